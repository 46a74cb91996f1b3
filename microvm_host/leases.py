# SPDX-License-Identifier: MIT
"""The addresses that VMs have, as far as this host knows them.

By a VM's MAC addresses, which its package tells, they are looked up in what the DHCP servers of
systemd-networkd on this host gave away, and, if asked for, in the kernel's table of neighbours.
Whatever is there was said by guests: it is shown, and nothing else is made of it.

Stands behind `microvm -l`: costs a host without such a network two looks at paths that are not
there, and must import nothing before that.
"""

from __future__ import annotations

import os

from . import names, process
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .paths import HostPaths

    # Addresses by MAC addresses.
    Addresses = dict[str, list[str]]

# In a package, a line for each tap: its name, and the guest's MAC address on it.
_MACS = "share/microvm/tap-macs"
# The bridge of the network that this project ships.
BRIDGE = "mvbr0"
_ETHERNET_LENGTH = 6
# net/if_arp.h: the kernel has the neighbour's answer.
_COMPLETE = 0x2


def macs(package: str) -> tuple[str, ...]:
    """The MAC addresses of a package's taps; none if it does not tell."""
    try:
        # Guests' packages come from anywhere: what is no file is not waited for.
        file = os.open(f"{package}/{_MACS}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return ()
    try:
        lines = os.read(file, 65536).decode(errors="replace").splitlines()
    except OSError:
        return ()
    finally:
        os.close(file)
    found = []
    for line in lines:
        try:
            found.append(names.mac_address(line.rpartition(" ")[2]))
        except MicrovmHostError:
            continue
    return tuple(found)


def known(host: HostPaths, *, neighbours: bool = False) -> Addresses:
    """The addresses that this host knows.

    Args:
        neighbours: also those that the kernel spoke with, whoever gave them.
    """
    found: Addresses = {}
    try:
        interfaces = sorted(os.listdir(host.dhcp_leases))
    except OSError:
        interfaces = []
    for interface in interfaces:
        _add(found, _persisted(f"{host.dhcp_leases}/{interface}"))
    if BRIDGE not in interfaces and os.path.isdir(host.net_device(BRIDGE)):
        # Before systemd 257, networkd keeps them to itself, and has to be asked.
        _add(found, _offered(host.net_device(BRIDGE)))
    if neighbours:
        _add(found, _neighbours(host.arp_table))
    return found


def _add(found: Addresses, more: Iterable[tuple[str, str]]) -> None:
    for mac, address in more:
        have = found.setdefault(mac, [])
        if address not in have:
            have.append(address)


def _persisted(path: str) -> list[tuple[str, str]]:
    """What a file of leases holds, without those that have run out."""
    import json
    import time

    now = time.time() * 1e6
    try:
        # networkd's user could put something there that is to be waited for.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(file, encoding="utf-8") as source:
            leases = json.load(source)["Leases"]
        return [
            (_mac(each["HardwareAddress"]), _address(each["Address"]))
            for each in leases
            if each["HardwareAddressLength"] == _ETHERNET_LENGTH
            and each["ExpirationRealtimeUSec"] > now
        ]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        # The list of VMs is not to fail for it.
        return []


def _offered(device: str) -> list[tuple[str, str]]:
    """What networkd says of an interface's DHCP server (org.freedesktop.network1(5))."""
    import json
    import time

    try:
        with open(f"{device}/ifindex", encoding="ascii") as source:
            index = source.read().strip()
        # A path's element must not begin with a digit: the first one is written as a number.
        path = f"/org/freedesktop/network1/link/_{ord(index[0]):x}{index[1:]}"
        interface = "org.freedesktop.network1.DHCPServer"
        service = "org.freedesktop.network1"
        argv = ["busctl", "--json=short", "--auto-start=no", "get-property"]
        said = process.output([*argv, service, path, interface, "Leases"], errors=True)
        now = time.clock_gettime(time.CLOCK_BOOTTIME) * 1e6
        # Family, client, address, gateway, hardware address, end.
        return [
            (_mac(each[4]), _address(each[2])) for each in json.loads(said)["data"] if each[5] > now
        ]
    except (MicrovmHostError, OSError, ValueError, TypeError, LookupError, RecursionError):
        return []


def _neighbours(path: str) -> list[tuple[str, str]]:
    """What the kernel's table has (proc_pid_net(5)): address, type, flags, MAC address, …"""
    try:
        with open(path, encoding="ascii", errors="replace") as source:
            rows = [line.split() for line in source][1:]
        return [(row[3].lower(), row[0]) for row in rows if int(row[2], 16) & _COMPLETE]
    except (OSError, ValueError, LookupError):
        return []


def _mac(numbers: list[int]) -> str:
    return ":".join(f"{number:02x}" for number in bytes(numbers[:_ETHERNET_LENGTH]))


def _address(numbers: list[int]) -> str:
    return ".".join(str(number) for number in bytes(numbers))
