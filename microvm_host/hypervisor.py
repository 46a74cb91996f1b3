# SPDX-License-Identifier: MIT
"""Becomes the hypervisor, and asks it to stop.

Both run as the VM's user in the VM's state directory, by microvm@.service. Starting ends in
execve(2), so that the unit's main process is the hypervisor itself. Stopping is a ladder: the
package's own script, the hypervisor's power button where its control socket is known, SIGTERM,
SIGKILL. Whatever these return, the main process is waited for: that it has ended is the only proof
of a stop. Each rung is logged with its time, and the last line says which it was.
"""

from __future__ import annotations

import os
import select
import time

# `signal` makes enums of these, for 5 ms.
from _signal import (
    SIG_DFL,
    SIG_IGN,
    SIGKILL,
    SIGPIPE,
    SIGRTMIN,
    SIGTERM,
    SIGXFSZ,
    pidfd_send_signal,
    signal,
)

from . import log, timespan
from .errors import MicrovmHostError, NoGuest, PackageError
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import NoReturn, Protocol

    from .control import Pressed

    class Asking(Protocol):
        """A guest that was asked, and what asked it."""

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None:
            """Let go of it: the guest has gone, or is asked anew."""

        def report(self, clock: Clock) -> None:
            """Log what there is to say while it is waited for."""

        def heard(self) -> str | None:
            """How the guest ended, if the hypervisor has said so: one of control's words."""

    class Way(Protocol):
        """A way to ask the guest."""

        name: str
        # Whether one that failed is worth another try.
        may_work_later: bool

        def ask(self, _within: float) -> Asking:
            """Ask. Raises MicrovmHostError if that cannot be done, within so many seconds.

            NoGuest if there is nobody to ask.
            """


# Python ignores these, and who is executed by it would inherit that.
IGNORED_BY_PYTHON = (SIGPIPE, SIGXFSZ)
# What `machinectl poweroff` and its like send to the main process (systemd(1), "Signals"), by
# default the end of it. No hypervisor knows them, so that the guest would lose its power.
_FOR_SYSTEMD = tuple(SIGRTMIN + number for number in (*range(3, 8), *range(13, 18)))


def _why_not_executable(program: str) -> str:
    """What makes a program executable for this user."""
    try:
        is_noexec = os.statvfs(program).f_flag & os.ST_NOEXEC
    except OSError:
        is_noexec = False
    if is_noexec:
        return "its file system is mounted with noexec: mount it with exec, or move the package"
    return "chmod -R a+rX the package"


def become(program: str, running: str | None) -> NoReturn:
    """Replace this process by the package's `bin/microvm-run`.

    Args:
        program: the path of that script.
        running: the unit's status from now on; None if somebody else tells systemd that it is
            started.

    Raises:
        PackageError: it cannot be run.
    """
    if not os.access(program, os.X_OK):
        raise PackageError(
            "cannot be executed by this user", path=program, hint=_why_not_executable(program)
        )
    # From here on systemd takes the VM for started. What comes next, execve, was checked.
    if running is not None:
        log.notify(f"READY=1\n{log.status_assignment(running)}")
    # Some packages would pass on what their guest says there, as it is. Not taken away, but
    # emptied: a script that minds unset variables minds that it is gone.
    if "NOTIFY_SOCKET" in os.environ:
        os.environ["NOTIFY_SOCKET"] = ""
    for number in IGNORED_BY_PYTHON:
        signal(number, SIG_DFL)
    for number in _FOR_SYSTEMD:
        signal(number, SIG_IGN)
    try:
        os.execv(program, [program])
    except OSError as error:
        raise PackageError(
            f"cannot be executed: {error.strerror}",
            path=program,
            hint="its first line names an interpreter that this host lacks, perhaps",
        ) from error


SCRIPT_ENDS_WITHIN = 1.0  # seconds
# How long the hypervisor may take to answer on its control socket; it does so within milliseconds.
BUTTON_WITHIN = 5.0  # seconds
WAKES_WITHIN = 1.0  # seconds
# A guest that still boots misses the request, and one without a keyboard Ctrl-Alt-Del.
ASKS_AGAIN_AFTER = 10.0  # seconds
# The same for the first time while the guest boots, as it may for so long after its start. Doubled
# each time: a script that takes long to ask must come to its end as well.
ASKS_AGAIN_SOON_AFTER = 1.0  # seconds
BOOTS_WITHIN = 60.0  # seconds


