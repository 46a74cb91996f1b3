# SPDX-License-Identifier: MIT
"""Does at run time what boot would do with the declarations, and says what changed.

Each declared VM is installed, started if it is to start by itself, and restarted if it runs
another package than the current one. One that fails does not keep the others from it.
"""

from __future__ import annotations

import os

from . import declaration, install, names, process, systemd, taken
from .errors import DeclarationError, MicrovmHostError
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .declaration import Declaration
    from .declaration.claims import Claims
    from .paths import HostPaths


@frozen
class Outcome:
    """What became of one declared VM; `error` if it failed."""

    name: str
    text: str
    changed: bool
    error: MicrovmHostError | None = None


def apply(host: HostPaths, *, dry_run: bool = False) -> Iterator[Outcome]:
    """Bring every declared VM up to date, one outcome at a time.

    Args:
        dry_run: say what would be done, and do nothing.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    if not dry_run:
        # The generator runs anew: microvms.target wants what is declared now.
        systemd.reload()
    active = systemd.states(names.unit("*"))
    # Read once for all, and only if one of them is built here.
    others: Claims | None = None
    for found in declaration.load_all(host.declarations):
        if isinstance(found, DeclarationError):
            path = found.path or ""
            yield Outcome(os.path.basename(path), str(found), False, found)
            continue
        runs = active.get(names.unit(found.name)) in ("active", "activating")
        try:
            if others is None and found.source.kind == "declaration":
                others = taken.gather(host)
            do = _would if dry_run else _bring_up
            yield do(found, host, others, runs=runs)
        except MicrovmHostError as error:
            yield Outcome(found.name, f"{found.name}: {error}", False, error)


def _bring_up(found: Declaration, host: HostPaths, others: Claims | None, *, runs: bool) -> Outcome:
    change = install.declared(found, host, others)
    text, unit = change.describe(), names.unit(found.name)
    if runs and change.wants_restart:
        if found.restart_if_changed:
            process.output(["systemctl", "restart", unit])
            return Outcome(found.name, f"{text}, restarted", True)
        return Outcome(
            found.name, f"{text}, still runs the former: systemctl restart {unit}", change.is_new
        )
    if not runs and found.autostart:
        process.output(["systemctl", "start", unit])
        return Outcome(found.name, f"{text}, started", True)
    return Outcome(found.name, text, change.is_new)


def _would(found: Declaration, host: HostPaths, others: Claims | None, *, runs: bool) -> Outcome:
    from . import state

    before = state.pointed_to(host.current(found.name))
    name, parts = found.name, []
    after = install.would_be(found.name, found.source, host, others)
    if after is None:
        parts.append(f"would build {found.source.reference}")
        is_new = True
    else:
        is_new = before != after
        if is_new:
            verb = "install" if before is None else f"update from {before} to"
            parts.append(f"would {verb} {after}")
    if runs and is_new and found.restart_if_changed:
        parts.append("would restart it if it changed")
    elif not runs and found.autostart:
        parts.append("would start it")
    return Outcome(name, f"{name}: {', '.join(parts) or 'up to date'}", bool(parts))
