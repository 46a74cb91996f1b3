# SPDX-License-Identifier: MIT
"""Declared guests on QEMU's other machines, seen from inside: without PCI, and q35.

The usual machine is in test_declared.py and test_access.py; what takes KVM, vsock, macvtaps or
devices of the host in test_virtual.py and test_virtual_passthrough.py.
"""

from __future__ import annotations

import pytest

from .toolkit import IMAGE, Toolkit

pytestmark = pytest.mark.container

DECLARATION = """\
autostart = false
kernel = "{image}/vmlinuz"
initrd = "{image}/initrd"
mem = 256
balloon = true
machineId = "{uuid}"
kernelParams = [
    "quiet", "loglevel=3", "guest.name={vm}",
    "guest.net={tap},10.77.8.2/24", "guest.net={user},10.0.2.15/24,10.0.2.2",
    "guest.share=fs,/mnt", "guest.9p=nine,/nine", "guest.disk=first", "guest.ping=10.0.2.2",
    {params}
]
{keys}

[qemu]
guestAgent = true
{machine}

[[interfaces]]
type = "tap"
id = "{vm}t"
mac = "{tap}"

[[interfaces]]
type = "user"
id = "net"
mac = "{user}"

[[shares]]
tag = "fs"
source = "/srv/{vm}/fs"
proto = "virtiofs"

[[shares]]
tag = "nine"
source = "/srv/{vm}/nine"
proto = "9p"

[[volumes]]
image = "disk.img"
size = 16
fsType = "none"
serial = "first"
"""
TAP, USER = "02:00:00:00:08:01", "02:00:00:00:08:02"
UUID = "6f7b2ab2-1234-4000-8000-000000000001"
MMIO = 'machineOpts.pcie = "off"'
# It has all that a VM may be given by and by from the start, and gets a part of it.
HOTPLUG = "hotplugMem = 512\nhotpluggedMem = 256"


def boot(
    toolkit: Toolkit, vm: str, *, machine: str = "", keys: str = "", params: str = ""
) -> list[str]:
    """Declare the guest and start it; gives what it tells until it is up."""
    toolkit.sh(
        f"mkdir -p /etc/microvms; for tag in fs nine; do mkdir -p /srv/{vm}/$tag; "
        f'echo "from $tag" >/srv/{vm}/$tag/hello; done; chown microvm /srv/{vm}/*'
    )
    text = DECLARATION.format(
        **{"vm": vm, "image": IMAGE, "tap": TAP, "user": USER, "uuid": UUID},
        **{"machine": machine, "keys": keys, "params": params},
    )
    toolkit.host.write(f"/etc/microvms/{vm}.toml", text)
    toolkit.sh("microvm apply")
    toolkit.systemctl("start", f"microvm@{vm}", timeout=180)
    return toolkit.await_line(vm, f"GUEST {vm}: ready", timeout=400)


def check(toolkit: Toolkit, vm: str, lines: list[str]) -> None:
    """Check that the guest sees and uses all that it was declared with."""
    text = "\n".join(lines)
    for mac in (TAP, USER):
        assert any(f" {mac} " in line and "driver virtio_net" in line for line in lines), text
    assert f"GUEST {vm}: block vda 16777216 bytes ro 0 serial first" in lines, text
    assert f"GUEST {vm}: disk first write: ok" in lines, text
    for tag in ("fs", "nine"):
        assert f"GUEST {vm}: share {tag} file hello: from {tag}" in lines, text
        assert f"GUEST {vm}: share {tag} write: ok" in lines, text
        assert toolkit.host.read(f"/srv/{vm}/{tag}/from-guest") == f"written by {vm}\n"
    assert f"GUEST {vm}: ping 10.0.2.2 ok" in lines, text
    assert any(f"GUEST {vm}: rng virtio_rng" in line for line in lines), text
    assert f"GUEST {vm}: port org.qemu.guest_agent.0" in lines, text
    assert f"GUEST {vm}: balloon driver virtio_balloon free-page-reporting on" in lines, text


def end(toolkit: Toolkit, vm: str) -> None:
    """Stop it by its power button."""
    toolkit.systemctl("stop", f"microvm@{vm}", timeout=180)
    assert f"GUEST {vm}: shutting down (power-button)" in toolkit.journal(vm)
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    toolkit.sh(f"rm -r /srv/{vm}")


def test_a_machine_without_pci(toolkit: Toolkit, vm: str) -> None:
    lines = boot(toolkit, vm, machine=MMIO)
    check(toolkit, vm, lines)
    assert not [line for line in lines if line.startswith(f"GUEST {vm}: pci ")], lines
    end(toolkit, vm)


def test_q35_with_memory_that_comes_later(toolkit: Toolkit, vm: str) -> None:
    lines = boot(toolkit, vm, keys=HOTPLUG, params='"guest.memory=512"')
    check(toolkit, vm, lines)
    text = "\n".join(lines)
    # The bridge to the old buses is that of this machine.
    assert f"GUEST {vm}: pci 0000:00:1f.0 8086:2918 driver -" in lines, text
    # virtio-mem is device 24 (virtio 1.2, 5.15).
    assert "1af4:1058 driver virtio-pci" in text, text
    assert f"GUEST {vm}: memory blocks 512 MB" in lines, text
    assert f"GUEST {vm}: uuid {UUID}" in lines, text
    end(toolkit, vm)
