# SPDX-License-Identifier: MIT
"""What the toolkit asks of systemd: states, jobs and transient units.

The only module that imports pystemd, by which the helpers make units, on systemd's own socket for
root; what anybody may ask goes through `systemctl`. Of a VM's own service, `service` asks.
"""

from __future__ import annotations

import sys
import time

from . import process
from .errors import MicrovmHostError
from .interpreter import add_distribution_packages

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    # A property's name -> its D-Bus signature and value, as org.freedesktop.systemd1(5) lists
    # them.
    Properties = Mapping[str, tuple[str, Any]]

_DESTINATION = b"org.freedesktop.systemd1"
_PATH = b"/org/freedesktop/systemd1"
_MANAGER = b"org.freedesktop.systemd1.Manager"
_UNIT = b"org.freedesktop.systemd1.Unit"
# systemd keeps a stopped transient unit until the unit of its OnSuccess= or OnFailure= has started.
_FORGETS_WITHIN = 30.0  # seconds


def show(unit: str, *properties: str) -> dict[str, str]:
    """Properties of a unit as `systemctl show` prints them; raises MicrovmHostError."""
    text = process.output(["systemctl", "show", f"--property={','.join(properties)}", "--", unit])
    return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)


def show_all(properties: tuple[str, ...], *patterns: str) -> dict[str, dict[str, str]]:
    """Properties of the loaded units of these names or globs; raises MicrovmHostError.

    Times are `@` and seconds since 1970.
    """
    text = process.output(
        ["systemctl", "show", "--timestamp=unix", f"--property={','.join(('Id', *properties))}"]
        + ["--", *map(_as_glob, patterns)]
    )
    found = {}
    for block in text.split("\n\n"):
        facts = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        if facts:
            found[facts.pop("Id", "")] = facts
    return found


def states(*patterns: str) -> dict[str, str]:
    """The loaded units of these names or globs, with their active state (`active`, `failed`, …).

    No patterns match no units, where systemctl would list all that the host has.
    """
    if not patterns:
        return {}
    text = process.output(
        ["systemctl", "list-units", "--all", "--plain", "--full", "--no-legend", "--no-pager"]
        + ["--", *map(_as_glob, patterns)]
    )
    found = {}
    for line in text.splitlines():
        columns = line.split()
        if len(columns) >= 4:
            found[columns[0]] = columns[2]
    return found


def jobs(*patterns: str) -> set[str]:
    """The units of these names or globs that wait for something to happen to them, or see it."""
    text = process.output(
        ["systemctl", "list-jobs", "--plain", "--full", "--no-legend", "--no-pager"]
        + ["--", *map(_as_glob, patterns)]
    )
    # JOB UNIT TYPE STATE; without any job, some versions say so in words.
    columns = [line.split() for line in text.splitlines()]
    return {words[1] for words in columns if len(words) == 4 and words[0].isdigit()}


def _as_glob(pattern: str) -> str:
    # What a backslash of an escaped name means differs: systemctl takes it for itself in a name,
    # and for a glob's in a glob and where it looks for jobs.
    return pattern.replace("\\", "?")


def stop(units: Sequence[str]) -> None:
    """Stop units and wait until they have; those that systemd does not have count as stopped.

    Raises:
        MicrovmHostError: one of them runs on.
    """
    found = _running(units)
    if not found:
        return
    try:
        process.output(["systemctl", "stop", "--", *found])
    except MicrovmHostError:
        # A transient unit that ended meanwhile is gone, which systemctl takes for a failure.
        found = _running(found)
        if found:
            raise


def reload() -> None:
    """Have systemd read its units anew, and the generator run; raises MicrovmHostError."""
    process.output(["systemctl", "daemon-reload"])


def _running(units: Sequence[str]) -> list[str]:
    found = states(*units)
    # Only what was asked for: the next thing that happens to these is that they are stopped.
    return [unit for unit in units if found.get(unit, "inactive") not in ("inactive", "failed")]


