# SPDX-License-Identifier: MIT
"""Asks systemd for properties, on the socket that it has for root.

`systemctl` takes 8 ms on the processor for this, and pystemd 3 to be loaded, where the whole of a
helper takes 10; and helpers of a start and a stop ask little. So this speaks D-Bus by itself, as
much of it as reading properties takes: a connection for each exchange, all questions sent at once,
and the answers read back (D-Bus Specification, "Message Protocol"; org.freedesktop.systemd1(5)).
All that changes anything goes through pystemd or systemctl.
"""

from __future__ import annotations

import os
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket

from .errors import MicrovmHostError, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # The interface, without what all of systemd's begin with, and the property.
    Property = tuple[str, str]

# As long as sd-bus itself waits for an answer (sd_bus_set_method_call_timeout(3)).
WITHIN = 25.0  # seconds
# Properties are small; this is the end of a message that is none.
MESSAGE_MAX = 1 << 20

_METHOD_RETURN, _ERROR = 2, 3
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _SIGNATURE = 1, 2, 3, 4, 5, 8
# Type -> its size and the kind of number; all are aligned to their size.
_NUMBERS = {
    **{"y": (1, False), "b": (4, False), "n": (2, True), "q": (2, False), "i": (4, True)},
    **{"u": (4, False), "x": (8, True), "t": (8, False)},
}
# systemd's own object.
MANAGER = "/org/freedesktop/systemd1"
_GONE = ("org.freedesktop.DBus.Error.UnknownObject", "org.freedesktop.systemd1.NoSuchUnit")


