# SPDX-License-Identifier: MIT
"""A guest that QEMU paused, since the host's file system was full: seen, resumed, and stopped."""

from __future__ import annotations

import json

import pytest

from tests.guest.package import Volume

from .toolkit import Toolkit, eventually
from .vms import control, declare, guest, start, stop

pytestmark = pytest.mark.container


def listed(toolkit: Toolkit, vm: str) -> str:
    return toolkit.sh(f"microvm -l | grep '^{vm}:'").strip()


@pytest.mark.core
def test_a_full_disk_is_seen_and_resumed(toolkit: Toolkit, vm: str) -> None:
    package = guest(
        vm,
        shutdown="none",
        volumes=(Volume(image="full/data.img", size_mb=3, serial="data"),),
        disks=("data",),
        # As packages that are built from declarations have it.
        qemu_args=("-trace", "enable=vm_state_notify"),
        **control(vm),
    )
    declare(toolkit, package)
    full = f"/var/lib/microvms/{vm}/full"
    toolkit.sh(
        f"mkdir -p {full} && mount -t tmpfs -o size=64k none {full} && chown microvm: {full} && "
        f"{{ dd if=/dev/zero of={full}/fill bs=4k || true; }}"
    )
    try:
        start(toolkit, vm, ready=False)
        state = eventually(
            lambda: listed(toolkit, vm),
            lambda line: "paused" in line,
            120,
            "the guest is not seen to be paused",
        )
        assert state == f"{vm}: current({vm}), paused(io-error): microvm resume {vm}"
        assert toolkit.sh(f"microvm list {vm}").splitlines()[-1].endswith("  io-error")
        # At the moment when it happened.
        toolkit.await_line(vm, "vm_state_notify running 0 reason")
        assert any("(io-error)" in line for line in toolkit.journal(vm))
        (row,) = json.loads(toolkit.sh(f"microvm list --json {vm}"))
        assert (row["paused"], row["command"]) == ("io-error", f"microvm resume {vm}")
        refused = toolkit.host.run(["microvm", "resume", vm], check=False)
        assert refused.returncode == 1
        assert refused.stderr == (
            f"microvm: the hypervisor has paused microVM {vm} again (io-error); "
            "one of its disks cannot be written: free space on its file system\n"
        )
        toolkit.sh(f"rm {full}/fill")
        assert toolkit.sh(f"microvm resume {vm}") == f"{vm}: resumed, was paused (io-error)\n"
        toolkit.await_line(vm, f"GUEST {vm}: disk data write: ok")
        toolkit.await_line(vm, f"GUEST {vm}: ready")
        assert listed(toolkit, vm) == f"{vm}: current({vm})"

        assert toolkit.sh(f"microvm pause {vm}") == f"{vm}: paused\n"
        assert "paused(paused)" in listed(toolkit, vm)
        assert toolkit.sh(f"microvm pause {vm}") == f"{vm}: is paused already (paused)\n"
        lines, result, _ = stop(toolkit, vm)
        assert "the guest was paused (paused): resumed it, so that it can shut down" in lines
        assert f"GUEST {vm}: powering off" in lines
        assert result == "success"
    finally:
        toolkit.sh(f"systemctl stop microvm@{vm}; umount {full}", check=False)


def test_a_guest_that_has_never_run_is_not_waited_for(toolkit: Toolkit, vm: str) -> None:
    declare(toolkit, guest(vm, qemu_args=("-S",), **control(vm)))
    start(toolkit, vm, ready=False)
    eventually(
        lambda: listed(toolkit, vm),
        lambda line: "paused(prelaunch)" in line,
        30,
        "the guest is not seen to wait",
    )
    lines, result, seconds = stop(toolkit, vm)
    assert "no guest runs in the hypervisor (prelaunch): ending the hypervisor by SIGTERM" in lines
    assert (result, seconds < 20) == ("success", True)
