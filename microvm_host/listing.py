# SPDX-License-Identifier: MIT
"""What VMs there are, whether each runs, and which version of it: behind `microvm -l`.

One pass over the state directories and one call to systemd, whatever the number of VMs. Nothing
is built or evaluated, unless asked for by name: `newest_by_building` is for --check.
"""

from __future__ import annotations

import os

from . import leases, names, source, state, systemd
from .errors import MicrovmHostError
from .frozen import frozen
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from .paths import HostPaths
    from .source import Source

# systemd's word for the state of a unit -> what people call a VM whose unit is in that state.
_STATUS = {
    "active": "running",
    "reloading": "running",
    "activating": "starting",
    "deactivating": "stopping",
    "inactive": "stopped",
}
_PROPERTIES = ("StateChangeTimestamp", "MemoryCurrent")
_RUNS = ("active", "activating", "deactivating", "reloading")
# Characters of a digest or a hash that tell packages apart, as `microvm history` shows them.
_SHORT = 12
_HEX = frozenset("0123456789abcdef")


@frozen
class Version:
    """One version of a VM.

    `package` is the runner package's directory; `system` what its `share/microvm/system` points
    to, where it has that. Two versions are the same if their systems are, as on NixOS.
    """

    package: str
    system: str | None = None

    @property
    def identity(self) -> str:
        return self.system or self.package

    @property
    def label(self) -> str:
        """A short name for people: `24.05` of /nix/store/…-nixos-system-web-24.05."""
        base = os.path.basename(self.identity)
        if self.identity.startswith("/nix/store/"):
            return base.rsplit("-", 1)[-1] if self.system else base[:8]
        return base

    @property
    def short(self) -> str:
        """As short as it can be: the beginning of the digest for a package that was built here."""
        digest, dash, _ = self.label.partition("-")
        is_digest = bool(dash) and len(digest) == 32 and _HEX.issuperset(digest)
        return digest[:_SHORT] if is_digest else self.label


@frozen
class Row:
    """One VM of the listing."""

    name: str
    # systemd's word for the unit: active, activating, deactivating, failed, inactive.
    active: str
    current: Version | None
    booted: Version | None
    # What its source would give now, where that is known.
    newest: Version | None = None
    # Why there is nothing to tell.
    problem: str = ""
    # Tags of shares whose virtiofsd has failed under the running guest.
    lost: tuple[str, ...] = ()
    # Addresses of the running guest that the host knows.
    addresses: tuple[str, ...] = ()
    # A declaration made this VM, and the file is gone.
    is_undeclared: bool = False
    # Why the hypervisor has paused the guest, in QEMU's words; nothing if it has not.
    paused: str = ""
    # When the unit came into its state, in seconds since 1970, and what it takes of the host's
    # memory, in bytes; None where systemd does not tell, or was not asked.
    since: int | None = None
    memory: int | None = None

    @property
    def status(self) -> str:
        """In plain words whether it runs: running, paused, starting, stopping, failed …"""
        if self.current is None and not self.runs:
            return "broken"
        if self.paused:
            return "paused"
        return _STATUS.get(self.active, self.active)

    @property
    def runs(self) -> bool:
        return self.active in _RUNS

    @property
    def state(self) -> str:
        """In microvm.nix's words: outdated, stale, current; or broken."""
        if self.current is None:
            return "broken"
        if self.newest is not None and self.newest.identity != self.current.identity:
            return "outdated"
        if self.booted is not None and self.booted.identity != self.current.identity:
            return "stale"
        return "current"

    @property
    def command(self) -> str | None:
        """The command that mends it; None if there is nothing to mend."""
        unit = names.unit(self.name)
        if self.state == "broken":
            return None
        if self.paused:
            return f"microvm resume {self.name}"
        if self.state == "outdated":
            return f"microvm -{'Ru' if self.booted else 'u'} {self.name}"
        if self.state == "stale":
            return f"systemctl restart {unit}"
        if self.active == "failed":
            return f"systemctl status {unit}"
        if self.lost:
            return f"systemctl restart {unit}"
        return None if self.runs else f"systemctl start {unit}"


def rows(
    host: HostPaths,
    only: tuple[str, ...] = (),
    newest_by_building: Callable[[str, Source], Version | None] | None = None,
    *,
    neighbours: bool = False,
    details: bool = False,
) -> list[Row]:
    """The VMs of this host, sorted by name.

    Args:
        only: these alone, in this order.
        newest_by_building: finds out what a flake or a declaration would give now; without it,
            they are not asked.
        neighbours: tell addresses too that no DHCP server of this host gave.
        details: tell `since` and `memory` too, for which systemd is asked a second time.

    Raises:
        MicrovmHostError: systemd does not answer, or a VM of `only` does not exist.
    """
    for name in only:
        require(name, host)
    chosen = only or [name for name in installed(host) if os.path.isdir(host.vm(name))]
    active = systemd.states(
        names.unit("*"),
        names.again_unit("*"),
        "microvm-foreground-*.service",
        "microvm-virtiofsd-*.service",
        *names.set_up_units("*"),
    )
    known = leases.known(host, neighbours=neighbours)
    units: dict[str, dict[str, str]] = {}
    if details:
        units = systemd.show_all(_PROPERTIES, names.unit("*"), "microvm-foreground-*.service")
    running = [name for name in chosen if _active(name, active) in _RUNS]
    paused = _paused(running, host)
    return [_row(name, active, host, newest_by_building, known, units, paused) for name in chosen]


