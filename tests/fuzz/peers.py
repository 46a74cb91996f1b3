# SPDX-License-Identifier: MIT
"""Those that a hypervisor or a guest speaks to: its control socket's client, and the listener.

The sockets are real ones, but nothing waits: a peer says the next thing when it is read from, and
clocks go forward by what would have been waited.
"""

from __future__ import annotations

import os
import re
import select
import zlib
from _socket import AF_UNIX, MSG_DONTWAIT, SHUT_WR, SOCK_STREAM, socket, socketpair
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace

from microvm_host import control, log, readiness
from microvm_host.errors import MicrovmHostError

from .engine import promise, read_input, replaced

WITHIN = 5.0
# As it was before `isolate`.
_Listener = readiness.Listener
WORDS = (None, control.POWERED_OFF, control.REBOOTED, control.PANICKED)
# All that is ever said to a hypervisor.
_SAID = {
    "qmp": b'{"execute":"qmp_capabilities","id":1}\n{"execute":"query-status","id":2}\n'
    b'{"execute":"system_powerdown","id":3}\n',
    "cloud-hypervisor": b"PUT /api/v1/vm.power-button HTTP/1.1\r\nHost: localhost\r\n"
    b"Accept: application/json\r\nContent-Length: 0\r\n\r\n",
    "firecracker": b"PUT /actions HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    b"Content-Type: application/json\r\nContent-Length: 32\r\n\r\n"
    b'{"action_type":"SendCtrlAltDel"}',
}
_REMARKS = (
    *(f"the guest is stopped ({each}) and cannot react" for each in control.PAUSED),
    *(f"the guest was paused ({each}): resumed it, so that" for each in control.RESUMABLE),
    *(f"the guest is paused ({each}) and cannot react: " for each in control.RESUMABLE),
)


class Peer:
    """The other end of a connection, which says `answers` in pieces.

    Args:
        size: of a piece.
        then: `hangs up`, `is silent`, or `goes on`: says it again and again.
    """

    def __init__(self, answers: bytes, size: int, then: str) -> None:
        self._answers = answers
        self._size = size
        self._then = then
        self._at = 0
        self.given = 0
        ours, self._theirs = socketpair(AF_UNIX, SOCK_STREAM)
        self.ours = _Dialed(self, ours.detach())

    def answer(self) -> None:
        """Say the next piece, or do what comes then."""
        piece = self._answers[self._at : self._at + self._size]
        self._at += len(piece)
        if self._then == "goes on" and self._at >= len(self._answers):
            self._at = 0
        if piece:
            self.given += self._theirs.send(piece)
        elif self._then == "is silent":
            if self.ours.gettimeout():
                # As it would be, after a while.
                raise TimeoutError("timed out")
        else:
            self._theirs.shutdown(SHUT_WR)

    def heard(self) -> bytes:
        """What was said to it; it is gone then."""
        try:
            return self._theirs.recv(65536, MSG_DONTWAIT)
        except BlockingIOError:
            return b""
        finally:
            self._theirs.close()


class _Dialed(socket):
    """A socket that has reached its peer whatever it dials."""

    def __init__(self, peer: Peer, fileno: int) -> None:
        super().__init__(AF_UNIX, SOCK_STREAM, 0, fileno)
        self._peer = peer

    def connect(self, _address: object, /) -> None:
        self._check()

    def recv(self, bufsize: int, _flags: int = 0, /) -> bytes:
        self._check()
        self._peer.answer()
        return super().recv(bufsize)

    def sendall(self, data: bytes, _flags: int = 0, /) -> None:  # type: ignore[override]
        self._check()
        super().sendall(data)

    def _check(self) -> None:
        within = self.gettimeout()
        promise(within is not None and 0 <= within <= WITHIN * 2, f"would wait for {within}")


def dialing(module: object, peer: Peer) -> tuple[object, str, object]:
    """For `replaced`: what a module dials is this peer."""
    return module, "socket", lambda *_: peer.ours


# ---- control sockets, and the event log


