# SPDX-License-Identifier: MIT
"""The `microvm` command as its users type it."""

from __future__ import annotations

import json

import pytest

from tests.guest.package import Share, Stub, Tap

from .toolkit import Toolkit, eventually

pytestmark = [pytest.mark.container, pytest.mark.core]


def line(toolkit: Toolkit, vm: str) -> str:
    """The line of a VM in `microvm -l`."""
    lines = toolkit.sh("microvm -l").splitlines()
    return next(line for line in lines if line.startswith(f"{vm}: "))


@pytest.mark.fault
def test_listing_through_a_vms_life(toolkit: Toolkit, vm: str) -> None:
    """With `current` replaced under it, a VM runs on as it was, and is said to be stale."""
    first = toolkit.put(Stub(name=vm, system="/gone/1111-nixos-system-x-24.05"), "/opt/first")
    second = toolkit.put(Stub(name=vm, system="/gone/2222-nixos-system-x-24.11"), "/opt/second")
    toolkit.sh(f"ln -sfn {first} /opt/newest")
    made = toolkit.sh(f"microvm -c {vm} --runner /opt/newest")
    assert made == (f"{vm}: installed {first}\nstart it: systemctl start microvm@{vm}.service\n")
    label = "1111-nixos-system-x-24.05"
    newer = "2222-nixos-system-x-24.11"
    assert line(toolkit, vm) == (
        f"{vm}: current({label}), not booted: systemctl start microvm@{vm}.service"
    )
    toolkit.host.run(["microvm", "start", vm])
    assert line(toolkit, vm) == f"{vm}: current({label})"
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    toolkit.sh(f"ln -sfn {second} /opt/newest")
    assert line(toolkit, vm) == (
        f"{vm}: outdated({label}), rebuild({newer}) and reboot: microvm -Ru {vm}"
    )
    assert f"systemctl restart microvm@{vm}.service" in toolkit.sh(f"microvm -u {vm}")
    assert line(toolkit, vm) == (
        f"{vm}: stale({label}), reboot({newer}): systemctl restart microvm@{vm}.service"
    )
    assert toolkit.property(f"microvm@{vm}", "MainPID") == main
    assert toolkit.sh(f"readlink /var/lib/microvms/{vm}/booted").strip() == first
    toolkit.host.run(["microvm", "-Ru", vm])
    assert line(toolkit, vm) == f"{vm}: current({newer})"
    (found,) = [each for each in json.loads(toolkit.sh("microvm -l --json")) if each["name"] == vm]
    assert found["active"] == "active"
    assert found["booted"]["package"] == found["current"]["package"] == second
    toolkit.sh("rm -rf /opt/second")
    assert line(toolkit, vm).startswith(f"{vm}: broken, ")


