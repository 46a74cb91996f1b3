# SPDX-License-Identifier: MIT
"""Tells of shares that a running guest has lost: of a virtiofsd that ended under it.

Asked of systemd, by the units that it starts when one has ended: whether the VM runs for which that
served, since virtiofsd ends with its hypervisor, too. What is lost is an error in the VM's journal
and a line in the record `lost-shares`, which the listing reads and the end of the VM clears.
"""

from __future__ import annotations

import os
import stat
import time

from . import bus, log, names
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .paths import HostPaths

# As long as the timers that `shares` makes.
ENDS_WITHIN = 5.0  # seconds
# CLD_EXITED of waitid(2), by which systemd tells how a process ended; the others are of signals.
_EXITED, _DUMPED = 1, 3


def tell(name: str, tag: str, host: HostPaths) -> None:
    """Tell of the share of a tag, if it is lost, and write it down for the status.

    Args:
        tag: empty for all shares of a package's own bin/virtiofsd-run.

    Raises:
        MicrovmHostError: systemd does not answer, or a record cannot be read or written.
    """
    since = _runs_since(name, host)
    if since is not None and os.environ.get("TRIGGER_PATH"):
        # Of the sockets of a script. It may be the hypervisor that ends, which makes virtiofsd end
        # and be started again; and a new socket is not yet there.
        time.sleep(ENDS_WITHIN)
        since = _runs_since(name, host)
    if since is None:
        # It ended with its hypervisor.
        return
    record = Record(host.record(name, "lost-shares"))
    lost = _lost(name, tag, since, host) if tag else _own_lost(name, host, record.read())
    for each, how in lost.items():
        record.append("share", each)
        log.error(
            f"virtiofsd of share {each} has ended under the running guest"
            + (f" ({how})" if how else "")
            + ": what uses the share in there hangs, unless the hypervisor connects anew, which "
            f"QEMU does not; save what can be saved, then systemctl restart {names.unit(name)}",
            vm=name,
        )


def _runs_since(name: str, host: HostPaths) -> int | None:
    """When the unit of a VM was started, in microseconds; None if it does not run."""
    for unit in (names.unit(name), names.foreground_unit(name)):
        state, since, main = _properties(
            *(unit, host, ("Unit", "ActiveState")),
            *(("Unit", "InactiveExitTimestampMonotonic"), ("Service", "MainPID")),
        )
        # A guest that is waited for is `activating`. So is a VM that is about to be started again,
        # without a main process yet, and the one that waits for its turn.
        if main and state in ("active", "activating", "reloading"):
            return int(since)
    return None


def _lost(name: str, tag: str, since: int, host: HostPaths) -> dict[str, str]:
    """The tag of a share whose socket systemd holds, if that is lost, and how it ended."""
    state, started, code, status = _properties(
        *(names.share_unit(name, tag, ".service"), host, ("Unit", "ActiveState")),
        ("Service", "ExecMainStartTimestampMonotonic"),
        *(("Service", "ExecMainCode"), ("Service", "ExecMainStatus")),
    )
    # The hypervisor's connecting is what starts one. Either that was a former hypervisor's, or this
    # one has connected anew, as some do when their guest reboots.
    if started < since or state == "active":
        return {}
    return {tag: _how(code, status)}


def _own_lost(name: str, host: HostPaths, told: list[list[str]]) -> dict[str, str]:
    """The tags of shares of a package's own script that are lost and not told, and how."""
    (state,) = _properties(names.own_share_unit(name), host, ("Unit", "ActiveState"))
    # systemd has forgotten the unit, but tells whom it starts for it (systemd.exec(5)).
    get = os.environ.get
    how = f"{get('MONITOR_EXIT_CODE', '')} {get('MONITOR_EXIT_STATUS', '')}".strip()
    found = {}
    for line in Record(host.record(name, "served-shares")).read():
        match line:
            case ["share", tag, _, _] if ["share", tag] in told:
                continue
            case ["share", tag, socket, uid] if names.is_number(uid):
                if state != "active":
                    found[tag] = how
                elif _is_another(socket, int(uid)):
                    found[tag] = "another one was started"
    return found


def _is_another(socket: str, uid: int) -> bool:
    """Whether a socket is another one than that which was given to the VM's user.

    A package's own supervisor starts a virtiofsd again that has died, and that makes a socket of
    root's in place of the former. Whether anything connects to it or not, the guest's files are
    lost. One that is gone says nothing: it is needed no more once it was connected to.
    """
    try:
        status = os.lstat(socket)
    except OSError:
        return False
    is_given = status.st_uid == uid and (uid != 0 or stat.S_IMODE(status.st_mode) == 0o600)
    return stat.S_ISSOCK(status.st_mode) and not is_given


def _how(code: int, status: int) -> str:
    """The same words for systemd's numbers."""
    if code == _EXITED:
        return f"exited {status}"
    # Long to import, and seldom wanted.
    from signal import Signals

    known = status in Signals._value2member_map_
    word = Signals(status).name.removeprefix("SIG") if known else str(status)
    return f"{'dumped' if code == _DUMPED else 'killed'} {word}"


def _properties(unit: str, host: HostPaths, *wanted: bus.Property) -> list[Any]:
    return bus.properties(host.systemd_private_socket, bus.unit(unit), *wanted)
