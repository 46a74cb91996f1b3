# SPDX-License-Identifier: MIT
"""What goes wrong on a host, done on purpose, and what must hold after it.

Each test says so in its docstring; that nothing is left holds after all of them, by the fixture
`vm`. Cases that stand elsewhere have the mark `fault` too, so that `make test-faults` runs them:

    a guest that ignores the button             test_ladder
    a shutdown script that hangs                test_start_stop
    a shutdown script that fails, or returns    test_start_stop
    `current` replaced while running            test_command
    a tap deleted from outside                  test_start_stop
    the host powered off with its guests        test_ladder
    a virtiofsd that ends in other ways         test_lost_shares
    helpers of PCI devices killed               test_virtual_passthrough
    50 rounds with PCI devices                  test_virtual_passthrough
    helpers of macvtaps killed                  test_virtual
    the helper that installs killed             test_declared
    processes that wait for a guest killed      test_ready
    500 rounds                                  test_rounds
"""

from __future__ import annotations

import dataclasses
import time

import pytest

from tests.guest.package import Share, Stub, Tap

from .rounds import rounds, spread
from .shooting import Shooting, shooting
from .toolkit import SOURCES, Toolkit, eventually
from .vms import connected, control, declare, guest, stop

pytestmark = [pytest.mark.container, pytest.mark.fault]

UUID = "6f1a3a52-93a5-4d0e-8f2c-0a8d1a7f4c11"


def stub(vm: str, **fields: object) -> Stub:
    """One with all that is set up: two taps and two shares."""
    return Stub(
        name=vm,
        taps=(
            Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),
            Tap(name=f"{vm}b", mac="02:00:00:00:00:02"),
        ),
        shares=(
            Share(tag="data", source="/srv/data", mount="/mnt"),
            Share(tag="sub/data", source="/srv/data", mount="/mnt/sub", socket="run/sub.sock"),
        ),
        **fields,  # type: ignore[arg-type]
    )


def is_whole(toolkit: Toolkit, vm: str) -> None:
    """Assert that a VM of `stub` runs, with all that belongs to it, owned as it should be."""
    state = f"/var/lib/microvms/{vm}"
    shown = toolkit.sh(
        f"systemctl is-active microvm@{vm}; cat /sys/class/net/{vm}[ab]/owner | sort -u; "
        f"readlink {state}/booted; stat -c '%U %a' {state}/{vm}-virtiofs-data.sock "
        f"{state}/run/sub.sock; test -s /run/microvm-host/{vm}/tap-interfaces && echo recorded; "
        f"ip -o link show up | grep -c ' {vm}[ab]:'",
        check=False,
    ).splitlines()
    user = toolkit.sh("id -u microvm").strip()
    wanted = ["active", user, f"/opt/packages/{vm}", *["microvm 600"] * 2, "recorded", "2"]
    assert shown == wanted, toolkit.status(vm)


def left(toolkit: Toolkit, before: set[str]) -> set[str]:
    """What is there that was not before, but for units that failed."""
    return {line for line in toolkit.footprint() - before if not line.endswith(" failed")}


def leaves_nothing(toolkit: Toolkit, before: set[str], what: str) -> None:
    """Wait until nothing is left but failed units, and forget these."""
    eventually(
        lambda: sorted(left(toolkit, before)), lambda lines: not lines, 60, f"left by {what}"
    )
    toolkit.systemctl("reset-failed")
    toolkit.await_footprint(before)


def points(toolkit: Toolkit, shots: Shooting, vm: str, few: int) -> list[int]:
    """The moments at which to shoot a helper of a start and a stop, after watching one of each."""
    shots.watch()
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.host.run(["microvm", "stop", vm])
    effects = len(shots.seen())
    assert effects, "nothing was seen of what the helper does"
    return spread(effects, few)


# ---- helpers


