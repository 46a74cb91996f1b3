# SPDX-License-Identifier: MIT
"""Into guests, against made-up ones on real sockets: attaching, console, agent and balloon.

tests/system/test_access.py has a real guest.
"""

from __future__ import annotations

import base64
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microvm_host import attach, balloon, console, control, guestagent
from microvm_host.attach import NobodyThere, Running
from microvm_host.errors import MicrovmHostError, UsageError
from microvm_host.paths import HostPaths
from microvm_host.record import Record
from microvm_host.runner import ControlSocket, Package

from . import packages

Answer = Callable[[socket.socket], None]
REPOSITORY = Path(__file__).parents[2]


class Fake:
    """Listens at a socket, and gives each client to a function, one at a time as QEMU does."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.path = str(path)
        self.clients = 0
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._answer = answer
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.clients += 1
            with client:
                client.settimeout(10)
                try:
                    self._answer(client)
                except OSError:
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def listen(root: Path) -> Iterator[Callable[..., Fake]]:
    fakes: list[Fake] = []

    def start(answer: Answer, name: str = "fake.sock") -> Fake:
        fakes.append(Fake(root / name, answer))
        return fakes[-1]

    yield start
    for fake in fakes:
        fake.close()


def never(client: socket.socket) -> None:
    client.recv(1)


def vm_in(directory: Path, **fields: object) -> Running:
    package = Package(path=str(directory), **fields)  # type: ignore[arg-type]
    return Running("web", str(directory), package, os.getuid(), os.getgid(), "me")


# ---- attaching


def test_attaches_to_a_socket_of_the_users(listen: Callable[..., Fake], root: Path) -> None:
    listen(lambda client: client.sendall(b"hello"))
    with vm_in(root).connect("fake.sock", 5) as peer:
        assert peer.recv(5) == b"hello"


def test_attaches_to_nothing_of_others(listen: Callable[..., Fake], root: Path) -> None:
    fake = listen(never)
    with pytest.raises(MicrovmHostError, match="is not a socket of the VM's user"):
        attach.connect(fake.path, os.getuid() + 1, 5)
    (root / "link.sock").symlink_to(fake.path)
    (root / "file.sock").write_text("")
    for name in ("link.sock", "file.sock"):
        with pytest.raises(MicrovmHostError, match="is not a socket of the VM's user"):
            attach.connect(str(root / name), os.getuid(), 5)
    assert fake.clients == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a socket away, which takes root")
def test_attaches_to_no_process_of_others(listen: Callable[..., Fake]) -> None:
    # The socket is the user's, who has it by a hard link perhaps; who listens is not.
    fake = listen(never)
    os.chown(fake.path, 12345, 12345)
    with pytest.raises(MicrovmHostError, match="does not lead to a process of the VM's user"):
        attach.connect(fake.path, 12345, 5)


def test_tells_that_nobody_is_there(root: Path) -> None:
    with pytest.raises(NobodyThere, match="there is no such socket"):
        attach.connect(str(root / "none.sock"), os.getuid(), 5)
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(root / "left.sock"))
    left.close()
    with pytest.raises(NobodyThere, match="nobody listens"):
        attach.connect(str(root / "left.sock"), os.getuid(), 5)


def test_gives_up_where_others_wait_already(root: Path) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(root / "full.sock"))
    listener.listen(0)
    with listener, attach.connect(str(root / "full.sock"), os.getuid(), 5):
        began = time.monotonic()
        with pytest.raises(MicrovmHostError, match="others are connected"):
            attach.connect(str(root / "full.sock"), os.getuid(), 0.3)
        assert 0.2 < time.monotonic() - began < 30


def test_knows_whom_a_vm_runs_as(host: HostPaths, root: Path) -> None:
    package = Package(path=str(root / "package"), console_socket="web-console.sock")
    packages.write(Path(package.path), package)
    os.mkdir(host.vm("web"))
    assert attach.running("web", host) is None
    os.symlink(package.path, host.booted("web"))
    if os.geteuid() == 0:
        # Without a record it is no more than a link.
        assert attach.running("web", host) is None
        Record(host.record("web", "booted")).append("user", "alice", "1001", "users", "100")
        Record(host.record("web", "booted")).append("groups", "104", "7")
        found = attach.running("web", host)
        assert found is not None
        assert (found.user, found.uid, found.gid) == ("alice", 1001, 100)
        assert found.groups == (104, 7)
        assert found.package.console_socket == "web-console.sock"


# ---- console


@pytest.mark.parametrize(
    ("text", "key"),
    [("^]", b"\x1d"), ("^a", b"\x01"), ("^A", b"\x01"), ("~", b"~"), ("^", b"^")]
    + [("none", None)],
)
def test_escape_key(text: str, key: bytes | None) -> None:
    assert console.escape_key(text) == key


@pytest.mark.parametrize("text", ["", "ab", "^1", "ü", "^]]"])
def test_no_escape_key(text: str) -> None:
    with pytest.raises(UsageError, match="is no key"):
        console.escape_key(text)


class Relay:
    """A relay between pipes and a socket, in a thread."""

    def __init__(self, **arguments: object) -> None:
        self.guest, inner = socket.socketpair()
        inner.setblocking(False)
        self._inner = inner
        keys, self.keyboard = os.pipe()
        self.screen, screen = os.pipe()
        self.result: list[str] = []
        settings: dict[str, object] = {"types": True, "escape": b"\x1d", **arguments}

        def work() -> None:
            self.result.append(
                console.relay(inner.fileno(), keys=keys, screen=screen, **settings)  # type: ignore[arg-type]
            )
            os.close(screen)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    def end(self) -> str:
        self._thread.join(10)
        assert self.result, "it goes on"
        return self.result[0]


def test_relay_carries_both_ways() -> None:
    relay = Relay()
    relay.guest.sendall(b"login: ")
    # At once, whether or not a line ends.
    assert os.read(relay.screen, 100) == b"login: "
    os.write(relay.keyboard, b"ro\x03ot\r")
    assert relay.guest.recv(100) == b"ro\x03ot\r"
    os.write(relay.keyboard, b"last\x1drest")
    assert relay.end() == console.DETACHED
    assert relay.guest.recv(100) == b"last"


def test_relay_without_an_escape_sends_each_byte() -> None:
    relay = Relay(escape=None)
    every = bytes(range(256))
    os.write(relay.keyboard, every)
    assert relay.guest.recv(1000) == every
    # The end of the input is not the end of the guest.
    os.close(relay.keyboard)
    relay.guest.sendall(b"still here")
    assert os.read(relay.screen, 100) == b"still here"
    relay.guest.close()
    assert relay.end() == console.ENDED


def test_relay_ends_with_its_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of /dev/null, or of a pipe; the answer to what was typed last is shown."""
    monkeypatch.setattr(console, "_LAST_WORDS", 0.5)
    relay = Relay(escape=None)
    os.write(relay.keyboard, b"ls\r")
    os.close(relay.keyboard)
    assert relay.guest.recv(100) == b"ls\r"
    relay.guest.sendall(b"file")
    assert os.read(relay.screen, 100) == b"file"
    assert relay.end() == console.DETACHED


