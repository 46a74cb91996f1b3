# SPDX-License-Identifier: MIT
"""Time spans as systemd takes them, and how a stop is divided."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from microvm_host import timespan

from .golden import DIRECTORY

RIGHT = {
    "90": 90,
    "1.5": 1.5,
    " 2min ": 120,
    "1min 30s": 90,
    "1min30s": 90,
    "1h 30min 5 sec": 5405,
    "2 hours": 7200,
    "500ms": 0.5,
    "3d": 259200,
    "1w": 604800,
    "1M": 30.44 * 86400,
    "2min 200ms": 120.2,
    ".5s": 0.5,
    "infinity": float("inf"),
}
WRONG = ["", " ", "s", "soon", "-1", "1e9", "0x9", "5 5 parsecs", "1.1.1s", ".", "1 m2x", "\u0663s"]


@pytest.mark.parametrize("text", RIGHT)
def test_right(text: str) -> None:
    assert timespan.parse(text) == pytest.approx(RIGHT[text])


@pytest.mark.parametrize("text", [*WRONG, "9" * 60])
def test_wrong(text: str) -> None:
    assert timespan.parse(text) is None


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
@pytest.mark.parametrize("text", [*RIGHT, *WRONG])
def test_systemd_takes_the_same(text: str) -> None:
    done = subprocess.run(["systemd-analyze", "timespan", "--", text], capture_output=True)
    assert (done.returncode == 0) == (timespan.parse(text) is not None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12, "12s"), (0.25, "0.25s"), (90, "1min 30s"), (3600, "1h"), (float("inf"), "infinity")],
)
def test_for_people(seconds: float, text: str) -> None:
    assert timespan.describe(seconds) == text


@pytest.mark.parametrize("terminate", [None, 0.1, 1.0, 10.0, 60.0, 600.0])
@pytest.mark.parametrize("guest", [0.1, 1.0, 4.0, 20.0, 50.0, 90.0, 300.0, 86400.0])
def test_a_declared_time_is_the_guests(guest: float, terminate: float | None) -> None:
    whole = timespan.stop_for(guest, terminate)
    found = timespan.parts(whole, terminate)
    assert found.guest == pytest.approx(guest)
    assert found.guest + found.terminate + found.kill == pytest.approx(whole)
    if terminate is not None and terminate <= guest:
        assert found.terminate == pytest.approx(terminate)


@pytest.mark.parametrize("whole", [0.5, 2.0, 12.0, 29.0, 31.0, 105.0, 900.0])
@pytest.mark.parametrize("terminate", [None, 1.0, 1e9, float("inf")])
def test_each_step_has_a_part(whole: float, terminate: float | None) -> None:
    found = timespan.parts(whole, terminate)
    assert min(found.guest, found.terminate, found.kill) > 0
    assert found.guest >= whole / (2 if terminate is None else 3) - 1e-9
    assert found.guest + found.terminate + found.kill == pytest.approx(whole)


def test_the_units_own_bound() -> None:
    unit = (DIRECTORY.parents[1] / "units/microvm@.service.in").read_text()
    assert f"\nTimeoutStopSec={timespan.STOP:g}\n" in unit
    assert timespan.parts(timespan.STOP) == timespan.Parts()
