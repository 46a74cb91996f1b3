# SPDX-License-Identifier: MIT
"""Network interfaces of a device whose driver makes them anew: known again, and named as before.

A new interface is down and has a name that the kernel counted up. udev renames it, where a rule or
its default policy says so; a name that somebody gave by hand comes from nobody but us. Which of
several interfaces had which name is told by their permanent MAC addresses and by the ports of the
card (kernel.org, ABI/testing/sysfs-class-net: `address`, `addr_assign_type`, `dev_port`).
"""

from __future__ import annotations

import time
from errno import ENODEV

from . import hostuse, log, names, pcibus
from .errors import MicrovmHostError
from .frozen import frozen
from .interfaces import IFF_UP, get_flags, rename, set_flags
from .sysfs import attribute

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .paths import HostPaths
    from .pcibus import Device

# udev gives an interface its name a little after the driver has made it.
APPEARS_WITHIN = 10.0  # seconds

_UNKNOWN = "-"
_PERMANENT = "0"  # NET_ADDR_PERM of linux/netdevice.h
_TEMPORARY_NAME = "mvhnew"


@frozen
class Interface:
    """An interface as it was, or is."""

    name: str
    is_up: bool = False
    # Its MAC address, if it is the card's own and so the same each time; and which of a card's
    # ports it is. None if that is not known, as to records of versions that did not look.
    mac: str | None = None
    port: str | None = None

    def may_be(self, other: Interface) -> bool:
        """Whether nothing says that these are two."""
        return (self.mac is None or other.mac is None or self.mac == other.mac) and (
            self.port is None or other.port is None or self.port == other.port
        )


# ---- as it was


def to_fields(device: Device, host: HostPaths) -> list[str]:
    """A device's interfaces, as fields of a record.

    These are the names of those that are up, of those that are down, and for each of which more is
    known, name, MAC address and port.

    Raises:
        MicrovmHostError: the kernel does not tell whether one is up.
    """
    found = [
        Interface(each.name, bool(get_flags(each.name) & IFF_UP), each.mac, each.port)
        for each in _present(device, host)
    ]
    return [
        " ".join(each.name for each in found if each.is_up),
        " ".join(each.name for each in found if not each.is_up),
        *(
            f"{each.name} {each.mac or _UNKNOWN} {each.port or _UNKNOWN}"
            for each in found
            if each.mac or each.port
        ),
    ]


def from_fields(up: str, down: str, *marks: str) -> list[Interface] | None:
    """What `to_fields` gave; None if these fields were never given by it."""
    known = {}
    for mark in marks:
        words = mark.split(" ")
        if len(words) != 3 or not set(words[1] + words[2]) <= set("0123456789abcdef:-"):
            return None
        known[words[0]] = [None if word == _UNKNOWN else word for word in words[1:]]
    found = []
    for text, is_up in ((up, True), (down, False)):
        for name in text.split():
            if not names.is_interface_name(name):
                return None
            mac, port = known.get(name, (None, None))
            found.append(Interface(name, is_up, mac, port))
    return found


def _present(device: Device, host: HostPaths) -> list[Interface]:
    """The interfaces that a device has now, `is_up` left open."""
    found = []
    for name in hostuse.interfaces(device, host):
        directory = host.net_device(name)
        is_permanent = attribute(directory, "addr_assign_type") == _PERMANENT
        mac = attribute(directory, "address") if is_permanent else None
        found.append(Interface(name, False, mac or None, attribute(directory, "dev_port") or None))
    return found


# ---- as it is to be again


