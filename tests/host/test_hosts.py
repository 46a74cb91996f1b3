# SPDX-License-Identifier: MIT
"""Tests of the test hosts: what every other test takes for granted.

Both kinds go through the same tests, since they promise the same; what only one can do follows.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.host import cache, leftovers, root
from tests.host.container import ContainerHost
from tests.host.fixtures import container_host, require_container, require_virtual, virtual_host
from tests.host.interface import CommandFailed, CommandHost, HostError, inner_argv
from tests.host.virtual import VirtualHost

__all__ = ["container_host", "virtual_host"]  # fixtures are found by name

Hosts = Callable[[], CommandHost]

BOTH = (
    pytest.param("container", marks=pytest.mark.container),
    pytest.param("virtual", marks=pytest.mark.virtual),
)


@pytest.fixture(params=BOTH)
def host(request: pytest.FixtureRequest) -> CommandHost:
    """The session's host of each kind."""
    give: Hosts = request.getfixturevalue(f"{request.param}_host")
    return give()


@pytest.fixture(params=BOTH)
def own_host(request: pytest.FixtureRequest) -> Iterator[CommandHost]:
    """A host of each kind that the test may spoil."""
    require_container() if request.param == "container" else require_virtual()
    with ContainerHost() if request.param == "container" else VirtualHost() as fresh:
        yield fresh


def test_systemd_is_up(host: CommandHost) -> None:
    assert host.run(["systemctl", "is-system-running"]).stdout == "running\n"
    assert host.run(["systemctl", "--failed", "--quiet"]).stdout == ""
    assert host.start_seconds > 0


@pytest.mark.parametrize("code", [0, 1, 78, 255])
def test_exit_codes_pass_through(host: CommandHost, code: int) -> None:
    assert host.run(["sh", "-c", f"exit {code}"], check=False).returncode == code


