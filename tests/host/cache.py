# SPDX-License-Identifier: MIT
"""Where the roots and the running hosts' scratch directories live, and the locks on them.

The place is never inside the checkout: a root is a gigabyte of files owned by many users, which
`git clean`, editors and backup programs should not meet.  It has to be a real file system, since
an overlay cannot stand on another overlay.

Locks are flock() locks, because the kernel drops them with the process that held them, however
it died; a lock that is free therefore proves that its owner is gone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tests.host.progress import step


def directory() -> Path:
    """The cache of this user; MICROVM_HOST_TEST_CACHE overrides it."""
    if chosen := os.environ.get("MICROVM_HOST_TEST_CACHE"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/cache/microvm-host-tests")
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "microvm-host-tests"


def roots() -> Path:
    """One directory for each built root."""
    return directory() / "roots"


def guests() -> Path:
    """Roots of guests, one archive each."""
    return directory() / "guests"


def hosts() -> Path:
    """One directory for each running host."""
    return directory() / "hosts"


def try_lock(path: Path) -> IO[str] | None:
    """Take the lock, or return None if somebody who is alive has it."""
    held = path.open("a", encoding="utf-8")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held.close()
        return None
    return held


@contextmanager
def locked(path: Path, *, waiting: str) -> Iterator[None]:
    """Hold the lock for a while, saying so if that means waiting for another process."""
    path.parent.mkdir(parents=True, exist_ok=True)
    held = try_lock(path)
    if held is None:
        with step(waiting):
            held = path.open("a", encoding="utf-8")
            fcntl.flock(held, fcntl.LOCK_EX)
    with held:
        yield


def claim(work: Path) -> IO[str]:
    """Make a host's directory and take its lock, which is held for as long as the host lives."""
    # Under one lock for all, so that nobody takes a directory that is just being made for one
    # whose owner died.
    with locked(hosts() / "lock", waiting="waiting for another process that clears up"):
        work.mkdir()
        owner = try_lock(work / "owner")
        assert owner is not None, f"{work} was new"
        return owner


def release(work: Path, owner: IO[str]) -> None:
    """Remove a host's directory and let its lock go, in the sight of others both at once."""
    with locked(hosts() / "lock", waiting="waiting for another process that clears up"):
        owner.close()
        shutil.rmtree(work)


def abandoned() -> Iterator[Path]:
    """The directories of hosts whose owner is gone, each locked until the next is asked for."""
    with locked(hosts() / "lock", waiting="waiting for another process that clears up"):
        for work in sorted(hosts().iterdir()):
            if not work.is_dir():
                continue
            owner = try_lock(work / "owner")
            if owner is not None:
                with owner:
                    yield work
