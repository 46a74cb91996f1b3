# SPDX-License-Identifier: MIT
"""Prints the listing; colours on a terminal only (no-color.org).

Must not import click: it stands behind `microvm -l`.
"""

from __future__ import annotations

import os
import sys
import time

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
    *,
    as_lines: bool = False,
) -> None:
    """Print what VMs there are; raises MicrovmHostError.

    Args:
        as_lines: a sentence for each as microvm.nix has it, in place of the table.
    """
    rows = listing.rows(host, only, newest_by_building, details=not as_lines)
    show(rows, host, as_lines=as_lines)


def show(rows: list[listing.Row], host: HostPaths, *, as_lines: bool = False) -> None:
    """Print VMs as `show_list` does."""
    if not rows:
        sys.stderr.write(
            f"no microVMs in {host.state}; `microvm init NAME` makes one to begin with\n"
        )
    if as_lines:
        lines = [listing.as_text(row, paint) for row in rows]
    else:
        lines = table(rows, time.time(), _width()) if rows else []
    sys.stdout.write("".join(f"{line}\n" for line in lines))
    sys.stdout.flush()


def _width() -> int | None:
    """How long a line may be: as long as the terminal is wide, and any length elsewhere."""
    if not sys.stdout.isatty():
        return None
    try:
        # What a terminal of unknown size tells is 0.
        return os.get_terminal_size().columns or None
    except OSError:
        return None


_HEADS = ("NAME", "STATE", "SINCE", "VERSION", "ADDRESS", "MEMORY", "NOTES")
_COLOURS = {"running": "green", "starting": "green", "failed": "red", "broken": "red"} | {
    "stopping": "yellow",
    "paused": "yellow",
}


def table(rows: list[listing.Row], now: float, width: int | None) -> list[str]:
    """The lines of the table: a head, and one line for each VM, cut at the width."""
    cells = [_HEADS, *((*_cells(row, now), ", ".join(_notes(row))) for row in rows)]
    # Without any note there is no such column.
    count = len(_HEADS) if any(line[-1] for line in cells[1:]) else len(_HEADS) - 1
    widths = [max(len(line[column]) for line in cells) for column in range(count)]
    lines = []
    for number, texts in enumerate(cells):
        padded = [text.ljust(size) for text, size in zip(texts, widths, strict=False)]
        line = "  ".join(padded).rstrip()
        if width is not None and len(line) > width:
            line = f"{line[: width - 1]}…"
        colour = _COLOURS.get(rows[number - 1].status, "") if number else ""
        start, end = widths[0] + 2, widths[0] + 2 + len(texts[1])
        if colour and len(line) >= end:
            line = f"{line[:start]}{paint(colour, line[start:end])}{line[end:]}"
        lines.append(line)
    return lines


def _cells(row: listing.Row, now: float) -> tuple[str, ...]:
    version = row.booted or row.current
    more = f" +{len(row.addresses) - 1}" if len(row.addresses) > 1 else ""
    return (
        row.name,
        row.status,
        "-" if row.since is None else f"{_span(now - row.since)} ago",
        version.short if version else "-",
        f"{row.addresses[0]}{more}" if row.addresses else "-",
        "-" if row.memory is None else f"{row.memory >> 20} MB",
    )


def _notes(row: listing.Row) -> list[str]:
    """What else there is to know about a VM; for a command that fixes it there is `-l`."""
    found = [row.problem] if row.problem else []
    # Why, unless somebody paused it: that says the state.
    if row.paused not in ("", "paused"):
        found.append(row.paused)
    if row.state == "outdated" and row.current is not None and row.newest is not None:
        found.append(f"update to {_short(row.current, row.newest)}")
    elif row.state == "stale" and row.current is not None and row.booted is not None:
        found.append(f"restart for {_short(row.booted, row.current)}")
    if row.lost:
        found.append(f"lost share {', '.join(row.lost)}")
    if row.is_undeclared:
        found.append("no longer declared")
    return found


def _short(old: listing.Version, new: listing.Version) -> str:
    """A short name of a version that tells it from another one."""
    return new.short if old.short != new.short else listing.labels(old, new)[1]


def _span(seconds: float) -> str:
    """A span of time in its largest unit, as systemd abbreviates these."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{max(int(seconds), 0)}s"
