# SPDX-License-Identifier: MIT
"""Packages for crosvm (docs/book and `crosvm run --help` of its sources)."""

from __future__ import annotations

from ..paths import MICROVM_BALLOON, MICROVM_RUN, MICROVM_SHUTDOWN, PCI_DEVICES
from . import command_line, inside, kernels, limits, macvtaps, once, payload, scripts, seed, shell
from .facts import facts, notify_socket, notify_word
from .limits import plain
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
    **limits.NO_VHOST,
    **limits.NO_HOTPLUG,
    "initialBalloonMem": ("has a balloon that is empty at the start", "leave it out"),
    "9p.readOnly": ("shares directories by 9p writable alone", 'add proto = "virtiofs"'),
    # It finds out by itself, for what it can.
    "imageType": ("is not told here what an image is", "convert it: qemu-img convert -O raw …"),
}
_REPEATED = (
    *("--serial", "--params", "--block", "--net", "--vhost-user-fs", "--shared-dir", "--vfio"),
)
# What ends a value or quotes one (serde_keyvalue), and what parts a shared directory's.
_SPECIAL = ",\"'[]"
_SHARED = ":"
# What it adds to the kernel's command line (x86_64/src/lib.rs, arch/src/serial.rs).
_ADDED = len("pci=noacpi reboot=k panic=-1 acpi=noirq console=ttyS0 ")


def build(guest: Guest, tools: Tools) -> Tree:
    """The package; raises Refused."""
    path = hypervisor(guest, tools)
    limits.check(guest, _CANNOT)
    macvtaps.check(guest)
    kernels.check(guest, tools, kernels.BZIMAGE, kernels.ELF)
    entries = facts(guest, tools, multi_queue=False)
    entries |= payload.files(guest, tools)
    taps = macvtaps.descriptors(guest, 1)
    root = f"./{inside.sandbox(guest)}"
    sockets = [guest.socket] if guest.socket is not None else []
    entries[MICROVM_RUN] = File(
        scripts.run(
            guest,
            tools,
            [
                *(path, "run"),
                *once.merged(guest, _arguments(guest, tools, root, taps), repeated=_REPEATED),
                payload.KERNEL,
            ],
            last=[
                scripts.stale(*sockets),
                f"# Empty, for the sandbox of each device.\nmkdir -p {shell.quoted(root)}",
                macvtaps.opened(taps),
            ],
        ),
        0o755,
    )
    if guest.socket is not None:
        program, quoted = shell.quoted(path), shell.quoted(guest.socket)
        entries[MICROVM_SHUTDOWN] = File(
            scripts.shutdown(
                tools, guest.socket, f"{program} powerbtn {quoted}", "Presses the power button."
            ),
            0o755,
        )
        if guest.balloon:
            entries[MICROVM_BALLOON] = File(
                # It is told what it takes, in bytes.
                scripts.balloon(
                    tools,
                    f"taken=$((({guest.mem} - $1) * 1048576))",
                    '[ "$taken" -ge 0 ] || taken=0',
                    f'exec {program} balloon "$taken" {quoted}',
                ),
                0o755,
            )
    return Tree.of(entries)


def _arguments(
    guest: Guest, tools: Tools, root: str, taps: dict[str, tuple[int, ...]]
) -> Iterator[Word | str]:
    if guest.socket is not None:
        yield from ("--socket", guest.socket)
    yield from ("--cpus", str(guest.vcpu), "--mem", str(guest.mem))
    yield from ("--serial", "type=stdout,hardware=serial,num=1,console=true,stdin=true")
    yield from ("--pivot-root", root)
    yield from ("--params", _parameters(guest, tools))
    if guest.initrd is not None:
        yield from ("--initrd", payload.INITRD)
    if not guest.balloon:
        yield "--no-balloon"
    else:
        yield "--balloon-page-reporting"
        if not guest.deflate_on_oom:
            yield "--strict-balloon"
    for number, volume in enumerate(seed.disks(guest)):
        at = ("volumes", number)
        options = [
            f"path={plain(guest, (*at, 'image'), volume.image, _SPECIAL)}",
            f"ro={_truth(volume.read_only)}",
            f"o_direct={_truth(volume.direct)}",
        ]
        if volume.serial is not None:
            options.append(f"id={plain(guest, (*at, 'serial'), volume.serial, _SPECIAL)}")
        yield from ("--block", ",".join(options))
    for number, interface in enumerate(guest.interfaces):
        if interface.type == "macvtap":
            backend = f"tap-fd={taps[interface.id][0]}"
        else:
            name = plain(guest, ("interfaces", number, "id"), interface.id, _SPECIAL)
            backend = f"tap-name={name}"
        yield from ("--net", f"{backend},mac={interface.mac}")
    for number, share in enumerate(guest.shares):
        at = ("shares", number)
        # A colon is what parts an older form of the first, too.
        tag = plain(guest, (*at, "tag"), share.tag, _SPECIAL + _SHARED)
        if share.socket is not None:
            socket = plain(guest, (*at, "socket"), share.socket, _SPECIAL + _SHARED)
            yield from ("--vhost-user-fs", f"socket={socket},tag={tag}")
        else:
            source = plain(guest, (*at, "source"), share.source, _SHARED)
            yield from ("--shared-dir", f"{source}:{tag}:type=p9")
    for device in guest.pci_devices:
        yield from ("--vfio", f"{PCI_DEVICES}/{device.address},iommu=viommu")
    if guest.vsock_cid is not None:
        yield from ("--vsock", f"cid={guest.vsock_cid}")


def _parameters(guest: Guest, tools: Tools) -> str:
    words = ["console=ttyS0", "reboot=k", "panic=1", *guest.kernel_params]
    if guest.readiness == "guest" and guest.vsock_cid is not None:
        words.append(notify_word(notify_socket(guest.vsock_cid)))
    return command_line.joined(guest, tools, words, added=_ADDED)


def _truth(value: bool) -> str:
    return "true" if value else "false"
