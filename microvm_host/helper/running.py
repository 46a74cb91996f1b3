# SPDX-License-Identifier: MIT
"""The hypervisor: becoming it, waiting for its guest, and asking that to shut down."""

from __future__ import annotations

import os

from .. import log, names, timespan
from ..errors import MicrovmHostError
from ..paths import MICROVM_RUN, MICROVM_SHUTDOWN
from ..record import Record
from . import booted, settings
from .outcome import carried_out

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..paths import HostPaths
    from ..readiness import Listener


def start(name: str, host: HostPaths) -> None:
    """Become the hypervisor; runs as the VM's user."""
    from .. import hypervisor

    _check_settings(name, host)
    ends = Record(host.record(name, "ends"))
    if os.path.exists(ends.path):
        from .. import aftermath

        first_delay = settings.seconds("MICROVM_RESTART_SECONDS", aftermath.FIRST_DELAY)
        aftermath.wait_for_turn(ends, first_delay)
    package = os.path.realpath(host.booted(name))
    log.status(f"Starting {package}")
    kind = "".join(booted.noted(name, host, "hypervisor")) or "the hypervisor"
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
        wanted = "".join(booted.noted(name, host, "readiness"))
    # In the foreground, nobody asks when it is ready.
    if wanted != "guest" or not os.environ.get("NOTIFY_SOCKET"):
        return None
    from .. import readiness, record

    match notify := booted.noted(name, host, "notify"):
        case ["vsock", port, cid, kind] if names.is_number(port) and names.is_number(cid):
            address = readiness.Address("", int(port), int(cid), kind == "stream")
        case ["unix", path]:
            address = readiness.Address(path)
        case [_, *_]:
            raise booted.record(name, host).strange(["notify", *notify])
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
    match booted.noted(name, host, "start-timeout"):
        case [seconds] if names.is_number(seconds.replace(".", "", 1)):
            timeout = float(seconds)
        case [*fields] if fields:
            raise booted.record(name, host).strange(["start-timeout", *fields])
    return readiness.Listener(address, timeout=timeout, others=others)


def _run_until_ready(
    name: str, program: str, running: str, listener: Listener, host: HostPaths
) -> None:
    """Run the hypervisor, as the main process in its place until the guest is ready.

    Who wants the VM stopped until then, or whose patience is over, tells the main process alone,
    which then asks the guest.
    """
    from .. import hypervisor, readiness, supervised

    asked = supervised.AskedToStop()
    child = supervised.Supervised(
        lambda: os._exit(carried_out(lambda: hypervisor.become(program, None), "start", name))
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
    # This asks as the VM's user, who may not ask systemd.
    _shut_down(name, child.pid, host, _noted_stop(name, host), is_booting=True)
    if outcome != readiness.READY:
        child.end_alike()


def stop(name: str, host: HostPaths) -> None:
    """Ask the guest to shut down, as the user that the VM was started for.

    Runs as root under the sandbox of the unit, whose User= may have changed since.
    """
    main_pid = os.environ.get("MAINPID", "")
    # systemd.service(5): without a main process there is nobody to ask.
    if not main_pid:
        return
    timeout, ran = _noted_stop(name, host), timespan.INFINITE
    if os.geteuid() == 0:
        from .. import service

        try:
            timeout, ran = service.stop_timeout(name), service.ran(name)
            # On a busy host it takes a while to come to this.
            timeout = max(timeout - service.stopping_for(name), 0.5)
        except MicrovmHostError as error:
            log.warning(str(error))
        _become_user_of_start(name, host)
    from .. import hypervisor

    is_booting = ran < hypervisor.BOOTS_WITHIN
    _shut_down(name, int(main_pid), host, timeout, is_booting=is_booting)


def _become_user_of_start(name: str, host: HostPaths) -> None:
    """Give up root for good; raises MicrovmHostError."""
    try:
        identity = booted.identity(name, host)
    except MicrovmHostError as error:
        from .. import service

        log.warning(f"{error}; asking as the unit's present user")
        identity = service.identity(name)
    try:
        groups = os.getgrouplist(identity.user, identity.gid)
        # With those of SupplementaryGroups=, by which alone a socket may be reached.
        os.setgroups([*groups, *(each for each in identity.groups if each not in groups)])
        os.setresgid(identity.gid, identity.gid, identity.gid)
        os.setresuid(identity.uid, identity.uid, identity.uid)
    except PermissionError as error:
        raise MicrovmHostError(
            f"cannot ask the guest to shut down as {identity.user}, the user of its start",
            hint="CapabilityBoundingSet= of the unit needs CAP_SETUID and CAP_SETGID",
        ) from error


def _noted_stop(name: str, host: HostPaths) -> float:
    """TimeoutStopSec= of the VM, as it was at its start."""
    match booted.noted(name, host, "stop-timeout"):
        case [text] if (found := timespan.parse(text)) is not None:
            return found
    return timespan.STOP


def _times(timeout: float, *, is_said: bool) -> tuple[float, float, timespan.Parts]:
    """What the environment asks for of the guest's time, and of repeating; and what it gets."""
    guest = settings.seconds("MICROVM_SHUTDOWN_SECONDS", timespan.INFINITE, is_said=is_said)
    again = settings.seconds("MICROVM_ASK_AGAIN_SECONDS", 0, is_said=is_said)
    terminate = settings.seconds("MICROVM_TERMINATE_SECONDS", 0, is_said=is_said) or None
    return guest, again, timespan.parts(timeout, terminate, guest)


def _check_settings(name: str, host: HostPaths) -> None:
    """Say at the start what of the settings for a stop will not count."""
    if {"MICROVM_RESTART_SECONDS", "MICROVM_RESTART_LIMIT"} & {*os.environ}:
        from .. import aftermath

        settings.seconds("MICROVM_RESTART_SECONDS", aftermath.FIRST_DELAY)
        settings.number("MICROVM_RESTART_LIMIT", aftermath.LIMIT)
    timeout = _noted_stop(name, host)
    guest, _, parts = _times(timeout, is_said=False)
    if parts.guest < guest < timespan.INFINITE:
        log.warning(
            f"MICROVM_SHUTDOWN_SECONDS={os.environ['MICROVM_SHUTDOWN_SECONDS']} does not fit into "
            f"TimeoutStopSec={timespan.describe(timeout)}, which bounds a stop: the guest will "
            f"have {timespan.describe(parts.guest)}; set TimeoutStopSec= in a drop-in instead"
        )


def _shut_down(
    name: str, main_pid: int, host: HostPaths, timeout: float, *, is_booting: bool
) -> None:
    from .. import hypervisor

    button = None
    match control := booted.noted(name, host, "control"):
        case [protocol, path]:
            button = hypervisor.Button(protocol, path)
        case [_, *_]:
            # Its end does not hang on that.
            log.warning(str(booted.record(name, host).strange(["control", *control])))
    ways: list[hypervisor.Way] = []
    script = f"{os.path.realpath(host.booted(name))}/{MICROVM_SHUTDOWN}"
    if os.path.exists(script):
        ways.append(hypervisor.Script(script, button))
    if button is not None:
        ways.append(button)
    _, again, parts = _times(timeout, is_said=True)
    first = hypervisor.ASKS_AGAIN_SOON_AFTER if is_booting and not again else 0.0
    again = again or hypervisor.ASKS_AGAIN_AFTER
    times = hypervisor.Times(parts.guest, again, parts.terminate, parts.kill, first)
    hypervisor.stop(main_pid, ways, times)
