# SPDX-License-Identifier: MIT
"""Taps as the kernel has them: guests change nothing of the host, and bridges stay the same."""

from __future__ import annotations

import json

import pytest

from tests.guest.package import Stub, Tap

from .rogue_router import DISPUTED, HOST, HOST_4, REDIRECTED, REDIRECTED_4, ROUTER, ROUTER_4
from .toolkit import SOURCES, Toolkit

pytestmark = pytest.mark.container

ROGUE = f"python3 -B {SOURCES}/tests/system/rogue_router.py"


def stub(name: str, **fields: object) -> Stub:
    return Stub(name=name, taps=(Tap(name=f"{name}a", mac="02:00:00:00:00:66", **fields),))  # type: ignore[arg-type]


def network_of(toolkit: Toolkit) -> str:
    """The host's addresses and routes, and the way to what redirects are about."""
    return toolkit.sh(
        "ip -o address; ip route show table all; ip -6 route show table all; "
        f"ip -o route get {REDIRECTED_4}; ip -o -6 route get {REDIRECTED} | sed 's/ cache.*//'"
    )


def attack(toolkit: Toolkit, tap: str, link: str) -> None:
    """Send for a while on a tap what may change the host's routes and addresses, on `link`."""
    # Routes by the guest, so that redirects have something to change.
    toolkit.sh(
        f"ip address add {HOST_4}/24 dev {link}; ip route add 198.51.100.0/24 via {ROUTER_4}; "
        f"ip neighbour replace {ROUTER_4} lladdr 02:00:00:00:00:66 dev {link}; "
        f"ip -6 address add {HOST}/64 dev {link} nodad; "
        f"ip -6 route add 2001:db8:77::/64 via {ROUTER} dev {link}; "
        f"ip -6 neighbour replace {ROUTER} lladdr 02:00:00:00:00:66 dev {link}"
    )
    sender = toolkit.host.spawn(["sh", "-c", f"{ROGUE} {tap} 5"])
    try:
        # Meanwhile, since the guest disputes this one.
        toolkit.sh(f"sleep 0.5; ip -6 address add {DISPUTED}/64 dev {link}; sleep 0.5")
        before = network_of(toolkit)
        assert (
            f"{DISPUTED}/64" in before and "dadfailed" not in before and "tentative" not in before
        )
        # It is routed by the guest, which the guest tries to change.
        assert f"via {ROUTER_4}" in before and f"via {ROUTER}" in before
        assert "2001:db8:66:" not in before and "default via fe80:" not in before
        toolkit.sh("sleep 2")
        assert network_of(toolkit) == before
        assert sender.wait(30) == 0, sender.communicate()
    finally:
        sender.kill()
        sender.communicate()


