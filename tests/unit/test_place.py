# SPDX-License-Identifier: MIT
"""Files of root's below a state directory: what is on the way to them, and what has their name."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from microvm_host import place
from microvm_host.errors import MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.place import Place

# Who runs the tests may give away to themselves alone.
ALICE = Identity("alice", os.getuid(), "alice", os.getgid())


@pytest.fixture(autouse=True)
def roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs the tests stands for root."""
    monkeypatch.setattr(place, "ROOT", os.getuid())


@pytest.fixture
def state(root: Path) -> Path:
    state = root / "state"
    state.mkdir()
    return state


def bind(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


def is_open() -> set[str]:
    return {os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


@pytest.mark.parametrize("inner", ["", "/", "/a//b", "/../b", "/a/../b", "/./b", "/a/.", "2/a"])
def test_no_place(state: Path, inner: str) -> None:
    with pytest.raises(ValueError, match="is no plain path below"):
        Place(f"{state}{inner}", str(state))


def test_directories(state: Path) -> None:
    path = state / "a/b/c.sock"
    with Place(str(path), str(state)) as its:
        mask = os.umask(0)
        try:
            its.make_directories()
        finally:
            os.umask(mask)
        assert mode(state / "a") == mode(state / "a/b") == 0o755
        # They are there already.
        its.make_directories()
        assert str(state / "a/b") in is_open()
    assert not any(each.startswith(str(state)) for each in is_open())
    with Place(str(path), str(state)) as its:
        its.make_directories()
        bind(path)
        its.remove_socket()
        its.remove_directories()
    assert list(state.iterdir()) == []


def test_directories_that_are_made_half(state: Path) -> None:
    """Whoever made them was killed, when it had made the first."""
    (state / "a").mkdir(0o755)
    with Place(f"{state}/a/b/c.sock", str(state)) as its:
        its.remove_socket()
        its.remove_directories()
    assert list(state.iterdir()) == []


def test_a_directory_that_is_in_use_stays(state: Path) -> None:
    (state / "a/b").mkdir(0o755, parents=True)
    (state / "a/other").touch()
    with Place(f"{state}/a/b/c.sock", str(state)) as its:
        its.remove_directories()
    assert [path.name for path in (state / "a").iterdir()] == ["other"]


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "writable"])
@pytest.mark.parametrize("inner", ["run/c.sock", "run/b/c.sock", "first/run/c.sock"])
def test_what_is_no_directory_of_roots(state: Path, root: Path, kind: str, inner: str) -> None:
    (root / "elsewhere/b").mkdir(parents=True)
    for each in ("c.sock", "b/c.sock"):
        bind(root / "elsewhere" / each)
    (state / "first").mkdir(0o755)
    run = state / "run" if inner.startswith("run") else state / "first/run"
    if kind in ("link", "dangling"):
        run.symlink_to(root / ("elsewhere" if kind == "link" else "nowhere"))
    elif kind == "file":
        run.touch()
    else:
        os.rename(root / "elsewhere", run)
        run.chmod(0o775)
    with Place(f"{state}/{inner}", str(state)) as its:
        for do in (its.make_directories, its.reserve, lambda: its.give(ALICE)):
            with pytest.raises(MicrovmHostError, match="not a directory of root's alone") as caught:
                do()
            assert caught.value.path == str(run)
        its.remove_socket()
        its.remove_file()
        its.remove_directories()
    there = run if kind == "writable" else root / "elsewhere"
    assert (there / "c.sock").is_socket() and (there / "b/c.sock").is_socket()
    assert not (root / "nowhere").exists()
    assert not any(each.startswith(str(root)) for each in is_open())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
def test_a_directory_of_another_user(state: Path) -> None:
    (state / "run").mkdir(0o755)
    bind(state / "run/c.sock")
    os.chown(state / "run", 12345, -1)
    with Place(f"{state}/run/c.sock", str(state)) as its:
        with pytest.raises(MicrovmHostError, match="not a directory of root's alone"):
            its.make_directories()
        its.remove_socket()
    assert (state / "run/c.sock").is_socket()


def test_a_directory_that_is_exchanged_while_it_is_open(state: Path, root: Path) -> None:
    """Which nobody but root could; what is done goes to the one that was looked at."""
    (root / "elsewhere").mkdir()
    bind(root / "elsewhere/c.sock")
    with Place(f"{state}/run/c.sock", str(state)) as its:
        its.make_directories()
        bind(state / "run/c.sock")
        os.rename(state / "run", root / "moved")
        (state / "run").symlink_to(root / "elsewhere")
        its.remove_socket()
        assert list((root / "moved").iterdir()) == []
        its.reserve()
        assert (root / "moved/c.sock").is_file()
    assert (root / "elsewhere/c.sock").is_socket()


