# SPDX-License-Identifier: MIT
"""What comes up at boot and goes at power-off, and `microvm apply` between boots.

On hosts of their own, since they are rebooted.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.guest.package import Stub, Tap
from tests.host.container import ContainerHost
from tests.host.fixtures import require_container

from .toolkit import Toolkit

pytestmark = pytest.mark.container


@pytest.fixture(params=["trixie", "bookworm", "sid"])
def fresh(request: pytest.FixtureRequest) -> Iterator[Toolkit]:
    """A fresh host with the toolkit."""
    require_container()
    with ContainerHost(request.param) as host:
        toolkit = Toolkit(host)
        toolkit.install()
        yield toolkit


def is_active(toolkit: Toolkit, vm: str) -> bool:
    return toolkit.property(f"microvm@{vm}", "ActiveState") == "active"


def test_boot(fresh: Toolkit) -> None:
    """Enabled, declared, declared without autostart, broken: all on one host, one reboot."""
    host = fresh.host
    assert fresh.systemctl("is-enabled", "microvms.target").strip() == "enabled"
    for name in ("enabled", "declared", "manual"):
        fresh.put(Stub(name=name, taps=(Tap(name=f"{name}0", mac="02:00:00:00:00:01"),)))
    host.run(["microvm", "create", "enabled", "--runner", "/opt/packages/enabled"])
    fresh.systemctl("enable", "microvm@enabled")
    host.write("/etc/microvms/declared.toml", 'runner = "/opt/packages/declared"\n')
    host.write("/etc/microvms/manual.toml", 'runner = "/opt/packages/manual"\nautostart = false\n')
    host.write("/etc/microvms/broken.toml", 'runner = "/opt/packages/x"\nautostrat = true\n')
    host.write("/etc/microvms/gone.toml", 'runner = "/opt/packages/gone"\n')
    host.reboot()
    for name, expected in (
        ("enabled", True),
        ("declared", True),
        ("manual", False),
        ("broken", False),
        ("gone", False),
    ):
        assert is_active(fresh, name) == expected, fresh.status(name)
    assert fresh.systemctl("is-active", "microvms.target").strip() == "active"
    assert fresh.sh("readlink /var/lib/microvms/declared/current").strip() == (
        "/opt/packages/declared"
    )
    assert "/opt/packages/gone: no runner package" in fresh.sh(
        "journalctl --no-pager -b -u install-microvm@gone"
    )
    # What the generator complains of goes to the kernel's log, where it is there; the generator
    # says the same when it is run by hand.
    by_hand = host.run(
        [
            "env",
            "MICROVM_HOST_ROOT=/",
            "sh",
            "-c",
            "mkdir -p /tmp/g && /usr/local/lib/systemd/system-generators/microvm-generator /tmp/g "
            "/tmp/g /tmp/g; ls -R /tmp/g",
        ]
    )
    assert "microvm@broken.service" not in by_hand.stdout
    assert "microvm@declared.service" in by_hand.stdout
    assert fresh.systemctl("is-enabled", "microvm@declared").strip() == "enabled-runtime"
    # One that is not declared is installed by nobody, and nothing waits for a network.
    assert fresh.property("install-microvm@enabled", "ConditionResult") == "no"
    assert fresh.property("install-microvm@declared", "ConditionResult") == "yes"
    assert fresh.property("network-online.target", "ActiveState") == "inactive"

    # A declared VM that is started by hand is installed first.
    fresh.systemctl("start", "microvm@manual")
    assert is_active(fresh, "manual")
    assert host.exists("/sys/class/net/manual0")


# What a guest needs of its host, by the target that such services are ordered before and have in
# their own transaction: as network managers, and what mounts network storage.
NEEDED = ("network", "remote-fs")


# What orders units is the same in all versions.
@pytest.mark.parametrize("fresh", ["trixie"], indirect=True)
def test_power_off_ends_guests_before_what_they_need(fresh: Toolkit) -> None:
    """Both are asked at once; network, shares and storage stay until the slower one has ended."""
    for target in NEEDED:
        fresh.host.write(
            f"/etc/systemd/system/needed-{target}.service",
            f"[Unit]\nBefore={target}.target\nWants={target}.target\n"
            "[Service]\nType=oneshot\nRemainAfterExit=yes\n"
            "ExecStart=true\nExecStop=true\n",
        )
    fresh.host.write(
        "/etc/systemd/system/var-lib-microvms.mount",
        "[Mount]\nWhat=/srv/vms\nWhere=/var/lib/microvms\nType=none\nOptions=bind\n",
    )
    # So that the next boot has the journal of this one.
    fresh.sh(
        "cp -a /var/lib/microvms /srv/vms; mkdir -p /var/log/journal; "
        "systemctl restart systemd-journald; journalctl --flush"
    )
    fresh.systemctl("daemon-reload")
    fresh.systemctl("start", "var-lib-microvms.mount", *(f"needed-{each}" for each in NEEDED))
    delays = {"quick": 0, "slow": 3}
    for name, delay in delays.items():
        fresh.create(Stub(name=name, shutdown_delay=delay))
    fresh.systemctl("start", *(f"microvm@{name}" for name in delays))
    fresh.host.poweroff()
    fresh.host.start()
    # PID 1's own lines, which are in the order of what it did.
    log = fresh.sh("journalctl --no-pager -b -1 --output=cat _PID=1").splitlines()

    def when(text: str) -> int:
        found = [number for number, line in enumerate(log) if line.startswith(text)]
        assert found, "\n".join([f"{text!r} is not in the journal:", *log[-200:]])
        return found[-1]

    ended = [when(f"Stopped microvm@{name}.service") for name in delays]
    assert max(when(f"Stopping microvm@{name}.service") for name in delays) < min(ended)
    for target in NEEDED:
        assert max(ended) < when(f"Stopping needed-{target}.service")
    assert max(ended) < when("Unmounting var-lib-microvms.mount")


def test_apply(fresh: Toolkit) -> None:
    host = fresh.host
    for name in ("one", "two"):
        fresh.put(Stub(name=name), f"/opt/packages/{name}-1")
        fresh.put(Stub(name=name), f"/opt/packages/{name}-2")
        fresh.sh(f"ln -sfn /opt/packages/{name}-1 /opt/{name}")
    host.write("/etc/microvms/one.toml", 'runner = "/opt/one"\n')
    host.write("/etc/microvms/two.toml", 'runner = "/opt/two"\nrestart_if_changed = false\n')
    would = host.run(["microvm", "apply", "--dry-run"]).stdout
    assert "one: would install /opt/packages/one-1, would start it" in would
    assert not host.exists("/var/lib/microvms/one")
    assert host.run(["microvm", "apply"]).stdout == (
        "one: installed /opt/packages/one-1, started\ntwo: installed /opt/packages/two-1, started\n"
    )
    assert is_active(fresh, "one")
    assert host.run(["microvm", "apply"]).stdout == (
        "one: up to date (/opt/packages/one-1)\ntwo: up to date (/opt/packages/two-1)\n"
    )
    main = fresh.property("microvm@two", "MainPID")
    fresh.sh("ln -sfn /opt/packages/one-2 /opt/one; ln -sfn /opt/packages/two-2 /opt/two")
    assert host.run(["microvm", "apply"]).stdout == (
        "one: updated from /opt/packages/one-1 to /opt/packages/one-2, restarted\n"
        "two: updated from /opt/packages/two-1 to /opt/packages/two-2, still runs the former: "
        "systemctl restart microvm@two.service\n"
    )
    assert fresh.sh("readlink /var/lib/microvms/one/booted").strip() == "/opt/packages/one-2"
    assert fresh.property("microvm@two", "MainPID") == main

    # One broken declaration keeps nobody else from it, and the exit code tells.
    host.write("/etc/microvms/bad.toml", "runner = 7\n")
    fresh.sh("ln -sfn /opt/packages/one-1 /opt/one")
    done = host.run(["microvm", "apply"], check=False)
    assert done.returncode == 78
    assert "/etc/microvms/bad.toml:1: runner = 7 is not a string" in done.stderr
    assert "one: updated from /opt/packages/one-2 to /opt/packages/one-1, restarted" in done.stdout


def test_uninstalling_leaves_vms_alone_and_removes_all_else(fresh: Toolkit) -> None:
    host = fresh.host
    fresh.create(Stub(name="kept"))
    host.write("/var/lib/microvms/kept/disk.img", "data")
    host.write("/etc/microvms/other.toml", 'runner = "/opt/packages/kept"\nautostart = false\n')
    fresh.systemctl("start", "microvm@kept")
    refused = host.run(["make", "-C", "/usr/src/microvm-host", "uninstall"], check=False)
    assert refused.returncode != 0
    assert "microVMs are running" in refused.stderr
    host.run(["microvm", "stop", "kept"])
    said = host.run(["make", "-s", "-C", "/usr/src/microvm-host", "uninstall"]).stdout
    assert said.splitlines() == [
        "microvm-host is removed from below /usr/local.",
        "Kept: /var/lib/microvms",
        "Kept: /etc/microvms",
        "Kept: the user microvm, and microvm-NAME of each VM that had a user of its own.",
    ]
    left = fresh.sh(
        "find / -xdev -ignore_readdir_race -name '*microvm*' -not -path '/proc/*' "
        "-not -path '/usr/src/*' -not -path '/opt/*' -not -path '/var/log/*' -not -path '/sys/*' "
        # QEMU has a machine of that name.
        "-not -name 'bios-microvm.bin' -not -name 'qemu-system-*'"
    ).splitlines()
    assert sorted(left) == ["/etc/microvms", "/var/lib/microvms"], left
    assert host.read("/var/lib/microvms/kept/disk.img") == "data"
    assert host.exists("/etc/microvms/other.toml")
    # And back again, with the VMs as they were.
    fresh.install()
    fresh.systemctl("start", "microvm@kept")


# Each step of an install looks whether the command works that is there so far.
_LOOK = """\
#!/bin/sh
install "$@" && { microvm -l >/tmp/said 2>&1 || echo "after $*: $(cat /tmp/said)" >>/tmp/broken; }
"""


def test_replacing_the_toolkit_breaks_nobody_who_starts_meanwhile(fresh: Toolkit) -> None:
    host, newer = fresh.host, "/usr/src/microvm-host.newer"
    host.write("/usr/local/bin/look", _LOOK)
    # In the newer one another name for what nearly all modules import from the first of them.
    fresh.sh(
        f"chmod 755 /usr/local/bin/look; rm -f /tmp/broken; cp -r /usr/src/microvm-host {newer}; "
        f"cd {newer} && grep -rl MicrovmHostError microvm_host | "
        "xargs sed -i 's/MicrovmHostError/OtherError/g'"
    )
    for source in (newer, "/usr/src/microvm-host"):
        done = host.run(["make", "-s", "-C", source, "install", "INSTALL=look"])
        assert not host.exists("/tmp/broken"), host.read("/tmp/broken")
        assert done.stdout.startswith("microvm-host is installed below /usr/local.\nNext: ")
        assert done.stderr == "", done.stderr
    # The tree before is there for who runs from it; those before that are not.
    assert len(fresh.sh("ls -d /usr/local/lib/microvm-host-*").split()) == 2
    fresh.sh(f"rm -r {newer} /usr/local/bin/look")


def test_a_prefix_that_systemd_does_not_see_in_time(fresh: Toolkit) -> None:
    make = ["make", "-s", "-C", "/usr/src/microvm-host", "PREFIX=/opt/prefix"]
    fresh.sh("mkdir /opt/prefix && mount -t tmpfs tmpfs /opt/prefix")
    try:
        said = fresh.host.run([*make, "install"]).stderr
        assert "/opt/prefix/lib/systemd/system lies on /opt/prefix, which is mounted after" in said
        assert "Install with PREFIX=/usr" in said
        fresh.host.run([*make, "uninstall"])
        assert fresh.sh("find /opt/prefix -type f -o -type l") == ""
    finally:
        fresh.sh("umount /opt/prefix && rmdir /opt/prefix")
        fresh.install()
