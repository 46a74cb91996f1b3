# SPDX-License-Identifier: MIT
"""Mounts are seen and never entered; real ones, in a mount namespace of the test's own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from microvm_host import mounts
from microvm_host.paths import HostPaths

REPOSITORY = Path(__file__).parents[2]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts")


def mountinfo(host: HostPaths, *lines: str) -> None:
    path = Path(host.mounts)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"36 35 98:0 / {line}\n" for line in lines))


def apart(shell: str, code: str) -> subprocess.CompletedProcess[str]:
    """Mount by a shell and run Python in a mount namespace that ends with it."""
    return subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f'{shell}\nexec "$@"', "sh"]
        + [sys.executable, "-B", "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def test_mount_points_below_a_directory(host: HostPaths) -> None:
    web = host.vm("web")
    os.mkdir(web)
    assert mounts.below(web, host) == []
    mountinfo(
        host,
        "/ rw shared:1 - ext4 /dev/sda1 rw",
        f"{web}-2/a rw - tmpfs tmpfs rw",
        f"{web}/b\\040c\\134d rw - tmpfs tmpfs rw",
        f"{web}/a rw master:1 - ext4 /dev/sda1 rw",
    )
    assert mounts.below(web, host) == [f"{web}/a", f"{web}/b c\\d"]
    assert not mounts.is_mount_point(web, host)
    # By whatever link it is called.
    os.symlink(web, host.at("/link"))
    assert mounts.below(host.at("/link"), host) == [f"{web}/a", f"{web}/b c\\d"]
    mountinfo(host, f"{web} rw - autofs systemd-1 rw", f"{web} rw - ext4 /dev/sdb rw")
    assert mounts.below(web, host) == []
    assert mounts.is_mount_point(host.at("/link"), host)
    assert mounts.mount_points(host) == {web: "ext4"}


def test_a_tree_is_deleted_and_links_are_not_followed(root: Path) -> None:
    outside, tree = root / "outside", root / "tree"
    outside.mkdir()
    (outside / "file").write_text("data")
    deep = tree
    for _ in range(300):
        deep = deep / "d"
    deep.mkdir(parents=True)
    (deep / "file").write_text("data")
    (tree / "link").symlink_to(outside)
    os.mkfifo(tree / "fifo")
    os.link(outside / "file", tree / "hard")
    mounts.remove_tree(str(tree))
    assert not tree.exists()
    assert (outside / "file").read_text() == "data"


@needs_root
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_bind_mount_of_the_same_file_system_is_not_emptied(root: Path, kind: str) -> None:
    source, target = root / "source", root / "tree/target"
    for directory in (source, target.parent):
        directory.mkdir()
    if kind == "directory":
        target.mkdir()
        (source / "file").write_text("data")
    else:
        source.rmdir()
        source.write_text("data")
        target.write_text("")
    done = apart(
        f"mount --bind {source} {target}",
        f"from microvm_host import mounts; mounts.remove_tree({str(target.parent)!r})",
    )
    assert done.returncode == 1
    assert "is a mount point" in done.stderr or "Device or resource busy" in done.stderr
    kept = source / "file" if kind == "directory" else source
    assert kept.read_text() == "data"


@needs_root
def test_a_mount_that_appears_while_files_change_hands_is_left(host: HostPaths, root: Path) -> None:
    web, source = Path(host.vm("web")), root / "source"
    for directory in (source, web, web / "data"):
        directory.mkdir()
        os.chown(directory, 61000, 61000)
    for file in (source / "file", web / "disk.img"):
        file.write_text("data")
        os.chown(file, 61000, 61000)
    done = apart(
        f"mount --bind {source} {web}/data",
        f"""
from microvm_host import adopt
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
# As if it had been mounted after the check.
adopt.check = lambda *_: None
found = adopt.adopt("web", 61000, Identity("w", 61002, "w", 61003), HostPaths({host.root!r}))
print(found.given, found.left)
""",
    )
    assert done.stdout == "('disk.img',) ('data: lies on another mount',)\n", done.stderr
    assert (source / "file").stat().st_uid == source.stat().st_uid == 61000