@pytest.mark.parametrize("verb", ["set-booted", "tap-interfaces-up", "virtiofsd-up"])
def test_a_helper_that_sets_up_is_killed(toolkit: Toolkit, vm: str, verb: str) -> None:
    """The start fails, nothing is left of it, and the next start is whole."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    before = toolkit.footprint()
    with shooting(toolkit, verb) as shots:
        for at in points(toolkit, shots, vm, 4):
            shots.arm(at)
            done = toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False)
            (shot,) = shots.seen()
            what = f"{verb} that was killed before {at}, {shot}"
            assert done.returncode, what
            leaves_nothing(toolkit, before, what)
            toolkit.systemctl("start", f"microvm@{vm}")
            is_whole(toolkit, vm)
            toolkit.host.run(["microvm", "stop", vm])
            leaves_nothing(toolkit, before, f"the start and stop after {what}")


@pytest.mark.parametrize("verb", ["unset-booted", "tap-interfaces-down", "virtiofsd-down"])
def test_a_helper_that_undoes_is_killed(toolkit: Toolkit, vm: str, verb: str) -> None:
    """The guest was stopped in order, and what is left the next start and stop finish.

    So does `microvm reconcile`.
    """
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    before = toolkit.footprint()
    with shooting(toolkit, verb) as shots:
        for number, at in enumerate(points(toolkit, shots, vm, 4)):
            # In turns, or both where there is the time.
            ways = ["start", "reconcile"]
            for way in rounds(ways[number % 2 :][:1], ways):
                toolkit.systemctl("start", f"microvm@{vm}")
                shots.arm(at)
                toolkit.host.run(["microvm", "stop", vm], check=False)
                eventually(
                    lambda: toolkit.host.exists("/opt/shooting/shot"), bool, 60, "it was not shot"
                )
                (shot,) = shots.seen()
                what = f"{verb} that was killed before {at}, {shot}"
                assert toolkit.property(f"microvm@{vm}", "Result") == "success", what
                if way == "start":
                    toolkit.systemctl("start", f"microvm@{vm}")
                    is_whole(toolkit, vm)
                    toolkit.host.run(["microvm", "stop", vm])
                else:
                    done = toolkit.host.run(["microvm", "reconcile", "--apply"], check=False)
                    assert done.returncode == 0, f"{done.stdout}{done.stderr} after {what}"
                leaves_nothing(toolkit, before, f"{way} after {what}")


# What a unit sets up by, and the unit; and what undoes it.
_SETS_UP = {
    "set-booted": "microvm-set-booted",
    "tap-interfaces-up": "microvm-tap-interfaces",
    "virtiofsd-up": "microvm-virtiofsd",
}
_UNDOES = ("unset-booted", "tap-interfaces-down", "virtiofsd-down")


@pytest.mark.parametrize("verb", [*_SETS_UP, *_UNDOES])
def test_a_helper_is_killed_in_an_automatic_restart(toolkit: Toolkit, vm: str, verb: str) -> None:
    """As by the shortage of memory that ended the hypervisor: the VM is up again, and whole."""
    toolkit.sh("mkdir -p /srv/data")
    declare(toolkit, stub(vm), restart_delay="100ms", restart_limit=0)
    before = toolkit.footprint()
    with shooting(toolkit, verb) as shots:
        for at in rounds([1], range(1, 100)):
            toolkit.systemctl("start", f"microvm@{vm}")
            lines = len(toolkit.journal(vm))
            shots.arm(at)
            crash(toolkit, vm)
            shot = shots.seen()
            what = f"{verb} that was killed before {at}, {shot}"
            if at > 1 and not shot:
                # It does not do that much.
                toolkit.host.run(["microvm", "stop", vm])
                break
            is_whole(toolkit, vm)
            said = [line for line in toolkit.journal(vm)[lines:] if "it is started again" in line]
            if verb in _SETS_UP:
                unit = f"{_SETS_UP[verb]}@{vm}.service"
                assert said[1:] == [
                    f"{unit} failed: signal by signal 9; it is started again, 2 times in a row now"
                ], what
            else:
                # What could not be undone the restart has found and done.
                assert len(said) == 1, what
            toolkit.host.run(["microvm", "stop", vm])
            leaves_nothing(toolkit, before, what)


@pytest.mark.parametrize("verb", ["again", "again-over"])
def test_the_helper_that_starts_a_vm_again_is_killed(toolkit: Toolkit, vm: str, verb: str) -> None:
    """It is killed as well as what sets up: the VM is up again, and each end counts once."""
    toolkit.sh("mkdir -p /srv/data")
    declare(toolkit, stub(vm), restart_delay="100ms", restart_limit=0)
    before = toolkit.footprint()
    with shooting(toolkit, "tap-interfaces-up") as others, shooting(toolkit, verb) as shots:
        toolkit.systemctl("start", f"microvm@{vm}")
        others.arm(1)
        shots.watch()
        crash(toolkit, vm)
        # The last ones may be of the other, which is told of in the same place.
        effects = len(shots.seen()) - 1
        toolkit.host.run(["microvm", "stop", vm])
        for at in spread(effects, 2):
            toolkit.systemctl("start", f"microvm@{vm}")
            others.arm(1)
            shots.arm(at)
            crash(toolkit, vm)
            what = f"{verb} that was killed before {at}, {shots.seen()}"
            is_whole(toolkit, vm)
            count = len(toolkit.sh(f"cat /run/microvm-host/{vm}/ends").splitlines())
            assert count == 2, what
            toolkit.host.run(["microvm", "stop", vm])
            leaves_nothing(toolkit, before, what)


@pytest.mark.core
def test_what_cannot_be_set_up_after_a_crash_is_given_up(toolkit: Toolkit, vm: str) -> None:
    """It is tried as often as for any end, and the status says what was wrong at last."""
    unit, before = f"microvm@{vm}", toolkit.footprint()
    lose_source_and_crash(toolkit, vm, restart_delay="100ms", restart_limit=2)
    lines = toolkit.await_line(vm, "started again 2 times in a row, it is given up")
    # For the hypervisor, and for the share.
    assert len([line for line in lines if "it is started again" in line]) == 2
    last = next(line for line in lines if "it is given up" in line)
    assert last.startswith(f"microvm-virtiofsd@{vm}.service failed: ")
    assert "/srv/gone" in last
    assert last.endswith(f"when it is mended: systemctl start {unit}.service")
    assert last in toolkit.status(vm)
    assert f"{vm}: current({vm}), failed" in toolkit.sh(f"microvm -l {vm}")
    leaves_nothing(toolkit, before, "a VM that was given up")
    toolkit.sh("mkdir /srv/gone")
    toolkit.systemctl("start", unit)
    assert toolkit.property(unit, "ActiveState") == "active"


@pytest.mark.core
def test_an_administrator_is_heeded_while_a_vm_waits_to_be_set_up(
    toolkit: Toolkit, vm: str
) -> None:
    """A restart does not wait, and a stop is the last word."""
    unit, again, before = f"microvm@{vm}", f"microvm-again@{vm}", toolkit.footprint()
    for verb in ("stop", "restart"):
        lose_source_and_crash(toolkit, vm, restart_delay="1h")
        eventually(
            lambda: toolkit.sh(f"systemctl show -P ActiveState -P StatusText {again}", check=False),
            # What it said last, it says when it has ended as well.
            lambda text: "Starts again in " in text and "activating" in text,
            20,
            "it does not wait",
        )
        assert toolkit.sh(f"microvm -l {vm}") == f"{vm}: current({vm}), activating\n"
        # What belongs to it is none of anybody's leftovers.
        assert vm not in toolkit.sh("microvm reconcile", check=False)
        toolkit.sh("mkdir /srv/gone")
        toolkit.systemctl(verb, unit)
        wanted = "active" if verb == "restart" else "inactive"
        assert toolkit.property(unit, "ActiveState") == wanted
        if verb == "stop":
            leaves_nothing(toolkit, before, "a stop in the waiting")
    assert not toolkit.host.exists(f"/run/microvm-host/{vm}/ends")
    assert toolkit.property(again, "ActiveState") == "inactive"


def lose_source_and_crash(toolkit: Toolkit, vm: str, **settings: object) -> None:
    """Start a VM with a share, take away what it shares, and kill its hypervisor."""
    toolkit.sh("mkdir -p /srv/data /srv/gone")
    if not toolkit.host.exists(f"/etc/microvms/{vm}.toml"):
        package = stub(vm)
        gone = dataclasses.replace(package.shares[0], source="/srv/gone")
        declare(toolkit, dataclasses.replace(package, shares=(gone, package.shares[1])), **settings)
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.sh(f"rmdir /srv/gone; kill -KILL {toolkit.property(f'microvm@{vm}', 'MainPID')}")


def test_the_helper_that_becomes_the_hypervisor_is_killed(toolkit: Toolkit, vm: str) -> None:
    """The VM comes up by itself, and whole."""
    toolkit.sh("mkdir -p /srv/data")
    declare(toolkit, stub(vm), restart_delay="100ms", restart_limit=0)
    before = toolkit.footprint()
    with shooting(toolkit, "start") as shots:
        for at in points(toolkit, shots, vm, 4):
            shots.arm(at)
            so_far = len(toolkit.journal(vm))
            toolkit.systemctl("start", f"microvm@{vm}", check=False)
            # It may count as started before it is shot.
            eventually(
                lambda so_far=so_far: toolkit.journal(vm)[so_far:],  # type: ignore[misc]
                lambda lines: any("it is started again" in line for line in lines),
                60,
                f"a shot at {at} was not noted",
            )
            eventually(
                lambda: toolkit.property(f"microvm@{vm}", "ActiveState"),
                lambda state: state == "active",
                60,
                f"it does not come up after a shot at {at}",
            )
            assert shots.seen()
            is_whole(toolkit, vm)
            toolkit.host.run(["microvm", "stop", vm])
            leaves_nothing(toolkit, before, f"start that was killed at {at}")


@pytest.mark.parametrize("verb", ["stop", "ended", "guard"])
def test_a_helper_of_the_stop_is_killed(toolkit: Toolkit, vm: str, verb: str) -> None:
    """The VM is stopped all the same, at once, and stays so; nothing is left."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm, shutdown_delay=0.2))
    before = toolkit.footprint()
    with shooting(toolkit, verb) as shots:
        hits = 0
        # How often it looks is a matter of time, but for the first looks.
        for at in sorted({1, 2, *points(toolkit, shots, vm, 4)}):
            toolkit.systemctl("start", f"microvm@{vm}")
            is_whole(toolkit, vm)
            main = toolkit.property(f"microvm@{vm}", "MainPID")
            shots.arm(at)
            began = time.monotonic()
            toolkit.host.run(["microvm", "stop", vm], check=False)
            assert time.monotonic() - began < 28
            seen = shots.seen()
            hits += bool(seen)
            what = f"{verb} that was killed before {at}, {seen}"
            assert not toolkit.host.exists(f"/proc/{main}"), what
            if verb == "guard":
                assert toolkit.property(f"microvm@{vm}", "Result") == "success"
            leaves_nothing(toolkit, before, what)
            assert toolkit.property(f"microvm@{vm}", "ActiveState") == "inactive", what
        assert hits >= 2, f"{verb} was hit {hits} times only"


