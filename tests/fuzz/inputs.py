# SPDX-License-Identifier: MIT
"""What is fed to a target: a tree of files, which may be just one, and how one is changed.

In the corpus an input of one file is that file, and a tree is JSON: `[[PATH, KIND, CONTENT], …]`,
with each byte as the character of its number, so that people can read and write it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

KINDS = ("file", "link", "directory", "fifo", "socket")
# Enough to pass each limit of what is read, and no more.
SIZE_MAX = 70_000
ENTRIES_MAX = 300


class Entry(NamedTuple):
    """A file of a tree; `content` is where a link points, and nothing for the rest."""

    path: bytes
    kind: str
    content: bytes


Tree = tuple[Entry, ...]


def single(content: bytes) -> Tree:
    return (Entry(b"input", "file", content),)


def dump(tree: Tree) -> bytes:
    if len(tree) == 1 and tree[0][:2] == (b"input", "file"):
        return tree[0].content
    rows = [[path.decode("latin-1"), kind, text.decode("latin-1")] for path, kind, text in tree]
    return ("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n").encode()


def load(text: bytes, *, is_tree: bool) -> Tree:
    if not is_tree:
        return single(text)
    return tuple(
        Entry(path.encode("latin-1"), kind, content.encode("latin-1"))
        for path, kind, content in json.loads(text)
    )


def write(tree: Tree, root: str) -> None:
    """Make a tree below `root`, leaving out what cannot be made, or would be made elsewhere."""
    base = os.fsencode(root)
    # Links come last, so that nothing is written through one.
    for entry in sorted(tree, key=lambda entry: entry.kind == "link"):
        path = os.path.normpath(base + b"/" + entry.path)
        if b"\0" in path or not path.startswith(base + b"/"):
            continue
        parent = os.path.dirname(path)
        try:
            if parent != base and not os.path.isdir(parent):
                os.makedirs(parent)
            # A link that was made before may be part of it.
            if entry.kind == "link" and not os.path.realpath(parent).startswith(base):
                continue
            if entry.kind == "file":
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                file = os.open(path, flags, 0o755 if b"/bin/" in path else 0o644)
                os.write(file, entry.content)
                os.close(file)
            elif entry.kind == "link":
                os.symlink(entry.content, path)
            elif entry.kind == "directory":
                os.mkdir(path)
            elif entry.kind == "fifo":
                os.mkfifo(path)
            else:
                os.mknod(path, 0o140644)
        except (OSError, ValueError):
            # A name that is too long or there already, a parent that is a file.
            continue


# Bytes at which readers go wrong: ends and separators of all sorts, what is no UTF-8, what commands
# terminals, what has a meaning in paths, units and globs.
_NASTY = (
    *(b"\0", b"\n", b"\r\n", b"\r", b"\t", b" ", b"\x1b[2J", b"\x7f", b"\xff", b"\xc0\x80", b"%n"),
    *(b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\xc2\x85", b"\xe2\x80\xae", b"\xef\xbb\xbf", b"\xcc\x88"),
    *(b"/", b"//", b"..", b"../", b".", b"-", b"--", b"*", b"?", b"[", b"\\", b"\\x2d", b"%", b"$"),
    *(b"0", b"-1", b"4294967295", b"4294967296", b"18446744073709551616", b"1e999", b"0x7f"),
    *(b"@", b":", b",", b"=", b"#", b"'", b'"', b"'''", b"{", b"}", b"_", b"\xd9\xa3", b"\xc2\xb2"),
)


@dataclass(frozen=True)
class Mutator:
    """Changes inputs; the same changes for the same random numbers.

    Args:
        words: what means something to the target, beside what is nasty to all.
        paths: where files of a tree may be; none for inputs of one file.
    """

    random: Random
    words: Sequence[bytes]
    paths: Sequence[bytes] = ()

    def changed(self, tree: Tree, pool: Sequence[Tree]) -> Tree:
        """A tree changed in a few places, perhaps with parts of others."""
        for _ in range(self._few()):
            tree = self._changed_once(tree, pool)
        return tree

    def _few(self) -> int:
        count = 1
        while count < 12 and self.random.random() < 0.5:
            count += 1
        return count

    def _changed_once(self, tree: Tree, pool: Sequence[Tree]) -> Tree:
        random = self.random
        other = random.choice(pool)
        if not self.paths:
            content = tree[0].content if tree else b""
            donor = other[0].content if other else b""
            return single(self.text(content, donor))
        entries = list(tree)
        choice = random.random()
        if not entries or choice < 0.12:
            entries.append(Entry(random.choice(self.paths), "file", self._line()))
        elif choice < 0.2 and other:
            entries.append(random.choice(other))
        elif choice < 0.27:
            del entries[random.randrange(len(entries))]
        else:
            at = random.randrange(len(entries))
            entry = entries[at]
            if choice < 0.34:
                entries[at] = entry._replace(path=self._path(entry.path))
            elif choice < 0.4:
                entries[at] = entry._replace(kind=random.choice(KINDS))
            elif choice < 0.43:
                entries.append(entry._replace(path=self._path(entry.path)))
            elif choice < 0.435:
                count = random.randrange(ENTRIES_MAX)
                entries += [entry._replace(path=b"%s%d" % (entry.path, n)) for n in range(count)]
            else:
                donor = random.choice(other).content if other else b""
                entries[at] = entry._replace(content=self.text(entry.content, donor))
        return tuple(entries[: 2 * ENTRIES_MAX])

    def _path(self, path: bytes) -> bytes:
        if self.random.random() < 0.5:
            return self.random.choice(self.paths)
        parts = path.split(b"/")
        at = self.random.randrange(len(parts))
        change = self.random.random()
        if change < 0.4:
            parts[at] = self.text(parts[at], b"")
        elif change < 0.7:
            parts.insert(at, self._word())
        else:
            del parts[at]
        return b"/".join(parts)

    def _word(self) -> bytes:
        return self.random.choice(self.words if self.random.random() < 0.7 else _NASTY)

    def _line(self) -> bytes:
        separator = self.random.choice((b" ", b"\t", b"", b" = ", b"\n"))
        return separator.join(self._word() for _ in range(self._few())) + b"\n"

    def text(self, text: bytes, donor: bytes) -> bytes:
        """Bytes changed in one place."""
        changes: tuple[Callable[[bytes, bytes], bytes], ...] = (
            *(self._insert, self._insert, self._replace, self._replace, self._cut, self._repeat),
            *(self._byte, self._lines, self._lines, self._splice, self._grow),
        )
        return self.random.choice(changes)(text, donor)[:SIZE_MAX]

    def _span(self, text: bytes) -> tuple[int, int]:
        begin = self.random.randint(0, len(text))
        return begin, min(len(text), begin + self.random.choice((0, 1, 1, 2, 4, 8, 32)))

    def _insert(self, text: bytes, _: bytes) -> bytes:
        at, _end = self._span(text)
        return text[:at] + self._word() + text[at:]

    def _replace(self, text: bytes, _: bytes) -> bytes:
        """Put a word in place of a word."""
        parts = _words(text)
        if not parts:
            return self._line()
        begin, end = self.random.choice(parts)
        return text[:begin] + self._word() + text[end:]

    def _cut(self, text: bytes, _: bytes) -> bytes:
        begin, end = self._span(text)
        return text[:begin] if self.random.random() < 0.2 else text[:begin] + text[end:]

    def _repeat(self, text: bytes, _: bytes) -> bytes:
        begin, end = self._span(text)
        return text[:end] + text[begin:end] * self.random.choice((1, 1, 2, 8, 40)) + text[end:]

    def _byte(self, text: bytes, _: bytes) -> bytes:
        if not text:
            return bytes([self.random.randrange(256)])
        at = self.random.randrange(len(text))
        byte = text[at] ^ 1 << self.random.randrange(8)
        if self.random.random() < 0.5:
            byte = self.random.randrange(256)
        return text[:at] + bytes([byte]) + text[at + 1 :]

    def _lines(self, text: bytes, donor: bytes) -> bytes:
        lines = text.splitlines(keepends=True)
        more = donor.splitlines(keepends=True) or [self._line()]
        choice = self.random.random()
        at = self.random.randint(0, len(lines))
        if choice < 0.3:
            lines.insert(at, self.random.choice(more))
        elif choice < 0.5:
            lines.insert(at, self._line())
        elif lines and choice < 0.7:
            del lines[at - 1]
        elif lines:
            lines.insert(at, self.random.choice(lines))
        return b"".join(lines)

    def _splice(self, text: bytes, donor: bytes) -> bytes:
        return text[: self._span(text)[0]] + donor[self._span(donor)[0] :]

    def _grow(self, text: bytes, _: bytes) -> bytes:
        # Rarely: it is slow, and one limit at a time is enough.
        if self.random.random() > 0.02 or not text:
            return self._insert(text, b"")
        return text * (SIZE_MAX // len(text) + 1) if self.random.random() < 0.3 else text * 300


def _words(text: bytes) -> list[tuple[int, int]]:
    """Where words begin and end: what stands between separators."""
    found = []
    begin = 0
    for at, byte in enumerate(text[:4096] + b" "):
        if byte in b" \t\n/=:.,\"'-":
            if at > begin:
                found.append((begin, at))
            begin = at + 1
    return found
