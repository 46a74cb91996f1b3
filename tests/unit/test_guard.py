# SPDX-License-Identifier: MIT
"""The guard over a stop: when it waits, when it kills, and when it goes."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable

import pytest

from microvm_host import guard, process
from microvm_host.errors import MicrovmHostError
from microvm_host.helper import settings

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
    """Gives one state after the other."""
    left = list(states)
    return lambda: (left.pop(0), True, pid)


def within(seconds: float) -> Callable[[], float]:
    return lambda: seconds


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ("", 90),
        ("A=b\nMICROVM_SHUTDOWN_SECONDS=2.5", 2.5),
        ("MICROVM_SHUTDOWN_SECONDS=1\nMICROVM_SHUTDOWN_SECONDS=2", 2),
        ("MICROVM_SHUTDOWN_SECONDS=soon", 90),
        ("XMICROVM_SHUTDOWN_SECONDS=1", 90),
        # What the stop itself would not take either: it must not be watched over for ever.
        *((f"MICROVM_SHUTDOWN_SECONDS={text}", 90) for text in ("nan", "inf", "-5", "0", "1e9")),
    ],
)
def test_patience(environment: str, seconds: float) -> None:
    defaults = {"MICROVM_SHUTDOWN_SECONDS": 90.0}
    assert guard.patience(environment.splitlines(), defaults, settings.as_seconds) == seconds


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
    guard.watch("web", within(60), look)
    # Not before: all that there was to see was seen.
    with pytest.raises(IndexError):
        look()
    assert killed == []


def test_it_kills_what_does_not_stop(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "NEVER_TOO_SOON", -1)
    guard.watch("web", within(-1), states("deactivating", "deactivating", "failed"))
    assert killed == [["systemctl", "kill", "--signal=KILL", "--", UNIT]] * 2


def test_it_does_not_kill_what_was_not_told_to_stop(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "BEGINS_WITHIN", 0.05)
    guard.watch("web", within(-1), lambda: ("active", True, 0))
    # It ended by itself, and waits to be started again.
    guard.watch("web", within(-1), lambda: ("activating", False, 0))
    assert killed == []


@pytest.mark.parametrize("pid", [0, 2**22 + 1, 2**32 - 1])
def test_it_goes_on_without_a_main_process(killed: list[list[str]], pid: int) -> None:
    guard.watch("web", within(60), states("deactivating", "deactivating", "inactive", pid=pid))
    assert killed == []


def test_it_asks_for_no_patience_that_it_does_not_need(killed: list[list[str]]) -> None:
    def never() -> float:
        raise AssertionError

    guard.watch("web", never, states("deactivating", "deactivating", "inactive"))
    assert killed == []


def test_a_systemd_that_does_not_tell() -> None:
    def look() -> guard.Seen:
        raise MicrovmHostError("systemd cannot be asked")

    with pytest.raises(MicrovmHostError, match="cannot be asked"):
        guard.watch("web", within(60), look)


def test_it_sees_the_main_process_end_at_once(
    killed: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "LOOK_EVERY", 20)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with subprocess.Popen(["sleep", "0.2"]) as child:
        guard.watch("web", within(60), states("deactivating", "inactive", pid=child.pid))
    assert killed == []
