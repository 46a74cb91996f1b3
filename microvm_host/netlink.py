# SPDX-License-Identifier: MIT
"""Links made and deleted by rtnetlink(7).

Macvtaps, which are rare and need more of netlink, are made by pyroute2. Messages that delete links
are packed here: each stop of a VM with a tap sends one, and importing pyroute2 takes a tenth of a
second.
"""

from __future__ import annotations

import os
import struct
from _socket import AF_NETLINK, SOCK_CLOEXEC, SOCK_RAW, socket
from errno import ENODEV

from .errors import MicrovmHostError
from .interpreter import add_distribution_packages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

# linux/rtnetlink.h, linux/netlink.h, linux/if_link.h
RTM_DELLINK, RTM_SETLINK = 17, 19
NLM_F_REQUEST, NLM_F_ACK = 0x1, 0x4
IFLA_GROUP = 27


def create_macvtap(
    name: str, index: int, *, link: int, mode: str, mac: str, mtu: int | None
) -> None:
    """Make a macvtap on the interface of the index `link`.

    Args:
        index: the interface index that the macvtap gets.
        mtu: None is that of the interface below.

    Raises:
        OSError: the kernel refuses; FileExistsError if the name is taken, EBUSY if the index is.
        MicrovmHostError: pyroute2 is missing.
    """
    add_distribution_packages()
    try:
        from pyroute2 import IPRoute, NetlinkError
    except ImportError as error:
        raise MicrovmHostError(
            f"cannot import pyroute2: {error}", hint="install python3-pyroute2"
        ) from error
    more = {} if mtu is None else {"mtu": mtu}
    try:
        with IPRoute() as connection:
            connection.link(
                "add",
                index=index,
                ifname=name,
                kind="macvtap",
                link=link,
                macvtap_mode=mode,
                address=mac,
                **more,
            )
    except NetlinkError as error:
        # It is no OSError, and has no errno, before pyroute2 0.8.
        raise OSError(error.code, os.strerror(error.code)) from error


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


def request(connection: socket, kind: int, index: int, attributes: bytes = b"") -> None:
    """Send a message about a link and take the kernel's answer.

    Raises:
        OSError: what the kernel answered.
    """
    body = struct.pack("=BxHiII", 0, 0, index, 0, 0) + attributes
    header = struct.pack("=IHHII", 16 + len(body), kind, NLM_F_REQUEST | NLM_F_ACK, 1, 0)
    connection.sendto(header + body, (0, 0))
    answer = connection.recv(4096)
    (code,) = struct.unpack_from("=i", answer, 16)
    if code:
        raise OSError(-code, os.strerror(-code))


def _attribute(kind: int, value: bytes) -> bytes:
    """An attribute (struct rtattr), padded to four bytes."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
