# SPDX-License-Identifier: MIT
"""Makes images on the first start: the lines of `microvm-run` that do so.

An image is made under another name and gets its own by a rename, so that a start that was cut short
leaves no half-made one behind. Those with content from the beginning are made by a script of their
own, `microvm-prepare`, which the host runs when it installs the package: that takes long, and some
content is for root to read. The host lends that script the right to read everything. Only mkfs may
use it: the VM's user can put links in the place of images that are being made, and any other
program would read through them.
"""

from __future__ import annotations

import json
from shlex import quote

from ..paths import MICROVM_PREPARE
from . import shell
from .refused import Refused
from .shell import PACKAGE_VARIABLE, quoted, word

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..declaration.guest import Guest, Volume
    from .tools import Tools

# Options of each file system's mkfs: be quiet, take what is there for nobody's, and the label's.
_MKFS = {
    "ext4": (("-q", "-F"), "-L", 16),
    "xfs": (("-q", "-f"), "-L", 12),
    "btrfs": (("-q", "-f"), "-L", 255),
    "vfat": ((), "-n", 11),
    "erofs": ((), "-L", 15),
}
# Not in vfat's labels (dosfstools, validate_volume_label); the others take anything.
_NOT_IN_FAT_LABELS = frozenset('*?.,;:/\\|+=<>[]"')
# The least that each mkfs takes without options of its own, in MiB; to be told before a VM starts.
_LEAST = {"xfs": 300, "btrfs": 109}
EMPTY = "none"
# Endings of the names under which an image is made: of what gets its name, and of what that is of.
TEMPORARY = (_NEW, _RAW) = (".new", ".raw")
# File systems that are made of a directory or an archive.
FILLED = ("ext4", "erofs")
# From then on, each takes an archive in place of a directory, and mkfs.erofs a label.
E2FS_ARCHIVES = (1, 47, 1)
EROFS_ARCHIVES = (1, 7)
EROFS_LABELS = (1, 8)
# Compressed ones are mke2fs's alone, by libarchive.
_ARCHIVE = ".tar"
_COMPRESSED = (".tar.gz", ".tar.xz", ".tar.zst", ".tgz", ".txz")
PROGRESS = "lib/with-progress"
# Goes before each program of `microvm-prepare` but mkfs.
_UNPRIVILEGED = "unprivileged "
_UNPRIVILEGED_FUNCTION = """\
# Only mkfs keeps the capability that root may have lent to this script: what any other program
# reads could be a link that the VM's user has put there meanwhile.
unprivileged() {
    setpriv --inh-caps=-all --ambient-caps=-all -- "$@"
}"""


def creation(guest: Guest, tools: Tools) -> str:
    """The lines that make what is missing; raises Refused."""
    lines = []
    if filled(guest):
        program = quoted(word(PACKAGE_VARIABLE, f"/{MICROVM_PREPARE}"))
        lines += [f"[ -e {quote(_path(volume))} ] || {program}" for _, volume in filled(guest)]
    for number, volume in enumerate(guest.volumes):
        if volume.source is None and volume.is_file and volume.auto_create:
            lines.append(_made(number, volume, tools))
        elif volume.source is not None and not (volume.is_file and volume.auto_create):
            raise Refused(
                ("volumes", number, "source"),
                f"volumes.source is for an image that is made, and {volume.image!r} is not",
                "autoCreate = false and devices leave nothing to make",
            )
    return "\n".join(lines)


def filled(guest: Guest) -> list[tuple[int, Volume]]:
    """The volumes that are made of a directory or an archive, with their numbers."""
    return [
        (number, volume)
        for number, volume in enumerate(guest.volumes)
        if volume.source is not None and volume.is_file and volume.auto_create
    ]


def images(guest: Guest) -> list[str]:
    """The images of a guest, a line each: format, `ro` or `rw`, and path."""
    return [
        f"{volume.image_type} {'ro' if volume.read_only else 'rw'} {volume.image}"
        for volume in guest.volumes
        if not volume.image.startswith("rbd:")
    ]


def origins(guest: Guest) -> list[str]:
    """How the images are made that the package makes, a line of JSON each."""
    return [
        json.dumps(
            {
                "image": volume.image,
                "imageType": volume.image_type,
                "size": volume.size,
                "fsType": volume.fs_type,
                "label": volume.label,
                "mkfsExtraArgs": volume.mkfs_extra_args,
                "source": volume.source,
            },
            ensure_ascii=False,
        )
        for volume in guest.volumes
        if volume.is_file and volume.auto_create
    ]


