# SPDX-License-Identifier: MIT
"""A declaration, `/etc/microvms/NAME.toml`, read and checked.

A file goes in, a frozen value comes out, or DeclarationError says file, line, key and value. The
generator reads declarations at boot: this package imports nothing but the standard library,
`errors`, `frozen`, `names`, `source` and `users`.
"""

from __future__ import annotations

import os

from .. import names, users
from ..errors import DeclarationError, NameInvalid
from ..frozen import frozen
from ..source import Source
from . import checks, plain

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
        # Editors leave hidden files, which declare nothing.
        if file.endswith(".toml") and not file.startswith("."):
            try:
                yield load(f"{directory}/{file}")
            except DeclarationError as error:
                yield error


def load(path: str) -> Declaration:
    """Read one declaration.

    Raises:
        DeclarationError: it is not there or not right.
    """
    name = name_of(path)
    try:
        with open(path, "rb") as source:
            text = source.read().decode()
    except UnicodeDecodeError as error:
        raise DeclarationError("is not UTF-8 text", path=path) from error
    except FileNotFoundError as error:
        raise DeclarationError(
            f"microVM {name} is not declared: there is no such file", path=path
        ) from error
    except OSError as error:
        raise DeclarationError(f"cannot be read: {error.strerror}", path=path) from error
    table = _table(text, path)
    settings = _checked(table, text, path)
    for key in ("runner", "flake", "user", "allow_host_devices"):
        settings.pop(key, None)
    return Declaration(
        name=name,
        source=_source(table, text, path),
        user=_user(table, text, path),
        allow_host_devices=_addresses("allow_host_devices", table, text, path),
        **settings,
    )


def _table(text: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] | None = plain.table(text)
    if found is not None:
        return found
    # Not for the others: it takes longer to import than a hundred of them to read.
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Beside its own TOMLDecodeError: numbers of thousands of digits, and nesting without end.
        message, line = _syntax_error(str(error))
        raise DeclarationError(f"is not TOML: {message}", path=path, line=line) from error


def _syntax_error(message: str) -> tuple[str, int | None]:
    """Take apart what tomllib says: `Invalid value (at line 3, column 5)`."""
    text, _, place = message.rpartition(" (at line ")
    number = place.partition(",")[0]
    return (text, int(number)) if text and number.isdigit() else (message, None)


def _checked(table: dict[str, Any], text: str, path: str) -> dict[str, Any]:
    """The keys with what their values mean."""
    found = {}
    for key, value in table.items():
        if key not in _KEYS:
            import difflib

            near = difflib.get_close_matches(key, _KEYS, 1)
            raise DeclarationError(
                f"there is no key {key!r}",
                path=path,
                line=_line_of(key, text),
                hint=f"did you mean {near[0]}?" if near else f"known are {', '.join(_KEYS)}",
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
            raise DeclarationError(
                f"{key} = {value!r} {error}", path=path, line=_line_of(key, text)
            ) from error
    return found


def _source(table: dict[str, Any], text: str, path: str) -> Source:
    given = [key for key in ("runner", "flake") if key in table]
    if len(given) != 1:
        raise DeclarationError(
            "has both runner and flake" if given else "says not what to run",
            path=path,
            line=_line_of("flake", text) if given else None,
            hint='give one of runner = "/path/to/package" and flake = "…"',
        )
    try:
        return Source(given[0], table[given[0]]).checked()
    except NameInvalid as error:
        raise DeclarationError(
            error.message, path=path, line=_line_of(given[0], text), hint=error.hint
        ) from error


def _user(table: dict[str, Any], text: str, path: str) -> str | None:
    if "user" not in table:
        return None
    try:
        return users.checked(table["user"])
    except NameInvalid as error:
        raise DeclarationError(
            error.message, path=path, line=_line_of("user", text), hint=error.hint
        ) from error


def _addresses(key: str, table: dict[str, Any], text: str, path: str) -> tuple[str, ...]:
    """A list of PCI addresses, in full: what is allowed is not to be guessed by a glob."""
    found = []
    for value in table.get(key, []):
        line = _line_of(key, text)
        if not isinstance(value, str):
            raise DeclarationError(
                f"{key} has {value!r}, which is not a string", path=path, line=line
            )
        try:
            address = names.pci_address(value)
        except NameInvalid as error:
            raise DeclarationError(error.message, path=path, line=line, hint=error.hint) from error
        if "*" in address:
            raise DeclarationError(
                f"{key} has {value!r}, which may stand for several devices",
                path=path,
                line=line,
                hint="name each by its address",
            )
        found.append(address)
    return tuple(found)


def _line_of(key: str, text: str) -> int | None:
    """The line that sets a key, for messages; None where the key is written unusually."""
    for number, line in enumerate(text.split("\n"), 1):
        word = line.partition("=")[0].strip().strip("\"'")
        if word == key or line.strip().strip("[]").strip() == key:
            return number
    return None
