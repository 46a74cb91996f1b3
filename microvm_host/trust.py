# SPDX-License-Identifier: MIT
"""Whether the user of a VM could change what root is about to act on.

Root reads packages and exports directories by their paths. A path is only as good as each
directory on its way: whoever may write to one of them may put another file, or a link, in the
place of what was looked at, and needs no luck where time passes in between. What is asked here is
therefore not who owns a file now, but whether one given user could exchange it.

Permission bits are looked at, not access control lists, whose mask the group's bits show (acl(5)).
"""

from __future__ import annotations

import os
import stat

from .errors import MicrovmHostError
from .frozen import frozen
from .paths import VIRTIOFSD_RUN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .identity import Identity

# What root reads of a package, and what it runs. All else is read by the VM's user alone.
ROOTS_PART = ("share/microvm", VIRTIOFSD_RUN)
# As the kernel's own: path_resolution(7).
LINKS_MAX = 40


@frozen
class Suspect:
    """Somebody who might want root to act for them: a user and all of their groups."""

    uid: int
    gids: frozenset[int]

    def can_write(self, status: os.stat_result) -> bool:
        """Whether they may write to a file or a directory, or allow it to themselves."""
        if self.uid == 0 or status.st_uid == self.uid:
            return True
        if status.st_gid in self.gids:
            return bool(status.st_mode & stat.S_IWGRP)
        return bool(status.st_mode & stat.S_IWOTH)

    def can_enter(self, status: os.stat_result) -> bool:
        """Whether they may get at what is in a directory, or allow it to themselves."""
        if self.uid == 0 or status.st_uid == self.uid:
            return True
        if status.st_gid in self.gids:
            return bool(status.st_mode & stat.S_IXGRP)
        return bool(status.st_mode & stat.S_IXOTH)

    def can_exchange(self, directory: os.stat_result, entry: os.stat_result) -> bool:
        """Whether they may put something else in the place of an entry of a directory."""
        if not self.can_write(directory):
            return False
        # inode(7): in a sticky directory one moves only what is one's own.
        is_protected = directory.st_mode & stat.S_ISVTX and directory.st_uid != self.uid
        return not is_protected or entry.st_uid == self.uid


def suspect(identity: Identity) -> Suspect:
    """The hypervisor of a VM, taken for hostile."""
    try:
        groups = os.getgrouplist(identity.user, identity.gid)
    except OSError:
        groups = []
    return Suspect(identity.uid, frozenset({identity.gid, *groups}))


def exchangeable(path: str, by: Suspect) -> str | None:
    """What on the way to an absolute path, links followed, they could exchange; None if nothing.

    Raises:
        OSError: there is no such path.
    """
    if by.uid == 0:
        # Who needs no help of root's.
        return None
    at, directory = "/", os.lstat("/")
    todo = path.split("/")[::-1]
    links = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            # Where `at` came through was looked at on the way down.
            at = os.path.dirname(at)
            directory = os.lstat(at)
            continue
        entry = f"{at.rstrip('/')}/{part}"
        status = os.lstat(entry)
        if by.can_exchange(directory, status):
            return entry
        if stat.S_ISLNK(status.st_mode):
            links += 1
            if links > LINKS_MAX:
                return entry
            target = os.readlink(entry)
            todo += target.split("/")[::-1]
            if target.startswith("/"):
                at, directory = "/", os.lstat("/")
        else:
            at, directory = entry, status
    return None


def changeable(path: str, by: Suspect) -> str | None:
    """What of a file, or of all that is in a directory, they could change or exchange.

    Links in it are followed to what they mean; one that leads nowhere means nothing.

    Raises:
        OSError: there is no such path.
    """
    if by.uid == 0:
        return None
    return exchangeable(path, by) or _changeable(path, by)


def check_package(package: str, identity: Identity) -> None:
    """Check that the user of a VM decides nothing of what its package has root do.

    Args:
        package: the directory of the runner package, without links in it.

    Raises:
        MicrovmHostError: they could change it.
    """
    by = suspect(identity)
    for part in ROOTS_PART:
        try:
            found = changeable(f"{package}/{part}", by)
        except FileNotFoundError:
            # Nor may they be able to add it.
            found = exchangeable(package, by) or _writable_directory(package, part, by)
        if found:
            raise MicrovmHostError(
                f"could be changed by {identity.user}, whom the VM runs as, and says what root "
                "does for it",
                path=found,
                hint="keep the package, and what it links to, where root alone may write",
            )


def _writable_directory(package: str, part: str, by: Suspect) -> str | None:
    """The directory on the way to a missing part of a package in which they could make it."""
    directory = package
    for name in part.split("/"):
        try:
            if by.can_write(os.stat(directory)):
                return directory
        except OSError:
            return None
        directory += f"/{name}"
    return None


def _changeable(path: str, by: Suspect) -> str | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    if by.can_write(status):
        return path
    if not stat.S_ISDIR(status.st_mode):
        return None
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink():
                try:
                    found = exchangeable(entry.path, by)
                except OSError:
                    continue
                # A directory that is linked, as `system` is, is the package's to name, not ours
                # to read.
                if not found and not entry.is_dir():
                    found = _changeable(entry.path, by)
            else:
                found = _changeable(entry.path, by)
            if found:
                return found
    return None
