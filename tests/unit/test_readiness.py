# SPDX-License-Identifier: MIT
"""Waiting for the guest: what is believed of a hostile one, on real sockets.

`Systemd` is a fake of the host's systemd: it takes sd_notify(3)'s datagrams. Guests behind a
hypervisor that carries vsock itself are real connections to the real socket; those behind the
kernel's vsock are fakes that bring a made-up CID, since unit tests have no guest.
"""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microvm_host import log, readiness
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths
from microvm_host.readiness import MESSAGE_MAX, STATUS_MAX, Address, Listener, Word
from microvm_host.record import Record

from . import packages

REPOSITORY = Path(__file__).parents[2]


# ---- what a guest says


def heard(*messages: bytes) -> Word:
    word = Word()
    for message in messages:
        word.hear(message)
    return word


@pytest.mark.parametrize(
    "messages",
    [
        [b"READY=1"],
        [b"READY=1\n"],
        [b"READY=1\nSTATUS=Ready."],
        [b"STATUS=x\nREADY=1\nMAINPID=1"],
        [b"\xff\0=\n\nREADY=1"],
        [b"X_SYSTEMD_UNIT_ACTIVE=basic.target", b"READY=1"],
        # Mended by whoever sat at the guest's console.
        [
            b"X_SYSTEMD_UNIT_ACTIVE=emergency.target",
            b"READY=1",
            b"X_SYSTEMD_UNIT_INACTIVE=emergency.target",
        ],
    ],
)
def test_words_of_one_that_is_ready(messages: list[bytes]) -> None:
    assert heard(*messages).is_ready


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [b""],
        [b"READY=0"],
        [b"READY=11"],
        [b"READY=1 "],
        [b"READY=1\r\n"],
        [b" READY=1"],
        [b"ready=1"],
        [b"XREADY=1"],
        [b"STATUS=READY=1"],
        [b"READY=1\0"],
        [b"READY"],
        # As systemd 260 says it in a guest whose root did not mount.
        [b"X_SYSTEMD_UNIT_ACTIVE=emergency.target", b"READY=1\nSTATUS=Ready."],
        [b"READY=1\nX_SYSTEMD_UNIT_ACTIVE=rescue.target"],
        [
            b"X_SYSTEMD_UNIT_ACTIVE=emergency.target",
            b"X_SYSTEMD_UNIT_INACTIVE=rescue.target",
            b"READY=1",
        ],
    ],
)
def test_words_of_one_that_is_not_ready(messages: list[bytes]) -> None:
    assert not heard(*messages).is_ready


@pytest.mark.parametrize(
    ("given_", "shown"),
    [
        (b"Reached target Basic System.", "Reached target Basic System."),
        ("grüezi".encode(), "grüezi"),
        (b"\x1b[2J\x07bell\ttab", "?[2J?bell?tab"),
        (b"\xff\xfe", "��"),
        # Text that runs backwards, and a line break that is none to split().
        ("abc\u202edef".encode(), "abc?def"),
        ("a\u2028b\x85".encode(), "a?b?"),
        (b" " * 50, ""),
        (b"x" * STATUS_MAX, "x" * STATUS_MAX),
        (b"x" * 4000, "x" * (STATUS_MAX - 1) + "…"),
    ],
)
def test_status(given_: bytes, shown: str) -> None:
    assert heard(b"STATUS=" + given_).status == shown


def test_what_is_told_of_a_guest_that_is_not_ready() -> None:
    assert heard().describe() == "it has said nothing"
    assert heard(b"STATUS=Starting").describe() == "it says: Starting"
    emergency = heard(b"STATUS=x", b"X_SYSTEMD_UNIT_ACTIVE=emergency.target", b"READY=1")
    assert emergency.describe() == "it is in its emergency.target"


LINES = st.lists(
    st.sampled_from(
        [b"READY=1", b"READY=", b"STATUS=", b"\n", b"\0", b"=", b"X_SYSTEMD_UNIT_ACTIVE="]
        + [b"emergency.target", b"MAINPID=1", b"\x1b]0;x\x07", b"\xff", "ü\u202e".encode()]
    )
    | st.binary(max_size=30)
).map(b"".join)


