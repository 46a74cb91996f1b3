# SPDX-License-Identifier: MIT
"""Stopping by rungs, starting again or not, shares that are lost, and a host that shuts down.

With the real guest and the real QMP of QEMU, but where only the units are in question.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import pytest

from tests.guest.package import Share, Stub, Tap, Volume
from tests.host.container import ContainerHost
from tests.host.fixtures import require_container

from .rounds import rounds
from .toolkit import Toolkit, eventually
from .vms import control, declare, guest, hasty_guard, ours, start, stop

pytestmark = pytest.mark.container


# ---- rungs


@pytest.mark.core
def test_without_a_script_the_button_is_pressed_at_once(toolkit: Toolkit, vm: str) -> None:
    # Asked once, however long it takes.
    declare(toolkit, guest(vm, shutdown="none", **control(vm)), ask_again_after=60)
    start(toolkit, vm)
    lines, result, seconds = stop(toolkit, vm)
    assert f"GUEST {vm}: shutting down (power-button)" in lines
    assert f"GUEST {vm}: powering off" in lines
    first, last = ours(lines)
    assert first == "asked the guest to shut down by the power button (qmp)"
    assert last.startswith("the guest powered off in ")
    assert last.endswith(" s, asked once, by the power button (qmp)")
    assert (result, seconds < 40) == ("success", True), seconds


def test_the_button_follows_a_script_that_is_not_heard(toolkit: Toolkit, vm: str) -> None:
    """Ctrl-Alt-Del, on a machine without a keyboard: QEMU refuses it, the script waits on."""
    declare(toolkit, guest(vm, shutdown="ctrl-alt-del", **control(vm)), ask_again_after=6)
    start(toolkit, vm)
    lines, result, seconds = stop(toolkit, vm)
    first, second, last = ours(lines)
    assert first == "asked the guest to shut down by its package's script"
    assert second == "asked the guest to shut down by the power button (qmp)"
    assert last.endswith(" s, asked 2 times, at last by the power button (qmp)")
    assert f"GUEST {vm}: shutting down (power-button)" in lines
    assert (result, 6 <= seconds < 40) == ("success", True), seconds


@pytest.mark.fault
def test_a_deaf_guest_is_ended_by_sigterm_and_that_is_a_failure(toolkit: Toolkit, vm: str) -> None:
    declare(toolkit, guest(vm, deaf=True, **control(vm)), ask_again_after=1, shutdown_timeout=4)
    start(toolkit, vm)
    lines, result, seconds = stop(toolkit, vm)
    said = ours(lines)
    assert said[:2] == [
        "asked the guest to shut down by its package's script",
        "asked the guest to shut down by the power button (qmp)",
    ]
    # Less what the stop had taken before it asked.
    told = r"the guest did not shut down within [34] s: sending SIGTERM to the hypervisor"
    assert re.fullmatch(told, said[-2]), said
    assert said[-1].startswith("the hypervisor ended by SIGTERM after ")
    assert lines.count(f"GUEST {vm}: ignoring power-button") >= 2
    assert f"GUEST {vm}: powering off" not in lines
    assert (result, 3 <= seconds < 30) == ("exit-code", True), seconds
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "failed"
    assert f"{vm}: current({vm}), failed" in toolkit.sh(f"microvm -l {vm}")


@pytest.mark.fault
def test_a_deaf_hypervisor_is_killed_and_the_result_says_so(toolkit: Toolkit, vm: str) -> None:
    declare(
        toolkit, Stub(name=vm, deaf=True, shutdown="hang"), shutdown_timeout=3, terminate_timeout=3
    )
    start(toolkit, vm, ready=False)
    toolkit.await_line(vm, f"STUB {vm}: started")
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    lines, result, seconds = stop(toolkit, vm)
    assert not toolkit.host.exists(f"/proc/{main}")
    assert [line.rpartition(": ")[2] for line in ours(lines) if "sending" in line] == [
        "sending SIGTERM to the hypervisor",
        "sending SIGKILL to the hypervisor",
    ]
    assert ours(lines)[-1].startswith("the hypervisor was killed after ")
    # Not what a hypervisor that ended by SIGTERM has, nor a guest that shut down.
    assert (result, 2 <= seconds < 11) == ("signal", True), seconds


def test_a_guest_that_cannot_be_asked_is_no_failure_and_told_of(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(Stub(name=vm, shutdown="none"))
    # What nothing wants, systemd forgets when it is down.
    toolkit.systemctl("enable", f"microvm@{vm}")
    start(toolkit, vm, ready=False)
    lines, result, _ = stop(toolkit, vm)
    assert result == "success"
    assert any("the guest could not be asked" in line for line in lines)
    status = toolkit.property(f"microvm@{vm}", "StatusText")
    assert status.startswith("the hypervisor ended by SIGTERM in ")
    assert status.endswith(" s, the guest could not be asked")


def drop_in(toolkit: Toolkit, vm: str, *lines: str) -> None:
    path = f"/etc/systemd/system/microvm@{vm}.service.d/more.conf"
    toolkit.host.write(path, "\n".join(["[Service]", *lines, ""]))
    toolkit.systemctl("daemon-reload")


@pytest.mark.core
def test_an_administrators_bound_holds_for_the_whole_stop(toolkit: Toolkit, vm: str) -> None:
    """Of a deaf hypervisor that runs already, whatever its declaration says."""
    declare(toolkit, Stub(name=vm, deaf=True, shutdown="hang"), shutdown_timeout="10min")
    start(toolkit, vm, ready=False)
    toolkit.await_line(vm, f"STUB {vm}: started")
    assert toolkit.property(f"microvm@{vm}", "TimeoutStopUSec") == "10min 15s"
    drop_in(toolkit, vm, "TimeoutStopSec=9")
    lines, result, seconds = stop(toolkit, vm)
    said = ours(lines)
    # A half of it, less the time until the helper came to it.
    sent = [line.rpartition(": ")[2] for line in said if "did not shut down within 4" in line]
    assert sent == ["sending SIGTERM to the hypervisor", "sending SIGKILL to the hypervisor"]
    assert said[-1].startswith("the hypervisor was killed after ")
    assert (result, 5 <= seconds < 12) == ("signal", True), seconds


@pytest.mark.core
def test_a_stop_without_a_bound_and_settings_that_are_wrong(toolkit: Toolkit, vm: str) -> None:
    declare(toolkit, Stub(name=vm, shutdown_delay=4))
    drop_in(
        toolkit,
        vm,
        "TimeoutStopSec=infinity",
        "Environment=MICROVM_SHUTDOWN_SECONDS=5min MICROVM_ASK_AGAIN_SECONDS=soon",
    )
    start(toolkit, vm, ready=False)
    toolkit.await_line(vm, "MICROVM_ASK_AGAIN_SECONDS='soon' is no time span, such as 90")
    with hasty_guard(toolkit, 1):
        lines, result, seconds = stop(toolkit, vm)
    assert not any("MICROVM_" in line for line in lines)
    assert (result, 4 <= seconds < 40) == ("success", True), (lines, seconds)


@pytest.mark.core
def test_the_guest_is_asked_as_the_user_of_its_start(toolkit: Toolkit, vm: str) -> None:
    """User= and Group= change while it runs; neither is root left over in who asks."""
    declare(toolkit, Stub(name=vm))
    start(toolkit, vm, ready=False)
    toolkit.await_line(vm, f"STUB {vm}: started")
    toolkit.sh("id other >/dev/null 2>&1 || useradd --system other")
    drop_in(toolkit, vm, "User=other", "Group=other")
    lines, result, seconds = stop(toolkit, vm)
    assert any("asked once, by its package's script" in line for line in lines), lines
    assert (result, seconds < 40) == ("success", True), seconds


def test_the_hypervisor_cannot_write_what_root_goes_by(toolkit: Toolkit, vm: str) -> None:
    """EnvironmentFile= of the VM's user, which ExecStop= and ExecStopPost= begin with as root."""
    declare(toolkit, Stub(name=vm))
    evil = f"/var/lib/microvms/{vm}/evil"
    start(toolkit, vm, ready=False)
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.sh(
        f"mkdir -p {evil}/bin {evil}/run/microvm-host/{vm} && "
        f"printf '#!/bin/sh\\nid >>{evil}/called\\n' >{evil}/bin/systemctl && "
        f"chmod 755 {evil}/bin/systemctl && "
        f"printf 'user\\troot\\t0\\troot\\t0\\n' >{evil}/run/microvm-host/{vm}/booted && "
        f"chown -R microvm: {evil}"
    )
    toolkit.host.write(
        f"{evil}/environment",
        f"LD_DEBUG=all\nLD_DEBUG_OUTPUT={evil}/loader\nMICROVM_HOST_ROOT={evil}\n"
        f"PATH={evil}/bin\nPYTHONPATH={evil}\n",
    )
    # Its death is what makes the helper call systemctl.
    drop_in(
        toolkit,
        vm,
        f"EnvironmentFile={evil}/environment",
        "Environment=MICROVM_RESTART_LIMIT=1 MICROVM_RESTART_SECONDS=100ms",
    )
    start(toolkit, vm, ready=False)
    for _ in range(2):
        toolkit.await_line(vm, f"STUB {vm}: started")
        toolkit.sh(f"systemctl kill -s KILL --kill-whom=main microvm@{vm}", check=False)
        time.sleep(1)
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.systemctl("stop", f"microvm@{vm}")
    # Neither the loader of root's processes nor root itself has written there.
    found = toolkit.sh(f"find {evil} -name 'loader*' -o -name called").split()
    assert found == []


