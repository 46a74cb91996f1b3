# SPDX-License-Identifier: MIT
"""Whose hands a path is in, with owners that are made up by the tests."""

from __future__ import annotations

import errno
import functools
import os
import stat
import struct
from pathlib import Path
from typing import Any

import pytest

from microvm_host import trust
from microvm_host.errors import MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.trust import Suspect

from . import packages

EVE, KVM = 1666, 77
BY_EVE = Suspect(EVE, frozenset({EVE, KVM}))


class Owners:
    """Tells of each path below a root whose it is: root's, unless it was given to somebody."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.owners: dict[str, tuple[int, int]] = {}
        self.root = str(root)
        real: dict[str, Any] = {"lstat": os.lstat, "stat": os.stat}

        def told(kind: str, path: object, **named: object) -> os.stat_result:
            if not isinstance(path, str) or named:
                # Of the tests' own machinery.
                whatever: os.stat_result = real[kind](path, **named)
                return whatever
            status = list(real[kind](path))
            key = os.path.realpath(path) if kind == "stat" else path
            status[4], status[5] = self.owners.get(key, (0, 0))
            if not path.startswith(self.root):
                # Of the machine that the tests run on, whoever may write to its /tmp.
                status[0] = stat.S_IFMT(status[0]) | 0o755
            return os.stat_result(status)

        monkeypatch.setattr(os, "lstat", functools.partial(told, "lstat"))
        monkeypatch.setattr(os, "stat", functools.partial(told, "stat"))

    def give(self, path: Path, uid: int = 0, gid: int = 0) -> None:
        self.owners[str(path)] = (uid, gid)


@pytest.fixture
def owners(root: Path, monkeypatch: pytest.MonkeyPatch) -> Owners:
    (root / "a/b/c").mkdir(parents=True)
    return Owners(root, monkeypatch)


def test_roots_own_path(root: Path, owners: Owners) -> None:
    assert trust.exchangeable(f"{root}/a/b/c", BY_EVE) is None
    # Her own directory, where she cannot move it.
    owners.give(root / "a/b/c", EVE)
    assert trust.exchangeable(f"{root}/a/b/c", BY_EVE) is None
    with pytest.raises(FileNotFoundError):
        trust.exchangeable(f"{root}/a/none", BY_EVE)


def test_what_lies_in_a_directory_of_hers(root: Path, owners: Owners) -> None:
    owners.give(root / "a", EVE)
    assert trust.exchangeable(f"{root}/a/b/c", BY_EVE) == f"{root}/a/b"
    assert trust.exchangeable(f"{root}/a", BY_EVE) is None


@pytest.mark.parametrize(
    ("gid", "mode", "safe"),
    [
        (0, 0o755, True),
        (KVM, 0o755, True),
        (KVM, 0o775, False),
        (0, 0o775, True),
        (0, 0o757, False),
        # Not the group's right, which is hers; but a process of hers may be without the group.
        (KVM, 0o757, False),
    ],
)
@pytest.mark.parametrize("sticky", [False, True])
def test_modes(root: Path, owners: Owners, gid: int, mode: int, safe: bool, sticky: bool) -> None:
    owners.give(root / "a", 0, gid)
    (root / "a").chmod(mode | (0o1000 if sticky else 0))
    found = trust.exchangeable(f"{root}/a/b/c", BY_EVE)
    assert found == (None if safe or sticky else f"{root}/a/b")
    # The sticky bit protects what is not hers.
    owners.give(root / "a/b", EVE)
    assert trust.exchangeable(f"{root}/a/b", BY_EVE) == (None if safe else f"{root}/a/b")


# ---- access control lists

OWNER, USER, GROUP_OBJ, GROUP, MASK, OTHER = 1, 2, 4, 8, 16, 32
NOBODY = 0xFFFFFFFF


def allow(path: Path, *named: tuple[int, int, int], mask: int = 7, kind: str = "access") -> None:
    """Give a directory a list: tag, permissions and number of each entry beside the usual ones."""
    entries = [(OWNER, 7, NOBODY), (GROUP_OBJ, 5, NOBODY), (MASK, mask, NOBODY), (OTHER, 5, NOBODY)]
    value = struct.pack("<I", 2)
    for entry in sorted([*entries, *named], key=lambda entry: (entry[0], entry[2])):
        value += struct.pack("<HHI", *entry)
    try:
        os.setxattr(path, f"system.posix_acl_{kind}", value)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            pytest.skip("the file system of the tests has no access control lists")
        raise


@pytest.mark.parametrize(
    ("entry", "mask", "safe"),
    [
        ((USER, 7, EVE), 7, False),
        ((USER, 2, EVE), 7, False),
        ((USER, 5, EVE), 7, True),
        ((USER, 7, EVE), 5, True),
        ((USER, 7, EVE + 1), 7, True),
        ((GROUP, 7, KVM), 7, False),
        ((GROUP, 7, KVM), 5, True),
        ((GROUP, 7, KVM + 1), 7, True),
    ],
)
@pytest.mark.parametrize("sticky", [False, True])
def test_access_control_lists(
    root: Path, owners: Owners, entry: tuple[int, int, int], mask: int, safe: bool, sticky: bool
) -> None:
    directory = root / "a"
    allow(directory, entry, mask=mask)
    directory.chmod(stat.S_IMODE(directory.stat().st_mode) | (0o1000 if sticky else 0))
    found = trust.exchangeable(f"{root}/a/b/c", BY_EVE)
    assert found == (None if safe or sticky else f"{root}/a/b")
    # What she can write herself.
    assert trust.changeable(f"{root}/a", BY_EVE) == (None if safe else f"{root}/a")


def test_the_groups_own_entry_of_a_list(root: Path, owners: Owners) -> None:
    """The mask shows where the mode has the group's bits; the group's own right is less here."""
    owners.give(root / "a", 0, KVM)
    allow(root / "a", (USER, 7, EVE + 1))
    assert stat.S_IMODE((root / "a").stat().st_mode) == 0o775
    assert trust.exchangeable(f"{root}/a/b/c", BY_EVE) is None
    allow(root / "a/b", (USER, 1, EVE))
    (root / "a/b").chmod(0o710)
    assert BY_EVE.can_enter(f"{root}/a/b", os.stat(root / "a/b"))


def test_a_list_for_what_is_made_later_allows_nothing_now(root: Path, owners: Owners) -> None:
    allow(root / "a", (USER, 7, EVE), kind="default")
    assert trust.exchangeable(f"{root}/a/b/c", BY_EVE) is None


def test_groups_of_the_unit_count(root: Path, owners: Owners) -> None:
    owners.give(root / "a", 0, KVM)
    (root / "a").chmod(0o775)
    for groups in ((), (5, KVM)):
        identity = Identity("eve-who-is-not-there", EVE, "eve", EVE, groups)
        found = trust.exchangeable(f"{root}/a/b", trust.suspect(identity))
        assert found == (f"{root}/a/b" if groups else None)
    with pytest.raises(MicrovmHostError) as caught:
        trust.refuse_exchangeable(f"{root}/a/b/c", identity, "read")
    assert str(caught.value) == (
        f"{root}/a/b: user 'eve-who-is-not-there', which runs this VM, can replace this; refusing "
        f"to read {root}/a/b/c as root; move it to a directory that only root can write"
    )


def test_a_file_system_that_she_serves(
    root: Path, owners: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE says of its files whose they are; where one may mount, it is believed by nobody."""
    directory, mounts = root / "a/b", root / "mountinfo"
    lstat = os.lstat

    def on_another(path: str, **named: object) -> os.stat_result:
        status = list(lstat(path, **named))  # type: ignore[arg-type]
        if isinstance(path, str) and path.startswith(str(directory)):
            status[2] = os.makedev(0, 77)
        return os.stat_result(status)

    monkeypatch.setattr(os, "lstat", on_another)
    monkeypatch.setattr(trust, "MOUNTS", str(mounts))
    line = (
        "40 30 0:77 / {} rw,nosuid,nodev shared:1 - {} eve rw,user_id={},group_id=0,allow_other\n"
    )
    for kind, uid, safe in (
        ("fuse.evil", EVE, False),
        ("fuse.sshfs", EVE + 1, True),
        ("fuse", 0, True),
        ("tmpfs", EVE, True),
    ):
        mounts.write_text("30 1 0:20 / / rw - ext4 /dev/vda rw\n" + line.format("/x", kind, uid))
        found = trust.exchangeable(f"{directory}/c", BY_EVE)
        assert found == (None if safe else str(directory)), kind