@settings(max_examples=300, deadline=None, database=None)
@given(st.lists(LINES, max_size=5))
def test_any_words(messages: list[bytes]) -> None:
    word = heard(*messages)
    assert word.status.isprintable()
    assert len(word.status) <= STATUS_MAX
    assert word.describe().isprintable()
    if word.is_ready:
        assert any(line == b"READY=1" for each in messages for line in each.split(b"\n"))


# ---- the listener


class Systemd:
    """A fake of the host's systemd: takes notify messages, and lets go of descriptors in turn."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.messages: list[str] = []
        self.barriers = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            data, fds, *_ = socket.recv_fds(self.socket, 65536, 8)
            if data == b"end":
                return
            self.may_go_on.wait(10)
            if data == b"BARRIER=1":
                self.barriers += 1
            else:
                self.messages.append(data.decode())
            for fd in fds:
                os.close(fd)

    def end(self, path: Path) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(b"end", str(path))
        self._thread.join(5)
        self.socket.close()

    @property
    def statuses(self) -> list[str]:
        return [
            line.removeprefix("STATUS=")
            for message in self.messages
            for line in message.split("\n")
            if line.startswith("STATUS=")
        ]


@pytest.fixture
def systemd(root: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    path = root / "systemd"
    monkeypatch.setenv("NOTIFY_SOCKET", str(path))
    fake = Systemd(path)
    yield fake
    fake.end(path)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for word in ("info", "notice", "warning", "error"):
        monkeypatch.setattr(log, word, lambda text, word=word: lines.append(f"{word}: {text}"))
    return lines


class Running:
    """A listener that runs in a thread, and guests of it."""

    def __init__(self, listener: Listener, path: Path) -> None:
        self.listener = listener
        self.path = path
        self.outcome = ""
        # What a hypervisor that ends and somebody who asks would make readable.
        self._hypervisor, self.hypervisor_ends = os.pipe()
        self._asked, self.ask = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.outcome = self.listener.run(self._hypervisor, self._asked)

    def await_socket(self) -> None:
        deadline = time.monotonic() + 5
        while not self.path.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    def connect(self) -> socket.socket:
        deadline = time.monotonic() + 5
        while True:
            guest = socket.socket(socket.AF_UNIX)
            guest.settimeout(10)
            try:
                guest.connect(str(self.path))
            except ConnectionRefusedError:
                # The socket is there a moment before anybody listens on it.
                guest.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return guest

    def say(self, message: bytes) -> None:
        """As systemd does in a guest: send, close."""
        with self.connect() as guest:
            guest.sendall(message)

    def ended(self, within: float = 10) -> bool:
        self._thread.join(within)
        return not self._thread.is_alive()

    def close(self) -> None:
        for fd in (self._hypervisor, self.hypervisor_ends, self._asked, self.ask):
            os.close(fd)


Start = Callable[..., Running]


def nobody() -> list[str]:
    return []


@pytest.fixture
def start(root: Path, systemd: Systemd, said: list[str]) -> Iterator[Start]:
    begun: list[Running] = []

    def start(timeout: float | None = 60) -> Running:
        path = root / "notify.vsock_8888"
        listener = Listener(Address(str(path)), timeout=timeout, others=nobody)
        begun.append(Running(listener, path))
        return begun[-1]

    yield start
    for running in begun:
        if not running.ended(0):
            os.write(running.ask, b"x")
            assert running.ended()
            assert running.outcome == readiness.ASKED
        running.close()


def test_ready(start: Start, systemd: Systemd, said: list[str]) -> None:
    running = start()
    running.say(b"X_SYSTEMD_HOSTNAME=guest")
    assert not running.ended(0.05)
    running.say(b"READY=1\nSTATUS=Ready.\nMAINPID=1\nFDSTORE=1\nWATCHDOG=trigger")
    assert running.ended()
    assert (running.outcome, running.listener.status) == (readiness.READY, "Ready.")
    readiness.tell("STATUS=done")
    text = "\n".join(systemd.messages)
    for key in ("MAINPID", "FDSTORE", "WATCHDOG", "HOSTNAME"):
        assert key not in text
    assert said[-1].startswith("info: the guest is ready after 0.")
    assert not running.path.exists()


def test_a_slow_systemd_is_waited_for(systemd: Systemd) -> None:
    """It looks up who sent a message when it comes to it: that process must still be there."""
    systemd.may_go_on.clear()
    telling = threading.Thread(target=readiness.tell, args=("READY=1",))
    telling.start()
    telling.join(0.5)
    assert telling.is_alive()
    systemd.may_go_on.set()
    telling.join(10)
    assert not telling.is_alive()
    assert (systemd.messages, systemd.barriers) == (["READY=1"], 1)


def test_the_hypervisor_has_ended(start: Start, said: list[str]) -> None:
    running = start()
    os.write(running.hypervisor_ends, b"x")
    assert running.ended()
    assert running.outcome == readiness.ENDED
    assert said == ["notice: the hypervisor ended before the guest was ready"]
    assert not running.path.exists()


def test_time_spent_before_is_not_the_guests(start: Start, systemd: Systemd) -> None:
    running = start(timeout=77)
    running.say(b"READY=1")
    assert running.ended()
    # Behind it, whatever was sent before has been taken in.
    readiness.tell("STATUS=done")
    assert "EXTEND_TIMEOUT_USEC=77000000" in systemd.messages


def test_status_is_passed_on_while_waiting(start: Start, systemd: Systemd) -> None:
    running = start()
    running.say(b"STATUS=Mounting\x1b[0m")
    deadline = time.monotonic() + 5
    expected = "Waiting for the guest to be ready; it says: Mounting?[0m"
    while expected not in systemd.statuses and time.monotonic() < deadline:
        time.sleep(0.01)
    assert expected in systemd.statuses


def test_a_guest_that_chatters_does_not_make_systemd_listen(start: Start, systemd: Systemd) -> None:
    running = start()
    began = time.monotonic()
    for number in range(500):
        with running.connect() as guest:
            guest.sendall(b"STATUS=%d" % number)
            guest.shutdown(socket.SHUT_WR)
            # As a newer systemd does.
            assert guest.recv(1) == b""
    running.say(b"READY=1")
    assert running.ended()
    took = time.monotonic() - began
    readiness.tell("STATUS=done")
    assert len(systemd.messages) <= 5 + took / readiness.STATUS_EVERY
    assert running.listener.status == "499"


def test_a_sender_whose_end_does_not_come(start: Start) -> None:
    """cloud-hypervisor keeps the guest's shutdown(2) to itself; the guest waits for our end."""
    running = start()
    with running.connect() as guest:
        began = time.monotonic()
        guest.sendall(b"READY=1")
        assert guest.recv(1) == b""
        assert time.monotonic() - began < readiness.CONNECTION_MAX / 2
    assert running.ended()


