# SPDX-License-Identifier: MIT
"""A stand-in for systemd on its private socket, which answers for properties that it was given.

It speaks D-Bus over a real socket, with an encoder of its own: the reader in `bus` is not to be
tested against itself.
"""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path
from typing import Any

# (interface, property) -> signature and value; of whichever object.
Properties = dict[tuple[str, str], tuple[str, Any]]


def encode(signature: str, values: tuple[Any, ...], order: str = "<", at: int = 0) -> bytes:
    """Values of a signature, from the place `at` in a message; structures as tuples."""
    data = bytearray()

    def align(to: int) -> None:
        data.extend(bytes(-(at + len(data)) % to))

    def put(kind: str, value: Any) -> None:
        if kind in "ybnqiuxt":
            form = {"y": "B", "b": "I", "n": "h", "q": "H", "i": "i", "u": "I", "x": "q", "t": "Q"}
            align(struct.calcsize("=" + form[kind]))
            data.extend(struct.pack(order + form[kind], value))
        elif kind in "so":
            align(4)
            text = value.encode()
            data.extend(struct.pack(order + "I", len(text)) + text + b"\0")
        elif kind == "g":
            data.extend(bytes([len(value)]) + value.encode() + b"\0")
        elif kind == "v":
            inner, content = value
            put("g", inner)
            put(inner, content)
        elif kind[0] == "a":
            align(4)
            size_at = len(data)
            data.extend(bytes(4))
            align(8 if kind[1] in "({xt" else 4 if kind[1] in "soaui" else 1)
            begin = len(data)
            for each in value:
                put(kind[1:], each)
            data[size_at : size_at + 4] = struct.pack(order + "I", len(data) - begin)
        else:
            align(8)
            for inner, each in zip(split(kind[1:-1]), value, strict=True):
                put(inner, each)

    for kind, value in zip(split(signature), values, strict=True):
        put(kind, value)
    return bytes(data)


def split(signature: str) -> list[str]:
    """The single types of a signature: `u(uo)as` is `u`, `(uo)` and `as`."""
    found, at = [], 0
    while at < len(signature):
        begin = at
        while signature[at] == "a":
            at += 1
        depth = 0
        while True:
            depth += {"(": 1, "{": 1, ")": -1, "}": -1}.get(signature[at], 0)
            at += 1
            if not depth:
                break
        found.append(signature[begin:at])
    return found


def message(
    kind: int, fields: list[tuple[int, tuple[str, Any]]], signature: str, *values: Any
) -> bytes:
    """A whole message: 2 a method's return, 3 an error, 4 a signal."""
    if signature:
        fields = [*fields, (8, ("g", signature))]
    body = encode(signature, values)
    head = b"l" + bytes([kind, 1, 1]) + struct.pack("<II", len(body), 99)
    head += encode("a(yv)", (fields,), at=12)
    return head + bytes(-len(head) % 8) + body


SIGNAL = message(
    4,
    [
        (1, ("o", "/org/freedesktop/systemd1")),
        (2, ("s", "org.freedesktop.systemd1.Manager")),
        (3, ("s", "JobRemoved")),
    ],
    "uoss",
    *(7, "/org/freedesktop/systemd1/job/7", "a.service", "done"),
)


def answer(serial: int, value: tuple[str, Any]) -> bytes:
    """What a property is."""
    return message(2, [(5, ("u", serial))], "v", value)


def refusal(serial: int, name: str, text: str) -> bytes:
    """An error of that name."""
    return message(3, [(4, ("s", name)), (5, ("u", serial))], "s", text)


class FakeSystemd:
    """Listens at a path until it is closed; `asked` is what it was asked for."""

    def __init__(self, path: Path) -> None:
        self.properties: Properties = {}
        # What there is no object of: its path.
        self.gone: set[str] = set()
        self.asked: list[tuple[str, str, str]] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                try:
                    self._talk(connection)
                except OSError:
                    # Who is refused one thing does not wait to hear of the next.
                    pass

    def _talk(self, connection: socket.socket) -> None:
        hello = b""
        while not hello.endswith(b"BEGIN\r\n"):
            hello += connection.recv(1)
        assert (
            hello == b"\0AUTH EXTERNAL %s\r\nBEGIN\r\n" % str(os.geteuid()).encode().hex().encode()
        )
        # A signal before any answer, since systemd sends those to all on this socket.
        connection.sendall(b"OK 0123456789abcdef0123456789abcdef\r\n" + SIGNAL)
        while head := connection.recv(16, socket.MSG_WAITALL):
            body_size, serial, fields_size = struct.unpack("<4xIII", head)
            fields_size += -fields_size % 8
            fields = connection.recv(fields_size, socket.MSG_WAITALL)
            body = connection.recv(body_size, socket.MSG_WAITALL)
            connection.sendall(self._answer(serial, fields, body))

    def _answer(self, serial: int, fields: bytes, body: bytes) -> bytes:
        # The first field is the path; at its fixed place, since our own calls are all alike.
        size = struct.unpack_from("<I", fields, 4)[0]
        path = fields[8 : 8 + size].decode()
        size = struct.unpack_from("<I", body)[0]
        interface = body[4 : 4 + size].decode()
        at = 4 + size + 1
        at += -at % 4
        name = body[at + 4 : -1].decode()
        self.asked.append((path, interface, name))
        if path in self.gone:
            return refusal(serial, "org.freedesktop.DBus.Error.UnknownObject", f"no {path}")
        found = self.properties.get((interface.removeprefix("org.freedesktop.systemd1."), name))
        if found is None:
            return refusal(serial, "org.freedesktop.DBus.Error.UnknownProperty", f"no {name}")
        return answer(serial, found)
