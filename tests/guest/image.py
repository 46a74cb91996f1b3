# SPDX-License-Identifier: MIT
"""Kernel and initrd of the test guest, made from a Debian tree.

The tree (an unpacked root, or ``/`` itself) gives the kernel, its modules and a static busybox; the
``init`` beside this file gives the rest. Needs no privileges: the archive is written here, so that
owners and device nodes are entries in it and never files on the disk. It must not need anything
that the tree's own distribution release could lack.
"""

from __future__ import annotations

import argparse
import lzma
import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

INIT = Path(__file__).with_name("init")

# Loaded at every boot: nothing announces itself to ask for them.
ALWAYS = ("button", "evdev")

# Loaded when a device asks for them. The emulated NICs are there to be passed through.
ON_DEMAND = (
    "virtio_pci",
    "virtio_mmio",
    "virtio_net",
    "virtio_blk",
    "virtio_console",
    "virtio_input",
    "virtio_balloon",
    "virtio_mem",
    "virtio_rng",
    "virtiofs",
    "9pnet_virtio",
    "9p",
    "vmw_vsock_virtio_transport",
    "pvpanic_pci",
    "qemu_fw_cfg",
    "xhci_pci",
    "8139cp",
    "e1000",
    "e1000e",
    "igb",
)

# Loaded when a disk is to be mounted, by the name of its file system.
FILESYSTEMS = {
    "vfat": ("nls_cp437", "nls_ascii", "vfat"),
    # Older kernels find their checksum by the name of its algorithm alone.
    "ext4": ("crc32c_generic", "ext4"),
    "erofs": ("crc32c_generic", "erofs"),
}

# A device's modalias is compared with these buses' patterns only; others cannot be in the guest.
BUSES = ("virtio:", "pci:", "acpi")

COMPRESSED = (".xz", ".zst", ".gz")


class ImageError(Exception):
    """The tree cannot become a guest; the message names what is missing and where."""


@dataclass(frozen=True)
class Image:
    """A directory with ``vmlinuz`` and ``initrd``."""

    directory: Path

    @property
    def kernel(self) -> Path:
        """The kernel, as Debian ships it."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The archive with busybox, modules and init."""
        return self.directory / "initrd"


@dataclass(frozen=True)
class Kernel:
    """One installed kernel: its version, its image and the directory of its modules."""

    version: str
    image: Path
    modules: Path


def find_kernels(root: Path) -> list[Kernel]:
    """List the kernels of a tree that have both image and modules, oldest first."""
    found: dict[str, Kernel] = {}
    # Unpacked without the usr merge, a tree has its modules under /usr only.
    for parent in (root / "lib/modules", root / "usr/lib/modules"):
        if not parent.is_dir():
            continue
        for modules in parent.iterdir():
            version = modules.name
            images = (root / f"boot/vmlinuz-{version}", modules / "vmlinuz")
            for candidate in images:
                if candidate.is_file() and modules.is_dir():
                    found.setdefault(version, Kernel(version, candidate, modules))
    return sorted(found.values(), key=lambda kernel: _natural(kernel.version))


