# SPDX-License-Identifier: MIT
"""`current` is brought up to date all or not at all; nix is a stand-in that speaks two verbs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from microvm_host import install, remove, service, source, state
from microvm_host.errors import MicrovmHostError, PackageError, UsageError
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.source import Source

from . import packages

# It notes how it was called, and gives what the test says: NIX_RESULT is the "store" path, and
# without it the build fails.
FAKE_NIX = """#!/bin/sh
printf '%s\\n' "$*" >>"$NIX_CALLS"
[ "$1 $2" = "--extra-experimental-features nix-command flakes" ] || exit 64
shift 2
if [ -z "$NIX_RESULT" ]; then echo "error: builder failed" >&2; exit 1; fi
case $1 in
build) [ "$2" = --out-link ] || exit 64; ln -sfn "$NIX_RESULT" "$3" ;;
eval) [ "$2" = --raw ] || exit 64; printf '%s' "$NIX_RESULT" ;;
*) exit 64 ;;
esac
"""
FLAKE = Source("flake", "/etc/nixos")


@pytest.fixture(autouse=True)
def without_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd is not asked, and owners that only root can give are not given."""
    ours = Identity("me", os.getuid(), "us", os.getgid())
    monkeypatch.setattr(service, "identity", lambda name: ours)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(state, "_is_roots", lambda status: True)


