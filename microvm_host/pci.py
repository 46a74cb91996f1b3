# SPDX-License-Identifier: MIT
"""PCI devices of a VM: taken from their drivers for vfio-pci, and given back.

Everything is checked before anything is touched: that each device is there and is one, that the
host does not use it, that no other VM has it, that its driver can be made to let go, and that
the rest of its IOMMU group keeps still, since VFIO hands out whole groups (kernel.org,
driver-api/vfio). What a device was before stands in the record, from which it becomes that again.
"""

from __future__ import annotations

import os
import time
from errno import EBUSY, ETIMEDOUT

from . import hostuse, log, names, nodes, pci_lock, pcibus, process, reborn
from .errors import MicrovmHostError, NameInvalid
from .frozen import frozen
from .pcibus import VFIO_PCI, Device
from .record import Record, holders
from .sysfs import attribute, linked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from .identity import Identity
    from .paths import HostPaths
    from .plan import Step

WHAT = "pci-devices"
# A note of the helper that could not give all of them back, for the one that follows it.
FAILED = "pci-devices-failed"

# A driver may wait for whoever uses its device before it lets go, without an end of its own.
LETS_GO_WITHIN = 30.0  # seconds
# Cards that start their firmware when they are probed take that long.
TAKES_WITHIN = 60.0  # seconds
NODE_APPEARS_WITHIN = 5.0  # seconds

_ASK_THE_KERNEL = "`journalctl -k` may have the kernel's reason"


class InUse(MicrovmHostError):
    """A device that another VM has: `holder`."""

    def __init__(self, message: str, holder: str) -> None:
        super().__init__(
            message,
            hint=f"stop that one first: systemctl stop microvm@{holder}.service; if it is down, "
            "`microvm reconcile --apply` gives back what it left",
        )
        self.holder = holder


class _Hangs(MicrovmHostError):
    """The kernel works on a device still, and keeps it locked."""


def recorded_addresses(record: Record) -> list[str]:
    """The PCI devices that a record says were taken."""
    lines = record.read()
    return [line[1] for line in lines if line[0] == "device" and _is_address("".join(line[1:2]))]


# ---- checking


def problems(vm: str, addresses: Iterable[str], host: HostPaths) -> list[MicrovmHostError]:
    """All that stands against giving a VM these devices; nothing is changed.

    Args:
        addresses: checked addresses or globs, as the package has them.

    Raises:
        DeclarationError: the VM's declaration, which may allow what the host uses, is wrong.
    """
    found: list[MicrovmHostError] = []
    if not pcibus.has_iommu(host):
        return [pcibus.no_iommu(host)]
    devices: list[Device] = []
    for address in addresses:
        try:
            devices.append(_one(address, host))
        except MicrovmHostError as error:
            found.append(error)
    if _lacks_vfio(devices, host):
        try:
            # Without loading it.
            process.output(["modprobe", "-n", "-q", VFIO_PCI])
        except MicrovmHostError as error:
            # Who is not root may not have the program in $PATH, and cannot tell.
            if not isinstance(error.__cause__, OSError):
                found.append(_no_module(str(error)))
    mine = set[str]()
    for device in devices:
        if device.address in mine:
            found.append(
                MicrovmHostError(
                    f"{device.address} is asked for twice", hint="a glob stands for it too, perhaps"
                )
            )
        mine.add(device.address)
        found += _problems_of(device, vm, host)
    for group in _groups(devices):
        for mate in pcibus.group_mates(group, host):
            if mate.address not in mine:
                found += _problems_of_mate(mate, group, vm, host)
    return found


def _lacks_vfio(devices: Iterable[Device], host: HostPaths) -> bool:
    """Whether the driver is needed and not there, as before anything used it since boot."""
    return not os.path.isdir(host.pci_driver(VFIO_PCI)) and any(
        not device.is_for_vms for device in devices
    )


