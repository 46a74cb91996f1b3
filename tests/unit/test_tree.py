# SPDX-License-Identifier: MIT
"""Packages are written whole or not at all, and with the same bytes each time."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from microvm_host.build.tree import Copy, File, Link, Tree
from microvm_host.errors import MicrovmHostError

BLOB = b"a kernel" * 1000


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    (tmp_path / "blob").write_bytes(BLOB)
    blob = Copy(str(tmp_path / "blob"), sha256(BLOB).hexdigest())
    return Tree.of(
        {
            "bin/run": File(b"#!/bin/sh\n", 0o755),
            "share/microvm/virtiofs/a/b/source": File(b"/srv\n"),
            "share/microvm/system": Link("/nix/store/x"),
            "lib/kernel": blob,
            "lib/initrd": Copy(blob.source, blob.sha256, is_private=True),
        }
    )


def on_disk(directory: Path) -> dict[str, tuple[int, bytes]]:
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        mode = path.lstat().st_mode & 0o7777
        if path.is_symlink():
            found[name] = (0, os.readlink(path).encode())
        elif path.is_file():
            found[name] = (mode, path.read_bytes())
        else:
            found[name] = (mode, b"")
    return found


def test_what_is_written(tree: Tree, tmp_path: Path) -> None:
    mask = os.umask(0o077)
    try:
        tree.write(str(tmp_path / "out"))
    finally:
        os.umask(mask)
    found = on_disk(tmp_path / "out")
    assert found["bin/run"] == (0o755, b"#!/bin/sh\n")
    assert found["lib/kernel"] == (0o644, BLOB)
    # Who may not read it there may not read it here.
    assert found["lib/initrd"] == (0o640, BLOB)
    assert found["share/microvm/system"] == (0, b"/nix/store/x")
    assert {mode for name, (mode, data) in found.items() if (tmp_path / "out" / name).is_dir()} == {
        0o755
    }
    assert sorted(os.listdir(tmp_path)) == ["blob", "out"]
    tree.write(str(tmp_path / "again"))
    assert on_disk(tmp_path / "again") == found


def test_digest_tells_everything_apart(tree: Tree) -> None:
    entries = dict(tree.entries)
    variants = [
        {**entries, "bin/run": File(b"#!/bin/sh\n", 0o644)},
        {**entries, "bin/run": File(b"#!/bin/bash\n", 0o755)},
        {**entries, "bin/other": File(b"#!/bin/sh\n", 0o755)},
        {**entries, "share/microvm/system": Link("/nix/store/y")},
        {**entries, "lib/kernel": Copy("/elsewhere", "0" * 64)},
        {**entries, "lib/initrd": entries["lib/kernel"]},
    ]
    digests = {Tree.of(each).digest for each in variants}
    assert len(digests) == len(variants)
    assert tree.digest not in digests
    # The same file by another name is the same.
    moved = Copy("/elsewhere", sha256(BLOB).hexdigest())
    assert Tree.of({**entries, "lib/kernel": moved}).digest == tree.digest
    assert Tree.of(dict(reversed(entries.items()))) == tree


def test_a_directory_that_has_something_is_left_alone(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(MicrovmHostError, match="out: the package cannot be written: "):
        tree.write(str(tmp_path / "out"))
    assert on_disk(tmp_path / "out") == {"mine": (0o644, b"x")}
    assert sorted(os.listdir(tmp_path)) == ["blob", "out"]


def test_an_empty_directory_is_filled(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    tree.write(str(tmp_path / "out"))
    assert (tmp_path / "out/bin/run").exists()


def test_a_file_that_changed_meanwhile(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "blob").write_bytes(b"another")
    with pytest.raises(MicrovmHostError, match="blob: was changed while it was copied"):
        tree.write(str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["blob"]


def test_the_same_content_is_linked(tree: Tree, tmp_path: Path) -> None:
    tree.write(str(tmp_path / "one"))
    tree.write(str(tmp_path / "two"), same=lambda copy: str(tmp_path / "one/lib/kernel"))
    kernels = [(tmp_path / each / "lib/kernel").stat() for each in ("one", "two")]
    assert kernels[0].st_ino == kernels[1].st_ino
    # Not what is private, which has an owner.
    assert (tmp_path / "two/lib/initrd").stat().st_ino != kernels[0].st_ino
    # One that is gone meanwhile is copied.
    tree.write(str(tmp_path / "three"), same=lambda copy: "/nonexistent")
    assert (tmp_path / "three/lib/kernel").read_bytes() == BLOB


# What writing calls, each of which may fail: a full disk, above all.
CALLS = ["mkdir", "chmod", "open", "symlink", "fdopen", "fchmod", "fchown", "fsync", "rename"]


class _Fails:
    """Stands for a function of `os`, and fails at the n-th call of any of them."""

    def __init__(self, at: int, error: BaseException) -> None:
        self.count = 0
        self.at = at
        self.error = error

    def around(self, real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            self.count += 1
            if self.count == self.at:
                raise self.error
            return real(*arguments, **named)

        return call


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_failure_anywhere_leaves_nothing(
    tree: Tree, tmp_path: Path, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = 0
    while True:
        at += 1
        fails = _Fails(at, error)
        with monkeypatch.context() as patch:
            for name in CALLS:
                patch.setattr(os, name, fails.around(getattr(os, name)))
            patch.setattr(shutil, "copyfile", fails.around(shutil.copyfile))
            try:
                tree.write(str(tmp_path / "out"))
                failed = False
            except (MicrovmHostError, OSError, KeyboardInterrupt):
                failed = True
        if not failed:
            break
        # Whole, where it failed after the rename, or not there at all.
        left = sorted(os.listdir(tmp_path))
        if "out" in left:
            assert len(on_disk(tmp_path / "out")) == 12
            shutil.rmtree(tmp_path / "out")
        assert [each for each in left if each != "out"] == ["blob"], f"call {at}"
    assert at > 40
    assert sorted(os.listdir(tmp_path)) == ["blob", "out"]