def test_the_helper_that_takes_note_of_an_end_is_killed(toolkit: Toolkit, vm: str) -> None:
    """A VM that ended by itself is up again, as if its end had been noted."""
    toolkit.sh("mkdir -p /srv/data")
    declare(toolkit, stub(vm), restart_delay="100ms", restart_limit=0)
    with shooting(toolkit, "ended") as shots:
        toolkit.systemctl("start", f"microvm@{vm}")
        shots.watch()
        crash(toolkit, vm)
        effects = len(shots.seen())
        assert effects > 3
        for at in spread(effects, 3):
            shots.arm(at)
            crash(toolkit, vm)
            assert shots.seen(), f"not hit at {at}"
            is_whole(toolkit, vm)


def crash(toolkit: Toolkit, vm: str) -> None:
    """Kill the hypervisor, and wait until there is another."""
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    toolkit.sh(f"kill -KILL {main}")
    eventually(
        lambda: toolkit.sh(
            f"systemctl show -P ActiveState -P MainPID microvm@{vm}", check=False
        ).split(),
        lambda found: "active" in found and not {"0", main} & {*found},
        20,
        "it is not up again",
    )


def test_the_helper_that_registers_is_killed(toolkit: Toolkit, vm: str) -> None:
    """The VM runs on, not registered, or is; and so it is after its next start."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm, machine_uuid=UUID, register=True))
    before = toolkit.footprint()
    with shooting(toolkit, "register") as shots:
        shots.watch()
        start_and_register(toolkit, vm)
        effects = len(shots.seen())
        hits = 0
        toolkit.host.run(["microvm", "stop", vm])
        for at in spread(effects, 3):
            shots.arm(at)
            start_and_register(toolkit, vm)
            shot = shots.seen()
            what = f"register that was killed before {at}, {shot}"
            result = toolkit.property(f"microvm-machined@{vm}", "Result")
            assert result == ("signal" if shot else "success"), what
            hits += bool(shot)
            is_whole(toolkit, vm)
            toolkit.host.run(["microvm", "stop", vm])
            leaves_nothing(toolkit, before, what)
        assert hits >= 2
        start_and_register(toolkit, vm)
        assert vm in toolkit.sh("machinectl list --no-legend")


def start_and_register(toolkit: Toolkit, vm: str) -> None:
    unit = f"microvm-machined@{vm}"
    before = toolkit.property(unit, "InvocationID")
    toolkit.systemctl("start", f"microvm@{vm}")
    eventually(
        lambda: (
            toolkit.property(unit, "InvocationID") != before
            and toolkit.property(unit, "ActiveState")
        ),
        lambda state: state in ("inactive", "failed"),
        60,
        "it does not register",
    )


def test_the_helper_that_tells_of_a_lost_share_is_killed(toolkit: Toolkit, vm: str) -> None:
    """The VM runs on, and is stopped in order."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    with shooting(toolkit, "share-lost") as shots:
        for at in (1, 3):
            toolkit.systemctl("start", f"microvm@{vm}")
            shots.arm(at)
            lose_share(toolkit, vm)
            is_whole(toolkit, vm)
            toolkit.host.run(["microvm", "stop", vm])
            assert toolkit.property(f"microvm@{vm}", "Result") == "success"