def _no_module(said: str) -> MicrovmHostError:
    return MicrovmHostError(
        f"the running kernel {os.uname().release} has no module {VFIO_PCI} that can be loaded: "
        f"{said}",
        hint="if the kernel was upgraded, reboot into the new one; otherwise install the package "
        "with its modules",
    )


def _one(pattern: str, host: HostPaths) -> Device:
    """The one device that an address or a glob stands for."""
    matches = pcibus.find(pattern, host)
    if len(matches) > 1:
        raise MicrovmHostError(
            f"{pattern} stands for {len(matches)} PCI devices: {', '.join(matches)}",
            hint="give one of these",
        )
    device = pcibus.device(matches[0], host) if matches else None
    if device is None:
        raise MicrovmHostError(
            f"there is no PCI device {pattern}",
            path=host.pci_device(pattern),
            hint="`microvm pci` lists the devices of this host",
        )
    return device


def _problems_of(device: Device, vm: str, host: HostPaths) -> list[MicrovmHostError]:
    found: list[MicrovmHostError] = []
    address = device.address
    if device.is_bridge:
        return [
            MicrovmHostError(
                f"{address} is a bridge, which no VM can have",
                hint="pass through the devices behind it",
            )
        ]
    if device.group is None or pcibus.is_unprotected(device.group, host):
        return [
            MicrovmHostError(
                f"{address} is in no IOMMU group: the IOMMU does not translate for it",
                path=device.directory,
                hint="try another slot, or a newer firmware",
            )
        ]
    holder = _holder(address, vm, host)
    if holder is not None:
        return [InUse(f"{address} is in use by microVM {holder}", holder)]
    if device.is_for_vms:
        if _is_open(device.group, host):
            found.append(
                MicrovmHostError(
                    f"{address} is in use by a program that is none of ours",
                    path=host.vfio_group_node(device.group),
                    hint=f"fuser -v {host.vfio_group_node(device.group)}",
                )
            )
        return found
    reasons = hostuse.reasons(device, host)
    if reasons and address not in _allowed(vm, host):
        found.append(
            MicrovmHostError(
                f"{address} is not given away, since this host uses it: {'; '.join(reasons)}",
                hint=f'allow_host_devices = ["{address}"] in {host.declaration(vm)} allows it '
                "all the same",
            )
        )
    if device.driver is not None and not os.path.exists(f"{host.pci_driver(device.driver)}/unbind"):
        found.append(
            MicrovmHostError(
                f"{address} is held by driver {device.driver}, which never lets go of a device",
                path=host.pci_driver(device.driver),
                hint=f"keep the driver from it: vfio-pci.ids={device.vendor_id:04x}:"
                f"{device.device_id:04x} on the kernel's command line",
            )
        )
    return found


def _allowed(vm: str, host: HostPaths) -> tuple[str, ...]:
    """The devices that the administrator gives to a VM although the host uses them."""
    if not os.path.exists(host.declaration(vm)):
        return ()
    # Not before, since reading TOML takes longer than all else: devices in use are rare.
    from . import declaration

    return declaration.load(host.declaration(vm)).allow_host_devices


def _problems_of_mate(mate: Device, group: str, vm: str, host: HostPaths) -> list[MicrovmHostError]:
    holder = _holder(mate.address, vm, host)
    if holder is not None:
        return [
            InUse(
                f"IOMMU group {group} cannot be taken: {mate.address} in it is in use by microVM "
                f"{holder}",
                holder,
            )
        ]
    if mate.is_for_vms and _is_open(group, host):
        # It alone may open the group, as long as it does.
        return [
            MicrovmHostError(
                f"IOMMU group {group} cannot be taken: {mate.address} in it is in use by a "
                "program that is none of ours",
                path=host.vfio_group_node(group),
                hint=f"fuser -v {host.vfio_group_node(group)}",
            )
        ]
    if mate.keeps_group_free:
        return []
    return [
        MicrovmHostError(
            f"IOMMU group {group} cannot be taken: {mate.address} in it is in use by the host's "
            f"driver {mate.driver}",
            path=f"{host.iommu_groups}/{group}/devices",
            hint="a group goes to one VM as a whole: pass that one through as well, or put the "
            "card into another slot",
        )
    ]


