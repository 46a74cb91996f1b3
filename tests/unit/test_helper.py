# SPDX-License-Identifier: MIT
"""The helper's verbs, as far as they go without root: exit codes, records, and what is said."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NoReturn

import pytest

from microvm_host import guard, hypervisor, links, pci, service, shares, state, systemd, trust
from microvm_host.errors import MicrovmHostError
from microvm_host.helper import entry, running, settings, setup
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.record import Record

from . import packages
from .fake_systemd import FakeSystemd
from .sysfs_trees import Kernel, Sysfs


@pytest.fixture(autouse=True)
def made_up_host(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROVM_HOST_ROOT", host.root)
    ours = Identity("me", os.getuid(), "us", os.getgid())
    monkeypatch.setattr(service, "identity", lambda name: ours)
    monkeypatch.setattr(service, "stop_timeout", lambda name: 105.0)
    monkeypatch.setattr(service, "stopping_for", lambda name: 0.0)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(state, "check_current", lambda name, host: None)
    # The package is whose who runs the tests is.
    monkeypatch.setattr(trust, "check_package", lambda package, identity: None)


_ALWAYS_NOTED = ("user", "stop-timeout", "hypervisor")


@pytest.fixture
def web(host: HostPaths) -> Path:
    package = packages.minimal(Path(host.at("/packages/web")))
    os.mkdir(host.vm("web"))
    os.symlink(package, host.current("web"))
    return package


def run(*arguments: str) -> int:
    return entry.main(["helper", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["start"], ["no-such", "web"], ["start", "web", "more"], ["start", "a/b"]),
        *(["share-lost", ""], ["share-lost", "web-"], ["share-lost", "web-..-x"]),
        ["share-lost", "we\\xzz-data"],
    ],
)
def test_wrong_usage(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_booted_and_not(host: HostPaths, web: Path) -> None:
    packages.put(web, "share/microvm/hypervisor", "qemu\n")
    packages.put(web, "share/microvm/control-socket", "web.sock\n")
    packages.put(web, "share/microvm/control-protocol", "qmp\n")
    packages.put(web, "share/microvm/event-log", "web.events\n")
    assert run("set-booted", "web") == 0
    assert os.readlink(host.booted("web")) == str(web)
    assert os.stat(host.vm("web")).st_mode & 0o7777 == 0o1771
    lines = Record(host.record("web", "booted")).read()
    assert lines == [
        ["user", "me", str(os.getuid()), "us", str(os.getgid())],
        ["stop-timeout", "105.000000"],
        ["hypervisor", "qemu"],
        ["control", "qmp", "web.sock"],
        ["event-log", "web.events"],
    ]
    # Once more, as after a boot that was cut short.
    assert run("set-booted", "web") == 0
    assert Record(host.record("web", "booted")).read() == lines

    assert run("unset-booted", "web") == 0
    assert not os.path.lexists(host.booted("web"))
    assert os.listdir(host.records) == []
    assert run("unset-booted", "web") == 0


@pytest.mark.parametrize(
    ("files", "lines"),
    [
        (
            {"vsock-cid": "42"},
            [["readiness", "exec"], ["notify", "vsock", "8888", "42", "seqpacket"]],
        ),
        (
            {"vsock-cid": "42", "readiness": "guest", "notify-socket": "vsock-stream:2:9000"},
            [["readiness", "guest"], ["notify", "vsock", "9000", "42", "stream"]],
        ),
        (
            {"hypervisor": "firecracker", "readiness": "guest"},
            [["readiness", "guest"], ["notify", "unix", "notify.vsock_8888"]],
        ),
    ],
)
@pytest.mark.parametrize("timeout", [150.0, None])
def test_how_a_guest_may_be_waited_for(
    host: HostPaths,
    web: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: dict[str, str],
    lines: list[list[str]],
    timeout: float | None,
) -> None:
    monkeypatch.setattr(service, "start_timeout", lambda name: timeout)
    for name, value in files.items():
        packages.put(web, f"share/microvm/{name}", f"{value}\n")
    assert run("set-booted", "web") == 0
    found = Record(host.record("web", "booted")).read()
    expected = lines + ([["start-timeout", "150.000000"]] if timeout else [])
    assert [line for line in found if line[0] not in _ALWAYS_NOTED] == expected


@pytest.mark.parametrize(
    ("verb", "what", "module", "facts"),
    [
        ("tap-interfaces-up", "tap-interfaces", links, {"tap-interfaces": "t0\n"}),
        (
            "macvtap-interfaces-up",
            "macvtap-interfaces",
            links,
            {"macvtap-interfaces": "m0 02:00:00:00:00:01 eth0 bridge\n"},
        ),
        (
            "virtiofsd-up",
            "virtiofsd",
            shares,
            {"virtiofs/a/source": "/srv\n", "virtiofs/a/socket": "a.sock\n"},
        ),
    ],
)
def test_what_a_killed_helper_left_is_taken_back_first(
    host: HostPaths,
    web: Path,
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    what: str,
    module: ModuleType,
    facts: dict[str, str],
) -> None:
    done: list[str] = []

    def undo(record: Record, *_: object) -> list[str]:
        done.append("undone")
        record.clear()
        return []

    def plan(*_: object) -> list[object]:
        done.append("planned")
        return []

    made = f"_{what.partition('-')[0]}s" if module is links else ""
    monkeypatch.setattr(module, f"undo{made}", undo)
    monkeypatch.setattr(module, f"plan{made}", plan)
    monkeypatch.setattr(systemd, "Connection", lambda _: SimpleNamespace(close=lambda: None))
    for name, text in facts.items():
        packages.put(web, f"share/microvm/{name}", text)
    os.symlink(web, host.booted("web"))
    Record(host.record("web", "booted")).append("user", "me", "1000", "us", "1000")
    assert run(verb, "web") == 0
    Record(host.record("web", what)).append("whatever", "it", "was")
    assert run(verb, "web") == 0
    assert done == ["planned", "undone", "planned"]


@pytest.mark.usefixtures("web")
def test_sockets_of_who_was_killed(host: HostPaths) -> None:
    """Of the listener and of the hypervisor; nothing that only has their names, or lies below."""
    directory = Path(host.vm("web"))
    booted = Record(host.record("web", "booted"))
    (directory / "run").mkdir()
    for control, stays in (("web.sock", False), ("run/web.sock", True)):
        booted.append("notify", "unix", "notify.vsock_8888")
        booted.append("control", "qmp", control)
        places = [directory / name for name in ("notify.vsock_8888", "notify.vsock_8889", control)]
        for place in places:
            place.unlink(missing_ok=True)
            with socket.socket(socket.AF_UNIX) as left:
                left.bind(str(place))
        assert run("unset-booted", "web") == 0
        assert [place.exists() for place in places] == [False, True, stays]
    booted.append("control", "qmp", "disk.img")
    (directory / "disk.img").touch()
    assert run("unset-booted", "web") == 0
    assert (directory / "disk.img").exists()


def test_temporary_files(host: HostPaths, web: Path) -> None:
    """Those of the VM's user go when it is down; what only has their names does not."""
    packages.put(web, "share/microvm/temporary-files", "seed.img\ncurrent\nlink\nsub\nothers\n")
    assert run("set-booted", "web") == 0
    noted = Record(host.record("web", "booted"))
    assert [line[1] for line in noted.read() if line[0] == "temporary"] == [
        *("seed.img", "current", "link", "sub", "others")
    ]
    directory = Path(host.vm("web"))
    for name in ("seed.img", "elsewhere", "others", "disk.img"):
        (directory / name).write_text("secret")
    (directory / "link").symlink_to("elsewhere")
    (directory / "sub").mkdir()
    assert run("unset-booted", "web") == 0
    assert "seed.img" not in os.listdir(directory)
    assert {"current", "link", "elsewhere", "sub", "disk.img"} <= {*os.listdir(directory)}
    # A user's who is not the VM's.
    (directory / "others").write_text("secret")
    for uid, stays in ((os.getuid() + 1, True), (os.getuid(), False)):
        noted.append("user", "me", str(uid), "us", "100")
        noted.append("temporary", "others")
        # What a hostile record would hold.
        noted.append("temporary", "sub/../disk.img")
        assert run("unset-booted", "web") == 0
        assert (directory / "others").exists() == stays
    assert (directory / "disk.img").exists()