def lose_share(toolkit: Toolkit, vm: str) -> None:
    """Have the virtiofsd of the share `data` start, and kill it."""
    # One that has not taken the connection yet is started again by the socket, and nothing is lost.
    with connected(toolkit, vm, "data"):
        toolkit.systemctl("kill", "-s", "KILL", f"microvm-virtiofsd-{vm}-data.service")
        eventually(
            lambda: toolkit.sh("cat /opt/shooting/shot", check=False),
            bool,
            60,
            "nobody was told of it",
        )


# ---- the hypervisor

# Seconds from the moment that the unit has a main process: as a helper, as the package's script,
# as QEMU, with a guest that boots, and up to where it is ready.
MOMENTS = (0.0, 0.01, 0.02, 0.04, 0.07, 0.1, 0.3, 0.7, 1.2, 2.0)


def test_the_hypervisor_is_killed_while_it_starts(toolkit: Toolkit, vm: str) -> None:
    """It is up again by itself with tap and share; or, after a stop, nothing is left."""
    toolkit.sh("mkdir -p /srv/data; echo hi >/srv/data/hello")
    package = guest(
        vm,
        taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01", address="10.78.1.2/24"),),
        shares=(Share(tag="data", source="/srv/data", mount="/mnt/data"),),
        **control(vm),
    )
    declare(toolkit, package, restart_delay="100ms", restart_limit=0)
    before = toolkit.footprint()
    chosen = [MOMENTS[n - 1] for n in spread(len(MOMENTS), 4)]
    killed = []
    for number, seconds in enumerate(chosen):
        lines = len(toolkit.journal(vm))
        killed += toolkit.sh(
            f"systemctl start --no-block microvm@{vm}; p=0; while [ $p = 0 ]; do "
            f"p=$(systemctl show -P MainPID microvm@{vm}); done; sleep {seconds}; "
            "cat /proc/$p/comm; kill -KILL $p",
            timeout=30,
        ).split()
        if number % 2 == 0:
            new = eventually(
                lambda lines=lines: toolkit.journal(vm)[lines:],  # type: ignore[misc]
                lambda new: f"GUEST {vm}: ready" in new,
                60,
                f"it is not up again after {seconds} s",
            )
            assert any("it is started again" in line for line in new)
            assert f"GUEST {vm}: share data file hello: hi" in new
            assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
            toolkit.sh(f"ip address add 10.78.1.1/24 dev {vm}a")
            assert "1 received" in toolkit.sh("ping -c1 -W5 10.78.1.2")
        # It tells of one that failed while it was waited for, and that is the one that was killed.
        toolkit.host.run(["microvm", "stop", vm], timeout=90, check=not number % 2)
        # That of one that was up again, or of the one that was killed.
        result = toolkit.property(f"microvm@{vm}", "Result")
        assert result == "success" or (number % 2 and result == "signal")
        leaves_nothing(toolkit, before, f"one that was killed after {seconds} s")
    # It was not the same thing each time.
    assert len({*killed}) >= 2, killed


