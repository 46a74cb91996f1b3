# SPDX-License-Identifier: MIT
"""What is said of an end, when there is another start, and when there is none.

systemd is a made-up one here: tests/system/test_ladder.py has the real one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from microvm_host import aftermath, log, process, service
from microvm_host.aftermath import End
from microvm_host.errors import MicrovmHostError
from microvm_host.record import Record

CLEAN = End("success", "exited", "0", "qemu")
FAILED = End("exit-code", "exited", "3", "qemu")


class FakeSystemd:
    """Tells of the VM's service, and of whether it runs; keeps what else it is told."""

    def __init__(self) -> None:
        self.job = ""
        self.restart = "always"
        self.ran = 0.5
        self.became_active = True
        self.active = "active"
        self.told: list[list[str]] = []
        self.job_again = ""
        self.busy: set[str] = set()
        # Properties of other units.
        self.others: dict[str, dict[str, str | int]] = {}

    def output(self, argv: list[str]) -> str:
        self.told.append(argv)
        return ""

    def pending_job(self, name: str) -> tuple[str, ...] | None:
        assert name == "web"
        return tuple(self.job.split()) or None

    def unit_job(self, unit: str) -> tuple[str, ...] | None:
        assert unit == "microvm-again@web.service"
        return tuple(self.job_again.split()) or None

    def is_busy(self, unit: str) -> bool:
        return unit in self.busy

    def unit_properties(self, unit: str, *wanted: tuple[str, str]) -> list[str | int]:
        nothing: dict[str, str | int] = {"ActiveState": "inactive"}
        return [self.others.get(unit, nothing).get(each, 0) for _, each in wanted]

    def properties(self, name: str, *wanted: tuple[str, str]) -> list[object]:
        assert name == "web"
        found: dict[str, object] = {
            "ActiveState": self.active,
            "Job": (7, "/job") if self.job else (0, "/"),
            "Restart": self.restart,
            "ActiveEnterTimestampMonotonic": 2_000_000 if self.became_active else 900_000,
            "ExecMainStartTimestampMonotonic": 1_000_000,
            "ExecMainExitTimestampMonotonic": 2_000_000 + int(self.ran * 1e6),
        }
        return [found[each] for _, each in wanted]


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> FakeSystemd:
    fake = FakeSystemd()
    monkeypatch.setattr(process, "output", fake.output)
    monkeypatch.setattr(service, "pending_job", fake.pending_job)
    for each in ("properties", "unit_properties", "unit_job", "is_busy"):
        monkeypatch.setattr(service, each, getattr(fake, each))
    return fake


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for word in ("info", "warning", "error"):
        monkeypatch.setattr(
            log, word, lambda text, vm=None, word=word: lines.append(f"{word}: {text}")
        )
    monkeypatch.setattr(log, "notify", lines.append)
    return lines


@pytest.fixture
def ends(tmp_path: Path) -> Record:
    return Record(str(tmp_path / "web/ends"))


Note = Callable[..., int]


@pytest.fixture
def note(systemd: FakeSystemd, said: list[str], ends: Record) -> Note:
    def take(end: End, heard: str | None = None, limit: int = 10) -> int:
        return aftermath.take_note("web", end, heard, limit, ends)

    return take


