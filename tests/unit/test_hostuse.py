# SPDX-License-Identifier: MIT
"""Why the host needs a device: disks, the way out, the display."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import hostuse, pcibus

from .sysfs_trees import DISPLAY, NETWORK, STORAGE, Kernel, Sysfs

CARD, OTHER = "0000:03:00.0", "0000:04:00.0"


@pytest.fixture(autouse=True)
def kernel(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(sysfs)
    kernel.install(monkeypatch)
    return kernel


def reasons(sysfs: Sysfs, address: str = CARD) -> list[str]:
    device = pcibus.device(address, sysfs.host)
    assert device is not None
    return hostuse.reasons(device, sysfs.host)


def test_nothing(sysfs: Sysfs) -> None:
    sysfs.device(CARD, "e1000e", 7)
    assert reasons(sysfs) == []


# ---- disks


@pytest.fixture
def sda(sysfs: Sysfs) -> Path:
    """A disk with two partitions, behind an AHCI controller, as sysfs nests it."""
    controller = sysfs.device(CARD, "ahci", 7, class_code=STORAGE)
    sda = sysfs.disk("sda", (8, 0), controller / "ata1/host0/target0:0:0/0:0:0:0/block")
    sysfs.disk("sda1", (8, 1), sda)
    sysfs.disk("sda2", (8, 2), sda)
    # Another controller's, which nobody asks about.
    other = sysfs.device(OTHER, "ahci", 8, class_code=STORAGE)
    sysfs.disk("sdb", (8, 16), other / "ata2/host1/target1:0:0/1:0:0:0/block")
    return sda


@pytest.mark.usefixtures("sda")
class TestDisks:
    def test_not_used(self, sysfs: Sysfs) -> None:
        sysfs.mount("/", "8:16", "/dev/sdb")
        assert reasons(sysfs) == []
        assert reasons(sysfs, OTHER) == ["its disk sdb holds /"]

    def test_root_on_a_partition(self, sysfs: Sysfs) -> None:
        sysfs.mount("/", "8:2", "/dev/root")
        assert reasons(sysfs) == ["its disk sda2 holds /"]

    def test_file_system_on_the_whole_disk(self, sysfs: Sysfs) -> None:
        sysfs.mount("/srv", "8:0", "/dev/sda")
        assert reasons(sysfs) == ["its disk sda holds /srv"]

    def test_two_partitions(self, sysfs: Sysfs) -> None:
        sysfs.mount("/boot", "8:1", "/dev/sda1")
        sysfs.mount("/", "8:2", "/dev/sda2")
        assert reasons(sysfs) == ["its disk sda1 holds /boot", "its disk sda2 holds /"]

    def test_mounted_at_many_places(self, sysfs: Sysfs) -> None:
        for place in ("/", "/a", "/a", "/b", "/c", "/d"):
            sysfs.mount(place, "8:2", "/dev/sda2")
        assert reasons(sysfs) == ["its disk sda2 holds /, /a, /b and 2 more"]

    def test_bind_mounts_are_no_uses_of_their_own(self, sysfs: Sysfs) -> None:
        sysfs.mount("/srv", "8:2", "/dev/sda2")
        for place in ("/etc/hosts", "/exports/a", "/exports/b"):
            sysfs.mount(place, "8:2", "/dev/sda2", part=f"/parts{place}")
        assert reasons(sysfs) == ["its disk sda2 holds /srv"]

    def test_bind_mounts_alone(self, sysfs: Sysfs) -> None:
        """In a container, files of the machine outside; its disk must not be taken either."""
        sysfs.mount("/run/host/os-release", "8:2", "/dev/sda2", part="/usr/lib/os-release")
        sysfs.mount("/run/host/incoming", "8:2", "/dev/sda2", part="/run/incoming")
        assert reasons(sysfs) == [
            "its disk sda2 is mounted outside: /run/host/os-release is a part of it"
        ]

    def test_root_of_a_container_or_of_ostree(self, sysfs: Sysfs) -> None:
        sysfs.mount("/", "8:2", "/dev/sda2", part="/var/lib/machines/one")
        sysfs.mount("/etc/hosts", "8:2", "/dev/sda2", part="/etc/hosts")
        assert reasons(sysfs) == ["its disk sda2 holds /"]

    def test_subvolumes_of_btrfs(self, sysfs: Sysfs) -> None:
        sysfs.mount("/", "0:35", "/dev/sda2", "btrfs", part="/@")
        sysfs.mount("/home", "0:35", "/dev/sda2", "btrfs", part="/@home")
        assert reasons(sysfs) == ["its disk sda2 holds /, /home"]

    def test_swap_space_that_cannot_be(self, sysfs: Sysfs) -> None:
        sysfs.put("proc/swaps", "Filename\n/dev/sd\0a partition 1 0 -2\n/gone file 1 0 -2\n")
        assert reasons(sysfs) == []

    def test_place_with_odd_characters(self, sysfs: Sysfs) -> None:
        sysfs.mount("/a\\040b\\134040\\011", "8:2", "/dev/sda2")
        assert reasons(sysfs) == [r"its disk sda2 holds '/a b\\040\t'"]

    def test_lvm_over_md_over_partition(self, sysfs: Sysfs) -> None:
        sysfs.disk("md0", (9, 0))
        sysfs.disk("dm-0", (253, 0))
        sysfs.hold("md0", "sda2")
        sysfs.hold("md0", "sdb")
        sysfs.hold("dm-0", "md0")
        sysfs.mount("/", "253:0", "/dev/mapper/vg-root")
        assert reasons(sysfs) == ["its disk sda2 holds /"]
        assert reasons(sysfs, OTHER) == ["its disk sdb holds /"]

    def test_btrfs_has_a_number_of_its_own(self, sysfs: Sysfs) -> None:
        sysfs.mount("/", "0:35", "/dev/sda2", "btrfs")
        assert reasons(sysfs) == ["its disk sda2 holds /"]

    def test_btrfs_on_a_link(self, sysfs: Sysfs) -> None:
        sysfs.disk("dm-0", (253, 0))
        sysfs.hold("dm-0", "sda1")
        (sysfs.root / "dev/mapper").mkdir()
        (sysfs.root / "dev/mapper/secret").symlink_to("../dm-0")
        sysfs.mount("/", "0:35", "/dev/mapper/secret", "btrfs")
        assert reasons(sysfs) == ["its disk sda1 holds /"]

    def test_what_is_no_disk(self, sysfs: Sysfs) -> None:
        sysfs.mount("/tmp", "0:40", "tmpfs", "tmpfs")
        sysfs.mount("/srv", "0:41", "server:/srv", "nfs4")
        sysfs.mount("/gone", "0:42", "/dev/gone", "btrfs")
        sysfs.mount("/file", "0:43", "/proc/cmdline", "btrfs")
        sysfs.add("proc/self/mountinfo", "cut short - ext4")
        sysfs.add("proc/self/mountinfo", "")
        assert reasons(sysfs) == []

    def test_swap(self, sysfs: Sysfs) -> None:
        sysfs.add("proc/swaps", "/dev/sda1                               partition\t9\t0\t-2")
        sysfs.add("proc/swaps", "/proc/cmdline                           file\t9\t0\t-3")
        assert reasons(sysfs) == ["its disk sda1 holds swap space"]

    def test_mount_and_swap(self, sysfs: Sysfs) -> None:
        sysfs.mount("/", "253:0", "/dev/mapper/root")
        for name, number in (("dm-0", (253, 0)), ("dm-1", (253, 1))):
            sysfs.disk(name, number)
            sysfs.hold(name, "sda2")
        sysfs.add("proc/swaps", "/dev/dm-1 partition\t9\t0\t-2")
        assert reasons(sysfs) == ["its disk sda2 holds /, swap space"]

    def test_held_but_not_mounted(self, sysfs: Sysfs) -> None:
        sysfs.disk("dm-0", (253, 0))
        sysfs.hold("dm-0", "sda2")
        assert reasons(sysfs) == ["its disk sda2 holds dm-0"]

    def test_claimed_and_sysfs_says_nothing(self, sysfs: Sysfs, kernel: Kernel) -> None:
        # ZFS; btrfs over several disks names one of them alone.
        kernel.opened.add(sysfs.host.block_node("sda"))
        assert reasons(sysfs) == ["its disk sda is in use by the kernel"]
        assert reasons(sysfs, OTHER) == []

    def test_claimed_and_told_already(self, sysfs: Sysfs, kernel: Kernel) -> None:
        kernel.opened.add(sysfs.host.block_node("sda"))
        sysfs.mount("/", "8:2", "/dev/sda2")
        assert reasons(sysfs) == ["its disk sda2 holds /"]

    def test_no_node(self, sysfs: Sysfs) -> None:
        for name in ("sda", "sda1", "sda2"):
            os.unlink(sysfs.host.block_node(name))
        assert reasons(sysfs) == []

    def test_nothing_to_read(self, sysfs: Sysfs) -> None:
        for file in ("self/mountinfo", "swaps", "net/route"):
            (sysfs.root / "proc" / file).unlink()
        assert reasons(sysfs) == []


def test_disk_with_a_slash_in_its_name(sysfs: Sysfs, kernel: Kernel) -> None:
    controller = sysfs.device(CARD, "cciss", 7, class_code=STORAGE)
    sysfs.disk("cciss!c0d0", (104, 0), controller / "block")
    kernel.opened.add(f"{sysfs.root}/dev/cciss/c0d0")
    assert reasons(sysfs) == ["its disk cciss!c0d0 is in use by the kernel"]


def test_nvme(sysfs: Sysfs) -> None:
    controller = sysfs.device(CARD, "nvme", 7, class_code=STORAGE)
    disk = sysfs.disk("nvme0n1", (259, 0), controller / "nvme/nvme0")
    sysfs.disk("nvme0n1p2", (259, 2), disk)
    sysfs.mount("/", "259:2", "/dev/nvme0n1p2")
    assert reasons(sysfs) == ["its disk nvme0n1p2 holds /"]


def test_nvme_by_several_ways(sysfs: Sysfs) -> None:
    """What a kernel with multipath makes of NVMe: the disk is below no controller."""
    subsystem = sysfs.root / "sys/devices/virtual/nvme-subsystem/nvme-subsys0"
    disk = sysfs.disk("nvme0n1", (259, 0), subsystem)
    sysfs.disk("nvme0n1p2", (259, 2), disk)
    for number, address in enumerate((CARD, OTHER)):
        controller = sysfs.device(address, "nvme", 7 + number, class_code=STORAGE)
        (controller / f"nvme/nvme{number}").mkdir(parents=True)
        (subsystem / f"nvme{number}").symlink_to(controller / f"nvme/nvme{number}")
    # The subsystem of another disk.
    third = sysfs.device("0000:05:00.0", "nvme", 9, class_code=STORAGE)
    (third / "nvme/nvme2").mkdir(parents=True)
    second = sysfs.root / "sys/devices/virtual/nvme-subsystem/nvme-subsys1"
    sysfs.disk("nvme2n1", (259, 5), second)
    (second / "nvme2").symlink_to(third / "nvme/nvme2")
    sysfs.mount("/", "259:2", "/dev/nvme0n1p2")
    for address in (CARD, OTHER):
        assert reasons(sysfs, address) == ["its disk nvme0n1p2 holds /"]
    assert reasons(sysfs, "0000:05:00.0") == []


def test_device_whose_path_begins_alike(sysfs: Sysfs) -> None:
    controller = sysfs.device(CARD, "ahci", 7, class_code=STORAGE)
    sysfs.disk("sda", (8, 0), controller.with_name(f"{controller.name}1") / "block")
    sysfs.mount("/", "8:0", "/dev/sda")
    assert reasons(sysfs) == []


# ---- the way out


@pytest.fixture
def eth0(sysfs: Sysfs) -> Path:
    """A card with one interface, and another card with another."""
    sysfs.interface("eth1", sysfs.device(OTHER, "e1000e", 8, class_code=NETWORK))
    # virtio's are a level deeper.
    return sysfs.interface("eth0", sysfs.device(CARD, "virtio-pci", 7) / "virtio1")


@pytest.mark.usefixtures("eth0")
class TestInterfaces:
    def test_not_used(self, sysfs: Sysfs) -> None:
        sysfs.ipv4_route("eth1")
        sysfs.ipv4_route("eth0", to="0002A8C0", mask="00FFFFFF", flags=1)
        assert reasons(sysfs) == []
        assert reasons(sysfs, OTHER) == ["its interface eth1 has the default route"]

    def test_default_route(self, sysfs: Sysfs) -> None:
        sysfs.ipv4_route("eth0")
        assert reasons(sysfs) == ["its interface eth0 has the default route"]

    def test_ipv6(self, sysfs: Sysfs) -> None:
        sysfs.ipv6_route("eth1", to="fe80" + 28 * "0", length="40")
        sysfs.ipv6_route("eth0")
        assert reasons(sysfs) == ["its interface eth0 has the default route"]
        assert reasons(sysfs, OTHER) == []

    def test_both(self, sysfs: Sysfs) -> None:
        sysfs.ipv4_route("eth0")
        sysfs.ipv6_route("eth0")
        assert reasons(sysfs) == ["its interface eth0 has the default route"]

    @pytest.mark.parametrize("flags", [0x200201, 0x200, 0x0, 0x2])
    def test_reject_and_dead_routes(self, sysfs: Sysfs, flags: int) -> None:
        sysfs.ipv6_route("eth0", flags=flags)
        sysfs.ipv6_route("lo", flags=flags)
        assert reasons(sysfs) == []

    def test_ipv4_reject_and_dead_routes(self, sysfs: Sysfs) -> None:
        sysfs.ipv4_route("*", flags=0x201)
        sysfs.ipv4_route("eth0", flags=0x2)
        assert reasons(sysfs) == []

    def test_half_of_all_addresses_is_no_default_route(self, sysfs: Sysfs) -> None:
        sysfs.ipv4_route("eth0", mask="00000080")
        sysfs.ipv6_route("eth0", length="01")
        assert reasons(sysfs) == []

    def test_lines_that_are_cut_short(self, sysfs: Sysfs) -> None:
        sysfs.add("proc/net/route", "eth0\t00000000")
        sysfs.add("proc/net/ipv6_route", "0" * 32)
        assert reasons(sysfs) == []

    def test_through_a_bridge(self, sysfs: Sysfs) -> None:
        sysfs.interface("br0")
        sysfs.stack("br0", "eth0")
        sysfs.ipv4_route("br0")
        assert reasons(sysfs) == ["its interface eth0 has the default route through br0"]
        assert reasons(sysfs, OTHER) == []

    def test_through_vlan_over_bridge_over_bond(self, sysfs: Sysfs) -> None:
        for name in ("bond0", "br0", "br0.7"):
            sysfs.interface(name)
        sysfs.stack("bond0", "eth0")
        sysfs.stack("bond0", "eth1")
        sysfs.stack("br0", "bond0")
        sysfs.stack("br0.7", "br0")
        sysfs.ipv6_route("br0.7")
        assert reasons(sysfs) == ["its interface eth0 has the default route through br0.7"]
        assert reasons(sysfs, OTHER) == ["its interface eth1 has the default route through br0.7"]

    def test_carries_others(self, sysfs: Sysfs) -> None:
        for name in ("br1", "eth0.9"):
            sysfs.interface(name)
            sysfs.stack(name, "eth0")
        sysfs.ipv4_route("eth1")
        assert reasons(sysfs) == ["its interface eth0 carries br1, eth0.9"]

    def test_two_interfaces(self, sysfs: Sysfs, eth0: Path) -> None:
        card = sysfs.pci(CARD)
        sysfs.interface("eth2", card / "virtio2")
        sysfs.interface("br0")
        sysfs.stack("br0", "eth2")
        sysfs.ipv4_route("eth0")
        assert reasons(sysfs) == [
            "its interface eth0 has the default route",
            "its interface eth2 carries br0",
        ]
        device = pcibus.device(CARD, sysfs.host)
        assert device is not None
        assert hostuse.interfaces(device, sysfs.host) == ["eth0", "eth2"]

    def test_up_with_an_address_is_no_reason(self, sysfs: Sysfs) -> None:
        assert reasons(sysfs) == []


# ---- the display


def test_display_of_the_boot(sysfs: Sysfs) -> None:
    card = sysfs.device(CARD, "i915", 7, class_code=DISPLAY)
    (card / "boot_vga").write_text("1\n")
    connector = card / "drm/card0/card0-HDMI-A-1"
    connector.mkdir(parents=True)
    (connector / "enabled").write_text("enabled\n")
    assert reasons(sysfs) == ["it is the display that the host booted with"]


@pytest.mark.parametrize(
    ("class_code", "enabled", "expected"),
    [
        (DISPLAY, "enabled\n", ["it shows a picture on card1-DP-2"]),
        (0x030200, "enabled\n", ["it shows a picture on card1-DP-2"]),
        (DISPLAY, "disabled\n", []),
        # Not a display: no class of that kind has connectors.
        (0x120000, "enabled\n", []),
    ],
)
def test_connectors(sysfs: Sysfs, class_code: int, enabled: str, expected: list[str]) -> None:
    card = sysfs.device(CARD, "amdgpu", 7, class_code=class_code)
    (card / "boot_vga").write_text("0\n")
    for name, text in (("card1-DP-1", "disabled\n"), ("card1-DP-2", enabled)):
        (card / "drm/card1" / name).mkdir(parents=True)
        (card / "drm/card1" / name / "enabled").write_text(text)
    (card / "drm/renderD128").mkdir()
    assert reasons(sysfs) == expected


# ---- SR-IOV


@pytest.mark.parametrize(
    ("number", "expected"), [(0, []), (4, ["its 4 virtual functions would vanish"])]
)
def test_virtual_functions(sysfs: Sysfs, number: int, expected: list[str]) -> None:
    card = sysfs.device(CARD, "igb", 7)
    (card / "sriov_totalvfs").write_text("7\n")
    for each in range(number):
        (card / f"virtfn{each}").symlink_to(f"../0000:03:10.{each}")
    assert reasons(sysfs) == expected


def test_several_reasons(sysfs: Sysfs) -> None:
    card = sysfs.device(CARD, "igb", 7)
    for each in range(2):
        (card / f"virtfn{each}").symlink_to(f"../0000:03:10.{each}")
    sysfs.interface("eth0", card)
    sysfs.ipv4_route("eth0")
    sysfs.disk("sda", (8, 0), card / "block")
    sysfs.mount("/", "8:0", "/dev/sda")
    assert reasons(sysfs) == [
        "its disk sda holds /",
        "its interface eth0 has the default route",
        "its 2 virtual functions would vanish",
    ]
