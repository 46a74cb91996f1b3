# SPDX-License-Identifier: MIT
"""Taps and macvtaps of a VM: made for its user, recorded, and deleted again.

Taps are made by the ioctls of /dev/net/tun (kernel.org, networking/tuntap), macvtaps by `netlink`,
which also deletes both. A tap that somebody else made may be adopted if it is just what the VM
needs; teardown then leaves it as it was found. Undo records name links by interface index: names
and MAC addresses can be changed by others, those of an open tap or macvtap by the VM's user.

Nothing that a guest sends changes the host's addresses and routes: on a plain tap the kernel takes
no router advertisements and redirects, and lets nobody dispute the host's own addresses; on a tap
of a bridge, and on a macvtap, the host has no IPv6. What a guest's bridge accepts is up to whoever
made that bridge.
"""

from __future__ import annotations

import os
import struct
import time
from errno import EBUSY, EEXIST, EINVAL, ENODEV, EOPNOTSUPP
from fcntl import ioctl

from . import interfaces, log, names, netlink, nodes
from .errors import MicrovmHostError
from .frozen import frozen
from .interfaces import IFF_ALLMULTI, IFF_UP, get_flags, interface_index, set_flags
from .record import holders
from .sysfs import attribute, linked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from .identity import Identity
    from .paths import HostPaths
    from .plan import Step
    from .record import Record
    from .runner import Macvtap, Tap

# linux/if_tun.h
TUNSETIFF, TUNSETPERSIST, TUNSETOWNER, TUNSETGROUP = 0x400454CA, 0x400454CB, 0x400454CC, 0x400454CE
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
# Refuses a name that is taken, where TUNSETIFF would change the owner of what has it.
IFF_TUN_EXCL = 0x8000
_COMPARED_FLAGS = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE

# linux/netdevice.h: somebody chose the MAC address.
_NET_ADDR_SET = "3"
# linux/if_ether.h
_ETHERNET_MTU = 1500
_MTU_MAX = 65535

# Settings of the kernel's IPv4 and IPv6 (kernel.org, networking/ip-sysctl).
_REDIRECTS = "accept_redirects"
_NO_IPV6 = (("ipv6", "disable_ipv6", "1"),)
# The guest is no router for the host, and must not make the host's own addresses duplicates.
_GUEST_IS_NO_ROUTER = (
    ("ipv6", "accept_ra", "0"),
    ("ipv6", "autoconf", "0"),
    ("ipv6", _REDIRECTS, "0"),
    ("ipv6", "accept_dad", "0"),
    ("ipv4", _REDIRECTS, "0"),
)

# That of `microvm network enable`.
READY_MADE_BRIDGE = "mvbr0"
NODE_APPEARS_WITHIN = 2.0  # seconds
BRIDGE_APPEARS_WITHIN = 5.0


