# SPDX-License-Identifier: MIT
"""Macvtaps for hypervisors: open, as descriptors of the script's shell, or by their nodes.

A macvtap's device node is known by its number only when the VM starts, and one that is opened
several times has several queues.
"""

from __future__ import annotations

from ..paths import NET_DEVICES
from . import shell
from .refused import Refused
from .shell import Variable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..declaration.guest import Guest, Interface

# The shell's own descriptors have one digit, and the first three are taken.
_DESCRIPTORS = range(3, 10)


def check(guest: Guest) -> None:
    """Raises Refused for more than there are descriptors."""
    if len(guest.macvtaps) > len(_DESCRIPTORS):
        raise Refused(
            ("interfaces",),
            f"interfaces has {len(guest.macvtaps)} of type macvtap; {len(_DESCRIPTORS)} is "
            "the most",
        )


def descriptors(guest: Guest, queues: int) -> dict[str, tuple[int, ...]]:
    """The shell's descriptors of each macvtap, by its name.

    Args:
        queues: how many each is to have; where that is too much for all, each has one.
    """
    macvtaps = guest.macvtaps
    if queues * len(macvtaps) > len(_DESCRIPTORS):
        queues = 1
    first = _DESCRIPTORS[0]
    return {
        each.id: tuple(range(first + number * queues, first + (number + 1) * queues))
        for number, each in enumerate(macvtaps)
    }


def opened(found: dict[str, tuple[int, ...]]) -> str:
    """The lines that open them."""
    lines = []
    for interface, numbers in found.items():
        node = f'"$(cat {NET_DEVICES}/{shell.quoted(interface)}/ifindex)"'
        lines += [f"exec {number}<>/dev/tap{node}" for number in numbers]
    return "\n".join(lines)


def number(guest: Guest, interface: Interface) -> Variable:
    """What `numbers` finds, for the node's name: /dev/tapNUMBER."""
    return Variable(f"macvtap{guest.macvtaps.index(interface)}")


def numbers(guest: Guest) -> str:
    """The lines that find the numbers of all of them; empty for one that is not there."""
    lines = []
    for interface in guest.macvtaps:
        variable = number(guest, interface).name
        file = f"{NET_DEVICES}/{shell.quoted(interface.id)}/ifindex"
        lines += [f"{variable}=", f"[ ! -r {file} ] || read -r {variable} <{file}"]
    return "\n".join(lines)
