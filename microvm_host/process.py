# SPDX-License-Identifier: MIT
"""Runs a program and takes its output, and calls what may never return, for the helpers.

`subprocess` costs more to import (11 ms) than most programs that they call take to run.
"""

from __future__ import annotations

import os

from .errors import MicrovmHostError, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


def output(argv: list[str], *, errors: bool = False) -> str:
    """Run a program, found in $PATH, and give its standard output.

    Its standard error goes where ours goes; or, with `errors`, into the output, which is told if
    it fails.

    Raises:
        MicrovmHostError: it is missing or did not exit with 0.
    """
    from _signal import SIGPIPE, SIGXFSZ

    # Programs of systemd's report to $NOTIFY_SOCKET if there is one: they are not the service.
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    reader, writer = os.pipe()
    try:
        try:
            actions = [(os.POSIX_SPAWN_DUP2, writer, fd) for fd in ((1, 2) if errors else (1,))]
            # Python ignores these signals, which the program would inherit.
            child = os.posix_spawnp(
                argv[0], argv, environment, file_actions=actions, setsigdef=(SIGPIPE, SIGXFSZ)
            )
        except OSError as error:
            raise MicrovmHostError(f"cannot run {argv[0]}: {error.strerror}") from error
        finally:
            os.close(writer)
        chunks = []
        while chunk := os.read(reader, 65536):
            chunks.append(chunk)
    finally:
        os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    text = b"".join(chunks).decode(errors="replace")
    if code:
        said = f": {one_line(text)}" if errors and text.strip() else ""
        raise MicrovmHostError(f"`{' '.join(argv)}` failed with {code}{said}")
    return text


def call_apart(
    call: Callable[[], object], patience: float, wait: Callable[[float], object]
) -> None:
    """Call something that may hang in the kernel in a process of its own, and wait for its end.

    Args:
        call: does its work by effects on the kernel alone; what it returns is lost.
        patience: seconds to wait. A process that takes longer is killed, which it notices only
            when the kernel lets it.
        wait: called about each second, with the seconds that have passed.

    Raises:
        OSError: as `call` raised it; ETIMEDOUT, if it took longer; ECHILD, if it raised anything
            else or was killed.
    """
    import select
    import time
    from _signal import SIGKILL
    from errno import ECHILD, ETIMEDOUT

    child = os.fork()
    if not child:
        code = ECHILD
        try:
            # It may outlive us, and is to hold no lock of ours.
            os.closerange(3, 1 << 16)
            call()
            code = 0
        except OSError as error:
            # The kernel has some beyond what an exit code holds.
            code = error.errno if error.errno and error.errno < 256 else ECHILD
        finally:
            # Whatever it was: nothing of the parent's is to run in here.
            os._exit(code)
    began = time.monotonic()
    ended = os.pidfd_open(child)
    try:
        poll = select.poll()
        poll.register(ended, select.POLLIN)
        while not poll.poll(min(1.0, patience) * 1000):
            wait(time.monotonic() - began)
            if time.monotonic() - began > patience:
                os.kill(child, SIGKILL)
                raise OSError(ETIMEDOUT, os.strerror(ETIMEDOUT))
    finally:
        os.close(ended)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        code = code if code > 0 else ECHILD
        raise OSError(code, os.strerror(code))
