# SPDX-License-Identifier: MIT
"""Packages for QEMU: the machines microvm, over PCIe or MMIO, and q35.

What is known only when the VM starts (whether KVM works, the clock of an emulated CPU, the number
of a macvtap) the script finds out by itself, and starts no process for the first two.
"""

from __future__ import annotations

from shlex import quote

from ..paths import MICROVM_BALLOON, MICROVM_RUN, MICROVM_SHUTDOWN
from . import (
    command_line,
    credentials,
    inside,
    kernels,
    limits,
    macvtaps,
    payload,
    programs,
    scripts,
    seed,
    shell,
)
from .facts import facts, notify_socket
from .refused import Refused
from .shell import PACKAGE_VARIABLE, Variable, word
from .tree import File, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..declaration.guest import Device, Guest, Interface, Share, Volume
    from .shell import Word, Words
    from .tools import Tools

_CANNOT: limits.Cannot = {
    "initialBalloonMem": ("has a balloon that is empty at the start", "leave it out"),
}
# From then on, QEMU writes its events to a file with nobody listening (chardev file,input-path=).
_EVENTS_SINCE = (8, 1)
# From then on, a character device can be in two places (chardev hub).
_HUB_SINCE = (10, 0)
# Transports of the microvm machine with ACPI (QEMU's hw/i386/microvm.c).
_MMIO_MAX = 24
# With this much memory, in MB, QEMU's option ROM leaves the initrd on top of the ACPI tables: it
# takes the end of the memory, 2^31, for a negative number (pc-bios/optionrom/linuxboot_dma.c).
_MEMORY_NOT_BOOTED = 2048
# QEMU places a command line of up to 64 KiB; what the kernel says that it takes is less.
_COMMAND_LINE_MAX = 0xFFFF
# virtio-mem's block size on x86: a huge page.
_HOTPLUG_UNIT = 2
# QEMU's names of the formats that microvm.nix names otherwise.
_FORMATS = {"vhd": "vpc"}
# Where the guest's systemd finds credentials (systemd.system-credentials(7)).
_CREDENTIALS = "opt/io.systemd.credentials"
# FW_CFG_MAX_FILE_PATH of QEMU's include/hw/nvram/fw_cfg.h is 56, with the final NUL.
_CREDENTIAL_MAX = 55 - len(_CREDENTIALS) - 1
# QEMU ends by an assertion when its fw_cfg has more files than places. There are 32 by default, of
# which machines fill up to 15 themselves (hw/nvram/fw_cfg.c).
_FEW_CREDENTIALS, _CREDENTIALS_MAX, _PLACES = 12, 100, 128
# What the guest's systemd is told by it where to say that it is ready.
_NOTIFY_CREDENTIAL = "vmm.notify_socket"
# max_cpus of each machine (hw/i386/microvm.c, pc_q35.c), and from when on q35 has more.
_VCPU_MAX, _Q35_VCPU_MAX, _Q35_VCPU_SINCE = 288, 1024, (8, 1)

_PROBE = """\
# KVM by what the CPU can do: /dev/kvm may be there, and open, where no guest would ever run.
accel=tcg cpu=max clock= vhost=off flags= mhz=
while IFS= read -r line; do
    case $line in
        "cpu MHz"*) mhz=${line##* } ;;
        flags*) flags=$line && break ;;
    esac
done </proc/cpuinfo
case " $flags " in
    *" vmx "* | *" svm "*)
        if [ -r /dev/kvm ] && [ -w /dev/kvm ]; then accel=kvm cpu=@cpu@; fi
        ;;
esac
[ "$accel" = kvm ] || [ -n "${MICROVM_SHOW-}" ] ||
    echo "without KVM, the guest is emulated and about ten times slower" >&2"""
