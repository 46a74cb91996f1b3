# SPDX-License-Identifier: MIT
"""`microvm init`: what it says, and to whom."""

from __future__ import annotations

import sys

import click

from .. import init, names
from ..init import Wish
from ..paths import HostPaths


def make(wish: Wish, host: HostPaths, output: str | None, *, replaces: bool) -> None:
    """Make a guest and declare it, or write the declaration to `output`, `-` for standard output.

    Raises:
        MicrovmHostError: it could not be made.
    """
    if output is not None:
        text = init.make(wish, host, say)
        if output == "-":
            sys.stdout.write(text)
        else:
            init.write(output, text)
        return
    change = init.declare(wish, host, say, replaces=replaces)
    click.echo(f"declared {host.declaration(wish.name)}")
    click.echo(change.describe())
    if change.wants_restart:
        click.echo(f"it still runs the former: systemctl restart {names.unit(wish.name)}")
    else:
        click.echo(f"start it: systemctl start {names.unit(wish.name)}")
    click.echo(f"its console: microvm console {wish.name}")


def say(text: str) -> None:
    click.echo(text, err=True)
