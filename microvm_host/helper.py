# SPDX-License-Identifier: MIT
"""The verbs that the units call: `helper VERB NAME`.

Each verb is one short function that imports just what it needs: these run between `systemctl
start` and the hypervisor, where every import counts. Nothing here is for people to call.
"""

from __future__ import annotations

import os

from . import log, names
from .errors import EXIT_CONFIG, EXIT_FAILED, EXIT_USAGE, MicrovmHostError, NameInvalid
from .paths import MICROVM_RUN, MICROVM_SHUTDOWN, HostPaths
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .identity import Identity

# As long as a systemd in the guest gives each of its own services (DefaultTimeoutStopSec=).
SHUTDOWN_SECONDS = 90.0
HOLDER_GIVES_BACK_WITHIN = 30.0  # seconds


def set_booted(name: str, host: HostPaths) -> None:
    """Check all of the package and make it the booted one: the rest of the start reads that."""
    from . import runner, state, systemd

    state.check_current(name, host)
    package = runner.load(host.current(name))
    identity = systemd.identity(name)
    state.prepare(name, identity.gid, host)
    booted = _booted_record(name, host)
    booted.clear()
    booted.append("user", identity.user, str(identity.uid), identity.group, str(identity.gid))
    if package.hypervisor is not None:
        booted.append("hypervisor", package.hypervisor)
    state.link(host.booted(name), package.path)
    log.status(f"checked {package.path}")


def unset_booted(name: str, host: HostPaths) -> None:
    """Forget what ran."""
    try:
        os.unlink(host.booted(name))
    except FileNotFoundError:
        pass
    _booted_record(name, host).clear()


def taps_up(name: str, host: HostPaths) -> None:
    from . import links, plan, runner

    taps = runner.load_taps(host.booted(name))
    steps = links.plan_taps(name, taps, _identity(name, host), host)
    record = Record(host.record(name, "tap-interfaces"))
    plan.carry_out(steps, record, lambda done: links.undo_taps(done, host))
    log.status(f"up: {', '.join(tap.name for tap in taps)}")


def taps_down(name: str, host: HostPaths) -> None:
    from . import links, plan

    record = Record(host.record(name, "tap-interfaces"))
    plan.take_back(record, lambda done: links.undo_taps(done, host))


def macvtaps_up(name: str, host: HostPaths) -> None:
    from . import links, plan, runner

    macvtaps = runner.load_macvtaps(host.booted(name))
    steps = links.plan_macvtaps(macvtaps, _identity(name, host), host)
    record = Record(host.record(name, "macvtap-interfaces"))
    plan.carry_out(steps, record, lambda done: links.undo_macvtaps(done, host))
    log.status(f"up: {', '.join(macvtap.name for macvtap in macvtaps)}")


def macvtaps_down(name: str, host: HostPaths) -> None:
    from . import links, plan

    record = Record(host.record(name, "macvtap-interfaces"))
    plan.take_back(record, lambda done: links.undo_macvtaps(done, host))


def pci_up(name: str, host: HostPaths) -> None:
    from . import pci, plan, runner

    addresses = runner.load_pci_devices(host.booted(name))
    identity = _identity(name, host)
    record = Record(host.record(name, pci.WHAT))
    for last_time in (False, True):
        try:
            with pci.Exclusive(host):
                steps = pci.plan(name, addresses, identity, host)
                plan.carry_out(steps, record, lambda done: pci.undo(done, host))
            break
        except pci.InUse as error:
            if last_time or not _comes_free(error.holder, host):
                raise
    log.status(f"on vfio-pci: {', '.join(addresses)}")


def pci_down(name: str, host: HostPaths) -> None:
    from . import pci, plan

    record = Record(host.record(name, pci.WHAT))
    if not record.read():
        return
    with pci.Exclusive(host):
        plan.take_back(record, lambda done: pci.undo(done, host))


def _comes_free(holder: str, host: HostPaths) -> bool:
    """Wait for a VM that has stopped to give its devices back; False for one that runs.

    systemd calls a VM stopped when its hypervisor has ended, a moment before its devices are back.
    """
    import time

    from . import pci, systemd

    vm, unit = names.unit(holder), f"microvm-pci-devices@{holder}.service"
    deadline = time.monotonic() + HOLDER_GIVES_BACK_WITHIN
    while Record(host.record(holder, pci.WHAT)).read():
        found = systemd.states(vm, unit)
        runs = found.get(vm, "inactive") not in ("inactive", "failed")
        gives_back = found.get(unit, "inactive") in ("active", "deactivating")
        if runs or not gives_back or time.monotonic() > deadline:
            return False
        log.status(f"waiting for microVM {holder} to give its PCI devices back")
        time.sleep(0.1)
    return True


