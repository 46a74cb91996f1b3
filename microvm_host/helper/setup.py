# SPDX-License-Identifier: MIT
"""What a VM stands on: taps, macvtaps, PCI devices and shares, set up and taken back."""

from __future__ import annotations

import os

from .. import log, names
from ..errors import EXIT_FAILED, MicrovmHostError
from ..record import Record
from . import booted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..paths import HostPaths

HOLDER_GIVES_BACK_WITHIN = 30.0  # seconds


def taps_up(name: str, host: HostPaths) -> None:
    from .. import links, plan, runner

    taps = runner.load_taps(host.booted(name))
    record = Record(host.record(name, "tap-interfaces"))
    if record.read():
        # Left by a helper that was killed. These taps are not used again: the VM's user, who had
        # them open, may have changed their owner and flags.
        taps_down(name, host)
    steps = links.plan_taps(name, taps, booted.identity(name, host), host)
    plan.carry_out(steps, record, lambda done: links.undo_taps(done, host))
    log.status(f"up: {', '.join(tap.name for tap in taps)}")


def taps_down(name: str, host: HostPaths) -> None:
    from .. import links, plan

    record = Record(host.record(name, "tap-interfaces"))
    plan.take_back(record, lambda done: links.undo_taps(done, host))


def macvtaps_up(name: str, host: HostPaths) -> None:
    from .. import links, plan, runner

    macvtaps = runner.load_macvtaps(host.booted(name))
    record = Record(host.record(name, "macvtap-interfaces"))
    if record.read():
        # Left by a helper that was killed, and not used again.
        macvtaps_down(name, host)
    steps = links.plan_macvtaps(macvtaps, booted.identity(name, host), host)
    plan.carry_out(steps, record, lambda done: links.undo_macvtaps(done, host))
    log.status(f"up: {', '.join(macvtap.name for macvtap in macvtaps)}")


def macvtaps_down(name: str, host: HostPaths) -> None:
    from .. import links, plan

    record = Record(host.record(name, "macvtap-interfaces"))
    plan.take_back(record, lambda done: links.undo_macvtaps(done, host))


def pci_up(name: str, host: HostPaths) -> None:
    from .. import pci, pci_lock, plan, runner

    addresses = runner.load_pci_devices(host.booted(name))
    identity = booted.identity(name, host)
    record = Record(host.record(name, pci.WHAT))
    for last_time in (False, True):
        try:
            with pci_lock.Exclusive(name, [*addresses, *pci.recorded_addresses(record)], host):
                steps = pci.plan(name, addresses, identity, host)
                plan.carry_out(steps, record, lambda done: pci.undo(done, host))
            break
        except pci.InUse as error:
            if last_time or not _comes_free(error.holder, host):
                raise
    log.status(f"on vfio-pci: {', '.join(addresses)}")
    for other in _same_users(name, identity.uid, host):
        log.warning(
            f"microVM {other} has PCI devices too, and runs as the same user {identity.user}: "
            "each could open those of the other; "
            'user = "auto" in their declarations keeps them apart',
            vm=name,
        )


def pci_down(name: str, host: HostPaths) -> None:
    failed = _failed(name, host)
    failed.clear()
    try:
        _give_back(name, host)
    except BaseException:
        failed.append("told")
        raise


def pci_down_again(name: str, host: HostPaths) -> int:
    """Finish what a helper that was killed has left of that.

    What it failed at it has told, and that is not tried again at once.
    """
    failed = _failed(name, host)
    if failed.read():
        failed.clear()
        return EXIT_FAILED
    _give_back(name, host)
    return 0


def _failed(name: str, host: HostPaths) -> Record:
    from .. import pci

    return Record(host.record(name, pci.FAILED))


def _give_back(name: str, host: HostPaths) -> None:
    from .. import pci, pci_lock, plan

    record = Record(host.record(name, pci.WHAT))
    if not record.read():
        return
    with pci_lock.Exclusive(name, pci.recorded_addresses(record), host):
        plan.take_back(record, lambda done: pci.undo(done, host))


def _same_users(name: str, uid: int, host: HostPaths) -> list[str]:
    """The other VMs that have PCI devices now, and run as this user."""
    from .. import pci
    from ..sysfs import entries

    found = []
    for vm in filter(names.is_vm_name, entries(host.records)):
        if vm != name and Record(host.record(vm, pci.WHAT)).read():
            try:
                if booted.identity(vm, host).uid == uid:
                    found.append(vm)
            except MicrovmHostError:
                # One that is being set up, or whose record is not right: it tells that itself.
                continue
    return found


def _comes_free(holder: str, host: HostPaths) -> bool:
    """Wait for a VM that has stopped to give its devices back; False for one that runs.

    systemd calls a VM stopped when its hypervisor has ended, a moment before its devices are back.
    """
    import time

    from .. import pci, systemd

    vm, unit = names.unit(holder), f"microvm-pci-devices@{holder}.service"
    deadline = time.monotonic() + HOLDER_GIVES_BACK_WITHIN
    while Record(host.record(holder, pci.WHAT)).read():
        found = systemd.states(vm, unit)
        runs = found.get(vm, "inactive") not in ("inactive", "failed")
        gives_back = found.get(unit, "inactive") in ("active", "deactivating")
        if runs or time.monotonic() > deadline:
            return False
        if not gives_back:
            # It may have while systemd was asked.
            return not Record(host.record(holder, pci.WHAT)).read()
        log.waiting(f"waiting for microVM {holder} to give its PCI devices back")
        time.sleep(0.1)
    return True


def shares_up(name: str, host: HostPaths) -> None:
    from .. import plan, runner, shares, systemd

    package = os.path.realpath(host.booted(name))
    found = runner.load_shares(package)
    record = Record(host.record(name, "virtiofsd"))
    if record.read():
        # Whoever was to stop them was killed, and systemd has them still.
        shares_down(name, host)
    connection = systemd.Connection(host.systemd_private_socket)
    try:
        identity = booted.identity(name, host)
        steps = shares.plan(name, package, found, identity, host, connection)
        plan.carry_out(steps, record, lambda done: shares.undo(done, host.vm(name), systemd.stop))
    finally:
        connection.close()
    log.status(f"listening for {', '.join(share.tag for share in found)}")


def shares_down(name: str, host: HostPaths) -> None:
    from .. import plan, shares, systemd

    record = Record(host.record(name, "virtiofsd"))
    plan.take_back(record, lambda done: shares.undo(done, host.vm(name), systemd.stop))
