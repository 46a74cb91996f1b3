# SPDX-License-Identifier: MIT
"""What a declaration asks for that not every hypervisor does, and the refusal of it.

A builder names what its hypervisor cannot do, with the reason; what is not named here all of them
can, or the builder looks at by itself.
"""

from __future__ import annotations

from ..declaration.guest import Qemu
from .refused import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ..declaration.guest import Guest
    from ..declaration.locate import Path

    # By what is asked for: the reason, worded to follow the hypervisor's name, and a hint.
    Cannot = Mapping[str, tuple[str, str]]

# What all but QEMU cannot do, or are not told here.
NOT_QEMU: Cannot = {
    "9p.securityModel": ("has no such choice", "leave securityModel out"),
    "cpu": ("gives the guest the host's own CPU", "leave cpu out"),
    "usb": ("passes no USB devices through", 'hypervisor = "qemu" does'),
    "device.qemu": ("has no options of QEMU's", "leave devices.qemu out"),
    "rbd": ("opens files and block devices alone", "map it by rbd(8), and give image = /dev/rbd…"),
    "user": ("has no network of its own", 'give the interface type = "tap"'),
    "forwardPorts": ("forwards no ports", 'hypervisor = "qemu" does'),
    "credentialFiles": (
        "has no device to hand them over by, and everybody reads its command line",
        "put them into a share or a volume",
    ),
}
NO_HOTPLUG: Cannot = {
    "hotplugMem": ("has no memory that could be added", "give all of it by mem"),
}
NO_9P: Cannot = {"9p": ("shares directories by virtiofs alone", 'add proto = "virtiofs"')}
NO_SHARES: Cannot = {
    "9p": ("shares no directories", "give the guest a volume"),
    "virtiofs": ("shares no directories", "give the guest a volume"),
}
RAW_ONLY: Cannot = {
    "imageType": ("knows raw images alone", "convert it: qemu-img convert -O raw …"),
}
NO_SERIAL: Cannot = {
    "serial": ("gives disks no serial number of one's choice", "tell disks apart by their labels")
}
NO_DIRECT: Cannot = {"direct": ("has no way past the page cache", "leave direct out")}
NO_PCI: Cannot = {"pci": ("passes no devices through", 'hypervisor = "qemu" does')}
NO_MACVTAP: Cannot = {
    "macvtap": ("opens taps by their names alone", 'give the interface type = "tap"')
}
NO_VHOST: Cannot = {
    "vhost": ("does not let the host's kernel carry packets", "leave tap.vhost out")
}


def check(guest: Guest, cannot: Cannot) -> None:
    """Refuse what the guest's hypervisor cannot do, the first that is asked for.

    Raises:
        Refused
    """
    for table in _tables(guest):
        if table != guest.hypervisor:
            raise Refused(
                (table,),
                f"{table} is for hypervisor = {table!r}, and this one is {guest.hypervisor!r}",
            )
    for what, at, shown in _asked(guest):
        if what in cannot:
            reason, hint = cannot[what]
            raise Refused(at, f"{shown}: {guest.hypervisor} {reason}", hint)
    if guest.initial_balloon_mem and not guest.balloon:
        raise Refused(
            ("initialBalloonMem",),
            "initialBalloonMem is what a balloon takes at the start, and there is none",
            "add balloon = true",
        )
    if guest.initial_balloon_mem >= guest.mem:
        raise Refused(
            ("initialBalloonMem",),
            f"initialBalloonMem = {guest.initial_balloon_mem} leaves nothing of mem = {guest.mem}",
        )


def plain(guest: Guest, at: Path, value: str, special: str = ",") -> str:
    """A value for one of the option strings of a hypervisor that has no way to quote.

    Raises:
        Refused: it holds a character that would end it.
    """
    for each in special:
        if each in value:
            key = ".".join(part for part in at if isinstance(part, str))
            raise Refused(
                at,
                f"{key} = {value!r} has {each!r} in it, which ends a value for {guest.hypervisor}",
            )
    return value


def _tables(guest: Guest) -> Iterator[str]:
    """The hypervisors that have a table of their own."""
    if guest.qemu != Qemu():
        yield "qemu"
    for name, given in guest.own_arguments:
        if given:
            yield name
    if guest.oem_strings:
        yield "cloud-hypervisor"


def _asked(guest: Guest) -> Iterator[tuple[str, Path, str]]:
    """What is asked for, by which key, and how that is written."""
    if guest.cpu is not None:
        yield "cpu", ("cpu",), f"cpu = {guest.cpu!r}"
    if guest.initial_balloon_mem:
        shown = f"initialBalloonMem = {guest.initial_balloon_mem}"
        yield "initialBalloonMem", ("initialBalloonMem",), shown
    if guest.balloon:
        yield "balloon", ("balloon",), "balloon = true"
    if guest.hotplug_mem:
        yield "hotplugMem", ("hotplugMem",), f"hotplugMem = {guest.hotplug_mem}"
    if guest.credential_files:
        yield "credentialFiles", ("credentialFiles",), "credentialFiles"
    yield from _asked_of_disks(guest)
    for number, interface in enumerate(guest.interfaces):
        at: Path = ("interfaces", number)
        yield interface.type, (*at, "type"), f"interfaces.type = {interface.type!r}"
        if interface.vhost:
            yield "vhost", (*at, "tap", "vhost"), "interfaces.tap.vhost = true"
    if guest.forward_ports:
        yield "forwardPorts", ("forwardPorts", 0), "forwardPorts"
    for number, share in enumerate(guest.shares):
        at = ("shares", number)
        yield share.proto, (*at, "proto"), f"shares.proto = {share.proto!r}"
        if share.proto == "9p" and share.read_only:
            yield "9p.readOnly", (*at, "readOnly"), "shares.readOnly = true with proto = '9p'"
        if share.security_model != "none":
            shown = f"shares.securityModel = {share.security_model!r}"
            yield "9p.securityModel", (*at, "securityModel"), shown
    for number, device in enumerate(guest.devices):
        at = ("devices", number)
        yield device.bus, (*at, "bus"), f"devices.bus = {device.bus!r}"
        if device.qemu_id or device.qemu_bus or device.qemu_extra:
            yield "device.qemu", (*at, "qemu"), "devices.qemu"


def _asked_of_disks(guest: Guest) -> Iterator[tuple[str, Path, str]]:
    for number, volume in enumerate(guest.volumes):
        at = ("volumes", number)
        if volume.image.startswith("rbd:"):
            yield "rbd", (*at, "image"), f"volumes.image = {volume.image!r}"
        if volume.image_type != "raw":
            yield "imageType", (*at, "imageType"), f"volumes.imageType = {volume.image_type!r}"
        if volume.serial is not None:
            yield "serial", (*at, "serial"), f"volumes.serial = {volume.serial!r}"
        if volume.direct:
            yield "direct", (*at, "direct"), "volumes.direct = true"
