# SPDX-License-Identifier: MIT
"""Tells the line of each key and value in a TOML text, which tomllib does not.

For messages alone: the text has been read by tomllib, so that it is known to be right, and what is
not understood here costs a line number and no more.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    # Keys of tables, and positions in arrays: ("interfaces", 0, "mac").
    Path = tuple[str | int, ...]

_BARE_ENDS = " \t=.]}\n,#"
_ESCAPES = {"b": "\b", "t": "\t", "n": "\n", "f": "\f", "r": "\r", "e": "\x1b"}


def line(text: str, path: Path) -> int | None:
    """The line, from 1, of a key or value; that of what holds it, if it is not there itself."""
    try:
        found = lines(text)
    except (IndexError, RecursionError):
        return None
    while path:
        if path in found:
            return found[path]
        path = path[:-1]
    return None


def lines(text: str) -> dict[Path, int]:
    """The line of each key, table and element of an array, by its path."""
    return _Scanner(text).document()


class _Scanner:
    def __init__(self, text: str) -> None:
        # As tomllib does it; and a newline, so that each key and comment has an end.
        self._text = text.replace("\r\n", "\n") + "\n"
        self._at = 0
        self._found: dict[Path, int] = {}
        # How many tables each `[[array]]` has so far.
        self._counts: dict[Path, int] = {}

    def document(self) -> dict[Path, int]:
        table: Path = ()
        while True:
            self._skip_blank()
            if self._at >= len(self._text):
                return self._found
            if self._peek() == "[":
                table = self._header()
            else:
                self._pair(table)

    def _peek(self, length: int = 1) -> str:
        return self._text[self._at : self._at + length]

    def _note(self, path: Path) -> None:
        self._found.setdefault(path, self._text.count("\n", 0, self._at) + 1)

    def _skip_space(self) -> None:
        while self._peek() in (" ", "\t"):
            self._at += 1

    def _skip_blank(self) -> None:
        """To the next thing that is neither space, nor newline, nor comment, nor a comma."""
        while self._at < len(self._text) and self._peek() in " \t\n,#":
            if self._peek() == "#":
                self._at = self._text.index("\n", self._at)
            else:
                self._at += 1

    def _header(self) -> Path:
        is_array = self._peek(2) == "[["
        at = self._at
        self._at += 2 if is_array else 1
        words = self._key()
        self._at = self._text.index("]", self._at) + (2 if is_array else 1)
        after, self._at = self._at, at
        path: Path = ()
        for number, word in enumerate(words):
            path = (*path, word)
            self._note(path)
            if is_array and number == len(words) - 1:
                self._counts[path] = self._counts.get(path, 0) + 1
            if path in self._counts:
                # What follows belongs to the last one so far.
                path = (*path, self._counts[path] - 1)
                self._note(path)
        self._at = after
        return path

    def _pair(self, table: Path) -> None:
        at = self._at
        words = self._key()
        after, self._at = self._at, at
        path = table
        for word in words:
            path = (*path, word)
            self._note(path)
        self._at = after
        self._skip_space()
        self._at += 1  # the `=`
        self._skip_space()
        self._value(path)

    def _key(self) -> list[str]:
        """A key, dotted perhaps, with each part bare or quoted."""
        words = []
        while True:
            self._skip_space()
            if self._peek() in ("'", '"'):
                words.append(self._string())
            else:
                start = self._at
                while self._peek() not in _BARE_ENDS:
                    self._at += 1
                words.append(self._text[start : self._at])
            self._skip_space()
            if self._peek() != ".":
                return words
            self._at += 1

    def _value(self, path: Path) -> None:
        first = self._peek()
        if first in ("'", '"'):
            self._string()
        elif first == "[":
            self._at += 1
            number = 0
            while True:
                self._skip_blank()
                if self._peek() == "]":
                    break
                self._note((*path, number))
                self._value((*path, number))
                number += 1
            self._at += 1
        elif first == "{":
            self._at += 1
            while True:
                self._skip_blank()
                if self._peek() == "}":
                    break
                self._pair(path)
            self._at += 1
        else:
            # A number, a truth or a time, which may hold a space.
            while self._text[self._at] not in ",]}\n#":
                self._at += 1

    def _string(self) -> str:
        quote = self._peek()
        ends = quote * 3 if self._peek(3) == quote * 3 else quote
        self._at += len(ends)
        value = ""
        while self._peek(len(ends)) != ends:
            if quote == '"' and self._peek() == "\\":
                value += self._escaped()
            else:
                value += self._text[self._at]
                self._at += 1
        self._at += len(ends)
        # Up to two quotes may stand right before the three that end it.
        while len(ends) == 3 and self._peek() == quote:
            self._at += 1
        return value

    def _escaped(self) -> str:
        letter = self._text[self._at + 1]
        digits = {"x": 2, "u": 4, "U": 8}.get(letter, 0)
        word = self._text[self._at + 2 : self._at + 2 + digits]
        self._at += 2 + digits
        return chr(int(word, 16)) if digits else _ESCAPES.get(letter, letter)
