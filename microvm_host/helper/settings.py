# SPDX-License-Identifier: MIT
"""Settings that units give their helpers in the environment."""

from __future__ import annotations

import os

from .. import log, names

# Longer ones would overflow what systemd counts microseconds in; a day is "wait for ever".
SECONDS_MAX = 86400.0


def seconds(variable: str, default: float) -> float:
    """A time of the environment, which may be too long for anybody to wait, but is one."""
    text = os.environ.get(variable, "")
    if not text:
        return default
    found = as_seconds(text)
    if found is None:
        log.warning(f"{variable}={text!r} is no time in seconds: {default:g} it is")
        return default
    return found


def as_seconds(text: str) -> float | None:
    """A time in seconds; None if it is none that anybody could wait for."""
    if text.split() != [text]:
        # float() bears with white space, and the guard reads files line by line.
        return None
    try:
        seconds = float(text)
    except ValueError:
        return None
    # False for `nan` as well.
    return seconds if 0.1 <= seconds <= SECONDS_MAX else None


def number(variable: str, default: int) -> int:
    """A whole number of the environment."""
    text = os.environ.get(variable, "")
    if not text or (names.is_number(text) and len(text) < 10):
        return int(text or default)
    log.warning(f"{variable}={text!r} is no number: {default} it is")
    return default
