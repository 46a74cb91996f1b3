# SPDX-License-Identifier: MIT
"""What a process of a fuzzing run does; it is not to be used for anything after that."""

from __future__ import annotations

import time

from . import engine, inputs
from .engine import Report
from .targets import BY_NAME, isolate


def chunk(task: tuple[str, int, str, float]) -> Report:
    """Fuzz a target: its name, how many inputs, the seed, and for how many seconds at most."""
    name, runs, seed, seconds = task
    isolate()
    return engine.fuzz(BY_NAME[name], runs, seed, until=time.monotonic() + seconds)


def least(task: tuple[str, list[inputs.Tree]]) -> list[inputs.Tree]:
    """See engine.least."""
    name, trees = task
    isolate()
    return engine.least(BY_NAME[name], trees)