def restore(address: str, recorded: Sequence[Interface], host: HostPaths) -> list[str]:
    """Have a device's interfaces again under their names, and those up that were up.

    Whoever set one up at boot need not watch for it to come back.

    Returns:
        What is not as it was, a line each.
    """
    device = pcibus.device(address, host)
    if not recorded or device is None:
        return []
    deadline = time.monotonic() + APPEARS_WITHIN
    pairs = _pairs(recorded, _present(device, host))
    told = time.monotonic()
    while pairs != {each.name: each.name for each in recorded}:
        now = time.monotonic()
        if now > deadline:
            break
        if now > told + 1:
            log.waiting(f"waiting for the interfaces of {address}")
            told = now
        time.sleep(0.01)
        pairs = _pairs(recorded, _present(device, host))
    refused = _rename({now: name for name, now in pairs.items() if now != name})
    problems = []
    for each in recorded:
        name = each.name
        if name not in pairs:
            problems.append(
                MicrovmHostError(
                    f"{address} is with its driver again, but its interface {name} is not there",
                    hint="`ip link` shows those that are: it may have been unplugged, or its "
                    "driver is late",
                )
            )
        if name in refused:
            name, error = refused[name]
            problems.append(
                MicrovmHostError(
                    f"{address} is with its driver again, but its interface {name} cannot be "
                    f"called {each.name} as before: {error}",
                    hint=f"`ip link set dev {name} down && ip link set dev {name} name "
                    f"{each.name}` does it when that is mended",
                )
            )
        if each.is_up and each.name in pairs:
            try:
                _set_up(name, deadline)
            except MicrovmHostError as error:
                problems.append(
                    MicrovmHostError(
                        f"{address} is with its driver again, but cannot be set up: {error}",
                        hint=f"`ip link set dev {name} up` does it when that is mended",
                    )
                )
    return [str(problem) for problem in problems]


def _pairs(recorded: Sequence[Interface], present: Sequence[Interface]) -> dict[str, str]:
    """Which interface of those present is which of the recorded: former name to present name.

    Where two could be one, neither is: a wrong name may get a wrong network's addresses.
    """
    pairs: dict[str, str] = {}
    missing, spare = list(recorded), list(present)

    def pair(one: Interface, other: Interface) -> None:
        pairs[one.name] = other.name
        missing.remove(one)
        spare.remove(other)

    def is_it_by_mac(one: Interface, other: Interface) -> bool:
        return one.mac is not None and one.mac == other.mac and one.may_be(other)

    def is_it_by_name(one: Interface, other: Interface) -> bool:
        return one.name == other.name and one.may_be(other)

    def is_called_so(one: Interface, other: Interface) -> bool:
        # A virtual function, say, that was given another MAC address meanwhile.
        return one.name == other.name

    for is_it in (is_it_by_mac, is_it_by_name, Interface.may_be, is_called_so):
        # Once more for each: of two that could be one, the other may have been found meanwhile.
        for _ in recorded:
            for one in list(missing):
                others = [other for other in spare if is_it(one, other)]
                if len(others) == 1 and sum(is_it(each, others[0]) for each in missing) == 1:
                    pair(one, others[0])
    return pairs


def _rename(moves: dict[str, str]) -> dict[str, tuple[str, MicrovmHostError]]:
    """Rename interfaces, which are down then, from their present names to others.

    Returns:
        Of those that could not be, by the name that was to be: the present one, and why.
    """
    now = {name: present for present, name in moves.items()}
    refused = {}
    for present, name in moves.items():
        try:
            # Whoever manages the network may have set it up meanwhile, and before Linux 6.2 none
            # that is up is renamed.
            set_flags(present, 0, clear=IFF_UP)
            if name in moves:
                # Another one has it still, and may be waiting for this one's.
                names = (f"{_TEMPORARY_NAME}{number}" for number in range(2 * len(moves)))
                now[name] = next(each for each in names if each not in {*moves, *now.values()})
                rename(present, now[name])
        except MicrovmHostError as error:
            del now[name]
            refused[name] = present, error
    # Those first that free a name for another.
    for name in sorted(now, key=lambda name: name in moves):
        try:
            rename(now[name], name)
        except MicrovmHostError as error:
            refused[name] = now[name], error
    return refused


def _set_up(name: str, deadline: float) -> None:
    """Set an interface up that may have got its name this moment.

    sysfs has the new name a little before the kernel finds the interface by it.
    """
    while True:
        try:
            if not get_flags(name) & IFF_UP:
                set_flags(name, IFF_UP)
            return
        except MicrovmHostError as error:
            is_late = time.monotonic() > deadline
            if is_late or getattr(error.__cause__, "errno", None) != ENODEV:
                raise
            time.sleep(0.01)
