# SPDX-License-Identifier: MIT
"""A package as a value: files, copies and links by their paths, and how it gets onto a disk.

The same tree gives the same bytes and the same digest, whoever writes it and when. It is written
into a temporary directory beside its place and put there by one rename, so that a package is there
whole or not at all, whatever happens on the way.
"""

from __future__ import annotations

import os
import shutil
from hashlib import file_digest, sha256

from ..errors import MicrovmHostError
from ..frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Half of SHA-256: nobody finds a second package of the same digest with that either.
DIGEST_LENGTH = 32


@frozen
class File:
    content: bytes
    mode: int = 0o644

    def describe(self) -> str:
        return f"file {self.mode:04o} {sha256(self.content).hexdigest()}"


@frozen
class Copy:
    """A copy of a file of the host, whose digest was taken before.

    One that not everybody may read there is for the VM's group alone here.
    """

    source: str
    sha256: str
    is_private: bool = False

    @property
    def mode(self) -> int:
        return 0o640 if self.is_private else 0o644

    def describe(self) -> str:
        # Not whence: the same kernel by another name is the same.
        return f"file {self.mode:04o} {self.sha256}"


@frozen
class Link:
    target: str

    def describe(self) -> str:
        return f"link {self.target}"


@frozen
class Tree:
    """Entries by their paths, in order."""

    entries: tuple[tuple[str, File | Copy | Link], ...]

    @classmethod
    def of(cls, entries: dict[str, File | Copy | Link]) -> Tree:
        return cls(tuple(sorted(entries.items())))

    def listing(self) -> str:
        """A line for each entry, with all that makes it different from another."""
        return "".join(f"{path} {entry.describe()}\n" for path, entry in self.entries)

    @property
    def digest(self) -> str:
        return sha256(self.listing().encode()).hexdigest()[:DIGEST_LENGTH]

    def text(self, path: str) -> str:
        """What a file says; raises KeyError."""
        entry = dict(self.entries)[path]
        assert isinstance(entry, File)
        return entry.content.decode()

    def shared(self) -> Iterator[tuple[str, str]]:
        """The copies that everybody may read, by their paths, with their SHA-256."""
        for path, entry in self.entries:
            if isinstance(entry, Copy) and not entry.is_private:
                yield path, entry.sha256

    def copied(self) -> list[str]:
        """The files of the host that it has copies of."""
        return [entry.source for _, entry in self.entries if isinstance(entry, Copy)]

    def write(
        self,
        directory: str,
        *,
        gid: int = -1,
        same: Callable[[Copy], str | None] = lambda copy: None,
    ) -> None:
        """Write the package; the directory must not be there, or be empty.

        Args:
            gid: the group that private files are for; -1 for that of whoever writes.
            same: knows a file on the same file system that has the content of a copy already, to
                which a hard link is made.

        Raises:
            MicrovmHostError: it cannot be written; nothing is there then that was not before.
        """
        parent, name = os.path.split(os.path.abspath(directory))
        temporary = f"{parent}/.{name}.{os.urandom(8).hex()}"
        try:
            try:
                os.mkdir(temporary, 0o755)
                os.chmod(temporary, 0o755)
                for path, entry in self.entries:
                    _write(f"{temporary}/{path}", entry, gid, same)
                for inner in _directories(temporary):
                    _sync(inner)
                os.rename(temporary, directory)
            except OSError as error:
                # rename(2) onto a directory that is not empty says just that.
                raise MicrovmHostError(
                    f"the package cannot be written: {error.strerror or error}", path=directory
                ) from error
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _sync(parent)


def _write(
    path: str, entry: File | Copy | Link, gid: int, same: Callable[[Copy], str | None]
) -> None:
    _make_directories(os.path.dirname(path))
    if isinstance(entry, Link):
        os.symlink(entry.target, path)
        return
    if isinstance(entry, Copy) and not entry.is_private and _linked(same(entry), path):
        return
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(file, "w+b") as target:
        if isinstance(entry, File):
            target.write(entry.content)
        else:
            _copy(entry, path)
            target.seek(0)
            if file_digest(target, "sha256").hexdigest() != entry.sha256:
                raise MicrovmHostError(
                    "was changed while it was copied", path=entry.source, hint="try again"
                )
            if entry.is_private:
                os.fchown(target.fileno(), -1, gid)
        target.flush()
        # Whatever the umask.
        os.fchmod(target.fileno(), entry.mode)
        os.fsync(target.fileno())


def _make_directories(path: str) -> None:
    if not os.path.isdir(path):
        _make_directories(os.path.dirname(path))
        os.mkdir(path)
        os.chmod(path, 0o755)


def _linked(other: str | None, path: str) -> bool:
    if other is None:
        return False
    try:
        os.link(other, path, follow_symlinks=False)
    except OSError:
        # Another file system, one without hard links, or gone meanwhile.
        return False
    return True


def _copy(entry: Copy, path: str) -> None:
    try:
        shutil.copyfile(entry.source, path)
    except shutil.SpecialFileError as error:
        raise MicrovmHostError("is no regular file", path=entry.source) from error


def _directories(path: str) -> Iterator[str]:
    for directory, _, _ in os.walk(path, topdown=False):
        yield directory


def _sync(path: str) -> None:
    """Have a directory's entries on the disk."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
