# SPDX-License-Identifier: MIT
"""A virtiofsd that ends under a running VM, in ways that systemd takes for a success as well.

The hypervisor is a stub, for which `socat` connects to the sockets of shares. With a real guest
test_ladder and test_faults have what is killed.
"""

from __future__ import annotations

import pytest

from tests.guest.package import Share, Stub

from .toolkit import Toolkit, eventually
from .vms import connected

pytestmark = [pytest.mark.container, pytest.mark.fault]

LOST = "has ended under the running guest"


def shared(toolkit: Toolkit, *tags: str) -> tuple[Share, ...]:
    """Shares of these tags, each of a directory of its own."""
    toolkit.sh("mkdir -p " + " ".join(f"/srv/{tag}" for tag in tags))
    return tuple(Share(tag=tag, source=f"/srv/{tag}", mount=f"/mnt/{tag}") for tag in tags)


def await_loss(toolkit: Toolkit, vm: str, *tags: str) -> None:
    """Wait until the VM's journal and its status tell of these shares, and of no others."""
    for tag in tags:
        toolkit.await_line(vm, f"virtiofsd of share {tag} {LOST}")
    (listed,) = toolkit.sh(f"microvm -l {vm}").splitlines()
    head, _, rest = listed.partition(", lost share ")
    told, _, command = rest.partition(": ")
    assert sorted(told.split(", ")) == sorted(tags), listed
    assert (head, command) == (f"{vm}: current({vm})", f"systemctl restart microvm@{vm}.service")


def tells_nothing(toolkit: Toolkit, vm: str, before: int) -> None:
    """Assert that nothing was said of lost shares since there were so many lines."""
    assert not any(LOST in line for line in toolkit.journal(vm)[before:])


@pytest.mark.core
def test_a_virtiofsd_that_ends_in_order(toolkit: Toolkit, vm: str) -> None:
    """It is told of, like one that failed; and the VM's own stop, which it looks like, is not."""
    tags = ("told", "failed", "error", "kept")
    toolkit.create(Stub(name=vm, shares=shared(toolkit, *tags)))
    before = toolkit.footprint()
    toolkit.systemctl("start", f"microvm@{vm}")
    with connected(toolkit, vm, *tags) as clients:
        # virtiofsd in Rust takes the one for a failure, QEMU's former one takes none for any.
        for tag, signal in (("told", "INT"), ("failed", "TERM")):
            unit = f"microvm-virtiofsd-{vm}-{tag}.service"
            toolkit.sh(f"kill -{signal} $(systemctl show -P MainPID {unit})")
        # After an error of the protocol, too, it ends as if the hypervisor had gone.
        clients["error"].kill()
        await_loss(toolkit, vm, "told", "failed", "error")
        ended = toolkit.property(f"microvm-virtiofsd-{vm}-told.service", "Result")
        assert ended == "success"
        assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
        toolkit.systemctl("restart", f"microvm@{vm}")
    assert toolkit.sh(f"microvm -l {vm}") == f"{vm}: current({vm})\n"
    lines = len(toolkit.journal(vm))
    with connected(toolkit, vm, "told", "kept") as clients:
        toolkit.systemctl("stop", "--no-block", f"microvm@{vm}")
        clients["told"].kill()
        clients["kept"].kill()
        # Timers are among that.
        toolkit.await_footprint(before, 60)
    tells_nothing(toolkit, vm, lines)


def test_a_share_is_lost_while_the_guest_is_waited_for(toolkit: Toolkit, vm: str) -> None:
    (share,) = shared(toolkit, "data")
    toolkit.create(
        Stub(
            name=vm,
            hypervisor="cloud-hypervisor",
            readiness="guest",
            run="exec sleep infinity",
            shares=(share,),
        )
    )
    toolkit.systemctl("start", "--no-block", f"microvm@{vm}")
    eventually(
        lambda: toolkit.property(f"microvm@{vm}", "StatusText"),
        lambda text: text.startswith("Waiting for the guest"),
        60,
        "it does not wait for its guest",
    )
    with connected(toolkit, vm, "data"):
        toolkit.systemctl("kill", "-s", "KILL", f"microvm-virtiofsd-{vm}-data.service")
        toolkit.await_line(vm, f"virtiofsd of share data {LOST}")
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "activating"
    assert ", lost share data" in toolkit.sh(f"microvm -l {vm}")


def test_a_packages_own_virtiofsd_run(toolkit: Toolkit, vm: str) -> None:
    """One of its virtiofsd dies and is started again; all of it dies; all of it is told to end."""
    toolkit.create(
        Stub(
            name=vm,
            share_options=False,
            virtiofsd_run=True,
            shares=shared(toolkit, "one", "other"),
        )
    )
    before = toolkit.footprint()
    unit, listed = f"microvm-virtiofsd-{vm}.service", f"{vm}: current({vm})\n"
    toolkit.systemctl("start", f"microvm@{vm}")
    assert toolkit.sh(f"microvm -l {vm}") == listed
    toolkit.sh("pkill -KILL -f 'shared-dir=/srv/[o]ne'")
    await_loss(toolkit, vm, "one")
    assert toolkit.property(unit, "ActiveState") == "active"
    toolkit.systemctl("kill", "-s", "KILL", unit)
    await_loss(toolkit, vm, "one", "other")

    lines = len(toolkit.journal(vm))
    toolkit.systemctl("restart", f"microvm@{vm}")
    assert toolkit.sh(f"microvm -l {vm}") == listed
    tells_nothing(toolkit, vm, lines)
    # By which it ends in order.
    toolkit.systemctl("kill", "-s", "TERM", "--kill-who=main", unit)
    eventually(
        lambda: toolkit.journal(vm)[lines:],
        lambda said: sum(LOST in line for line in said) == 2,
        60,
        "it is not told of",
    )
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.await_footprint(before, 60)
