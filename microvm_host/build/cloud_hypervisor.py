# SPDX-License-Identifier: MIT
"""Packages for cloud-hypervisor, from version 36 on (docs/ of its sources, and its --help)."""

from __future__ import annotations

from ..paths import MICROVM_BALLOON, MICROVM_RUN, MICROVM_SHUTDOWN, PCI_DEVICES
from . import (
    command_line,
    inside,
    kernels,
    limits,
    macvtaps,
    once,
    payload,
    programs,
    scripts,
    seed,
    shell,
)
from .facts import OWN_NOTIFY_SOCKET, OWN_VSOCK, facts
from .limits import plain
from .refused import Refused
from .tools import hypervisor
from .tree import File, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..declaration.guest import Guest
    from .tools import Tools

_CANNOT: limits.Cannot = {
    **limits.NOT_QEMU,
    **limits.NO_9P,
    **limits.NO_VHOST,
}
# Versions 30 to 35 had another command line, in which an option took one value at a time.
_OLDEST = (36, 0)
_BZIMAGE_SINCE = (39, 0)
# From then on it refuses writes to the first sector of an image whose type is not told.
_IMAGE_TYPE_SINCE = (50, 1)
# CMDLINE_MAX_SIZE of its arch/src/x86_64/layout.rs, with the final NUL.
_COMMAND_LINE_MAX = 0xFFFF
# Before that, an x2APIC of one byte.
_VCPU_MAX, _MANY_CPUS_SINCE = 254, (48, 0)
# virtio-mem's alignment there, in MB (virtio-devices/src/mem.rs).
_HOTPLUG_UNIT = 128
# Options with one value after the other, and those that an administrator's take the place of.
_LISTED, _REPLACED = ("--disk", "--net", "--fs", "--device"), ("--serial", "--console")
# Of --platform's, what is given by keys of their own.
_PLATFORM_KEYS = {
    "uuid": "machineId",
    "system_uuid": "machineId",
    "oem_strings": "cloud-hypervisor.platformOEMStrings",
}
# By which systemd takes an OEM string for a credential (systemd.system-credentials(7)); another is
# io.systemd.credential.binary.
_CREDENTIAL = "io.systemd.credential"
# On a terminal, both would read the same input.
_TTY = "tty"
_NOT_SEEN = ("off", "null")
# What ends a value, or begins a list (option_parser/src/lib.rs).
_SPECIAL = ',"[]'


def build(guest: Guest, tools: Tools) -> Tree:
    """The package; raises Refused."""
    path = hypervisor(guest, tools)
    version = tools.program_version
    if version < _OLDEST:
        raise Refused(
            ("hypervisor",),
            f"{path} is version {version[0]}.{version[1]}, and {_OLDEST[0]} is the oldest whose "
            "options are known",
        )
    limits.check(guest, _CANNOT)
    if guest.vcpu > _VCPU_MAX and version < _MANY_CPUS_SINCE:
        raise Refused(
            ("vcpu",),
            f"vcpu = {guest.vcpu} is more than {_VCPU_MAX}, the most for cloud-hypervisor before "
            f"version {_MANY_CPUS_SINCE[0]}",
        )
    macvtaps.check(guest)
    formats = [kernels.PVH, *([kernels.BZIMAGE] if version >= _BZIMAGE_SINCE else [])]
    kernels.check(guest, tools, *formats)
    _check_hotplug(guest)
    # It serves several clients at a time: the package's scripts and the host have the same.
    socket = guest.socket or inside.control(guest)
    entries = facts(
        guest,
        tools,
        multi_queue=guest.vcpu > 1,
        control=(socket, "cloud-hypervisor"),
        has_own_vsock=True,
    )
    entries |= payload.files(guest, tools)
    _check_extra(guest)
    vsock = [OWN_VSOCK] if guest.vsock_cid is not None else []
    taps = macvtaps.descriptors(guest, guest.vcpu)
    entries[MICROVM_RUN] = File(
        scripts.run(
            guest,
            tools,
            [
                path,
                *once.merged(
                    guest,
                    _arguments(guest, tools, socket, taps),
                    listed=_LISTED,
                    joined=("--platform",),
                    replaced=_REPLACED,
                ),
            ],
            last=[scripts.stale(socket, *vsock), macvtaps.opened(taps)],
        ),
        0o755,
    )
    if guest.socket is not None:
        quoted = shell.quoted(socket)
        entries["lib/api"] = File(programs.api(tools.python), 0o755)
        entries[MICROVM_SHUTDOWN] = File(
            scripts.shutdown(
                tools,
                socket,
                f'"$package"/lib/api --wait {quoted} PUT /api/v1/vm.power-button',
                "Presses the power button, and waits until the hypervisor has gone or the input "
                "ends.",
            ),
            0o755,
        )
        if guest.balloon:
            entries[MICROVM_BALLOON] = File(_balloon(guest, tools, quoted), 0o755)
            if guest.hotplug_mem:
                entries["lib/surplus"] = File(programs.surplus(tools.python), 0o755)
    return Tree.of(entries)


