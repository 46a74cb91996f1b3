# SPDX-License-Identifier: MIT
"""`microvm network`: what it looks at, what it refuses, and that it leaves nothing half done."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microvm_host import links, network
from microvm_host.cli import commands
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths

SHIPPED = Path(__file__).parents[2] / "data/network"
HEAD = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT\n"


class Networkd:
    """Stands for systemctl and networkctl, and makes the bridge as networkd would."""

    def __init__(self, host: HostPaths) -> None:
        self.host = host
        self.state = "LoadState=loaded\nActiveState=active\nUnitFileState=enabled\n"
        self.works = True
        self.reloads = 0

    def output(self, argv: list[str], *, errors: bool = False) -> str:
        if argv[0] == "systemctl":
            return self.state
        assert argv == ["networkctl", "reload"]
        self.reloads += 1
        files = self.host.networkd_files
        if self.works and all(os.path.exists(f"{files}/{name}") for name in network.FILES):
            self.make_bridge()
        return ""

    def make_bridge(self, *members: str) -> None:
        device = Path(self.host.net_device("mvbr0"))
        (device / "bridge").mkdir(parents=True, exist_ok=True)
        (device / "brif").mkdir(exist_ok=True)
        for member in members:
            (device / "brif" / member).touch()

    def files(self) -> list[str]:
        try:
            return sorted(os.listdir(self.host.networkd_files))
        except FileNotFoundError:
            return []


@pytest.fixture
def networkd(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Networkd:
    found = Networkd(host)
    monkeypatch.setattr("microvm_host.process.output", found.output)
    monkeypatch.setattr(network, "_APPEARS_WITHIN", 0.1)
    routes(host)
    return found


def routes(host: HostPaths, *rows: tuple[str, str, str]) -> None:
    """The host's routes: interface, destination and mask, as the kernel has them."""
    Path(host.ipv4_routes).parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{name}\t{at}\t00000000\t0001\t0\t0\t0\t{mask}\t0\t0\t0\n" for name, at, mask in rows]
    Path(host.ipv4_routes).write_text(HEAD + "".join(lines))


def test_enabling_links_the_files(networkd: Networkd, host: HostPaths) -> None:
    routes(host, ("eth0", "00000000", "00000000"), ("eth0", "0001A8C0", "00FFFFFF"))
    done = network.enable(host)
    assert done[-1] == "mvbr0 is up with 192.168.87.1/24"
    assert networkd.files() == sorted(network.FILES)
    for name in network.FILES:
        link = Path(host.networkd_files, name)
        assert link.resolve() == SHIPPED / name
    state = network.state(host)
    assert (state.enabled, state.up, state.networkd, state.at_boot) == (True, True, "active", True)
    # Once more is no harm.
    assert network.enable(host) == ["mvbr0 is up with 192.168.87.1/24"]


def test_what_does_not_last_is_said(networkd: Networkd, host: HostPaths) -> None:
    networkd.state = "LoadState=loaded\nActiveState=active\nUnitFileState=disabled\n"
    assert "does not start at boot: systemctl enable" in network.enable(host)[-1]
    assert not network.state(host).at_boot


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("LoadState=loaded\nActiveState=inactive\n", r"does not run on this host \(inactive\)"),
        ("LoadState=loaded\nActiveState=failed\n", r"does not run on this host \(failed\)"),
        ("LoadState=masked\nActiveState=inactive\n", r"does not run on this host \(masked\)"),
        ("LoadState=not-found\nActiveState=inactive\n", "this host has no systemd-networkd"),
    ],
)
def test_without_networkd(state: str, message: str, networkd: Networkd, host: HostPaths) -> None:
    networkd.state = state
    with pytest.raises(MicrovmHostError, match=message) as caught:
        network.enable(host)
    assert 'name it: bridge = "…"' in caught.value.hint
    assert networkd.files() == [] and networkd.reloads == 0


