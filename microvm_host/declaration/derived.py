# SPDX-License-Identifier: MIT
"""What a declaration leaves out and is made of names: the same each time, and on each host.

Whether somebody else has it already is for `claims` to find out.
"""

from __future__ import annotations

from hashlib import sha256

from ..names import machine_uuid

# Small ones are what people give by hand.
_CID_LOWEST = 1 << 16
_CID_HIGHEST = (1 << 31) - 1


def mac(vm: str, interface: str) -> str:
    """A MAC address: locally administered, and no multicast address (IEEE 802, 8.2)."""
    digest = sha256(f"mac\0{vm}\0{interface}".encode()).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def cid(vm: str) -> int:
    """A vsock CID (vsock(7))."""
    number = int.from_bytes(sha256(f"cid\0{vm}".encode()).digest()[:8], "big")
    return _CID_LOWEST + number % (_CID_HIGHEST - _CID_LOWEST + 1)


def machine_id(vm: str) -> str:
    """A UUID, as microvm.nix makes it of the host name (its options.nix, machineId).

    Of no version of RFC 9562, but a guest that was made there keeps its machine ID.
    """
    return machine_uuid(sha256(f"microvm.nix:{vm}".encode()).hexdigest()[:32])


def instance_id(vm: str) -> str:
    """What cloud-init tells instances apart by: another one sets the guest up anew."""
    return f"iid-{vm}"


def share_socket(vm: str, tag: str) -> str:
    """The socket between the hypervisor and virtiofsd, as microvm.nix names it."""
    return f"{vm}-virtiofs-{tag}.sock"
