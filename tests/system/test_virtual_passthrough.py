# SPDX-License-Identifier: MIT
"""PCI passthrough on a machine with an IOMMU: real devices, real drivers, a real guest.

Every test ends with a comparison of all PCI devices of the host with what they were before it:
drivers, overrides, network interfaces, nodes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.guest.image import Image
from tests.guest.package import Card, Guest, Stub
from tests.host.fixtures import require_virtual
from tests.host.virtual import (
    SPARE_DISK,
    SPARE_DISPLAY,
    SPARE_E1000E,
    SPARE_E1000E_MAC,
    SPARE_NET,
    SPARE_NET_MAC,
    SPARE_NVME,
    SPARE_PAIR,
    SPARE_PAIR_BRIDGE,
    SPARE_RNG,
    SPARE_USB,
    VirtualHost,
)

from .rounds import rounds
from .toolkit import IMAGE, Toolkit, eventually
from .udev import check_that_udev_keeps, check_what_udev_would_do, owners

pytestmark = pytest.mark.virtual

# What every virtual host has (tests/host/virtual.py).
ROOT_DISK = "0000:00:02.0"
OUTER_CARD = "0000:00:04.0"
AHCI = "0000:00:1f.2"

# One line a fact about the PCI devices. The number behind a driver is that of its link in sysfs,
# which the kernel makes anew at each binding.
_STATE = r"""
cd /sys/bus/pci/devices
find */ -maxdepth 1 -name driver -printf '%h driver %l %i\n'
for address in *; do
    read -r override <$address/driver_override
    echo "$address override $override"
done
for link in /sys/class/net/*; do
    read -r flags <$link/flags
    [ -e $link/device ] && echo "interface ${link##*/} up $((flags & 1))"
done
# A node may go between being found and looked at, which find takes for a failure.
find /dev/vfio -mindepth 1 -printf 'node %p %u:%g %m\n' || true
"""


def state(machine: Toolkit, *, bindings: bool = False) -> set[str]:
    """What the PCI devices of the host are now, a line each fact.

    With `bindings` a device that lost its driver and got it back differs as well.
    """
    lines = set()
    for line in machine.sh(_STATE).splitlines():
        words = line.split(" ")
        if words[1] == "driver":
            words[2] = words[2].rpartition("/")[2]
            if not bindings:
                del words[3]
        lines.add(" ".join(words))
    assert any(" driver " in line for line in lines)
    return lines


def await_state(machine: Toolkit, expected: set[str], timeout: float = 120) -> None:
    """Wait until the devices are as expected; what is not is shown.

    Units that give devices back run on when `systemctl stop` of the VM has returned.
    """
    deadline = time.monotonic() + timeout
    while (found := state(machine)) != expected:
        if time.monotonic() > deadline:
            raise AssertionError(
                f"now: {sorted(found - expected)}; before: {sorted(expected - found)}"
            )
        time.sleep(0.1)


def drivers(machine: Toolkit, *addresses: str) -> list[str]:
    """The drivers that devices have now; `-` for none."""
    line = 'for a; do basename "$(readlink /sys/bus/pci/devices/$a/driver || echo -)"; done'
    return machine.host.run(["sh", "-c", line, "sh", *addresses]).stdout.split()


def node(machine: Toolkit, address: str) -> str:
    """The node of the device's IOMMU group."""
    group = machine.sh(f"readlink /sys/bus/pci/devices/{address}/iommu_group")
    return f"/dev/vfio/{group.strip().rpartition('/')[2]}"


def has_line(text: str, *words: str) -> bool:
    """Whether some line has all the words."""
    return any(all(word in line for word in words) for line in text.splitlines())


# Opens devices as a hypervisor does (linux/vfio.h), and then waits.
_HOLD = r"""
import fcntl, os, signal, struct, sys
SET_IOMMU, SET_CONTAINER, GET_DEVICE_FD = (ord(";") << 8 | 100 + number for number in (2, 4, 6))
container = os.open("/dev/vfio/vfio", os.O_RDWR)
groups = {}
for address in sys.argv[1:]:
    name = os.path.basename(os.readlink(f"/sys/bus/pci/devices/{address}/iommu_group"))
    if name not in groups:
        groups[name] = os.open(f"/dev/vfio/{name}", os.O_RDWR)
        fcntl.ioctl(groups[name], SET_CONTAINER, struct.pack("i", container))
        if len(groups) == 1:
            fcntl.ioctl(container, SET_IOMMU, 1)
    fcntl.ioctl(groups[name], GET_DEVICE_FD, address.encode() + b"\0")
    print("HOLDS", address, flush=True)
signal.pause()
"""


def hold(*addresses: str) -> str:
    """The command that opens devices and keeps them."""
    return shlex.join(["python3", "-IS", "-c", _HOLD, *addresses])


def holder(name: str, *addresses: str) -> Stub:
    """A VM whose hypervisor does nothing but hold its devices."""
    return Stub(name=name, pci_devices=addresses, run=f"exec {hold(*addresses)}")


def start_and_hold(machine: Toolkit, name: str, *addresses: str) -> None:
    machine.systemctl("start", f"microvm@{name}")
    for address in addresses:
        machine.await_line(name, f"HOLDS {address}")


def main_process(machine: Toolkit, name: str) -> str:
    return machine.property(f"microvm@{name}", "MainPID")