def test_links_are_followed_by_the_same_rules(root: Path, owners: Owners) -> None:
    (root / "hers").mkdir()
    (root / "hers/real").mkdir()
    owners.give(root / "hers", EVE)
    os.symlink("hers/real", root / "relative")
    os.symlink(root / "hers/real", root / "absolute")
    os.symlink("a/b/../../hers/real", root / "winding")
    for name in ("relative", "absolute", "winding"):
        assert trust.exchangeable(f"{root}/{name}", BY_EVE) == f"{root}/hers/real"
    os.symlink(root / "a/b", root / "hers/link")
    assert trust.exchangeable(f"{root}/hers/link", BY_EVE) == f"{root}/hers/link"
    os.symlink("loop", root / "loop")
    assert trust.exchangeable(f"{root}/loop", BY_EVE) == f"{root}/loop"


def test_root_needs_no_help(root: Path, owners: Owners) -> None:
    assert trust.exchangeable(f"{root}/a", Suspect(0, frozenset({0}))) is None
    assert trust.changeable(f"{root}/a", Suspect(0, frozenset({0}))) is None


# ---- packages


@pytest.fixture
def package(root: Path, owners: Owners) -> Path:
    package = packages.minimal(root / "packages/web")
    packages.put(package, "share/microvm/virtiofs/t/source", "/srv\n")
    return package


