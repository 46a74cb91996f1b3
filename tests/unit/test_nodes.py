# SPDX-License-Identifier: MIT
"""Device nodes: claimed for udev, handed over at once, released."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from microvm_host import names, nodes
from microvm_host.errors import MicrovmHostError, NameInvalid
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.record import Record, holders

ALICE = Identity("alice", 1001, "users", 100)
BOB = Identity("bob", 1002, "kvm", 99)


def claims(host: HostPaths) -> dict[str, str]:
    directory = Path(host.node_owner("any")).parent
    return {path.name: path.read_text() for path in directory.iterdir()}


# ---- claims


def test_claim_is_what_udev_imports(host: HostPaths) -> None:
    nodes.claim("tap7", ALICE, host)
    assert claims(host) == {"tap7": "MICROVM_NODE_USER=1001\nMICROVM_NODE_GROUP=100\n"}


def test_everybody_may_read(host: HostPaths) -> None:
    old = os.umask(0o022)
    try:
        nodes.claim("12", ALICE, host)
    finally:
        os.umask(old)
    path = host.node_owner("12")
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o644
    assert stat.S_IMODE(os.stat(os.path.dirname(path)).st_mode) == 0o755


@pytest.mark.parametrize(
    ("subsystem", "name"), [("macvtap", "tap7"), ("vfio", "12"), ("vfio-dev", "vfio0")]
)
def test_udev_is_told_once_the_claim_is_there(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch, subsystem: str, name: str
) -> None:
    event = Path(host.uevent(subsystem, name))
    event.parent.mkdir(parents=True)
    event.write_text("")
    renamed: list[str] = []
    rename = os.rename

    def watched(source: str, target: str) -> None:
        renamed.append(event.read_text())
        rename(source, target)

    monkeypatch.setattr(os, "rename", watched)
    nodes.claim(name, ALICE, host)
    assert renamed == [""]
    assert event.read_text() == "change"


def test_later_claim_replaces_the_former_at_one_stroke(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes.claim("12", ALICE, host)
    seen = []
    write = os.write

    def watched(file: int, data: bytes) -> int:
        seen.append(Path(host.node_owner("12")).read_text())
        return write(file, data)

    monkeypatch.setattr(os, "write", watched)
    nodes.claim("12", BOB, host)
    # What was there before stood there, whole, until what is to be was.
    assert seen == ["MICROVM_NODE_USER=1001\nMICROVM_NODE_GROUP=100\n"]
    assert claims(host) == {"12": "MICROVM_NODE_USER=1002\nMICROVM_NODE_GROUP=99\n"}


def test_link_in_the_way_is_not_followed(host: HostPaths, root: Path) -> None:
    nodes.claim("vfio0", ALICE, host)
    (root / "elsewhere").write_text("")
    # Where it is being written, which the rename does not take away.
    os.symlink(root / "elsewhere", host.node_owner("12.new"))
    with pytest.raises(MicrovmHostError, match="cannot be claimed for alice") as caught:
        nodes.claim("12", ALICE, host)
    assert caught.value.path == host.node_owner("12")
    assert (root / "elsewhere").read_text() == ""


def test_claim_while_another_vm_releases_the_last(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    makedirs, directory = os.makedirs, os.path.dirname(host.node_owner("tap7"))
    removed: list[str] = []

    def and_removed(path: str, mode: int = 0o777, *, exist_ok: bool = False) -> None:
        makedirs(path, mode, exist_ok=exist_ok)
        if path == directory and not removed:
            removed.append(path)
            os.rmdir(path)

    monkeypatch.setattr(os, "makedirs", and_removed)
    nodes.claim("tap7", ALICE, host)
    assert removed
    assert list(claims(host)) == ["tap7"]


def test_release_leaves_the_others(host: HostPaths) -> None:
    nodes.claim("12", ALICE, host)
    nodes.claim("13", BOB, host)
    nodes.release("12", host)
    assert list(claims(host)) == ["13"]


def test_nothing_is_left_of_the_last(host: HostPaths) -> None:
    nodes.claim("tap7", ALICE, host)
    nodes.release("tap7", host)
    assert os.listdir(host.records) == []


def test_release_of_what_was_never_claimed(host: HostPaths) -> None:
    nodes.release("tap7", host)
    nodes.claim("12", ALICE, host)
    nodes.release("tap7", host)
    assert list(claims(host)) == ["12"]


def test_release_after_a_claim_was_cut_short(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            nodes.claim("tap7", ALICE, host)
    assert list(claims(host)) != []
    nodes.release("tap7", host)
    assert os.listdir(host.records) == []


def test_release_that_fails(host: HostPaths) -> None:
    os.makedirs(host.node_owner("tap7"))
    with pytest.raises(MicrovmHostError, match="cannot be released: Is a directory") as caught:
        nodes.release("tap7", host)
    assert caught.value.path == host.node_owner("tap7")


# ---- beside the records of VMs


def test_no_vm_has_the_directorys_name(host: HostPaths) -> None:
    directory = os.path.basename(os.path.dirname(host.node_owner("12")))
    assert os.path.dirname(host.record(directory, "x")) == os.path.dirname(host.node_owner("12"))
    with pytest.raises(NameInvalid):
        names.vm_name(directory)


def test_claims_are_taken_for_nobodys_record(host: HostPaths) -> None:
    nodes.claim("12", ALICE, host)
    Record(host.record("web", "pci-devices")).append("device", "0000:01:00.0")
    assert holders(host.records, "pci-devices", ("device", "0000:01:00.0")) == ["web"]
    # Nor by their own content, whatever is looked for.
    assert holders(host.records, "12", ("device", "0000:01:00.0")) == []


# ---- nodes


@pytest.fixture
def changes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What is done to nodes, without the right to do it."""
    done: list[tuple[object, ...]] = []
    monkeypatch.setattr(os, "chmod", lambda path, mode: done.append(("chmod", path, mode)))
    monkeypatch.setattr(
        os,
        "chown",
        lambda path, uid, gid, *, follow_symlinks: done.append(
            ("chown", path, uid, gid, follow_symlinks)
        ),
    )
    return done


def test_hand_over(changes: list[tuple[object, ...]]) -> None:
    nodes.hand_over("/dev/null", ALICE)
    assert changes == [("chmod", "/dev/null", 0o600), ("chown", "/dev/null", 1001, 100, False)]


@pytest.mark.parametrize("what", ["link", "file", "directory", "fifo"])
def test_hand_over_of_what_is_no_device(
    root: Path, changes: list[tuple[object, ...]], what: str
) -> None:
    path = root / "tap7"
    if what == "link":
        path.symlink_to("/dev/null")
    elif what == "file":
        path.write_text("")
    elif what == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(MicrovmHostError, match="is to be a device node, but is none") as caught:
        nodes.hand_over(str(path), ALICE)
    assert caught.value.path == str(path)
    assert changes == []


def test_hand_over_of_what_has_gone(root: Path) -> None:
    with pytest.raises(MicrovmHostError, match="cannot be given to alice: No such file") as caught:
        nodes.hand_over(str(root / "tap7"), ALICE)
    assert caught.value.path == str(root / "tap7")