def test_relay_shows_the_last_words() -> None:
    relay = Relay()
    relay.guest.sendall(b"x" * 100_000 + b"bye")
    relay.guest.close()
    shown = b""
    while data := os.read(relay.screen, 65536):
        shown += data
    assert shown == b"x" * 100_000 + b"bye"
    assert relay.end() == console.ENDED


def test_a_reader_who_stands_still_does_not_hold_up_the_guest() -> None:
    relay = Relay()
    relay.guest.settimeout(20)
    piece = b"".join(b"%07d\n" % number for number in range(1 << 13))
    for _ in range(64):
        relay.guest.sendall(piece)
    relay.guest.sendall(b"the end")
    relay.guest.close()
    time.sleep(0.2)
    shown = b""
    while data := os.read(relay.screen, 65536):
        shown += data
    assert relay.end() == console.ENDED
    assert b"bytes were not shown in time]" in shown
    assert shown.endswith(b"the end")
    assert console.SCREEN_MAX < len(shown) < console.SCREEN_MAX + 400_000


def test_relay_that_only_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_LAST_WORDS", 0.2)
    ended, over = os.pipe()
    asked: list[int] = []

    def successor() -> int | None:
        asked.append(os.dup(ended))
        # The first process was the one that waited for the guest.
        return second if len(asked) == 1 else None

    second, over_too = os.pipe()
    relay = Relay(types=False, ended=ended, successor=successor)
    os.write(relay.keyboard, b"typed\r")
    relay.guest.sendall(b"one")
    assert os.read(relay.screen, 100) == b"one"
    os.close(over)
    relay.guest.sendall(b"two")
    assert os.read(relay.screen, 100) == b"two"
    time.sleep(0.4)
    assert not relay.result
    os.close(over_too)
    # What is said last still comes.
    relay.guest.sendall(b"three")
    assert os.read(relay.screen, 100) == b"three"
    assert relay.end() == console.ENDED
    relay.guest.setblocking(False)
    with pytest.raises(BlockingIOError):
        relay.guest.recv(1)


