# SPDX-License-Identifier: MIT
"""The units of shares beside a running VM: their messages, restarts in a row, `systemctl isolate`.

What stops all VMs at once is here as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.guest.package import Share, Stub, Tap

from .rounds import rounds
from .toolkit import Toolkit, eventually
from .vms import control, guest

pytestmark = pytest.mark.container

RUN = "bin/virtiofsd-run"
FEW = "/etc/systemd/system/few.target"
# All that systemd would heed of a service that it listens to, in a script that ends by `set -e`
# where it cannot report.
MESSAGES = """\
systemd-notify --ready --status=up
systemd-notify READY=1 STOPPING=1
systemd-notify "$(printf 'RELOADING=1\\nMONOTONIC_USEC=1')" MAINPID=1 EXTEND_TIMEOUT_USEC=1000000
systemd-notify WATCHDOG_USEC=100000 WATCHDOG=trigger
systemd-notify STOPPING=1
"""


def share(toolkit: Toolkit, tag: str) -> Share:
    toolkit.sh(f"mkdir -p /srv/{tag} && echo hi >/srv/{tag}/hello")
    return Share(tag=tag, source=f"/srv/{tag}", mount=f"/mnt/{tag}")


def script(vm: str, tag: str, before: str = "") -> dict[str, bytes]:
    """A package's own virtiofsd-run, which is virtiofsd itself after some lines of shell."""
    socket = f"{vm}-virtiofs-{tag}.sock"
    return {
        RUN: (
            f"#! /bin/bash -e\n{before}"
            "if [ -x /usr/libexec/virtiofsd ]; then\n"
            f"exec /usr/libexec/virtiofsd --socket-path={socket} --shared-dir=/srv/{tag}\nfi\n"
            f"exec /usr/lib/qemu/virtiofsd --socket-path={socket} -o source=/srv/{tag}\n"
        ).encode()
    }


@contextmanager
def drop_in(toolkit: Toolkit, unit: str, text: str) -> Iterator[None]:
    path = f"/etc/systemd/system/{unit}.d"
    toolkit.sh(f"mkdir -p {path} && printf '{text}' >{path}/test.conf && systemctl daemon-reload")
    try:
        yield
    finally:
        toolkit.sh(f"rm -r {path}; systemctl daemon-reload")


@pytest.mark.core
def test_what_a_packages_script_says_does_not_end_it(toolkit: Toolkit, vm: str) -> None:
    """Its shares are there when TimeoutStopSec= is over, and the stop does not take that long."""
    served = share(toolkit, "said")
    toolkit.create(
        Stub(
            name=vm,
            share_options=False,
            shares=(served,),
            extra_files=script(vm, "said", MESSAGES),
        )
    )
    before, unit = toolkit.footprint(), f"microvm-virtiofsd-{vm}.service"
    # Two seconds stand for 90.
    with drop_in(toolkit, unit, "[Service]\\nTimeoutStopSec=2\\n"):
        toolkit.systemctl("start", f"microvm@{vm}")
        main = toolkit.property(unit, "MainPID")
        toolkit.sh("sleep 3")
        for name, value in (
            ("ActiveState", "active"),
            ("SubState", "running"),
            ("MainPID", main),
            ("StatusText", ""),
        ):
            assert toolkit.property(unit, name) == value
        assert "lost" not in toolkit.sh(f"microvm list {vm}")
        toolkit.sh(f"microvm stop {vm}")
        assert toolkit.footprint() == before


def restarts(toolkit: Toolkit, vm: str, number: int) -> None:
    """Restart a VM so many times, by systemctl and by itself, and see that its shares are there."""
    unit = f"microvm-virtiofsd-{vm}.service"
    toolkit.systemctl("start", f"microvm@{vm}")
    for each in range(number):
        if each % 10 == 9:
            # Nobody waits for this one.
            main = toolkit.property(f"microvm@{vm}", "MainPID")
            toolkit.systemctl("kill", "-s", "KILL", "--kill-who=main", f"microvm@{vm}")
            eventually(
                lambda main=main: toolkit.property(f"microvm@{vm}", "MainPID"),  # type: ignore[misc]
                lambda now, main=main: now not in ("0", main),  # type: ignore[misc]
                60,
                "it is not started again",
            )
        toolkit.systemctl("restart", f"microvm@{vm}")
        assert toolkit.property(unit, "ActiveState") == "active", each


def test_a_restart_while_a_lost_share_is_looked_for(toolkit: Toolkit, vm: str) -> None:
    """systemd keeps the stopped unit of a script for as long as that takes, which is 5 s."""
    toolkit.create(
        Stub(
            name=vm,
            share_options=False,
            shares=(share(toolkit, "kept"),),
            extra_files=script(vm, "kept"),
        )
    )
    toolkit.systemctl("start", f"microvm@{vm}")
    teller = f"microvm-share-lost@{vm}.service"
    toolkit.sh(f"rm /var/lib/microvms/{vm}/{vm}-virtiofs-kept.sock")
    eventually(
        lambda: toolkit.property(teller, "ActiveState"),
        lambda state: state == "activating",
        30,
        "nothing looks for it",
    )
    # However long the stop takes on a busy machine, it is there for longer.
    toolkit.systemctl("kill", "-s", "STOP", teller)
    restarts(toolkit, vm, 1)
    assert not [line for line in toolkit.journal(vm) if "already loaded" in line]


