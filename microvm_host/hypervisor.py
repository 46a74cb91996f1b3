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

from . import log
from .errors import MicrovmHostError, PackageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn


def become(program: str, package: str, hypervisor: str | None) -> NoReturn:
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
    log.notify(f"READY=1\nSTATUS=Running {hypervisor or 'the hypervisor'} from {package}")
    try:
        os.execv(program, [program])
    except OSError as error:
        raise PackageError(
            f"cannot be executed: {error.strerror}",
            path=program,
            hint="its first line names an interpreter that this host lacks, perhaps",
        ) from error


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
    try:
        with _Asked(script) as asked:
            while not _ended(main, within=1.0):
                asked.report(clock)
                if clock.seconds >= patience:
                    raise MicrovmHostError(
                        f"the guest did not shut down within {patience:.0f} s: ending the "
                        "hypervisor by force",
                        path=script,
                        hint="MICROVM_SHUTDOWN_SECONDS in a drop-in of the unit gives it longer",
                    )
                log.status(f"Waiting for the guest to shut down, {clock.seconds:.0f} s")
    finally:
        os.close(main)
    log.info(f"the guest shut down in {clock.seconds:.1f} s, asked by its package's script")


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
            )
        except OSError as error:
            # The rungs after this one are still there: wait for none of it.
            log.error(f"{self._script}: cannot be executed: {error.strerror}")
            self._returned = True
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
        os.close(self._stdin)
        # What still runs of the script ends with it, or with the unit's control group.