@pytest.fixture(scope="module")
def machine() -> Iterator[Toolkit]:
    """A virtual host with the toolkit and spare devices; one of its spare cards is up."""
    require_virtual()
    with VirtualHost(memory=3072, spare_devices=True) as host:
        toolkit = Toolkit(host)
        toolkit.install()
        toolkit.build_image()
        toolkit.sh(
            "useradd --create-home alice; ip link set enp1s0 up; "
            # From here on it belongs to the state that everything returns to.
            "modprobe vfio-pci"
        )
        yield toolkit


def take_away(machine: Toolkit, name: str) -> None:
    """Remove a VM, whatever state a test left it in.

    `Toolkit.remove` reloads systemd each time, which takes seconds where the CPU is emulated.
    """
    machine.sh(
        f"systemctl kill -s KILL microvm@{name} 2>/dev/null; "
        f"systemctl stop microvm@{name} microvm-pci-devices@{name}; "
        f"systemctl reset-failed 'microvm*@{name}.service' 2>/dev/null; "
        f"rm -rf /var/lib/microvms/{name} /opt/packages/{name} /etc/microvms/{name}.toml; "
        f"d=/etc/systemd/system/microvm@{name}.service.d; "
        "if [ -e $d ]; then rm -r $d; systemctl daemon-reload; fi",
        timeout=200,
    )


HELPER = "/usr/local/libexec/microvm-host/helper"

_numbers = itertools.count(1)


@pytest.fixture
def vm(machine: Toolkit) -> Iterator[str]:
    """A name for a VM; another may have it with a `b` behind. Nothing is left of either."""
    name = f"pci{next(_numbers)}"
    footprint, devices = machine.footprint(), state(machine)
    yield name
    both = (name, f"{name}b")
    for each in both:
        take_away(machine, each)
    try:
        machine.await_footprint(footprint, timeout=30)
        await_state(machine, devices)
    finally:
        # A record that was left would keep the devices from all tests that follow.
        for each in both:
            machine.sh(f"{HELPER} pci-devices-down {each}")


def test_the_spare_devices_are_where_the_host_says(machine: Toolkit) -> None:
    """What the other tests stand on."""
    found = {
        line.split()[0]: line.split()[1:]
        for line in machine.sh(
            "cd /sys/bus/pci/devices; for a in *; do "
            "echo $a $(cat $a/class) $(basename $(readlink $a/iommu_group)); done"
        ).splitlines()
    }
    classes = {
        ROOT_DISK: "0x010000",
        OUTER_CARD: "0x020000",
        SPARE_E1000E: "0x020000",
        SPARE_NET: "0x020000",
        SPARE_RNG: "0x00ff00",
        SPARE_DISK: "0x010000",
        SPARE_PAIR[0]: "0x00ff00",
        SPARE_PAIR[1]: "0x00ff00",
        SPARE_PAIR_BRIDGE: "0x060400",
        SPARE_DISPLAY: "0x030000",
        SPARE_NVME: "0x010802",
        AHCI: "0x010601",
    }
    assert {address: found[address][0] for address in classes} == classes
    alone = [a for a in classes if a not in (*SPARE_PAIR, SPARE_PAIR_BRIDGE, AHCI)]
    for address in alone:
        assert [a for a in found if found[a][1] == found[address][1]] == [address]
    pair = found[SPARE_PAIR[0]][1]
    assert [a for a in found if found[a][1] == pair] == [SPARE_PAIR_BRIDGE, *SPARE_PAIR]
    interfaces = machine.sh("ip -br link")
    assert has_line(interfaces, "enp1s0", SPARE_E1000E_MAC), interfaces
    assert has_line(interfaces, "enp0s8", SPARE_NET_MAC), interfaces


