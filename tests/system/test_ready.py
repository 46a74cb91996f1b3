# SPDX-License-Identifier: MIT
"""Guest readiness: the unit is started when the guest says so, and tells why when it does not.

In the container host there is no vsock. What speaks there is a fake: a hypervisor of a kind that
carries vsock itself, and connects for its guest to a UNIX socket, in a few lines of shell. Real
guests with real vsock are in test_virtual.py.
"""

from __future__ import annotations

import time

import pytest

from tests.guest.package import Stub, Tap

from .rounds import rounds
from .toolkit import Toolkit, eventually
from .vms import declare, saying

pytestmark = pytest.mark.container

STARTS = rounds(40, 200)
AT_ONCE = 4


def fake(name: str, run: str, **fields: object) -> Stub:
    """A hypervisor whose guest does `run` beside it, in the state directory."""
    return Stub(
        name=name,
        hypervisor="cloud-hypervisor",
        readiness="guest",
        run=f"({run}) &\nexec sleep infinity",
        **fields,  # type: ignore[arg-type]
    )


def limit(toolkit: Toolkit, vm: str, seconds: int) -> None:
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/limit.conf",
        f"[Service]\nTimeoutStartSec={seconds}\nRestart=no\n",
    )
    toolkit.systemctl("daemon-reload")


def await_property(toolkit: Toolkit, vm: str, name: str, value: str) -> None:
    eventually(
        lambda: toolkit.property(f"microvm@{vm}", name),
        lambda found: found == value,
        20,
        f"{name} of {vm} is not {value!r}",
    )


@pytest.mark.core
def test_started_when_the_guest_says_so(toolkit: Toolkit, vm: str) -> None:
    say = saying("STATUS=Mounting disks\\nMAINPID=1\\nRESTART_RESET=1")
    ready = saying("X_SYSTEMD_UNIT_ACTIVE=basic.target\\nREADY=1\\nSTATUS=Ready.")
    path = toolkit.create(
        fake(
            vm,
            f"{say}; while [ ! -e booted-up ]; do sleep 0.05; done; {ready}",
            taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
        )
    )
    before = toolkit.footprint()
    toolkit.systemctl("start", "--no-block", f"microvm@{vm}")
    await_property(
        toolkit,
        vm,
        "StatusText",
        "Waiting for the guest to be ready; it says: Mounting disks",
    )
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "activating"
    # Who is to be asked to stop until then.
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    assert toolkit.host.read(f"/proc/{main}/comm") == "helper\n"
    status = toolkit.host.run(["microvm", "status", vm], check=False).stdout
    assert "   readiness: guest, which is waited for" in status

    toolkit.host.run(["touch", f"/var/lib/microvms/{vm}/booted-up"], user="microvm")
    await_property(toolkit, vm, "ActiveState", "active")
    # Nobody has it but systemd.
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    assert toolkit.host.read(f"/proc/{main}/comm") == "sleep\n"
    assert "PPid:\t1\n" in toolkit.host.read(f"/proc/{main}/status")
    assert not any("not our child" in line for line in toolkit.journal(vm))
    assert toolkit.property(f"microvm@{vm}", "StatusText") == (
        f"Running cloud-hypervisor from {path}; the guest says: Ready."
    )
    status = toolkit.host.run(["microvm", "status", vm], check=False).stdout
    assert "   readiness: guest, which is ready" in status
    # Nothing of ours has stayed.
    eventually(
        lambda: toolkit.sh("pgrep -x helper", check=False), lambda found: not found, 30, "it stayed"
    )
    assert not toolkit.host.exists(f"/var/lib/microvms/{vm}/notify.vsock_8888")
    assert any("the guest is ready after" in line for line in toolkit.journal(vm))
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.await_footprint(before)


