# SPDX-License-Identifier: MIT
"""Reads the TOML that declarations are usually written in, without tomllib.

The generator delays boot, and tomllib, with the regular expressions that it stands on, takes three
times as long to import as all else that the generator needs. Of TOML (toml.io, v1.0.0) this knows
lines of `key = value` with a string in double quotes and no backslash, a truth or a small number,
blank lines and comments. What it does not know for certain it leaves to tomllib, wrong TOML above
all: it never raises.
"""

from __future__ import annotations

_KEY = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
_TRUTHS = {"true": True, "false": False}


def table(text: str) -> dict[str, str | bool | int] | None:
    """What tomllib.loads would give, if all lines of a text are of the plain kind; else None."""
    found: dict[str, str | bool | int] = {}
    for line in text.split("\n"):
        # Leaves out tabs and all other control characters too, allowed or not.
        if not line.isprintable():
            return None
        line = line.strip(" ")
        if not line or line[0] == "#":
            continue
        key, equals, value = line.partition("=")
        key, value = key.rstrip(" "), value.lstrip(" ")
        if not equals or not key or key in found or not _KEY.issuperset(key):
            return None
        if value in _TRUTHS:
            found[key] = _TRUTHS[value]
        elif len(value) >= 2 and value[0] == value[-1] == '"':
            inner = value[1:-1]
            # A comment behind it has a quote in between, if this ends with one.
            if '"' in inner or "\\" in inner:
                return None
            found[key] = inner
        elif value.isascii() and value.isdigit() and len(value) < 10 and str(int(value)) == value:
            found[key] = int(value)
        else:
            return None
    return found