def test_a_real_guest_uses_its_devices(machine: Toolkit, vm: str) -> None:
    """Cards, a disk, and both endpoints of one group; each is the host's again when it stops."""
    devices = (SPARE_E1000E, SPARE_NET, SPARE_DISK, *SPARE_PAIR)
    machine.sh("echo hello from the host >/dev/vdb")
    machine.create(
        Guest(
            name=vm,
            image=Image(Path(IMAGE)),
            placement="refer",
            image_prefix=IMAGE,
            pci_devices=devices,
            cards=(
                Card(mac=SPARE_E1000E_MAC, address="10.0.4.15/24"),
                Card(mac=SPARE_NET_MAC, address="10.0.5.15/24"),
            ),
            disks=("spare",),
            pings=("10.0.4.2", "10.0.5.2"),
        )
    )
    before = state(machine)
    machine.systemctl("start", f"microvm@{vm}", timeout=120)
    assert drivers(machine, *devices) == ["vfio-pci"] * 5
    lines = machine.await_line(vm, f"GUEST {vm}: ready", timeout=180)
    text = "\n".join(lines)
    for what in (
        "8086:10d3 driver e1000e",
        "1af4:1041 driver virtio-pci",
        "1af4:1042 driver virtio-pci",
        "disk spare holds: hello from the host",
        "disk spare write: ok",
        "rng virtio_rng.0 gave 16 bytes",
        "rng virtio_rng.1 gave 16 bytes",
        "ping 10.0.4.2 ok",
        "ping 10.0.5.2 ok",
    ):
        assert has_line(text, f"GUEST {vm}: ", what), text

    main = main_process(machine, vm)
    assert "accel=kvm" in machine.host.read(f"/proc/{main}/cmdline")
    status = machine.host.read(f"/proc/{main}/status")
    user = machine.sh("id -u microvm").strip()
    assert f"\nUid:\t{user}\t{user}\t{user}\t{user}\n" in status and user != "0"
    # All of the guest's memory is pinned for its devices, within what the process may lock.
    (locked,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmLck")]
    assert int(locked) >= 256 * 1024
    (limit,) = [
        line.split()[3]
        for line in machine.host.read(f"/proc/{main}/limits").splitlines()
        if line.startswith("Max locked memory")
    ]
    assert limit == "unlimited" or int(limit) > int(locked) * 1024
    opened = machine.sh(f"readlink /proc/{main}/fd/*", check=False).splitlines()
    nodes = {node(machine, address) for address in devices}
    assert len(nodes) == 4
    assert nodes <= set(opened)
    for each in nodes:
        assert machine.sh(f"stat -c '%U:%G %a' {each}").strip() == "microvm:microvm 600"

    machine.systemctl("stop", f"microvm@{vm}", timeout=120)
    assert machine.property(f"microvm@{vm}", "Result") == "success"
    await_state(machine, before)
    assert "interface enp1s0 up 1" in before and "interface enp0s8 up 0" in before
    assert machine.sh("dd if=/dev/vdb bs=512 skip=1 count=1 | tr -d '\\0'") == f"written by {vm}\n"


def test_a_declared_guest_uses_its_devices(machine: Toolkit, vm: str) -> None:
    """A card, a USB device and the machine q35; ready by the credential that its tables have."""
    vendor, product = SPARE_USB
    rule = f'ATTR{{idVendor}}=="{vendor}", ATTR{{idProduct}}=="{product}"'
    rules = "/run/udev/rules.d/60-spare-usb.rules"
    # USB devices are the administrator's to give.
    machine.host.write(rules, f'SUBSYSTEM=="usb", {rule}, OWNER="microvm"\n')
    machine.sh(
        "udevadm control --reload; udevadm trigger --settle --subsystem-match=usb; "
        "mkdir -p /etc/microvms /srv/tree; mount --bind / /srv/tree"
    )
    machine.host.write(
        f"/etc/microvms/{vm}.toml",
        f"""\
autostart = false
kernel = "{IMAGE}/vmlinuz"
initrd = "{IMAGE}/initrd"
mem = 256
readiness = "guest"
vsock.cid = 66
kernelParams = [
    "quiet", "loglevel=3", "guest.name={vm}", "guest.share=tree,/mnt/tree",
    "guest.notify=/mnt/tree,credential", "guest.net={SPARE_E1000E_MAC},10.0.4.15/24",
    "guest.ping=10.0.4.2", "guest.usb={vendor}:{product}",
]

[[shares]]
tag = "tree"
source = "/srv/tree"
proto = "virtiofs"
readOnly = true

[[devices]]
bus = "pci"
path = "{SPARE_E1000E}"

[[devices]]
bus = "usb"
path = "vendorid=0x{vendor},productid=0x{product}"
""",
    )
    # A busy host that is emulated itself takes its time.
    machine.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/slow.conf",
        "[Service]\nTimeoutStartSec=600\nRestart=no\n",
    )
    before, input_devices = state(machine), machine.sh("ls -d /sys/bus/usb/drivers/usbhid/*:*")
    # It reloads systemd, too.
    machine.sh("microvm apply")
    machine.systemctl("start", f"microvm@{vm}", timeout=620)
    lines = machine.journal(vm)
    text = "\n".join(lines)
    assert drivers(machine, SPARE_E1000E) == ["vfio-pci"]
    assert has_line(text, f"GUEST {vm}: pci", "8086:10d3 driver e1000e"), text
    assert has_line(text, f"GUEST {vm}: net", SPARE_E1000E_MAC, "driver e1000e"), text
    assert f"GUEST {vm}: ping 10.0.4.2 ok" in lines, text
    assert f"GUEST {vm}: usb {vendor}:{product} QEMU USB Tablet" in lines, text
    assert f"GUEST {vm}: notifies vsock:2:9066" in lines, text
    command = machine.host.read(f"/proc/{main_process(machine, vm)}/cmdline")
    assert "\0q35,accel=kvm," in command, command
    status = machine.property(f"microvm@{vm}", "StatusText")
    assert status.endswith("; the guest says: Said by systemd-notify."), status
    machine.systemctl("stop", f"microvm@{vm}", timeout=120)
    assert machine.property(f"microvm@{vm}", "Result") == "success"
    await_state(machine, before)
    assert machine.sh("ls -d /sys/bus/usb/drivers/usbhid/*:*") == input_devices
    machine.sh(f"umount /srv/tree; rm {rules}; udevadm control --reload")


def test_addresses_in_their_other_forms(machine: Toolkit, vm: str) -> None:
    """Without the domain, with a longer one, and as a glob that one device fits."""
    devices = (SPARE_E1000E, SPARE_NET, SPARE_RNG)
    forms = (SPARE_E1000E.removeprefix("0000:"), f"0{SPARE_NET}", f"*{SPARE_RNG[4:]}")
    machine.create(Stub(name=vm, pci_devices=forms, run=f"exec {hold(*devices)}"))
    before = state(machine)
    start_and_hold(machine, vm, *devices)
    assert drivers(machine, *devices) == ["vfio-pci"] * 3
    machine.systemctl("stop", f"microvm@{vm}")
    await_state(machine, before)


