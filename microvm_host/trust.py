# SPDX-License-Identifier: MIT
"""Whether the user of a VM could change what root is about to act on.

Root reads packages and exports directories by their paths. A path is only as good as each
directory on its way: whoever may write to one of them can put another file, or a link, in the
place of what was looked at, and needs no luck where time passes in between. The question here is
therefore not who owns a file now, but whether one given user could replace it. All code that reads,
serves, runs or deletes as root on behalf of a VM asks this module.

The user counts with every group that a process of theirs may have: by the group database
(initgroups(3)), by their passwd entry, and by Group= and SupplementaryGroups= of the VM's unit. A
process may also have fewer groups than that, so a right that a group is denied and others have is
a right. Access control lists (acl(5)) count as well; those of NFS (nfs4_acl(5)) do not, beyond the
permission bits that the server makes of them.
"""

from __future__ import annotations

import os
import stat
from errno import ENODATA, EOPNOTSUPP

from .errors import MicrovmHostError
from .frozen import frozen
from .paths import MOUNTS, VIRTIOFSD_RUN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .identity import Identity

# What root reads of a package, and what it runs. All else is read by the VM's user alone.
ROOTS_PART = ("share/microvm", VIRTIOFSD_RUN)
# As the kernel's own: path_resolution(7).
LINKS_MAX = 40

# The list as the kernel has it (linux/posix_acl_xattr.h): a version, then entries of a tag, the
# permissions, and the number of the user or group that the entry names.
_ACL = "system.posix_acl_access"
_ACL_VERSION = 2
_ACL_USER, _ACL_GROUP_OBJ, _ACL_GROUP = 0x02, 0x04, 0x08


@frozen
class Suspect:
    """Somebody who might want root to act for them: a user and all of their groups."""

    uid: int
    gids: frozenset[int]

    def can_write(self, path: str, status: os.stat_result) -> bool:
        """Whether they may write to a file or a directory, or allow it to themselves.

        Raises:
            OSError: its access control list cannot be read.
        """
        return self._may(path, status, stat.S_IWOTH)

    def can_enter(self, path: str, status: os.stat_result) -> bool:
        """Whether they may get at what is in a directory, or allow it to themselves."""
        return self._may(path, status, stat.S_IXOTH)

    def can_exchange(self, path: str, directory: os.stat_result, entry: os.stat_result) -> bool:
        """Whether they may put something else in the place of an entry of a directory."""
        if not self.can_write(path, directory):
            return False
        # inode(7): in a sticky directory one moves only what is one's own.
        is_protected = directory.st_mode & stat.S_ISVTX and directory.st_uid != self.uid
        return not is_protected or entry.st_uid == self.uid

    def _may(self, path: str, status: os.stat_result, right: int) -> bool:
        if self.uid == 0 or status.st_uid == self.uid or status.st_mode & right:
            return True
        # With an access control list, the group's bits are its mask: a right that is not among
        # them has nobody whom the list names. So most paths cost no further look.
        if not status.st_mode & right << 3:
            return False
        entries = _access_control_list(path)
        if not entries:
            return status.st_gid in self.gids
        for tag, rights, number in entries:
            if rights & right and (
                (tag == _ACL_USER and number == self.uid)
                or (tag == _ACL_GROUP and number in self.gids)
                or (tag == _ACL_GROUP_OBJ and status.st_gid in self.gids)
            ):
                return True
        return False


def _access_control_list(path: str) -> list[tuple[int, int, int]]:
    """Tag, permissions and number of each entry; nothing where there is no list."""
    try:
        value = os.getxattr(path, _ACL)
    except OSError as error:
        if error.errno in (ENODATA, EOPNOTSUPP):
            return []
        raise
    words = [int.from_bytes(value[at : at + 2], "little") for at in range(0, len(value), 2)]
    if words[:2] != [_ACL_VERSION, 0] or len(words) % 4 != 2:
        raise OSError(0, "its access control list cannot be understood")
    return [
        (words[at], words[at + 1], words[at + 2] | words[at + 3] << 16)
        for at in range(2, len(words), 4)
    ]


def suspect(identity: Identity) -> Suspect:
    """The hypervisor of a VM, taken for hostile."""
    try:
        groups = os.getgrouplist(identity.user, identity.gid)
    except OSError:
        groups = []
    return Suspect(identity.uid, frozenset({identity.gid, *identity.groups, *groups}))


def refuse_exchangeable(path: str, identity: Identity, doing: str) -> None:
    """Check that the user of a VM can put nothing else in the place of a file of the host's.

    Args:
        path: an absolute one.
        doing: what root is about to do with it, for the error: `read`.

    Raises:
        MicrovmHostError: they can.
        OSError: there is no such path.
    """
    found = exchangeable(path, suspect(identity))
    if found:
        raise MicrovmHostError(
            f"user {identity.user!r}, which runs this VM, can replace this; refusing to {doing} "
            f"{'it' if found == path else path} as root",
            path=found,
            hint="move it to a directory that only root can write",
        )


def exchangeable(path: str, by: Suspect) -> str | None:
    """What on the way to an absolute path, links followed, they could exchange; None if nothing.

    Raises:
        OSError: there is no such path.
    """
    if by.uid in (0, os.geteuid()):
        # Who needs no help of ours.
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
        if by.can_exchange(at, directory, status) or _is_mounted(status, directory, by):
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


def _is_mounted(entry: os.stat_result, directory: os.stat_result, by: Suspect) -> bool:
    """Whether a file system begins here that they serve themselves: it says what they like (FUSE).

    Their own directory, which they can only mount on, may lie in one of root's.
    """
    if entry.st_dev == directory.st_dev or os.major(entry.st_dev) != 0:
        # FUSE has no device: proc_pid_mountinfo(5).
        return False
    device = f"{os.major(entry.st_dev)}:{os.minor(entry.st_dev)}"
    with open(MOUNTS, encoding="utf-8", errors="replace") as mounts:
        for line in mounts:
            mount, _, rest = line.partition(" - ")
            if mount.split()[2] == device and rest.startswith("fuse"):
                return f"user_id={by.uid}" in rest.split()[-1].split(",")
    return False


def changeable(path: str, by: Suspect) -> str | None:
    """What of a file, or of all that is in a directory, they could change or exchange.

    Links in it are followed to what they mean; one that leads nowhere means nothing.

    Raises:
        OSError: there is no such path.
    """
    if by.uid in (0, os.geteuid()):
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
                f"user {identity.user!r}, which runs this VM, can change this; refusing to act on "
                "it as root",
                path=found,
                hint="keep the package, and what it links to, where only root can write",
            )


def _writable_directory(package: str, part: str, by: Suspect) -> str | None:
    """The directory on the way to a missing part of a package in which they could make it."""
    directory = package
    for name in part.split("/"):
        try:
            if by.can_write(directory, os.stat(directory)):
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
    if by.can_write(path, status):
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