def _check_hotplug(guest: Guest) -> None:
    for key, value in (
        ("hotplugMem", guest.hotplug_mem),
        ("hotpluggedMem", guest.hotplugged_mem),
    ):
        if value % _HOTPLUG_UNIT:
            raise Refused(
                (key,),
                f"{key} = {value} is no multiple of {_HOTPLUG_UNIT} MB, cloud-hypervisor's unit of "
                "virtio-mem",
            )


def _check_extra(guest: Guest) -> None:
    for option in once.given(guest):
        if option.name in (*_REPLACED, "--platform") and len(option.values) != 1:
            raise once.refused(guest, option, "without its one value")
        if option.name == "--platform":
            for key, instead in _PLATFORM_KEYS.items():
                if f",{key}=" in f",{option.values[0]}":
                    raise once.refused(guest, option, f"with {key}", f"say it by {instead}")
        is_tty = _extra(guest, "--serial", _TTY) == _extra(guest, "--console", "off") == _TTY
        if option.name == "--console" and is_tty:
            raise once.refused(
                guest, option, "tty, where the serial port is, too", 'add "--serial", "null"'
            )


def _extra(guest: Guest, name: str, default: str) -> str:
    """What an option with one value says."""
    found = [each.values for each in once.given(guest) if each.name == name]
    return found[0][0] if found and found[0] else default


def _arguments(
    guest: Guest, tools: Tools, socket: str, taps: dict[str, tuple[int, ...]]
) -> Iterator[shell.Word | str]:
    yield from ("--api-socket", f"path={plain(guest, ('socket',), socket, _SPECIAL)}")
    yield from ("--cpus", f"boot={guest.vcpu}")
    yield from ("--memory", _memory(guest))
    yield from ("--platform", _platform(guest))
    yield from ("--kernel", payload.KERNEL)
    if guest.initrd is not None:
        yield from ("--initramfs", payload.INITRD)
    is_seen = _extra(guest, "--serial", _TTY) not in _NOT_SEEN
    console = ["earlyprintk=ttyS0", "console=ttyS0"] if is_seen else []
    words = [*console, "reboot=t", "panic=-1", *guest.kernel_params]
    line = command_line.joined(guest, tools, words, own_max=_COMMAND_LINE_MAX)
    yield from ("--cmdline", line)
    yield from ("--serial", _TTY, "--console", "off", "--seccomp", "true", "--watchdog")
    if guest.balloon:
        deflates = "on" if guest.deflate_on_oom else "off"
        size = f"size={guest.initial_balloon_mem}M"
        yield from ("--balloon", f"{size},deflate_on_oom={deflates},free_page_reporting=on")
    if seed.disks(guest):
        yield from ("--disk", *_disks(guest, tools))
    if guest.interfaces:
        yield from ("--net", *_nets(guest, taps))
    if guest.shares:
        yield from ("--fs", *_shares(guest))
    if guest.pci_devices:
        yield "--device"
        yield from (f"path={PCI_DEVICES}/{each.address}" for each in guest.pci_devices)
    if guest.vsock_cid is not None:
        yield from ("--vsock", f"cid={guest.vsock_cid},socket={OWN_VSOCK}")


