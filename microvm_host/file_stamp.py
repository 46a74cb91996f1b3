# SPDX-License-Identifier: MIT
"""Stamps of files, by which a file that has changed is told from one that has not.

A stamp is what make and git look at: device, inode, size, mtime and ctime. A file that is replaced
by a rename has another inode; one that is written in place has another ctime, which nobody can set.
Two cases take care. A write within the same tick of the file system's clock leaves the stamp as it
was, so a file that is younger than that is not settled, and nothing is remembered of it. And files
of a read-only file system may be others after a boot with the same numbers (an image with fixed
times), so that the boot is part of their stamps.
"""

from __future__ import annotations

import fcntl
import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .paths import HostPaths

ABSENT = "absent"
# Ticks of file systems are those of the kernel, 10 ms at most; FAT, where EFI has kernels, has one
# of two seconds.
_SETTLED_AFTER = 100_000_000  # nanoseconds
_SETTLED_AFTER_ON_FAT = 2_100_000_000
_SECOND = 1_000_000_000
# A kernel on a disk that sleeps.
_PATIENCE = 30.0  # seconds
_FACT_MAX = 4096


class Inputs:
    """The files that something is made of, each with the stamp that it had before it was read.

    With a directory for it, facts that are costly to find out are kept there, for other processes
    too. Only root writes there.
    """

    def __init__(self, host: HostPaths, *, remembers: bool = True) -> None:
        self._facts = host.file_facts if remembers else ""
        self._boot = host.boot_id
        self.stamps: dict[str, str] = {}
        # Whether the stamps will tell of each change from now on.
        self.is_settled = True

    def see(self, path: str, file: int | None = None) -> None:
        """Take the stamp of a file, before it is read.

        Args:
            file: the same file, opened: what is read is what the stamp is of.
        """
        try:
            status = os.stat(path) if file is None else os.fstat(file)
        except OSError as error:
            stamp = _missing(error)
        else:
            stamp = self._of(path, status)
            self.is_settled &= _is_settled(status)
        if self.stamps.setdefault(path, stamp) != stamp:
            self.is_settled = False

    def stamp(self, path: str) -> str:
        """The stamp that a file has now."""
        try:
            return self._of(path, os.stat(path))
        except OSError as error:
            return _missing(error)

    def are_as_seen(self) -> bool:
        """Whether each file still is what was seen."""
        return all(self.stamp(path) == stamp for path, stamp in self.stamps.items())

    def fact(self, kind: str, path: str, file: int, find_out: Callable[[], str]) -> str:
        """What `find_out` says of an open file, without asking again while the file is the same.

        Of several processes that want the same, one finds out.
        """
        status = os.fstat(file)
        if not self._facts or not _is_settled(status):
            return find_out()
        stamp = self._of(path, status)
        place = f"{self._facts}/{kind}-{status.st_dev:x}-{status.st_ino:x}"
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            os.makedirs(self._facts, mode=0o700, exist_ok=True)
            memory = os.open(place, flags, 0o600)
        except OSError:
            # Not root, or there is no room: then it is found out each time.
            return find_out()
        try:
            _wait_for(memory)
            known, _, value = os.pread(memory, _FACT_MAX, 0).decode(errors="replace").partition(" ")
            # Only a whole line ends in one.
            if known == stamp and value.endswith("\n"):
                return value[:-1]
            value = find_out()
            if self._of(path, os.fstat(file)) == stamp:
                line = f"{stamp} {value}\n".encode()
                os.ftruncate(memory, 0)
                os.pwrite(memory, line, 0)
            return value
        finally:
            os.close(memory)

    def _of(self, path: str, status: os.stat_result) -> str:
        numbers = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        stamp = "-".join(f"{number:x}" for number in (*numbers, status.st_ctime_ns))
        if _is_read_only(path):
            with open(self._boot, encoding="ascii") as file:
                stamp += f"@{file.read().strip()}"
        return stamp


def _missing(error: OSError) -> str:
    is_absent = isinstance(error, FileNotFoundError | NotADirectoryError)
    return ABSENT if is_absent else f"error-{error.errno}"


def _is_settled(status: os.stat_result) -> bool:
    latest = max(status.st_mtime_ns, status.st_ctime_ns)
    whole_seconds = status.st_ctime_ns % _SECOND == 0
    return latest < time.time_ns() - (_SETTLED_AFTER_ON_FAT if whole_seconds else _SETTLED_AFTER)


def _is_read_only(path: str) -> bool:
    try:
        return bool(os.statvfs(path).f_flag & os.ST_RDONLY)
    except OSError:
        return False


def _wait_for(file: int) -> None:
    """Wait for whoever finds out the same, but not for ever: it is no harm to do it twice."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.01)