class Refused(MicrovmHostError):
    """systemd's answer is an error; `is_gone` tells that there is no such object, or no more."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(message)
        self.is_gone = name in _GONE


def unit(name: str) -> str:
    """The object of a unit, which systemd loads when it is asked for it.

    Its name is in there with all but letters and digits escaped, as sd_bus_path_encode(3) has it.
    """
    label = "".join(
        char if char.isascii() and char.isalnum() and (at or not char.isdigit()) else _escaped(char)
        for at, char in enumerate(name)
    )
    return f"{MANAGER}/unit/{label or '_'}"


def _escaped(char: str) -> str:
    return "".join(f"_{byte:02x}" for byte in char.encode())


def properties(private_socket: str, path: str, *wanted: Property) -> list[Any]:
    """Properties of one of systemd's objects, in the order in which they were asked for.

    Args:
        private_socket: where systemd listens for root.
        path: the object.
        wanted: interfaces, e.g. `Unit`, and their properties, e.g. `ActiveState`.

    Returns:
        Numbers, booleans and text; tuples for structures and lists for arrays.

    Raises:
        Refused: there is no such object or property.
        MicrovmHostError: systemd cannot be reached, or does not answer.
    """
    hello = f"\0AUTH EXTERNAL {str(os.geteuid()).encode().hex()}\r\nBEGIN\r\n".encode()
    calls = [_call(serial, path, *what) for serial, what in enumerate(wanted, 1)]
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        connection.settimeout(WITHIN)
        connection.connect(private_socket)
        connection.sendall(hello)
        incoming = _Incoming(connection)
        incoming.authenticated()
        # Not before: what systemd has read together with BEGIN, it would leave lying until more
        # comes.
        connection.sendall(b"".join(calls))
        answers: dict[int, Any] = {}
        while len(answers) < len(wanted):
            answer = incoming.answer()
            if answer is not None:
                serial, value = answer
                answers[serial] = value
        return [answers[serial] for serial in range(1, len(wanted) + 1)]
    except OSError as error:
        raise MicrovmHostError(
            f"systemd cannot be asked: {error.strerror or error}", path=private_socket
        ) from error
    except (KeyError, IndexError, ValueError, OverflowError) as error:
        raise MicrovmHostError(
            f"systemd's answer cannot be understood: {error!r}", path=private_socket
        ) from error
    finally:
        connection.close()


def _call(serial: int, path: str, interface: str, name: str) -> bytes:
    """The message that asks for a property."""
    body = b""
    for text in (f"org.freedesktop.systemd1.{interface}", name):
        body = _padded(body, 4) + _text(text)
    fields = b""
    for code, kind, text in (
        (_PATH, b"o", path),
        (_INTERFACE, b"s", "org.freedesktop.DBus.Properties"),
        (_MEMBER, b"s", "Get"),
    ):
        fields = _padded(fields, 8) + bytes((code, 1)) + kind + b"\0" + _text(text)
    fields = _padded(fields, 8) + bytes((_SIGNATURE, 1)) + b"g\0\2ss\0"
    # Little-endian, a method call, without flags, of the protocol's first version.
    head = b"l\1\0\1" + _word(len(body)) + _word(serial) + _word(len(fields)) + fields
    return _padded(head, 8) + body


def _word(number: int) -> bytes:
    return number.to_bytes(4, "little")


def _text(text: str) -> bytes:
    encoded = text.encode()
    return _word(len(encoded)) + encoded + b"\0"


def _padded(data: bytes, to: int) -> bytes:
    return data + bytes(-len(data) % to)


class _Incoming:
    """What systemd says on a connection."""

    def __init__(self, connection: socket) -> None:
        self._connection = connection
        self._buffer = b""

    def authenticated(self) -> None:
        """Read its leave to go on: `OK` and its identifier."""
        while b"\r\n" not in self._buffer:
            self._receive()
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        if not line.startswith(b"OK "):
            raise ValueError(line[:80])

    def answer(self) -> tuple[int, Any] | None:
        """The next message: of an answer, the serial and the value; None for any other.

        Such are systemd's signals, which all get who are connected here.
        """
        data = self._take(16)
        order = {b"l": "little", b"B": "big"}[data[:1]]
        size, fields_size = (int.from_bytes(data[at : at + 4], order) for at in (4, 12))  # type: ignore[arg-type]
        head = 16 + fields_size + -fields_size % 8
        if head + size > MESSAGE_MAX:
            raise ValueError(f"a message of {head + size} bytes")
        data += self._take(head + size - 16)
        kind = data[1]
        if kind not in (_METHOD_RETURN, _ERROR):
            return None
        fields = dict(_Reader(data, 12, order).value("a(yv)"))
        signature = fields.get(_SIGNATURE, "")
        value = _Reader(data[head:], 0, order).value(signature) if signature else None
        if kind == _ERROR:
            raise Refused(fields[_ERROR_NAME], f"systemd does not tell: {one_line(str(value))}")
        return fields[_REPLY_SERIAL], value

    def _take(self, size: int) -> bytes:
        while len(self._buffer) < size:
            self._receive()
        taken, self._buffer = self._buffer[:size], self._buffer[size:]
        return taken

    def _receive(self) -> None:
        if not (received := self._connection.recv(65536)):
            raise ValueError("it hung up")
        self._buffer += received


class _Reader:
    """Reads values of a message, by their signature."""

    def __init__(self, data: bytes, at: int, order: str) -> None:
        self._data = data
        self._at = at
        self._order: Any = order

    def value(self, signature: str) -> Any:
        """The first value of a signature."""
        return self._value(signature, 0)[0]

    def _value(self, signature: str, at: int) -> tuple[Any, int]:
        """The value of the type that begins at `at` of the signature, and where the next begins."""
        kind = signature[at]
        if kind in _NUMBERS:
            size, is_signed = _NUMBERS[kind]
            self._align(size)
            number = int.from_bytes(self._take(size), self._order, signed=is_signed)
            return (bool(number) if kind == "b" else number), at + 1
        if kind in "so":
            self._align(4)
            return self._text(int.from_bytes(self._take(4), self._order)), at + 1
        if kind == "g":
            return self._text(self._take(1)[0]), at + 1
        if kind == "v":
            return self.value(self._text(self._take(1)[0])), at + 1
        if kind == "a":
            return self._array(signature, at + 1)
        if kind in "({":
            self._align(8)
            values, at = [], at + 1
            while signature[at] not in ")}":
                value, at = self._value(signature, at)
                values.append(value)
            return tuple(values), at + 1
        raise ValueError(f"type {kind!r}")

    def _array(self, signature: str, at: int) -> tuple[list[Any], int]:
        self._align(4)
        size = int.from_bytes(self._take(4), self._order)
        # Not counted in its size, and there for an empty one as well.
        self._align(8 if signature[at] in "({xtd" else 1)
        end, values = self._at + size, []
        after = _after(signature, at)
        while self._at < end:
            values.append(self._value(signature, at)[0])
        return values, after

    def _align(self, to: int) -> None:
        self._at += -self._at % to

    def _text(self, size: int) -> str:
        return self._take(size + 1)[:-1].decode()

    def _take(self, size: int) -> bytes:
        taken = self._data[self._at : self._at + size]
        if len(taken) < size:
            raise ValueError("it is cut short")
        self._at += size
        return taken


def _after(signature: str, at: int) -> int:
    """Where the type that begins at `at` has ended."""
    while signature[at] == "a":
        at += 1
    depth = 0
    while True:
        depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(signature[at], 0)
        at += 1
        if not depth:
            return at
