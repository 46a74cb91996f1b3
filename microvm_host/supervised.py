# SPDX-License-Identifier: MIT
"""Runs a program for as long as somebody has to be its main process for it.

systemd stops a service that has not yet said READY=1 by SIGTERM to its main process, without
ExecStop=. A hypervisor takes that for a pulled plug. While its guest boots, the main process is
therefore one of ours, which can ask the guest instead, and the hypervisor runs below it.

    main process (ours) -> parent -> hypervisor

The one in between takes in how the hypervisor ends, since nobody but its parent is told. When it
is killed, the kernel gives the hypervisor to systemd (prctl(2), PR_SET_CHILD_SUBREAPER: the
nearest ancestor that reaps, which is process 1), and systemd may be told that this is its child,
and the main process from now on.
"""

from __future__ import annotations

import os
import select
from _signal import SIG_DFL, SIGKILL, SIGTERM, set_wakeup_fd, signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

_PID_SIZE = 4  # bytes; so has a status of wait(2)


class AskedToStop:
    """Takes SIGTERM to this process for a question; true when it has come."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        # Python writes there in its handler, which has nothing else to do.
        set_wakeup_fd(self._writer)
        signal(SIGTERM, lambda *_: None)

    def fileno(self) -> int:
        """Readable when it has come."""
        return self._reader

    def __bool__(self) -> bool:
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        return bool(poll.poll(0))


class Supervised:
    """A running program.

    Attributes:
        pid: its process.
    """

    def __init__(self, become: Callable[[], NoReturn]) -> None:
        """
        Args:
            become: replaces the calling process by the program. If it returns or raises, that
                process ends with 1 and without a word.
        """
        number, tell_number = os.pipe()
        self._status, tell_status = os.pipe()
        go_on, let_go_on = os.pipe()
        self._parent = os.fork()
        if not self._parent:
            os.close(let_go_on)
            _be_parent(become, tell_number, go_on, tell_status)
        for fd in (tell_number, tell_status, go_on):
            os.close(fd)
        self.pid = int.from_bytes(os.read(number, _PID_SIZE), "little")
        os.close(number)
        # Until here nobody has waited for it, so that the number is still its own.
        self._fd = os.pidfd_open(self.pid)
        os.close(let_go_on)

    def fileno(self) -> int:
        """Readable when the program has ended."""
        return self._fd

    def release(self) -> None:
        """Give it to systemd."""
        os.kill(self._parent, SIGKILL)
        os.waitpid(self._parent, 0)

    def end_alike(self) -> NoReturn:
        """End this process as the program ended, which has."""
        status = os.read(self._status, _PID_SIZE)
        # Without one, who was to tell was killed.
        code = os.waitstatus_to_exitcode(int.from_bytes(status, "little")) if status else 1
        if code >= 0:
            os._exit(code)
        from resource import RLIMIT_CORE, setrlimit

        # Of the program there is a core dump already, if any was wanted. The 1 is heeded where
        # core dumps are piped to a program as well (core(5)).
        setrlimit(RLIMIT_CORE, (1, 1))
        if -code != SIGKILL:
            signal(-code, SIG_DFL)
        os.kill(os.getpid(), -code)
        # One that does not end a process did not end the other.
        os._exit(1)


def _be_parent(
    become: Callable[[], NoReturn], tell_number: int, go_on: int, tell_status: int
) -> NoReturn:
    """Be the program's parent; never returns, whatever happens."""
    code = 1
    try:
        set_wakeup_fd(-1)
        signal(SIGTERM, SIG_DFL)
        child = os.fork()
        if not child:
            become()
        os.write(tell_number, child.to_bytes(_PID_SIZE, "little"))
        os.read(go_on, 1)
        status = os.waitpid(child, 0)[1]
        os.write(tell_status, status.to_bytes(_PID_SIZE, "little"))
        code = 0
    finally:
        os._exit(code)
