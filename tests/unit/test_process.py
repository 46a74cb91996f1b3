# SPDX-License-Identifier: MIT
"""Programs that are run, and calls that may never return."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from errno import EBUSY, ECHILD, ENODEV, ETIMEDOUT
from pathlib import Path

import pytest

from microvm_host import process
from microvm_host.errors import MicrovmHostError


def test_output(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/x")
    assert process.output(["sh", "-c", "printf '%s' a$NOTIFY_SOCKET; seq 20000 | tail -n1"]) == (
        "a20000\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such-program"], "cannot run no-such-program: No such file or directory"),
        (["sh", "-c", "exit 3"], "`sh -c exit 3` failed with 3"),
        (["sh", "-c", "kill -9 $$"], "failed with -9"),
    ],
)
def test_program_that_fails(argv: list[str], message: str) -> None:
    with pytest.raises(MicrovmHostError) as caught:
        process.output(argv)
    assert message in str(caught.value)


def test_what_a_program_complains_of_is_told_in_one_line() -> None:
    with pytest.raises(MicrovmHostError) as caught:
        process.output(["sh", "-c", r"printf 'oh\n\033[2Jno\n\n' >&2; exit 1"], errors=True)
    assert str(caught.value).endswith("failed with 1: oh [2Jno")


def ignore(seconds: float) -> None:
    raise AssertionError(f"asked to wait after {seconds} s")


def test_call_apart(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    process.call_apart(lambda: file.write_text(f"{os.getpid()}"), 60.0, ignore)
    assert int(file.read_text()) != os.getpid()
    # Nothing is left of it.
    with pytest.raises(ChildProcessError):
        os.waitpid(int(file.read_text()), 0)


def raising(error: BaseException) -> Callable[[], object]:
    def call() -> None:
        raise error

    return call


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(ENODEV, "no"), ENODEV),
        (PermissionError(EBUSY, "no"), EBUSY),
        (OSError("no number"), ECHILD),
        # ENOTSUPP is the kernel's own, and 512 would look like success.
        (OSError(524, "no"), ECHILD),
        (OSError(512, "no"), ECHILD),
        (ValueError("no"), ECHILD),
        (SystemExit(0), ECHILD),
        (KeyboardInterrupt(), ECHILD),
    ],
)
def test_call_apart_that_fails(error: BaseException, code: int) -> None:
    with pytest.raises(OSError) as caught:
        process.call_apart(raising(error), 60.0, ignore)
    assert caught.value.errno == code
    assert caught.value.strerror == os.strerror(code)


def test_call_apart_that_is_killed() -> None:
    with pytest.raises(OSError) as caught:
        process.call_apart(lambda: os.kill(os.getpid(), signal.SIGKILL), 60.0, ignore)
    assert caught.value.errno == ECHILD


def test_call_apart_that_hangs(tmp_path: Path) -> None:
    file = tmp_path / "pid"

    def hang() -> None:
        file.write_text(f"{os.getpid()}")
        time.sleep(60)

    waited: list[float] = []
    began = time.monotonic()
    with pytest.raises(OSError) as caught:
        process.call_apart(hang, 1.5, waited.append)
    assert caught.value.errno == ETIMEDOUT
    # About each second, and not long after its patience has ended.
    assert len(waited) == 2
    assert waited == sorted(waited)
    assert 1.5 <= time.monotonic() - began < 30
    pid = int(file.read_text())
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def test_call_apart_leaves_no_files_open() -> None:
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        process.call_apart(lambda: None, 60.0, ignore)
        with pytest.raises(OSError):
            process.call_apart(lambda: time.sleep(60), 0.01, lambda seconds: None)
    assert os.listdir("/proc/self/fd") == before
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
