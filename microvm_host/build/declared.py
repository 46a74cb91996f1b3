# SPDX-License-Identifier: MIT
"""From a declaration's file to its package's tree: reads, looks for the tools, and builds.

What is refused on the way is told with the file and the line that asked for it.
"""

from __future__ import annotations

from ..declaration import guest as guests
from . import build
from .refused import Refused
from .tools import Tools, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..declaration.claims import Claims
    from ..declaration.guest import Guest
    from .tree import Tree


def tree(path: str, others: Claims | None = None, tools: Callable[[Guest], Tools] = find) -> Tree:
    """The package of a declared guest.

    Args:
        path: the declaration.
        others: what the VMs of this host claim.
        tools: looks for what building takes.

    Raises:
        DeclarationError: it is wrong, or asks for what cannot be done.
        MicrovmHostError: a tool that is there does not work.
    """
    guest, document = guests.load(path, others)
    try:
        return build(guest, tools(guest))
    except Refused as error:
        raise document.error(error.at, error.message, error.hint) from error
