# SPDX-License-Identifier: MIT
"""`ssh vsock/CID`, by what systemd has for it and by what the toolkit has where that is too old.

A container host has no vsock of its own. A guest's kernel does, for itself: in it, a program of the
host's own tree logs in over the loopback CID.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guest.package import Share

from .toolkit import Toolkit
from .vms import guest

pytestmark = [pytest.mark.container, pytest.mark.core]

OURS = "/etc/ssh/ssh_config.d/25-microvm-host.conf"
SYSTEMDS = "/etc/ssh/ssh_config.d/20-systemd-ssh-proxy.conf"
OUR_PROXY = "/usr/bin/python3 -IS /usr/local/lib/microvm-host/microvm_host/vsock.py %h %p"

# Logs in to itself, as this host's root, with the configuration of the tree that it runs in. Only
# what is mounted on /run can be written to. The processor is emulated: the cheapest there is.
LOGIN = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
modprobe vsock_loopback || exit
mkdir /run/sshd
printf '%s\\n' 'UsePAM no' 'UseDNS no' 'AuthorizedKeysFile /srv/ssh/key.pub' \
    'HostKey /etc/ssh/ssh_host_ed25519_key' >/run/sshd.conf
socat VSOCK-LISTEN:22,fork EXEC:'/usr/sbin/sshd -i -f /run/sshd.conf' &
# Nobody listens at first.
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    ssh -i /srv/ssh/key -o BatchMode=yes -o StrictHostKeyChecking=no \
        -o UserKnownHostsFile=/run/known -o KexAlgorithms=curve25519-sha256 \
        -l root vsock/1 echo came over vsock && break
    sleep 1
done
kill $!
"""


def configured(toolkit: Toolkit) -> dict[str, str]:
    """What ssh would do for a CID."""
    shown = toolkit.host.run(["ssh", "-G", "vsock/77"]).stdout
    return dict(line.split(" ", 1) for line in shown.splitlines() if " " in line)


@pytest.fixture
def without_systemds(toolkit: Toolkit) -> Iterator[None]:
    """A host as if its systemd had no proxy."""
    toolkit.sh(f"test ! -e {SYSTEMDS} || mv {SYSTEMDS} {SYSTEMDS}.off")
    yield
    toolkit.sh(f"test ! -e {SYSTEMDS}.off || mv {SYSTEMDS}.off {SYSTEMDS}")


def test_the_newer_systemds_own_proxy_comes_first(toolkit: Toolkit) -> None:
    assert toolkit.sh(f"readlink {OURS}") == "/usr/local/share/microvm-host/ssh_config\n"
    expected = OUR_PROXY
    if toolkit.host.suite != "bookworm":
        expected = "/usr/lib/systemd/systemd-ssh-proxy %h %p"
    found = configured(toolkit)
    assert (found["proxycommand"], found["proxyusefdpass"]) == (expected, "yes")


@pytest.mark.usefixtures("without_systemds")
def test_ours_is_used_where_systemd_has_none(toolkit: Toolkit) -> None:
    found = configured(toolkit)
    assert (found["proxycommand"], found["proxyusefdpass"]) == (OUR_PROXY, "yes")
    # As for any host.
    assert found["stricthostkeychecking"] == "ask"
    # By a user as well. Nobody ever has this CID.
    refused = toolkit.host.run(
        ["ssh", "-o", "BatchMode=yes", "vsock/0", "true"], user="microvm", check=False
    )
    assert refused.returncode == 255
    assert "cannot reach port 22 of vsock CID 0: " in refused.stderr


def test_keys_of_guests_are_kept_by_the_vms_name(toolkit: Toolkit, vm: str) -> None:
    """And checked by it, whatever systemd's file says for `vsock/CID`."""
    toolkit.create(guest(vm, vsock_cid=77))
    shown = toolkit.host.run(["microvm", "ssh", vm, "-G"]).stdout.splitlines()
    assert f"hostkeyalias microvm-{vm}" in shown
    assert "stricthostkeychecking ask" in shown
    assert not [line for line in shown if line.startswith("userknownhostsfile /dev/null")]


@pytest.mark.usefixtures("without_systemds")
def test_login_over_vsock(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh(
        "mkdir -p /srv/ssh /srv/tree; test -e /srv/ssh/key || "
        "ssh-keygen -q -t ed25519 -N '' -f /srv/ssh/key; mount --bind / /srv/tree"
    )
    toolkit.host.write("/srv/ssh/login", LOGIN, 0o755)
    toolkit.create(
        guest(
            vm,
            shares=(Share(tag="tree", source="/srv/tree", mount="/tree"),),
            kernel_args=("guest.run=/tree,/srv/ssh/login",),
        )
    )
    try:
        toolkit.systemctl("start", f"microvm@{vm}", timeout=120)
        lines = toolkit.await_line(vm, f"GUEST {vm}: ready", timeout=300)
        assert f"GUEST {vm}: run: came over vsock" in lines, "\n".join(lines)
        toolkit.systemctl("stop", f"microvm@{vm}", timeout=120)
    finally:
        toolkit.remove(vm)
        toolkit.sh("umount /srv/tree", check=False)
