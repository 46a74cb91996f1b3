# SPDX-License-Identifier: MIT
"""The power button over control sockets, against made-up hypervisors, honest and hostile.

The fakes here answer on real sockets; tests/system/test_ladder.py has a real QEMU.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm_host import control
from microvm_host.errors import MicrovmHostError, NoGuest

Answer = Callable[[socket.socket], None]
WITHIN = 0.5  # seconds, more than any honest fake needs


class FakeHypervisor:
    """Listens at a control socket and gives each client to a function; keeps what clients say."""

    def __init__(self, path: Path, answer: Answer) -> None:
        self.path = str(path)
        self._answer = answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with client:
                client.settimeout(10)
                try:
                    self._answer(client)
                except OSError:
                    # It hung up on us, as it should on most of these.
                    pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Callable[[Answer], str]]:
    """Starts a fake; gives the path of its socket."""
    fakes: list[FakeHypervisor] = []

    def start(answer: Answer) -> str:
        fakes.append(FakeHypervisor(tmp_path / f"{len(fakes)}.sock", answer))
        return fakes[-1].path

    yield start
    for fake in fakes:
        fake.close()


def say(client: socket.socket, *messages: object) -> None:
    for message in messages:
        client.sendall(json.dumps(message).encode() + b"\r\n")


GREETING = {"QMP": {"version": {"qemu": {"major": 9}}, "capabilities": ["oob"]}}
POWERDOWN = {"event": "POWERDOWN", "timestamp": {"seconds": 1, "microseconds": 2}}


def shutdown(reason: object) -> dict[str, object]:
    return {"event": "SHUTDOWN", "data": {"guest": True, "reason": reason}}


def fake_qemu(heard: list[str], *after: object, status: object = "running") -> Answer:
    """An honest QEMU: answers what it is asked, and has some things to say after."""

    def answer(client: socket.socket) -> None:
        say(client, GREETING)
        for line in client.makefile("rb"):
            command = json.loads(line)
            heard.append(command["execute"])
            result = {"status": status} if command["execute"] == "query-status" else {}
            if command["execute"] == "system_powerdown":
                # Events come in between as they like.
                say(client, POWERDOWN)
            say(client, {"return": result, "id": command["id"]})
            if command["execute"] == "system_powerdown":
                say(client, *after)

    return answer


def test_qmp(listen: Callable[[Answer], str]) -> None:
    heard: list[str] = []
    pressed = control.press("qmp", listen(fake_qemu(heard)), WITHIN)
    assert heard == ["qmp_capabilities", "query-status", "system_powerdown"]
    assert (pressed.remark, pressed.heard()) == ("", None)
    pressed.close()


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([shutdown("guest-shutdown")], "powered-off"),
        ([shutdown("guest-reset")], "rebooted"),
        ([shutdown("guest-panic")], "panicked"),
        ([{"event": "GUEST_PANICKED", "data": {}}, shutdown("guest-reset")], "panicked"),
        ([shutdown("host-signal")], None),
        ([shutdown("host-signal"), shutdown("guest-shutdown")], "powered-off"),
        ([{"event": "RESET"}], None),
        ([shutdown(["guest-shutdown"])], None),
        ([{"event": "SHUTDOWN", "data": "guest-shutdown"}], None),
        ([{"event": ["SHUTDOWN"]}, {"event": {}}], None),
    ],
)
def test_qmp_tells_how_it_ended(
    listen: Callable[[Answer], str], events: list[object], expected: str | None
) -> None:
    pressed = control.press("qmp", listen(fake_qemu([], *events)), WITHIN)
    deadline = time.monotonic() + WITHIN
    while (found := pressed.heard()) != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    # Also what comes late changes nothing.
    time.sleep(0.05)
    assert found == pressed.heard() == expected
    pressed.close()


@pytest.mark.parametrize(
    ("status", "resumes"),
    [
        ("io-error", "cont"),
        ("paused", "cont"),
        ("watchdog", "cont"),
        ("suspended", "system_wakeup"),
    ],
)
def test_a_paused_guest_is_resumed_first(
    listen: Callable[[Answer], str], status: str, resumes: str
) -> None:
    heard: list[str] = []
    path = listen(fake_qemu(heard, status=status))
    pressed = control.press("qmp", path, WITHIN)
    remark = f"the guest was paused ({status}): resumed it, so that it can shut down"
    assert pressed.remark == remark
    assert heard == ["qmp_capabilities", "query-status", resumes, "system_powerdown"]
    pressed.close()
    assert control.wake("qmp", path, WITHIN) == remark


@pytest.mark.parametrize("status", ["prelaunch", "shutdown", "postmigrate"])
def test_qmp_tells_that_there_is_no_guest(listen: Callable[[Answer], str], status: str) -> None:
    path = listen(fake_qemu([], status=status))
    for ask in (control.press, control.wake):
        with pytest.raises(NoGuest, match=f"^no guest runs in the hypervisor \\({status}\\)$"):
            ask("qmp", path, WITHIN)


@pytest.mark.parametrize("status", ["internal-error", "guest-panicked"])
def test_qmp_tells_why_the_guest_cannot_react(listen: Callable[[Answer], str], status: str) -> None:
    pressed = control.press("qmp", listen(fake_qemu([], status=status)), WITHIN)
    assert pressed.remark == f"the guest is stopped ({status}) and cannot react"
    pressed.close()


@pytest.mark.parametrize("status", ["\x1b[2J", 7, None, ["paused"], "x" * 1000])
def test_of_the_status_only_known_words_are_repeated(
    listen: Callable[[Answer], str], status: object
) -> None:
    pressed = control.press("qmp", listen(fake_qemu([], status=status)), WITHIN)
    assert pressed.remark == ""
    pressed.close()


def raw(*parts: bytes, then: str = "hang up") -> Answer:
    """Says these bytes whatever it is asked, and hangs up, hangs, or goes on for ever."""

    def answer(client: socket.socket) -> None:
        for part in parts:
            client.sendall(part)
            time.sleep(0.02)
        if then == "hang":
            # As long as there is somebody.
            while client.recv(65536):
                pass
        while then == "repeat":
            client.sendall(parts[-1])

    return answer


HELLO = json.dumps(GREETING).encode() + b"\n"
HOSTILE: dict[str, tuple[Answer, str]] = {
    "hangs up at once": (raw(), "hung up"),
    "says nothing": (raw(then="hang"), "does not answer"),
    "says half a line": (raw(b'{"QMP": {', then="hang"), "does not answer"),
    "hangs up in a line": (raw(b'{"QMP": {'), "hung up"),
    "says nothing after the greeting": (raw(HELLO, then="hang"), "does not answer"),
    "garbage": (raw(bytes(range(256)) * 9 + b"\n", then="hang"), "no message of QMP"),
    "no UTF-8": (raw(b'{"QMP": "\xff"}\n', then="hang"), "no message of QMP"),
    "no object": (raw(b"[1]\n", then="hang"), "no message of QMP"),
    "no greeting": (raw(b'{"return": {}}\n', then="hang"), "no greeting of QMP"),
    "a wrong greeting": (raw(b'{"QMP": 1}\n', then="hang"), "no greeting of QMP"),
    "an answer to no question": (raw(HELLO, b'{"return": {}, "id": 7}\n'), "answer to no question"),
    "an error without id": (raw(HELLO, b'{"error": {"desc": "x"}}\n'), "answer to no question"),
    "an error": (raw(HELLO, b'{"error": "\\u001b[2J", "id": 1}\n'), "refuses qmp_capabilities"),
    "deep nesting": (raw(b"[" * 60000 + b"\n", then="hang"), "no message of QMP"),
    "a huge number": (raw(b'{"QMP":' + b"9" * 60000 + b"}\n", then="hang"), "no message of QMP"),
    "a line without end": (raw(b"x" * 4096, then="repeat"), "more than any answer has"),
    "events without end": (
        raw(HELLO, b'{"event": "RESET"}\n' * 100, then="repeat"),
        "more than any answer has",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_qemu(
    listen: Callable[[Answer], str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No more than a busy machine reads in that time.
    monkeypatch.setattr(control, "EXCHANGE_MAX", 128 * 1024)
    answer, complaint = HOSTILE[name]
    path = listen(answer)
    before = len(os.listdir("/proc/self/fd"))
    # What is bounded by size is to end by that, on a busy machine too.
    within = 10 * WITHIN if complaint == "more than any answer has" else WITHIN
    began = time.monotonic()
    with pytest.raises(MicrovmHostError) as caught:
        control.press("qmp", path, within)
    assert time.monotonic() - began < within + 10
    assert complaint in str(caught.value)
    # One line of known words: nothing of what it said gets to a terminal.
    assert str(caught.value).isprintable()
    assert str(caught.value).startswith(f"{path}: the hypervisor ")
    deadline = time.monotonic() + 30
    # The fake, in this process too, lets go of its end a moment later.
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_drop_by_drop_is_no_way_around_the_deadline(listen: Callable[[Answer], str]) -> None:
    def drip(client: socket.socket) -> None:
        while True:
            client.sendall(b" ")
            time.sleep(0.05)

    began = time.monotonic()
    with pytest.raises(MicrovmHostError, match="does not answer"):
        control.press("qmp", listen(drip), WITHIN)
    assert time.monotonic() - began < WITHIN + 10


def test_what_is_heard_afterwards_has_an_end(listen: Callable[[Answer], str]) -> None:
    """Events without end do not keep the stop from going on."""

    def answer(client: socket.socket) -> None:
        fake_qemu_until_powerdown(client)
        while True:
            client.sendall(b'{"event": "RESET"}\n' * 1000)

    def fake_qemu_until_powerdown(client: socket.socket) -> None:
        say(client, GREETING)
        lines = client.makefile("rb")
        for _ in range(3):
            say(client, {"return": {}, "id": json.loads(next(lines))["id"]})

    pressed = control.press("qmp", listen(answer), WITHIN)
    began = time.monotonic()
    assert pressed.heard() is None
    assert time.monotonic() - began < 20
    pressed.close()


def test_nothing_is_heard_after_nonsense(listen: Callable[[Answer], str]) -> None:
    after = [shutdown("guest-shutdown"), ["nonsense"], shutdown("guest-reset")]
    pressed = control.press("qmp", listen(fake_qemu([], *after)), WITHIN)
    time.sleep(0.1)
    assert [pressed.heard(), pressed.heard()] == ["powered-off", "powered-off"]
    pressed.close()


# ---- HTTP


def test_over_http_nothing_is_an_event(listen: Callable[[Answer], str]) -> None:
    answer = b"HTTP/1.1 204\n\n" + json.dumps(shutdown("guest-reset")).encode() + b"\n"
    pressed = control.press("firecracker", listen(fake_http([], answer)), WITHIN)
    time.sleep(0.1)
    assert pressed.heard() is None
    pressed.close()


def test_one_that_hangs_up_before_it_is_asked(listen: Callable[[Answer], str]) -> None:
    path = listen(lambda client: client.close())
    with pytest.raises(MicrovmHostError, match="the hypervisor hung up"):
        for _ in range(20):
            control.press("firecracker", path, WITHIN)


def fake_http(heard: list[bytes], answer: bytes) -> Answer:
    def serve(client: socket.socket) -> None:
        data = b""
        while b"\r\n\r\n" not in data:
            data += client.recv(4096)
        head, _, body = data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
        while len(body) < length:
            body += client.recv(4096)
        heard.append(head.split(b"\r\n")[0] + b" " + body)
        client.sendall(answer)

    return serve


@pytest.mark.parametrize(
    ("protocol", "request_line"),
    [
        ("cloud-hypervisor", b"PUT /api/v1/vm.power-button HTTP/1.1 "),
        ("firecracker", b'PUT /actions HTTP/1.1 {"action_type":"SendCtrlAltDel"}'),
    ],
)
def test_http(listen: Callable[[Answer], str], protocol: str, request_line: bytes) -> None:
    heard: list[bytes] = []
    path = listen(fake_http(heard, b"HTTP/1.1 204 \r\nServer: x\r\nConnection: keep-alive\r\n\r\n"))
    pressed = control.press(protocol, path, WITHIN)
    assert heard == [request_line]
    assert (pressed.remark, pressed.heard()) == ("", None)
    pressed.close()


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (b"HTTP/1.1 400 Bad\r\n\r\n{}", "refuses: HTTP status 400"),
        (b"HTTP/1.1 500 \x1b[2J\r\n\r\n", "refuses: HTTP status 500"),
        (b"HTTP/2 204\r\n", "no answer of HTTP"),
        (b"HTTP/1.1 2\xb2\xb3\r\n", "no answer of HTTP"),
        (b"HTTP/1.1\r\n", "no answer of HTTP"),
        (b"{}\n", "no answer of HTTP"),
        (b"HTTP/1.1 204", "hung up"),
        (b"", "hung up"),
        (b"x" * (control.LINE_MAX + 1), "more than any answer has"),
    ],
)
def test_hostile_http(listen: Callable[[Answer], str], answer: bytes, complaint: str) -> None:
    with pytest.raises(MicrovmHostError) as caught:
        control.press("firecracker", listen(fake_http([], answer)), WITHIN)
    assert complaint in str(caught.value)
    assert str(caught.value).isprintable()


# ---- sockets


def test_nobody_listens(tmp_path: Path) -> None:
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(tmp_path / "left.sock"))
    left.close()
    (tmp_path / "file").write_text("")
    for path, complaint in (
        ("none.sock", "No such file or directory"),
        ("left.sock", "Connection refused"),
        ("file", "Connection refused"),
        ("x" * 200, "AF_UNIX path too long"),
    ):
        with pytest.raises(MicrovmHostError) as caught:
            control.press("qmp", str(tmp_path / path), WITHIN)
        assert f"cannot be reached: {complaint}" in str(caught.value)


def test_nobody_accepts(tmp_path: Path) -> None:
    """Another client has QEMU's only place, and others wait already."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = str(tmp_path / "busy.sock")
        listener.bind(path)
        listener.listen(0)
        waiting = []
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            waiting.append(client)
            try:
                client.connect(path)
            except BlockingIOError:
                break
        began = time.monotonic()
        with pytest.raises(MicrovmHostError, match=r"cannot be reached|does not answer"):
            control.press("qmp", path, WITHIN)
        assert time.monotonic() - began < WITHIN + 10
        for client in waiting:
            client.close()


