# SPDX-License-Identifier: MIT
"""A Debian guest with cloud-init inside, which takes from its seed what it did not know before."""

from __future__ import annotations

import pytest

from tests.guest import debian
from tests.host import root

from .toolkit import Toolkit

pytestmark = pytest.mark.container

PLACE = "/opt/debian"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGb1dWfbLqjxHQfWJ0x3Cx3l0yE1mYwq6rW5b7s0Qd4T alice@test"
DECLARATION = f"""\
autostart = false
kernel = "{PLACE}/vmlinuz"
initrd = "{PLACE}/initrd"
kernelParams = ["root=LABEL=debian", "rw", "quiet", "systemd.show_status=0"]
mem = 1024
credentialFiles.KEY = "/etc/secrets/guest-key"

[[volumes]]
image = "root.img"
size = 2048
label = "debian"
source = "{PLACE}/root.tar"

[[interfaces]]
type = "user"
id = "net"
mac = "02:00:00:00:0a:01"

[cloudInit]
hostname = "shop"
networkConfig = "/etc/secrets/guest-network"

[[cloudInit.users]]
name = "alice"
groups = ["adm"]
sshAuthorizedKeys = ["{KEY}"]
"""
NETWORK = """\
version: 2
ethernets:
  first:
    match: {macaddress: "02:00:00:00:0a:01"}
    addresses: [192.0.2.7/24]
"""


def test_a_debian_takes_all_of_it_from_its_seed(toolkit: Toolkit, vm: str) -> None:
    # The kernel of the hosts, and of the guest, is Debian's of the same release.
    kernel = root.with_tree(debian.SUITE)
    for source, name in (
        (debian.archive(), "root.tar"),
        (kernel.kernel, "vmlinuz"),
        (kernel.initrd, "initrd"),
    ):
        toolkit.host.copy(source, f"{PLACE}/{name}")
    toolkit.host.write("/etc/secrets/guest-key", "secret of the host", 0o600)
    toolkit.host.write("/etc/secrets/guest-network", NETWORK, 0o600)
    toolkit.host.write(f"/etc/microvms/{vm}.toml", DECLARATION)
    # Its root as well is made without root: everybody may read the archive.
    toolkit.host.run(["microvm", "apply"], timeout=120)
    toolkit.systemctl("start", f"microvm@{vm}", timeout=120)
    lines = toolkit.await_line(vm, "GUEST: ready", timeout=400)
    said = {line.partition("GUEST: ")[2] for line in lines if "GUEST: " in line}
    assert {
        "host name shop",
        "cloud-init status: done",
        f"instance iid-{vm}",
        "user alice alice adm",
        f"key alice {KEY}",
        "credential KEY secret of the host",
        "ready",
    } <= said
    assert any(line.startswith("address e") and line.endswith(" 192.0.2.7/24") for line in said), (
        said
    )
    toolkit.sh(f"rm -r {PLACE}; systemctl kill -s KILL microvm@{vm}")
