# SPDX-License-Identifier: MIT
"""Does at run time what boot would do with the declarations, and says what changed.

First each declared VM is installed. Then all that are to start by themselves, or run another
package than the current one, are started at once: systemd orders them and waits for all of them
together. One that fails does not keep the others from it. Flakes are built beside all that; VMs
that wait for one by their `order`, and those of the flakes, are started when the flakes are built.
VMs whose declaration was deleted stay as they are, and are listed.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

from . import declaration, install, listing, names, service, source, systemd, taken
from .build_record import Looks
from .errors import DeclarationError, MicrovmHostError
from .frozen import frozen
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from .declaration import Declaration
    from .declaration.claims import Claims
    from .install import Change
    from .paths import HostPaths

    # Starts VMs, earlier ones first, and restarts those of them that run, which the second argument
    # names; gives what went wrong, by VM.
    BringUp = Callable[[Sequence[str], Sequence[str]], Mapping[str, MicrovmHostError]]

# At a time: nix uses all processors for one of them already.
_BUILDS = 4


@frozen
class Outcome:
    """What became of one VM; `error` if it failed."""

    name: str
    text: str
    changed: bool
    error: MicrovmHostError | None = None
    # Its declaration was deleted, and nothing was done.
    is_undeclared: bool = False


@frozen
class _Installed:
    """A VM with its package, and what is to be done with it: `start`, `restart` or nothing."""

    found: Declaration
    change: Change
    verb: str

    @property
    def order(self) -> int:
        # Those without one wait for nobody, and nobody for them.
        return -1 if self.found.order is None else self.found.order


def apply(
    host: HostPaths,
    bring_up: BringUp,
    say: Callable[[str], object] = lambda text: None,
    *,
    dry_run: bool = False,
) -> Iterator[Outcome]:
    """Bring every declared VM up to date, one outcome at a time.

    Args:
        bring_up: starts and restarts VMs.
        say: is told what is being done; `` when it is done.
        dry_run: say what would be done, and do nothing.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    if not dry_run:
        # The generator runs again: microvms.target wants what is declared now.
        systemd.reload()
    active = systemd.states(names.unit("*"))
    declared = []
    for found in declaration.load_all(host.declarations):
        if isinstance(found, DeclarationError):
            yield Outcome(os.path.basename(found.path or ""), str(found), False, found)
        else:
            declared.append(found)
    run = _Run(host, active)
    if dry_run:
        yield from map(run.would, declared)
        yield from run.undeclared()
        return
    quick = [found for found in declared if found.source.kind != "flake"]
    slow = [found for found in declared if found.source.kind == "flake"]
    later: list[_Installed] = []
    with ExitStack() as stack:
        builds = _in_the_background(run.install, slow, stack)
        ready = []
        for number, found in enumerate(quick):
            say(f"installing {found.name} ({number + 1} of {len(quick)})")
            one = run.install(found)
            say("")
            if isinstance(one, Outcome):
                yield one
            elif any(_comes_before(each, found) for each in slow):
                later.append(one)
            else:
                ready.append(one)
        yield from run.bring_up(ready, bring_up)
        for wait, found in zip(builds, slow, strict=True):
            say(f"building {found.source.reference} for {found.name}")
            one = wait()
            say("")
            if isinstance(one, Outcome):
                yield one
            else:
                later.append(one)
    yield from run.bring_up(later, bring_up)
    yield from run.undeclared()
    if run.has_changed:
        install.collect(host)


def _comes_before(one: Declaration, other: Declaration) -> bool:
    return one.order is not None and other.order is not None and one.order < other.order


def _in_the_background(
    do: Callable[[Declaration], _Installed | Outcome],
    declared: Sequence[Declaration],
    stack: ExitStack,
) -> list[Callable[[], _Installed | Outcome]]:
    """Install these in threads, some at a time; gives what waits for each."""
    if not declared:
        return []
    from concurrent.futures import ThreadPoolExecutor

    pool = stack.enter_context(ThreadPoolExecutor(_BUILDS))
    return [pool.submit(do, found).result for found in declared]


