# SPDX-License-Identifier: MIT
"""Runs commands in a guest by QEMU's guest agent, which listens at a port of the guest's.

The protocol is lines of JSON (QEMU's docs/interop/qemu-ga-ref). What comes is the guest's to say,
and taken for hostile: lines have a limit, each answer is checked, and of an error's text only what
can be printed is repeated. What a command writes is given as it is: it was asked for.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import time

from .errors import MicrovmHostError, one_line
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    Connect = Callable[[float], socket.socket]

# The agent keeps 16 MiB of each output (GUEST_EXEC_MAX_OUTPUT in qga/commands.c), in base64.
ANSWER_MAX = 48 << 20
INPUT_MAX = 16 << 20
_PATIENCE_IN_PORT = 2.0  # seconds: others may want to ask something, too
_FIRST_PAUSE, _PAUSE_MAX = 0.02, 1.0
_ERROR_MAX = 300


class NoAgent(MicrovmHostError):
    """Nobody answers, or not sensibly."""


@frozen
class Ended:
    """How a command in the guest ended, and what it wrote.

    `code` is its exit code, or that of a shell for one that a signal ended; `is_cut` tells that it
    wrote more than the agent keeps.
    """

    code: int
    out: bytes
    err: bytes
    is_cut: bool = False


def run(
    connect: Connect,
    argv: Sequence[str],
    given: bytes | None,
    within: float,
) -> Ended:
    """Run a command in the guest and wait until it has ended.

    Args:
        connect: gives a connection to the agent's port, in so many seconds.
        argv: the command; the agent looks for it in its own $PATH.
        given: what the command reads; None for nothing.
        within: seconds that the agent may take for any answer. The command may take any time.

    Raises:
        NoAgent: the agent does not answer.
        MicrovmHostError: it refuses, or cannot be reached.
    """
    arguments: dict[str, object] = {
        "path": argv[0],
        "arg": list(argv[1:]),
        "capture-output": True,
    }
    if given is not None:
        if len(given) > INPUT_MAX:
            raise MicrovmHostError(f"the input is larger than {INPUT_MAX >> 20} MiB")
        arguments["input-data"] = base64.b64encode(given).decode()
    port = _Port(connect(within), within)
    began = time.monotonic()
    pause = _FIRST_PAUSE
    try:
        started = port.ask("guest-exec", arguments, within)
        pid = started.get("pid") if isinstance(started, dict) else None
        if type(pid) is not int:
            raise port.nonsense("no process")
        while True:
            time.sleep(pause)
            pause = min(pause * 1.5, _PAUSE_MAX)
            if port.is_closed:
                port = _Port(connect(within), within)
            found = port.ask("guest-exec-status", {"pid": pid}, within)
            if not isinstance(found, dict) or type(found.get("exited")) is not bool:
                raise port.nonsense("no state of a process")
            if found["exited"]:
                return _ended(found, port)
            if time.monotonic() - began > _PATIENCE_IN_PORT:
                # QEMU lets one in at a time.
                port.close()
    finally:
        port.close()


def _ended(found: dict[str, object], port: _Port) -> Ended:
    code, signal = found.get("exitcode"), found.get("signal")
    if type(code) is not int and type(signal) is int:
        code = 128 + signal
    if type(code) is not int:
        raise port.nonsense("no exit code")
    outputs = []
    for key in ("out-data", "err-data"):
        data = found.get(key, "")
        try:
            outputs.append(base64.b64decode(data if isinstance(data, str) else "!", validate=True))
        except (binascii.Error, ValueError):
            raise port.nonsense("an output that is not base64") from None
    is_cut = any(found.get(key) is True for key in ("out-truncated", "err-truncated"))
    return Ended(code & 0xFF, outputs[0], outputs[1], is_cut)


class _Port:
    """A connection on which the agent is known to listen."""

    def __init__(self, connected: socket.socket, within: float) -> None:
        self._socket = connected
        self._buffer = bytearray()
        self._read = 0
        self.is_closed = False
        try:
            self._meet(within)
        except BaseException:
            self.close()
            raise

    def _meet(self, within: float) -> None:
        """Have the agent forget what others began to say, and hear only what it says from now."""
        token = int.from_bytes(os.urandom(4), "big")
        # A byte that no text holds begins it, on both ways (guest-sync-delimited).
        request = {"execute": "guest-sync-delimited", "arguments": {"id": token}}
        deadline = time.monotonic() + within
        self._send(b"\xff" + json.dumps(request).encode() + b"\n", deadline)
        while True:
            line = self._line(deadline).rpartition(b"\xff")[2]
            answer = _parsed(line)
            # Answers to those who asked before and have gone are not for us.
            if answer is not None and answer.get("return") == token:
                return

    def ask(self, command: str, arguments: dict[str, object], within: float) -> object:
        """What the agent returns; raises MicrovmHostError."""
        deadline = time.monotonic() + within
        self._read = 0
        request = {"execute": command, "arguments": arguments}
        self._send(json.dumps(request).encode() + b"\n", deadline)
        answer = _parsed(self._line(deadline))
        if answer is None:
            raise self.nonsense("no JSON")
        if "return" in answer:
            return answer["return"]
        error = answer.get("error")
        said = error.get("desc") if isinstance(error, dict) else None
        kind = error.get("class") if isinstance(error, dict) else None
        hint = ""
        if kind == "CommandNotFound" or (isinstance(said, str) and "disabled" in said):
            hint = "the guest's configuration of the agent has to allow it"
        text = one_line(said)[:_ERROR_MAX] if isinstance(said, str) else "an error"
        raise MicrovmHostError(f"the guest's agent refuses {command}: {text}", hint=hint)

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(max(deadline - time.monotonic(), 0.01))
            self._socket.sendall(data)
        except TimeoutError:
            raise _silent() from None
        except OSError as error:
            raise NoAgent(f"the agent's port was closed: {error.strerror}") from error

    def _line(self, deadline: float) -> bytes:
        begin = 0
        while (end := self._buffer.find(b"\n", begin)) < 0:
            begin = len(self._buffer)
            rest = deadline - time.monotonic()
            try:
                if rest <= 0:
                    raise TimeoutError
                self._socket.settimeout(rest)
                data = self._socket.recv(1 << 20)
            except TimeoutError:
                raise _silent() from None
            except OSError as error:
                raise NoAgent(f"the agent's port was closed: {error.strerror}") from error
            if not data:
                raise NoAgent("the VM has ended, or closed the agent's port")
            self._buffer += data
            self._read += len(data)
            if self._read > ANSWER_MAX:
                raise self.nonsense("more than any answer has")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return line

    def nonsense(self, what: str) -> NoAgent:
        return NoAgent(f"the guest's agent does not make sense: {what}")

    def close(self) -> None:
        self.is_closed = True
        self._socket.close()


def _silent() -> NoAgent:
    return NoAgent(
        "no agent answers in the guest",
        hint="the guest has to have booted, and to run qemu-guest-agent",
    )


def _parsed(line: bytes) -> dict[str, object] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
