# SPDX-License-Identifier: MIT
"""The guard over a stop: when it waits, when it kills, and when it goes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm_host import guard, process
from microvm_host.errors import MicrovmHostError

from .fake_systemd import FakeSystemd

UNIT = "microvm@web.service"


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was run, in place of running it."""
    argvs: list[list[str]] = []

    def note(argv: list[str]) -> str:
        argvs.append(argv)
        return ""

    monkeypatch.setattr(process, "output", note)
    monkeypatch.setattr(guard, "LOOK_EVERY", 0.01)
    return argvs


def states(*states: str, pid: int = 0) -> Callable[[], guard.Seen]:
    """Gives one state after the other, with a job to stop for as long as there is what stops."""
    left = list(states)

    def look() -> guard.Seen:
        state = left.pop(0)
        return state, state not in ("inactive", "failed"), pid

    return look


def watch(within: Callable[[], float], look: Callable[[], guard.Seen]) -> bool:
    return guard.watch(UNIT, "web", within, look)


def within(seconds: float) -> Callable[[], float]:
    return lambda: seconds


@pytest.mark.parametrize(
    "seen",
    [
        ("deactivating", "deactivating", "inactive"),
        ("active", "deactivating", "failed"),
        # It was restarted, or ended by itself and waits to be started again.
        ("deactivating", "activating"),
        ("deactivating", "active"),
        # It had ended, and a start that waits for the guard is all that is left.
        ("inactive",),
        ("failed",),
        # The hypervisor pretended to reload, or was about to start.
        ("reloading", "deactivating", "inactive"),
        ("activating", "deactivating", "inactive"),
    ],
)
def test_it_goes_when_the_vm_has_stopped(seen: tuple[str, ...], killed: list[list[str]]) -> None:
    look = states(*seen)
    watch(within(60), look)
    # Not before: all that there was to see was seen.
    with pytest.raises(IndexError):
        look()
    assert killed == []


def test_it_kills_what_does_not_stop(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "NEVER_TOO_SOON", -1)
    watch(within(-1), states("deactivating", "deactivating", "failed"))
    assert killed == [["systemctl", "kill", "--signal=KILL", "--", UNIT]] * 2


def test_it_does_not_kill_what_was_not_told_to_stop(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "NEVER_TOO_SOON", -1)
    # It ended by itself, and waits to be started again; or somebody took the stop back.
    assert not watch(within(-1), lambda: ("activating", False, 0))
    assert not watch(within(-1), lambda: ("active", False, 0))
    assert killed == []


@pytest.mark.parametrize("state", ["active", "reloading", "activating"])
def test_it_waits_for_a_stop_that_others_are_to_come_before(
    state: str, killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For however long, without counting that; and then counts."""
    clock = [0.0]
    naps: list[float] = []
    seen = iter([(state, True, 0)] * 2000 + [("deactivating", True, 0)] * 1200)

    def look() -> guard.Seen:
        # Once it was killed, it goes.
        return next(seen) if not killed else ("failed", False, 0)

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        clock[0] += seconds

    monkeypatch.setattr(guard, "LOOK_EVERY", 1.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "sleep", sleep)
    assert watch(within(7), look)
    assert killed == [["systemctl", "kill", "--signal=KILL", "--", UNIT]]
    # That a stop begins at once is seen at once; for another it does not keep the host busy.
    waited = naps.index(1.0) * guard.LOOK_AT_LAST_EVERY + naps.count(1.0)
    assert naps[0] == guard.LOOK_AT_LAST_EVERY and naps.count(1.0) > 1000
    assert 7 < clock[0] - waited < 7.1


@pytest.mark.parametrize("pid", [0, 2**22 + 1, 2**32 - 1])
def test_it_goes_on_without_a_main_process(killed: list[list[str]], pid: int) -> None:
    watch(within(60), states("deactivating", "deactivating", "inactive", pid=pid))
    assert killed == []


def test_it_asks_for_no_patience_that_it_does_not_need(killed: list[list[str]]) -> None:
    def never() -> float:
        raise AssertionError

    watch(never, states("deactivating", "deactivating", "inactive"))
    assert killed == []


@pytest.mark.parametrize("is_whose", ["look", "within"])
def test_a_systemd_that_is_busy_for_a_while(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch, is_whose: str
) -> None:
    monkeypatch.setattr(guard, "NEVER_TOO_SOON", -1)
    seen = states(*["deactivating"] * 9, "failed")
    calls = []

    def busy() -> None:
        calls.append(1)
        if len(calls) in (2, 3):
            raise MicrovmHostError("systemd cannot be asked")

    def look() -> guard.Seen:
        if is_whose == "look":
            busy()
        return seen()

    def patience() -> float:
        if is_whose == "within":
            busy()
            busy()
        return -1

    assert watch(patience, look)
    assert killed


def test_a_systemd_that_does_not_tell(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> guard.Seen:
        raise MicrovmHostError("systemd cannot be asked")

    monkeypatch.setattr(guard, "SILENT_AT_MOST", 0.05)
    with pytest.raises(MicrovmHostError, match="cannot be asked"):
        watch(within(60), look)
    assert killed == []


def test_it_sees_the_main_process_end_at_once(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LOOK_EVERY", 20)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with subprocess.Popen(["sleep", "0.2"]) as child:
        watch(within(60), states("deactivating", "inactive", pid=child.pid))
    assert killed == []


JOB = "/org/freedesktop/systemd1/job/7"


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSystemd]:
    monkeypatch.setenv("MICROVM_HOST_ROOT", str(tmp_path))
    fake = FakeSystemd(tmp_path / "run/systemd/private")
    fake.properties |= {
        ("Service", "MainPID"): ("u", 42),
        ("Unit", "Job"): ("(uo)", (7, JOB)),
        ("Job", "State"): ("s", "waiting"),
    }
    yield fake
    fake.close()


@pytest.mark.parametrize(
    ("state", "job", "is_to_stop"),
    [
        *(("active", job, True) for job in ("stop", "restart", "try-restart")),
        # What takes the place of a stop, and what a restart is when it has stopped.
        *(("active", job, False) for job in ("start", "verify-active", "reload")),
        *((state, "stop", True) for state in ("activating", "reloading")),
        ("deactivating", "", True),
        *((state, "", False) for state in ("active", "inactive", "failed")),
    ],
)
def test_what_is_to_stop(systemd: FakeSystemd, state: str, job: str, *, is_to_stop: bool) -> None:
    systemd.properties["Unit", "ActiveState"] = ("s", state)
    systemd.properties["Job", "JobType"] = ("s", job)
    if not job:
        systemd.properties["Unit", "Job"] = ("(uo)", (0, "/"))
    assert guard.look(UNIT) == (state, is_to_stop, 42)
    # What stops or has stopped is known without its job.
    asked = {name for _, _, name in systemd.asked}
    assert ("Job" in asked) == (state in ("active", "activating", "reloading"))
