# SPDX-License-Identifier: MIT
"""`systemctl start`, `stop` and `restart` of VMs, with all that is set up for them."""

from __future__ import annotations

import time

import pytest

from tests.guest.package import Share, Stub, Tap

from .toolkit import Toolkit, eventually
from .vms import guest, no_helper_stays

pytestmark = pytest.mark.container


@pytest.mark.core
def test_a_real_guest_sees_its_taps_and_shares(toolkit: Toolkit, vm: str) -> None:
    """2 taps with queues, 3 shares: nested tag, source with a space, read-only."""
    sources = {"plain": "/srv/with a space", "home/alice": "/srv/alice", "ro": "/srv/ro"}
    for source in sources.values():
        toolkit.sh(f"mkdir -p '{source}' && echo 'from {source}' > '{source}/hello'")
    legacy = toolkit.host.suite == "bookworm"
    before = toolkit.footprint()
    toolkit.create(
        guest(
            vm,
            cpus=2,
            taps=(
                Tap(name=f"{vm}a", mac="02:00:00:00:01:01", address="10.77.1.2/24"),
                Tap(name=f"{vm}b", mac="02:00:00:00:01:02", address="10.77.2.2/24"),
            ),
            shares=(
                Share(tag="plain", source=sources["plain"], mount="/mnt/plain"),
                Share(tag="home/alice", source=sources["home/alice"], mount="/mnt/alice"),
                Share(tag="ro", source=sources["ro"], mount="/mnt/ro", read_only=True),
            ),
        )
    )
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.sh(f"ip address add 10.77.1.1/24 dev {vm}a")
    lines = toolkit.await_line(vm, f"GUEST {vm}: ready")
    text = "\n".join(lines)
    for mac in ("02:00:00:00:01:01", "02:00:00:00:01:02"):
        assert any(f"{mac}" in line and "driver virtio_net mq 2" in line for line in lines), text
    for tag, source in sources.items():
        assert f"GUEST {vm}: share {tag} mounted" in lines, text
        assert f"GUEST {vm}: share {tag} file hello: from {source}" in lines, text
    assert f"GUEST {vm}: share plain write: ok" in lines, text
    assert f"GUEST {vm}: share ro write: Read-only file system" in lines or legacy, text
    assert not toolkit.host.exists("/srv/ro/from-guest")
    assert toolkit.host.exists("/srv/alice/from-guest")
    assert "1 received" in toolkit.sh("ping -c1 -W5 10.77.1.2")
    # The main process is the hypervisor itself, and nothing of ours has stayed.
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    assert "qemu" in toolkit.sh(f"readlink /proc/{main}/exe")
    no_helper_stays(toolkit)
    began = time.monotonic()
    toolkit.systemctl("stop", f"microvm@{vm}")
    assert time.monotonic() - began < 40
    assert f"GUEST {vm}: powering off" in toolkit.journal(vm)
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    toolkit.await_footprint(before)


