# SPDX-License-Identifier: MIT
"""The PCI devices of the host as sysfs shows them, and their IOMMU groups.

Reading alone (kernel.org: ABI/testing/sysfs-bus-pci, driver-api/vfio): what may be done with a
device is for `pci`, and what the host itself does with it for `hostuse`.
"""

from __future__ import annotations

import os

from .errors import MicrovmHostError
from .frozen import frozen
from .sysfs import attribute, entries, linked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

VFIO_PCI = "vfio-pci"
# Drivers that do nothing with a device but keep others from it, so that the rest of its IOMMU
# group may be passed through (kernel.org: driver-api/vfio).
_HARMLESS = (VFIO_PCI, "pci-stub")


@frozen
class Device:
    """One function of a PCI device.

    `directory` is its own in sysfs, below which its disks and interfaces are found; `group` is its
    IOMMU group.
    """

    address: str
    directory: str
    driver: str | None = None
    group: str | None = None
    is_bridge: bool = False
    # 0xCCSSPP: class, sub-class and programming interface.
    class_code: int = 0
    vendor_id: int = 0
    device_id: int = 0

    @property
    def is_for_vms(self) -> bool:
        """Whether vfio-pci or a relative of it for this one kind of device has it."""
        return self.driver == VFIO_PCI or bool(self.vfio_names)

    @property
    def keeps_group_free(self) -> bool:
        """Whether the rest of its IOMMU group may be passed through while it stays as it is."""
        return (
            self.is_bridge
            or self.driver is None
            or self.driver in _HARMLESS
            or bool(self.vfio_names)
        )

    @property
    def override(self) -> str | None:
        """The driver that somebody chose for it, whatever its IDs.

        Read when asked for: the kernel lets nobody read it while a driver lets go of the device,
        which may take for ever, and whoever merely looks at devices is not to wait for that.
        """
        text = attribute(self.directory, "driver_override")
        # The kernel's way to write that there is none.
        return None if text in ("(null)", "") else text

    @property
    def vfio_names(self) -> list[str]:
        """What VFIO calls the device: `vfio0`, or nothing if it has not got it."""
        return entries(f"{self.directory}/vfio-dev")

    @property
    def reset_methods(self) -> str:
        """How the kernel can reset it, best first (`flr bus`); empty if it cannot."""
        methods = attribute(self.directory, "reset_method")
        if methods is None and os.path.exists(f"{self.directory}/reset"):
            # Before Linux 5.15 there was only the file that does it.
            return "yes"
        return methods or ""


def device(address: str, host: HostPaths) -> Device | None:
    """The device at a full address; None if there is none."""
    link = host.pci_device(address)
    if not os.path.exists(link):
        return None
    return Device(
        address=address,
        directory=os.path.realpath(link),
        driver=linked(link, "driver"),
        group=linked(link, "iommu_group"),
        is_bridge=_is_bridge(link),
        class_code=_number(link, "class"),
        vendor_id=_number(link, "vendor"),
        device_id=_number(link, "device"),
    )


def devices(host: HostPaths) -> list[Device]:
    """All devices of the host, by address."""
    found = (device(address, host) for address in addresses(host))
    return [each for each in found if each is not None]


def addresses(host: HostPaths) -> list[str]:
    """The addresses of all devices, in the order of their numbers."""
    return sorted(entries(host.pci_device("")), key=_numbers)


def find(pattern: str, host: HostPaths) -> list[str]:
    """The addresses that a checked address or a glob of one stands for.

    Each field is a number, so that `0000:01:00.0` and `00000:01:00.0` are one device.
    """
    if "*" not in pattern and os.path.exists(host.pci_device(pattern)):
        return [pattern]
    wanted = _fields(pattern)
    return [
        address
        for address in addresses(host)
        if all(
            want == "*" or int(want, 16) == int(have, 16)
            for want, have in zip(wanted, _fields(address), strict=True)
        )
    ]


def group_mates(group: str, host: HostPaths) -> list[Device]:
    """All devices of an IOMMU group, bridges too."""
    found = (device(address, host) for address in entries(f"{host.iommu_groups}/{group}/devices"))
    return [each for each in found if each is not None]


def has_iommu(host: HostPaths) -> bool:
    return any(not is_unprotected(group, host) for group in entries(host.iommu_groups))


def is_unprotected(group: str, host: HostPaths) -> bool:
    """Whether VFIO made a group up for a device that is behind no IOMMU.

    So it does where somebody set its option `enable_unsafe_noiommu_mode` (drivers/vfio/group.c).
    """
    return attribute(f"{host.iommu_groups}/{group}", "name") == "vfio-noiommu"


def no_iommu(host: HostPaths) -> MicrovmHostError:
    """The error for a host without an IOMMU, which says what is missing of it.

    The firmware announces an IOMMU by an ACPI table: DMAR for Intel's VT-d, IVRS for AMD's.
    """
    tables = entries(host.acpi_tables)
    try:
        with open(host.kernel_command_line, encoding="utf-8", errors="replace") as source:
            options = source.read().split()
    except OSError:
        options = []
    switched_off = [
        option for option in options if option in ("intel_iommu=off", "amd_iommu=off", "iommu=off")
    ]
    is_asked_for = any(
        option.startswith("intel_iommu=") and "on" in option.partition("=")[2].split(",")
        for option in options
    )
    if os.path.exists(host.container):
        hint = "this is a container: run the VM on the machine outside"
    elif switched_off:
        hint = f"remove {switched_off[0]} from the kernel's command line and reboot"
    elif "DMAR" in tables and is_asked_for:
        hint = (
            "the firmware has one and intel_iommu=on is given: `dmesg | grep -i -e dmar -e iommu` "
            "says why it is not used"
        )
    elif "DMAR" in tables:
        hint = "add intel_iommu=on to the kernel's command line and reboot"
    elif "IVRS" in tables:
        hint = "the firmware has one: `dmesg | grep -i -e iommu -e AMD-Vi` says why it is not used"
    else:
        hint = "switch on VT-d (Intel), the IOMMU (AMD) or the SMMU (Arm) in the firmware"
    return MicrovmHostError(
        "this host has no IOMMU in use, without which no device can be passed through",
        path=host.iommu_groups,
        hint=hint,
    )


def _is_bridge(directory: str) -> bool:
    """Whether the header is of a bridge's kind: bits 0 to 6 of byte 14 (PCI Local Bus 3.0, 6.1).

    By the header, as the kernel does when it judges a group: the class also calls host bridges
    and chipsets bridges, which are devices with drivers of their own.
    """
    try:
        with open(f"{directory}/config", "rb") as source:
            header = source.read(15)
    except OSError:
        return False
    return len(header) == 15 and header[14] & 0x7F in (1, 2)


def _number(directory: str, name: str) -> int:
    try:
        return int(attribute(directory, name) or "0", 16)
    except ValueError:
        return 0


def _fields(address: str) -> list[str]:
    return address.replace(".", ":").split(":")


def _numbers(address: str) -> list[int]:
    try:
        return [int(field, 16) for field in _fields(address)]
    except ValueError:
        return []