def test_the_declarations_times_hold_in_the_foreground_too(toolkit: Toolkit, vm: str) -> None:
    declare(toolkit, Stub(name=vm, shutdown="early"), shutdown_timeout=3)
    running = toolkit.host.spawn(["microvm", "run", vm])
    try:
        unit = f"microvm-foreground-{vm}.service"
        eventually(
            lambda: toolkit.property(unit, "ActiveState"),
            lambda state: state == "active",
            60,
            "does not run",
        )
        began = time.monotonic()
        toolkit.host.run(["microvm", "stop", vm], check=False, timeout=120)
        assert time.monotonic() - began < 40
        shown = "".join(running.communicate(timeout=60))
    finally:
        running.kill()
    told = shown + toolkit.sh(f"journalctl --no-pager --unit={unit}")
    assert re.search(r"the guest did not shut down within [123] s: sending SIGTERM", told), told


# ---- ends that nobody asked for


# What the guest does, what its declaration says, what is said of it, and what state that leads to.
ENDS: dict[str, tuple[dict[str, object], str, str, str]] = {
    "off": ({"exit_after": 0}, "on-failure", "the guest powered itself off; it st", "inactive"),
    "boot": ({"reboot_after": 0}, "on-failure", "the guest rebooted after", "activating"),
    "crash": (
        {"crash_after": 0, "panic_device": True},
        "never",
        "the guest's kernel panicked; it stays down",
        "failed",
    ),
    "fail": ({"fail_after": 0}, "always", "qemu failed with exit status 3 after", "activating"),
}


