# SPDX-License-Identifier: MIT
"""A plan is a list of steps that say what they will do and do it, recorded, or not at all.

Planning looks and checks; applying changes. The list in between can be printed and compared.
"""

from __future__ import annotations

from . import log
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from .record import Record

    class Step(Protocol):
        """One change of the host."""

        def describe(self) -> str:
            """What it does, for people: `create tap web0 for alice`."""

        def apply(self, record: Record) -> None:
            """Do it, having written in the record what undoes it. Raises MicrovmHostError."""

    # Undoes what a record says, going on past failures, which it returns as lines.
    Undo = Callable[[Record], list[str]]


def carry_out(steps: Sequence[Step], record: Record, undo: Undo) -> None:
    """Apply the steps in order; if one fails, undo those before it.

    Raises:
        MicrovmHostError: of the step that failed. What could not be undone is logged.
    """
    try:
        for step in steps:
            log.status(step.describe())
            step.apply(record)
    except BaseException:
        for problem in undo(record):
            log.error(problem, vm=record.vm)
        raise


def take_back(record: Record, undo: Undo) -> None:
    """Undo a record, to the end.

    Raises:
        MicrovmHostError: something could not be undone; the record stays, naming it.
    """
    problems = undo(record)
    for problem in problems:
        log.error(problem, vm=record.vm)
    if problems:
        raise MicrovmHostError(
            f"{len(problems)} of the things that were set up could not be undone",
            path=record.path,
            hint="the log names them"
            + ("; `microvm reconcile --apply` tries again" if record.read() else ""),
        )
