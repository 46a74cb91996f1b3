# SPDX-License-Identifier: MIT
"""What packages of microvm.nix ask of their own scripts is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import microvm_nix, runner

from . import packages

# As nixos-modules/microvm/interfaces.nix writes it.
TAP_UP = """\
#! /nix/store/x-bash/bin/bash -e
set -eou pipefail
if [ -e /sys/class/net/web0 ]; then
  /nix/store/x-iproute2/bin/ip link delete 'web0'
fi

/nix/store/x-iproute2/bin/ip tuntap add name 'web0' mode tap user 'microvm' vnet_hdr multi_queue
/nix/store/x-iproute2/bin/ip link set 'web0' up
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    made = packages.minimal(tmp_path / "package")
    packages.put(made, "share/microvm/tap-interfaces", "web0\n")
    packages.put(made, "bin/tap-up", TAP_UP)
    return made


def notices(package: Path) -> list[str]:
    return microvm_nix.notices(runner.load(str(package)), "/var/lib/microvms/web")


def test_nothing_is_said_of_what_the_host_does_by_itself(package: Path) -> None:
    assert notices(package) == []
    os.unlink(package / "bin/tap-up")
    assert notices(package) == []
    os.mkfifo(package / "bin/tap-up")
    assert notices(package) == []


@pytest.mark.parametrize(
    ("line", "bridge"),
    [
        ("/nix/store/x-iproute2/bin/ip link set dev 'web0' master 'br-lan'", "br-lan"),
        ("ip link set web0 master br0 up", "br0"),
        ("brctl addif br0 web0", "BRIDGE"),
        ("/nix/store/x-ovs/bin/ovs-vsctl add-port ovs web0", "BRIDGE"),
        ("ip link set web0 mtu 9000", "BRIDGE"),
        ("ip addr add 10.0.0.1/32 dev web0", "BRIDGE"),
    ],
)
def test_lines_of_its_own(package: Path, line: str, bridge: str) -> None:
    packages.put(package, "bin/tap-up", f"{TAP_UP}{line}\n")
    (notice,) = notices(package)
    assert line in notice
    assert f"[Match] Name=web0, [Network] Bridge={bridge}" in notice


MACVTAP_UP = """\
#! /nix/store/x-bash/bin/bash -e
set -eou pipefail
if [ -e /sys/class/net/m0 ]; then
  /nix/store/x-iproute2/bin/ip link delete 'm0'
fi
/nix/store/x-iproute2/bin/ip link add link 'eth0' name 'm0' address '02:00:00:00:00:01' \
type macvtap mode 'bridge'
/nix/store/x-iproute2/bin/ip link set 'm0' allmulticast on
if [ -f "/proc/sys/net/ipv6/conf/m0/disable_ipv6" ]; then
  echo 1 > "/proc/sys/net/ipv6/conf/m0/disable_ipv6"
fi
/nix/store/x-iproute2/bin/ip link set 'm0' up
/nix/store/x-coreutils/bin/chown 'microvm:kvm' /dev/tap$(< "/sys/class/net/m0/ifindex")
""".replace("\\\n", "")
DOWN = "#! /nix/store/x-bash/bin/bash -e\nset -ou pipefail\n/x/bin/ip link delete 'm0'\n"


@pytest.mark.parametrize(
    ("script", "text", "setting"),
    [
        ("tap-down", DOWN, "ExecStopPost"),
        ("macvtap-up", MACVTAP_UP, "ExecStartPre"),
        ("macvtap-down", DOWN, "ExecStopPost"),
    ],
)
def test_lines_of_its_own_in_others(package: Path, script: str, text: str, setting: str) -> None:
    packages.put(package, f"bin/{script}", text)
    assert notices(package) == []
    for line in ("nft delete table inet web", "ip link set m0 promisc on", "chown a /dev/x"):
        packages.put(package, f"bin/{script}", f"{text}{line}\n")
        (notice,) = notices(package)
        assert notice.startswith(f"bin/{script} ") and f": {line}. " in notice
        assert f"{setting}=+" in notice and "`systemctl edit microvm@web`" in notice


def test_an_interface_of_type_bridge(package: Path) -> None:
    run = "#!/bin/sh\nexec qemu -netdev '{}' -device virtio-net\n"
    helper = "bridge,id=web0,br=br0,helper=/run/wrappers/bin/qemu-bridge-helper"
    packages.put(package, "bin/microvm-run", run.format(helper))
    (notice,) = notices(package)
    assert 'type = "tap"' in notice
    for text in (
        "qemu -netdev \\\n  bridge,id=a\n",
        "qemu -nic bridge,br=br0\n",
        "qemu -netdev type=bridge,id=a\n",
    ):
        packages.put(package, "bin/microvm-run", f"#!/bin/sh\n{text}")
        assert len(notices(package)) == 1, text
    packages.put(package, "bin/microvm-run", run.format("tap,id=bridge,ifname=bridge0"))
    assert notices(package) == []


def test_relative_sources_that_its_own_script_exports(package: Path) -> None:
    packages.put(package, "share/microvm/virtiofs/logs/source", "my logs\n")
    packages.put(package, "share/microvm/virtiofs/logs/socket", "logs.sock\n")
    assert notices(package) == []
    packages.put(package, "bin/virtiofsd-run", "#!/bin/sh\n")
    os.chmod(package / "bin/virtiofsd-run", 0o755)
    (notice,) = notices(package)
    assert notice.endswith("chown root: '/var/lib/microvms/web/my logs'")
