# SPDX-License-Identifier: MIT
"""What the guest boots from, in its package: kernel, initial RAM disk, what fills its disks."""

from __future__ import annotations

from ..paths import MICROVM_PREPARE
from . import programs, seed, volumes
from .shell import PACKAGE_VARIABLE, word
from .tree import Copy, File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..declaration.guest import Guest
    from .tools import Tools
    from .tree import Link

_KERNEL, _INITRD = "lib/kernel", "lib/initrd"
# As words of a command line.
KERNEL, INITRD = (word(PACKAGE_VARIABLE, f"/{path}") for path in (_KERNEL, _INITRD))


def files(guest: Guest, tools: Tools) -> dict[str, File | Copy | Link]:
    """Copies, so that a rollback does not need what the distribution has removed since."""
    found: dict[str, File | Copy | Link] = {_KERNEL: _copy(guest.kernel, tools)}
    if guest.initrd is not None:
        found[_INITRD] = _copy(guest.initrd, tools)
    found |= seed.files(guest)
    if volumes.filled(guest):
        found[MICROVM_PREPARE] = File(volumes.preparation(guest, tools), 0o755)
        found[volumes.PROGRESS] = File(programs.with_progress(tools.python), 0o755)
    return found


def _copy(path: str, tools: Tools) -> Copy:
    blob = tools.blob(path)
    return Copy(blob.path, blob.sha256, blob.is_private)