@frozen
class CreateTap:
    """A tap that does not exist yet."""

    tap: Tap
    identity: Identity
    host: HostPaths

    def describe(self) -> str:
        joined = f", joined to {self.tap.bridge}" if self.tap.bridge else ""
        return f"create tap {self.tap.name} for {self.identity.user}{joined}"

    def apply(self, record: Record) -> None:
        name = self.tap.name
        try:
            tun = os.open(self.host.tun, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise MicrovmHostError(
                f"cannot make taps: {error.strerror}", path=self.host.tun, hint="modprobe tun"
            ) from error
        try:
            request = struct.pack("16sH22x", name.encode(), tap_flags(self.tap) | IFF_TUN_EXCL)
            ioctl(tun, TUNSETIFF, request)
            ioctl(tun, TUNSETOWNER, self.identity.uid)
            ioctl(tun, TUNSETGROUP, self.identity.gid)
            # Until it is persistent the tap goes away with us: killed here, we leave nothing.
            record.append("tap", name, str(interface_index(name)))
            ioctl(tun, TUNSETPERSIST, 1)
        except OSError as error:
            if error.errno == EBUSY:
                _check_no_altname(name, "the name of a tap", self.host)
                raise MicrovmHostError(f"tap {name} was made by somebody else just now") from error
            raise MicrovmHostError(f"cannot create tap {name}: {error.strerror}") from error
        finally:
            os.close(tun)
        _configure(self.tap, self.host)


@frozen
class AdoptTap:
    """A tap that was there before and is just what the VM needs."""

    tap: Tap
    host: HostPaths

    def describe(self) -> str:
        joined = f", and join it to {self.tap.bridge}" if self._has_to_join else ""
        return f"use tap {self.tap.name}, which is there already{joined}"

    @property
    def _has_to_join(self) -> bool:
        return self.tap.bridge is not None and _bridge_of(self.tap.name, self.host) is None

    def apply(self, record: Record) -> None:
        name, bridge = self.tap.name, self.tap.bridge
        index = str(interface_index(name))
        record.append("adopted", name, index)
        if bridge is not None and self._has_to_join:
            device = self.host.net_device(name)
            mtu = attribute(device, "mtu") or str(_ETHERNET_MTU)
            record.append("joined", name, index, bridge, mtu)
            _join(name, bridge, attribute(device, "address") or "", self.host)
        if not get_flags(name) & IFF_UP:
            record.append("raised", name, index)
            set_flags(name, IFF_UP)


def _configure(tap: Tap, host: HostPaths) -> None:
    """Prepare a tap that was just made, and set it up."""
    name = tap.name
    # Of a bridge's ports the lowest address becomes the bridge's: this one is above all that
    # network cards have, and none that the guest has.
    mac = ":".join(f"{byte:02x}" for byte in b"\xfe" + os.urandom(5))
    interfaces.set_mac(name, mac)
    # Before it is up, so that nothing is taken from the guest meanwhile.
    if tap.bridge is None:
        _keep_addresses_and_routes(name, host)
    else:
        _write_settings(name, _NO_IPV6, host)
    if tap.bridge is not None:
        _join(name, tap.bridge, mac, host)
    elif tap.mtu is not None:
        interfaces.set_mtu(name, tap.mtu)
    set_flags(name, IFF_UP)


def _join(name: str, bridge: str, mac: str, host: HostPaths) -> None:
    """Make a tap a port of a bridge, whose MAC address and MTU stay as they are.

    A bridge has the smallest MTU and the lowest MAC address of its ports, unless somebody chose
    them; with its last port it would lose both.
    """
    device = host.net_device(bridge)
    mtu = int(attribute(device, "mtu") or _ETHERNET_MTU)
    own = attribute(device, "address") or ""
    if str(mtu) != attribute(host.net_device(name), "mtu"):
        interfaces.set_mtu(name, mtu)
    has_ports = bool(os.listdir(f"{device}/brif"))
    if attribute(device, "addr_assign_type") != _NET_ADDR_SET and (not has_ports or mac < own):
        interfaces.set_mac(bridge, own)
    if not has_ports and mtu not in (_ETHERNET_MTU, _MTU_MAX):
        # The kernel takes an MTU for chosen when it changes.
        interfaces.set_mtu(bridge, mtu + 1)
        interfaces.set_mtu(bridge, mtu)
    if bridge == READY_MADE_BRIDGE:
        # networkd sees to router advertisements, and has no key for the rest.
        _keep_addresses_and_routes(bridge, host)
    interfaces.join_bridge(bridge, name)


def _bridge_of(name: str, host: HostPaths) -> str | None:
    """The bridge, or other interface, that an interface is a port of."""
    return linked(host.net_device(name), "master")


def _keep_addresses_and_routes(link: str, host: HostPaths) -> None:
    """Have the kernel ignore what guests on a link say about the host's addresses and routes.

    With IPv4, a redirect counts for any route of the host, also for one by a network card: a guest
    could send it in the name of the host's own gateway. The kernel takes it if either the link or
    "all" says so. "all" alone says nothing about the host's other links, which keep their own word.
    """
    _write_settings(link, _GUEST_IS_NO_ROUTER, host)
    if attribute(os.path.dirname(host.ip_setting("ipv4", "all", _REDIRECTS)), _REDIRECTS) == "1":
        _write_settings("all", (("ipv4", _REDIRECTS, "0"),), host)
        log.notice(
            "net.ipv4.conf.all.accept_redirects is 0 now, so that guests cannot redirect the "
            "host's traffic; other interfaces keep their own setting"
        )


def _write_settings(name: str, settings: Iterable[tuple[str, str, str]], host: HostPaths) -> None:
    for family, key, value in settings:
        path = host.ip_setting(family, name, key)
        try:
            with open(path, "r+") as file:
                file.write(value)
        except FileNotFoundError:
            # A kernel without IPv6.
            pass
        except OSError as error:
            if attribute(os.path.dirname(path), key) == value:
                continue
            raise MicrovmHostError(
                f"cannot keep the guest on {name} from changing the host's {family} addresses and "
                f"routes: cannot write {value}: {error.strerror}",
                path=path,
                hint="in a container, /proc/sys/net must be writable",
            ) from error


def tap_flags(tap: Tap) -> int:
    """The flags of TUNSETIFF that a tap is made with, and later found with in sysfs."""
    flags = IFF_TAP | IFF_NO_PI
    if tap.vnet_hdr:
        flags |= IFF_VNET_HDR
    if tap.multi_queue:
        flags |= IFF_MULTI_QUEUE
    return flags


def plan_taps(vm: str, taps: Iterable[Tap], identity: Identity, host: HostPaths) -> list[Step]:
    """What makes the taps of a VM.

    Raises:
        MicrovmHostError: a name is taken by something that cannot be adopted, which it names; or
            a bridge is missing, and has not come within seconds.
    """
    steps: list[Step] = []
    for tap in taps:
        if tap.bridge is not None:
            _check_bridge(tap, tap.bridge, host)
        if not os.path.isdir(host.net_device(tap.name)):
            steps.append(CreateTap(tap, identity, host))
            continue
        _check_adoptable(vm, tap, identity, host)
        _check_not_on_other_bridge(tap, host)
        steps.append(AdoptTap(tap, host))
    return steps


def _check_bridge(tap: Tap, bridge: str, host: HostPaths) -> None:
    device = host.net_device(bridge)
    if not os.path.isdir(device):
        _check_no_altname(bridge, f"the bridge of tap {tap.name}", host)
    if not _await_bridge(f"{device}/bridge"):
        raise MicrovmHostError(
            f"tap {tap.name} is to join {bridge}, which is no bridge of this host",
            hint="create it: "
            + (
                "microvm network enable"
                if bridge == READY_MADE_BRIDGE
                else f"ip link add {bridge} type bridge"
            ),
        )
    mtu = int(attribute(device, "mtu") or _ETHERNET_MTU)
    if tap.mtu is not None and tap.mtu > mtu:
        raise MicrovmHostError(
            f"tap {tap.name} has an MTU of {tap.mtu}, but its bridge {bridge} has {mtu} and would "
            "drop what is larger",
            hint=f"give the bridge that MTU: ip link set {bridge} mtu {tap.mtu}",
        )


def _check_no_altname(name: str, what: str, host: HostPaths) -> None:
    """Raise MicrovmHostError for an altname (ip-link(8)), which has no directory in sysfs."""
    main = interfaces.main_name(name)
    if main is not None and main != name and os.path.isdir(host.net_device(main)):
        raise MicrovmHostError(
            f"{name}, {what}, is another name (altname) of interface {main}",
            hint=f"write {main}, or remove the altname: ip link property del dev {main} altname "
            f"{name}",
        )


def _check_not_on_other_bridge(tap: Tap, host: HostPaths) -> None:
    bridge = _bridge_of(tap.name, host)
    if tap.bridge is not None and bridge not in (None, tap.bridge):
        raise MicrovmHostError(
            f"tap {tap.name} exists and is on {bridge}, not on {tap.bridge}",
            hint=f"take it off: ip link set {tap.name} nomaster",
        )


def _await_bridge(path: str) -> bool:
    """Wait for a bridge: at boot, who makes it may be up and not yet have come to that."""
    deadline = time.monotonic() + BRIDGE_APPEARS_WITHIN
    while not os.path.isdir(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _check_adoptable(vm: str, tap: Tap, identity: Identity, host: HostPaths) -> None:
    device = host.net_device(tap.name)
    remove = f"give the VM another name for it, or remove it: ip link del {tap.name}"
    others = [
        other
        for verb in ("tap", "adopted")
        for other in holders(host.records, "tap-interfaces", (verb, tap.name))
        if other != vm
    ]
    if others:
        raise MicrovmHostError(
            f"tap {tap.name} is in use by microVM {others[0]}",
            hint="two VMs that run at once need taps of different names",
        )
    flags = attribute(device, "tun_flags")
    if flags is None:
        raise MicrovmHostError(f"{tap.name} is no tap but {_kind(device)}", hint=remove)
    owner, group = int(attribute(device, "owner") or -1), int(attribute(device, "group") or -1)
    found, wanted = int(flags, 16) & _COMPARED_FLAGS, tap_flags(tap)
    if owner != identity.uid or group not in (-1, identity.gid):
        raise MicrovmHostError(
            f"tap {tap.name} exists and belongs to user {_user(owner)}, group {_group(group)}, "
            f"not to {identity.user}:{identity.group}",
            hint=remove,
        )
    if found != wanted:
        raise MicrovmHostError(
            f"tap {tap.name} exists and is {_flag_words(found)}, not {_flag_words(wanted)}",
            hint=remove,
        )


def undo_taps(record: Record, host: HostPaths) -> list[str]:
    """Delete the taps that a record says were made; leaves adopted ones as they were found.

    Returns:
        What could not be undone, a line each; the record is cleared if there is nothing.
    """
    problems = []
    doomed: dict[str, int] = {}
    for line in reversed(record.read()):
        match line:
            # Without an index: by a version that did not record it.
            case ["raised", name, *index] if names.is_interface_name(name) and len(index) <= 1:
                # The VM's user can have a tap go away that they had open (TUNSETPERSIST).
                if index and not _is_still(name, index[0], host):
                    continue
                try:
                    set_flags(name, 0, clear=IFF_UP)
                except MicrovmHostError as error:
                    if os.path.isdir(host.net_device(name)):
                        problems.append(f"cannot set {name} down: {error}")
            case ["joined", name, index, bridge, mtu] if (
                names.is_interface_name(name)
                and names.is_interface_name(bridge)
                and mtu.isdecimal()
            ):
                if _is_still(name, index, host):
                    try:
                        _leave(name, bridge, int(mtu), host)
                    except MicrovmHostError as error:
                        problems.append(f"cannot take {name} off {bridge} again: {error}")
            case ["tap", name, index] if names.is_interface_name(name):
                if _is_still(name, index, host):
                    doomed[name] = int(index)
            case ["adopted", _, _]:
                pass
            case _:
                problems.append(str(record.strange(line)))
    problems += delete(doomed, host)
    if not problems:
        record.clear()
    return problems


def _leave(name: str, bridge: str, mtu: int, host: HostPaths) -> None:
    """Take an adopted tap off its bridge; it gets the MTU that it had before."""
    if _bridge_of(name, host) == bridge:
        interfaces.leave_bridge(bridge, name)
    if attribute(host.net_device(name), "mtu") != str(mtu):
        interfaces.set_mtu(name, mtu)


def _is_still(name: str, index: str, host: HostPaths) -> bool:
    """Whether a recorded link is there and is the one that was recorded."""
    found = attribute(host.net_device(name), "ifindex")
    if found is None:
        return False
    if found != index:
        log.notice(f"{name} was made anew by somebody else and is left alone")
        return False
    return True


def delete(links: dict[str, int], host: HostPaths) -> list[str]:
    """Delete links, by name with their index; gives a line for each that stayed."""
    try:
        netlink.delete_links(links.values())
    except OSError as error:
        if error.errno != ENODEV:
            log.warning(f"deleting {', '.join(links)}: {error.strerror}")
    return [
        f"interface {name} could not be deleted"
        for name, index in links.items()
        if attribute(host.net_device(name), "ifindex") == str(index)
    ]


@frozen
class CreateMacvtap:
    """A macvtap that does not exist yet."""

    macvtap: Macvtap
    identity: Identity
    host: HostPaths

    def describe(self) -> str:
        macvtap = self.macvtap
        return f"create macvtap {macvtap.name} on {macvtap.link} for {self.identity.user}"

    def apply(self, record: Record) -> None:
        macvtap = self.macvtap
        link = interface_index(macvtap.link)
        # The index is chosen here, so that it is on record before the macvtap exists: killed in
        # between, the helper leaves nothing that is not recorded.
        index = netlink.random_number()
        record.append("macvtap", macvtap.name, str(index))
        try:
            netlink.create_macvtap(
                macvtap.name,
                index,
                link=link,
                mode=macvtap.mode,
                mac=macvtap.mac,
                mtu=macvtap.mtu,
            )
        except OSError as error:
            if error.errno == EEXIST:
                _check_no_altname(macvtap.name, "the name of a macvtap", self.host)
            raise MicrovmHostError(
                f"cannot create macvtap {macvtap.name} on {macvtap.link}: {error.strerror}",
                hint=self._hint(error),
            ) from error
        # First, since udev is on its way to the node as well.
        self._hand_over_node(record)
        # Else the host would take a link-local address from the guest's own MAC address.
        _write_settings(macvtap.name, _NO_IPV6, self.host)
        set_flags(macvtap.name, IFF_UP | IFF_ALLMULTI)

    def _hint(self, error: OSError) -> str:
        if error.errno == EOPNOTSUPP:
            return "the kernel has no macvtaps: modprobe macvtap"
        if error.errno == EINVAL and self.macvtap.mtu is not None:
            return f"the MTU must not be more than that of {self.macvtap.link}"
        if error.errno == EBUSY:
            return f"{self.macvtap.link} is in use otherwise: as the port of a bridge, for instance"
        return ""

    def _hand_over_node(self, record: Record) -> None:
        node = self.host.macvtap_node(interface_index(self.macvtap.name))
        deadline = time.monotonic() + NODE_APPEARS_WITHIN
        while not os.path.exists(node):
            if time.monotonic() > deadline:
                raise MicrovmHostError(
                    f"the node of macvtap {self.macvtap.name} does not appear",
                    path=node,
                    hint="a container's /dev is not the kernel's: macvtaps need a real host",
                )
            time.sleep(0.01)
        nodes.hand_over(node, self.identity)
        # Not before: were udev the first to make it the user's, we could not set its mode any more,
        # which takes a capability that we do not have.
        record.append("node", os.path.basename(node))
        nodes.claim(os.path.basename(node), self.identity, self.host)


def plan_macvtaps(macvtaps: Iterable[Macvtap], identity: Identity, host: HostPaths) -> list[Step]:
    """What makes the macvtaps of a VM.

    Raises:
        MicrovmHostError: a name is taken, or the interface below is missing.
    """
    steps: list[Step] = []
    for macvtap in macvtaps:
        device = host.net_device(macvtap.name)
        if os.path.isdir(device):
            raise MicrovmHostError(
                f"cannot create macvtap {macvtap.name}: the name belongs to {_kind(device)}",
                hint=f"remove it: ip link del {macvtap.name}",
            )
        if not os.path.isdir(host.net_device(macvtap.link)):
            _check_no_altname(macvtap.link, f"the interface below macvtap {macvtap.name}", host)
            raise MicrovmHostError(
                f"macvtap {macvtap.name} is to stand on {macvtap.link}, which this host lacks",
                hint="`ip link` lists the interfaces",
            )
        steps.append(CreateMacvtap(macvtap, identity, host))
    return steps


def undo_macvtaps(record: Record, host: HostPaths) -> list[str]:
    """Delete the macvtaps that a record says were made; returns and clears as undo_taps."""
    problems = []
    doomed = {}
    for line in reversed(record.read()):
        match line:
            case ["node", kernel_name] if nodes.is_kernel_name(kernel_name):
                try:
                    nodes.release(kernel_name, host)
                except MicrovmHostError as error:
                    problems.append(str(error))
            case ["macvtap", name, index] if names.is_interface_name(name):
                if _is_still(name, index, host):
                    doomed[name] = int(index)
            case _:
                problems.append(str(record.strange(line)))
    problems += delete(doomed, host)
    if not problems:
        record.clear()
    return problems


def _kind(device: str) -> str:
    """What an interface is, for people: `a bridge`, `a wlan interface`, `an interface`."""
    if os.path.isdir(f"{device}/bridge"):
        return "a bridge"
    if attribute(device, "tun_flags") is not None:
        return "a tap"
    if os.path.exists(f"{device}/device"):
        return "a network card"
    uevent = attribute(device, "uevent") or ""
    for line in uevent.splitlines():
        if line.startswith("DEVTYPE="):
            return f"a {line.removeprefix('DEVTYPE=')} interface"
    return "an interface of another kind"


def _user(uid: int) -> str:
    import pwd

    try:
        return "nobody in particular" if uid == -1 else pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _group(gid: int) -> str:
    import grp

    try:
        return "any" if gid == -1 else grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def _flag_words(flags: int) -> str:
    words = [
        word
        for flag, word in ((IFF_VNET_HDR, "vnet_hdr"), (IFF_MULTI_QUEUE, "multi_queue"))
        if flags & flag
    ]
    if not flags & IFF_TAP:
        words.append("a tun")
    if not flags & IFF_NO_PI:
        words.append("with packet information")
    return " ".join(words) or "without vnet_hdr and multi_queue"
