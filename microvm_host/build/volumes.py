# SPDX-License-Identifier: MIT
"""Makes images on the first start: the lines of `microvm-run` that do so.

An image is made under another name and gets its own by a rename, so that a start that was cut short
leaves no half-made one behind.
"""

from __future__ import annotations

from shlex import quote

from .refused import Refused

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
}
EMPTY = "none"


def creation(guest: Guest, tools: Tools) -> str:
    """The lines that make what is missing; raises Refused."""
    return "\n".join(
        _made(number, volume, tools)
        for number, volume in enumerate(guest.volumes)
        if volume.is_file and volume.auto_create
    )


def _made(number: int, volume: Volume, tools: Tools) -> str:
    if volume.image_type != "raw":
        raise Refused(
            ("volumes", number, "imageType"),
            f"volumes.imageType = {volume.image_type!r} is not made by itself",
            f"make it: qemu-img create -f {volume.image_type} …; and add autoCreate = false",
        )
    # No program is to take a name for an option.
    path = f"./{volume.image}" if volume.image.startswith("-") else volume.image
    image, new = quote(path), quote(f"{path}.new")
    lines = [
        f"if [ ! -e {image} ]; then",
        f"    rm -f {new}",
        f"    : >{new}",
        # Copy on write would tear a disk that is written to here and there into pieces; what is no
        # btrfs refuses, and needs it not.
        f"    chattr +C {new} 2>/dev/null || :",
        f"    truncate -s {volume.size}M {new}",
        *_formatted(number, volume, new, tools),
        f"    mv {new} {image}",
        "fi",
    ]
    return "\n".join(lines)


def _formatted(number: int, volume: Volume, new: str, tools: Tools) -> list[str]:
    at = ("volumes", number, "fsType")
    if volume.fs_type == EMPTY:
        if volume.label is not None or volume.mkfs_extra_args:
            key = "label" if volume.label is not None else "mkfsExtraArgs"
            raise Refused(
                ("volumes", number, key), f"volumes.{key} is for a file system, and fsType is none"
            )
        return []
    if volume.fs_type not in _MKFS:
        raise Refused(
            at,
            f"volumes.fsType = {volume.fs_type!r} is not one that is made by itself",
            f"{', '.join(_MKFS)} are, and {EMPTY} leaves the image empty",
        )
    program = dict(tools.mkfs).get(volume.fs_type)
    if program is None:
        raise Refused(
            at,
            f"volumes.fsType = {volume.fs_type!r}: this host has no mkfs.{volume.fs_type}",
            f'install it, or give fsType = "{EMPTY}" and have the guest make one',
        )
    options, label_option, longest = _MKFS[volume.fs_type]
    label: list[str] = []
    if volume.label is not None:
        if len(volume.label.encode()) > longest:
            raise Refused(
                ("volumes", number, "label"),
                f"volumes.label = {volume.label!r} is longer than {longest} bytes, for "
                f"{volume.fs_type}",
            )
        label = [label_option, quote(volume.label)]
    words = [program, *options, *label, *map(quote, volume.mkfs_extra_args), new]
    return [f"    {' '.join(words)}"]