@pytest.mark.core
def test_status_tells_the_story(toolkit: Toolkit, vm: str) -> None:
    path = toolkit.create(Stub(name=vm, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
    toolkit.systemctl("start", f"microvm@{vm}")
    assert f'Status: "Running qemu from {path}"' in toolkit.status(vm)
    assert toolkit.property(f"microvm-tap-interfaces@{vm}", "StatusText") == f"up: {vm}a"
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    # The package's script has something to say before it becomes that.
    eventually(
        lambda: toolkit.host.read(f"/proc/{main}/comm"),
        lambda name: name == "sleep\n",
        60,
        "it is something else",
    )
    # What the process has in the end depends on the hard limits of the machine below.
    assert toolkit.property(f"microvm@{vm}", "LimitMEMLOCK") == "infinity"
    assert toolkit.property(f"microvm@{vm}", "LimitNOFILE") == "1048576"
    assert toolkit.sh(f"readlink /proc/{main}/cwd").strip() == f"/var/lib/microvms/{vm}"
    assert any(f"STUB {vm}: started as microvm:microvm" in line for line in toolkit.journal(vm))


@pytest.mark.core
def test_restarted_twenty_times_as_fast_as_it_goes(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("mkdir -p /srv/data")
    toolkit.create(
        Stub(
            name=vm,
            taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
            shares=(Share(tag="data", source="/srv/data", mount="/mnt"),),
        )
    )
    before = toolkit.footprint()
    toolkit.sh(
        f"for i in $(seq 20); do systemctl restart microvm@{vm} || exit 1; done; "
        f"for i in $(seq 20); do systemctl stop microvm@{vm} || exit 1; "
        f"systemctl start microvm@{vm} || exit 1; "
        # Each of them whole, whatever of the stop before it was taken back.
        f"test -S /var/lib/microvms/{vm}/{vm}-virtiofs-data.sock || exit 3; "
        f"test -e /sys/class/net/{vm}a || exit 4; done",
        timeout=600,
    )
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    assert toolkit.host.exists(f"/sys/class/net/{vm}a")
    assert toolkit.host.exists(f"/var/lib/microvms/{vm}/{vm}-virtiofs-data.sock")
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.await_footprint(before)


@pytest.mark.core
def test_a_drop_in_makes_everything_alices(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("id alice 2>/dev/null || useradd --create-home alice; mkdir -p /srv/data")
    toolkit.create(
        Stub(
            name=vm,
            taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
            shares=(Share(tag="data", source="/srv/data", mount="/mnt"),),
        )
    )
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/user.conf",
        "[Service]\nUser=alice\nGroup=alice\n",
    )
    toolkit.systemctl("daemon-reload")
    toolkit.systemctl("start", f"microvm@{vm}")
    tap = toolkit.sh(f"ip -details link show {vm}a")
    assert "user alice group alice" in tap
    socket = f"/var/lib/microvms/{vm}/{vm}-virtiofs-data.sock"
    assert toolkit.sh(f"stat -c '%U:%G %a' {socket}").strip() == "alice:alice 600"
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    assert toolkit.sh(f"stat -c %U /proc/{main}").strip() == "alice"
    # Nobody else, not the user of other VMs either, can connect.
    connect = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1]); print('in')"
    refused = toolkit.host.run(["python3", "-c", connect, socket], user="microvm", check=False)
    assert "PermissionError" in refused.stderr
    allowed = toolkit.host.run(["python3", "-c", connect, socket], user="alice", check=False)
    assert allowed.stdout == "in\n", allowed.stderr
    # alice may make files in the state directory, and neither move nor remove what root decides.
    state = f"/var/lib/microvms/{vm}"
    assert toolkit.host.run(["touch", f"{state}/disk.img"], user="alice").returncode == 0
    for argv in (["rm", "-f", f"{state}/current"], ["ln", "-sfn", "/etc", f"{state}/booted"]):
        assert toolkit.host.run(argv, user="alice", check=False).returncode != 0


def test_flags_of_taps(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(
        Stub(name=vm, multi_queue=True, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),))
    )
    toolkit.systemctl("start", f"microvm@{vm}")
    assert int(toolkit.host.read(f"/sys/class/net/{vm}a/tun_flags"), 16) & 0x5102 == 0x5102
    flags = int(toolkit.host.read(f"/sys/class/net/{vm}a/flags"), 16)
    assert flags & 1, "the tap is not up"