def test_in_pieces(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    # Longer than a busy machine keeps this process waiting between two pieces.
    monkeypatch.setattr(readiness, "SILENCE", 10.0)
    running = start()
    with running.connect() as guest:
        for piece in (b"REA", b"DY", b"=1\nSTA"):
            guest.sendall(piece)
            time.sleep(0.01)
        guest.shutdown(socket.SHUT_WR)
    assert running.ended()


def test_two_senders_do_not_mix(start: Start) -> None:
    running = start()
    with running.connect() as one, running.connect() as other:
        one.sendall(b"REA")
        other.sendall(b"DY=1")
    assert not running.ended(0.2)


@pytest.mark.parametrize("size", [MESSAGE_MAX + 1, 10 * MESSAGE_MAX])
def test_too_large(start: Start, size: int) -> None:
    running = start()
    try:
        running.say(b"READY=1\n" + b"x" * (size - 8))
    except (BrokenPipeError, ConnectionResetError):
        # It was not even read to its end.
        pass
    assert not running.ended(0.2)


def test_largest(start: Start) -> None:
    running = start()
    running.say(b"x" * (MESSAGE_MAX - 8) + b"\nREADY=1")
    assert running.ended()


def test_connections_that_say_nothing_do_not_shut_out_the_one_that_does(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readiness, "CONNECTION_MAX", 0.3)
    running = start()
    idle = [running.connect() for _ in range(readiness.CONNECTIONS_MAX)]
    time.sleep(0.05)
    running.say(b"READY=1")
    assert running.ended()
    for each in idle:
        each.close()


def test_a_connection_that_never_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then is no silence."""
    monkeypatch.setattr(readiness, "CONNECTION_MAX", 0.5)
    running = start()
    with running.connect() as guest:
        began = time.monotonic()
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while time.monotonic() < began + 10:
                guest.sendall(b"x")
                time.sleep(0.05)
    assert time.monotonic() - began < 5


def test_the_packages_script_removes_the_socket(start: Start) -> None:
    """As those of microvm.nix for cloud-hypervisor do, before the hypervisor starts."""
    running = start()
    running.path.unlink()
    running.await_socket()
    running.say(b"READY=1")
    assert running.ended()
    assert not running.path.exists()


def test_a_socket_of_somebody_elses_is_left(start: Start, root: Path) -> None:
    running = start()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(root / "other"))
        os.replace(root / "other", running.path)
        inode = running.path.stat().st_ino
        time.sleep(3 * readiness.LOOK_AFTER_SOCKET_EVERY)
        assert running.path.stat().st_ino == inode
        running.path.unlink()
        running.await_socket()


def test_left_by_a_run_that_was_killed(start: Start, root: Path) -> None:
    with socket.socket(socket.AF_UNIX) as former:
        former.bind(str(root / "notify.vsock_8888"))
    running = start()
    assert stat.S_IMODE(running.path.stat().st_mode) == 0o600
    running.say(b"READY=1")
    assert running.ended()


def test_something_is_in_the_way(root: Path) -> None:
    path = root / "notify.vsock_8888"
    path.write_text("")
    with pytest.raises(MicrovmHostError, match="cannot listen there for the guest") as caught:
        Listener(Address(str(path)), timeout=1, others=nobody)
    assert caught.value.path == str(path)
    assert path.exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "it has said nothing"),
        ([b"STATUS=A start job is running"], "it says: A start job is running"),
        (
            [b"X_SYSTEMD_UNIT_ACTIVE=emergency.target", b"READY=1\nSTATUS=Ready."],
            "it is in its emergency.target",
        ),
    ],
)
def test_the_time_is_over(
    start: Start, systemd: Systemd, said: list[str], words: list[bytes], told: str
) -> None:
    running = start(timeout=1.5)
    for word in words:
        running.say(word)
    reason = f"the guest did not become ready within 2 s (TimeoutStartSec=): {told}"
    deadline = time.monotonic() + 5
    while reason not in systemd.statuses and time.monotonic() < deadline:
        time.sleep(0.01)
    assert reason in systemd.statuses
    assert f"error: {reason}" in said
    # Before systemd's own time was over, and it is systemd who ends it.
    assert not running.ended(0)
    assert not any("READY=1" in message for message in systemd.messages)


# ---- vsock


class KernelsVsock:
    """A fake of a listening vsock socket: connections come with a peer's CID."""

    def __init__(self) -> None:
        self._pending: list[tuple[int, tuple[int, int]]] = []
        self._ours, self._theirs = socket.socketpair()
        self._ours.setblocking(False)

    def fileno(self) -> int:
        return self._ours.fileno()

    def come(self, cid: int, message: bytes) -> socket.socket:
        guest, host = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        guest.sendall(message)
        guest.shutdown(socket.SHUT_WR)
        self._pending.append((host.detach(), (cid, 1023)))
        self._theirs.send(b"x")
        guest.settimeout(10)
        return guest

    def _accept(self) -> tuple[int, tuple[int, int]]:
        self._ours.recv(1)
        return self._pending.pop(0)

    def close(self) -> None:
        self._ours.close()
        self._theirs.close()


def test_only_its_own_guest_is_heard(
    systemd: Systemd, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = KernelsVsock()
    monkeypatch.setattr(readiness, "_vsock", lambda port, is_stream: kernel)
    address = Address(port=8888, cid=42)
    listener = Listener(address, timeout=60, others=nobody)
    running = Running(listener, Path())
    # Another guest, the host itself, and any program over the loopback.
    for cid in (43, 2, 1):
        with kernel.come(cid, b"READY=1") as guest, pytest.raises(ConnectionResetError):
            # Closed without having been read.
            guest.recv(1)
    assert not running.ended(0.1)
    with kernel.come(42, b"READY=1\nSTATUS=hi") as guest:
        assert guest.recv(1) == b""
    assert running.ended()
    assert (running.outcome, listener.status) == (readiness.READY, "hi")
    running.close()


def listen_by_vsock(kind: int, port: int = 0xFFFFFFFF) -> socket.socket:
    try:
        taken = socket.socket(socket.AF_VSOCK, kind)
        taken.bind((socket.VMADDR_CID_ANY, port))
        taken.listen()
    except OSError as error:
        pytest.skip(f"this kernel has no vsock: {error}")
    return taken


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_port_that_is_taken_is_waited_for(
    systemd: Systemd, said: list[str], *, is_stream: bool
) -> None:
    kind = socket.SOCK_STREAM if is_stream else socket.SOCK_SEQPACKET
    taken = listen_by_vsock(kind)
    port = taken.getsockname()[1]
    address = Address(port=port, cid=42, is_stream=is_stream)
    later = threading.Timer(0.4, taken.close)
    later.start()
    began = time.monotonic()
    listener = Listener(address, timeout=30, others=lambda: ["db", "web"])
    assert time.monotonic() - began >= 0.3
    assert said == [
        f"notice: vsock port {port} is taken, perhaps by microVM db, web: waiting for it"
    ]
    later.join()
    # It has the port by now.
    with socket.socket(socket.AF_VSOCK, kind) as other, pytest.raises(OSError, match="in use"):
        other.bind((socket.VMADDR_CID_ANY, port))
    running = Running(listener, Path())
    os.write(running.ask, b"x")
    assert running.ended()
    running.close()


def test_a_port_that_stays_taken(systemd: Systemd, said: list[str]) -> None:
    taken = listen_by_vsock(socket.SOCK_STREAM)
    port = taken.getsockname()[1]
    with pytest.raises(MicrovmHostError) as caught:
        Listener(Address(port=port, cid=42), timeout=0.5, others=nobody)
    assert str(caught.value) == (
        f"vsock port {port} is taken by what is no microVM; give each VM a port of its own"
    )
    taken.close()


# ---- the whole start, with the real helper


@pytest.fixture
def web(host: HostPaths) -> Path:
    package = packages.minimal(Path(host.at("/packages/web")))
    os.mkdir(host.vm("web"))
    os.symlink(package, host.booted("web"))
    record = Record(host.record("web", "booted"))
    record.append("hypervisor", "cloud-hypervisor")
    record.append("readiness", "guest")
    record.append("notify", "unix", "notify.vsock_8888")
    record.append("start-timeout", "30")
    return package


def helper(host: HostPaths, systemd: str, **environment: str) -> subprocess.Popen[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from microvm_host.helper import entry\n"
        "sys.exit(entry.main(['helper', 'start', 'web']))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-BIS", "-c", code],
        cwd=host.vm("web"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={
            "PATH": "/usr/bin:/bin",
            "MICROVM_HOST_ROOT": host.root,
            "NOTIFY_SOCKET": systemd,
            **environment,
        },
    )


def say(host: HostPaths, message: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as guest:
        guest.connect(f"{host.vm('web')}/notify.vsock_8888")
        guest.sendall(message)
        guest.shutdown(socket.SHUT_WR)
        # The end comes when it was taken in.
        assert guest.recv(1) == b""


def test_the_hypervisor_gets_nothing_of_it(host: HostPaths, web: Path, systemd: Systemd) -> None:
    """No child, no descriptor, no $NOTIFY_SOCKET; and the socket is there before it runs."""
    packages.program(
        web,
        "bin/microvm-run",
        "#!/bin/sh\nset -u\n"
        "test -S notify.vsock_8888 && echo socket\n"
        # Not by a program, which would be a child.
        "read -r children < /proc/$$/task/$$/children || true\n"
        'echo "children:$children"\n'
        'for fd in /proc/$$/fd/*; do echo "fd $(readlink $fd)"; done\n'
        "while read -r line; do\n"
        "case $line in SigBlk*|SigIgn*) echo $line; esac\n"
        "done < /proc/$$/status\n"
        'echo "pid:$$"\n'
        'echo "notify:$NOTIFY_SOCKET"\n'
        "exec sleep 30\n",
    )
    child = helper(host, str(systemd.socket.getsockname()))
    assert child.stdout is not None
    lines: list[str] = []
    while not lines or not lines[-1].startswith("notify:"):
        lines.append(child.stdout.readline().strip())
        assert child.poll() is None, lines
    descriptors = {line.split(":")[0] for line in lines if line.startswith("fd")}
    # Standard input, output and error, and the shell's script.
    assert descriptors == {"fd /dev/null", "fd pipe", f"fd {web}/bin/microvm-run"}
    main = next(line for line in lines if line.startswith("pid:"))[4:]
    masks = {line[:6]: int(line.split()[1], 16) for line in lines if line.startswith("Sig")}
    # Not all that could be, since Python ignores SIGPIPE.
    assert masks["SigBlk"] == 0
    assert not masks["SigIgn"] & 1 << signal.SIGTERM - 1
    assert [line for line in lines if not line.startswith(("fd", "Sig", "pid"))] == [
        "socket",
        "children:",
        "notify:",
    ]
    assert not any("READY=1" in message for message in systemd.messages)
    say(host, b"READY=1\nSTATUS=Ready.")
    child.wait(timeout=10)
    assert child.returncode == 0
    package = f"{host.root}/packages/web"
    assert systemd.messages[-1] == (
        f"MAINPID={main}\nREADY=1\nSTATUS=Running cloud-hypervisor from {package}; "
        "the guest says: Ready."
    )
    # All of it was taken in before this process ended.
    assert systemd.barriers == 1
    # It is not ours any more; here, process 1 stands for systemd.
    assert "PPid:\t1\n" in Path(f"/proc/{main}/status").read_text()
    os.kill(int(main), signal.SIGKILL)
    child.communicate()


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("exit 3", 3),
        ("exit 0", 0),
        ("kill -TERM $$", -signal.SIGTERM),
        ("kill -KILL $$", -signal.SIGKILL),
        ("ulimit -c 0; kill -SEGV $$", -signal.SIGSEGV),
    ],
)
def test_the_hypervisor_ends_first(
    host: HostPaths, web: Path, systemd: Systemd, end: str, code: int
) -> None:
    packages.program(web, "bin/microvm-run", f"#!/bin/sh\n{end}\n")
    child = helper(host, str(systemd.socket.getsockname()))
    # Until all have closed it: nobody is left.
    _, complaints = child.communicate(timeout=10)
    assert child.returncode == code
    assert complaints == "the hypervisor ended before the guest was ready\n"
    assert not os.path.exists(f"{host.vm('web')}/notify.vsock_8888")


def test_the_hypervisor_cannot_be_executed(host: HostPaths, web: Path, systemd: Systemd) -> None:
    packages.program(web, "bin/microvm-run", "#!/no/such/shell\n")
    child = helper(host, str(systemd.socket.getsockname()))
    _, complaints = child.communicate(timeout=10)
    # As without a guest to wait for.
    assert child.returncode == 78
    assert "bin/microvm-run: cannot be executed: No such file or directory" in complaints


# Waits to be asked by its script, and says so.
ASKED = (
    "#!/bin/sh\ntrap 'echo asked; exit 0' USR1\ntrap 'echo plug pulled; exit 1' TERM\n"
    "echo waiting\nwhile :; do sleep 0.01; done\n"
)


def test_stopped_before_the_guest_is_ready(host: HostPaths, web: Path, systemd: Systemd) -> None:
    """As systemd does it: SIGTERM to the main process."""
    packages.program(web, "bin/microvm-run", ASKED)
    packages.program(web, "bin/microvm-shutdown", '#!/bin/sh\nkill -USR1 "$MAINPID"\n')
    child = helper(host, str(systemd.socket.getsockname()))
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    child.terminate()
    shown, said = child.communicate(timeout=10)
    assert shown == "asked\n"
    assert "asked the guest to shut down by its package's script" in said
    assert child.returncode == 0
    # A stop is bounded by systemd alone.
    asking = [each for each in systemd.messages if "shut down" in each]
    assert asking and not any("EXTEND_TIMEOUT_USEC=" in each for each in asking)
    assert not any("READY=1" in message for message in systemd.messages)
    assert not os.path.exists(f"{host.vm('web')}/notify.vsock_8888")


def test_stopped_before_the_guest_is_ready_by_force(
    host: HostPaths, web: Path, systemd: Systemd
) -> None:
    packages.program(web, "bin/microvm-run", ASKED)
    child = helper(host, str(systemd.socket.getsockname()), MICROVM_SHUTDOWN_SECONDS="0.2")
    packages.program(web, "bin/microvm-shutdown", "#!/bin/sh\n")
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    child.terminate()
    shown, said = child.communicate(timeout=10)
    assert shown == "plug pulled\n"
    assert "the guest was not shut down" in said
    assert child.returncode == 1


def test_stopped_when_systemd_has_not_yet_heard_of_the_guest(
    host: HostPaths, web: Path, systemd: Systemd
) -> None:
    """It still takes this process for the main one, and kills what is left when that ends."""
    packages.program(web, "bin/microvm-run", ASKED)
    packages.program(web, "bin/microvm-shutdown", '#!/bin/sh\nkill -USR1 "$MAINPID"\n')
    child = helper(host, str(systemd.socket.getsockname()))
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    systemd.may_go_on.clear()
    say(host, b"READY=1")
    time.sleep(0.2)
    child.terminate()
    time.sleep(0.1)
    systemd.may_go_on.set()
    shown, _ = child.communicate(timeout=10)
    assert shown == "asked\n"
    assert child.returncode == 0


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ("exec", "READY=1\nSTATUS=Running cloud-hypervisor from {}"),
        ("", None),
    ],
)
def test_the_administrator_decides(
    host: HostPaths, web: Path, systemd: Systemd, wanted: str, expected: str | None
) -> None:
    packages.program(web, "bin/microvm-run", "#!/bin/sh\nsleep 0.2\n")
    child = helper(host, str(systemd.socket.getsockname()), MICROVM_READINESS=wanted)
    child.communicate(timeout=10)
    ready = [message for message in systemd.messages if "READY=1" in message]
    package = f"{host.root}/packages/web"
    assert ready == ([expected.format(package)] if expected else [])


@pytest.mark.parametrize(
    ("record", "wanted", "complaint"),
    [
        ([], "guest", "MICROVM_READINESS=guest, but the package gives the guest no vsock"),
        ([("readiness", "exec")], "soon", "MICROVM_READINESS='soon' is neither exec nor guest"),
    ],
)
def test_cannot_be_waited_for(
    host: HostPaths,
    web: Path,
    systemd: Systemd,
    record: list[tuple[str, ...]],
    wanted: str,
    complaint: str,
) -> None:
    booted = Record(host.record("web", "booted"))
    booted.clear()
    for line in record:
        booted.append(*line)
    child = helper(host, str(systemd.socket.getsockname()), MICROVM_READINESS=wanted)
    _, complaints = child.communicate(timeout=10)
    assert child.returncode == 1
    assert complaint in complaints