@pytest.mark.fault
@pytest.mark.parametrize("seconds", [0, 6], ids=["stopped-at-once", "up-again"])
def test_a_hypervisor_that_was_killed(machine: Toolkit, vm: str, seconds: int) -> None:
    devices = (SPARE_E1000E, SPARE_NET)
    machine.create(holder(vm, *devices))
    before = state(machine)
    start_and_hold(machine, vm, *devices)
    main = main_process(machine, vm)
    machine.sh(f"kill -KILL {main}")
    if seconds:
        # Restart=always has it up again, with its devices.
        eventually(
            lambda: [line for line in machine.journal(vm) if f"HOLDS {devices[1]}" in line],
            lambda lines: len(lines) == 2,
            180,
            "the hypervisor is not up again",
        )
        assert main_process(machine, vm) not in ("0", main)
        assert drivers(machine, *devices) == ["vfio-pci", "vfio-pci"]
    machine.systemctl("stop", f"microvm@{vm}")
    await_state(machine, before)


def test_a_hypervisor_that_stays_dead_keeps_nothing(machine: Toolkit, vm: str) -> None:
    devices = (SPARE_E1000E, SPARE_NET)
    machine.create(holder(vm, *devices))
    machine.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/once.conf", "[Service]\nRestart=no\n"
    )
    machine.systemctl("daemon-reload")
    before = state(machine)
    start_and_hold(machine, vm, *devices)
    machine.sh(f"kill -KILL {main_process(machine, vm)}")
    await_state(machine, before)
    assert machine.property(f"microvm@{vm}", "Result") == "signal"


# Kills a helper when the drivers of two devices are just so, and tells what they were right after.
_SNIPER = r"""
import os, sys, time
verb, vm, *wanted = sys.argv[1:]
devices = dict(word.split("=") for word in wanted)

def driver(address):
    try:
        return os.path.basename(os.readlink(f"/sys/bus/pci/devices/{address}/driver"))
    except FileNotFoundError:
        return "-"

def helper():
    for pid in os.listdir("/proc"):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as source:
                if source.read().split(b"\0")[-3:-1] == [verb.encode(), vm.encode()]:
                    return int(pid)
        except (OSError, ValueError):
            pass

deadline = time.monotonic() + 20
print("armed", flush=True)
while not (pid := helper()) and time.monotonic() < deadline:
    pass
while time.monotonic() < deadline and os.path.exists(f"/proc/{pid}"):
    if all(driver(address) == name for address, name in devices.items()):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            sys.exit("missed")
        break
else:
    sys.exit("missed")
try:
    while open(f"/proc/{pid}/stat").read().split()[2] not in "ZX":
        pass
except (FileNotFoundError, ProcessLookupError):
    # Somebody has noticed its end.
    pass
print(*(driver(address) for address in devices), flush=True)
"""


def shoot(machine: Toolkit, verb: str, vm: str, action: list[str], **wanted: str) -> list[str]:
    """Run systemctl; kill the helper of that verb when the devices' drivers are as wanted.

    Args:
        wanted: address to driver.

    Returns:
        The drivers right after the helper's end; nothing if it was too quick.
    """
    words = [f"{address}={driver}" for address, driver in wanted.items()]
    sniper = machine.host.spawn(["python3", "-IS", "-c", _SNIPER, verb, vm, *words])
    assert sniper.stdout is not None
    assert sniper.stdout.readline() == "armed\n"
    machine.host.run(["systemctl", *action], check=False)
    out, complaint = sniper.communicate(timeout=60)
    assert sniper.returncode == 0 or "missed" in (complaint or ""), complaint
    return out.split()


@pytest.mark.fault
@pytest.mark.parametrize("second", ["virtio-pci", "-"], ids=["between-two", "in-the-middle"])
def test_a_helper_that_was_killed_while_taking(machine: Toolkit, vm: str, second: str) -> None:
    """The first device is on vfio-pci; the second still as it was, or of no driver just now."""
    devices = (SPARE_E1000E, SPARE_NET)
    machine.create(holder(vm, *devices))
    before = state(machine)
    for _ in range(40):
        hit = shoot(
            machine,
            "pci-devices-up",
            vm,
            ["start", f"microvm@{vm}"],
            **{SPARE_E1000E: "vfio-pci", SPARE_NET: second},
        )
        if hit:
            result = machine.property(f"microvm-pci-devices@{vm}", "Result")
        machine.systemctl("stop", f"microvm@{vm}", f"microvm-pci-devices@{vm}")
        await_state(machine, before)
        if hit[:1] == ["vfio-pci"] and hit[1] != "vfio-pci":
            assert result == "signal"
            return
    raise AssertionError("the helper was never hit between its two devices")


@pytest.mark.fault
def test_a_helper_that_was_killed_while_giving_back(machine: Toolkit, vm: str) -> None:
    """What it has left is given back when the unit has stopped, and the VM starts as ever."""
    devices = (SPARE_E1000E, SPARE_NET)
    machine.create(holder(vm, *devices))
    before = state(machine)
    for _ in range(40):
        start_and_hold(machine, vm, *devices)
        # Given back in reverse.
        hit = shoot(
            machine,
            "pci-devices-down",
            vm,
            ["stop", f"microvm@{vm}", f"microvm-pci-devices@{vm}"],
            **{SPARE_E1000E: "vfio-pci", SPARE_NET: "virtio-pci"},
        )
        # systemctl has waited for this unit as well.
        assert machine.property(f"microvm-pci-devices@{vm}", "ActiveState") == "inactive"
        assert state(machine) == before
        if hit == ["vfio-pci", "virtio-pci"]:
            break
    else:
        raise AssertionError("the helper was never hit between its two devices")
    machine.systemctl("start", f"microvm@{vm}")
    assert drivers(machine, *devices) == ["vfio-pci", "vfio-pci"]
    machine.systemctl("stop", f"microvm@{vm}")
    await_state(machine, before)


