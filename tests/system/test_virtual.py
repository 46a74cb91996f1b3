# SPDX-License-Identifier: MIT
"""What takes a real machine: macvtaps and their nodes, udev, vsock, limits, a real reboot.

The host is emulated where the developer's machine has no KVM, so that seconds are long there;
microVMs in it run with KVM.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.guest.image import Image
from tests.guest.package import Guest, Macvtap, Share, Stub, Tap
from tests.host.container import kvm_works
from tests.host.fixtures import require_virtual
from tests.host.virtual import VirtualHost

from .rounds import rounds, spread
from .shooting import shooting
from .toolkit import IMAGE, SOURCES, Toolkit, eventually
from .udev import check_that_udev_keeps, check_what_udev_would_do, owners, rules_of_others
from .vms import no_helper_stays

pytestmark = pytest.mark.virtual

# The card that the host has for it (tests/host/virtual.py).
SPARE = "spare0"
# Where udev reads rules that last until the next boot.


@pytest.fixture(scope="module")
def machine() -> Iterator[Toolkit]:
    """A virtual host with the toolkit."""
    require_virtual()
    with VirtualHost() as host:
        toolkit = Toolkit(host)
        toolkit.install()
        toolkit.build_image()
        yield toolkit


def test_the_whole_package(machine: Toolkit) -> None:
    """2 taps with queues, a macvtap, 3 shares, all for a guest under KVM, and all gone after."""
    sources = {"plain": "/srv/with a space", "home/alice": "/srv/alice", "ro": "/srv/ro"}
    for source in sources.values():
        machine.sh(f"mkdir -p '{source}' && echo 'from {source}' > '{source}/hello'")
    before = machine.footprint()
    machine.create(
        Guest(
            name="whole",
            image=Image(Path(IMAGE)),
            placement="refer",
            image_prefix=IMAGE,
            cpus=2,
            taps=(
                Tap(name="whole0", mac="02:00:00:00:01:01", address="10.77.1.2/24"),
                Tap(name="whole1", mac="02:00:00:00:01:02", address="10.77.2.2/24"),
            ),
            macvtaps=(
                Macvtap(
                    name="whole2",
                    mac="02:00:00:00:01:03",
                    link=SPARE,
                    mode="bridge",
                    address="10.0.3.9/24",
                ),
            ),
            shares=(
                Share(tag="plain", source=sources["plain"], mount="/mnt/plain"),
                Share(tag="home/alice", source=sources["home/alice"], mount="/mnt/alice"),
                Share(tag="ro", source=sources["ro"], mount="/mnt/ro", read_only=True),
            ),
            # The other side of the spare card: reached through the macvtap alone.
            pings=("10.0.3.2",),
        )
    )
    machine.systemctl("start", "microvm@whole", timeout=120)
    machine.sh("ip address add 10.77.1.1/24 dev whole0")
    lines = machine.await_line("whole", "GUEST whole: ready", timeout=180)
    text = "\n".join(lines)
    for mac in ("02:00:00:00:01:01", "02:00:00:00:01:02", "02:00:00:00:01:03"):
        assert any(mac in line and "driver virtio_net" in line for line in lines), text
    for tag, source in sources.items():
        assert f"GUEST whole: share {tag} file hello: from {source}" in lines, text
    assert "GUEST whole: share ro write: Read-only file system" in lines, text
    assert "GUEST whole: share plain write: ok" in lines, text
    assert "GUEST whole: ping 10.0.3.2 ok" in lines, text
    assert "1 received" in machine.sh("ping -c1 -W20 10.77.1.2")

    index = machine.host.read("/sys/class/net/whole2/ifindex").strip()
    assert machine.sh(f"stat -c '%U:%G %a' /dev/tap{index}").strip() == "microvm:microvm 600"
    details = machine.sh("ip -details link show whole2")
    assert "macvtap mode bridge" in details
    assert "ALLMULTI" in details or "allmulti 1" in details, details
    assert machine.host.read("/proc/sys/net/ipv6/conf/whole2/disable_ipv6") == "1\n"
    assert "inet6" not in machine.sh("ip address show whole2")

    main = machine.property("microvm@whole", "MainPID")
    limits = machine.host.read(f"/proc/{main}/limits").splitlines()
    (locked,) = [line for line in limits if line.startswith("Max locked memory")]
    (files,) = [line for line in limits if line.startswith("Max open files")]
    assert locked.split()[3] == "unlimited"
    assert files.split()[3] == "1048576"
    assert "accel=kvm" in machine.host.read(f"/proc/{main}/cmdline")

    machine.systemctl("stop", "microvm@whole", timeout=120)
    assert machine.property("microvm@whole", "Result") == "success"
    machine.await_footprint(before, timeout=60)
    assert not machine.host.exists(f"/dev/tap{index}")
    machine.remove("whole")


def test_a_drop_in_makes_the_macvtaps_node_alices(machine: Toolkit) -> None:
    machine.sh("id alice 2>/dev/null || useradd --create-home alice")
    machine.create(
        Stub(
            name="hers",
            macvtaps=(Macvtap(name="hers0", mac="02:00:00:00:02:01", link=SPARE, mode="private"),),
        )
    )
    machine.host.write(
        "/etc/systemd/system/microvm@hers.service.d/user.conf",
        "[Service]\nUser=alice\nGroup=alice\n",
    )
    machine.systemctl("daemon-reload")
    before = machine.footprint()
    machine.systemctl("start", "microvm@hers", timeout=120)
    index = machine.host.read("/sys/class/net/hers0/ifindex").strip()
    assert owners(machine, f"/dev/tap{index}") == ["alice:alice 600"]
    check_that_udev_keeps(machine, f"/sys/class/macvtap/tap{index}", f"/dev/tap{index}")
    opened = machine.host.run(
        ["python3", "-c", f"open('/dev/tap{index}', 'r+b', 0); print('opened')"],
        user="alice",
        check=False,
    )
    assert opened.stdout == "opened\n", opened.stderr
    machine.systemctl("stop", "microvm@hers", timeout=120)
    machine.await_footprint(before, timeout=60)
    machine.remove("hers")


def test_udev_gives_the_macvtaps_node_to_the_vm(machine: Toolkit) -> None:
    machine.create(
        Stub(
            name="its",
            macvtaps=(Macvtap(name="its0", mac="02:00:00:00:05:01", link=SPARE, mode="private"),),
        )
    )
    before = machine.footprint()
    machine.systemctl("start", "microvm@its", timeout=120)
    index = machine.host.read("/sys/class/net/its0/ifindex").strip()
    node, device = f"/dev/tap{index}", f"/sys/class/macvtap/tap{index}"
    assert owners(machine, node) == ["microvm:microvm 600"]
    check_that_udev_keeps(machine, device, node)
    check_what_udev_would_do(machine, device, "microvm")

    machine.systemctl("stop", "microvm@its", timeout=120)
    machine.await_footprint(before, timeout=60)
    machine.remove("its")


# As a hypervisor that a guest has taken over may do, with the macvtap that it holds.
CHANGE_ADDRESS = """
import fcntl, os, struct, sys
node = os.open(sys.argv[1], os.O_RDWR)
address = bytes.fromhex("0200000005ff")
fcntl.ioctl(node, 0x8924, struct.pack("16sH6s16x", b"", 1, address))
"""


def test_a_macvtap_whose_address_the_vm_changed_goes_as_well(machine: Toolkit) -> None:
    machine.create(
        Stub(
            name="moved",
            macvtaps=(Macvtap(name="moved0", mac="02:00:00:00:05:02", link=SPARE, mode="bridge"),),
        )
    )
    before = machine.footprint()
    # The second start would find what the first has left.
    for _ in range(2):
        machine.systemctl("start", "microvm@moved", timeout=120)
        index = machine.host.read("/sys/class/net/moved0/ifindex").strip()
        machine.host.run(["python3", "-c", CHANGE_ADDRESS, f"/dev/tap{index}"], user="microvm")
        address = machine.host.read("/sys/class/net/moved0/address").strip()
        assert address == "02:00:00:00:05:ff"
        machine.systemctl("stop", "microvm@moved", timeout=120)
        machine.await_footprint(before, timeout=60)
    machine.remove("moved")


def test_udev_understands_the_rules(machine: Toolkit) -> None:
    told = machine.sh("udevadm verify /usr/local/lib/udev/rules.d/49-microvm-host.rules 2>&1")
    assert "Success: 1" in told, told


def test_udev_gives_the_shared_nodes_to_hypervisors(machine: Toolkit) -> None:
    nodes = ("/dev/vhost-net", "/dev/vhost-vsock")
    assert owners(machine, *nodes) == ["root:kvm 660"] * 2
    with rules_of_others(machine, "50-udev-default.rules", ""):
        # A distribution that has nothing to say of these.
        machine.sh(f"chown root:root {' '.join(nodes)} && chmod 600 {' '.join(nodes)}")
        # Which has udev look at nodes that are there.
        machine.sh(f"make -C {SOURCES} install", timeout=600)
        assert owners(machine, *nodes) == ["root:kvm 660"] * 2
    look = "udevadm trigger --settle --action=change --subsystem-match=misc"
    with rules_of_others(machine, "50-udev-default.rules", 'KERNEL=="vhost-*", MODE="0666"\n'):
        machine.sh(look)
        assert owners(machine, *nodes) == ["root:kvm 666"] * 2
    machine.sh(look)
    assert owners(machine, *nodes) == ["root:kvm 660"] * 2
    assert owners(machine, "/dev/vfio/vfio", "/dev/kvm") == ["root:root 666", "root:kvm 660"]


@pytest.mark.fault
@pytest.mark.parametrize("verb", ["macvtap-interfaces-up", "macvtap-interfaces-down"])
def test_a_helper_of_macvtaps_is_killed(machine: Toolkit, verb: str) -> None:
    """Killed while it makes them, it leaves none; while it deletes them, the next stop does."""
    vm = "cut"
    macvtaps = tuple(
        Macvtap(name=f"{vm}{number}", mac=f"02:00:00:00:06:0{number}", link=SPARE, mode="bridge")
        for number in range(2)
    )
    machine.create(Stub(name=vm, macvtaps=macvtaps))
    before = machine.footprint()

    def cycle(verb: str) -> int:
        done = machine.host.run(["microvm", verb, vm], check=False, timeout=120)
        return done.returncode

    with shooting(machine, verb) as shots:
        shots.watch()
        assert (cycle("start"), cycle("stop")) == (0, 0)
        for at in spread(len(shots.seen()), 1):
            if verb.endswith("-up"):
                shots.arm(at)
                assert cycle("start") != 0
            else:
                assert cycle("start") == 0
                shots.arm(at)
                cycle("stop")
            (shot,) = shots.seen()
            if verb.endswith("-down"):
                # It is what the next start and stop are for.
                assert (cycle("start"), cycle("stop")) == (0, 0), shot
            machine.systemctl("reset-failed")
            machine.await_footprint(before, timeout=60)
            assert (cycle("start"), cycle("stop")) == (0, 0), shot
            machine.await_footprint(before, timeout=60)
    machine.remove(vm)


def test_a_macvtap_that_cannot_be_made_is_refused(machine: Toolkit) -> None:
    machine.create(
        Stub(
            name="lost",
            taps=(Tap(name="lost0", mac="02:00:00:00:03:01"),),
            macvtaps=(Macvtap(name="lost1", mac="02:00:00:00:03:02", link="eth77", mode="bridge"),),
        )
    )
    before = machine.footprint()
    started = machine.host.run(["systemctl", "start", "microvm@lost"], check=False, timeout=120)
    assert started.returncode
    assert "macvtap lost1 is to stand on eth77, which this host lacks" in machine.status("lost")
    machine.systemctl("reset-failed")
    machine.await_footprint(before, timeout=60)
    machine.remove("lost")


def test_ssh_over_vsock(machine: Toolkit) -> None:
    """A real login through the proxy of `microvm ssh`, on the loopback CID."""
    machine.sh(
        "modprobe vsock_loopback; test -e /root/.ssh/id_ed25519 || "
        "ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519; "
        "cat /root/.ssh/id_ed25519.pub >> /root/.ssh/authorized_keys"
    )
    # sshd, on a connection that systemd took: as guests do it.
    machine.host.write(
        "/etc/systemd/system/vsock-sshd.socket",
        "[Socket]\nListenStream=vsock::2222\nAccept=yes\n",
    )
    machine.host.write(
        "/etc/systemd/system/vsock-sshd@.service",
        "[Service]\nExecStart=-/usr/sbin/sshd -i\nStandardInput=socket\nRuntimeDirectory=sshd\n",
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("start", "vsock-sshd.socket")
    proxy = "python3 -IS /usr/local/lib/microvm-host/microvm_host/vsock.py 2222 cid:1"
    done = machine.host.run(
        ["ssh", "-o", f"ProxyCommand={proxy}", "-o", "ProxyUseFdpass=yes"]
        + ["-o", "StrictHostKeyChecking=no", "root@anything", "echo", "over vsock"],
        timeout=120,
    )
    assert done.stdout == "over vsock\n"


@pytest.fixture
def tree(machine: Toolkit) -> Iterator[Share]:
    """The host's own root as a share, without what is mounted in it: a whole Debian."""
    machine.sh("mkdir -p /srv/tree && mount --bind / /srv/tree")
    yield Share(tag="tree", source="/srv/tree", mount="/mnt/tree", read_only=True)
    machine.sh("umount /srv/tree")