def _natural(version: str) -> list[tuple[int, str]]:
    return [
        (int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", version)
    ]


def find_kernel(root: Path, version: str | None = None) -> Kernel:
    """The tree's newest kernel, or the one of that version."""
    kernels = find_kernels(root)
    if version is not None:
        kernels = [kernel for kernel in kernels if kernel.version == version]
    if not kernels:
        what = f"kernel {version}" if version else "kernel with modules"
        raise ImageError(f"{root}: no {what}; install linux-image-amd64 there")
    return kernels[-1]


def find_busybox(root: Path) -> Path:
    """The tree's static busybox; a dynamic one would want libraries in the guest."""
    for name in ("bin/busybox", "usr/bin/busybox"):
        path = root / name
        if path.is_file():
            if _is_dynamic(path):
                raise ImageError(f"{path}: is not static; install busybox-static")
            return path
    raise ImageError(f"{root}: no busybox; install busybox-static there")


def _is_dynamic(path: Path) -> bool:
    """Whether an ELF file names a program interpreter (a PT_INTERP header)."""
    data = path.read_bytes()
    if data[:5] != b"\x7fELF\x02":
        raise ImageError(f"{path}: is not a 64-bit ELF file")
    offset = int.from_bytes(data[32:40], "little")
    size = int.from_bytes(data[54:56], "little")
    count = int.from_bytes(data[56:58], "little")
    headers = (data[offset + index * size :][:4] for index in range(count))
    return any(int.from_bytes(header, "little") == 3 for header in headers)


@dataclass(frozen=True)
class Modules:
    """The modules that go into the guest."""

    files: dict[str, bytes]
    """Path below ``/lib/modules`` -> the module, uncompressed."""
    always: list[str]
    """Paths to load at boot, dependencies first."""
    aliases: list[tuple[str, list[str]]]
    """A device's pattern, and what to load for it, dependencies first."""
    filesystems: list[tuple[str, list[str]]]
    """A file system, and what to load for it, dependencies first."""


def collect_modules(kernel: Kernel) -> Modules:
    """Read the wanted modules with what they depend on; those built in are left out."""
    dep_file = kernel.modules / "modules.dep"
    if not dep_file.is_file():
        raise ImageError(f"{dep_file}: missing; run depmod for {kernel.version} in that tree")
    depends: dict[str, list[str]] = {}
    paths: dict[str, str] = {}
    for line in dep_file.read_text().splitlines():
        path, _, rest = line.partition(":")
        depends[path] = rest.split()
        paths[_module_name(path)] = path
    builtin_file = kernel.modules / "modules.builtin"
    builtin = {_module_name(line) for line in builtin_file.read_text().splitlines()}

    chains: dict[str, list[str]] = {}
    for name in (*ALWAYS, *ON_DEMAND, *(name for each in FILESYSTEMS.values() for name in each)):
        if name in paths:
            # modules.dep has the nearest dependency first; loading wants the farthest first.
            chains[name] = [*reversed(depends[paths[name]]), paths[name]]
        elif name not in builtin and name in ("virtio_net", "virtio_pci", "virtiofs", *ALWAYS):
            raise ImageError(f"{kernel.modules}: kernel {kernel.version} has no module {name}")

    files: dict[str, bytes] = {}
    for chain in chains.values():
        for path in chain:
            files.setdefault(_bare(path), b"")
            if not files[_bare(path)]:
                files[_bare(path)] = _read_module(kernel.modules / path)

    always = list(dict.fromkeys(_bare(path) for name in ALWAYS for path in chains.get(name, [])))
    # Nothing but a mount asks for the file system itself.
    by_mount = [("virtio:d00000009v*", "9p")]
    aliases = [
        (pattern, [_bare(path) for path in chains[name]])
        for pattern, name in [*_read_aliases(kernel.modules / "modules.alias"), *by_mount]
        if name in chains
    ]
    filesystems = [
        (kind, [_bare(path) for name in modules for path in chains.get(name, [])])
        for kind, modules in FILESYSTEMS.items()
    ]
    return Modules(files=files, always=always, aliases=aliases, filesystems=filesystems)


def _module_name(path: str) -> str:
    """``…/virtio-rng.ko.xz`` -> ``virtio_rng``: the kernel does not tell dash from underscore."""
    return path.rpartition("/")[2].partition(".ko")[0].replace("-", "_")


def _bare(path: str) -> str:
    """The path without its compression suffix."""
    stem, suffix = os.path.splitext(path)
    return stem if suffix in COMPRESSED else path


def _read_module(path: Path) -> bytes:
    """A module's contents, uncompressed, since not every kernel can do that itself."""
    data = path.read_bytes()
    match path.suffix:
        case ".xz":
            return lzma.decompress(data)
        case ".zst":
            zstd = shutil.which("zstd")
            if zstd is None:
                raise ImageError(f"{path}: needs zstd to unpack; install it")
            return subprocess.run(
                [zstd, "-dcq"], input=data, stdout=subprocess.PIPE, check=True
            ).stdout
        case ".gz":
            import gzip

            return gzip.decompress(data)
    return data


def _read_aliases(path: Path) -> Iterator[tuple[str, str]]:
    """The lines ``alias PATTERN MODULE`` for buses that the guest can have."""
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[0] == "alias" and words[1].startswith(BUSES):
            yield words[1], words[2].replace("-", "_")


class Archive:
    """Writes the "newc" cpio format that the kernel unpacks as its first root."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._inode = 0
        self._made: set[str] = set()

    def _entry(
        self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        self._inode += 1
        raw = name.encode() + b"\0"
        fields = (
            *(self._inode, mode, 0, 0, 1, 0, len(data)),
            *(0, 0, *device, len(raw), 0),
        )
        header = b"070701" + b"".join(b"%08X" % field for field in fields)
        self._stream.write(header + raw + bytes(-(len(header) + len(raw)) % 4))
        self._stream.write(data + bytes(-len(data) % 4))

    def directory(self, name: str) -> None:
        """Add a directory and those above it, once each."""
        parent = name.rpartition("/")[0]
        if parent:
            self.directory(parent)
        if name not in self._made:
            self._made.add(name)
            self._entry(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file."""
        self.directory(name.rpartition("/")[0] or ".")
        self._entry(name, stat.S_IFREG | mode, data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def character(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self.directory(name.rpartition("/")[0])
        self._entry(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> None:
        """Write the end mark."""
        self._entry("TRAILER!!!", 0)


# What init calls by name. Those built into busybox's shell need no link, but a link costs nothing.
APPLETS = (
    *("sh", "cat", "dd", "echo", "grep", "head", "hexdump", "httpd", "insmod", "ip", "kill", "ln"),
    *("ls", "mkdir", "mount", "nc", "od", "ping", "poweroff", "ps", "reboot", "rm", "sed", "sleep"),
    *(
        "stat",
        "stty",
        "sync",
        "timeout",
        "touch",
        "umount",
        "uname",
        "wc",
        "date",
        "chmod",
        "chown",
    ),
    *("dmesg", "df", "free", "id", "lsmod", "md5sum", "mknod", "netstat", "test", "tr", "wget"),
)


def write_initrd(stream: IO[bytes], *, busybox: Path, modules: Modules) -> None:
    """Write the guest's root as an uncompressed archive.

    Uncompressed on purpose: under TCG, unpacking costs the guest more than QEMU takes to load a few
    megabytes more.
    """
    archive = Archive(stream)
    archive.directory(".")
    for name in ("dev", "proc", "sys", "run", "tmp", "mnt", "www", "etc"):
        archive.directory(name)
    # init's own standard streams, before devtmpfs is there.
    archive.character("dev/console", 5, 1)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in APPLETS:
        archive.symlink(f"bin/{applet}", "busybox")
    for path, data in modules.files.items():
        archive.file(f"lib/modules/{path}", data)
    archive.file("lib/guest/always", _lines(modules.always))
    archive.file(
        "lib/guest/aliases",
        _lines(f"{pattern} {' '.join(chain)}" for pattern, chain in modules.aliases),
    )
    archive.file(
        "lib/guest/filesystems",
        _lines(f"{kind} {' '.join(chain)}" for kind, chain in modules.filesystems),
    )
    archive.file("init", INIT.read_bytes(), 0o755)
    archive.finish()


def _lines(lines: Iterable[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def build(root: Path, output: Path, *, kernel_version: str | None = None) -> Image:
    """Make ``vmlinuz`` and ``initrd`` in the output directory."""
    kernel = find_kernel(root, kernel_version)
    busybox = find_busybox(root)
    modules = collect_modules(kernel)
    image = Image(output)
    output.mkdir(parents=True, exist_ok=True)
    # Written beside and renamed: a test run that is interrupted leaves no half image in a cache.
    for target, write in (
        (image.kernel, lambda stream: stream.write(kernel.image.read_bytes())),
        (
            image.initrd,
            lambda stream: write_initrd(stream, busybox=busybox, modules=modules),
        ),
    ):
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with partial.open("wb") as stream:
                write(stream)
            partial.chmod(0o644)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return image


def add_command(commands: Commands) -> None:
    """Add ``image`` to the command line."""
    parser = commands.add_parser("image", help="make kernel and initrd from a Debian tree")
    parser.add_argument("--root", type=Path, default=Path("/"), metavar="DIR")
    parser.add_argument("--kernel", metavar="VERSION", help="default: the newest of the tree")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    image = build(options.root, options.output, kernel_version=options.kernel)
    print(image.directory)