@pytest.mark.parametrize(
    ("row", "which"),
    [
        (("eth0", "0057A8C0", "00FFFFFF"), "192.168.87.0/24 is on eth0"),
        (("wg0", "0000A8C0", "0000FFFF"), "192.168.0.0/16 is on wg0"),
        (("docker0", "4057A8C0", "C0FFFFFF"), "192.168.87.64/26 is on docker0"),
    ],
)
def test_addresses_in_use(
    row: tuple[str, str, str], which: str, networkd: Networkd, host: HostPaths
) -> None:
    routes(host, ("eth1", "00000000", "00000000"), row)
    with pytest.raises(MicrovmHostError, match=f"is in use: {which}"):
        network.enable(host)
    assert networkd.files() == []
    # The administrator's own files have other ones, and are left as they are.
    os.makedirs(host.networkd_files)
    for name in network.FILES:
        # With blanks, which systemd's files may have.
        text = (SHIPPED / name).read_text().replace("=192.168.87.1/24", " = 10.9.8.1/24")
        lease = "[DHCPServerStaticLease]\nAddress=10.9.8.7\n\n" if name == network.NETWORK else ""
        Path(host.networkd_files, name).write_text(lease + text)
    assert network.enable(host) == ["mvbr0 is up with 10.9.8.1/24"]
    assert "stays" in network.disable(host)[0]
    assert networkd.files() == sorted(network.FILES)


def test_the_file_and_the_manual_say_the_same_of_another_address() -> None:
    """That it takes copies, since drop-ins are not read for it."""
    head = (SHIPPED / network.NETWORK).read_text().partition("[")[0]
    manual = (SHIPPED.parents[1] / "man/microvm-host.7").read_text()
    drop_in = "/etc/systemd/network/60-microvm-host.network.d/local.conf"
    for text in (head, manual):
        assert drop_in in text and "Address=" in text
        # Debian 12 has none.
        assert "networkctl edit" not in text
    assert "takes copies of this file" in " ".join(head.replace("#", "").split())
    assert "it needs a copy of both files" in manual


def test_a_bridge_of_somebody_else(networkd: Networkd, host: HostPaths) -> None:
    networkd.make_bridge()
    with pytest.raises(MicrovmHostError, match="a bridge mvbr0 already"):
        network.enable(host)
    assert networkd.files() == []


def test_a_bridge_that_does_not_come_leaves_nothing(networkd: Networkd, host: HostPaths) -> None:
    networkd.works = False
    with pytest.raises(MicrovmHostError, match="networkd has not made mvbr0"):
        network.enable(host)
    assert networkd.files() == [] and networkd.reloads == 2


def test_disabling(networkd: Networkd, host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    network.enable(host)
    networkd.make_bridge("vm-web")
    with pytest.raises(MicrovmHostError, match="vm-web is on mvbr0"):
        network.disable(host)
    assert networkd.files() == sorted(network.FILES)
    os.unlink(host.net_device("mvbr0") + "/brif/vm-web")
    deleted: list[str] = []

    def delete(found: dict[str, int], host: HostPaths) -> list[str]:
        deleted.extend(found)
        return []

    monkeypatch.setattr(links, "delete", delete)
    monkeypatch.setattr(network, "interface_index", lambda name: 7)
    assert network.disable(host)[-1] == "deleted mvbr0"
    assert deleted == ["mvbr0"] and networkd.files() == []


def run(host: HostPaths, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setattr(commands, "HOST", host)
    return CliRunner().invoke(commands.microvm, ["network", *arguments])


def test_it_is_shown(networkd: Networkd, host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    done = run(host, monkeypatch)
    assert "mvbr0: down, not enabled, 192.168.87.1/24\n" in done.output
    network.enable(host)
    networkd.make_bridge("vm-web")
    done = run(host, monkeypatch)
    assert done.output == "mvbr0: up, enabled, 192.168.87.1/24\n  interfaces: vm-web\n"
    shown = json.loads(run(host, monkeypatch, "--json").output)
    assert shown == {
        "bridge": "mvbr0",
        "enabled": True,
        "up": True,
        "address": "192.168.87.1/24",
        "networkd": "active",
        "at_boot": True,
        "interfaces": ["vm-web"],
        "leases": [],
    }
