# SPDX-License-Identifier: MIT
"""A host's PCI devices as a tree of files, and a stand-in for the kernel that answers writes to it.

`Sysfs` lays out what the toolkit reads of /sys, /proc and /dev, where Linux has it: devices below
/sys/devices, links to them from buses, classes and IOMMU groups. `Kernel` is a fake: it does with
the tree what the kernel does when somebody writes to `unbind`, `bind`, `drivers_probe` and
`driver_override` (drivers/base/bus.c, drivers/base/dd.c and drivers/vfio of Linux), and has
switches for what goes wrong.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from errno import EBUSY, EINVAL, EIO, ENODEV, ENOENT, ETIMEDOUT
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microvm_host import hostuse, interfaces, pci, pcibus, process, reborn, sysfs
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths

NETWORK, STORAGE, DISPLAY = 0x020000, 0x010802, 0x030000
BRIDGE, ISA_BRIDGE, SOUND = 0x060400, 0x060100, 0x040300

IPV4_HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"
NO_IPV6 = "0" * 32


class Sysfs:
    """Files below a root, which are a host's."""

    def __init__(self, root: Path) -> None:
        self.host = HostPaths(str(root))
        self.root = root
        # Device nodes of disks: only root may make real ones.
        self.numbers: dict[str, tuple[int, int]] = {}
        for directory in ("bus/pci/devices", "bus/pci/drivers", "class/net", "class/block"):
            (root / "sys" / directory).mkdir(parents=True)
        (root / "sys/kernel/iommu_groups").mkdir(parents=True)
        (root / "sys/bus/pci/drivers_probe").write_text("")
        (root / "dev/vfio").mkdir(parents=True)
        (root / "run").mkdir(exist_ok=True)
        self.put("proc/cmdline", "root=/dev/sda2 quiet\n")
        self.put("proc/self/mountinfo", "22 1 0:20 / /proc rw - proc proc rw\n")
        self.put("proc/swaps", "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n")
        self.put("proc/net/route", IPV4_HEAD)
        self.put("proc/net/ipv6_route", "")

    def put(self, path: str, text: str) -> Path:
        """Write a file, given below the root."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return file

    def add(self, path: str, text: str) -> None:
        """Add a line to a file."""
        with open(self.root / path, "a") as file:
            file.write(f"{text}\n")

    # ---- PCI

    def driver(self, name: str, *, lets_go: bool = True) -> None:
        """A driver; one that has suppress_bind_attrs set has neither `bind` nor `unbind`."""
        directory = Path(self.host.pci_driver(name))
        if directory.exists():
            return
        directory.mkdir()
        for file in ("bind", "unbind") if lets_go else ():
            (directory / file).write_text("")

    def device(
        self,
        address: str,
        driver: str | None = None,
        group: int | None = None,
        *,
        class_code: int = NETWORK,
        header: int = 0,
        ids: tuple[int, int] = (0x8086, 0x10D3),
        override: str | None = None,
        behind: str | None = None,
    ) -> Path:
        """A function of a device.

        Args:
            header: its header type: 0x80 for one of several functions, 1 for a PCI bridge.
            behind: the address of the bridge that it is behind.
        """
        domain, bus = address.split(":")[:2]
        above = self.pci(behind) if behind else self.root / f"sys/devices/pci{domain}:{bus}"
        directory = above / address
        directory.mkdir(parents=True)
        vendor_id, device_id = ids
        (directory / "class").write_text(f"0x{class_code:06x}\n")
        (directory / "vendor").write_text(f"0x{vendor_id:04x}\n")
        (directory / "device").write_text(f"0x{device_id:04x}\n")
        (directory / "driver_override").write_text(f"{override or '(null)'}\n")
        (directory / "modalias").write_text(f"pci:v{vendor_id:08X}d{device_id:08X}\n")
        (directory / "reset_method").write_text("flr bus\n")
        (directory / "config").write_bytes(bytes([*[0] * 14, header, *[0] * 49]))
        Path(self.host.pci_device(address)).symlink_to(directory)
        if group is not None:
            inside = Path(self.host.iommu_groups) / str(group)
            (inside / "devices").mkdir(parents=True, exist_ok=True)
            (inside / "devices" / address).symlink_to(directory)
            (directory / "iommu_group").symlink_to(inside)
        if driver is not None:
            self.driver(driver)
            self.bind(address, driver)
        return directory

    def pci(self, address: str) -> Path:
        """The directory of a device."""
        return Path(self.host.pci_device(address)).resolve()

    def group(self, address: str) -> str | None:
        link = self.pci(address) / "iommu_group"
        return link.readlink().name if link.is_symlink() else None

    def driver_of(self, address: str) -> str | None:
        link = self.pci(address) / "driver"
        return link.readlink().name if link.is_symlink() else None

    def override_of(self, address: str) -> str | None:
        text = (self.pci(address) / "driver_override").read_text().strip()
        return None if text == "(null)" else text

    def bind(self, address: str, driver: str) -> None:
        """Have a driver have a device; vfio-pci and its kin make its nodes."""
        directory = Path(self.host.pci_driver(driver))
        (self.pci(address) / "driver").symlink_to(directory)
        (directory / address).symlink_to(self.pci(address))
        group = self.group(address)
        if is_vfio(driver) and group is not None:
            self._vfio_nodes(address, group)

    def _vfio_nodes(self, address: str, group: str) -> None:
        node = Path(self.host.vfio_group_node(group))
        if not node.exists():
            make_node(node)
        devices = Path(self.host.vfio_device_node("x")).parent
        taken = set(os.listdir(devices)) if devices.is_dir() else set()
        name = next(f"vfio{n}" for n in range(99) if f"vfio{n}" not in taken)
        self.put(f"{(self.pci(address) / 'vfio-dev' / name).relative_to(self.root)}/dev", "511:0\n")
        make_node(Path(self.host.vfio_device_node(name)))

    def unbind(self, address: str) -> None:
        """Take a device from its driver, and the nodes of vfio-pci with it."""
        driver = self.driver_of(address)
        assert driver is not None
        (self.pci(address) / "driver").unlink()
        (Path(self.host.pci_driver(driver)) / address).unlink()
        for entry in (self.pci(address) / "vfio-dev").glob("*"):
            node = Path(self.host.vfio_device_node(entry.name))
            node.unlink()
            if not os.listdir(node.parent):
                node.parent.rmdir()
        shutil.rmtree(self.pci(address) / "vfio-dev", ignore_errors=True)
        group = self.group(address)
        if group and not any(is_vfio(self.driver_of(mate)) for mate in self.mates(group)):
            Path(self.host.vfio_group_node(group)).unlink(missing_ok=True)

    def mates(self, group: str) -> list[str]:
        return sorted(os.listdir(f"{self.host.iommu_groups}/{group}/devices"))

    def remove(self, address: str) -> None:
        """Pull a device out."""
        if self.driver_of(address):
            self.unbind(address)
        group = self.group(address)
        if group is not None:
            (Path(self.host.iommu_groups) / group / "devices" / address).unlink()
        directory = self.pci(address)
        Path(self.host.pci_device(address)).unlink()
        shutil.rmtree(directory)

    # ---- network interfaces

    def interface(
        self,
        name: str,
        parent: Path | None = None,
        *,
        up: bool = True,
        attributes: dict[str, str] | None = None,
    ) -> Path:
        """An interface, of a device below whose directory it is, or of none (a bridge).

        Args:
            attributes: what else sysfs tells of it: `address`, `addr_assign_type`, `dev_port`.
        """
        above = parent or self.root / "sys/devices/virtual"
        directory = above / "net" / name
        directory.mkdir(parents=True)
        (directory / "flags").write_text("0x1003\n" if up else "0x1002\n")
        for attribute, text in (attributes or {}).items():
            (directory / attribute).write_text(f"{text}\n")
        Path(self.host.net_device(name)).symlink_to(directory)
        return directory

    def stack(self, upper: str, lower: str) -> None:
        """Have one interface stand on another: a bridge on its port, a VLAN on its card."""
        one, other = (Path(self.host.net_device(name)).resolve() for name in (upper, lower))
        (one / f"lower_{lower}").symlink_to(other)
        (other / f"upper_{upper}").symlink_to(one)

    def ipv4_route(
        self, name: str, *, to: str = "00000000", mask: str = "00000000", flags: int = 3
    ) -> None:
        self.add(
            "proc/net/route",
            f"{name}\t{to}\t0102A8C0\t{flags:04X}\t0\t0\t100\t{mask}\t0\t0\t0",
        )

    def ipv6_route(
        self, name: str, *, to: str = NO_IPV6, length: str = "00", flags: int = 0x3
    ) -> None:
        router = "fe800000000000000000000000000001"
        self.add(
            "proc/net/ipv6_route",
            f"{to} {length} {NO_IPV6} 00 {router} 00000400 00000001 00000000 {flags:08x} {name:>8}",
        )

    # ---- disks

    def disk(
        self, name: str, number: tuple[int, int], parent: Path | None = None, *, node: bool = True
    ) -> Path:
        """A disk or partition, of a device or another disk below whose directory it is, or of none.

        Args:
            number: major and minor, which no other disk has.
            node: whether /dev has it.
        """
        directory = (parent or self.root / "sys/devices/virtual/block") / name
        (directory / "holders").mkdir(parents=True)
        (directory / "slaves").mkdir()
        (directory / "dev").write_text(f"{number[0]}:{number[1]}\n")
        Path(self.host.block_device(name)).symlink_to(directory)
        if node:
            path = Path(self.host.block_node(name))
            path.parent.mkdir(exist_ok=True)
            path.write_text("")
            self.numbers[str(path)] = number
        return directory

    def hold(self, upper: str, lower: str) -> None:
        """Have one block device stand on another: md on its members, LVM on its volumes."""
        one, other = (Path(self.host.block_device(name)).resolve() for name in (upper, lower))
        (one / "slaves" / lower).symlink_to(other)
        (other / "holders" / upper).symlink_to(one)

    def mount(
        self, place: str, number: str, source: str, kind: str = "ext4", *, part: str = "/"
    ) -> None:
        """Mount a file system, or bind a part of it."""
        self.add(
            "proc/self/mountinfo",
            f"30 22 {number} {part} {place} rw,relatime shared:1 - {kind} {source} rw",
        )

    # ---- all of it

    def picture(self) -> dict[str, str]:
        """All of /sys and /dev as text, to be compared."""
        found = {}
        for top in ("sys", "dev"):
            for directory, directories, files in os.walk(self.root / top):
                for name in (*directories, *files):
                    path = Path(directory) / name
                    found[str(path.relative_to(self.root))] = _described(path)
        return found


def _described(path: Path) -> str:
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        return f"-> {path.readlink()}"
    if stat.S_ISDIR(status.st_mode):
        return "directory"
    if stat.S_ISCHR(status.st_mode):
        return f"node {stat.S_IMODE(status.st_mode):o} {status.st_uid}:{status.st_gid}"
    return path.read_bytes().hex() if path.name == "config" else path.read_text()


def make_node(path: Path, mode: int = 0o600) -> None:
    """A character device, of the one number that needs no root (mknod(2), Linux 5.8)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mknod(path, stat.S_IFCHR | mode, os.makedev(0, 0))


