# SPDX-License-Identifier: MIT
"""Brings `current` of a VM up to date, and turns it back.

A package comes from a path of this host, from a flake that nix builds, or from a declaration that
says itself what the guest is like, of which it is built into the store.

All or nothing: the new package is there and was checked before `current` turns to it; whatever
fails leaves the old one.
"""

from __future__ import annotations

import os

from . import (
    build_record,
    image_changes,
    install_lock,
    log,
    mount_units,
    runner,
    service,
    state,
    store,
    trust,
    users,
)
from .build_record import Built, Looks
from .errors import MicrovmHostError, UsageError
from .file_stamp import Inputs
from .frozen import frozen
from .paths import MICROVM_RUN
from .source import DECLARED, KINDS, Source, remembered

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .build.declared import Plan
    from .declaration import Declaration
    from .declaration.claims import Claims
    from .identity import Identity
    from .install_lock import Lock
    from .paths import HostPaths

# Endings of an image's name while it is made (build.volumes.TEMPORARY).
_UNFINISHED = (".new", ".raw")
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
    # The state directory may be the mount point of a file system with a VM on it.
    mount_units.require(name, lambda: _paths(source), host)
    with install_lock.of_vm(name, host, f"creates {name}") as lock:
        if os.path.lexists(path) and not (state.is_unused(name, host) or _is_unfinished(path)):
            raise UsageError(
                f"microVM {name} exists already",
                path=path,
                hint=f"`microvm update {name}` updates it, `microvm remove {name}` removes it",
            )
        if user is not None:
            users.ensure(name, user, host)
            users.write_drop_in(name, user, host)
        try:
            return _Installation(name, source, host, lock).carry_out()
        except BaseException:
            if user is not None:
                users.remove_drop_in(name, host)
            raise


def _is_unfinished(directory: str) -> bool:
    """Whether a state directory holds nothing but what an install that was killed left."""
    known = (*KINDS, DECLARED)
    try:
        with os.scandir(directory) as found:
            return not os.path.islink(directory) and all(
                each.name in known and each.is_file(follow_symlinks=False) for each in found
            )
    except OSError:
        return False


def declared(
    found: Declaration,
    host: HostPaths,
    others: Callable[[], Claims] | None = None,
    *,
    keeps_rollback: bool = True,
    looks: Looks | None = None,
    collects: bool = True,
) -> Change:
    """Bring a declared VM up to date, its user included; raises as from_source.

    Args:
        others: gives what all VMs claim, if the caller knows already.
        keeps_rollback: a VM that was rolled back stays so until its declaration, or what it is
            built with, changes.
        looks: looks at what has changed, for several VMs at once.
        collects: delete packages that nobody needs any more; else the caller does it.
    """
    mount_units.require(found.name, lambda: _paths(found.source), host)
    with install_lock.of_vm(found.name, host, f"installs {found.name}") as lock:
        change = _if_unchanged(found.name, host, looks or Looks(host), keeps_rollback)
        if change is not None:
            return change
        if found.user is not None:
            users.ensure(found.name, found.user, host)
        return _Installation(
            found.name,
            found.source,
            host,
            lock,
            others,
            is_declared=True,
            keeps_rollback=keeps_rollback,
            collects=collects,
        ).carry_out()


