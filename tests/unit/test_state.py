# SPDX-License-Identifier: MIT
"""The state directory and its links. Owners that only root can give are for the tests on hosts."""

from __future__ import annotations

import os
import stat
import struct
from pathlib import Path

import pytest

from microvm_host import source, state
from microvm_host.errors import MicrovmHostError, PackageError
from microvm_host.paths import HostPaths


def test_link_replaces_links_and_files(tmp_path: Path) -> None:
    path = str(tmp_path / "current")
    state.link(path, "/a")
    assert os.readlink(path) == "/a"
    state.link(path, "/b")
    assert os.readlink(path) == "/b"
    os.unlink(path)
    Path(path).write_text("a file")
    state.link(path, "/c")
    assert os.readlink(path) == "/c"
    assert os.listdir(tmp_path) == ["current"]


def test_link_does_not_follow(tmp_path: Path) -> None:
    (tmp_path / "directory").mkdir()
    state.link(str(tmp_path / "current"), str(tmp_path / "directory"))
    state.link(str(tmp_path / "current"), "/b")
    assert os.listdir(tmp_path / "directory") == []


def test_link_does_not_replace_a_directory(tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    with pytest.raises(MicrovmHostError, match="cannot be replaced"):
        state.link(str(tmp_path / "current"), "/a")
    assert os.listdir(tmp_path) == ["current"]


@pytest.mark.skipif(os.geteuid() != 0, reason="gives away directories")
def test_prepare_removes_what_a_former_owner_allowed(host: HostPaths) -> None:
    """A list for files made later would have their user write to root's notes."""
    directory = host.vm("web")
    os.mkdir(directory)
    entries = ((1, 7, -1), (2, 7, 61002), (4, 5, -1), (16, 7, -1), (32, 7, -1))
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    try:
        for kind in ("access", "default"):
            os.setxattr(directory, f"system.posix_acl_{kind}", value)
    except OSError as error:
        pytest.skip(f"the file system of the tests has no access control lists: {error}")
    # Even before they are removed, and whatever the umask.
    note = f"{directory}/runner"
    state.write(note, "/srv/package\n")
    assert stat.S_IMODE(os.stat(note).st_mode) == 0o644
    assert source.remembered(directory) == source.Source("runner", "/srv/package")
    os.chmod(note, 0o664)
    assert source.remembered(directory) is None
    os.chown(directory, 61002, 61003)
    state.prepare("web", 61003, host)
    assert not [each for each in os.listxattr(directory) if "posix_acl" in each]


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a directory of another user's")
def test_what_root_makes_where_the_vms_user_made_a_directory(tmp_path: Path) -> None:
    for name in ("current", "flake"):
        directory = tmp_path / name
        (directory / "inner").mkdir(parents=True)
        os.chown(directory, 61002, 61003)
        if name == "current":
            moved = state.link(str(directory), "/a")
            assert os.readlink(directory) == "/a"
        else:
            moved = state.write(str(directory), "text")
            assert directory.read_text() == "text"
        assert moved is not None and moved.startswith(f"{directory}.moved.")
        assert os.listdir(moved) == ["inner"]
    assert len(os.listdir(tmp_path)) == 4


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a directory of another user's")
def test_a_directory_that_is_made_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "current"
    replace = os.replace

    def late(source: str, target: str) -> None:
        path.mkdir(exist_ok=True)
        os.chown(path, 61002, 61003)
        replace(source, target)

    monkeypatch.setattr(os, "replace", late)
    with pytest.raises(MicrovmHostError, match="again and again"):
        state.link(str(path), "/a")
    assert not any(name.startswith(".") for name in os.listdir(tmp_path))


def test_link_is_there_all_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "current")
    state.link(path, "/old")
    replaced: list[str] = []
    replace = os.replace

    def look_and_replace(source: str, target: str) -> None:
        # Up to the one stroke the former link stands, and the new one is whole beside it.
        assert os.readlink(target) == "/old"
        assert os.readlink(source) == "/new"
        assert os.path.dirname(source) == os.path.dirname(target)
        replace(source, target)
        replaced.append(target)

    monkeypatch.setattr(os, "replace", look_and_replace)
    state.link(path, "/new")
    assert replaced == [path]
    assert os.readlink(path) == "/new"


