# SPDX-License-Identifier: MIT
"""Finds and removes what a host leaves on the machine: processes, cgroups, mounts, directories.

The hosts use it to prove that nothing of them is left, and the next host to clear up after one
whose owner was killed before it could.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.host import cache
from tests.host.interface import HostError

_NSPAWN = Path("/run/systemd/nspawn")
_UNIFIED_MOUNTS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))


# -- cgroups ------------------------------------------------------------------------------------


def _cgroup_mount() -> Path:
    for path in _UNIFIED_MOUNTS:
        if (path / "cgroup.procs").exists():
            return path
    raise HostError("no cgroup v2 tree is mounted below /sys/fs/cgroup")


def cgroup_of(pid: int) -> Path:
    """Where a process stands in the cgroup v2 tree."""
    for line in Path(f"/proc/{pid}/cgroup").read_text(encoding="utf-8").splitlines():
        if line.startswith("0::/"):
            return _cgroup_mount() / line.removeprefix("0::/")
    raise HostError(f"process {pid} is in no cgroup v2")


def make_cgroups(name: str) -> list[Path]:
    """A cgroup of the container's own, in which nspawn makes `payload` and `supervisor`.

    Two containers started from one cgroup would share these two, and with them each other's
    units: stopping a service in one would kill it in the other.
    """
    paths = [cgroup_of(os.getpid())]
    # On a legacy machine nspawn makes its two in systemd's named tree as well.
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "name=systemd":
            paths.append(Path("/sys/fs/cgroup/systemd") / path.lstrip("/"))
    made = []
    for parent in paths:
        (parent / name).mkdir(exist_ok=True)
        made.append(parent / name)
    return made


def in_cgroups_argv(cgroups: Sequence[Path], argv: Sequence[str]) -> list[str]:
    """Runs a command in these cgroups."""
    # A shell does it, as a function run between fork and exec is not safe beside threads.
    if not cgroups:
        return list(argv)
    moves = "".join(f"echo $$ >{path}/cgroup.procs && " for path in cgroups)
    return ["sh", "-c", moves + 'exec "$@"', "sh", *argv]


def _members(cgroup: Path) -> Iterator[int]:
    for directory, _, files in os.walk(cgroup):
        if "cgroup.procs" in files:
            with contextlib.suppress(OSError):
                text = (Path(directory) / "cgroup.procs").read_text(encoding="utf-8")
                yield from (int(pid) for pid in text.split())


def remove_cgroups(cgroups: Sequence[Path]) -> None:
    """Remove cgroups with all below them; they must be empty."""
    for cgroup in cgroups:
        for directory, _, _ in os.walk(cgroup, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                Path(directory).rmdir()


# -- the end ------------------------------------------------------------------------------------


def discard(work: Path, cgroups: Sequence[Path], network: str) -> None:
    """Take down what is left of a host, and raise if anything of it is still there."""
    deadline = time.monotonic() + 60
    while left := {pid for cgroup in cgroups for pid in _members(cgroup)}:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise HostError(f"processes of {work.name} do not end: {sorted(left)}")
        time.sleep(0.01)
    remove_cgroups(cgroups)
    while mounts := _mounts_of(work):
        subprocess.run(["umount", "--", mounts[-1]], capture_output=True)
        if _mounts_of(work) == mounts:
            if time.monotonic() > deadline:
                raise HostError(f"still mounted: {mounts}")
            time.sleep(0.05)
    # nspawn leaves its directories where it cannot tell that /run is kept in memory, and where it
    # was killed.
    for place in ("propagate", "unix-export"):
        with contextlib.suppress(OSError):
            (_NSPAWN / place / work.name).rmdir()
    # Interfaces live and die with their network namespace, and that with its last process.
    while network and (holders := _holders_of_network(network)):
        if time.monotonic() > deadline:
            raise HostError(
                f"the network of {work.name}, and all interfaces in it, is held by {holders}"
            )
        time.sleep(0.01)


def _mounts_of(work: Path) -> list[str]:
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    points = [line.split()[4] for line in table]
    # From 256 on nspawn mounts a directory for sockets outside as well.
    outside = f"{_NSPAWN}/unix-export/{work.name}"
    return [point for point in points if point.startswith(f"{work}/") or point == outside]


def _holders_of_network(network: str) -> list[int]:
    holders = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(entry / "ns" / "net") == network:
                    holders.append(int(entry.name))
    return holders


def clean() -> list[str]:
    """Remove hosts whose owner was killed before it could; returns their names.

    A host's directory holds a lock for as long as its owner lives, so one that can be taken
    proves that nobody is left to stop the host in order.
    """
    cleaned: list[str] = []
    for work in cache.abandoned():
        _end_qemu(work)
        if (work / "tree").is_dir():
            named = [path for path in _cgroup_mount().rglob(work.name) if path.is_dir()]
            named += Path("/sys/fs/cgroup/systemd").rglob(work.name)
            discard(work, named, "")
        shutil.rmtree(work)
        cleaned.append(work.name)
    return cleaned


def _end_qemu(work: Path) -> None:
    """End the QEMU of a host whose owner is gone, if it still is that QEMU."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((work / "pid").read_text(encoding="utf-8"))
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if work.name.encode() in command:  # a pid may have gone to somebody else
            os.kill(pid, signal.SIGKILL)


def session_members(session: int) -> list[int]:
    """The processes of a session."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                stat = (entry / "stat").read_text(encoding="utf-8", errors="replace")
                if int(stat.rpartition(")")[2].split()[3]) == session:
                    members.append(int(entry.name))
    return members
