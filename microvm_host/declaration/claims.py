# SPDX-License-Identifier: MIT
"""What each declared VM wants to have for itself on this host: addresses and interfaces.

Two VMs with the same MAC address, CID or tap do not fail when they are declared, but some day, in a
way that nobody connects with it. So it is looked at before a package is made.
"""

from __future__ import annotations

import os

from .. import names
from ..errors import DeclarationError, NameInvalid
from . import derived, name_of
from .document import Document, is_declaration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

    # What is claimed, and which: ("MAC address", "02:00:00:00:00:01").
    Claim = tuple[str, str]
    # Who has it.
    Claims = dict[Claim, list[str]]

MAC, CID, INTERFACE = "MAC address", "vsock CID", "interface"


def of(name: str, table: dict[str, Any], host_id: str = "") -> Iterator[Claim]:
    """What one declaration claims, given or derived; what is wrong in it claims nothing."""
    if "vsock" in table:
        vsock = table["vsock"]
        given = vsock.get("cid") if isinstance(vsock, dict) else None
        yield CID, str(derived.cid(name) if given is None else given)
    interfaces = table.get("interfaces")
    for each in interfaces if isinstance(interfaces, list) else ():
        if not isinstance(each, dict) or not isinstance(each.get("id"), str):
            continue
        if each.get("type") == "user":
            # A network of its own, in which nobody else is.
            continue
        yield INTERFACE, each["id"]
        try:
            mac = each.get("mac") or derived.mac(name, each["id"], host_id)
            yield MAC, names.mac_address(mac)
        except (NameInvalid, AttributeError):
            continue


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
    """Who has it, other than the VM of that name; None if nobody."""
    return next((other for other in claims.get(claim, ()) if other != name), None)