def test_a_vm_is_stopped_while_it_starts(toolkit: Toolkit, vm: str) -> None:
    """The stop wins, at once, whatever the start has come to; nothing is left."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    before = toolkit.footprint()
    for milliseconds in spread(300, 8):
        toolkit.sh(
            f"systemctl start --no-block microvm@{vm}; sleep {milliseconds / 1000}; "
            f"systemctl stop microvm@{vm}"
        )
        what = f"a stop after {milliseconds} ms"
        assert toolkit.property(f"microvm@{vm}", "ActiveState") in ("inactive", "failed"), what
        leaves_nothing(toolkit, before, what)
    toolkit.systemctl("start", f"microvm@{vm}")
    is_whole(toolkit, vm)


def test_two_stops_and_a_start_at_once(toolkit: Toolkit, vm: str) -> None:
    """The last word counts; where it is not known which that was, the VM is whole or gone."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    unit = f"microvm@{vm}"
    before = toolkit.footprint()
    for number in range(rounds(5, 50)):
        toolkit.systemctl("start", unit)
        last = ("start", "stop")[number % 2]
        toolkit.sh(
            f"systemctl stop --no-block {unit}; systemctl stop --no-block {unit}; "
            f"systemctl start --no-block {unit}"
            + (f"; systemctl stop --no-block {unit}" if last == "stop" else "")
        )
        settle(toolkit, vm)
        if last == "start":
            is_whole(toolkit, vm)
        else:
            assert toolkit.property(unit, "ActiveState") == "inactive"
            leaves_nothing(toolkit, before, "a stop at last")
        toolkit.sh(
            f"systemctl start {unit}; systemctl stop {unit} & systemctl start {unit} & "
            f"systemctl stop {unit} & wait",
        )
        settle(toolkit, vm)
        if toolkit.property(unit, "ActiveState") == "active":
            is_whole(toolkit, vm)
        else:
            leaves_nothing(toolkit, before, "all at once")
    toolkit.systemctl("start", unit)
    is_whole(toolkit, vm)
    # Nothing of that was an end that nobody wanted, which makes the next start wait.
    assert not [line for line in toolkit.journal(vm) if "it is started again" in line]


