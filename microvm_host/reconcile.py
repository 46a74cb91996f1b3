# SPDX-License-Identifier: MIT
"""Finds what VMs left behind, and undoes it: behind `microvm reconcile`.

Whatever ends a VM undoes what was set up for it. What stays nevertheless, since a helper was
killed, the power failed or somebody deleted a directory, is found here: by its record below
/run/microvm-host, by the name of a unit, by a link of ours. It is undone by the same functions
that a stop uses. What is not known by one of these to be the toolkit's is not looked at.

A VM that runs, starts or stops owns all that bears its name. While something is undone, a unit
holds back further starts (`_holding_back`), and what was found is looked for again after that, so
that no start can come between looking and undoing.
"""

from __future__ import annotations

import fcntl
import os
import stat
import time
from contextlib import contextmanager

from . import handover, links, names, pci, pci_lock, process, shares, source, systemd
from .errors import MicrovmHostError
from .frozen import frozen
from .record import Record, remove_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from typing import Protocol

    from .paths import HostPaths

    class Leftover(Protocol):
        """Something that a VM left."""

        @property
        def vm(self) -> str: ...

        @property
        def what(self) -> str:
            """What it is: a unit, or a path."""

        @property
        def kind(self) -> str:
            """Of which sort, in one word for programs."""

        @property
        def is_kept(self) -> bool:
            """Whether it is only told of: it may be of worth to somebody."""

        def describe(self) -> str:
            """What it is, for people: `unit x.socket is active`."""

        def undo(self, host: HostPaths) -> list[str]:
            """Undo it; gives what could not be undone, a line each. Raises MicrovmHostError."""


RUNNING = ("active", "activating", "deactivating", "reloading", "refreshing", "maintenance")
_GATE = "microvm-reconcile.service"
_GATE_CLOSES_WITHIN = 10.0  # seconds
# A directory without a package may be that of a VM whose flake is being built.
_BUILT_WITHIN = 86400.0  # seconds


def _undo_taps(record: Record, vm: str, host: HostPaths) -> list[str]:
    return links.undo_taps(record, host)


def _undo_macvtaps(record: Record, vm: str, host: HostPaths) -> list[str]:
    return links.undo_macvtaps(record, host)


def _undo_shares(record: Record, vm: str, host: HostPaths) -> list[str]:
    return shares.undo(record, host.vm(vm), systemd.stop)


def _undo_pci(record: Record, vm: str, host: HostPaths) -> list[str]:
    with pci_lock.Exclusive(vm, pci.recorded_addresses(record), host):
        return pci.undo(record, host)


def _undo_private(record: Record, vm: str, host: HostPaths) -> list[str]:
    handover.take_back(vm, record, host)
    return []


def _forget_booted(record: Record, vm: str, host: HostPaths) -> list[str]:
    if not os.path.islink(host.vm(vm)):
        remove_files(record, host.vm(vm))
    record.clear()
    return []


def _forget(record: Record, vm: str, host: HostPaths) -> list[str]:
    record.clear()
    return []


# What undoes a record, by its file's name; another version's is told of and left alone. `_forget`
# is for notes, which set nothing up.
UNDO: dict[str, Callable[[Record, str, HostPaths], list[str]]] = {
    "virtiofsd": _undo_shares,
    "macvtap-interfaces": _undo_macvtaps,
    "tap-interfaces": _undo_taps,
    pci.WHAT: _undo_pci,
    pci.FAILED: _forget,
    handover.WHAT: _undo_private,
    "booted": _forget_booted,
    "ends": _forget,
    "lost-shares": _forget,
    shares.SERVED: _forget,
}

# What the lines of records stand for, by their verb. Others tell nothing that has to be undone.
_THINGS = {
    "files": "private files",
    "tap": "tap",
    "macvtap": "macvtap",
    "unit": "unit",
    "socket": "socket",
} | {"device": "PCI device"}


@frozen
class StrayUnit:
    """A unit that is up for a VM that is not."""

    vm: str
    what: str
    kind: str = "unit"
    is_kept: bool = False

    def describe(self) -> str:
        return f"unit {self.what} is up"

    def undo(self, host: HostPaths) -> list[str]:
        systemd.stop([self.what])
        return []


@frozen
class FailedUnit:
    """A set-up unit that failed and is remembered by systemd for it."""

    vm: str
    what: str
    kind: str = "failed-unit"
    is_kept: bool = False

    def describe(self) -> str:
        return f"unit {self.what} has failed"

    def undo(self, host: HostPaths) -> list[str]:
        process.output(["systemctl", "reset-failed", "--", self.what])
        return []


