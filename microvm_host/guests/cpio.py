# SPDX-License-Identifier: MIT
"""Writes the "newc" archives that the kernel unpacks as its first root (kernel.org,
driver-api/early-userspace/buffer-format).

Owners, modes and device nodes are entries in it and never files of the host, so that this needs no
privileges. The same entries give the same bytes.
"""

from __future__ import annotations

import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

# The kernel aligns each header and each file to this.
_ALIGNED = 4


class Archive:
    """An archive in the making; paths have no leading slash."""

    def __init__(self, target: IO[bytes]) -> None:
        self._target = target
        self._count = 0
        self._directories: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory, after those above it; one that is there already stays as it is."""
        if not path or path in self._directories:
            return
        self.directory(path.rpartition("/")[0])
        self._directories.add(path)
        self._entry(path, stat.S_IFDIR | mode)

    def file(self, path: str, content: bytes, mode: int = 0o644) -> None:
        self.directory(path.rpartition("/")[0])
        self._entry(path, stat.S_IFREG | mode, content)

    def link(self, path: str, target: str) -> None:
        self.directory(path.rpartition("/")[0])
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def node(self, path: str, major: int, minor: int) -> None:
        """Add the node of a character device."""
        self.directory(path.rpartition("/")[0])
        self._entry(path, stat.S_IFCHR | 0o600, device=(major, minor))

    def end(self) -> None:
        self._entry("TRAILER!!!", 0)

    def _entry(
        self, path: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._count += 1
        name = path.encode() + b"\0"
        # Inode, mode, uid, gid, links, time; size; the device it is on; its own; name; checksum.
        numbers = (self._count, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name), 0)
        header = b"070701" + b"".join(b"%08X" % number for number in numbers)
        for part in (header + name, content):
            self._target.write(part + bytes(-len(part) % _ALIGNED))
