# SPDX-License-Identifier: MIT
"""The kinds of values that a key of a declaration can have: each checks, and describes itself.

A kind takes what TOML had and gives what is meant, or raises ValueError with the rule that is
broken, worded to follow the value, or NameInvalid, which has the value in it. The same kinds give
the JSON Schema, so that an editor and the toolkit do not disagree.
"""

from __future__ import annotations

from ..errors import NameInvalid
from . import elsewhere
from .nearest import nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .document import Document
    from .locate import Path


class Required:
    """The default of a key that has none."""


REQUIRED = Required()


class Kind:
    """Anything; the base of the others."""

    def read(self, value: object, at: Path, document: Document) -> Any:
        """What the value at a place of a document means; raises DeclarationError."""
        try:
            return self.check(value)
        except ValueError as error:
            raise document.error(at, f"{dotted(at)} = {shown(value)} {error}") from error
        except NameInvalid as error:
            raise document.error(at, f"{dotted(at)}: {error.message}", error.hint) from error

    def check(self, value: object) -> Any:
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        """JSON Schema's words for it (json-schema.org, 2020-12)."""
        raise NotImplementedError


class Text(Kind):
    """A string of one printable line, and what else `check` wants of it."""

    def __init__(
        self,
        check: Callable[[str], str] | None = None,
        pattern: str = "",
        *,
        may_be_empty: bool = False,
    ) -> None:
        self._check = check
        self._pattern = pattern
        self._may_be_empty = may_be_empty

    def check(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("is not a string")
        if not value and not self._may_be_empty:
            raise ValueError("is empty")
        if not value.isprintable():
            # It becomes a line of a file, or a word of a command line that people read.
            raise ValueError("is not one printable line")
        return self._check(value) if self._check and value else value

    def schema(self) -> dict[str, Any]:
        found: dict[str, Any] = {"type": "string"}
        if not self._may_be_empty:
            found["minLength"] = 1
        if self._pattern:
            found["pattern"] = self._pattern
        return found


class Truth(Kind):
    def check(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("is not true or false")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


class Number(Kind):
    def __init__(self, lowest: int, highest: int) -> None:
        self._lowest, self._highest = lowest, highest

    def check(self, value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise ValueError("is not a whole number")
        if not self._lowest <= value <= self._highest:
            raise ValueError(f"is not between {self._lowest} and {self._highest}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self._lowest, "maximum": self._highest}


class Choice(Kind):
    def __init__(self, *words: str) -> None:
        self._words = words

    def check(self, value: object) -> str:
        if not isinstance(value, str) or value not in self._words:
            near = nearest(str(value), self._words)
            rule = f"is none of {', '.join(self._words)}"
            raise ValueError(f"{rule}; did you mean {near}?" if near else rule)
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self._words)}


class List(Kind):
    """A list of values of one kind; gives a tuple."""

    def __init__(self, of: Kind) -> None:
        self._of = of

    def read(self, value: object, at: Path, document: Document) -> Any:
        if not isinstance(value, list):
            hint = f"it is written [[{dotted(at)}]]" if isinstance(self._of, Table) else ""
            raise document.error(at, f"{dotted(at)} = {shown(value)} is not a list", hint)
        return tuple(
            self._of.read(element, (*at, number), document) for number, element in enumerate(value)
        )

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self._of.schema()}


class Map(Kind):
    """A table whose keys anybody may choose; gives pairs, by key."""

    def __init__(self, key: Kind, value: Kind) -> None:
        self._key, self._value = key, value

    def read(self, value: object, at: Path, document: Document) -> Any:
        if not isinstance(value, dict):
            raise document.error(at, f"{dotted(at)} = {shown(value)} is not a table")
        return tuple(
            (
                self._key.read(key, (*at, key), document),
                self._value.read(value[key], (*at, key), document),
            )
            for key in sorted(value)
        )

    def schema(self) -> dict[str, Any]:
        return {"type": "object", "additionalProperties": self._value.schema()}


class Key:
    """One key of a table: its kind, its default and what it is for, in a sentence or two.

    A default of None is what the toolkit finds by itself.
    """

    def __init__(self, kind: Kind, default: object, about: str) -> None:
        self.kind, self.default, self.about = kind, default, about

    @property
    def is_required(self) -> bool:
        return self.default is REQUIRED


class Table(Kind):
    """A table with keys of its own; gives a value for each, by name."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self.keys = keys

    def read(self, value: object, at: Path, document: Document) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise document.error(at, f"{dotted(at)} = {shown(value)} is not a table")
        for key in value:
            if key not in self.keys:
                raise document.error(
                    (*at, key),
                    f"there is no key {dotted((*at, key))!r}",
                    elsewhere.advice(key, self.keys, dotted(at)),
                )
        found = {}
        for name, key in self.keys.items():
            if name in value:
                found[name] = key.kind.read(value[name], (*at, name), document)
            elif key.is_required:
                about = f"{key.about[0].lower()}{key.about[1:].rstrip('.')}"
                raise document.error(at, f"{dotted((*at, name))} is missing", about)
            elif isinstance(key.kind, Table):
                found[name] = key.kind.read({}, (*at, name), document)
            else:
                found[name] = key.default
        return found

    def schema(self) -> dict[str, Any]:
        properties = {}
        for name, key in self.keys.items():
            properties[name] = {**key.kind.schema(), "description": key.about}
            if key.default is not None and not key.is_required and key.default != ():
                properties[name]["default"] = key.default
        found: dict[str, Any] = {"type": "object", "properties": properties}
        required = [name for name, key in self.keys.items() if key.is_required]
        if required:
            found["required"] = required
        return {**found, "additionalProperties": False}


def dotted(at: Path) -> str:
    """A key as it is written: the line tells which of several tables is meant."""
    keys = [each for each in at if isinstance(each, str)]
    # TOML has quotes for those with anything in them.
    return ".".join(key if key.isprintable() else repr(key) for key in keys)


def shown(value: object) -> str:
    """A value much as TOML has it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