def shares_up(name: str, host: HostPaths) -> None:
    from . import plan, runner, shares, systemd

    package = os.path.realpath(host.booted(name))
    found = runner.load_shares(package)
    connection = systemd.Connection(host.systemd_private_socket)
    try:
        steps = shares.plan(
            name,
            package,
            found,
            _identity(name, host),
            host,
            connection,
        )
        record = Record(host.record(name, "virtiofsd"))
        plan.carry_out(steps, record, lambda done: shares.undo(done, host.vm(name), systemd.stop))
    finally:
        connection.close()
    log.status(f"listening for {', '.join(share.tag for share in found)}")


def shares_down(name: str, host: HostPaths) -> None:
    from . import plan, shares, systemd

    record = Record(host.record(name, "virtiofsd"))
    plan.take_back(record, lambda done: shares.undo(done, host.vm(name), systemd.stop))


def start(name: str, host: HostPaths) -> None:
    """Become the hypervisor; runs as the VM's user."""
    from . import hypervisor

    package = os.path.realpath(host.booted(name))
    log.status(f"Starting {package}")
    hypervisor.become(f"{package}/{MICROVM_RUN}", package, *_booted(name, host, "hypervisor"))


def stop(name: str, host: HostPaths) -> None:
    """Ask the guest to shut down; runs as the VM's user."""
    from . import hypervisor

    main_pid = os.environ.get("MAINPID", "")
    if not main_pid:
        # systemd.service(5): without a main process there is nobody to ask.
        return
    script = f"{os.path.realpath(host.booted(name))}/{MICROVM_SHUTDOWN}"
    text = os.environ.get("MICROVM_SHUTDOWN_SECONDS", "")
    try:
        patience = float(text) if text else SHUTDOWN_SECONDS
    except ValueError:
        log.warning(f"MICROVM_SHUTDOWN_SECONDS={text!r} is no number: {SHUTDOWN_SECONDS:.0f} it is")
        patience = SHUTDOWN_SECONDS
    hypervisor.stop(int(main_pid), script if os.path.exists(script) else None, patience)


def install(name: str, host: HostPaths) -> None:
    """Bring `current` of a declared VM up to date."""
    from . import declaration, install

    declared = declaration.load(host.declaration(name))
    log.status(f"Installing {declared.source}")
    change = install.from_source(name, declared.source, host)
    log.status(change.describe())


def _booted_record(name: str, host: HostPaths) -> Record:
    """What set-booted found out once for the rest of the start."""
    return Record(host.record(name, "booted"))


def _booted(name: str, host: HostPaths, what: str) -> list[str]:
    """The fields that set-booted wrote down of one thing; none if it had nothing to tell."""
    for verb, *fields in _booted_record(name, host).read():
        if verb == what:
            return fields
    return []


def _identity(name: str, host: HostPaths) -> Identity:
    """Whom the VM runs as, asked of systemd once a start."""
    from .identity import Identity

    fields = _booted(name, host, "user")
    if not fields:
        raise MicrovmHostError(
            f"microvm-set-booted@{name} has not run", path=_booted_record(name, host).path
        )
    user, uid, group, gid = fields
    return Identity(user, int(uid), group, int(gid))


VERBS: dict[str, Callable[[str, HostPaths], None]] = {
    "set-booted": set_booted,
    "unset-booted": unset_booted,
    "tap-interfaces-up": taps_up,
    "tap-interfaces-down": taps_down,
    "macvtap-interfaces-up": macvtaps_up,
    "macvtap-interfaces-down": macvtaps_down,
    "pci-devices-up": pci_up,
    "pci-devices-down": pci_down,
    "virtiofsd-up": shares_up,
    "virtiofsd-down": shares_down,
    "start": start,
    "stop": stop,
    "install": install,
}


def main(argv: list[str]) -> int:
    """Run one verb; gives the exit code."""
    if len(argv) != 3 or argv[1] not in VERBS:
        log.error(f"usage: helper VERB NAME, with VERB one of {', '.join(VERBS)}")
        return EXIT_USAGE
    try:
        name = names.vm_name(argv[2])
    except NameInvalid as error:
        # Not for the VM's unit: there is no such VM.
        log.error(str(error))
        return EXIT_USAGE
    try:
        VERBS[argv[1]](name, HostPaths.from_environment())
    except MicrovmHostError as error:
        log.status(str(error))
        log.error(str(error), vm=name)
        # A name that was read, not typed, is wrong in a file.
        return EXIT_CONFIG if isinstance(error, NameInvalid) else error.exit_code
    except OSError as error:
        log.error(f"{error.filename or argv[1]}: {error.strerror}", vm=name)
        return EXIT_FAILED
    except Exception:
        # A mistake of ours. There is no standard error that would show it.
        from traceback import format_exc

        for line in format_exc().splitlines():
            log.error(line, vm=name)
        return EXIT_FAILED
    return 0