class Connection:
    """A connection to systemd, for root.

    Raises:
        MicrovmHostError: pystemd is not installed, or systemd cannot be reached.
    """

    def __init__(self, private_socket: str) -> None:
        add_distribution_packages()
        try:
            DBusAddress, self._apply_signature = _import_pystemd()
        except ImportError as error:
            raise MicrovmHostError(
                f"cannot import pystemd: {error}", hint="install python3-pystemd"
            ) from error
        # Not the bus: systemd's own socket is there without a D-Bus daemon too.
        self._bus = DBusAddress(f"unix:path={private_socket}".encode(), peer_to_peer=True)
        try:
            self._bus.open()
        except Exception as error:
            raise MicrovmHostError(f"cannot reach systemd: {error}", path=private_socket) from error

    def close(self) -> None:
        """To be called once: pystemd aborts the process at a second call."""
        self._bus.close()

    def start_transient(
        self, unit: str, properties: Properties, auxiliary: Mapping[str, Properties] | None = None
    ) -> None:
        """Start a transient unit and wait until it is up.

        A former unit of one of the names may have stopped without systemd having forgotten it:
        the new one waits for that.

        Args:
            unit: its name.
            auxiliary: further units to create, not to start, by name.

        Raises:
            MicrovmHostError: systemd refuses the unit, or it did not come up.
        """
        arguments = self._apply_signature(b"ss", [unit.encode(), b"fail"])
        arguments += self._marshal_properties(properties)
        arguments.append((ord("a"), b"(sa(sv))"))
        for name, its_properties in (auxiliary or {}).items():
            arguments.append((ord("r"), b"sa(sv)"))
            arguments += self._apply_signature(b"s", [name.encode()])
            arguments += self._marshal_properties(its_properties)
            arguments.append((-1, None))
        arguments.append((-1, None))
        self._wait_for_job(self._create([unit, *(auxiliary or {})], arguments))
        state = self.active_state(unit)
        if state != "active":
            raise MicrovmHostError(
                f"{unit} did not start: it is {state}",
                hint=f"`systemctl status '{unit}'` or `journalctl -u '{unit}'` says more",
            )

    def _create(self, units: Sequence[str], arguments: Any) -> Any:
        """Call StartTransientUnit for units of these names; gives the job's object."""
        deadline = time.monotonic() + _FORGETS_WITHIN
        while True:
            try:
                return self._bus.call_method(
                    _DESTINATION, _PATH, _MANAGER, b"StartTransientUnit", arguments
                ).body
            except Exception as error:
                refused = MicrovmHostError(f"systemd refuses {units[0]}: {_message(error)}")
                if not _is_known_already(error):
                    raise refused from error
            for unit in units:
                state = self.active_state(unit)
                if state not in ("inactive", "failed", "deactivating"):
                    refused.hint = f"it is {state}; stop it: systemctl stop '{unit}'"
                    raise refused
            if time.monotonic() > deadline:
                raise refused
            # The listing, which never comes here, loads this module too.
            from . import log

            log.waiting(f"Waiting for systemd to forget the former {units[0]}")
            time.sleep(0.05)

    def active_state(self, unit: str) -> str:
        """`active`, `failed`, …; `inactive` for a unit that systemd no longer has."""
        try:
            path = self._bus.call_method(
                _DESTINATION,
                _PATH,
                _MANAGER,
                b"GetUnit",
                self._apply_signature(b"s", [unit.encode()]),
            ).body
            state = self._bus.get_property(_DESTINATION, path, _UNIT, b"ActiveState", b"s")
        except Exception as error:
            if _is_gone(error):
                return "inactive"
            raise MicrovmHostError(f"systemd does not tell of {unit}: {error}") from error
        return str(state.decode())

    def _marshal_properties(self, properties: Properties) -> list[tuple[int, Any]]:
        # By hand, since pystemd's own table of signatures lacks some properties.
        marshalled: list[tuple[int, Any]] = [(ord("a"), b"(sv)")]
        for name, (signature, value) in properties.items():
            encoded = signature.encode()
            marshalled.append((ord("r"), b"sv"))
            marshalled += self._apply_signature(b"s", [name.encode()])
            marshalled.append((ord("v"), encoded))
            marshalled += self._apply_signature(encoded, [value])
            marshalled += [(-1, None), (-1, None)]
        marshalled.append((-1, None))
        return marshalled

    def _wait_for_job(self, job: bytes) -> None:
        # A job's object goes away with the job. Asking for it costs 0.1 ms and, unlike waiting
        # for the signal, cannot miss one. Most units here are sockets: up within 10 ms.
        rounds = 0
        while True:
            try:
                self._bus.get_property(
                    _DESTINATION, job, b"org.freedesktop.systemd1.Job", b"Id", b"u"
                )
            except Exception as error:
                if _is_gone(error):
                    return
                raise MicrovmHostError(f"systemd does not tell of its job: {error}") from error
            rounds += 1
            time.sleep(0.001 if rounds < 50 else 0.02)


