# SPDX-License-Identifier: MIT
"""Two who install at once: one waits for the other, says for whom, and not for ever.

The other is a process of its own, which is killed in the end: what it did not finish must neither
be taken for done nor stand in the way.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from microvm_host import (
    build_record,
    install,
    install_lock,
    remove,
    runner,
    service,
    source,
    state,
    store,
    systemd,
)
from microvm_host.build import declared
from microvm_host.build.tree import File, Tree
from microvm_host.errors import MicrovmHostError, UsageError
from microvm_host.identity import Identity
from microvm_host.install_lock import Lock
from microvm_host.paths import HostPaths
from microvm_host.source import Source

from . import packages


@pytest.fixture(autouse=True)
def without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd is not asked, and owners that only root can give are not given."""
    ours = Identity("me", os.getuid(), "us", os.getgid())
    monkeypatch.setattr(service, "identity", lambda name: ours)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(state, "_is_roots", lambda status: True)


@contextmanager
def meanwhile(work: Callable[[Callable[[], None]], object]) -> Iterator[int]:
    """Another process that works until it calls what it is given, and is killed there.

    Gives its process id once it has come that far.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reader)

            def here() -> None:
                os.write(writer, b".")
                time.sleep(60)

            work(here)
        finally:
            os._exit(1)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b".", "it did not come that far"
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)


def test_who_waits_is_told_for_whom(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_lock, "PATIENCE", 0.3)
    monkeypatch.setattr(install_lock, "_QUIET", 0.1)

    def hold(here: Callable[[], None]) -> None:
        with install_lock.of_vm("web", host, "installs web"):
            here()

    with meanwhile(hold) as other:
        # Another VM is nobody's business.
        with install_lock.of_vm("db", host, "installs db"):
            pass
        lock = install_lock.of_vm("web", host, "removes web")
        with pytest.raises(MicrovmHostError) as caught, lock:
            pass
        told = f"process {other} installs web at the same time"
        assert caught.value.message == f"gave up after 0.3 s: {told}"
        assert capfd.readouterr().err == f"waiting: {told}\n"
    # The kernel gives back what a killed one held.
    with install_lock.of_vm("web", host, "installs web"):
        pass


def test_others_who_come_one_after_the_other_are_waited_for(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of a thousand VMs takes the store's lock at the first boot."""
    monkeypatch.setattr(install_lock, "PATIENCE", 0.1)
    take, looks = install_lock._take, iter(range(20))

    def is_free(file: int) -> bool:
        return next(looks) == 19 and take(file)

    monkeypatch.setattr(install_lock, "_take", is_free)
    monkeypatch.setattr(install_lock, "_holder", lambda file: str(time.monotonic()))
    began = time.monotonic()
    with store.locked(host):
        assert time.monotonic() - began > 0.3


def test_a_lock_is_roots_alone(host: HostPaths) -> None:
    with install_lock.of_vm("web", host, "installs web"):
        assert os.stat(f"{host.install_locks}/web").st_mode & 0o777 == 0o600
        assert os.stat(host.install_locks).st_mode & 0o777 == 0o700
    os.unlink(f"{host.install_locks}/web")
    os.symlink("/etc/passwd", f"{host.install_locks}/web")
    with pytest.raises(OSError), Lock(f"{host.install_locks}/web", "x"):
        pass


# ---- two installs of one name


