# SPDX-License-Identifier: MIT
"""What format a disk image has, by its magic number.

A hypervisor takes an image for what it is told. A qcow2 image that is declared as raw starts, shows
the guest a disk full of metadata, and is destroyed by the first write.
"""

from __future__ import annotations

import os
import stat

from .paths import OPENED

# As volumes.imageType has them.
RAW, QCOW2, VHD, VHDX = "raw", "qcow2", "vhd", "vhdx"
# Magic numbers at the beginning (QEMU's block drivers, their probe functions).
_MAGIC = (
    # Version 1 of qcow2 is a format of its own.
    (b"QFI\xfb\0\0\0\x01", "qcow"),
    (b"QFI\xfb", QCOW2),
    (b"vhdxfile", VHDX),
    (b"conectix", VHD),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"# Disk DescriptorFile", "vmdk"),
    (b"QED\0", "qed"),
    (b"WithoutFreeSpace", "parallels"),
    (b"WithouFreSpacExt", "parallels"),
    (b"Bochs Virtual HD Image", "bochs"),
)
# A VDI begins with a text of its maker's choice.
_VDI_AT, _VDI = 0x40, b"\x7f\x10\xda\xbe"
# A VHD of fixed size is a raw image with this before its end.
_FOOTER = 512
_HEAD = 512


def mismatch(path: str, declared: str) -> str:
    """What is wrong with an image that is declared to have a format; nothing if nothing is known.

    Args:
        path: the image, which need not be there.
        declared: RAW, QCOW2, VHD or VHDX.
    """
    found = detect(path)
    if found is None or found == declared:
        return ""
    if found == RAW:
        return f"is no {declared} image, by its first bytes"
    return f"is a {found} image, by its first bytes, and not {declared}"


def hint(path: str, declared: str) -> str:
    """What to do about it."""
    found = detect(path)
    if found in (RAW, QCOW2, VHD, VHDX):
        # qemu-img calls it by its maker's name.
        wanted = "vpc" if declared == VHD else declared
        return f"give imageType = {found!r}, or convert it: qemu-img convert -O {wanted} …"
    return f"convert it: qemu-img convert -f {found} -O raw {os.path.basename(path)} …"


def detect(path: str) -> str | None:
    """The format of an image; None if it cannot be read, is empty, or is no file or disk."""
    try:
        # What is looked at is what is read, whatever has this name by then; and opening alone has
        # effects on some devices.
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        kind = stat.S_IFMT(os.fstat(place).st_mode)
        if kind not in (stat.S_IFREG, stat.S_IFBLK):
            return None
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        image = os.open(f"{OPENED}/{place}", flags)
    except OSError:
        return None
    finally:
        os.close(place)
    try:
        return _detect(image)
    except OSError:
        return None
    finally:
        os.close(image)


def _detect(image: int) -> str | None:
    head = os.pread(image, _HEAD, 0)
    if not head:
        return None
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[_VDI_AT:].startswith(_VDI):
        return "vdi"
    size = os.lseek(image, 0, os.SEEK_END)
    if size > _FOOTER and os.pread(image, 8, size - _FOOTER) == b"conectix":
        return VHD
    return RAW