@pytest.mark.parametrize(
    ("end", "heard", "text"),
    [
        (CLEAN, None, "the guest powered off or rebooted by itself, qemu does not say which"),
        (CLEAN, "powered-off", "the guest powered itself off"),
        (CLEAN, "rebooted", "the guest rebooted"),
        (CLEAN, "panicked", "the guest's kernel panicked"),
        (FAILED, None, "qemu failed with exit status 3"),
        # An event log of a run that came to nothing may be of the one before.
        (FAILED, "powered-off", "qemu failed with exit status 3"),
        (End("signal", "killed", "KILL", "qemu"), None, "somebody ended qemu by SIGKILL"),
        (End("success", "killed", "TERM", "qemu"), None, "somebody ended qemu by SIGTERM"),
        (End("core-dump", "dumped", "SEGV", "qemu"), None, "qemu crashed with SIGSEGV"),
        (End("oom-kill", "killed", "KILL"), None, "the host ran out of memory, and the kernel"),
        (End("timeout", "", ""), None, "the hypervisor did not come up: timeout"),
        (End("success", "exited", "0", "crosvm"), None, "the guest powered itself off"),
        (End("exit-code", "exited", "32", "crosvm"), None, "the guest rebooted"),
        (End("exit-code", "exited", "33", "crosvm"), None, "the guest crashed"),
        (End("exit-code", "exited", "34", "crosvm"), None, "the guest's kernel panicked"),
        (End("exit-code", "exited", "36", "crosvm"), None, "the guest stalled"),
        (End("exit-code", "exited", "32", "qemu"), None, "qemu failed with exit status 32"),
        (End("exit-code", "exited", "148", "firecracker"), None, "the hypervisor made a system c"),
    ],
)
def test_words(end: End, heard: str | None, text: str) -> None:
    assert end.describe(heard).startswith(text)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (("SERVICE_RESULT", "signal"), ("EXIT_CODE", "killed")):
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("EXIT_STATUS", raising=False)
    assert End.from_environment("qemu") == End("signal", "killed", "", "qemu")


@pytest.mark.parametrize(
    "job",
    # The last one: a start that came during the stop.
    ["stop running", "restart running", "try-restart running", "stop waiting", "start waiting"],
)
def test_a_stop_that_was_asked_for_forgets(
    note: Note, systemd: FakeSystemd, said: list[str], ends: Record, job: str
) -> None:
    ends.append("end", "1.0", "x")
    systemd.job = job
    assert note(FAILED) == 0
    assert (ends.read(), said) == ([], [])
    assert note(End("timeout", "killed", "KILL")) == 0
    assert said == ["error: systemd had to end the hypervisor: the guest was not shut down"]


def test_a_start_that_failed_is_no_wish(note: Note, systemd: FakeSystemd, ends: Record) -> None:
    systemd.job = "start running"
    assert note(FAILED) == 0
    assert len(ends.read()) == 1


@pytest.mark.parametrize(
    ("end", "heard", "restart", "again", "code"),
    [
        (CLEAN, None, "always", True, 0),
        (CLEAN, "rebooted", "always", True, 0),
        (CLEAN, "panicked", "always", True, 1),
        (FAILED, None, "always", True, 0),
        (CLEAN, None, "on-failure", False, 0),
        (CLEAN, "powered-off", "on-failure", False, 0),
        (CLEAN, "rebooted", "on-failure", True, 1),
        (CLEAN, "panicked", "on-failure", True, 1),
        (FAILED, None, "on-failure", True, 0),
        (CLEAN, "rebooted", "no", False, 0),
        (CLEAN, "panicked", "no", False, 1),
        (FAILED, None, "no", False, 0),
        (CLEAN, "rebooted", "on-success", True, 0),
        (FAILED, None, "on-success", False, 0),
    ],
)
def test_what_leads_to_what(
    note: Note,
    systemd: FakeSystemd,
    said: list[str],
    ends: Record,
    end: End,
    heard: str | None,
    restart: str,
    again: bool,
    code: int,
) -> None:
    systemd.restart = restart
    assert note(end, heard) == code
    assert len(ends.read()) == again
    assert len(said) == 1
    assert ("it is started again" in said[0]) == again
    assert ("it stays down" in said[0]) == (not again)


def test_a_wrong_package_is_no_end(note: Note, said: list[str], ends: Record) -> None:
    ends.append("end", "1.0", "x")
    assert note(End("exit-code", "exited", "78")) == 0
    assert (ends.read(), said) == ([], [])