# Starts and stops a VM again and again, and looks at the host after each; in there, and without a
# shell's many processes, because a round takes seconds as it is.
_ROUNDS = r"""
import glob, os, subprocess, sys, time
rounds, vm, *devices = sys.argv[1:]

def text(path):
    with open(path) as source:
        return source.read().strip()

def driver(device):
    link = f"{device}/driver"
    return os.path.basename(os.readlink(link)) if os.path.islink(link) else None

def state():
    devices, cards = glob.glob("/sys/bus/pci/devices/*"), glob.glob("/sys/class/net/*")
    found = {device: (driver(device), text(f"{device}/driver_override")) for device in devices}
    found |= {card: text(f"{card}/flags") for card in cards}
    return found | {node: os.stat(node).st_uid for node in glob.glob("/dev/vfio/*")}

def opened():
    count = 0
    with open(f"/sys/fs/cgroup/machine.slice/microvm@{vm}.service/cgroup.procs") as pids:
        for pid in pids.read().split():
            for link in glob.glob(f"/proc/{pid}/fd/*"):
                count += os.readlink(link) == "anon_inode:[vfio-device]"
    return count

def until(look, wanted, what):
    deadline = time.monotonic() + 120
    while True:
        try:
            seen = look()
        except OSError as error:
            seen = error  # read while it changed
        if seen == wanted:
            return
        if time.monotonic() > deadline:
            sys.exit(f"round {number}: {what}: {seen}, not {wanted}")
        time.sleep(0.02)

before = state()
for number in range(int(rounds)):
    subprocess.run(["systemctl", "start", f"microvm@{vm}"], check=True)
    for address in devices:
        if driver(f"/sys/bus/pci/devices/{address}") != "vfio-pci":
            sys.exit(f"round {number}: {address} is not on vfio-pci")
    until(opened, len(devices), "devices that are open")
    subprocess.run(["systemctl", "stop", f"microvm@{vm}"], check=True)
    until(state, before, "the host")
"""


