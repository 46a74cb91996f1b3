# SPDX-License-Identifier: MIT
"""What the VMs of this host have for themselves already: addresses, interfaces, disks and sockets.

Of a VM whose declaration says what its guest is like, that declaration tells: what is declared is
what comes, and two VMs may exchange what they have. Of any other the packages tell, that which
starts next and that which runs.
"""

from __future__ import annotations

import os

from . import leases, names, runner, state
from .declaration import claims, derived
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .declaration.claims import Claim, Claims
    from .paths import HostPaths


def gather(host: HostPaths) -> Claims:
    """What the VMs of this host claim; what is broken claims nothing."""
    found: Claims = {}
    guests = set()
    host_id = derived.host_id(host.machine_id)
    for name, table in claims.tables(host.declarations):
        # Others are declared by where their packages come from.
        if not {"runner", "flake"} & table.keys():
            guests.add(name)
            _add(found, name, claims.of(name, table, host_id, host))
    try:
        present = sorted(os.listdir(host.state))
    except OSError:
        present = []
    for name in present:
        if name in guests or not names.is_vm_name(name):
            continue
        if state.pointed_to(host.current(name)) is not None:
            _add(found, name, _of_package(name, host.current(name), host))
        if state.booted(name, host) is not None:
            _add(found, name, _of_package(name, host.booted(name), host))
    return found


def _add(found: Claims, name: str, more: Iterator[Claim]) -> None:
    for claim in more:
        have = found.setdefault(claim, [])
        if name not in have:
            have.append(name)


def _of_package(name: str, path: str, host: HostPaths) -> Iterator[Claim]:
    def sockets(path: str) -> list[Claim]:
        found = [share.socket for share in runner.load_shares(path)]
        control = runner.load_control_socket(path)
        found += [control.path] if control is not None else []
        return [claims.socket_claim(each, host.vm(name)) for each in found]

    def images(path: str) -> list[Claim]:
        return [
            claim
            for image in runner.load_images(path)
            for claim in claims.image_claims(
                image.path, host.vm(name), host, shared=image.read_only
            )
        ]

    for claim in (_cid, _taps, _macvtaps, sockets, images):
        yield from _unless_broken(claim, path)


def _unless_broken(claims_of: Callable[[str], list[Claim]], path: str) -> list[Claim]:
    try:
        return claims_of(path)
    except (MicrovmHostError, OSError):
        # It is told to whoever starts that one.
        return []


def _cid(path: str) -> list[Claim]:
    cid = runner.load_vsock_cid(path)
    return [] if cid is None else [(claims.CID, str(cid))]


def _taps(path: str) -> list[Claim]:
    found = [(claims.INTERFACE, tap.name) for tap in runner.load_taps(path)]
    return [*found, *((claims.MAC, mac) for mac in leases.macs(path))]


def _macvtaps(path: str) -> list[Claim]:
    found = []
    for macvtap in runner.load_macvtaps(path):
        found += [(claims.INTERFACE, macvtap.name), (claims.MAC, macvtap.mac)]
    return found