@frozen
class Times:
    """How long the steps of a stop take, in seconds: timespan.Parts, and what is between them."""

    guest: float = timespan.Parts.guest
    ask_again: float = ASKS_AGAIN_AFTER
    terminate: float = timespan.Parts.terminate
    kill: float = timespan.Parts.kill
    # After the first request, instead of `ask_again`; doubled until it is that. 0 for the same.
    ask_first: float = 0.0


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start


def stop(main_pid: int, ways: Sequence[Way], times: Times) -> None:
    """Ask the guest to shut down, wait until the hypervisor has ended, and end it if need be.

    Args:
        main_pid: of the hypervisor.
        ways: how the guest can be asked, in the order in which to try them.

    Raises:
        MicrovmHostError: the guest did not shut down, and was ended by force.
    """
    try:
        # Not the number, which may come to mean another process: pidfd_open(2).
        main = os.pidfd_open(main_pid)
    except ProcessLookupError:
        log.info("the hypervisor has ended by itself")
        return
    clock = Clock()
    try:
        reason = nobody = ""
        try:
            if ways:
                reason = _ask_until_ended(main, list(ways), times, clock)
            else:
                nobody = "the package has neither bin/microvm-shutdown nor a control socket"
        except NoGuest as error:
            nobody = error.message
        if nobody:
            log.notice(f"{nobody}: ending the hypervisor by SIGTERM")
            if _signalled(main, SIGTERM, times.terminate):
                told = (
                    f"the hypervisor ended by SIGTERM in {clock.seconds:.1f} s, the guest could "
                    "not be asked"
                )
                log.info(told)
                log.status(told)
                return
            reason = f"the hypervisor does not end within {_for_people(times.terminate)} s"
        elif not reason:
            return
        else:
            log.error(f"at {clock.seconds:.1f} s: {reason}: sending SIGTERM to the hypervisor")
            if _signalled(main, SIGTERM, times.terminate):
                raise MicrovmHostError(
                    f"the hypervisor ended by SIGTERM after {clock.seconds:.1f} s, the guest was "
                    "not shut down",
                    hint="shutdown_timeout in its declaration, or TimeoutStopSec= in a drop-in of "
                    "the unit, gives it longer",
                )
        log.error(f"at {clock.seconds:.1f} s: {reason}: sending SIGKILL to the hypervisor")
        if _signalled(main, SIGKILL, times.kill):
            raise MicrovmHostError(
                f"the hypervisor was killed after {clock.seconds:.1f} s, the guest was not shut "
                "down"
            )
        raise MicrovmHostError(
            f"the hypervisor, process {main_pid}, has not even ended by SIGKILL: it hangs in the "
            "kernel",
            hint="the kernel's log may say on which device",
        )
    finally:
        os.close(main)


def _for_people(seconds: float) -> str:
    """What was given, not what was left of it when the helper had started."""
    return f"{seconds:.0f}" if seconds > 1 else f"{seconds:.1g}"


def _ask_until_ended(main: int, ways: list[Way], times: Times, clock: Clock) -> str:
    """Ask in each way in turn; gives why the guest has not shut down, nothing if it has.

    Raises:
        NoGuest: there is none.
    """
    asked: list[str] = []
    said: set[str] = set()
    turn = 0
    patience = times.ask_first or times.ask_again
    heard = None
    while not _ended(main, within=0):
        if clock.seconds >= times.guest:
            return f"the guest did not shut down within {_for_people(times.guest)} s"
        way = ways[turn % len(ways)]
        until = min(clock.seconds + patience, times.guest)
        log.status(f"Asking the guest to shut down by {way.name}, {clock.seconds:.0f} s")
        try:
            asking = way.ask(min(BUTTON_WITHIN, until - clock.seconds))
        except NoGuest:
            raise
        except MicrovmHostError as error:
            if str(error) not in said:
                said.add(str(error))
                log.warning(f"at {clock.seconds:.1f} s: {error}")
            if not way.may_work_later:
                ways.remove(way)
                if not ways:
                    return "the guest cannot be asked"
            elif len(ways) == 1 or turn % len(ways) == len(ways) - 1:
                # Once round. A hypervisor that has just begun does not listen yet.
                _ended(main, within=min(1.0, max(times.guest - clock.seconds, 0)))
                turn += 1
            else:
                turn += 1
            continue
        turn += 1
        patience = min(patience * 2, times.ask_again)
        asked.append(way.name)
        log.info(f"at {clock.seconds:.1f} s: asked the guest to shut down by {way.name}")
        with asking:
            while clock.seconds < until:
                log.status(_waiting(way.name, times.guest, clock))
                if _ended(main, within=min(1.0, max(until - clock.seconds, 0))):
                    break
                asking.report(clock)
            heard = asking.heard() or heard
    if not asked:
        log.info(f"the hypervisor ended in {clock.seconds:.1f} s, before it could be asked")
        return ""
    by = f"asked once, by {asked[0]}"
    if len(asked) > 1:
        by = f"asked {len(asked)} times, at last by {asked[-1]}"
    how = f"{_HEARD[heard]} " if heard else "the guest shut down "
    told = f"{how}in {clock.seconds:.1f} s, {by}"
    log.info(told)
    log.status(told)
    return ""


