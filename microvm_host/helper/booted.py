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


def identity(name: str, host: HostPaths) -> Identity:
    """Whom the VM runs as, asked of systemd once a start."""
    from ..identity import Identity

    fields = noted(name, host, "user")
    if not fields:
        raise MicrovmHostError(
            f"microvm-set-booted@{name} has not run", path=record(name, host).path
        )
    match fields:
        case [user, uid, group, gid] if names.is_number(uid) and names.is_number(gid):
            return Identity(user, int(uid), group, int(gid))
    raise record(name, host).strange(["user", *fields])