# QEMU crashes on microvm with SGX, and x2APIC is what lets it have many CPUs.
_HOST_CPU = "host,+x2apic,-sgx"
# What that makes of a clock of up to 99 GHz.
_CLOCK_WORD = len(" tsc_early_khz=99999999")
_VHOST = """\
if [ "$accel" = kvm ] && [ -w /dev/vhost-net ]; then vhost=on; fi"""
_CLOCK = """\
# An emulated CPU's clock is the host's. A kernel that has to measure it fails now and then on a
# busy host, and this machine has no other clock to fall back to.
case $accel:$mhz in
    tcg:*[0-9].[0-9][0-9][0-9]) clock=" tsc_early_khz=${mhz%.*}${mhz#*.}" ;;
esac"""
# The journal has the console by standard output, and `microvm console` by a socket. A terminal on
# standard input is somebody's who runs the VM there.
_CONSOLE_BY_HUB = """\
# QEMU writes to no standard output whose input has ended, and on this input nothing ever comes.
[ -t 0 ] || exec </dev/ptmx"""
_CONSOLE_IN_ONE_PLACE = """\
# This QEMU can have the console in one place only, but keep a log of it.
console=@socket@,logfile=@log@
if [ -t 0 ] && [ -z "${MICROVM_SHOW-}" ]; then console=stdio,id=console,signal=off; fi"""
_LOGGED_CONSOLE = """\
# What cannot be opened by a name, as the journal cannot, cannot be the log: cat carries it there,
# and ends with QEMU.
if [ "${console#stdio}" = "$console" ]; then
    rm -f @log@
    mkfifo -m 600 @log@
    cat <@log@ &
fi"""

# The package may be anywhere (`microvm build -o`).
_PLACE = """\
case $package in
    @wrong@)
        echo "$package: QEMU cannot be told of files in a directory with @what@ in its path" >&2
        exit 78
        ;;
esac"""
_NO_COMMAS = ("*,*", "a comma")
# It takes a command apart by blanks and quotes.
_PLAIN_ALONE = ("*[!a-zA-Z0-9/._+@:~-]*", "anything but letters, digits and /._+@:~-")


def build(guest: Guest, tools: Tools) -> Tree:
    """The package; raises Refused."""
    if tools.qemu is None:
        raise Refused(
            ("hypervisor",),
            "hypervisor = 'qemu': this host has no qemu-system-x86_64",
            "install it (on Debian: qemu-system-x86)",
        )
    machine = _Machine(guest, tools)
    machine.check()
    entries = facts(
        guest,
        tools,
        multi_queue=guest.vcpu > 1,
        # QEMU listens to one client at a time on each socket.
        control=(inside.control(guest), "qmp"),
        event_log=machine.event_log,
        console=inside.console(guest) if guest.qemu.serial_console else None,
        agent=inside.agent(guest) if guest.qemu.guest_agent else None,
    )
    entries |= payload.files(guest, tools)
    entries[MICROVM_RUN] = File(machine.run_script(), 0o755)
    if machine.event_log is not None:
        entries["lib/qmp-hello"] = File(b'{"execute":"qmp_capabilities"}\n')
    if guest.socket is not None:
        entries["lib/qmp"] = File(programs.qmp(tools.python), 0o755)
        entries[MICROVM_SHUTDOWN] = File(machine.shutdown_script(guest.socket), 0o755)
        if guest.balloon:
            entries[MICROVM_BALLOON] = File(machine.balloon_script(guest.socket), 0o755)
    if any(forward.source == "guest" for forward in guest.forward_ports):
        entries["lib/connect"] = File(programs.connect(tools.python), 0o755)
    return Tree.of(entries)


