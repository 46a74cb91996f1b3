# SPDX-License-Identifier: MIT
"""VMs wait for what is mounted late, and make nothing below a mount point."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guest.package import Stub
from tests.host.container import ContainerHost
from tests.host.fixtures import require_container

from .toolkit import IMAGE, Toolkit

pytestmark = pytest.mark.container

# Shows what a VM finds there, and makes what is missing, as packages do with images.
LOOK = "test -e {0}/disk.img || echo made >{0}/disk.img; cat {0}/disk.img"


@pytest.fixture
def late(toolkit: Toolkit, vm: str) -> Iterator[str]:
    """A directory of which a mount unit knows, after a service that takes its time."""
    where, data = f"/srv/{vm}", f"/opt/{vm}-data"
    toolkit.sh(f"mkdir -p {where} {data} && chmod 777 {where} {data}")
    toolkit.host.write(
        f"/etc/systemd/system/slow-{vm}.service", "[Service]\nType=oneshot\nExecStart=sleep 1\n"
    )
    toolkit.host.write(
        f"/etc/systemd/system/srv-{vm}.mount",
        f"[Unit]\nRequires=slow-{vm}.service\nAfter=slow-{vm}.service\n"
        f"[Mount]\nWhat={data}\nWhere={where}\nType=none\nOptions=bind\n",
    )
    toolkit.systemctl("daemon-reload")
    yield where
    toolkit.sh(
        f"systemctl stop microvm@{vm} srv-{vm}.mount; systemctl reset-failed srv-{vm}.mount; "
        f"rm -rf /etc/systemd/system/*{vm}.service /etc/systemd/system/*{vm}.mount; "
        f"systemctl daemon-reload; rm -r {where} {data}",
        check=False,
    )


@pytest.mark.core
def test_a_created_vm_waits_for_what_its_script_names(toolkit: Toolkit, vm: str, late: str) -> None:
    toolkit.sh(f"echo precious >/opt/{vm}-data/disk.img")
    toolkit.create(Stub(name=vm, prepare=LOOK.format(late)))
    toolkit.host.run(["microvm", "start", vm])
    assert toolkit.property(f"srv-{vm}.mount", "ActiveState") == "active"
    lines = toolkit.await_line(vm, "precious")
    assert any(f"waiting for {late} to be mounted" in line for line in lines)
    toolkit.systemctl("stop", f"microvm@{vm}", f"srv-{vm}.mount")
    assert toolkit.sh(f"ls {late}") == ""

    # What cannot be mounted is told, and nothing is made below.
    toolkit.host.write(
        f"/etc/systemd/system/srv-{vm}.mount.d/x.conf",
        "[Mount]\nWhat=/dev/null\nType=ext4\nOptions=ro\n",
    )
    toolkit.systemctl("daemon-reload")
    refused = toolkit.host.run(["microvm", "start", vm], check=False)
    assert refused.returncode == 1
    assert f"lies on {late}, which is not mounted: srv-{vm}.mount is failed" in refused.stderr
    assert toolkit.sh(f"ls {late}; rm -r /etc/systemd/system/srv-{vm}.mount.d") == ""


def test_a_declared_vm_is_installed_from_what_is_mounted_late(
    toolkit: Toolkit, vm: str, late: str
) -> None:
    """Kernel, state directory and disk, each on that mount."""
    toolkit.sh(
        # Root copies the kernel from where the VM's user cannot replace it.
        f"chmod 755 /opt/{vm}-data; cp {IMAGE}/vmlinuz {IMAGE}/initrd /opt/{vm}-data/; "
        f"ln -s {late}/disks /srv/{vm}-disks; mkdir -m 777 /opt/{vm}-data/disks"
    )
    toolkit.host.write(
        f"/etc/microvms/{vm}.toml",
        f'kernel = "{late}/vmlinuz"\ninitrd = "{late}/initrd"\nmem = 256\nautostart = false\n'
        "shutdown_timeout = 1\n"
        f'[[volumes]]\nimage = "/srv/{vm}-disks/disk.img"\nsize = 16\n',
    )
    toolkit.host.run(["microvm", "apply"])
    toolkit.systemctl("stop", f"srv-{vm}.mount")
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.sh(
        f"for i in $(seq 100); do test -e /opt/{vm}-data/disks/disk.img && exit; sleep 0.1; done; "
        "exit 1"
    )
    # The guest still boots, so that it is ended by force.
    toolkit.systemctl("stop", f"microvm@{vm}", check=False)
    toolkit.systemctl("stop", f"srv-{vm}.mount")
    assert toolkit.sh(f"ls {late}; rm /srv/{vm}-disks") == ""


@pytest.mark.parametrize("suite", ["trixie", "bookworm"])
def test_boot_with_late_mounts(suite: str) -> None:
    """fstab's `nofail`: the boot does not wait for these, and the VMs do."""
    require_container()
    with ContainerHost(suite) as host:
        fresh = Toolkit(host)
        fresh.install()
        host.write(
            "/etc/systemd/system/slow.service",
            "[Unit]\nDefaultDependencies=no\n"
            "[Service]\nType=oneshot\nRemainAfterExit=yes\nExecStart=sleep 3\n",
        )
        fresh.sh(
            "mkdir -p /opt/data /srv/data /opt/web /var/lib/microvms/web; chmod 1777 /opt/data; "
            "echo precious >/opt/data/disk.img && "
            "for each in data:srv/data web:var/lib/microvms/web; do "
            "echo /opt/${each%:*} /${each#*:} none "
            "bind,nofail,x-systemd.requires=slow.service 0 0; done >>/etc/fstab && "
            "systemctl daemon-reload && systemctl start srv-data.mount var-lib-microvms-web.mount"
        )
        for name in ("web", "db", "own"):
            stub = Stub(name=name, prepare=LOOK.format("/srv/data"))
            fresh.put(stub, f"/srv/data/{name}" if name == "own" else None)
        host.run(["microvm", "create", "web", "--runner", "/opt/packages/web"])
        host.run(["microvm", "create", "own", "--runner", "/srv/data/own"])
        fresh.systemctl("enable", "microvm@web", "microvm@own")
        host.write("/etc/microvms/db.toml", 'runner = "/opt/packages/db"\n')
        fresh.sh("mkdir -p /var/log/journal; journalctl --flush")
        host.reboot()
        for name in ("web", "own", "db"):
            assert "precious" in "\n".join(fresh.await_line(name, "precious")), fresh.status(name)
        assert host.exists("/opt/web/booted")
        fresh.systemctl("stop", "microvm@web", "microvm@own", "microvm@db")
        fresh.systemctl("stop", "srv-data.mount", "var-lib-microvms-web.mount")
        assert fresh.sh("ls /srv/data /var/lib/microvms/web").split() == [
            "/srv/data:",
            "/var/lib/microvms/web:",
        ]
