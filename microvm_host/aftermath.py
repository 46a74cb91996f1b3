# SPDX-License-Identifier: MIT
"""What became of a VM, and whether it is worth another start.

Runs as root when a hypervisor has ended (ExecStopPost= of microvm@.service), and tells in the
journal whether the guest powered off, rebooted or crashed, as far as the hypervisor says so.
Whether systemd starts it again is Restart= of the unit; when, and how often in a row, is decided
here. systemd cannot: its start limit counts an administrator's starts as well, its restart counter
stays at zero since our set-up units are restarted with the VM, and delays that grow are not in
systemd 252.

Each end that nobody asked for, soon after the start, is a line in the record `ends`. The next start
waits for its turn, longer each time, and after too many of them there is none. A stop that was
asked for, or a run that was long enough, clears the record: an administrator never waits.

Where it is not the VM that failed, but what was to be set up for its start anew, Restart= does
nothing more, and `start_again` goes on in its place (microvm-again@.service).
"""

from __future__ import annotations

import os
import time

from . import control, log, names, process, service
from .errors import EXIT_CONFIG, EXIT_USAGE, MicrovmHostError, one_line
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .record import Record

# Seconds before the first start anew, as on NixOS; doubled for each further one in a row.
FIRST_DELAY = 5.0
LONGEST_DELAY = 300.0
# So often a VM is started again in a row; 0 is for ever.
LIMIT = 10
# Seconds of running after which an end is not held against a VM. A guest that does one job and
# powers off is no guest that keeps dying, so that it needs less.
LONG_ENOUGH = 60.0
LONG_ENOUGH_TO_FAIL = 600.0

# Exit statuses that say more than that it failed. crosvm: CommandStatus in src/main.rs.
# firecracker: FcExitCode in src/vmm/src/lib.rs.
_STATUSES = {
    ("crosvm", 0): control.POWERED_OFF,
    ("crosvm", 32): control.REBOOTED,
    ("crosvm", 33): "crashed",
    ("crosvm", 34): control.PANICKED,
    ("crosvm", 36): "stalled",
    ("firecracker", 148): "filtered",
    ("firecracker", 152): "misconfigured",
    ("firecracker", 153): "misconfigured",
}
_WORDS = {
    control.POWERED_OFF: "the guest powered itself off",
    control.REBOOTED: "the guest rebooted",
    control.PANICKED: "the guest's kernel panicked",
    "crashed": "the guest crashed",
    "stalled": "the guest stalled, and its watchdog ended it",
    "filtered": "the hypervisor made a system call that its own filter forbids",
    "misconfigured": "the hypervisor does not understand its configuration",
}
_FAILURES = (control.PANICKED, "crashed", "stalled", "filtered", "misconfigured")


@frozen
class End:
    """How the main process ended, in systemd's words (systemd.exec(5), $SERVICE_RESULT)."""

    result: str
    code: str
    status: str
    hypervisor: str = "the hypervisor"

    @classmethod
    def from_environment(cls, hypervisor: str = "the hypervisor") -> End:
        get = os.environ.get
        return cls(
            get("SERVICE_RESULT", ""), get("EXIT_CODE", ""), get("EXIT_STATUS", ""), hypervisor
        )

    @property
    def is_clean(self) -> bool:
        return (self.code, self.status) == ("exited", "0")

    def kind(self, said: str | None) -> str | None:
        """What the guest did, by the hypervisor's words or exit status; None if it does not say."""
        if self.code != "exited" or not names.is_number(self.status):
            return None
        return (said if self.is_clean else None) or _STATUSES.get(
            (self.hypervisor, int(self.status))
        )

    def describe(self, said: str | None) -> str:
        kind = self.kind(said)
        if kind is not None:
            return _WORDS[kind]
        if self.is_clean:
            return (
                f"the guest powered off or rebooted by itself, {self.hypervisor} does not say which"
            )
        if self.result == "oom-kill":
            return "the host ran out of memory, and the kernel killed the hypervisor"
        if self.code == "exited":
            return f"{self.hypervisor} failed with exit status {self.status}"
        if self.code == "killed" and self.status in ("KILL", "TERM", "INT", "HUP"):
            return f"somebody ended {self.hypervisor} by SIG{self.status}"
        if self.code in ("killed", "dumped"):
            return f"{self.hypervisor} crashed with SIG{self.status}"
        return f"{self.hypervisor} did not come up: {self.result}"


