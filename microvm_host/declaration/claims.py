# SPDX-License-Identifier: MIT
"""What each declared VM wants to have for itself on this host: addresses, interfaces, disks, ports.

Two VMs with the same MAC address or disk do not fail when they are declared, but some day, in a way
that nobody connects with it. So it is looked at before a package is made.

A disk is claimed by what its path leads to: links and hard links, a partition and the disk that it
is on, a loop device and its file are one thing. Who only reads a disk may share it with others who
do.
"""

from __future__ import annotations

import os
import stat

from .. import names
from ..errors import DeclarationError, NameInvalid
from ..frozen import frozen
from ..paths import HostPaths
from ..sysfs import attribute, entries
from . import derived, name_of
from .document import Document, is_declaration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    from .locate import Path

    # What is claimed, and which: ("MAC address", "02:00:00:00:00:01").
    Claim = tuple[str, str]
    # Who has it.
    Claims = dict[Claim, list[str]]

MAC, CID, INTERFACE = "MAC address", "vsock CID", "interface"
IMAGE, PORT, SOCKET = "image", "port of the host", "socket"
# An image that is only read.
IMAGE_READ = "image, to be read"
_ANY_ADDRESS = ("", "0.0.0.0", "::")
_BLOCK = "block device "


@frozen
class Wish:
    """One claim of a declaration: `at` is the key that asks for it, and `text` what stands there.

    One key may claim a thing by several names, of which each is as good as the others.
    """

    claim: Claim
    at: Path
    text: str

    @property
    def what(self) -> str:
        return IMAGE if self.claim[0] == IMAGE_READ else self.claim[0]


def of(
    name: str, table: dict[str, Any], host_id: str = "", host: HostPaths | None = None
) -> Iterator[Claim]:
    """What one declaration claims, given or derived; what is wrong in it claims nothing."""
    return (wish.claim for wish in wishes(name, table, host_id, host))


def wishes(
    name: str, table: dict[str, Any], host_id: str = "", host: HostPaths | None = None
) -> Iterator[Wish]:
    """The same, with the keys that ask for it."""
    host = host or HostPaths.from_environment()
    if "vsock" in table:
        vsock = table["vsock"]
        given = vsock.get("cid") if isinstance(vsock, dict) else None
        cid = str(derived.cid(name) if given is None else given)
        yield Wish((CID, cid), ("vsock", "cid"), cid)
    for number, each in _tables(table, "interfaces"):
        if not isinstance(each.get("id"), str) or each.get("type") == "user":
            # The latter has a network of its own, in which nobody else is.
            continue
        at = ("interfaces", number)
        yield Wish((INTERFACE, each["id"]), (*at, "id"), each["id"])
        try:
            mac = names.mac_address(each.get("mac") or derived.mac(name, each["id"], host_id))
        except (NameInvalid, AttributeError):
            continue
        yield Wish((MAC, mac), (*at, "mac"), mac)
    for number, each in _tables(table, "volumes"):
        if isinstance(image := each.get("image"), str):
            for claim in image_claims(image, host.vm(name), host, shared=each.get("readOnly")):
                yield Wish(claim, ("volumes", number, "image"), image)
    for number, each in _tables(table, "forwardPorts"):
        end = each.get("host")
        if each.get("from", "host") == "host" and isinstance(end, dict):
            where = f"{end.get('address') or '0.0.0.0'}:{end.get('port')}"
            which = f"{each.get('proto', 'tcp')} {where}"
            yield Wish((PORT, which), ("forwardPorts", number, "host", "port"), which)
    if isinstance(socket := table.get("socket"), str) and socket:
        yield Wish(socket_claim(socket, host.vm(name)), ("socket",), socket)
    for number, each in _tables(table, "shares"):
        if isinstance(socket := each.get("socket"), str) and socket:
            claim = socket_claim(socket, host.vm(name))
            yield Wish(claim, ("shares", number, "socket"), socket)