@pytest.mark.fault
def test_restarts_in_a_row_on_a_busy_machine(toolkit: Toolkit, vm: str) -> None:
    """With two loops beside, none of 200 fails; each tenth follows an end of the hypervisor."""
    toolkit.create(
        Stub(
            name=vm,
            share_options=False,
            shares=(share(toolkit, "busy"),),
            extra_files=script(vm, "busy"),
        )
    )
    before = toolkit.footprint()
    loops = [toolkit.host.spawn(["sh", "-c", "while :; do :; done"]) for _ in range(2)]
    try:
        restarts(toolkit, vm, rounds(5, 200))
    finally:
        for loop in loops:
            loop.kill()
            loop.communicate()
    toolkit.sh(f"microvm stop {vm}")
    assert toolkit.footprint() == before


def test_isolate_leaves_shares_to_running_guests(toolkit: Toolkit, vm: str) -> None:
    """A guest with sockets of systemd's, and one with its package's own supervisor.

    Both go on reading and writing, and shut down in order when they are not wanted any more.
    """
    before = toolkit.footprint()
    own, shared = f"{vm}s", share(toolkit, "isolated")
    toolkit.sh("rm -f /srv/isolated/after-*")
    try:
        for number, (name, has_own) in enumerate(((vm, False), (own, True)), 1):
            toolkit.create(
                guest(
                    name,
                    taps=(
                        Tap(
                            name=f"{name}t",
                            mac=f"02:00:00:00:00:{number:02x}",
                            address=f"10.79.{number}.2/24",
                        ),
                    ),
                    shares=(shared,),
                    share_options=not has_own,
                    virtiofsd_run=has_own,
                    shell_port=2323,
                    **control(name),
                )
            )
            toolkit.systemctl("enable", "-q", "--now", f"microvm@{name}")
        for number, name in enumerate((vm, own), 1):
            toolkit.await_line(name, f"GUEST {name}: ready")
            toolkit.sh(f"ip address add 10.79.{number}.1/24 dev {name}t")
        running = toolkit.footprint()

        toolkit.systemctl("isolate", "multi-user.target")
        assert toolkit.footprint() == running
        for number, name in enumerate((vm, own), 1):
            command = f"cat hello; echo {name} >after-{name}; sync; cat after-{name}"
            said = toolkit.sh(
                f"echo 'cd /mnt/isolated; {command}; exit' | "
                f"timeout 60 socat -t60 - TCP:10.79.{number}.2:2323"
            )
            assert said.splitlines() == ["hi", name]
            assert toolkit.sh(f"cat /srv/isolated/after-{name}") == f"{name}\n"
            assert "lost" not in toolkit.sh(f"microvm list {name}")

        # As rescue.target does, but for its shell.
        toolkit.host.write(
            FEW,
            "[Unit]\nRequires=basic.target\nAfter=basic.target\nAllowIsolate=yes\n",
        )
        toolkit.systemctl("daemon-reload")
        toolkit.systemctl("isolate", "few.target")
        for name in (vm, own):
            toolkit.await_line(name, f"GUEST {name}: powering off")
        toolkit.await_footprint(before)
        for name in (vm, own):
            assert toolkit.property(f"microvm@{name}", "Result") == "success"
            assert not [
                line
                for line in toolkit.journal(name)
                if "has ended under" in line or "was not shut down" in line
            ]
    finally:
        toolkit.sh(f"systemctl disable -q microvm@{vm} microvm@{own}; rm -f {FEW}", check=False)
        toolkit.systemctl("isolate", "multi-user.target")
        toolkit.remove(own)


@pytest.mark.core
def test_stopping_the_target_stops_all_vms(toolkit: Toolkit, vm: str) -> None:
    """One that is started at boot, and one that an administrator has started."""
    before, others = toolkit.footprint(), f"{vm}o"
    try:
        for name in (vm, others):
            toolkit.create(Stub(name=name))
        toolkit.systemctl("enable", "-q", f"microvm@{vm}")
        toolkit.systemctl("start", "microvms.target", f"microvm@{others}")
        assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
        toolkit.systemctl("stop", "microvms.target")
        toolkit.await_footprint(before)
        for name in (vm, others):
            assert toolkit.property(f"microvm@{name}", "Result") == "success"
        toolkit.systemctl("start", "microvms.target")
        assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
        assert toolkit.property(f"microvm@{others}", "ActiveState") == "inactive"
    finally:
        toolkit.remove(others)


def test_a_stop_that_leaves_something_says_so(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(Stub(name=vm, shares=(share(toolkit, "left"),)))
    toolkit.systemctl("start", f"microvm@{vm}")
    record = f"/run/microvm-host/{vm}/virtiofsd"
    toolkit.sh(f"echo strange >>{record}")
    done = toolkit.host.run(["microvm", "stop", vm], check=False)
    assert done.returncode == 1
    assert f"{vm} stopped, but not all" in done.stderr
    assert f"microvm-virtiofsd@{vm}.service failed" in done.stderr
    assert "['strange'] is no line of this record" in done.stderr
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "inactive"
    toolkit.sh(f"rm -r /run/microvm-host/{vm}; systemctl reset-failed microvm-virtiofsd@{vm}")
    toolkit.sh(f"microvm stop {vm}")