def test_what_is_removed(state: Path) -> None:
    kinds: tuple[tuple[Callable[[Path], object], bool, bool], ...] = (
        (bind, True, False),
        (lambda path: path.touch(), False, True),
        (lambda path: path.symlink_to("/etc/passwd"), False, False),
        (lambda path: path.mkdir(), False, False),
        (lambda path: os.mkfifo(path), False, False),
    )
    for make, as_socket, as_file in kinds:
        for method, goes in (("remove_socket", as_socket), ("remove_file", as_file)):
            path = state / "x"
            make(path)
            with Place(str(path), str(state)) as its:
                getattr(its, method)()
            assert os.path.lexists(path) is not goes
            if not goes:
                path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_not_removed(state: Path) -> None:
    path = state / "x.pid"
    path.touch()
    os.chown(path, 12345, -1)
    with Place(str(path), str(state)) as its:
        its.remove_file()
    assert path.exists()


@pytest.mark.parametrize("kind", ["nothing", "link", "hard link", "fifo", "socket", "file"])
def test_reserving(state: Path, root: Path, kind: str) -> None:
    path, other = state / "x.pid", root / "other"
    other.write_text("of somebody else's")
    plant: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "link": lambda: path.symlink_to(other),
        "hard link": lambda: os.link(other, path),
        "fifo": lambda: os.mkfifo(path),
        "socket": lambda: bind(path),
        "file": lambda: path.write_text("of an earlier run"),
    }
    plant[kind]()
    with Place(str(path), str(state)) as its:
        its.reserve()
    status = path.lstat()
    assert stat.S_ISREG(status.st_mode) and status.st_nlink == 1
    assert path.read_text() == ("of an earlier run" if kind == "file" else "")
    assert other.read_text() == "of somebody else's"


def test_reserving_where_a_directory_is(state: Path) -> None:
    (state / "x.pid").mkdir()
    wanted = pytest.raises(MicrovmHostError, match="is in the way of what root is to write there")
    with Place(f"{state}/x.pid", str(state)) as its, wanted:
        its.reserve()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives directories away")
def test_reserving_where_a_directory_of_the_vms_user_is(state: Path) -> None:
    (state / "x.pid/inner").mkdir(parents=True)
    os.chown(state / "x.pid", 61002, 61003)
    with Place(f"{state}/x.pid", str(state)) as its:
        its.reserve()
    assert (state / "x.pid").is_file()
    (moved,) = state.glob("x.pid.moved.*/inner")
    assert moved.is_dir()


def test_giving(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = state / "run/x.sock"
    with Place(str(path), str(state)) as its:
        its.make_directories()
        bind(path)
        path.chmod(0o777)
        given: list[tuple[str, int, int]] = []
        monkeypatch.setattr(
            os, "chown", lambda path, uid, gid: given.append((os.readlink(path), uid, gid))
        )
        its.give(ALICE)
    assert mode(path) == 0o600
    assert given == [(str(path), ALICE.uid, ALICE.gid)]


@pytest.mark.parametrize("kind", ["nothing", "link", "link to a socket", "hard link", "file"])
def test_giving_what_is_no_socket_of_roots(state: Path, root: Path, kind: str) -> None:
    path, file, other = state / "x.sock", root / "file", root / "other.sock"
    file.touch(0o644)
    bind(other)
    other.chmod(0o644)
    plant: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "link": lambda: path.symlink_to(file),
        "link to a socket": lambda: path.symlink_to(other),
        "hard link": lambda: os.link(other, path),
        "file": lambda: path.touch(0o644),
    }
    plant[kind]()
    wanted = pytest.raises(MicrovmHostError, match="is to be a socket of root's, but is none")
    with Place(str(path), str(state)) as its, wanted:
        its.give(ALICE)
    assert mode(file) == mode(other) == 0o644


def test_a_socket_that_is_listened_at(state: Path, root: Path) -> None:
    path = state / "run/a.sock"
    path.parent.mkdir(mode=0o755)

    def is_listened_at() -> bool:
        with Place(str(path), str(state)) as its:
            return its.is_listened_at()

    assert not is_listened_at()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.setblocking(False)
        before = is_open()
        assert is_listened_at()
        assert is_open() == before
        # virtiofsd ends when the first who connects has gone.
        with pytest.raises(BlockingIOError):
            listener.accept()
        os.link(path, state / "run/second")
        assert not is_listened_at()
        os.unlink(state / "run/second")
        os.rename(path, root / "moved.sock")
        os.symlink(root / "moved.sock", path)
        assert not is_listened_at()
        os.unlink(path)
        os.rename(root / "moved.sock", path)
        assert is_listened_at()
    assert not is_listened_at()
    path.unlink()
    path.write_text("no socket")
    assert not is_listened_at()
    path.unlink()
    path.parent.chmod(0o777)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        assert not is_listened_at()
