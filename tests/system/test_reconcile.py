# SPDX-License-Identifier: MIT
"""`microvm reconcile` on real leftovers: what is undone, and what is left alone."""

from __future__ import annotations

import json
import time

import pytest

from tests.guest.package import Share, Stub, Tap

from .toolkit import Toolkit, eventually

pytestmark = pytest.mark.container


def stub(vm: str) -> Stub:
    return Stub(
        name=vm,
        taps=(
            Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),
            Tap(name=f"{vm}b", mac="02:00:00:00:00:02"),
        ),
        shares=(Share(tag="data", source="/srv/data", mount="/mnt"),),
    )


def reconcile(toolkit: Toolkit, vm: str, *options: str) -> tuple[int, list[dict[str, object]]]:
    """Run it; gives its exit code and what it tells of one VM."""
    done = toolkit.host.run(["microvm", "reconcile", "--json", *options], check=False)
    return done.returncode, [each for each in json.loads(done.stdout) if each["vm"] == vm]


def leave(toolkit: Toolkit, vm: str) -> None:
    """Start and stop a VM whose set-up is not undone, as if each helper had been killed."""
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    for what in ("set-booted", "tap-interfaces", "virtiofsd"):
        toolkit.host.write(
            f"/run/systemd/system/microvm-{what}@{vm}.service.d/killed.conf",
            "[Service]\nExecStopPost=\n",
        )
    toolkit.systemctl("daemon-reload")
    toolkit.host.run(["microvm", "start", vm])
    toolkit.host.run(["microvm", "stop", vm])
    toolkit.sh(f"rm -r /run/systemd/system/microvm-*@{vm}.service.d")
    toolkit.systemctl("daemon-reload")


@pytest.mark.core
def test_what_killed_helpers_left(toolkit: Toolkit, vm: str) -> None:
    before = toolkit.footprint()
    leave(toolkit, vm)
    left = toolkit.footprint()
    assert {f"interface {vm}a", f"interface {vm}b"} <= left
    code, found = reconcile(toolkit, vm)
    assert code == 1
    assert {(each["kind"], str(each["what"]).rpartition("/")[2]) for each in found} == {
        ("record", "virtiofsd"),
        ("record", "served-shares"),
        ("record", "tap-interfaces"),
        ("record", "booted"),
        ("booted", "booted"),
    }
    assert {each["state"] for each in found} == {"left"}
    assert toolkit.footprint() == left, "looking has changed something"
    # Anybody may look.
    shown = toolkit.host.run(["microvm", "reconcile"], user="nobody", check=False)
    assert f"{vm}: record /run/microvm-host/{vm}/tap-interfaces of tap {vm}a, tap {vm}b" in (
        shown.stdout
    )
    refused = toolkit.host.run(["microvm", "reconcile", "--apply"], user="nobody", check=False)
    assert (refused.returncode, "needs root" in refused.stderr) == (1, True)
    code, found = reconcile(toolkit, vm, "--apply")
    assert {each["state"] for each in found} == {"undone"}, found
    assert code == 0
    # What holds starts back meanwhile ends a moment later.
    toolkit.await_footprint(before)
    assert reconcile(toolkit, vm) == (0, [])
    # The VM is none the worse for it.
    toolkit.host.run(["microvm", "start", vm])
    toolkit.host.run(["microvm", "stop", vm])


@pytest.mark.core
def test_a_directory_that_was_deleted(toolkit: Toolkit, vm: str) -> None:
    before = toolkit.footprint()
    leave(toolkit, vm)
    toolkit.sh(
        f"rm -r /var/lib/microvms/{vm}; mkdir -p /nix/var/nix/gcroots/microvm; "
        f"ln -s /var/lib/microvms/{vm}/current /nix/var/nix/gcroots/microvm/{vm}"
    )
    code, found = reconcile(toolkit, vm, "--apply")
    assert (code, {each["state"] for each in found}) == (0, {"undone"}), found
    toolkit.await_footprint(before)
    assert toolkit.sh("ls /nix/var/nix/gcroots/microvm") == ""