def test_what_became_of_the_guest_and_what_follows(toolkit: Toolkit, vm: str) -> None:
    vms = {f"{vm}{end}": case for end, case in ENDS.items()}
    try:
        for name, (fields, restart, _, _) in vms.items():
            package = guest(name, event_log="events.json", **fields)
            declare(toolkit, package, restart=restart, restart_delay="600s")
        toolkit.systemctl("start", *(f"microvm@{name}" for name in vms), timeout=300)
        for name, (_, _, said, state) in vms.items():
            toolkit.await_line(name, said, timeout=300)

            def shown_of(name: str = name) -> list[str]:
                # Of one moment, in whatever order.
                argv = ["show", "--property=ActiveState,StatusText", f"microvm@{name}"]
                return sorted(toolkit.systemctl(*argv).splitlines())

            def settled(found: list[str], state: str = state) -> bool:
                active, status = found
                waits = status.startswith("StatusText=Starts again in ")
                return active == f"ActiveState={state}" and waits == (state == "activating")

            # One that is started again is also "activating" before its wait, and down in between.
            eventually(shown_of, settled, 60, f"{name} does not become {state}")
        # And stays there.
        for name, (_, _, _, state) in vms.items():
            unit = f"microvm@{name}"
            assert toolkit.property(unit, "ActiveState") == state
            waits = toolkit.property(unit, "StatusText").startswith("Starts again in ")
            assert waits == (state == "activating"), name
    finally:
        for name in vms:
            toolkit.remove(name)


