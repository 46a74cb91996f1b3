# SPDX-License-Identifier: MIT
"""What is different between two packages: their files, and what they were declared by.

For people and for `microvm history`: nothing acts on it.
"""

from __future__ import annotations

import difflib
import os
import stat

from .declaration.document import IDENTITIES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

# A script or a list is no longer than that; the rest are kernels and disks.
_TEXT_MAX = 256 * 1024


def diff(before: str, after: str) -> list[str]:
    """The lines of a unified diff; one line for a file that is no text, saying that it differs."""
    old, new = _files(before), _files(after)
    found: list[str] = []
    for path in sorted({*old, *new}):
        if old.get(path) == new.get(path):
            continue
        one, other = (files.get(path, "") for files in (old, new))
        if one.startswith("\0") or other.startswith("\0"):
            verb = "added" if path not in old else "removed" if path not in new else "changed"
            found.append(f"{verb} {path}")
            continue
        found += difflib.unified_diff(
            one.splitlines(),
            other.splitlines(),
            f"a/{path}" if path in old else os.devnull,
            f"b/{path}" if path in new else os.devnull,
            n=1,
            lineterm="",
        )
    return found


def changed_files(before: str, after: str) -> list[str]:
    """The files that two packages do not have alike."""
    old, new = _files(before), _files(after)
    return [path for path in sorted({*old, *new}) if old.get(path) != new.get(path)]


def changed_keys(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys of a declaration that have other values now, as `volumes[data.img].size`.

    Each with its former and its new value; None stands for none.
    """
    old, new = dict(_keys(before, "")), dict(_keys(after, ""))
    return [
        (key, old.get(key), new.get(key))
        for key in dict.fromkeys([*old, *new])
        if old.get(key) != new.get(key)
    ]


def _keys(table: dict[str, Any], at: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        # What tells the tables of a list apart.
        identity = "" if at else IDENTITIES.get(key, "")
        if isinstance(value, dict):
            yield from _keys(value, f"{at}{key}.")
        elif identity and isinstance(value, list) and all(isinstance(each, dict) for each in value):
            for each in value:
                yield from _keys(each, f"{at}{key}[{each.get(identity)}].")
        else:
            yield f"{at}{key}", value


def _files(package: str) -> dict[str, str]:
    """What each file of a package says; of one that is no text, its digest after a NUL."""
    return dict(_below(package, ""))


def _below(package: str, directory: str) -> Iterator[tuple[str, str]]:
    for name in sorted(os.listdir(f"{package}/{directory}")):
        path = f"{directory}/{name}".lstrip("/")
        status = os.lstat(f"{package}/{path}")
        if stat.S_ISLNK(status.st_mode):
            yield path, f"-> {os.readlink(f'{package}/{path}')}"
        elif stat.S_ISDIR(status.st_mode):
            yield from _below(package, path)
        elif stat.S_ISREG(status.st_mode):
            yield path, _content(f"{package}/{path}", status.st_size)


def _content(path: str, size: int) -> str:
    with open(path, "rb") as source:
        if size <= _TEXT_MAX:
            try:
                return source.read().decode()
            except UnicodeDecodeError:
                source.seek(0)
        from hashlib import file_digest

        return f"\0{file_digest(source, 'sha256').hexdigest()}"
