# SPDX-License-Identifier: MIT
"""Becoming the hypervisor, and the first rungs of stopping it, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm_host import hypervisor, log
from microvm_host.errors import MicrovmHostError, PackageError

from . import packages

REPOSITORY = Path(__file__).parents[2]
Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for word in ("info", "notice", "warning", "error"):
        monkeypatch.setattr(log, word, lambda text, word=word: lines.append(f"{word}: {text}"))
    monkeypatch.setattr(log, "status", lambda text: None)
    return lines


@pytest.fixture
def main() -> Iterator[Start]:
    """Starts the process that stands for the hypervisor: a line of shell."""
    started: list[subprocess.Popen[bytes]] = []

    def start(line: str) -> subprocess.Popen[bytes]:
        child = subprocess.Popen(["/bin/sh", "-c", line])
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypervisor, "ASK_AGAIN_AFTER", 0.25)
    monkeypatch.setattr(hypervisor, "SCRIPT_ENDS_WITHIN", 0.1)


def script(tmp_path: Path, body: str) -> str:
    return str(packages.program(tmp_path, "bin/microvm-shutdown", f"#!/bin/sh\n{body}\n"))


def left_of(marker: str) -> list[str]:
    """Processes whose command line holds `marker`."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                line = Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line and int(entry) != os.getpid():
                found.append(entry)
    return found


# ---- stop


def test_ended_already(said: list[str]) -> None:
    child = subprocess.Popen(["/bin/true"])
    child.wait()
    hypervisor.stop(child.pid, "/nonexistent", 5)
    assert said == ["info: the hypervisor has ended by itself"]


def test_without_a_script(main: Start, said: list[str]) -> None:
    child = main("sleep 60")
    hypervisor.stop(child.pid, None, 5)
    assert child.poll() is None
    assert said == [
        "notice: the package has no bin/microvm-shutdown: ending the hypervisor by SIGTERM"
    ]


def test_script_that_ends_it(main: Start, said: list[str], tmp_path: Path) -> None:
    child = main("exec sleep 60")
    began = time.monotonic()
    hypervisor.stop(child.pid, script(tmp_path, f"kill {child.pid}"), 20)
    assert time.monotonic() - began < 5
    assert child.wait(1) == -15
    assert said[-1].startswith("info: the guest shut down in 0.")
    assert said[-1].endswith("its package's script asked once")


@pytest.mark.usefixtures("quick")
def test_script_that_returns_at_once_is_not_believed(
    main: Start, said: list[str], tmp_path: Path
) -> None:
    # The guest takes its time; the script is back long before.
    child = main(f"while [ ! -e {tmp_path}/asked ]; do sleep 0.05; done; sleep 0.5")
    hypervisor.stop(child.pid, script(tmp_path, f"touch {tmp_path}/asked"), 20)
    assert child.wait(1) == 0
    assert "info: the guest shut down in" in said[-1]


