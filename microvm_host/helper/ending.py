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

# By the bound of a stop, who asks the guest has killed the hypervisor, or systemd has killed that.
GUARD_WAITS = 1.5  # seconds


def guard(name: str, host: HostPaths) -> None:
    """See to it that a stop of the VM ends, whatever the hypervisor does to those who ask it."""
    from .. import guard, names, service

    def is_seen_to_stop(unit: str) -> bool:
        def within() -> float:
            return service.unit_stop_timeout(unit) + GUARD_WAITS

        return guard.watch(unit, name, within, lambda: guard.look(unit))

    # Nobody runs both.
    if not is_seen_to_stop(names.unit(name)):
        is_seen_to_stop(names.foreground_unit(name))


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
