# SPDX-License-Identifier: MIT
"""Declared VMs of hypervisors that are not to be had here, each run with a stand-in for it.

What is seen is real as far as the host goes: taps, shares, images and users, the start, readiness,
the stop, and the real APIs on real sockets. No guest is; standin.py says what stands in for what.
"""

from __future__ import annotations

import json

import pytest

from .toolkit import IMAGE, SOURCES, Toolkit, eventually

pytestmark = pytest.mark.container

PROGRAMS = {
    "cloud-hypervisor": "cloud-hypervisor",
    "firecracker": "firecracker",
    "crosvm": "crosvm",
    "kvmtool": "lkvm",
    "stratovirt": "stratovirt",
    "alioth": "alioth",
}
# Those that say when their guests are ready: there is no vsock of the kernel's in a container.
READY = ("cloud-hypervisor", "firecracker")
SHARES = ("cloud-hypervisor", "crosvm", "stratovirt", "alioth")
QUEUES = {"cloud-hypervisor": 2, "stratovirt": 2, "alioth": 2}
VMLINUX = "/opt/stand-in/vmlinux"


@pytest.fixture(params=PROGRAMS)
def hypervisor(toolkit: Toolkit, request: pytest.FixtureRequest) -> str:
    program = PROGRAMS[request.param]
    toolkit.sh("mkdir -p /opt/stand-in /etc/microvms /srv/stood")
    toolkit.sh(
        f"install -m 755 {SOURCES}/tests/system/standin.py /usr/local/bin/{program}; "
        f"python3 -B {SOURCES}/tests/system/standin.py kernel {VMLINUX}"
    )
    found = request.param
    assert isinstance(found, str)
    return found


def declaration(vm: str, hypervisor: str, *lines: str) -> str:
    kernel = VMLINUX if hypervisor == "firecracker" else f"{IMAGE}/vmlinuz"
    found = [
        f'hypervisor = "{hypervisor}"',
        f'kernel = "{kernel}"',
        f'initrd = "{IMAGE}/initrd"',
        "autostart = false",
        "vcpu = 2",
        'kernelParams = ["quiet"]',
        *lines,
        "[vsock]" if hypervisor in READY else "",
        "[[interfaces]]",
        'type = "tap"',
        f'id = "{vm}t"',
        "[[volumes]]",
        'image = "disk.img"',
        "size = 16",
        'fsType = "none"',
    ]
    if hypervisor in READY:
        found.insert(0, 'readiness = "guest"')
    if hypervisor in SHARES:
        found += ["[[shares]]", 'tag = "stood"', 'source = "/srv/stood"', 'proto = "virtiofs"']
    return "\n".join(found) + "\n"


def said(toolkit: Toolkit, vm: str) -> list[str]:
    return [
        line.removeprefix("STAND-IN: ")
        for line in toolkit.journal(vm)
        if line.startswith("STAND-IN: ")
    ]


def test_start_readiness_and_stop(toolkit: Toolkit, vm: str, hypervisor: str) -> None:
    more = ["balloon = true"]
    if hypervisor == "alioth":
        # It has none that anything could blow up.
        more = []
    elif hypervisor == "cloud-hypervisor":
        more.append("hotplugMem = 512")
    toolkit.host.write(f"/etc/microvms/{vm}.toml", declaration(vm, hypervisor, *more))
    before = toolkit.footprint()
    assert f"{vm}: installed /var/lib/microvm-host/packages/" in toolkit.sh("microvm apply")
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.await_line(vm, f"{hypervisor} runs", timeout=20)
    heard = said(toolkit, vm)
    loaded = "b'\\x7fELF'" if hypervisor == "firecracker" else "b'MZ"
    assert any(line.startswith(f"loaded {loaded}") for line in heard), heard
    assert any(line.startswith("initrd of ") and "of 0 bytes" not in line for line in heard)
    assert any("disk.img of 16777216 bytes" in line for line in heard), heard
    assert f"tap {vm}t with {QUEUES.get(hypervisor, 1)} queues" in heard
    assert any(line.startswith("share ") for line in heard) == (hypervisor in SHARES), heard
    # What is shown is what runs, but for the interpreter of the stand-in.
    words = json.loads(toolkit.sh(f"microvm show {vm} --json"))
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    running = toolkit.host.read(f"/proc/{main}/cmdline").split("\0")[:-1]
    assert running[1:] == words
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    if hypervisor in READY:
        assert any("the guest is ready after" in line for line in toolkit.journal(vm))
        # Nothing was heard before it stood in.
        assert toolkit.property(f"microvm@{vm}", "StatusText").endswith("says: Stood in")
    balloon = f"/var/lib/microvms/{vm}/booted/bin/microvm-balloon"
    assert toolkit.host.exists(balloon) == (hypervisor != "alioth")
    if hypervisor in ("cloud-hypervisor", "firecracker", "stratovirt"):
        # By the package's script, since none of them speaks QMP to the host.
        toolkit.sh(f"microvm balloon {vm} 256")
        expected = {
            # Of mem = 512 and as much again that is plugged.
            "cloud-hypervisor": 'PUT /api/v1/vm.resize {"desired_balloon":805306368}',
            "firecracker": 'PATCH /balloon {"amount_mib":256}',
            "stratovirt": "qmp balloon",
        }
        assert expected[hypervisor] in said(toolkit, vm)
    toolkit.systemctl("stop", f"microvm@{vm}")
    journal = toolkit.journal(vm)
    if hypervisor in ("cloud-hypervisor", "firecracker", "crosvm"):
        button = "Ctrl-Alt-Del" if hypervisor == "firecracker" else "power button"
        assert f"STAND-IN: guest: {button}" in journal
        assert "STAND-IN: guest: off" in journal
        assert any("asked once, by its package's script" in line for line in journal), journal
    else:
        assert any("SIGTERM" in line for line in journal), journal
        assert not any("guest: " in line for line in journal)
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    left = {f"left /var/lib/microvms/{vm}/{name}" for name in sockets_left(vm, hypervisor)}
    toolkit.await_footprint(before | left)
    # Sockets that were left are no hindrance.
    toolkit.systemctl("start", f"microvm@{vm}")
    eventually(
        lambda: said(toolkit, vm),
        lambda lines: lines.count(f"{hypervisor} runs") == 2,
        20,
        "it did not start again",
    )
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.await_footprint(before | left)