def is_vfio(driver: str | None) -> bool:
    """Whether a driver is vfio-pci or one of its kin: mlx5_vfio_pci."""
    return driver is not None and driver.replace("_", "-").endswith("vfio-pci")


# Where the tree keeps the driver that does not come back from unbinding.
HUNG = "hung_driver"


class Hangs(BaseException):
    """The writer or reader waits in the kernel: no way out of there, if it does so in person."""


class Kernel:
    """Answers writes to the tree. A fake; what it cannot know stands in its attributes.

    It keeps nothing to itself: all that changes is in the tree, where what forked processes write
    is seen too.
    """

    def __init__(self, sysfs: Sysfs) -> None:
        self.sysfs = sysfs
        # The driver that takes a device by its IDs, and the interfaces that it makes then.
        self.by_ids: dict[str, str] = {}
        # Drivers that have no IDs, and devices only by an override (or by new_id).
        self.without_ids = {"uio_pci_generic"}
        # `eth%d` is counted up; `attributes` are theirs, and whether they come up by themselves is
        # for whoever manages the network.
        self.interfaces: dict[str, tuple[str, ...]] = {}
        self.attributes: dict[str, tuple[dict[str, str], ...]] = {}
        self.sets_up = False
        # Pairs of driver and address for which probing fails.
        self.fails_to_bind: set[tuple[str, str]] = set()
        # What writing to a driver's `unbind` gives, and those that wait for ever in there.
        self.unbind_error: dict[str, int] = {}
        self.hangs: set[str] = set()
        # Drivers that wait for ever when they are to take a device.
        self.hangs_in_probe: set[str] = set()
        # Nodes that somebody has open and that nobody else may open, and errors of any write.
        self.opened: set[str] = set()
        self.write_error: dict[str, int] = {}
        # What modprobe finds: the drivers that modules bring, by name or alias.
        self.modules = {"vfio-pci": "vfio-pci"}
        # Those of them that are there and cannot be loaded.
        self.broken_modules: set[str] = set()
        # Called before each write.
        self.before_write: Callable[[str, str], None] = lambda path, text: None
        self.chowned: list[tuple[str, int, int]] = []

    def adopt(self) -> None:
        """Take it that each device's present driver is the one by its IDs, as are interfaces."""
        for address in os.listdir(self.sysfs.host.pci_device("")):
            driver = self.sysfs.driver_of(address)
            if driver is not None and not is_vfio(driver) and driver not in self.without_ids:
                self.by_ids[address] = driver
                net = self.sysfs.pci(address) / "net"
                if net.is_dir():
                    self.interfaces[address] = tuple(sorted(os.listdir(net)))
                    self.attributes[address] = tuple(
                        {
                            file.name: file.read_text().strip()
                            for file in (net / name).iterdir()
                            if file.is_file() and file.name != "flags"
                        }
                        for name in self.interfaces[address]
                    )

    def put(self, path: str, text: str) -> None:
        """What stands for `pci._put`."""
        self.before_write(path, text)
        file = Path(path)
        if str(file) in self.write_error:
            raise OSError(self.write_error[str(file)], os.strerror(self.write_error[str(file)]))
        if not file.exists():
            raise FileNotFoundError(ENOENT, os.strerror(ENOENT), path)
        device = Path(self.sysfs.host.pci_device(text))
        locked = file.parent if file.name == "driver_override" else device
        if os.path.lexists(locked / HUNG):
            raise Hangs
        if file.name == "driver_override":
            if len(text) >= 4095:
                raise OSError(EINVAL, "Invalid argument")
            file.write_text(f"{text.strip() or '(null)'}\n")
        elif file.name == "unbind":
            self._unbind(text, file.parent.name)
        elif file.name == "bind":
            self._bind(text, file.parent.name)
        elif file.name == "drivers_probe":
            self._probe(text)
        else:
            raise AssertionError(f"nobody writes to {path}")

    def _unbind(self, address: str, driver: str) -> None:
        if not self._is_there(address) or self.sysfs.driver_of(address) != driver:
            raise OSError(ENODEV, os.strerror(ENODEV))
        if driver in self.hangs:
            self._hang(address)
        if driver in self.unbind_error:
            raise OSError(self.unbind_error[driver], os.strerror(self.unbind_error[driver]))
        net = self.sysfs.pci(address) / "net"
        for name in os.listdir(net) if net.is_dir() else ():
            Path(self.sysfs.host.net_device(name)).unlink()
        shutil.rmtree(net, ignore_errors=True)
        self.sysfs.unbind(address)

    def _hang(self, address: str) -> None:
        """The driver is out of sysfs already, and the device is locked until it has let go."""
        directory = self.sysfs.pci(address)
        (directory / "driver").rename(directory / HUNG)
        raise Hangs

    def let_go(self, *addresses: str) -> None:
        """End what hangs; taking ends well."""
        for address in addresses:
            directory = self.sysfs.pci(address)
            if (directory / "driver").is_symlink():
                (directory / HUNG).unlink()
                driver = self.sysfs.driver_of(address)
                assert driver is not None
                self.hangs_in_probe.discard(driver)
                (directory / "driver").unlink()
                self._bind(address, driver)
                continue
            (directory / HUNG).rename(directory / "driver")
            driver = self.sysfs.driver_of(address)
            self.hangs.discard(driver or "")
            assert driver is not None
            self._unbind(address, driver)

    def _matches(self, address: str, driver: str) -> bool:
        override = self.sysfs.override_of(address)
        return driver == (override or self.by_ids.get(address))

    def _bind(self, address: str, driver: str) -> None:
        if not self._is_there(address) or not self._matches(address, driver):
            raise OSError(ENODEV, os.strerror(ENODEV))
        if self.sysfs.driver_of(address) is not None:
            raise OSError(EBUSY, os.strerror(EBUSY))
        if (driver, address) in self.fails_to_bind:
            raise OSError(EIO, os.strerror(EIO))
        if driver in self.hangs_in_probe:
            # In sysfs it has the device already.
            for link in ("driver", HUNG):
                directory = self.sysfs.pci(address)
                (directory / link).symlink_to(self.sysfs.host.pci_driver(driver))
            raise Hangs
        self.sysfs.bind(address, driver)
        if not is_vfio(driver):
            given = self.interfaces.get(address, ())
            known = [*self.attributes.get(address, ()), *({} for _ in given)]
            for name, attributes in zip(given, known, strict=False):
                self.sysfs.interface(
                    self._counted(name),
                    self.sysfs.pci(address),
                    up=self.sets_up,
                    attributes=attributes,
                )

    def _counted(self, name: str) -> str:
        names = (name.replace("%d", str(number)) for number in range(99))
        return next(each for each in names if not os.path.exists(self.sysfs.host.net_device(each)))

    def _probe(self, address: str) -> None:
        """Tell nobody if no driver takes it: the write is good all the same."""
        if not self._is_there(address):
            raise OSError(ENODEV, os.strerror(ENODEV))
        for driver in sorted(os.listdir(self.sysfs.host.pci_driver(""))):
            if self.sysfs.driver_of(address) is None and self._matches(address, driver):
                try:
                    self._bind(address, driver)
                except OSError:
                    pass

    def _is_there(self, address: str) -> bool:
        return Path(self.sysfs.host.pci_device(address)).exists()

    # ---- netdevice(7)

    def get_flags(self, name: str) -> int:
        return int(self._interface(name, "flags").read_text(), 16)

    def set_flags(self, name: str, flags: int, *, clear: int = 0) -> None:
        now = self.get_flags(name) & ~clear | flags
        self._interface(name, "flags").write_text(f"0x{now:x}\n")

    def rename(self, name: str, to: str) -> None:
        # As before Linux 6.2.
        if self.get_flags(name) & interfaces.IFF_UP:
            raise MicrovmHostError(f"interface {name}: Device or resource busy")
        if Path(self.sysfs.host.net_device(to)).exists():
            raise MicrovmHostError(f"interface {name}: File exists")
        link = Path(self.sysfs.host.net_device(name))
        directory = link.resolve()
        link.unlink()
        directory.rename(directory.with_name(to))
        Path(self.sysfs.host.net_device(to)).symlink_to(directory.with_name(to))

    def _interface(self, name: str, attribute: str) -> Path:
        path = Path(self.sysfs.host.net_device(name))
        if not path.exists():
            raise MicrovmHostError(f"interface {name}: No such device")
        return path / attribute

    # ---- system calls

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Put it where the toolkit would reach the real one."""
        patch.setattr(pci, "_put", self.put)
        for name in ("get_flags", "set_flags", "rename"):
            patch.setattr(reborn, name, getattr(self, name))
        for module in (hostuse, pci, pcibus, reborn):
            patch.setattr(module, "attribute", self.attribute)
        patch.setattr(process, "call_apart", self._call_apart)
        patch.setattr(process, "output", self._program)
        real_open, real_stat = os.open, os.stat

        def opened(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            if str(path) in self.opened:
                raise OSError(EBUSY, os.strerror(EBUSY), path)
            return real_open(path, flags, *arguments, **options)

        def statted(path: Any, *arguments: Any, **options: Any) -> Any:
            found = real_stat(path, *arguments, **options)
            number = isinstance(path, str) and self.sysfs.numbers.get(os.path.realpath(path))
            return SimpleNamespace(st_rdev=os.makedev(*number)) if number else found

        patch.setattr(os, "open", opened)
        patch.setattr(os, "stat", statted)
        patch.setattr(os, "chown", self._chown)

    def _chown(self, path: str, uid: int, gid: int, *, follow_symlinks: bool = True) -> None:
        # Only root may in earnest.
        Path(path).lstat()
        self.chowned.append((path, uid, gid))

    def attribute(self, directory: str, name: str) -> str | None:
        """What stands for `sysfs.attribute`: some wait for the device's lock."""
        if name in ("driver_override", "sriov_numvfs") and os.path.lexists(f"{directory}/{HUNG}"):
            raise Hangs
        return sysfs.attribute(directory, name)

    @staticmethod
    def _call_apart(
        call: Callable[[], object], patience: float, wait: Callable[[float], object]
    ) -> None:
        """What stands for `process.call_apart`, in this process and without waiting."""
        try:
            call()
        except Hangs:
            wait(patience)
            raise OSError(ETIMEDOUT, os.strerror(ETIMEDOUT)) from None

    def _program(self, argv: list[str], *, errors: bool = False) -> str:
        """What stands for `process.output`, for modprobe(8) alone."""
        program, *options, module = argv
        assert program == "modprobe"
        if module not in self.modules:
            # Quiet, it says nothing of this.
            said = f": FATAL: Module {module} not found." if errors and "-q" not in options else ""
            raise MicrovmHostError(f"`{' '.join(argv)}` failed with 1{said}")
        if module in self.broken_modules and "-n" not in options:
            said = f": ERROR: could not insert '{module}'" if errors else ""
            raise MicrovmHostError(f"`{' '.join(argv)}` failed with 1{said}")
        if "-n" not in options:
            self.sysfs.driver(self.modules[module])
        return ""


@contextmanager
def patched(kernel: Kernel) -> Iterator[Kernel]:
    """The same for as long as a block, for tests that take many hosts."""
    with pytest.MonkeyPatch.context() as patch:
        kernel.install(patch)
        yield kernel