def preparation(guest: Guest, tools: Tools) -> bytes:
    """The script that makes these; raises Refused."""
    return shell.script(
        tools.shell,
        "# Makes the images that have content from the beginning, where they are missing.",
        shell.PACKAGE,
        _UNPRIVILEGED_FUNCTION,
        *(_made(number, volume, tools, _UNPRIVILEGED) for number, volume in filled(guest)),
    )


def opening(guest: Guest) -> str:
    """The lines that say why a device of the host cannot be opened, before the hypervisor does."""
    return "\n".join(
        _opened(guest.name, volume)
        for volume in guest.volumes
        if not volume.is_file and volume.image.startswith("/")
    )


def _opened(name: str, volume: Volume) -> str:
    device, rights = quote(volume.image), "r" if volume.read_only else "rw"
    refused = " || ".join(f"[ ! -{right} {device} ]" for right in rights)
    # Both rights are asked at once: the kernel asks the unit's DeviceAllow= as well as the mode.
    hint = (
        f"{volume.image}: this VM may not open it. Disks of the host are closed to VMs: "
        f"`systemctl edit microvm@{name}`, and write [Service] and, in a line of its own, "
        f"DeviceAllow={volume.image} {rights}. And its node has to be the VM's user's, by a rule "
        "of udev. See CONFINEMENT in microvm-host(7)."
    )
    return "\n".join(
        [
            f"if [ ! -e {device} ]; then",
            f"    echo {quote(f'{volume.image}: there is no such device')} >&2 && exit 1",
            f"elif {refused}; then",
            # No other try makes it right (microvm@.service, RestartPreventExitStatus=).
            f"    echo {quote(hint)} >&2 && exit 78",
            "fi",
        ]
    )


def _path(volume: Volume) -> str:
    # No program is to take a name for an option.
    return f"./{volume.image}" if volume.image.startswith("-") else volume.image


def _made(number: int, volume: Volume, tools: Tools, plain: str = "") -> str:
    """The lines that make an image, with `plain` before each program but mkfs; raises Refused."""
    path = _path(volume)
    image, new, raw = quote(path), quote(f"{path}{_NEW}"), quote(f"{path}{_RAW}")
    if volume.image_type == "raw":
        lines = [
            f"{plain}rm -f {new}",
            f": >{new}",
            # Copy on write would tear a disk that is written to here and there into pieces; what
            # is no btrfs refuses, and needs it not.
            f"{plain}chattr +C {new} 2>/dev/null || :",
            *_formatted(number, volume, new, tools, plain),
        ]
    else:
        lines = _converted(number, volume, new, raw, tools, plain)
    made = shell.directories(volume.image)
    lines = [f"{plain}{made}" if made else "", *lines, f"{plain}mv {new} {image}"]
    lines = [f"if [ ! -e {image} ]; then", *(f"    {line}" for line in lines if line), "fi"]
    return "\n".join(lines)


def _progress(volume: Volume, target: str) -> str:
    """Goes before what writes content, which may take long."""
    if volume.source is None:
        return ""
    program = quoted(word(PACKAGE_VARIABLE, f"/{PROGRESS}"))
    return f"{program} {target} {quote(f'making {volume.image} of {volume.source}')} "


def _converted(
    number: int, volume: Volume, new: str, raw: str, tools: Tools, plain: str
) -> list[str]:
    """The lines that make an image of another format: no mkfs writes into one."""
    if volume.image_type != "qcow2":
        raise Refused(
            ("volumes", number, "imageType"),
            f"volumes.imageType = {volume.image_type!r} is not made by itself",
            f"make it: qemu-img create -f {volume.image_type} …; and add autoCreate = false",
        )
    if tools.qemu_img is None:
        raise Refused(
            ("volumes", number, "imageType"),
            "volumes.imageType = 'qcow2': this host has no qemu-img, by which it is made",
            "install it (on Debian: qemu-utils)",
        )
    formatted = _formatted(number, volume, raw, tools, plain)
    # nocow is what `chattr +C` is for the others.
    if volume.fs_type == EMPTY:
        return [
            f"{plain}rm -f {new}",
            f"{plain}{tools.qemu_img} create -q -f qcow2 -o nocow=on {new} {volume.size}M",
        ]
    convert = f"{tools.qemu_img} convert -q -f raw -O qcow2 -o nocow=on {raw} {new}"
    return [
        f"{plain}rm -f {new} {raw}",
        *formatted,
        f"{plain}{_progress(volume, new)}{convert}",
        f"{plain}rm -f {raw}",
    ]


