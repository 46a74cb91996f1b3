# SPDX-License-Identifier: MIT
"""Says of VMs on QEMU that they are emulated, which nothing else tells from a slow guest."""

from __future__ import annotations

import click

from .. import kvm, runner, service
from ..errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..paths import HostPaths

# Others have nothing but KVM, and say so themselves.
_EMULATES = "qemu"
# Names in one line.
_SHOWN = 5


def reason(vm: str, package: runner.Package, host: HostPaths) -> str | None:
    """Why a VM's guest is emulated; None if it is not."""
    if package.hypervisor != _EMULATES:
        return None
    # Of the user asks systemd, which takes milliseconds for each VM.
    if why := kvm.why_not(None, host):
        return why
    try:
        identity = service.identity(vm)
    except MicrovmHostError:
        identity = None
    return kvm.why_not(identity, host)


def warn(vms: Iterable[str], host: HostPaths) -> None:
    """Say of the current packages of VMs which are emulated, in a line for each reason."""
    found: dict[str, list[str]] = {}
    for vm in vms:
        try:
            why = reason(vm, runner.load(host.current(vm)), host)
        except (MicrovmHostError, OSError):
            # Whoever starts it is told.
            continue
        if why is not None:
            found.setdefault(why, []).append(vm)
    for why, emulated in found.items():
        shown = ", ".join(emulated[:_SHOWN]) + (
            f" and {len(emulated) - _SHOWN} more" if len(emulated) > _SHOWN else ""
        )
        click.echo(f"microvm: {shown}: without KVM, about ten times slower: {why}", err=True)