def test_unknown_protocol(listen: Callable[[Answer], str]) -> None:
    with pytest.raises(MicrovmHostError, match="no control protocol 'telnet'"):
        control.press("telnet", listen(raw(then="hang")), WITHIN)


# ---- event log


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", None),
        (f"{json.dumps(GREETING)}\n{json.dumps(shutdown('guest-reset'))}\n", "rebooted"),
        (f"{json.dumps(shutdown('guest-shutdown'))}", "powered-off"),
        ('{"event": "GUEST_PANICKED"}\n' + json.dumps(shutdown("guest-reset")), "panicked"),
        ("x" * 200000 + "\n" + json.dumps(shutdown("guest-shutdown")) + "\n", "powered-off"),
        (json.dumps(shutdown("guest-shutdown")) + "\n" + "x" * 200000, None),
        ("[" * 60000 + "\n\0\n{}\n\n", None),
    ],
)
def test_last_words(tmp_path: Path, text: str, expected: str | None) -> None:
    (tmp_path / "log").write_text(text)
    assert control.last_words(str(tmp_path / "log")) == expected


def test_last_words_of_what_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text(json.dumps(shutdown("guest-reset")))
    (tmp_path / "link").symlink_to("log")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "directory", "fifo", "none"):
        assert control.last_words(str(tmp_path / name)) is None, name
    assert control.last_words("/dev/zero") is None


