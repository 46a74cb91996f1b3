# SPDX-License-Identifier: MIT
"""Watches over a stop that a hostile hypervisor could hold up for ever.

It trusts nothing but what systemd says of the unit's state: the main process is what the unit's
own processes made systemd believe.
"""

from __future__ import annotations

import os
import select
import time

from . import log, names, process, service

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    # ActiveState, whether the unit has a job, and its main process, 0 for none.
    Seen = tuple[str, bool, int]

# The job of the unit may have to wait for a moment.
BEGINS_WITHIN = 5.0  # seconds
# No stop that takes less is too long, so that most need not ask how long that would be.
NEVER_TOO_SOON = 5.0  # seconds
LOOK_EVERY = 1.0  # seconds
# Without a main process, what is left takes a moment, and the rest of the stop waits for us.
LOOK_AT_LAST_EVERY = 0.01  # seconds


def look(vm: str) -> Seen:
    """What systemd says of the unit of a VM now; raises MicrovmHostError."""
    state, (job, _), main = service.properties(
        vm, ("Unit", "ActiveState"), ("Unit", "Job"), ("Service", "MainPID")
    )
    return state, bool(job), main


def patience(
    environment: Sequence[str],
    defaults: Mapping[str, float],
    seconds: Callable[[str], float | None],
) -> float:
    """How many seconds a stop may take, by the unit's Environment=.

    Args:
        environment: assignments.
        defaults: the variables of the times that a stop consists of, with what each is unset.
        seconds: reads one; None if it is no time that the stop itself would take.
    """
    found = dict(defaults)
    for assignment in environment:
        key, _, value = assignment.partition("=")
        if key in found:
            time_given = seconds(value)
            found[key] = defaults[key] if time_given is None else time_given
    return sum(found.values())


def watch(vm: str, within: Callable[[], float], look: Callable[[], Seen]) -> None:
    """Wait until the unit of a VM has stopped, and kill all that is in it if that takes too long.

    Args:
        within: how long that is, in seconds; asked when it has taken a while.
        look: gives what systemd says of the unit.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    unit = names.unit(vm)
    began = time.monotonic()
    patience: float | None = None
    is_stopping = False
    while True:
        state, has_job, main = look()
        elapsed = time.monotonic() - began
        if state == "deactivating":
            is_stopping = True
            if patience is None and elapsed > NEVER_TOO_SOON:
                patience = within()
            if patience is not None and elapsed > patience:
                # Again and again: it may have made new processes.
                log.error(
                    f"{unit} is there {elapsed:.0f} s after it was told to stop: killing all of it",
                    vm=vm,
                )
                process.output(["systemctl", "kill", "--signal=KILL", "--", unit])
        elif (
            is_stopping or state in ("inactive", "failed") or not has_job or elapsed > BEGINS_WITHIN
        ):
            # It has stopped, or is about to start again, or ended by itself.
            return
        _wait(main)


def _wait(pid: int) -> None:
    """Wait for a process to end, or for a while."""
    try:
        main = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        # Gone already.
        time.sleep(LOOK_AT_LAST_EVERY)
        return
    try:
        poll = select.poll()
        poll.register(main, select.POLLIN)
        if poll.poll(LOOK_EVERY * 1000):
            # systemd hears of it when we do.
            time.sleep(LOOK_AT_LAST_EVERY / 2)
    finally:
        os.close(main)