def test_a_tap_that_was_there_is_used_and_stays(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh(f"ip tuntap add {vm}a mode tap user microvm vnet_hdr")
    try:
        toolkit.create(Stub(name=vm, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
        index = toolkit.host.read(f"/sys/class/net/{vm}a/ifindex")
        toolkit.systemctl("start", f"microvm@{vm}")
        assert int(toolkit.host.read(f"/sys/class/net/{vm}a/flags"), 16) & 1
        toolkit.host.run(["microvm", "stop", vm])
        assert toolkit.host.read(f"/sys/class/net/{vm}a/ifindex") == index
        assert not int(toolkit.host.read(f"/sys/class/net/{vm}a/flags"), 16) & 1, "is still up"
    finally:
        toolkit.sh(f"ip link del {vm}a")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        ("ip tuntap add {} mode tap user root", "belongs to user root, group any"),
        ("ip tuntap add {} mode tap user microvm", "is without vnet_hdr and multi_queue"),
        ("ip link add {} type bridge", "is no tap but a bridge"),
    ],
)
def test_a_link_that_does_not_fit_is_refused(
    toolkit: Toolkit, vm: str, make: str, complaint: str
) -> None:
    """The second of two taps: the first is taken back, and the stranger is left as it is."""
    toolkit.sh(make.format(f"{vm}b"))
    try:
        toolkit.create(
            Stub(
                name=vm,
                taps=(
                    Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),
                    Tap(name=f"{vm}b", mac="02:00:00:00:00:02"),
                ),
            )
        )
        before = toolkit.footprint()
        details = toolkit.sh(f"ip -details link show {vm}b")
        assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
        assert complaint in toolkit.status(vm)
        toolkit.systemctl("reset-failed")
        toolkit.await_footprint(before)
        assert toolkit.sh(f"ip -details link show {vm}b") == details
    finally:
        toolkit.sh(f"ip link del {vm}b")


def test_two_vms_cannot_have_one_tap(toolkit: Toolkit, vm: str) -> None:
    tap = Tap(name="shared0", mac="02:00:00:00:00:01")
    other = f"{vm}x"
    try:
        for name in (vm, other):
            toolkit.create(Stub(name=name, taps=(tap,)))
        toolkit.systemctl("start", f"microvm@{vm}")
        assert toolkit.host.run(["systemctl", "start", f"microvm@{other}"], check=False).returncode
        assert f"tap shared0 is in use by microVM {vm}" in toolkit.status(other)
        assert toolkit.property(f"microvm@{vm}", "ActiveState") == "active"
    finally:
        toolkit.remove(other)


