# SPDX-License-Identifier: MIT
"""When a share counts as lost, and what is said then.

systemd is a made-up one here: tests/system/test_ladder.py has the real one.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from microvm_host import bus, log, lostshares, names
from microvm_host.paths import HostPaths
from microvm_host.record import Record

# A VM that was started at 2 s and runs, with a virtiofsd that was started at 3 s and then killed.
RUNS: dict[str, int | str] = {
    "ActiveState": "active",
    "InactiveExitTimestampMonotonic": 2_000_000,
    "MainPID": 42,
}
KILLED: dict[str, int | str] = {
    **{"ActiveState": "failed", "ExecMainStartTimestampMonotonic": 3_000_000},
    **{"ExecMainCode": 2, "ExecMainStatus": 9},
}
NOTHING: dict[str, int | str] = {
    **dict.fromkeys((*RUNS, *KILLED), 0),
    "ActiveState": "inactive",
}


class FakeSystemd:
    """Its units' properties, by the unit's object."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.units: dict[str, dict[str, int | str]] = {}

    def say(self, unit: str, **properties: int | str) -> None:
        known = self.units.setdefault(bus.unit(unit), {**NOTHING})
        known.update(properties)

    def properties(self, path: str, unit: str, *wanted: bus.Property) -> list[int | str]:
        assert path == self.path
        return [self.units.get(unit, NOTHING)[name] for _, name in wanted]


@pytest.fixture
def systemd(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> FakeSystemd:
    fake = FakeSystemd(host.systemd_private_socket)
    monkeypatch.setattr(bus, "properties", fake.properties)
    fake.say("microvm@web.service", **RUNS)
    fake.say(names.share_unit("web", "home/a", ".service"), **KILLED)
    return fake


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "error", lambda text, vm: lines.append(f"{vm}: {text}"))
    return lines


def lost(host: HostPaths) -> list[list[str]]:
    return Record(host.record("web", "lost-shares")).read()


@pytest.mark.parametrize(
    ("code", "status", "how"),
    [
        (1, 0, "exited 0"),
        (2, 9, "killed KILL"),
        (2, 15, "killed TERM"),
        (3, 11, "dumped SEGV"),
        (2, 99, "killed 99"),
    ],
)
def test_a_lost_share(
    systemd: FakeSystemd, said: list[str], host: HostPaths, code: int, status: int, how: str
) -> None:
    unit = names.share_unit("web", "home/a", ".service")
    systemd.say(unit, ActiveState="inactive", ExecMainCode=code, ExecMainStatus=status)
    lostshares.tell("web", "home/a", host)
    assert lost(host) == [["share", "home/a"]]
    (line,) = said
    assert line.startswith(
        f"web: virtiofsd of share home/a has ended under the running guest ({how}): "
    )
    assert line.endswith("systemctl restart microvm@web.service")


@pytest.mark.parametrize(
    "vm",
    [
        # It ended with its hypervisor, which has stopped, is stopped, or is about to start again.
        {"ActiveState": "inactive", "MainPID": 0},
        {"ActiveState": "deactivating"},
        {"ActiveState": "activating", "MainPID": 0},
        # The hypervisor that it served was a former one; the next may wait for its turn.
        {"InactiveExitTimestampMonotonic": 3_500_000},
        {"ActiveState": "activating", "InactiveExitTimestampMonotonic": 3_500_000},
    ],
)
def test_a_share_that_went_with_its_hypervisor(
    systemd: FakeSystemd, said: list[str], host: HostPaths, vm: dict[str, str | int]
) -> None:
    systemd.say("microvm@web.service", **vm)
    lostshares.tell("web", "home/a", host)
    assert (lost(host), said) == ([], [])


def test_a_share_that_was_connected_to_anew_or_never(
    systemd: FakeSystemd, said: list[str], host: HostPaths
) -> None:
    systemd.say(names.share_unit("web", "home/a", ".service"), ActiveState="active")
    lostshares.tell("web", "home/a", host)
    lostshares.tell("web", "never", host)
    assert (lost(host), said) == ([], [])


