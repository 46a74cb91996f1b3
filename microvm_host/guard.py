# SPDX-License-Identifier: MIT
"""Watches over a stop that a hostile hypervisor could hold up for ever.

It trusts nothing but what systemd says of the unit's state: the main process is what the unit's
own processes made systemd believe.
"""

from __future__ import annotations

import os
import select
import time

from . import log, names, process
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PROPERTIES = ("ActiveState", "Job", "MainPID")
# The job of the unit may have to wait for a moment.
BEGINS_WITHIN = 5.0  # seconds
LOOK_EVERY = 1.0  # seconds


def patience(
    environment: str,
    defaults: Mapping[str, float],
    seconds: Callable[[str], float | None],
) -> float:
    """How many seconds a stop may take, by the unit's Environment= as systemd shows it.

    Args:
        defaults: the variables of the times that a stop consists of, with what each is unset.
        seconds: reads one; None if it is no time that the stop itself would take.
    """
    found = dict(defaults)
    for word in environment.split():
        key, _, value = word.strip("\"'").partition("=")
        if key in found:
            time_given = seconds(value)
            found[key] = defaults[key] if time_given is None else time_given
    return sum(found.values())


def watch(vm: str, within: float, look: Callable[[], Mapping[str, str]]) -> None:
    """Wait until the unit of a VM has stopped, and kill all that is in it if that takes too long.

    Args:
        within: seconds.
        look: gives the unit's PROPERTIES.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    unit = names.unit(vm)
    began = time.monotonic()
    is_stopping = False
    while True:
        found = look()
        elapsed = time.monotonic() - began
        state = found.get("ActiveState")
        if not state:
            raise MicrovmHostError(f"systemd does not tell the state of {unit}")
        if state == "deactivating":
            is_stopping = True
            if elapsed > within:
                # Again and again: it may have made new processes.
                log.error(
                    f"{unit} is there {elapsed:.0f} s after it was told to stop: killing all of it",
                    vm=vm,
                )
                process.output(["systemctl", "kill", "--signal=KILL", "--", unit])
        elif (
            is_stopping
            or state in ("inactive", "failed")
            or not found.get("Job")
            or elapsed > BEGINS_WITHIN
        ):
            # It has stopped, or is about to start again, or ended by itself.
            return
        main = found.get("MainPID", "")
        _wait(int(main) if names.is_number(main) else 0)


def _wait(pid: int) -> None:
    """Wait for a process to end, or for a while."""
    try:
        main = os.pidfd_open(pid)
    except (OSError, ValueError, OverflowError):
        # Gone already: what is left takes a moment.
        time.sleep(LOOK_EVERY / 20)
        return
    try:
        poll = select.poll()
        poll.register(main, select.POLLIN)
        if poll.poll(LOOK_EVERY * 1000):
            # systemd hears of it when we do.
            time.sleep(LOOK_EVERY / 200)
    finally:
        os.close(main)
