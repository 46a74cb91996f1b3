# SPDX-License-Identifier: MIT
"""Formats of kernels, of which each hypervisor loads some: told before anything is built.

x86's bzImage is what distributions have as vmlinuz (Documentation/arch/x86/boot.rst); an ELF file
is the uncompressed vmlinux, and may name an entry for PVH (Xen's docs/misc/pvh.pandoc).
"""

from __future__ import annotations

from .refused import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import BinaryIO

    from ..declaration.guest import Guest
    from .tools import Tools

BZIMAGE, ELF, PVH = "bzImage", "vmlinux", "vmlinux with an entry for PVH"

# boot.rst: the header's magic number.
_HEADER_AT, _HEADER = 0x202, b"HdrS"
# Its version of the protocol, and from 2.06 on the size of the command line that it takes.
_VERSION_AT, _CMDLINE_SIZE_AT = 0x206, 0x238
_CMDLINE_SIZE_SINCE = 0x206
# elf(5), of 64 bits and little-endian.
_ELF = b"\x7fELF\x02\x01"
_PT_NOTE = 4
# include/xen/interface/elfnote.h
_PVH_OWNER, _PVH_NOTE = b"Xen\0", 18
# No kernel has more of either.
_SEGMENTS_MAX, _NOTES_MAX = 64, 1 << 16

_HINTS = {
    BZIMAGE: "the distribution's own vmlinuz in /boot is one",
    ELF: "scripts/extract-vmlinux of the kernel's sources unpacks a vmlinuz",
    PVH: "scripts/extract-vmlinux of the kernel's sources unpacks a vmlinuz; CONFIG_PVH=y is "
    "what gives it the entry",
}


def check(guest: Guest, tools: Tools, *formats: str) -> str:
    """The kernel's format, which is one of those; raises Refused.

    Args:
        formats: what the hypervisor loads, best first. What takes ELF takes it with PVH as well.
    """
    found = tools.blob(guest.kernel).format
    if found in formats or (found == PVH and ELF in formats):
        return found
    raise Refused(
        ("kernel",),
        f"kernel {guest.kernel!r} is {f'a {found}' if found else 'no kernel that is known'}, and "
        f"{guest.hypervisor} takes a {' or a '.join(formats)}",
        _HINTS[formats[0]],
    )


def kind(file: BinaryIO) -> str:
    """The format of what an open file holds; `` if it is none of them."""
    head = _part(file, 0, _HEADER_AT + len(_HEADER))
    if head.endswith(_HEADER) and len(head) == _HEADER_AT + len(_HEADER):
        return BZIMAGE
    if not head.startswith(_ELF):
        return ""
    return PVH if any(_has_pvh(notes) for notes in _notes(file, head)) else ELF


def command_line_max(file: BinaryIO) -> int:
    """How long a bzImage says that its command line may be, in bytes without the final NUL; 0 if
    it does not say.
    """
    version = _number(_part(file, _VERSION_AT, 2), 0, 2)
    # Linux has said it since 2.6.22.
    return _number(_part(file, _CMDLINE_SIZE_AT, 4), 0, 4) if version >= _CMDLINE_SIZE_SINCE else 0


def _notes(file: BinaryIO, head: bytes) -> list[bytes]:
    """The segments of notes."""
    start, size, count = _number(head, 0x20, 8), _number(head, 0x36, 2), _number(head, 0x38, 2)
    found = []
    for number in range(min(count, _SEGMENTS_MAX)):
        entry = _part(file, start + number * size, 0x38)
        if _number(entry, 0, 4) == _PT_NOTE:
            length = min(_number(entry, 0x20, 8), _NOTES_MAX)
            found.append(_part(file, _number(entry, 0x08, 8), length))
    return found


def _has_pvh(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        owner, value, number = (_number(notes, at + each, 4) for each in (0, 4, 8))
        at += 12
        if notes[at : at + owner] == _PVH_OWNER and number == _PVH_NOTE:
            return True
        at += _aligned(owner) + _aligned(value)
    return False


def _part(file: BinaryIO, at: int, length: int) -> bytes:
    try:
        file.seek(at)
        return file.read(length)
    except (OSError, OverflowError, ValueError):
        # A file can say that its parts lie anywhere.
        return b""


def _number(data: bytes, at: int, length: int) -> int:
    return int.from_bytes(data[at : at + length], "little")


def _aligned(length: int) -> int:
    return (length + 3) & ~3