@pytest.mark.core
def test_units_of_nobody(toolkit: Toolkit, vm: str) -> None:
    before = toolkit.footprint()
    toolkit.sh(
        f"systemd-run --unit=microvm-virtiofsd-{vm}-t --socket-property=ListenStream=/run/{vm}.sock"
        f" --socket-property=RemoveOnStop=yes /bin/cat; "
        # An administrator's own, whatever its name.
        f"printf '[Service]\\nExecStart=sleep 1000\\n' "
        f">/etc/systemd/system/microvm-virtiofsd-{vm}-mine.service; systemctl daemon-reload; "
        f"systemctl start microvm-virtiofsd-{vm}-mine"
    )
    # Set up by hand, and bound to nothing that runs.
    toolkit.create(stub(vm))
    toolkit.host.write(
        f"/run/systemd/system/microvm-set-booted@{vm}.service.d/stays.conf",
        "[Unit]\nStopWhenUnneeded=no\n",
    )
    toolkit.systemctl("daemon-reload")
    toolkit.systemctl("start", f"microvm-set-booted@{vm}")
    code, found = reconcile(toolkit, vm, "--apply")
    assert {each["what"] for each in found if each["kind"] == "unit"} == {
        f"microvm-virtiofsd-{vm}-t.socket",
        f"microvm-set-booted@{vm}.service",
    }
    assert (code, {each["state"] for each in found}) == (0, {"undone"}), found
    mine = f"unit microvm-virtiofsd-{vm}-mine.service active"
    toolkit.await_footprint(before | {mine})
    assert not toolkit.host.exists(f"/run/{vm}.sock")
    toolkit.sh(
        f"systemctl stop microvm-virtiofsd-{vm}-mine; "
        f"rm -r /etc/systemd/system/microvm-virtiofsd-{vm}-mine.service "
        f"/run/systemd/system/microvm-set-booted@{vm}.service.d; systemctl daemon-reload"
    )


def test_what_is_not_ours_stays(toolkit: Toolkit, vm: str) -> None:
    leave(toolkit, vm)
    # One made anew by somebody else, a tap that nobody recorded, and a disk.
    toolkit.sh(
        f"ip link del {vm}a; ip tuntap add {vm}a mode tap; ip tuntap add {vm}c mode tap; "
        f"touch /var/lib/microvms/{vm}/disk.img; rm /var/lib/microvms/{vm}/current; "
        f"touch -d '3 days ago' /var/lib/microvms/{vm}"
    )
    code, found = reconcile(toolkit, vm, "--apply")
    kept = [each for each in found if each["state"] == "kept"]
    assert [(each["kind"], "disk.img" in str(each["message"])) for each in kept] == [
        ("directory", True)
    ]
    # To tell of it is no reason to fail for ever.
    assert code == 0
    interfaces = toolkit.sh("ls /sys/class/net").split()
    assert {f"{vm}a", f"{vm}c"} <= {*interfaces}
    assert f"{vm}b" not in interfaces
    assert toolkit.host.exists(f"/var/lib/microvms/{vm}/disk.img")
    toolkit.sh(f"ip link del {vm}a; ip link del {vm}c")


