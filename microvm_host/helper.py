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
from .record import Record, remove_sockets

# Longer ones would overflow what systemd counts microseconds in; a day is "wait for ever".
SECONDS_MAX = 86400.0

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .identity import Identity
    from .readiness import Listener
    from .runner import Package

# Longer than what comes after the asking may take: that is for systemd to end.
GUARD_WAITS = 30.0  # seconds
HOLDER_GIVES_BACK_WITHIN = 30.0  # seconds


def set_booted(name: str, host: HostPaths) -> None:
    """Check all of the package and make it the booted one: the rest of the start reads that."""
    from . import runner, service, state, trust

    state.check_current(name, host)
    package = runner.load(host.current(name))
    identity = service.identity(name)
    trust.check_package(package.path, identity)
    if state.prepare(name, identity.gid, host):
        log.notice(
            f"the state directory is {identity.group}'s from now on; if disks in it are a former "
            f"user's, `microvm adopt {name}` hands them over",
            vm=name,
        )
    booted = _booted_record(name, host)
    booted.clear()
    booted.append("user", identity.user, str(identity.uid), identity.group, str(identity.gid))
    if package.hypervisor is not None:
        booted.append("hypervisor", package.hypervisor)
    if package.control_socket is not None:
        booted.append("control", package.control_socket.protocol, package.control_socket.path)
    if package.event_log is not None:
        booted.append("event-log", package.event_log)
    _note_readiness(package, booted, name)
    state.link(host.booted(name), package.path)
    log.status(f"checked {package.path}")


def _note_readiness(package: Package, booted: Record, name: str) -> None:
    """Note down how the VM may be waited for; those that cannot be pay nothing for it."""
    socket = package.notify_socket
    if socket is None:
        return
    from . import service

    booted.append("readiness", package.readiness)
    if socket.path is not None:
        booted.append("notify", "unix", socket.path)
    else:
        kind = "stream" if socket.is_stream else "seqpacket"
        booted.append("notify", "vsock", str(socket.port), str(package.vsock_cid), kind)
    seconds = service.start_timeout(name)
    if seconds is not None:
        booted.append("start-timeout", f"{seconds:.6f}")


def unset_booted(name: str, host: HostPaths) -> None:
    """Forget what ran."""
    # A link in the directory's place leads to where nothing is ours; no start bears with it.
    is_ours = not os.path.islink(host.vm(name))
    if is_ours:
        remove_sockets(_booted_record(name, host), host.vm(name))
    ends = Record(host.record(name, "ends"))
    if os.path.exists(ends.path):
        from . import aftermath

        aftermath.forget_unless_it_goes_on(name, ends)
    Record(host.record(name, "lost-shares")).clear()
    _booted_record(name, host).clear()
    # Last: what the VM's user has put in its place is not to keep the records.
    try:
        if is_ours:
            os.unlink(host.booted(name))
    except (FileNotFoundError, NotADirectoryError):
        pass


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
    record = Record(host.record(name, "macvtap-interfaces"))
    if record.read():
        # Of a helper that was killed while it undid these. Unlike taps, they are not used again.
        macvtaps_down(name, host)
    steps = links.plan_macvtaps(macvtaps, _identity(name, host), host)
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
    record = Record(host.record(name, "virtiofsd"))
    if record.read():
        # Whoever was to stop them was killed, and systemd has them still.
        shares_down(name, host)
    connection = systemd.Connection(host.systemd_private_socket)
    try:
        identity = _identity(name, host)
        steps = shares.plan(name, package, found, identity, host, connection)
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

    ends = Record(host.record(name, "ends"))
    if os.path.exists(ends.path):
        from . import aftermath

        aftermath.wait_for_turn(ends, _seconds("MICROVM_RESTART_SECONDS", aftermath.FIRST_DELAY))
    package = os.path.realpath(host.booted(name))
    log.status(f"Starting {package}")
    kind = "".join(_booted(name, host, "hypervisor")) or "the hypervisor"
    running = f"Running {kind} from {package}"
    program = f"{package}/{MICROVM_RUN}"
    listener = _listener(name, host)
    if listener is None:
        hypervisor.become(program, running)
    _run_until_ready(name, program, running, listener, host)


