# SPDX-License-Identifier: MIT
"""`microvm pci` and `microvm pci check`."""

from __future__ import annotations

import json
import sys

import click

from .. import pcibus, pcilisting, systemd
from ..errors import EXIT_FAILED
from ..paths import HostPaths
from .table import paint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..pcilisting import Check, Row


def show(host: HostPaths, *, bridges: bool, as_json: bool) -> None:
    """Print the devices of the host."""
    rows = pcilisting.rows(host)
    if not pcibus.has_iommu(host):
        click.echo(f"microvm: {pcibus.no_iommu(host)}", err=True)
    if as_json:
        click.echo(json.dumps([pcilisting.as_json(row) for row in rows], indent=2))
        return
    if not any(row.name.vendor for row in rows):
        click.echo("devices have no names here: install pci.ids or hwdata", err=True)
    shown = [row for row in rows if bridges or not _is_plumbing(row)]
    heads = ("ADDRESS", "GROUP", "DRIVER", "RESET", "USED BY", "DEVICE")
    cells = [_cells(row) for row in shown]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    click.echo(_line(heads, widths))
    for row, texts in zip(shown, cells, strict=True):
        line = _line(texts, widths)
        if row.holder:
            line = paint("bold green", line)
        elif row.host_uses:
            line = paint("red", line)
        click.echo(line)
    for row in shown:
        if row.host_uses:
            click.echo(f"{row.device.address}: the host lives on it: {'; '.join(row.host_uses)}")


def _is_plumbing(row: Row) -> bool:
    """Bridges, the host's own as well, which no VM can have."""
    return row.device.is_bridge or (row.device.class_code >> 8 == 0x0600 and not row.device.driver)


def _cells(row: Row) -> tuple[str, ...]:
    device = row.device
    if row.holder:
        used_by = row.holder
    elif row.host_uses:
        used_by = "host"
    else:
        used_by = f"for {', '.join(row.wanted_by)}" if row.wanted_by else "-"
    name = f"{row.name.vendor} {row.name.device}".strip() if row.name.device else ""
    number = f"{device.vendor_id:04x}:{device.device_id:04x}"
    return (
        device.address,
        device.group or "-",
        device.driver or "-",
        device.reset_methods.replace(" ", ",") or "-",
        used_by,
        name or " ".join(filter(None, (row.name.vendor, row.name.kind, number))),
    )


def _line(texts: tuple[str, ...], widths: list[int]) -> str:
    cells = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
    return "  ".join(cells).rstrip()


def check(vm: str, host: HostPaths, *, as_json: bool) -> None:
    """Print what a start of a VM would do about its devices; exits with 1 if it would fail."""
    found = pcilisting.check(vm, systemd.identity(vm), host)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "name": found.vm,
                    "addresses": list(found.addresses),
                    "running": found.has_them,
                    "steps": list(found.steps),
                    "problems": [str(problem) for problem in found.problems],
                },
                indent=2,
            )
        )
    else:
        _print(found)
    if found.problems:
        sys.exit(EXIT_FAILED)


def _print(found: Check) -> None:
    for problem in found.problems:
        click.echo(f"microvm: {problem}", err=True)
    if found.has_them:
        click.echo(f"{found.vm}: runs, and has {', '.join(found.addresses)}")
    elif not found.addresses:
        click.echo(f"{found.vm}: its package asks for no PCI devices")
    elif found.steps:
        click.echo(f"{found.vm}: a start would")
        for step in found.steps:
            click.echo(f"  {step}")
