# SPDX-License-Identifier: MIT
"""Makes runner packages of declared guests: `build(guest, tools)` gives a tree of files.

A pure function: what it has to know of the host is in `tools`, found beforehand. One module a
hypervisor; what one of them cannot do is refused by its reason, and by the key that asks for it.
What the host does with a package is no business of this one's, which must not import any of it.
"""

from __future__ import annotations

from . import qemu
from .refused import Refused
from .tools import Tools
from .tree import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..declaration.guest import Guest

_BUILDERS: dict[str, Callable[[Guest, Tools], Tree]] = {"qemu": qemu.build}


def build(guest: Guest, tools: Tools) -> Tree:
    """The package of a guest.

    Raises:
        Refused: its hypervisor cannot do all of it.
    """
    builder = _BUILDERS.get(guest.hypervisor)
    if builder is None:
        raise Refused(
            ("hypervisor",),
            f"packages for {guest.hypervisor} are not yet built from declarations",
            f"those for {', '.join(_BUILDERS)} are; others come by runner or flake",
        )
    return builder(guest, tools)