def sockets_left(vm: str, hypervisor: str) -> list[str]:
    """What each leaves, as the real one does; control sockets the host clears away."""
    return {
        "cloud-hypervisor": ["notify.vsock"],
        "firecracker": ["notify.vsock"],
        "kvmtool": [f".lkvm/{vm}.sock"],
        "stratovirt": [f"{vm}.sock"],
    }.get(hypervisor, [])


@pytest.mark.parametrize("hypervisor", READY, indirect=True)
def test_the_hosts_own_power_button(toolkit: Toolkit, vm: str, hypervisor: str) -> None:
    """A package without a script: the host presses it over the control socket."""
    toolkit.host.write(f"/etc/microvms/{vm}.toml", declaration(vm, hypervisor, 'socket = ""'))
    toolkit.sh("microvm apply")
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.systemctl("stop", f"microvm@{vm}")
    journal = toolkit.journal(vm)
    assert any(f"asked once, by the power button ({hypervisor})" in line for line in journal)
    assert "STAND-IN: guest: off" in journal
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"


@pytest.mark.parametrize("hypervisor", READY, indirect=True)
def test_ssh_by_the_hypervisors_own_vsock(toolkit: Toolkit, vm: str, hypervisor: str) -> None:
    """A real ssh, as far as the name of the sshd that it reaches."""
    toolkit.host.write(f"/etc/microvms/{vm}.toml", declaration(vm, hypervisor))
    toolkit.sh("microvm apply")
    toolkit.systemctl("start", f"microvm@{vm}")
    done = toolkit.host.run(["microvm", "ssh", vm, "-v"], check=False, timeout=60)
    assert "remote software version StandIn" in done.stderr
    assert {"vsock CONNECT 22", "sshd hears SSH"} <= {*said(toolkit, vm)}
    # Another port is nobody's, and the host knows no address to try.
    done = toolkit.host.run(["microvm", "ssh", vm, "-p", "2222"], check=False, timeout=60)
    assert done.returncode == 255
    assert "/notify.vsock: nobody listens in the guest; does the guest's sshd" in done.stderr
    # Once it does, that is tried.
    package = f"/var/lib/microvms/{vm}/booted/share/microvm"
    mac = toolkit.host.read(f"{package}/tap-macs").split()[1]
    toolkit.sh(f"ip addr add 192.0.2.1/24 dev {vm}t; ip link set {vm}t up")
    toolkit.sh(f"ip neigh replace 192.0.2.7 lladdr {mac} dev {vm}t nud permanent")
    argv = ["microvm", "ssh", vm, "-p", "2222"]
    done = toolkit.host.run(argv, check=False, timeout=60)
    assert "nobody listens in the guest; trying 192.0.2.7" in done.stderr
    # The socket that is in its place is not the VM's user's.
    toolkit.sh(f"cd /var/lib/microvms/{vm} && mv notify.vsock kept && ln -s kept notify.vsock")
    done = toolkit.host.run(["microvm", "ssh", vm], check=False, timeout=60)
    assert "notify.vsock: is not a socket of the VM's user" in done.stderr
    toolkit.systemctl("stop", f"microvm@{vm}")


@pytest.mark.parametrize("hypervisor", READY, indirect=True)
def test_a_package_for_another_host(toolkit: Toolkit, vm: str, hypervisor: str) -> None:
    """`microvm build` makes what `microvm create` runs; and refuses what cannot be, early."""
    toolkit.sh("mkdir -p /opt/packages")
    toolkit.host.write(f"/opt/packages/{vm}.toml", declaration(vm, hypervisor))
    toolkit.sh(f"microvm build /opt/packages/{vm}.toml -o /opt/packages/{vm}")
    toolkit.sh(f"rm /opt/packages/{vm}.toml; microvm create {vm} --runner /opt/packages/{vm}")
    toolkit.systemctl("start", f"microvm@{vm}")
    assert f"{hypervisor} runs" in said(toolkit, vm)
    toolkit.systemctl("stop", f"microvm@{vm}")
    wrong = declaration(vm, hypervisor).replace(VMLINUX, f"{IMAGE}/initrd")
    toolkit.host.write(f"/opt/packages/{vm}-2.toml", wrong.replace("/vmlinuz", "/initrd"))
    argv = ["microvm", "build", f"/opt/packages/{vm}-2.toml", "-o", f"/opt/packages/{vm}-2"]
    done = toolkit.host.run(argv, check=False)
    toolkit.sh(f"rm /opt/packages/{vm}-2.toml")
    assert done.returncode == 78
    assert "is no kernel that is known, and" in done.stderr
    assert not toolkit.host.exists(f"/opt/packages/{vm}-2")
