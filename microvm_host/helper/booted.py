# SPDX-License-Identifier: MIT
"""The record `booted`: what was found out once for the rest of a start, and for the stop."""

from __future__ import annotations

from .. import names
from ..errors import MicrovmHostError
from ..record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..identity import Identity
    from ..paths import HostPaths


def record(name: str, host: HostPaths) -> Record:
    """The record itself."""
    return Record(host.record(name, "booted"))


def noted(name: str, host: HostPaths, what: str) -> list[str]:
    """The fields that set-booted wrote down of one thing; none if it had nothing to tell."""
    for verb, *fields in record(name, host).read():
        if verb == what:
            return fields
    return []


def note_identity(noted: Record, identity: Identity) -> None:
    """Write down whom the VM runs as."""
    noted.append("user", identity.user, str(identity.uid), identity.group, str(identity.gid))
    if identity.groups:
        noted.append("groups", *map(str, identity.groups))


def identity(name: str, host: HostPaths) -> Identity:
    """Whom the VM runs as, asked of systemd once a start."""
    from ..identity import Identity

    lines = record(name, host).read()
    # A record of an older version has no line of further groups.
    fields, groups = (
        next((found for verb, *found in lines if verb == wanted), [])
        for wanted in ("user", "groups")
    )
    if not fields:
        raise MicrovmHostError(
            f"microvm-set-booted@{name} has not run", path=record(name, host).path
        )
    match fields:
        case [user, uid, group, gid] if all(map(names.is_number, (uid, gid, *groups))):
            return Identity(user, int(uid), group, int(gid), tuple(map(int, groups)))
    raise record(name, host).strange(["user", *fields])