_ATTACHED = """
import os, socket, sys
from microvm_host import console
guest = socket.socket(fileno=int(sys.argv[1]))
print("ready", flush=True)
print(console.attach(guest, b"\\x1d"), flush=True)
"""


@pytest.mark.parametrize("how", ["key", "guest", "SIGTERM", "SIGHUP"])
def test_the_terminal_is_as_it_was(how: str) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    guest, inner = socket.socketpair()
    process = subprocess.Popen(
        [sys.executable, "-B", "-c", _ATTACHED, str(inner.fileno())],
        stdin=slave,
        stdout=slave,
        stderr=subprocess.PIPE,
        pass_fds=[inner.fileno()],
        cwd=REPOSITORY,
    )
    inner.close()
    assert b"ready" in os.read(master, 100)
    deadline = time.monotonic() + 10
    while termios.tcgetattr(slave)[3] & termios.ICANON:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # These are the guest's.
    os.write(master, b"\x03\x1a")
    guest.settimeout(10)
    assert guest.recv(1) + guest.recv(1) == b"\x03\x1a"
    if how == "key":
        os.write(master, b"\x1d")
    elif how == "guest":
        guest.close()
    else:
        process.send_signal(getattr(signal, how))
    assert process.wait(10) == {"key": 0, "guest": 0}.get(how, 1)
    after = termios.tcgetattr(slave)
    assert after == before


def test_the_keyboard_is_one_persons(root: Path, host: HostPaths) -> None:
    vm = vm_in(root)
    # What the kernel would say of it.
    Path(host.locks).parent.mkdir(parents=True)
    status = os.stat(root)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    Path(host.locks).write_text(
        f"1: POSIX  ADVISORY  WRITE 1 {device} 0 EOF\n2: FLOCK  ADVISORY  WRITE 77 {device} 0 EOF\n"
    )
    first, second = console.Keyboard(vm, host), console.Keyboard(vm, host)
    assert first.take()
    assert not second.take()
    assert second.holder() == "process 77"
    Path(host.locks).write_text("nonsense\n")
    assert second.holder() == "somebody else"
    first.close()
    assert second.take()
    second.close()


# ---- agent


class FakeAgent:
    """An honest agent: one process, which ends after so many questions."""

    def __init__(self, *, ends_after: int = 1, **ended: object) -> None:
        self.heard: list[dict[str, object]] = []
        self._left = ends_after
        self._ended = {"exited": True, "exitcode": 0, **ended}

    def __call__(self, client: socket.socket) -> None:
        # What it said to one who has gone meanwhile.
        client.sendall(b'{"return": {"pid": 1}}\n{"half')
        for line in client.makefile("rb"):
            request = json.loads(line.lstrip(b"\xff"))
            arguments = request["arguments"]
            self.heard.append(request)
            if request["execute"] == "guest-sync-delimited":
                assert line.startswith(b"\xff")
                client.sendall(b"\xff" + json.dumps({"return": arguments["id"]}).encode() + b"\n")
            elif request["execute"] == "guest-exec":
                client.sendall(b'{"return": {"pid": 42}}\n')
            else:
                assert arguments == {"pid": 42}
                self._left -= 1
                state = self._ended if self._left <= 0 else {"exited": False}
                client.sendall(json.dumps({"return": state}).encode() + b"\n")