def test_what_the_script_returned_is_logged(
    main: Start, said: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = main(f"while [ ! -e {tmp_path}/asked ]; do sleep 0.05; done; sleep 1.2")
    path = script(tmp_path, f"touch {tmp_path}/asked; exit 3")
    hypervisor.stop(child.pid, path, 20)
    assert said[0].startswith(f"warning: {path} returned 3 after 1.0 s, and the guest still runs")
    assert said[1].startswith("info: the guest shut down in 1.")
    assert len(said) == 2


@pytest.mark.usefixtures("quick")
def test_standard_input_is_held_open(main: Start, said: list[str], tmp_path: Path) -> None:
    # QEMU's script: asks, waits on its input, and what it started goes away at the end of it.
    child = main("exec sleep 60")
    body = f"cat >/dev/null; touch {tmp_path}/end-of-input; kill {child.pid}; sleep 60"
    began = time.monotonic()
    hypervisor.stop(child.pid, script(tmp_path, body), 20)
    # Its input ended when it was to be asked again, not at once.
    assert time.monotonic() - began >= hypervisor.ASK_AGAIN_AFTER
    assert (tmp_path / "end-of-input").exists()
    assert said[-1].startswith("info: the guest shut down in")


@pytest.mark.usefixtures("quick")
def test_script_that_hangs_is_killed_with_what_it_started(
    main: Start, said: list[str], tmp_path: Path
) -> None:
    child = main("exec sleep 60")
    marker = f"60.{os.getpid()}"
    path = script(tmp_path, f"trap '' TERM HUP; sleep {marker} & sleep {marker}")
    with pytest.raises(MicrovmHostError):
        hypervisor.stop(child.pid, path, 0.4)
    deadline = time.monotonic() + 5
    while left_of(marker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left_of(marker) == []


@pytest.mark.usefixtures("quick")
def test_patience_ends(main: Start, said: list[str], tmp_path: Path) -> None:
    child = main("exec sleep 60")
    began = time.monotonic()
    with pytest.raises(MicrovmHostError) as caught:
        hypervisor.stop(child.pid, script(tmp_path, "exit 0"), 1)
    assert 1 <= time.monotonic() - began < 4
    assert child.poll() is None
    assert "the guest did not shut down within 1 s: ending the hypervisor by force" in str(
        caught.value
    )
    assert "MICROVM_SHUTDOWN_SECONDS" in caught.value.hint
    assert caught.value.exit_code == 1


@pytest.mark.usefixtures("quick")
def test_asked_again(main: Start, said: list[str], tmp_path: Path) -> None:
    # A guest that still boots misses the first two.
    child = main("exec sleep 60")
    body = f"echo >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -lt 3 ] || kill {child.pid}"
    hypervisor.stop(child.pid, script(tmp_path, body), 20)
    assert said[-1].endswith("its package's script asked 3 times")


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kind", ["missing", "not executable", "no interpreter"])
def test_script_that_cannot_run(main: Start, said: list[str], tmp_path: Path, kind: str) -> None:
    path = script(tmp_path, "exit 0")
    if kind == "missing":
        os.unlink(path)
    elif kind == "not executable":
        os.chmod(path, 0o644)
    else:
        Path(path).write_text("#!/nonexistent/sh\n")
    child = main("exec sleep 60")
    began = time.monotonic()
    with pytest.raises(MicrovmHostError, match="the guest cannot be asked") as caught:
        hypervisor.stop(child.pid, path, 20)
    # At once: nobody was asked, so that there is nothing to wait for.
    assert time.monotonic() - began < 1
    assert caught.value.path == path
    assert child.poll() is None


def test_no_descriptor_stays_open(main: Start, said: list[str], tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    child = main("exec sleep 60")
    hypervisor.stop(child.pid, script(tmp_path, f"kill {child.pid}"), 20)
    assert sorted(os.listdir("/proc/self/fd")) == before


# ---- become


def become(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from microvm_host import hypervisor\n"
        "from microvm_host.errors import PackageError\n"
        "import os\n"
        "print(os.getpid(), flush=True)\n"
        "try:\n"
        f"    hypervisor.become({program!r}, '/package', 'qemu')\n"
        "except PackageError as error:\n"
        "    print(error); sys.exit(error.exit_code)\n"
    )
    return subprocess.run(
        [sys.executable, "-BIS", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )


def test_become_is_the_same_process(tmp_path: Path) -> None:
    program = packages.program(tmp_path, "bin/microvm-run", "#! /bin/sh -e\necho $$ $0\n")
    done = become(tmp_path, str(program))
    before, after = done.stdout.splitlines()
    assert after == f"{before} {program}"


def test_become_without_interpreter(tmp_path: Path) -> None:
    program = packages.program(tmp_path, "bin/microvm-run", "#! /nonexistent/bash -e\n")
    done = become(tmp_path, str(program))
    assert done.returncode == 78
    assert f"{program}: cannot be executed: No such file or directory; its first line" in (
        done.stdout
    )


def test_become_what_may_not_run(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="cannot be executed by this user"):
        hypervisor.become(str(packages.put(tmp_path, "run", "x")), "/package")