def _import_pystemd() -> tuple[Any, Any]:
    """pystemd's binding of sd-bus: DBusAddress and apply_signature.

    The binding is one extension module, loaded in 2 ms. What is imported around it takes 30: the
    package's __init__, which wants lxml, and two modules of which the binding uses a function
    each, one of them only to word an error. While it is loaded, stand-ins take their places, and
    that of `collections`.

    Raises:
        ImportError: it is not installed, or not of a kind that can be loaded so.
    """
    # importlib.machinery has it too, for a millisecond.
    from _frozen_importlib_external import PathFinder

    found = PathFinder.find_spec("pystemd")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("there is no package pystemd")
    package, utils, pprint = (type(sys)(name) for name in ("pystemd", "pystemd.utils", "pprint"))
    package.__path__ = list(found.submodule_search_locations)
    vars(utils)["x2char_star"] = _encoded
    vars(pprint)["pformat"] = repr
    stand_ins: dict[str, Any] = {
        **{module.__name__: module for module in (package, utils, pprint)},
        **_stand_ins_for_abstract_classes(),
    }
    displaced = {name: sys.modules.get(name) for name in stand_ins}
    sys.modules.update(stand_ins)
    try:
        from pystemd.dbuslib import DBusAddress, apply_signature
    finally:
        for name, module in displaced.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    return DBusAddress, apply_signature


def _stand_ins_for_abstract_classes() -> dict[str, Any]:
    """Stand-ins for where Cython looks for the abstract classes of coroutines, to add its own.

    They are in a module that `os` has loaded already; `collections` gives it another name, and
    takes 2 ms to do so.
    """
    if "collections" in sys.modules:
        return {}
    collections, abstract = type(sys)("collections"), sys.modules["_collections_abc"]
    vars(collections)["abc"] = abstract
    # None is for "not there": it is a package of Python 2, looked for in all directories.
    return {"collections": collections, "collections.abc": abstract, "backports_abc": None}


def _encoded(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _message(error: Exception) -> str:
    text = getattr(error, "err_message", None) or str(error)
    return text.decode(errors="replace") if isinstance(text, bytes) else str(text)


def _is_known_already(error: Exception) -> bool:
    """Whether a D-Bus error says that systemd has a unit of this name (UnitExists)."""
    from errno import EEXIST

    return bool(abs(getattr(error, "errno", 0) or 0) == EEXIST)


def _is_gone(error: Exception) -> bool:
    """Whether a D-Bus error says that an object no longer exists.

    pystemd has an exception of its own for some error names and a general one for the rest, so
    that neither class nor name can be relied upon; the errno can: sd-bus maps both
    UnknownObject and NoSuchUnit (sd-bus-errors(3)).
    """
    from errno import EBADR, ENOENT

    return abs(getattr(error, "errno", 0) or 0) in (EBADR, ENOENT)
