# SPDX-License-Identifier: MIT
"""What a guest said is shown again without what commands a terminal."""

from __future__ import annotations

import pytest

from microvm_host.terminal_text import Lines, shown_again


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        (b"plain text", b"plain text"),
        (
            "Gr\u00fc\u00dfe, \u4e16\u754c, \u0100".encode(),
            "Gr\u00fc\u00dfe, \u4e16\u754c, \u0100".encode(),
        ),
        (b"a\tb", b"a\tb"),
        # Questions: the kind, the place of the cursor, colours, the size.
        (b"\x1b[c\x1b[>c\x1b[6n\x1b]11;?\x07\x1b]10;?\x1b\\\x1b[18tlogin: ", b"login: "),
        (b"\x1bP+q544e\x1b\\x\x1bZ\x05y", b"xy"),
        # Clears and moves, of which some ends are missing.
        (b"\x1b[2J\x1b[Ha\x1b7b\x1b(Bc\x1b[?25l\x1b[", b"abc"),
        (b"half \x1b]0;title", b"half "),
        (b"half \x1b", b"half "),
        # The same as one character each (C1), but no part of another character.
        (b"\xc2\x9b6n\xc2\x9d0;x\xc2\x9cok\xc2\x85", b"ok"),
        # Colours stay, and end with the line.
        (b"[\x1b[0;32m  OK  \x1b[0m] x", b"[\x1b[0;32m  OK  \x1b[0m] x\x1b[0m"),
        (b"\x1b[?1mx\x1b[>4;2my", b"xy"),
        (b"dos\r", b"dos"),
        (b"10%\r20%\r", b"10%\r20%"),
        (b"a\x00\x08\x7fb", b"ab"),
    ],
)
def test_a_line(line: bytes, shown: bytes) -> None:
    assert shown_again(line) == shown
    assert shown_again(line + b"\n") == shown + b"\n"


def test_lines_in_pieces() -> None:
    lines = Lines()
    assert lines(b"one\ntw") == b"one\n"
    assert lines(b"o\x1b") == b""
    assert lines(b"[6n\n\nrest\x1b[c") == b"two\n\n"
    assert (lines.rest(), lines.rest()) == (b"rest", b"")