def _holder(address: str, vm: str, host: HostPaths) -> str | None:
    """Another VM that has a device."""
    others = (each for each in holders(host.records, WHAT, ("device", address)) if each != vm)
    return next(others, None)


def _is_open(group: str, host: HostPaths) -> bool:
    """Whether somebody uses an IOMMU group: the kernel lets one at a time open its node."""
    try:
        os.close(os.open(host.vfio_group_node(group), os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == EBUSY
    return False


def _groups(devices: Iterable[Device]) -> list[str]:
    """The IOMMU groups of devices, each once, in their order."""
    return list(dict.fromkeys(each.group for each in devices if each.group is not None))


# ---- planning


def plan(
    vm: str,
    addresses: Sequence[str],
    identity: Identity,
    host: HostPaths,
) -> list[Step]:
    """What gives a VM its devices, checked.

    Args:
        identity: whose the devices' nodes become.

    Raises:
        MicrovmHostError: something stands against it. If it is more than one thing, the others
            are logged; InUse is raised if nothing but another VM does.
    """
    if not addresses:
        return []
    found = problems(vm, addresses, host)
    if found:
        # What waiting for another VM would not mend comes first.
        found.sort(key=lambda error: isinstance(error, InUse))
        for other in found[1:]:
            log.error(str(other), vm=vm)
        raise found[0]
    return steps(vm, addresses, identity, host)


def steps(
    vm: str,
    addresses: Sequence[str],
    identity: Identity,
    host: HostPaths,
) -> list[Step]:
    """What gives a VM its devices, against which nothing stands; see plan."""
    devices = [_one(address, host) for address in addresses]
    # What it could not give back when it stopped.
    lines = Record(host.record(vm, WHAT)).read()
    former = {line[1]: line[2] for line in lines if line[0] == "device" and len(line) > 2}
    found: list[Step] = []
    if _lacks_vfio(devices, host):
        found.append(LoadVfio(host))
    found += [Take(device, host, former.get(device.address)) for device in devices]
    for group in _groups(devices):
        inside = tuple(device for device in devices if device.group == group)
        found.append(HandOver(group, inside, identity, host))
    return found


@frozen
class LoadVfio:
    """The kernel's module, which is not loaded yet and stays."""

    host: HostPaths

    def describe(self) -> str:
        return "load the kernel module vfio-pci"

    def apply(self, record: Record) -> None:
        try:
            # The unit has no standard error in which it could say why.
            process.output(["modprobe", VFIO_PCI], errors=True)
        except MicrovmHostError as error:
            raise _no_module(str(error)) from error


@frozen
class Take:
    """A device, to be bound to vfio-pci, or left there if it is."""

    device: Device
    host: HostPaths
    # The driver that it goes back to by the VM's record of before; `` for none.
    former: str | None = None

    def describe(self) -> str:
        device = self.device
        if device.is_for_vms and self.former not in (None, device.driver):
            return (
                f"use {device.address}, which {device.driver} has still, and give it back to "
                f"{self.former or 'no driver'} when the VM stops"
            )
        if device.is_for_vms:
            return f"use {device.address}, which {device.driver} has already, and leave it there"
        former = f", now {device.driver}'s" if device.driver else ""
        return f"bind {device.address} to {VFIO_PCI}{former}"

    def apply(self, record: Record) -> None:
        device, host = self.device, self.host
        link = host.pci_device(device.address)
        # Of a start before this one, a driver may not have let go yet.
        _await_settled(device.address, host)
        interfaces = reborn.to_fields(device, host)
        # What could not be undone once is still written down as it was before.
        if not any(line[:2] == ["device", device.address] for line in record.read()):
            record.append(
                "device",
                device.address,
                device.driver or "",
                device.override or "",
                *interfaces,
            )
        if device.is_for_vms:
            return
        _write(f"{link}/driver_override", VFIO_PCI)
        if device.driver is not None:
            _unbind(device.address, device.driver, host)
        _have_bound(host.pci_probe, device.address, VFIO_PCI)
        driver = linked(link, "driver")
        if driver != VFIO_PCI:
            raise MicrovmHostError(
                f"{VFIO_PCI} did not take {device.address}, which {driver or 'no driver'} has now",
                path=link,
                hint=_ASK_THE_KERNEL,
            )


@frozen
class HandOver:
    """The nodes by which the hypervisor gets at its devices of one IOMMU group."""

    group: str
    devices: tuple[Device, ...]
    identity: Identity
    host: HostPaths

    def describe(self) -> str:
        return f"give {self.host.vfio_group_node(self.group)} to {self.identity.user}"

    def apply(self, record: Record) -> None:
        _hand_over(
            self.group, self.host.vfio_group_node(self.group), self.identity, self.host, record
        )
        for device in self.devices:
            for name in device.vfio_names:
                # The newer way in, a node a device: there if the kernel was built for it.
                if attribute(f"{device.directory}/vfio-dev/{name}", "dev") is not None:
                    _hand_over(
                        name, self.host.vfio_device_node(name), self.identity, self.host, record
                    )


def _hand_over(
    kernel_name: str, node: str, identity: Identity, host: HostPaths, record: Record
) -> None:
    _await(node)
    former = os.stat(node)
    record.append(
        "node", kernel_name, node, str(former.st_uid), str(former.st_gid), f"{former.st_mode:o}"
    )
    nodes.claim(kernel_name, identity, host)
    nodes.hand_over(node, identity)


def _await(node: str) -> None:
    deadline = time.monotonic() + NODE_APPEARS_WITHIN
    while not os.path.exists(node):
        if time.monotonic() > deadline:
            raise MicrovmHostError(
                "this node of VFIO does not appear",
                path=node,
                hint="a container's /dev is not the kernel's: PCI devices need a real host",
            )
        time.sleep(0.01)


# ---- giving back


def undo(record: Record, host: HostPaths) -> list[str]:
    """Give devices back to the drivers they had, as a record says.

    Returns:
        What could not be undone, a line each; the record keeps that, and nothing else.
    """
    found, kept = [], []
    lines = record.read()
    # The IOMMU groups that somebody uses still, though he was waited for.
    in_use = set[str]()
    for line in _undone_in_order(lines):
        try:
            match line:
                case ["device", address, driver, override, up, down, *marks] if (
                    _is_address(address)
                    and _is_driver(driver)
                    and _is_driver(override)
                    and (interfaces := reborn.from_fields(up, down, *marks)) is not None
                ):
                    found += _give_back(
                        address, driver, override, interfaces, in_use, record.vm, host
                    )
                case ["node", name, node, uid, gid, mode] if (
                    nodes.is_kernel_name(name)
                    and node in (host.vfio_group_node(name), host.vfio_device_node(name))
                    and uid.isdecimal()
                    and gid.isdecimal()
                    and set() < set(mode) <= set("01234567")
                ):
                    _take_back_node(name, node, uid, gid, mode, host=host)
                case _:
                    raise record.strange(line)
        except OSError as error:
            found.append(f"{line[1]}: {error.filename or ''}: {error.strerror}")
            kept.append(line)
        except MicrovmHostError as error:
            found.append(str(error))
            kept.append(line)
    # The others are free for whoever wants them.
    record.keep([line for line in lines if line in kept])
    return found


def _undone_in_order(lines: list[list[str]]) -> list[list[str]]:
    """The nodes, and then the devices by their addresses, as at boot.

    The kernel counts interfaces up as they come, and where udev does not rename them, they are to
    come in the same order.
    """
    devices = [line for line in lines if line[0] == "device"]
    return [
        *(line for line in reversed(lines) if line[0] != "device"),
        *sorted(devices, key=lambda line: line[1:2]),
    ]


def _is_address(text: str) -> bool:
    try:
        return names.pci_address(text) == text and "*" not in text
    except NameInvalid:
        return False


def _is_driver(text: str) -> bool:
    """Whether it may be the name of a driver, which is one of a directory; none is ``."""
    return "/" not in text and text not in (".", "..") and text.isprintable()


def _take_back_node(
    kernel_name: str, node: str, uid: str, gid: str, mode: str, *, host: HostPaths
) -> None:
    nodes.release(kernel_name, host)
    # It goes away with the last device of the group; if it stays, it was there before.
    try:
        os.chown(node, int(uid), int(gid))
        os.chmod(node, int(mode, 8) & 0o7777)
    except FileNotFoundError:
        pass


def _give_back(
    address: str,
    driver: str,
    override: str,
    interfaces: list[reborn.Interface],
    in_use: set[str],
    vm: str,
    host: HostPaths,
) -> list[str]:
    """Have a device in the hands of its former driver; of none, if it had none.

    A device that is gone, or that somebody else has taken, is left alone.

    Args:
        interfaces: its network interfaces, which are to be as before.
        in_use: IOMMU groups that are not waited for any more, to which this one's may be added.

    Returns:
        What of the interfaces is not as before, a line each. The device is nobody's then: another
        VM may have it, and waiting for an interface that stays away helps nobody.
    """
    link = host.pci_device(address)
    if not os.path.isdir(link):
        log.notice(f"{address} is there no more, and so not given back", vm=vm)
        return []
    _await_settled(address, host)
    now = linked(link, "driver") or ""
    # Killed at any point, taking leaves no other driver than these.
    if now not in ("", driver, VFIO_PCI):
        log.notice(f"{address} was taken by somebody else for {now} and is left alone", vm=vm)
        return []
    if now == driver:
        _set_override(link, override)
        with pci_lock.Naming(host, is_needed=bool(interfaces)):
            return reborn.restore(address, interfaces, host)
    # A driver is bound if the override names it or, without one, by its IDs: it may have been bound
    # while another override stood there, which only then was changed to the former one.
    _set_override(link, driver or override)
    if now == VFIO_PCI:
        _await_closed(address, in_use, host)
    if now:
        _unbind(address, now, host)
    if not driver:
        return []
    with pci_lock.Naming(host, is_needed=bool(interfaces)):
        try:
            _bind(address, driver, vm, host)
        except _Hangs:
            # Who wrote the override now would wait as well.
            raise
        except MicrovmHostError:
            _set_override(link, override)
            raise
        _set_override(link, override)
        return reborn.restore(address, interfaces, host)


def _set_override(link: str, override: str) -> None:
    if attribute(link, "driver_override") != (override or "(null)"):
        _write(f"{link}/driver_override", override or "\n")


def _bind(address: str, driver: str, vm: str, host: HostPaths) -> None:
    """Have a driver take a device that has none, and whose override names it."""
    link = host.pci_device(address)
    try:
        _have_bound(f"{host.pci_driver(driver)}/bind", address, driver)
    except _Hangs:
        raise
    except MicrovmHostError:
        # Its module went away meanwhile, or it wants to be found, as at boot.
        _load_driver(driver, link, vm, host)
        _have_bound(host.pci_probe, address, driver)
    now = linked(link, "driver") or ""
    if now != driver:
        raise MicrovmHostError(
            f"{address} was not taken back by driver {driver}; {now or 'none'} has it",
            path=link,
            hint=f"echo {address} > {host.pci_driver(driver)}/bind, or reboot",
        )


def _await_settled(address: str, host: HostPaths) -> None:
    """Wait until a driver that was about to take a device, or let go of it, has done so.

    Until then the kernel holds the device's lock, on which whoever reads or writes
    `driver_override` waits, where no signal reaches him.
    """
    link = host.pci_device(address)
    try:
        process.call_apart(
            lambda: attribute(link, "driver_override"),
            LETS_GO_WITHIN,
            lambda seconds: log.waiting(
                f"waiting until a driver has taken or let go of {address}, {seconds:.0f} s"
            ),
        )
    except OSError as error:
        # The link is there before the driver probes, and gone before it lets go.
        driver = linked(link, "driver")
        if driver is not None:
            raise _Hangs(
                f"driver {driver} has still not done with taking {address}",
                path=link,
                hint=_ASK_THE_KERNEL,
            ) from error
        raise _Hangs(
            f"the driver that {address} had has still not let go of it",
            path=link,
            hint=_ASK_THE_KERNEL,
        ) from error


def _await_closed(address: str, in_use: set[str], host: HostPaths) -> None:
    """Wait until nobody uses a device by VFIO any more; once for all devices of a group.

    Taken away before that, vfio-pci waits in the kernel where no signal reaches the writer.
    """
    group = linked(host.pci_device(address), "iommu_group")
    if group is None or not _is_open(group, host):
        return
    if group not in in_use:
        for _ in pci_lock.patiently(LETS_GO_WITHIN, f"waiting until nothing uses {address}"):
            if not _is_open(group, host):
                return
    in_use.add(group)
    node = host.vfio_group_node(group)
    raise MicrovmHostError(
        f"{address} is still in use after {LETS_GO_WITHIN:.0f} s, and so not given back",
        path=node,
        hint=f"`fuser -v {node}` shows by whom",
    )


def _load_driver(driver: str, link: str, vm: str, host: HostPaths) -> None:
    """Load the module of a driver that is not there; by its name if not for the device's IDs."""
    for module in (attribute(link, "modalias"), driver):
        if module and not os.path.isdir(host.pci_driver(driver)):
            try:
                process.output(["modprobe", "--", module], errors=True)
            except MicrovmHostError as error:
                log.warning(str(error), vm=vm)


# ---- writing to sysfs


def _write(path: str, text: str) -> None:
    """Write to an attribute; raises MicrovmHostError, naming it and the text."""
    try:
        _put(path, text)
    except OSError as error:
        raise _refused(path, text, error) from error


def _refused(path: str, text: str, error: OSError) -> MicrovmHostError:
    return MicrovmHostError(
        f"cannot write {text.strip()!r}: {error.strerror}", path=path, hint=_ASK_THE_KERNEL
    )


def _unbind(address: str, driver: str, host: HostPaths) -> None:
    """Take a device from a driver; raises MicrovmHostError, also if that does not let go."""
    path = f"{host.pci_driver(driver)}/unbind"
    try:
        # Apart, since the kernel waits for the driver for as long as that takes.
        process.call_apart(
            lambda: _put(path, address),
            LETS_GO_WITHIN,
            lambda seconds: log.waiting(
                f"waiting for {driver} to let go of {address}, {seconds:.0f} s"
            ),
        )
    except OSError as error:
        took = f" within {LETS_GO_WITHIN:.0f} s" if error.errno == ETIMEDOUT else ""
        raise MicrovmHostError(
            f"driver {driver} does not let go of {address}{took}: {error.strerror}",
            path=path,
            hint=_ASK_THE_KERNEL,
        ) from error


def _have_bound(path: str, address: str, driver: str) -> None:
    """Have a driver take a device, by writing to `bind` or `drivers_probe`.

    Raises:
        _Hangs: it has not done so in time, and may do so yet.
        MicrovmHostError: the kernel refuses.
    """
    waited = 0.0

    def wait(seconds: float) -> None:
        nonlocal waited
        waited = seconds
        log.waiting(f"waiting for {driver} to take {address}, {seconds:.0f} s")

    try:
        # Apart, since the kernel waits for the driver for as long as that takes.
        process.call_apart(lambda: _put(path, address), TAKES_WITHIN, wait)
    except OSError as error:
        # A driver may say ETIMEDOUT itself.
        if error.errno == ETIMEDOUT and waited >= TAKES_WITHIN:
            raise _Hangs(
                f"driver {driver} has not taken {address} within {TAKES_WITHIN:.0f} s",
                path=path,
                hint=_ASK_THE_KERNEL,
            ) from error
        raise _refused(path, address, error) from error


def _put(path: str, text: str) -> None:
    target = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(target, text.encode())
    finally:
        os.close(target)