def _memory(guest: Guest) -> str:
    # vhost-user: virtiofsd maps the guest's memory.
    shared = "on" if guest.virtiofs else "off"
    # The kernel merges no shared pages; from version 52 on both together are refused.
    mergeable = "off" if guest.virtiofs else "on"
    options = [f"size={guest.mem}M", f"mergeable={mergeable}", f"shared={shared}"]
    if guest.hotplug_mem:
        options += ["hotplug_method=virtio-mem", f"hotplug_size={guest.hotplug_mem}M"]
        # Nothing is not a size there.
        options += [f"hotplugged_size={guest.hotplugged_mem}M"] if guest.hotplugged_mem else []
    return ",".join(options)


def _platform(guest: Guest) -> str:
    strings = []
    for number, each in enumerate(guest.oem_strings):
        at = ("cloud-hypervisor", "platformOEMStrings", number)
        if each.startswith(_CREDENTIAL):
            # Not shown: it is what should not be read.
            raise Refused(
                at,
                f"cloud-hypervisor.platformOEMStrings has one that begins with {_CREDENTIAL!r}: "
                "everybody could read it, in the package and on the command line",
                'put it into a share or a volume, or use credentialFiles with hypervisor = "qemu"',
            )
        strings.append(plain(guest, at, each, _SPECIAL))
    if guest.readiness == "guest":
        strings.append(f"{_CREDENTIAL}:vmm.notify_socket={OWN_NOTIFY_SOCKET}")
    listed = [f"oem_strings=[{','.join(strings)}]"] if strings else []
    return ",".join((f"uuid={guest.machine_id}", *listed))


def _disks(guest: Guest, tools: Tools) -> Iterator[str]:
    for number, volume in enumerate(seed.disks(guest)):
        at = ("volumes", number)
        options = [
            f"path={plain(guest, (*at, 'image'), volume.image, _SPECIAL)}",
            f"readonly={'on' if volume.read_only else 'off'}",
            f"direct={'on' if volume.direct else 'off'}",
        ]
        if tools.program_version >= _IMAGE_TYPE_SINCE:
            options.append(f"image_type={volume.image_type}")
        if volume.serial is not None:
            options.append(f"serial={plain(guest, (*at, 'serial'), volume.serial, _SPECIAL)}")
        if guest.vcpu > 1:
            options.append(f"num_queues={guest.vcpu}")
        yield ",".join(options)


def _nets(guest: Guest, taps: dict[str, tuple[int, ...]]) -> Iterator[str]:
    for number, interface in enumerate(guest.interfaces):
        pairs = guest.vcpu
        if interface.type == "macvtap":
            descriptors = taps[interface.id]
            pairs = len(descriptors)
            backend = f"fd=[{','.join(map(str, descriptors))}]"
        else:
            name = plain(guest, ("interfaces", number, "id"), interface.id, _SPECIAL)
            backend = f"tap={name}"
        # One for each direction.
        queues = [f"num_queues={2 * pairs}"] if pairs > 1 else []
        yield ",".join((backend, f"mac={interface.mac}", *queues))


def _shares(guest: Guest) -> Iterator[str]:
    for number, share in enumerate(guest.shares):
        assert share.socket is not None
        tag = plain(guest, ("shares", number, "tag"), share.tag, _SPECIAL)
        socket = plain(guest, ("shares", number, "socket"), share.socket, _SPECIAL)
        yield f"tag={tag},socket={socket}"


def _balloon(guest: Guest, tools: Tools, socket: str) -> bytes:
    """It is told what it takes, in bytes."""
    taken = [f"taken=$((({guest.mem} - $1) * 1048576))", '[ "$taken" -ge 0 ] || taken=0']
    if guest.hotplug_mem:
        # How much is plugged changes while it runs.
        taken = [
            f'info=$("$package"/lib/api {socket} GET /api/v1/vm.info)',
            'taken=$("$package"/lib/surplus "$1" "$info")',
        ]
    return scripts.balloon(
        tools,
        *taken,
        f'exec "$package"/lib/api {socket} PUT /api/v1/vm.resize '
        '"{\\"desired_balloon\\":$taken}"',
    )
