# SPDX-License-Identifier: MIT
"""The state directory of a VM: who owns it, and the links `current` and `booted` in it.

The hypervisor's user makes sockets and images in the directory, but must not be able to change
what root will do. The directory therefore belongs to root, with the VM's group allowed to write
and the sticky bit set: one may add files then, but neither remove nor rename those of others
(inode(7)), least of all the links to the package.
"""

from __future__ import annotations

import os
import stat
from errno import EEXIST, EISDIR, ENODATA, EOPNOTSUPP

from .errors import MicrovmHostError, PackageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

# Others may pass, so that `microvm -l` needs no root, but not look around.
DIRECTORY_MODE = 0o1771
# How often a directory is moved aside of which somebody makes another one each time.
_TRIES = 100


def check_current(name: str, host: HostPaths) -> None:
    """Check that `current` is there and that nobody but root decided where it points.

    Raises:
        PackageError: it is missing or no link.
        MicrovmHostError: it is not root's.
    """
    path = host.current(name)
    try:
        status = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        known = os.path.isdir(host.vm(name))
        raise PackageError(
            f"microVM {name} has no package" if known else f"there is no microVM {name}",
            path=path,
            hint=f"`microvm create {name} --runner PATH` makes one",
        ) from error
    if not stat.S_ISLNK(status.st_mode):
        raise PackageError("is not a link to a runner package", path=path)
    # A second name makes it a link that root made elsewhere, for something else.
    if status.st_uid != 0 or status.st_nlink != 1:
        raise MicrovmHostError(
            "does not belong to root, who is to act on what it points to"
            if status.st_uid != 0
            else "has another name elsewhere (a hard link), so that it is not root's word here",
            path=path,
            hint=f"look where it points, then chown -h root '{path}'"
            if status.st_uid != 0
            else "look where it points, remove it and make it anew",
        )


def is_unused(name: str, host: HostPaths) -> bool:
    """Whether a state directory is there and empty, as a file system made for the VM is."""
    path = host.vm(name)
    try:
        return not os.path.islink(path) and {"lost+found"}.issuperset(os.listdir(path))
    except OSError:
        return False


def prepare(name: str, gid: int, host: HostPaths) -> bool:
    """Give the state directory its owner and mode, making it if it is not there.

    Returns:
        Whether it was another user's or group's, whose files may be in it.

    Raises:
        MicrovmHostError: it is a link or no directory.
    """
    path = host.vm(name)
    is_new = True
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        is_new = False
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise MicrovmHostError("is to be the VM's directory, but is none", path=path) from error
    try:
        status = os.fstat(directory)
        was_anothers = (status.st_uid, status.st_gid) != (0, gid)
        if was_anothers:
            os.fchown(directory, 0, gid)
            _remove_access_control_lists(directory)
        if stat.S_IMODE(status.st_mode) != DIRECTORY_MODE:
            os.fchmod(directory, DIRECTORY_MODE)
    finally:
        os.close(directory)
    return was_anothers and not is_new


def _remove_access_control_lists(directory: int) -> None:
    """Remove what a former owner has allowed to whom they like, also of files made from now on."""
    for kind in ("access", "default"):
        try:
            os.removexattr(directory, f"system.posix_acl_{kind}")
        except OSError as error:
            if error.errno not in (ENODATA, EOPNOTSUPP):
                raise


def link(path: str, target: str) -> str | None:
    """Make `path` a link to `target` at one stroke, whatever link or file it was.

    Returns:
        Where the VM's user's directory is now that lay there, if one did.

    Raises:
        MicrovmHostError: a directory of root's is in the way.
    """
    temporary = _temporary(path)
    os.symlink(target, temporary)
    return _replace(temporary, path)


def write(path: str, text: str) -> str | None:
    """Make `path` a file of root's with this text at one stroke; returns and raises as link."""
    temporary = _temporary(path)
    # Exclusively: the VM's user, who may make files here, must not have root follow a link. And by
    # a mode that lets in nobody else, whatever the directory's access control list says of files.
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(file, "w", encoding="utf-8") as target:
        target.write(text)
        os.fchmod(file, 0o644)
    return _replace(temporary, path)


def _temporary(path: str) -> str:
    """A name beside `path` that the VM's user cannot have taken, since they cannot guess it."""
    directory, name = os.path.split(path)
    return f"{directory}/.{name}.{os.urandom(8).hex()}"


def _replace(temporary: str, path: str) -> str | None:
    moved = None
    try:
        for _ in range(_TRIES):
            try:
                os.replace(temporary, path)
                return moved
            except IsADirectoryError:
                # rename(2) puts no file in the place of a directory. The VM's user can make one,
                # which must not keep root from anything.
                pass
            aside = f"{path}.moved.{os.urandom(4).hex()}"
            try:
                if os.lstat(path).st_uid == 0:
                    raise IsADirectoryError(EISDIR, "a directory of root's is in the way")
                os.rename(path, aside)
                moved = aside
            except FileNotFoundError:
                pass
        raise FileExistsError(EEXIST, "somebody makes a directory there again and again")
    except OSError as error:
        os.unlink(temporary)
        raise MicrovmHostError(f"cannot be replaced: {error.strerror}", path=path) from error


def booted(name: str, host: HostPaths) -> str | None:
    """What `booted` points to; None if it is not there, or not root's: then nothing runs by us."""
    path = host.booted(name)
    try:
        return os.readlink(path) if _is_roots(os.lstat(path)) else None
    except OSError:
        return None


def _is_roots(status: os.stat_result) -> bool:
    return status.st_uid == 0


def pointed_to(path: str) -> str | None:
    """Where a link points; None if it is not there."""
    try:
        return os.readlink(path)
    except OSError:
        return None