def if_unchanged(name: str, host: HostPaths) -> Change | None:
    """What `declared` gives for a VM that is up to date, without reading its declaration; or None.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    with install_lock.of_vm(name, host, f"installs {name}"):
        return _if_unchanged(name, host, Looks(host), keeps_rollback=True)


def _if_unchanged(name: str, host: HostPaths, looks: Looks, keeps_rollback: bool) -> Change | None:
    built = looks.unchanged(name)
    directory, current = host.vm(name), state.pointed_to(host.current(name))
    if built is None or current is None or not _is_whole(built, directory):
        return None
    passed_over = None
    if current != built.package:
        if not keeps_rollback or store.turned_away_from(name, host) != built.package:
            return None
        passed_over = built.package
    if remembered(directory) != Source("declaration", host.declaration(name)):
        return None
    if built.user is not None:
        users.ensure(name, built.user, host)
    if store.is_private(current):
        # The VM's user may be another one by now. For no other package is systemd asked, which
        # loads a dozen units to answer; the directory gets its owner when the VM starts.
        store.give(current, service.identity(name).gid)
    return Change(name, current, current, state.booted(name, host), passed_over)


def _is_whole(built: Built, directory: str) -> bool:
    """Whether a package is there, and all that was made besides."""
    images = (os.path.join(directory, image) for image in built.images)
    return all(map(os.path.exists, (f"{built.package}/{MICROVM_RUN}", *images)))


def update(name: str, host: HostPaths) -> Change:
    """Bring a VM up to date from where its package comes from, as its declaration has it now.

    A VM that was rolled back follows its declaration again.

    Raises:
        MicrovmHostError: nothing tells where its package comes from; else as from_source.
    """
    from . import declaration

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
    others: Callable[[], Claims] | None = None,
    *,
    is_declared: bool = False,
    keeps_rollback: bool = False,
) -> Change:
    """Take the package from its source, check it, and make it `current`.

    Args:
        others: gives what all VMs claim, if the caller knows already.
        is_declared: the source stands in a declaration, which is remembered.
        keeps_rollback: a VM that was rolled back stays so, which was somebody's wish.

    Raises:
        MicrovmHostError: it cannot be had; `current` is as it was, and a VM that was not there
            is not there now.
        PackageError: it is no package, or a wrong one; likewise.
        DeclarationError: it is declared wrongly; likewise.
    """
    mount_units.require(name, lambda: _paths(source), host)
    with install_lock.of_vm(name, host, f"installs {name}") as lock:
        return _Installation(
            name, source, host, lock, others, is_declared=is_declared, keeps_rollback=keeps_rollback
        ).carry_out()


def _paths(source: Source) -> Iterator[str]:
    """The absolute paths that a package comes from, or its declaration names."""
    from . import declaration, package_paths

    yield from package_paths.in_text(source.reference)
    if source.kind == "declaration":
        yield from package_paths.in_table(declaration.read(source.reference).table)


class _Installation:
    """One install of one VM, whose lock is held. If it fails, it undoes what it made itself."""

    def __init__(
        self,
        name: str,
        source: Source,
        host: HostPaths,
        lock: Lock,
        others: Callable[[], Claims] | None = None,
        *,
        is_declared: bool = False,
        keeps_rollback: bool = False,
        collects: bool = True,
    ) -> None:
        self._name = name
        self._source = source
        self._host = host
        self._lock = lock
        self._others = others
        self._is_declared = is_declared
        self._keeps_rollback = keeps_rollback
        self._collects = collects
        self._directory = host.vm(name)
        self._before = state.pointed_to(host.current(name))
        self._after: str | None = None
        # What is there now and was not there before, in the order in which it was made.
        self._made: list[str] = []
        self._images: tuple[str, ...] = ()
        # What the new package does not do to images that are there.
        self._undone: tuple[str, ...] = ()

    def carry_out(self) -> Change:
        """Do it; raises as from_source."""
        try:
            identity = service.identity(self._name)
            if self._is_declared:
                trust.refuse_exchangeable(self._host.declaration(self._name), identity, "read")
            if self._source.kind == "declaration":
                return self._from_declaration(identity)
            package = self._source.reference
            if self._source.kind == "flake":
                _refuse_flake_of_vms_user(package, identity)
                package = _build(self._name, package, self._host)
            elif os.path.exists(package):
                # Else nothing is there, and the reader says it better.
                trust.refuse_exchangeable(package, identity, "follow")
            after = runner.load(package).path
            # Not before there is something to put there: a build may be killed.
            self._prepare(identity)
            self._note_undone(after)
            self._switch(after)
        except BaseException:
            self._undo()
            raise
        finally:
            _drop_build_link(self._name, self._host)
        return self._change(after)

    def _from_declaration(self, identity: Identity) -> Change:
        name, host = self._name, self._host
        surroundings, inputs = build_record.surroundings(host), Inputs(host)
        # Under the VM's lock, so that of two at a time the second is the newer.
        plan = _plan(self._source.reference, host, self._others, inputs)
        for file in plan.tree.copied():
            trust.refuse_exchangeable(file, identity, "copy")
        path = store.path_of(plan.tree, name, host)
        try:
            with store.locked(host):
                self._lock.keep(path)
            package = store.put(plan.tree, name, identity.gid, host)
            after = runner.load(package).path
            passed_over = None
            turned_away = store.turned_away_from(name, host) if self._keeps_rollback else None
            if self._before and turned_away == after:
                passed_over, after = after, self._before
            self._prepare(identity)
            if passed_over is None:
                # Before those are made that are not there.
                self._note_undone(after)
                self._make_images(plan, package, identity)
            with store.locked(host):
                self._switch(after)
                if passed_over is None:
                    store.note(name, after, host, declared=plan.declared)
        except BaseException:
            self._undo()
            self._collect()
            raise
        built = Built(package, plan.user, plan.images)
        build_record.write(name, built, inputs, surroundings, host)
        if self._collects:
            self._collect()
        return self._change(after, passed_over)

    def _change(self, after: str, passed_over: str | None = None) -> Change:
        booted = state.booted(self._name, self._host)
        for line in self._undone:
            log.warning(line, vm=self._name)
        return Change(self._name, self._before, after, booted, passed_over)

    def _note_undone(self, after: str) -> None:
        found = image_changes.not_done(self._name, self._before, after, self._directory)
        self._undone = tuple(found)

    def _prepare(self, identity: Identity) -> None:
        """Have the state directory, with its owner."""
        try:
            os.mkdir(self._directory, 0o700)
            self._made.append(self._directory)
        except FileExistsError:
            pass
        state.prepare(self._name, identity.gid, self._host)

    def _make_images(self, plan: Plan, package: str, identity: Identity) -> None:
        """Make the images that are not there, which may take long: the store is not locked."""
        from . import images

        sources = _image_sources(plan)
        if sources:
            self._images = plan.images
            images.make(self._name, package, sources, identity, self._directory)

    def _switch(self, after: str) -> None:
        """Have the VM's links and files name the package and its source."""
        _keep_from_collection(self._name, after, self._host)
        for kind in KINDS:
            path = f"{self._directory}/{kind}"
            if kind == self._source.kind:
                self._write(path, self._source.reference + "\n")
            else:
                try:
                    _unlink(path)
                except IsADirectoryError:
                    # It is the VM's user's, and says nothing to root.
                    pass
        if self._is_declared:
            self._write(f"{self._directory}/{DECLARED}", "")
        if after != self._before:
            self._after = after
            _make_current(self._name, after, self._host)

    def _write(self, path: str, text: str) -> None:
        if not os.path.lexists(path):
            self._made.append(path)
        _tell_moved(self._name, path, state.write(path, text))

    def _undo(self) -> None:
        """Undo what was made here, and nothing else: others may have come into the directory."""
        if self._after is not None:
            self._turn_back(self._host.current(self._name))
        is_new = self._directory in self._made
        for path in reversed(self._made):
            if path == self._directory:
                continue
            _unlink(path)
        if not is_new:
            return
        # Nobody had an image here before.
        for image in self._images:
            _remove_image(image, self._directory)
        try:
            os.rmdir(self._directory)
        except OSError:
            # Somebody has put something there meanwhile.
            return
        forget_gc_roots(self._name, self._host)

    def _turn_back(self, current: str) -> None:
        if state.pointed_to(current) != self._after:
            return
        if self._before is None:
            _unlink(current)
        else:
            state.link(current, self._before)

    def _collect(self) -> None:
        self._lock.keep("")
        collect(self._host)


