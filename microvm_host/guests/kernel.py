# SPDX-License-Identifier: MIT
"""The host's kernels, and the modules of one of them that a guest needs.

Modules are given uncompressed, since neither every kernel nor busybox's modprobe can unpack them.
"""

from __future__ import annotations

import os
import struct

from ..errors import MicrovmHostError
from ..frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from ..paths import HostPaths

_PACKED = (".xz", ".zst", ".gz")
# Of the header of a kernel image (kernel.org, arch/x86/boot): its mark, and where its version is,
# counted from the end of the first sector.
_MARK, _MARK_AT, _VERSION_AT, _SECTOR = b"HdrS", 0x202, 0x20E, 0x200
_INSTALL = "install one (on Debian: apt install linux-image-amd64), or name one with --kernel"


@frozen
class Kernel:
    """An image, its version as `uname -r` has it, and the directory of its modules."""

    image: str
    version: str
    modules: str


def find(host: HostPaths, running: str, image: str | None = None) -> Kernel:
    """The kernel for a guest: the one at `image`, else the running one, else the newest installed.

    Args:
        running: the version that this host runs. A container has no image of that.

    Raises:
        MicrovmHostError: there is none, or it cannot be read, or has no modules.
    """
    if image is None:
        image = _installed(host, running)
    found = version(image)
    for modules in host.modules_places(found):
        if os.path.isfile(f"{modules}/modules.dep"):
            return Kernel(image, found, modules)
    raise MicrovmHostError(
        f"the modules of kernel {found} are missing",
        path=host.modules_places(found)[0],
        hint="a guest needs its drivers; install that kernel as a package of the distribution",
    )


def _installed(host: HostPaths, running: str) -> str:
    for place in host.kernel_places(running):
        if os.path.exists(place):
            return place
    found = []
    for directory in host.modules_places(""):
        for release in _listed(directory):
            found += [place for place in host.kernel_places(release) if os.path.exists(place)]
    if not found:
        raise MicrovmHostError(
            "this host has no kernel to boot a guest with",
            path=host.kernel_places(running)[0],
            hint=_INSTALL,
        )
    return max(found, key=_natural)


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts 6.12.9 before 6.12.10."""
    import re

    # What is no number before what is one: 6.1 is newer than 6.1-rc2.
    parts = re.split(r"(\d+)", path)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def version(image: str) -> str:
    """The version that a kernel image says it is.

    Raises:
        MicrovmHostError: it cannot be read, or is no image of a Linux kernel for x86.
    """
    try:
        with open(image, "rb") as source:
            # The version lies in the first sectors, which are the setup code.
            head = source.read(0x10000)
    except OSError as error:
        hint = "this needs root" if isinstance(error, PermissionError) else _INSTALL
        raise MicrovmHostError(
            f"cannot be read: {error.strerror}", path=image, hint=hint
        ) from error
    if head[_MARK_AT : _MARK_AT + len(_MARK)] == _MARK:
        (offset,) = struct.unpack_from("<H", head, _VERSION_AT)
        words = head[offset + _SECTOR :].split(b"\0", 1)[0].split()
        if offset and words and words[0].isascii() and b"/" not in words[0]:
            return words[0].decode()
    raise MicrovmHostError("is no image of a Linux kernel for x86", path=image, hint=_INSTALL)


def modules(kernel: Kernel, wanted: Collection[str]) -> dict[str, bytes]:
    """A tree of modules for modprobe, by path below `/lib/modules/VERSION`.

    Holds the wanted ones, by name, with what they depend on, and the lines of the kernel's lists
    that are about them. What the kernel has built in, or does not know, is left out.

    Raises:
        MicrovmHostError: the kernel's lists or a module cannot be read.
    """
    depends: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for line in _lines(kernel, "modules.dep"):
        path, _, rest = line.partition(":")
        depends[path] = rest.split()
        names[name_of(path)] = path
    chosen: dict[str, None] = {}
    for name in sorted(wanted):
        if name in names:
            chosen |= dict.fromkeys((names[name], *depends[names[name]]))
    chosen_names = {name_of(path) for path in chosen}
    dep = [f"{_bare(path)}: {' '.join(map(_bare, depends[path]))}".rstrip() for path in chosen]
    alias = [
        line
        for line in _lines(kernel, "modules.alias")
        if line.startswith("alias ") and name_of(line.rpartition(" ")[2]) in chosen_names
    ]
    tree = {_bare(path): _content(f"{kernel.modules}/{path}") for path in chosen}
    for name, lines in (("modules.dep", dep), ("modules.alias", alias)):
        tree[name] = "".join(f"{line}\n" for line in lines).encode()
    return tree


def known(kernel: Kernel) -> set[str]:
    """The names of all modules that a kernel has, built in or not; raises as `modules`."""
    found = {name_of(line.partition(":")[0]) for line in _lines(kernel, "modules.dep")}
    return found | {name_of(line) for line in _lines(kernel, "modules.builtin")}


def name_of(path: str) -> str:
    """The name of a module by its file: the kernel does not tell dash from underscore."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _lines(kernel: Kernel, name: str) -> Iterator[str]:
    path = f"{kernel.modules}/{name}"
    try:
        with open(path, encoding="utf-8") as source:
            yield from source.read().splitlines()
    except OSError as error:
        raise MicrovmHostError(
            f"cannot be read: {error.strerror}", path=path, hint=f"run depmod {kernel.version}"
        ) from error


def _bare(path: str) -> str:
    """The path without the suffix of what it was packed with."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in _PACKED else path


def _content(path: str) -> bytes:
    """A module, unpacked."""
    import gzip
    import lzma
    import subprocess

    try:
        with open(path, "rb") as source:
            content = source.read()
        if path.endswith(".xz"):
            return lzma.decompress(content)
        if path.endswith(".gz"):
            return gzip.decompress(content)
        if path.endswith(".zst"):
            # Python knows that from 3.14 on.
            return subprocess.run(
                ["zstd", "-dcq"], input=content, stdout=subprocess.PIPE, check=True
            ).stdout
    except FileNotFoundError as error:
        if error.filename == "zstd":
            raise MicrovmHostError(
                "cannot be unpacked: this host has no zstd", path=path, hint="install zstd"
            ) from error
        raise MicrovmHostError("is missing", path=path, hint="run depmod -a") from error
    except (OSError, EOFError, lzma.LZMAError, subprocess.CalledProcessError) as error:
        raise MicrovmHostError(f"cannot be unpacked: {error}", path=path) from error
    return content