def control_answers(root: str) -> None:
    """The same bytes as an answer in each protocol, and as an event log."""
    answers = read_input(root)
    promise(control.last_words(f"{root}/input") in WORDS, "other words on the end")
    for protocol in _SAID:
        state = control.answered(protocol, answers)
        promise(state in (None, "", control.RUNNING, *control.PAUSED), f"another state, {state!r}")
    refused: list[MicrovmHostError] = []
    for protocol in _SAID:
        result = _press(protocol, Peer(answers, 65536, "hangs up"), refused)
        if len(answers) < control.LINE_MAX:
            pieces = Peer(answers, len(answers) // 20 + 3, "is silent")
            again = _press(protocol, pieces, [])
            promise(result == again, f"{result} of {protocol}, but {again} in pieces")
    if answers and not zlib.crc32(answers) % 64:
        with replaced((control, "EXCHANGE_MAX", 3 << 15)):
            many = answers * (65536 // len(answers))
            for protocol in _SAID:
                peer = Peer(many, 65536, "goes on")
                _press(protocol, peer, [])
                promise(peer.given <= control.EXCHANGE_MAX + 65536, f"reads {peer.given} bytes")
    if len(refused) == len(_SAID):
        raise refused[0]


def _press(protocol: str, peer: Peer, refused: list[MicrovmHostError]) -> object:
    """Gives all that came of it, in words that do not depend on how it ended too early."""
    outcome: object
    try:
        with replaced(dialing(control, peer)):
            pressed = control.press(protocol, "web.sock", WITHIN)
    except MicrovmHostError as error:
        refused.append(error)
        promise(str(error).isprintable(), f"it says {error!s}")
        promise(len(str(error)) < 200, f"it says {error!s}")
        outcome = re.sub("hung up|does not answer", "ended", str(error))
    else:
        promise(
            not pressed.remark or pressed.remark.startswith(_REMARKS),
            f"it remarks {pressed.remark!r}",
        )
        heard = pressed.heard()
        promise(heard in WORDS, f"it ended by {heard!r}")
        promise(pressed.heard() == heard, "it says something else later")
        pressed.close()
        outcome = pressed.remark, heard
    promise(peer.ours.fileno() < 0, "the connection is left open")
    # A paused guest is resumed first.
    said = re.sub(rb'{"execute":"(cont|system_wakeup)","id":3}\n', b"", peer.heard())
    said = said.replace(b'"id":4}', b'"id":3}')
    if isinstance(outcome, tuple):
        promise(said == _SAID[protocol], f"it has said {said!r}")
    promise(_SAID[protocol].startswith(said), f"it has said {said!r}")
    return outcome, said


# ---- what a guest says when it is ready

# What ends a message: the sender closes, or leaves its connection open; a pause within one.
CLOSES, LEAVES, PAUSES = b"\x1e", b"\x1d", b"\x1f"
_PARTS = re.compile(b"([\x1d-\x1f])")
PARTS_MAX = 100
# The hypervisor ends after the start has timed out, and each connection.
TIMEOUT, ENDS_AFTER = 3.0, 7.0
RUNNING = "Running qemu from /srv/web"
_TOLD = re.compile(
    r"MAINPID=4242\nREADY=1\nSTATUS=Running qemu from /srv/web(?:; the guest says: (?P<ready>.+))?"
    r"|STATUS=Waiting for the guest to be ready(?:; it says: (?P<waiting>.+)"
    r"|; it is in its (?:emergency|rescue)\.target|; it has said nothing)?"
    r"|STATUS=the guest did not become ready within 3 s \(TimeoutStartSec=\): (?:it says: "
    r"(?P<late>.+)|it is in its (?:emergency|rescue)\.target|it has said nothing)"
    r"|EXTEND_TIMEOUT_USEC=3000000"
)


class Guest:
    """Sends one thing whenever the listener has nothing else to read, and lets its time pass."""

    def __init__(self, said: bytes, path: str) -> None:
        self.now = 1000.0
        self._until = self.now + ENDS_AFTER
        self._path = path
        self._parts = _PARTS.split(said, PARTS_MAX)
        self._open: list[socket] = []
        self._is_new = True
        # A process that has ended is a descriptor with something to read.
        self.hypervisor, self._alive = os.pipe()
        # The messages that reach the listener whole, as far as that can be told from here.
        self.messages = [b""]
        self.left_open = 0

    def monotonic(self) -> float:
        return self.now

    def next(self, wait: float | None) -> None:
        if self._parts:
            self._say(self._parts.pop(0), self._parts.pop(0) if self._parts else LEAVES)
            return
        promise(wait is not None, "waits for ever")
        promise(wait is None or wait > 0, "does not wait")
        self.now += (wait or 0) / 1000
        if self.now > self._until:
            self._hang_up()

    def _say(self, text: bytes, then: bytes) -> None:
        if self._is_new:
            self._open.append(socket(AF_UNIX, SOCK_STREAM))
            self._open[-1].setblocking(False)
            self.messages.append(b"")
        try:
            if self._is_new:
                self._open[-1].connect(self._path)
            self._open[-1].sendall(text)
        except OSError:
            # Nobody reads so much, or takes in so many.
            pass
        self.left_open += then == LEAVES
        self.messages[-1] += text
        self._is_new = then != PAUSES
        if then == CLOSES:
            self._open.pop().close()

    def _hang_up(self) -> None:
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1

    def close(self) -> None:
        self._hang_up()
        for each in self._open:
            each.close()


class _Poll:
    """select.poll, which instead of waiting lets the guest go on."""

    def __init__(self, guest: Guest) -> None:
        self._guest = guest
        self._poll = select.poll()
        self.register = self._poll.register

    def poll(self, wait: float | None) -> list[tuple[int, int]]:
        found = self._poll.poll(0)
        if not found:
            self._guest.next(wait)
        return found


def notify_messages(root: str) -> None:
    """What a guest says, over real connections to a real listener."""
    said = read_input(root)
    path = "host/notify.sock"
    guest = Guest(said, path)
    told: list[str] = []
    poll: Callable[[], _Poll] = lambda: _Poll(guest)  # noqa: E731
    with ExitStack() as stack:
        stack.callback(guest.close)
        stack.enter_context(
            replaced(
                (log, "notify", told.append),
                (readiness, "tell", told.append),
                (readiness, "time", guest),
                (readiness, "LOOK_AFTER_SOCKET_EVERY", 1.0),
                (readiness, "select", SimpleNamespace(poll=poll, POLLIN=select.POLLIN)),
            )
        )
        listener = _Listener(readiness.Address(path), timeout=TIMEOUT, others=tuple)
        asked, ask = os.pipe()
        stack.callback(os.close, asked)
        stack.callback(os.close, ask)
        outcome = listener.run(guest.hypervisor, asked)
        stack.callback(os.close, guest.hypervisor)
        if outcome == readiness.READY:
            readiness.announce(4242, RUNNING, listener.status)
    promise(not os.path.exists(path), "leaves its socket")
    for each in told:
        found = _TOLD.fullmatch(each)
        promise(found is not None, f"tells systemd {each!r}")
        for status in found.groups() if found else ():
            promise(status is None or status.isprintable(), f"passes on {status!r}")
            promise(status is None or len(status) <= readiness.STATUS_MAX, f"passes on {status!r}")
    promise(len(told) < 300, "tells systemd too much")
    promise(all("READY=1" not in each for each in told[:-1]), "is ready twice")
    _check_words(guest, is_ready=outcome == readiness.READY)
    if outcome != readiness.READY:
        raise NotReady("the guest is not ready")


class NotReady(Exception):
    """The guest has not become ready, which is no mistake of anybody's."""


def _check_words(guest: Guest, *, is_ready: bool) -> None:
    """Ready if and only if it said so, in a message that was not too large."""
    whole = [each for each in guest.messages if len(each) <= readiness.MESSAGE_MAX]
    said = any(b"READY=1" in each.split(b"\n") for each in whole)
    promise(said or not is_ready, "ready without its word")
    in_emergency = any(b"X_SYSTEMD_UNIT_ACTIVE=" in each for each in whole)
    # Others wait while so many are silent, and some for longer than the hypervisor lives.
    if not in_emergency and guest.left_open < readiness.CONNECTIONS_MAX:
        promise(is_ready or not said, "its word was not heard")
