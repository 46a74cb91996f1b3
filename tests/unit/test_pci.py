# SPDX-License-Identifier: MIT
"""PCI devices: what stands against taking them, taking them, and giving them back."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EPERM
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microvm_host import log, pci, pci_lock, plan, process, reborn
from microvm_host.errors import DeclarationError, MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.pci import InUse
from microvm_host.record import Record

from . import golden, packages
from .sysfs_trees import BRIDGE, ISA_BRIDGE, SOUND, STORAGE, Kernel, Sysfs, patched

ALICE = Identity("alice", 1001, "users", 1002)
CALL_APART = process.call_apart
CARD, SECOND, VMD, ADMINS = "0000:03:00.0", "0000:03:00.1", "10000:e1:00.0", "0000:05:00.0"
RICH = (CARD, SECOND, VMD, ADMINS)


@pytest.fixture(autouse=True)
def kernel(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(sysfs)
    kernel.install(monkeypatch)
    monkeypatch.setattr(pci, "NODE_APPEARS_WITHIN", 0.05)
    monkeypatch.setattr(reborn, "APPEARS_WITHIN", 0.05)
    return kernel


def rich(sysfs: Sysfs, kernel: Kernel) -> None:
    """A card of two functions behind a bridge, a disk in a VMD domain, one the administrator's."""
    sysfs.driver("vfio-pci")
    sysfs.device("0000:00:1c.0", "pcieport", 7, class_code=BRIDGE, header=0x81)
    card = sysfs.device(CARD, "e1000e", 7, header=0x80, behind="0000:00:1c.0")
    sysfs.interface("eth0", card)
    sysfs.interface("eth1", card, up=False)
    sysfs.device(SECOND, None, 7, class_code=SOUND, header=0x80, behind="0000:00:1c.0")
    sysfs.device(VMD, "nvme", 9, class_code=STORAGE, override="nvme")
    sysfs.device(ADMINS, "vfio-pci", 10, override="vfio-pci")
    os.chmod(sysfs.host.vfio_group_node("10"), 0o640)
    kernel.adopt()


def record_of(vm: str, host: HostPaths) -> Record:
    return Record(host.record(vm, pci.WHAT))


def problems(sysfs: Sysfs, *addresses: str, vm: str = "web") -> list[str]:
    before = sysfs.picture()
    found = pci.problems(vm, addresses, sysfs.host)
    assert sysfs.picture() == before
    return [str(error).replace(str(sysfs.root), "") for error in found]


def take(sysfs: Sysfs, *addresses: str, vm: str = "web") -> Record:
    """What the helper does for a start."""
    record = record_of(vm, sysfs.host)
    steps = pci.plan(vm, addresses, ALICE, sysfs.host)
    plan.carry_out(steps, record, lambda done: pci.undo(done, sysfs.host))
    return record


def planned(sysfs: Sysfs, *addresses: str) -> list[plan.Step]:
    return pci.plan("web", addresses, ALICE, sysfs.host)


def nothing_is_recorded(host: HostPaths) -> bool:
    return not os.path.exists(host.records) or os.listdir(host.records) == []


# ---- what stands against it


