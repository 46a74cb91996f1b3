# SPDX-License-Identifier: MIT
"""What the host itself uses: disks, the way out, the display. For PCI devices' sake.

Taking such a device away stops the host or cuts it off. Each reason is a line for people, in
which the device is `it`.
"""

from __future__ import annotations

import os
from errno import EBUSY

from .sysfs import attribute, entries

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .paths import HostPaths
    from .pcibus import Device

_DISPLAY = 0x03
_NAMED_USES = 3
_RTF_UP, _RTF_REJECT = 0x1, 0x200  # linux/route.h


def reasons(device: Device, host: HostPaths) -> list[str]:
    """Why the host needs a device, a line each; none if it can do without."""
    found = [*_disks(device, host), *_interfaces(device, host), *_displays(device)]
    # Not by sriov_numvfs, for which some kernels wait until a driver has let go of the device.
    functions = sum(entry.startswith("virtfn") for entry in entries(device.directory))
    if functions:
        found.append(f"its {functions} virtual functions would vanish")
    return found


def interfaces(device: Device, host: HostPaths) -> list[str]:
    """The network interfaces that a device drives."""
    return [
        name
        for name in entries(host.net_device(""))
        if _is_below(os.path.realpath(host.net_device(name)), device.directory)
    ]


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(f"{directory}/")


# ---- disks


def _disks(device: Device, host: HostPaths) -> Iterator[str]:
    mine = [
        name
        for name in entries(host.block_device(""))
        if any(_is_below(place, device.directory) for place in _places(name, host))
    ]
    if not mine:
        return
    uses: dict[str, list[str]] = {}
    bound: dict[str, str] = {}
    for use, name, is_whole in _uses(host):
        for disk in mine:
            if disk in _below(name, host):
                if is_whole:
                    uses.setdefault(disk, []).append(use)
                else:
                    bound.setdefault(disk, use)
                break
    for disk in mine:
        above = entries(f"{host.block_device(disk)}/holders")
        if disk not in uses and above:
            uses[disk] = above
    for disk, held in uses.items():
        more = f" and {len(held) - _NAMED_USES} more" if len(held) > _NAMED_USES else ""
        yield f"its disk {disk} holds {', '.join(held[:_NAMED_USES])}{more}"
    for disk, place in bound.items():
        # The whole of it is mounted elsewhere: a container has files of the machine outside.
        if disk not in uses:
            yield f"its disk {disk} is mounted outside: {place} is a part of it"
    if not uses and not bound:
        for disk in mine:
            if _is_claimed(host.block_node(disk)):
                yield f"its disk {disk} is in use by the kernel"


def _places(name: str, host: HostPaths) -> list[str]:
    """Where a disk is in sysfs. An NVMe disk with several ways to it is below none of them."""
    place = os.path.realpath(host.block_device(name))
    head, subsystem, rest = place.partition("/nvme-subsystem/")
    if not subsystem:
        return [place]
    directory = f"{head}{subsystem}{rest.partition('/')[0]}"
    return [
        f"{os.path.realpath(f'{directory}/{entry}')}/{name}"
        for entry in entries(directory)
        if os.path.islink(f"{directory}/{entry}") and entry.startswith("nvme")
    ]


def _uses(host: HostPaths) -> Iterator[tuple[str, str, bool]]:
    """What is mounted or swapped to: the use, the name of the block device, and if it is whole.

    A bind mount of a directory or file is a part of a file system.
    """
    numbers = {
        attribute(host.block_device(name), "dev"): name for name in entries(host.block_device(""))
    }
    seen = set()
    for line in _lines(host.mounts):
        # proc_pid_mountinfo(5): … major:minor root mountpoint … - type source options
        # The root file system of a container or of OSTree is a bind mount as well.
        fields, _, rest = line.partition(" - ")
        columns, source = fields.split(" "), rest.split(" ")
        if len(columns) < 5 or len(source) < 2:
            continue
        # File systems over several disks have a number that is no disk's: btrfs. They name one.
        # Their subvolumes are mounted by their paths, like bind mounts.
        numbered = numbers.get(columns[2])
        name = numbered or _named(source[1], numbers, host)
        is_whole = numbered is None or "/" in (columns[3], columns[4])
        if name and (name, columns[4]) not in seen:
            seen.add((name, columns[4]))
            yield _unescaped(columns[4]), name, is_whole
    for line in _lines(host.swaps)[1:]:
        name = _named(line.split(" ", 1)[0], numbers, host)
        if name:
            yield "swap space", name, True