@pytest.mark.core
def test_one_that_keeps_dying_is_given_up_and_an_administrator_never_waits(
    toolkit: Toolkit, vm: str
) -> None:
    stub = Stub(
        name=vm,
        taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
        seconds=0.1,
        status=3,
    )
    before = toolkit.footprint()
    declare(toolkit, stub, restart_limit=2, restart_delay=2)
    began = time.monotonic()
    toolkit.systemctl("start", f"microvm@{vm}")
    eventually(
        lambda: toolkit.property(f"microvm@{vm}", "ActiveState"),
        lambda state: state == "failed",
        120,
        "it is not given up",
    )
    # Before the first start anew it waits 2 s, before the second 4.
    assert time.monotonic() - began > 6
    lines = toolkit.journal(vm)
    assert lines.count(f"STUB {vm}: started as microvm:microvm in /var/lib/microvms/{vm}") == 3
    assert any("started again 2 times in a row, it is given up" in line for line in lines)
    assert "it is given up" in toolkit.property(f"microvm@{vm}", "StatusText")
    toolkit.await_footprint(before | {f"unit microvm@{vm}.service failed"})
    time.sleep(1)
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "failed"

    # Counting begins anew, and a stop and a restart in the waiting end it at once.
    toolkit.host.write(
        f"/etc/microvms/{vm}.toml",
        f'runner = "/opt/packages/{vm}"\nautostart = false\nrestart_delay = 120\n',
    )
    toolkit.systemctl("daemon-reload")
    toolkit.systemctl("start", f"microvm@{vm}")
    for verb, state in (("restart", "active"), ("stop", "inactive")):
        eventually(
            lambda: toolkit.property(f"microvm@{vm}", "StatusText"),
            lambda text: text.startswith("Starts again in "),
            60,
            "it does not wait for its start",
        )
        began = time.monotonic()
        toolkit.systemctl(verb, f"microvm@{vm}")
        assert time.monotonic() - began < 50, verb
        if state == "inactive":
            assert toolkit.property(f"microvm@{vm}", "ActiveState") == state
    toolkit.await_footprint(before)


# ---- shares


@pytest.mark.fault
def test_a_virtiofsd_that_dies_is_told_of_and_not_started_for_ever(
    toolkit: Toolkit, vm: str
) -> None:
    toolkit.sh("mkdir -p /srv/lost && echo hi > /srv/lost/hello")
    declare(
        toolkit,
        guest(
            vm,
            shares=(
                Share(tag="home/a-b", source="/srv/lost", mount="/mnt/lost"),
                Share(tag="kept", source="/srv/lost", mount="/mnt/kept"),
            ),
        ),
        shutdown_timeout=1,
    )
    start(toolkit, vm)
    listed = f"{vm}: current({vm})\n"
    assert toolkit.sh(f"microvm -l {vm}") == listed
    unit = toolkit.sh(
        f"systemctl list-units --plain --no-legend 'microvm-virtiofsd-{vm}-home*.service' | "
        "cut -d' ' -f1"
    ).strip()
    toolkit.host.run(["systemctl", "kill", "-s", "KILL", unit])
    lines = toolkit.await_line(vm, "virtiofsd of share home/a-b has ended under the running guest")
    text = next(line for line in lines if "has ended under" in line)
    assert "(killed KILL)" in text
    assert text.endswith(f"then systemctl restart microvm@{vm}.service")
    assert toolkit.sh(f"microvm -l {vm}") == (
        f"{vm}: current({vm}), lost share home/a-b: systemctl restart microvm@{vm}.service\n"
    )
    shown = toolkit.host.run(["microvm", "status", vm], check=False).stdout
    assert "home/a-b → /srv/lost (lost: its virtiofsd has ended)" in shown
    assert "kept → /srv/lost\n" in shown
    # QEMU has not come back, and nothing starts virtiofsd for nobody.
    time.sleep(1)
    assert toolkit.property(unit, "ActiveState") in ("failed", "inactive")
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    # The guest hangs in its unmounting, so that it cannot shut down; a start mends all.
    # With so little time for all, systemd may have been first.
    assert stop(toolkit, vm)[1] in ("exit-code", "timeout")
    before = len(toolkit.journal(vm))
    toolkit.systemctl("start", f"microvm@{vm}")
    eventually(
        lambda: toolkit.journal(vm)[before:],
        lambda lines: f"GUEST {vm}: share home/a-b file hello: hi" in lines,
        60,
        "the share is not back",
    )
    assert toolkit.sh(f"microvm -l {vm}") == listed


