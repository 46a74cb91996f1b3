# SPDX-License-Identifier: MIT
"""The ready-made network, by a real systemd-networkd: a VM on it gets an address and a way out."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.host.container import ContainerHost
from tests.host.fixtures import require_container

from .test_init import BOOTS_WITHIN, console, log_in
from .test_links import attack, shown, stub
from .toolkit import Toolkit, eventually

pytestmark = pytest.mark.container

# Another host, which knows no way back into the network: only masqueraded packets are answered.
OUTER = "198.51.100.2"
ADD_OUTER = f"""
ip netns add outer
ip link add up0 type veth peer name up1 netns outer
ip address add 198.51.100.1/24 dev up0 && ip link set up0 up
ip -n outer address add {OUTER}/24 dev up1 && ip -n outer link set up1 up
"""


def on(*suites: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("networked", suites, indirect=True, scope="module")


@pytest.fixture(scope="module")
def networked(request: pytest.FixtureRequest) -> Iterator[Toolkit]:
    """A host of its own, since other tests take interfaces for left behind."""
    require_container()
    with ContainerHost(request.param) as host:
        toolkit = Toolkit(host)
        toolkit.install()
        yield toolkit


@on("trixie")
def test_without_networkd_it_is_refused(networked: Toolkit) -> None:
    networked.systemctl("disable", "--now", "systemd-networkd.service", "systemd-networkd.socket")
    done = networked.host.run(["microvm", "network", "enable"], check=False)
    assert done.returncode == 1
    assert "systemd-networkd does not run on this host (inactive)" in done.stderr
    assert "systemctl enable --now systemd-networkd.service" in done.stderr
    assert networked.sh("ls /etc/systemd/network") == ""
    shown = networked.host.run(["microvm", "network"])
    assert shown.stdout == "mvbr0: down, not enabled, 192.168.87.1/24\n"
    assert "`microvm network enable` makes it" in shown.stderr


# bookworm's networkd keeps its leases to itself, and has to be asked.
@on("trixie", "bookworm")
def test_a_vm_gets_an_address_and_a_way_out(networked: Toolkit) -> None:
    toolkit = networked
    toolkit.systemctl("enable", "--now", "systemd-networkd.service")
    before = toolkit.footprint()
    said = toolkit.sh("microvm network enable")
    assert "mvbr0 is up with 192.168.87.1/24" in said and "at boot" not in said
    # Once more changes nothing.
    assert toolkit.sh("microvm network enable") == "mvbr0 is up with 192.168.87.1/24\n"
    # What waits for the network, as a start of a declared VM does, is not kept.
    toolkit.systemctl("start", "network-online.target", timeout=90)
    toolkit.sh(ADD_OUTER)
    toolkit.sh("microvm init web")
    toolkit.systemctl("start", "microvm@web")
    lines = toolkit.await_line("web", "eth0 has 192.168.87.", timeout=BOOTS_WITHIN)
    address = "\n".join(lines).partition("eth0 has ")[2].split()[0]
    # The host shows it.
    label = toolkit.sh("readlink /var/lib/microvms/web/current").strip().rpartition("/")[2]
    assert toolkit.sh("microvm -l") == f"web: current({label}), {address}\n"
    assert json.loads(toolkit.sh("microvm list --json"))[0]["addresses"] == [address]
    assert f"addresses: {address}" in toolkit.sh("microvm status web", check=False)
    network = json.loads(toolkit.sh("microvm network --json"))
    assert network["up"] and network["at_boot"] and network["interfaces"] == ["vm-web"]
    assert [each["addresses"] for each in network["leases"]] == [[address]]
    # Host and guest reach each other, and the guest what the host reaches.
    toolkit.sh(f"ping -c 1 -W 10 {address}")
    with console(toolkit, "web") as shown:
        log_in(shown, "web")
        shown.type(f"ping -c 1 -W 10 {OUTER}; echo done-$?\r")
        shown.await_text("done-0")
        assert f"64 bytes from {OUTER}" in shown.text
    # It stays while somebody is on it.
    done = toolkit.host.run(["microvm", "network", "disable"], check=False)
    assert done.returncode == 1 and "vm-web is on mvbr0" in done.stderr
    # Until its tap is gone as well.
    toolkit.host.run(["microvm", "stop", "web"], timeout=180)
    assert toolkit.sh("microvm -l").startswith(f"web: current({label}), not booted")
    said = toolkit.sh("microvm network disable")
    assert "deleted mvbr0" in said
    toolkit.sh("ip link del up0; ip netns del outer")
    toolkit.await_footprint(before)


@on("trixie", "bookworm")
def test_a_guest_does_not_become_the_hosts_router(networked: Toolkit) -> None:
    toolkit = networked
    toolkit.systemctl("enable", "--now", "systemd-networkd.service")
    toolkit.sh("microvm network enable")
    toolkit.create(stub("rogue", bridge="mvbr0"))
    before = shown(toolkit, "mvbr0")
    toolkit.systemctl("start", "microvm@rogue")
    attack(toolkit, "roguea", "mvbr0")
    toolkit.systemctl("stop", "microvm@rogue")
    toolkit.sh("while [ -e /sys/class/net/roguea ]; do sleep 0.05; done")
    assert shown(toolkit, "mvbr0") == before
    toolkit.remove("rogue")
    toolkit.sh("microvm network disable")


@on("trixie")
def test_a_vm_that_starts_at_boot_waits_for_the_bridge(networked: Toolkit) -> None:
    toolkit = networked
    toolkit.systemctl("enable", "--now", "systemd-networkd.service")
    toolkit.sh("microvm network enable")
    toolkit.sh(
        "microvm init --force web; sed -i 's/^autostart = false/autostart = true/' "
        "/etc/microvms/web.toml"
    )
    toolkit.host.reboot()
    eventually(
        lambda: toolkit.sh("microvm -l"),
        lambda text: ", 192.168.87." in text,
        240,
        "it has no address",
    )
    toolkit.host.run(["microvm", "stop", "web"], timeout=180)


@on("trixie")
def test_addresses_that_are_in_use_are_not_taken(networked: Toolkit) -> None:
    toolkit = networked
    toolkit.sh("microvm network disable")
    toolkit.systemctl("start", "systemd-networkd")
    toolkit.sh("ip link add other type bridge && ip link set other up")
    toolkit.sh("ip address add 192.168.87.77/25 dev other")
    done = toolkit.host.run(["microvm", "network", "enable"], check=False)
    assert done.returncode == 1
    assert "is in use: 192.168.87.0/25 is on other" in done.stderr
    assert networked.sh("ls /etc/systemd/network") == ""
    toolkit.sh("ip link del other")