# control's words. Ctrl-Alt-Del makes most guests reboot, which ends the hypervisor as well.
_HEARD = {
    "powered-off": "the guest powered off",
    "rebooted": "the guest shut down to reboot",
    "panicked": "the guest's kernel panicked",
}


def _waiting(way: str, guest: float, clock: Clock) -> str:
    limit = "" if guest == timespan.INFINITE else f" of {timespan.describe(guest)}"
    return f"Waiting for the guest to shut down, asked by {way}, {clock.seconds:.0f} s{limit}"


def _signalled(main: int, number: int, within: float) -> bool:
    """Send a signal; whether the hypervisor has ended within that many seconds.

    Raises:
        MicrovmHostError: it runs as somebody else; systemd is to end it.
    """
    try:
        pidfd_send_signal(main, number)
    except ProcessLookupError:
        return True
    except PermissionError as error:
        raise MicrovmHostError(
            "the hypervisor runs as another user than its unit: leaving it to systemd"
        ) from error
    clock = Clock()
    while clock.seconds < within:
        log.status(f"Ending the hypervisor by force, {clock.seconds:.0f} s")
        if _ended(main, within=min(1.0, max(within - clock.seconds, 0))):
            return True
    return False


def _ended(main: int, *, within: float) -> bool:
    poll = select.poll()
    poll.register(main, select.POLLIN)
    return bool(poll.poll(within * 1000))


class Script:
    """The package's `bin/microvm-shutdown`, by its path."""

    name = "its package's script"
    may_work_later = False

    def __init__(self, path: str, button: Button | None = None) -> None:
        self._path = path
        self._button = button

    def ask(self, within: float) -> Asking:
        # Before the script, which may take QEMU's only connection.
        if self._button is not None:
            self._button.wake(min(WAKES_WITHIN, within))
        return _RunningScript(self._path)


class Button:
    """The hypervisor's own power button, behind its control socket."""

    may_work_later = True

    def __init__(self, protocol: str, path: str) -> None:
        self.name = f"the power button ({protocol})"
        self._protocol = protocol
        self._path = path

    def ask(self, within: float) -> Asking:
        # Most guests have gone by their script before this is needed.
        from . import control

        if self._protocol != "qmp":
            within /= 2
            self.wake(within)
        pressed = control.press(self._protocol, self._path, within)
        if pressed.remark:
            log.warning(pressed.remark)
        return _PressedButton(pressed)

    def wake(self, within: float) -> None:
        """Resume the guest if it is paused: it could not react to anything."""
        from . import control

        try:
            remark = control.wake(self._protocol, self._path, within)
        except NoGuest:
            raise
        except MicrovmHostError:
            # Who asks the guest next says what is wrong.
            return
        if remark:
            log.warning(remark)


class _PressedButton:
    """The connection is held, since by it QEMU says what became of the guest."""

    def __init__(self, pressed: Pressed) -> None:
        self._pressed = pressed

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        # Before the next round: QEMU has one client at a time, and the script is one, too.
        self._pressed.close()

    def report(self, clock: Clock) -> None:
        pass

    def heard(self) -> str | None:
        return self._pressed.heard()


class _RunningScript:
    """The running shutdown script.

    Its standard input is held open: QEMU's waits on it for the guest, and would return at once at
    an end of file.
    """

    def __init__(self, script: str) -> None:
        self._script = script
        self._returned = False
        stdin, self._stdin = os.pipe()
        try:
            self._pid = os.posix_spawn(
                self._script,
                [self._script],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0)],
                setpgroup=0,
                setsigdef=IGNORED_BY_PYTHON,
            )
        except OSError as error:
            os.close(self._stdin)
            raise MicrovmHostError(
                f"cannot be executed, so that it cannot ask the guest: {error.strerror}",
                path=self._script,
            ) from error
        finally:
            os.close(stdin)

    def __enter__(self) -> None:
        pass

    def heard(self) -> str | None:
        return None

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
