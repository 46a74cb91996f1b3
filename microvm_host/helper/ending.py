# SPDX-License-Identifier: MIT
"""What is done besides when a VM stops or ends, whoever wanted that."""

from __future__ import annotations

import os

from ..record import Record
from . import booted, settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..identity import Identity
    from ..paths import HostPaths

# Longer than what comes after the asking may take: that is for systemd to end.
GUARD_WAITS = 30.0  # seconds


def guard(name: str, host: HostPaths) -> None:
    """See to it that a stop of the VM ends, whatever the hypervisor does to those who ask it."""
    from .. import guard, hypervisor, names

    times = hypervisor.Times()
    defaults = {
        "MICROVM_SHUTDOWN_SECONDS": times.guest,
        "MICROVM_TERMINATE_SECONDS": times.terminate,
    }

    def is_seen_to_stop(unit: str) -> bool:
        def within() -> float:
            given = _may_be_in_environment(unit, name, host)
            return guard.patience(given, defaults, settings.as_seconds) + GUARD_WAITS

        return guard.watch(unit, name, within, lambda: guard.look(unit))

    # Nobody runs both.
    if not is_seen_to_stop(names.unit(name)):
        is_seen_to_stop(names.foreground_unit(name))


def _may_be_in_environment(unit: str, name: str, host: HostPaths) -> list[str]:
    """The assignments that whoever asks the guest may go by. Most stops end without this."""
    from .. import environment, log, trust
    from ..errors import MicrovmHostError

    by = None
    try:
        by = trust.suspect(booted.identity(name, host))
    except MicrovmHostError as error:
        # Not a reason to leave.
        log.warning(str(error), vm=name)
    return environment.assignments(unit, name, by, host)


def ended(name: str, host: HostPaths) -> int:
    """Say how the VM ended, and see to it that one that keeps dying is not started for ever."""
    from .. import aftermath

    said = None
    event_log = booted.noted(name, host, "event-log")
    kind = "".join(booted.noted(name, host, "hypervisor")) or "the hypervisor"
    end = aftermath.End.from_environment(kind)
    if event_log and end.is_clean:
        said = _last_words(f"{host.vm(name)}/{event_log[0]}", booted.identity(name, host))
    limit = settings.number("MICROVM_RESTART_LIMIT", aftermath.LIMIT)
    return aftermath.take_note(name, end, said, limit, Record(host.record(name, "ends")))


def _last_words(path: str, identity: Identity) -> str | None:
    """What the hypervisor's event log says, read with no more rights than who wrote it."""
    from .. import control

    os.setgroups([identity.gid])
    os.setegid(identity.gid)
    os.seteuid(identity.uid)
    try:
        return control.last_words(path)
    finally:
        os.seteuid(0)
        os.setegid(0)


def share_lost(name: str, tag: str, host: HostPaths) -> None:
    """A virtiofsd has ended: say so where its VM is looked at, if that still runs."""
    from .. import lostshares

    lostshares.tell(name, tag, host)
