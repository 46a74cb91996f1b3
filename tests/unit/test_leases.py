# SPDX-License-Identifier: MIT
"""Addresses of VMs: from what networkd's DHCP servers gave away, and from the neighbours."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from microvm_host import leases, listing, process, state, systemd
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths

MAC = "02:c7:ca:73:92:90"
OTHER = "02:00:00:00:00:01"
LATER = int((time.time() + 3600) * 1e6)


def lease(mac: str = MAC, last: int = 103, *, until: object = LATER) -> dict[str, object]:
    """As networkd writes one (seen: 257)."""
    numbers = [int(part, 16) for part in mac.split(":")]
    return {
        "ClientId": [1, *numbers],
        "Address": [192, 168, 87, last],
        "Hostname": "web",
        "HardwareAddressType": 1,
        "HardwareAddressLength": 6,
        "HardwareAddress": numbers + [0] * 10,
        "ExpirationUSec": 80336697138,
        "ExpirationRealtimeUSec": until,
    }


def write(host: HostPaths, *given: object, interface: str = "mvbr0") -> None:
    os.makedirs(host.dhcp_leases, exist_ok=True)
    text = json.dumps({"BootID": "0", "Address": [192, 168, 87, 1], "Leases": given})
    Path(host.dhcp_leases, interface).write_text(text)


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program is asked."""

    def output(argv: list[str], *, errors: bool = False) -> str:
        raise AssertionError(argv)

    monkeypatch.setattr(process, "output", output)


def test_a_host_without_such_a_network(host: HostPaths, silent: None) -> None:
    assert leases.known(host) == {}
    assert leases.known(host, neighbours=True) == {}


def test_leases_of_all_servers(host: HostPaths, silent: None) -> None:
    write(host, lease(), lease(OTHER, 7))
    write(host, lease(OTHER, 9), lease(OTHER, 7), interface="br0")
    assert leases.known(host) == {
        OTHER: ["192.168.87.9", "192.168.87.7"],
        MAC: ["192.168.87.103"],
    }


def test_one_that_has_run_out_is_none(host: HostPaths, silent: None) -> None:
    write(host, lease(until=int((time.time() - 5) * 1e6)), lease(OTHER, 7))
    assert leases.known(host) == {OTHER: ["192.168.87.7"]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"Leases": 3}',
        '{"Leases": [3]}',
        json.dumps({"Leases": [{**lease(), "Address": ["a", 300]}]}),
        json.dumps({"Leases": [{**lease(), "HardwareAddress": None}]}),
        json.dumps({"Leases": [lease(until="never")]}),
        "[" * 100000,
        "\udcff",
    ],
)
def test_a_broken_file_hides_no_other(text: str, host: HostPaths, silent: None) -> None:
    write(host, lease())
    Path(host.dhcp_leases, "broken").write_bytes(text.encode(errors="surrogateescape"))
    assert leases.known(host) == {MAC: ["192.168.87.103"]}


def test_a_pipe_is_not_waited_for(host: HostPaths, silent: None) -> None:
    write(host, lease())
    os.mkfifo(f"{host.dhcp_leases}/pipe")
    assert leases.known(host) == {MAC: ["192.168.87.103"]}


def test_an_older_networkd_is_asked(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    os.makedirs(host.net_device("mvbr0") + "/bridge")
    Path(host.net_device("mvbr0"), "ifindex").write_text("12\n")
    numbers = [int(part, 16) for part in MAC.split(":")]
    until = int(time.clock_gettime(time.CLOCK_BOOTTIME) * 1e6) + 10**9
    entry = [2, [1, *numbers], [192, 168, 87, 103], [0, 0, 0, 0], numbers + [0] * 10]
    asked = []

    def output(argv: list[str], *, errors: bool = False) -> str:
        asked.append(argv)
        data = [[*entry, until], [*entry[:2], [192, 168, 87, 9], *entry[3:], 1]]
        return json.dumps({"type": "a(uayayayayt)", "data": data})

    monkeypatch.setattr(process, "output", output)
    assert leases.known(host) == {MAC: ["192.168.87.103"]}
    (argv,) = asked
    assert argv[0] == "busctl" and "/org/freedesktop/network1/link/_312" in argv

    def fails(argv: list[str], *, errors: bool = False) -> str:
        raise MicrovmHostError("no networkd")

    monkeypatch.setattr(process, "output", fails)
    assert leases.known(host) == {}
    # A newer one has written it down.
    write(host, lease(OTHER, 7))
    monkeypatch.setattr(process, "output", output)
    assert leases.known(host) == {OTHER: ["192.168.87.7"]}
    assert len(asked) == 1


def test_neighbours_that_answered(host: HostPaths, silent: None) -> None:
    Path(host.arp_table).parent.mkdir(parents=True)
    Path(host.arp_table).write_text(
        "IP address       HW type     Flags       HW address            Mask     Device\n"
        f"10.77.0.2        0x1         0x2         {MAC}     *        br0\n"
        f"192.168.87.103   0x1         0x2         {MAC}     *        mvbr0\n"
        f"10.77.0.4        0x1         0x8         {MAC}     *        br0\n"
        "10.77.0.3        0x1         0x0         00:00:00:00:00:00     *        br0\n"
    )
    write(host, lease())
    assert leases.known(host) == {MAC: ["192.168.87.103"]}
    assert leases.known(host, neighbours=True) == {MAC: ["192.168.87.103", "10.77.0.2"]}
    Path(host.arp_table).write_text("head\nodd\n")
    assert leases.known(host, neighbours=True) == {MAC: ["192.168.87.103"]}


def test_macs_of_a_package(root: Path) -> None:
    assert leases.macs(str(root)) == ()
    file = root / "share/microvm/tap-macs"
    file.parent.mkdir(parents=True)
    file.write_text(f"web0 {MAC}\nweb 1 {OTHER.upper()}\nodd\nx 02:00\n\n")
    assert leases.macs(str(root)) == (MAC, OTHER)
    file.unlink()
    os.mkfifo(file)
    assert leases.macs(str(root)) == ()


@pytest.mark.parametrize(
    ("active", "shown"),
    [
        ("active", "web: current(package), 192.168.87.103, 192.168.87.7"),
        ("deactivating", "web: current(package), 192.168.87.103, 192.168.87.7, deactivating"),
        ("inactive", "web: current(package), not booted: systemctl start microvm@web.service"),
    ],
)
def test_a_vm_that_runs_is_listed_with_them(
    active: str, shown: str, host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "states", lambda *patterns: {"microvm@web.service": active})
    monkeypatch.setattr(state, "_is_roots", lambda status: True)
    file = root / "package/share/microvm/tap-macs"
    file.parent.mkdir(parents=True)
    file.write_text(f"a {MAC}\nb {OTHER}\n")
    os.mkdir(host.vm("web"))
    for link in (host.current("web"), host.booted("web")):
        os.symlink(root / "package", link)
    write(host, lease(), lease(OTHER, 7), lease("02:00:00:00:00:99", 8))
    (row,) = listing.rows(host)
    assert listing.as_text(row, lambda colours, text: text) == shown
    expected = [] if active == "inactive" else ["192.168.87.103", "192.168.87.7"]
    assert listing.as_json(row)["addresses"] == expected
