# SPDX-License-Identifier: MIT
"""The virtual host: a whole machine with its own kernel, udev, IOMMU and power switch.

QEMU boots the cached root as a disk, with KVM where the CPU has it and by emulation elsewhere.
It has what a container cannot give: device nodes made by udev, vfio-pci behind an emulated IOMMU,
vhost-net, vhost-vsock, enforced cgroup limits, boot and power-off.  `-cpu max` has AMD's
virtualisation even when it is emulated, so a microVM inside runs with KVM.  No privilege is
needed.

Links inside: `outer0` carries the commands and the default route and leads nowhere else;
`spare0` is a network card nobody uses, up and without an address, for macvtaps to stand on.  Its
network is 10.0.3.0/24, where 10.0.3.2 answers to ping and ARP, and it leads nowhere either.

With `spare_devices=True` there are PCI devices for microVMs to have, at the addresses below
(`SPARE_...`): two network cards, a disk, a source of random numbers, two more endpoints that share
an IOMMU group, and two that a host may well need itself: a display, and an NVMe controller that can
be split into virtual functions, for which QEMU must be 7.1 or newer. And there is a USB device.

Commands go through ssh over a card of QEMU's user network.  The guest agent was the other
candidate: it hands a command's output over only when the command has ended, in one piece with
a limit, and has no way to a terminal.  A program of our own on a serial port would have to
learn multiplexing, standard input, exit codes, signals and terminals, which is what ssh is.
One connection is opened at boot and all commands share it, so that the costly handshake happens
once, and the port is bound to the loopback and answers to a key that only this cache holds.

The disk is an overlay that QEMU itself makes and unlinks (`snapshot=on`), so a killed test run
leaves no image.  QEMU pauses when the machine powers off instead of ending, and the overlay with
it: `poweroff` and `start` are the power button of one machine with its files kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from tests.host import cache, leftovers, root
from tests.host.container import kvm_works
from tests.host.interface import CommandHost, HostError

_numbers = itertools.count(1)

# What `spare_devices=True` adds, by the addresses that the firmware gives them: buses are numbered
# in the order of the bridges' slots.
SPARE_E1000E = "0000:01:00.0"  # behind a root port; its network is 10.0.4.0/24
SPARE_NET = "0000:00:08.0"  # virtio; its network is 10.0.5.0/24
SPARE_RNG = "0000:00:09.0"
SPARE_DISK = "0000:00:0a.0"  # virtio, empty, serial number "spare"
# Two sources of random numbers in one IOMMU group, behind a bridge that hides which of them speaks
# and is of that group itself.
SPARE_PAIR = ("0000:03:01.0", "0000:03:02.0")
SPARE_PAIR_BRIDGE = "0000:02:00.0"
SPARE_DISPLAY = "0000:00:0b.0"  # the console is on it
SPARE_NVME = "0000:04:00.0"  # no disk behind it; a virtual function would be 0000:04:00.1
SPARE_USB = ("0627", "0001")  # a tablet; vendor and product
SPARE_E1000E_MAC = "52:54:00:6d:00:03"
SPARE_NET_MAC = "52:54:00:6d:00:04"

_SPARE_DISK_BYTES = 64 << 20

# Under emulation a boot takes a quarter of a minute on an idle machine, and tests share it.
_BOOT_TIMEOUT = 600


def missing() -> str | None:
    """What this machine lacks for a virtual host, or None."""
    for program in ("qemu-system-x86_64", "mmdebstrap", "ssh", "ssh-keygen", "mke2fs"):
        if not shutil.which(program) and not Path("/sbin", program).exists():
            return f"{program} is not installed (tests/prerequisites installs it)"
    if os.geteuid() != 0 and not shutil.which("newuidmap"):
        return "newuidmap is not installed (package uidmap; tests/prerequisites installs it)"
    return None


def _spare_devices_argv(work: Path) -> list[str]:
    """The devices for microVMs, and the other halves of them."""
    # Without it a virtio device's DMA goes past the emulated IOMMU, once a guest has it.
    translated = "iommu_platform=on,disable-legacy=on"
    return [
        *("-device", "pcie-root-port,id=port6,addr=6,chassis=6"),
        *("-netdev", "user,id=spare-e1000e,restrict=on,ipv6=off,net=10.0.4.0/24"),
        "-device",
        f"e1000e,bus=port6,netdev=spare-e1000e,mac={SPARE_E1000E_MAC},romfile=",
        *("-device", "pcie-root-port,id=port7,addr=7,chassis=7"),
        *("-device", "pci-bridge,id=bridge7,bus=port7,chassis_nr=8"),
        *("-device", f"virtio-rng-pci,bus=bridge7,addr=1,{translated}"),
        *("-device", f"virtio-rng-pci,bus=bridge7,addr=2,{translated}"),
        *("-netdev", "user,id=spare-net,restrict=on,ipv6=off,net=10.0.5.0/24"),
        "-device",
        f"virtio-net-pci,netdev=spare-net,mac={SPARE_NET_MAC},addr=8,romfile=,{translated}",
        *("-device", f"virtio-rng-pci,addr=9,{translated}"),
        *("-drive", f"file={work}/spare.img,format=raw,if=none,id=spare-disk"),
        *("-device", f"virtio-blk-pci,drive=spare-disk,serial=spare,addr=a,{translated}"),
        *("-device", "VGA,addr=b,romfile="),
        *("-device", "pcie-root-port,id=port12,addr=c,chassis=12"),
        *("-device", "nvme-subsys,id=subsystem12"),
        # As little as it takes to have virtual functions (QEMU's docs/system/devices/nvme).
        "-device",
        "nvme,serial=spare,subsys=subsystem12,bus=port12,max_ioqpairs=6,msix_qsize=9,"
        "sriov_max_vfs=2,sriov_vq_flexible=4,sriov_vi_flexible=2",
        *("-device", "qemu-xhci,id=spare-usb,addr=d"),
        *("-device", "usb-tablet,bus=spare-usb.0"),
    ]


def qemu_argv(
    built: root.Root,
    *,
    work: Path,
    memory: int,
    smp: int,
    devices: Sequence[str],
    spare_devices: bool,
    kernel_args: Sequence[str],
    kvm: bool,
) -> list[str]:
    """The machine.  Devices are words of a command line, as QEMU takes them."""
    machine = "q35,accel=kvm,kernel-irqchip=split" if kvm else "q35"
    # The emulator's cache of translated code is small by default and a boot overflows it.
    accel = [] if kvm else ["-accel", "tcg,thread=multi,tb-size=512"]
    kernel_line = [
        "root=/dev/vda rw",
        "console=ttyS0",
        "intel_iommu=on iommu=pt",
        "systemd.hostname=host",  # as in the container host
        # A getty hangs the console up, and with it the log of what went wrong.
        "systemd.getty_auto=0",
        # Every byte on a serial port is an exit from the emulator: only what is wrong goes there.
        "quiet systemd.show_status=error",
        "systemd.journald.forward_to_console=1",
        # An emulator that gets no CPU for a while fails the kernel's test of the timer: it panics.
        "no_timer_check",
        # Nor does it get through with the devices, the channel's among them, in 90 s then.
        f"systemd.default_device_timeout_sec={_BOOT_TIMEOUT}",
        # Half of an emulated boot went into guarding a CPU that has nothing to guard.
        "mitigations=off",
        "test_host.channel",
        *kernel_args,
    ]
    return [
        "qemu-system-x86_64",
        *("-name", work.name),
        *("-machine", machine),
        *accel,
        *("-cpu", "max"),
        *("-smp", str(smp)),
        *("-m", str(memory)),
        "-nodefaults",
        "-display",
        "none",
        *("-kernel", str(built.kernel)),
        *("-initrd", str(built.initrd)),
        *("-append", " ".join(kernel_line)),
        # The IOMMU comes before what it translates for.
        *("-device", "intel-iommu,intremap=on,device-iotlb=on"),
        *("-drive", f"file={built.image},format=raw,if=none,id=root,snapshot=on"),
        *("-device", "virtio-blk-pci,drive=root,addr=2"),
        *("-device", "virtio-rng-pci,addr=3"),
        *("-netdev", "user,id=outer,restrict=on,ipv6=off,hostfwd=tcp:127.0.0.1:0-:22"),
        *("-device", f"virtio-net-pci,netdev=outer,mac={root.OUTER_MAC},addr=4"),
        # A second network of QEMU's own, because a card that leads nowhere at all stalls: nothing
        # takes its packets, and the kernel complains of its queue.
        *("-netdev", "user,id=spare,restrict=on,ipv6=off,net=10.0.3.0/24"),
        *("-device", f"virtio-net-pci,netdev=spare,mac={root.SPARE_MAC},addr=5"),
        *(_spare_devices_argv(work) if spare_devices else ()),
        *("-serial", f"file:{work}/console.log"),
        *("-serial", f"file:{work}/journal.log"),
        *("-qmp", f"unix:{work}/qmp,server=on,wait=off"),
        # A power-off pauses the machine, so that its disk outlives it.
        *("-action", "shutdown=pause"),
        *(word for device in devices for word in ("-device", device)),
    ]


class VirtualHost(CommandHost):
    """One virtual machine; several may run at once.

    `devices` are further QEMU devices, each the value of a `-device` option.  A virtio device
    that is to be passed through to a microVM needs `iommu_platform=on,disable-legacy=on`, or its
    DMA goes past the emulated IOMMU.  PCI slots 2 to 5 are taken, and 6 to 13 with
    `spare_devices`, which are described above.  `kernel_args` go to the end of the kernel's
    command line, where they have the last word.

    Left alone, `smp` is two CPUs with KVM and one by emulation, because several emulated CPUs go
    wrong in two ways.  The kernel rewrites instructions while it runs (static keys: when its clock
    is found to be stable, when KVM's first VM comes or its last one goes), and a CPU that is just
    there may run half of each: such a machine panicked by "int3" or "invalid opcode", once in some
    hundred boots or VMs.  And QEMU before 8.2 may lose what one CPU writes to a device while
    another changes the memory map, as drivers do when they come and go (fixed by its commit
    0d58c660689f); the machine hangs when that was the end of an interrupt.
    """

    kind = "virtual"

    def __init__(
        self,
        suite: str = root.DEFAULT_SUITE,
        *,
        memory: int = 2048,
        smp: int | None = None,
        devices: Sequence[str] = (),
        spare_devices: bool = False,
        kernel_args: Sequence[str] = (),
    ) -> None:
        super().__init__(suite)
        self.name = f"test-host-v{os.getpid()}-{next(_numbers)}"
        self._work = cache.hosts() / self.name
        self._memory = memory
        self._smp = smp or (2 if kvm_works() else 1)
        self._devices = tuple(devices)
        self._spare_devices = spare_devices
        self._kernel_args = tuple(kernel_args)
        self._owner: IO[str] | None = None
        self._qemu: subprocess.Popen[bytes] | None = None
        self._qmp: _Qmp | None = None
        self._master: subprocess.Popen[bytes] | None = None
        self._ssh: list[str] = []
        self._log_seen = 0  # where this boot begins in the log

    # -- life -------------------------------------------------------------------------------

    def start(self) -> None:
        if lack := missing():
            raise HostError(lack)
        began_paused = self._qemu is not None and self._qemu.poll() is None
        if began_paused:
            assert self._qmp is not None
            if self._qmp.ask("query-status")["status"] != "shutdown":
                raise HostError(f"{self.name} runs already")
        else:
            leftovers.clean()
            built = root.with_image(self.suite)
            self._owner = cache.claim(self._work)
        began = time.monotonic()
        if began_paused:
            assert self._qmp is not None
            self._qmp.ask("system_reset")
            self._qmp.ask("cont")
        else:
            self._launch(built)
        self._await_running(began)

    def _launch(self, built: root.Root) -> None:
        if self._spare_devices:
            with (self._work / "spare.img").open("wb") as image:
                image.truncate(_SPARE_DISK_BYTES)
        argv = qemu_argv(
            built,
            work=self._work,
            memory=self._memory,
            smp=self._smp,
            devices=self._devices,
            spare_devices=self._spare_devices,
            kernel_args=self._kernel_args,
            kvm=kvm_works(),
        )
        with (self._work / "qemu.log").open("ab") as log:
            self._qemu = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        (self._work / "pid").write_text(f"{self._qemu.pid}\n", encoding="utf-8")
        deadline = time.monotonic() + 30
        while True:
            if (code := self._qemu.poll()) is not None:
                raise HostError(f"QEMU ended at once ({code})\n{self.diagnosis()}")
            try:
                self._qmp = _Qmp(self._work / "qmp")
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise HostError(f"QEMU does not listen\n{self.diagnosis()}") from None
                time.sleep(0.02)
        # QEMU chose a free port, which no choice of ours could do without a race.
        table = self._qmp.ask(
            "human-monitor-command", {"command-line": "info usernet"}, answer_type=str
        )
        found = re.search(r"TCP\[HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)", table)
        if not found:
            raise HostError(f"QEMU forwards no port:\n{table}")
        self._ssh = self._ssh_argv(built.key, int(found[1]))

    def _ssh_argv(self, key: Path, port: int) -> list[str]:
        # ssh refuses a key that others may read and a socket name of more than 100 bytes; both
        # are ours to choose, but for where the user's home is.
        options = {
            "ControlPath": self._control_path(),
            "IdentityFile": str(key),
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "BatchMode": "yes",
            "StrictHostKeyChecking": "no",
            "UserKnownHostsFile": "/dev/null",
            "GlobalKnownHostsFile": "/dev/null",
            "LogLevel": "ERROR",
            "ConnectTimeout": "30",
            # The emulated CPU pays for every byte.
            "Ciphers": "aes128-gcm@openssh.com",
            "KexAlgorithms": "curve25519-sha256",
            "Compression": "no",
        }
        words = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        # -F: the user's own configuration is for the user's own machines.
        return ["ssh", "-F", "none", *words, "-p", str(port), "-l", "root"]

    def _control_path(self) -> str:
        return f"{self._work}/ssh"

    def _await_running(self, began: float) -> None:
        deadline = time.monotonic() + _BOOT_TIMEOUT
        while True:
            assert self._qemu is not None
            if self._qemu.poll() is not None:
                raise HostError(f"QEMU ended while the machine booted\n{self.diagnosis()}")
            if self._channel_listens() and self._connect(deadline):
                break
            if time.monotonic() > deadline:
                raise HostError(f"{self.name} did not come up\n{self.diagnosis()}")
            time.sleep(0.05)
        left = max(deadline - time.monotonic(), 1)
        done = self.run(["systemctl", "is-system-running", "--wait"], check=False, timeout=left)
        if done.stdout.strip() not in ("running", "degraded"):
            raise HostError(f"{self.name} came up as {done.stdout!r}\n{self.diagnosis()}")
        self.start_seconds = time.monotonic() - began

    def _channel_listens(self) -> bool:
        # Asking is no way to find out: QEMU accepts a connection on its own, and one that is made
        # before the guest has a network hangs for many seconds.  So the guest tells.
        log = self._work / "journal.log"
        if not log.exists():
            return False
        with log.open("rb") as text:
            text.seek(self._log_seen)
            return root.CHANNEL_LISTENS.encode() in text.read()

    def _connect(self, deadline: float) -> bool:
        """Try to open the connection that all commands share."""
        self._disconnect()
        with (self._work / "ssh.log").open("ab") as log:
            self._master = subprocess.Popen(
                [*self._ssh, "-o", "ControlMaster=yes", "-o", "ServerAliveInterval=15", "-N", "-T"]
                + ["127.0.0.1"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while time.monotonic() < deadline:
            if os.path.exists(self._control_path()):
                return True
            if self._master.poll() is not None:
                time.sleep(0.2)
                return False
            time.sleep(0.02)
        return False

    def _disconnect(self) -> None:
        if self._master is not None:
            self._master.kill()
            self._master.wait()
            self._master = None
        Path(self._control_path()).unlink(missing_ok=True)

    def poweroff(self) -> None:
        self._ask_and_await(["systemctl", "poweroff"], "SHUTDOWN")

    def reboot(self) -> None:
        began = self._ask_and_await(["systemctl", "reboot"], "RESET")
        self._await_running(began)

    def _ask_and_await(self, argv: Sequence[str], event: str) -> float:
        """Ask the machine for its end and wait until QEMU has seen it; returns when that was."""
        assert self._qmp is not None, "the host was never started"
        self._qmp.forget_events()
        # The channel may go before the answer comes.
        with contextlib.suppress(HostError):
            self.run(argv, check=False)
        if not self._qmp.wait_for(event, timeout=120):
            raise HostError(f"{argv} did not end {self.name}\n{self.diagnosis()}")
        self._disconnect()
        self._log_seen = (self._work / "journal.log").stat().st_size
        return time.monotonic()

    def stop(self) -> None:
        if self._owner is None:
            return
        self._disconnect()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._qemu is not None:
            self._qemu.kill()
            self._qemu.wait()
        # QEMU was our own child and starts none; the kernel confirms that its session is empty.
        if self._qemu is not None and leftovers.session_members(self._qemu.pid):
            raise HostError(f"processes of {self.name} are left")
        self._qemu = None
        cache.release(self._work, self._owner)
        self._owner = None

    # -- commands ---------------------------------------------------------------------------

    def _enter_argv(self, inner: Sequence[str], *, terminal: bool) -> list[str]:
        if self._qemu is None or not self._ssh:
            raise HostError(f"{self.name} does not run")
        # With more to do than the command, the remote shell stays its parent and turns a signal
        # into an exit code; what it has to say about the signal is not the command's output.
        line = f"exec 3>&2 2>/dev/null; {shlex.join(inner)} 2>&3 3>&-; exit $?"
        return [*self._ssh, "-t" if terminal else "-T", "127.0.0.1", line]

    def _bounded(self, inner: Sequence[str], timeout: float) -> list[str]:
        # ssh ends without a word to the command, which would run on for as long as it likes.
        # Our own clock runs out first, so that a timeout is told as one.
        return ["timeout", "--signal=KILL", f"{timeout + 0.5}", *inner]

    def _check_channel(self, returncode: int) -> None:
        # ssh says 255 for its own failures; a command's own 255 comes over a channel that works.
        if returncode == 255:
            check = subprocess.run([*self._ssh, "-O", "check", "127.0.0.1"], capture_output=True)
            if check.returncode:
                raise HostError(f"the channel to {self.name} is gone\n{self.diagnosis()}")

    def diagnosis(self) -> str:
        parts = []
        for name in ("qemu.log", "ssh.log", "console.log", "journal.log"):
            log = self._work / name
            if log.exists() and log.stat().st_size:
                text = log.read_text(encoding="utf-8", errors="replace")
                parts.append(f"{name}:\n{text[-4000:].rstrip()}")
        return "\n".join(parts) or "(no logs)"


class _Qmp:
    """QEMU's monitor, as much as a power button and an ear for events need of it."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        # The name may be longer than a socket address; through the directory it never is.
        directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/{path.name}")
        except BaseException:
            self._socket.close()
            raise
        finally:
            os.close(directory)
        self._buffer = b""
        self._events: list[str] = []
        self._receive(30)  # the greeting
        self.ask("qmp_capabilities")

    def ask(
        self,
        command: str,
        arguments: dict[str, Any] | None = None,
        *,
        answer_type: type = dict,
    ) -> Any:
        """Run a command and return its answer; events that come in between are kept."""
        message = {"execute": command, "arguments": arguments or {}}
        self._socket.sendall(json.dumps(message).encode())
        while True:
            answer = self._receive(30)
            if "error" in answer:
                raise HostError(f"QEMU refused {command}: {answer['error']}")
            if "return" in answer:
                value = answer["return"]
                if not isinstance(value, answer_type):
                    raise HostError(f"QEMU answered {command} with {value!r}")
                return value

    def forget_events(self) -> None:
        """What happened so far is of no interest any more."""
        with contextlib.suppress(TimeoutError):
            while True:
                self._receive(0.001)
        self._events.clear()

    def wait_for(self, event: str, *, timeout: float) -> bool:
        """Whether the event came in time."""
        deadline = time.monotonic() + timeout
        while event not in self._events:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            with contextlib.suppress(TimeoutError):
                self._receive(left)
        return True

    def _receive(self, timeout: float) -> dict[str, Any]:
        self._socket.settimeout(timeout)
        while b"\n" not in self._buffer:
            data = self._socket.recv(65536)
            if not data:
                raise HostError("QEMU closed its monitor")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            self._events.append(message["event"])
        return message

    def close(self) -> None:
        """Let go of the monitor."""
        self._socket.close()