def test_a_second_install_does_not_delete_what_the_first_made(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second looked before the first was done, and fails after it."""
    package = str(packages.minimal(root / "one"))
    load = runner.load

    def first_comes_between(path: str) -> runner.Package:
        monkeypatch.setattr(runner, "load", load)
        # Without the lock, as another tool would.
        os.makedirs(host.vm("web"), exist_ok=True)
        os.symlink(package, host.current("web"))
        Path(host.vm("web"), "disk.img").write_text("data")
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "load", first_comes_between)
    with pytest.raises(KeyboardInterrupt):
        install.create("web", Source("runner", package), host)
    assert Path(host.vm("web"), "disk.img").read_text() == "data"
    assert os.readlink(host.current("web")) == package


def test_a_failed_install_keeps_what_came_into_its_directory(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = str(packages.minimal(root / "one"))

    def fail(*_: object) -> None:
        Path(host.vm("web"), "disk.img").write_text("data")
        raise KeyboardInterrupt

    monkeypatch.setattr(state, "link", fail)
    with pytest.raises(KeyboardInterrupt):
        install.create("web", Source("runner", package), host)
    # Its own files are gone.
    assert os.listdir(host.vm("web")) == ["disk.img"]


def test_create_waits_for_an_install_and_finds_its_vm(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = str(packages.minimal(root / "one"))
    monkeypatch.setattr(install_lock, "PATIENCE", 0.2)

    def create(here: Callable[[], None]) -> None:
        monkeypatch.setattr(state, "link", lambda *_: here())
        install.create("web", Source("runner", package), host)

    with meanwhile(create):
        for call in (
            lambda: install.create("web", Source("runner", package), host),
            lambda: install.from_source("web", Source("runner", package), host),
            lambda: remove_(host),
        ):
            with pytest.raises(MicrovmHostError, match="creates web at the same time"):
                call()
    # Killed before it was done: the next one begins again.
    assert os.listdir(host.vm("web")) == ["runner"]
    assert install.create("web", Source("runner", package), host).before is None
    with pytest.raises(UsageError, match="exists already"):
        install.create("web", Source("runner", package), host)


def remove_(host: HostPaths, name: str = "web") -> None:
    """What `microvm remove` does once it has asked."""
    with remove.kept_down(name, host):
        remove.remove(name, host)


def test_a_failed_update_has_the_former_package(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = build(host, "web", 1), None

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(store, "note", fail)
        with pytest.raises(KeyboardInterrupt):
            second = build(host, "web", 2)
    assert second is None and os.readlink(host.current("web")) == first
    assert os.listdir(host.packages) == [os.path.basename(first)]


# ---- the store


def build(host: HostPaths, name: str, number: int) -> str:
    """Install a package that is told from others by a number."""
    tree = Tree.of({"bin/microvm-run": File(f"#!/bin/sh\n# {number}\n".encode(), 0o755)})
    plan = declared.Plan(tree)
    given = install._plan
    install._plan = lambda *_: plan
    try:
        found = install.from_source(
            name, Source("declaration", host.declaration(name)), host, others=dict
        )
    finally:
        install._plan = given
    return found.after


POINTS: dict[str, tuple[object, str]] = {
    "before it is put": (store, "put"),
    "before it is looked at": (runner, "load"),
    "before the directory": (state, "prepare"),
    "before the link": (state, "link"),
    "before it is noted": (store, "note"),
    "before it is recorded": (build_record, "write"),
    "before others are collected": (store, "collect"),
}


@pytest.mark.parametrize("point", POINTS)
def test_an_install_that_is_killed_is_neither_in_the_way_nor_taken_for_done(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    def stop_there(here: Callable[[], None]) -> None:
        owner, name = POINTS[point]
        monkeypatch.setattr(owner, name, lambda *_, **__: here())
        build(host, "web", 1)

    with meanwhile(stop_there):
        # Meanwhile another VM is installed, and whatever nobody needs is collected.
        if point in ("before the link", "before it is noted", "before others are collected"):
            monkeypatch.setattr(install_lock, "PATIENCE", 0.1)
            with pytest.raises(MicrovmHostError, match="changes the store"):
                build(host, "db", 1)
            monkeypatch.undo()
        else:
            build(host, "db", 1)
            if point != "before it is put":
                assert any(each.endswith("-web") for each in os.listdir(host.packages))
    monkeypatch.setattr(service, "identity", lambda name: Identity("me", 0, "us", 0))
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(state, "_is_roots", lambda status: True)
    built = build(host, "web", 1)
    assert os.readlink(host.current("web")) == built and runner.load(built)
    assert [entry.package for entry in store.history("web", host)] == [built]
    # Of a killed one, nothing is kept.
    other = build(host, "web", 2)
    assert {built, other} <= {f"{host.packages}/{each}" for each in os.listdir(host.packages)}
    assert not [each for each in os.listdir(host.packages) if each.startswith(".")]


def test_what_is_being_written_is_not_collected(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernel may be read from a network that hangs, which delays no other VM."""

    def write(here: Callable[[], None]) -> None:
        monkeypatch.setattr(os, "rename", lambda *_: here())
        build(host, "web", 1)

    def written() -> list[str]:
        return [each for each in os.listdir(host.packages) if each.startswith(".")]

    with meanwhile(write):
        build(host, "db", 1)
        assert len(written()) == 1
    build(host, "db", 2)
    assert written() == []


def test_what_is_being_installed_is_not_collected(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images are made while others put packages into the store and collect."""
    from microvm_host import images

    def make_image(here: Callable[[], None]) -> None:
        monkeypatch.setattr(install, "_image_sources", lambda plan: ("/srv/root",))
        monkeypatch.setattr(images, "make", lambda *_: here())
        build(host, "web", 1)

    with meanwhile(make_image):
        build(host, "db", 1)
        build(host, "db", 2)
        assert [each for each in os.listdir(host.packages) if each.endswith("-web")]
    # It did not become anybody's.
    build(host, "db", 3)
    assert not [each for each in os.listdir(host.packages) if each.endswith("-web")]


def test_installs_rollbacks_and_removals_at_once_lose_nothing(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes, each with a will of its own, and two VMs."""
    monkeypatch.setattr(systemd, "states", lambda *_: {})
    names = ("web", "db")
    for name in names:
        # What must never go with a VM that failed to be installed.
        build(host, name, 0)
        Path(host.vm(name), "disk.img").write_text(name)

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for number in range(25):
            name = chance.choice(names)
            match chance.randrange(4):
                case 0:
                    with suppress(MicrovmHostError):
                        install.roll_back(name, None, host)
                case 1:
                    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
                        patch.setattr(store, "note", interrupted)
                        build(host, name, number)
                case 2:
                    # A third VM comes and goes.
                    with suppress(MicrovmHostError, FileNotFoundError):
                        build(host, "gone", number)
                        remove_(host, "gone")
                case _:
                    build(host, name, number)
            # At each moment a VM has a package, and it is whole.
            assert runner.load(host.current(name))

    children = []
    for seed in range(3):
        child = os.fork()
        if not child:
            code = 1
            try:
                work(seed)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
    for name in names:
        assert Path(host.vm(name), "disk.img").read_text() == name
        assert runner.load(os.readlink(host.current(name)))
        assert all(map(os.path.isdir, store.kept(name, host)))
    build(host, "web", 99)
    assert not [each for each in os.listdir(host.packages) if each.startswith(".")]
    assert not install_lock.kept(host)


def interrupted(*_: object, **__: object) -> None:
    raise KeyboardInterrupt