@pytest.mark.parametrize(
    ("end", "ran", "counts"),
    [(CLEAN, 59, 2), (CLEAN, 61, 1), (FAILED, 61, 2), (FAILED, 599, 2), (FAILED, 601, 1)],
)
def test_a_long_run_is_forgiven(
    note: Note, systemd: FakeSystemd, ends: Record, end: End, ran: float, counts: int
) -> None:
    ends.append("end", "1.0", "x")
    systemd.ran = ran
    note(end)
    assert len(ends.read()) == counts


def test_one_that_never_was_up_did_not_run(note: Note, systemd: FakeSystemd, ends: Record) -> None:
    ends.append("end", "1.0", "x")
    systemd.ran, systemd.became_active = 9999, False
    note(FAILED)
    assert len(ends.read()) == 2


def test_given_up(note: Note, systemd: FakeSystemd, said: list[str], ends: Record) -> None:
    for _ in range(3):
        note(FAILED, None, 3)
    assert systemd.told == []
    assert said[-1].endswith("it is started again, 3 times in a row now")
    with pytest.raises(MicrovmHostError, match="started again 3 times in a row, it is given up"):
        note(FAILED, None, 3)
    assert systemd.told == [["systemctl", "stop", "--no-block", "--", "microvm@web.service"]]
    # The administrator's next start begins anew.
    assert ends.read() == []


def test_never_given_up(note: Note, systemd: FakeSystemd, ends: Record) -> None:
    for _ in range(30):
        note(FAILED, None, 0)
    assert (len(ends.read()), systemd.told) == (30, [])


