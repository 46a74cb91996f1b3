# SPDX-License-Identifier: MIT
"""What a package makes in the VM's state directory by itself, and that nothing else is put there.

QEMU deletes what is where it is to listen, and what makes an image deletes what is left of an
earlier try: a volume of the same name would be lost.
"""

from __future__ import annotations

from os.path import normpath

from ..frozen import frozen
from ..paths import HostPaths
from ..source import DECLARED, KINDS
from . import seed, volumes
from .facts import OWN_NOTIFY_SOCKET, OWN_VSOCK
from .refused import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..declaration.guest import Guest
    from ..declaration.locate import Path

# The host's: links to packages, and where they come from.
_HOST = ("current", "booted", DECLARED, *KINDS)
# Those that take a control socket of a declaration's.
_CONTROLLED = ("qemu", "cloud-hypervisor", "firecracker", "crosvm", "stratovirt")


def control(guest: Guest) -> str:
    """The hypervisor's control socket for the host alone."""
    return f"{guest.name}-control.sock"


def console(guest: Guest) -> str:
    """The guest's serial console."""
    return f"{guest.name}-console.sock"


def console_log(guest: Guest) -> str:
    """Carries the console to the journal."""
    return f"{guest.name}-console.fifo"


def agent(guest: Guest) -> str:
    """The port of QEMU's guest agent."""
    return f"{guest.name}-agent.sock"


def event_log(guest: Guest) -> str:
    """Where QEMU writes what happens to the guest."""
    return f"{guest.name}-events.log"


def sandbox(guest: Guest) -> str:
    """The directory that is the root of crosvm's devices."""
    return f"{guest.name}-root"


def taken(guest: Guest) -> str:
    """How much kvmtool's balloon took."""
    return f"{guest.name}-balloon"


@frozen
class _Place:
    """A path, whose it is, and the key and the value that give it; none for what is there anyway.

    `is_roots` is for sockets of shares, whose directories root makes.
    """

    path: str
    whose: str
    at: Path = ()
    value: str = ""
    is_roots: bool = False


def check(guest: Guest) -> None:
    """Refuse a declaration that puts two things at one place.

    Raises:
        Refused
    """
    places: list[_Place] = []
    for place in _places(guest):
        for other in places:
            if place.at and place.at != other.at and (hint := _in_the_way(place, other)):
                key = ".".join(part for part in place.at if isinstance(part, str))
                raise Refused(
                    place.at,
                    f"{key} = {place.value!r}: {other.whose}, {other.path!r}, is in its way",
                    hint,
                )
        places.append(place)


def _in_the_way(one: _Place, other: _Place) -> str:
    """What to do about it where two cannot be there; empty where they can."""
    # Neither is a directory that the other could be in.
    if f"{one.path}/".startswith(f"{other.path}/") or f"{other.path}/".startswith(f"{one.path}/"):
        return "give another name"
    if one.is_roots != other.is_roots and not _directory(one).isdisjoint(_directory(other)):
        return "root makes the directories of shares' sockets, for these alone: give another one"
    return ""


def _directory(place: _Place) -> set[str]:
    """The directory right below the state directory that a path is in, if it is in one."""
    first, slash, _ = place.path.partition("/")
    return {first} if slash and first else set()


def _places(guest: Guest) -> Iterator[_Place]:
    """All of them; those that a declaration names come after those that it does not."""
    for name in _HOST:
        yield _Place(name, "the host's own")
    for path, whose in _own(guest):
        yield _Place(path, whose)
    if guest.socket is not None and guest.hypervisor in _CONTROLLED:
        path = _inner(guest, guest.socket)
        yield _Place(path, "the control socket", ("socket",), guest.socket)
    for number, share in enumerate(guest.shares):
        if share.socket is not None:
            path, whose = _inner(guest, share.socket), f"the socket of share {share.tag!r}"
            yield _Place(path, whose, ("shares", number, "socket"), share.socket, is_roots=True)
    for number, volume in enumerate(guest.volumes):
        if volume.is_file:
            path, at = _inner(guest, volume.image), ("volumes", number, "image")
            yield _Place(path, "another volume", at, volume.image)
            for ending in volumes.TEMPORARY if volume.auto_create else ():
                yield _Place(f"{path}{ending}", "by which another volume is made", at, volume.image)


def _own(guest: Guest) -> Iterator[tuple[str, str]]:
    """What is there whatever a declaration says; also what other versions would have there."""
    match guest.hypervisor:
        case "qemu":
            yield control(guest), "QEMU's socket for the host"
            yield console(guest), "the console"
            yield console_log(guest), "the console's log"
            yield agent(guest), "the guest agent"
            yield event_log(guest), "QEMU's event log"
        case "cloud-hypervisor" | "firecracker":
            if guest.socket is None:
                yield control(guest), "the control socket"
            yield OWN_VSOCK, "the vsock"
            yield f"{OWN_VSOCK}_{OWN_NOTIFY_SOCKET.rpartition(':')[2]}", "the vsock"
        case "crosvm":
            yield sandbox(guest), "crosvm's sandbox"
        case "kvmtool":
            yield taken(guest), "kvmtool's balloon"
            yield ".lkvm", "kvmtool's sockets"
    if guest.cloud_init is not None:
        yield seed.IMAGE, "cloudInit's own disk"


def _inner(guest: Guest, path: str) -> str:
    """A path relative to the state directory, if it is in there."""
    return normpath(path).removeprefix(f"{HostPaths().vm(guest.name)}/")
