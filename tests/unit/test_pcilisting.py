# SPDX-License-Identifier: MIT
"""`microvm pci`: names, who has a device and who asks for it, and what is printed of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microvm_host import pci, pcilisting, systemd
from microvm_host.cli import commands
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.pciids import Name, Names
from microvm_host.record import Record
from microvm_host.runner import Package

from . import packages

PCI_IDS = """\
# a comment
1af4  Red Hat, Inc.
\t1041  Virtio 1.0 network device
\t\t1af4 1100  QEMU Virtual Machine
\t1042  Virtio 1.0 block device
# another, in between
8086  Intel Corporation
\t10d3  82574L Gigabit Network Connection
\t\t1af4 1041  Not this one

C 01  Mass storage controller
\t08  Non-Volatile memory controller
\t\t02  NVM Express
C 02  Network controller
\t00  Ethernet controller
"""


@pytest.fixture(autouse=True)
def as_root(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "HOST", host)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    me = Identity("microvm", os.getuid(), "kvm", os.getgid())
    monkeypatch.setattr(systemd, "identity", lambda name: me)


def write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text)


def device(
    host: HostPaths,
    address: str,
    ids: str,
    code: str,
    group: str,
    driver: str | None = None,
    *,
    header: int = 0,
) -> None:
    """Make a device up."""
    link = host.pci_device(address)
    vendor, number = ids.split(":")
    for name, text in (
        ("vendor", f"0x{vendor}\n"),
        ("device", f"0x{number}\n"),
        ("class", f"0x{code}\n"),
        ("driver_override", "(null)\n"),
        ("reset_method", "flr bus\n"),
    ):
        write(f"{link}/{name}", text)
    Path(f"{link}/config").write_bytes(bytes([0] * 14 + [header] + [0] * 49))
    inside = Path(host.iommu_groups) / group / "devices"
    inside.mkdir(parents=True, exist_ok=True)
    (inside / address).symlink_to(link)
    Path(f"{link}/iommu_group").symlink_to(inside.parent)
    if driver:
        Path(host.pci_driver(driver)).mkdir(parents=True, exist_ok=True)
        write(f"{host.pci_driver(driver)}/unbind", "")
        Path(f"{link}/driver").symlink_to(host.pci_driver(driver))


@pytest.fixture
def devices(host: HostPaths) -> None:
    write(host.pci_ids_places()[1], PCI_IDS)
    device(host, "0000:00:02.0", "1af4:1042", "010000", "1", "virtio-pci")
    device(host, "0000:00:03.0", "1b36:000c", "060400", "2", "pcieport", header=1)
    device(host, "0000:01:00.0", "8086:10d3", "020000", "3", "e1000e")
    device(host, "0000:02:00.0", "abcd:0001", "010802", "4")
    device(host, "0000:02:00.1", "abcd:0002", "020000", "4", "vfio-pci")


def vm(host: HostPaths, root: Path, name: str, *addresses: str) -> None:
    path = packages.write(
        root / f"packages/{name}", Package(path="", pci_devices=addresses, has_shutdown=True)
    )
    Path(host.vm(name)).mkdir(parents=True)
    Path(host.current(name)).symlink_to(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(commands.microvm, ["pci", *arguments], prog_name="microvm")


@pytest.mark.usefixtures("devices")
def test_names(host: HostPaths) -> None:
    names = Names(host)
    assert names.are_known
    found = {row.device.address: row.name for row in pcilisting.rows(host)}
    assert found["0000:01:00.0"] == Name(
        "Intel Corporation", "82574L Gigabit Network Connection", "Ethernet controller"
    )
    assert found["0000:00:02.0"] == Name(
        "Red Hat, Inc.", "Virtio 1.0 block device", "Mass storage controller"
    )
    assert found["0000:02:00.0"] == Name(kind="Non-Volatile memory controller")
    assert found["0000:00:03.0"] == Name()


def test_no_names(host: HostPaths) -> None:
    device(host, "0000:01:00.0", "8086:10d3", "020000", "3", "e1000e")
    assert not Names(host).are_known
    result = run()
    assert "install pci.ids or hwdata" in result.stderr
    assert result.stdout.splitlines()[1].endswith("8086:10d3")


@pytest.mark.usefixtures("devices")
def test_table(host: HostPaths, root: Path) -> None:
    vm(host, root, "web", "01:00.0", "*:02:00.1")
    vm(host, root, "db", "0000:02:00.1")
    vm(host, root, "broken", "no address")
    Record(host.record("web", pci.WHAT)).append("device", "0000:01:00.0", "e1000e", "", "", "")
    result = run()
    assert result.exit_code == 0
    assert result.stderr == ""
    assert result.stdout == (
        "ADDRESS       GROUP  DRIVER      RESET    USED BY      DEVICE\n"
        "0000:00:02.0  1      virtio-pci  flr,bus  -            "
        "Red Hat, Inc. Virtio 1.0 block device\n"
        "0000:01:00.0  3      e1000e      flr,bus  web          "
        "Intel Corporation 82574L Gigabit Network Connection\n"
        "0000:02:00.0  4      -           flr,bus  -            "
        "Non-Volatile memory controller abcd:0001\n"
        "0000:02:00.1  4      vfio-pci    flr,bus  for db, web  "
        "Ethernet controller abcd:0002\n"
    )
    assert "0000:00:03.0  2      pcieport" in run("--all").stdout


@pytest.mark.usefixtures("devices")
def test_what_the_host_lives_on(host: HostPaths) -> None:
    for number in range(2):
        write(f"{host.pci_device('0000:02:00.0')}/virtfn{number}/vendor", "0xffff\n")
    result = run()
    line = next(line for line in result.stdout.splitlines() if line.startswith("0000:02:00.0 "))
    assert " host " in line
    assert result.stdout.splitlines()[-1] == (
        "0000:02:00.0: the host lives on it: its 2 virtual functions would vanish"
    )


@pytest.mark.usefixtures("devices")
def test_json(host: HostPaths, root: Path) -> None:
    vm(host, root, "web", "01:00.0")
    found = json.loads(run("--json").stdout)
    assert [each["address"] for each in found] == [
        *("0000:00:02.0", "0000:00:03.0", "0000:01:00.0", "0000:02:00.0", "0000:02:00.1")
    ]
    assert found[2] == {
        "address": "0000:01:00.0",
        "iommu_group": "3",
        "vendor_id": "8086",
        "device_id": "10d3",
        "class": "020000",
        "vendor": "Intel Corporation",
        "device": "82574L Gigabit Network Connection",
        "kind": "Ethernet controller",
        "is_bridge": False,
        "driver": "e1000e",
        "driver_override": None,
        "reset_methods": ["flr", "bus"],
        "host_uses": [],
        "holder": None,
        "wanted_by": ["web"],
    }
    assert found[1]["is_bridge"] is True


def test_without_an_iommu_the_devices_are_listed_all_the_same(host: HostPaths) -> None:
    write(f"{host.pci_device('0000:01:00.0')}/vendor", "0x8086\n")
    result = run()
    assert result.exit_code == 0
    assert "this host has no IOMMU in use" in result.stderr
    assert "0000:01:00.0  -" in result.stdout


@pytest.mark.usefixtures("devices")
def test_check_says_the_steps_and_changes_nothing(host: HostPaths, root: Path) -> None:
    vm(host, root, "web", "01:00.0", "02:00.1")
    before = sorted(str(path) for path in root.rglob("*"))
    result = run("check", "web")
    assert result.exit_code == 0, result.output
    assert result.stdout == (
        "web: a start would\n"
        "  bind 0000:01:00.0 to vfio-pci, now e1000e's\n"
        "  use 0000:02:00.1, which vfio-pci has already, and leave it there\n"
        f"  give {host.vfio_group_node('3')} to microvm\n"
        f"  give {host.vfio_group_node('4')} to microvm\n"
    )
    found = json.loads(run("check", "--json", "web").stdout)
    assert found["steps"] == [line.strip() for line in result.stdout.splitlines()[1:]]
    assert sorted(str(path) for path in root.rglob("*")) == before


@pytest.mark.usefixtures("devices")
def test_check_says_all_that_stands_against_it(host: HostPaths, root: Path) -> None:
    vm(host, root, "web", "00:03.0", "07:00.0", "01:00.0")
    Record(host.record("db", pci.WHAT)).append("device", "0000:01:00.0", "e1000e", "", "", "")
    result = run("check", "web")
    assert result.exit_code == 1
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 3
    for text in (
        "there is no PCI device 0000:07:00.0",
        "0000:00:03.0 is a bridge",
        "0000:01:00.0 is in use by microVM db",
    ):
        assert any(text in line for line in lines), text
    found = json.loads(run("check", "--json", "web").stdout)
    assert (found["steps"], len(found["problems"])) == ([], 3)


@pytest.mark.usefixtures("devices")
def test_check_of_a_vm_without_devices_and_of_one_that_has_them(
    host: HostPaths, root: Path
) -> None:
    vm(host, root, "plain")
    assert run("check", "plain").stdout == "plain: its package asks for no PCI devices\n"
    vm(host, root, "web", "01:00.0")
    Record(host.record("web", pci.WHAT)).append("device", "0000:01:00.0", "e1000e", "", "", "")
    assert run("check", "web").stdout == "web: runs, and has 0000:01:00.0\n"


def test_check_of_what_is_not_there(host: HostPaths) -> None:
    result = run("check", "nobody")
    assert "there is no microVM nobody" in str(result.exception)
    assert run("--json", "check", "nobody").exception is not None
