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
from ..file_stamp import Inputs
from ..frozen import frozen
from ..paths import PROGRAM_PLACES, QEMU_PLACES, SHELL, HostPaths
from . import kernels
from .refused import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..declaration.guest import Guest

_MACHINES = {"x86_64": "x86_64", "amd64": "x86_64"}
# QEMU's own program where a distribution has but one, without its name in it.
_QEMU = ("qemu-system-x86_64", "qemu-kvm")
# The program of each other hypervisor.
PROGRAMS = {
    "cloud-hypervisor": "cloud-hypervisor",
    "firecracker": "firecracker",
    "crosvm": "crosvm",
    "kvmtool": "lkvm",
    "stratovirt": "stratovirt",
    "alioth": "alioth",
}
# Those whose options depend on their version.
_VERSIONED = ("cloud-hypervisor", "firecracker")

# More than any of the words takes by which cloud-init knows a file, with blank lines before it.
_HEAD_MAX = 1024

# What cloud-init's seed is.
SEED_FS = "vfat"


@frozen
class Blob:
    """A file of the host that becomes part of the package."""

    path: str
    sha256: str
    is_private: bool = False
    # A kernel's, of `kernels`.
    format: str = ""
    # The longest command line that a kernel says it takes, in bytes; 0 if it does not say.
    command_line_max: int = 0


@frozen
class Tools:
    """Paths of programs, and what matters of their versions; None and () for what is not there."""

    shell: str = SHELL
    python: str = ""
    qemu: str | None = None
    qemu_version: tuple[int, ...] = (0, 0)
    # Any other hypervisor's; the version of one whose options do not depend on it is not known.
    program: str | None = None
    program_version: tuple[int, ...] = (0, 0)
    # Each file system with the program that makes it.
    mkfs: tuple[tuple[str, str], ...] = ()
    mcopy: str | None = None
    qemu_img: str | None = None
    # Asked for where they matter; () elsewhere.
    e2fs_version: tuple[int, ...] = ()
    erofs_version: tuple[int, ...] = ()
    blobs: tuple[Blob, ...] = ()
    # How files for cloud-init begin, by their paths; those that cannot be read now are left out.
    heads: tuple[tuple[str, bytes], ...] = ()

    def blob(self, path: str) -> Blob:
        return next(blob for blob in self.blobs if blob.path == path)


def find(guest: Guest, inputs: Inputs | None = None) -> Tools:
    """Look for what building this guest takes.

    Args:
        inputs: is told what was looked at, and remembers what is costly to find out.

    Raises:
        Refused: its kernel or initrd cannot be had.
        MicrovmHostError: a program says nothing sensible about itself.
    """
    if _MACHINES.get(os.uname().machine) is None:
        raise Refused(
            ("hypervisor",),
            f"packages are not yet built on {os.uname().machine}, only on x86_64",
        )
    look = _Look(inputs or Inputs(HostPaths(), remembers=False))
    blobs = [look.blob("kernel", guest.kernel)]
    if guest.initrd is not None:
        blobs.append(look.blob("initrd", guest.initrd))
    kinds = {volume.fs_type for volume in guest.volumes}
    if guest.cloud_init is not None:
        kinds.add(SEED_FS)
    made = ((kind, look.program(f"mkfs.{kind}")) for kind in sorted(kinds))
    mkfs = {kind: path for kind, path in made if path}
    filled = {volume.fs_type for volume in guest.volumes if volume.source is not None}
    formats = {volume.image_type for volume in guest.volumes}
    qemu = other = None
    if guest.hypervisor == "qemu":
        qemu = next(filter(None, (look.program(each, QEMU_PLACES) for each in _QEMU)), None)
    else:
        other = look.program(PROGRAMS[guest.hypervisor])
    is_versioned = other is not None and guest.hypervisor in _VERSIONED
    return Tools(
        python=sys.executable,
        qemu=qemu,
        qemu_version=look.version(qemu) if qemu else (0, 0),
        program=other,
        program_version=look.version(other) if other and is_versioned else (0, 0),
        mkfs=tuple(mkfs.items()),
        mcopy=look.program("mcopy") if guest.cloud_init is not None else None,
        qemu_img=look.program("qemu-img") if "qcow2" in formats else None,
        e2fs_version=look.version(mkfs["ext4"], "-V") if "ext4" in filled & mkfs.keys() else (),
        erofs_version=look.version(mkfs["erofs"], "-V") if "erofs" in mkfs else (),
        blobs=tuple(blobs),
        heads=tuple(look.heads(guest.cloud_init.kinds)) if guest.cloud_init is not None else (),
    )


