# SPDX-License-Identifier: MIT
"""Becoming the hypervisor, and the first rungs of stopping it, with real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from microvm_host import hypervisor, log
from microvm_host.errors import MicrovmHostError, NoGuest, PackageError
from microvm_host.hypervisor import Times

from . import packages

if TYPE_CHECKING:
    from microvm_host.hypervisor import Way

REPOSITORY = Path(__file__).parents[2]
Start = Callable[[str], subprocess.Popen[bytes]]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for word in ("info", "notice", "warning", "error"):
        monkeypatch.setattr(log, word, lambda text, word=word: lines.append(f"{word}: {text}"))
    monkeypatch.setattr(log, "notify", lambda text: None)
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
    monkeypatch.setattr(hypervisor, "SCRIPT_ENDS_WITHIN", 0.1)


AGAIN = 0.25


def stop(
    main_pid: int, *ways: str | Way, guest: float = 20, ask_again: float = 10, terminate: float = 5
) -> None:
    """Stop a process; a string is the path of a script."""
    found = [hypervisor.Script(way) if isinstance(way, str) else way for way in ways]
    hypervisor.stop(main_pid, found, Times(guest, ask_again, terminate))


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
    stop(child.pid, "/nonexistent")
    assert said == ["info: the hypervisor has ended by itself"]


def test_without_any_way_to_ask(main: Start, said: list[str]) -> None:
    child = main("exec sleep 60")
    stop(child.pid)
    assert child.wait(30) == -15
    first, last = said
    assert first == (
        "notice: the package has neither bin/microvm-shutdown nor a control socket: ending the "
        "hypervisor by SIGTERM"
    )
    assert re.fullmatch(
        r"info: the hypervisor ended by SIGTERM in \d+\.\d s, the guest could not be asked", last
    )


def test_without_any_way_to_ask_and_deaf(main: Start, said: list[str], tmp_path: Path) -> None:
    child = deaf(main, tmp_path)
    with pytest.raises(MicrovmHostError, match=r"was killed after \d"):
        stop(child.pid, terminate=0.3)
    assert child.wait(30) == -9
    assert re.match(
        r"error: at \d+\.\d s: the hypervisor does not end within 0\.3 s: sending", said[1]
    )


def test_script_that_ends_it(main: Start, said: list[str], tmp_path: Path) -> None:
    child = main("exec sleep 60")
    began = time.monotonic()
    stop(child.pid, script(tmp_path, f"kill {child.pid}"))
    assert time.monotonic() - began < 30
    assert child.wait(30) == -15
    assert re.fullmatch(
        r"info: at \d+\.\d s: asked the guest to shut down by its package's script", said[0]
    )
    assert said[1].startswith("info: the guest shut down in ")
    assert said[1].endswith("s, asked once, by its package's script")


@pytest.mark.usefixtures("quick")
def test_script_that_returns_at_once_is_not_believed(
    main: Start, said: list[str], tmp_path: Path
) -> None:
    # The guest takes its time; the script is back long before.
    child = main(f"while [ ! -e {tmp_path}/asked ]; do sleep 0.05; done; sleep 0.5")
    stop(child.pid, script(tmp_path, f"touch {tmp_path}/asked"), ask_again=AGAIN)
    assert child.wait(30) == 0
    assert "info: the guest shut down in" in said[-1]


def test_what_the_script_returned_is_logged(main: Start, said: list[str], tmp_path: Path) -> None:
    child = main(f"while [ ! -e {tmp_path}/asked ]; do sleep 0.05; done; sleep 3")
    path = script(tmp_path, f"touch {tmp_path}/asked; exit 3")
    stop(child.pid, path)
    told = rf"warning: {re.escape(path)} returned 3 after 1\.\d s, and the guest still runs"
    assert re.match(told, said[1])
    assert said[2].startswith("info: the guest shut down in ")
    assert len(said) == 3


@pytest.mark.usefixtures("quick")
def test_standard_input_is_held_open(main: Start, said: list[str], tmp_path: Path) -> None:
    # QEMU's script: asks, waits on its input, and what it started goes away at the end of it.
    child = main("exec sleep 60")
    body = f"cat >/dev/null; touch {tmp_path}/end-of-input; kill {child.pid}; sleep 60"
    began = time.monotonic()
    stop(child.pid, script(tmp_path, body), ask_again=AGAIN)
    # Its input ended when it was to be asked again, not at once.
    assert time.monotonic() - began >= AGAIN
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
        stop(child.pid, path, guest=0.4, ask_again=AGAIN)
    deadline = time.monotonic() + 5
    while left_of(marker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left_of(marker) == []


@pytest.mark.usefixtures("quick")
def test_patience_ends_in_sigterm(main: Start, said: list[str], tmp_path: Path) -> None:
    child = main("exec sleep 60")
    began = time.monotonic()
    with pytest.raises(MicrovmHostError) as caught:
        stop(child.pid, script(tmp_path, "exit 0"), guest=1, ask_again=AGAIN)
    assert 1 <= time.monotonic() - began < 30
    assert child.wait(30) == -15
    assert re.match(r"error: at \d+\.\d s", said[-1])
    assert said[-1].endswith(
        "s: the guest did not shut down within 1 s: sending SIGTERM to the hypervisor"
    )
    assert "the hypervisor ended by SIGTERM after " in str(caught.value)
    assert "TimeoutStopSec=" in caught.value.hint
    assert caught.value.exit_code == 1


def deaf(main: Start, tmp_path: Path) -> subprocess.Popen[bytes]:
    """A process that has SIGTERM ignored already."""
    child = main(f"trap '' TERM; touch {tmp_path}/deaf; exec sleep 60")
    while not (tmp_path / "deaf").exists():
        time.sleep(0.01)
    return child


@pytest.mark.usefixtures("quick")
def test_sigterm_ends_in_sigkill(main: Start, said: list[str], tmp_path: Path) -> None:
    child = deaf(main, tmp_path)
    with pytest.raises(MicrovmHostError, match=r"was killed after \d"):
        stop(child.pid, script(tmp_path, "exit 0"), guest=0.3, terminate=0.4)
    assert child.wait(30) == -9
    assert [line.rpartition(": ")[2] for line in said if line.startswith("error")] == [
        "sending SIGTERM to the hypervisor",
        "sending SIGKILL to the hypervisor",
    ]


@pytest.mark.usefixtures("quick")
def test_asked_again(main: Start, said: list[str], tmp_path: Path) -> None:
    # A guest that still boots misses the first two.
    child = main("exec sleep 60")
    body = f"echo >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -lt 3 ] || kill {child.pid}"
    stop(child.pid, script(tmp_path, body), ask_again=AGAIN)
    assert said[-1].endswith("s, asked 3 times, at last by its package's script")


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
    with pytest.raises(MicrovmHostError, match="ended by SIGTERM"):
        stop(child.pid, path)
    # At once: nobody was asked, so that there is nothing to wait for.
    assert time.monotonic() - began < 30
    assert child.wait(30) == -15
    assert re.match(rf"warning: at \d+\.\d s: {re.escape(path)}: cannot be executed", said[0])
    assert "the guest cannot be asked: sending SIGTERM" in said[1]


class FakeWay:
    """A way to ask that does what a list says, turn by turn: an error, or a line of shell."""

    def __init__(self, name: str, turns: list[str], *, may_work_later: bool = True) -> None:
        self.name = name
        self.may_work_later = may_work_later
        self.turns = turns

    def ask(self, _within: float) -> FakeWay:
        turn = self.turns.pop(0)
        if turn.startswith("!!"):
            raise NoGuest(turn)
        if turn.startswith("!"):
            raise MicrovmHostError(turn)
        subprocess.run(["/bin/sh", "-c", turn], check=True)
        return self

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...

    def report(self, clock: object) -> None: ...

    def heard(self) -> str | None:
        return "powered-off"


def test_ways_take_turns(main: Start, said: list[str]) -> None:
    child = main("exec sleep 60")
    ways = FakeWay("a", ["true", "true"]), FakeWay("b", ["!no", f"kill {child.pid}"])
    stop(child.pid, *ways, ask_again=0.1)
    assert [line.partition(" s: ")[2] or line for line in said[:-1]] == [
        "asked the guest to shut down by a",
        "!no",
        "asked the guest to shut down by a",
        "asked the guest to shut down by b",
    ]
    assert said[-1].startswith("info: the guest powered off in ")
    assert said[-1].endswith("s, asked 3 times, at last by b")


def test_a_way_that_fails_is_tried_again_and_told_of_once(main: Start, said: list[str]) -> None:
    # The hypervisor does not listen yet.
    child = main("exec sleep 60")
    stop(child.pid, FakeWay("a", ["!no", "!no", f"kill {child.pid}"]))
    (told,) = [line for line in said if "!no" in line]
    assert re.fullmatch(r"warning: at \d+\.\d s: !no", told)
    assert said[-1].startswith("info: the guest powered off in ")


@pytest.mark.parametrize("turns", [["!!none"], ["true", "!no", "!!none"]])
def test_nobody_waits_for_a_guest_that_there_is_not(
    main: Start, said: list[str], turns: list[str]
) -> None:
    child = main("exec sleep 60")
    stop(child.pid, FakeWay("a", turns), ask_again=0.1)
    assert child.wait(30) == -15
    assert said[-2] == "notice: !!none: ending the hypervisor by SIGTERM"
    assert said[-1].endswith("s, the guest could not be asked")


def test_ended_before_it_could_be_asked(main: Start, said: list[str]) -> None:
    child = main("sleep 0.3")
    stop(child.pid, FakeWay("a", ["!no", "!no"]))
    assert said[-1].endswith("s, before it could be asked")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a process of another user")
def test_another_users_hypervisor_is_left_to_systemd(said: list[str]) -> None:
    child = subprocess.Popen(["/bin/sleep", "60"])
    code = (
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from microvm_host import hypervisor\n"
        "os.setresuid(65534, 65534, 65534)\n"
        f"hypervisor.stop({child.pid}, [], hypervisor.Times())\n"
    )
    done = subprocess.run([sys.executable, "-BIS", "-c", code], capture_output=True, text=True)
    assert "runs as another user than its unit: leaving it to systemd" in done.stderr
    assert child.poll() is None
    child.kill()
    child.wait()


def test_no_descriptor_stays_open(main: Start, said: list[str], tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    child = main("exec sleep 60")
    stop(child.pid, script(tmp_path, f"kill {child.pid}"))
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("quick")
def test_a_guest_that_boots_is_asked_again_soon_and_then_less_often(
    main: Start, said: list[str], tmp_path: Path
) -> None:
    """It hears the fourth request; and a script that takes long to ask comes to its end."""
    child = main("exec sleep 60")
    count = f"echo x >>{tmp_path}/asked; [ $(wc -l <{tmp_path}/asked) -lt 4 ] && exit"
    times = Times(guest=20, ask_again=60, ask_first=0.2)
    ways = [hypervisor.Script(script(tmp_path, f"{count}; sleep 1; kill {child.pid}"))]
    began = time.monotonic()
    hypervisor.stop(child.pid, ways, times)
    # After 0.2, 0.4 and 0.8 seconds, and the one that the script takes.
    assert 2.4 <= time.monotonic() - began < 15
    assert "asked 4 times" in said[-1]


# ---- become


def become(tmp_path: Path, program: str) -> subprocess.CompletedProcess[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from microvm_host import hypervisor\n"
        "from microvm_host.errors import PackageError\n"
        "import os\n"
        "print(os.getpid(), flush=True)\n"
        "try:\n"
        f"    hypervisor.become({program!r}, 'Running it')\n"
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


def signals(status: str, key: str) -> set[int]:
    """The signals of a mask in /proc/PID/status."""
    mask = int(re.search(rf"^{key}:\t(\w+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    return {number for number in range(1, 65) if mask >> (number - 1) & 1}


def test_become_leaves_no_signal_as_python_had_it(tmp_path: Path) -> None:
    program = packages.program(tmp_path, "run", "#!/bin/sh\nexec cat /proc/self/status\n")
    status = become(tmp_path, str(program)).stdout
    assert signals(status, "SigBlk") == set()
    # What `machinectl poweroff` sends does not pull the plug.
    containers = {*range(37, 42), *range(47, 52)}
    # Who runs the tests may ignore others. Of those, SIGPIPE and SIGXFSZ are Python's.
    inherited = signals(Path("/proc/self/status").read_text(encoding="utf-8"), "SigIgn")
    inherited -= {signal.SIGPIPE, signal.SIGXFSZ}
    assert signals(status, "SigIgn") == containers | inherited


def test_the_script_has_the_signals_of_a_shell(
    main: Start, said: list[str], tmp_path: Path
) -> None:
    child = main("exec sleep 60")
    body = f"cat /proc/self/status >{tmp_path}/status; kill {child.pid}"
    stop(child.pid, script(tmp_path, body))
    # posix_spawn(3) of glibc ignores the two that glibc uses itself.
    assert signals((tmp_path / "status").read_text(), "SigIgn") <= {32, 33}


def test_become_without_interpreter(tmp_path: Path) -> None:
    program = packages.program(tmp_path, "bin/microvm-run", "#! /nonexistent/bash -e\n")
    done = become(tmp_path, str(program))
    assert done.returncode == 78
    assert f"{program}: cannot be executed: No such file or directory; its first line" in (
        done.stdout
    )


def test_become_on_a_file_system_without_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = packages.program(tmp_path, "bin/microvm-run", "#!/bin/sh\n")
    given = os.statvfs(program)
    flags = os.statvfs_result((*given[:8], os.ST_NOEXEC, given[9]))
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: flags)
    with pytest.raises(PackageError, match="mounted with noexec") as raised:
        hypervisor.become(str(program), None)
    assert "chmod" not in str(raised.value)


def test_become_what_may_not_run(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match="cannot be executed by this user"):
        hypervisor.become(str(packages.put(tmp_path, "run", "x")), "Running it")
