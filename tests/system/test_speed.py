# SPDX-License-Identifier: MIT
"""A start with a share beside supervisord, which the peer runs for it. `make bench` tells more."""

from __future__ import annotations

import statistics
import time

import pytest

from tests.guest.package import Share, Stub

from .toolkit import Toolkit

pytestmark = pytest.mark.container

ROUNDS = 5


def test_a_start_with_a_share_is_20_times_as_fast_as_with_supervisord(
    toolkit: Toolkit, vm: str
) -> None:
    """The same package both ways: the sockets of systemd, and the package's own supervisord."""
    toolkit.sh("mkdir -p /srv/data")
    share = Share(tag="data", source="/srv/data", mount="/mnt", cache="auto")
    ours = toolkit.put(Stub(name=vm, shares=(share,)))
    theirs = toolkit.put(
        Stub(name=vm, shares=(share,), share_options=False, virtiofsd_run=True), f"/opt/{vm}-theirs"
    )
    # The peer waits for supervisord's own word that its programs run, which comes when they have
    # stayed up for a second.
    toolkit.host.write(
        f"/etc/systemd/system/plain-virtiofsd@{vm}.service",
        f"[Service]\nType=notify\nNotifyAccess=all\nWorkingDirectory=/var/lib/microvms/{vm}\n"
        f"ExecStart={theirs}/bin/virtiofsd-run\n",
    )
    toolkit.link(vm, ours)
    toolkit.systemctl("daemon-reload")
    fast, slow = [], []
    for _ in range(ROUNDS):
        for unit, seconds in ((f"microvm@{vm}", fast), (f"plain-virtiofsd@{vm}", slow)):
            began = time.monotonic()
            toolkit.systemctl("start", unit)
            seconds.append(time.monotonic() - began)
            if unit.startswith("microvm@"):
                assert toolkit.sh("pgrep -a python", check=False) == ""
                toolkit.host.run(["microvm", "stop", vm])
            else:
                toolkit.systemctl("stop", unit)
    toolkit.sh(f"rm /etc/systemd/system/plain-virtiofsd@{vm}.service; systemctl daemon-reload")
    ratio = statistics.median(slow) / statistics.median(fast)
    print(
        f"toolkit {statistics.median(fast) * 1000:.0f} ms, "
        f"supervisord alone {statistics.median(slow) * 1000:.0f} ms, ratio {ratio:.1f}"
    )
    assert ratio >= 20
