# SPDX-License-Identifier: MIT
"""Plans: in order, or not at all; undone from the record."""

from __future__ import annotations

from pathlib import Path

import pytest

from microvm_host import log, plan
from microvm_host.errors import MicrovmHostError
from microvm_host.frozen import frozen
from microvm_host.record import Record


@frozen
class Note:
    """A step that only records itself, or fails after it did."""

    name: str
    failure: BaseException | None = None

    def describe(self) -> str:
        return f"note {self.name}"

    def apply(self, record: Record) -> None:
        record.append("note", self.name)
        if self.failure is not None:
            raise self.failure


class Undo:
    """Undoes all but what it is told to fail at."""

    def __init__(self, *stuck: str) -> None:
        self.stuck = stuck
        self.undone: list[str] = []

    def __call__(self, record: Record) -> list[str]:
        problems = []
        for _verb, name in reversed(record.read()):
            if name in self.stuck:
                problems.append(f"{name} is stuck")
            else:
                self.undone.append(name)
        if not problems:
            record.clear()
        return problems


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(str(tmp_path / "web/notes"))


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "status", lambda text: lines.append(f"status: {text}"))
    monkeypatch.setattr(log, "error", lambda text, vm=None: lines.append(f"error: {vm}: {text}"))
    return lines


def test_in_order(record: Record, said: list[str]) -> None:
    undo = Undo()
    plan.carry_out([Note("a"), Note("b")], record, undo)
    assert record.read() == [["note", "a"], ["note", "b"]]
    assert undo.undone == []
    assert said == ["status: note a", "status: note b"]


def test_nothing_to_do(record: Record) -> None:
    plan.carry_out([], record, Undo())
    assert not Path(record.path).exists()


@pytest.mark.parametrize("failure", [MicrovmHostError("no"), OSError("no"), KeyboardInterrupt()])
def test_failure_undoes_in_reverse(record: Record, failure: BaseException) -> None:
    undo = Undo()
    with pytest.raises(type(failure)) as caught:
        plan.carry_out([Note("a"), Note("b"), Note("c", failure), Note("d")], record, undo)
    assert caught.value is failure
    # The failed step too: it wrote itself down before it took hold.
    assert undo.undone == ["c", "b", "a"]
    assert not Path(record.path).exists()


def test_what_cannot_be_undone_is_logged(record: Record, said: list[str]) -> None:
    failure = MicrovmHostError("no")
    undo = Undo("a")
    with pytest.raises(MicrovmHostError) as caught:
        plan.carry_out([Note("a"), Note("b"), Note("c", failure)], record, undo)
    assert caught.value is failure
    assert undo.undone == ["c", "b"]
    assert "error: web: a is stuck" in said
    assert record.read()


def test_take_back(record: Record) -> None:
    for name in "abc":
        Note(name).apply(record)
    undo = Undo()
    plan.take_back(record, undo)
    assert undo.undone == ["c", "b", "a"]
    plan.take_back(record, undo)
    assert undo.undone == ["c", "b", "a"]


def test_take_back_goes_on_and_keeps_the_record(record: Record, said: list[str]) -> None:
    for name in "abc":
        Note(name).apply(record)
    undo = Undo("b", "c")
    with pytest.raises(MicrovmHostError, match="2 of the things that were set up") as caught:
        plan.take_back(record, undo)
    assert caught.value.path == record.path
    assert caught.value.hint == "the log names them; `microvm reconcile --apply` tries again"
    assert undo.undone == ["a"]
    assert said == ["error: web: c is stuck", "error: web: b is stuck"]
    assert len(record.read()) == 3


def test_take_back_of_what_is_not_tried_again(record: Record, said: list[str]) -> None:
    """Told, but nothing that could be undone is left."""
    Note("a").apply(record)

    def undo(record: Record) -> list[str]:
        record.clear()
        return ["a was there no more"]

    with pytest.raises(MicrovmHostError) as caught:
        plan.take_back(record, undo)
    assert caught.value.hint == "the log names them"
    assert said == ["error: web: a was there no more"]
