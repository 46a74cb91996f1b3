# SPDX-License-Identifier: MIT
"""How much tests do of what only shows by being repeated: a little in `make test`, or all of it.

`make test-faults` asks for the latter. The one place that reads MICROVM_HOST_TEST_ROUNDS.
"""

from __future__ import annotations

import os
from typing import TypeVar

_T = TypeVar("_T")

_VARIABLE = "MICROVM_HOST_TEST_ROUNDS"


def rounds(few: _T, full: _T) -> _T:
    """`few`, or `full` where the environment asks for it."""
    match os.environ.get(_VARIABLE) or "few":
        case "few":
            return few
        case "full":
            return full
        case other:
            raise ValueError(f"{_VARIABLE}={other!r} is neither few nor full")


def spread(points: int, few: int) -> list[int]:
    """The numbers from 1 to `points`, or so few of them, evenly, with the first and the last."""
    chosen = min(points, rounds(few, points))
    if chosen < 2:
        return [1][:chosen]
    return sorted({1 + round(n * (points - 1) / (chosen - 1)) for n in range(chosen)})
