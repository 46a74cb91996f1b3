# SPDX-License-Identifier: MIT
"""Where root makes and removes files below a state directory, in which the VM's user makes others.

A path means something else from one moment to the next: the VM's user may take the name of a
directory that is not there yet, or no longer, for a link to another one, and root would go through
that with all of its rights. So root goes by no path. It opens each directory on the way by its name
in the one before, follows no link, and goes on only in one that is root's alone. Nobody else moves
such a one: not away, since the state directory is sticky (inode(7)), nor there from elsewhere,
which takes the right to write to it (rename(2)). What is done then is done by name in what is open.
"""

from __future__ import annotations

import errno
import os
import stat

from .errors import MicrovmHostError
from .paths import OPENED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Self

    from .identity import Identity

# Whose directories, files and sockets are root's; tests stand in for root.
ROOT = 0

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def is_roots_directory(status: os.stat_result) -> bool:
    """Whether a directory is root's, and nobody else can put something else into it."""
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(status.st_mode) and status.st_uid == ROOT and not status.st_mode & others


def is_roots_socket(status: os.stat_result) -> bool:
    """Whether this is a socket of root's that was made here.

    With a second name it may be one that was made elsewhere, for somebody else (a hard link).
    """
    return stat.S_ISSOCK(status.st_mode) and status.st_uid == ROOT and status.st_nlink == 1


class Place:
    """The place of one file; what is opened on the way to it is closed at the end of `with`."""

    def __init__(self, path: str, state_directory: str) -> None:
        """
        Args:
            path: the file's, below the state directory and in its shortest form.

        Raises:
            ValueError: it is not, which the callers' checks exclude.
        """
        inner = path.removeprefix(f"{state_directory}/")
        if inner == path or not {"", ".", ".."}.isdisjoint(inner.split("/")):
            raise ValueError(f"{path!r} is no plain path below {state_directory!r}")
        self._path = path
        self._state_directory = state_directory
        *self._parts, self._name = inner.split("/")
        # The state directory, and those of `_parts` after it, as far as we are.
        self._opened: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        while self._opened:
            os.close(self._opened.pop())

    def make_directories(self) -> None:
        """Make the directories between the state directory and the file, root's alone.

        Raises:
            MicrovmHostError: somebody was quicker.
        """
        if not self._go(make=True):
            # All of them and the state directory, as long as they are open.
            parts = [self._state_directory, *self._parts][: len(self._opened) + 1]
            raise MicrovmHostError(
                "a socket is to lie in here, but it is not a directory of root's alone",
                path="/".join(parts),
                hint="remove it; it is made anew at start",
            )

    def reserve(self) -> None:
        """Make a file of root's where root's programs would write through whatever link is there.

        Raises:
            MicrovmHostError: a directory is there, or somebody else is quicker, time and again.
        """
        self.make_directories()
        directory = self._opened[-1]
        for _ in range(100):
            try:
                status = os.stat(self._name, dir_fd=directory, follow_symlinks=False)
                if stat.S_ISREG(status.st_mode) and status.st_uid == ROOT and status.st_nlink == 1:
                    return
                if stat.S_ISDIR(status.st_mode) and status.st_uid != ROOT:
                    # The VM's user keeps root from nothing by one.
                    aside = f"{self._name}.moved.{os.urandom(4).hex()}"
                    os.rename(self._name, aside, src_dir_fd=directory, dst_dir_fd=directory)
                else:
                    os.unlink(self._name, dir_fd=directory)
            except FileNotFoundError:
                pass
            except OSError as error:
                raise MicrovmHostError(
                    f"is in the way of what root is to write there: {error.strerror}",
                    path=self._path,
                ) from error
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
                os.close(os.open(self._name, flags, 0o600, dir_fd=directory))
                return
            except FileExistsError:
                continue
        raise MicrovmHostError(
            "is made anew by somebody as often as it is removed", path=self._path
        )

    def give(self, identity: Identity) -> None:
        """Give a socket of root's to the VM's user alone, whoever may use it by now.

        Raises:
            MicrovmHostError: no such socket is there.
        """
        self.make_directories()
        try:
            # What is looked at is what is given, whatever has this name by then.
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            socket = os.open(self._name, flags, dir_fd=self._opened[-1])
        except FileNotFoundError as error:
            raise self._no_socket() from error
        try:
            if not is_roots_socket(os.fstat(socket)):
                raise self._no_socket()
            itself = f"{OPENED}/{socket}"
            # In this order: once it is the user's, changing the mode takes one more capability.
            os.chmod(itself, 0o600)
            os.chown(itself, identity.uid, identity.gid)
        finally:
            os.close(socket)

    def is_listened_at(self) -> bool:
        """Whether a socket of root's is there that a program has open; it notices nothing.

        A datagram socket cannot connect to a stream socket. The kernel refuses by EPROTOTYPE where
        a program has that open, and by ECONNREFUSED where none has it any more.
        """
        from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM, socket

        if not self._go():
            return False
        try:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            found = os.open(self._name, flags, dir_fd=self._opened[-1])
        except FileNotFoundError:
            return False
        probe = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
        try:
            if not is_roots_socket(os.fstat(found)):
                return False
            probe.connect(f"{OPENED}/{found}")
        except OSError as error:
            return error.errno == errno.EPROTOTYPE
        finally:
            probe.close()
            os.close(found)
        # It took the probe, so that it is no stream socket.
        return False

    def remove_socket(self) -> None:
        """Remove a socket, if it is one: never another file, whoever put it there."""
        self._remove(lambda status: stat.S_ISSOCK(status.st_mode))

    def remove_file(self) -> None:
        """Remove a file that was made for root's programs, if it is one: never another's."""
        self._remove(lambda status: stat.S_ISREG(status.st_mode) and status.st_uid == ROOT)

    def remove_directories(self) -> None:
        """Remove the directories between the state directory and the file, if they are empty."""
        self._go()
        for part in reversed(self._parts[: max(0, len(self._opened) - 1)]):
            os.close(self._opened.pop())
            try:
                os.rmdir(part, dir_fd=self._opened[-1])
            except OSError:
                # Something else is in it, so that it is in use.
                return

    def _no_socket(self) -> MicrovmHostError:
        return MicrovmHostError("is to be a socket of root's, but is none", path=self._path)

    def _remove(self, is_it: Callable[[os.stat_result], bool]) -> None:
        # In what is not root's lies nothing that was put there for this VM.
        if not self._go():
            return
        directory = self._opened[-1]
        try:
            if is_it(os.stat(self._name, dir_fd=directory, follow_symlinks=False)):
                os.unlink(self._name, dir_fd=directory)
        except FileNotFoundError:
            pass

    def _go(self, *, make: bool = False) -> bool:
        """Open what is on the way, and make it if told so; whether all of it is root's alone."""
        try:
            if not self._opened:
                self._opened.append(os.open(self._state_directory, _DIRECTORY))
            for part in self._parts[len(self._opened) - 1 :]:
                if make:
                    try:
                        os.mkdir(part, 0o755, dir_fd=self._opened[-1])
                    except FileExistsError:
                        pass
                directory = os.open(part, _DIRECTORY, dir_fd=self._opened[-1])
                if not is_roots_directory(os.fstat(directory)):
                    os.close(directory)
                    return False
                self._opened.append(directory)
        except (FileNotFoundError, NotADirectoryError):
            # A link is no directory either, where none is followed.
            return False
        return True
