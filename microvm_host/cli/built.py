# SPDX-License-Identifier: MIT
"""`microvm build`, `show` and `history`: packages that are made of declarations."""

from __future__ import annotations

import json
import os
import subprocess
import time

import click

from .. import state, store
from ..diff import diff
from ..errors import MicrovmHostError
from ..paths import MICROVM_RUN, HostPaths
from .table import paint

_SHORT = 12


def build(path: str, output: str) -> None:
    """Write the package of a declaration into a directory; raises MicrovmHostError."""
    from ..build import declared
    from ..declaration import derived

    declared.tree(path, host_id=derived.host_id(HostPaths().machine_id)).write(output)


def command_line(vm: str, host: HostPaths) -> list[str]:
    """The words of the command line that a start of a VM would be now.

    Raises:
        MicrovmHostError: its package is not one that could be asked.
    """
    # What runs is what counts; a VM that is down shows what would run.
    link = host.booted(vm) if state.booted(vm, host) else host.current(vm)
    package = os.path.realpath(link)
    if not store.is_ours(package, host):
        raise MicrovmHostError(
            f"the package of {vm} was not made of a declaration, and does not tell",
            path=package,
            hint=f"look into {MICROVM_RUN} there",
        )
    done = subprocess.run(
        [f"{package}/{MICROVM_RUN}"],
        env={**os.environ, "MICROVM_SHOW": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MicrovmHostError(f"{MICROVM_RUN} ended with {done.returncode}", path=package)
    return done.stdout.splitlines()


def show_history(vm: str, host: HostPaths, *, as_json: bool) -> None:
    """Print the packages that a VM had, newest last, with what each changed."""
    entries = store.history(vm, host)
    current = state.pointed_to(host.current(vm))
    booted = state.booted(vm, host)
    rows: list[dict[str, object]] = []
    changes: list[list[str]] = []
    before = None
    for entry in entries:
        is_there = os.path.isdir(entry.package)
        can_compare = before is not None and is_there and os.path.isdir(before)
        changes.append(diff(before, entry.package) if can_compare and before else [])
        rows.append(
            {
                "package": entry.package,
                "time": entry.time,
                "rolled_back_from": entry.instead_of,
                "current": entry.package == current,
                "booted": entry.package == booted,
                "available": is_there,
                "changes": changes[-1] if can_compare else None,
            }
        )
        before = entry.package
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    if not rows:
        click.echo(
            f"microvm: {vm} has no history: its package was not made of a declaration", err=True
        )
    for entry, row, lines in zip(entries, rows, changes, strict=True):
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry.time))
        words = [word for word in ("current", "booted") if row[word]]
        words += [] if row["available"] else ["no longer kept"]
        words += ["a rollback"] if entry.instead_of else []
        digest = os.path.basename(entry.package)[:_SHORT]
        click.echo(f"{when}  {paint('bold', digest)}  {', '.join(words)}".rstrip())
        for line in lines:
            colour = {"+": "green", "-": "red", "@": "faint"}.get(line[0])
            click.echo(f"    {paint(colour, line) if colour else line}")
