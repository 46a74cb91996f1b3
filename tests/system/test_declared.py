# SPDX-License-Identifier: MIT
"""A TOML file becomes a VM: built here, seen from inside, stopped, changed and rolled back."""

from __future__ import annotations

import json

import pytest

from .rounds import spread
from .shooting import shooting
from .toolkit import IMAGE, Toolkit

pytestmark = pytest.mark.container

# What the guest is told to look at; it reports on its console.
DECLARATION = """\
autostart = false
kernel = "{image}/vmlinuz"
initrd = "{image}/initrd"
mem = 2048
kernelParams = [
    "quiet", "loglevel=3", "guest.name={vm}",
    "guest.net={tap},10.77.9.2/24", "guest.net={user},10.0.2.15/24,10.0.2.2",
    "guest.share=data,/mnt", "guest.share=ro,/ro", "guest.disk=first",
    "guest.ping=10.0.2.2",
]
balloon = true

[[interfaces]]
type = "tap"
id = "{vm}t"
mac = "{tap}"

[[interfaces]]
type = "user"
id = "net"
mac = "{user}"

[[forwardPorts]]
host = {{ address = "127.0.0.1", port = 18080 }}
guest.port = 80

[[shares]]
tag = "data"
source = "/srv/a dir"
proto = "virtiofs"

[[shares]]
tag = "ro"
source = "/srv/ro"
proto = "virtiofs"
readOnly = true

[[volumes]]
image = "disk.img"
size = 16
fsType = "none"
serial = "first"
"""
TAP, USER = "02:00:00:00:09:01", "02:00:00:00:09:02"


