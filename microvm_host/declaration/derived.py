# SPDX-License-Identifier: MIT
"""What a declaration leaves out and is derived from names: the same each time on one host.

Two hosts may have a VM of the same name on one network, so that MAC addresses and machine IDs are
also derived from the host's machine-id(5), which a hash keeps secret. Others are not: a vsock CID
is known to its host alone, and another instance ID would have cloud-init set up a guest again that
was moved.

Whether somebody else has a value already is for `claims` to find out.
"""

from __future__ import annotations

from hashlib import sha256

from ..names import is_socket_path, machine_uuid
from ..paths import HostPaths

# Small ones are what people give by hand.
_CID_LOWEST = 1 << 16
_CID_HIGHEST = (1 << 31) - 1


def host_id(path: str) -> str:
    """The host's machine-id, from its file; empty for a host without one."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(64).strip()
    except FileNotFoundError:
        return ""


def mac(vm: str, interface: str, host: str = "") -> str:
    """A MAC address: locally administered, and no multicast address (IEEE 802, 8.2).

    Args:
        host: the host's ID.
    """
    digest = sha256(_on(host, f"mac\0{vm}\0{interface}")).digest()
    return ":".join(f"{byte:02x}" for byte in (0x02, *digest[:5]))


def cid(vm: str) -> int:
    """A vsock CID (vsock(7))."""
    number = int.from_bytes(sha256(f"cid\0{vm}".encode()).digest()[:8], "big")
    return _CID_LOWEST + number % (_CID_HIGHEST - _CID_LOWEST + 1)


def machine_id(vm: str, host: str = "") -> str:
    """A UUID, of no version of RFC 9562. Without a host's ID it is the one of microvm.nix.

    Args:
        host: the host's ID.
    """
    return machine_uuid(sha256(_on(host, f"microvm.nix:{vm}")).hexdigest()[:32])


def _on(host: str, text: str) -> bytes:
    return (f"{text}\0{host}" if host else text).encode()


def instance_id(vm: str) -> str:
    """What cloud-init tells instances apart by: another one sets the guest up anew."""
    return f"iid-{vm}"


def share_socket(vm: str, tag: str) -> str:
    """The socket between the hypervisor and virtiofsd, as microvm.nix names it.

    Long names make a path that no socket can have: then a digest takes their place.
    """
    name = f"{vm}-virtiofs-{tag}.sock"
    if is_socket_path(f"{HostPaths().vm(vm)}/{name}"):
        return name
    return f"virtiofs-{sha256(f'{vm}/{tag}'.encode()).hexdigest()[:10]}.sock"
