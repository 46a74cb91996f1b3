# SPDX-License-Identifier: MIT
"""The PCI devices of the host and the VMs that have them or ask for them: behind `microvm pci`."""

from __future__ import annotations

from . import hostuse, names, pci, pcibus, runner
from .errors import MicrovmHostError, NameInvalid
from .frozen import frozen
from .pciids import Name, Names
from .record import holders
from .sysfs import entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .identity import Identity
    from .paths import HostPaths
    from .pcibus import Device


@frozen
class Row:
    """One device of the listing."""

    device: Device
    name: Name
    # Why the host needs it.
    host_uses: tuple[str, ...] = ()
    # The VM that has it now.
    holder: str | None = None
    # VMs whose packages ask for it, whether or not they run.
    wanted_by: tuple[str, ...] = ()


def rows(host: HostPaths) -> list[Row]:
    """All devices of the host, by address."""
    found = pcibus.devices(host)
    known = Names(host)
    wanted = _wanted(host)
    return [
        Row(
            device,
            known.of(device),
            tuple(hostuse.reasons(device, host)),
            next(iter(holders(host.records, pci.WHAT, ("device", device.address))), None),
            tuple(vm for vm, addresses in wanted.items() if device.address in addresses),
        )
        for device in found
    ]


def _wanted(host: HostPaths) -> dict[str, set[str]]:
    """The devices that the VMs' current packages ask for, by VM."""
    wanted = {}
    for vm in entries(host.state):
        try:
            patterns = runner.load_pci_devices(host.current(names.vm_name(vm)))
        except (MicrovmHostError, NameInvalid):
            # No VM, or one whose package is wrong, which `microvm status` tells.
            continue
        wanted[vm] = {address for each in patterns for address in pcibus.find(each, host)}
    return wanted


def as_json(row: Row) -> dict[str, Any]:
    """A device as `microvm pci --json` gives it."""
    device = row.device
    return {
        "address": device.address,
        "iommu_group": device.group,
        "vendor_id": f"{device.vendor_id:04x}",
        "device_id": f"{device.device_id:04x}",
        "class": f"{device.class_code:06x}",
        "vendor": row.name.vendor or None,
        "device": row.name.device or None,
        "kind": row.name.kind or None,
        "is_bridge": device.is_bridge,
        "driver": device.driver,
        "driver_override": device.override,
        "reset_methods": device.reset_methods.split(),
        "host_uses": list(row.host_uses),
        "holder": row.holder,
        "wanted_by": list(row.wanted_by),
    }


@frozen
class Check:
    """What a start of a VM would do about its PCI devices, and what stands against it."""

    vm: str
    # The devices that its package asks for, as it has them.
    addresses: tuple[str, ...]
    steps: tuple[str, ...] = ()
    problems: tuple[MicrovmHostError, ...] = ()
    # It runs, and has them.
    has_them: bool = False


def check(vm: str, identity: Identity, host: HostPaths) -> Check:
    """Look what a start would do; changes nothing.

    Args:
        identity: whom the VM runs as.

    Raises:
        PackageError, DeclarationError: one of these is wrong.
    """
    addresses = runner.load_pci_devices(host.current(vm))
    if vm in holders(host.records, pci.WHAT, ("device",)):
        return Check(vm, addresses, has_them=True)
    problems = pci.problems(vm, addresses, host) if addresses else []
    steps = [] if problems else pci.plan(vm, addresses, identity, host)
    return Check(vm, addresses, tuple(step.describe() for step in steps), tuple(problems))
