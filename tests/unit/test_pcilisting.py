# SPDX-License-Identifier: MIT
"""`microvm pci`: names, who has a device and who asks for it, and what is printed of it."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from microvm_host import pci, pcilisting, service, systemd
from microvm_host.cli import commands
from microvm_host.cli import pci as cli_pci
from microvm_host.errors import MicrovmHostError
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
# and within
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
    monkeypatch.setattr(service, "identity", lambda name: me)
    monkeypatch.setattr(systemd, "states", lambda *units: {})


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
    found = {row.device.address: row.name for row in pcilisting.rows(host, names)}
    assert found["0000:01:00.0"] == Name(
        "Intel Corporation", "82574L Gigabit Network Connection", "Ethernet controller"
    )
    assert found["0000:00:02.0"] == Name(
        "Red Hat, Inc.", "Virtio 1.0 block device", "Mass storage controller"
    )
    assert found["0000:02:00.0"] == Name(kind="Non-Volatile memory controller")
    # Neither its vendor nor its class is in this list.
    assert found["0000:00:03.0"] == Name(kind="bridge")


@pytest.mark.parametrize("text", [PCI_IDS.rstrip("\n"), f"{PCI_IDS}\n\n# the end", "8086  Intel"])
def test_a_list_that_ends_anywhere(host: HostPaths, text: str) -> None:
    write(host.pci_ids_places()[0], text)
    device(host, "0000:01:00.0", "8086:10d3", "020000", "3")
    (row,) = pcilisting.rows(host, Names(host))
    assert row.name.vendor.startswith("Intel")
    assert row.name.kind in ("Ethernet controller", "network")


def test_a_list_that_commands_terminals(host: HostPaths) -> None:
    write(host.pci_ids_places()[0], "8086  In\x1b[2Jtel\x85\n\t10d3  a\x07b\r\n")
    device(host, "0000:01:00.0", "8086:10d3", "020000", "3")
    (row,) = pcilisting.rows(host, Names(host))
    assert (row.name.vendor, row.name.device) == ("In [2Jtel", "a b")


def test_a_record_of_no_vm(host: HostPaths) -> None:
    device(host, "0000:01:00.0", "8086:10d3", "020000", "3")
    write(host.record("a\nb", "pci-devices"), "device\t0000:01:00.0\n")
    (row,) = pcilisting.rows(host, Names(host))
    assert row.holder is None


def test_no_names(host: HostPaths) -> None:
    device(host, "0000:01:00.0", "8086:10d3", "020000", "3", "e1000e")
    assert not Names(host).are_known
    result = run()
    assert result.stderr.count("install the package pci.ids (Debian, Ubuntu) or hwdata") == 1
    assert result.stdout.splitlines()[1].endswith("  -        network 8086:10d3")


@pytest.mark.usefixtures("devices")
def test_a_list_that_knows_nothing_of_this_host_is_no_missing_list(host: HostPaths) -> None:
    write(host.pci_ids_places()[0], "ffff  Nobody\n")
    assert run().stderr == ""


def test_a_host_without_pci(host: HostPaths) -> None:
    result = run()
    assert (result.exit_code, result.stdout) == (0, "")
    assert "this host has no PCI devices" in result.stderr
    assert "pci.ids" not in result.stderr
    assert json.loads(run("--json").stdout) == []


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
        "ADDRESS       GROUP  DRIVER      RESET  USED BY      DEVICE\n"
        "0000:00:02.0  1      virtio-pci  flr    -            "
        "Red Hat, Inc. Virtio 1.0 block device\n"
        "0000:01:00.0  3      e1000e      flr    web          "
        "Intel Corporation 82574L Gigabit Network Connection\n"
        "0000:02:00.0  4      -           flr    -            "
        "Non-Volatile memory controller abcd:0001\n"
        "0000:02:00.1  4      vfio-pci    flr    for db, web  "
        "Ethernet controller abcd:0002\n"
    )
    assert "0000:00:03.0  2      pcieport" in run("--all").stdout


def test_a_group_stands_together_and_in_its_numbers_order(host: HostPaths) -> None:
    for address, group in (
        *(("0000:00:01.0", "10"), ("0000:00:02.0", "9"), ("0000:00:03.0", "10")),
        ("0000:00:04.0", "9"),
    ):
        device(host, address, "8086:10d3", "020000", group)
    write(f"{host.pci_device('0000:00:00.1')}/vendor", "0x8086\n")
    lines = run().stdout.splitlines()[1:]
    assert [line.split()[0][-4:] for line in lines] == ["02.0", "04.0", "01.0", "03.0", "00.1"]
    # Programs get them by address.
    found = [each["address"][-4:] for each in json.loads(run("--json").stdout)]
    assert found == ["00.1", "01.0", "02.0", "03.0", "04.0"]


@pytest.mark.usefixtures("devices")
def test_many_vms_ask_for_what_the_host_lives_on(host: HostPaths, root: Path) -> None:
    write(f"{host.pci_device('0000:02:00.0')}/virtfn0/vendor", "0xffff\n")
    for name in ("a", "b", "c"):
        vm(host, root, name, "0000:02:00.0")
    assert "  host, for a, b, …  " in run().stdout
    (found,) = (each for each in json.loads(run("--json").stdout) if each["wanted_by"])
    assert found["wanted_by"] == ["a", "b", "c"]


@pytest.mark.usefixtures("devices")
def test_on_a_terminal_lines_are_cut_and_coloured(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(f"{host.pci_device('0000:02:00.0')}/virtfn0/vendor", "0xffff\n")
    Record(host.record("web", pci.WHAT)).append("device", "0000:01:00.0", "e1000e", "", "", "")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli_pci.show(host, bridges=True, as_json=False)
    by_address = {}
    for line in capsys.readouterr().out.splitlines():
        parts = re.fullmatch(r"(?:\033\[([\d;]+)m)?(.*?)(?:\033\[0m)?", line)
        assert parts
        colour, plain = parts.groups()
        if "the host uses it" not in plain:
            assert len(plain) <= 70
            by_address[plain.split()[0]] = colour, plain
    assert by_address["0000:01:00.0"][0] == "1;32"
    assert by_address["0000:02:00.0"][0] == "31"
    assert by_address["0000:00:03.0"][0] == "2"
    assert by_address["0000:02:00.1"][0] is None
    assert by_address["0000:01:00.0"][1].endswith("…")
    assert by_address["0000:00:03.0"][1].endswith(" 1b36:000c")
    # Nothing is cut for who reads it from a pipe.
    assert "82574L Gigabit Network Connection\n" in run().stdout


@pytest.mark.usefixtures("devices")
def test_a_bridge_does_not_live_by_what_is_behind_it(host: HostPaths) -> None:
    write(f"{host.pci_device('0000:00:03.0')}/virtfn0/vendor", "0xffff\n")
    assert all(not each["host_uses"] for each in json.loads(run("--json").stdout))


@pytest.mark.usefixtures("devices")
def test_a_record_that_is_wrong_hides_no_devices(host: HostPaths) -> None:
    Record(host.record("web", pci.WHAT)).append("device", "0000:01:00.0", "e1000e", "", "", "")
    Path(host.record("db", "x")).parent.mkdir()
    Path(host.record("db", pci.WHAT)).write_bytes(b"device\t\xff\n")
    Record(host.record("cut", pci.WHAT)).append("device")
    assert [each["holder"] for each in json.loads(run("--json").stdout)] == [
        *(None, None, "web", None, None)
    ]


@pytest.mark.usefixtures("devices")
def test_an_override_that_the_kernel_does_not_tell(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    for address in ("0000:01:00.0", "0000:02:00.0"):
        write(f"{host.pci_device(address)}/driver_override", "vfio-pci\n")

    def overrides() -> dict[str, str | None]:
        found = json.loads(run("--json").stdout)
        return {each["address"]: each["driver_override"] for each in found}

    assert overrides()["0000:01:00.0"] == overrides()["0000:02:00.0"] == "vfio-pci"
    # As for a driver that never lets go of its device: opening a FIFO waits for ever too.
    monkeypatch.setattr(pcilisting, "OVERRIDE_KNOWN_WITHIN", 0.05)
    os.unlink(f"{host.pci_device('0000:02:00.0')}/driver_override")
    fifo = f"{host.pci_device('0000:02:00.0')}/driver_override"
    os.mkfifo(fifo)

    def answer() -> None:
        # Late, so that who waits for it fails here instead of hanging.
        with open(os.open(fifo, os.O_RDWR), "w", encoding="ascii") as late:
            late.write("vfio-pci\n")

    timer = threading.Timer(5, answer)
    timer.start()
    try:
        found = overrides()
    finally:
        timer.cancel()
    assert (found["0000:01:00.0"], found["0000:02:00.0"]) == ("vfio-pci", None)


@pytest.mark.usefixtures("devices")
def test_in_short(host: HostPaths) -> None:
    assert pcilisting.in_short("01:00.0", host) == "01:00.0 (not there)"
    assert pcilisting.in_short("0000:01:00.0", host) == "0000:01:00.0 (group 3, e1000e)"
    assert pcilisting.in_short("*:02:00.0", host) == "0000:02:00.0 (group 4, no driver)"
    assert pcilisting.in_short("0000:02:00.*", host) == "0000:02:00.* (2 devices)"
    write(f"{host.pci_device('0000:05:00.0')}/vendor", "0x8086\n")
    assert pcilisting.in_short("0000:05:00.0", host) == "0000:05:00.0 (no group, no driver)"


@pytest.mark.usefixtures("devices")
def test_what_the_host_lives_on(host: HostPaths) -> None:
    for number in range(2):
        write(f"{host.pci_device('0000:02:00.0')}/virtfn{number}/vendor", "0xffff\n")
    result = run()
    line = next(line for line in result.stdout.splitlines() if line.startswith("0000:02:00.0 "))
    assert " host " in line
    assert result.stdout.splitlines()[-1] == (
        "0000:02:00.0: the host uses it: its 2 virtual functions would vanish"
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
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm(host, root, "plain")
    assert run("check", "plain").stdout == "plain: its package asks for no PCI devices\n"
    vm(host, root, "web", "02:00.0")
    Record(host.record("web", pci.WHAT)).append("device", "0000:01:00.0", "e1000e", "", "", "")
    Record(host.record("web", pci.WHAT)).append("node", "3", "/dev/vfio/3", "0", "0", "600")
    unit = "microvm-pci-devices@web.service"
    monkeypatch.setattr(systemd, "states", lambda *units: dict.fromkeys(units, "active"))
    # What it has, not what the package asks for that the next start runs.
    assert run("check", "web").stdout == "web: runs, and has 0000:01:00.0\n"
    found = json.loads(run("check", "--json", "web").stdout)
    assert (found["running"], found["has"], found["steps"]) == (True, ["0000:01:00.0"], [])

    monkeypatch.setattr(systemd, "states", lambda *units: {unit: "failed"})
    result = run("check", "web")
    assert result.exit_code == 0
    assert result.stderr == (
        "microvm: web is down, and could not give back 0000:01:00.0; "
        "`journalctl -u microvm@web.service` says why, `microvm reconcile --apply` tries again\n"
    )
    assert result.stdout.startswith("web: a start would\n  bind 0000:02:00.0 to vfio-pci\n")
    found = json.loads(run("check", "--json", "web").stdout)
    assert (found["running"], found["has"]) == (False, ["0000:01:00.0"])


@pytest.mark.usefixtures("devices")
def test_check_of_a_vm_that_runs_without_devices(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm(host, root, "plain")
    assert not json.loads(run("check", "--json", "plain").stdout)["running"]
    for unit in ("microvm@plain.service", "microvm-foreground-plain.service"):
        states = {unit: "active"}
        monkeypatch.setattr(systemd, "states", lambda *units, states=states: states)
        assert json.loads(run("check", "--json", "plain").stdout)["running"]
        assert run("check", "plain").stdout == "plain: runs, and has no PCI devices\n"
    # The package of its next start asks for some.
    vm(host, root, "web", "02:00.0")
    monkeypatch.setattr(systemd, "states", lambda *units: {"microvm@web.service": "active"})
    shown = run("check", "web").stdout
    assert shown.startswith("web: runs, and has no PCI devices\nweb: its next start would\n  bind ")


@pytest.mark.usefixtures("devices")
def test_check_of_a_vm_that_is_stopping(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm(host, root, "web", "02:00.0")
    Record(host.record("web", pci.WHAT)).append("device", "0000:01:00.0", "e1000e", "", "", "")
    monkeypatch.setattr(systemd, "states", lambda *units: dict.fromkeys(units, "deactivating"))
    result = run("check", "web")
    assert result.stderr == "microvm: web is stopping, and giving back 0000:01:00.0\n"
    assert result.stdout.startswith("web: a start would\n")
    assert json.loads(run("check", "--json", "web").stdout)["running"] is False


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(("former", "said"), [("nvme", "nvme"), ("", "no driver")])
def test_check_of_what_the_vm_could_not_give_back(
    host: HostPaths, root: Path, former: str, said: str
) -> None:
    """vfio-pci has it for the VM's sake, and not by the administrator's wish."""
    vm(host, root, "web", "02:00.1")
    Record(host.record("web", pci.WHAT)).append("device", "0000:02:00.1", former, "", "", "")
    assert (
        "  use 0000:02:00.1, which vfio-pci has still, and give it back to "
        f"{said} when the VM stops\n"
    ) in run("check", "web").stdout
    Record(host.record("web", pci.WHAT)).clear()
    Record(host.record("web", pci.WHAT)).append("device", "0000:02:00.1", "vfio-pci", "", "", "")
    assert "has already, and leave it there\n" in run("check", "web").stdout


@pytest.mark.usefixtures("devices")
def test_check_looks_once(host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vm(host, root, "web", "01:00.0")
    looks: list[str] = []
    real = pci.problems

    def look(name: str, *given: Any) -> list[MicrovmHostError]:
        looks.append(name)
        return real(name, *given)

    monkeypatch.setattr(pci, "problems", look)
    assert run("check", "web").exit_code == 0
    assert looks == ["web"]


def test_check_of_what_is_not_there(host: HostPaths) -> None:
    result = run("check", "nobody")
    assert "there is no microVM nobody" in str(result.exception)
    assert run("--json", "check", "nobody").exception is not None
