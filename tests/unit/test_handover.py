# SPDX-License-Identifier: MIT
"""Handing files of root's to the VM's user, and taking them back. Needs root to chown."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from microvm_host import handover, reconcile
from microvm_host.errors import MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths, private_file
from microvm_host.record import Record
from microvm_host.runner import PrivateFile

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root hands files over")

WEB = Identity("microvm-web", 61002, "microvm-web", 61003)


@pytest.fixture
def record(host: HostPaths) -> Record:
    return Record(host.record("web", handover.WHAT))


@pytest.fixture
def secret(root: Path) -> Path:
    path = root / "etc/secret key"
    path.parent.mkdir()
    path.write_text("secret")
    path.chmod(0o600)
    return path


def run(host: HostPaths, record: Record, *sources: str) -> None:
    files = [PrivateFile(f"file{number}", source) for number, source in enumerate(sources)]
    handover.hand_over("web", files, WEB, record, host)


def test_for_its_user_alone_and_for_a_while(host: HostPaths, record: Record, secret: Path) -> None:
    for text in ("secret", "another"):
        # Once more without an end between, as after a helper that was killed.
        secret.write_text(text)
        run(host, record, str(secret))
        there = Path(host.at(private_file("web", "file0")))
        assert there.read_text() == text
        status = os.lstat(there)
        assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (61002, 61003, 0o400)
        directory = os.lstat(there.parent)
        assert (directory.st_uid, stat.S_IMODE(directory.st_mode)) == (0, 0o711)
        assert record.read() == [["files", str(there.parent)]]
    handover.take_back("web", record, host)
    assert not there.parent.exists() and not os.path.exists(record.path)
    handover.take_back("web", record, host)


def test_reconcile_takes_it_back(host: HostPaths, record: Record, secret: Path) -> None:
    run(host, record, str(secret))
    (found,) = reconcile._records(host)["web"]
    assert found.describe().endswith(f"of private files {host.private('web')}")
    assert found.undo(host) == []
    assert not os.path.exists(host.private("web")) and not os.path.exists(record.path)


def test_noted_before_anything_is_there(host: HostPaths, record: Record, root: Path) -> None:
    with pytest.raises(MicrovmHostError, match="No such file or directory"):
        run(host, record, f"{root}/none")
    # What undoes a start that failed goes by this.
    assert record.read() == [["files", host.private("web")]]


def test_what_is_not_handed_over(host: HostPaths, record: Record, root: Path, secret: Path) -> None:
    os.mkfifo(root / "fifo")
    big = root / "big"
    big.write_bytes(bytes(handover.SIZE_MAX + 1))
    theirs = root / "theirs"
    theirs.mkdir()
    os.chown(theirs, WEB.uid, WEB.gid)
    (theirs / "link").symlink_to(secret)
    for path, said in (
        (root / "fifo", "no regular file"),
        (root, "no regular file"),
        (big, "larger than 1024 KiB"),
        (theirs / "link", "user 'microvm-web', which runs this VM, can replace this"),
    ):
        with pytest.raises(MicrovmHostError, match=said):
            run(host, record, str(path))
        assert os.listdir(host.private("web")) == []
    big.write_bytes(bytes(handover.SIZE_MAX))
    run(host, record, str(big))
    assert os.path.getsize(host.at(private_file("web", "file0"))) == handover.SIZE_MAX