@frozen
class StaleRecord:
    """A record of things that were set up; `things` are those, for people."""

    vm: str
    what: str
    things: tuple[str, ...]
    is_kept: bool = False
    kind: str = "record"

    def describe(self) -> str:
        if self.is_kept:
            return f"record {self.what} is of another version, which has to undo it"
        return f"record {self.what} of {', '.join(self.things) or 'nothing to undo'}"

    def undo(self, host: HostPaths) -> list[str]:
        if os.path.isdir(self.what):
            os.rmdir(self.what)
            return []
        return UNDO[os.path.basename(self.what)](Record(self.what), self.vm, host)


@frozen
class StaleLink:
    """A link of ours: `booted` of a VM that is down, or a root of nix's garbage collector."""

    vm: str
    what: str
    target: str
    kind: str

    is_kept: bool = False

    def describe(self) -> str:
        return f"link {self.what} to {self.target}"

    def undo(self, host: HostPaths) -> list[str]:
        os.unlink(self.what)
        return []


@frozen
class Directory:
    """A state directory without a package; `kept` are the files in it that are not ours."""

    vm: str
    what: str
    kept: tuple[str, ...] = ()
    kind: str = "directory"

    @property
    def is_kept(self) -> bool:
        return bool(self.kept)

    def describe(self) -> str:
        text = f"directory {self.what} has no package"
        if self.kept:
            shown = ", ".join(self.kept[:3]) + (", …" if len(self.kept) > 3 else "")
            text += f", but {shown}: `microvm remove {self.vm}` deletes it"
        return text

    def undo(self, host: HostPaths) -> list[str]:
        directory = os.open(self.what, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            # What comes after this look is kept, and with it the directory.
            there = os.listdir(directory)
            for name in there:
                if not _is_ours(name, os.stat(name, dir_fd=directory, follow_symlinks=False)):
                    return [f"{self.what} has got {name!r} meanwhile and stays"]
            for name in there:
                os.unlink(name, dir_fd=directory)
        finally:
            os.close(directory)
        os.rmdir(self.what)
        return []


@frozen
class Undeclared:
    """A VM that runs, was installed from a declaration, and is declared no more."""

    vm: str
    what: str
    kind: str = "vm"
    is_kept: bool = False

    def describe(self) -> str:
        return f"runs, but its declaration {self.what} is gone"

    def undo(self, host: HostPaths) -> list[str]:
        systemd.stop([names.unit(self.vm)])
        return []


@frozen
class Outcome:
    """What became of something that was found; `problems` if it is there still."""

    leftover: Leftover
    problems: tuple[str, ...] = ()
    # Of a VM that started meanwhile.
    is_in_use: bool = False


def find(host: HostPaths) -> list[Leftover]:
    """What VMs left behind, by VM and in the order in which it is to be undone.

    Changes nothing and needs no root, but may see less without.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    # In this order: a record that is older than what systemd says of its VM cannot be one that is
    # just being written.
    records = _records(host)
    seen = _Seen()
    roots: dict[str, list[StaleLink]] = {}
    for root in _gc_roots(host):
        roots.setdefault(root.vm, []).append(root)
    vms = {*records, *seen.vms(), *_directories(host), *roots}
    found: list[Leftover] = []
    for vm in sorted(vms):
        if seen.is_live(vm):
            if seen.runs(vm) and source.is_undeclared(vm, host):
                found.append(Undeclared(vm, host.declaration(vm)))
            continue
        recorded = {thing for record in records.get(vm, ()) for thing in record.things}
        found += [unit for unit in seen.left(vm) if f"unit {unit.what}" not in recorded]
        found += records.get(vm, ())
        # A link in the directory's place leads to where nothing is ours; no start bears with it.
        if not os.path.islink(host.vm(vm)):
            found += _booted(vm, host)
            found += _directory(vm, host)
        found += roots.get(vm, ())
    return found


def undo(found: Sequence[Leftover], host: HostPaths) -> Iterator[Outcome]:
    """Undo what `find` found, one after the other; the rest goes on where one fails.

    What is kept, and VMs that run undeclared, are passed over.

    Raises:
        MicrovmHostError: starts could not be held back, so that nothing was undone.
    """
    wanted = [each for each in found if not each.is_kept and not isinstance(each, Undeclared)]
    if not wanted:
        return
    with _holding_back([each.vm for each in wanted], host):
        again = set(find(host))
        live = _Seen()
        for leftover in wanted:
            if leftover not in again:
                yield Outcome(leftover, is_in_use=live.is_live(leftover.vm))
                continue
            try:
                yield Outcome(leftover, tuple(leftover.undo(host)))
            except MicrovmHostError as error:
                yield Outcome(leftover, (str(error),))
            except FileNotFoundError:
                # Gone by itself, or with what was undone before it.
                yield Outcome(leftover)
            except OSError as error:
                yield Outcome(leftover, (f"{leftover.what}: {error.strerror}",))


@contextmanager
def _holding_back(vms: Sequence[str], host: HostPaths) -> Iterator[None]:
    """Let none of these VMs start for a while: what comes after a unit waits until it is up.

    A oneshot service before all of them that waits for a lock of ours is `activating` for as long
    as we hold that, and no longer, however we end.

    Raises:
        MicrovmHostError: another reconcile is at work, or systemd does not run the unit.
    """
    # Not a lock on a directory that anybody may open, for anybody may lock what he can open.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    lock = os.open(host.reconcile_lock, flags, 0o600)
    try:
        _lock(lock, host)
        first = [f"microvm-set-booted@{vm}.service" for vm in dict.fromkeys(vms)]
        # That of a reconcile just before waits for our lock now.
        systemd.stop([_GATE])
        process.output(
            ["systemd-run", "--quiet", "--no-block", "--collect", f"--unit={_GATE}"]
            + ["--description=Hold back starts while microvm reconcile undoes what VMs left"]
            + ["--property=Type=oneshot", f"--property=Before={' '.join(first)}"]
            # Starts that `systemctl isolate` asks for are held back as well.
            + ["--property=IgnoreOnIsolate=yes"]
            + ["--", "flock", host.reconcile_lock, "true"]
        )
        deadline = time.monotonic() + _GATE_CLOSES_WITHIN
        while (state := systemd.states(_GATE).get(_GATE, "inactive")) != "activating":
            if time.monotonic() > deadline:
                raise MicrovmHostError(
                    f"starts could not be held back: {_GATE} is {state}",
                    hint=f"`journalctl -u {_GATE}` says more",
                )
            time.sleep(0.01)
        yield
    finally:
        os.close(lock)


def _lock(lock: int, host: HostPaths) -> None:
    # The unit of a reconcile just before holds it for a moment, too.
    deadline = time.monotonic() + 1
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise MicrovmHostError(
                    "another `microvm reconcile` is at work", path=host.reconcile_lock
                ) from error
        time.sleep(0.02)


class _Seen:
    """What systemd says of the units of VMs, at one moment."""

    def __init__(self) -> None:
        patterns = [names.unit("*"), "microvm-foreground-*.service", *names.set_up_units("*")]
        patterns.append(names.again_unit("*"))
        # In this order: what is done with a job by then shows in the state.
        self._jobs = systemd.jobs(*patterns)
        self._states = systemd.states(*patterns, "microvm-virtiofsd-*")
        # By VM, once: a host has a thousand units, and each VM would go through all of them.
        self._vms = {vm for vm in map(_vm_of, self._states) if vm is not None}
        self._share_units: dict[str, list[str]] = {}
        # Sockets before services: a socket that is there starts its service again.
        for unit in sorted(self._states, reverse=True):
            vm = names.vm_of_share_unit(unit)
            if vm is not None and self._states[unit] in RUNNING:
                self._share_units.setdefault(vm, []).append(unit)

    def vms(self) -> set[str]:
        return self._vms

    def runs(self, vm: str) -> bool:
        return self._states.get(names.unit(vm)) in RUNNING

    def is_live(self, vm: str) -> bool:
        """Whether a VM runs, starts or stops."""
        services = [names.unit(vm), names.foreground_unit(vm), names.again_unit(vm)]
        set_up = names.set_up_units(vm)
        return (
            any(self._states.get(unit) in RUNNING for unit in services)
            or any(self._states.get(unit) in ("activating", "deactivating") for unit in set_up)
            or not self._jobs.isdisjoint([*services, *set_up])
        )

    def left(self, vm: str) -> Iterator[StrayUnit | FailedUnit]:
        """The units that are there for a VM that is not live."""
        set_up = names.set_up_units(vm)
        # In the order in which they stand on each other, so from the last.
        for unit in reversed(set_up):
            if self._states.get(unit) in RUNNING:
                yield StrayUnit(vm, unit)
        for unit in self._share_units.get(vm, ()):
            if _is_transient(unit):
                yield StrayUnit(vm, unit)
        for unit in set_up:
            if self._states.get(unit) == "failed":
                yield FailedUnit(vm, unit)


def _is_transient(unit: str) -> bool:
    """Whether a unit was made at run time, as ours are, and not by somebody's file."""
    return systemd.show(unit, "Transient").get("Transient") == "yes"


def _vm_of(unit: str) -> str | None:
    """The VM that a set-up unit or a unit of a share belongs to; None for other units."""
    prefix, at, instance = unit.removesuffix(".service").partition("@")
    if (at and prefix in names.SET_UP_UNITS) or prefix == "microvm":
        return instance if names.is_vm_name(instance) else None
    return names.vm_of_share_unit(unit)


def _records(host: HostPaths) -> dict[str, list[StaleRecord]]:
    """All records, by VM, each VM's in the order in which they are undone."""
    found = {}
    for vm in _names_in(host.records):
        directory = f"{host.records}/{vm}"
        try:
            files = sorted(os.listdir(directory))
        except FileNotFoundError:
            # Just undone by a stop.
            continue
        order = [*(file for file in UNDO if file in files), *(f for f in files if f not in UNDO)]
        found[vm] = [
            StaleRecord(vm, f"{directory}/{file}", _things(f"{directory}/{file}"))
            if file in UNDO
            else StaleRecord(vm, f"{directory}/{file}", (), is_kept=True)
            for file in order
        ]
        if not files:
            found[vm] = [StaleRecord(vm, directory, ())]
    return found


def _things(path: str) -> tuple[str, ...]:
    try:
        lines = Record(path).read()
    except MicrovmHostError as error:
        return (error.message,)
    things = [f"{_THINGS[line[0]]} {line[1]}" for line in lines if line[0] in _THINGS and line[1:]]
    # It ends on terminals.
    return tuple(thing if thing.isprintable() else repr(thing) for thing in things)


def _names_in(directory: str) -> list[str]:
    """The directories in one that are called like VMs."""
    try:
        found = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [
        name
        for name in found
        if names.is_vm_name(name)
        and os.path.isdir(f"{directory}/{name}")
        and not os.path.islink(f"{directory}/{name}")
    ]


def _directories(host: HostPaths) -> list[str]:
    return _names_in(host.state)


def _booted(vm: str, host: HostPaths) -> Iterator[StaleLink]:
    try:
        yield StaleLink(vm, host.booted(vm), os.readlink(host.booted(vm)), "booted")
    except OSError:
        # Not there, or no link, and then not ours.
        return


def _directory(vm: str, host: HostPaths) -> Iterator[Directory]:
    path = host.vm(vm)
    # Declared, its package comes with the next boot or `microvm apply`.
    if os.path.lexists(host.current(vm)) or os.path.lexists(host.declaration(vm)):
        return
    try:
        if time.time() - os.stat(path).st_mtime < _BUILT_WITHIN:
            return
        foreign = [
            name
            for name in sorted(os.listdir(path))
            if not _is_ours(name, os.lstat(f"{path}/{name}"))
        ]
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        # Not there, no more, or not for everybody to see.
        return
    # It ends on terminals.
    yield Directory(vm, path, tuple(n if n.isprintable() else repr(n) for n in foreign))


def _is_ours(name: str, status: os.stat_result) -> bool:
    """Whether a file of a state directory is one of the small ones that the toolkit makes."""
    base = name.rpartition(".")[0] if name.rpartition(".")[2].isdigit() else name
    if stat.S_ISLNK(status.st_mode):
        return _is_roots(status) and base.lstrip(".") in ("build", "booted", "current")
    known = (*source.KINDS, source.DECLARED)
    return stat.S_ISREG(status.st_mode) and _is_roots(status) and base in known


def _is_roots(status: os.stat_result) -> bool:
    return status.st_uid == 0


def _gc_roots(host: HostPaths) -> list[StaleLink]:
    """The links that keep packages of VMs that are gone."""
    try:
        files = sorted(os.listdir(host.gc_roots))
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []
    found = []
    for file in files:
        path = f"{host.gc_roots}/{file}"
        try:
            target = os.readlink(path)
        except OSError:
            continue
        vm, _, link = target.removeprefix(f"{host.state}/").partition("/")
        if (
            target.startswith(f"{host.state}/")
            and names.is_vm_name(vm)
            and (file, link) in ((vm, "current"), (f"booted-{vm}", "booted"))
            and not os.path.lexists(host.vm(vm))
        ):
            found.append(StaleLink(vm, path, target, "gc-root"))
    return found