def _listener(name: str, host: HostPaths) -> Listener | None:
    """Listens for the guest to be ready, if that is to be waited for."""
    wanted = os.environ.get("MICROVM_READINESS", "")
    if wanted not in ("", "exec", "guest"):
        raise MicrovmHostError(f"MICROVM_READINESS={wanted!r} is neither exec nor guest")
    if not wanted:
        wanted = "".join(_booted(name, host, "readiness"))
    # In the foreground, nobody asks when it is ready.
    if wanted != "guest" or not os.environ.get("NOTIFY_SOCKET"):
        return None
    from . import readiness, record

    match notify := _booted(name, host, "notify"):
        case ["vsock", port, cid, kind] if names.is_number(port) and names.is_number(cid):
            address = readiness.Address("", int(port), int(cid), kind == "stream")
        case ["unix", path]:
            address = readiness.Address(path)
        case [_, *_]:
            raise _booted_record(name, host).strange(["notify", *notify])
        case _:
            raise MicrovmHostError(
                "MICROVM_READINESS=guest, but the package gives the guest no vsock",
                path=os.path.realpath(host.booted(name)),
            )

    def others() -> list[str]:
        return [
            vm
            for vm in record.holders(host.records, "booted", ("notify", *notify[:2]))
            if vm != name
        ]

    timeout = None
    match _booted(name, host, "start-timeout"):
        case [seconds] if names.is_number(seconds.replace(".", "", 1)):
            timeout = float(seconds)
        case [*fields] if fields:
            raise _booted_record(name, host).strange(["start-timeout", *fields])
    return readiness.Listener(address, timeout=timeout, others=others)


def _run_until_ready(
    name: str, program: str, running: str, listener: Listener, host: HostPaths
) -> None:
    """Run the hypervisor, as the main process in its place until the guest is ready.

    Who wants the VM stopped until then, or whose patience is over, tells the main process alone,
    which then asks the guest.
    """
    from . import hypervisor, readiness, supervised

    asked = supervised.AskedToStop()
    child = supervised.Supervised(
        lambda: os._exit(_carried_out(lambda: hypervisor.become(program, None), "start", name))
    )
    outcome = listener.run(child.fileno(), asked.fileno())
    if outcome == readiness.ENDED:
        child.end_alike()
    if outcome == readiness.READY:
        child.release()
        readiness.announce(child.pid, running, listener.status)
        # systemd has read this, so that whoever was asked before is this process.
        if not asked:
            return
    # As for ExecStop=: scripts of packages use it.
    os.environ["MAINPID"] = str(child.pid)
    _shut_down(name, child.pid, host)
    if outcome != readiness.READY:
        child.end_alike()


def register(name: str, host: HostPaths) -> None:
    """Have systemd-machined know the VM, which runs already and does without as well."""
    from . import machined, runner, systemd

    unit = names.unit(name)
    try:
        leader = int(systemd.show(unit, "MainPID").get("MainPID", "0"))
        if not leader:
            # It did not come up, or has ended.
            return
        package = runner.load(host.booted(name))
        links = [tap.name for tap in package.taps]
        links += [macvtap.name for macvtap in package.macvtaps]
        interfaces = []
        for link in links:
            with open(f"{host.net_device(link)}/ifindex", encoding="ascii") as file:
                interfaces.append(int(file.read()))
        machine = machined.Machine(
            name=name,
            uuid=package.machine_uuid or machined.derived_uuid(name, host),
            unit=unit,
            leader=leader,
            interfaces=tuple(interfaces),
            vsock_cid=package.vsock_cid,
        )
        machined.register(machine, host)
    except (MicrovmHostError, OSError) as error:
        log.notice(f"not registered with systemd-machined: {error}", vm=name)
        return
    log.status("registered")


def stop(name: str, host: HostPaths) -> None:
    """Ask the guest to shut down; runs as the VM's user."""
    main_pid = os.environ.get("MAINPID", "")
    # systemd.service(5): without a main process there is nobody to ask.
    if main_pid:
        _shut_down(name, int(main_pid), host)


def _shut_down(name: str, main_pid: int, host: HostPaths) -> None:
    from . import hypervisor

    ways: list[hypervisor.Way] = []
    script = f"{os.path.realpath(host.booted(name))}/{MICROVM_SHUTDOWN}"
    if os.path.exists(script):
        ways.append(hypervisor.Script(script))
    match control := _booted(name, host, "control"):
        case [protocol, path]:
            ways.append(hypervisor.Button(protocol, path))
        case [_, *_]:
            # Its end does not hang on that.
            log.warning(str(_booted_record(name, host).strange(["control", *control])))
    default = hypervisor.Times()
    times = hypervisor.Times(
        guest=_seconds("MICROVM_SHUTDOWN_SECONDS", default.guest),
        ask_again=_seconds("MICROVM_ASK_AGAIN_SECONDS", default.ask_again),
        terminate=_seconds("MICROVM_TERMINATE_SECONDS", default.terminate),
    )
    hypervisor.stop(main_pid, ways, times)


def ended(name: str, host: HostPaths) -> int:
    """Say how the VM ended, and see to it that one that keeps dying is not started for ever."""
    from . import aftermath

    said = None
    event_log = _booted(name, host, "event-log")
    kind = "".join(_booted(name, host, "hypervisor")) or "the hypervisor"
    end = aftermath.End.from_environment(kind)
    if event_log and end.is_clean:
        said = _last_words(f"{host.vm(name)}/{event_log[0]}", _identity(name, host))
    limit = _number("MICROVM_RESTART_LIMIT", aftermath.LIMIT)
    return aftermath.take_note(name, end, said, limit, Record(host.record(name, "ends")))


