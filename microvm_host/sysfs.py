# SPDX-License-Identifier: MIT
"""Reading sysfs: attributes, which are files of a line, and links, whose last part says it."""

from __future__ import annotations

import os


def attribute(directory: str, name: str) -> str | None:
    """An attribute without its line end; None if it or the directory is not there."""
    try:
        with open(f"{directory}/{name}", encoding="ascii", errors="replace") as source:
            return source.read().strip()
    except OSError:
        return None


def linked(directory: str, name: str) -> str | None:
    """The name of what a link leads to, as `e1000e` for `driver`; None if there is no link."""
    try:
        return os.path.basename(os.readlink(f"{directory}/{name}"))
    except OSError:
        return None


def entries(directory: str) -> list[str]:
    """The names in a directory, sorted; none if it is not there."""
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []
