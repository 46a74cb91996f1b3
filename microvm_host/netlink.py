# SPDX-License-Identifier: MIT
"""Links made and deleted by rtnetlink(7).

The messages are packed here, because importing pyroute2 takes a tenth of a second.
"""

from __future__ import annotations

import os
import struct
from _socket import AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, socket
from errno import ENODEV

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

# linux/rtnetlink.h, linux/netlink.h, linux/if_link.h
RTM_NEWLINK, RTM_DELLINK, RTM_SETLINK = 16, 17, 19
NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE = 0x1, 0x4, 0x200, 0x400
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_LINKINFO, IFLA_GROUP = 1, 3, 4, 5, 18, 27
IFLA_INFO_KIND, IFLA_INFO_DATA, IFLA_MACVLAN_MODE = 1, 2, 1
_MACVLAN_MODES = {"private": 1, "vepa": 2, "bridge": 4, "passthru": 8, "source": 16}


def create_macvtap(
    name: str, index: int, *, link: int, mode: str, mac: str, mtu: int | None
) -> None:
    """Make a macvtap on the interface of the index `link`.

    Args:
        index: the interface index that the macvtap gets.
        mtu: None is that of the interface below.

    Raises:
        OSError: the kernel refuses; FileExistsError if the name is taken, EBUSY if the index is.
    """
    data = _attribute(IFLA_MACVLAN_MODE, struct.pack("=I", _MACVLAN_MODES[mode]))
    kind = _attribute(IFLA_INFO_KIND, b"macvtap") + _attribute(IFLA_INFO_DATA, data)
    attributes = (
        _attribute(IFLA_IFNAME, name.encode() + b"\0")
        + _attribute(IFLA_LINK, struct.pack("=I", link))
        + _attribute(IFLA_ADDRESS, bytes.fromhex(mac.replace(":", "")))
        + (_attribute(IFLA_MTU, struct.pack("=I", mtu)) if mtu is not None else b"")
        + _attribute(IFLA_LINKINFO, kind)
    )
    connection = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0)
    try:
        request(connection, RTM_NEWLINK, index, attributes, NLM_F_CREATE | NLM_F_EXCL)
    finally:
        connection.close()


def delete_links(indexes: Collection[int]) -> None:
    """Delete links by their indexes; those that have gone need no deleting.

    One by one the kernel takes 20 ms a link, waiting each time until nobody uses it; a group of
    links takes as long as one. The group's number is drawn at random from 2^30, far above what
    people pick, so that no other link is deleted with them.

    Raises:
        OSError: what the kernel answered.
    """
    connection = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0)
    try:
        if len(indexes) == 1:
            (index,) = indexes
            request(connection, RTM_DELLINK, index)
        elif indexes:
            group = random_number()
            number = struct.pack("=I", group)
            for index in indexes:
                try:
                    request(connection, RTM_SETLINK, index, _attribute(IFLA_GROUP, number))
                except OSError as error:
                    if error.errno != ENODEV:
                        raise
            request(connection, RTM_DELLINK, 0, _attribute(IFLA_GROUP, number))
    finally:
        connection.close()


def random_number() -> int:
    """A number from 2^30 to 2^31, which nobody else uses for a group or an interface index."""
    return 0x40000000 | int.from_bytes(os.urandom(4), "big") >> 2


def request(
    connection: socket, kind: int, index: int, attributes: bytes = b"", flags: int = 0
) -> None:
    """Send a message about a link and take the kernel's answer.

    Raises:
        OSError: what the kernel answered.
    """
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + attributes
    flags |= NLM_F_REQUEST | NLM_F_ACK
    header = struct.pack("=IHHII", 16 + len(body), kind, flags, 1, 0)
    connection.sendto(header + body, (0, 0))
    answer = connection.recv(4096)
    (code,) = struct.unpack_from("=i", answer, 16)
    if code:
        raise OSError(-code, os.strerror(-code))


def _attribute(kind: int, value: bytes) -> bytes:
    """An attribute (struct rtattr), padded to four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
