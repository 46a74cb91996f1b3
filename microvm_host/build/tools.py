# SPDX-License-Identifier: MIT
"""What a builder needs to know of the host, found beforehand, so that building asks nothing.

Programs are named by their paths in packages, since those that they are run as need not have them
in $PATH.
"""

from __future__ import annotations

import os
import stat
import sys
from hashlib import file_digest

from .. import process
from ..errors import MicrovmHostError
from ..frozen import frozen
from ..paths import PROGRAM_PLACES, QEMU_PLACES, SHELL
from .refused import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..declaration.guest import Guest

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64"}
# QEMU's own program where a distribution has but one, without its name in it.
_QEMU = ("qemu-system-x86_64", "qemu-kvm")


@frozen
class Blob:
    """A file of the host that becomes part of the package."""

    path: str
    sha256: str
    is_private: bool = False


@frozen
class Tools:
    """Paths of programs, and what matters of their versions; None and () for what is not there."""

    shell: str = SHELL
    python: str = ""
    qemu: str | None = None
    qemu_version: tuple[int, int] = (0, 0)
    # Each file system with the program that makes it.
    mkfs: tuple[tuple[str, str], ...] = ()
    blobs: tuple[Blob, ...] = ()

    def blob(self, path: str) -> Blob:
        return next(blob for blob in self.blobs if blob.path == path)


def find(guest: Guest) -> Tools:
    """Look for what building this guest takes.

    Raises:
        Refused: its kernel or initrd cannot be had.
        MicrovmHostError: a program says nothing sensible about itself.
    """
    blobs = [_blob("kernel", guest.kernel)]
    if guest.initrd is not None:
        blobs.append(_blob("initrd", guest.initrd))
    kinds = sorted({volume.fs_type for volume in guest.volumes})
    made = ((kind, program(f"mkfs.{kind}")) for kind in kinds)
    qemu = None
    if guest.hypervisor == "qemu":
        if _MACHINES.get(os.uname().machine) is None:
            raise Refused(
                ("hypervisor",),
                f"packages for QEMU are not yet built on {os.uname().machine}, only on x86_64",
            )
        qemu = next(filter(None, (program(each, QEMU_PLACES) for each in _QEMU)), None)
    return Tools(
        python=sys.executable,
        qemu=qemu,
        qemu_version=_version(qemu) if qemu else (0, 0),
        mkfs=tuple((kind, path) for kind, path in made if path),
        blobs=tuple(blobs),
    )


def program(name: str, places: tuple[str, ...] = PROGRAM_PLACES) -> str | None:
    """Where a program is; None if it is nowhere."""
    for place in places:
        path = f"{place}/{name}"
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def _blob(key: str, path: str) -> Blob:
    try:
        # Not waiting: it could be a FIFO.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        hint = ""
        if isinstance(error, PermissionError):
            hint = "try as root"
        raise Refused((key,), f"{key} {path!r} cannot be read: {error.strerror}", hint) from error
    with os.fdopen(file, "rb") as source:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise Refused((key,), f"{key} {path!r} is no regular file")
        digest = file_digest(source, "sha256").hexdigest()
    return Blob(path, digest, not status.st_mode & stat.S_IROTH)


def _version(qemu: str) -> tuple[int, int]:
    """`QEMU emulator version 7.2.22 (Debian …)` is (7, 2)."""
    said = process.output([qemu, "--version"])
    words = said.partition("version ")[2].split(".")
    try:
        return int(words[0]), int(words[1])
    except (IndexError, ValueError) as error:
        raise MicrovmHostError(
            f"says no version that could be understood: {said[:80]!r}", path=qemu
        ) from error
