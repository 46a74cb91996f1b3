# SPDX-License-Identifier: MIT
"""A declaration as TOML has it: `NAME.toml` with the drop-ins of `NAME.toml.d` laid over it.

What is laid over: a table is merged, and so are the tables of an array that have the same
identity (`id` of an interface, `tag` of a share, `image` of a volume, `path` of a device); other
tables of arrays are appended, and so are the elements of other lists, which an empty list empties
first. All else is replaced.

A document knows where each of its keys stands, for messages. The generator reads documents at
boot: this module imports nothing that it does not need when all is right.
"""

from __future__ import annotations

import os

from ..errors import DeclarationError
from . import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .locate import Path

DROP_INS = ".d"
IDENTITIES = {"interfaces": "id", "shares": "tag", "volumes": "image", "devices": "path"}


class Document:
    """One declaration, merged: its `table`, and whence it comes."""

    def __init__(self, path: str) -> None:
        """Read it.

        Raises:
            DeclarationError: a file of it is not there, cannot be read or is not TOML.
        """
        self.path = path
        self.table: dict[str, Any] = {}
        # The files in the order in which they were laid over each other, with their texts.
        self._layers: list[tuple[str, str]] = []
        # What did not come from the first file: its path here, the file's number, its path there.
        self._origins: dict[Path, tuple[int, Path]] = {}
        self.table = self._read(path)
        for drop_in in _drop_ins(path):
            self._merge(self.table, self._read(drop_in), (), ())

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(path for path, _ in self._layers)

    def error(self, at: Path, message: str, hint: str = "") -> DeclarationError:
        """An error about a key or a value, with the file and the line that it has there."""
        from .locate import line

        layer, there = self._origin(at)
        path, text = self._layers[layer]
        return DeclarationError(
            message, path=path, line=line(text, there) if there else None, hint=hint
        )

    def _origin(self, at: Path) -> tuple[int, Path]:
        for length in range(len(at), 0, -1):
            if at[:length] in self._origins:
                layer, there = self._origins[at[:length]]
                return layer, there + at[length:]
        return 0, at

    def _read(self, path: str) -> dict[str, Any]:
        try:
            # Unbuffered: it is read at one stroke.
            with open(path, "rb", buffering=0) as source:
                # Editors may begin a file with a byte order mark, which TOML does not know.
                text = source.readall().decode().removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            raise DeclarationError("is not UTF-8 text", path=path) from error
        except FileNotFoundError as error:
            if os.path.islink(path):
                raise DeclarationError("is a link to what does not exist", path=path) from error
            vm = os.path.basename(path).removesuffix(".toml")
            message = f"microVM {vm} is not declared: there is no such file"
            raise DeclarationError(message, path=path) from error
        except OSError as error:
            raise DeclarationError(f"cannot be read: {error.strerror}", path=path) from error
        table = _table(text, path)
        self._layers.append((path, text))
        return table

    def _merge(self, base: dict[str, Any], over: dict[str, Any], at: Path, there: Path) -> None:
        for key, value in over.items():
            here, from_where = (*at, key), (*there, key)
            before = base.get(key)
            if isinstance(before, dict) and isinstance(value, dict):
                self._merge(before, value, here, from_where)
            elif isinstance(before, list) and isinstance(value, list) and value:
                identity = IDENTITIES.get(key, "") if not at else ""
                for number, element in enumerate(value):
                    self._add(before, element, identity, here, (*from_where, number))
            else:
                base[key] = value
                self._forget(here)
                self._origins[here] = (len(self._layers) - 1, from_where)

    def _add(self, base: list[Any], element: Any, identity: str, at: Path, there: Path) -> None:
        """Merge an element into the one of its identity, or append it."""
        if identity and isinstance(element, dict) and identity in element:
            for number, other in enumerate(base):
                if isinstance(other, dict) and other.get(identity) == element[identity]:
                    self._merge(other, element, (*at, number), there)
                    return
        base.append(element)
        self._origins[(*at, len(base) - 1)] = (len(self._layers) - 1, there)

    def _forget(self, at: Path) -> None:
        for path in [each for each in self._origins if each[: len(at)] == at]:
            del self._origins[path]


def _drop_ins(path: str) -> list[str]:
    directory = path + DROP_INS
    try:
        files = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DeclarationError(f"cannot be read: {error.strerror}", path=directory) from error
    return [f"{directory}/{file}" for file in files if is_declaration(file)]


def is_declaration(file: str) -> bool:
    """Whether a file of a directory counts: editors leave hidden ones, which declare nothing."""
    return file.endswith(".toml") and not file.startswith(".")


def _table(text: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] | None = plain.table(text)
    if found is not None:
        return found
    # Not for the others: it takes longer to import than a hundred of them to read.
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        # Beside its own TOMLDecodeError: numbers of thousands of digits, and nesting without end.
        message, line = _syntax_error(str(error))
        raise DeclarationError(f"is not TOML: {message}", path=path, line=line) from error


def _syntax_error(message: str) -> tuple[str, int | None]:
    """Take apart what tomllib says: `Invalid value (at line 3, column 5)`."""
    text, _, place = message.rpartition(" (at line ")
    number = place.partition(",")[0]
    return (text, int(number)) if text and number.isdigit() else (message, None)
