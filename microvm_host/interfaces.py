# SPDX-License-Identifier: MIT
"""Network interfaces of the host, asked and changed by the ioctls of netdevice(7).

`_socket` is what `socket` wraps; the wrapper's own imports take 7 ms of each start.
"""

from __future__ import annotations

import struct
from _socket import AF_INET, SOCK_CLOEXEC, SOCK_DGRAM, socket
from fcntl import ioctl

from .errors import MicrovmHostError

# linux/sockios.h, linux/if.h
SIOCGIFNAME, SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU = 0x8910, 0x8913, 0x8914, 0x8922
SIOCSIFNAME, SIOCSIFHWADDR, SIOCGIFINDEX = 0x8923, 0x8924, 0x8933
SIOCBRADDIF, SIOCBRDELIF = 0x89A2, 0x89A3
ARPHRD_ETHER = 1
IFF_UP, IFF_ALLMULTI = 0x1, 0x200


def interface_index(name: str) -> int:
    """The index of an interface; raises MicrovmHostError if there is none of that name."""
    return int(struct.unpack("16si20x", _interface_ioctl(SIOCGIFINDEX, name))[1])


def main_name(name: str) -> str | None:
    """The name by which sysfs has an interface, whose altname (ip-link(8)) may be given.

    None if no interface has the name or altname.
    """
    try:
        index = interface_index(name)
        found = _interface_ioctl(SIOCGIFNAME, "", struct.pack("i", index))
    except MicrovmHostError:
        return None
    return found[:16].partition(b"\0")[0].decode(errors="surrogateescape")


def get_flags(name: str) -> int:
    """The flags of an interface, such as IFF_UP; raises MicrovmHostError."""
    return int(struct.unpack("16sH22x", _interface_ioctl(SIOCGIFFLAGS, name))[1])


def set_flags(name: str, flags: int, *, clear: int = 0) -> None:
    """Set and clear flags of an interface, such as IFF_UP; raises MicrovmHostError."""
    _interface_ioctl(SIOCSIFFLAGS, name, struct.pack("H", get_flags(name) & ~clear | flags))


def join_bridge(bridge: str, name: str) -> None:
    """Make an interface a port of a bridge; raises MicrovmHostError."""
    _interface_ioctl(SIOCBRADDIF, bridge, struct.pack("i", interface_index(name)))


def leave_bridge(bridge: str, name: str) -> None:
    """Take a port out of its bridge; raises MicrovmHostError."""
    _interface_ioctl(SIOCBRDELIF, bridge, struct.pack("i", interface_index(name)))


def set_mtu(name: str, mtu: int) -> None:
    """Set the MTU of an interface; raises MicrovmHostError."""
    _interface_ioctl(SIOCSIFMTU, name, struct.pack("i", mtu))


def set_mac(name: str, mac: str) -> None:
    """Give an Ethernet interface a MAC address; raises MicrovmHostError."""
    address = bytes.fromhex(mac.replace(":", ""))
    _interface_ioctl(SIOCSIFHWADDR, name, struct.pack("H6s", ARPHRD_ETHER, address))


def rename(name: str, to: str) -> None:
    """Give an interface, which must be down, another name; raises MicrovmHostError."""
    _interface_ioctl(SIOCSIFNAME, name, to.encode())


def _interface_ioctl(request: int, name: str, argument: bytes = b"") -> bytes:
    """One of the ioctls of netdevice(7), which take a struct ifreq of 40 bytes."""
    connection = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        return ioctl(connection.fileno(), request, struct.pack("16s24s", name.encode(), argument))
    except OSError as error:
        raise MicrovmHostError(f"interface {name}: {error.strerror}") from error
    finally:
        connection.close()
