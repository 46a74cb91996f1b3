# SPDX-License-Identifier: MIT
"""Packages for alioth (alioth-cli/src/boot of its sources).

It has no control socket: nothing can ask its guest to shut down, or take memory back.
"""

from __future__ import annotations

from ..paths import MICROVM_RUN
from . import command_line, kernels, limits, macvtaps, payload, scripts, seed
from .facts import facts, notify_socket, notify_word
from .limits import plain
from .refused import Refused
from .shell import word
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
    **limits.NOT_QEMU,
    **limits.NO_9P,
    **limits.NO_VHOST,
    **limits.NO_HOTPLUG,
    **limits.RAW_ONLY,
    **limits.NO_SERIAL,
    **limits.NO_DIRECT,
    "balloon": ("has a balloon that nothing can blow up", "leave balloon out"),
    "initialBalloonMem": ("has a balloon that nothing can blow up", "leave it out"),
    "pci": ("names devices by nodes that are not known before the start", 'take "qemu"'),
}
# What it takes for the name of an object (serde_aco), wherever a value begins with it.
_OBJECT = "id_"
_MTU = 1500


def build(guest: Guest, tools: Tools) -> Tree:
    """The package; raises Refused."""
    path = hypervisor(guest, tools)
    limits.check(guest, _CANNOT)
    kind = kernels.check(guest, tools, kernels.BZIMAGE, kernels.PVH)
    entries = facts(guest, tools, multi_queue=guest.vcpu > 1)
    entries |= payload.files(guest, tools)
    entries[MICROVM_RUN] = File(
        scripts.run(
            guest,
            tools,
            [path, "boot", *_arguments(guest, tools, kind)],
            looks=[macvtaps.numbers(guest)],
        ),
        0o755,
    )
    return Tree.of(entries)


def _arguments(guest: Guest, tools: Tools, kind: str) -> Iterator[Word | str]:
    yield from ("--memory", f"size={guest.mem}M,backend=memfd")
    yield from ("--cpu", f"count={guest.vcpu}")
    yield from ("--pvh" if kind == kernels.PVH else "--kernel", payload.KERNEL)
    if guest.initrd is not None:
        yield from ("--initramfs", payload.INITRD)
    words = ["console=ttyS0", "reboot=k", "panic=1", *guest.kernel_params]
    if guest.readiness == "guest" and guest.vsock_cid is not None:
        words.append(notify_word(notify_socket(guest.vsock_cid)))
    yield from ("--cmdline", command_line.joined(guest, tools, words))
    yield "--entropy"
    for number, volume in enumerate(seed.disks(guest)):
        image = _file(guest, ("volumes", number, "image"), volume.image)
        read_only = "true" if volume.read_only else "false"
        yield from ("--blk", f"file,path={image},readonly={read_only}")
    for number, interface in enumerate(guest.interfaces):
        options = f",mac={interface.mac},mtu={interface.mtu or _MTU}"
        if interface.type == "macvtap":
            node = word("tap,tap=/dev/tap", macvtaps.number(guest, interface), options)
            yield from ("--net", node)
        else:
            name = _value(guest, ("interfaces", number, "id"), interface.id)
            pairs = f",queue_pairs={guest.vcpu}" if guest.vcpu > 1 else ""
            yield from ("--net", f"tap,if_name={name}{options}{pairs}")
    for number, share in enumerate(guest.shares):
        assert share.socket is not None
        at = ("shares", number)
        socket = _file(guest, (*at, "socket"), share.socket)
        yield from ("--fs", f"vu,socket={socket},tag={_value(guest, (*at, 'tag'), share.tag)}")
    if guest.vsock_cid is not None:
        yield from ("--vsock", f"vhost,cid={guest.vsock_cid}")


def _file(guest: Guest, at: Path, path: str) -> str:
    return _value(guest, at, path if path.startswith("/") else f"./{path}")


def _value(guest: Guest, at: Path, value: str) -> str:
    if value.startswith(_OBJECT):
        key = ".".join(part for part in at if isinstance(part, str))
        raise Refused(at, f"{key} = {value!r} begins with {_OBJECT!r}, an object's name for alioth")
    return plain(guest, at, value)