def test_a_signal_becomes_an_exit_code_and_no_output(host: CommandHost) -> None:
    done = host.run(["sh", "-c", "kill -KILL $$"], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (137, "", "")


def test_output_and_input_are_kept_apart(host: CommandHost) -> None:
    done = host.run(["sh", "-c", "cat; echo err >&2"], input="grüße\nwithout an end")
    assert (done.stdout, done.stderr) == ("grüße\nwithout an end", "err\n")
    assert host.run(["cat"]).stdout == ""  # no input is an end of file, not the terminal


def test_words_stay_words(host: CommandHost) -> None:
    words = ["a b", "$HOME", "*", "'", '"', "\\", "new\nline", "", "ä", "; false"]
    assert host.run(["printf", "%s\\0", *words]).stdout.split("\0")[:-1] == words


def test_a_failure_shows_the_output(host: CommandHost) -> None:
    with pytest.raises(CommandFailed, match=r"(?s)exit 3.*said this"):
        host.run(["sh", "-c", "echo said this >&2; exit 3"])


def test_large_output(host: CommandHost) -> None:
    done = host.run(["sh", "-c", "head -c 5000000 /dev/zero | tr '\\0' x"])
    assert len(done.stdout) == 5_000_000


def test_the_environment_is_clean(host: CommandHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEAKED", "yes")
    lines = host.run(["env"], env={"GIVEN": "a b"}).stdout.splitlines()
    assert "GIVEN=a b" in lines
    assert "HOME=/root" in lines
    assert not [line for line in lines if line.startswith("LEAKED")]
    assert host.run(["pwd"]).stdout == "/\n"


def test_another_user(host: CommandHost) -> None:
    host.run(["sh", "-c", "id alice 2>/dev/null || useradd --create-home alice"])
    line = "id -un; id -Gn; echo $HOME; cat"
    done = host.run(["sh", "-c", line], user="alice", input="in")
    assert done.stdout == "alice\nalice\n/home/alice\nin"
    assert host.run(["true"], user="nobody-like-this", check=False).returncode == 1
    assert host.run(["loginctl", "list-sessions", "--no-legend"]).stdout == ""


def test_a_timeout_leaves_no_command(host: CommandHost) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        host.run(["sleep", "4711"], timeout=1)
    # Where it has to be told to the other side, that takes a moment.
    for _ in range(50):
        if host.run(["pgrep", "-f", "^sleep 4711"], check=False).returncode == 1:
            return
        time.sleep(0.2)
    pytest.fail("the command still runs")


def test_commands_run_at_the_same_time(host: CommandHost) -> None:
    outputs: dict[int, str] = {}
    # Each ends when all are there.
    meet = "touch /run/meet/$0; until [ $(ls /run/meet | wc -l) = 12 ]; do sleep 0.1; done; echo $0"
    host.run(["sh", "-c", "rm -rf /run/meet; mkdir /run/meet"])

    def run(number: int) -> None:
        outputs[number] = host.run(["sh", "-c", meet, str(number)], timeout=120).stdout

    threads = [threading.Thread(target=run, args=(number,)) for number in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outputs == {number: f"{number}\n" for number in range(12)}


def test_spawned_commands_talk_and_take_signals(host: CommandHost) -> None:
    line = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.1; done"
    with host.spawn(["sh", "-c", line]) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "bye\n"
        assert process.wait(timeout=30) == 7
    with host.spawn(["cat"]) as process:
        out, _ = process.communicate("through\n", timeout=30)
        assert (out, process.returncode) == ("through\n", 0)


def test_files(host: CommandHost) -> None:
    path = "/var/tmp/made/by test/ä"
    assert not host.exists(path)
    host.write(path, "one\n", mode=0o640)
    assert host.exists(path)
    assert host.read(path) == "one\n"
    assert host.run(["stat", "-c", "%a %U:%G", path]).stdout == "640 root:root\n"
    host.run(["ln", "-sfn", "/nowhere", "/var/tmp/dangling"])
    assert host.exists("/var/tmp/dangling")
    with pytest.raises(CommandFailed, match="No such file"):
        host.read("/var/tmp/not there")


def test_copies(host: CommandHost, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "program").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "sub" / "program").chmod(0o755)
    (tmp_path / "link").symlink_to("sub/program")
    (tmp_path / "left-out").mkdir()
    host.copy(tmp_path, "/opt/copied", exclude=["left-out"])
    assert host.run(["/opt/copied/link"]).stdout == "ran\n"
    assert host.run(["stat", "-c", "%U", "/opt/copied/sub/program"]).stdout == "root\n"
    assert not host.exists("/opt/copied/left-out")
    host.copy(tmp_path / "sub" / "program", "/opt/single/renamed")
    assert host.run(["/opt/single/renamed"]).stdout == "ran\n"


def test_taps_and_transient_units(host: CommandHost) -> None:
    host.run(["ip", "tuntap", "add", "mode", "tap", "name", "t0"])
    assert host.exists("/sys/class/net/t0/tun_flags")
    host.run(["ip", "link", "delete", "t0"])
    argv = ["systemd-run", "--wait", "--pipe", "--quiet", "--collect"]
    done = host.run([*argv, "sh", "-c", "echo unit; exit 5"], check=False)
    assert (done.stdout, done.returncode) == ("unit\n", 5)


def test_python_has_what_the_toolkit_imports(host: CommandHost) -> None:
    host.run(["/usr/bin/python3", "-c", "import click, pyroute2, pystemd"])


def test_reboot_and_power_keep_files(own_host: CommandHost) -> None:
    host = own_host
    first = host.read("/proc/sys/kernel/random/boot_id")
    host.write("/var/lib/kept", "kept")
    unit = "[Service]\nType=oneshot\nExecStart=touch /run/started\n"
    unit += "[Install]\nWantedBy=multi-user.target\n"
    host.write("/etc/systemd/system/at-boot.service", unit)
    host.run(["systemctl", "enable", "at-boot.service"])
    host.reboot()
    assert host.read("/var/lib/kept") == "kept"
    assert host.exists("/run/started")
    second = host.read("/proc/sys/kernel/random/boot_id")
    assert second != first
    host.poweroff()
    with pytest.raises(HostError):
        host.run(["true"])
    host.start()
    assert host.read("/var/lib/kept") == "kept"
    assert host.read("/proc/sys/kernel/random/boot_id") not in (first, second)
    host.stop()
    assert _traces() == []


@pytest.mark.container
@pytest.mark.parametrize("suite", root.SUITES)
def test_every_suite_boots(container_host: Callable[[str], ContainerHost], suite: str) -> None:
    host = container_host(suite)
    assert host.run(["systemctl", "is-system-running"]).stdout == "running\n"
    assert f"VERSION_CODENAME={'forky' if suite == 'sid' else suite}" in host.read(
        "/etc/os-release"
    )


@pytest.mark.container
def test_containers_do_not_meet(container_host: Callable[[], ContainerHost]) -> None:
    one = container_host()
    with ContainerHost() as two:
        two.write("/etc/only-here", "")
        two.run(["ip", "link", "add", "b0", "type", "bridge"])
        assert not one.exists("/etc/only-here")
        assert not one.exists("/sys/class/net/b0")
        assert not Path("/sys/class/net/b0").exists()
        two.run(["systemctl", "stop", "systemd-logind.service"])
        active = one.run(["systemctl", "is-active", "systemd-logind.service"])
        assert active.stdout == "active\n"


@pytest.mark.container
def test_a_stopped_container_starts_fresh() -> None:
    require_container()
    host = ContainerHost()
    with host:
        host.write("/etc/changed", "")
        host.run(["ip", "link", "add", "b0", "type", "bridge"])
        inside = host.spawn(["sh", "-c", "echo up; exec sleep 1000"])
        assert inside.stdout is not None and inside.stdout.readline() == "up\n"
    assert _traces() == []
    with host:
        assert not host.exists("/etc/changed")


@pytest.mark.container
def test_a_host_of_a_killed_owner_is_cleared_away() -> None:
    require_container()
    script = (
        "import os, signal\n"
        "from tests.host.container import ContainerHost\n"
        "host = ContainerHost()\n"
        "host.start()\n"
        "print(host.name, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    checkout = Path(__file__).parents[2]
    argv = [sys.executable, "-c", script]
    killed = subprocess.run(argv, cwd=checkout, stdout=subprocess.PIPE, text=True)
    name = killed.stdout.strip()
    assert (cache.hosts() / name).exists()
    leftovers.clean()
    assert not (cache.hosts() / name).exists()
    assert [trace for trace in _traces(name)] == []


@pytest.mark.virtual
def test_what_only_a_virtual_host_has(virtual_host: Callable[[], VirtualHost]) -> None:
    host = virtual_host()
    host.run(
        ["modprobe", "-a", "kvm_amd", "vhost_net", "vhost_vsock", "macvtap", "vfio-pci", "tun"]
    )
    for node in ("/dev/kvm", "/dev/vhost-net", "/dev/vhost-vsock", "/dev/vfio/vfio"):
        assert host.exists(node), node
    assert int(host.run(["sh", "-c", "ls /sys/kernel/iommu_groups | wc -l"]).stdout) > 1
    assert "memory" in host.read("/sys/fs/cgroup/cgroup.controllers").split()


@pytest.mark.virtual
def test_a_macvtap_stands_on_the_virtual_hosts_spare_card(
    virtual_host: Callable[[], VirtualHost],
) -> None:
    host = virtual_host()
    words = ["link", "spare0", "name", "mv0", "type", "macvtap", "mode", "bridge"]
    host.run(["ip", "link", "add", *words])
    try:
        index = host.read("/sys/class/net/mv0/ifindex").strip()
        host.run(["udevadm", "settle"])
        assert host.exists(f"/dev/tap{index}")
    finally:
        host.run(["ip", "link", "delete", "mv0"])


def test_argv_is_no_line_of_shell() -> None:
    with pytest.raises(TypeError, match="sequence of words"):
        inner_argv("ls -l")


def test_a_recipe_has_its_own_name() -> None:
    names = {root.recipe_hash(suite) for suite in root.SUITES}
    assert len(names) == len(root.SUITES)


def _traces(name: str | None = None) -> list[str]:
    """What hosts of this process, or the host of that name, have left on the machine."""
    mark = name or f"test-host-c{os.getpid()}-"
    other = name or f"test-host-v{os.getpid()}-"
    marks = (mark, other)
    found = [path.name for path in cache.hosts().iterdir() if path.name.startswith(marks)]
    table = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    found += [line for line in table if any(f"/{each}" in line for each in marks)]
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().decode(errors="replace")
        except OSError:
            continue
        found += [command for each in marks if f"/{each}" in command]
    live = _live_names()
    return [trace for trace in found if not any(each in trace for each in live)]


def _live_names() -> list[str]:
    """Hosts of the session, which run on while a test looks for what its own has left."""
    return [path.parent.name for path in cache.hosts().glob("*/owner") if _held(path)]


def _held(owner: Path) -> bool:
    lock = cache.try_lock(owner)
    if lock is None:
        return True
    lock.close()
    return False