@pytest.fixture
def calls(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Puts the stand-in into $PATH; gives what it was called with so far."""
    packages.program(root, "fake/nix", FAKE_NIX)
    monkeypatch.setenv("PATH", f"{root}/fake:/usr/bin:/bin")
    monkeypatch.setenv("NIX_CALLS", str(root / "calls"))
    return lambda: (root / "calls").read_text().splitlines() if (root / "calls").exists() else []


@pytest.fixture
def one(root: Path) -> str:
    return str(packages.minimal(root / "packages/one"))


@pytest.fixture
def two(root: Path) -> str:
    return str(packages.minimal(root / "packages/two"))


def snapshot(directory: str) -> dict[str, str]:
    """All that is in a state directory."""
    found = {}
    for name in sorted(os.listdir(directory)):
        path = Path(directory, name)
        found[name] = os.readlink(path) if path.is_symlink() else path.read_text()
    return found


# ---- from a path


@pytest.mark.parametrize("inside", [(), ("lost+found",)])
def test_create_takes_an_empty_directory(
    host: HostPaths, one: str, root: Path, inside: tuple[str, ...]
) -> None:
    """Such as the mount point of a file system that was made for the VM."""
    web = Path(host.vm("web"))
    web.mkdir()
    for name in inside:
        (web / name).mkdir()
    with pytest.raises(PackageError):
        install.create("web", Source("runner", str(root / "none")), host)
    assert sorted(os.listdir(web)) == sorted(inside)
    assert install.create("web", Source("runner", one), host).before is None
    assert os.readlink(web / "current") == one


@pytest.mark.parametrize("inside", ["disk.img", ".hidden", "link"])
def test_create_takes_nothing_that_has_files(
    host: HostPaths, one: str, root: Path, inside: str
) -> None:
    web = Path(host.vm("web"))
    if inside == "link":
        (root / "elsewhere").mkdir()
        web.symlink_to(root / "elsewhere")
    else:
        web.mkdir()
        (web / inside).write_text("data")
    with pytest.raises(UsageError, match="exists already"):
        install.create("web", Source("runner", one), host)


def test_create(host: HostPaths, one: str) -> None:
    change = install.create("web", Source("runner", one), host)
    assert change.describe() == f"web: installed {one}"
    assert (change.is_new, change.wants_restart) == (True, False)
    assert snapshot(host.vm("web")) == {"current": one, "runner": f"{one}\n"}
    assert os.stat(host.vm("web")).st_mode & 0o7777 == 0o1771


def test_create_twice(host: HostPaths, one: str, two: str) -> None:
    install.create("web", Source("runner", one), host)
    with pytest.raises(UsageError, match="microVM web exists already") as caught:
        install.create("web", Source("runner", two), host)
    assert caught.value.exit_code == 2
    assert snapshot(host.vm("web"))["current"] == one


@pytest.mark.parametrize("kind", ["missing", "no package", "wrong", "killed"])
def test_create_leaves_nothing_on_failure(
    host: HostPaths, one: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: type[BaseException] = PackageError
    if kind == "missing":
        one = "/nonexistent"
    elif kind == "no package":
        os.unlink(f"{one}/bin/microvm-run")
    elif kind == "wrong":
        packages.put(Path(one), "share/microvm/tap-interfaces", "vm%d\n")
    else:
        expected = KeyboardInterrupt

        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(state, "link", interrupt)
    with pytest.raises(expected):
        install.create("web", Source("runner", one), host)
    assert os.listdir(host.state) == []


def test_update(host: HostPaths, one: str, two: str) -> None:
    install.create("web", Source("runner", one), host)
    Path(host.vm("web"), "disk.img").write_text("data")
    os.symlink(one, host.booted("web"))
    change = install.from_source("web", Source("runner", two), host)
    assert change.describe() == f"web: updated from {one} to {two}"
    assert (change.is_new, change.wants_restart) == (True, True)
    assert snapshot(host.vm("web")) == {
        "booted": one,
        "current": two,
        "disk.img": "data",
        "runner": f"{two}\n",
    }
    again = install.from_source("web", Source("runner", two), host)
    assert again.describe() == f"web: up to date ({two})"
    # What runs is still the former.
    assert (again.is_new, again.wants_restart) == (False, True)


def test_a_path_is_remembered_as_given_and_resolved(host: HostPaths, one: str, two: str) -> None:
    link = host.at("/latest")
    os.symlink(one, link)
    install.create("web", Source("runner", link), host)
    assert snapshot(host.vm("web")) == {"current": one, "runner": f"{link}\n"}
    os.unlink(link)
    os.symlink(two, link)
    remembered = source.remembered(host.vm("web"))
    assert remembered is not None
    install.from_source("web", remembered, host)
    assert os.readlink(host.current("web")) == two


def test_that_it_was_declared_is_remembered(host: HostPaths, one: str, two: str) -> None:
    install.from_source("web", Source("runner", one), host, is_declared=True)
    assert source.is_from_declaration(host.vm("web"))
    install.create("by-hand", Source("runner", one), host)
    assert not source.is_from_declaration(host.vm("by-hand"))
    # An update by hand does not change whose it is.
    for name in ("web", "by-hand"):
        install.from_source(name, Source("runner", two), host)
    assert source.is_from_declaration(host.vm("web"))
    assert not source.is_from_declaration(host.vm("by-hand"))


def test_failed_update_leaves_everything(host: HostPaths, one: str) -> None:
    install.create("web", Source("runner", one), host)
    before = snapshot(host.vm("web"))
    with pytest.raises(PackageError):
        install.from_source("web", Source("runner", "/nonexistent"), host)
    assert snapshot(host.vm("web")) == before


def test_what_is_remembered_is_not_written_through_a_link(
    host: HostPaths, one: str, two: str
) -> None:
    # The VM's user may make files in that directory.
    install.create("web", Source("runner", one), host)
    victim = Path(host.at("/victim"))
    victim.write_text("untouched")
    os.unlink(f"{host.vm('web')}/runner")
    os.symlink(victim, f"{host.vm('web')}/runner")
    os.symlink(victim, f"{host.vm('web')}/runner.{os.getpid()}")
    install.from_source("web", Source("runner", two), host)
    assert victim.read_text() == "untouched"
    os.unlink(f"{host.vm('web')}/runner.{os.getpid()}")
    assert snapshot(host.vm("web")) == {"current": two, "runner": f"{two}\n"}


@pytest.mark.skipif(os.geteuid() != 0, reason="makes directories of another user's")
def test_directories_of_the_vms_user_keep_root_from_nothing(
    host: HostPaths, one: str, two: str, capfd: pytest.CaptureFixture[str]
) -> None:
    install.create("web", Source("runner", one), host)
    taken = (*source.KINDS, source.DECLARED, "current", ".build")
    for name in taken:
        path = f"{host.vm('web')}/{name}"
        if os.path.lexists(path):
            os.unlink(path)
        os.mkdir(path)
        os.chown(path, 61002, 61003)
    change = install.from_source("web", Source("runner", two), host, is_declared=True)
    assert change.after == two
    assert os.readlink(host.current("web")) == two
    assert Path(f"{host.vm('web')}/runner").read_text() == f"{two}\n"
    assert source.is_from_declaration(host.vm("web"))
    said = capfd.readouterr().err
    assert f"{host.vm('web')}/runner: the VM's user made a directory here" in said


@pytest.mark.skipif(os.geteuid() != 0, reason="gives away directories")
def test_what_the_vms_user_chose_is_not_followed(
    host: HostPaths, one: str, two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run their VM by a package of root's, and could choose another of root's."""
    eve = Identity("eve-who-is-not-there", 61002, "eve", 61003, (61004,))
    monkeypatch.setattr(service, "identity", lambda name: eve)
    for each in Path(host.root).resolve().parents:
        if each.stat().st_mode & 0o022 and not each.stat().st_mode & 0o1000:
            pytest.skip(f"everybody may write to {each}")
    os.chmod(host.root, 0o755)
    theirs = Path(host.at("/theirs"))
    theirs.mkdir()
    os.symlink(one, theirs / "result")
    (theirs / "flake.nix").write_text("{}")
    install.create("web", Source("runner", str(theirs / "result")), host)
    for uid, gid, mode in ((61002, 0, 0o755), (0, 61003, 0o775), (0, 61004, 0o770)):
        os.chown(theirs, uid, gid)
        theirs.chmod(mode)
        with pytest.raises(MicrovmHostError, match="can replace this; refusing to follow it"):
            install.from_source("web", Source("runner", str(theirs / "result")), host)
        for flake in (f"{theirs}", f"path:{theirs}", f"git+file://{theirs}?ref=main"):
            with pytest.raises(MicrovmHostError, match="refusing to build the flake"):
                install.from_source("web", Source("flake", flake), host)
        assert os.readlink(host.current("web")) == one
    os.makedirs(host.declarations, exist_ok=True)
    (theirs / "web.toml").write_text(f'runner = "{two}"\n')
    os.symlink(theirs / "web.toml", host.declaration("web"))
    with pytest.raises(MicrovmHostError, match="can replace this; refusing to read"):
        install.update("web", host)
    assert os.readlink(host.current("web")) == one


# ---- from a flake


def test_build(
    host: HostPaths, one: str, calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIX_RESULT", one)
    change = install.create("web.1", FLAKE, host)
    assert change.after == one
    assert snapshot(host.vm("web.1")) == {"current": one, "flake": "/etc/nixos\n"}
    output = '/etc/nixos#nixosConfigurations."web.1".config.microvm.declaredRunner'
    assert calls() == [
        "--extra-experimental-features nix-command flakes build "
        f"--out-link {host.build_link('web.1')} --refresh {output}"
    ]


def test_failed_build_leaves_the_old_current(
    host: HostPaths,
    one: str,
    calls: Callable[[], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("NIX_RESULT", one)
    install.create("web", FLAKE, host)
    before = snapshot(host.vm("web"))
    monkeypatch.setenv("NIX_RESULT", "")
    with pytest.raises(MicrovmHostError, match="nix could not build /etc/nixos: it ended with 1"):
        install.from_source("web", FLAKE, host)
    assert snapshot(host.vm("web")) == before
    # What nix said stands above.
    assert "error: builder failed" in capfd.readouterr().err


@pytest.mark.usefixtures("calls")
def test_build_of_what_is_no_package(
    host: HostPaths, one: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIX_RESULT", one)
    install.create("web", FLAKE, host)
    before = snapshot(host.vm("web"))
    (root / "nixos-system").mkdir()
    monkeypatch.setenv("NIX_RESULT", str(root / "nixos-system"))
    with pytest.raises(PackageError, match=r"has no bin/microvm-run"):
        install.from_source("web", FLAKE, host)
    assert snapshot(host.vm("web")) == before


@pytest.mark.usefixtures("calls")
def test_failed_build_of_a_new_vm_leaves_nothing(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIX_RESULT", "")
    with pytest.raises(MicrovmHostError):
        install.create("web", FLAKE, host)
    assert os.listdir(host.state) == []
    assert not os.path.exists(host.gc_roots)


def test_without_nix(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(MicrovmHostError, match="this host has no nix") as caught:
        install.create("web", FLAKE, host)
    assert "give a package by --runner" in caught.value.hint


@pytest.mark.usefixtures("calls")
def test_from_flake_to_path(
    host: HostPaths, one: str, two: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIX_RESULT", one)
    install.create("web", FLAKE, host)
    install.from_source("web", Source("runner", two), host)
    assert snapshot(host.vm("web")) == {"current": two, "runner": f"{two}\n"}


def test_evaluate(calls: Callable[[], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIX_RESULT", "/nix/store/x")
    assert install.evaluate("web", "/etc/nixos") == "/nix/store/x"
    assert calls()[0].endswith(
        ' eval --raw /etc/nixos#nixosConfigurations."web".config.microvm.declaredRunner.outPath'
    )


# ---- roots of the garbage collector


def test_roots_are_kept_for_the_store_alone(host: HostPaths, one: str) -> None:
    install.create("web", Source("runner", one), host)
    assert not os.path.exists(host.gc_roots)
    install._keep_from_collection("web", "/nix/store/x-microvm", host)
    install._keep_from_collection("web", "/nix/store/y-microvm", host)
    assert snapshot(host.gc_roots) == {
        "booted-web": host.booted("web"),
        "web": host.current("web"),
    }


def test_remove(host: HostPaths, one: str) -> None:
    for name in ("web", "web-2"):
        install.create(name, Source("runner", one), host)
        install._keep_from_collection(name, "/nix/store/x-microvm", host)
    Path(host.vm("web"), "disk.img").write_text("data")
    remove.remove("web", host)
    assert os.listdir(host.state) == ["web-2"]
    assert sorted(os.listdir(host.gc_roots)) == ["booted-web-2", "web-2"]
    # The package is not ours to delete.
    assert os.path.exists(one)