def take_note(name: str, end: End, said: str | None, limit: int, ends: Record) -> int:
    """Log how a VM ended, and decide on its next start.

    Args:
        said: what the hypervisor's event log has on it, in control's words.
        limit: so often it is started again in a row; 0 for ever.
        ends: the record of ends that count.

    Returns:
        The exit code: 1 makes systemd take an end for a failure that it took for a success.

    Raises:
        MicrovmHostError: it is given up.
    """
    if _was_asked_for(name):
        if end.result == "timeout":
            log.error("systemd had to end the hypervisor: the guest was not shut down", vm=name)
        ends.clear()
        return 0
    restart, active, started, exited = service.properties(
        name,
        ("Service", "Restart"),
        ("Unit", "ActiveEnterTimestampMonotonic"),
        ("Service", "ExecMainStartTimestampMonotonic"),
        ("Service", "ExecMainExitTimestampMonotonic"),
    )
    kind, what = end.kind(said), end.describe(said)
    is_failure = end.result != "success" or kind in _FAILURES
    # Where only failures lead to a new start, a reboot is to be one, or the guest stays down.
    is_wish = kind == control.REBOOTED and restart == "on-failure"
    code = 1 if (is_failure or is_wish) and end.result == "success" else 0
    if not _starts_again(restart, end, is_failure=is_failure or is_wish):
        ends.clear()
        # Of a package that is wrong the helper that found it out has told.
        if not _is_wrong_package(end):
            (log.warning if is_failure else log.info)(f"{what}; it stays down", vm=name)
        return 1 if is_failure and end.result == "success" else 0
    ran = _ran(active, started, exited)
    if ran > (LONG_ENOUGH_TO_FAIL if is_failure else LONG_ENOUGH):
        ends.clear()
    ends.append("end", f"{time.clock_gettime(time.CLOCK_BOOTTIME):.3f}", what)
    count = len(ends.read())
    if limit and count > limit:
        ends.clear()
        # systemd has already decided to start it again; a stop is what changes its mind.
        process.output(["systemctl", "stop", "--no-block", "--", names.unit(name)])
        raise _given_up(name, f"{what} after {ran:.0f} s", limit)
    (log.warning if is_failure else log.info)(
        f"{what} after {ran:.0f} s; {_started_again(count)}", vm=name
    )
    return code


def _given_up(name: str, what: str, limit: int) -> MicrovmHostError:
    return MicrovmHostError(
        f"{what}; started again {limit} times in a row, it is given up",
        hint=f"when it is mended: systemctl start {names.unit(name)}",
    )


def _started_again(count: int) -> str:
    return "it is started again" + (f", {count} times in a row now" if count > 1 else "")


def _is_wrong_package(end: End) -> bool:
    return (end.code, end.status) == ("exited", str(EXIT_CONFIG))


def _starts_again(restart: str, end: End, *, is_failure: bool) -> bool:
    """Whether systemd will start the VM again, by Restart= (systemd.service(5), Table 2)."""
    if _is_wrong_package(end):
        return False
    if restart == "always":
        return True
    if restart == "on-success":
        return not is_failure
    # The rest differ in which failures count; one that does not makes a record that the next
    # stop clears.
    return restart != "no" and is_failure


def _ran(active: int, started: int, exited: int) -> float:
    """How many seconds the VM ran, from when it counted as started; 0 if it never did.

    Args:
        active: when the unit was active last, in microseconds; 0 for what never was.
        started: when its main process began.
        exited: when that ended.
    """
    if active < started:
        # That was a former run.
        return 0.0
    return max(exited - active, 0) / 1e6


def _was_asked_for(name: str) -> bool:
    """Whether a VM has ended because somebody wanted it to."""
    match service.pending_job(name):
        case ("stop" | "restart" | "try-restart", _):
            return True
        case ("start", "waiting"):
            # It has come during the stop and taken that job's place. A start that is what failed
            # just now is running still.
            return True
    return False


def wait_for_turn(ends: Record, first_delay: float) -> None:
    """Wait until a VM that ended by itself may be started again; runs in its new main process.

    There, and not in RestartSec=, which does not grow: while it waits, the unit says why, and an
    administrator's stop or restart ends the waiting at once.
    """
    lines = ends.read()
    if not lines:
        return
    delay = min(first_delay * 2 ** min(len(lines) - 1, 32), max(LONGEST_DELAY, first_delay))
    match lines[-1]:
        case ["end", at, what] if names.is_number(at.replace(".", "", 1)):
            # Not what is yet to come, or it would be waited for as well.
            _wait_until(min(float(at), time.clock_gettime(time.CLOCK_BOOTTIME)) + delay, what)
        case strange:
            log.warning(str(ends.strange(strange)))


def _wait_until(until: float, what: str) -> None:
    """Wait, saying so in the unit's status.

    Args:
        until: by CLOCK_BOOTTIME.
        what: what it is started again after.
    """
    while (rest := until - time.clock_gettime(time.CLOCK_BOOTTIME)) > 0:
        status = log.status_assignment(f"Starts again in {rest:.0f} s, since {what}")
        log.notify(f"{status}\nEXTEND_TIMEOUT_USEC={(min(rest, 1) + 20) * 1e6:.0f}")
        time.sleep(min(rest, 1))


def forget_unless_it_goes_on(name: str, ends: Record) -> None:
    """Clear the record when a VM is undone that is not about to be started again."""
    # In this order: that one ends by giving the VM a job. It has been queued before the undoing.
    if not service.is_busy(names.again_unit(name)) and not service.pending_job(name):
        ends.clear()