# ---- pausing


def fake_rest(heard: list[str], paused: list[bool], pauses: str, resumes: str) -> Answer:
    """cloud-hypervisor or firecracker: a state, and two requests that change it."""

    def serve(client: socket.socket) -> None:
        stream = client.makefile("rb")
        while line := stream.readline():
            length = 0
            while header := stream.readline().strip():
                if header.lower().startswith(b"content-length:"):
                    length = int(header.split(b":")[1])
            asked = f"{' '.join(line.decode().split()[:2])} {stream.read(length).decode()}".strip()
            heard.append(asked)
            if asked.startswith("GET "):
                state = b"Paused" if paused[-1] else b"Running"
                body = b'{"config":{"state":"x"},"state":"' + state + b'"}'
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n"
                client.sendall(head.encode() + body)
            else:
                paused.append(asked == pauses)
                client.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    return serve


@pytest.mark.parametrize(
    ("protocol", "state", "pauses", "resumes"),
    [
        *(
            (
                "cloud-hypervisor",
                "GET /api/v1/vm.info",
                f"PUT /api/v1/vm.{a}",
                f"PUT /api/v1/vm.{b}",
            )
            for a, b in [("pause", "resume")]
        ),
        (
            *("firecracker", "GET /"),
            *('PATCH /vm {"state":"Paused"}', 'PATCH /vm {"state":"Resumed"}'),
        ),
    ],
)
def test_pausing_by_http(
    listen: Callable[[Answer], str], protocol: str, state: str, pauses: str, resumes: str
) -> None:
    heard: list[str] = []
    path = listen(fake_rest(heard, [False], pauses, resumes))
    hypervisor = control.Hypervisor(protocol, path, WITHIN)
    assert hypervisor.state() == "running"
    hypervisor.pause()
    assert hypervisor.state() == "paused"
    hypervisor.close()
    assert control.wake(protocol, path, WITHIN).startswith("the guest was paused (paused): resumed")
    assert control.wake(protocol, path, WITHIN) == ""
    assert heard == [state, pauses, state, state, resumes, state]


