# SPDX-License-Identifier: MIT
"""What is mounted where, and how to delete a directory without leaving its mount.

A device number does not tell a bind mount of the same file system from the directory around it, so
the kernel's own list and numbers of mounts are used: /proc/self/mountinfo for what is mounted now,
and the `mnt_id` of an open file for what is mounted while we work (proc_pid_mountinfo(5),
proc_pid_fdinfo(5)).
"""

from __future__ import annotations

import os

from .errors import MicrovmHostError
from .paths import OPENED_FACTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A directory that is nested deeper is moved up before it is emptied: each level takes a descriptor.
_DEPTH_MAX = 64
# mountinfo writes these characters of a path in octal.
_ESCAPED = (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\"))


def mount_points(host: HostPaths) -> dict[str, str]:
    """Each mount point with the type of the file system that was mounted on it last."""
    found = {}
    try:
        with open(host.mounts, encoding="utf-8", errors="surrogateescape") as file:
            for line in file:
                fields, _, rest = line.partition(" - ")
                columns = fields.split(" ")
                if len(columns) >= 5:
                    found[_unescaped(columns[4])] = rest.split(" ", 1)[0]
    except FileNotFoundError:
        # A host without /proc, as in tests and images.
        pass
    return found


def _unescaped(path: str) -> str:
    for code, character in _ESCAPED:
        path = path.replace(code, character)
    return path


def below(directory: str, host: HostPaths) -> list[str]:
    """The mount points below a directory, itself excluded, in the order of their paths."""
    inner = os.path.realpath(directory).rstrip("/") + "/"
    return sorted(point for point in mount_points(host) if point.startswith(inner))


def is_mount_point(directory: str, host: HostPaths) -> bool:
    return os.path.realpath(directory) in mount_points(host)


def mount_id(descriptor: int) -> str:
    """The number of the mount that an open file is on."""
    with open(f"{OPENED_FACTS}/{descriptor}", encoding="ascii") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key == "mnt_id":
                return value.strip()
    # Linux has it since 3.15.
    raise MicrovmHostError("the kernel does not tell which mount a file is on")


def remove_tree(path: str) -> None:
    """Delete a directory with all that is in it, following no link and entering no other mount.

    Raises:
        MicrovmHostError: something was mounted in it, or it is a mount point.
        OSError: it cannot be deleted.
    """
    directory = os.open(path, _DIRECTORY)
    try:
        while entries := os.listdir(directory):
            for name in entries:
                _remove(directory, name, f"{path}/{name}", mount_id(directory), directory, 1)
    finally:
        os.close(directory)
    os.rmdir(path)


def _remove(parent: int, name: str, path: str, mount: str, top: int, depth: int) -> None:
    try:
        directory = os.open(name, _DIRECTORY, dir_fd=parent)
    except FileNotFoundError:
        return
    except OSError:
        # Not a directory, which open(2) tells without opening it.
        os.unlink(name, dir_fd=parent)
        return
    try:
        if mount_id(directory) != mount:
            raise MicrovmHostError("is a mount point; not deleting what is mounted", path=path)
        if depth > _DEPTH_MAX:
            # To a name that cannot be taken: the caller comes to it in its next round.
            os.rename(name, os.urandom(16).hex(), src_dir_fd=parent, dst_dir_fd=top)
            return
        for inner in os.listdir(directory):
            _remove(directory, inner, f"{path}/{inner}", mount, top, depth + 1)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=parent)
