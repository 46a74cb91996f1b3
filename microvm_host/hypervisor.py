# SPDX-License-Identifier: MIT
"""Becomes the hypervisor, and asks it to stop.

Both run as the VM's user in the VM's state directory, by microvm@.service. Starting ends in
execve(2), so that the unit's main process is the hypervisor itself. Stopping is a ladder: the
package's own script, waiting for the main process whatever the script returned, and then systemd
with SIGTERM and SIGKILL. The only proof of a stop is that the main process has ended.
"""

from __future__ import annotations

import os
import select
import time
from _signal import SIGKILL  # `signal` wraps it in an enum, for 5 ms

from . import log
from .errors import MicrovmHostError, PackageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def become(program: str, package: str, hypervisor: str = "the hypervisor") -> NoReturn:
    """Replace this process by the package's `bin/microvm-run`.

    Args:
        program: the path of that script.
        package: the package's directory, for the unit's status.
        hypervisor: its name, if the package tells.

    Raises:
        PackageError: it cannot be run.
    """
    if not os.access(program, os.X_OK):
        raise PackageError(
            "cannot be executed by this user", path=program, hint="chmod -R a+rX the package"
        )
    # From here on systemd takes the VM for started. What comes next, execve, was checked.
    log.notify(f"READY=1\nSTATUS=Running {hypervisor} from {package}")
    try:
        os.execv(program, [program])
    except OSError as error:
        raise PackageError(
            f"cannot be executed: {error.strerror}",
            path=program,
            hint="its first line names an interpreter that this host lacks, perhaps",
        ) from error


# A guest that still boots misses the button: it is pressed again.
ASK_AGAIN_AFTER = 10.0  # seconds
SCRIPT_ENDS_WITHIN = 1.0  # seconds


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def stop(main_pid: int, script: str | None, patience: float) -> None:
    """Ask the guest to shut down and wait until the hypervisor has ended.

    Args:
        main_pid: of the hypervisor.
        script: the package's `bin/microvm-shutdown`, if it has one.
        patience: seconds to wait at most.

    Raises:
        MicrovmHostError: it runs on; systemd is to end it.
    """
    try:
        # Not the number, which may come to mean another process: pidfd_open(2).
        main = os.pidfd_open(main_pid)
    except ProcessLookupError:
        log.info("the hypervisor has ended by itself")
        return
    if script is None:
        os.close(main)
        log.notice("the package has no bin/microvm-shutdown: ending the hypervisor by SIGTERM")
        return
    clock = Clock()
    times = 0
    try:
        while not _ended(main, within=0):
            if clock.seconds >= patience:
                raise MicrovmHostError(
                    f"the guest did not shut down within {patience:.0f} s: ending the "
                    "hypervisor by force",
                    path=script,
                    hint="MICROVM_SHUTDOWN_SECONDS in a drop-in of the unit gives it longer",
                )
            times += 1
            _ask(script, main, clock, until=min(clock.seconds + ASK_AGAIN_AFTER, patience))
    finally:
        os.close(main)
    asked = "once" if times == 1 else f"{times} times"
    told = f"the guest shut down in {clock.seconds:.1f} s, its package's script asked {asked}"
    log.info(told)
    log.status(told)


def _ask(script: str, main: int, clock: Clock, *, until: float) -> None:
    """Run the script, and wait for the main process until the clock shows `until`."""
    with _Asked(script) as asked:
        while clock.seconds < until:
            log.status(f"Waiting for the guest to shut down, {clock.seconds:.0f} s")
            if _ended(main, within=min(1.0, max(until - clock.seconds, 0))):
                return
            asked.report(clock)


def _ended(main: int, *, within: float) -> bool:
    poll = select.poll()
    poll.register(main, select.POLLIN)
    return bool(poll.poll(within * 1000))


class _Asked:
    """The running shutdown script.

    Its standard input is held open: QEMU's waits on it for the guest, and would return at once at
    an end of file.
    """

    def __init__(self, script: str) -> None:
        self._script = script
        self._returned = False

    def __enter__(self) -> _Asked:
        stdin, self._stdin = os.pipe()
        try:
            self._pid = os.posix_spawn(
                self._script,
                [self._script],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)],
                setpgroup=0,
            )
        except OSError as error:
            os.close(self._stdin)
            raise MicrovmHostError(
                f"cannot be executed, so the guest cannot be asked: {error.strerror}; ending the "
                "hypervisor by force",
                path=self._script,
            ) from error
        finally:
            os.close(stdin)
        return self

    def report(self, clock: Clock) -> None:
        """Log it once when the script has returned, and believe nothing of it."""
        if self._returned:
            return
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid:
            self._returned = True
            code = os.waitstatus_to_exitcode(status)
            write = log.warning if code else log.info
            write(
                f"{self._script} returned {code} after {clock.seconds:.1f} s, and the guest "
                "still runs; waiting for it"
            )

    def __exit__(self, *_: object) -> None:
        """End the script, which is of no use any more: the guest has gone or is asked anew."""
        # At the end of their input most return, and let go of the hypervisor's only control
        # connection, which the next one needs.
        os.close(self._stdin)
        deadline = time.monotonic() + SCRIPT_ENDS_WITHIN
        while not self._returned and time.monotonic() < deadline:
            if os.waitpid(self._pid, os.WNOHANG)[0]:
                return
            time.sleep(0.01)
        if not self._returned:
            # The whole group, since scripts leave the talking to programs that they start.
            os.killpg(self._pid, SIGKILL)
            os.waitpid(self._pid, 0)
