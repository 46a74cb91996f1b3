# SPDX-License-Identifier: MIT
"""Properties are read as systemd sends them, and what is no answer is not believed."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvm_host import bus
from microvm_host.errors import MicrovmHostError

from .fake_systemd import SIGNAL, FakeSystemd, answer, encode, refusal

PATH = "/org/freedesktop/systemd1/unit/a_2eservice"


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    fake = FakeSystemd(tmp_path / "private")
    yield fake
    fake.close()


def test_properties(systemd: FakeSystemd, tmp_path: Path) -> None:
    wanted = {
        ("Unit", "ActiveState"): ("s", "active"),
        ("Unit", "Job"): ("(uo)", (12, "/org/freedesktop/systemd1/job/12")),
        ("Service", "DynamicUser"): ("b", 1),
        ("Service", "TimeoutStartUSec"): ("t", 2**64 - 1),
        ("Service", "Nice"): ("i", -5),
        ("Service", "Environment"): ("as", ["A=b c", "D=é"]),
        ("Service", "Nothing"): ("as", []),
        ("Service", "Times"): ("a(tx)", [(1, -1), (2, -2)]),
        ("Service", "Bytes"): ("ay", [1, 2, 3]),
        ("Service", "Odd"): ("(ya{sv}q)", (7, [("k", ("n", -3))], 9)),
    }
    systemd.properties.update(wanted)
    found = bus.properties(str(tmp_path / "private"), PATH, *wanted)
    assert found == [
        *("active", (12, "/org/freedesktop/systemd1/job/12"), True, 2**64 - 1, -5),
        *(["A=b c", "D=é"], [], [(1, -1), (2, -2)], [1, 2, 3], (7, [("k", -3)], 9)),
    ]
    assert systemd.asked == [
        (PATH, f"org.freedesktop.systemd1.{interface}", name) for interface, name in wanted
    ]


@pytest.mark.parametrize(("path", "is_gone"), [(PATH, True), ("/other", False)])
def test_what_is_refused(systemd: FakeSystemd, tmp_path: Path, path: str, *, is_gone: bool) -> None:
    systemd.gone.add(PATH)
    with pytest.raises(bus.Refused, match="systemd does not tell: no ") as caught:
        bus.properties(str(tmp_path / "private"), path, ("Unit", "Id"))
    assert caught.value.is_gone == is_gone


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(MicrovmHostError, match="private: systemd cannot be asked: No such file"):
        bus.properties(str(tmp_path / "private"), PATH, ("Unit", "Id"))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        # As `busctl tree org.freedesktop.systemd1` shows them.
        ("microvm@web-1.service", "microvm_40web_2d1_2eservice"),
        ("7.slice", "_37_2eslice"),
        ("a7.slice", "a7_2eslice"),
        ("a\\x2db_c.socket", "a_5cx2db_5fc_2esocket"),
        ("ü.service", "_c3_bc_2eservice"),
        ("", "_"),
    ],
)
def test_object_of_a_unit(name: str, label: str) -> None:
    assert bus.unit(name) == f"/org/freedesktop/systemd1/unit/{label}"


OK = b"OK 0123\r\n"


def ask(tmp_path: Path, said: bytes, *, size: int = 65536) -> list[Any]:
    """Ask for one property of somebody who says that, in pieces, whatever is asked."""
    path = tmp_path / f"said{len(os.listdir(tmp_path))}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                try:
                    for at in range(0, len(said), size):
                        connection.sendall(said[at : at + size])
                    connection.shutdown(socket.SHUT_WR)
                    while connection.recv(4096):
                        pass
                except OSError:
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            return bus.properties(str(path), PATH, ("Unit", "Id"))
        finally:
            thread.join(10)


def test_in_pieces(tmp_path: Path) -> None:
    said = OK + SIGNAL + answer(1, ("s", "a.service")) + SIGNAL
    assert ask(tmp_path, said, size=3) == ["a.service"]


def test_of_the_other_byte_order(tmp_path: Path) -> None:
    body = encode("v", (("(tas)", (5, ["x"])),), ">")
    head = b"B\2\1\1" + struct.pack(">II", len(body), 7)
    head += encode("a(yv)", ([(5, ("u", 1)), (8, ("g", "v"))],), ">", at=12)
    said = OK + head + bytes(-len(head) % 8) + body
    assert ask(tmp_path, said) == [(5, ["x"])]


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"REJECTED EXTERNAL\r\n",
        OK,
        OK + answer(1, ("s", "a"))[:-1],
        # To a question that nobody asked.
        OK + answer(2, ("s", "a")),
        OK + b"x" + answer(1, ("s", "a"))[1:],
        # A message without end.
        OK + b"l\2\1\1" + struct.pack("<III", 1 << 30, 1, 8) + bytes(64),
        # Of a kind that there is not, and without a serial.
        OK + answer(1, ("s", "a")).replace(b"\1s\0", b"\1Z\0"),
        OK + answer(1, ("s", "a")).replace(b"\5\1u\0", b"\7\1u\0"),
        OK + refusal(1, "a.b", "c").replace(b"\4\1s\0", b"\7\1s\0"),
    ],
)
def test_what_is_no_answer(tmp_path: Path, said: bytes) -> None:
    with pytest.raises(MicrovmHostError, match=r"cannot be (understood|asked)"):
        ask(tmp_path, said)


def test_a_silence_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bus, "WITHIN", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "private"))
        listener.listen()
        with pytest.raises(MicrovmHostError, match="systemd cannot be asked: timed out"):
            bus.properties(str(tmp_path / "private"), PATH, ("Unit", "Id"))


_TYPES: Any = st.deferred(
    lambda: st.one_of(
        st.tuples(
            st.just("s"), st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
        ),
        st.tuples(st.just("t"), st.integers(0, 2**64 - 1)),
        st.tuples(st.just("i"), st.integers(-(2**31), 2**31 - 1)),
        st.tuples(st.just("y"), st.integers(0, 255)),
        st.lists(_TYPES, min_size=1, max_size=3).map(
            lambda items: (
                "(" + "".join(kind for kind, _ in items) + ")",
                tuple(value for _, value in items),
            )
        ),
        st.tuples(_TYPES, st.integers(0, 3)).map(
            lambda both: (f"a{both[0][0]}", [both[0][1]] * both[1])
        ),
    )
)


@given(_TYPES)
def test_any_value(kind_and_value: tuple[str, Any]) -> None:
    kind, value = kind_and_value
    data = encode("v", ((kind, value),))
    assert bus._Reader(data, 0, "little").value("v") == value