@pytest.mark.fault
def test_guests_say_that_they_are_ready_over_vsock(machine: Toolkit, tree: Share) -> None:
    """Two VMs with one port, told by systemd's own systemd-notify in them."""
    before = machine.footprint()
    names = ("seq", "stream")
    for number, name in enumerate(names):
        machine.create(
            Guest(
                name=name,
                image=Image(Path(IMAGE)),
                placement="refer",
                image_prefix=IMAGE,
                shares=(tree,),
                vsock_cid=100 + number,
                readiness="guest",
                notify_socket=f"vsock{'' if name == 'seq' else '-stream'}:2:9000",
                notify_tree="/mnt/tree",
            )
        )
    units = [f"microvm@{name}" for name in names]
    times = rounds(1, 2)
    for _ in range(times):
        # Both at once: one waits for the other's port before it starts at all.
        machine.systemctl("start", *units, timeout=300)
        for unit, name in zip(units, names, strict=True):
            assert machine.property(unit, "ActiveState") == "active"
            assert machine.property(unit, "StatusText") == (
                f"Running qemu from /opt/packages/{name}; the guest says: Said by systemd-notify."
            )
            main = machine.property(unit, "MainPID")
            assert "qemu" in machine.sh(f"readlink /proc/{main}/exe")
        no_helper_stays(machine)
        machine.systemctl("stop", *units, timeout=120)
        machine.await_footprint(before, timeout=60)
    waited = [
        line for name in names for line in machine.journal(name) if ": waiting for it" in line
    ]
    assert len(waited) == times, waited
    assert all("vsock port 9000 is taken, perhaps by microVM s" in line for line in waited)
    for name in names:
        machine.remove(name)


