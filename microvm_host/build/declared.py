# SPDX-License-Identifier: MIT
"""From a declaration's file to its package's tree: reads, looks for the tools, and builds.

What is refused on the way is told with the file and the line that asked for it.
"""

from __future__ import annotations

import os

from .. import declaration, image_format
from ..declaration import document
from ..declaration import guest as guests
from ..file_stamp import Inputs
from ..frozen import frozen
from ..paths import HostPaths
from . import build, volumes
from .refused import Refused
from .tools import find
from .tree import Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from ..declaration.claims import Claims
    from ..declaration.guest import Guest
    from .tools import Tools


@frozen
class Plan:
    """What a declaration asks for: the package, images that are made at once, and the VM's user."""

    tree: Tree
    images: tuple[str, ...] = ()
    user: str | None = None
    # What the declaration and its drop-ins say, together.
    declared: dict[str, Any] | None = None


def plan(
    path: str,
    others: Claims | None = None,
    tools: Callable[[Guest], Tools] | None = None,
    inputs: Inputs | None = None,
    host_id: str = "",
) -> Plan:
    """What a declaration asks for.

    Args:
        path: the declaration.
        others: what the VMs of this host claim.
        tools: looks for what building takes, in place of `find`.
        inputs: is told of all that was looked at.
        host_id: the machine-id of the host that the package is for.

    Raises:
        DeclarationError: it is wrong, or asks for what cannot be done.
        MicrovmHostError: a tool that is there does not work.
    """
    if inputs is not None:
        _see(path, inputs)
    guest, read = guests.load(path, others, host_id)
    if inputs is not None and not set(read.files) <= inputs.stamps.keys():
        # A drop-in that came in between.
        inputs.is_settled = False
    _check_formats(guest, read)
    try:
        tree = build(guest, tools(guest) if tools else find(guest, inputs))
    except Refused as error:
        raise read.error(error.at, error.message, error.hint) from error
    images = tuple(volume.image for _, volume in volumes.filled(guest))
    return Plan(tree, images, declaration.of(read).user, read.table)


def _check_formats(guest: Guest, read: document.Document) -> None:
    """Refuse images that are there and have another format than is declared."""
    directory = HostPaths.from_environment().vm(guest.name)
    for number, volume in enumerate(guest.volumes):
        path = os.path.join(directory, volume.image)
        if wrong := image_format.mismatch(path, volume.image_type):
            raise read.error(
                ("volumes", number, "imageType" if volume.image_type != "raw" else "image"),
                f"volumes.image = {volume.image!r} {wrong}",
                image_format.hint(path, volume.image_type),
            )


def tree(
    path: str,
    others: Claims | None = None,
    tools: Callable[[Guest], Tools] | None = None,
    host_id: str = "",
) -> Tree:
    """The package of a declared guest; raises as `plan`."""
    return plan(path, others, tools, host_id=host_id).tree


def _see(path: str, inputs: Inputs) -> None:
    """Take the stamps of a declaration's files, and of the directory of its drop-ins."""
    directory = path + document.DROP_INS
    inputs.see(path)
    inputs.see(directory)
    try:
        files = filter(document.is_declaration, os.listdir(directory))
    except OSError:
        return
    for file in files:
        inputs.see(f"{directory}/{file}")
