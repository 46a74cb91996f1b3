# SPDX-License-Identifier: MIT
"""Packages for StratoVirt's machine microvm (docs/config_guidebook.md of its sources).

That machine has no power button: its QMP has no way to ask a guest to shut down.
"""

from __future__ import annotations

from ..paths import MICROVM_BALLOON, MICROVM_RUN
from . import command_line, kernels, limits, macvtaps, payload, programs, scripts, seed, shell
from .facts import facts, notify_socket, notify_word
from .limits import plain
from .refused import Refused
from .tools import hypervisor
from .tree import File, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..declaration.guest import Guest
    from .shell import Word
    from .tools import Tools

_CANNOT: limits.Cannot = {
    **limits.NOT_QEMU,
    **limits.NO_9P,
    **limits.NO_HOTPLUG,
    **limits.NO_PCI,
    **limits.RAW_ONLY,
    "initialBalloonMem": ("has a balloon that is empty at the start", "leave it out"),
}
_VCPU_MAX = 254
# In MB.
_MEMORY_MIN, _MEMORY_MAX = 128, 512 * 1024
# Of virtio-mmio on x86; and of a tap's queues.
_DEVICES_MAX, _QUEUES_MAX = 11, 16


def build(guest: Guest, tools: Tools) -> Tree:
    """The package; raises Refused."""
    path = hypervisor(guest, tools)
    limits.check(guest, _CANNOT)
    macvtaps.check(guest)
    kernels.check(guest, tools, kernels.BZIMAGE)
    _check(guest)
    entries = facts(guest, tools, multi_queue=guest.vcpu > 1)
    entries |= payload.files(guest, tools)
    taps = macvtaps.descriptors(guest, _queues(guest))
    sockets = [guest.socket] if guest.socket is not None else []
    entries[MICROVM_RUN] = File(
        scripts.run(
            guest,
            tools,
            [path, *_arguments(guest, tools, taps)],
            last=[scripts.stale(*sockets), macvtaps.opened(taps)],
        ),
        0o755,
    )
    if guest.socket is not None and guest.balloon:
        entries["lib/qmp"] = File(programs.qmp(tools.python), 0o755)
        entries[MICROVM_BALLOON] = File(
            scripts.balloon(
                tools, f'exec "$package"/lib/qmp {shell.quoted(guest.socket)} balloon "$1"'
            ),
            0o755,
        )
    return Tree.of(entries)


def _check(guest: Guest) -> None:
    if guest.vcpu > _VCPU_MAX:
        raise Refused(("vcpu",), f"vcpu = {guest.vcpu} is more than stratovirt's {_VCPU_MAX}")
    if not _MEMORY_MIN <= guest.mem <= _MEMORY_MAX:
        raise Refused(
            ("mem",),
            f"mem = {guest.mem} is beyond stratovirt's {_MEMORY_MIN} to {_MEMORY_MAX} MB",
        )
    count = _devices(guest)
    if count > _DEVICES_MAX:
        raise Refused(
            ("hypervisor",),
            f"stratovirt's machine microvm has room for {_DEVICES_MAX} devices, and this guest has "
            f"{count}",
        )


def _devices(guest: Guest) -> int:
    count = len(seed.disks(guest)) + len(guest.interfaces) + len(guest.shares)
    # Beside these: random numbers, the balloon, the vsock.
    return count + 1 + guest.balloon + (guest.vsock_cid is not None)


def _queues(guest: Guest) -> int:
    return min(guest.vcpu, _QUEUES_MAX)


def _arguments(
    guest: Guest, tools: Tools, taps: dict[str, tuple[int, ...]]
) -> Iterator[Word | str]:
    yield from ("-name", guest.name)
    # vhost-user: virtiofsd maps the guest's memory.
    yield from ("-machine", f"type=microvm,mem-share={'on' if guest.virtiofs else 'off'}")
    yield from ("-smp", str(guest.vcpu), "-m", f"{guest.mem}M")
    yield from ("-kernel", payload.KERNEL)
    if guest.initrd is not None:
        yield from ("-initrd", payload.INITRD)
    words = ["console=ttyS0", "edd=off", "reboot=t", "panic=-1", *guest.kernel_params]
    if guest.readiness == "guest" and guest.vsock_cid is not None:
        words.append(notify_word(notify_socket(guest.vsock_cid)))
    # It names each device there, and says that there is no PCI.
    added = len(" pci=off") + _devices(guest) * command_line.MMIO_DEVICE
    yield from ("-append", command_line.joined(guest, tools, words, added=added))
    yield from ("-serial", "stdio")
    if guest.socket is not None:
        socket = plain(guest, ("socket",), guest.socket)
        yield from ("-qmp", f"unix:{socket},server,nowait")
    yield from ("-object", "rng-random,id=rng0,filename=/dev/urandom")
    yield from ("-device", "virtio-rng-device,rng=rng0,id=rng_dev0")
    if guest.balloon:
        deflates = "true" if guest.deflate_on_oom else "false"
        options = f"id=balloon0,deflate-on-oom={deflates},free-page-reporting=true"
        yield from ("-device", f"virtio-balloon-device,{options}")
    for number, volume in enumerate(seed.disks(guest)):
        at, name = ("volumes", number), f"vd{number}"
        image = plain(guest, (*at, "image"), volume.image)
        read_only = "on" if volume.read_only else "off"
        # It is direct if nothing is said.
        direct = "on,aio=native" if volume.direct else "off,aio=off"
        yield from (
            "-drive",
            f"id={name},file={image},format=raw,if=none,readonly={read_only},direct={direct}",
        )
        serial = ""
        if volume.serial is not None:
            serial = f",serial={plain(guest, (*at, 'serial'), volume.serial)}"
        yield from ("-device", f"virtio-blk-device,drive={name},id=blk_{name}{serial}")
    for number, share in enumerate(guest.shares):
        assert share.socket is not None
        at, name = ("shares", number), f"fs{number}"
        tag = plain(guest, (*at, "tag"), share.tag)
        socket = plain(guest, (*at, "socket"), share.socket)
        yield from ("-chardev", f"socket,id={name},path={socket}")
        yield from ("-device", f"vhost-user-fs-device,id=dev_{name},chardev={name},tag={tag}")
    for number in range(len(guest.interfaces)):
        yield from _interface(guest, number, taps)
    if guest.vsock_cid is not None:
        yield from ("-device", f"vhost-vsock-device,id=vsock0,guest-cid={guest.vsock_cid}")


def _interface(guest: Guest, number: int, taps: dict[str, tuple[int, ...]]) -> Iterator[str]:
    interface, name = guest.interfaces[number], f"net{number}"
    queues = _queues(guest)
    if interface.type == "macvtap":
        descriptors = taps[interface.id]
        queues = len(descriptors)
        key = "fds" if queues > 1 else "fd"
        backend = f"{key}={':'.join(map(str, descriptors))}"
    else:
        backend = f"ifname={plain(guest, ('interfaces', number, 'id'), interface.id)}"
    many, mq = (f",queues={queues}", ",mq=on") if queues > 1 else ("", "")
    vhost = ",vhost=on" if interface.vhost else ""
    yield from ("-netdev", f"tap,id={name},{backend}{many}{vhost}")
    yield from ("-device", f"virtio-net-device,id=dev_{name},netdev={name},mac={interface.mac}{mq}")