@pytest.mark.fault
def test_many_rounds(machine: Toolkit, vm: str) -> None:
    """Started, seen with its devices open, stopped; after each the host is as it was."""
    count = rounds(5, 50)
    devices = (SPARE_E1000E, SPARE_RNG)
    machine.create(holder(vm, *devices))
    done = machine.host.run(
        ["python3", "-IS", "-c", _ROUNDS, str(count), vm, *devices],
        check=False,
        timeout=60 * count,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    held = [line for line in machine.journal(vm) if line.startswith("HOLDS")]
    assert len(held) == count * len(devices)


# ---- refusals


@dataclass(frozen=True)
class Refusal:
    """Devices that a VM may not have, and words of the line that says why."""

    name: str
    devices: tuple[str, ...]
    words: tuple[str, ...]
    prepare: str = ":"
    restore: str = ":"


_TO_VFIO = (
    "d=/sys/bus/pci/devices/{0}; echo vfio-pci >$d/driver_override; "
    "[ ! -e $d/driver ] || echo {0} >$d/driver/unbind; echo {0} >/sys/bus/pci/drivers_probe"
)
_FROM_VFIO = (
    "d=/sys/bus/pci/devices/{0}; echo >$d/driver_override; echo {0} >$d/driver/unbind; "
    "echo {0} >/sys/bus/pci/drivers_probe; udevadm settle"
)

REFUSALS = (
    Refusal("missing", ("0000:00:1d.0",), ("0000:00:1d.0",)),
    Refusal("glob", ("0000:03:*.0",), ("0000:03:*.0", *SPARE_PAIR)),
    Refusal("group-mate", (SPARE_PAIR[0],), (SPARE_PAIR[1], "virtio-pci")),
    Refusal("chipset-mates", (AHCI,), ("0000:00:1f.0", "lpc_ich")),
    Refusal("root-disk", (ROOT_DISK,), (ROOT_DISK, "vda")),
    Refusal(
        "mounted-disk",
        (SPARE_DISK,),
        (SPARE_DISK, "/mnt/spare"),
        "busybox mke2fs /dev/vdb >/dev/null; mkdir -p /mnt/spare; mount /dev/vdb /mnt/spare",
        "umount /mnt/spare",
    ),
    Refusal(
        "swap",
        (SPARE_DISK,),
        (SPARE_DISK, "swap"),
        "busybox mkswap /dev/vdb >/dev/null; swapon /dev/vdb",
        "swapoff /dev/vdb",
    ),
    Refusal(
        "claimed-disk",
        (SPARE_DISK,),
        (SPARE_DISK, "vdb"),
        # As LVM, RAID or an encrypted volume would have it.
        "systemd-run -q --unit=claim python3 -c 'import os, signal; "
        'os.open("/dev/vdb", os.O_RDWR | os.O_EXCL); print("claimed", flush=True); '
        "signal.pause()'; until journalctl -b -o cat -u claim | grep -q ^claimed; do :; done",
        "systemctl stop claim",
    ),
    Refusal("default-route", (OUTER_CARD,), (OUTER_CARD, "outer0")),
    Refusal("display", (SPARE_DISPLAY,), (SPARE_DISPLAY, "display")),
    Refusal(
        "virtual-functions",
        (SPARE_NVME,),
        (SPARE_NVME, "virtual function"),
        # Whose driver would come to it a moment later.
        f"echo 0 >/sys/bus/pci/devices/{SPARE_NVME}/sriov_drivers_autoprobe; "
        f"echo 1 >/sys/bus/pci/devices/{SPARE_NVME}/sriov_numvfs",
        f"echo 0 >/sys/bus/pci/devices/{SPARE_NVME}/sriov_numvfs; "
        f"echo 1 >/sys/bus/pci/devices/{SPARE_NVME}/sriov_drivers_autoprobe",
    ),
    Refusal(
        # No PCI driver of Debian's is built without it: what is not seen is not there.
        "driver-without-unbind",
        (SPARE_E1000E,),
        (SPARE_E1000E, "e1000e"),
        "mount -t tmpfs none /sys/bus/pci/drivers/e1000e",
        "umount /sys/bus/pci/drivers/e1000e",
    ),
    Refusal(
        # By a program that the administrator runs as a user of its own.
        "open-group",
        SPARE_PAIR,
        (SPARE_PAIR[0],),
        "; ".join(_TO_VFIO.format(address) for address in SPARE_PAIR)
        + "; udevadm settle; chown alice /dev/vfio/$(basename $(readlink $d/iommu_group))"
        + f"; systemd-run -q --unit=stranger --uid=alice {hold(SPARE_PAIR[0])}; "
        "until journalctl -b -o cat -u stranger | grep -q ^HOLDS; do :; done",
        "systemctl stop stranger; "
        + "; ".join(_FROM_VFIO.format(address) for address in SPARE_PAIR),
    ),
    Refusal("bridge", (SPARE_PAIR_BRIDGE,), (SPARE_PAIR_BRIDGE, "bridge")),
)


@pytest.fixture(scope="module")
def refused(machine: Toolkit) -> Iterator[str]:
    """A VM that asks for what each test writes into its package."""
    # One that it could have comes first: not even that may be touched.
    machine.create(holder("refused", SPARE_RNG))
    yield "refused"
    take_away(machine, "refused")


@contextlib.contextmanager
def prepared(machine: Toolkit, refusal: Refusal) -> Iterator[None]:
    before = state(machine)
    machine.sh(refusal.prepare)
    try:
        yield
    finally:
        machine.sh(refusal.restore)
        await_state(machine, before)


@pytest.mark.parametrize("refusal", REFUSALS, ids=[each.name for each in REFUSALS])
def test_refused_before_anything_is_changed(
    machine: Toolkit, refused: str, refusal: Refusal
) -> None:
    machine.host.write(
        "/opt/packages/refused/share/microvm/pci-devices",
        "".join(f"{address}\n" for address in (SPARE_RNG, *refusal.devices)),
    )
    with prepared(machine, refusal):
        footprint, before = machine.footprint(), state(machine, bindings=True)

        started = machine.host.run(["systemctl", "start", f"microvm@{refused}"], check=False)
        assert started.returncode
        assert state(machine, bindings=True) == before
        status = machine.status(refused)
        assert has_line(status, *refusal.words), status
        assert "HOLDS" not in status
        machine.systemctl("reset-failed")
        machine.await_footprint(footprint)

        checked = machine.host.run(["microvm", "pci", "check", refused], check=False)
        assert checked.returncode == 1, checked
        assert has_line(checked.stderr + checked.stdout, *refusal.words), checked
        assert state(machine, bindings=True) == before


def test_two_vms_that_want_one_device(machine: Toolkit, vm: str) -> None:
    """The second is told who has it; when the first has stopped, it may have it at once."""
    other = f"{vm}b"
    machine.create(holder(vm, SPARE_E1000E))
    machine.create(holder(other, SPARE_RNG, SPARE_E1000E))
    start_and_hold(machine, vm, SPARE_E1000E)
    before = state(machine, bindings=True)
    started = machine.host.run(["systemctl", "start", f"microvm@{other}"], check=False)
    assert started.returncode
    assert state(machine, bindings=True) == before
    status = machine.status(other)
    assert has_line(status, SPARE_E1000E, f"microVM {vm}"), status
    machine.sh(f"systemctl stop microvm@{vm} && systemctl start microvm@{other}")
    machine.await_line(other, f"HOLDS {SPARE_E1000E}")


def test_a_group_goes_to_one_vm(machine: Toolkit, vm: str) -> None:
    """The other endpoint has no driver, and would be free but for the VM that has its mate."""
    other = f"{vm}b"
    machine.sh(f"echo {SPARE_PAIR[1]} >/sys/bus/pci/drivers/virtio-pci/unbind")
    try:
        machine.create(holder(vm, SPARE_PAIR[0]))
        machine.create(holder(other, SPARE_PAIR[1]))
        start_and_hold(machine, vm, SPARE_PAIR[0])
        before = state(machine, bindings=True)
        started = machine.host.run(["systemctl", "start", f"microvm@{other}"], check=False)
        assert started.returncode
        assert state(machine, bindings=True) == before
        status = machine.status(other)
        assert has_line(status, SPARE_PAIR[0], f"microVM {vm}"), status
        machine.systemctl("stop", f"microvm@{vm}")
        # The driver that it did not have is not forced upon it either.
        eventually(
            lambda: drivers(machine, *SPARE_PAIR),
            lambda found: found == ["virtio-pci", "-"],
            30,
            "the pair is not as it was",
        )
    finally:
        machine.sh(f"echo {SPARE_PAIR[1]} >/sys/bus/pci/drivers_probe")


@pytest.mark.parametrize("stand_in", ["/dev/null", "/dev/full"])
def test_a_driver_that_does_not_let_go(machine: Toolkit, vm: str, stand_in: str) -> None:
    """Which nobody can know before: the device that was taken already is given back."""
    machine.create(holder(vm, SPARE_RNG, SPARE_E1000E))
    before = state(machine)
    unbind = "/sys/bus/pci/drivers/e1000e/unbind"
    machine.sh(f"mount --bind {stand_in} {unbind}")
    try:
        started = machine.host.run(["systemctl", "start", f"microvm@{vm}"], check=False)
        assert started.returncode
        await_state(machine, before)
        status = machine.status(vm)
        assert has_line(status, SPARE_E1000E, "e1000e"), status
        assert not any("HOLDS" in line for line in machine.journal(vm))
    finally:
        machine.sh(f"umount {unbind}")


# ---- what the administrator decides


def test_a_device_that_is_on_vfio_pci_stays_there(machine: Toolkit, vm: str) -> None:
    machine.sh(_TO_VFIO.format(SPARE_RNG))
    try:
        machine.create(holder(vm, SPARE_RNG))
        before = state(machine, bindings=True)
        start_and_hold(machine, vm, SPARE_RNG)
        owner = machine.sh(f"stat -c '%U:%G %a' {node(machine, SPARE_RNG)}").strip()
        assert owner == "microvm:microvm 600"
        machine.systemctl("stop", f"microvm@{vm}")
        eventually(
            lambda: state(machine, bindings=True),
            lambda found: found == before,
            30,
            "the device is not as it was",
        )
        assert f"node {node(machine, SPARE_RNG)} root:root 600" in before
    finally:
        machine.sh(_FROM_VFIO.format(SPARE_RNG))


@pytest.mark.parametrize(
    ("address", "driver"),
    # The second is for later: e1000e has the device, and is to have it back.
    [(SPARE_RNG, "virtio-pci"), (SPARE_E1000E, "vfio-pci")],
)
def test_an_override_is_put_back(machine: Toolkit, vm: str, address: str, driver: str) -> None:
    override = f"/sys/bus/pci/devices/{address}/driver_override"
    machine.sh(f"echo {driver} >{override}")
    try:
        machine.create(holder(vm, address))
        before = state(machine)
        assert f"{address} override {driver}" in before
        start_and_hold(machine, vm, address)
        machine.systemctl("stop", f"microvm@{vm}")
        await_state(machine, before)
    finally:
        machine.sh(f"echo >{override}")


def test_an_interface_gets_the_name_back_that_was_given_by_hand(machine: Toolkit, vm: str) -> None:
    machine.sh("ip link set enp0s8 name lan0; ip link set lan0 up")
    try:
        machine.create(holder(vm, SPARE_NET))
        before = state(machine)
        assert "interface lan0 up 1" in before
        start_and_hold(machine, vm, SPARE_NET)
        machine.systemctl("stop", f"microvm@{vm}")
        await_state(machine, before)
    finally:
        machine.sh("ip link set lan0 down; ip link set lan0 name enp0s8")


def declare(machine: Toolkit, package: Stub, allowed: list[str]) -> None:
    """Declare a VM that may have devices which the host uses."""
    path = machine.put(package)
    machine.host.write(
        f"/etc/microvms/{package.name}.toml",
        f'runner = "{path}"\nautostart = false\nallow_host_devices = {json.dumps(allowed)}\n',
    )
    machine.host.run(["microvm", "apply"])


def test_a_device_of_the_hosts_may_be_given_away_by_name(machine: Toolkit, vm: str) -> None:
    declare(machine, holder(vm, SPARE_DISPLAY), [SPARE_DISPLAY])
    before = state(machine)
    checked = machine.host.run(["microvm", "pci", "check", vm])
    assert SPARE_DISPLAY in checked.stdout
    start_and_hold(machine, vm, SPARE_DISPLAY)
    machine.systemctl("stop", f"microvm@{vm}")
    await_state(machine, before)
    assert f"{SPARE_DISPLAY} driver bochs-drm" in before


def test_a_group_is_not_given_away_in_parts_by_name(machine: Toolkit, vm: str) -> None:
    declare(machine, holder(vm, SPARE_PAIR[0]), list(SPARE_PAIR))
    before = state(machine, bindings=True)
    started = machine.host.run(["systemctl", "start", f"microvm@{vm}"], check=False)
    assert started.returncode
    assert state(machine, bindings=True) == before
    assert has_line(machine.status(vm), SPARE_PAIR[1], "virtio-pci")


# ---- users


def test_no_other_vm_gets_at_the_group(machine: Toolkit, vm: str) -> None:
    hers = f"{vm}b"
    machine.create(holder(vm, SPARE_RNG))
    machine.create(holder(hers, SPARE_E1000E))
    machine.host.write(
        f"/etc/systemd/system/microvm@{hers}.service.d/user.conf",
        "[Service]\nUser=alice\nGroup=alice\n",
    )
    machine.systemctl("daemon-reload")
    start_and_hold(machine, vm, SPARE_RNG)
    start_and_hold(machine, hers, SPARE_E1000E)
    nodes = {"microvm": node(machine, SPARE_RNG), "alice": node(machine, SPARE_E1000E)}
    for user, path in nodes.items():
        assert owners(machine, path) == [f"{user}:{user} 600"]
        group = f"/sys/class/vfio/{path.rpartition('/')[2]}"
        # For one who is no system user our rule runs chown, which it tests for nobody.
        if user == "microvm":
            check_what_udev_would_do(machine, group, user)
        check_that_udev_keeps(machine, group, path)
    for user in nodes:
        for owner, path in nodes.items():
            tried = machine.host.run(
                ["python3", "-c", f"open('{path}', 'r+b', 0)"], user=user, check=False
            )
            # Its own, which is refused only because the VM has it open.
            error = "[Errno 16]" if user == owner else "[Errno 13]"
            assert error in tried.stderr, (user, owner, tried)
        main = main_process(machine, vm if user == "microvm" else hers)
        assert machine.sh(f"stat -c %U /proc/{main}").strip() == user


def test_vms_of_one_user_are_told_of_each_other(machine: Toolkit, vm: str) -> None:
    """And those with users of their own are kept apart."""
    other = f"{vm}b"
    machine.create(holder(vm, SPARE_RNG))
    machine.create(holder(other, SPARE_E1000E))
    start_and_hold(machine, vm, SPARE_RNG)
    assert not any("has PCI devices too" in line for line in machine.journal(vm))
    start_and_hold(machine, other, SPARE_E1000E)
    said = "\n".join(machine.journal(other))
    assert has_line(said, f"microVM {vm} has PCI devices too", 'user = "auto"'), said
    machine.host.run(["microvm", "stop", other], timeout=180)
    machine.host.write(
        f"/etc/microvms/{other}.toml",
        f'runner = "/opt/packages/{other}"\nautostart = false\nuser = "auto"\n',
    )
    machine.sh("microvm apply")
    lines = len(machine.journal(other))
    machine.systemctl("start", f"microvm@{other}")
    assert not any("has PCI devices too" in line for line in machine.journal(other)[lines:])
    own = f"microvm-{other}"
    assert owners(machine, node(machine, SPARE_E1000E)) == [f"{own}:{own} 600"]
    for user, address in ((own, SPARE_RNG), ("microvm", SPARE_E1000E)):
        look = ["python3", "-c", f"open('{node(machine, address)}', 'r+b', 0)"]
        tried = machine.host.run(look, user=user, check=False)
        assert "[Errno 13]" in tried.stderr, (user, tried)


# ---- the command


def test_the_list_shows_who_has_what(machine: Toolkit, vm: str) -> None:
    other = f"{vm}b"
    machine.host.write(
        "/usr/share/misc/pci.ids",
        "8086  Intel Corporation\n\t10d3  82574L Gigabit Network Connection\n",
    )
    machine.create(holder(vm, SPARE_E1000E))
    machine.create(holder(other, SPARE_RNG))
    start_and_hold(machine, vm, SPARE_E1000E)
    for user in ("root", "alice"):
        done = machine.host.run(["microvm", "pci", "--json"], user=user)
        rows = {row["address"]: row for row in json.loads(done.stdout)}
        assert set(rows) == set(machine.sh("ls /sys/bus/pci/devices").split())
        card = rows[SPARE_E1000E]
        assert card["driver"] == "vfio-pci"
        assert card["iommu_group"] == node(machine, SPARE_E1000E).rpartition("/")[2]
        assert card["vendor"] == "Intel Corporation"
        assert card["device"] == "82574L Gigabit Network Connection"
        assert "pm" in card["reset_methods"]
        assert card["holder"] == vm
        assert rows[SPARE_RNG]["holder"] is None
        # Others of this file may want it too.
        assert other in rows[SPARE_RNG]["wanted_by"]
        assert vm not in rows[SPARE_RNG]["wanted_by"]
        assert any("vda" in use for use in rows[ROOT_DISK]["host_uses"])
        assert any("outer0" in use for use in rows[OUTER_CARD]["host_uses"])
    table = machine.host.run(["microvm", "pci"]).stdout
    assert has_line(table, SPARE_E1000E, "vfio-pci", vm, "82574L"), table
    assert has_line(table, SPARE_RNG, "virtio-pci", other), table
    machine.sh("rm /usr/share/misc/pci.ids")


def test_a_check_says_what_a_start_would_do(machine: Toolkit, vm: str) -> None:
    machine.create(holder(vm, SPARE_E1000E, *SPARE_PAIR))
    footprint, before = machine.footprint(), state(machine, bindings=True)
    checked = machine.host.run(["microvm", "pci", "check", vm])
    for address, driver in (
        (SPARE_E1000E, "e1000e"),
        (SPARE_PAIR[0], "virtio-pci"),
        (SPARE_PAIR[1], "virtio-pci"),
    ):
        assert has_line(checked.stdout, address, driver), checked.stdout
    assert node(machine, SPARE_E1000E) in checked.stdout
    assert state(machine, bindings=True) == before
    assert machine.footprint() == footprint


def test_a_check_names_all_reasons(machine: Toolkit, vm: str) -> None:
    machine.create(holder(vm, ROOT_DISK, SPARE_PAIR[0], "0000:00:1d.0"))
    checked = machine.host.run(["microvm", "pci", "check", vm], check=False)
    assert checked.returncode == 1
    text = checked.stdout + checked.stderr
    for words in ((ROOT_DISK, "vda"), (SPARE_PAIR[1], "virtio-pci"), ("0000:00:1d.0",)):
        assert has_line(text, *words), text


# ---- a host without an IOMMU


def test_without_an_iommu_the_hint_says_how_to_get_one() -> None:
    require_virtual()
    with VirtualHost(kernel_args=("intel_iommu=off",)) as host:
        machine = Toolkit(host)
        machine.install()
        machine.create(holder("lost", "0000:00:03.0"))
        before = state(machine, bindings=True)
        started = machine.host.run(["systemctl", "start", "microvm@lost"], check=False)
        assert started.returncode
        status = machine.status("lost")
        assert has_line(status, "IOMMU", "intel_iommu=off"), status
        assert state(machine, bindings=True) == before
        checked = machine.host.run(["microvm", "pci", "check", "lost"], check=False)
        assert checked.returncode == 1
        assert "intel_iommu=off" in checked.stdout + checked.stderr