EVES = Identity("eve-who-is-not-there", EVE, "kvm", KVM)


def test_package_of_roots(package: Path, root: Path) -> None:
    trust.check_package(str(package), EVES)
    # Where nothing is, or something that is not read, nothing can be wrong.
    os.symlink("/nowhere", package / "share/microvm/system")
    trust.check_package(str(package), EVES)


@pytest.mark.parametrize(
    "part",
    [
        *("", "share", "share/microvm", "share/microvm/virtiofs", "share/microvm/virtiofs/t"),
        *("share/microvm/virtiofs/t/source", "bin", "bin/virtiofsd-run", ".."),
    ],
)
def test_package_with_a_part_of_eves(package: Path, owners: Owners, part: str) -> None:
    if part == "bin/virtiofsd-run":
        packages.program(package, part)
    place = (package / part).resolve()
    owners.give(place, EVE)
    with pytest.raises(
        MicrovmHostError, match=r"user 'eve.*', which runs this VM, can change this"
    ) as caught:
        trust.check_package(str(package), EVES)
    assert caught.value.path is not None and caught.value.path.startswith(str(place))


def test_package_that_links_to_what_is_eves(package: Path, owners: Owners, root: Path) -> None:
    (root / "hers").mkdir()
    (root / "hers/taps").write_text("a\n")
    os.symlink(root / "hers/taps", package / "share/microvm/tap-interfaces")
    trust.check_package(str(package), EVES)
    owners.give(root / "hers", EVE)
    with pytest.raises(MicrovmHostError) as caught:
        trust.check_package(str(package), EVES)
    assert caught.value.path == f"{root}/hers/taps"