def settle(toolkit: Toolkit, vm: str) -> None:
    """Wait until systemd has nothing to do for a VM, its set-up included."""
    quiet = 0

    def look() -> int:
        nonlocal quiet
        busy = toolkit.sh(
            f"systemctl list-jobs --no-legend 'microvm*{vm}*' | grep {vm}", check=False
        )
        quiet = 0 if busy else quiet + 1
        return quiet

    eventually(look, lambda found: found >= 3, 90, "it does not settle")


# ---- shares under load

_LOAD = (
    "cd /mnt/data; (while :; do dd if=/dev/zero of=w bs=64k count=64; echo x >>log; "
    "done) >/dev/null 2>&1 </dev/null & "
    "(while :; do cat big; ls -l; done) >/dev/null 2>&1 </dev/null & echo loaded"
)


def test_virtiofsd_is_killed_under_load(toolkit: Toolkit, vm: str) -> None:
    """The VM's status says so, it is ended within its bounds, and the next start has the share."""
    toolkit.sh("mkdir -p /srv/load; head -c 4M /dev/urandom >/srv/load/big; rm -f /srv/load/log")
    declare(
        toolkit,
        guest(
            vm,
            taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01", address="10.78.2.2/24"),),
            shares=(Share(tag="data", source="/srv/load", mount="/mnt/data"),),
            shell_port=2323,
            **control(vm),
        ),
        shutdown_timeout=2,
    )
    before = toolkit.footprint()
    for _ in range(rounds(1, 5)):
        lines = len(toolkit.journal(vm))
        toolkit.systemctl("start", f"microvm@{vm}")
        eventually(
            lambda lines=lines: toolkit.journal(vm)[lines:],  # type: ignore[misc]
            lambda new: f"GUEST {vm}: ready" in new,
            60,
            "it is not up",
        )
        assert f"GUEST {vm}: share data write: ok" in toolkit.journal(vm)[lines:]
        toolkit.sh(
            f"ip address add 10.78.2.1/24 dev {vm}a; rm -f /srv/load/log; "
            f"echo '{_LOAD}' | socat -t60 - TCP:10.78.2.2:2323 | grep loaded"
        )
        eventually(lambda: toolkit.host.exists("/srv/load/log"), bool, 60, "there is no load")
        toolkit.systemctl("kill", "-s", "KILL", f"microvm-virtiofsd-{vm}-data.service")
        eventually(
            lambda: toolkit.sh(f"microvm -l {vm}"),
            lambda text: "lost share data" in text,
            60,
            "it is not told of",
        )
        assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
        _, result, seconds = stop(toolkit, vm)
        # The guest cannot unmount it: it is the bound that ends the stop.
        # With so little time for all, systemd may have been first.
        assert result in ("exit-code", "timeout")
        assert seconds < 15
        leaves_nothing(toolkit, before, "a VM whose virtiofsd was killed")