def test_nothing_of_a_vm_that_runs(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    toolkit.host.run(["microvm", "start", vm])
    # Its script has become what runs from now on.
    before = eventually(
        toolkit.footprint,
        lambda found: "process sleep infinity " in found,
        60,
        "it does not run",
    )
    assert reconcile(toolkit, vm, "--apply", "--yes") == (0, [])
    assert toolkit.footprint() == before


@pytest.mark.core
def test_starts_are_held_back_while_it_undoes(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    slow = f"microvm-virtiofsd-{vm}-slow.service"
    toolkit.sh(
        f"systemd-run --unit={slow} --property=ExecStop='/bin/sleep 3' /bin/sleep 1000; sleep 0.2"
    )
    running = toolkit.host.spawn(["microvm", "reconcile", "--apply"])
    try:
        deadline = time.monotonic() + 60
        while toolkit.property(slow, "ActiveState") != "deactivating":
            assert time.monotonic() < deadline, "nothing is undone"
        toolkit.host.run(["microvm", "start", vm])
        # It came up after the slow one had gone, and has all that it needs.
        assert toolkit.property(slow, "ActiveState") == "inactive"
        assert running.wait(timeout=60) == 0
    finally:
        running.kill()
    assert toolkit.host.exists(f"/sys/class/net/{vm}a")
    assert toolkit.property("microvm-reconcile.service", "ActiveState") == "inactive"


def test_beside_starts_and_stops(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(stub(vm))
    toolkit.sh("rm -f /run/enough")
    running = toolkit.host.spawn(
        ["sh", "-c", "while [ ! -e /run/enough ]; do microvm reconcile --apply; done"]
    )
    try:
        for _ in range(20):
            toolkit.host.run(["microvm", "start", vm])
            assert toolkit.sh(f"ls -d /sys/class/net/{vm}?").split() == [
                f"/sys/class/net/{vm}a",
                f"/sys/class/net/{vm}b",
            ]
            assert toolkit.host.exists(f"/var/lib/microvms/{vm}/{vm}-virtiofs-data.sock")
            assert toolkit.host.exists(f"/run/microvm-host/{vm}/tap-interfaces")
            toolkit.host.run(["microvm", "stop", vm])
    finally:
        toolkit.sh("touch /run/enough")
        shown, _ = running.communicate(timeout=30)
    assert "Traceback" not in shown


def test_one_at_a_time(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh(f"mkdir -p /var/lib/microvms/{vm}; ln -s /gone /var/lib/microvms/{vm}/booted")
    hold = ["flock", "/run/microvm-host.lock", "sh", "-c", "echo held; read enough"]
    holder = toolkit.host.spawn(hold)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        refused = toolkit.host.run(["microvm", "reconcile", "--apply"], check=False)
        assert refused.returncode == 1
        assert "another `microvm reconcile` is at work" in refused.stderr
        holder.communicate("\n", timeout=60)
        assert holder.returncode == 0
    finally:
        holder.kill()
    assert reconcile(toolkit, vm, "--apply")[0] == 0
    assert not toolkit.host.exists(f"/var/lib/microvms/{vm}/booted")


@pytest.mark.core
def test_a_vm_that_is_declared_no_more(toolkit: Toolkit, vm: str) -> None:
    path = toolkit.put(Stub(name=vm))
    declaration = f"/etc/microvms/{vm}.toml"
    toolkit.host.write(declaration, f'runner = "{path}"\n')
    toolkit.host.run(["microvm", "apply"])
    assert reconcile(toolkit, vm) == (0, [])
    toolkit.sh(f"rm {declaration}; systemctl daemon-reload")
    code, found = reconcile(toolkit, vm)
    assert (code, [(each["kind"], each["state"]) for each in found]) == (1, [("vm", "left")])
    # Nobody is there to be asked.
    code, found = reconcile(toolkit, vm, "--apply")
    assert (code, found[0]["state"]) == (1, "left")
    terminal = ["script", "-qec", "microvm reconcile --apply", "/dev/null"]
    declined = toolkit.host.run(terminal, input="n\n", check=False)
    assert f"{vm} runs, but its declaration {declaration} is gone. Stop it?" in declined.stdout
    assert (declined.returncode, toolkit.property(f"microvm@{vm}", "ActiveState")) == (1, "active")
    agreed = toolkit.host.run(terminal, input="y\n", check=False)
    assert agreed.returncode == 0, agreed.stdout
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "inactive"
    assert toolkit.host.exists(f"/var/lib/microvms/{vm}/current")