def _tables(table: dict[str, Any], key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The tables of an array that are some, with their numbers."""
    array = table.get(key)
    for number, each in enumerate(array if isinstance(array, list) else ()):
        if isinstance(each, dict):
            yield number, each


def socket_claim(path: str, directory: str) -> Claim:
    """The claim of a socket, whose path may be relative to the state directory."""
    return SOCKET, os.path.realpath(os.path.join(directory, path))


def image_claims(
    image: str, directory: str, host: HostPaths, *, shared: object = False
) -> Iterator[Claim]:
    """The claims of a disk, by all that tells it from others.

    Args:
        image: its path, which may be relative to the state directory `directory`.
        shared: it is only read.
    """
    kind = IMAGE_READ if shared is True else IMAGE
    if image.startswith("rbd:"):
        yield kind, image
        return
    path = os.path.realpath(os.path.join(directory, image))
    yield kind, path
    try:
        # A name in a directory, for a file that is yet to be made, and for bind mounts.
        parent = os.stat(os.path.dirname(path))
        yield kind, f"{parent.st_dev}:{parent.st_ino}/{os.path.basename(path)}"
        status = os.stat(path)
    except OSError:
        return
    for each in sorted(_overlapping(_storage(status), host)):
        yield kind, each


def _storage(status: os.stat_result) -> str:
    """A name for a file or a block device, which does not depend on its path."""
    if stat.S_ISBLK(status.st_mode):
        return f"{_BLOCK}{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    return f"{status.st_dev}:{status.st_ino}"


def _overlapping(storage: str, host: HostPaths) -> set[str]:
    """All that has the same contents, or a part of them.

    A block device has partitions, and LVM, dm-crypt or md use it or these. A loop device has the
    contents of its file, which may be a block device.
    """
    found: set[str] = set()
    ahead = [storage]
    loops = _loop_devices(host)
    while ahead:
        each = ahead.pop()
        if each in found:
            continue
        found.add(each)
        ahead += [loop for loop, file in loops.items() if file == each]
        if each in loops:
            ahead.append(loops[each])
        if not each.startswith(_BLOCK):
            continue
        directory = host.block_number(each.removeprefix(_BLOCK))
        inner = [f"{directory}/{name}" for name in entries(directory)]
        inner = [path for path in inner if os.path.exists(f"{path}/partition")]
        inner += [host.block_device(name) for name in entries(f"{directory}/holders")]
        ahead += [f"{_BLOCK}{dev}" for path in inner if (dev := attribute(path, "dev"))]
    return found


def _loop_devices(host: HostPaths) -> dict[str, str]:
    """The loop devices in use, each with its file."""
    found = {}
    for name in entries(host.block_devices):
        if not name.startswith("loop"):
            continue
        directory = host.block_device(name)
        file, number = attribute(f"{directory}/loop", "backing_file"), attribute(directory, "dev")
        try:
            found[f"{_BLOCK}{number}"] = _storage(os.stat(file or ""))
        except OSError:
            # Not in use, or its file is deleted.
            continue
    return found


def tables(directory: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The declarations of a directory, by their names; those that cannot be read are left out."""
    try:
        files = sorted(os.listdir(directory))
    except OSError:
        return
    for file in filter(is_declaration, files):
        path = f"{directory}/{file}"
        try:
            yield name_of(path), Document(path).table
        except DeclarationError:
            # It is told to whoever installs that one.
            continue


def gather(directory: str) -> Claims:
    """What all declarations of a directory claim."""
    found: Claims = {}
    for name, table in tables(directory):
        for claim in of(name, table):
            found.setdefault(claim, []).append(name)
    return found


def holder(claims: Claims, claim: Claim, name: str) -> str | None:
    """Who has what a claim is about, other than the VM of that name; None if nobody."""
    kind, which = claim
    if kind == PORT:
        rivals = [other for other in claims if other[0] == PORT and _is_same_port(other[1], which)]
    elif kind in (IMAGE, IMAGE_READ):
        rivals = [(IMAGE, which), *([(IMAGE_READ, which)] if kind == IMAGE else [])]
    else:
        rivals = [claim]
    holders = (holder for rival in rivals for holder in claims.get(rival, ()))
    return next((other for other in holders if other != name), None)


def _is_same_port(one: str, other: str) -> bool:
    """Whether both would listen at the same place: an address of none in particular has all."""
    if one == other:
        return True
    (proto, where), (other_proto, other_where) = one.split(" ", 1), other.split(" ", 1)
    address, _, port = where.rpartition(":")
    other_address, _, other_port = other_where.rpartition(":")
    is_any = address in _ANY_ADDRESS or other_address in _ANY_ADDRESS
    return is_any and (proto, port) == (other_proto, other_port)
