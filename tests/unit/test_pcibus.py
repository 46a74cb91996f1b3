# SPDX-License-Identifier: MIT
"""PCI devices and IOMMU groups, as they are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from microvm_host import pcibus
from microvm_host.paths import HostPaths

from .sysfs_trees import BRIDGE, ISA_BRIDGE, Sysfs


def test_device(sysfs: Sysfs) -> None:
    directory = sysfs.device("0000:03:00.0", "e1000e", 7, ids=(0x8086, 0x15B8))
    found = pcibus.device("0000:03:00.0", sysfs.host)
    assert found == pcibus.Device(
        address="0000:03:00.0",
        directory=str(directory),
        driver="e1000e",
        group="7",
        is_bridge=False,
        class_code=0x020000,
        vendor_id=0x8086,
        device_id=0x15B8,
    )
    assert found.override is None
    assert found.reset_methods == "flr bus"
    assert found.vfio_names == []
    assert not found.is_for_vms
    assert not found.keeps_group_free


def test_device_that_is_not_there(sysfs: Sysfs) -> None:
    assert pcibus.device("0000:03:00.0", sysfs.host) is None
    assert pcibus.devices(sysfs.host) == []


def test_device_without_anything(sysfs: Sysfs) -> None:
    directory = sysfs.device("0000:03:00.0")
    for file in directory.iterdir():
        file.unlink()
    found = pcibus.device("0000:03:00.0", sysfs.host)
    assert found == pcibus.Device("0000:03:00.0", str(directory))
    assert found.reset_methods == ""


@pytest.mark.parametrize("number", ["", "nonsense\n", "0x\n"])
def test_numbers_that_are_none(sysfs: Sysfs, number: str) -> None:
    directory = sysfs.device("0000:03:00.0")
    (directory / "class").write_text(number)
    found = pcibus.device("0000:03:00.0", sysfs.host)
    assert found is not None
    assert found.class_code == 0


@pytest.mark.parametrize(
    ("written", "override"),
    [("(null)\n", None), ("\n", None), ("vfio-pci\n", "vfio-pci"), ("pci-stub\n", "pci-stub")],
)
def test_override(sysfs: Sysfs, written: str, override: str | None) -> None:
    directory = sysfs.device("0000:03:00.0")
    (directory / "driver_override").write_text(written)
    found = pcibus.device("0000:03:00.0", sysfs.host)
    assert found is not None
    assert found.override == override


def test_reset_before_linux_5_15(sysfs: Sysfs) -> None:
    directory = sysfs.device("0000:03:00.0")
    found = pcibus.device("0000:03:00.0", sysfs.host)
    assert found is not None
    (directory / "reset_method").unlink()
    assert found.reset_methods == ""
    (directory / "reset").write_text("")
    assert found.reset_methods == "yes"


@pytest.mark.parametrize(
    ("class_code", "header", "is_bridge"),
    [
        (BRIDGE, 0x01, True),
        (BRIDGE, 0x81, True),
        # CardBus.
        (0x060700, 0x02, True),
        # A host bridge, a chipset: devices with drivers of their own.
        (0x060000, 0x00, False),
        (ISA_BRIDGE, 0x80, False),
        (0x020000, 0x00, False),
    ],
)
def test_bridges(sysfs: Sysfs, class_code: int, header: int, is_bridge: bool) -> None:
    sysfs.device("0000:00:1f.0", class_code=class_code, header=header)
    found = pcibus.device("0000:00:1f.0", sysfs.host)
    assert found is not None
    assert found.is_bridge == is_bridge


@pytest.mark.parametrize("config", [None, b"", b"\1" * 14])
def test_unreadable_header_is_no_bridges(sysfs: Sysfs, config: bytes | None) -> None:
    directory = sysfs.device("0000:00:1c.0", header=1)
    (directory / "config").unlink()
    if config is not None:
        (directory / "config").write_bytes(config)
    found = pcibus.device("0000:00:1c.0", sysfs.host)
    assert found is not None
    assert not found.is_bridge


@pytest.mark.parametrize(
    ("driver", "is_for_vms", "keeps_group_free"),
    [
        (None, False, True),
        ("pci-stub", False, True),
        ("vfio-pci", True, True),
        ("mlx5_vfio_pci", True, True),
        ("e1000e", False, False),
        ("pcieport", False, False),
    ],
)
def test_what_a_driver_means(
    sysfs: Sysfs, driver: str | None, is_for_vms: bool, keeps_group_free: bool
) -> None:
    sysfs.device("0000:03:00.0", driver, 7)
    found = pcibus.device("0000:03:00.0", sysfs.host)
    assert found is not None
    assert found.is_for_vms == is_for_vms
    assert found.keeps_group_free == keeps_group_free


def test_addresses_are_in_the_order_of_numbers(sysfs: Sysfs) -> None:
    # As text, the domain of five digits would come before the last one of four.
    wanted = ["0000:00:02.0", "0000:0a:00.0", "0000:af:00.0", "2000:00:00.0", "10000:e1:00.0"]
    for address in reversed(wanted):
        sysfs.device(address)
    assert pcibus.addresses(sysfs.host) == wanted
    assert [each.address for each in pcibus.devices(sysfs.host)] == wanted


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("0000:03:00.0", ["0000:03:00.0"]),
        ("0000:03:00.7", []),
        # The same device, with zeroes that sysfs does not write.
        ("00000:03:00.0", ["0000:03:00.0"]),
        ("10000:e1:00.0", ["10000:e1:00.0"]),
        ("*:e1:00.0", ["10000:e1:00.0"]),
        ("*:03:00.0", ["0000:03:00.0", "0001:03:00.0"]),
        ("0000:03:00.*", ["0000:03:00.0", "0000:03:00.1"]),
        ("0000:*:1f.*", ["0000:00:1f.3"]),
        ("*:*:*.*", None),
        ("*:04:00.0", []),
    ],
)
def test_find(sysfs: Sysfs, pattern: str, found: list[str] | None) -> None:
    for address in ("10000:e1:00.0", "0000:03:00.0", "0000:03:00.1", "0001:03:00.0"):
        sysfs.device(address)
    sysfs.device("0000:00:1f.3")
    everything = ["0000:00:1f.3", "0000:03:00.0", "0000:03:00.1", "0001:03:00.0", "10000:e1:00.0"]
    assert pcibus.find(pattern, sysfs.host) == (everything if found is None else found)


def test_group_mates(sysfs: Sysfs) -> None:
    sysfs.device("0000:00:1c.0", "pcieport", 7, class_code=BRIDGE, header=1)
    sysfs.device("0000:03:00.0", "e1000e", 7, behind="0000:00:1c.0")
    sysfs.device("0000:03:00.1", None, 7, behind="0000:00:1c.0")
    sysfs.device("0000:04:00.0", "nvme", 8)
    found = pcibus.group_mates("7", sysfs.host)
    assert [(each.address, each.is_bridge) for each in found] == [
        ("0000:00:1c.0", True),
        ("0000:03:00.0", False),
        ("0000:03:00.1", False),
    ]
    assert pcibus.group_mates("9", sysfs.host) == []


# ---- hosts without an IOMMU


def test_has_iommu(sysfs: Sysfs, tmp_path: Path) -> None:
    assert not pcibus.has_iommu(sysfs.host)
    sysfs.device("0000:03:00.0", group=0)
    assert pcibus.has_iommu(sysfs.host)
    # Made up by VFIO, for who wants to do without one.
    sysfs.put("sys/kernel/iommu_groups/0/name", "vfio-noiommu\n")
    assert not pcibus.has_iommu(sysfs.host)
    sysfs.device("0000:04:00.0", group=1)
    assert pcibus.has_iommu(sysfs.host)
    # A kernel without IOMMU_SUPPORT has no such directory.
    assert not pcibus.has_iommu(HostPaths(str(tmp_path)))


@pytest.mark.parametrize(
    ("tables", "options", "hint"),
    [
        (["DMAR", "FACP"], "quiet", "add intel_iommu=on to the kernel's command line and reboot"),
        (["IVRS"], "quiet", "the firmware has one: `dmesg"),
        ([], "quiet", "switch on VT-d (Intel), the IOMMU (AMD) or the SMMU (Arm) in the firmware"),
        (["DMAR"], "quiet intel_iommu=off", "remove intel_iommu=off from the kernel's command"),
        (["IVRS"], "amd_iommu=off ro", "remove amd_iommu=off from"),
        (["DMAR"], "iommu=off intel_iommu=on", "remove iommu=off from"),
        *(
            (["DMAR"], options, "the firmware has one and intel_iommu=on is given: `dmesg | grep")
            for options in ("intel_iommu=on", "quiet intel_iommu=sm_on,on iommu=pt")
        ),
        # Another option that ends so, or none of its values.
        (["DMAR"], "intel_iommu=sm_on", "add intel_iommu=on"),
        (["DMAR"], "some.iommu=off", "add intel_iommu=on"),
    ],
)
def test_no_iommu(sysfs: Sysfs, tables: list[str], options: str, hint: str) -> None:
    for table in tables:
        sysfs.put(f"sys/firmware/acpi/tables/{table}", "")
    sysfs.put("proc/cmdline", f"root=/dev/sda2 {options}\n")
    error = pcibus.no_iommu(sysfs.host)
    assert error.message.startswith("this host has no IOMMU in use")
    assert error.path == sysfs.host.iommu_groups
    assert error.hint.startswith(hint)


def test_no_iommu_in_a_container(sysfs: Sysfs) -> None:
    sysfs.put("run/systemd/container", "systemd-nspawn")
    error = pcibus.no_iommu(sysfs.host)
    assert error.hint == "this is a container: run the VM on the machine outside"


def test_no_iommu_and_nothing_to_read(tmp_path: Path) -> None:
    error = pcibus.no_iommu(HostPaths(str(tmp_path)))
    assert error.hint.startswith("switch on VT-d")
