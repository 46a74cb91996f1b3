# SPDX-License-Identifier: MIT
"""Hands the files of a VM's state directory from a former user to the one whom it runs as now.

As root, in a directory where the former user could do what they liked, and perhaps still can:
their links may lead anywhere, their hard links be names of files elsewhere, and all of it may
change under our eyes. So nothing is done by path. Each entry is opened without following links,
from the descriptor of its directory, looked at, and given away through that same descriptor; and
what is given away must have belonged to the former user, and have no second name. The worst they
can bring about is that files of their own change hands.

Never a part of a start: an administrator asks for it, of a VM that is down.
"""

from __future__ import annotations

import os
import shlex
import stat

from . import mounts, state
from .errors import MicrovmHostError
from .frozen import frozen
from .paths import OPENED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .identity import Identity
    from .paths import HostPaths

# Deeper than anybody nests the files of a VM, and each takes a descriptor.
DEPTH_MAX = 64


@frozen
class Adoption:
    """What changed hands, and what did not and why, by paths relative to the state directory."""

    given: tuple[str, ...]
    left: tuple[str, ...]


def check(name: str, host: HostPaths) -> None:
    """Refuse while something is mounted in a VM's state directory; it may be a mount itself.

    Raises:
        MicrovmHostError: it names the mount.
    """
    found = mounts.below(host.vm(name), host)
    if found:
        raise MicrovmHostError(
            "is a mount point; not changing the owner of what is mounted",
            path=found[0],
            hint=f"unmount it first: umount {shlex.quote(found[0])}",
        )


def adopt(name: str, former: int, identity: Identity, host: HostPaths) -> Adoption:
    """Give the files of `former` in a VM's state directory to the VM's user, for them alone.

    Args:
        former: the uid of the former user; files of others are left as they are.
        identity: whom the VM runs as.

    Raises:
        MicrovmHostError: there is no such directory, or something is mounted in it.
    """
    check(name, host)
    # First of all, so that from here on nobody moves what is not theirs.
    state.prepare(name, identity.gid, host)
    walk = _Walk(former, identity)
    directory = os.open(host.vm(name), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        walk.mount = mounts.mount_id(directory)
        walk.enter(directory, "", 0)
    finally:
        os.close(directory)
    return Adoption(tuple(walk.given), tuple(walk.left))


class _Walk:
    def __init__(self, former: int, identity: Identity) -> None:
        if former == 0:
            raise MicrovmHostError(
                "what is root's is not given away",
                hint="it may be what root acts on; use chown, file by file",
            )
        self.former = former
        self.identity = identity
        self.mount = ""
        self.given: list[str] = []
        self.left: list[str] = []

    def enter(self, directory: int, where: str, depth: int) -> None:
        for name in sorted(os.listdir(directory)):
            path = f"{where}{name}"
            try:
                entry = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            except FileNotFoundError:
                continue
            try:
                status = os.fstat(entry)
                reason = self._reason_to_leave(entry, status, depth)
                if reason:
                    self._leave(path, reason)
                elif status.st_uid == self.former:
                    self._give(entry, status)
                    self.given.append(path)
                if stat.S_ISDIR(status.st_mode) and not reason:
                    self._descend(entry, path, depth)
            except OSError as error:
                self._leave(path, error.strerror or "failed")
            finally:
                os.close(entry)

    def _leave(self, path: str, reason: str) -> None:
        # The former user's own words, which must not command a terminal.
        self.left.append(f"{path if path.isprintable() else repr(path)}: {reason}")

    def _descend(self, entry: int, path: str, depth: int) -> None:
        # `.` of what was looked at, not its name, which may mean another directory by now.
        inner = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=entry)
        try:
            self.enter(inner, f"{path}/", depth + 1)
        finally:
            os.close(inner)

    def _reason_to_leave(self, entry: int, status: os.stat_result, depth: int) -> str:
        """Why something is left as it is; nothing if it may be given, or is the new user's."""
        kind = stat.S_IFMT(status.st_mode)
        if kind in (stat.S_IFBLK, stat.S_IFCHR):
            return "is a device"
        if mounts.mount_id(entry) != self.mount:
            return "lies on another mount"
        if status.st_uid in (0, self.identity.uid):
            # Ours and theirs already. Directories of both are looked into.
            return ""
        if status.st_uid != self.former:
            return f"belongs to another user, {status.st_uid}"
        if kind != stat.S_IFDIR and status.st_nlink != 1:
            return "has another name elsewhere (a hard link), which may be anybody's file"
        if kind == stat.S_IFDIR and depth >= DEPTH_MAX:
            return f"is nested more than {DEPTH_MAX} deep"
        return ""

    def _give(self, entry: int, status: os.stat_result) -> None:
        # It is given first: after that the former user can change nothing of it, its mode
        # included.
        itself = f"{OPENED}/{entry}"
        os.chown(itself, self.identity.uid, self.identity.gid)
        if not stat.S_ISLNK(status.st_mode):
            # For the new user alone, and nothing in it of setuid.
            os.chmod(itself, stat.S_IMODE(status.st_mode) & 0o700)
