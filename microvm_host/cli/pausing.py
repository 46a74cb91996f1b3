# SPDX-License-Identifier: MIT
"""`microvm pause` and `microvm resume`."""

from __future__ import annotations

import sys

import click

from .. import control, runstate
from ..errors import MicrovmHostError
from . import access

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ..paths import HostPaths


def pause(vms: Sequence[str], host: HostPaths) -> None:
    """Pause guests; exits with 1 if one could not be."""

    def one(vm: str) -> str:
        before = runstate.pause(access.running(vm, host))
        return f"is paused already ({before})" if before in control.PAUSED else "paused"

    _each(vms, one)


def resume(vms: Sequence[str], host: HostPaths) -> None:
    """Resume guests; exits with 1 if one could not be."""

    def one(vm: str) -> str:
        before = runstate.resume(access.running(vm, host))
        return f"resumed, was paused ({before})" if before in control.PAUSED else "runs already"

    _each(vms, one)


def _each(vms: Sequence[str], do: Callable[[str], str]) -> None:
    """Do it for each VM: one that fails does not keep the others from it."""
    failed: MicrovmHostError | None = None
    for vm in vms:
        try:
            click.echo(f"{vm}: {do(vm)}")
        except MicrovmHostError as error:
            click.echo(f"microvm: {error}", err=True)
            failed = failed or error
    if failed:
        sys.exit(failed.exit_code)