def test_a_link_in_the_state_directorys_place(host: HostPaths, root: Path) -> None:
    (root / "elsewhere").mkdir()
    for name in ("booted", "notify.sock"):
        (root / "elsewhere" / name).touch()
    os.makedirs(host.state, exist_ok=True)
    os.symlink(root / "elsewhere", host.vm("web"))
    Record(host.record("web", "booted")).append("notify", "unix", "notify.sock")
    assert run("unset-booted", "web") == 0
    assert sorted(os.listdir(root / "elsewhere")) == ["booted", "notify.sock"]


def test_wrong_package_changes_nothing(
    host: HostPaths, web: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packages.put(web, "share/microvm/tap-interfaces", "vm%d\n")
    assert run("set-booted", "web") == 78
    assert not os.path.lexists(host.booted("web"))
    assert not os.path.exists(host.records)
    err = capsys.readouterr().err
    assert err.startswith(f"{web}/share/microvm/tap-interfaces:1: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("verb", ["tap-interfaces-up", "macvtap-interfaces-up", "pci-devices-up"])
def test_before_set_booted(
    host: HostPaths, web: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink(web, host.booted("web"))
    assert run(verb, "web") == 1
    assert "microvm-set-booted@web has not run" in capsys.readouterr().err


@pytest.mark.parametrize(
    "verb",
    ["tap-interfaces-down", "macvtap-interfaces-down", "pci-devices-down", "unset-booted"],
)
def test_undoing_what_was_not_done(verb: str) -> None:
    # ExecStopPost= runs after a start that was refused, too.
    assert run(verb, "web") == 0


def test_nobody_to_stop() -> None:
    assert run("stop", "web") == 0


def test_stop_of_what_has_ended(
    web: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    monkeypatch.setenv("MAINPID", str(child))
    monkeypatch.setattr(service, "ran", lambda name: 1.0)
    monkeypatch.setenv("MICROVM_SHUTDOWN_SECONDS", "soon")
    # What is wrong was said at the start.
    assert run("stop", "web") == 0
    assert "soon" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "timeout", "said"),
    [
        ({}, 105.0, ""),
        ({"MICROVM_SHUTDOWN_SECONDS": "1min 30s"}, 105.0, ""),
        ({"MICROVM_SHUTDOWN_SECONDS": "infinity"}, 12.0, ""),
        ({"MICROVM_SHUTDOWN_SECONDS": "5min"}, float("inf"), ""),
        (
            {"MICROVM_SHUTDOWN_SECONDS": "soon"},
            105.0,
            "MICROVM_SHUTDOWN_SECONDS='soon' is no time span, such as 90, 5min or infinity: "
            "ignored\n",
        ),
        (
            {"MICROVM_TERMINATE_SECONDS": "1 fortnight", "MICROVM_ASK_AGAIN_SECONDS": "10ms"},
            105.0,
            "MICROVM_ASK_AGAIN_SECONDS='10ms' is shorter than 100ms: ignored\n"
            "MICROVM_TERMINATE_SECONDS='1 fortnight' is no time span, such as 90, 5min or infinity:"
            " ignored\n",
        ),
        (
            {"MICROVM_SHUTDOWN_SECONDS": "5min"},
            12.0,
            "MICROVM_SHUTDOWN_SECONDS=5min does not fit into TimeoutStopSec=12s, which bounds a "
            "stop: the guest will have 6s; set TimeoutStopSec= in a drop-in instead\n",
        ),
        (
            {"MICROVM_RESTART_LIMIT": "many", "MICROVM_RESTART_SECONDS": "never"},
            105.0,
            "MICROVM_RESTART_SECONDS='never' is no time span, such as 90, 5min or infinity: "
            "ignored\nMICROVM_RESTART_LIMIT='many' is no number: 10 it is\n",
        ),
    ],
)
def test_what_is_wrong_with_settings_is_said_at_the_start(
    host: HostPaths,
    web: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: dict[str, str],
    timeout: float,
    said: str,
) -> None:
    monkeypatch.setattr(service, "stop_timeout", lambda name: timeout)
    assert run("set-booted", "web") == 0
    for name, value in settings.items():
        monkeypatch.setenv(name, value)

    def become(program: str, running: str | None) -> NoReturn:
        raise MicrovmHostError("became it")

    monkeypatch.setattr(hypervisor, "become", become)
    capsys.readouterr()
    assert run("start", "web") == 1
    assert capsys.readouterr().err == f"{said}became it\n"


@pytest.mark.parametrize(
    ("timeout", "ran", "settings", "expected"),
    [
        # What systemd says counts, not what it said at the start.
        (105.0, 600.0, {}, (90, 10, 10, 5, 0)),
        (12.0, 600.0, {}, (6, 10, 4, 2, 0)),
        (float("inf"), 600.0, {}, (float("inf"), 10, 10, 5, 0)),
        # The guest may still boot.
        (105.0, 1.0, {}, (90, 10, 10, 5, 1)),
        (105.0, 1.0, {"MICROVM_ASK_AGAIN_SECONDS": "1min"}, (90, 60, 10, 5, 0)),
        (105.0, 600.0, {"MICROVM_SHUTDOWN_SECONDS": "30"}, (30, 10, 10, 5, 0)),
        (12.0, 600.0, {"MICROVM_SHUTDOWN_SECONDS": "5min"}, (6, 10, 4, 2, 0)),
        (12.0, 600.0, {"MICROVM_TERMINATE_SECONDS": "5"}, (5, 10, 5, 2, 0)),
    ],
)
def test_the_steps_of_a_stop_fit_into_its_bound(
    host: HostPaths,
    web: Path,
    monkeypatch: pytest.MonkeyPatch,
    timeout: float,
    ran: float,
    settings: dict[str, str],
    expected: tuple[float, ...],
) -> None:
    assert run("set-booted", "web") == 0
    seen = []
    monkeypatch.setattr(service, "stop_timeout", lambda name: timeout)
    monkeypatch.setattr(service, "ran", lambda name: ran)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(running, "_become_user_of_start", lambda name, host: None)
    monkeypatch.setattr(hypervisor, "stop", lambda main, ways, times: seen.append(times))
    monkeypatch.setenv("MAINPID", "1")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert run("stop", "web") == 0
    (times,) = seen
    found = (times.guest, times.ask_again, times.terminate, times.kill, times.ask_first)
    assert found == pytest.approx(expected)


def test_who_asks_is_the_user_that_the_vm_was_started_for(
    host: HostPaths, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the one that the unit names by now; and root is given up for good."""
    Record(host.record("web", "booted")).append("user", "nobody", "4321", "nogroup", "1234")
    Record(host.record("web", "booted")).append("groups", "6", "7")
    monkeypatch.setattr(os, "getgrouplist", lambda user, gid: [gid, len(user)])
    done: list[object] = []
    for call in ("setgroups", "setresgid", "setresuid"):
        monkeypatch.setattr(os, call, lambda *to, call=call: done.append((call, *to)))
    running._become_user_of_start("web", host)
    assert done == [
        ("setgroups", [1234, 6, 7]),
        ("setresgid", 1234, 1234, 1234),
        ("setresuid", 4321, 4321, 4321),
    ]


def test_an_installed_helper_goes_by_nothing_that_a_vm_could_write(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = {
        "LD_PRELOAD": "/srv/evil.so",
        "MICROVM_HOST_ROOT": "/srv/evil",
        "MICROVM_RESTART_LIMIT": "3",
        "PATH": "/srv/evil",
        "PYTHONPATH": "/srv/evil",
        "SERVICE_RESULT": "success",
        "TMPDIR": "/srv/evil",
    }
    monkeypatch.setattr(os, "environ", dict(given))
    # A package's own script may need all of it.
    entry.clean_environment(["stop"])
    assert os.environ == {key: given[key] for key in given if key != "MICROVM_HOST_ROOT"}
    entry.clean_environment(["ended"])
    assert {**os.environ, "PATH": ""} == {
        "MICROVM_RESTART_LIMIT": "3",
        "PATH": "",
        "SERVICE_RESULT": "success",
    }
    assert "evil" not in os.environ["PATH"]


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "-1", "0", "1e9", "0x9", "9 9x", "1.1.1s"])
def test_times_that_are_none(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("X", text)
    assert settings.seconds("X", 7.5) == 7.5
    err = capsys.readouterr().err
    assert err.startswith(f"X={text!r} is ") and err.endswith(": ignored\n")
    assert settings.seconds("X", 7.5, is_said=True) == 7.5
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("X", "0.25")
    assert settings.seconds("X", 7.5) == 0.25
    monkeypatch.delenv("X")
    assert settings.seconds("X", 7.5) == 7.5


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "1e9", "\u0663", "9" * 12])
def test_numbers_that_are_none(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("X", text)
    assert settings.number("X", 7) == 7
    assert capsys.readouterr().err == f"X={text!r} is no number: 7 it is\n"
    monkeypatch.setenv("X", "0")
    assert settings.number("X", 7) == 0


@pytest.mark.parametrize(
    ("raised", "code", "text"),
    [
        (MicrovmHostError("no", path="/x", hint="y"), 1, "/x: no; y\n"),
        (PermissionError(13, "Permission denied", "/y"), 1, "/y: Permission denied\n"),
    ],
)
def test_failures(
    raised: Exception,
    code: int,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(name: str, host: HostPaths) -> None:
        raise raised

    monkeypatch.setattr(running, "start", fail)
    assert run("start", "web") == code
    assert capsys.readouterr().err == text


def test_mistakes_of_ours_are_told_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, host: HostPaths) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(running, "start", fail)
    assert run("start", "web") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ZeroDivisionError: oh"


@pytest.mark.parametrize("fields", [("me",), ("me", "x", "us", "2"), ("me", "1", "us", "2", "3")])
def test_whom_it_runs_as_is_damaged(
    host: HostPaths, capsys: pytest.CaptureFixture[str], fields: tuple[str, ...]
) -> None:
    Record(host.record("web", "booted")).append("user", *fields)
    os.makedirs(host.vm("web"))
    packages.minimal(Path(host.booted("web")))
    assert run("tap-interfaces-up", "web") == 1
    assert "is no line of this record" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        *(("notify", "vsock", "x", "3", "stream"), ("notify", "vsock", "9" * 5000, "3", "stream")),
        *(("notify", "vsock"), ("notify", "other", "1"), ("start-timeout", "nan")),
        ("start-timeout", "1", "2"),
    ],
)
def test_how_it_is_waited_for_is_damaged(
    host: HostPaths,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: tuple[str, ...],
) -> None:
    monkeypatch.setenv("MICROVM_READINESS", "guest")
    monkeypatch.setenv("NOTIFY_SOCKET", "none")
    Record(host.record("web", "booted")).append(*line)
    Record(host.record("web", "booted")).append("notify", "unix", "notify.sock")
    assert run("start", "web") == 1
    assert "is no line of this record" in capsys.readouterr().err


def test_how_it_is_stopped_is_damaged(
    host: HostPaths, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []
    monkeypatch.setattr(hypervisor, "stop", lambda pid, ways, times: asked.append(ways))
    monkeypatch.setenv("MAINPID", "42")
    Record(host.record("web", "booted")).append("control", "qmp", "web.sock", "more")
    assert run("stop", "web") == 0
    assert asked == [[]]
    assert "is no line of this record" in capsys.readouterr().err


class Guard:
    """What the guard's verb watches, and how long it would."""

    def __init__(self, host: HostPaths, patch: pytest.MonkeyPatch, *stopping: str) -> None:
        self.watched: list[str] = []
        self.patience: list[float] = []
        self.stopping = stopping
        self.systemd = FakeSystemd(Path(host.systemd_private_socket))
        self.systemd.properties |= {
            ("Service", "TimeoutStopUSec"): ("t", 12_000_000),
        }
        patch.setattr(guard, "watch", self.watch)

    def watch(self, unit: str, vm: str, within: Callable[[], float], _look: object) -> bool:
        self.watched.append(unit)
        self.patience.append(within())
        return unit in self.stopping

    def run(self) -> None:
        assert run("guard", "web") == 0
        self.systemd.close()


SERVICE, FOREGROUND = "microvm@web.service", "microvm-foreground-web.service"


@pytest.mark.parametrize(
    ("stopping", "watched"),
    [
        ([SERVICE], [SERVICE]),
        ([FOREGROUND], [SERVICE, FOREGROUND]),
        ([], [SERVICE, FOREGROUND]),
    ],
)
def test_what_the_guard_watches(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch, stopping: list[str], watched: list[str]
) -> None:
    guarding = Guard(host, monkeypatch, *stopping)
    guarding.run()
    assert guarding.watched == watched
    assert guarding.patience == [12 + 1.5] * len(watched)


def test_the_guard_knows_a_stop_without_a_bound(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarding = Guard(host, monkeypatch, SERVICE)
    guarding.systemd.properties["Service", "TimeoutStopUSec"] = ("t", 2**64 - 1)
    guarding.run()
    assert guarding.patience == [float("inf")]


def test_install_of_a_declared_vm(host: HostPaths, web: Path) -> None:
    packages.put(Path(host.declarations), "db.toml", f'runner = "{web}"\n')
    assert run("install", "db") == 0
    assert os.readlink(host.current("db")) == str(web)
    packages.put(Path(host.declarations), "db.toml", "runner = 1\n")
    assert run("install", "db") == 78
    assert os.readlink(host.current("db")) == str(web)


# ---- PCI devices

CARD, DISK = "0000:03:00.0", "0000:04:00.0"


class Cards:
    """A host with two devices, and VMs that want them."""

    def __init__(self, host: HostPaths, patch: pytest.MonkeyPatch) -> None:
        self.host = host
        self.sysfs = Sysfs(Path(host.root))
        self.sysfs.driver("vfio-pci")
        self.sysfs.device(CARD, "e1000e", 7)
        self.sysfs.device(DISK, "nvme", 8)
        self.kernel = Kernel(self.sysfs)
        self.kernel.adopt()
        self.kernel.install(patch)
        self.before = self.sysfs.picture()

    def boot(self, name: str, *addresses: str) -> None:
        package = packages.minimal(Path(self.host.at(f"/packages/{name}")))
        lines = "".join(f"{address}\n" for address in addresses)
        packages.put(package, "share/microvm/pci-devices", lines)
        os.makedirs(self.host.vm(name), exist_ok=True)
        os.symlink(package, self.host.current(name))
        assert run("set-booted", name) == 0

    def drivers(self) -> list[str | None]:
        return [self.sysfs.driver_of(address) for address in (CARD, DISK)]

    def records(self, name: str) -> list[str]:
        return sorted(os.listdir(f"{self.host.records}/{name}"))


@pytest.fixture
def cards(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Cards:
    return Cards(host, monkeypatch)


def test_pci_devices_up_and_down(cards: Cards, capsys: pytest.CaptureFixture[str]) -> None:
    cards.boot("web", "*:03:00.0", DISK)
    assert run("pci-devices-up", "web") == 0
    assert cards.drivers() == ["vfio-pci", "vfio-pci"]
    assert cards.records("web") == ["booted", "pci-devices"]
    # Without the package, which may be gone by then.
    os.unlink(cards.host.booted("web"))
    assert run("pci-devices-down", "web") == 0
    assert cards.sysfs.picture() == cards.before
    assert cards.records("web") == ["booted"]
    assert run("pci-devices-down", "web") == 0
    assert capsys.readouterr().err == ""


def test_pci_devices_that_are_refused(cards: Cards, capsys: pytest.CaptureFixture[str]) -> None:
    cards.boot("web", CARD, "0000:09:00.0", "0000:0a:00.0")
    assert run("pci-devices-up", "web") == 1
    err = capsys.readouterr().err.splitlines()
    # Those that did not end it first.
    assert [line.partition("; ")[0].rpartition(" ")[2] for line in err] == [
        "0000:0a:00.0",
        "0000:09:00.0",
    ]
    assert run("pci-devices-down", "web") == 0
    assert cards.sysfs.picture() == cards.before


def test_pci_devices_that_are_taken_in_part(
    cards: Cards, capsys: pytest.CaptureFixture[str]
) -> None:
    cards.boot("web", CARD, DISK)
    cards.kernel.fails_to_bind.add(("vfio-pci", DISK))
    assert run("pci-devices-up", "web") == 1
    assert f"vfio-pci did not take {DISK}" in capsys.readouterr().err
    assert cards.sysfs.picture() == cards.before
    assert cards.records("web") == ["booted"]


def test_pci_devices_that_are_not_given_back(
    cards: Cards, capsys: pytest.CaptureFixture[str]
) -> None:
    cards.boot("web", CARD, DISK)
    assert run("pci-devices-up", "web") == 0
    cards.kernel.fails_to_bind.add(("e1000e", CARD))
    assert run("pci-devices-down", "web") == 1
    err = capsys.readouterr().err
    assert f"{CARD} was not taken back by driver e1000e" in err
    assert "1 of the things that were set up could not be undone" in err
    assert cards.drivers() == [None, "nvme"]
    assert cards.records("web") == ["booted", "pci-devices", "pci-devices-failed"]
    cards.kernel.fails_to_bind.clear()
    # What has failed is not tried again at once, and fails the unit.
    assert run("pci-devices-down-again", "web") == 1
    assert capsys.readouterr().err == ""
    assert cards.drivers() == [None, "nvme"]
    assert run("pci-devices-down", "web") == 0
    assert cards.sysfs.picture() == cards.before
    assert run("pci-devices-down-again", "web") == 0
    assert cards.records("web") == ["booted"]


def test_pci_devices_that_a_killed_helper_left(cards: Cards) -> None:
    cards.boot("web", CARD, DISK)
    assert run("pci-devices-up", "web") == 0
    # It was killed before it did anything.
    assert run("pci-devices-down-again", "web") == 0
    assert cards.sysfs.picture() == cards.before
    assert cards.records("web") == ["booted"]


def test_two_vms_of_one_user_are_told_of(cards: Cards, capsys: pytest.CaptureFixture[str]) -> None:
    cards.boot("web", CARD)
    cards.boot("db", DISK)
    assert run("pci-devices-up", "web") == 0
    assert capsys.readouterr().err == ""
    assert run("pci-devices-up", "db") == 0
    assert "microVM web has PCI devices too, and runs as the same user" in capsys.readouterr().err


def test_wrong_declaration_ends_the_start(cards: Cards) -> None:
    cards.sysfs.interface("eth0", cards.sysfs.pci(CARD))
    cards.sysfs.ipv4_route("eth0")
    packages.put(Path(cards.host.declarations), "web.toml", "oh\n")
    cards.boot("web", CARD)
    assert run("pci-devices-up", "web") == 78
    assert cards.drivers() == ["e1000e", "nvme"]
    declared = f'runner = "/a"\nallow_host_devices = ["{CARD}"]\n'
    packages.put(Path(cards.host.declarations), "web.toml", declared)
    assert run("pci-devices-up", "web") == 0
    assert cards.drivers() == ["vfio-pci", "nvme"]


class Units:
    """What systemd says of the VM that has the devices, each time that it is asked."""

    def __init__(self, patch: pytest.MonkeyPatch, *answers: tuple[str | None, str | None]) -> None:
        self.answers = list(answers)
        self.naps = 0
        self.after: dict[int, Callable[[], object]] = {}
        patch.setattr(systemd, "states", self.states)
        patch.setattr(time, "sleep", self.sleep)

    def states(self, *units: str) -> dict[str, str]:
        assert units == ("microvm@db.service", "microvm-pci-devices@db.service")
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        # A unit that is not loaded is not told of.
        return {unit: state for unit, state in zip(units, answer, strict=True) if state}

    def sleep(self, seconds: float) -> None:
        self.naps += 1
        self.after.get(self.naps, lambda: None)()


@pytest.fixture
def shared(cards: Cards) -> Cards:
    """The same device for two VMs, of which `db` has it."""
    cards.boot("db", CARD)
    cards.boot("web", CARD)
    assert run("pci-devices-up", "db") == 0
    return cards


@pytest.mark.parametrize(
    "states",
    [
        ("active", "active"),
        ("activating", "active"),
        ("deactivating", "active"),
        ("reloading", "active"),
        # Starting: whoever was first has it.
        (None, "activating"),
        # Stopped, and what it could not undo is still there.
        (None, None),
        ("failed", "failed"),
        ("inactive", "inactive"),
    ],
)
def test_device_of_a_vm_that_keeps_it(
    shared: Cards,
    states: tuple[str | None, str | None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    units = Units(monkeypatch, states)
    assert run("pci-devices-up", "web") == 1
    assert units.naps == 0
    assert capsys.readouterr().err == (
        f"{CARD} is in use by microVM db; stop that one first: systemctl stop "
        "microvm@db.service; if it is down, `microvm reconcile --apply` gives back what it left\n"
    )
    assert shared.drivers() == ["vfio-pci", "nvme"]
    assert shared.records("web") == ["booted"]
    assert "pci-devices" in shared.records("db")


@pytest.mark.parametrize(
    ("stopped", "unit"),
    [(None, "deactivating"), ("inactive", "active"), ("failed", "deactivating")],
)
def test_device_of_a_vm_that_gives_it_back(
    shared: Cards, stopped: str | None, unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = Units(monkeypatch, (stopped, unit))
    units.after[3] = lambda: run("pci-devices-down", "db")
    assert run("pci-devices-up", "web") == 0
    assert units.naps == 3
    assert Record(shared.host.record("web", pci.WHAT)).read()[0] == [
        *("device", CARD, "e1000e", "", "", "")
    ]
    assert shared.records("db") == ["booted"]
    assert run("pci-devices-down", "web") == 0
    assert shared.sysfs.picture() == shared.before


def test_device_of_a_vm_that_starts_again(
    shared: Cards, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    units = Units(monkeypatch, (None, "deactivating"), (None, "active"), ("activating", "active"))
    assert run("pci-devices-up", "web") == 1
    assert units.naps == 2
    assert "is in use by microVM db" in capsys.readouterr().err


def test_device_that_is_taken_again_meanwhile(
    shared: Cards, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Waited for once: a third VM was quicker."""
    shared.boot("third", CARD)
    units = Units(monkeypatch, (None, "deactivating"))

    def hand_on() -> None:
        assert run("pci-devices-down", "db") == 0
        assert run("pci-devices-up", "third") == 0

    units.after[1] = hand_on
    assert run("pci-devices-up", "web") == 1
    assert capsys.readouterr().err == (
        f"{CARD} is in use by microVM third; stop that one first: systemctl stop "
        "microvm@third.service; if it is down, `microvm reconcile --apply` gives back what it "
        "left\n"
    )


def test_device_that_is_not_given_back_in_time(
    shared: Cards, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(setup, "HOLDER_GIVES_BACK_WITHIN", 0.0)
    Units(monkeypatch, (None, "deactivating"))
    assert run("pci-devices-up", "web") == 1
    assert "is in use by microVM db" in capsys.readouterr().err


def test_nobody_waits_for_what_waiting_does_not_mend(
    shared: Cards, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = Units(monkeypatch, (None, "deactivating"))
    os.unlink(shared.host.current("web"))
    os.unlink(shared.host.booted("web"))
    shared.boot("web", CARD, "0000:09:00.0")
    assert run("pci-devices-up", "web") == 1
    assert units.naps == 0
