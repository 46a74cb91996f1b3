# SPDX-License-Identifier: MIT
"""A declaration, `/etc/microvms/NAME.toml`, read and checked.

A file goes in, with its drop-ins; a frozen value comes out, or DeclarationError says file, line,
key and value. What the guest itself is like is checked by `guest`, which the generator has no use
for: that one reads declarations at boot, and importing this package imports nothing but the
standard library, `errors`, `frozen`, `names`, `source` and `users`.
"""

from __future__ import annotations

import os

from .. import names, users
from ..errors import DeclarationError, NameInvalid
from ..frozen import frozen
from ..source import Source
from . import checks
from .document import Document, is_declaration

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any


# Each with its type, or with what checks its value.
_KEYS: dict[str, type | Callable[[object], object]] = {
    "runner": str,
    "flake": str,
    "autostart": bool,
    "restart_if_changed": bool,
    "user": str,
    "allow_host_devices": list,
    "order": checks.number(0, 1000000),
    "restart": checks.one_of("always", "on-failure", "never"),
    "restart_delay": checks.seconds,
    "restart_limit": checks.number(0, 1000000),
    "shutdown_timeout": checks.seconds,
    "ask_again_after": checks.seconds,
    "terminate_timeout": checks.seconds,
}
_TYPE_WORDS = {str: "a string", bool: "true or false", list: "a list"}
# The keys by which a declaration says the guest itself; `schema` knows the rest about them.
GUEST_KEYS = (
    *("hypervisor", "kernel", "initrd", "kernelParams", "vcpu", "mem", "balloon", "deflateOnOOM"),
    *("initialBalloonMem", "hotplugMem", "hotpluggedMem", "cpu", "volumes", "interfaces"),
    *("forwardPorts", "shares", "devices", "vsock", "readiness", "socket", "machineId"),
    *("registerWithMachined", "credentialFiles", "cloudInit", "qemu", "cloud-hypervisor", "crosvm"),
    "firecracker",
)


@frozen
class Declaration:
    """One declared VM. Times are in seconds; None is what the toolkit does by itself."""

    name: str
    source: Source
    autostart: bool = True
    restart_if_changed: bool = True
    # A user of the host, users.AUTO for one of its own, or None for the unit's.
    user: str | None = None
    # PCI devices that the VM may have though the host uses them, by their full addresses.
    allow_host_devices: tuple[str, ...] = ()
    order: int | None = None
    restart: str = "always"
    restart_delay: float | None = None
    restart_limit: int | None = None
    shutdown_timeout: float | None = None
    ask_again_after: float | None = None
    terminate_timeout: float | None = None
    # Absolute paths that the guest's disks and shares are at, for what they lie on to be mounted.
    storage: tuple[str, ...] = ()


def name_of(path: str) -> str:
    """The name of the VM that a file declares, which is the file's without `.toml`.

    Raises:
        DeclarationError: it cannot be the name of a VM.
    """
    try:
        return names.vm_name(os.path.basename(path).removesuffix(".toml"))
    except NameInvalid as error:
        raise DeclarationError(error.message, path=path, hint=error.hint) from error


def load_all(directory: str) -> Iterator[Declaration | DeclarationError]:
    """Read all declarations of a directory, by name; gives what is wrong in place of a wrong one.

    A directory that is not there holds none.
    """
    try:
        files = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    for file in files:
        if is_declaration(file):
            try:
                yield load(f"{directory}/{file}")
            except DeclarationError as error:
                yield error


def read(path: str) -> Document:
    """Read the text of a declaration and its drop-ins; raises DeclarationError."""
    name_of(path)
    return Document(path)


def load(path: str) -> Declaration:
    """Read one declaration.

    Raises:
        DeclarationError: it is not there or not right.
    """
    return of(read(path))


def of(document: Document) -> Declaration:
    """What a document says to the host; raises DeclarationError."""
    settings = _checked(document)
    for key in ("runner", "flake", "user", "allow_host_devices"):
        settings.pop(key, None)
    return Declaration(
        name=name_of(document.path),
        source=_source(document),
        user=_user(document),
        allow_host_devices=_addresses("allow_host_devices", document),
        storage=tuple(_storage(document)),
        **settings,
    )


def _storage(document: Document) -> Iterator[str]:
    # Whether they are what the schema asks for, is looked at when the package is built.
    for array, key in (("volumes", "image"), ("shares", "source")):
        entries = document.table.get(array)
        for entry in entries if isinstance(entries, list) else ():
            path = entry.get(key) if isinstance(entry, dict) else None
            if isinstance(path, str) and path.startswith("/") and path.isprintable():
                yield os.path.normpath(path)


def _checked(document: Document) -> dict[str, Any]:
    """The host's keys with what their values mean."""
    found = {}
    for key, value in document.table.items():
        if key in GUEST_KEYS:
            continue
        if key not in _KEYS:
            from .elsewhere import advice

            raise document.error(
                (key,), f"there is no key {key!r}", advice(key, (*_KEYS, *GUEST_KEYS))
            )
        check = _KEYS[key]
        try:
            if not isinstance(check, type):
                found[key] = check(value)
            elif type(value) is check:
                found[key] = value
            else:
                raise ValueError(f"is not {_TYPE_WORDS[check]}")
        except ValueError as error:
            raise document.error((key,), f"{key} = {value!r} {error}") from error
    return found


def _source(document: Document) -> Source:
    table = document.table
    given = [key for key in ("runner", "flake") if key in table]
    guest = [key for key in table if key in GUEST_KEYS]
    if not given and guest:
        # The files are read, and what they say of the guest is checked, when it is built.
        return Source("declaration", document.path)
    if len(given) != 1:
        raise document.error(
            ("flake",) if given else (),
            "has both runner and flake" if given else "says not what to run",
            'give one of runner = "/path/to/package", flake = "…", and kernel = "/path/to/kernel"',
        )
    if guest:
        raise document.error(
            (guest[0],),
            f"has both {given[0]} and {guest[0]}",
            f"what {given[0]} gives says already what the guest is like",
        )
    try:
        return Source(given[0], table[given[0]]).checked()
    except NameInvalid as error:
        raise document.error((given[0],), error.message, error.hint) from error


def _user(document: Document) -> str | None:
    if "user" not in document.table:
        return None
    try:
        return users.checked(document.table["user"])
    except NameInvalid as error:
        raise document.error(("user",), error.message, error.hint) from error


def _addresses(key: str, document: Document) -> tuple[str, ...]:
    """A list of PCI addresses, in full: what is allowed is not to be guessed by a glob."""
    found = []
    for number, value in enumerate(document.table.get(key, [])):
        at = (key, number)
        if not isinstance(value, str):
            raise document.error(at, f"{key} has {value!r}, which is not a string")
        try:
            address = names.pci_address(value)
        except NameInvalid as error:
            raise document.error(at, error.message, error.hint) from error
        if "*" in address:
            raise document.error(
                at,
                f"{key} has {value!r}, which may stand for several devices",
                "name each by its address",
            )
        found.append(address)
    return tuple(found)