def _formatted(number: int, volume: Volume, new: str, tools: Tools, plain: str = "") -> list[str]:
    """The lines that give a raw image its size and its file system."""
    at = ("volumes", number, "fsType")
    kind = volume.fs_type
    sized = [f"{plain}truncate -s {volume.size}M {new}"]
    if kind == EMPTY:
        for key, value in (
            ("label", volume.label),
            ("mkfsExtraArgs", volume.mkfs_extra_args),
            ("source", volume.source),
        ):
            if value:
                raise Refused(
                    ("volumes", number, key),
                    f"volumes.{key} is for a file system, and fsType is none",
                )
        return sized
    if kind not in _MKFS:
        raise Refused(
            at,
            f"volumes.fsType = {kind!r} is not one that is made by itself",
            f"{', '.join(_MKFS)} are, and {EMPTY} leaves the image empty",
        )
    program = dict(tools.mkfs).get(kind)
    if program is None:
        raise Refused(
            at,
            f"volumes.fsType = {kind!r}: this host has no mkfs.{kind}",
            f'install it, or give fsType = "{EMPTY}" and have the guest make one',
        )
    least = 0 if volume.mkfs_extra_args else _LEAST.get(kind, 0)
    if volume.size is not None and volume.size < least:
        raise Refused(
            ("volumes", number, "size"),
            f"volumes.size = {volume.size} is less than {least}, the least for {kind}",
        )
    options, label_option, longest = _MKFS[kind]
    label: list[str] = []
    if volume.label is not None:
        if len(volume.label.encode()) > longest:
            raise Refused(
                ("volumes", number, "label"),
                f"volumes.label = {volume.label!r} is longer than {longest} bytes, for {kind}",
            )
        if kind == "vfat":
            _check_fat_label(number, volume.label)
        label = [label_option, quote(volume.label)]
    by = _progress(volume, new)
    words = [program, *options, *label, *map(quote, volume.mkfs_extra_args)]
    if kind == "erofs":
        return [f"{by}{' '.join([*words, *_erofs(number, volume, new, tools)])} >/dev/null"]
    if volume.source is None:
        return [*sized, " ".join([*words, new])]
    _check_source(number, volume, tools)
    return [*sized, f"{by}{' '.join([*words, '-d', quote(volume.source), new])}"]


def _check_fat_label(number: int, label: str) -> None:
    """What mkfs.vfat refuses; what is not ASCII depends on the locale for it."""
    for character in label:
        if character in _NOT_IN_FAT_LABELS or not character.isascii():
            raise Refused(
                ("volumes", number, "label"),
                f"volumes.label = {label!r} has {character!r} in it, which vfat's labels cannot",
            )
    if label.startswith(" "):
        raise Refused(
            ("volumes", number, "label"),
            f"volumes.label = {label!r} begins with a space, which vfat's labels cannot",
        )


def _erofs(number: int, volume: Volume, new: str, tools: Tools) -> list[str]:
    """What mkfs.erofs writes, and of what."""
    if volume.source is None:
        raise Refused(
            ("volumes", number, "fsType"),
            "volumes.fsType = 'erofs' is read-only from the beginning, and needs content",
            'give source = "/path/to/directory", or another fsType',
        )
    if volume.size is not None:
        raise Refused(
            ("volumes", number, "size"),
            "volumes.size is not for erofs, which is as large as its content",
        )
    if volume.label is not None and tools.erofs_version < EROFS_LABELS:
        raise Refused(
            ("volumes", number, "label"),
            f"volumes.label: this host's mkfs.erofs gives none before {_dotted(EROFS_LABELS)}",
        )
    _check_source(number, volume, tools)
    is_archive = volume.source.endswith(_ARCHIVE)
    return [*(["--tar=f"] if is_archive else []), new, quote(volume.source)]


def _check_source(number: int, volume: Volume, tools: Tools) -> None:
    at = ("volumes", number, "source")
    source = volume.source or ""
    if volume.fs_type not in FILLED:
        raise Refused(
            at,
            f"volumes.source is not for {volume.fs_type}, whose mkfs makes it empty",
            f"{' and '.join(FILLED)} are made with content",
        )
    is_compressed = source.endswith(_COMPRESSED)
    if not is_compressed and not source.endswith(_ARCHIVE):
        return
    if is_compressed and volume.fs_type == "erofs":
        raise Refused(
            at,
            f"volumes.source = {source!r} is compressed, which mkfs.erofs does not take",
            "unpack it to a plain .tar",
        )
    program, found, since = (
        ("mkfs.erofs", tools.erofs_version, EROFS_ARCHIVES)
        if volume.fs_type == "erofs"
        else ("mke2fs", tools.e2fs_version, E2FS_ARCHIVES)
    )
    if found < since:
        raise Refused(
            at,
            f"volumes.source = {source!r}: this host's {program} takes no archives before "
            f"{_dotted(since)}, and it is {_dotted(found)}",
            "unpack it into a directory, as root, and name that",
        )


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