def test_a_tap_joins_its_bridge(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(
        Stub(name=vm, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01", bridge=f"{vm}br"),))
    )
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert f"{vm}br, which is no bridge of this host" in toolkit.status(vm)
    toolkit.sh(f"ip link add {vm}br type bridge")
    try:
        toolkit.systemctl("start", f"microvm@{vm}")
        assert f"master {vm}br" in toolkit.sh(f"ip link show {vm}a")
        toolkit.host.run(["microvm", "stop", vm])
    finally:
        toolkit.sh(f"ip link del {vm}br")


@pytest.mark.fault
def test_many_taps_go_at_once_and_no_other(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh("ip link add bystander type bridge")
    try:
        toolkit.create(
            Stub(
                name=vm,
                taps=tuple(
                    Tap(name=f"{vm}t{number}", mac=f"02:00:00:00:00:{number:02x}")
                    for number in range(16)
                ),
            )
        )
        before = toolkit.footprint()
        toolkit.systemctl("start", f"microvm@{vm}")
        assert len([line for line in toolkit.footprint() if f"interface {vm}t" in line]) == 16
        # One is deleted by somebody else, and one made anew: that one is not ours any more.
        toolkit.sh(f"ip link del {vm}t3; ip link del {vm}t4; ip link add {vm}t4 type bridge")
        toolkit.systemctl("stop", f"microvm@{vm}")
        toolkit.await_footprint(before | {f"interface {vm}t4"})
        assert f"{vm}t4 was made anew by somebody else" in toolkit.sh(
            f"journalctl --no-pager -u microvm-tap-interfaces@{vm}"
        )
        toolkit.sh(f"ip link del {vm}t4")
        # The next start has all of them again.
        toolkit.systemctl("start", f"microvm@{vm}")
        assert len([line for line in toolkit.footprint() if f"interface {vm}t" in line]) == 16
        toolkit.systemctl("stop", f"microvm@{vm}")
        assert toolkit.property(f"microvm@{vm}", "Result") == "success"
        toolkit.await_footprint(before)
    finally:
        toolkit.sh("ip link del bystander")


def test_why_a_device_was_not_given_back_is_in_the_vms_journal(toolkit: Toolkit, vm: str) -> None:
    """A container has no devices, but a record of some, and a unit that gives them back."""
    toolkit.create(Stub(name=vm, pci_devices=("ffff:ff:1f.6",)))
    before = toolkit.footprint()
    record = f"/run/microvm-host/{vm}/pci-devices"
    lines = r"device\tffff:ff:1f.7\te1000e\t\t\t\nnonsense\tffff:ff:1f.5\n"
    toolkit.sh(f"mkdir -p {record.rpartition('/')[0]}; printf '{lines}' >{record}")
    try:
        assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
        toolkit.await_line(vm, "ffff:ff:1f.7 is there no more, and so not given back")
        toolkit.await_line(vm, "['nonsense', 'ffff:ff:1f.5'] is no line of this record")
        # What is done with stays on record no longer.
        assert toolkit.sh(f"cat {record}") == "nonsense\tffff:ff:1f.5\n"
    finally:
        toolkit.sh(f"rm -rf {record.rpartition('/')[0]}; systemctl reset-failed")
    toolkit.await_footprint(before)


@pytest.mark.core
def test_a_missing_source_is_an_error_before_the_vm_starts(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(
        Stub(
            name=vm,
            taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),),
            shares=(Share(tag="gone", source="/srv/not there", mount="/mnt"),),
        )
    )
    before = toolkit.footprint()
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert "/srv/not there: the source '/srv/not there' of share 'gone' does not exist" in (
        toolkit.status(vm)
    )
    assert not any(f"STUB {vm}" in line for line in toolkit.journal(vm))
    toolkit.systemctl("reset-failed")
    toolkit.await_footprint(before)


def test_a_packages_own_virtiofsd_run(toolkit: Toolkit, vm: str) -> None:
    """Without share options in files, only that script knows which share is read-only."""
    toolkit.sh("mkdir -p /srv/own /srv/own-ro; echo a > /srv/own/hello; echo b > /srv/own-ro/hello")
    before = toolkit.footprint()
    toolkit.create(
        guest(
            vm,
            share_options=False,
            virtiofsd_run=True,
            shares=(
                Share(tag="own", source="/srv/own", mount="/mnt/own"),
                Share(tag="own-ro", source="/srv/own-ro", mount="/mnt/own-ro", read_only=True),
            ),
        )
    )
    toolkit.systemctl("start", f"microvm@{vm}")
    lines = toolkit.await_line(vm, f"GUEST {vm}: ready")
    assert f"GUEST {vm}: share own write: ok" in lines
    assert f"GUEST {vm}: share own-ro write: Read-only file system" in lines
    assert "supervisord" in "\n".join(toolkit.footprint())
    toolkit.systemctl("stop", f"microvm@{vm}")
    toolkit.await_footprint(before)
    assert not any("has ended under the running guest" in line for line in toolkit.journal(vm))


def test_sources_that_would_trip_a_shell(toolkit: Toolkit, vm: str) -> None:
    """`$`, `%`, quotes, a backslash and a comma are part of the name, for systemd as well."""
    source = "/srv/$HOME %i \"q\" 'r' \\n, ünï*"
    toolkit.host.run(["mkdir", "-p", source])
    toolkit.host.write(f"{source}/hello", "odd\n")
    toolkit.create(
        guest(
            vm,
            shares=(
                Share(tag="odd", source=source, mount="/mnt/odd"),
                Share(tag="ro", source=source, mount="/mnt/ro", read_only=True),
            ),
        )
    )
    toolkit.systemctl("start", f"microvm@{vm}")
    lines = toolkit.await_line(vm, f"GUEST {vm}: ready")
    for tag in ("odd", "ro"):
        assert f"GUEST {vm}: share {tag} file hello: odd" in lines, "\n".join(lines)
    assert f"GUEST {vm}: share ro write: Read-only file system" in lines, "\n".join(lines)


@pytest.mark.core
def test_a_hypervisor_that_dies_is_up_again_with_all_that_it_needs(
    toolkit: Toolkit, vm: str
) -> None:
    toolkit.create(Stub(name=vm, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/quick.conf", "[Service]\nRestartSec=100ms\n"
    )
    toolkit.systemctl("daemon-reload")
    toolkit.systemctl("start", f"microvm@{vm}")
    first = toolkit.property(f"microvm@{vm}", "MainPID")
    toolkit.sh(f"kill -9 {first}")
    toolkit.sh(
        f"for i in $(seq 600); do sleep 0.1; p=$(systemctl show -P MainPID microvm@{vm}); "
        f"[ $p != {first} ] && [ $p != 0 ] && systemctl -q is-active microvm@{vm} && exit 0; "
        "done; exit 1"
    )
    assert toolkit.host.exists(f"/sys/class/net/{vm}a")


@pytest.mark.fault
@pytest.mark.parametrize("shutdown", ["early", "fail", "none"])
def test_stop_never_returns_before_the_hypervisor_has_ended(
    toolkit: Toolkit, vm: str, shutdown: str
) -> None:
    """Whatever the script said or did, the main process is what counts."""
    toolkit.create(
        Stub(
            name=vm,
            shutdown=shutdown,  # type: ignore[arg-type]
            # Ends by itself 8 s after its start, which is after any of these scripts.
            run="exec sleep 8" if shutdown != "none" else "exec sleep infinity",
        )
    )
    toolkit.systemctl("start", f"microvm@{vm}")
    main = toolkit.property(f"microvm@{vm}", "MainPID")
    toolkit.systemctl("stop", f"microvm@{vm}")
    assert not toolkit.host.exists(f"/proc/{main}")
    text = "\n".join(toolkit.journal(vm))
    if shutdown == "none":
        assert "nor a control socket: ending the hypervisor by SIGTERM" in text
    else:
        code = 1 if shutdown == "fail" else 0
        assert f"bin/microvm-shutdown returned {code} after" in text
        assert "the guest shut down in" in text


@pytest.mark.fault
def test_a_guest_that_does_not_listen_makes_the_stop_a_failure(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(Stub(name=vm, shutdown="hang"))
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/quick.conf",
        "[Service]\nEnvironment=MICROVM_SHUTDOWN_SECONDS=2\n",
    )
    toolkit.systemctl("daemon-reload")
    toolkit.systemctl("start", f"microvm@{vm}")
    stopped = toolkit.host.run(["microvm", "stop", vm], check=False)
    assert stopped.returncode == 1
    assert "the guest did not shut down within " in stopped.stderr
    assert toolkit.property(f"microvm@{vm}", "ActiveState") == "failed"
    assert toolkit.sh("pgrep -a sleep", check=False) == ""


def test_a_guest_asked_while_it_boots_is_asked_again(toolkit: Toolkit, vm: str) -> None:
    toolkit.create(guest(vm))
    toolkit.systemctl("start", f"microvm@{vm}")
    began = time.monotonic()
    toolkit.systemctl("stop", f"microvm@{vm}")
    assert time.monotonic() - began < 90
    text = "\n".join(toolkit.journal(vm))
    assert f"GUEST {vm}: powering off" in text
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"


def test_a_start_right_after_a_stop_is_whole(toolkit: Toolkit, vm: str) -> None:
    """The teardown of the last run may still be under way."""
    toolkit.create(Stub(name=vm, taps=(Tap(name=f"{vm}a", mac="02:00:00:00:00:01"),)))
    for _ in range(10):
        toolkit.sh(f"systemctl start microvm@{vm} && test -e /sys/class/net/{vm}a")
        toolkit.sh(
            f"systemctl stop --no-block microvm@{vm}; systemctl start microvm@{vm} && "
            f"test -e /sys/class/net/{vm}a && test -L /var/lib/microvms/{vm}/booted && "
            f"systemctl stop microvm@{vm}"
        )