# ---- no space


def test_no_space_in_the_state_directory(toolkit: Toolkit, vm: str) -> None:
    """The start fails and says why, nothing is left of it, and with space it starts."""
    toolkit.sh("mkdir -p /srv/data")
    path = toolkit.put(stub(vm))
    state = f"/var/lib/microvms/{vm}"
    toolkit.sh(
        f"mkdir {state} && mount -t tmpfs -o size=64k,nr_inodes=16 small {state} && "
        f"ln -s {path} {state}/current"
    )
    before = toolkit.footprint()
    try:
        # Once without any, and once with just enough for the link to the package.
        for spare in (0, 1):
            toolkit.sh(
                f"cd {state}; head -c 1M /dev/zero >full; i=0; "
                "while : >fill$i; do i=$((i+1)); done; "
                f"for j in $(seq {spare}); do i=$((i-1)); rm -f fill$i; done",
                check=False,
            )
            done = toolkit.host.run(["microvm", "start", vm], check=False)
            assert done.returncode, f"it starts with {spare} inodes"
            assert "No space left on device" in done.stderr, done.stderr
            assert "No space left on device" in toolkit.status(vm)
            assert "Traceback" not in toolkit.status(vm)
            leaves_nothing(toolkit, before, f"a start with {spare} inodes")
        toolkit.sh(f"rm -f {state}/fill* {state}/full")
        toolkit.systemctl("start", f"microvm@{vm}")
        is_whole(toolkit, vm)
        # A stop asks for no space.
        toolkit.sh(
            f"cd {state}; head -c 1M /dev/zero >full; i=0; while : >fill$i; do i=$((i+1)); done",
            check=False,
        )
        toolkit.host.run(["microvm", "stop", vm])
        assert toolkit.property(f"microvm@{vm}", "Result") == "success"
        leaves_nothing(toolkit, before, "a stop without space")
    finally:
        toolkit.sh(f"systemctl stop microvm@{vm}; umount {state}", check=False)