def hypervisor(guest: Guest, tools: Tools) -> str:
    """The path of a hypervisor that is not QEMU; raises Refused where there is none."""
    if tools.program is None:
        name = PROGRAMS[guest.hypervisor]
        raise Refused(
            ("hypervisor",),
            f"hypervisor = {guest.hypervisor!r}: this host has no {name}",
            f"put it into one of {', '.join(PROGRAM_PLACES)}",
        )
    return tools.program


def program(name: str, places: tuple[str, ...] = PROGRAM_PLACES) -> str | None:
    """Where a program is; None if it is nowhere."""
    for place in places:
        path = f"{place}/{name}"
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


class _Look:
    """Looks at the host, and has inputs told of it."""

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def program(self, name: str, places: tuple[str, ...] = ()) -> str | None:
        for place in places or PROGRAM_PLACES:
            # Those that are not there as well: the first one counts, once there is one.
            self._inputs.see(f"{place}/{name}")
            if found := program(name, (place,)):
                return found
        return None

    def version(self, program: str, option: str = "--version") -> tuple[int, ...]:
        """The version that a program tells."""
        with open(program, "rb", buffering=0) as file:
            if file.read(2) == b"#!":
                # A script may run something else tomorrow without being another one.
                self._inputs.is_settled = False
                return _version([program, option])
            said = self._inputs.fact(
                "version",
                program,
                file.fileno(),
                lambda: ".".join(map(str, _version([program, option]))),
            )
        return tuple(map(int, said.split(".")))

    def heads(self, paths: Mapping[str, str]) -> Iterator[tuple[str, bytes]]:
        """How files begin."""
        for path in paths.values():
            self._inputs.see(path)
            try:
                # Not waiting: it could be a FIFO.
                file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                # It is needed at the start, whose error it is.
                continue
            with os.fdopen(file, "rb") as source:
                if stat.S_ISREG(os.fstat(file).st_mode):
                    yield path, source.read(_HEAD_MAX)

    def blob(self, key: str, path: str) -> Blob:
        """A file that becomes part of the package."""
        try:
            # Not waiting: it could be a FIFO.
            file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            message = f"{key} {path!r} cannot be read: {error.strerror}"
            raise Refused((key,), message, _hint_for(error, path)) from error
        with os.fdopen(file, "rb") as source:
            self._inputs.see(path, file)
            status = os.fstat(file)
            if not stat.S_ISREG(status.st_mode):
                raise Refused((key,), f"{key} {path!r} is no regular file")
            digest = self._inputs.fact(
                "sha256", path, file, lambda: file_digest(source, "sha256").hexdigest()
            )
            kind = kernels.kind(source) if key == "kernel" else ""
            longest = kernels.command_line_max(source) if kind == kernels.BZIMAGE else 0
        return Blob(path, digest, not status.st_mode & stat.S_IROTH, kind, longest)


def _hint_for(error: OSError, path: str) -> str:
    if isinstance(error, PermissionError):
        return "this needs root"
    if not path.startswith(f"{HostPaths().guests}/"):
        return ""
    # What `microvm init` made, and somebody deleted.
    if "/debian-" in path:
        return (
            "`microvm init NAME --guest debian --force` makes another guest, once the disk of this "
            "one is deleted"
        )
    return "`microvm init NAME --force` makes it again"


def _version(argv: list[str]) -> tuple[int, ...]:
    """The version that a program tells.

    `QEMU emulator version 7.2.22 (Debian …)` is (7, 2, 22), `Firecracker v1.13.1` (1, 13, 1), and
    `mke2fs 1.47.2 (1-Jan-2025)` (1, 47, 2).
    """
    said = process.output(argv, errors=True)
    for word in said.split():
        numbers: list[int] = []
        for part in word.removeprefix("v").split("."):
            digits = part[: len(part) - len(part.lstrip("0123456789"))]
            if not digits:
                break
            numbers.append(int(digits))
            if digits != part:
                break
        if len(numbers) > 1:
            return tuple(numbers)
    path = argv[0]
    raise MicrovmHostError(f"says no version that could be understood: {said[:80]!r}", path=path)
