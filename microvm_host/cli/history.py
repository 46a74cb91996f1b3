# SPDX-License-Identifier: MIT
"""`microvm history`: the packages that a VM had, and what each change was."""

from __future__ import annotations

import json
import os
import time

import click

from .. import diff, state, store
from .table import paint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..paths import HostPaths

_SHORT = 12
_FILES_SHOWN = 4


def show(vm: str, host: HostPaths, *, as_json: bool, as_diff: bool) -> None:
    """Print the packages that a VM had, newest last.

    Args:
        as_diff: with what changed in their files, instead of in the keys of the declaration.
    """
    entries = store.history(vm, host)
    if as_json:
        click.echo(json.dumps(_rows(entries, vm, host), indent=2))
        return
    if not entries:
        click.echo(
            f"microvm: {vm} has no history: its package was not made of a declaration", err=True
        )
    before = None
    for entry, row in zip(entries, _rows(entries, vm, host, has_diffs=as_diff), strict=True):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        words = [word for word in ("current", "booted") if row[word]]
        words += [] if row["available"] else ["no longer kept"]
        words += ["a rollback"] if entry.instead_of else []
        digest = os.path.basename(entry.package)[:_SHORT]
        click.echo(f"{when}  {paint('bold', digest)}  {', '.join(words)}".rstrip())
        lines = _changes(before, entry) if before and not as_diff else row["changes"] or []
        assert isinstance(lines, list)
        for line in lines:
            colour = {"+": "green", "-": "red", "@": "faint"}.get(line[0]) if as_diff else None
            click.echo(f"    {paint(colour, line) if colour else line}")
        before = entry


def _rows(
    entries: tuple[store.Entry, ...], vm: str, host: HostPaths, *, has_diffs: bool = True
) -> list[dict[str, object]]:
    current = state.pointed_to(host.current(vm))
    booted = state.booted(vm, host)
    rows: list[dict[str, object]] = []
    before: store.Entry | None = None
    for entry in entries:
        keys = _keys(before, entry) if before else None
        rows.append(
            {
                "package": entry.package,
                "time": entry.time,
                "rolled_back_from": entry.instead_of,
                "current": entry.package == current,
                "booted": entry.package == booted,
                "available": os.path.isdir(entry.package),
                "keys": None
                if keys is None
                else [{"key": key, "before": old, "after": new} for key, old, new in keys],
                "changes": diff.diff(before.package, entry.package)
                if has_diffs and before and _can_compare(before, entry)
                else None,
            }
        )
        before = entry
    return rows


def _can_compare(before: store.Entry, after: store.Entry) -> bool:
    return os.path.isdir(before.package) and os.path.isdir(after.package)


def _keys(before: store.Entry, after: store.Entry) -> list[tuple[str, object, object]] | None:
    """The keys with other values, None if they are not known of both."""
    if before.declared is None or after.declared is None:
        return None
    return diff.changed_keys(before.declared, after.declared)


def _changes(before: store.Entry, after: store.Entry) -> list[str]:
    """What changed, a line for each key; or the files, where no key says it."""
    if keys := _keys(before, after):
        return [_line(*each) for each in keys]
    if before.package == after.package or not _can_compare(before, after):
        return []
    files = diff.changed_files(before.package, after.package)
    more = f" and {len(files) - _FILES_SHOWN} more" if len(files) > _FILES_SHOWN else ""
    return [f"changed: {', '.join(files[:_FILES_SHOWN])}{more}"] if files else []


def _line(key: str, before: object, after: object) -> str:
    if before is None:
        return f"{key} = {_text(after)} (new)"
    return f"{key}: {_text(before)} → {_text(after) if after is not None else 'gone'}"


def _text(value: object) -> str:
    return json.dumps(value, ensure_ascii=True)
