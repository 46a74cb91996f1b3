# SPDX-License-Identifier: MIT
"""Watches over a stop that a hostile hypervisor could hold up for ever.

It trusts nothing but what systemd says of the unit's state and its job: the main process is what
the unit's own processes made systemd believe.
"""

from __future__ import annotations

import os
import select
import time

from . import log, process, service
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    # ActiveState, whether the unit is to stop or does, and its main process, 0 for none.
    Seen = tuple[str, bool, int]

# A stop begins in a moment, unless it waits for units that stop before: `order` of declarations.
BEGINS_WITHIN = 5.0  # seconds
# No stop that takes less is too long, so that most need not ask how long that would be.
NEVER_TOO_SOON = 5.0  # seconds
LOOK_EVERY = 1.0  # seconds
# systemd does not answer while it reloads or executes itself anew.
SILENT_AT_MOST = 60.0  # seconds
# Without a main process, what is left takes a moment, and the rest of the stop waits for us.
LOOK_AT_LAST_EVERY = 0.01  # seconds


def look(unit: str) -> Seen:
    """What systemd says of a unit now; raises MicrovmHostError."""
    state, main = service.unit_properties(unit, ("Unit", "ActiveState"), ("Service", "MainPID"))
    if state in ("deactivating", "inactive", "failed"):
        return state, state == "deactivating", main
    job = service.unit_job(unit)
    # Half of a restart is a stop; the other half is a start to systemd as well.
    return state, job is not None and job[0] in ("stop", "restart", "try-restart"), main


def watch(unit: str, vm: str, within: Callable[[], float], look: Callable[[], Seen]) -> bool:
    """Wait until a unit has stopped, and kill all that is in it if that takes too long.

    Args:
        vm: whose it is.
        within: how long that is from when it began, in seconds; asked when it has taken a while.
        look: gives what systemd says of the unit.

    Returns:
        Whether it was seen to stop.

    Raises:
        MicrovmHostError: systemd has not answered for long.
    """
    came = heard = time.monotonic()
    began: float | None = None
    patience: float | None = None
    while True:
        try:
            state, is_to_stop, main = look()
            now = time.monotonic()
            if state == "deactivating":
                began = now if began is None else began
                if patience is None and now - began > NEVER_TOO_SOON:
                    patience = within()
                if patience is not None and now - began > patience:
                    # Again and again: it may have made new processes. But not at once: what is run
                    # by ExecStopPost= is in there as well.
                    patience = now - began + LOOK_EVERY
                    log.error(
                        f"{unit} is there {now - began:.0f} s after it began to stop: killing all "
                        "of it",
                        vm=vm,
                    )
                    process.output(["systemctl", "kill", "--signal=KILL", "--", unit])
            elif began is not None or not is_to_stop:
                # It has stopped, or is about to start again, or ended by itself.
                return began is not None
        except MicrovmHostError:
            if time.monotonic() - heard > SILENT_AT_MOST:
                raise
            time.sleep(LOOK_EVERY)
            continue
        heard = now
        is_soon = began is not None or now - came < BEGINS_WITHIN
        _wait(main, LOOK_AT_LAST_EVERY if is_soon else LOOK_EVERY)


def _wait(pid: int, otherwise: float) -> None:
    """Wait for a process to end, or for a while; without one, for `otherwise` seconds."""
    try:
        main = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        # Gone already.
        time.sleep(otherwise)
        return
    try:
        poll = select.poll()
        poll.register(main, select.POLLIN)
        if poll.poll(LOOK_EVERY * 1000):
            # systemd hears of it when we do.
            time.sleep(LOOK_AT_LAST_EVERY / 2)
    finally:
        os.close(main)