def installed(host: HostPaths) -> list[str]:
    """The names of the VMs that have a state directory."""
    try:
        return sorted(filter(names.is_vm_name, os.listdir(host.state)))
    except FileNotFoundError:
        return []


def declared(host: HostPaths) -> list[str]:
    """The names of the VMs that have a declaration, installed or not."""
    try:
        files = os.listdir(host.declarations)
    except OSError:
        return []
    found = (file.removesuffix(".toml") for file in files if file.endswith(".toml"))
    return sorted(filter(names.is_vm_name, found))


def require(name: str, host: HostPaths, *, declared_will_do: bool = False) -> None:
    """Check that a VM is there.

    Args:
        declared_will_do: it may be declared alone: whoever asks has systemd install it.

    Raises:
        MicrovmHostError: it is not; says which one the caller may have meant.
    """
    if os.path.isdir(host.vm(name)):
        return
    is_declared = os.path.lexists(host.declaration(name))
    if is_declared and declared_will_do:
        return
    if is_declared:
        raise MicrovmHostError(
            f"microVM {name} is declared, but not installed yet",
            hint=f"`microvm apply` installs it, `microvm start {name}` starts it, too",
        )
    # Mistakes alone pay for it.
    from .declaration.nearest import nearest

    meant = nearest(name, {*installed(host), *declared(host)})
    raise MicrovmHostError(
        f"there is no microVM {name}",
        hint=f"did you mean {meant}?" if meant else "`microvm list` shows those that there are",
    )