def declare(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("mkdir -p /etc/microvms '/srv/a dir' /srv/ro")
    for directory in ("/srv/a dir", "/srv/ro"):
        toolkit.sh(f"echo 'from {directory}' >'{directory}/hello'")
    toolkit.host.write(
        f"/etc/microvms/{vm}.toml", DECLARATION.format(vm=vm, image=IMAGE, tap=TAP, user=USER)
    )


def test_a_declaration_becomes_a_guest(toolkit: Toolkit, vm: str) -> None:
    declare(toolkit, vm)
    before = toolkit.footprint()
    assert f"{vm}: installed /var/lib/microvm-host/packages/" in toolkit.sh("microvm apply")
    # As any other: systemd starts it, and sees it whole.
    toolkit.systemctl("start", f"microvm@{vm}", timeout=120)
    lines = toolkit.await_line(vm, f"GUEST {vm}: ready", timeout=180)
    text = "\n".join(lines)
    for mac in (TAP, USER):
        assert any(f" {mac} " in line and "driver virtio_net" in line for line in lines), text
    assert any(
        f"GUEST {vm}: block" in line and "16777216 bytes ro 0 serial first" in line
        for line in lines
    ), text
    assert f"GUEST {vm}: disk first write: ok" in lines, text
    assert f"GUEST {vm}: share data file hello: from /srv/a dir" in lines, text
    assert f"GUEST {vm}: share data write: ok" in lines, text
    assert f"GUEST {vm}: share ro file hello: from /srv/ro" in lines, text
    assert f"GUEST {vm}: share ro write: Read-only file system" in lines, text
    assert f"GUEST {vm}: ping 10.0.2.2 ok" in lines, text
    assert any(f"GUEST {vm}: rng" in line and "gave 16 bytes" in line for line in lines), text
    assert toolkit.host.exists("/srv/a dir/from-guest")
    assert not toolkit.host.exists("/srv/ro/from-guest")
    # Through the forwarded port, to the guest's web server.
    fetch = (
        "import urllib.request as u; print(u.urlopen('http://127.0.0.1:18080/').read().decode())"
    )
    assert f"GUEST {vm}: hello from Linux" in toolkit.host.run(["python3", "-c", fetch]).stdout
    # The finished command line, word by word, is what runs.
    words = json.loads(toolkit.sh(f"microvm show {vm} --json"))
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    assert toolkit.host.read(f"/proc/{main}/cmdline").split("\0")[:-1] == words
    # The balloon, by the package's own script, as the VM's user would.
    state = f"/var/lib/microvms/{vm}"
    assert toolkit.sh(f"cd {state} && booted/bin/microvm-balloon 200").strip().isdigit()
    # The power button of QEMU's first socket, by the package's script.
    toolkit.systemctl("stop", f"microvm@{vm}", timeout=120)
    assert f"GUEST {vm}: powering off" in toolkit.journal(vm)
    journal = "\n".join(toolkit.journal(vm))
    assert "asked the guest to shut down by its package's script" in journal
    assert "the guest shut down in " in journal or "the guest powered off in " in journal
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    toolkit.await_footprint(before)


def test_history_and_rollback(toolkit: Toolkit, vm: str) -> None:
    declare(toolkit, vm)
    toolkit.sh("microvm apply")
    state = f"/var/lib/microvms/{vm}"
    first = toolkit.sh(f"readlink {state}/current").strip()
    # Nothing changed, and nothing is built anew.
    assert f"{vm}: up to date" in toolkit.sh(f"microvm update {vm}")
    # A drop-in says otherwise.
    toolkit.sh(f"mkdir -p /etc/microvms/{vm}.toml.d")
    toolkit.host.write(f"/etc/microvms/{vm}.toml.d/10-more.toml", "vcpu = 2\n")
    assert f"{vm}: updated from {first} to " in toolkit.sh(f"microvm update {vm}")
    second = toolkit.sh(f"readlink {state}/current").strip()
    assert second != first
    # One kernel on the disk for both.
    inodes = toolkit.sh(f"stat -c %i {first}/lib/kernel {second}/lib/kernel").split()
    assert inodes[0] == inodes[1]
    shown = toolkit.sh(f"microvm history {vm}")
    assert shown.splitlines()[2:] == ["    vcpu = 2 (new)"], shown
    shown = toolkit.sh(f"microvm history {vm} --diff")
    assert "-    -smp 1 \\" in shown and "+    -smp 2 \\" in shown, shown
    assert "+multi_queue" in shown
    assert f"rolled back from {second} to {first}" in toolkit.sh(f"microvm rollback {vm}")
    assert toolkit.sh(f"readlink {state}/current").strip() == first
    # Neither boot nor `apply` undoes that, and an explicit wish does.
    assert "stays rolled back" in toolkit.sh("microvm apply")
    toolkit.systemctl("start", f"install-microvm@{vm}")
    assert toolkit.sh(f"readlink {state}/current").strip() == first
    toolkit.sh(f"microvm update {vm}")
    assert toolkit.sh(f"readlink {state}/current").strip() == second
    entries = json.loads(toolkit.sh(f"microvm history {vm} --json"))
    assert [entry["package"] for entry in entries] == [first, second, first, second]
    assert [entry["rolled_back_from"] for entry in entries] == [None, None, second, None]
    assert [entry["current"] for entry in entries] == [False, True, False, True]
    assert entries[2]["keys"] == [{"key": "vcpu", "before": 2, "after": None}]
    # What it says of the unit holds with an update, too.
    toolkit.host.write(f"/etc/microvms/{vm}.toml.d/30-times.toml", "shutdown_timeout = 77\n")
    assert f"{vm}: up to date" in toolkit.sh(f"microvm update {vm}")
    # The guest's 77 seconds, and 15 for ending the hypervisor by force.
    assert toolkit.property(f"microvm@{vm}", "TimeoutStopUSec") == "1min 32s"
    # A wrong one is told with its place, and leaves everything as it is.
    toolkit.host.write(f"/etc/microvms/{vm}.toml.d/20-wrong.toml", '\nmem = "1G"\n')
    done = toolkit.host.run(["microvm", "update", vm], check=False)
    assert done.returncode == 78
    assert f"{vm}.toml.d/20-wrong.toml:2: mem = '1G' is not a whole number" in done.stderr
    assert toolkit.sh(f"readlink {state}/current").strip() == second
    assert toolkit.sh("ls -A /var/lib/microvm-host/packages").split() == sorted(
        each.rpartition("/")[2] for each in (first, second)
    )
    # What is gone is collected.
    toolkit.sh(f"rm -r /etc/microvms/{vm}.toml*; microvm remove -y {vm}")
    assert toolkit.sh("ls -A /var/lib/microvm-host/packages /var/lib/microvm-host/history").split(
        "\n"
    ) == ["/var/lib/microvm-host/history:", "", "/var/lib/microvm-host/packages:", ""]
    assert not toolkit.host.exists(state)


# Prints what of the store is a package, as each start checks it; fails for one that is none.
_CHECK = """
import os, sys
sys.path.insert(0, "/usr/local/lib/microvm-host")
from microvm_host import runner
store = "/var/lib/microvm-host/packages"
for name in sorted(os.listdir(store)):
    if not name.startswith("."):
        print(runner.load(f"{store}/{name}").path)
"""


@pytest.mark.fault
def test_the_helper_that_installs_is_killed(toolkit: Toolkit, vm: str) -> None:
    """`current` is the old package or the new one, each whole, and the next one installs it."""
    declare(toolkit, vm)
    unit, state = f"install-microvm@{vm}", f"/var/lib/microvms/{vm}"
    toolkit.systemctl("start", unit)
    toolkit.sh(f"mkdir -p /etc/microvms/{vm}.toml.d")

    def change(number: int) -> None:
        toolkit.host.write(f"/etc/microvms/{vm}.toml.d/10-more.toml", f"mem = {256 + number}\n")

    with shooting(toolkit, "install") as shots:
        change(1)
        shots.watch()
        toolkit.systemctl("restart", unit)
        effects = len(shots.seen())
        assert effects > 10
        for number, at in enumerate(spread(effects, 4), 2):
            old = toolkit.sh(f"readlink {state}/current").strip()
            change(number)
            shots.arm(at)
            toolkit.systemctl("restart", unit, check=False)
            (shot,) = shots.seen()
            what = f"install that was killed before {at}, {shot}"
            assert toolkit.property(unit, "Result") == "signal", what
            whole = toolkit.host.run(["python3", "-c", _CHECK]).stdout.split()
            now = toolkit.sh(f"readlink {state}/current").strip()
            assert now in whole and old in whole, what
            toolkit.systemctl("restart", unit)
            new = toolkit.sh(f"readlink {state}/current").strip()
            assert new != old and now in (old, new), what
            assert f"-m {256 + number}" in toolkit.sh(f"cat {new}/bin/microvm-run"), what
            # What was half-way is gone, too.
            whole = toolkit.host.run(["python3", "-c", _CHECK]).stdout.split()
            assert new in whole, what
            assert len(toolkit.sh("ls -A /var/lib/microvm-host/packages").split()) == len(whole)
