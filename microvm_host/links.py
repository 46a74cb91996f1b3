# SPDX-License-Identifier: MIT
"""Taps and macvtaps of a VM: made for its user, recorded, and deleted again.

Taps are made by the ioctls of /dev/net/tun (kernel.org, networking/tuntap) and deleted by
rtnetlink(7), both written out here, since pyroute2 takes a tenth of a second to import; macvtaps,
which are rare and need more of netlink, use it. A link that somebody else made is never changed,
but may be adopted if it is just what the VM needs, and then stays.
"""

from __future__ import annotations

import os
import struct
import time
from _socket import AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, socket
from errno import EBUSY, ENODEV
from fcntl import ioctl

from . import log, names, nodes
from .errors import MicrovmHostError
from .frozen import frozen
from .interfaces import IFF_ALLMULTI, IFF_UP, get_flags, interface_index, join_bridge, set_flags
from .interpreter import add_distribution_packages
from .record import holders
from .sysfs import attribute

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

# linux/rtnetlink.h, linux/netlink.h, linux/if_link.h
RTM_DELLINK, RTM_SETLINK = 17, 19
NLM_F_REQUEST, NLM_F_ACK = 1, 4
IFLA_GROUP = 27

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
                raise MicrovmHostError(f"tap {name} was made by somebody else just now") from error
            raise MicrovmHostError(f"cannot create tap {name}: {error.strerror}") from error
        finally:
            os.close(tun)
        if self.tap.bridge is not None:
            join_bridge(self.tap.bridge, name)
        set_flags(name, IFF_UP)


@frozen
class AdoptTap:
    """A tap that was there before and is just what the VM needs."""

    tap: Tap

    def describe(self) -> str:
        return f"use tap {self.tap.name}, which is there already"

    def apply(self, record: Record) -> None:
        name = self.tap.name
        record.append("adopted", name, str(interface_index(name)))
        if not get_flags(name) & IFF_UP:
            record.append("raised", name)
            set_flags(name, IFF_UP)


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
        if tap.bridge is not None and not _await_bridge(f"{host.net_device(tap.bridge)}/bridge"):
            raise MicrovmHostError(
                f"tap {tap.name} is to join {tap.bridge}, which is no bridge of this host",
                hint=f"create it: ip link add {tap.bridge} type bridge",
            )
        if not os.path.isdir(host.net_device(tap.name)):
            steps.append(CreateTap(tap, identity, host))
            continue
        _check_adoptable(vm, tap, identity, host)
        steps.append(AdoptTap(tap))
    return steps


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
            case ["raised", name] if names.is_interface_name(name):
                try:
                    set_flags(name, 0, clear=IFF_UP)
                except MicrovmHostError as error:
                    if os.path.isdir(host.net_device(name)):
                        problems.append(f"cannot set {name} down: {error}")
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
    """Delete links, by name with their index; gives a line for each that stayed.

    One by one the kernel takes 20 ms a link, waiting each time until nobody uses it; a group of
    links takes as long as one. So that no other link goes with them, the group's number must
    be nobody else's.
    """
    connection = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0)
    try:
        if len(links) > 1:
            group = _unused_group(host)
            for index in links.values():
                _request(connection, RTM_SETLINK, index, group)
            _request(connection, RTM_DELLINK, 0, group)
        else:
            for index in links.values():
                _request(connection, RTM_DELLINK, index, None)
    except OSError as error:
        if error.errno != ENODEV:
            log.warning(f"deleting {', '.join(links)}: {error.strerror}")
    finally:
        connection.close()
    return [
        f"interface {name} could not be deleted"
        for name, index in links.items()
        if attribute(host.net_device(name), "ifindex") == str(index)
    ]


def _unused_group(host: HostPaths) -> int:
    device = host.net_device("")
    taken = {attribute(f"{device}{name}", "netdev_group") for name in os.listdir(device)}
    # Above what people pick by hand; our pid keeps two helpers apart.
    group = 0x6D000000 + os.getpid() % 0x1000000
    while str(group) in taken:
        group += 0x1000000
    return group


def _request(connection: socket, kind: int, index: int, group: int | None) -> None:
    """Send a message about a link and take the kernel's answer.

    Raises:
        OSError: what the kernel answered; ENODEV, when setting a group, is left out, since a
            link that has gone needs no deleting.
    """
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0)
    if group is not None:
        body += struct.pack("=HHI", 8, IFLA_GROUP, group)
    header = struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    connection.send(header + body)
    answer = connection.recv(4096)
    (code,) = struct.unpack_from("=i", answer, 16)
    if code and not (kind == RTM_SETLINK and -code == ENODEV):
        raise OSError(-code, os.strerror(-code))


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
        add_distribution_packages()
        try:
            from pyroute2 import IPRoute, NetlinkError
        except ImportError as error:
            raise MicrovmHostError(
                f"cannot import pyroute2: {error}", hint="install python3-pyroute2"
            ) from error
        macvtap = self.macvtap
        # Before, for the case that we are killed meanwhile: the address tells it from another's.
        record.append("macvtap", macvtap.name, macvtap.mac)
        try:
            with IPRoute() as netlink:
                netlink.link(
                    "add",
                    ifname=macvtap.name,
                    kind="macvtap",
                    link=interface_index(macvtap.link),
                    macvtap_mode=macvtap.mode,
                    address=macvtap.mac,
                )
        except (NetlinkError, OSError) as error:
            code = getattr(error, "code", None) or getattr(error, "errno", None) or 0
            raise MicrovmHostError(
                f"cannot create macvtap {macvtap.name} on {macvtap.link}: {os.strerror(code)}",
                hint="modprobe macvtap, if the kernel lacks it",
            ) from error
        # First, since udev is on its way to the node as well.
        self._hand_over_node(record)
        self._leave_ipv6_to_the_guest()
        set_flags(macvtap.name, IFF_UP | IFF_ALLMULTI)

    def _leave_ipv6_to_the_guest(self) -> None:
        # Else the host would take a link-local address from the guest's own MAC address.
        setting = self.host.ipv6_setting(self.macvtap.name, "disable_ipv6")
        try:
            with open(setting, "w") as target:
                target.write("1")
        except FileNotFoundError:
            # A kernel without IPv6.
            pass
        except OSError as error:
            raise MicrovmHostError(
                f"cannot switch off the host's IPv6 on {self.macvtap.name}: {error.strerror}",
                path=setting,
            ) from error

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
            case ["macvtap", name, mac] if names.is_interface_name(name):
                device = host.net_device(name)
                if not os.path.isdir(device):
                    continue
                if attribute(device, "address") == mac:
                    doomed[name] = interface_index(name)
                else:
                    log.notice(f"{name} was made anew by somebody else and is left alone")
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
