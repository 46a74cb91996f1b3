# SPDX-License-Identifier: MIT
"""`microvm network`: the ready-made network, shown, enabled and disabled."""

from __future__ import annotations

import json

import click

from .. import leases, network
from ..paths import HostPaths
from .table import paint


def show(host: HostPaths, *, as_json: bool) -> None:
    """Print how the network is, and which addresses it gave."""
    state = network.state(host)
    given = leases.known(host, neighbours=False) if state.up else {}
    if as_json:
        rows = [{"mac": mac, "addresses": addresses} for mac, addresses in sorted(given.items())]
        click.echo(
            json.dumps(
                {
                    "bridge": network.BRIDGE,
                    "enabled": state.enabled,
                    "up": state.up,
                    "address": state.address,
                    "networkd": state.networkd,
                    "at_boot": state.enabled and state.at_boot,
                    "interfaces": list(state.members),
                    "leases": rows,
                },
                indent=2,
            )
        )
        return
    words = [
        paint("green", "up") if state.up else paint("red", "down"),
        "enabled" if state.enabled else "not enabled",
    ]
    click.echo(f"{network.BRIDGE}: {', '.join(words)}, {state.address}")
    if state.members:
        click.echo(f"  interfaces: {', '.join(state.members)}")
    for mac, addresses in sorted(given.items()):
        click.echo(f"  {mac}: {', '.join(addresses)}")
    if not state.enabled:
        click.echo("`microvm network enable` makes it", err=True)
    elif state.networkd != "active":
        click.echo(f"systemd-networkd, which makes it, is {state.networkd}", err=True)
    elif not state.at_boot:
        click.echo("systemd-networkd does not start at boot", err=True)