def test_nothing_against_it(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    assert problems(sysfs, *RICH) == []


def test_no_iommu(sysfs: Sysfs) -> None:
    sysfs.device(CARD, "e1000e")
    assert problems(sysfs, CARD, "nonsense:00:00.0") == [
        "/sys/kernel/iommu_groups: this host has no IOMMU in use, without which no device can be "
        "passed through; switch on VT-d (Intel), the IOMMU (AMD) or the SMMU (Arm) in the "
        "firmware"
    ]


def test_missing_device(sysfs: Sysfs) -> None:
    sysfs.device(CARD, "e1000e", 7)
    missing = [
        f"/sys/bus/pci/devices/{pattern}: there is no PCI device {pattern}; `microvm pci` lists "
        "the devices of this host"
        for pattern in ("0000:09:00.0", "*:09:00.0", "10000:03:00.0")
    ]
    assert problems(sysfs, "0000:09:00.0", "*:09:00.0", "10000:03:00.0") == missing


def test_globs(sysfs: Sysfs) -> None:
    for address, group in ((CARD, 7), (SECOND, 8), (VMD, 9)):
        sysfs.device(address, "e1000e", group)
    assert problems(sysfs, "*:e1:00.0", "0000:03:00.1") == []
    assert problems(sysfs, "*:03:00.*") == [
        "*:03:00.* stands for 2 PCI devices: 0000:03:00.0, 0000:03:00.1; give one of these"
    ]
    assert problems(sysfs, CARD, "*:03:00.0") == [
        "0000:03:00.0 is asked for twice; a glob stands for it too, perhaps"
    ]


def test_bridge(sysfs: Sysfs) -> None:
    sysfs.device("0000:00:1c.0", "pcieport", 7, class_code=BRIDGE, header=1)
    assert problems(sysfs, "0000:00:1c.0") == [
        "0000:00:1c.0 is a bridge, which no VM can have; pass through the devices behind it"
    ]


def test_device_in_no_group(sysfs: Sysfs) -> None:
    sysfs.device(CARD, "e1000e", 7)
    sysfs.device("0000:04:00.0", "e1000e")
    assert problems(sysfs, "0000:04:00.0") == [
        "/sys/devices/pci0000:04/0000:04:00.0: 0000:04:00.0 is in no IOMMU group: the IOMMU does "
        "not translate for it; try another slot, or a newer firmware"
    ]
    # VFIO's own, where somebody does without an IOMMU.
    sysfs.device("0000:05:00.0", "vfio-pci", 8)
    (Path(sysfs.host.iommu_groups) / "8/name").write_text("vfio-noiommu\n")
    [line] = problems(sysfs, "0000:05:00.0")
    assert "0000:05:00.0 is in no IOMMU group" in line


def test_device_of_another_vm(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    take(sysfs, VMD, vm="db")
    assert problems(sysfs, VMD) == [
        "10000:e1:00.0 is in use by microVM db; stop that one first: systemctl stop "
        "microvm@db.service; if it is down, `microvm reconcile --apply` gives back what it left"
    ]
    [error] = pci.problems("web", [VMD], sysfs.host)
    assert isinstance(error, InUse)
    assert error.holder == "db"
    # Its own, of a stop that could not undo everything.
    assert problems(sysfs, VMD, vm="db") == []


def test_mate_of_another_vm(sysfs: Sysfs, kernel: Kernel) -> None:
    sysfs.driver("vfio-pci")
    sysfs.device(CARD, "e1000e", 7)
    sysfs.device(SECOND, None, 7)
    kernel.adopt()
    take(sysfs, CARD, vm="db")
    assert problems(sysfs, SECOND) == [
        "IOMMU group 7 cannot be taken: 0000:03:00.0 in it is in use by microVM db; stop that one "
        "first: systemctl stop microvm@db.service"
        "; if it is down, `microvm reconcile --apply` gives back what it left"
    ]


def test_open_by_a_program_of_somebody_elses(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    kernel.opened.add(sysfs.host.vfio_group_node("10"))
    assert problems(sysfs, ADMINS) == [
        "/dev/vfio/10: 0000:05:00.0 is in use by a program that is none of ours; fuser -v "
        "/dev/vfio/10"
    ]


def test_mate_open_by_a_program_of_somebody_elses(sysfs: Sysfs, kernel: Kernel) -> None:
    sysfs.device(CARD, "e1000e", 7)
    sysfs.device(SECOND, "vfio-pci", 7)
    assert problems(sysfs, CARD) == []
    # The kernel would let vfio-pci have the first, and nobody but that program open the group.
    kernel.opened.add(sysfs.host.vfio_group_node("7"))
    assert problems(sysfs, CARD) == [
        "/dev/vfio/7: IOMMU group 7 cannot be taken: 0000:03:00.1 in it is in use by a program "
        "that is none of ours; fuser -v /dev/vfio/7"
    ]


def test_what_the_host_lives_on(sysfs: Sysfs) -> None:
    card = sysfs.device(CARD, "igb", 7)
    sysfs.interface("eth0", card)
    sysfs.ipv4_route("eth0")
    for number in range(2):
        (card / f"virtfn{number}").symlink_to(f"../0000:03:10.{number}")
    refused = [
        "0000:03:00.0 is not given away, since this host uses it: its interface eth0 has the "
        "default route; its 2 virtual functions would vanish; "
        'allow_host_devices = ["0000:03:00.0"] in /etc/microvms/web.toml allows it all the same'
    ]
    assert problems(sysfs, CARD) == refused
    declared = packages.put(sysfs.root, "etc/microvms/web.toml", 'runner = "/a"\n')
    assert problems(sysfs, CARD) == refused
    # Another VM's word, and another device.
    packages.put(
        sysfs.root, "etc/microvms/db.toml", f'runner = "/a"\nallow_host_devices = ["{CARD}"]\n'
    )
    declared.write_text('runner = "/a"\nallow_host_devices = ["0000:03:00.1"]\n')
    assert problems(sysfs, CARD) == refused
    declared.write_text('runner = "/a"\nallow_host_devices = ["03:00.0"]\n')
    assert problems(sysfs, CARD) == []
    declared.write_text("oh\n")
    with pytest.raises(DeclarationError):
        pci.problems("web", [CARD], sysfs.host)


def test_declaration_is_not_read_for_nothing(sysfs: Sysfs) -> None:
    sysfs.device(CARD, "e1000e", 7)
    packages.put(sysfs.root, "etc/microvms/web.toml", "oh\n")
    assert problems(sysfs, CARD) == []


def test_driver_that_never_lets_go(sysfs: Sysfs) -> None:
    sysfs.driver("stuck", lets_go=False)
    sysfs.device(CARD, "stuck", 7, ids=(0x8086, 0x15B8))
    assert problems(sysfs, CARD) == [
        "/sys/bus/pci/drivers/stuck: 0000:03:00.0 is held by driver stuck, which never lets go of "
        "a device; keep the driver from it: vfio-pci.ids=8086:15b8 on the kernel's command line"
    ]


def test_mate_in_host_use(sysfs: Sysfs) -> None:
    sysfs.device("0000:00:1f.0", "lpc_ich", 7, class_code=ISA_BRIDGE, header=0x80)
    sysfs.device("0000:00:1f.2", "ahci", 7, class_code=STORAGE)
    sysfs.device("0000:00:1f.3", None, 7)
    refused = [
        f"/sys/kernel/iommu_groups/7/devices: IOMMU group 7 cannot be taken: {address} in it is "
        f"in use by the host's driver {driver}; a group goes to one VM as a whole: pass that one "
        "through as well, or put the card into another slot"
        for address, driver in (("0000:00:1f.0", "lpc_ich"), ("0000:00:1f.2", "ahci"))
    ]
    # An ISA bridge calls itself a bridge and has a driver all the same.
    assert problems(sysfs, "0000:00:1f.3") == refused
    assert problems(sysfs, "0000:00:1f.2", "0000:00:1f.3") == refused[:1]
    assert problems(sysfs, "0000:00:1f.2", "0000:00:1f.3", "0000:00:1f.0") == []


@pytest.mark.parametrize("driver", [None, "pci-stub", "vfio-pci", "mlx5_vfio_pci"])
def test_mates_that_keep_still(sysfs: Sysfs, driver: str | None) -> None:
    sysfs.device("0000:00:1c.0", "pcieport", 7, class_code=BRIDGE, header=1)
    sysfs.device(CARD, "e1000e", 7)
    sysfs.device(SECOND, driver, 7)
    assert problems(sysfs, CARD) == []


def test_all_problems_at_once(
    sysfs: Sysfs, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    """Waiting for another VM would not mend the rest, which therefore comes first."""
    rich(sysfs, kernel)
    sysfs.driver("stuck", lets_go=False)
    controller = sysfs.device("0000:06:00.0", "stuck", 11, class_code=STORAGE)
    sysfs.disk("sda", (8, 0), controller)
    sysfs.mount("/", "8:0", "/dev/sda")
    take(sysfs, VMD, vm="db")
    wanted = (VMD, SECOND, "0000:09:00.0", "0000:06:00.0")
    assert [line.partition(" (")[0][:60] for line in problems(sysfs, *wanted)] == [
        "/sys/bus/pci/devices/0000:09:00.0: there is no PCI device 00",
        "10000:e1:00.0 is in use by microVM db; stop that one first: ",
        "0000:06:00.0 is not given away, since this host uses it: its",
        "/sys/bus/pci/drivers/stuck: 0000:06:00.0 is held by driver s",
        "/sys/kernel/iommu_groups/7/devices: IOMMU group 7 cannot be ",
    ]
    before = sysfs.picture()
    capsys.readouterr()
    with pytest.raises(MicrovmHostError, match="there is no PCI device 0000:09:") as caught:
        pci.plan("web", wanted, ALICE, sysfs.host)
    assert not isinstance(caught.value, InUse)
    logged = capsys.readouterr().err.splitlines()
    assert len(logged) == 4
    assert "in use by microVM db" in logged[-1]
    with pytest.raises(InUse):
        pci.plan("web", [VMD], ALICE, sysfs.host)
    assert sysfs.picture() == before
    assert os.listdir(sysfs.host.records) == [".nodes", "db"]


# ---- one at a time

HOLD_LOCK = """\
import sys
from microvm_host import pci_lock
from microvm_host.paths import HostPaths
with pci_lock.Exclusive("db", [sys.argv[2]], HostPaths(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_exclusive(sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    rich(sysfs, kernel)
    holder = subprocess.Popen(
        [sys.executable, "-B", "-c", HOLD_LOCK, str(sysfs.root), VMD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with holder:
        assert holder.stdout is not None and holder.stdin is not None
        assert holder.stdout.readline() == b"locked\n"
        lock = os.open(sysfs.host.pci_lock("9"), os.O_RDONLY)
        try:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who wants devices of other groups does not wait.
            monkeypatch.setattr(pci_lock, "LOCKED_FOR", 0.0)
            with pci_lock.Exclusive("web", [SECOND, "*:05:00.0", CARD, "0000:77:00.0"], sysfs.host):
                assert Path(sysfs.host.pci_lock("7")).read_text() == "web"
            monkeypatch.setattr(pci_lock, "LOCKED_FOR", 0.2)
            statuses: list[str] = []
            monkeypatch.setattr(log, "waiting", statuses.append)
            open_before = os.listdir("/proc/self/fd")
            with (
                pytest.raises(MicrovmHostError) as caught,
                pci_lock.Exclusive("web", [VMD], sysfs.host),
            ):
                pass
            assert os.listdir("/proc/self/fd") == open_before
            assert str(caught.value) == (
                "PCI devices of IOMMU group 9 are being taken or given back for microVM db, for "
                "more than 0 s now; "
                "`systemctl status microvm-pci-devices@db.service` may say what it waits for"
            )
            assert {*statuses} == {
                "waiting while IOMMU group 9 is taken or given back for microVM db"
            }
            monkeypatch.setattr(pci_lock, "LOCKED_FOR", 60.0)
            # Whoever waits has it when the other is done.
            monkeypatch.setattr(log, "waiting", lambda text: holder.stdin.close())
            with pci_lock.Exclusive("web", [VMD], sysfs.host):
                assert Path(sysfs.host.pci_lock("9")).read_text() == "web"
            assert holder.wait() == 0
            # Free again, and again after each use.
            for _ in range(2):
                with pci_lock.Exclusive("web", [VMD], sysfs.host), pytest.raises(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(lock)
    # Anybody can lock what he can open.
    assert os.stat(sysfs.host.pci_lock("9")).st_mode & 0o077 == 0


def test_interfaces_come_back_one_device_at_a_time(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, CARD, SECOND)
    lock = os.open(sysfs.host.pci_lock("names"), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    statuses: list[str] = []

    def waiting(text: str) -> None:
        statuses.append(text)
        fcntl.flock(lock, fcntl.LOCK_UN)

    monkeypatch.setattr(log, "waiting", waiting)
    assert pci.undo(record, sysfs.host) == []
    assert statuses == ["waiting for the interfaces of another microVM's PCI device"]
    assert sysfs.driver_of(CARD) == "e1000e"
    # Free again; and it is not waited for without end.
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    record = take(sysfs, CARD, SECOND)
    monkeypatch.setattr(log, "waiting", statuses.append)
    monkeypatch.setattr(pci_lock, "NAMED_WITHIN", 0.1)
    assert pci.undo(record, sysfs.host) == []
    assert len(statuses) == 2
    os.close(lock)


def test_lock_is_freed_by_an_error(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    open_before = os.listdir("/proc/self/fd")
    with pytest.raises(ZeroDivisionError), pci_lock.Exclusive("web", [VMD], sysfs.host):
        raise ZeroDivisionError
    with pci_lock.Exclusive("web", [VMD], sysfs.host):
        assert os.path.isfile(sysfs.host.pci_lock("9"))
    assert os.listdir("/proc/self/fd") == open_before


def test_lock_is_freed_though_a_process_hangs(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One driver that does not let go is not to keep other VMs from the devices of its group."""
    rich(sysfs, kernel)
    children = []
    # What waits in the kernel does not notice that it is killed.
    monkeypatch.setattr(os, "kill", lambda pid, signal: children.append(pid))
    with pytest.raises(TimeoutError), pci_lock.Exclusive("web", [VMD], sysfs.host):
        CALL_APART(lambda: time.sleep(60), 0.05, lambda seconds: None)
    monkeypatch.undo()
    lock = os.open(sysfs.host.pci_lock("9"), os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(lock)
        [child] = children
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# ---- planning and taking


def test_no_devices(sysfs: Sysfs) -> None:
    # Not even a host without an IOMMU stands against that.
    assert pci.plan("web", [], ALICE, sysfs.host) == []


def test_plan_in_words(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    steps = pci.plan("web", ["*:e1:00.0", CARD, SECOND, ADMINS], ALICE, sysfs.host)
    words = "".join(f"{step.describe()}\n" for step in steps)
    golden.compare("pci-plan.txt", words.replace(str(sysfs.root), ""))


def test_planning_changes_nothing(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    assert len(pci.plan("web", RICH, ALICE, sysfs.host)) == 7
    assert sysfs.picture() == before
    assert not os.path.exists(sysfs.host.records)


def test_taken(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, *RICH)
    host = sysfs.host
    assert [sysfs.driver_of(address) for address in RICH] == ["vfio-pci"] * 4
    assert sysfs.driver_of("0000:00:1c.0") == "pcieport"
    assert [sysfs.override_of(address) for address in RICH] == ["vfio-pci"] * 4
    nodes = [host.vfio_group_node(group) for group in ("7", "9", "10")]
    assert all(os.stat(node).st_mode & 0o777 == 0o600 for node in nodes)
    us = f"{os.getuid()}", f"{os.getgid()}"
    # vfio0 was the administrator's before.
    names = {CARD: "vfio1", SECOND: "vfio2", VMD: "vfio3", ADMINS: "vfio0"}
    node_lines = [
        ["node", name, path, *us, mode]
        for name, path, mode in (
            ("7", nodes[0], "20600"),
            ("vfio1", host.vfio_device_node("vfio1"), "20600"),
            ("vfio2", host.vfio_device_node("vfio2"), "20600"),
            ("9", nodes[1], "20600"),
            ("vfio3", host.vfio_device_node("vfio3"), "20600"),
            ("10", nodes[2], "20640"),
            ("vfio0", host.vfio_device_node("vfio0"), "20600"),
        )
    ]
    assert [os.listdir(sysfs.pci(address) / "vfio-dev") for address in RICH] == [
        [names[address]] for address in RICH
    ]
    assert record.read() == [
        ["device", CARD, "e1000e", "", "eth0", "eth1"],
        ["device", SECOND, "", "", "", ""],
        ["device", VMD, "nvme", "nvme", "", ""],
        ["device", ADMINS, "vfio-pci", "vfio-pci", "", ""],
        *node_lines,
    ]
    # Each is claimed for udev and handed over to the VM's user.
    assert sorted(os.listdir(os.path.dirname(host.node_owner("7")))) == sorted(
        line[1] for line in node_lines
    )
    claim = Path(host.node_owner("vfio3")).read_text()
    assert claim == "MICROVM_NODE_USER=1001\nMICROVM_NODE_GROUP=1002\n"
    assert kernel.chowned == [(line[2], 1001, 1002) for line in node_lines]


def test_order_of_writes(sysfs: Sysfs, kernel: Kernel) -> None:
    """Probing may not find another driver in between, and nothing is bound that is not ours."""
    rich(sysfs, kernel)
    writes: list[tuple[str, str]] = []
    kernel.before_write = lambda path, text: writes.append(
        (path.removeprefix(f"{sysfs.root}/sys/bus/pci/"), text)
    )
    record = take(sysfs, *RICH)
    assert writes == [
        (f"devices/{CARD}/driver_override", "vfio-pci"),
        ("drivers/e1000e/unbind", CARD),
        ("drivers_probe", CARD),
        (f"devices/{SECOND}/driver_override", "vfio-pci"),
        ("drivers_probe", SECOND),
        (f"devices/{VMD}/driver_override", "vfio-pci"),
        ("drivers/nvme/unbind", VMD),
        ("drivers_probe", VMD),
    ]
    writes.clear()
    assert pci.undo(record, sysfs.host) == []
    assert writes == [
        (f"devices/{CARD}/driver_override", "e1000e"),
        ("drivers/vfio-pci/unbind", CARD),
        ("drivers/e1000e/bind", CARD),
        (f"devices/{CARD}/driver_override", "\n"),
        (f"devices/{SECOND}/driver_override", "\n"),
        ("drivers/vfio-pci/unbind", SECOND),
        (f"devices/{VMD}/driver_override", "nvme"),
        ("drivers/vfio-pci/unbind", VMD),
        ("drivers/nvme/bind", VMD),
    ]


def test_record_is_written_before_anything_else(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    record = record_of("web", sysfs.host)
    seen: list[list[str]] = []
    kernel.before_write = lambda path, text: seen.append([line[1] for line in record.read()])
    take(sysfs, CARD, SECOND)
    assert seen == [[CARD]] * 3 + [[CARD, SECOND]] * 2


def test_module_that_is_not_loaded(sysfs: Sysfs, kernel: Kernel) -> None:
    sysfs.device(CARD, "e1000e", 7)
    kernel.adopt()
    steps = pci.plan("web", [CARD], ALICE, sysfs.host)
    assert steps[0].describe() == "load the kernel module vfio-pci"
    take(sysfs, CARD)
    assert sysfs.driver_of(CARD) == "vfio-pci"


NO_MODULE = (
    f"the running kernel {os.uname().release} has no module vfio-pci that can be loaded: "
    "`modprobe {}` failed with 1{}; if the kernel was upgraded, reboot into the new one; otherwise "
    "install the package with its modules"
)


def test_module_that_is_missing(sysfs: Sysfs, kernel: Kernel) -> None:
    """As after an upgrade of the kernel whose package took the old one's modules away."""
    sysfs.device(CARD, "e1000e", 7)
    kernel.adopt()
    del kernel.modules["vfio-pci"]
    missing = NO_MODULE.format("-n -q vfio-pci", "")
    assert problems(sysfs, CARD) == [missing]
    assert refused(sysfs, CARD) == missing
    # Who has it does without.
    sysfs.device(VMD, "mlx5_vfio_pci", 9)
    assert problems(sysfs, VMD) == []
    assert not any("kernel module" in step.describe() for step in planned(sysfs, VMD))
    kernel.modules["vfio-pci"] = "vfio-pci"
    before = sysfs.picture()
    assert problems(sysfs, CARD) == []
    assert sysfs.picture() == before
    # Not asked for, where it is.
    sysfs.driver("vfio-pci")
    del kernel.modules["vfio-pci"]
    assert problems(sysfs, CARD) == []


def test_module_of_which_modprobe_cannot_be_asked(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who is not root may not have it in $PATH."""
    sysfs.device(CARD, "e1000e", 7)

    def output(argv: list[str], *, errors: bool = False) -> str:
        raise MicrovmHostError("cannot run modprobe") from FileNotFoundError(errno.ENOENT, "no")

    monkeypatch.setattr(process, "output", output)
    assert problems(sysfs, CARD) == []


def test_module_that_cannot_be_loaded(sysfs: Sysfs, kernel: Kernel) -> None:
    sysfs.device(CARD, "e1000e", 7)
    kernel.adopt()
    kernel.broken_modules.add("vfio-pci")
    assert problems(sysfs, CARD) == []
    assert refused(sysfs, CARD) == NO_MODULE.format(
        "vfio-pci", ": ERROR: could not insert 'vfio-pci'"
    )


def test_kernel_without_device_nodes(sysfs: Sysfs, kernel: Kernel) -> None:
    """VFIO_DEVICE_CDEV is off in most kernels: vfio-dev/vfio0 is there, its `dev` is not."""
    rich(sysfs, kernel)
    (sysfs.pci(ADMINS) / "vfio-dev/vfio0/dev").unlink()
    record = take(sysfs, ADMINS)
    assert [line[1] for line in record.read()] == [ADMINS, "10"]


# ---- what goes wrong while taking


def refused(sysfs: Sysfs, *addresses: str) -> str:
    """What is said when taking fails, which must leave everything as it was."""
    before = sysfs.picture()
    with pytest.raises(MicrovmHostError) as caught:
        take(sysfs, *addresses)
    assert sysfs.picture() == before
    assert nothing_is_recorded(sysfs.host)
    return str(caught.value).replace(str(sysfs.root), "")


def test_vfio_pci_does_not_take_the_second(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    kernel.fails_to_bind.add(("vfio-pci", VMD))
    assert refused(sysfs, CARD, ADMINS, VMD, SECOND) == (
        "/sys/bus/pci/devices/10000:e1:00.0: vfio-pci did not take 10000:e1:00.0, which no driver "
        "has now; `journalctl -k` may have the kernel's reason"
    )


def test_another_driver_is_quicker(
    sysfs: Sysfs, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    rich(sysfs, kernel)
    sysfs.driver("xen-pciback")

    def be_quicker(path: str, text: str) -> None:
        if path.endswith("drivers_probe"):
            sysfs.bind(text, "xen-pciback")

    kernel.before_write = be_quicker
    with pytest.raises(MicrovmHostError, match=r"did not take .* which xen-pciback has"):
        take(sysfs, CARD)
    # It is somebody else's now.
    assert sysfs.driver_of(CARD) == "xen-pciback"
    assert "was taken by somebody else for xen-pciback" in capsys.readouterr().err
    assert nothing_is_recorded(sysfs.host)


def test_driver_that_refuses(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    kernel.unbind_error["nvme"] = EPERM
    assert refused(sysfs, CARD, SECOND, VMD) == (
        "/sys/bus/pci/drivers/nvme/unbind: driver nvme does not let go of 10000:e1:00.0: Operation "
        "not permitted; `journalctl -k` may have the kernel's reason"
    )


def test_driver_that_hangs(
    sysfs: Sysfs, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    """What could be given back is; the rest waits for the driver, without waiting in the kernel."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    kernel.hangs.add("nvme")
    with pytest.raises(MicrovmHostError) as caught:
        take(sysfs, CARD, SECOND, VMD)
    assert str(caught.value).replace(str(sysfs.root), "") == (
        "/sys/bus/pci/drivers/nvme/unbind: driver nvme does not let go of 10000:e1:00.0 within "
        "30 s: Connection timed out; `journalctl -k` may have the kernel's reason"
    )
    assert capsys.readouterr().err.replace(str(sysfs.root), "") == (
        "/sys/bus/pci/devices/10000:e1:00.0: the driver that 10000:e1:00.0 had has still not "
        "let go of it; `journalctl -k` may have the kernel's reason\n"
    )
    assert [sysfs.driver_of(address) for address in (CARD, SECOND, VMD)] == ["e1000e", None, None]
    kernel.let_go(VMD)
    assert given_back(sysfs, record_of("web", sysfs.host)) == []
    assert sysfs.picture() == before
    assert nothing_is_recorded(sysfs.host)


def test_start_while_a_driver_hangs_still(sysfs: Sysfs, kernel: Kernel) -> None:
    """Nothing but `driver_override` waits for the driver, and that is read apart first."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    kernel.hangs.add("nvme")
    with pytest.raises(MicrovmHostError):
        take(sysfs, VMD)
    assert problems(sysfs, VMD) == []
    assert len(pci.plan("web", [VMD], ALICE, sysfs.host)) == 2
    with pytest.raises(MicrovmHostError) as caught:
        take(sysfs, VMD)
    assert str(caught.value).replace(str(sysfs.root), "") == (
        "/sys/bus/pci/devices/10000:e1:00.0: the driver that 10000:e1:00.0 had has still not let "
        "go of it; `journalctl -k` may have the kernel's reason"
    )
    # What it was before is not forgotten over this.
    kernel.let_go(VMD)
    take(sysfs, VMD)
    assert sysfs.driver_of(VMD) == "vfio-pci"
    assert given_back(sysfs, record_of("web", sysfs.host)) == []
    assert sysfs.picture() == before


def test_mate_whose_driver_hangs_still(sysfs: Sysfs, kernel: Kernel) -> None:
    sysfs.driver("vfio-pci")
    sysfs.device(CARD, "nvidia", 7)
    sysfs.device(SECOND, None, 7)
    kernel.adopt()
    kernel.hangs.add("nvidia")
    with pytest.raises(MicrovmHostError):
        take(sysfs, CARD, vm="db")
    assert problems(sysfs, SECOND) == [
        "IOMMU group 7 cannot be taken: 0000:03:00.0 in it is in use by microVM db; stop that one "
        "first: systemctl stop microvm@db.service"
        "; if it is down, `microvm reconcile --apply` gives back what it left"
    ]


def test_driver_that_hangs_in_probe(sysfs: Sysfs, kernel: Kernel) -> None:
    """Its device stays on record, nobody waits in the kernel for it, and the rest is given back."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, CARD, SECOND, VMD)
    kernel.hangs_in_probe.add("e1000e")
    assert given_back(sysfs, record) == [
        "/sys/bus/pci/drivers/e1000e/bind: driver e1000e has not taken 0000:03:00.0 within 60 s; "
        "`journalctl -k` may have the kernel's reason"
    ]
    assert sysfs.driver_of(VMD) == "nvme"
    assert [line[1] for line in record.read()] == [CARD]
    still = (
        "/sys/bus/pci/devices/0000:03:00.0: driver e1000e has still not done with taking "
        "0000:03:00.0; `journalctl -k` may have the kernel's reason"
    )
    assert given_back(sysfs, record) == [still]
    with pytest.raises(MicrovmHostError, match="has still not done with taking"):
        take(sysfs, CARD, SECOND)
    assert problems(sysfs, SECOND, vm="db")[0].startswith("IOMMU group 7 cannot be taken")
    kernel.let_go(CARD)
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before
    assert nothing_is_recorded(sysfs.host)


def test_vfio_pci_hangs_in_probe(
    sysfs: Sysfs, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    kernel.hangs_in_probe.add("vfio-pci")
    with pytest.raises(MicrovmHostError, match="vfio-pci has not taken 10000:"):
        take(sysfs, VMD)
    assert "driver vfio-pci has still not done with taking" in capsys.readouterr().err
    kernel.let_go(VMD)
    assert given_back(sysfs, record_of("web", sysfs.host)) == []
    assert sysfs.picture() == before


def test_systemd_is_told_to_be_patient(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait has an end of its own, and a card may have many functions."""
    rich(sysfs, kernel)
    told: list[str] = []
    monkeypatch.setattr(log, "notify", told.append)
    record = take(sysfs, VMD)
    kernel.hangs.add("vfio-pci")
    given_back(sysfs, record)
    given_back(sysfs, record)
    kernel.let_go(VMD)
    kernel.hangs_in_probe.add("nvme")
    given_back(sysfs, record)
    assert [line for line in told if "EXTEND" in line] == [
        f"STATUS=waiting {what}, {seconds} s\nEXTEND_TIMEOUT_USEC=30000000"
        for what, seconds in (
            (f"for vfio-pci to let go of {VMD}", 30),
            (f"until a driver has taken or let go of {VMD}", 30),
            (f"for nvme to take {VMD}", 60),
        )
    ]


def test_driver_that_times_out_by_itself(sysfs: Sysfs, kernel: Kernel) -> None:
    """That is the kernel's answer, not our patience's end: the override is put right."""
    sysfs.driver("vfio-pci")
    sysfs.device(CARD, "e1000e", 7, override="vfio-pci")
    kernel.adopt()
    record = take(sysfs, CARD)
    kernel.write_error[f"{sysfs.host.pci_driver('e1000e')}/bind"] = errno.ETIMEDOUT
    kernel.fails_to_bind.add(("e1000e", CARD))
    [found] = given_back(sysfs, record)
    assert "was not taken back by driver e1000e" in found
    assert sysfs.override_of(CARD) == "vfio-pci"


def test_taken_and_given_back_in_earnest(sysfs: Sysfs, kernel: Kernel) -> None:
    """What may hang is written from another process, as it is outside of tests."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "call_apart", CALL_APART)
        patch.setattr(pci, "LETS_GO_WITHIN", 60.0)
        record = take(sysfs, *RICH)
        assert sysfs.driver_of(VMD) == "vfio-pci"
        assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_override_cannot_be_written(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    kernel.write_error[f"{sysfs.host.pci_device(SECOND)}/driver_override"] = EPERM
    assert refused(sysfs, CARD, SECOND) == (
        "/sys/bus/pci/devices/0000:03:00.1/driver_override: cannot write 'vfio-pci': Operation not "
        "permitted; `journalctl -k` may have the kernel's reason"
    )


def test_node_does_not_appear(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rich(sysfs, kernel)
    # As in a container, whose /dev is its own.
    monkeypatch.setattr(sysfs, "_vfio_nodes", lambda address, group: None)
    assert refused(sysfs, VMD) == (
        "/dev/vfio/9: this node of VFIO does not appear; a container's /dev is not the kernel's: "
        "PCI devices need a real host"
    )


def test_node_that_is_none(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    node = Path(sysfs.host.vfio_group_node("10"))
    node.unlink()
    node.write_text("")
    with pytest.raises(MicrovmHostError, match="is to be a device node, but is none"):
        take(sysfs, ADMINS)


def test_device_vanishes_while_taken(
    sysfs: Sysfs, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    rich(sysfs, kernel)

    def pull_out(path: str, text: str) -> None:
        if path.endswith("drivers_probe"):
            sysfs.remove(text)

    kernel.before_write = pull_out
    with pytest.raises(MicrovmHostError, match=f"cannot write '{VMD}': No such device"):
        take(sysfs, VMD)
    assert f"{VMD} is there no more, and so not given back" in capsys.readouterr().err
    assert nothing_is_recorded(sysfs.host)


# ---- giving back


def given_back(sysfs: Sysfs, record: Record) -> list[str]:
    return [line.replace(str(sysfs.root), "") for line in pci.undo(record, sysfs.host)]


def test_given_back(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, *RICH)
    taken = sysfs.picture()
    assert taken != before
    kernel.chowned.clear()
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before
    assert nothing_is_recorded(sysfs.host)
    # The nodes went to whoever had them, before those of ours went away.
    us = os.getuid(), os.getgid()
    assert (sysfs.host.vfio_group_node("10"), *us) in kernel.chowned
    assert len(kernel.chowned) == 7
    # Once more: a unit's ExecStopPost= runs whenever.
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_former_owner_of_a_node(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    record = record_of("web", sysfs.host)
    node = sysfs.host.vfio_group_node("10")
    record.append("node", "10", node, "107", "36", "20666")
    assert given_back(sysfs, record) == []
    assert kernel.chowned == [(node, 107, 36)]
    assert os.stat(node).st_mode & 0o7777 == 0o666


def test_many_rounds(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    for _ in range(10):
        assert given_back(sysfs, take(sysfs, *RICH)) == []
        assert sysfs.picture() == before


def test_record_of_nothing(sysfs: Sysfs) -> None:
    assert given_back(sysfs, record_of("web", sysfs.host)) == []


def test_device_that_has_vanished(
    sysfs: Sysfs, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, CARD, SECOND, VMD)
    sysfs.remove(VMD)
    assert given_back(sysfs, record) == []
    assert sysfs.driver_of(CARD) == "e1000e"
    assert f"{VMD} is there no more" in capsys.readouterr().err
    assert nothing_is_recorded(sysfs.host)


def test_device_that_somebody_else_has_taken(
    sysfs: Sysfs, kernel: Kernel, capsys: pytest.CaptureFixture[str]
) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, CARD, SECOND, VMD)
    sysfs.driver("pci-stub")
    sysfs.unbind(VMD)
    sysfs.bind(VMD, "pci-stub")
    assert given_back(sysfs, record) == []
    assert sysfs.driver_of(VMD) == "pci-stub"
    assert sysfs.driver_of(CARD) == "e1000e"
    assert f"{VMD} was taken by somebody else for pci-stub" in capsys.readouterr().err


def test_device_that_is_back_already(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, VMD)
    # By hand, but for the override.
    sysfs.unbind(VMD)
    sysfs.bind(VMD, "nvme")
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_driver_that_does_not_take_it_back(sysfs: Sysfs, kernel: Kernel) -> None:
    """The others are given back all the same; the next try goes on where this one ended."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, CARD, SECOND, VMD)
    kernel.fails_to_bind.add(("e1000e", CARD))
    for _ in range(2):
        assert given_back(sysfs, record) == [
            "/sys/bus/pci/devices/0000:03:00.0: 0000:03:00.0 was not taken back by driver e1000e; "
            "none has it; echo 0000:03:00.0 > /sys/bus/pci/drivers/e1000e/bind, or reboot"
        ]
        assert [sysfs.driver_of(address) for address in (CARD, SECOND, VMD)] == [None, None, "nvme"]
        assert sysfs.override_of(CARD) is None
        # What is back is nobody's any more.
        assert [line[:2] for line in record.read()] == [["device", CARD]]
    with pytest.raises(MicrovmHostError, match="1 of the things that were set up could not be"):
        plan.take_back(record, lambda done: pci.undo(done, sysfs.host))
    kernel.fails_to_bind.clear()
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_start_after_a_stop_that_failed(sysfs: Sysfs, kernel: Kernel) -> None:
    """What the devices were is known from before: the start finds them without a driver."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, *RICH)
    kernel.fails_to_bind.add(("e1000e", CARD))
    assert len(given_back(sysfs, record)) == 1
    take(sysfs, *RICH)
    assert sum(line[:2] == ["device", CARD] for line in record.read()) == 1
    kernel.fails_to_bind.clear()
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_other_driver_would_take_it_by_its_ids(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, CARD, SECOND)
    sysfs.driver("igb")
    kernel.by_ids[CARD] = "igb"
    kernel.interfaces[CARD] = ("eth0", "eth1")
    assert given_back(sysfs, record) == []
    assert sysfs.driver_of(CARD) == "e1000e"
    assert sysfs.override_of(CARD) is None
    assert sysfs.picture().items() >= before.items()


@pytest.mark.parametrize(
    ("driver", "override"),
    [("e1000e", "vfio-pci"), ("e1000e", "ixgbe"), ("uio_pci_generic", None)],
)
def test_driver_that_is_not_the_one_of_the_override(
    sysfs: Sysfs, kernel: Kernel, driver: str, override: str | None
) -> None:
    """Set for later, while another driver has it; or cleared after it was bound, as by DPDK."""
    sysfs.driver("vfio-pci")
    sysfs.driver("ixgbe")
    sysfs.device(CARD, driver, 7, override=override)
    kernel.adopt()
    kernel.by_ids.setdefault(CARD, "ixgbe")
    before = sysfs.picture()
    record = take(sysfs, CARD)
    assert sysfs.driver_of(CARD) == "vfio-pci"
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before
    record = take(sysfs, CARD)
    kernel.fails_to_bind.add((driver, CARD))
    [found] = given_back(sysfs, record)
    assert f"was not taken back by driver {driver}; none has it" in found
    # Whoever chose that finds it, whatever becomes of the driver.
    assert sysfs.override_of(CARD) == override
    kernel.fails_to_bind.clear()
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


@pytest.mark.parametrize(
    ("driver", "module"),
    [("e1000e", "pci:v00008086d000010D3"), ("uio_pci_generic", "uio_pci_generic")],
)
def test_module_of_the_driver_was_unloaded(
    sysfs: Sysfs, kernel: Kernel, driver: str, module: str
) -> None:
    sysfs.driver("vfio-pci")
    sysfs.device(CARD, driver, 7)
    kernel.adopt()
    before = sysfs.picture()
    record = take(sysfs, CARD)
    directory = Path(sysfs.host.pci_driver(driver))
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    kernel.modules[module] = driver
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


@pytest.mark.parametrize("in_use_for", [1, None])
def test_still_open(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch, in_use_for: int | None
) -> None:
    """vfio-pci would wait in the kernel for whoever has the device open."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, VMD)
    kernel.opened.add(sysfs.host.vfio_group_node("9"))
    waits: list[str] = []

    def wait(text: str) -> None:
        waits.append(text)
        if len(waits) == in_use_for:
            kernel.opened.clear()

    monkeypatch.setattr(log, "waiting", wait)
    if in_use_for is None:
        monkeypatch.setattr(pci, "LETS_GO_WITHIN", 0.05)
        assert given_back(sysfs, record) == [
            "/dev/vfio/9: 10000:e1:00.0 is still in use after 0 s, and so not given back; "
            "`fuser -v /dev/vfio/9` shows by whom"
        ]
        assert sysfs.driver_of(VMD) == "vfio-pci"
        kernel.opened.clear()
    assert given_back(sysfs, record) == []
    assert waits[0] == f"waiting until nothing uses {VMD}"
    assert sysfs.picture() == before


def test_a_group_that_is_still_open_is_waited_for_once(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card of six functions would have its unit wait for three minutes."""
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, *RICH)
    kernel.opened |= {sysfs.host.vfio_group_node(group) for group in ("7", "9")}
    waits: list[float] = []
    real = pci_lock.patiently

    def patiently(seconds: float, status: str) -> Iterator[None]:
        waits.append(seconds)
        return real(0, status)

    monkeypatch.setattr(pci_lock, "patiently", patiently)
    found = given_back(sysfs, record)
    assert [line.partition(" is still in use after 30 s")[0] for line in found] == [
        f"/dev/vfio/7: {CARD}",
        f"/dev/vfio/7: {SECOND}",
        f"/dev/vfio/9: {VMD}",
    ]
    assert waits == [30.0, 30.0]
    kernel.opened.clear()
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_vfio_pci_hangs(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, CARD, SECOND, VMD)
    kernel.hangs.add("vfio-pci")
    found = given_back(sysfs, record)
    assert len(found) == 3
    assert found[0].startswith(
        "/sys/bus/pci/drivers/vfio-pci/unbind: driver vfio-pci does not let go of 0000:03:00.0 "
        "within 30 s"
    )
    kernel.let_go(VMD, SECOND, CARD)
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_errors_of_the_system(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, ADMINS)
    with pytest.MonkeyPatch.context() as patch:

        def fail(path: str, *_: object) -> None:
            raise PermissionError(EPERM, "Operation not permitted", path)

        patch.setattr(os, "chown", fail)
        assert given_back(sysfs, record) == [
            "vfio0: /dev/vfio/devices/vfio0: Operation not permitted",
            "10: /dev/vfio/10: Operation not permitted",
        ]
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str | None, str]]:
    """What is logged: the VM in whose journal it is, and the message."""
    lines: list[tuple[str | None, str]] = []
    monkeypatch.setattr(
        log, "write", lambda priority, message, *, vm=None: lines.append((vm, message))
    )
    return lines


def test_why_it_was_not_given_back_is_in_the_vms_journal(
    sysfs: Sysfs, kernel: Kernel, said: list[tuple[str | None, str]]
) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, *RICH)
    sysfs.remove(SECOND)
    sysfs.driver("pci-stub")
    sysfs.unbind(VMD)
    sysfs.bind(VMD, "pci-stub")
    # Its driver is gone, and so is the module.
    shutil.rmtree(sysfs.host.pci_driver("e1000e"))
    with pytest.raises(MicrovmHostError, match="1 of the things that were set up could not be"):
        plan.take_back(record, lambda done: pci.undo(done, sysfs.host))
    for text in (
        f"{SECOND} is there no more",
        f"{VMD} was taken by somebody else",
        "Module e1000e not found",
        f"{CARD} was not taken back by driver e1000e",
    ):
        assert any(text in message for _, message in said), text
    assert {vm for vm, _ in said} == {"web"}


# ---- interfaces, which are back under their names


def test_interfaces_that_were_down_stay_down(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, CARD, SECOND)
    assert not os.path.exists(sysfs.host.net_device("eth0"))
    assert given_back(sysfs, record) == []
    assert kernel.get_flags("eth0") & 1
    assert not kernel.get_flags("eth1") & 1


def test_interfaces_whose_names_were_given_by_hand(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, CARD, SECOND)
    kernel.interfaces[CARD] = ("enp3s0f0", "eth1")
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_udev_gives_the_name_a_little_later(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    record = take(sysfs, CARD, SECOND)
    kernel.interfaces[CARD] = ("eth1", "eth7")
    monkeypatch.setattr(reborn, "APPEARS_WITHIN", 30.0)
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            kernel.rename("eth7", "eth0")

    monkeypatch.setattr(time, "sleep", nap)
    assert given_back(sysfs, record) == []
    assert len(naps) == 3
    assert sysfs.picture() == before


def test_interface_that_stays_away(sysfs: Sysfs, kernel: Kernel) -> None:
    """A network card on a USB controller, unplugged meanwhile: told once, and no more waited for.

    The device itself is back, so that it is not kept from other VMs.
    """
    rich(sysfs, kernel)
    record = take(sysfs, CARD, SECOND)
    kernel.interfaces[CARD] = ("eth0",)
    assert given_back(sysfs, record) == [
        "0000:03:00.0 is with its driver again, but its interface eth1 is not there; `ip link` "
        "shows those that are: it may have been unplugged, or its driver is late"
    ]
    assert kernel.get_flags("eth0") & 1
    assert nothing_is_recorded(sysfs.host)
    assert problems(sysfs, CARD, SECOND, vm="db") == []
    assert given_back(sysfs, record) == []


def test_interface_that_stays_away_makes_the_unit_fail(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, CARD, SECOND)
    kernel.interfaces[CARD] = ("eth1",)
    with pytest.raises(MicrovmHostError, match="1 of the things that were set up could not be"):
        plan.take_back(record, lambda done: pci.undo(done, sysfs.host))
    assert sysfs.driver_of(CARD) == "e1000e"


def test_interface_that_cannot_be_set_up(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    rich(sysfs, kernel)
    record = take(sysfs, CARD, SECOND)

    def fail(name: str, flags: int) -> None:
        raise MicrovmHostError(f"interface {name}: Cannot assign requested address")

    monkeypatch.setattr(reborn, "set_flags", fail)
    [found] = given_back(sysfs, record)
    assert "interface eth0: Cannot assign requested address" in found
    assert nothing_is_recorded(sysfs.host)


def test_names_that_the_kernel_counts_up(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cards, and no udev that renames (net.ifnames=0): back in the same order."""
    sysfs.driver("vfio-pci")
    for address, name in ((CARD, "eth0"), (VMD, "eth1")):
        card = sysfs.device(address, "e1000e", int(name[-1]))
        sysfs.interface(name, card, up=name == "eth0")
    kernel.adopt()
    before = sysfs.picture()
    for order in ((CARD, VMD), (VMD, CARD)):
        record = take(sysfs, *order)
        kernel.interfaces = dict.fromkeys((CARD, VMD), ("eth%d",))
        monkeypatch.delattr(reborn, "rename", raising=False)
        assert given_back(sysfs, record) == []
        assert sysfs.picture() == before


def test_ports_of_a_card(sysfs: Sysfs, kernel: Kernel) -> None:
    sysfs.driver("vfio-pci")
    card = sysfs.device(CARD, "mlx4_core", 7)
    for port, name in enumerate(("wan", "lan")):
        sysfs.interface(name, card, up=name == "lan", attributes={"dev_port": f"{port}"})
    kernel.adopt()
    before = sysfs.picture()
    record = take(sysfs, CARD)
    assert record.read()[0] == [
        *("device", CARD, "mlx4_core", "", "lan", "wan"),
        *("lan - 1", "wan - 0"),
    ]
    kernel.interfaces[CARD] = ("eth1", "eth0")
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


def test_record_of_a_version_before_ports(sysfs: Sysfs, kernel: Kernel) -> None:
    """The toolkit may be upgraded while VMs run."""
    sysfs.driver("vfio-pci")
    card = sysfs.device(CARD, "e1000e", 7)
    sysfs.interface("lan", card, attributes={"dev_port": "0"})
    kernel.adopt()
    before = sysfs.picture()
    record = take(sysfs, CARD)
    old, *rest = record.read()
    record.keep([old[:6], *rest])
    kernel.interfaces[CARD] = ("eth0",)
    assert given_back(sysfs, record) == []
    assert sysfs.picture() == before


# ---- killed, or failing, at any point


class Killed(BaseException):
    """SIGKILL: nothing of the toolkit runs any more."""


class Fuse:
    """Ends whatever runs before its n-th change of the host, records and nodes included."""

    def __init__(self, number: int, error: BaseException) -> None:
        self.number = number
        self.error: BaseException | None = error
        self._inside = False

    @property
    def has_blown(self) -> bool:
        return self.error is None

    @contextmanager
    def burning(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in (
                (pci, "_put"),
                *((reborn, name) for name in ("rename", "set_flags")),
                *((os, name) for name in ("chmod", "chown", "rename", "unlink")),
                *((Record, name) for name in ("append", "clear")),
            ):
                patch.setattr(owner, name, self._wrapped(getattr(owner, name)))
            yield

    def _wrapped(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            # What the fake kernel does on a change is part of it.
            if self._inside:
                return change(*arguments, **options)
            if self.number == 0 and self.error is not None:
                error, self.error = self.error, None
                raise error
            self.number -= 1
            self._inside = True
            try:
                return change(*arguments, **options)
            finally:
                self._inside = False

        return wrapped


@contextmanager
def fresh() -> Iterator[tuple[Sysfs, Kernel]]:
    """One more host, where a test takes many."""
    with tempfile.TemporaryDirectory(prefix="mvh-") as directory:
        sysfs = Sysfs(Path(directory).resolve())
        with patched(Kernel(sysfs)) as kernel:
            yield sysfs, kernel


def killed_while_taking(sysfs: Sysfs, number: int) -> bool:
    record = record_of("web", sysfs.host)
    fuse = Fuse(number, Killed())
    steps = pci.plan("web", RICH, ALICE, sysfs.host)
    with fuse.burning():
        try:
            for step in steps:
                step.apply(record)
        except Killed:
            pass
    return fuse.has_blown


def killed_while_giving_back(sysfs: Sysfs, number: int) -> bool:
    fuse = Fuse(number, Killed())
    with fuse.burning():
        try:
            assert pci.undo(record_of("web", sysfs.host), sysfs.host) == []
        except Killed:
            pass
    return fuse.has_blown


def test_killed_at_any_point_of_taking(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    number = 0
    while killed_while_taking(sysfs, number):
        assert given_back(sysfs, record_of("web", sysfs.host)) == []
        assert sysfs.picture() == before, number
        assert nothing_is_recorded(sysfs.host)
        number += 1
    # 3 + 2 + 3 writes to sysfs, 4 lines of devices, and 4 changes for each of 7 nodes.
    assert number == 8 + 4 + 4 * 7


def test_killed_at_any_point_of_giving_back(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    number, goes_on = 0, True
    while goes_on:
        record = take(sysfs, *RICH)
        goes_on = killed_while_giving_back(sysfs, number)
        assert given_back(sysfs, record) == []
        assert sysfs.picture() == before, number
        assert nothing_is_recorded(sysfs.host)
        number += 1
    assert number > 30


def test_killed_and_started_again_without_giving_back(sysfs: Sysfs, kernel: Kernel) -> None:
    rich(sysfs, kernel)
    before = sysfs.picture()
    number = 0
    while killed_while_taking(sysfs, number):
        record = take(sysfs, *RICH)
        assert [sysfs.driver_of(address) for address in RICH] == ["vfio-pci"] * 4
        assert given_back(sysfs, record) == []
        assert sysfs.picture() == before, number
        assert nothing_is_recorded(sysfs.host)
        number += 3


# A driver and the override that goes with it.
DRIVERS = st.sampled_from(
    [(None, None), (None, "pci-stub"), ("e1000e", None), ("e1000e", "e1000e"), ("nvme", None)]
    + [("vfio-pci", "vfio-pci"), ("pci-stub", "pci-stub")]
    + [("e1000e", "vfio-pci"), ("uio_pci_generic", None)]
)
INTERFACES = st.lists(st.booleans(), max_size=2)
DEVICES = st.lists(st.tuples(DRIVERS, st.integers(0, 3), INTERFACES), min_size=1, max_size=5)


@settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=os.environ.get("CI") == "true",
)
@given(
    devices=DEVICES,
    number=st.integers(0, 30),
    error=st.sampled_from([OSError, MicrovmHostError, KeyboardInterrupt]),
    order=st.randoms(use_true_random=False),
)
def test_failing_anywhere_leaves_everything_as_it_was(
    devices: list[tuple[tuple[str | None, str | None], int, list[bool]]],
    number: int,
    error: Callable[[str], BaseException],
    order: Any,
) -> None:
    with fresh() as (sysfs, kernel):
        sysfs.driver("vfio-pci")
        sysfs.driver("pci-stub")
        addresses = []
        for bus, ((driver, override), group, interfaces) in enumerate(devices):
            addresses.append(f"{'0000' if bus % 2 else '10000'}:{bus:02x}:00.0")
            directory = sysfs.device(addresses[-1], driver, group, override=override)
            if driver == "e1000e":
                for each, up in enumerate(interfaces):
                    sysfs.interface(f"en{bus}n{each}", directory, up=up)
        kernel.adopt()
        sysfs.driver("ixgbe")
        for address in addresses:
            kernel.by_ids.setdefault(address, "ixgbe")
        before = sysfs.picture()
        order.shuffle(addresses)
        fuse = Fuse(number, error("no"))
        try:
            with fuse.burning():
                record = take(sysfs, *addresses)
        except (OSError, MicrovmHostError, KeyboardInterrupt):
            assert fuse.has_blown
        else:
            assert not fuse.has_blown
            assert {sysfs.driver_of(address) for address in addresses} == {"vfio-pci"}
            assert given_back(sysfs, record) == []
        assert sysfs.picture() == before
        assert nothing_is_recorded(sysfs.host)