def run(fake: Fake, *argv: str, given: bytes | None = None) -> guestagent.Ended:
    def connect(within: float) -> socket.socket:
        return attach.connect(fake.path, os.getuid(), within)

    return guestagent.run(connect, argv or ("true",), given, 0.5)


def coded(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_exec(listen: Callable[..., Fake]) -> None:
    agent = FakeAgent(ends_after=3, exitcode=3, **{"out-data": coded(b"o\0\xff"), "err-data": ""})
    ended = run(listen(agent), "sh", "-c", "exit 3", given=b"in\n")
    assert ended == guestagent.Ended(3, b"o\0\xff", b"")
    assert agent.heard[1] == {
        "execute": "guest-exec",
        "arguments": {
            "path": "sh",
            "arg": ["-c", "exit 3"],
            "capture-output": True,
            "input-data": coded(b"in\n"),
        },
    }


@pytest.mark.parametrize(
    ("ended", "expected"),
    [
        ({"exitcode": 256 + 7}, guestagent.Ended(7, b"", b"")),
        ({"exitcode": None, "signal": 9}, guestagent.Ended(137, b"", b"")),
        (
            {"err-data": coded(b"e"), "err-truncated": True},
            guestagent.Ended(0, b"", b"e", is_cut=True),
        ),
    ],
)
def test_ends(
    listen: Callable[..., Fake], ended: dict[str, object], expected: guestagent.Ended
) -> None:
    assert run(listen(FakeAgent(**ended))) == expected  # type: ignore[arg-type]


def test_one_that_takes_long_lets_others_in(
    listen: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestagent, "_PATIENCE_IN_PORT", 0.1)
    fake = listen(FakeAgent(ends_after=8))
    found: list[guestagent.Ended] = []
    long = threading.Thread(target=lambda: found.append(run(fake)))
    long.start()
    long.join(60)
    assert fake.clients >= 2
    assert found == [guestagent.Ended(0, b"", b"")]


def test_no_agent(listen: Callable[..., Fake]) -> None:
    began = time.monotonic()
    with pytest.raises(guestagent.NoAgent, match="no agent answers in the guest; the guest has to"):
        run(listen(never_answers))
    assert 0.4 < time.monotonic() - began < 30


def never_answers(client: socket.socket) -> None:
    while client.recv(4096):
        pass


def synced(*answers: bytes) -> Answer:
    """An agent that is one as far as the first question."""

    def answer(client: socket.socket) -> None:
        lines = client.makefile("rb")
        token = json.loads(next(lines).lstrip(b"\xff"))["arguments"]["id"]
        client.sendall(b'\xff{"return": %d}\n' % token)
        for text in answers:
            next(lines)
            client.sendall(text)
        client.recv(1)

    return answer


PID = b'{"return": {"pid": 1}}\n'


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([b"not JSON\n"], "does not make sense: no JSON"),
        ([b"[]\n"], "does not make sense: no JSON"),
        ([b'{"return": 1}\n'], "does not make sense: no process"),
        ([b'{"return": {"pid": true}}\n'], "does not make sense: no process"),
        ([b"[" * 100_000 + b"\n"], "does not make sense: no JSON"),
        ([PID, b'{"return": {"exited": "yes"}}\n'], "no state of a process"),
        ([PID, b'{"return": {"exited": true}}\n'], "no exit code"),
        (
            [PID, b'{"return": {"exited": true, "exitcode": 0, "out-data": "@@"}}\n'],
            "an output that is not base64",
        ),
        (
            [PID, b'{"return": {"exited": true, "exitcode": 0, "out-data": 1}}\n'],
            "an output that is not base64",
        ),
        (
            [b'{"error": {"class": "GenericError", "desc": "no \\u001b[31m such\\nfile"}}\n'],
            r"refuses guest-exec: no \[31m such file$",
        ),
        ([b'{"error": 1}\n'], "refuses guest-exec: an error"),
        (
            [b'{"error": {"class": "CommandNotFound", "desc": "has been disabled"}}\n'],
            "disabled; the guest's configuration of the agent has to allow it",
        ),
    ],
)
def test_strange_agents(listen: Callable[..., Fake], answers: list[bytes], message: str) -> None:
    with pytest.raises(MicrovmHostError, match=message):
        run(listen(synced(*answers)))


PIECES = st.sampled_from(
    [b'{"return": ', b"}", b"\n", b"\xff", b'{"pid": 1}', b'{"exited": true', b', "exitcode": 0']
    + [b', "out-data": "', b"aGk=", b'"', b"null", b"NaN", b"1e400", b"9" * 5000, b"[" * 2000]
    + [b'{"error": {"desc": "', b"\\ud800", b"\\u001b", b"\0", b"\xc3", PID, b"x" * 500]
    + [b'{"return": {"exited": true, "exitcode": 3, "out-data": "aGk="}}\n']
)


@settings(max_examples=150, deadline=None)
@given(st.lists(PIECES, max_size=12))
def test_whatever_an_agent_says(pieces: list[bytes]) -> None:
    """It is an end, or an error of one printable line."""
    ours, theirs = socket.socketpair()
    theirs.sendall(b'\xff{"return": 0}\n' + b"".join(pieces))
    theirs.shutdown(socket.SHUT_WR)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "urandom", bytes)
        patch.setattr(guestagent, "_FIRST_PAUSE", 0.0)
        try:
            ended = guestagent.run(lambda within: ours, ["true"], None, 0.5)
            assert 0 <= ended.code <= 255
        except MicrovmHostError as error:
            assert str(error).isprintable() and len(str(error)) < 500
    assert ours.fileno() < 0
    theirs.close()


def test_an_agent_that_never_ends_a_line(
    listen: Callable[..., Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guestagent, "ANSWER_MAX", 1 << 20)
    with pytest.raises(guestagent.NoAgent, match="more than any answer has"):
        run(listen(synced(b"x" * (2 << 20))))


# ---- balloon


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512", 512), ("512M", 512), ("512MiB", 512), ("2G", 2048), ("1t", 1 << 20), ("1gb", 1024)],
)
def test_sizes(text: str, expected: int) -> None:
    assert balloon.megabytes(text) == expected