class _Run:
    """What is the same for all VMs of one `microvm apply`."""

    def __init__(self, host: HostPaths, active: Mapping[str, str]) -> None:
        self._host = host
        self._active = active
        # Each file of the host is looked at once.
        self._looks = Looks(host)
        self._claims: Claims | None = None
        # Whether a VM has another package now, so that a former one may be needed no more.
        self.has_changed = False

    def install(self, found: Declaration) -> _Installed | Outcome:
        """Install one, and see what is to be done with it then."""
        name = found.name
        try:
            change = install.declared(
                found, self._host, self._others, looks=self._looks, collects=False
            )
        except MicrovmHostError as error:
            return Outcome(name, f"{name}: {error}", False, error)
        self.has_changed |= change.is_new
        verb = ""
        if not self._runs(name):
            verb = "start" if found.autostart else ""
        elif change.wants_restart and found.restart_if_changed:
            verb = "restart"
        return _Installed(found, change, verb)

    def bring_up(self, installed: Sequence[_Installed], bring_up: BringUp) -> Iterator[Outcome]:
        """Start and restart those that are to be, all at once; says what became of all of them."""
        wanted = sorted((each for each in installed if each.verb), key=lambda each: each.order)
        failed: Mapping[str, MicrovmHostError] = {}
        if wanted:
            failed = bring_up(
                [each.found.name for each in wanted],
                [each.found.name for each in wanted if each.verb == "restart"],
            )
        for each in installed:
            yield self._outcome(each, failed.get(each.found.name))

    def _outcome(self, installed: _Installed, error: MicrovmHostError | None) -> Outcome:
        name, change, verb = installed.found.name, installed.change, installed.verb
        text = change.describe()
        if not verb and (users := self._users(name)):
            # Not restarted for it: the files in its directory are still the former user's.
            text += (
                ", runs as {0} until it is stopped, then as {1}: microvm stop {2} && "
                "microvm adopt --from {0} {2} && microvm start {2}"
            ).format(*users, name)
        if error is not None:
            return Outcome(name, f"{text}, but: {error}", change.is_new, error)
        if verb:
            return Outcome(name, f"{text}, {verb}ed", True)
        if self._runs(name) and change.wants_restart:
            text += f", still runs the former: systemctl restart {names.unit(name)}"
        return Outcome(name, text, change.is_new)

    def _users(self, name: str) -> tuple[str, str] | None:
        """The user that a running VM has, and from its next start on; None if it keeps it."""
        if not self._runs(name):
            return None
        try:
            lines = Record(self._host.record(name, "booted")).read()
            now = service.identity(name)
        except MicrovmHostError:
            # A start says what is wrong with its user.
            return None
        was = next((fields for what, *fields in lines if what == "user"), [])
        if len(was) != 4 or was[1] == str(now.uid):
            return None
        return was[0], now.user

    def would(self, found: Declaration) -> Outcome:
        """What would be done with one."""
        from . import state

        name, parts = found.name, []
        before = state.pointed_to(self._host.current(name))
        try:
            after = install.would_be(name, found.source, self._host, self._others, self._looks)
        except MicrovmHostError as error:
            return Outcome(name, f"{name}: {error}", False, error)
        is_new = before != after
        if after is None:
            parts.append(f"would build {found.source.reference}")
        elif is_new:
            verb = "install" if before is None else f"update from {before} to"
            parts.append(f"would {verb} {after}")
        if self._runs(name):
            if is_new and found.restart_if_changed:
                parts.append("would restart it if it changed")
        elif found.autostart:
            parts.append("would start it")
        return Outcome(name, f"{name}: {', '.join(parts) or 'up to date'}", bool(parts))

    def undeclared(self) -> Iterator[Outcome]:
        """The VMs whose declaration was deleted: what to do with them is not decided by that."""
        for name in listing.installed(self._host):
            if source.is_undeclared(name, self._host):
                text = f"{name}: no longer declared"
                if self._runs(name):
                    text += f", still runs: microvm stop {name}"
                else:
                    text += f"; `microvm remove {name}` deletes it and its disks"
                yield Outcome(name, text, False, is_undeclared=True)

    def _runs(self, name: str) -> bool:
        return self._active.get(names.unit(name)) in ("active", "activating")

    def _others(self) -> Claims:
        """What all VMs claim, read once, and only if one of them is built."""
        if self._claims is None:
            self._claims = taken.gather(self._host)
        return self._claims
