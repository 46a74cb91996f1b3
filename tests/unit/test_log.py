# SPDX-License-Identifier: MIT
"""Messages: to standard error, to the journal under the VM's unit, to systemd, to the kernel."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm_host import log


def listen(address: str | bytes) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listener.bind(address)
    listener.settimeout(5)
    return listener


@pytest.fixture
def journal(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A service of root's, and the journal that it writes to."""
    place = root / "run/systemd/journal"
    place.mkdir(parents=True)
    monkeypatch.setenv("MICROVM_HOST_ROOT", str(root))
    monkeypatch.setenv("INVOCATION_ID", "0123456789abcdef0123456789abcdef")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with listen(str(place / "socket")) as listener:
        yield listener


def fields(datagram: bytes) -> dict[str, str]:
    assert datagram.endswith(b"\n")
    return dict(line.split("=", 1) for line in datagram.decode().splitlines())


def test_plain(capsys: pytest.CaptureFixture[str]) -> None:
    log.error("it failed", vm="web")
    log.info("two\nlines")
    assert capsys.readouterr().err == "it failed\ntwo lines\n"


@pytest.mark.parametrize(
    ("function", "priority"),
    [(log.error, 3), (log.warning, 4), (log.notice, 5), (log.info, 6)],
)
def test_priorities(
    function: object,
    priority: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert callable(function)
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    function("one\ntwo")
    assert capsys.readouterr().err == f"<{priority}>one two\n"


def test_journal(journal: socket.socket, capsys: pytest.CaptureFixture[str]) -> None:
    log.error("it failed: ü", vm="web")
    assert fields(journal.recv(4096)) == {
        "MESSAGE": "it failed: ü",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "microvm-host",
        "OBJECT_SYSTEMD_UNIT": "microvm@web.service",
        "MICROVM_NAME": "web",
    }
    log.notice("of no VM")
    assert fields(journal.recv(4096)) == {
        "MESSAGE": "of no VM",
        "PRIORITY": "5",
        "SYSLOG_IDENTIFIER": "microvm-host",
    }
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("cgroup", "own"),
    [
        ("0::/machine.slice/microvm-set-booted@web.service\n", ["microvm-set-booted@web.service"]),
        ("1:name=systemd:/m.slice/microvm-x@web.service\n0::/\n", ["microvm-x@web.service"]),
        ("0::/machine.slice/microvm@web.service\n", []),
        ("0::/user.slice/session-1.scope\n", []),
        ("", []),
    ],
)
def test_journal_under_the_helpers_own_unit_too(
    journal: socket.socket, root: Path, cgroup: str, own: list[str]
) -> None:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    log.error("it failed", vm="web")
    lines = journal.recv(4096).decode().splitlines()
    units = [line for line in lines if line.startswith("OBJECT_SYSTEMD_UNIT=")]
    assert units == [f"OBJECT_SYSTEMD_UNIT={unit}" for unit in [*own, "microvm@web.service"]]


def test_journal_takes_only_roots_word(
    journal: socket.socket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    log.error("it failed", vm="web")
    assert capsys.readouterr().err == "<3>it failed\n"


def test_journal_message_adds_no_fields(journal: socket.socket) -> None:
    log.warning("a\nPRIORITY=0\nb", vm="web")
    assert fields(journal.recv(4096))["MESSAGE"] == "a PRIORITY=0 b"


def test_journal_of_what_is_no_text(journal: socket.socket) -> None:
    # A file's name that is not UTF-8, as os.listdir() gives it.
    log.error("bad name \udcff", vm="web")
    assert fields(journal.recv(4096))["MESSAGE"] == "bad name \\udcff"


@pytest.mark.usefixtures("journal")
def test_no_journal(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.unlink(root / "run/systemd/journal/socket")
    log.error("lost?", vm="web")
    assert capsys.readouterr().err == "lost?\n"


def test_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    log.error("nobody hears")


def test_notify_path(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = str(root / "notify")
    with listen(address) as listener:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        log.notify("READY=1\nSTATUS=Running")
        assert listener.recv(4096) == b"READY=1\nSTATUS=Running"
        log.status("Waiting …")
        assert listener.recv(4096) == "STATUS=Waiting …".encode()
        log.waiting("for it")
        assert listener.recv(4096) == b"STATUS=for it\nEXTEND_TIMEOUT_USEC=30000000"


def test_a_status_is_one_assignment_whatever_is_in_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd splits a message at line breaks, and takes a backslash for an escape."""
    address = str(root / "notify")
    with listen(address) as listener:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
        log.status("a\\x2db\nSTOPPING=1\rMAINPID=1\\")
        assert listener.recv(4096) == b"STATUS=a\\\\x2db STOPPING=1 MAINPID=1\\\\"
        log.waiting("a\\b\nREADY=1")
        assert listener.recv(4096).split(b"\n")[0] == b"STATUS=a\\\\b READY=1"


def test_notify_abstract(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"microvm-host-test-{secrets.token_hex(8)}"
    with listen(f"\0{name}") as listener:
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        log.status("x")
        assert listener.recv(4096) == b"STATUS=x"


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "relative", "/nonexistent/socket"])
def test_notify_nobody(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is not None:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    log.status("x")


def test_kernel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kmsg = tmp_path / "kmsg"
    kmsg.write_text("")
    log.kernel(log.ERR, "a.toml: broken", str(kmsg))
    # Facility 3 of syslog(3), daemon, and priority 3.
    assert kmsg.read_text() == "<27>microvm-generator: a.toml: broken\n"
    log.kernel(log.ERR, "no kmsg", str(tmp_path / "none"))
    assert capsys.readouterr().err == "no kmsg\n"
    assert not os.path.exists(tmp_path / "none")


# ---- a journald or systemd that hangs

HANGS = """
import os, sys
sys.path.insert(0, sys.argv[1])
from microvm_host import log
os.geteuid = lambda: int(sys.argv[2])
log.SYSTEMD_WITHIN = 0.5
for _ in range(3):
    log.error("it failed", vm="web")
    log.notify("READY=1")
print("done")
"""


@pytest.mark.parametrize("uid", [0, 1000])
def test_nothing_waits_for_long_where_nobody_reads(root: Path, uid: int) -> None:
    """journald and systemd are stopped; their queues are full."""
    (root / "run/systemd/journal").mkdir(parents=True)
    sockets = [str(root / "run/systemd/journal/socket"), str(root / "notify")]
    listeners = [listen(path) for path in sockets]
    for path in sockets:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.setblocking(False)
            with pytest.raises(BlockingIOError):
                while True:
                    sender.sendto(b"x", path)
    theirs, ours = socket.socketpair()
    ours.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            ours.send(bytes(4096))
    ours.setblocking(True)
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-IS", "-c", HANGS, str(Path(__file__).parents[2]), str(uid)],
        env={
            "MICROVM_HOST_ROOT": str(root),
            "INVOCATION_ID": "0123456789abcdef0123456789abcdef",
            "JOURNAL_STREAM": "8:1",
            "NOTIFY_SOCKET": str(root / "notify"),
        },
        stdout=subprocess.PIPE,
        stderr=ours.fileno(),
        timeout=20,
    )
    assert done.stdout == b"done\n"
    # Once for each that does not read, not once for each message.
    assert time.monotonic() - began < 5
    for each in (*listeners, theirs, ours):
        each.close()
