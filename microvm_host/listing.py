# SPDX-License-Identifier: MIT
"""What VMs there are, whether each runs, and which version of it: behind `microvm -l`.

One pass over the state directories and one call to systemd, whatever the number of VMs. Nothing
is built or evaluated, unless asked for by name: `newest_by_building` is for --check.
"""

from __future__ import annotations

import os

from . import leases, names, state, systemd
from .errors import MicrovmHostError
from .frozen import frozen
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .paths import HostPaths
    from .source import Source


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

    @property
    def runs(self) -> bool:
        return self.active in ("active", "activating", "deactivating", "reloading")

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
) -> list[Row]:
    """The VMs of this host, sorted by name.

    Args:
        only: these alone, in this order.
        newest_by_building: finds out what a flake or a declaration would give now; without it,
            they are not asked.
        neighbours: tell addresses too that no DHCP server of this host gave.

    Raises:
        MicrovmHostError: systemd does not answer, or a VM of `only` does not exist.
    """
    try:
        present = {entry for entry in os.listdir(host.state) if names.is_vm_name(entry)}
    except FileNotFoundError:
        present = set()
    for name in only:
        if name not in present:
            raise MicrovmHostError(
                f"there is no microVM {name}", path=host.vm(name), hint="`microvm list` lists them"
            )
    active = systemd.states(
        names.unit("*"),
        names.again_unit("*"),
        "microvm-foreground-*.service",
        "microvm-virtiofsd-*.service",
        *names.set_up_units("*"),
    )
    known = leases.known(host, neighbours=neighbours)
    return [
        _row(
            name, _active(name, active), _lost(name, active, host), host, newest_by_building, known
        )
        for name in only or sorted(present)
        if only or os.path.isdir(host.vm(name))
    ]


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
    active: str,
    lost: tuple[str, ...],
    host: HostPaths,
    newest_by_building: Callable[[str, Source], Version | None] | None,
    known: dict[str, list[str]],
) -> Row:
    try:
        current = _version(host.current(name))
        booted = _version(host.booted(name)) if state.booted(name, host) else None
    except PermissionError:
        return Row(name, active, None, None, problem="cannot be read: try as root")
    if current is None:
        problem = (
            f"{host.current(name)} points nowhere"
            if os.path.islink(host.current(name))
            else f"no package in {host.vm(name)}"
        )
        return Row(name, active, None, booted, problem=problem)
    newest = _newest(name, host, newest_by_building)
    row = Row(name, active, current, booted, newest, lost=lost)
    if not (known and booted and row.runs):
        return row
    return Row(name, active, current, booted, newest, "", lost, _addresses(booted, known))


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
        "current": version(row.current),
        "booted": version(row.booted),
        "newest": version(row.newest),
        "command": row.command,
        "lost_shares": list(row.lost),
        "addresses": list(row.addresses),
        "problem": row.problem or None,
    }