# ---- the next start


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that sleeping moves."""
    times = [1000.0]
    monkeypatch.setattr(time, "clock_gettime", lambda clock: times[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: times.__setitem__(0, times[0] + seconds))
    return times


@pytest.mark.parametrize(
    ("count", "delay"),
    [(1, 5), (2, 10), (3, 20), (4, 40), (5, 80), (6, 160), (7, 300), (8, 300), (5000, 300)],
)
def test_delays_grow(
    ends: Record, said: list[str], slept: list[float], count: int, delay: float
) -> None:
    for _ in range(count):
        ends.append("end", "999.5", "it died")
    aftermath.wait_for_turn(ends, 5.0)
    assert slept[0] == pytest.approx(999.5 + delay)
    assert said[0].startswith(f"STATUS=Starts again in {delay - 0.5:.0f} s, since it died\nEXTEND_")
    # systemd is told in time to wait on.
    assert len(said) >= delay - 1


def test_a_longer_first_delay_is_kept(ends: Record, said: list[str], slept: list[float]) -> None:
    ends.append("end", "1000.0", "x")
    ends.append("end", "1000.0", "x")
    aftermath.wait_for_turn(ends, 900.0)
    assert slept[0] == pytest.approx(1900)


def test_no_delay_where_enough_time_has_passed(
    ends: Record, said: list[str], slept: list[float]
) -> None:
    aftermath.wait_for_turn(ends, 5.0)
    ends.append("end", "990.0", "x")
    aftermath.wait_for_turn(ends, 5.0)
    assert (slept[0], said) == (1000.0, [])


@pytest.mark.parametrize(
    "line", [("end", "990"), ("end", "soon", "x"), ("end", "inf", "x"), ("other", "1", "x")]
)
def test_a_damaged_record_holds_up_nothing(
    ends: Record,
    said: list[str],
    slept: list[float],
    line: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    warned: list[str] = []
    monkeypatch.setattr(log, "warning", warned.append)
    ends.append(*line)
    aftermath.wait_for_turn(ends, 5.0)
    assert (slept[0], said, len(warned)) == (1000.0, [], 1)
    assert "is no line of this record" in warned[0]


def test_an_end_yet_to_come_is_not_waited_for(
    ends: Record, said: list[str], slept: list[float]
) -> None:
    ends.append("end", "99999.0", "x")
    aftermath.wait_for_turn(ends, 5.0)
    assert slept[0] == pytest.approx(1005)


@pytest.mark.parametrize(
    ("job", "again", "kept"),
    [("start waiting", False, 1), ("", False, 0), ("", True, 1), ("start waiting", True, 1)],
)
def test_undoing_forgets_unless_a_start_follows(
    systemd: FakeSystemd,
    ends: Record,
    job: str,
    again: bool,
    kept: int,
) -> None:
    ends.append("end", "1.0", "x")
    systemd.job = job
    systemd.busy = {"microvm-again@web.service"} if again else set()
    aftermath.forget_unless_it_goes_on("web", ends)
    assert len(ends.read()) == kept


# ---- starts that fail where the VM is set up

UNDONE = 5_000_000  # microseconds
TAPS = "microvm-tap-interfaces@web.service"


@pytest.fixture
def failed(systemd: FakeSystemd, slept: list[float]) -> FakeSystemd:
    """Its taps were not set up in the last automatic restart."""
    slept[0] = 5.1
    systemd.active = "inactive"
    systemd.others = {
        "microvm-undo@web.target": {"InactiveExitTimestampMonotonic": UNDONE},
        "microvm-set-booted@web.service": {"InactiveExitTimestampMonotonic": 4_500_000},
        TAPS: as_failed(4_999_000, "no such bridge", 1),
        # Ended by the undoing, and in an earlier start.
        "microvm-virtiofsd@web.service": as_failed(5_050_000, "", 15, code=2, result="signal"),
        "microvm-pci-devices@web.service": as_failed(3_000_000, "", 78),
    }
    return systemd


def as_failed(
    at: int, said: str, status: int, *, code: int = 1, result: str = "exit-code"
) -> dict[str, str | int]:
    return {
        "ActiveState": "failed",
        "InactiveEnterTimestampMonotonic": at,
        "Result": result,
        "ExecMainCode": code,
        "ExecMainStatus": status,
        "StatusText": said,
    }


START = ["systemctl", "start", "--no-block", "--job-mode=fail", "--", "microvm@web.service"]


def test_a_vm_that_was_not_set_up_is_started_again(
    failed: FakeSystemd, said: list[str], ends: Record, slept: list[float]
) -> None:
    ends.append("end", "4.0", "it crashed")
    aftermath.start_again("web", ends, 10, 5.0)
    why = f"{TAPS} failed: no such bridge"
    assert said[0] == f"warning: {why}; it is started again, 2 times in a row now"
    assert said[1].startswith(f"STATUS=Starts again in 10 s, since {why}\n")
    assert ends.read()[1:] == [["end", "5.000", why]]
    # Of two in a row, from the time at which it failed.
    assert slept[0] == pytest.approx(15)
    assert failed.told == [START]


def test_a_killed_helper_counts_no_end_twice(
    failed: FakeSystemd, said: list[str], ends: Record
) -> None:
    ends.append("end", "5.000", "x")
    aftermath.start_again("web", ends, 1, 5.0)
    assert (len(ends.read()), failed.told) == (1, [START])


@pytest.mark.parametrize(
    ("state", "how"),
    [
        (as_failed(4_999_000, "", 9, code=2, result="signal"), "signal by signal 9"),
        (as_failed(4_999_000, "", 9, code=2, result="oom-kill"), "oom-kill by signal 9"),
        (as_failed(4_999_000, "", 0, code=0, result="resources"), "resources"),
        (as_failed(4_999_000, "", 3), "exit status 3"),
    ],
)
def test_why_it_was_not_set_up(
    failed: FakeSystemd, said: list[str], ends: Record, state: dict[str, str | int], how: str
) -> None:
    ends.append("end", "4.0", "it crashed")
    failed.others[TAPS] = state
    aftermath.start_again("web", ends, 10, 5.0)
    assert said[0].startswith(f"warning: {TAPS} failed: {how}; it is started again")


def test_one_that_cannot_be_set_up_is_given_up(
    failed: FakeSystemd, said: list[str], ends: Record
) -> None:
    ends.append("end", "3.0", "it crashed")
    ends.append("end", "4.0", "not set up")
    aftermath.start_again("web", ends, 2, 5.0)
    assert said[-1] == (
        f"error: {TAPS} failed: no such bridge; started again 2 times in a row, it is given up; "
        "when it is mended: systemctl start microvm@web.service"
    )
    assert (ends.read(), failed.told) == ([], [])


@pytest.mark.parametrize(
    ("restart", "status", "starts"),
    [
        ("always", 1, True),
        ("on-failure", 1, True),
        ("no", 1, False),
        ("on-success", 1, False),
        ("always", 78, False),
        ("always", 2, False),
    ],
)
def test_policy_and_wrong_packages_are_heeded(
    failed: FakeSystemd, said: list[str], ends: Record, restart: str, status: int, starts: bool
) -> None:
    ends.append("end", "4.0", "it crashed")
    failed.restart = restart
    failed.others[TAPS]["ExecMainStatus"] = status
    aftermath.start_again("web", ends, 10, 5.0)
    assert failed.told == ([START] if starts else [])
    assert len(ends.read()) == (2 if starts else 0)
    assert said[0].endswith("it stays down") == (not starts)


def test_a_start_that_goes_on_is_left_alone(
    failed: FakeSystemd, said: list[str], ends: Record
) -> None:
    ends.append("end", "4.0", "it crashed")
    failed.job = "start waiting"
    aftermath.start_again("web", ends, 10, 5.0)
    failed.job, failed.active = "", "active"
    aftermath.start_again("web", ends, 10, 5.0)
    assert (len(ends.read()), failed.told, said) == (1, [], [])


def test_a_stop_that_ended_what_sets_up_is_the_last_word(
    failed: FakeSystemd, said: list[str], ends: Record
) -> None:
    """In the start after the one that had failed: the last undoing is older than that."""
    ends.append("end", "5.000", "x")
    failed.others["microvm-set-booted@web.service"]["InactiveExitTimestampMonotonic"] = 5_020_000
    aftermath.start_again("web", ends, 10, 5.0)
    assert (ends.read(), failed.told, said) == ([], [], [])


def test_an_end_that_cannot_be_written_down_is_waited_for_nevertheless(
    failed: FakeSystemd, said: list[str], ends: Record, slept: list[float]
) -> None:
    os.makedirs(os.path.dirname(ends.path))
    with open(ends.path, "w", encoding="ascii"):
        pass

    def no_space(*fields: str) -> None:
        raise MicrovmHostError("No space left on device", path=ends.path)

    ends.append = no_space  # type: ignore[method-assign]
    aftermath.start_again("web", ends, 10, 5.0)
    assert any(line.startswith("warning: not counted: ") for line in said)
    assert slept[0] == pytest.approx(10.1)
    assert failed.told == [START]


@pytest.mark.parametrize(
    ("job", "code", "status", "kept"),
    [
        # It has queued a start; was killed, and is started anew; failed, likewise.
        ("", "exited", "0", 1),
        ("", "killed", "KILL", 1),
        ("", "exited", "1", 1),
        ("stop running", "killed", "TERM", 0),
        ("stop running", "exited", "1", 0),
        ("restart running", "killed", "TERM", 0),
        ("start waiting", "killed", "TERM", 1),
        ("", "killed", "TERM", 0),
    ],
)
def test_waiting_that_was_ended_is_forgotten(
    systemd: FakeSystemd,
    ends: Record,
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    code: str,
    status: str,
    kept: int,
) -> None:
    ends.append("end", "1.0", "x")
    systemd.job_again = job
    monkeypatch.setenv("EXIT_CODE", code)
    monkeypatch.setenv("EXIT_STATUS", status)
    aftermath.forget_if_told_to("web", ends)
    assert len(ends.read()) == kept
