# SPDX-License-Identifier: MIT
"""What VMs left on a made-up host, with a made-up systemd: what is found, and what is undone."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from microvm_host import links, names, process, reconcile, source, systemd
from microvm_host.cli import commands, jobs
from microvm_host.errors import MicrovmHostError, UsageError
from microvm_host.paths import HostPaths
from microvm_host.reconcile import (
    Directory,
    FailedUnit,
    StaleLink,
    StaleRecord,
    StrayUnit,
    Undeclared,
)
from microvm_host.record import Record

from .test_cli import microvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from microvm_host.reconcile import Leftover

ESCAPED = "microvm-virtiofsd-a\\x2db-home-alice"


class FakeSystemd:
    """Units with their states, those that have jobs, and what was done to them."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.jobs: set[str] = set()
        self.files: set[str] = set()
        self.done: list[str] = []

    def stop(self, units: Sequence[str]) -> None:
        for unit in units:
            self.done.append(f"stop {unit}")
            self.states.pop(unit, None)

    def run(self, argv: list[str]) -> str:
        self.done.append(" ".join(argv))
        if argv[:2] == ["systemctl", "reset-failed"]:
            self.states.pop(argv[-1], None)
        return ""


@pytest.fixture(autouse=True)
def pid1(monkeypatch: pytest.MonkeyPatch) -> FakeSystemd:
    fake = FakeSystemd()
    monkeypatch.setattr(systemd, "states", lambda *patterns: dict(fake.states))
    monkeypatch.setattr(systemd, "jobs", lambda *patterns: set(fake.jobs))
    monkeypatch.setattr(systemd, "stop", fake.stop)
    monkeypatch.setattr(
        systemd, "show", lambda unit, _: {"Transient": "no" if unit in fake.files else "yes"}
    )
    monkeypatch.setattr(process, "output", fake.run)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(reconcile, "_is_roots", lambda status: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    @contextmanager
    def gate(vms: Sequence[str], host: HostPaths) -> Iterator[None]:
        fake.done.append(f"hold {' '.join(dict.fromkeys(vms))}")
        yield
        fake.done.append("release")

    monkeypatch.setattr(reconcile, "_holding_back", gate)
    return fake


def vm(host: HostPaths, name: str, *links: str) -> Path:
    """A state directory that is some days old, with links to a package."""
    directory = Path(host.vm(name))
    directory.mkdir(exist_ok=True)
    for link in links:
        os.symlink("/srv/package", directory / link)
    os.utime(directory, (0, 0))
    return directory


def undone(found: Sequence[Leftover], host: HostPaths) -> list[tuple[str, tuple[str, ...]]]:
    return [(each.leftover.what, each.problems) for each in reconcile.undo(found, host)]


# ---- what is found


def test_nothing(host: HostPaths) -> None:
    assert reconcile.find(host) == []
    vm(host, "web", "current")
    assert reconcile.find(host) == []


def test_each_unit_is_looked_at_once_however_many_vms_there_are(
    host: HostPaths, pid1: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked = []
    look = names.vm_of_share_unit

    def counted(unit: str) -> str | None:
        looked.append(unit)
        return look(unit)

    monkeypatch.setattr(names, "vm_of_share_unit", counted)
    for number in range(50):
        # Up, and down with something left.
        for name, unit in (("up", "microvm@up{}.service"), ("down", "microvm-virtiofsd@down{}")):
            vm(host, f"{name}{number}", "current")
            pid1.states[unit.format(number)] = "active"
        pid1.states[f"microvm-virtiofsd-down{number}-home.socket"] = "active"
    found = reconcile.find(host)
    assert len([each for each in found if each.what.endswith(".socket")]) == 50
    assert len(looked) <= 2 * len(pid1.states)


@pytest.mark.parametrize(
    "unit",
    [
        "microvm@web.service",
        "microvm-foreground-web.service",
        "microvm-again@web.service",
        "microvm-tap-interfaces@web.service",
        "microvm-set-booted@web.service",
    ],
)
@pytest.mark.parametrize("state", ["activating", "deactivating", "job"])
def test_what_is_a_vms_that_starts_or_stops(
    host: HostPaths, pid1: FakeSystemd, unit: str, state: str
) -> None:
    vm(host, "web", "booted")
    Record(host.record("web", "tap-interfaces")).append("tap", "web0", "7")
    if state == "job":
        pid1.jobs.add(unit)
    else:
        pid1.states[unit] = state
    assert reconcile.find(host) == []
    pid1.jobs.clear()
    pid1.states.clear()
    assert len(reconcile.find(host)) == 3


def test_records(host: HostPaths) -> None:
    vm(host, "web", "current")
    vm(host, "up", "current")
    for what, *fields in (
        ("tap-interfaces", "tap", "web0", "7"),
        ("tap-interfaces", "adopted", "web1", "8"),
        ("virtiofsd", "unit", "microvm-virtiofsd-web-t.socket"),
        ("virtiofsd", "socket", f"{host.vm('web')}/t.sock"),
        ("booted", "user", "microvm", "1", "kvm", "2"),
        ("from-the-future", "thing", "x"),
    ):
        Record(host.record("web", what)).append(*fields)
    Path(host.record("empty", "")).mkdir()
    # Not called like a VM.
    Path(host.record(".x", "")).mkdir()
    shared = ("unit microvm-virtiofsd-web-t.socket", f"socket {host.vm('web')}/t.sock")
    assert reconcile.find(host) == [
        StaleRecord("empty", f"{host.records}/empty", ()),
        # In the order in which they are undone: nobody connects to what goes away next.
        StaleRecord("web", host.record("web", "virtiofsd"), shared),
        StaleRecord("web", host.record("web", "tap-interfaces"), ("tap web0",)),
        StaleRecord("web", host.record("web", "booted"), ()),
        StaleRecord("web", host.record("web", "from-the-future"), (), is_kept=True),
    ]


def test_a_record_that_is_no_text_is_found(host: HostPaths) -> None:
    Record(host.record("web", "tap-interfaces")).append("tap", "web0", "7")
    Path(host.record("web", "tap-interfaces")).write_bytes(b"tap\t\xff\t7\n")
    (found,) = reconcile.find(host)
    assert "UTF-8" in found.describe()
    ((_, (problem,)),) = undone([found], host)
    assert "UTF-8" in problem


def test_units(host: HostPaths, pid1: FakeSystemd) -> None:
    vm(host, "web", "current")
    pid1.states = {
        "microvm@web.service": "failed",
        "microvm-set-booted@web.service": "active",
        "microvm-tap-interfaces@web.service": "active",
        "microvm-virtiofsd@web.service": "failed",
        f"{ESCAPED}.socket": "active",
        f"{ESCAPED}.service": "active",
        "microvm-virtiofsd-idle-t.service": "inactive",
        # An administrator's own, of a file.
        "microvm-virtiofsd-mine.service": "active",
        "microvm-virtiofsd-\\x2e-t.service": "active",
        "microvm-tap-interfaces@.x.service": "active",
    }
    pid1.files.add("microvm-virtiofsd-mine.service")
    assert reconcile.find(host) == [
        StrayUnit("a-b", f"{ESCAPED}.socket"),
        StrayUnit("a-b", f"{ESCAPED}.service"),
        StrayUnit("web", "microvm-tap-interfaces@web.service"),
        StrayUnit("web", "microvm-set-booted@web.service"),
        FailedUnit("web", "microvm-virtiofsd@web.service"),
    ]


def test_units_that_a_record_names_are_told_of_once(host: HostPaths, pid1: FakeSystemd) -> None:
    unit = "microvm-virtiofsd-web-t.socket"
    pid1.states = {unit: "active"}
    Record(host.record("web", "virtiofsd")).append("unit", unit)
    (found,) = reconcile.find(host)
    assert isinstance(found, StaleRecord)


def test_links(host: HostPaths) -> None:
    vm(host, "web", "current", "booted")
    roots = Path(host.gc_roots)
    roots.mkdir(parents=True)
    for file, target in {
        "web": host.current("web"),
        "gone": host.current("gone"),
        "booted-gone": host.booted("gone"),
        # Called so, but not what the toolkit makes of that name.
        "booted-other": host.current("other"),
        "elsewhere": "/srv/elsewhere",
    }.items():
        os.symlink(target, roots / file)
    (roots / "file").touch()
    assert reconcile.find(host) == [
        StaleLink("gone", f"{roots}/booted-gone", host.booted("gone"), "gc-root"),
        StaleLink("gone", f"{roots}/gone", host.current("gone"), "gc-root"),
        StaleLink("web", host.booted("web"), "/srv/package", "booted"),
    ]


def test_directories(host: HostPaths) -> None:
    vm(host, "empty")
    ours = vm(host, "ours", "booted", ".build", ".current.123")
    for file in ("runner", "flake.77", "declared"):
        (ours / file).touch()
    disk = vm(host, "disk")
    (disk / "root.img").touch()
    (disk / "runner").mkdir()
    vm(host, "broken", "current")
    declared = vm(host, "declared")
    Path(host.declarations).mkdir(parents=True)
    Path(host.declaration("declared")).touch()
    for directory in (ours, disk, declared):
        os.utime(directory, (0, 0))
    # Its flake may be being built.
    vm(host, "new")
    os.utime(host.vm("new"))
    found = reconcile.find(host)
    assert found == [
        Directory("disk", str(disk), ("root.img", "runner")),
        Directory("empty", host.vm("empty")),
        StaleLink("ours", host.booted("ours"), "/srv/package", "booted"),
        Directory("ours", str(ours)),
    ]
    assert found[0].describe().endswith("root.img, runner: `microvm remove disk` deletes it")
    assert all(problems == () for _, problems in undone(found, host))
    assert reconcile.find(host) == [found[0]]
    assert not ours.exists()


def test_a_directory_that_got_something_stays(host: HostPaths) -> None:
    directory = vm(host, "web")
    found = Directory("web", str(directory))
    (directory / "disk.img").touch()
    (directory / "runner").touch()
    assert found.undo(host) == [f"{directory} has got 'disk.img' meanwhile and stays"]
    assert sorted(os.listdir(directory)) == ["disk.img", "runner"]


def test_what_comes_into_a_directory_while_it_is_removed_stays(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = vm(host, "web")
    (directory / "runner").touch()
    found = Directory("web", str(directory))
    listdir = os.listdir

    def listed(path: int | str) -> list[str]:
        there = listdir(path)
        (directory / "disk.img").touch()
        return there

    monkeypatch.setattr(os, "listdir", listed)
    with pytest.raises(OSError, match="not empty"):
        found.undo(host)
    assert listdir(directory) == ["disk.img"]


def test_a_link_in_the_place_of_a_directory(host: HostPaths, root: Path) -> None:
    """It leads to where nothing is ours, whatever it is called there."""
    elsewhere = vm(host, "elsewhere", "booted")
    os.rename(elsewhere, root / "elsewhere")
    (root / "elsewhere/runner").touch()
    os.utime(root / "elsewhere", (0, 0))
    os.symlink(root / "elsewhere", host.vm("web"))
    Record(host.record("web", "tap-interfaces")).append("tap", "web0", "7")
    (found,) = reconcile.find(host)
    assert isinstance(found, StaleRecord)
    with pytest.raises(NotADirectoryError):
        Directory("web", host.vm("web")).undo(host)
    assert sorted(os.listdir(root / "elsewhere")) == ["booted", "runner"]


def test_vms_that_are_declared_no_more(host: HostPaths, pid1: FakeSystemd) -> None:
    for name in ("web", "db", "by-hand", "down"):
        directory = vm(host, name, "current", "booted")
        if name != "by-hand":
            (directory / "declared").touch()
        pid1.states[f"microvm@{name}.service"] = "active" if name != "down" else "inactive"
    Path(host.declarations).mkdir(parents=True)
    Path(host.declaration("db")).touch()
    found = [each for each in reconcile.find(host) if each.kind == "vm"]
    assert found == [Undeclared("web", host.declaration("web"))]
    # For its administrator to decide.
    assert undone(found, host) == []
    assert pid1.done == []


# ---- what is undone


def test_undone_by_what_a_stop_uses(
    host: HostPaths, pid1: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    vm(host, "web", "current", "booted")
    device = Path(host.net_device("web0"))
    device.mkdir(parents=True)
    (device / "ifindex").write_text("7\n")
    deleted: list[dict[str, int]] = []

    def delete(doomed: dict[str, int], _: HostPaths) -> list[str]:
        deleted.append(doomed)
        return []

    monkeypatch.setattr(links, "delete", delete)
    Record(host.record("web", "tap-interfaces")).append("tap", "web0", "7")
    left = f"{host.vm('web')}/t.sock"
    listened, other = Path(host.vm("web"), "notify.vsock_8888"), Path(host.vm("web"), "other")
    for path in (left, listened, other):
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
    shared = Record(host.record("web", "virtiofsd"))
    shared.append("unit", "microvm-virtiofsd-web-t.socket")
    shared.append("socket", left)
    Record(host.record("web", "booted")).append("user", "microvm", "1", "kvm", "2")
    Record(host.record("web", "booted")).append("notify", "unix", "notify.vsock_8888")
    pid1.states["microvm-set-booted@web.service"] = "failed"
    found = reconcile.find(host)
    assert len(found) == 5
    assert all(problems == () for _, problems in undone(found, host))
    assert deleted == [{"web0": 7}]
    assert not os.path.exists(left)
    assert (listened.exists(), other.exists()) == (False, True)
    assert not os.path.lexists(host.booted("web"))
    assert not os.path.exists(f"{host.records}/web")
    assert pid1.done == [
        "hold web",
        "systemctl reset-failed -- microvm-set-booted@web.service",
        "stop microvm-virtiofsd-web-t.socket",
        "release",
    ]
    assert reconcile.find(host) == []


def test_one_that_fails_does_not_keep_the_others(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        Record(host.record(name, "tap-interfaces")).append("tap", f"{name}0", "7")
        device = Path(host.net_device(f"{name}0"))
        device.mkdir(parents=True)
        (device / "ifindex").write_text("7\n")
    monkeypatch.setattr(
        links, "delete", lambda doomed, _: ["a0 could not be deleted"] if "a0" in doomed else []
    )
    found = reconcile.find(host)
    assert [problems for _, problems in undone(found, host)] == [("a0 could not be deleted",), ()]
    assert reconcile.find(host) == [found[0]]


def test_nothing_of_a_vm_that_started_meanwhile(host: HostPaths, pid1: FakeSystemd) -> None:
    Record(host.record("web", "booted")).append("user", "microvm", "1", "kvm", "2")
    found = reconcile.find(host)
    pid1.states["microvm-set-booted@web.service"] = "activating"
    (outcome,) = reconcile.undo(found, host)
    assert outcome.is_in_use
    assert Record(host.record("web", "booted")).read()


def test_nothing_to_undo_holds_nobody_back(host: HostPaths, pid1: FakeSystemd) -> None:
    (vm(host, "disk") / "disk.img").touch()
    os.utime(host.vm("disk"), (0, 0))
    found = reconcile.find(host)
    assert [each.is_kept for each in found] == [True]
    assert undone(found, host) == []
    assert pid1.done == []


# ---- the command


@pytest.fixture
def command(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command on this host; gives the VMs that it stopped."""
    stopped: list[str] = []
    monkeypatch.setattr(commands, "HOST", host)
    monkeypatch.setattr(jobs, "run", lambda verb, vms: stopped.extend(vms))
    return stopped


@pytest.mark.usefixtures("command")
def test_command_shows_and_changes_nothing(host: HostPaths, pid1: FakeSystemd) -> None:
    done = microvm("reconcile")
    assert (done.exit_code, done.output) == (0, "nothing is left behind\n")
    vm(host, "web", "current", "booted")
    (vm(host, "disk") / "disk.img").touch()
    os.utime(host.vm("disk"), (0, 0))
    done = microvm("reconcile")
    assert (done.exit_code, done.output) == (
        1,
        f"disk: directory {host.vm('disk')} has no package, but disk.img: `microvm remove disk` "
        "deletes it\n"
        f"web: link {host.booted('web')} to /srv/package\n"
        "`microvm reconcile --apply` undoes it\n",
    )
    assert os.path.lexists(host.booted("web"))
    assert pid1.done == []


@pytest.mark.usefixtures("command")
def test_command_undoes(host: HostPaths) -> None:
    vm(host, "web", "current", "booted")
    done = microvm("reconcile", "--apply", "--json")
    assert done.exit_code == 0
    assert json.loads(done.output) == [
        {
            "vm": "web",
            "kind": "booted",
            "what": host.booted("web"),
            "message": f"link {host.booted('web')} to /srv/package",
            "state": "undone",
            "problems": [],
        }
    ]
    assert not os.path.lexists(host.booted("web"))


def test_command_stops_what_is_declared_no_more(
    host: HostPaths, pid1: FakeSystemd, command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (vm(host, "web", "current", "booted") / "declared").touch()
    pid1.states["microvm@web.service"] = "active"
    for words in (["reconcile"], ["reconcile", "--apply"]):
        done = microvm(*words)
        # Nobody was there to be asked.
        assert done.exit_code == 1
        assert command == []
    done = microvm("reconcile", "--apply", "--yes")
    assert done.exit_code == 0
    assert done.output == (
        f"web: runs, but its declaration {host.declaration('web')} is gone: undone\n"
    )
    assert command == ["web"]
    assert isinstance(microvm("reconcile", "--yes").exception, UsageError)


def test_command_tells_all_though_a_vm_does_not_stop(
    host: HostPaths, pid1: FakeSystemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(verb: str, vms: Sequence[str]) -> None:
        raise MicrovmHostError("could not stop web")

    monkeypatch.setattr(commands, "HOST", host)
    monkeypatch.setattr(jobs, "run", fail)
    (vm(host, "web", "current", "booted") / "declared").touch()
    vm(host, "db", "current", "booted")
    pid1.states["microvm@web.service"] = "active"
    done = microvm("reconcile", "--apply", "--yes", "--json")
    assert done.exit_code == 1
    found = [(each["vm"], each["state"], each["problems"]) for each in json.loads(done.output)]
    assert found == [("db", "undone", []), ("web", "failed", ["could not stop web"])]


@pytest.mark.parametrize(("answer", "stopped"), [("y\n", ["web"]), ("n\n", []), ("\n", [])])
def test_command_asks(
    host: HostPaths,
    pid1: FakeSystemd,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    stopped: list[str],
) -> None:
    (vm(host, "web", "current", "booted") / "declared").touch()
    pid1.states["microvm@web.service"] = "active"
    monkeypatch.setattr(commands, "_is_terminal", lambda: True)
    from click.testing import CliRunner

    done = CliRunner().invoke(commands.microvm, ["reconcile", "--apply"], input=answer)
    assert done.exit_code == (0 if stopped else 1)
    assert command == stopped


@pytest.mark.parametrize("what", ["ends", "lost-shares", "served-shares", "pci-devices-failed"])
def test_notes_set_nothing_up(host: HostPaths, what: str) -> None:
    record = Record(host.record("web", what))
    record.append("anything")
    (found,) = reconcile.find(host)
    assert undone([found], host) == [(record.path, ())]
    assert record.read() == []


def test_pci_devices(host: HostPaths) -> None:
    """Of one that is gone there is nothing to give back but its node."""
    node = Path(host.vfio_group_node("12"))
    node.parent.mkdir(parents=True)
    node.touch(0o600)
    record = Record(host.record("web", "pci-devices"))
    record.append("device", "0000:01:00.0", "e1000e", "", "eth0", "")
    record.append("node", "12", str(node), str(os.getuid()), str(os.getgid()), "20640")
    (found,) = reconcile.find(host)
    assert found.describe() == f"record {record.path} of PCI device 0000:01:00.0"
    assert undone([found], host) == [(record.path, ())]
    assert node.stat().st_mode & 0o7777 == 0o640
    assert record.read() == []


@pytest.mark.parametrize(
    "fields",
    [
        ("device",),
        ("device", "0000:01:00.0"),
        ("device", "../../x", "e1000e", "", "", ""),
        ("device", "*:01:00.0", "e1000e", "", "", ""),
        ("device", "0000:01:00.0", "../x", "", "", ""),
        ("device", "0000:01:00.0", "e1000e", "", "a/b", ""),
        ("node", "12", "/etc/shadow", "0", "0", "666"),
        ("node", "../12", "/dev/vfio/../12", "0", "0", "666"),
        ("node", "12", "VFIO", "root", "0", "666"),
        ("node", "12", "VFIO", "0", "0", ""),
    ],
)
def test_damaged_records_of_pci_devices(host: HostPaths, fields: tuple[str, ...]) -> None:
    fields = tuple(host.vfio_group_node("12") if field == "VFIO" else field for field in fields)
    record = Record(host.record("web", "pci-devices"))
    record.append(*fields)
    (found,) = reconcile.find(host)
    ((_, (problem,)),) = undone([found], host)
    assert "is no line of this record" in problem
    assert len(record.read()) == 1