def _last_words(path: str, identity: Identity) -> str | None:
    """What the hypervisor's event log says, read with no more rights than who wrote it."""
    from . import control

    os.setgroups([identity.gid])
    os.setegid(identity.gid)
    os.seteuid(identity.uid)
    try:
        return control.last_words(path)
    finally:
        os.seteuid(0)
        os.setegid(0)


def share_lost(name: str, tag: str, host: HostPaths) -> None:
    """A virtiofsd has failed: say so where its VM is looked at, if that still runs."""
    from . import aftermath

    aftermath.share_lost(name, tag, Record(host.record(name, "lost-shares")))


def guard(name: str, host: HostPaths) -> None:
    """See to it that a stop of the VM ends, whatever the hypervisor does to those who ask it."""
    from . import guard, hypervisor, service

    times = hypervisor.Times()
    defaults = {
        "MICROVM_SHUTDOWN_SECONDS": times.guest,
        "MICROVM_TERMINATE_SECONDS": times.terminate,
    }

    def within() -> float:
        (environment,) = service.properties(name, ("Service", "Environment"))
        return guard.patience(environment, defaults, _as_seconds) + GUARD_WAITS

    guard.watch(name, within, lambda: guard.look(name))


def install(name: str, host: HostPaths) -> None:
    """Bring `current` of a declared VM up to date."""
    from . import declaration, install

    declared = declaration.load(host.declaration(name))
    log.status(f"Installing {declared.source}")
    change = install.declared(declared, host)
    log.status(change.describe())


def _seconds(variable: str, default: float) -> float:
    """A time of the environment, which may be too long for anybody to wait, but is one."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    seconds = _as_seconds(text)
    if seconds is None:
        log.warning(f"{variable}={text!r} is no time in seconds: {default:g} it is")
        return default
    return seconds


def _as_seconds(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    # False for `nan` as well.
    return seconds if 0.1 <= seconds <= SECONDS_MAX else None


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, "")
    if not text or (names.is_number(text) and len(text) < 10):
        return int(text or default)
    log.warning(f"{variable}={text!r} is no number: {default} it is")
    return default


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
    match fields:
        case [user, uid, group, gid] if names.is_number(uid) and names.is_number(gid):
            return Identity(user, int(uid), group, int(gid))
    raise _booted_record(name, host).strange(["user", *fields])


VERBS: dict[str, Callable[[str, HostPaths], int | None]] = {
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
    "register": register,
    "stop": stop,
    "guard": guard,
    "ended": ended,
    "install": install,
}
# These are called with the instance of a share's unit in place of a VM's name.
SHARE_VERBS: dict[str, Callable[[str, str, HostPaths], None]] = {"share-lost": share_lost}


def main(argv: list[str]) -> int:
    """Run one verb; gives the exit code."""
    if len(argv) != 3 or argv[1] not in (*VERBS, *SHARE_VERBS):
        log.error(f"usage: helper VERB NAME, with VERB one of {', '.join((*VERBS, *SHARE_VERBS))}")
        return EXIT_USAGE
    verb, host = argv[1], HostPaths.from_environment()
    try:
        name, tag = names.share_of(argv[2]) if verb in SHARE_VERBS else (argv[2], "")
        names.vm_name(name)
    except NameInvalid as error:
        # Not for the VM's unit: there is no such VM.
        log.error(str(error))
        return EXIT_USAGE
    if os.geteuid() == 0:
        # Records are to be read by the VM's user too, whatever UMask= is for the files of that.
        os.umask(0o022)
    if verb in SHARE_VERBS:
        return _carried_out(lambda: SHARE_VERBS[verb](name, tag, host), verb, name)
    return _carried_out(lambda: VERBS[verb](name, host), verb, name)


def _carried_out(call: Callable[[], int | None], verb: str, name: str) -> int:
    """Call it; what goes wrong is told under the VM's name. Gives the exit code."""
    try:
        return call() or 0
    except MicrovmHostError as error:
        log.status(str(error))
        log.error(str(error), vm=name)
        # A name that was read, not typed, is wrong in a file.
        return EXIT_CONFIG if isinstance(error, NameInvalid) else error.exit_code
    except OSError as error:
        log.error(f"{error.filename or verb}: {error.strerror}", vm=name)
        return EXIT_FAILED
    except Exception:
        # A mistake of ours. There is no standard error that would show it.
        from traceback import format_exc

        for line in format_exc().splitlines():
            log.error(line, vm=name)
        return EXIT_FAILED
