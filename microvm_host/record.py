# SPDX-License-Identifier: MIT
"""Records of what was set up for a running VM, from which it is undone.

A record is a file of lines below /run/microvm-host/NAME/, one step a line: a verb and its fields,
apart by tabs. A line is written before the step takes hold, so that a helper that is killed
leaves nothing unrecorded; undoing therefore bears with steps that never happened. The file
belongs to root, as does its directory: what it says is believed.
"""

from __future__ import annotations

import os
import stat

from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Record:
    """One record, by its path."""

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def vm(self) -> str:
        """The VM that it is about."""
        return os.path.basename(os.path.dirname(self.path))

    def append(self, *fields: str) -> None:
        """Write a line down, the directory too if need be.

        Raises:
            MicrovmHostError: it cannot be written, so the step must not be taken.
            ValueError: a field holds a tab or a line break, which the callers' checks exclude.
        """
        self._check_place()
        line = "\t".join(fields)
        if "\n" in line or line.count("\t") != len(fields) - 1:
            raise ValueError(f"a record's fields cannot hold {fields!r}")
        try:
            os.makedirs(os.path.dirname(self.path), mode=0o755, exist_ok=True)
            flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(self.path, flags, 0o644)
            try:
                whole = f"{line}\n".encode()
                size = os.fstat(target).st_size
                if size and os.pread(target, 1, size - 1) != b"\n":
                    # A line that was cut off is not to be believed once it ends, nor ours joined
                    # to it.
                    os.ftruncate(target, self._end_of_last_line(target, size))
                if os.write(target, whole) != len(whole):
                    raise MicrovmHostError("the record could not be written whole", path=self.path)
            finally:
                os.close(target)
        except OSError as error:
            raise MicrovmHostError(
                f"the record cannot be written: {error.strerror}", path=self.path
            ) from error

    @staticmethod
    def _end_of_last_line(file: int, size: int) -> int:
        return os.pread(file, size, 0).rfind(b"\n") + 1

    def read(self) -> list[list[str]]:
        """The lines, oldest first, as lists of fields; none if there is no record.

        Raises:
            MicrovmHostError: it cannot be read, or is no text.
        """
        self._check_place()
        try:
            # Not waiting, which opening a FIFO would, and following no link: we make neither.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self.path, flags)
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                # Before a file is made of it, which it would not be of a directory.
                os.close(descriptor)
                raise MicrovmHostError("the record is no regular file", path=self.path)
            with open(descriptor, encoding="utf-8", newline="\n") as source:
                # A line without its end was being written when its writer was killed: the step
                # that it announces was not taken.
                return [line[:-1].split("\t") for line in source if line.endswith("\n")]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except UnicodeDecodeError as error:
            raise MicrovmHostError("the record is not UTF-8 text", path=self.path) from error
        except OSError as error:
            raise MicrovmHostError(
                f"the record cannot be read: {error.strerror}", path=self.path
            ) from error

    def keep(self, lines: list[list[str]]) -> None:
        """Forget all but these lines, which were read from it; without any, clear it.

        Raises:
            MicrovmHostError: it cannot be written. Then it says what it said before.
        """
        if not lines:
            return self.clear()
        self._check_place()
        directory, what = os.path.split(self.path)
        # Beside the VMs' directories, by a name that no VM has: what a killed helper left here
        # is no record of anything.
        records, vm = os.path.split(directory)
        new = f"{records}/.{vm}-{what}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        text = "".join("\t".join(line) + "\n" for line in lines)
        try:
            with open(os.open(new, flags, 0o644), "w", encoding="utf-8", newline="\n") as target:
                target.write(text)
            os.rename(new, self.path)
        except OSError as error:
            raise MicrovmHostError(
                f"the record cannot be written anew: {error.strerror}", path=self.path
            ) from error

    def strange(self, fields: list[str]) -> MicrovmHostError:
        """What to say of a line that the reader of this record has no use for."""
        return MicrovmHostError(
            f"{fields!r} is no line of this record, so that nothing is undone for it",
            path=self.path,
            hint="undo by hand what it stands for, and delete the record",
        )

    def _check_place(self) -> None:
        """Raise MicrovmHostError where the VM's directory of records is elsewhere."""
        directory = os.path.dirname(self.path)
        if os.path.islink(directory):
            raise MicrovmHostError("is a link, where records are to lie", path=directory)

    def clear(self) -> None:
        """Forget everything, the VM's directory of records too if this was the last one.

        Raises:
            MicrovmHostError: it cannot be removed.
        """
        self._check_place()
        try:
            os.unlink(self.path)
        except (FileNotFoundError, NotADirectoryError):
            # Its writer may have been killed when it had made the directory alone.
            pass
        except OSError as error:
            raise MicrovmHostError(
                f"the record cannot be removed: {error.strerror}", path=self.path
            ) from error
        try:
            os.rmdir(os.path.dirname(self.path))
        except OSError:
            # Another record is still there, or nothing is.
            pass


def holders(records: str, what: str, fields: tuple[str, ...]) -> list[str]:
    """The VMs whose record `what` has a line that begins with `fields`.

    Args:
        records: the directory of all records.
    """
    try:
        vms = sorted(os.listdir(records))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        vm
        for vm in vms
        if any(
            tuple(line[: len(fields)]) == fields for line in Record(f"{records}/{vm}/{what}").read()
        )
    ]


def remove_files(booted: Record, directory: str) -> None:
    """Remove what is not to outlast a run of a VM from its state directory.

    That are its user's temporary files, and the sockets that somebody who was killed has left: the
    hypervisor's control socket, and the one where the guest was listened for.

    Args:
        booted: the record of the VM's start, which names them.
        directory: the state directory.
    """
    user = ""
    for line in booted.read():
        match line:
            case ["user", _, uid, _, _]:
                user = uid
            # Further down there may be links of the VM's user by now, that lead elsewhere.
            case ["notify", "unix", name] | ["control", _, name] if "/" not in name:
                _remove(f"{directory}/{name}", stat.S_ISSOCK)
            case ["temporary", name] if "/" not in name and user:
                # Nothing of root's, whatever a package calls temporary.
                _remove(f"{directory}/{name}", stat.S_ISREG, user)


def _remove(path: str, is_it: Callable[[int], bool], user: str = "") -> None:
    try:
        status = os.lstat(path)
        if is_it(status.st_mode) and user in ("", str(status.st_uid)):
            os.unlink(path)
    except OSError:
        pass