def test_no_space_in_run(toolkit: Toolkit, vm: str) -> None:
    """A start fails and says why, a stop goes on, and with space all is as ever."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    before = toolkit.footprint()
    options = toolkit.sh("findmnt -no OPTIONS /run").strip().split(",")
    (size,) = [option for option in options if option.startswith("size=")]
    # Made small first: it is memory that is filled.
    fill = (
        "mount -o remount,size=$(df -B1K --output=used /run | tail -n 1 | tr -d ' ')k /run && "
        "! head -c 1M /dev/zero >/run/full"
    )
    free = f"rm -f /run/full; mount -o remount,{size} /run"
    try:
        toolkit.sh(fill)
        done = toolkit.host.run(["microvm", "start", vm], check=False)
        assert done.returncode, "it starts"
        assert "No space left on device" in done.stderr, done.stderr
        toolkit.sh(free)
        leaves_nothing(toolkit, before, "a start without space in /run")
        toolkit.systemctl("start", f"microvm@{vm}")
        is_whole(toolkit, vm)
        toolkit.sh(fill)
        toolkit.host.run(["microvm", "stop", vm])
        assert toolkit.property(f"microvm@{vm}", "Result") == "success"
        leaves_nothing(toolkit, before, "a stop without space in /run")
    finally:
        toolkit.sh(free)
    toolkit.systemctl("start", f"microvm@{vm}")
    is_whole(toolkit, vm)


# ---- what the host's own services do


def test_the_bus_is_gone(toolkit: Toolkit, vm: str) -> None:
    """VMs start, run, crash, start again and stop without it, and are told of."""
    toolkit.sh("mkdir -p /srv/data")
    declare(toolkit, stub(vm, machine_uuid=UUID, register=True), restart_delay="100ms")
    before = toolkit.footprint()
    toolkit.systemctl("start", f"microvm@{vm}")
    is_whole(toolkit, vm)
    try:
        toolkit.sh(
            "systemctl mask --runtime -q dbus.socket dbus.service; "
            "systemctl stop dbus.socket dbus.service; ! busctl list 2>/dev/null"
        )
        is_whole(toolkit, vm)
        assert f"{vm}: current({vm})" in toolkit.sh(f"microvm -l {vm}")
        toolkit.host.run(["microvm", "stop", vm])
        assert toolkit.property(f"microvm@{vm}", "Result") == "success"
        leaves_nothing(toolkit, before, "a stop without the bus")
        toolkit.host.run(["microvm", "start", vm])
        is_whole(toolkit, vm)
        crash(toolkit, vm)
        is_whole(toolkit, vm)
        assert toolkit.host.run(["microvm", "status", vm], check=False).returncode == 0
        assert toolkit.host.run(["microvm", "reconcile"], check=False).returncode == 0
    finally:
        toolkit.sh(
            "systemctl unmask --runtime -q dbus.socket dbus.service; systemctl start dbus.socket; "
            "busctl list >/dev/null"
        )
    is_whole(toolkit, vm)
    toolkit.host.run(["microvm", "stop", vm])
    leaves_nothing(toolkit, before, "a stop with the bus again")


NEWER = "/usr/src/microvm-host.newer"


def test_the_toolkit_is_upgraded_under_a_running_vm(toolkit: Toolkit, vm: str) -> None:
    """It runs on, is stopped by the new code, and keeps the toolkit from being removed."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    unit = f"microvm@{vm}"
    before = toolkit.footprint()
    toolkit.systemctl("start", unit)
    main = toolkit.property(unit, "MainPID")
    try:
        toolkit.sh(
            f"cp -r {SOURCES} {NEWER} && cd {NEWER} && "
            "sed -i 's/asked the guest to shut down by/newly &/' microvm_host/hypervisor.py && "
            "sed -i 's/^Description=.*/& (newer)/' units/microvm@.service.in && "
            "grep -q newly microvm_host/hypervisor.py && make install",
            timeout=120,
        )
        assert toolkit.property(unit, "Description") == f"MicroVM {vm} (newer)"
        assert toolkit.property(unit, "MainPID") == main
        is_whole(toolkit, vm)
        refused = toolkit.host.run(["make", "-C", NEWER, "uninstall"], check=False)
        assert refused.returncode
        assert "microVMs are running: stop them first" in refused.stderr
        assert toolkit.host.exists("/usr/local/bin/microvm")
        is_whole(toolkit, vm)
        lines, result, _ = stop(toolkit, vm)
        assert result == "success"
        assert any("newly asked the guest to shut down by its package" in line for line in lines)
        leaves_nothing(toolkit, before, "a VM of the former version")
        toolkit.systemctl("start", unit)
        is_whole(toolkit, vm)
        # And back: a downgrade is the same.
        toolkit.install()
        is_whole(toolkit, vm)
        lines, result, _ = stop(toolkit, vm)
        assert result == "success"
        assert not any("newly asked" in line for line in lines)
    finally:
        toolkit.install()
        toolkit.sh(f"rm -rf {NEWER}")
