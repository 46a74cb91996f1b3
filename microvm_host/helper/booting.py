# SPDX-License-Identifier: MIT
"""The first step and the last: a package becomes the booted one, and is that no more."""

from __future__ import annotations

import os

from .. import log
from ..record import Record, remove_files
from . import booted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..paths import HostPaths
    from ..runner import Package


def set_booted(name: str, host: HostPaths) -> None:
    """Check all of the package and make it the booted one: the rest of the start reads that."""
    from .. import mount_units, runner, service, state, trust

    may_lack = mount_units.require(name, lambda: [os.path.realpath(host.current(name))], host)
    state.check_current(name, host)
    package = runner.load(host.current(name))
    identity = service.identity(name)
    trust.check_package(package.path, identity)
    if may_lack:
        from .. import package_paths

        by = trust.suspect(identity)
        mount_units.require(name, lambda: package_paths.named_by(package, by), host)
    if state.prepare(name, identity.gid, host):
        log.notice(
            f"the state directory is {identity.group}'s from now on; if disks in it are a former "
            f"user's, `microvm adopt {name}` hands them over",
            vm=name,
        )
    # The links on the way from `current` say which package it is. Only now is its directory root's.
    trust.refuse_exchangeable(host.current(name), identity, "follow")
    _check_images(package, host.vm(name))
    noted = booted.record(name, host)
    noted.clear()
    booted.note_identity(noted, identity)
    noted.append("stop-timeout", f"{service.stop_timeout(name):.6f}".replace("inf", "infinity"))
    if package.hypervisor is not None:
        noted.append("hypervisor", package.hypervisor)
    if package.control_socket is not None:
        noted.append("control", package.control_socket.protocol, package.control_socket.path)
    if package.event_log is not None:
        noted.append("event-log", package.event_log)
    for file in package.temporary_files:
        noted.append("temporary", file)
    _note_readiness(package, noted, name)
    if package.private_files:
        from .. import handover

        private = Record(host.record(name, handover.WHAT))
        handover.hand_over(name, package.private_files, identity, private, host)
    moved = state.link(host.booted(name), package.path)
    if moved is not None:
        log.warning(f"the VM's user made a directory `booted`; it is {moved} now", vm=name)
    log.status(f"checked {package.path}")


def _check_images(package: Package, directory: str) -> None:
    """Refuse an image of another format than the hypervisor takes it for."""
    if not package.images:
        return
    from .. import image_format
    from ..errors import PackageError

    for image in package.images:
        path = os.path.join(directory, image.path)
        if wrong := image_format.mismatch(path, image.format):
            raise PackageError(wrong, path=path, hint=image_format.hint(path, image.format))


def _note_readiness(package: Package, noted: Record, name: str) -> None:
    """Note down how the VM may be waited for; those that cannot be pay nothing for it."""
    socket = package.notify_socket
    if socket is None:
        return
    from .. import service

    noted.append("readiness", package.readiness)
    if socket.path is not None:
        noted.append("notify", "unix", socket.path)
    else:
        kind = "stream" if socket.is_stream else "seqpacket"
        noted.append("notify", "vsock", str(socket.port), str(package.vsock_cid), kind)
    seconds = service.start_timeout(name)
    if seconds is not None:
        noted.append("start-timeout", f"{seconds:.6f}")


def unset_booted(name: str, host: HostPaths) -> None:
    """Forget what ran."""
    # A link in the directory's place leads to where nothing is ours; no start bears with it.
    is_ours = not os.path.islink(host.vm(name))
    if is_ours:
        remove_files(booted.record(name, host), host.vm(name))
    private = Record(host.record(name, "private-files"))
    if os.path.exists(private.path):
        from .. import handover

        handover.take_back(name, private, host)
    Record(host.record(name, "lost-shares")).clear()
    booted.record(name, host).clear()
    # Late: a stop may come as long as this runs.
    ends = Record(host.record(name, "ends"))
    if os.path.exists(ends.path):
        from .. import aftermath

        aftermath.forget_unless_it_goes_on(name, ends)
    # Last: what the VM's user has put in its place is not to keep the records.
    try:
        if is_ours:
            os.unlink(host.booted(name))
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        # The next start moves a directory of the VM's user aside.
        pass