@pytest.mark.core
@pytest.mark.parametrize(
    ("run", "reason"),
    [
        ("true", "it has said nothing"),
        (
            saying("X_SYSTEMD_UNIT_ACTIVE=emergency.target")
            + "; sleep 0.2; "
            + saying("READY=1\\nSTATUS=Ready."),
            "it is in its emergency.target",
        ),
    ],
)
def test_a_guest_that_is_never_ready_fails_the_start(
    toolkit: Toolkit, vm: str, run: str, reason: str
) -> None:
    toolkit.create(fake(vm, run, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
    limit(toolkit, vm, 4)
    before = toolkit.footprint()
    began = time.monotonic()
    started = toolkit.host.run(["microvm", "start", vm], check=False)
    assert 3 < time.monotonic() - began < 60
    assert started.returncode == 1
    told = f"the guest did not become ready within 4 s (TimeoutStartSec=): {reason}"
    assert told in started.stderr
    assert toolkit.property(f"microvm@{vm}", "Result") == "timeout"
    assert told in toolkit.status(vm)
    toolkit.systemctl("reset-failed", f"microvm@{vm}")
    toolkit.await_footprint(before)


def test_a_hypervisor_that_ends_while_its_guest_is_waited_for(toolkit: Toolkit, vm: str) -> None:
    package = Stub(
        name=vm,
        hypervisor="firecracker",
        readiness="guest",
        run="sleep 0.5\nexit 3",
        taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
    )
    toolkit.create(package)
    limit(toolkit, vm, 30)
    before = toolkit.footprint()
    began = time.monotonic()
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert time.monotonic() - began < 28
    assert toolkit.property(f"microvm@{vm}", "Result") == "exit-code"
    toolkit.systemctl("reset-failed", f"microvm@{vm}")
    toolkit.await_footprint(before)


@pytest.mark.core
def test_stopped_while_the_guest_is_waited_for(toolkit: Toolkit, vm: str) -> None:
    """It is asked, as it would be later, and is given the same time."""
    stub = Stub(
        name=vm,
        hypervisor="cloud-hypervisor",
        readiness="guest",
        shutdown_delay=4,
        taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
    )
    toolkit.create(stub)
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/quick.conf",
        "[Service]\nTimeoutStopSec=20\nEnvironment=MICROVM_ASK_AGAIN_SECONDS=60\n",
    )
    toolkit.systemctl("daemon-reload")
    before = toolkit.footprint()
    toolkit.systemctl("start", "--no-block", f"microvm@{vm}")
    await_property(toolkit, vm, "StatusText", "Waiting for the guest to be ready")
    toolkit.await_line(vm, f"STUB {vm}: started")
    began = time.monotonic()
    toolkit.systemctl("stop", f"microvm@{vm}")
    assert 4 <= time.monotonic() - began < 40
    lines = toolkit.journal(vm)
    assert any("asked once, by its package's script" in line for line in lines)
    assert any(line.startswith(f"STUB {vm}: shutdown script, main process ") for line in lines)
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    toolkit.await_footprint(before)


def test_killed_while_the_guest_is_waited_for(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(fake(vm, "true", taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
    limit(toolkit, vm, 30)
    before = toolkit.footprint()
    toolkit.systemctl("start", "--no-block", f"microvm@{vm}")
    await_property(toolkit, vm, "StatusText", "Waiting for the guest to be ready")
    toolkit.systemctl("kill", "-s", "KILL", f"microvm@{vm}")
    await_property(toolkit, vm, "ActiveState", "failed")
    toolkit.systemctl("reset-failed", f"microvm@{vm}", check=False)
    toolkit.await_footprint(before)


@pytest.mark.fault
@pytest.mark.parametrize("victims", ["main", "between", "hypervisor", "between hypervisor"])
def test_one_process_is_killed_while_the_guest_is_waited_for(
    toolkit: Toolkit, vm: str, victims: str
) -> None:
    """The VM is up at last, and of a hypervisor that was let down nothing is left.

    The one between the main process and the hypervisor is only there to tell how that ended: who
    waits goes on without it.
    """
    said = f"/var/lib/microvms/{vm}/said"
    say = "until test -e said; do sleep 0.1; done; " + saying("READY=1")
    taps = (Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)
    declare(toolkit, fake(vm, say, taps=taps), restart_delay="100ms", restart_limit=0)
    unit, before = f"microvm@{vm}", toolkit.footprint()
    toolkit.systemctl("start", "--no-block", unit)
    await_property(toolkit, vm, "StatusText", "Waiting for the guest to be ready")
    main = toolkit.property(unit, "MainPID")
    between = toolkit.sh(f"pgrep -P {main}").strip()
    pids = {"main": main, "between": between, "hypervisor": toolkit.sh(f"pgrep -P {between}")}
    pids = {who: pid.strip() for who, pid in pids.items()}
    for victim in victims.split():
        toolkit.sh(f"kill -KILL {pids[victim]}")
    if victims == "between":
        toolkit.sh(f"touch {said}")
        await_property(toolkit, vm, "ActiveState", "active")
        assert toolkit.property(unit, "MainPID") == pids["hypervisor"]
        assert not any("it is started again" in line for line in toolkit.journal(vm))
    else:
        toolkit.await_line(vm, "it is started again")
        for who, pid in pids.items():
            eventually(
                lambda pid=pid: toolkit.host.exists(f"/proc/{pid}"),  # type: ignore[misc]
                lambda there: not there,
                20,
                f"{who} is still there",
            )
        toolkit.sh(f"touch {said}")
        await_property(toolkit, vm, "ActiveState", "active")
    toolkit.host.run(["microvm", "stop", vm])
    assert toolkit.property(unit, "Result") == "success"
    toolkit.await_footprint(before)


def test_a_package_that_clears_away_sockets_and_forwards_by_itself(
    toolkit: Toolkit, vm: str
) -> None:
    """As microvm.nix's for cloud-hypervisor: what it would forward goes past no check."""
    toolkit.create(
        fake(
            vm,
            "sleep 0.5; " + saying("READY=1"),
            prepare="rm -f notify.vsock notify.vsock_8888\n"
            'if [ -n "${NOTIFY_SOCKET:-}" ]; then echo it has $NOTIFY_SOCKET; fi',
        )
    )
    limit(toolkit, vm, 30)
    toolkit.systemctl("start", f"microvm@{vm}")
    assert not any("it has" in line for line in toolkit.journal(vm))


def test_the_administrator_has_a_guest_waited_for(toolkit: Toolkit, vm: str) -> None:
    """A package that does not ask for it, as those of microvm.nix cannot."""
    package = Stub(
        name=vm,
        hypervisor="cloud-hypervisor",
        run=f"(sleep 0.5; {saying('READY=1')}) &\nexec sleep infinity",
    )
    toolkit.create(package)
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/guest.conf",
        "[Service]\nEnvironment=MICROVM_READINESS=guest\n",
    )
    toolkit.systemctl("daemon-reload")
    toolkit.systemctl("start", f"microvm@{vm}")
    assert any("the guest is ready after" in line for line in toolkit.journal(vm))


@pytest.mark.fault
def test_no_ready_is_lost(toolkit: Toolkit, vm: str) -> None:
    """Guests that say it as early as can be, before the hypervisor has even been executed."""
    names = [f"{vm}-{number}" for number in range(AT_ONCE)]
    try:
        for name in names:
            toolkit.create(
                Stub(
                    name=name,
                    hypervisor="cloud-hypervisor",
                    readiness="guest",
                    run=f"{saying('READY=1')}\nexec sleep infinity",
                )
            )
            limit(toolkit, name, 90)
        units = " ".join(f"microvm@{name}" for name in names)
        toolkit.sh(
            f"for i in $(seq {STARTS // AT_ONCE}); do systemctl restart {units} || exit 1; done",
            timeout=1500,
        )
        for name in names:
            assert toolkit.property(f"microvm@{name}", "ActiveState") == "active"
            told = [line for line in toolkit.journal(name) if "the guest is ready after" in line]
            assert len(told) == STARTS // AT_ONCE
    finally:
        for name in names:
            toolkit.remove(name)


@pytest.mark.core
def test_apply_waits_for_all_guests_together(toolkit: Toolkit, vm: str) -> None:
    """Two start beside each other, one comes after them by its order, and one fails."""
    names = {f"{vm}a": "order = 2", f"{vm}b": "order = 1", f"{vm}c": "", f"{vm}d": ""}
    wait = "while [ ! -e booted-up ]; do sleep 0.05; done; "
    for name, more in names.items():
        fields = {"pci_devices": ("0000:ff:1f.7",)} if name.endswith("d") else {}
        path = toolkit.put(fake(name, wait + saying("READY=1"), **fields))
        toolkit.host.write(f"/etc/microvms/{name}.toml", f'runner = "{path}"\n{more}\n')
    try:
        applying = toolkit.host.spawn(["sh", "-c", "microvm apply >/run/said 2>/run/wrong"])
        for name in (f"{vm}b", f"{vm}c"):
            await_property(toolkit, name, "StatusText", "Waiting for the guest to be ready")
        assert applying.poll() is None
        assert toolkit.property(f"microvm@{vm}a", "MainPID") == "0"
        ready = "runuser -u microvm -- touch"
        toolkit.sh(f"{ready} /var/lib/microvms/{vm}b/booted-up")
        await_property(toolkit, f"{vm}a", "StatusText", "Waiting for the guest to be ready")
        toolkit.sh(f"{ready} /var/lib/microvms/{vm}a/booted-up /var/lib/microvms/{vm}c/booted-up")
        assert applying.wait(60) == 1
        said = toolkit.host.read("/run/said").splitlines()
        assert [line.split(":")[0] for line in said if line.endswith(", started")] == [
            f"{vm}a",
            f"{vm}b",
            f"{vm}c",
        ]
        wrong = toolkit.host.read("/run/wrong")
        assert "this host has no IOMMU in use" in wrong and f"could not start {vm}d" in wrong, wrong
    finally:
        for name in names:
            toolkit.remove(name)