def collect(host: HostPaths) -> None:
    """Delete the packages that nobody needs any more; if not now, the next install does it."""
    if not os.path.isdir(host.packages):
        return
    try:
        with store.locked(host):
            store.collect(host)
    except MicrovmHostError:
        return


def _refuse_flake_of_vms_user(flake: str, identity: Identity) -> None:
    """Check a flake in a directory of the host, which nix evaluates and builds as root."""
    path = flake.removeprefix("git+file://").removeprefix("path:").partition("?")[0]
    if not path.startswith("/") or not os.path.isdir(path):
        return
    found = trust.changeable(path, trust.suspect(identity))
    if found:
        raise MicrovmHostError(
            f"user {identity.user!r}, which runs this VM, can change this; refusing to build the "
            f"flake {flake} as root",
            path=found,
            hint="keep the flake in a directory that only root can write",
        )


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _remove_image(image: str, directory: str) -> None:
    """Remove an image that was begun in a state directory, following no link of the VM's user."""
    *parts, name = image.split("/")
    if image.startswith("/"):
        return
    opened = []
    try:
        flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        opened.append(os.open(directory, flags))
        for part in parts:
            opened.append(os.open(part, flags, dir_fd=opened[-1]))
        for ending in ("", *_UNFINISHED):
            try:
                os.unlink(f"{name}{ending}", dir_fd=opened[-1])
            except FileNotFoundError:
                continue
        for number in range(len(parts) - 1, -1, -1):
            os.rmdir(parts[number], dir_fd=opened[number])
    except OSError:
        # Not begun, or no longer what it was. It stays for people to look at.
        pass
    finally:
        for file in opened:
            os.close(file)


