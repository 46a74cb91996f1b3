# SPDX-License-Identifier: MIT
"""A VM with a user of its own: made, kept apart from others, taken over, and taken away."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guest.package import Share, Stub, Tap

from .toolkit import Toolkit, eventually

pytestmark = [pytest.mark.container, pytest.mark.core]

CONNECT = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1]); print('in')"


@pytest.fixture
def other(toolkit: Toolkit, vm: str) -> Iterator[str]:
    """A second VM."""
    name = f"{vm}.Other"
    yield name
    toolkit.remove(name)


def package(name: str) -> Stub:
    return Stub(
        name=name,
        taps=(Tap(name=f"{name[:3]}{'b' if '.' in name else 'a'}", mac="02:00:00:00:00:01"),),
        shares=(Share(tag="data", source="/srv/data", socket="data.sock"),),
        prepare="test -e disk.img || echo secret >disk.img",
    )


def test_two_vms_with_users_of_their_own(toolkit: Toolkit, vm: str, other: str) -> None:
    """Neither gets at the other's disk, sockets and directory, nor does the user of all VMs."""
    toolkit.sh("mkdir -p /srv/data")
    drop_in = f"/etc/systemd/system/microvm@{other}.service.d"
    users = {}
    for name in (vm, other):
        path = toolkit.put(package(name))
        toolkit.host.run(["microvm", "create", name, "--runner", path, "--user", "auto", "--start"])
        main = toolkit.property(f"microvm@{name}", "MainPID")
        users[name] = toolkit.sh(f"stat -c %U /proc/{main}").strip()
        assert toolkit.sh(f"id -Gn {users[name]}").split() == [users[name], "kvm"]
        toolkit.await_line(name, f"started as {users[name]}:{users[name]} in ")
        state = f"/var/lib/microvms/{name}"
        assert toolkit.sh(f"stat -c '%U:%G %a' {state}").strip() == f"root:{users[name]} 1771"
        for file in ("disk.img", "data.sock"):
            eventually(
                lambda path=f"{state}/{file}": toolkit.host.exists(path),  # type: ignore[misc]
                bool,
                60,
                f"there is no {file}",
            )
            shown = toolkit.sh(f"stat -c '%U:%G %a' {state}/{file}").strip()
            assert shown == f"{users[name]}:{users[name]} 600", file
        assert users[name] in toolkit.sh(f"ip -d link show {package(name).taps[0].name}")
    assert users[vm] == f"microvm-{vm}"
    assert users[other].startswith("microvm-") and len(users[other]) == 31
    state = f"/var/lib/microvms/{vm}"
    for user in (users[other], "microvm"):
        for argv in (
            ["cat", f"{state}/disk.img"],
            ["ls", state],
            ["touch", f"{state}/new"],
            ["python3", "-c", CONNECT, f"{state}/data.sock"],
        ):
            done = toolkit.host.run(argv, user=user, check=False)
            assert "ermission denied" in done.stderr, (user, argv)
    own = ["python3", "-c", CONNECT, f"{state}/data.sock"]
    assert toolkit.host.run(own, user=users[vm]).stdout == "in\n"

    # It goes with its drop-in, and comes back as the same user.
    toolkit.host.run(["microvm", "stop", other])
    number = toolkit.sh(f"id -u {users[other]}")
    toolkit.host.run(["microvm", "remove", "--yes", other])
    assert not toolkit.host.exists(drop_in)
    assert toolkit.property(f"microvm@{other}", "User") == "microvm"
    path = toolkit.put(package(other))
    toolkit.host.run(["microvm", "create", other, "--runner", path, "--user", "auto"])
    assert toolkit.sh(f"id -u {users[other]}") == number
    assert toolkit.property(f"microvm@{other}", "User") == users[other]


def test_a_failed_creation_leaves_no_drop_in(toolkit: Toolkit, vm: str) -> None:
    argv = ["microvm", "create", vm, "--runner", "/nowhere", "--user", "auto"]
    assert toolkit.host.run(argv, check=False).returncode == 78
    assert not toolkit.host.exists(f"/etc/systemd/system/microvm@{vm}.service.d")
    argv[-1] = "nobody-here"
    assert "who does not exist" in toolkit.host.run(argv, check=False).stderr
    assert not toolkit.host.exists(f"/var/lib/microvms/{vm}")


def test_a_declared_vm(toolkit: Toolkit, vm: str) -> None:
    """From the shared user to its own, and an administrator's drop-in above both."""
    path = toolkit.put(
        Stub(name=vm, prepare="test -e disk.img || echo secret >disk.img; cat disk.img")
    )
    declaration = f"/etc/microvms/{vm}.toml"
    toolkit.host.write(declaration, f'runner = "{path}"\n')
    toolkit.host.run(["microvm", "apply"])
    disk = f"/var/lib/microvms/{vm}/disk.img"
    toolkit.await_line(vm, "secret")
    assert toolkit.sh(f"stat -c '%U:%G %a' {disk}") == "microvm:microvm 600\n"
    toolkit.host.run(["microvm", "stop", vm])

    toolkit.host.write(declaration, f'runner = "{path}"\nuser = "auto"\nautostart = false\n')
    toolkit.host.run(["microvm", "apply"])
    user = f"microvm-{vm}"
    assert toolkit.property(f"microvm@{vm}", "User") == user
    refused = toolkit.host.run(["microvm", "adopt", vm, "--user", "auto"], check=False)
    assert "its declaration says which user it has" in refused.stderr
    toolkit.sh(f"echo root >/var/lib/microvms/{vm}/roots; chmod 644 /var/lib/microvms/{vm}/roots")
    done = toolkit.host.run(["microvm", "adopt", vm])
    assert done.stdout == f"{vm}: runs as {user}, who was given 1 files\n"
    assert toolkit.sh(f"stat -c '%U:%G %a' {disk}") == f"{user}:{user} 600\n"
    assert toolkit.sh(f"stat -c %U /var/lib/microvms/{vm}/roots") == "root\n"
    toolkit.systemctl("start", f"microvm@{vm}")
    assert "running" in toolkit.host.run(["microvm", "adopt", vm], check=False).stderr
    assert toolkit.sh(f"stat -c %U /proc/{toolkit.property(f'microvm@{vm}', 'MainPID')}") == (
        f"{user}\n"
    )
    toolkit.host.run(["microvm", "stop", vm])

    toolkit.sh("id alice 2>/dev/null || useradd --create-home alice")
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/override.conf", "[Service]\nUser=alice\n"
    )
    toolkit.systemctl("daemon-reload")
    assert toolkit.property(f"microvm@{vm}", "User") == "alice"