class _Machine:
    """One guest on QEMU."""

    def __init__(self, guest: Guest, tools: Tools) -> None:
        self._guest = guest
        self._tools = tools
        needs_q35 = bool(guest.pci_devices or guest.hotplug_mem)
        self._type = guest.qemu.machine or ("q35" if needs_q35 else "microvm")
        self._options = self._machine_options()
        self._has_pcie = self._type == "q35" or self._options["pcie"] == "on"
        # SeaBIOS, which the machine has with ACPI, puts the tables at the end of the memory.
        self._has_tables = self._type == "microvm" and self._options["acpi"] != "off"

    @property
    def _has_hub(self) -> bool:
        return self._tools.qemu_version >= _HUB_SINCE

    @property
    def _memory_size(self) -> int:
        """The guest's memory in MB: one MB less where it would not boot."""
        is_booted = self._guest.initrd is None or not self._has_tables
        return self._guest.mem - (self._guest.mem == _MEMORY_NOT_BOOTED and not is_booted)

    @property
    def event_log(self) -> str | None:
        if self._tools.qemu_version < _EVENTS_SINCE:
            return None
        return inside.event_log(self._guest)

    def _machine_options(self) -> dict[str, str | Variable]:
        options: dict[str, str | Variable] = {"accel": Variable("accel")}
        if self._type == "microvm":
            options |= {"pcie": "on", "rtc": "on", "acpi": "on"}
        if self._guest.virtiofs:
            # vhost-user: virtiofsd maps the guest's memory.
            options["memory-backend"] = "mem"
        return options | dict(self._guest.qemu.machine_opts)

    def check(self) -> None:
        """Refuse what QEMU, or the machine, cannot do."""
        guest = self._guest
        limits.check(guest, _CANNOT)
        self._check_cpus()
        self._check_kernel()
        if guest.hotplug_mem and self._type == "microvm":
            raise Refused(
                ("hotplugMem",),
                "hotplugMem: QEMU's machine microvm has no virtio-mem",
                'leave qemu.machine out, or give "q35"',
            )
        for key, value in (
            ("hotplugMem", guest.hotplug_mem),
            ("hotpluggedMem", guest.hotplugged_mem),
        ):
            if value % _HOTPLUG_UNIT:
                raise Refused(
                    (key,),
                    f"{key} = {value} is no multiple of {_HOTPLUG_UNIT} MB, virtio-mem's unit",
                )
        if not self._has_pcie:
            self._check_mmio()
        macvtaps.check(guest)
        for number, forward in enumerate(guest.forward_ports):
            if forward.source == "guest" and forward.proto == "udp":
                raise Refused(
                    ("forwardPorts", number, "proto"),
                    "forwardPorts.proto = 'udp': QEMU forwards only TCP from a guest",
                )
        self._check_credentials()
        for name, _ in guest.qemu.machine_opts:
            if name == "type":
                raise Refused(
                    ("qemu", "machineOpts", name), "qemu.machineOpts.type is qemu.machine"
                )

    def _check_cpus(self) -> None:
        most, hint = _VCPU_MAX, ""
        if self._type == "q35" and self._tools.qemu_version >= _Q35_VCPU_SINCE:
            most = _Q35_VCPU_MAX
        elif self._type == "q35":
            hint = f"from QEMU {'.'.join(map(str, _Q35_VCPU_SINCE))} on it has {_Q35_VCPU_MAX}"
        else:
            hint = 'qemu.machine = "q35" may have more'
        if self._guest.vcpu > most:
            raise Refused(
                ("vcpu",),
                f"vcpu = {self._guest.vcpu} is more than the {most} of QEMU's machine {self._type}",
                hint,
            )

    def _check_kernel(self) -> None:
        guest = self._guest
        is_pvh = self._tools.blob(guest.kernel).format == kernels.PVH
        if is_pvh and guest.initrd is not None and self._has_tables:
            # QEMU's other loader (pc-bios/optionrom/pvh_main.c) asks nobody where memory ends.
            raise Refused(
                ("kernel",),
                f"kernel {guest.kernel!r} is a {kernels.PVH}: QEMU's machine microvm puts the "
                "initrd of such a kernel on top of the ACPI tables, and the guest does not boot",
                'take the vmlinuz instead, or qemu.machine = "q35"',
            )

    def _check_credentials(self) -> None:
        given = self._guest.credential_files
        for name, _ in given:
            if len(name) > _CREDENTIAL_MAX:
                raise Refused(
                    ("credentialFiles", name),
                    f"credentialFiles.{name} has more than {_CREDENTIAL_MAX} characters in its "
                    "name, the most for QEMU's fw_cfg",
                )
            if name == _NOTIFY_CREDENTIAL and self._guest.readiness == "guest":
                raise Refused(
                    ("credentialFiles", name),
                    f"credentialFiles.{name} is what readiness = 'guest' gives the guest",
                    "leave one of them out",
                )
        if len(given) > _CREDENTIALS_MAX:
            raise Refused(
                ("credentialFiles",),
                f"credentialFiles has {len(given)} of them, and {_CREDENTIALS_MAX} is the most",
                "put them into a share or a volume",
            )

    def _check_mmio(self) -> None:
        guest = self._guest
        at = ("qemu", "machineOpts", "pcie")
        if guest.devices:
            raise Refused(at, "qemu.machineOpts.pcie = 'off' leaves no bus for devices of the host")
        count = self._mmio_devices()
        if count > _MMIO_MAX:
            raise Refused(
                at,
                f"qemu.machineOpts.pcie = 'off' leaves room for {_MMIO_MAX} virtio devices, and "
                f"this guest has {count}",
            )

    def _mmio_devices(self) -> int:
        """How many virtio devices the guest has where these have no bus."""
        guest = self._guest
        count = len(seed.disks(guest)) + len(guest.interfaces) + len(guest.shares)
        # Beside these: random numbers, the balloon, the agent's port, the vsock.
        return count + 1 + guest.balloon + guest.qemu.guest_agent + (guest.vsock_cid is not None)

    # ---- the command line

    def _device(self, kind: str, *options: str) -> Words:
        """A virtio device on the machine's bus."""
        suffix = "pci" if self._has_pcie else "device"
        return ["-device", ",".join((f"{kind}-{suffix}", *options))]

    def argv(self) -> Words:
        guest, tools = self._guest, self._tools
        assert tools.qemu is not None
        argv: Words = [
            tools.qemu,
            *("-name", _escaped(guest.name)),
            *("-M", self._machine()),
            *("-cpu", guest.cpu or word(Variable("cpu"))),
            *("-smp", str(guest.vcpu)),
            *("-m", self._memory()),
            *("-nodefaults", "-no-user-config", "-display", "none", "-sandbox", "on"),
            # A guest that reboots ends QEMU, and systemd starts it again.
            "-no-reboot",
            *("-uuid", guest.machine_id),
            *("-kernel", payload.KERNEL),
        ]
        if guest.initrd is not None:
            argv += ["-initrd", payload.INITRD]
        argv += ["-append", self._append()]
        if guest.qemu.serial_console:
            argv += self._console()
        argv += self._monitors()
        if guest.virtiofs:
            argv += ["-object", f"memory-backend-memfd,id=mem,size={self._memory_size}M,share=on"]
        argv += self._device("virtio-rng")
        if guest.qemu.guest_agent:
            argv += self._agent()
        argv += self._hotplug()
        if guest.balloon:
            deflates = "on" if guest.deflate_on_oom else "off"
            argv += self._device(
                *("virtio-balloon", "id=balloon0", "free-page-reporting=on"),
                f"deflate-on-oom={deflates}",
            )
        for number, volume in enumerate(seed.disks(guest)):
            argv += self._volume(number, volume)
        for number, share in enumerate(guest.shares):
            argv += self._share(number, share)
        descriptors = macvtaps.descriptors(guest, guest.vcpu)
        for number, interface in enumerate(guest.interfaces):
            argv += self._interface(number, interface, descriptors.get(interface.id, ()))
        for device in guest.pci_devices:
            argv += ["-device", f"vfio-pci,host={device.address}{_device_options(device)}"]
        if guest.usb_devices:
            argv += ["-device", "qemu-xhci"]
        for device in guest.usb_devices:
            argv += ["-device", f"usb-host,{device.path}{_device_options(device)}"]
        if guest.vsock_cid is not None:
            argv += self._device("vhost-vsock", f"guest-cid={guest.vsock_cid}")
        argv += self._credentials()
        return [*argv, *guest.qemu.extra_args]

    def _machine(self) -> Word:
        parts: list[str | Variable] = [self._type]
        for name, value in self._options.items():
            parts += [f",{name}=", value if isinstance(value, Variable) else _escaped(value)]
        return word(*parts)

    def _memory(self) -> str:
        guest = self._guest
        if not guest.hotplug_mem:
            return f"{self._memory_size}M"
        return f"{guest.mem}M,maxmem={guest.mem + guest.hotplug_mem}M"

    def _append(self) -> Word:
        console = ["earlyprintk=ttyS0", "console=ttyS0"] if self._guest.qemu.serial_console else []
        # A triple fault is a reboot that each machine knows, and a panic ends the VM.
        words = [*console, "reboot=t", "panic=-1", *self._guest.kernel_params]
        clock = [Variable("clock")] if self._type == "microvm" else []
        added = _CLOCK_WORD if clock else 0
        if self._type == "microvm" and not self._has_tables:
            added += self._mmio_devices() * command_line.MMIO_DEVICE
        line = command_line.joined(
            self._guest, self._tools, words, added=added, own_max=_COMMAND_LINE_MAX
        )
        return word(line, *clock)

    def _monitors(self) -> Words:
        # QEMU then says in the journal when a guest is paused, and why: `io-error` for a full disk.
        argv: Words = ["-trace", "enable=vm_state_notify"]
        for socket in filter(None, (self._guest.socket, inside.control(self._guest))):
            argv += ["-qmp", f"unix:{_escaped(socket)},server=on,wait=off"]
        if self.event_log is not None:
            chardev = f"file,id=events,path={_escaped(self.event_log)},input-path="
            argv += ["-chardev", word(chardev, PACKAGE_VARIABLE, "/lib/qmp-hello")]
            argv += ["-mon", "chardev=events,mode=control"]
            if self._has_pcie:
                # By this, the guest's kernel says that it panicked.
                argv += ["-device", "pvpanic-pci"]
        return argv

    def _console(self) -> Words:
        if not self._has_hub:
            return ["-chardev", word(Variable("console")), "-serial", "chardev:console"]
        return [
            *("-chardev", "stdio,id=stdio,signal=off"),
            *("-chardev", _listening("socket", inside.console(self._guest))),
            *("-chardev", "hub,id=console,chardevs.0=stdio,chardevs.1=socket"),
            *("-serial", "chardev:console"),
        ]

    def _console_scripts(self) -> tuple[str, str]:
        """What the script does about the console: before the command line, and at last."""
        if not self._guest.qemu.serial_console:
            return "", ""
        if self._has_hub:
            return "", _CONSOLE_BY_HUB
        # Names of VMs hold nothing that the shell takes for its own.
        log = inside.console_log(self._guest)
        socket = _listening("console", inside.console(self._guest))
        before = _CONSOLE_IN_ONE_PLACE.replace("@socket@", socket)
        return before.replace("@log@", log), _LOGGED_CONSOLE.replace("@log@", log)

    def _agent(self) -> Words:
        """The port of QEMU's guest agent."""
        return [
            *("-chardev", _listening("agent", inside.agent(self._guest))),
            # Each port that might be takes two queues, in the guest's memory and in QEMU's: the 31
            # that it has by itself 6 MB of both. What else there may be by extraArgs finds room.
            *self._device("virtio-serial", "max_ports=8"),
            *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        ]

    def _hotplug(self) -> Words:
        guest = self._guest
        if not guest.hotplug_mem:
            return []
        backend, options = "memory-backend-ram", ""
        if guest.virtiofs:
            backend, options = "memory-backend-memfd", ",share=on"
        return [
            *("-object", f"{backend},id=vmem0,size={guest.hotplug_mem}M{options}"),
            "-device",
            f"virtio-mem-pci,id=vm0,memdev=vmem0,requested-size={guest.hotplugged_mem}M",
        ]

    def _volume(self, number: int, volume: Volume) -> Words:
        name = f"vd{number}"
        options = [
            f"id={name}",
            f"format={_FORMATS.get(volume.image_type, volume.image_type)}",
            f"file={_escaped(_file(volume))}",
            "if=none",
            "discard=unmap",
            f"read-only={'on' if volume.read_only else 'off'}",
        ]
        if volume.direct:
            # Native AIO is for files without the page cache; rbd has its own way.
            aio = [] if volume.image.startswith("rbd:") else ["aio=native"]
            options += ["cache=none", *aio]
        serial = [f"serial={_escaped(volume.serial)}"] if volume.serial is not None else []
        device = self._device("virtio-blk", f"drive={name}", *serial)
        return ["-drive", ",".join(options), *device]

    def _share(self, number: int, share: Share) -> Words:
        name = f"fs{number}"
        if share.socket is not None:
            return [
                *("-chardev", f"socket,id={name},path={_escaped(share.socket)}"),
                *self._device("vhost-user-fs", f"chardev={name}", f"tag={_escaped(share.tag)}"),
            ]
        options = f"local,id={name},path={_escaped(share.source)}"
        options += f",security_model={share.security_model}"
        options += ",readonly=on" if share.read_only else ""
        return [
            *("-fsdev", options),
            *self._device("virtio-9p", f"fsdev={name}", f"mount_tag={_escaped(share.tag)}"),
        ]

    def _interface(self, number: int, interface: Interface, descriptors: tuple[int, ...]) -> Words:
        # Not the interface's own name, which may hold what QEMU's ids may not.
        name = f"net{number}"
        queues = 1
        if interface.type == "user":
            # A port is forwarded once, by the first of several.
            users = [each for each in self._guest.interfaces if each.type == "user"]
            forwards = self._forwards() if interface == users[0] else []
            netdev = word(f"user,id={name}", *forwards)
        elif interface.type == "macvtap":
            queues = len(descriptors)
            key = "fds" if queues > 1 else "fd"
            numbers = ":".join(map(str, descriptors))
            netdev = word(f"tap,id={name},{key}={numbers}")
        else:
            queues = self._guest.vcpu
            many = f",queues={queues}" if queues > 1 else ""
            vhost: str | Variable = Variable("vhost")
            if interface.vhost is not None:
                vhost = "on" if interface.vhost else "off"
            netdev = word(
                f"tap,id={name},ifname={_escaped(interface.id)},script=no,downscript=no{many},vhost=",
                vhost,
            )
        # No option ROM: it would be looked for in a package that a small host lacks.
        options = [f"netdev={name}", f"mac={interface.mac}"]
        if interface.mtu is not None:
            options.append(f"host_mtu={interface.mtu}")
        if self._has_pcie:
            options += ["romfile="]
            if queues > 1:
                options += ["mq=on", f"vectors={2 * queues + 2}"]
        return ["-netdev", netdev, *self._device("virtio-net", *options)]

    def _forwards(self) -> list[str | Variable]:
        parts: list[str | Variable] = []
        for forward in self._guest.forward_ports:
            host = f"{forward.host_address}:{forward.host_port}"
            guest = f"{forward.guest_address}:{forward.guest_port}"
            if forward.source == "host":
                parts.append(f",hostfwd={forward.proto}:{host}-{guest}")
            else:
                address = forward.host_address or "127.0.0.1"
                parts += [f",guestfwd=tcp:{guest}-cmd:", PACKAGE_VARIABLE]
                parts.append(f"/lib/connect {address} {forward.host_port}")
        return parts

    def _credentials(self) -> Words:
        guest = self._guest
        argv: Words = []
        if len(guest.credential_files) > _FEW_CREDENTIALS:
            argv += ["-global", f"fw_cfg_io.x-file-slots={_PLACES}"]
        for name, path in credentials.files(guest):
            # Its contents never stand on a command line.
            argv += ["-fw_cfg", f"name={_CREDENTIALS}/{name},file={_escaped(path)}"]
        if guest.readiness == "guest" and guest.vsock_cid is not None:
            credential, value = _NOTIFY_CREDENTIAL, notify_socket(guest.vsock_cid)
            if self._type == "q35":
                # No module of the guest's kernel is needed for this one.
                text = f"io.systemd.credential:{credential}={value}"
                argv += ["-smbios", f"type=11,value={text}"]
            else:
                # This machine has no such tables.
                argv += ["-fw_cfg", f"name={_CREDENTIALS}/{credential},string={value}"]
        return argv

    # ---- the scripts

    def _place(self) -> str:
        """The lines that see to it that the package's path can stand in options."""
        if any(each.source == "guest" for each in self._guest.forward_ports):
            wrong, what = _PLAIN_ALONE
        elif self.event_log is not None:
            wrong, what = _NO_COMMAS
        else:
            return ""
        return _PLACE.replace("@wrong@", wrong).replace("@what@", what)

    def run_script(self) -> bytes:
        vhost = any(each.is_tap and each.vhost is None for each in self._guest.interfaces)
        console, console_at_last = self._console_scripts()
        return scripts.run(
            self._guest,
            self._tools,
            self.argv(),
            looks=[
                self._place(),
                _PROBE.replace("@cpu@", _HOST_CPU),
                _VHOST if vhost else "",
                _CLOCK if self._type == "microvm" else "",
                console,
            ],
            last=[
                # It removes a stale socket by itself.
                shell.directories(self._guest.socket or ""),
                self._memory_notice(),
                macvtaps.opened(macvtaps.descriptors(self._guest, self._guest.vcpu)),
                console_at_last,
            ],
        )

    def _memory_notice(self) -> str:
        """The line that says that the guest has less memory than it was given."""
        if self._memory_size == self._guest.mem:
            return ""
        notice = (
            f"{self._guest.name}: QEMU's machine microvm boots no initrd with {self._guest.mem} MB "
            f"of memory: the guest has {self._memory_size} MB"
        )
        return f"echo {quote(notice)} >&2"

    def shutdown_script(self, socket: str) -> bytes:
        return scripts.shutdown(
            self._tools,
            socket,
            f'"$package"/lib/qmp --wait {shell.quoted(socket)} system_powerdown',
            "Presses the power button, and waits until QEMU has gone or the input ends.",
        )

    def balloon_script(self, socket: str) -> bytes:
        return scripts.balloon(
            self._tools, f'exec "$package"/lib/qmp {shell.quoted(socket)} balloon "$1"'
        )


def _escaped(text: str) -> str:
    """A value within one of QEMU's option strings, in which a comma is two."""
    return text.replace(",", ",,")


def _listening(name: str, path: str) -> str:
    """A character device that one client at a time connects to."""
    return f"socket,id={name},path={_escaped(path)},server=on,wait=off"


def _file(volume: Volume) -> str:
    """An image's name, which QEMU would take for a protocol's if a colon were in it."""
    image = volume.image
    if volume.is_file and ":" in image and not image.startswith("/"):
        return f"./{image}"
    return image


def _device_options(device: Device) -> str:
    options = [f"id={device.qemu_id}"] if device.qemu_id is not None else []
    options += [f"bus={device.qemu_bus}"] if device.qemu_bus is not None else []
    options += [device.qemu_extra] if device.qemu_extra is not None else []
    return "".join(f",{option}" for option in options)
