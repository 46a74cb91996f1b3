# SPDX-License-Identifier: MIT
"""Handing files over, in a directory where the former user has laid traps. Needs root to chown."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from microvm_host import adopt
from microvm_host.errors import MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")

FORMER, OTHER = 61000, 61001
WEB = Identity("microvm-web", 61002, "microvm-web", 61003)


@pytest.fixture
def web(host: HostPaths) -> Path:
    directory = Path(host.vm("web"))
    directory.mkdir()
    os.chown(directory, FORMER, FORMER)
    return directory


def put(path: Path, uid: int = FORMER, mode: int = 0o644) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("data")
    path.chmod(mode)
    os.chown(path, uid, uid)
    os.chmod(path, mode)
    return path


def owner(path: Path) -> tuple[int, int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)


def run(host: HostPaths, former: int = FORMER) -> adopt.Adoption:
    return adopt.adopt("web", former, WEB, host)


def test_files_of_the_former_user_change_hands(host: HostPaths, web: Path) -> None:
    disk, tool = put(web / "disk.img"), put(web / "tool", mode=0o6755)
    put(web / "sub/inner", mode=0o666)
    os.chown(web / "sub", FORMER, FORMER)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{web}/web.sock")
    os.mkfifo(web / "fifo")
    for name in ("web.sock", "fifo"):
        os.chown(web / name, FORMER, FORMER)
    found = run(host)
    assert found.left == ()
    assert list(found.given) == ["disk.img", "fifo", "sub", "sub/inner", "tool", "web.sock"]
    assert owner(web) == (0, WEB.gid, 0o1771)
    assert owner(disk) == (WEB.uid, WEB.gid, 0o600)
    # Nothing is left of setuid, and nothing to anybody else.
    assert owner(tool) == (WEB.uid, WEB.gid, 0o700)
    assert owner(web / "sub")[:2] == (WEB.uid, WEB.gid)
    assert owner(web / "sub/inner") == (WEB.uid, WEB.gid, 0o600)
    assert disk.read_text() == "data"
    # Once more, nothing is left to do.
    assert run(host) == adopt.Adoption((), ())


def test_links_are_given_and_not_followed(host: HostPaths, web: Path, root: Path) -> None:
    for name, uid in (("theirs", FORMER), ("roots", 0)):
        target = put(root / f"outside-{name}/file", uid)
        os.chown(target.parent, uid, uid)
        os.symlink(target, web / f"file-{name}")
        os.symlink(target.parent, web / f"directory-{name}")
        for kind in ("file", "directory"):
            os.lchown(web / f"{kind}-{name}", FORMER, FORMER)
    found = run(host)
    assert len(found.given) == 4
    assert owner(web / "file-roots")[:2] == (WEB.uid, WEB.gid)
    for name, uid in (("theirs", FORMER), ("roots", 0)):
        assert owner(root / f"outside-{name}/file") == (uid, uid, 0o644)
        assert owner(root / f"outside-{name}")[:2] == (uid, uid)


def test_what_has_another_name_stays(host: HostPaths, web: Path, root: Path) -> None:
    """It may be a disk of another VM whose user was the same, or a file that is only readable."""
    for name, uid in (("other-vm.img", FORMER), ("shadow", 0), ("bobs", OTHER)):
        put(root / "outside" / name, uid)
        os.link(root / "outside" / name, web / name)
    found = run(host)
    assert found.given == ()
    for name, uid in (("other-vm.img", FORMER), ("shadow", 0), ("bobs", OTHER)):
        assert owner(root / "outside" / name) == (uid, uid, 0o644)
    assert any(line.startswith("other-vm.img: has another name") for line in found.left)


def test_what_is_not_the_former_users_stays(host: HostPaths, web: Path) -> None:
    os.symlink("/srv", web / "current")
    put(web / "runner", 0)
    put(web / "bobs", OTHER)
    # In a directory of root's the former user has files, too.
    put(web / "roots/inner")
    os.mknod(web / "node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.chown(web / "node", FORMER, FORMER)
    found = run(host)
    assert list(found.given) == ["roots/inner"]
    assert list(found.left) == [f"bobs: belongs to another user, {OTHER}", "node: is a device"]
    assert owner(web / "current")[0] == owner(web / "runner")[0] == owner(web / "roots")[0] == 0
    assert owner(web / "node")[0] == FORMER


def test_a_name_cannot_command_the_terminal(host: HostPaths, web: Path) -> None:
    put(web / "\x1b[2Jx", OTHER)
    (line,) = run(host).left
    assert line.startswith("'\\x1b[2Jx': ")


def test_a_tree_without_end_is_cut(host: HostPaths, web: Path) -> None:
    deep = web
    for _ in range(adopt.DEPTH_MAX + 20):
        deep = deep / "d"
        deep.mkdir()
        os.chown(deep, FORMER, FORMER)
    found = run(host)
    assert len(found.given) == adopt.DEPTH_MAX
    assert found.left[0].endswith(f"is nested more than {adopt.DEPTH_MAX} deep")


def test_nothing_of_roots_can_be_asked_for(host: HostPaths, web: Path) -> None:
    with pytest.raises(MicrovmHostError, match="what is root's is not given away"):
        run(host, 0)


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_is_no_directory(host: HostPaths, root: Path, kind: str) -> None:
    put(root / "outside/file")
    if kind == "link":
        os.symlink(root / "outside", host.vm("web"))
    else:
        put(Path(host.vm("web")))
    with pytest.raises(MicrovmHostError, match="is to be the VM's directory"):
        run(host)
    assert owner(root / "outside/file")[0] == FORMER