def select(patterns: Sequence[str], host: HostPaths, *, declared_too: bool = False) -> list[str]:
    """The VMs that names and globs stand for, each once.

    Args:
        declared_too: those that are declared, and not installed yet, are among them.

    Raises:
        MicrovmHostError: a name is no VM's, or a glob matches none.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        if not is_glob(pattern):
            require(pattern, host, declared_will_do=declared_too)
            found[pattern] = None
            continue
        from fnmatch import fnmatchcase

        known = [name for name in installed(host) if os.path.isdir(host.vm(name))]
        known += declared(host) if declared_too else []
        matches = [name for name in sorted({*known}) if fnmatchcase(name, pattern)]
        if not matches:
            raise MicrovmHostError(
                f"no microVM matches {pattern!r}", hint="`microvm list` shows those that there are"
            )
        found.update(dict.fromkeys(matches))
    return list(found)


def is_glob(text: str) -> bool:
    """Whether a text stands for any number of VMs; no VM has such a name."""
    return any(character in text for character in "*?[")


def _number(text: str) -> int | None:
    # systemd's word for a number that there is none of is the largest one, or no number.
    return int(text) if names.is_number(text) and int(text) < 1 << 63 else None


def _paused(running: list[str], host: HostPaths) -> dict[str, str]:
    """Why the guests are paused that are, as their hypervisors say."""
    if not running:
        return {}
    from . import runstate

    return runstate.paused(running, host)


def _active(name: str, active: dict[str, str]) -> str:
    """How a VM is, as a service or in the foreground; `failed` too if it was not got so far."""
    state = active.get(names.unit(name), "inactive")
    if state in ("inactive", "failed"):
        state = active.get(names.foreground_unit(name), state)
    if state in ("inactive", "failed") and active.get(names.again_unit(name)) == "activating":
        # It waits for its turn.
        return "activating"
    if state == "inactive" and "failed" in map(active.get, names.set_up_units(name)):
        return "failed"
    return state


def _lost(name: str, active: dict[str, str], host: HostPaths) -> tuple[str, ...]:
    """The shares whose virtiofsd has ended and was not started again since by a hypervisor."""
    return tuple(
        dict.fromkeys(
            tag
            for tag in _recorded_losses(name, host)
            if active.get(names.share_unit(name, tag, ".service")) != "active"
        )
    )


def _recorded_losses(name: str, host: HostPaths) -> list[str]:
    try:
        lines = Record(host.record(name, "lost-shares")).read()
    except MicrovmHostError:
        # The list of all VMs is not to fail for it.
        return []
    return [line[1] for line in lines if len(line) == 2 and line[1].isprintable()]


def _row(
    name: str,
    states: dict[str, str],
    host: HostPaths,
    newest_by_building: Callable[[str, Source], Version | None] | None,
    known: dict[str, list[str]],
    units: dict[str, dict[str, str]],
    paused: dict[str, str],
) -> Row:
    active = _active(name, states)
    facts = units.get(names.unit(name), {})
    if states.get(names.unit(name), "inactive") in ("inactive", "failed"):
        facts = units.get(names.foreground_unit(name), facts)
    since = _number(facts.get("StateChangeTimestamp", "").lstrip("@"))
    memory = _number(facts.get("MemoryCurrent", ""))
    current = booted = None
    problem = ""
    try:
        booted = _version(host.booted(name)) if state.booted(name, host) else None
        current = _version(host.current(name))
        if current is None:
            problem = (
                f"{host.current(name)} points nowhere"
                if os.path.islink(host.current(name))
                else f"no package in {host.vm(name)}"
            )
    except PermissionError:
        problem = "cannot be read: this needs root"
    return Row(
        name,
        active,
        current,
        booted,
        newest=_newest(name, host, newest_by_building) if current else None,
        problem=problem,
        lost=_lost(name, states, host) if current else (),
        addresses=_addresses(booted, known) if known and booted and active in _RUNS else (),
        is_undeclared=source.is_undeclared(name, host),
        paused=paused.get(name, ""),
        since=since,
        memory=memory,
    )


def _addresses(booted: Version, known: dict[str, list[str]]) -> tuple[str, ...]:
    return tuple(address for mac in leases.macs(booted.package) for address in known.get(mac, ()))


def _version(link: str) -> Version | None:
    """The version that a link to a package stands for; None if it leads nowhere."""
    try:
        package = os.path.realpath(link, strict=True)
    except PermissionError:
        raise
    except (OSError, ValueError):
        # The latter for a NUL byte, in a path that was remembered.
        return None
    try:
        system = os.readlink(f"{package}/share/microvm/system")
    except OSError:
        return Version(_printable(package))
    return Version(_printable(package), _printable(system))


def _printable(text: str) -> str:
    # Anybody may have made the package: its text must not command the terminal.
    return text if text.isprintable() else repr(text)


def _newest(
    name: str,
    host: HostPaths,
    newest_by_building: Callable[[str, Source], Version | None] | None,
) -> Version | None:
    from .source import remembered

    source = remembered(host.vm(name))
    if source is None:
        return None
    if source.kind == "runner":
        return _version(source.reference)
    return newest_by_building(name, source) if newest_by_building else None


def as_text(row: Row, paint: Callable[[str, str], str]) -> str:
    """The line of a VM.

    Args:
        paint: gives a text its colour: (colour, text) -> text.
    """
    if row.active in ("active", "activating"):
        name = paint("bold green", row.name)
    else:
        name = paint("bold yellow" if row.booted or row.runs else "bold red", row.name)
    if row.current is None:
        return f"{name}: {paint('red', 'broken')}, {row.problem}"
    command = paint("bold cyan", row.command) if row.command else ""
    current = row.current
    at = "".join(f", {address}" for address in row.addresses)
    at += ", no longer declared" if row.is_undeclared else ""
    if row.paused:
        at += f", {paint('red', f'paused({row.paused})')}"
    if row.state == "outdated" and row.newest is not None:
        old, new = labels(current, row.newest)
        reboot = " and reboot" if row.booted else ""
        return (
            f"{name}: {paint('red', 'outdated')}({paint('red', old)}){at}, "
            f"rebuild({paint('green', new)}){reboot}: {command}"
        )
    if row.state == "stale" and row.booted is not None:
        old, new = labels(row.booted, current)
        return (
            f"{name}: {paint('red', 'stale')}({paint('red', old)}){at}, "
            f"reboot({paint('green', new)}): {command}"
        )
    text = f"{name}: {paint('green', 'current')}({paint('green', current.label)}){at}"
    if row.active == "failed":
        return f"{text}, {paint('red', 'failed')}: {command}"
    if not row.runs:
        return f"{text}, not booted: {command}"
    if row.lost:
        lost = f"lost share {', '.join(row.lost)}"
        return f"{text}, {paint('red', lost)}: {command}"
    if row.paused:
        return f"{text}: {command}"
    return text if row.active == "active" else f"{text}, {row.active}"


def labels(old: Version, new: Version) -> tuple[str, str]:
    """Short names of two different versions that tell them apart."""
    if old.label != new.label:
        return old.label, new.label
    return old.identity, new.identity


def as_json(row: Row) -> dict[str, Any]:
    """A VM as `microvm list --json` gives it."""

    def version(given: Version | None) -> dict[str, str | None] | None:
        if given is None:
            return None
        return {"package": given.package, "system": given.system, "label": given.label}

    return {
        "name": row.name,
        "active": row.active,
        "state": row.state,
        "status": row.status,
        "since": row.since,
        "memory": row.memory,
        "undeclared": row.is_undeclared,
        "current": version(row.current),
        "booted": version(row.booted),
        "newest": version(row.newest),
        "command": row.command,
        "lost_shares": list(row.lost),
        "paused": row.paused or None,
        "addresses": list(row.addresses),
        "problem": row.problem or None,
    }