def _image_sources(plan: Plan) -> tuple[str, ...]:
    """What a package's images are made of."""
    return tuple(_text(plan, "share/microvm/image-sources").splitlines())


def _tell_undone(
    name: str, before: str | None, after: str, host: HostPaths, text: str | None = None
) -> None:
    """Say what a package does not do to images that are there."""
    for line in image_changes.not_done(name, before, after, host.vm(name), text=text):
        log.warning(line, vm=name)


def _text(plan: Plan, file: str) -> str:
    """A file of a package that is to be; empty if it has none."""
    try:
        return plan.tree.text(file)
    except KeyError:
        return ""


def _plan(
    path: str,
    host: HostPaths,
    others: Callable[[], Claims] | None,
    inputs: Inputs | None = None,
) -> Plan:
    """What a declaration asks for; raises MicrovmHostError."""
    from . import taken
    from .build import declared
    from .declaration import derived

    claims = taken.gather(host) if others is None else others()
    return declared.plan(
        path, claims, inputs=inputs or Inputs(host), host_id=derived.host_id(host.machine_id)
    )


def would_be(
    name: str,
    source: Source,
    host: HostPaths,
    others: Callable[[], Claims] | None = None,
    looks: Looks | None = None,
) -> str | None:
    """Where the package from a source would be, without installing it; None if only nix knows.

    Raises:
        MicrovmHostError: it cannot be had, or is wrong.
    """
    if source.kind == "flake":
        return None
    if source.kind == "runner":
        return runner.load(source.reference).path
    built = (looks or Looks(host)).unchanged(name)
    if built is not None and source.reference == host.declaration(name):
        path = built.package
    else:
        plan = _plan(source.reference, host, others)
        path = store.path_of(plan.tree, name, host)
        before, text = state.pointed_to(host.current(name)), _text(plan, image_changes.ORIGINS)
        _tell_undone(name, before, path, host, text)
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
    with install_lock.of_vm(name, host, f"rolls {name} back"), store.locked(host):
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
        _tell_undone(name, before, after, host)
        _make_current(name, after, host)
        # What is not to be installed again is what the first of several turned away from.
        store.note(name, after, host, instead_of=store.turned_away_from(name, host) or before)
    return Change(name, before, after, state.booted(name, host))


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
    link = host.build_link(name)
    os.makedirs(os.path.dirname(link), exist_ok=True)
    _nix("build", "--out-link", link, "--refresh", _output(name, flake), about=flake)
    return link


def _drop_build_link(name: str, host: HostPaths) -> None:
    try:
        os.unlink(host.build_link(name))
    except FileNotFoundError:
        pass


def _nix(verb: str, *arguments: str, about: str) -> str:
    """Run nix, which shows its progress and its errors on our standard error."""
    import subprocess

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


def _make_current(name: str, package: str, host: HostPaths) -> None:
    path = host.current(name)
    _tell_moved(name, path, state.link(path, package))


def _tell_moved(name: str, path: str, moved: str | None) -> None:
    if moved is not None:
        log.warning(f"{path}: the VM's user made a directory here; it is {moved} now", vm=name)


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