@pytest.mark.fault
def test_no_ready_is_lost_over_vsock(machine: Toolkit) -> None:
    """Said before the hypervisor has even been executed, by four VMs at once, two with one port.

    The kernel's own vsock, but no guests: what says it is a process of this host, on the loopback
    CID, which is not one that a package may have.
    """
    ports = {"vocal0": 9100, "vocal1": 9100, "vocal2": 9101, "vocal3": 9102}
    total = rounds(8, 200)
    before = machine.footprint()
    machine.sh("modprobe vsock_loopback")
    for name, port in ports.items():
        machine.create(
            Stub(
                name=name,
                vsock_cid=77,
                readiness="guest",
                notify_socket=f"vsock:2:{port}",
                # A socket of sequenced packets, as the guest's systemd has it.
                prepare=f"printf READY=1 | socat - VSOCK-CONNECT:1:{port},type=5",
            )
        )
        machine.host.write(
            f"/etc/systemd/system/microvm@{name}.service.d/loopback.conf",
            "[Service]\nTimeoutStartSec=300\nRestart=no\n"
            f"ExecStartPre=+sed -i 's/\\t77\\t/\\t1\\t/' /run/microvm-host/{name}/booted\n",
        )
    machine.systemctl("daemon-reload")
    units = [f"microvm@{name}" for name in ports]
    for _ in range(total // len(ports)):
        machine.systemctl("restart", *units, timeout=600)
    for name in ports:
        assert machine.property(f"microvm@{name}", "ActiveState") == "active"
        told = [line for line in machine.journal(name) if "the guest is ready after" in line]
        assert len(told) == total // len(ports)
    machine.systemctl("stop", *units, timeout=300)
    for name in ports:
        machine.remove(name)
    machine.await_footprint(before, timeout=60)


@pytest.mark.skipif(
    not kvm_works(), reason="boots a whole Debian as a guest: too slow where its host is emulated"
)
def test_the_guests_own_systemd(machine: Toolkit, tree: Share) -> None:
    """systemd boots in the guest, says that it is ready, and takes an ssh by machined's address."""
    before = machine.footprint()
    uuid = "12345678-1234-1234-1234-123456789abc"
    machine.sh(
        "test -e /root/.ssh/id_ed25519 || ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519; "
        "cat /root/.ssh/id_ed25519.pub >> /root/.ssh/authorized_keys"
    )
    machine.create(
        Guest(
            name="real",
            image=Image(Path(IMAGE)),
            placement="refer",
            image_prefix=IMAGE,
            # The other one has no tables for the credential to stand in.
            machine="q35",
            memory_mb=512,
            shares=(tree,),
            vsock_cid=77,
            machine_uuid=uuid,
            register=True,
            readiness="guest",
            systemd_tree="/mnt/tree",
            # As little as has sshd's socket: the CPU is emulated, with another one on top.
            kernel_args=(
                "systemd.unit=basic.target",
                # The way into the host that the tree is of; it would wait for a card.
                "systemd.mask=test-host-channel.service",
                "systemd.mask=systemd-udevd.service",
                "systemd.mask=systemd-udevd-control.socket",
                "systemd.mask=systemd-udevd-kernel.socket",
                "systemd.mask=systemd-udev-trigger.service",
                "systemd.mask=systemd-binfmt.service",
                "systemd.mask=systemd-journal-flush.service",
            ),
        )
    )
    machine.host.write(
        "/etc/systemd/system/microvm@real.service.d/slow.conf",
        "[Service]\nTimeoutStartSec=400\nRestart=no\n",
    )
    machine.systemctl("daemon-reload")
    machine.systemctl("start", "microvm@real", timeout=420)
    status = machine.property("microvm@real", "StatusText")
    assert status.startswith("Running qemu from /opt/packages/real; the guest says: "), status
    lines = machine.journal("real")
    assert any("handing over to systemd" in line for line in lines)
    machined = machine.sh(
        "for i in $(seq 100); do machinectl show real 2>/dev/null && break; sleep 0.1; done"
    ).splitlines()
    assert {f"Id={uuid.replace('-', '')}", "VSockCID=77", "SSHAddress=vsock/77"} <= {*machined}
    # By systemd's own proxy, and sshd on a socket that its generator made in the guest.
    ssh = "ssh -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null vsock/77"
    assert uuid in machine.sh(f"{ssh} cat /sys/class/dmi/id/product_uuid", timeout=300)
    machine.sh(f"{ssh} systemctl poweroff", timeout=300, check=False)
    eventually(
        lambda: machine.property("microvm@real", "ActiveState"),
        lambda state: state == "inactive",
        200,
        "the guest did not power off",
    )
    assert machine.property("microvm@real", "Result") == "success"
    machine.await_footprint(before, timeout=60)
    machine.remove("real")


def test_btrfs_does_not_copy_disks_on_write(machine: Toolkit) -> None:
    machine.sh(
        "truncate -s 300M /srv/btrfs.img && mkfs.btrfs -q /srv/btrfs.img && mkdir -p /srv/btrfs && "
        "mount -o loop /srv/btrfs.img /srv/btrfs && install -d -o microvm -g microvm /srv/btrfs/vm "
        "&& mkdir -p /etc/microvms"
    )
    machine.host.write(
        "/etc/microvms/nocow.toml",
        f'autostart = false\nkernel = "{IMAGE}/vmlinuz"\ninitrd = "{IMAGE}/initrd"\n'
        '[[volumes]]\nimage = "/srv/btrfs/vm/raw.img"\nsize = 16\nfsType = "vfat"\n'
        '[[volumes]]\nimage = "/srv/btrfs/vm/qcow2.img"\nsize = 16\nfsType = "vfat"\n'
        'imageType = "qcow2"\n',
    )
    machine.sh("microvm apply")
    machine.systemctl("start", "microvm@nocow", timeout=120)
    # The package's script makes them, and then runs the hypervisor.
    shown = eventually(
        # Each is made under another name, which may go while it is looked at.
        lambda: machine.sh("lsattr /srv/btrfs/vm", check=False).splitlines(),
        lambda lines: {line.rpartition("/")[2] for line in lines} == {"raw.img", "qcow2.img"},
        60,
        "the images are not made",
    )
    assert all("C" in line.partition(" ")[0] for line in shown), shown
    machine.remove("nocow")
    machine.sh("umount /srv/btrfs && rm -r /srv/btrfs /srv/btrfs.img")


def test_up_again_after_a_real_reboot(machine: Toolkit) -> None:
    machine.create(Stub(name="always", taps=(Tap(name="always0", mac="02:00:00:00:04:01"),)))
    machine.systemctl("enable", "--now", "microvm@always", timeout=120)
    machine.host.write("/etc/microvms/broken.toml", "runner = \n")
    machine.host.reboot()
    assert machine.systemctl("is-active", "microvm@always").strip() == "active"
    assert machine.host.exists("/sys/class/net/always0")
    for module in ("tun", "macvtap", "vhost_net", "vhost_vsock"):
        assert machine.host.exists(f"/sys/module/{module}"), module
    # The generator has only the kernel's log to say what it skipped.
    log = machine.sh("journalctl --no-pager -b -k -o cat -t microvm-generator")
    assert "/etc/microvms/broken.toml:1: is not TOML" in log
    machine.systemctl("stop", "microvm@always", timeout=120)
    machine.remove("always")
    machine.sh("rm /etc/microvms/broken.toml; systemctl daemon-reload")


def test_a_declared_guest_under_kvm(machine: Toolkit, tree: Share) -> None:
    """KVM and vhost are found, a macvtap with queues is opened, and the guest says it is ready.

    Where it is to say so, it knows by the credential that a systemd would read.
    """
    before = machine.footprint()
    machine.sh("mkdir -p /etc/microvms")
    machine.host.write(
        "/etc/microvms/kvm.toml",
        f"""\
autostart = false
kernel = "{IMAGE}/vmlinuz"
initrd = "{IMAGE}/initrd"
vcpu = 2
mem = 256
readiness = "guest"
vsock.cid = 55
kernelParams = [
    "quiet", "loglevel=3", "guest.name=kvm", "guest.share=tree,/mnt/tree", "guest.prompt=1",
    "guest.notify=/mnt/tree,credential", "guest.net=02:00:00:00:05:05,10.77.5.2/24",
    "guest.net=02:00:00:00:05:06,10.0.3.9/24", "guest.ping=10.0.3.2",
]

[[interfaces]]
type = "tap"
id = "kvm0"
mac = "02:00:00:00:05:05"

[[interfaces]]
type = "macvtap"
id = "kvm1"
mac = "02:00:00:00:05:06"
macvtap = {{ link = "{SPARE}", mode = "bridge" }}

[[shares]]
tag = "tree"
source = "{tree.source}"
proto = "virtiofs"
readOnly = true
""",
    )
    # A busy host that is emulated itself takes its time.
    machine.host.write(
        "/etc/systemd/system/microvm@kvm.service.d/slow.conf",
        "[Service]\nTimeoutStartSec=600\nRestart=no\n",
    )
    # It reloads systemd, too.
    machine.sh("microvm apply")
    machine.systemctl("start", "microvm@kvm", timeout=620)
    lines = machine.journal("kvm")
    text = "\n".join(lines)
    assert "GUEST kvm: vsock present" in lines, text
    for mac in ("02:00:00:00:05:05", "02:00:00:00:05:06"):
        assert any(f" {mac} " in line and "driver virtio_net mq 2" in line for line in lines), text
    # The other side of the spare card: reached through the macvtap alone.
    assert "GUEST kvm: ping 10.0.3.2 ok" in lines, text
    # On the line that the prompt began.
    assert any(line.endswith("GUEST kvm: notifies vsock:2:9055") for line in lines), text
    assert machine.property("microvm@kvm", "StatusText").endswith(
        "; the guest says: Said by systemd-notify."
    )
    main = machine.property("microvm@kvm", "MainPID")
    command = machine.host.read(f"/proc/{main}/cmdline")
    assert "microvm,accel=kvm," in command and ",vhost=on" in command
    # The same console as where nobody waits for the guest.
    typed = machine.host.spawn(["microvm", "console", "kvm"])
    assert typed.stdin is not None
    typed.stdin.write("hello\r")
    typed.stdin.flush()
    machine.await_line("kvm", "GUEST kvm: console read: hello")
    machine.systemctl("stop", "microvm@kvm", timeout=120)
    assert "console read: hello" in typed.communicate(timeout=30)[0]
    assert typed.returncode == 0
    machine.remove("kvm")
    machine.await_footprint(before, timeout=60)
