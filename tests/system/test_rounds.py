# SPDX-License-Identifier: MIT
"""Many VMs started and stopped at once, round after round, after which nothing has leaked."""

from __future__ import annotations

import time

import pytest

from tests.guest.package import Share, Stub, Tap

from .rounds import rounds
from .toolkit import Toolkit, eventually
from .vms import saying

pytestmark = [pytest.mark.container, pytest.mark.fault]

AT_ONCE = 10
# By number: what has a share, is registered with machined, and is waited for until its guest is
# ready. The latter's hypervisor is of a kind that carries vsock by itself.
SHARED, REGISTERED, AWAITED = range(2), range(2, 4), range(4, 6)
UUID = "12345678-1234-1234-1234-12345678900{}"

# What the footprint does not have, a line each. Descriptors by what they are, since a leak is of
# one kind: systemd has a number of its own open for each unit that runs, and these have gone.
_HELD = r"""
for fd in /proc/1/fd/*; do
    case $(readlink "$fd") in
        socket:*) echo socket ;; pipe:*) echo pipe ;; anon_inode:*) echo anon ;; *) echo file ;;
    esac
done 2>/dev/null | sort | uniq -c | while read -r count kind; do echo "fds $kind $count"; done
echo "mounts $(wc -l </proc/1/mountinfo)"
echo "links $(ls /sys/class/net | wc -l)"
echo "units $(systemctl list-units --all --plain --no-legend --no-pager 'microvm*' | wc -l)"
echo "cgroups $(find /sys/fs/cgroup -name '*microvm*' | wc -l)"
# Which also starts it, where it has found that nobody needs it.
echo "machines $(machinectl list --no-legend --no-pager | wc -l)"
echo "machined $(ls /proc/$(pidof systemd-machined)/fd | wc -l)"
echo "drop-ins $(find /run/systemd/transient /run/systemd/system.control -name '*microvm*' \
    2>/dev/null | wc -l)"
echo "processes $(ls -d /proc/[0-9]* | wc -l)"
echo "files $(find /run /tmp /var/lib/microvms -xdev -path /run/log -prune -o \
    -path /run/systemd/journal -prune -o -print | wc -l)"
"""

# Of systemd's own, some come and go with a moment: connections of systemctl, the journal's streams.
# What leaks with a round would be there as often as there were rounds, or VMs in them.
_TOLERANCE = {"fds": 4, "machined": 4, "processes": 4, "files": 4}


def held(toolkit: Toolkit) -> dict[str, int]:
    """How much of each kind of thing is there."""
    found = {}
    for line in toolkit.sh(_HELD).splitlines():
        what, _, count = line.rpartition(" ")
        found[what] = int(count)
    return found


def test_rounds_of_ten_vms_leave_nothing(toolkit: Toolkit, vm: str) -> None:
    """Ten VMs with a tap, up and down together, some of them with more.

    Two have a share, two are registered with machined, and of two the guest says that it is ready.

    After it, no interface, socket, unit, process, record, mount or descriptor of PID 1 is there
    that was not before, no start was refused, and no guest was killed.
    """
    total = rounds(10, 500)
    assert total > max(_TOLERANCE.values()), "too few to tell a leak from noise"
    toolkit.sh("mkdir -p /srv/data")
    share = Share(tag="data", source="/srv/data", mount="/mnt")
    vms = [f"{vm}r{number}" for number in range(AT_ONCE)]
    try:
        for number, name in enumerate(vms):
            toolkit.create(
                Stub(
                    name=name,
                    taps=(Tap(name=f"{name}t", mac=f"02:00:00:00:00:{number:02x}"),),
                    shares=(share,) if number in SHARED else (),
                    machine_uuid=UUID.format(number) if number in REGISTERED else None,
                    register=number in REGISTERED,
                    hypervisor="cloud-hypervisor" if number in AWAITED else "qemu",
                    readiness="guest" if number in AWAITED else None,
                    prepare=saying("READY=1") if number in AWAITED else "",
                )
            )
        footprint = toolkit.footprint()
        # The first round loads what stays loaded: units, and systemd's own caches.
        one_round(toolkit, vms)
        settle(toolkit, vms, footprint)
        before = held(toolkit)
        cursor = toolkit.sh("journalctl -n 0 --show-cursor").split("cursor: ")[1].strip()
        began = time.monotonic()
        for number in range(1, total + 1):
            one_round(toolkit, vms)
            if number % 25 == 0 or number == total:
                seconds = time.monotonic() - began
                print(f"round {number} of {total}, {number / seconds:.2f} a second", flush=True)
                # Not at the end alone: a leak is seen where it began.
                settle(toolkit, vms, footprint)

        def grown() -> dict[str, tuple[int, int]]:
            return {
                what: (before.get(what, 0), count)
                for what, count in held(toolkit).items()
                if count - before.get(what, 0) > _TOLERANCE.get(what.split()[0], 0)
            }

        # systemd forgets units a moment after their end; what has leaked stays.
        eventually(grown, lambda found: not found, 60, "there is more than before")
        toolkit.sh("journalctl --sync")
        complaints = toolkit.sh(
            f"journalctl --no-pager --output=cat --after-cursor='{cursor}' | grep -E "
            "'SIGKILL|SIGTERM|was not shut down|start-limit|too quickly|refused|Failed|failed|"
            "Traceback|could not' | sort | uniq -c | head -n 20",
            check=False,
        )
        assert complaints == ""
        for name in vms:
            assert toolkit.property(f"microvm@{name}", "Result") == "success"
            assert toolkit.property(f"microvm@{name}", "NRestarts") == "0"
    finally:
        for name in vms:
            toolkit.remove(name)


def settle(toolkit: Toolkit, vms: list[str], footprint: set[str]) -> None:
    """Wait until nothing more is there than before; machined hears of an end later than others."""
    toolkit.await_footprint(footprint)
    eventually(
        lambda: toolkit.sh("machinectl list --no-legend --no-pager").splitlines(),
        lambda lines: not any(line.split()[0] in vms for line in lines if line.strip()),
        60,
        "machined still knows them",
    )


# Registering is waited for by nobody: stopped in between, it would fail, and say so.
_REGISTERED = """
until leader=$(systemctl show --property=MainPID --value microvm@{0}) &&
    [ "$(machinectl show --property=Leader --value {0} 2>/dev/null)" = "$leader" ] &&
    [ "$(systemctl show --property=ActiveState --value microvm-machined@{0})" = inactive ]
do sleep 0.05; done
"""


def one_round(toolkit: Toolkit, vms: list[str]) -> None:
    """Start all and stop all, and see that they were there in between."""
    units = " ".join(f"microvm@{name}" for name in vms)
    up = toolkit.sh(
        f"systemctl start {units} && systemctl is-active {units} | grep -c '^active$'; "
        f"ls -d {' '.join(f'/sys/class/net/{name}t' for name in vms)} | wc -l; "
        f"{''.join(_REGISTERED.format(vms[number]) for number in REGISTERED)}"
        f"systemctl stop {units}",
        timeout=300,
    ).split()
    assert up == [str(len(vms))] * 2
