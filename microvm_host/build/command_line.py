# SPDX-License-Identifier: MIT
"""The guest's kernel command line, refused where it is longer than the kernel or the hypervisor
can take: what does not fit is cut off in silence, and the guest dies early in its boot.
"""

from __future__ import annotations

from .refused import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..declaration.guest import Guest
    from .tools import Tools

# COMMAND_LINE_SIZE of x86 is 2048 with the final NUL (arch/x86/include/asm/setup.h). Firecracker,
# crosvm and lkvm have no more room themselves.
LINUX_MAX = 2047
# The longest word by which a device of virtio-mmio is named on the command line.
MMIO_DEVICE = len(" virtio_mmio.device=512@0xfeb02e00:47")


def joined(
    guest: Guest, tools: Tools, words: Sequence[str], *, added: int = 0, own_max: int = LINUX_MAX
) -> str:
    """The words as one line.

    Args:
        added: how many bytes the hypervisor, or the package's script, adds at most.
        own_max: the most that the hypervisor passes on; a kernel may say that it takes more than
            the usual.

    Raises:
        Refused: the line is too long.
    """
    line = " ".join(words)
    most = min(tools.blob(guest.kernel).command_line_max or LINUX_MAX, own_max)
    length = len(line.encode()) + added
    if length > most:
        given = len(" ".join(guest.kernel_params).encode())
        raise Refused(
            ("kernelParams",),
            f"kernelParams makes a kernel command line of {length} bytes, and {guest.hypervisor} "
            f"and this kernel take {most}",
            f"shorten it by {length - most}: {given} bytes are kernelParams, {length - given} are "
            "added to them",
        )
    return line
