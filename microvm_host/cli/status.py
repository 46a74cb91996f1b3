# SPDX-License-Identifier: MIT
"""`microvm status`: all that is known of a VM, or how all of them are."""

from __future__ import annotations

import json
import os
import sys

import click

from .. import listing, pcilisting, runner
from ..errors import PackageError
from ..source import remembered
from ..sysfs import attribute
from . import emulation, jobs, table

# By what their packages have on the command line, or by default.
_ASK_FOR_MERGING = ("qemu", "cloud-hypervisor")

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from ..paths import HostPaths


def show_all(host: HostPaths, *, as_json: bool) -> None:
    """Print how many VMs are in which state, and the listing."""
    rows = listing.rows(host, neighbours=True, details=True)
    if as_json:
        click.echo(json.dumps([listing.as_json(row) for row in rows], indent=2))
        return
    counts: dict[str, int] = {}
    for row in rows:
        counts[row.status] = counts.get(row.status, 0) + 1
    if counts:
        each = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
        click.echo(f"{len(rows)} microVM{'s' if len(rows) > 1 else ''}: {each}")
    table.show(rows, host)


def show(vms: Sequence[str], host: HostPaths, *, as_json: bool, is_glob: bool) -> int:
    """Print all that is known of VMs; gives the exit code of `systemctl status` for them.

    Args:
        is_glob: JSON is an array, however many VMs there are.

    Raises:
        PackageError: the package of a VM is wrong; what its unit says was printed.
    """
    rows = listing.rows(host, tuple(vms), neighbours=True, details=True)
    if as_json:
        found = [_details(row, _package(row, host), host) for row in rows]
        click.echo(json.dumps(found if is_glob else found[0], indent=2))
        return 0
    code = 0
    for number, row in enumerate(rows):
        if number:
            click.echo()
        try:
            _print(row, _package(row, host), host)
        except PackageError:
            jobs.show_unit(row.name)
            raise
        # What systemctl prints comes after it.
        sys.stdout.flush()
        code = jobs.show_unit(row.name) or code
    return code


def _package(row: listing.Row, host: HostPaths) -> runner.Package:
    # What runs is what counts; a VM that is down shows what would run.
    return runner.load(host.booted(row.name) if row.booted else host.current(row.name))


def _details(row: listing.Row, package: runner.Package, host: HostPaths) -> dict[str, Any]:
    return {
        **listing.as_json(row),
        "hypervisor": package.hypervisor,
        "vsock_cid": package.vsock_cid,
        "readiness": jobs.readiness(row.name) or package.readiness,
        "merges_memory": _merges_memory(package, host),
        "without_kvm": emulation.reason(row.name, package, host),
        "taps": [tap.name for tap in package.taps],
        "macvtaps": [macvtap.name for macvtap in package.macvtaps],
        "pci_devices": list(package.pci_devices),
        "shares": [
            {"tag": share.tag, "source": share.source, "read_only": share.read_only}
            for share in package.shares
        ],
        "source": str(remembered(host.vm(row.name)) or "") or None,
    }


def _print(row: listing.Row, package: runner.Package, host: HostPaths) -> None:
    click.echo(listing.as_text(row, table.paint))
    readiness = jobs.readiness(row.name) or package.readiness
    emulated = emulation.reason(row.name, package, host)
    for title, value in (
        ("package", package.path),
        ("from", str(remembered(host.vm(row.name)) or "")),
        ("hypervisor", package.hypervisor),
        ("addresses", ", ".join(row.addresses)),
        ("vsock CID", package.vsock_cid),
        ("readiness", _readiness(readiness, row.active)),
        (
            "memory",
            "not merged with other VMs' memory, which it asks for: see MEMORY in microvm-host(7)"
            if _merges_memory(package, host) is False
            else "",
        ),
        ("without KVM", emulated and f"about ten times slower: {emulated}"),
        ("taps", ", ".join(tap.name for tap in package.taps)),
        ("macvtaps", ", ".join(f"{each.name} on {each.link}" for each in package.macvtaps)),
        ("PCI", ", ".join(pcilisting.in_short(each, host) for each in package.pci_devices)),
        *(
            (
                "share",
                f"{share.tag} → {share.source}"
                + (" (read-only)" if share.read_only else "")
                + (" (lost: its virtiofsd has ended)" if share.tag in row.lost else ""),
            )
            for share in package.shares
        ),
    ):
        if value:
            click.echo(f"{title:>12}: {value}")


def _merges_memory(package: runner.Package, host: HostPaths) -> bool | None:
    """Whether the kernel merges a VM's memory with equal memory of others; None if nobody asks.

    The memory of a VM with shares belongs to virtiofsd as well, and cannot be merged.
    """
    if package.hypervisor not in _ASK_FOR_MERGING or package.shares:
        return None
    return attribute(os.path.dirname(host.ksm_run), os.path.basename(host.ksm_run)) == "1"


def _readiness(readiness: str, active: str) -> str:
    """What the VM's start waits for, where that is not just its hypervisor."""
    if readiness != "guest":
        return ""
    states = {"activating": ", which is waited for", "active": ", which is ready"}
    return readiness + states.get(active, "")
