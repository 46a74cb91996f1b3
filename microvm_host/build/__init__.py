# SPDX-License-Identifier: MIT
"""Makes runner packages of declared guests: `build(guest, tools)` gives a tree of files.

A pure function: what it has to know of the host is in `tools`, found beforehand. One module a
hypervisor; what one of them cannot do is refused by its reason, and by the key that asks for it.
What the host does with a package is no business of this one's, which must not import any of it.
"""

from __future__ import annotations

from . import alioth, cloud_hypervisor, crosvm, firecracker, inside, kvmtool, qemu, stratovirt
from .tools import Tools
from .tree import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..declaration.guest import Guest

_BUILDERS: dict[str, Callable[[Guest, Tools], Tree]] = {
    "qemu": qemu.build,
    "cloud-hypervisor": cloud_hypervisor.build,
    "firecracker": firecracker.build,
    "crosvm": crosvm.build,
    "kvmtool": kvmtool.build,
    "stratovirt": stratovirt.build,
    "alioth": alioth.build,
}


def build(guest: Guest, tools: Tools) -> Tree:
    """The package of a guest.

    Raises:
        Refused: its hypervisor cannot do all of it.
    """
    inside.check(guest)
    return _BUILDERS[guest.hypervisor](guest, tools)
