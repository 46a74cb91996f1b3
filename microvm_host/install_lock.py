# SPDX-License-Identifier: MIT
"""Locks of those who install packages: one for each VM, and one for the store.

Whoever installs, rolls back or removes a VM holds that VM's lock all the while, so that a build
that hangs delays nobody but its own VM. The store's lock is held for moments only. The order is
always the same: first the VM's, then the store's.

The kernel gives a lock back however its holder ends. The file says who holds it, and names the
package that the store must keep for the holder until the VM's links name it.
"""

from __future__ import annotations

import fcntl
import os
import time

from . import log
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Self

    from .paths import HostPaths

# Longer than anything but the build of a flake takes. Whoever waits for one of these may try again.
PATIENCE = 120.0  # seconds
_QUIET = 1.0  # seconds
_STEP = 0.02  # seconds
# A line of each: process, what it does, package.
_SIZE = 8192


class Lock:
    """One lock, held in a `with` block.

    Files of locks are root's alone: anybody could hold a lock on a file that they can open.
    """

    def __init__(self, path: str, doing: str) -> None:
        """
        Args:
            doing: what for, said to whoever waits: `installs web`.
        """
        self._path = path
        self._doing = doing
        self._file = -1

    def __enter__(self) -> Self:
        os.makedirs(os.path.dirname(self._path), mode=0o700, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._file = os.open(self._path, flags, 0o600)
        try:
            self._wait()
            self._write("")
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    def keep(self, package: str) -> None:
        """Have the store keep a package for as long as the lock is held."""
        self._write(package)

    def _write(self, package: str) -> None:
        os.pwrite(self._file, f"{os.getpid()}\n{self._doing}\n{package}\n".encode(), 0)
        os.ftruncate(self._file, len(f"{os.getpid()}\n{self._doing}\n{package}\n".encode()))

    def _wait(self) -> None:
        holder, began = "", time.monotonic()
        is_told = False
        while not _take(self._file):
            if (now := _holder(self._file)) != holder:
                # At boot a thousand may come one after the other: that is progress.
                holder, began = now, time.monotonic()
            waited = time.monotonic() - began
            if waited > PATIENCE:
                raise MicrovmHostError(
                    f"gave up after {PATIENCE:g} s: {holder} at the same time",
                    path=self._path,
                    hint="try again when that process has ended, or end it",
                )
            if waited > _QUIET and not is_told:
                is_told = True
                text = f"waiting: {holder} at the same time"
                log.status(text)
                log.notice(text)
            time.sleep(_STEP)


def of_vm(name: str, host: HostPaths, doing: str) -> Lock:
    """The lock of one VM."""
    return Lock(f"{host.install_locks}/{name}", doing)


def kept(host: HostPaths) -> set[str]:
    """The packages that holders of VMs' locks have the store keep."""
    found: set[str] = set()
    try:
        names = os.listdir(host.install_locks)
    except FileNotFoundError:
        return found
    for name in names:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        file = os.open(f"{host.install_locks}/{name}", flags)
        try:
            # What is written in the file of a lock that nobody holds is of one who was killed.
            if not _take(file):
                found.add(_lines(file)[2])
        finally:
            os.close(file)
    return found - {""}


def _take(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(file: int) -> str:
    process, doing, _ = _lines(file)
    return f"process {process or 'unknown'} {doing or 'is at work'}"


def _lines(file: int) -> tuple[str, str, str]:
    lines = os.pread(file, _SIZE, 0).decode(errors="replace").split("\n")
    process, doing, package = (*lines, "", "", "")[:3]
    return process, doing, package
