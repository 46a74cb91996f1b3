# SPDX-License-Identifier: MIT
"""Text of a guest that is shown a second time: without what commands a terminal.

A guest's console asks the terminal for its size, its kind and the cursor's place. Shown again from
the journal, these questions would be answered again, on whatever standard input is then.
"""

from __future__ import annotations

import re

# ECMA-48, 5.4 and 5.6, as bytes of UTF-8: CSI with its end, strings with theirs, other escapes,
# and control characters except tab and line feed. A carriage return matters inside a line alone.
_COMMAND = re.compile(
    rb"(\x1b\[|\xc2\x9b)([0-?]*)[ -/]*([@-~]|$)"
    rb"|(?:\x1b[PX\]^_]|\xc2[\x90\x98\x9d-\x9f]).*?(?:\x07|\x1b\\|\xc2\x9c|$)"
    rb"|\x1b[ -/]*[0-~]?"
    rb"|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
    rb"|\xc2[\x80-\x9f]"
    rb"|\r+$"
)
_RESET = b"\x1b[0m"


def shown_again(line: bytes) -> bytes:
    """A line without control sequences; only its colours stay, which end with it."""
    has_colours = False

    def replace(found: re.Match[bytes]) -> bytes:
        nonlocal has_colours
        if found[3] != b"m" or found[2].strip(b"0123456789;:"):
            return b""
        has_colours = True
        return b"\x1b[" + found[2] + b"m"

    text, newline = (line[:-1], b"\n") if line.endswith(b"\n") else (line, b"")
    text = _COMMAND.sub(replace, text)
    return text + (_RESET if has_colours else b"") + newline


class Lines:
    """Puts lines together of what comes in pieces, and cleans each."""

    def __init__(self) -> None:
        self._rest = b""

    def __call__(self, data: bytes) -> bytes:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return b"".join(shown_again(line + b"\n") for line in lines)

    def rest(self) -> bytes:
        """What came after the last whole line."""
        rest, self._rest = self._rest, b""
        return shown_again(rest)
