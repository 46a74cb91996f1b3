# SPDX-License-Identifier: MIT
"""`@frozen` behaves as the standard frozen dataclass does, method by method."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest

from microvm_host.frozen import frozen


@frozen
class Ours:
    name: str
    number: int = 3
    rest: tuple[str, ...] = ()

    @property
    def doubled(self) -> int:
        return self.number * 2


Standard = dataclasses.make_dataclass(
    "Ours",
    [("name", str), ("number", int, 3), ("rest", tuple, ())],
    frozen=True,
    namespace={"doubled": property(lambda self: self.number * 2)},
)
BOTH: list[Any] = [Ours, Standard]

RIGHT: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    (("a",), {}),
    (("a", 1), {}),
    (("a", 1, ("x",)), {}),
    ((), {"name": "a"}),
    (("a",), {"rest": ("y",)}),
    ((), {"rest": (), "number": 0, "name": ""}),
]
WRONG: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((), {}),
    ((), {"number": 1}),
    (("a", 1, (), "too many"), {}),
    (("a",), {"name": "twice"}),
    (("a",), {"unknown": 1}),
    (("a", 1), {"number": 1}),
]


@pytest.mark.parametrize(("arguments", "named"), RIGHT)
def test_construction(arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    ours, standard = (cls(*arguments, **named) for cls in BOTH)
    for field in ("name", "number", "rest", "doubled"):
        assert getattr(ours, field) == getattr(standard, field)
    # The standard one's repr has the qualified name, which is the same for a class of a module.
    assert repr(ours) == repr(standard)
    assert hash(ours) == hash(standard)


@pytest.mark.parametrize("cls", BOTH)
@pytest.mark.parametrize(("arguments", "named"), WRONG)
def test_wrong_construction(cls: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        cls(*arguments, **named)


@pytest.mark.parametrize("cls", BOTH)
def test_equality(cls: Any) -> None:
    assert cls("a") == cls("a", 3) == cls(name="a", rest=())
    assert cls("a") != cls("b")
    assert cls("a") != ("a", 3, ())
    assert cls("a").__eq__(object()) is NotImplemented
    assert len({cls("a"), cls("a"), cls("b")}) == 2
    assert Ours("a") != Standard("a")


@pytest.mark.parametrize("cls", BOTH)
def test_immutability(cls: Any) -> None:
    value = cls("a")
    for field in ("name", "new"):
        with pytest.raises(AttributeError):
            setattr(value, field, "b")
    with pytest.raises(AttributeError):
        del value.name
    assert value == cls("a")


@pytest.mark.parametrize("cls", BOTH)
def test_match(cls: Any) -> None:
    assert cls.__match_args__ == ("name", "number", "rest")
    match cls("a", 1):
        case cls(name, number, ()):
            assert (name, number) == ("a", 1)
        case _:
            raise AssertionError


@pytest.mark.parametrize("cls", BOTH)
def test_hash_of_what_cannot_be_hashed(cls: Any) -> None:
    with pytest.raises(TypeError):
        hash(cls("a", rest=["a list"]))


def test_methods_are_kept() -> None:
    @frozen
    class Empty:
        """Without fields."""

        def word(self) -> str:
            return "kept"

    assert Empty().word() == "kept"
    assert Empty() == Empty()
    assert Empty.__doc__ == "Without fields."


def test_costs_no_import() -> None:
    # The reason that it exists; test_imports holds it for whole helpers.
    assert "dataclasses" not in vars(sys.modules["microvm_host.frozen"])
