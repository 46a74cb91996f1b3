# SPDX-License-Identifier: MIT
"""Packages for kvmtool's lkvm (builtin-run.c, disk/core.c and virtio/net.c of its sources).

It has no way to ask a guest to shut down: `lkvm stop` pulls the plug.
"""

from __future__ import annotations

from ..paths import MICROVM_BALLOON, MICROVM_RUN
from . import command_line, inside, kernels, limits, macvtaps, payload, scripts, seed, shell
from .facts import facts, notify_socket, notify_word
from .limits import plain
from .refused import Refused
from .tools import hypervisor
from .tree import File, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..declaration.guest import Guest
    from ..declaration.locate import Path
    from .shell import Word
    from .tools import Tools

_CANNOT: limits.Cannot = {
    **{key: why for key, why in limits.NOT_QEMU.items() if key != "user"},
    **limits.NO_HOTPLUG,
    **limits.NO_SERIAL,
    "virtiofs": ("shares directories by 9p alone", 'add proto = "9p"'),
    "9p.readOnly": ("shares directories writable alone", "mount it read-only on the host"),
    "initialBalloonMem": ("has a balloon that is empty at the start", "leave it out"),
    # It finds out by itself, for what it can.
    "imageType": ("is not told here what an image is", "convert it: qemu-img convert -O raw …"),
}
_DISKS_MAX = 4
# In MB.
_MEMORY_MIN = 64
# What it adds to the kernel's command line (x86/kvm.c, builtin-run.c).
_ADDED = len(
    "notsc noapic noacpi pci=conf1 reboot=k panic=1 i8042.direct=1 i8042.dumbkbd=1 i8042.nopnp=1 "
    "earlyprintk=serial i8042.noaux=1 console=ttyS0  root=/dev/vda rw "
)
# lkvm keeps its own sockets in the home directory.
_HOME = 'export HOME="$PWD"'


def build(guest: Guest, tools: Tools) -> Tree:
    """The package; raises Refused."""
    path = hypervisor(guest, tools)
    limits.check(guest, _CANNOT)
    kernels.check(guest, tools, kernels.BZIMAGE)
    _check(guest)
    entries = facts(guest, tools, multi_queue=False)
    entries |= payload.files(guest, tools)
    entries[MICROVM_RUN] = File(
        scripts.run(
            guest,
            tools,
            [path, "run", *_arguments(guest, tools)],
            looks=[macvtaps.numbers(guest)],
            last=[_taken_file(guest, "rm -f {}") if guest.balloon else "", _HOME],
        ),
        0o755,
    )
    if guest.balloon:
        entries[MICROVM_BALLOON] = File(_balloon(guest, tools, path), 0o755)
    return Tree.of(entries)


def _check(guest: Guest) -> None:
    if guest.initrd is None and not guest.volumes:
        raise Refused(
            ("kernel",),
            "kvmtool gives a guest with neither initrd nor volumes the host's own file system",
            "add one of them",
        )
    if len(seed.disks(guest)) > _DISKS_MAX:
        # The last is cloud-init's seed, if there is one.
        is_seed = len(guest.volumes) == _DISKS_MAX
        at: Path = ("cloudInit",) if is_seed else ("volumes", _DISKS_MAX)
        raise Refused(at, f"kvmtool has room for {_DISKS_MAX} disks, not for more")
    if guest.mem < _MEMORY_MIN:
        raise Refused(("mem",), f"mem = {guest.mem} is less than kvmtool's {_MEMORY_MIN} MB")
    users = [number for number, each in enumerate(guest.interfaces) if each.type == "user"]
    if len(users) > 1:
        raise Refused(
            ("interfaces", users[1], "type"),
            "interfaces.type = 'user': kvmtool has one network of its own, not more",
        )


def _arguments(guest: Guest, tools: Tools) -> Iterator[Word | str]:
    yield from ("--name", guest.name)
    yield from ("--cpus", str(guest.vcpu), "--mem", str(guest.mem))
    yield from ("--console", "serial", "--rng")
    yield from ("--kernel", payload.KERNEL)
    if guest.initrd is not None:
        yield from ("--initrd", payload.INITRD)
    words = ["console=ttyS0", "reboot=k", "panic=1", *guest.kernel_params]
    if guest.readiness == "guest" and guest.vsock_cid is not None:
        words.append(notify_word(notify_socket(guest.vsock_cid)))
    yield from ("--params", command_line.joined(guest, tools, words, added=_ADDED))
    if guest.balloon:
        yield "--balloon"
    for number, volume in enumerate(seed.disks(guest)):
        # A relative path could be one of its root directories by name, or `scsi:`.
        image = volume.image if volume.image.startswith("/") else f"./{volume.image}"
        options = ["direct"] if volume.direct else []
        options += ["ro"] if volume.read_only else []
        name = plain(guest, ("volumes", number, "image"), image)
        yield from ("--disk", ",".join((name, *options)))
    for number, share in enumerate(guest.shares):
        at = ("shares", number)
        source = plain(guest, (*at, "source"), share.source)
        yield from ("--9p", f"{source},{plain(guest, (*at, 'tag'), share.tag)}")
    for number in range(len(guest.interfaces)):
        yield from ("--network", _network(guest, number))
    if not guest.interfaces:
        # It would add one of its own.
        yield from ("--network", "mode=none")
    for device in guest.pci_devices:
        yield from ("--vfio-pci", device.address)
    if guest.vsock_cid is not None:
        yield from ("--vsock", str(guest.vsock_cid))


def _network(guest: Guest, number: int) -> Word | str:
    interface = guest.interfaces[number]
    mac = f",guest_mac={interface.mac}"
    if interface.type == "user":
        return f"mode=user{mac}"
    if interface.type == "macvtap":
        return shell.word("mode=tap,tapif=/dev/tap", macvtaps.number(guest, interface), mac)
    name = plain(guest, ("interfaces", number, "id"), interface.id, ",=")
    vhost = ",vhost=1" if interface.vhost else ""
    return f"mode=tap,tapif={name}{mac}{vhost}"


def _taken_file(guest: Guest, line: str) -> str:
    return line.format(shell.quoted(f"./{inside.taken(guest)}"))


def _balloon(guest: Guest, tools: Tools, path: str) -> bytes:
    """lkvm is told by how much, and not how much there is: what was taken is written down."""
    program = f"{shell.quoted(path)} balloon --name {shell.quoted(guest.name)}"
    return scripts.balloon(
        tools,
        _HOME,
        f"wanted=$(({guest.mem} - $1)) taken=0",
        '[ "$wanted" -ge 0 ] || wanted=0',
        _taken_file(guest, "[ ! -e {0} ] || read -r taken <{0}"),
        'if [ "$wanted" -gt "$taken" ]; then',
        f"    {program} --inflate $((wanted - taken))",
        'elif [ "$wanted" -lt "$taken" ]; then',
        f"    {program} --deflate $((taken - wanted))",
        "fi",
        _taken_file(guest, 'echo "$wanted" >{}'),
    )
