# SPDX-License-Identifier: MIT
"""Prints the listing; colours on a terminal only (no-color.org).

Must not import click: it stands behind `microvm -l`.
"""

from __future__ import annotations

import os
import sys

from .. import listing

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..paths import HostPaths
    from ..source import Source

_CODES = {"red": "31", "green": "32", "yellow": "33", "cyan": "36", "bold": "1", "faint": "2"}


def paint(colours: str, text: str) -> str:
    """Text in colours, by their names, where they are wanted."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not sys.stdout.isatty():
        return text
    codes = ";".join(_CODES[colour] for colour in colours.split())
    return f"\033[{codes}m{text}\033[0m"


def show_list(
    host: HostPaths,
    only: tuple[str, ...] = (),
    newest_by_building: Callable[[str, Source], listing.Version | None] | None = None,
) -> None:
    """Print a line for each VM; raises MicrovmHostError."""
    rows = listing.rows(host, only, newest_by_building)
    if not rows:
        sys.stderr.write(
            f"no microVMs in {host.state}; `microvm init NAME` makes one to begin with\n"
        )
    sys.stdout.write("".join(f"{listing.as_text(row, paint)}\n" for row in rows))
    sys.stdout.flush()