def test_a_guest_that_cannot_be_resumed(listen: Callable[[Answer], str]) -> None:
    def answer(client: socket.socket) -> None:
        say(client, GREETING)
        for line in client.makefile("rb"):
            asked = json.loads(line)
            if asked["execute"] == "cont":
                say(client, {"error": {"class": "GenericError", "desc": "no"}, "id": asked["id"]})
            else:
                say(client, {"return": {"status": "io-error"}, "id": asked["id"]})

    pressed = control.press("qmp", listen(answer), WITHIN)
    assert "is paused (io-error) and cannot react" in pressed.remark
    pressed.close()


@pytest.mark.parametrize(
    ("protocol", "heard", "state"),
    [
        ("qmp", HELLO + b'{"return": {}}\n', None),
        ("qmp", HELLO + b'{"return": {}}\n{"return": {"status": "paused"', None),
        ("qmp", b'{"return": {"status": "io-error", "running": false}}\r\n', "io-error"),
        ("qmp", b'{"return": {"running": true, "singlestep": 0, "status":"running"}}\n', "running"),
        ("qmp", b'{"return": {"status": "\x1b[2J"}}\n', ""),
        ("qmp", b'{"event": "X", "data": {"status": "paused"}}\n', None),
        ("firecracker", b"HTTP/1.1 200 \r\nContent-Length: 18\r\n\r\n", None),
        (
            "firecracker",
            b'HTTP/1.1 200 \r\nContent-Length: 18\r\n\r\n{"state":"Paused"}',
            "paused",
        ),
        ("cloud-hypervisor", b"HTTP/1.1 404 \r\n\r\n", ""),
        ("cloud-hypervisor", b"HTTP/1.1 200 \r\nContent-Length: 3\r\n\r\n[1]", ""),
    ],
)
def test_states_that_are_told(protocol: str, heard: bytes, state: str | None) -> None:
    assert control.answered(protocol, heard) == state
