# SPDX-License-Identifier: MIT
"""Which sources are read with root's right: those that the VM's user can do nothing with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import images
from microvm_host.trust import Suspect

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="takes root's files")

BY = Suspect(61002, frozenset({61003}))


@pytest.fixture
def closed(root: Path) -> Path:
    """A directory that others cannot enter, with a source and an archive in it."""
    root.chmod(0o755)
    directory = root / "closed"
    (directory / "source/tmp").mkdir(parents=True)
    (directory / "source/tmp").chmod(0o1777)
    (directory / "source.tar").write_text("")
    directory.chmod(0o700)
    return directory


def is_out_of_reach(path: Path) -> bool:
    return images._is_out_of_reach(str(path), BY)


def test_closed_ones_are(closed: Path) -> None:
    assert is_out_of_reach(closed / "source")
    assert is_out_of_reach(closed / "source.tar")
    (closed.parent / "link").symlink_to(closed / "source")
    assert is_out_of_reach(closed.parent / "link")
    # By its own mode alone.
    closed.chmod(0o755)
    (closed / "source").chmod(0o750)
    assert is_out_of_reach(closed / "source")
    # An archive has no inside that could be changed while it is read.
    assert is_out_of_reach(closed / "source.tar")


def test_open_ones_are_not(closed: Path) -> None:
    closed.chmod(0o755)
    # They may put links into its tmp.
    assert not is_out_of_reach(closed / "source")
    os.chown(closed / "source", 0, 61003)
    (closed / "source").chmod(0o750)
    assert not is_out_of_reach(closed / "source")
    assert not is_out_of_reach(closed / "none")


def test_their_own_are_not(closed: Path) -> None:
    (closed / "source.tar").chmod(0o666)
    assert not is_out_of_reach(closed / "source.tar")
    theirs = closed.parent / "theirs"
    theirs.mkdir()
    os.chown(theirs, 61002, 61003)
    (theirs / "link").symlink_to(closed / "source")
    assert not is_out_of_reach(theirs / "link")