# ---- the host shuts down


@pytest.fixture
def fresh() -> Iterator[Toolkit]:
    """A host of its own, since it is powered off."""
    require_container()
    with ContainerHost() as host:
        toolkit = Toolkit(host)
        toolkit.install()
        toolkit.build_image()
        yield toolkit


def mark(toolkit: Toolkit, vm: str) -> str:
    """What the guest wrote on its disk at last."""
    return toolkit.sh(f"head -n 1 /var/lib/microvms/{vm}/disk.img | tr -d '\\0'").strip()


@pytest.mark.fault
def test_guests_shut_down_with_their_host(fresh: Toolkit) -> None:
    """Three or ten guests, one of them slow and one that has to outlive the others; and a deaf one.

    Each has shut down by what its own disk says at last; but the deaf one, which is waited for as
    long as its declaration says, and of which it is known that it was killed.
    """
    fresh.sh("mkdir -p /srv/data && echo hi > /srv/data/hello")
    names = ("one", "two", *(f"more{number}" for number in range(rounds(0, 7))), "last")
    everybody = (*names, "deaf")
    for number, name in enumerate(everybody, 1):
        package = guest(
            name,
            mark=True,
            volumes=(Volume(image="disk.img", size_mb=1),),
            taps=(Tap(name=f"{name}0", mac=f"02:00:00:00:00:{number:02x}"),),
            shares=(Share(tag="data", source="/srv/data", mount="/mnt/data"),),
            slow_stop=8 if name == "one" else 0,
            deaf=name == "deaf",
            **control(name),
        )
        fresh.create(package)
        fresh.host.write(
            f"/etc/microvms/{name}.toml",
            f'runner = "/opt/packages/{name}"\nautostart = false\n'
            f"order = {1 if name == 'last' else 2}\n"
            f"shutdown_timeout = {5 if name == 'deaf' else 90}\n",
        )
    # So that the next boot has the journal of this one.
    fresh.sh("mkdir -p /var/log/journal; systemctl restart systemd-journald; journalctl --flush")
    fresh.systemctl("daemon-reload")
    fresh.systemctl("start", *(f"microvm@{name}" for name in everybody), timeout=300)
    for name in everybody:
        fresh.await_line(name, f"GUEST {name}: ready", timeout=300)
        assert mark(fresh, name) == f"GUEST {name}: running"
    began = time.monotonic()
    fresh.host.poweroff()
    # They go at once, but share processors that they emulate.
    assert time.monotonic() - began < 60 + 5 * len(everybody)
    fresh.host.start()
    for name in names:
        assert mark(fresh, name) == f"GUEST {name}: shut down"
    log = fresh.sh("journalctl --no-pager -b -1 --output=cat").splitlines()

    def when(text: str) -> int:
        found = [number for number, line in enumerate(log) if text in line]
        assert found, "\n".join([f"{text!r} is not in the journal:", *log[-200:]])
        return found[-1]

    for name in names:
        assert when(f"GUEST {name}: powering off") < when(f"Stopped microvm@{name}.service")
        # What the guest needs went after it.
        for unit in (f"microvm-tap-interfaces@{name}", f"microvm-virtiofsd@{name}"):
            assert when(f"Stopped microvm@{name}.service") < when(f"Stopped {unit}.service")
    # The slow one held up nobody of its own order, but the one that is to be last.
    assert when("GUEST two: shutting down") < when("GUEST one: powering off")
    assert when("Stopped microvm@one.service") < when("Stopping microvm@last.service")
    units = "".join(f" --unit=microvm@{name}" for name in names)
    theirs = fresh.sh(f"journalctl --no-pager -b -1 --output=cat {units}").splitlines()
    assert len(theirs) > 5 * len(names)
    for text in ("was not shut down", "it is started", "sending SIG", "killed after", "Failed"):
        assert not [line for line in theirs if text in line]
    assert mark(fresh, "deaf") == "GUEST deaf: running"
    assert when("did not shut down within") < when("the hypervisor ended by SIGTERM after")
    assert when("the hypervisor ended by SIGTERM after") < when("Stopping microvm@last.service")
    assert when("microvm@deaf.service: Failed with result 'exit-code'")
