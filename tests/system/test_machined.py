# SPDX-License-Identifier: MIT
"""Registration with the real systemd-machined: 252, 257 and what sid has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guest.package import Stub, Tap

from .toolkit import Toolkit, eventually
from .vms import no_helper_stays

pytestmark = pytest.mark.container

UUID = "12345678-1234-1234-1234-123456789abc"


def shown(toolkit: Toolkit, name: str) -> dict[str, str]:
    """What machined knows of a machine; nothing of one that it does not know."""
    done = toolkit.host.run(["machinectl", "show", "--no-pager", name], check=False)
    return dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)


def await_leader(toolkit: Toolkit, name: str) -> dict[str, str]:
    """Wait until the VM is registered with the main process that it has now."""

    def is_current(found: dict[str, str]) -> bool:
        return found.get("Leader", "0") == toolkit.property(f"microvm@{name}", "MainPID")

    return eventually(lambda: shown(toolkit, name), is_current, 60, f"{name} is not registered")


def await_gone(toolkit: Toolkit, name: str) -> None:
    eventually(lambda: shown(toolkit, name), lambda found: not found, 60, f"{name} is registered")


def stub(name: str, **fields: object) -> Stub:
    tap = Tap(name=f"{name}a", mac="02:00:00:00:00:01")
    return Stub(name=name, taps=(tap,), **fields)  # type: ignore[arg-type]


@pytest.mark.core
def test_registered_and_terminated(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(stub(vm, vsock_cid=42, machine_uuid=UUID, register=True))
    before = toolkit.footprint()
    toolkit.systemctl("start", f"microvm@{vm}")
    found = await_leader(toolkit, vm)
    assert found["Id"] == UUID.replace("-", "")
    assert (found["Class"], found["Service"]) == ("vm", "microvm-host")
    assert found["Unit"] == f"microvm@{vm}.service"
    # From 257 on.
    if toolkit.host.suite != "bookworm":
        assert (found["VSockCID"], found["SSHAddress"]) == ("42", "vsock/42")
    listed = toolkit.host.run(["machinectl", "list", "--no-pager", "--no-legend"]).stdout
    assert any(line.split()[:3] == [vm, "vm", "microvm-host"] for line in listed.splitlines())
    status = toolkit.host.run(["machinectl", "status", "--no-pager", vm]).stdout
    assert f"Iface: {vm}a" in status
    assert f"microvm@{vm}.service" in status
    # Nothing stays for it.
    eventually(
        lambda: toolkit.property(f"microvm-machined@{vm}", "ActiveState"),
        lambda state: state == "inactive",
        60,
        "it goes on",
    )
    no_helper_stays(toolkit)

    toolkit.host.run(["machinectl", "terminate", vm])
    await_gone(toolkit, vm)
    eventually(
        lambda: toolkit.property(f"microvm@{vm}", "ActiveState"),
        lambda state: state == "inactive",
        60,
        "it was not stopped",
    )
    # As by `systemctl stop`: asked, and not up again by itself.
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    assert any("shutdown script" in line for line in toolkit.journal(vm))
    toolkit.await_footprint(before)


@pytest.mark.core
def test_each_run_is_registered_anew(toolkit: Toolkit, vm: str) -> None:
    """Restarted, dead and up again by itself, stopped: machined knows the main process of now."""
    toolkit.create(stub(vm, machine_uuid=UUID, register=True))
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/quick.conf", "[Service]\nRestartSec=100ms\n"
    )
    toolkit.systemctl("daemon-reload")
    toolkit.systemctl("start", f"microvm@{vm}")
    first = await_leader(toolkit, vm)["Leader"]
    toolkit.systemctl("restart", f"microvm@{vm}")
    second = await_leader(toolkit, vm)["Leader"]
    assert first != second
    toolkit.sh(f"kill -9 {second}")
    eventually(
        lambda: toolkit.property(f"microvm@{vm}", "MainPID"),
        lambda pid: pid not in ("0", second),
        20,
        "it is not up again",
    )
    await_leader(toolkit, vm)
    toolkit.systemctl("stop", f"microvm@{vm}")
    await_gone(toolkit, vm)


def test_only_who_asks_is_registered(toolkit: Toolkit, vm: str) -> None:
    # A UUID alone asks for nothing: declared guests always have one.
    toolkit.create(stub(vm, machine_uuid=UUID))
    toolkit.systemctl("start", f"microvm@{vm}")
    eventually(
        lambda: toolkit.property(f"microvm-machined@{vm}", "ConditionTimestampMonotonic"),
        lambda stamp: stamp != "0",
        20,
        "the conditions were not looked at",
    )
    assert toolkit.property(f"microvm-machined@{vm}", "ConditionResult") == "no"
    # Not a process for it.
    assert toolkit.property(f"microvm-machined@{vm}", "ExecMainPID") == "0"
    assert shown(toolkit, vm) == {}


def test_asked_for_as_microvm_nix_does(toolkit: Toolkit, vm: str) -> None:
    """Its script is not run; without a UUID of the package's, the VM has one of its name's."""
    toolkit.create(stub(vm, register=True))
    toolkit.systemctl("start", f"microvm@{vm}")
    first = await_leader(toolkit, vm)["Id"]
    assert not any("asked for" in line for line in toolkit.journal(vm))
    toolkit.systemctl("restart", f"microvm@{vm}")
    assert await_leader(toolkit, vm)["Id"] == first


@pytest.fixture
def no_machined(toolkit: Toolkit) -> Iterator[None]:
    toolkit.sh("systemctl stop systemd-machined; systemctl mask --runtime systemd-machined")
    yield
    toolkit.sh("systemctl unmask --runtime systemd-machined")


@pytest.mark.core
@pytest.mark.usefixtures("no_machined")
def test_without_machined_there_is_a_notice(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(stub(vm, machine_uuid=UUID, register=True))
    toolkit.systemctl("start", f"microvm@{vm}")
    lines = toolkit.await_line(vm, "not registered with systemd-machined: ")
    assert len([line for line in lines if "not registered" in line]) == 1
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    eventually(
        lambda: toolkit.property(f"microvm-machined@{vm}", "ActiveState"),
        lambda state: state == "inactive",
        20,
        "registration has not ended, or failed",
    )


def test_anothers_machine_of_that_name_stays(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(stub(vm, machine_uuid=UUID, register=True))
    toolkit.sh(
        f"systemd-run --unit=other-{vm} sleep infinity; "
        "busctl call org.freedesktop.machine1 /org/freedesktop/machine1 "
        f"org.freedesktop.machine1.Manager RegisterMachine sayssus {vm} 0 other container "
        f"$(systemctl show -P MainPID other-{vm}) ''"
    )
    try:
        toolkit.systemctl("start", f"microvm@{vm}")
        toolkit.await_line(vm, f"there is a machine {vm} already, of other-{vm}.service")
        assert shown(toolkit, vm)["Service"] == "other"
        assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    finally:
        toolkit.sh(f"systemctl stop other-{vm}")
