# SPDX-License-Identifier: MIT
"""The PCI devices of the host and the VMs that have them or ask for them: behind `microvm pci`."""

from __future__ import annotations

from . import hostuse, names, pci, pcibus, process, runner, systemd
from .errors import MicrovmHostError, NameInvalid
from .frozen import frozen
from .pciids import Name, Names
from .record import Record
from .sysfs import entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .identity import Identity
    from .paths import HostPaths
    from .pcibus import Device

OVERRIDE_KNOWN_WITHIN = 1.0  # seconds


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


def rows(host: HostPaths, known: Names) -> list[Row]:
    """All devices of the host, by address."""
    vms = filter(names.is_vm_name, entries(host.records))
    held = {address: vm for vm in vms for address in _has(vm, host)}
    wanted = _wanted(host)
    return [
        Row(
            device,
            known.of(device),
            # What is behind a bridge is not its own, and no VM can have one.
            () if device.is_bridge else tuple(hostuse.reasons(device, host)),
            held.get(device.address),
            tuple(vm for vm, addresses in wanted.items() if device.address in addresses),
        )
        for device in pcibus.devices(host)
    ]


def _has(vm: str, host: HostPaths) -> tuple[str, ...]:
    """The devices that a VM has, as its record says."""
    try:
        lines = Record(host.record(vm, pci.WHAT)).read()
    except MicrovmHostError:
        # Whoever undoes it will tell; the other devices are shown meanwhile.
        return ()
    return tuple(line[1] for line in lines if line[0] == "device" and len(line) > 1)


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
        "driver_override": _override(device),
        "reset_methods": device.reset_methods.split(),
        "host_uses": list(row.host_uses),
        "holder": row.holder,
        "wanted_by": list(row.wanted_by),
    }


def _override(device: Device) -> str | None:
    """The driver that somebody chose for a device; None too if the kernel does not say it now."""
    if device.driver is None:
        # Or one that does not let go of it, for which the kernel has everybody wait.
        try:
            process.call_apart(lambda: device.override, OVERRIDE_KNOWN_WITHIN, lambda seconds: None)
        except OSError:
            return None
    return device.override


def in_short(pattern: str, host: HostPaths) -> str:
    """An address or glob of a package, with the group and the driver of its device."""
    found = [pcibus.device(address, host) for address in pcibus.find(pattern, host)]
    if len(found) != 1 or (device := found[0]) is None:
        return f"{pattern} ({f'{len(found)} devices' if found else 'not there'})"
    group = f"group {device.group}" if device.group else "no group"
    return f"{device.address} ({group}, {device.driver or 'no driver'})"


@frozen
class Check:
    """What a start of a VM would do about its PCI devices, and what stands against it."""

    vm: str
    # The devices that its package asks for, in its own words.
    addresses: tuple[str, ...]
    # Those that it has now: all of them if it runs, and otherwise what it could not give back.
    has: tuple[str, ...] = ()
    is_running: bool = False
    # Whether it is giving back, at this moment, what it has.
    is_stopping: bool = False
    # What a start would do; nothing while it runs, or if something stands against it.
    steps: tuple[str, ...] = ()
    problems: tuple[MicrovmHostError, ...] = ()


def check(vm: str, identity: Identity, host: HostPaths) -> Check:
    """Look what a start would do; changes nothing.

    Args:
        identity: whom the VM runs as.

    Raises:
        PackageError, DeclarationError: one of these is wrong.
        MicrovmHostError: systemd does not answer.
    """
    addresses = runner.load_pci_devices(host.current(vm))
    has = _has(vm, host)
    is_running = is_stopping = False
    if not has:
        units = systemd.states(names.unit(vm), names.foreground_unit(vm))
        is_running = any(state in ("activating", "active") for state in units.values())
    else:
        # Its own unit, not the VM's: in the foreground that is another.
        unit = f"microvm-pci-devices@{vm}.service"
        state = systemd.states(unit).get(unit)
        if state in ("activating", "active"):
            return Check(vm, addresses, has, is_running=True)
        is_stopping = state == "deactivating"
    problems = pci.problems(vm, addresses, host) if addresses else []
    steps = pci.steps(vm, addresses, identity, host) if addresses and not problems else []
    return Check(
        vm,
        addresses,
        has,
        is_running=is_running,
        is_stopping=is_stopping,
        steps=tuple(step.describe() for step in steps),
        problems=tuple(problems),
    )
