# SPDX-License-Identifier: MIT
"""Mounts what paths lie on, where systemd has a mount unit for it, before anything is made there.

Boot does not wait for mounts with `nofail`, nor for those of the network behind it, and an
administrator may have some mounted on demand. Whoever is quicker sees the directory below: an empty
share, a disk that is missing and would be made again. RequiresMountsFor= is systemd's word for such
paths, but they stand in packages, which systemd does not read; so a start compares them with the
mount units itself (fstab's are among them, systemd-fstab-generator(8)), and has systemd start those
that are needed.

Mostly all of them are mounted, and then nothing but a few directories is read. What is mounted
otherwise, by a service or by hand, is nobody's to wait for.
"""

from __future__ import annotations

import os

from . import bus, log, mounts, names
from .errors import MicrovmHostError, NameInvalid
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .paths import HostPaths

_SUFFIX = ".mount"
# A mounted file system may hold a link to another, and so on.
_ROUNDS = 10
_POLL = 0.1  # seconds


@frozen
class MountUnit:
    """A mount unit, and the directory that it mounts something on."""

    name: str
    where: str

    def carries(self, path: str) -> bool:
        """Whether a path lies on what this unit mounts."""
        return path == self.where or path.startswith(f"{self.where}/")


def missing(host: HostPaths) -> list[MountUnit]:
    """The mount units of this host whose file systems are not mounted, outer ones first."""
    found: dict[str, str] = {}
    for directory in host.unit_directories():
        try:
            files = os.listdir(directory)
        except OSError:
            continue
        for file in files:
            if file.endswith(_SUFFIX):
                # The first directory that has a unit is the one that counts.
                found.setdefault(file, f"{directory}/{file}")
    if not found:
        return []
    mounted = mounts.mount_points(host)
    units = []
    for file, path in found.items():
        try:
            where = host.at("/" + names.unescape(file.removesuffix(_SUFFIX)).strip("/"))
        except NameInvalid:
            continue
        # An automount point waits for somebody to go there, which virtiofsd does not.
        if mounted.get(where, "autofs") == "autofs" and not _is_masked(path):
            units.append(MountUnit(file, where))
    return sorted(units, key=lambda unit: unit.where)


def _is_masked(path: str) -> bool:
    try:
        return os.path.realpath(path) == os.devnull or os.stat(path).st_size == 0
    except OSError:
        return True


def require(name: str, paths: Callable[[], Iterable[str]], host: HostPaths) -> bool:
    """Have mounted what a VM's state directory and other paths of it lie on.

    Args:
        name: of the VM.
        paths: gives the absolute paths, once more after each mount: what is mounted may be or hold
            a link that leads elsewhere.

    Returns:
        Whether further paths have to be looked at: False if all of the host is mounted.

    Raises:
        MicrovmHostError: something cannot be mounted; it names the unit.
    """
    for _ in range(_ROUNDS):
        units = missing(host)
        needed = _needed(name, units, paths, host) if units else []
        if not needed:
            return bool(units)
        for unit, path in needed:
            _mount(unit, path, name, host)
    raise MicrovmHostError("has mounts below mounts without an end", path=needed[0][1])


def _needed(
    name: str, units: list[MountUnit], paths: Callable[[], Iterable[str]], host: HostPaths
) -> list[tuple[MountUnit, str]]:
    """The units that carry something of a VM, each with the path that it carries."""
    state = os.path.realpath(host.vm(name))
    found: dict[MountUnit, str] = {}
    for unit in units:
        # What is mounted in the state directory is the VM's, whatever names it.
        if unit.carries(state) or unit.where.startswith(f"{state}/"):
            found[unit] = unit.where
    for path in paths():
        for each in (os.path.normpath(path), os.path.realpath(path)):
            for unit in units:
                if unit.carries(each):
                    found.setdefault(unit, path)
    return [(unit, found[unit]) for unit in units if unit in found]


def _mount(unit: MountUnit, path: str, name: str, host: HostPaths) -> None:
    # Loaded by the few starts that have to wait.
    import time

    from . import process

    waiting = f"waiting for {unit.where} to be mounted, which {path} lies on"
    log.notice(waiting, vm=name)
    why = ""
    try:
        process.output(["systemctl", "start", "--no-block", "--", unit.name], errors=True)
        while True:
            state, (job, _) = bus.properties(
                host.systemd_private_socket,
                bus.unit(unit.name),
                ("Unit", "ActiveState"),
                ("Unit", "Job"),
            )
            if mounts.mount_points(host).get(unit.where, "autofs") != "autofs":
                return
            if not job and state != "activating":
                why = f"{unit.name} is {state}"
                break
            log.waiting(waiting)
            time.sleep(_POLL)
    except MicrovmHostError as error:
        why = error.message
    raise MicrovmHostError(
        f"lies on {unit.where}, which is not mounted: {why}",
        path=path,
        hint=f"`systemctl status {unit.name}` tells why",
    )
