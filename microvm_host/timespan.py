# SPDX-License-Identifier: MIT
"""Time spans as systemd spells them (systemd.time(7)), and the parts of a stop.

`TimeoutStopSec=` of the VM's unit bounds a whole stop. The guest has the most of it; what is left
is for SIGTERM and SIGKILL to the hypervisor, so that systemd's own SIGKILL is never needed.

Read at boot by the generator, and by the helpers: it imports nothing.
"""

from __future__ import annotations

from .frozen import frozen

_UNITS = {
    **dict.fromkeys(("usec", "us", "µs", "μs"), 1e-6),
    **dict.fromkeys(("msec", "ms"), 1e-3),
    **dict.fromkeys(("seconds", "second", "sec", "s", ""), 1.0),
    **dict.fromkeys(("minutes", "minute", "min", "m"), 60.0),
    **dict.fromkeys(("hours", "hour", "hr", "h"), 3600.0),
    **dict.fromkeys(("days", "day", "d"), 86400.0),
    **dict.fromkeys(("weeks", "week", "w"), 7 * 86400.0),
    **dict.fromkeys(("months", "month", "M"), 30.44 * 86400.0),
    **dict.fromkeys(("years", "year", "y"), 365.25 * 86400.0),
}
_DIGITS = "0123456789"
_LONGEST = 50  # characters
INFINITE = float("inf")

# TimeoutStopSec= of microvm@.service. A guest then has 90 seconds, as long as its own systemd
# gives each of its services (DefaultTimeoutStopSec=).
STOP = 105.0  # seconds
# From SIGTERM to SIGKILL, and from SIGKILL to the end. Nothing outlives the latter but what hangs
# in the kernel.
TERMINATE = 10.0  # seconds
KILL = 5.0  # seconds


def parse(text: str) -> float | None:
    """A time span in seconds, `infinity` included; None if systemd would not take it."""
    if len(text) > _LONGEST:
        return None
    if text.strip() == "infinity":
        return INFINITE
    total, rest, found = 0.0, text.strip(), False
    while rest:
        digits = rest[: len(rest) - len(rest.lstrip(_DIGITS + "."))]
        rest = rest[len(digits) :].lstrip()
        unit = rest[: len(rest) - len(rest.lstrip("abcdefghijklmnopqrstuvwxyzMµμ"))]
        rest = rest[len(unit) :].lstrip()
        if digits.count(".") > 1 or not digits.strip(".") or unit not in _UNITS:
            return None
        total += float(digits) * _UNITS[unit]
        found = True
    return total if found else None


def describe(seconds: float) -> str:
    """A time span for people, as systemd writes it, to a tenth of a second."""
    if seconds == INFINITE:
        return "infinity"
    if seconds < 60:
        return f"{seconds:.3g}s"
    parts = []
    rest = round(seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if rest >= size:
            parts.append(f"{rest // size}{unit}")
            rest %= size
    return " ".join(parts)


@frozen
class Parts:
    """How long the steps of a stop may take, in seconds."""

    # From the first request to SIGTERM.
    guest: float = STOP - TERMINATE - KILL
    terminate: float = TERMINATE
    kill: float = KILL


def parts(stop: float, terminate: float | None = None, guest: float = INFINITE) -> Parts:
    """The parts of a stop that is bounded.

    Args:
        stop: TimeoutStopSec=.
        terminate: how long the hypervisor has for ending by SIGTERM, a half of the stop at most;
            if nobody said so, a third.
        guest: how long the guest should have, if that is less than what is left.
    """
    wanted = TERMINATE if terminate is None else terminate
    if stop == INFINITE:
        return Parts(guest, wanted, KILL)
    kill = min(KILL, stop / 6)
    ends = min(wanted, stop / (3 if terminate is None else 2))
    return Parts(min(guest, stop - ends - kill), ends, kill)


def stop_for(guest: float, terminate: float | None = None) -> float:
    """The TimeoutStopSec= that leaves the guest so long; parts() the other way round."""
    if terminate is None:
        return min(
            guest + TERMINATE + KILL, (guest + TERMINATE) * 6 / 5, (guest + KILL) * 3 / 2, guest * 2
        )
    return min(guest + terminate + KILL, (guest + terminate) * 6 / 5, (guest + KILL) * 2, guest * 3)
