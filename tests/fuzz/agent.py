# SPDX-License-Identifier: MIT
"""What a guest's agent answers to `microvm exec`, over connections that nobody waits at."""

from __future__ import annotations

import json
import socket
import zlib
from types import SimpleNamespace
from typing import cast

from microvm_host import guestagent
from microvm_host.errors import MicrovmHostError

from .engine import promise, read_input, replaced
from .peers import WITHIN, Peer

# Ends what is said on one connection; the rest is said on the next.
NEXT = b"\x1e"
# What the client takes for a random number, so that an input can know it.
TOKEN = 7
_ERROR_MAX = 450


class _Clock:
    """Passes by what is slept."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        promise(0 < seconds <= 1, f"sleeps for {seconds}")
        self.now += seconds


class _Guest:
    """Gives a connection after the other, until it has no more to say."""

    def __init__(self, said: bytes, then: str, size: int) -> None:
        self._said = said.split(NEXT)
        self._then = then
        self._size = size
        self.peers: list[Peer] = []

    def connect(self, within: float) -> socket.socket:
        promise(within == WITHIN, f"would wait for {within}")
        if not self._said:
            raise guestagent.NoAgent("the VM has ended")
        self.peers.append(Peer(self._said.pop(0), self._size, self._then))
        return cast("socket.socket", self.peers[-1].ours)

    def heard(self) -> list[bytes]:
        return [peer.heard() for peer in self.peers]


def agent_answers(root: str) -> None:
    """The same in one piece and in many, and without an end."""
    answers = read_input(root)
    whole = _run(_Guest(answers, "hangs up", 65536))
    if len(answers) < 4096:
        again = _run(_Guest(answers, "hangs up", len(answers) // 20 + 1))
        promise(whole == again, f"{whole}, but {again} in pieces")
    if answers and not zlib.crc32(answers) % 64:
        with replaced((guestagent, "ANSWER_MAX", 3 << 15)):
            endless = _Guest(answers.replace(NEXT, b"") or b"x", "goes on", 65536)
            _run(endless)
            for peer in endless.peers:
                # For the greeting, and for as many answers as it takes sense for.
                promise(peer.given < 64 << 20, f"reads {peer.given} bytes")
    if isinstance(whole, MicrovmHostError):
        raise whole


class _Outcome(MicrovmHostError):
    """A refusal that equals another of the same words."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Outcome) and str(self) == str(other)

    __hash__ = MicrovmHostError.__hash__


def _run(guest: _Guest) -> guestagent.Ended | _Outcome:
    outcome: guestagent.Ended | _Outcome
    clock = _Clock()
    random = SimpleNamespace(urandom=lambda size: TOKEN.to_bytes(size, "big"))
    with replaced((guestagent, "time", clock), (guestagent, "os", random)):
        try:
            outcome = guestagent.run(guest.connect, ["cat", "/etc/os-release"], b"given", WITHIN)
        except MicrovmHostError as error:
            promise(str(error).isprintable(), f"it says {error!s}")
            promise(len(str(error)) < _ERROR_MAX, f"it says {error!s}")
            outcome = _Outcome(str(error))
        else:
            promise(0 <= outcome.code <= 255, f"it ended with {outcome.code}")
    for peer in guest.peers:
        promise(peer.ours.fileno() < 0, "a connection is left open")
    _check_said(guest.heard(), is_done=isinstance(outcome, guestagent.Ended))
    return outcome


def _check_said(connections: list[bytes], *, is_done: bool) -> None:
    """Each begins with a greeting, and the command is run once at most."""
    runs = 0
    for said in connections:
        promise(said == b"" or said[0] == 0xFF, f"it begins with {said[:9]!r}")
        lines = [json.loads(line) for line in said[1:].splitlines()]
        for number, line in enumerate(lines):
            promise(
                (line["execute"] == "guest-sync-delimited") == (number == 0),
                f"it has said {line}",
            )
            runs += line["execute"] == "guest-exec"
            if line["execute"] == "guest-exec-status":
                promise(type(line["arguments"]["pid"]) is int, f"it asks for {line}")
    promise(runs <= 1, f"the command is run {runs} times")
    promise(runs == 1 or not is_done, "it ended, and was never run")
