# SPDX-License-Identifier: MIT
"""`microvm pci` and `microvm pci check`."""

from __future__ import annotations

import json
import shutil
import sys

import click

from .. import names, pcibus, pcilisting, service
from ..errors import EXIT_FAILED
from ..paths import HostPaths
from ..pciids import Names
from .table import paint

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..pcilisting import Check, Row

_NAMED_VMS = 2


def show(host: HostPaths, *, bridges: bool, as_json: bool) -> None:
    """Print the devices of the host."""
    known = Names(host)
    rows = pcilisting.rows(host, known)
    if not pcibus.has_iommu(host):
        click.echo(f"microvm: {pcibus.no_iommu(host)}", err=True)
    if as_json:
        click.echo(json.dumps([pcilisting.as_json(row) for row in rows], indent=2))
        return
    if not rows:
        click.echo("microvm: this host has no PCI devices", err=True)
        return
    if not known.are_known:
        click.echo(
            "microvm: this host has no list of the names of devices; install the package "
            "pci.ids (Debian, Ubuntu) or hwdata (Fedora, openSUSE)",
            err=True,
        )
    shown = sorted((row for row in rows if bridges or not _is_plumbing(row)), key=_by_group)
    heads = ("ADDRESS", "GROUP", "DRIVER", "RESET", "USED BY", "DEVICE")
    cells = [_cells(row) for row in shown]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    click.echo(_line(heads, widths, room))
    for row, texts in zip(shown, cells, strict=True):
        line = _line(texts, widths, room)
        if row.holder:
            line = paint("bold green", line)
        elif row.host_uses:
            line = paint("red", line)
        elif _is_plumbing(row):
            line = paint("faint", line)
        click.echo(line)
    for row in shown:
        if row.host_uses:
            click.echo(f"{row.device.address}: the host uses it: {'; '.join(row.host_uses)}")


def _is_plumbing(row: Row) -> bool:
    """Bridges, the host's own as well, which no VM can have."""
    return row.device.is_bridge or (row.device.class_code >> 8 == 0x0600 and not row.device.driver)


def _by_group(row: Row) -> int:
    """Devices that go to a VM together stand together; those of no group come last."""
    group = row.device.group or ""
    return int(group) if group.isdecimal() else sys.maxsize


def _cells(row: Row) -> tuple[str, ...]:
    device = row.device
    name = f"{row.name.vendor} {row.name.device}".strip() if row.name.device else ""
    number = f"{device.vendor_id:04x}:{device.device_id:04x}"
    return (
        device.address,
        device.group or "-",
        device.driver or "-",
        # The kernel takes the first that works.
        (device.reset_methods.split() or ["-"])[0],
        _used_by(row),
        name or " ".join(filter(None, (row.name.vendor, row.name.kind, number))),
    )


def _used_by(row: Row) -> str:
    if row.holder:
        return row.holder
    uses = ["host"] if row.host_uses else []
    if row.wanted_by:
        more = ", …" if len(row.wanted_by) > _NAMED_VMS else ""
        uses.append(f"for {', '.join(row.wanted_by[:_NAMED_VMS])}{more}")
    return ", ".join(uses) or "-"


def _line(texts: tuple[str, ...], widths: list[int], room: int | None) -> str:
    """A line of the table, cut where the terminal ends."""
    cells = (text.ljust(width) for text, width in zip(texts, widths, strict=True))
    line = "  ".join(cells).rstrip()
    return line if room is None or len(line) <= room else f"{line[: room - 1]}…"


def check(vm: str, host: HostPaths, *, as_json: bool) -> None:
    """Print what a start of a VM would do about its devices; exits with 1 if it would fail."""
    found = pcilisting.check(vm, service.identity(vm), host)
    if as_json:
        click.echo(
            json.dumps(
                {
                    "name": found.vm,
                    "addresses": list(found.addresses),
                    "running": found.is_running,
                    "has": list(found.has),
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
    if found.is_running:
        click.echo(f"{found.vm}: runs, and has {', '.join(found.has) or 'no PCI devices'}")
    if found.is_running and (found.has or not found.addresses):
        return
    if found.has and found.is_stopping:
        click.echo(
            f"microvm: {found.vm} is stopping, and giving back {', '.join(found.has)}", err=True
        )
    elif found.has:
        click.echo(
            f"microvm: {found.vm} is down, and could not give back {', '.join(found.has)}; "
            f"`journalctl -u {names.unit(found.vm)}` says why, "
            "`microvm reconcile --apply` tries again",
            err=True,
        )
    for problem in found.problems:
        click.echo(f"microvm: {problem}", err=True)
    if not found.addresses:
        click.echo(f"{found.vm}: its package asks for no PCI devices")
    elif found.steps:
        click.echo(f"{found.vm}: {'its next' if found.is_running else 'a'} start would")
        for step in found.steps:
            click.echo(f"  {step}")
