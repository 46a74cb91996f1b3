# SPDX-License-Identifier: MIT
"""Brings `current` of a VM up to date, and turns it back.

A package comes from a path of this host, from a flake that nix builds, or from a declaration that
says itself what the guest is like, of which it is built into the store.

All or nothing: the new package is there and was checked before `current` turns to it; whatever
fails leaves the old one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack

from . import declaration, images, runner, service, state, store, users
from .errors import MicrovmHostError, UsageError
from .frozen import frozen
from .source import DECLARED, KINDS, Source, remembered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .build.tree import Tree
    from .declaration import Declaration
    from .declaration.claims import Claims
    from .paths import HostPaths

NIX = ("nix", "--extra-experimental-features", "nix-command flakes")


@frozen
class Change:
    """What became of a VM's `current`; None stands for no package.

    `passed_over` is the package that its declaration gives, where a rollback has another stay.
    """

    name: str
    before: str | None
    after: str
    booted: str | None
    passed_over: str | None = None

    @property
    def is_new(self) -> bool:
        return self.before != self.after

    @property
    def wants_restart(self) -> bool:
        """Whether the VM runs another package than the current one."""
        return self.booted is not None and self.booted != self.after

    def describe(self) -> str:
        if self.passed_over is not None:
            return (
                f"{self.name}: stays rolled back to {self.after}; `microvm update {self.name}` "
                "has it follow its declaration again"
            )
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
    if os.path.lexists(path) and not state.is_unused(name, host):
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


def declared(
    found: Declaration,
    host: HostPaths,
    others: Claims | None = None,
    *,
    keeps_rollback: bool = True,
) -> Change:
    """Bring a declared VM up to date, its user included; raises as from_source.

    Args:
        others: what all VMs claim, if the caller knows already.
        keeps_rollback: a VM that was rolled back stays so until its declaration, or what it is
            built with, changes.
    """
    if found.user is not None:
        users.ensure(found.name, found.user, host)
    return from_source(
        found.name, found.source, host, others, is_declared=True, keeps_rollback=keeps_rollback
    )


def update(name: str, host: HostPaths) -> Change:
    """Bring a VM up to date from where its package comes from, as its declaration has it now.

    A VM that was rolled back follows its declaration again.

    Raises:
        MicrovmHostError: nothing tells where its package comes from; else as from_source.
    """
    path = host.declaration(name)
    if os.path.lexists(path):
        return declared(declaration.load(path), host, keeps_rollback=False)
    source = remembered(host.vm(name))
    if source is None:
        raise MicrovmHostError(
            f"nothing tells where the package of {name} came from",
            path=host.vm(name),
            hint="somebody put it there by hand, who has to update it by hand as well",
        )
    return from_source(name, source.checked(), host)


def from_source(
    name: str,
    source: Source,
    host: HostPaths,
    others: Claims | None = None,
    *,
    is_declared: bool = False,
    keeps_rollback: bool = False,
) -> Change:
    """Take the package from its source, check it, and make it `current`.

    Args:
        others: what all VMs claim, if the caller knows already.
        is_declared: the source stands in a declaration, which is remembered.
        keeps_rollback: a VM that was rolled back stays so, which was somebody's wish.

    Raises:
        MicrovmHostError: it cannot be had; `current` is as it was, and a VM that was not there
            is not there now.
        PackageError: it is no package, or a wrong one; likewise.
        DeclarationError: it is declared wrongly; likewise.
    """
    is_new = not os.path.lexists(host.vm(name))
    before = state.pointed_to(host.current(name))
    identity = service.identity(name)
    state.prepare(name, identity.gid, host)
    is_built = source.kind == "declaration"
    passed_over = None
    sources: tuple[str, ...] = ()
    stack = ExitStack()
    try:
        if is_built:
            # Before the declaration is read, so that of two at a time the second is the newer.
            stack.enter_context(store.locked(host))
            stack.callback(store.collect, host)
            tree = _tree(source.reference, host, others)
            package = store.put(tree, name, identity.gid, host)
            sources = _image_sources(tree)
        else:
            is_flake = source.kind == "flake"
            package = _build(name, source.reference, host) if is_flake else source.reference
        after = runner.load(package).path
        if is_built and keeps_rollback and before and store.turned_away_from(name, host) == after:
            passed_over, after = after, before
        if sources and passed_over is None:
            images.make(name, after, sources, identity, host.vm(name))
        _keep_from_collection(name, after, host)
        _remember(name, source, host)
        if is_declared:
            _write(f"{host.vm(name)}/{DECLARED}", "")
        if after != before:
            state.link(host.current(name), after)
        if is_built and passed_over is None:
            store.note(name, after, host)
    except BaseException:
        if is_new:
            # Nothing but our own is in a directory that was not there before.
            _remove(name, host)
        raise
    finally:
        _drop_build_link(name, host)
        stack.close()
    return Change(name, before, after, state.booted(name, host), passed_over)


def _image_sources(tree: Tree) -> tuple[str, ...]:
    """What a package's images are made of."""
    try:
        return tuple(tree.text("share/microvm/image-sources").splitlines())
    except KeyError:
        return ()


def _tree(path: str, host: HostPaths, others: Claims | None) -> Tree:
    """What the package of a declared guest would be; raises MicrovmHostError."""
    from . import taken
    from .build import declared

    return declared.tree(path, taken.gather(host) if others is None else others)


def would_be(
    name: str, source: Source, host: HostPaths, others: Claims | None = None
) -> str | None:
    """Where the package from a source would be, without installing it; None if only nix knows.

    Raises:
        MicrovmHostError: it cannot be had, or is wrong.
    """
    if source.kind == "flake":
        return None
    if source.kind == "runner":
        return runner.load(source.reference).path
    path = store.path_of(_tree(source.reference, host, others), name, host)
    if store.turned_away_from(name, host) == path:
        return state.pointed_to(host.current(name))
    return path


def roll_back(name: str, to: str | None, host: HostPaths) -> Change:
    """Give a VM a package that it had before.

    Args:
        to: the beginning of that package's digest; None for the last one before the current,
            from which another rollback goes on to the one before that.

    Raises:
        MicrovmHostError: there is no such package any more.
    """
    with store.locked(host):
        before = state.pointed_to(host.current(name))
        if to is None:
            others = list(store.came_before(name, before, host))
        else:
            others = [
                package
                for package in store.kept(name, host)
                if package != before and os.path.basename(package).startswith(to)
            ]
        if not others or (to is not None and len(others) > 1):
            raise MicrovmHostError(
                f"microVM {name} had no other package"
                + (f" that begins with {to!r}" if to is not None else " before, or none is left")
                if not others
                else f"several packages of {name} begin with {to!r}",
                path=host.history(name),
                hint=f"`microvm history {name}` shows those that are left, to choose from",
            )
        after = runner.load(others[0]).path
        store.give(after, service.identity(name).gid)
        state.link(host.current(name), after)
        # What is not to be installed again is what the first of several turned away from.
        store.note(name, after, host, instead_of=store.turned_away_from(name, host) or before)
    return Change(name, before, after, state.booted(name, host))


def _remove(name: str, host: HostPaths) -> None:
    store.forget(name, host)
    shutil.rmtree(host.vm(name))
    users.remove_drop_in(name, host)
    forget_gc_roots(name, host)


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


def forget_gc_roots(name: str, host: HostPaths) -> None:
    """Leave the packages of a VM to nix's garbage collector."""
    for root in (f"{host.gc_roots}/{name}", f"{host.gc_roots}/booted-{name}"):
        if os.path.islink(root):
            os.unlink(root)