def test_pointed_to(tmp_path: Path) -> None:
    assert state.pointed_to(str(tmp_path / "none")) is None
    (tmp_path / "file").write_text("")
    assert state.pointed_to(str(tmp_path / "file")) is None
    os.symlink("/nowhere", tmp_path / "dangling")
    assert state.pointed_to(str(tmp_path / "dangling")) == "/nowhere"


def test_check_current_without_vm(host: HostPaths) -> None:
    with pytest.raises(PackageError) as caught:
        state.check_current("web", host)
    assert str(caught.value) == (
        f"{host.current('web')}: there is no microVM web; "
        "`microvm create web --runner PATH` makes one"
    )


def test_check_current_without_package(host: HostPaths) -> None:
    os.mkdir(host.vm("web"))
    with pytest.raises(PackageError, match="microVM web has no package"):
        state.check_current("web", host)


def test_check_current_that_is_no_link(host: HostPaths) -> None:
    os.makedirs(host.current("web"))
    with pytest.raises(PackageError, match="is not a link to a runner package"):
        state.check_current("web", host)


def test_check_current_of_whom(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkdir(host.vm("web"))
    os.symlink("/p", host.current("web"))
    if os.geteuid() == 0:
        state.check_current("web", host)
        os.lchown(host.current("web"), 12345, -1)
    with pytest.raises(MicrovmHostError, match="does not belong to root") as caught:
        state.check_current("web", host)
    assert caught.value.exit_code == 1
    assert caught.value.hint.endswith(f"chown -h root '{host.current('web')}'")


def test_check_current_with_another_name(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that root made, and that somebody put here too."""
    os.mkdir(host.vm("web"))
    os.symlink("/p", f"{host.state}/other")
    os.link(f"{host.state}/other", host.current("web"), follow_symlinks=False)
    if os.geteuid() == 0:
        with pytest.raises(MicrovmHostError, match="has another name elsewhere"):
            state.check_current("web", host)


@pytest.mark.skipif(os.geteuid() != 0, reason="makes links of others")
def test_booted_is_roots_word(host: HostPaths) -> None:
    os.mkdir(host.vm("web"))
    assert state.booted("web", host) is None
    os.symlink("/p", host.booted("web"))
    assert state.booted("web", host) == "/p"
    os.lchown(host.booted("web"), 12345, -1)
    assert state.booted("web", host) is None


def owned_by_root(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Take the change of owner down instead of doing it, which takes root."""
    given: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "fchown", lambda _fd, uid, gid: given.append((uid, gid)))
    return given


def test_prepare_makes_the_directory(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    given = owned_by_root(monkeypatch)
    state.prepare("web", 54321, host)
    assert given == [(0, 54321)]
    assert stat.S_IMODE(os.stat(host.vm("web")).st_mode) == 0o1771 == state.DIRECTORY_MODE


def test_prepare_mends_the_mode_and_keeps_content(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    owned_by_root(monkeypatch)
    os.mkdir(host.vm("web"), 0o777)
    Path(host.vm("web"), "disk.img").write_text("data")
    was_anothers = os.geteuid() != 0 or os.stat(host.vm("web")).st_gid != os.getgid()
    assert state.prepare("web", os.getgid(), host) is was_anothers
    assert state.prepare("web", os.getgid() + 1, host)
    assert stat.S_IMODE(os.stat(host.vm("web")).st_mode) == 0o1771
    assert Path(host.vm("web"), "disk.img").read_text() == "data"


@pytest.mark.parametrize("kind", ["link", "file", "dangling"])
def test_prepare_refuses_what_is_no_directory(host: HostPaths, kind: str, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if kind == "file":
        Path(host.vm("web")).write_text("")
    else:
        os.symlink(tmp_path / ("elsewhere" if kind == "link" else "none"), host.vm("web"))
    with pytest.raises(MicrovmHostError, match="is to be the VM's directory, but is none"):
        state.prepare("web", os.getgid(), host)
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o700