def test_a_share_that_is_lost_while_the_guest_is_waited_for(
    systemd: FakeSystemd, said: list[str], host: HostPaths
) -> None:
    systemd.say("microvm@web.service", ActiveState="activating")
    lostshares.tell("web", "home/a", host)
    assert len(said) == len(lost(host)) == 1


def test_a_share_of_a_vm_in_the_foreground(
    systemd: FakeSystemd, said: list[str], host: HostPaths
) -> None:
    systemd.say("microvm@web.service", **NOTHING)
    lostshares.tell("web", "home/a", host)
    assert said == []
    systemd.say(names.foreground_unit("web"), **RUNS)
    lostshares.tell("web", "home/a", host)
    assert len(said) == len(lost(host)) == 1


def test_all_shares_of_a_script(
    systemd: FakeSystemd, said: list[str], host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    for tag in ("a", "b"):
        Record(host.record("web", "served-shares")).append("share", tag, f"/{tag}.sock", "1000")
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits"))
    systemd.say(names.own_share_unit("web"), ActiveState="active")
    lostshares.tell("web", "", host)
    assert (lost(host), said) == ([], [])
    systemd.say(names.own_share_unit("web"), ActiveState="inactive")
    monkeypatch.setenv("MONITOR_EXIT_CODE", "killed")
    monkeypatch.setenv("MONITOR_EXIT_STATUS", "KILL")
    lostshares.tell("web", "", host)
    assert lost(host) == [["share", "a"], ["share", "b"]]
    # Once is enough.
    lostshares.tell("web", "", host)
    assert [line.partition(":")[2].partition(":")[0] for line in said] == [
        f" virtiofsd of share {tag} has ended under the running guest (killed KILL)"
        for tag in ("a", "b")
    ]


def test_a_virtiofsd_that_a_script_started_again(
    systemd: FakeSystemd, said: list[str], host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("TRIGGER_PATH", "/run/again.sock")
    own, uid = Record(host.record("web", "served-shares")), os.getuid()
    with socket.socket(socket.AF_UNIX) as first, socket.socket(socket.AF_UNIX) as second:
        for listener, tag, whose in ((first, "kept", uid), (second, "again", uid + 1)):
            path = host.at(f"/{tag}.sock")
            listener.bind(path)
            os.chmod(path, 0o600)
            own.append("share", tag, path, str(whose))
    own.append("share", "gone", host.at("/gone.sock"), str(uid))
    Path(host.at("/file")).touch()
    own.append("share", "file", host.at("/file"), str(uid + 1))
    for line in (("share", "x"), ("share", "x", "/", "y")):
        own.append(*line)
    systemd.say(names.own_share_unit("web"), ActiveState="active")
    lostshares.tell("web", "", host)
    assert (slept, lost(host)) == ([5.0], [["share", "again"]])
    assert "(another one was started)" in said[0]
    # The hypervisor has ended meanwhile, or has before.
    monkeypatch.setattr(time, "sleep", lambda _: systemd.say("microvm@web.service", **NOTHING))
    Record(host.record("web", "lost-shares")).clear()
    lostshares.tell("web", "", host)
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waits for a VM that is down"))
    lostshares.tell("web", "", host)
    assert (lost(host), len(said)) == ([], 1)


@pytest.mark.parametrize(
    ("vm", "tag"),
    [("web", "data"), ("a-b", "c"), ("a", "b-c"), ("x.y:z", "home/al-ice/ü n"), ("a-b", "")],
)
def test_instances_name_vm_and_tag(vm: str, tag: str) -> None:
    unit = names.share_lost_unit(vm, tag)
    assert unit.startswith("microvm-share-lost@")
    instance = unit.removeprefix("microvm-share-lost@").removesuffix(".service")
    assert names.share_of(instance) == (vm, tag)
    assert os.fsencode(instance).isascii()
    # The service too: it is stopped with the VM, since it keeps the unit that it tells of.
    for suffix in (".service", ".timer", ".path"):
        other = names.share_lost_unit(vm, tag, suffix)
        assert other == f"microvm-share-lost@{instance}{suffix}"
        assert names.vm_of_share_unit(other) == vm