def _unescaped(mount_point: str) -> str:
    """A mount point as it is called: mountinfo writes space, tab, `\\` and line breaks in octal.

    Whoever may mount chose the name, and it must not command a terminal.
    """
    for code in ("040", "011", "012", "134"):
        mount_point = mount_point.replace(f"\\{code}", chr(int(code, 8)))
    return mount_point if mount_point.isprintable() else repr(mount_point)


def _named(path: str, numbers: dict[str | None, str], host: HostPaths) -> str | None:
    if not path.startswith("/"):
        return None
    try:
        number = os.stat(host.at(path)).st_rdev
    except (OSError, ValueError):
        # The latter for a NUL byte.
        return None
    return numbers.get(f"{os.major(number)}:{os.minor(number)}")


def _below(name: str, host: HostPaths) -> set[str]:
    """A block device and those that it stands on: md, LVM, dm-crypt."""
    found, ahead = {name}, [name]
    while ahead:
        for below in entries(f"{host.block_device(ahead.pop())}/slaves"):
            if below not in found:
                found.add(below)
                ahead.append(below)
    return found


def _is_claimed(node: str) -> bool:
    """Whether the kernel has claimed a disk, as for a pool of ZFS, of which sysfs is silent.

    open(2): O_EXCL on a block device in use fails with EBUSY, and does nothing else.
    """
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == EBUSY
    return False


# ---- the way out


def _interfaces(device: Device, host: HostPaths) -> Iterator[str]:
    mine = interfaces(device, host)
    if not mine:
        return
    told = set()
    for way_out in sorted(_default_routes(host)):
        for name in mine:
            if name in _lower(way_out, host):
                told.add(name)
                through = "" if name == way_out else f" through {way_out}"
                yield f"its interface {name} has the default route{through}"
    for name in mine:
        above = [
            entry.removeprefix("upper_")
            for entry in entries(host.net_device(name))
            if entry.startswith("upper_")
        ]
        if above and name not in told:
            yield f"its interface {name} carries {', '.join(above)}"


def _default_routes(host: HostPaths) -> set[str]:
    """The interfaces that have a default route, of IPv4 or IPv6 (proc_pid_net(5))."""
    found = set()
    for line in _lines(host.ipv4_routes)[1:]:
        columns = line.split()
        # Iface Destination Gateway Flags RefCnt Use Metric Mask
        is_default = len(columns) > 7 and columns[1] == columns[7] == "00000000"
        if is_default and int(columns[3], 16) & _RTF_UP:
            found.add(columns[0])
    for line in _lines(host.ipv6_routes):
        columns = line.split()
        # destination length source length next metric references use flags interface
        is_default = len(columns) == 10 and set(columns[0]) == {"0"} and columns[1] == "00"
        if is_default and int(columns[8], 16) & (_RTF_UP | _RTF_REJECT) == _RTF_UP:
            found.add(columns[9])
    return found - {"lo"}


def _lower(name: str, host: HostPaths) -> set[str]:
    """An interface and those that it stands on: ports of a bridge, of a bond, below a VLAN."""
    found, ahead = {name}, [name]
    while ahead:
        for entry in entries(host.net_device(ahead.pop())):
            below = entry.removeprefix("lower_")
            if below != entry and below not in found:
                found.add(below)
                ahead.append(below)
    return found


# ---- the display


def _displays(device: Device) -> Iterator[str]:
    if device.class_code >> 16 != _DISPLAY:
        return
    if attribute(device.directory, "boot_vga") == "1":
        yield "it is the display that the host booted with"
        return
    for card in entries(f"{device.directory}/drm"):
        for connector in entries(f"{device.directory}/drm/{card}"):
            if attribute(f"{device.directory}/drm/{card}/{connector}", "enabled") == "enabled":
                yield f"it shows a picture on {connector}"
                return


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as source:
            return source.read().splitlines()
    except OSError:
        return []