@pytest.mark.parametrize("text", ["", "0", "G", "-1", "1.5G", "1K", "1GG", "٣", "9" * 10, "1 G"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="is not a size"):
        balloon.megabytes(text)


class FakeQemu:
    """A QEMU with 1 GB, and a balloon that takes a question's time for half of its way.

    It also has what is plugged as a DIMM, which its balloon counts, and as virtio-mem, which that
    does not.
    """

    def __init__(self, *, has_balloon: bool = True, dimm: int = 0, virtio_mem: int = 0) -> None:
        self.most = self.actual = self.target = (1 << 30) + dimm
        self._has_balloon = has_balloon
        self._plugged = {"dimm": dimm, "virtio-mem": virtio_mem}

    def __call__(self, client: socket.socket) -> None:
        client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
        for line in client.makefile("rb"):
            request = json.loads(line)
            command = request["execute"]
            answer: dict[str, object] = {"return": {}}
            if command == "query-memory-size-summary":
                plugged = sum(self._plugged.values())
                answer = {"return": {"base-memory": 1 << 30, "plugged-memory": plugged}}
            elif command == "query-memory-devices":
                answer = {
                    "return": [
                        {"type": kind, "data": {"id": kind, "size": size, "max-size": 1 << 40}}
                        for kind, size in self._plugged.items()
                    ]
                }
            elif command in ("balloon", "query-balloon") and not self._has_balloon:
                answer = {"error": {"class": "DeviceNotActive", "desc": "No balloon"}}
            elif command == "balloon":
                self.target = min(request["arguments"]["value"], self.most)
                client.sendall(b'{"event": "BALLOON_CHANGE", "data": {"actual": 1}}\r\n')
            elif command == "query-balloon":
                answer = {"return": {"actual": self.actual}}
                self.actual += (self.target - self.actual) // 2
                if abs(self.actual - self.target) < 64 << 20:
                    self.actual = self.target
            client.sendall(json.dumps({**answer, "id": request["id"]}).encode() + b"\r\n")


def qemu(root: Path) -> Running:
    return vm_in(root, control_socket=ControlSocket("fake.sock", "qmp"))


def test_balloon(listen: Callable[..., Fake], root: Path) -> None:
    listen(FakeQemu())
    assert balloon.memory(qemu(root)) == balloon.Memory(1 << 30, 1 << 30)
    assert balloon.resize(qemu(root), 512, 5) == balloon.Memory(1 << 30, 512 << 20)
    # One that takes its time.
    found = balloon.resize(qemu(root), 1024, 0)
    assert found is not None and found.actual < 1 << 30
    with pytest.raises(MicrovmHostError, match="was started with 1024 MB, and cannot have 1025"):
        balloon.resize(qemu(root), 1025, 5)


def test_a_balloon_and_memory_that_was_plugged(listen: Callable[..., Fake], root: Path) -> None:
    gigabyte, half = 1 << 30, 512 << 20
    listen(FakeQemu(dimm=half, virtio_mem=gigabyte))
    whole = 2 * gigabyte + half
    assert balloon.memory(qemu(root)) == balloon.Memory(whole, whole, gigabyte)
    found = balloon.resize(qemu(root), 1536, 30)
    assert found == balloon.Memory(whole, gigabyte + half, gigabyte)
    assert balloon.resize(qemu(root), 2560, 30) == balloon.Memory(whole, whole, gigabyte)
    with pytest.raises(MicrovmHostError, match="was started with 2560 MB, and cannot have 2561"):
        balloon.resize(qemu(root), 2561, 5)
    with pytest.raises(
        MicrovmHostError, match=r"has 1024 MB by hotplugMem, .* cannot be left 1024"
    ):
        balloon.resize(qemu(root), 1024, 5)


def test_no_balloon(listen: Callable[..., Fake], root: Path) -> None:
    listen(FakeQemu(has_balloon=False))
    with pytest.raises(MicrovmHostError, match="microVM web has no balloon"):
        balloon.memory(qemu(root))


def test_a_qemu_that_hangs(
    listen: Callable[..., Fake], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(balloon, "_WITHIN", 0.3)
    listen(never)
    with pytest.raises(MicrovmHostError, match="the hypervisor does not answer"):
        balloon.memory(qemu(root))


def test_a_qemu_that_makes_no_sense(root: Path, listen: Callable[..., Fake]) -> None:
    def answer(client: socket.socket) -> None:
        client.sendall(b'{"QMP": {}}\r\n')
        for line in client.makefile("rb"):
            number = json.loads(line)["id"]
            client.sendall(
                b'{"return": {"actual": "all", "base-memory": true}, "id": %d}\n' % number
            )

    listen(answer)
    with pytest.raises(MicrovmHostError, match="does not make sense: no sizes of memory"):
        balloon.memory(qemu(root))


def test_refusals_have_a_kind(listen: Callable[..., Fake]) -> None:
    fake = listen(FakeQemu(has_balloon=False))
    qmp = control.Qmp(attach.connect(fake.path, os.getuid(), 5), fake.path, 5)
    with pytest.raises(control.Refusal, match="refuses balloon") as caught:
        qmp.ask("balloon", {"value": 1})
    assert caught.value.kind == "DeviceNotActive"
    qmp.close()


def test_a_packages_own_script(root: Path) -> None:
    vm = vm_in(root)
    with pytest.raises(MicrovmHostError, match="does not tell its memory"):
        balloon.memory(vm)
    with pytest.raises(MicrovmHostError, match="there is no bin/microvm-balloon in its package"):
        balloon.resize(vm, 512, 5)
    packages.program(root, "bin/microvm-balloon")
    script = root / "bin/microvm-balloon"
    script.write_text('#!/bin/sh\necho "$1" >size; echo no >&2; exit "${1#51}"\n')
    # In the state directory, which is what its sockets are relative to.
    with pytest.raises(MicrovmHostError, match="bin/microvm-balloon ended with 2: no"):
        balloon.resize(vm, 512, 5)
    assert (root / "size").read_text() == "512\n"
    assert balloon.resize(vm, 510, 5) is None
