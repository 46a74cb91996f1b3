# SPDX-License-Identifier: MIT
"""Settings that units give their helpers in the environment."""

from __future__ import annotations

import os

from .. import log, names, timespan

SHORTEST = 0.1  # seconds


def seconds(variable: str, default: float, *, is_said: bool = False) -> float:
    """A time span of the environment.

    Args:
        default: what counts if it is not set, or is no time span, as systemd ignores such.
        is_said: that it is none was said before, at the start.
    """
    text = os.environ.get(variable, "")
    if not text:
        return default
    found = timespan.parse(text)
    if found is not None and found >= SHORTEST:
        return found
    if not is_said:
        why = "is no time span, such as 90, 5min or infinity"
        if found is not None:
            why = "is shorter than 100ms"
        log.warning(f"{variable}={text!r} {why}: ignored")
    return default


def number(variable: str, default: int) -> int:
    """A whole number of the environment."""
    text = os.environ.get(variable, "")
    if not text or (names.is_number(text) and len(text) < 10):
        return int(text or default)
    log.warning(f"{variable}={text!r} is no number: {default} it is")
    return default
