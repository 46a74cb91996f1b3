# SPDX-License-Identifier: MIT
"""Checks of the values in a declaration that are more than a string or a truth.

Each takes what TOML had and gives what is meant, or raises ValueError with the rule that is
broken, worded to follow the value.
"""

from __future__ import annotations

from .. import timespan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# Nobody waits longer.
SHORTEST, LONGEST = 0.1, 86400.0


def seconds(value: object) -> float:
    """A time: a number of seconds, or a string such as `90s` or `1h 30min`."""
    rule = 'is not a time; write 90, "90s" or "1min 30s"'
    if isinstance(value, str):
        found = timespan.parse(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        found = float(value) if abs(value) <= LONGEST else LONGEST + 1
    else:
        found = None
    if found is None:
        raise ValueError(rule)
    if not SHORTEST <= found <= LONGEST:
        raise ValueError("is not between 100ms and 24h")
    return found


def number(lowest: int, highest: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("is not a whole number")
        if not lowest <= value <= highest:
            raise ValueError(f"is not between {lowest} and {highest}")
        return value

    return check


def one_of(*words: str) -> Callable[[object], str]:
    def check(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError(f"is none of {', '.join(words)}")
        return value

    return check
