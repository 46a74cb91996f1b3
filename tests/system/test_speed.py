# SPDX-License-Identifier: MIT
"""A start with a share beside supervisord, which the peer runs for it. `make bench` tells more."""

from __future__ import annotations

import statistics

import pytest

from tests.guest.package import Share, Stub

from .toolkit import Toolkit
from .vms import no_helper_stays

pytestmark = pytest.mark.container

ROUNDS = 9


# The plain way: what the peer's units do, in as many units, with the package's own supervisord.
PLAIN = """
[plain-set-booted@.service]
[Unit]
PartOf=plain@%i.service
[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'ln -sfn $(readlink current) plain-booted'
ExecStop=/bin/rm plain-booted
WorkingDirectory=/var/lib/microvms/%i
[plain-virtiofsd@.service]
[Unit]
PartOf=plain@%i.service
After=plain-set-booted@%i.service
[Service]
Type=notify
NotifyAccess=all
ExecStart=/opt/plain/bin/virtiofsd-run
WorkingDirectory=/var/lib/microvms/%i
[plain@.service]
[Unit]
Requires=plain-set-booted@%i.service plain-virtiofsd@%i.service
After=plain-set-booted@%i.service plain-virtiofsd@%i.service
[Service]
ExecStart=/opt/plain/bin/microvm-run
WorkingDirectory=/var/lib/microvms/%i
User=microvm
Group=kvm
"""


def install_plain(toolkit: Toolkit) -> list[str]:
    """Write the plain units; gives their paths."""
    paths = []
    for part in PLAIN.strip().removeprefix("[plain").split("\n[plain"):
        name, _, text = f"plain{part}".partition("]\n")
        paths.append(f"/etc/systemd/system/{name}")
        toolkit.host.write(paths[-1], text + "\n")
    return paths


def milliseconds(toolkit: Toolkit, unit: str) -> float:
    """How long `systemctl start` takes, measured on the host itself."""
    line = f"a=$(date +%s%N); systemctl start {unit} || exit 1; b=$(date +%s%N); echo $((b - a))"
    return int(toolkit.sh(line)) / 1e6


def test_a_start_with_a_share_is_many_times_as_fast_as_with_supervisord(
    toolkit: Toolkit, vm: str
) -> None:
    """Alternating, in one run: the toolkit, and the plain way with the same share."""
    toolkit.sh("mkdir -p /srv/data")
    share = Share(tag="data", source="/srv/data", mount="/mnt", posix_acl=True)
    toolkit.link(vm, toolkit.put(Stub(name=vm, shares=(share,))))
    toolkit.put(
        Stub(name=vm, shares=(share,), share_options=False, virtiofsd_run=True), "/opt/plain"
    )
    paths = install_plain(toolkit)
    toolkit.systemctl("daemon-reload")
    fast, slow = [], []
    for _ in range(ROUNDS):
        fast.append(milliseconds(toolkit, f"microvm@{vm}"))
        # No process of ours: all that runs is the hypervisor.
        no_helper_stays(toolkit)
        toolkit.host.run(["microvm", "stop", vm])
        slow.append(milliseconds(toolkit, f"plain@{vm}"))
        toolkit.sh(f"systemctl stop plain@{vm} plain-virtiofsd@{vm} plain-set-booted@{vm}")
    toolkit.sh(f"rm {' '.join(paths)}; systemctl daemon-reload")
    medians = statistics.median(slow) / statistics.median(fast)
    # Whatever else the machine does adds to our milliseconds, and hides in their pauses.
    best = min(slow) / min(fast)
    print(
        f"toolkit {statistics.median(fast):.0f} ms (at best {min(fast):.0f}), with supervisord "
        f"{statistics.median(slow):.0f} ms ({min(slow):.0f}): {medians:.1f} times as fast "
        f"({best:.1f})"
    )
    # On an idle machine it is more than twenty. Others at work slow down just us, since supervisord
    # sleeps most of its time.
    assert best >= 10, (fast, slow)
