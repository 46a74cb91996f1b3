# SPDX-License-Identifier: MIT
"""Where packages come from, and what of it is remembered."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import source
from microvm_host.errors import NameInvalid
from microvm_host.source import Source, is_from_declaration, remembered


@pytest.mark.parametrize(
    ("kind", "reference"),
    [
        ("runner", "/nix/store/x"),
        ("runner", "/path with space"),
        ("flake", "git+file:///etc/nixos"),
        ("flake", "/etc/nixos"),
        ("flake", "github:a/b?ref=main"),
    ],
)
def test_right(kind: str, reference: str) -> None:
    given = Source(kind, reference)
    assert given.checked() is given
    assert str(given) == f"{kind} {reference}"


@pytest.mark.parametrize(
    ("kind", "reference", "message"),
    [
        ("runner", "", "is empty or not printable"),
        ("runner", "a/b", "is not an absolute path"),
        ("runner", "/a\nb", "not printable"),
        ("flake", "", "is empty"),
        ("flake", "x#y", "has a '#'"),
        ("flake", "--impure", "looks like an option"),
        ("flake", "a\0b", "not printable"),
    ],
)
def test_wrong(kind: str, reference: str, message: str) -> None:
    with pytest.raises(NameInvalid, match=message):
        Source(kind, reference).checked()


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of this user count as root's."""
    roots = source._is_roots_file
    monkeypatch.setattr(
        source,
        "_is_roots_file",
        lambda status: roots(os.stat_result((*status[:4], 0, *status[5:10]))),
    )


@pytest.mark.usefixtures("as_root")
def test_remembered(tmp_path: Path) -> None:
    assert remembered(str(tmp_path)) is None
    (tmp_path / "flake").write_text("git+file:///etc/nixos\n")
    assert remembered(str(tmp_path)) == Source("flake", "git+file:///etc/nixos")
    (tmp_path / "runner").write_text("/srv/runner\n")
    assert remembered(str(tmp_path)) == Source("runner", "/srv/runner")


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("kind", ["fifo", "link", "directory", "garbage"])
def test_remembered_bears_with_anything(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "runner"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        (tmp_path / "x").write_text("/x")
        os.symlink("x", path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.write_bytes(b"\xff\xfe\0" * 10000)
    found = remembered(str(tmp_path))
    if kind == "garbage":
        assert found is not None
        with pytest.raises(NameInvalid):
            found.checked()
    else:
        assert found is None


def test_only_root_says_that_a_vm_was_declared(tmp_path: Path) -> None:
    assert not is_from_declaration(str(tmp_path))
    (tmp_path / "declared").touch()
    if os.geteuid() == 0:
        assert is_from_declaration(str(tmp_path))
        os.chown(tmp_path / "declared", 12345, -1)
    assert not is_from_declaration(str(tmp_path))


def test_remembers_only_what_is_roots(tmp_path: Path) -> None:
    # The VM's user may make this file where a flake's name is what root wrote.
    (tmp_path / "runner").write_text("/home/mallory/package\n")
    if os.geteuid() == 0:
        os.chown(tmp_path / "runner", 12345, -1)
    assert remembered(str(tmp_path)) is None
