# SPDX-License-Identifier: MIT
"""The line on a terminal that says what is being done, on a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
from collections.abc import Iterator
from subprocess import TimeoutExpired
from types import SimpleNamespace

import pytest

from microvm_host import names, systemd
from microvm_host.cli import jobs, progress
from microvm_host.cli.progress import Line

# As hypervisor.py writes it while it waits for a guest.
STATUS = "Waiting for the guest to shut down, asked by the power button (qmp), 9 s of 1min 30s"


class Terminal:
    """A terminal of 80 columns as standard error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._master, slave = pty.openpty()
        self.file = os.fdopen(slave, "w", encoding="utf-8")
        self.resize(80)
        monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=self.file))

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.file, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def shown(self) -> str:
        """What was written to it."""
        # What is written arrives in pieces.
        self.file.write("\0")
        self.file.flush()
        found = b""
        while not found.endswith(b"\0"):
            found += os.read(self._master, 65536)
        return found.decode().removesuffix("\0")

    def close(self) -> None:
        self.file.close()
        os.close(self._master)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    found = Terminal(monkeypatch)
    yield found
    found.close()


def test_a_text_replaces_the_last_one(terminal: Terminal) -> None:
    line = Line()
    line.show("installing a")
    line.show("installing b")
    line.show("")
    line.clear()
    assert terminal.shown() == "\rinstalling a\033[K\rinstalling b\033[K\r\033[K"


@pytest.mark.parametrize(("length", "kept"), [(79, 79), (80, 78), (200, 78)])
def test_a_long_text_does_not_wrap(terminal: Terminal, length: int, kept: int) -> None:
    Line().show("x" * length)
    assert terminal.shown() == f"\r{'x' * kept}{'' if kept == length else '…'}\033[K"


def test_a_terminal_of_unknown_size(terminal: Terminal) -> None:
    terminal.resize(0)
    Line().show("x" * 100)
    assert len(terminal.shown()) == len(f"\r{'x' * 78}…\033[K")


def test_nothing_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    line = Line()
    line.show("installing a")
    line.clear()
    assert capsys.readouterr() == ("", "")


class Stop:
    """A `systemctl stop` that takes three looks of 0.7 seconds."""

    returncode = 0
    seconds = 0.0

    def __init__(self, argv: list[str], **_: object) -> None:
        assert argv[:2] == ["systemctl", "stop"]
        self._looks = 3

    def communicate(self, timeout: float) -> tuple[None, str]:
        if self._looks == 0:
            return None, ""
        self._looks -= 1
        Stop.seconds += 0.7
        raise TimeoutExpired("systemctl", timeout)


def test_a_stop_says_what_it_waits_for(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stop, "seconds", 0.0)
    monkeypatch.setattr("time.monotonic", lambda: Stop.seconds)
    monkeypatch.setattr("subprocess.Popen", Stop)
    states = {names.unit("web"): "active"}
    monkeypatch.setattr(systemd, "states", lambda *_: states)
    facts = {"ActiveState": "deactivating", "StatusText": STATUS}
    monkeypatch.setattr(systemd, "show", lambda unit, *_: facts)
    jobs.run("stop", ["web"])
    # Nothing in the first second; then a line a look, each within 80 columns, and none at the end.
    assert terminal.shown() == (
        "\rstopping web … 1 s: Waiting for the guest to shut down, asked by the power but…\033[K"
        "\rstopping web … 2 s: Waiting for the guest to shut down, asked by the power but…\033[K"
        "\r\033[K"
    )
