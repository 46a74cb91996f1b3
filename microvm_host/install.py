# SPDX-License-Identifier: MIT
"""Brings `current` of a VM up to date: from a path of this host, or by building a flake with nix.

All or nothing: the new package is there and was checked before `current` turns to it; whatever
fails leaves the old one.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from . import runner, state, systemd, users
from .errors import MicrovmHostError, UsageError
from .frozen import frozen
from .source import DECLARED, KINDS, Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .declaration import Declaration
    from .paths import HostPaths

NIX = ("nix", "--extra-experimental-features", "nix-command flakes")


@frozen
class Change:
    """What became of a VM's `current`; None stands for no package."""

    name: str
    before: str | None
    after: str
    booted: str | None

    @property
    def is_new(self) -> bool:
        return self.before != self.after

    @property
    def wants_restart(self) -> bool:
        """Whether the VM runs another package than the current one."""
        return self.booted is not None and self.booted != self.after

    def describe(self) -> str:
        if self.before is None:
            return f"{self.name}: installed {self.after}"
        if self.is_new:
            return f"{self.name}: updated from {self.before} to {self.after}"
        return f"{self.name}: up to date ({self.after})"


def create(name: str, source: Source, host: HostPaths, user: str | None = None) -> Change:
    """Make a VM that does not exist yet.

    Args:
        user: whom it is to run as, users.AUTO for one of its own; None for the unit's user.

    Raises:
        UsageError: it exists.
        MicrovmHostError, PackageError: its package cannot be had; nothing is left behind.
    """
    path = host.vm(name)
    if os.path.lexists(path):
        raise UsageError(
            f"microVM {name} exists already",
            path=path,
            hint=f"`microvm update {name}` updates it, `microvm remove {name}` removes it",
        )
    if user is not None:
        users.ensure(name, user, host)
        users.write_drop_in(name, user, host)
    try:
        return from_source(name, source, host)
    except BaseException:
        if user is not None:
            users.remove_drop_in(name, host)
        raise


def declared(found: Declaration, host: HostPaths) -> Change:
    """Bring a declared VM up to date, its user included; raises as from_source."""
    if found.user is not None:
        users.ensure(found.name, found.user, host)
    return from_source(found.name, found.source, host, is_declared=True)


def from_source(name: str, source: Source, host: HostPaths, *, is_declared: bool = False) -> Change:
    """Take the package from its source, check it, and make it `current`.

    Args:
        is_declared: the source stands in a declaration, which is remembered.

    Raises:
        MicrovmHostError: it cannot be had; `current` is as it was, and a VM that was not there
            is not there now.
        PackageError: it is no package, or a wrong one; likewise.
    """
    is_new = not os.path.lexists(host.vm(name))
    before = state.pointed_to(host.current(name))
    state.prepare(name, systemd.identity(name).gid, host)
    try:
        is_flake = source.kind == "flake"
        package = _build(name, source.reference, host) if is_flake else source.reference
        after = runner.load(package).path
        _keep_from_collection(name, after, host)
        _remember(name, source, host)
        if is_declared:
            _write(f"{host.vm(name)}/{DECLARED}", "")
        if after != before:
            state.link(host.current(name), after)
    except BaseException:
        if is_new:
            # Nothing but our own is in a directory that was not there before.
            remove(name, host)
        raise
    finally:
        _drop_build_link(name, host)
    return Change(name, before, after, state.booted(name, host))


def remove(name: str, host: HostPaths) -> None:
    """Delete a VM that does not run, with all of its state; its user stays."""
    shutil.rmtree(host.vm(name))
    users.remove_drop_in(name, host)
    _forget_gc_roots(name, host)


def evaluate(name: str, flake: str) -> str:
    """The package that a flake would give for a VM, without building it; asks nix.

    Raises:
        MicrovmHostError: nix is missing or fails.
    """
    return _nix("eval", "--raw", f"{_output(name, flake)}.outPath", about=flake).strip()


def _output(name: str, flake: str) -> str:
    return f'{flake}#nixosConfigurations."{name}".config.microvm.declaredRunner'


def _build(name: str, flake: str, host: HostPaths) -> str:
    """Build with an out-link, which keeps the result from being collected until it is current."""
    link = _build_link(name, host)
    _nix("build", "--out-link", link, "--refresh", _output(name, flake), about=flake)
    return link


def _build_link(name: str, host: HostPaths) -> str:
    return f"{host.vm(name)}/.build"


def _drop_build_link(name: str, host: HostPaths) -> None:
    try:
        os.unlink(_build_link(name, host))
    except FileNotFoundError:
        pass


def _nix(verb: str, *arguments: str, about: str) -> str:
    """Run nix, which shows its progress and its errors on our standard error."""
    try:
        done = subprocess.run(
            [*NIX, verb, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )
    except FileNotFoundError as error:
        raise MicrovmHostError(
            f"cannot build {about}: this host has no nix",
            hint="install nix (on Debian: nix-bin), or give a package by --runner",
        ) from error
    if done.returncode:
        raise MicrovmHostError(
            f"nix could not {verb} {about}: it ended with {done.returncode}",
            hint="what it said stands above; nothing was changed",
        )
    return done.stdout


def _remember(name: str, source: Source, host: HostPaths) -> None:
    for kind in KINDS:
        path = f"{host.vm(name)}/{kind}"
        if kind == source.kind:
            _write(path, source.reference + "\n")
        elif os.path.lexists(path):
            os.unlink(path)


def _write(path: str, text: str) -> None:
    """Make a file of a state directory at one stroke."""
    temporary = f"{path}.{os.getpid()}"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    # Exclusively: the VM's user, who may make files here, must not have us follow a link.
    with open(temporary, "x", encoding="utf-8") as target:
        target.write(text)
    os.replace(temporary, path)


def _keep_from_collection(name: str, package: str, host: HostPaths) -> None:
    """Make the links `current` and `booted` roots of nix's garbage collector, as NixOS does."""
    if not package.startswith("/nix/store/"):
        return
    os.makedirs(host.gc_roots, exist_ok=True)
    state.link(f"{host.gc_roots}/{name}", host.current(name))
    state.link(f"{host.gc_roots}/booted-{name}", host.booted(name))


def _forget_gc_roots(name: str, host: HostPaths) -> None:
    for root in (f"{host.gc_roots}/{name}", f"{host.gc_roots}/booted-{name}"):
        if os.path.islink(root):
            os.unlink(root)