@pytest.mark.core
def test_a_guest_does_not_become_the_hosts_router(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(stub(vm))
    toolkit.systemctl("start", f"microvm@{vm}")
    attack(toolkit, f"{vm}a", f"{vm}a")
    toolkit.systemctl("stop", f"microvm@{vm}")


def test_nor_on_a_bridge(toolkit: Toolkit, vm: str) -> None:
    """What the bridge itself takes is its maker's affair: here, nothing."""
    bridge = f"{vm}br"
    toolkit.sh(
        f"ip link add {bridge} type bridge; cd /proc/sys/net; for file in "
        f"ipv6/conf/{bridge}/accept_ra ipv6/conf/{bridge}/accept_dad "
        f"ipv?/conf/{bridge}/accept_redirects; "
        "do echo 0 >$file; done; "
        f"ip link set {bridge} up"
    )
    try:
        toolkit.create(stub(vm, bridge=bridge))
        toolkit.systemctl("start", f"microvm@{vm}")
        assert toolkit.sh(f"ip -6 address show dev {vm}a") == ""
        attack(toolkit, f"{vm}a", bridge)
        toolkit.systemctl("stop", f"microvm@{vm}")
    finally:
        toolkit.sh(f"ip link del {bridge}")


def shown(toolkit: Toolkit, link: str) -> tuple[str, int]:
    """MAC address and MTU of an interface."""
    (found,) = json.loads(toolkit.sh(f"ip -json link show {link}"))
    return found["address"], found["mtu"]


@pytest.mark.parametrize("has_ports", [False, True])
def test_a_bridge_keeps_its_mac_address_and_mtu(
    toolkit: Toolkit, vm: str, *, has_ports: bool
) -> None:
    bridge, card = f"{vm}br", f"{vm}eth"
    toolkit.sh(f"ip link add {bridge} mtu 9000 type bridge; ip link set {bridge} up")
    if has_ports:
        # Of a vendor whose numbers are high.
        toolkit.sh(f"ip link add {card} address f8:ff:ff:00:00:01 mtu 9000 type veth peer {card}1")
        toolkit.sh(f"ip link set {card} master {bridge} up")
    before = shown(toolkit, bridge)
    assert before[1] == 9000
    try:
        toolkit.create(stub(vm, bridge=bridge))
        for _ in range(3):
            toolkit.systemctl("start", f"microvm@{vm}")
            assert shown(toolkit, bridge) == before
            mac, mtu = shown(toolkit, f"{vm}a")
            assert mac.startswith("fe:") and mtu == 9000
            toolkit.systemctl("stop", f"microvm@{vm}")
            toolkit.sh(f"while [ -e /sys/class/net/{vm}a ]; do sleep 0.05; done")
            assert shown(toolkit, bridge) == before
    finally:
        toolkit.sh(f"ip link del {bridge}; ip link del {card} 2>/dev/null; true")


def test_a_tap_has_the_mtu_that_is_declared(toolkit: Toolkit, vm: str) -> None:
    bridge = f"{vm}br"
    toolkit.sh(f"ip link add {bridge} mtu 4000 type bridge; ip link set {bridge} up")
    path = toolkit.create(stub(vm))
    file = f"{path}/share/microvm/tap-mtus"
    try:
        toolkit.host.write(file, f"{vm}a 2000\n")
        toolkit.systemctl("start", f"microvm@{vm}")
        assert shown(toolkit, f"{vm}a")[1] == 2000
        toolkit.systemctl("stop", f"microvm@{vm}")
        # On a bridge the guest's may be less; the bridge's must not become so.
        toolkit.host.write(f"{path}/share/microvm/tap-bridges", f"{vm}a {bridge}\n")
        toolkit.systemctl("start", f"microvm@{vm}")
        assert shown(toolkit, f"{vm}a")[1] == shown(toolkit, bridge)[1] == 4000
        toolkit.systemctl("stop", f"microvm@{vm}")
        toolkit.host.write(file, f"{vm}a 9000\n")
        toolkit.systemctl("start", f"microvm@{vm}", check=False)
        assert f"its bridge {bridge} has 4000 and would drop" in toolkit.status(vm)
    finally:
        toolkit.sh(f"systemctl stop microvm@{vm}; ip link del {bridge}")


def test_a_tap_that_was_there_joins_its_bridge(toolkit: Toolkit, vm: str) -> None:
    bridge = f"{vm}br"
    toolkit.sh(
        f"ip tuntap add {vm}a mode tap user microvm vnet_hdr; "
        f"ip link add {bridge} mtu 9000 type bridge; ip link set {bridge} up"
    )
    master = f"readlink /sys/class/net/{vm}a/master"
    before = shown(toolkit, bridge)
    try:
        toolkit.create(stub(vm, bridge=bridge))
        toolkit.systemctl("start", f"microvm@{vm}")
        assert toolkit.sh(master).strip().endswith(f"/{bridge}")
        assert shown(toolkit, bridge) == before
        toolkit.systemctl("stop", f"microvm@{vm}")
        toolkit.sh(f"while [ -e /run/microvm-host/{vm}/tap-interfaces ]; do sleep 0.05; done")
        # As it was found.
        assert toolkit.sh(master, check=False) == ""
        assert shown(toolkit, f"{vm}a")[1] == 1500
        # On another bridge it is refused, and left there.
        toolkit.sh(f"ip link add {vm}br2 type bridge; ip link set {vm}a master {vm}br2")
        toolkit.systemctl("start", f"microvm@{vm}", check=False)
        assert f"tap {vm}a exists and is on {vm}br2, not on {bridge}" in toolkit.status(vm)
        assert toolkit.sh(master).strip().endswith(f"/{vm}br2")
    finally:
        toolkit.sh(
            f"systemctl stop microvm@{vm}; for each in {vm}a {bridge} {vm}br2; do "
            "ip link del $each 2>/dev/null; done; true"
        )


def test_an_altname_is_told(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(stub(vm))
    toolkit.sh(f"ip link add {vm}eth type veth peer {vm}eth1")
    toolkit.sh(f"ip link property add dev {vm}eth altname {vm}a")
    try:
        toolkit.systemctl("start", f"microvm@{vm}", check=False)
        said = f"{vm}a, the name of a tap, is another name (altname) of interface {vm}eth"
        assert said in toolkit.status(vm)
        assert "ip link property del dev" in toolkit.status(vm)
    finally:
        toolkit.sh(f"systemctl stop microvm@{vm}; ip link del {vm}eth")