def start_again(name: str, ends: Record, limit: int, first_delay: float) -> None:
    """Start a VM anew whose setting up failed in an automatic restart, when it is its turn.

    That counts as an end of the VM. It is none of our business where the VM has a job or runs: then
    what failed was the undoing for a start that goes on, or somebody else has started it.

    Args:
        ends: the record of ends that count, which is there only while such a restart goes on.
        limit: so often it is started again in a row; 0 for ever.
        first_delay: seconds, as for wait_for_turn.

    Raises:
        MicrovmHostError: systemd does not answer, or refuses the start.
    """
    restart, active, (job, _) = service.properties(
        name, ("Service", "Restart"), ("Unit", "ActiveState"), ("Unit", "Job")
    )
    if job or active not in ("inactive", "failed"):
        return
    (undone,) = service.unit_properties(
        names.undo_unit(name), ("Unit", "InactiveExitTimestampMonotonic")
    )
    (begun,) = service.unit_properties(
        names.set_up_units(name)[0], ("Unit", "InactiveExitTimestampMonotonic")
    )
    if undone < begun:
        # The last start did not fail: somebody has stopped the VM, which ended what set it up.
        ends.clear()
        return
    lines = ends.read()
    before, failed_at = _when(lines), _by_boot_time(undone)
    # Otherwise one of us was killed that had noted it already.
    if failed_at > before + _SAME:
        failed = _failed_set_up(name, before, failed_at)
        what = failed.describe() if failed else "what it needs did not come up"
        is_wrong = failed is not None and failed.status in (EXIT_CONFIG, EXIT_USAGE)
        if is_wrong or not _starts_again(restart, End("dependency", "", ""), is_failure=True):
            ends.clear()
            log.warning(f"{what}; it stays down", vm=name)
            return
        if limit and len(lines) + 1 > limit:
            ends.clear()
            error = str(_given_up(name, what, limit))
            # Not by failing, which would start this again.
            log.status(error)
            return log.error(error, vm=name)
        log.warning(f"{what}; {_started_again(len(lines) + 1)}", vm=name)
        try:
            ends.append("end", f"{failed_at:.3f}", what)
        except MicrovmHostError as error:
            # What there is no space for is often what has failed before.
            log.warning(f"not counted: {error}", vm=name)
            _wait_until(time.clock_gettime(time.CLOCK_BOOTTIME) + first_delay, what)
    wait_for_turn(ends, first_delay)
    while any(service.is_busy(unit) for unit in names.set_up_units(name)):
        # Of the undoing.
        time.sleep(0.05)
    # Where a stop is pending by now, that is not to be taken back.
    argv = ["systemctl", "start", "--no-block", "--job-mode=fail", "--", names.unit(name)]
    process.output(argv)


# Seconds between two readings of the clocks for one and the same end; two ends are further apart.
_SAME = 0.005


@frozen
class _Failed:
    """A set-up unit that has failed; `status` is that of its exit, None if it did not exit."""

    unit: str
    status: int | None
    how: str

    def describe(self) -> str:
        return f"{self.unit} failed: {self.how}"


def _when(lines: list[list[str]]) -> float:
    """When the last end was, by CLOCK_BOOTTIME; 0 without one, as where there was no space."""
    match lines:
        case [*_, ["end", at, _]] if names.is_number(at.replace(".", "", 1)):
            return float(at)
    return 0.0


def _by_boot_time(microseconds: int) -> float:
    """A time of systemd's, which does not count while the host is suspended, in ours."""
    boot, monotonic = map(time.clock_gettime, (time.CLOCK_BOOTTIME, time.CLOCK_MONOTONIC))
    return microseconds / 1e6 + boot - monotonic


def _failed_set_up(name: str, after: float, until: float) -> _Failed | None:
    """The set-up unit for whose failure the others were undone.

    Args:
        after: not those of former starts; by CLOCK_BOOTTIME, as all times here.
        until: when that began; what was ended by it has failed later.
    """
    latest, found = after, None
    for unit in names.set_up_units(name):
        state, entered, result, code, status, said = service.unit_properties(
            unit,
            ("Unit", "ActiveState"),
            ("Unit", "InactiveEnterTimestampMonotonic"),
            ("Service", "Result"),
            ("Service", "ExecMainCode"),
            ("Service", "ExecMainStatus"),
            ("Service", "StatusText"),
        )
        at = _by_boot_time(entered)
        if state != "failed" or not latest <= at <= until + _SAME:
            continue
        latest = at
        if code != os.CLD_EXITED:
            by = f" by signal {status}" if code else ""
            found = _Failed(unit, None, f"{result}{by}")
        elif said:
            # The helper says in its status what was wrong.
            found = _Failed(unit, status, one_line(said))
        else:
            found = _Failed(unit, status, f"exit status {status}")
    return found


def forget_if_told_to(name: str, ends: Record) -> None:
    """Clear the record when the waiting for a start was ended by somebody."""
    match service.unit_job(names.again_unit(name)):
        case ("start", _):
            # By undoing another start that has failed meanwhile, which is told of next.
            return
        case None:
            told = (os.environ.get("EXIT_CODE"), os.environ.get("EXIT_STATUS"))
            if told != ("killed", "TERM"):
                # It has come to its own end, or was killed and is started anew.
                return
    ends.clear()