def test_the_listing_needs_no_root_and_no_terminal(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(Stub(name=vm))
    shown = toolkit.host.run(["microvm", "-l"], user="nobody").stdout
    assert f"{vm}: current({vm}), not booted" in shown
    assert "\033" not in shown
    on_terminal = "script -qec 'microvm -l' /dev/null"
    assert "\033[1;31m" in toolkit.sh(on_terminal)
    assert "\033" not in toolkit.sh(f"NO_COLOR=1 {on_terminal}")


@pytest.mark.parametrize(
    ("words", "code", "complaint"),
    [
        (["frobnicate"], 2, "No such command"),
        (["-x"], 2, "there is no flag -x"),
        (["-R"], 2, "none of -l, -c, -u, -r and -s"),
        (["-l", "-c", "web"], 2, "does not go with"),
        (["start"], 2, "Missing argument"),
        (["start", "a/b"], 2, "cannot be the name of a VM"),
        (["start", "../x"], 2, "cannot be the name of a VM"),
        (["start", "no-such"], 1, "there is no microVM no-such"),
        (["stop", "no-such"], 1, "there is no microVM no-such"),
        (["stop", "no-such*"], 1, "no microVM matches 'no-such*'"),
        (["status", "no-such"], 1, "there is no microVM no-such"),
        (["create", "new", "--runner", "/no/where"], 78, "/no/where: no runner package"),
        (["create", "new", "--runner", "/etc"], 78, "has no bin/microvm-run"),
        (["create", "new", "--runner", "/x", "--flake", "y"], 2, "do not go together"),
        (["create", "new", "--flake", "x#y"], 2, "has a '#'"),
    ],
)
def test_wrong_use(toolkit: Toolkit, words: list[str], code: int, complaint: str) -> None:
    done = toolkit.host.run(["microvm", *words], check=False)
    assert (done.returncode, complaint in done.stderr) == (code, True), done.stderr
    assert "Traceback" not in done.stderr
    assert not toolkit.host.exists("/var/lib/microvms/new")
    assert toolkit.systemctl("is-system-running", check=False) == "running\n"


def test_a_vm_that_does_not_exist_leaves_nothing_behind(toolkit: Toolkit) -> None:
    """By systemctl, too: the start fails and says why, and no unit is failed or up after it."""
    before = toolkit.footprint()
    done = toolkit.host.run(["systemctl", "start", "microvm@no-such"], check=False)
    assert (done.returncode, "Assertion failed" in done.stderr) == (1, True), done.stderr
    assert toolkit.systemctl("is-system-running", check=False) == "running\n"
    toolkit.await_footprint(before)
    # One that was there, and is enabled still.
    toolkit.systemctl("enable", "microvm@no-such")
    try:
        toolkit.systemctl("start", "microvms.target")
        eventually(
            lambda: toolkit.systemctl("list-jobs", "--no-legend", "microvm*"),
            lambda jobs: "no-such" not in jobs,
            60,
            "does not end",
        )
        assert toolkit.systemctl("is-system-running", check=False) == "running\n"
    finally:
        toolkit.systemctl("disable", "microvm@no-such")
    toolkit.await_footprint(before)


def test_the_table(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(Stub(name=vm))
    toolkit.host.run(["microvm", "start", vm])
    head, row = toolkit.sh(f"microvm list '{vm[:2]}*'").splitlines()
    assert head.split()[:6] == ["NAME", "STATE", "SINCE", "VERSION", "ADDRESS", "MEMORY"]
    words = row.split()
    assert (words[:2], words[3:5]) == ([vm, "running"], ["ago", vm])
    (found,) = json.loads(toolkit.sh(f"microvm list --json {vm}"))
    now = int(toolkit.sh("date +%s"))
    assert now - 60 < found["since"] <= now
    # After a stop a run in the foreground waits until that is done.
    toolkit.host.spawn(["systemctl", "stop", "--no-block", f"microvm@{vm}"]).wait(60)
    running = toolkit.host.spawn(["microvm", "run", vm])
    try:
        eventually(
            lambda: toolkit.property(f"microvm-foreground-{vm}", "ActiveState"),
            lambda state: state == "active",
            60,
            "does not run",
        )
        toolkit.host.run(["microvm", "stop", vm])
        _, errors = running.communicate(timeout=60)
    finally:
        running.kill()
    # Not "Transaction … is destructive", as while it was being stopped.
    assert errors.startswith(
        f"[microvm: {vm} runs on this terminal until its guest powers off; "
        f"`microvm stop {vm}` on another one shuts it down]\n"
    )


def test_only_root_creates(toolkit: Toolkit, vm: str) -> None:
    path = toolkit.put(Stub(name=vm))
    done = toolkit.host.run(["microvm", "create", vm, "--runner", path], user="nobody", check=False)
    assert done.returncode == 1
    assert done.stderr == (f"microvm: this needs root; sudo microvm create {vm} --runner {path}\n")


def test_the_listing_shows_a_failed_start(toolkit: Toolkit, vm: str) -> None:
    path = toolkit.create(Stub(name=vm))
    toolkit.host.write(f"{path}/share/microvm/tap-interfaces", "vm%d\n")
    failed = toolkit.host.run(["microvm", "start", vm], check=False)
    assert failed.returncode == 78
    assert failed.stderr.startswith(f"{path}/share/microvm/tap-interfaces:1: ")
    assert line(toolkit, vm) == (
        f"{vm}: current({vm}), failed: systemctl status microvm@{vm}.service"
    )
    toolkit.systemctl("reset-failed")


def test_update_keeps_what_works(toolkit: Toolkit, vm: str) -> None:
    path = toolkit.create(Stub(name=vm))
    toolkit.sh(f"rm {path}/bin/microvm-run")
    done = toolkit.host.run(["microvm", "update", vm], check=False)
    assert done.returncode == 78
    assert "has no bin/microvm-run" in done.stderr
    assert toolkit.sh(f"readlink /var/lib/microvms/{vm}/current").strip() == path
    assert toolkit.host.run(["microvm", "create", vm, "--runner", path], check=False).stderr == (
        f"microvm: /var/lib/microvms/{vm}: microVM {vm} exists already; `microvm update {vm}` "
        f"updates it, `microvm remove {vm}` removes it\n"
    )


def test_run_in_the_foreground(toolkit: Toolkit, vm: str) -> None:
    before = toolkit.footprint()
    toolkit.create(
        Stub(
            name=vm,
            taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
            prepare=f"echo tap $(cat /sys/class/net/{vm}a/ifindex)",
            seconds=1,
        )
    )
    shown = toolkit.sh(f"microvm -r {vm}")
    assert f"STUB {vm}: started as microvm:microvm in /var/lib/microvms/{vm}" in shown
    assert "tap " in shown
    toolkit.await_footprint(before)
    # Now one that stays.
    toolkit.put(Stub(name=vm, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
    toolkit.systemctl("start", f"microvm@{vm}")
    refused = toolkit.host.run(["microvm", "run", vm], check=False)
    assert refused.returncode == 1
    assert "is active already" in refused.stderr


def test_a_vm_in_the_foreground_is_known_and_stopped_in_order(toolkit: Toolkit, vm: str) -> None:
    before = toolkit.footprint()
    toolkit.create(Stub(name=vm, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
    running = toolkit.host.spawn(["microvm", "run", vm])
    try:
        eventually(
            lambda: line(toolkit, vm), lambda shown: "booted" not in shown, 60, "does not run"
        )
        assert toolkit.host.exists(f"/sys/class/net/{vm}a")
        unit = f"microvm-foreground-{vm}.service"
        after = toolkit.property(unit, "After").split()
        assert {"network.target", "remote-fs.target"} < {*after}
        assert toolkit.property(f"microvm-guard@{vm}", "ActiveState") == "active"
        toolkit.host.run(["microvm", "stop", vm])
        shown, _ = running.communicate(timeout=60)
    finally:
        running.kill()
    assert f"STUB {vm}: shutdown script, main process" in shown
    toolkit.await_footprint(before)


def test_status_and_logs(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(
        Stub(
            name=vm,
            taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
            shares=(Share(tag="data", source="/srv/data", mount="/mnt", read_only=True),),
            vsock_cid=99,
        )
    )
    toolkit.host.run(["microvm", "start", vm])
    toolkit.await_line(vm, f"STUB {vm}: started")
    shown = toolkit.sh(f"microvm status {vm}")
    for expected in (f"taps: {vm}a", "share: data → /srv/data (read-only)", "vsock CID: 99"):
        assert expected in shown
    assert "Active: active (running)" in shown
    found = json.loads(toolkit.sh(f"microvm status {vm} --json"))
    assert found["shares"] == [{"tag": "data", "source": "/srv/data", "read_only": True}]
    assert found["source"] == f"runner /opt/packages/{vm}"
    assert f"STUB {vm}: started" in toolkit.sh(f"microvm logs {vm} -n 20")
    # What set-up units said belongs to it as well.
    assert f"microvm-tap-interfaces@{vm}" in toolkit.sh(f"microvm logs {vm}")


def test_ssh_goes_over_vsock(toolkit: Toolkit, vm: str) -> None:
    """With a stand-in for ssh that shows how it was called; the proxy itself is real."""
    toolkit.create(Stub(name=vm, vsock_cid=4242))
    toolkit.host.write("/opt/fake/ssh", '#!/bin/sh\nfor word; do echo "$word"; done\n', 0o755)
    shown = toolkit.host.run(
        ["env", "PATH=/opt/fake:/usr/local/bin:/usr/bin:/bin", "microvm", "ssh", f"joe@{vm}", "ls"]
    ).stdout.splitlines()
    assert shown[-4:] == ["-l", "joe", f"microvm-{vm}", "ls"]
    assert "ProxyUseFdpass=yes" in shown
    assert f"HostKeyAlias=microvm-{vm}" in shown
    (proxy,) = [word for word in shown if word.startswith("ProxyCommand=")]
    command = proxy.removeprefix("ProxyCommand=").replace("%p", "22")
    done = toolkit.host.run(["sh", "-c", command], check=False)
    assert done.returncode == 1
    assert "cannot reach port 22 of vsock CID 4242: " in done.stderr
    no_cid = toolkit.host.run(["microvm", "-s", "no-such"], check=False)
    assert no_cid.returncode == 1


def test_remove(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(Stub(name=vm))
    toolkit.systemctl("enable", "--now", f"microvm@{vm}")
    refused = toolkit.host.run(["microvm", "remove", "-y", vm], check=False)
    assert refused.returncode == 1
    assert "is running" in refused.stderr
    toolkit.host.run(["microvm", "stop", vm])
    asked = toolkit.host.run(["microvm", "remove", vm], input="n\n", check=False)
    assert asked.returncode == 1
    assert toolkit.host.exists(f"/var/lib/microvms/{vm}/current")
    toolkit.host.run(["microvm", "remove", "-y", vm])
    assert not toolkit.host.exists(f"/var/lib/microvms/{vm}")
    assert not toolkit.host.exists(
        f"/etc/systemd/system/microvms.target.wants/microvm@{vm}.service"
    )


def test_remove_and_adopt_leave_mounts_alone(toolkit: Toolkit, vm: str) -> None:
    """A bind mount of the same file system in the state directory, and one that is all of it."""
    state, data = f"/var/lib/microvms/{vm}", f"/srv/{vm}"
    toolkit.sh(f"mkdir -p {data} {state} && chown microvm {data} && mount --bind {data} {state}")
    try:
        # An empty mount point is a state directory as good as any.
        toolkit.create(Stub(name=vm))
        refused = toolkit.host.run(["microvm", "remove", "-y", vm], check=False)
        assert refused.returncode == 1
        assert f"{state}: is a mount point" in refused.stderr
    finally:
        toolkit.sh(f"umount {state}")
    toolkit.sh(f"mv {data}/* {state}/ && chown microvm {data}")
    toolkit.sh(
        f"touch {data}/file && chown microvm {data}/file && mkdir {state}/data && "
        f"mount --bind {data} {state}/data"
    )
    try:
        before = toolkit.sh(f"find {state} -printf '%p %u %m\n' | sort")
        for command in (["remove", "-y", vm], ["adopt", vm, "--user", "root"], ["adopt", vm]):
            refused = toolkit.host.run(["microvm", *command], check=False)
            assert refused.returncode == 1
            if "root" not in command:
                assert f"{state}/data: is a mount point" in refused.stderr
        assert toolkit.sh(f"find {state} -printf '%p %u %m\n' | sort") == before
    finally:
        toolkit.sh(f"umount {state}/data")
    toolkit.host.run(["microvm", "remove", "-y", vm])
    assert toolkit.sh(f"ls {data}; rm -r {data}") == "file\n"


def test_a_vm_that_starts_while_remove_asks_is_kept(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(Stub(name=vm))
    state = f"/var/lib/microvms/{vm}"
    # The answer comes when the VM is up.
    asked = toolkit.sh(
        f"{{ sleep 0.5; systemctl start microvm@{vm}; echo y; }} | microvm remove {vm} 2>&1",
        check=False,
    )
    assert f"microVM {vm} is running" in asked
    assert toolkit.host.exists(f"{state}/current")
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    # And one that comes up in the same moment is either kept whole, or does not start.
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.sh(
        f"systemctl start microvm@{vm} 2>/dev/null & microvm remove -y {vm} 2>/dev/null; wait",
        check=False,
    )
    runs = toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    assert toolkit.host.exists(f"{state}/current") == toolkit.host.exists(state) == runs


def test_stop_returns_when_nothing_is_left(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(
        Stub(
            name=vm,
            taps=tuple(
                Tap(name=f"{vm}t{number}", mac=f"02:00:00:00:00:0{number}") for number in range(8)
            ),
        )
    )
    before = toolkit.footprint()
    toolkit.host.run(["microvm", "start", vm])
    assert toolkit.sh(f"microvm stop {vm} && ls -d /sys/class/net/{vm}t*", check=False) == ""
    assert toolkit.footprint() == before


def test_a_guest_that_ends_itself_comes_back(toolkit: Toolkit, vm: str) -> None:
    """As on NixOS, a VM is up again whatever ended it, and the journal has both runs."""
    toolkit.create(Stub(name=vm, seconds=0.5))
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/quick.conf", "[Service]\nRestartSec=100ms\n"
    )
    toolkit.systemctl("daemon-reload")
    toolkit.host.run(["microvm", "start", vm])
    eventually(
        lambda: [line for line in toolkit.journal(vm) if f"STUB {vm}: started" in line],
        lambda starts: len(starts) >= 3,
        90,
        "not restarted",
    )
    toolkit.host.run(["microvm", "stop", vm], check=False)
