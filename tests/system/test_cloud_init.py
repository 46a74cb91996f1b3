# SPDX-License-Identifier: MIT
"""`microvm init --guest debian`: a Debian that takes from its seed what it did not know before.

The test's host reaches no mirror. The guest's root is made outside of it, by the same code, and put
where that looks for one.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm_host.guests import archives, debian
from microvm_host.paths import HostPaths
from tests.host import cache, root
from tests.host.container import ContainerHost
from tests.host.fixtures import require_container
from tests.host.progress import step

from .test_access import Console
from .toolkit import Toolkit, eventually

pytestmark = pytest.mark.container

SUITE = "trixie"
VM = "shop"
GUESTS = HostPaths().guests
# What init proposes is as it stands, and this beside it. Emulated, two CPUs boot sooner.
DROP_IN = """\
vcpu = 2
credentialFiles.KEY = "/etc/secrets/guest-key"

[cloudInit]
networkConfig = "/etc/secrets/guest-network"
"""
ADDRESS = "192.0.2.7/24"
NETWORK = f"""\
version: 2
ethernets:
  first:
    match: {{macaddress: "MAC"}}
    dhcp4: true
    addresses: [{ADDRESS}]
"""
# A host's key is not known the first time; options may come after the name.
SSH = "microvm ssh {} -o StrictHostKeyChecking=accept-new -o BatchMode=yes "
# Emulated, that is.
BOOTS_WITHIN = 1200


def archive() -> Path:
    """The directory of the guest's root in the tests' cache, made if need be."""
    origin = archives.origin(HostPaths(), SUITE, root.mirror())
    with step(f"{SUITE}: a Debian guest"):
        made = debian.make(debian.Recipe(origin), HostPaths(str(cache.guests())), print)
    return Path(made.root).parent


@pytest.fixture(scope="module")
def networked() -> Iterator[Toolkit]:
    """A host of its own, whose systemd-networkd has a network for VMs."""
    require_container()
    with ContainerHost(SUITE) as host:
        toolkit = Toolkit(host)
        toolkit.install()
        toolkit.systemctl("enable", "--now", "systemd-networkd.service")
        toolkit.sh("microvm network enable")
        yield toolkit


def test_a_host_that_makes_no_root_is_told_why(networked: Toolkit) -> None:
    for arguments, complaint, code in (
        (["--guest", "debian"], "made with mmdebstrap, which this host does not have", 1),
        (["--guest", "debian", "--suite", "Nosuch"], "'Nosuch' cannot be a suite of Debian", 2),
        (["--guest", "debian", "--ssh-key", "/none.pub"], "/none.pub: cannot be read", 1),
        (["--suite", SUITE], "--suite is for --guest debian alone", 2),
    ):
        done = networked.host.run(["microvm", "init", VM, *arguments], check=False)
        assert (done.returncode, complaint in done.stderr) == (code, True), done.stderr
    assert networked.sh("ls -A /etc/microvms /var/lib/microvms") in ("", _EMPTY), "left something"


_EMPTY = "/etc/microvms:\n\n/var/lib/microvms:\n"


def test_a_debian_takes_all_of_it_from_its_seed(networked: Toolkit) -> None:
    toolkit = networked
    made = archive()
    toolkit.host.copy(made, f"{GUESTS}/{made.name}")
    toolkit.sh("ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519")
    done = toolkit.host.run(
        ["microvm", "init", VM, "--guest", "debian", "--mirror", root.mirror()], timeout=120
    )
    assert f"taking the Debian root {GUESTS}/{made.name}" in done.stderr
    assert "admin may log in by ssh with the keys of /root/.ssh/id_ed25519.pub" in done.stderr
    assert f"start it: systemctl start microvm@{VM}" in done.stdout
    mac = toolkit.sh(f"cat /var/lib/microvms/{VM}/current/share/microvm/tap-macs").split()[1]
    toolkit.host.write("/etc/secrets/guest-key", "secret of the host", 0o600)
    toolkit.host.write("/etc/secrets/guest-network", NETWORK.replace("MAC", mac), 0o600)
    toolkit.host.write(f"/etc/microvms/{VM}.toml.d/test.toml", DROP_IN)
    toolkit.sh(f"microvm update {VM}")
    toolkit.systemctl("start", f"microvm@{VM}", timeout=120)
    # The prompt of `microvm console`.
    toolkit.await_line(VM, f"{VM} ttyS0", timeout=BOOTS_WITHIN)

    def status() -> str:
        argv = ["microvm", "exec", VM, "--", "cloud-init", "status", "--wait"]
        return toolkit.host.run(argv, check=False, timeout=BOOTS_WITHIN).stdout

    eventually(status, lambda said: "status: done" in said, BOOTS_WITHIN, "cloud-init is not done")
    # By its sshd, with the key of this host's root.
    script = (
        "hostname; id -nG; sudo -n id -u; cat /var/lib/cloud/data/instance-id; echo; "
        "ip -4 -o address; systemctl is-system-running --wait; "
        "sudo sshd -T | grep ^passwordauthentication; "
        "sudo systemd-creds --system cat KEY; echo; "
        "ssh-keygen -lf .ssh/authorized_keys; df --output=size -m / | tail -n 1"
    )
    argv = ["sh", "-c", f'{SSH.format(f"admin@{VM}")} "$0"', script]
    said = toolkit.host.run(argv, timeout=BOOTS_WITHIN).stdout
    lines = [line.strip() for line in said.splitlines()]
    assert lines[:4] == [VM, "admin adm sudo", "0", f"iid-{VM}"], said
    addresses = {line.split()[3] for line in lines if " inet " in line}
    lease = toolkit.sh(f"microvm -l | sed -n 's/^{VM}: .*, //p'").strip()
    assert {ADDRESS, f"{lease}/24"} <= addresses and lease.startswith("192.168.87."), said
    assert {"running", "passwordauthentication no", "secret of the host"} <= {*lines}, said
    fingerprint = toolkit.sh("ssh-keygen -lf /root/.ssh/id_ed25519.pub").strip()
    assert fingerprint in lines, said
    # The disk is the guest's own, as large as was asked for.
    assert int(lines[-1]) > 9000, said
    # `microvm ssh NAME` is root's.
    assert toolkit.sh(f"{SSH.format(VM)} id -u", timeout=BOOTS_WITHIN) == "0\n"
    # On the console one has a password, when root of the host gave one.
    chpasswd = ["microvm", "exec", "-i", "-t", "60", VM, "--", "chpasswd"]
    toolkit.host.run(chpasswd, input="admin:given\n")
    console = Console(toolkit, vm=VM)
    for shown, typed in ((": connected", ""), (f"{VM} login: ", "admin"), ("Password: ", "given")):
        console.await_text(shown)
        console.type(f"{typed}\r")
    console.await_text(f"admin@{VM}:~$")
    # How guests stop is seen elsewhere, and this one takes long.
    toolkit.systemctl("kill", "--signal=KILL", f"microvm@{VM}")
    assert console.ends() == 0
