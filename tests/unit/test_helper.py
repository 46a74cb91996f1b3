# SPDX-License-Identifier: MIT
"""The helper's verbs, as far as they go without root: exit codes, records, and what is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import helper, state, systemd
from microvm_host.errors import MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.record import Record

from . import packages


@pytest.fixture(autouse=True)
def made_up_host(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROVM_HOST_ROOT", host.root)
    ours = Identity("me", os.getuid(), "us", os.getgid())
    monkeypatch.setattr(systemd, "identity", lambda name: ours)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(state, "check_current", lambda name, host: None)


@pytest.fixture
def web(host: HostPaths) -> Path:
    package = packages.minimal(Path(host.at("/packages/web")))
    os.mkdir(host.vm("web"))
    os.symlink(package, host.current("web"))
    return package


def run(*arguments: str) -> int:
    return helper.main(["helper", *arguments])


@pytest.mark.parametrize(
    "arguments",
    [
        *([], ["start"], ["no-such", "web"], ["start", "web", "more"], ["start", "a/b"]),
        *(["share-lost", "web"], ["share-lost", "web-"], ["share-lost", "web-..-x"]),
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


@pytest.mark.parametrize("verb", ["tap-interfaces-up", "macvtap-interfaces-up"])
def test_before_set_booted(
    host: HostPaths, web: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.symlink(web, host.booted("web"))
    assert run(verb, "web") == 1
    assert "microvm-set-booted@web has not run" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["tap-interfaces-down", "macvtap-interfaces-down", "unset-booted"])
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
    monkeypatch.setenv("MICROVM_SHUTDOWN_SECONDS", "soon")
    assert run("stop", "web") == 0
    err = capsys.readouterr().err
    assert "MICROVM_SHUTDOWN_SECONDS='soon' is no time in seconds: 90 it is" in err


@pytest.mark.parametrize("text", ["soon", "nan", "inf", "-1", "0", "1e9", "0x9"])
def test_times_that_are_none(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("X", text)
    assert helper._seconds("X", 7.5) == 7.5
    assert capsys.readouterr().err == f"X={text!r} is no time in seconds: 7.5 it is\n"
    monkeypatch.setenv("X", "0.25")
    assert helper._seconds("X", 7.5) == 0.25
    monkeypatch.delenv("X")
    assert helper._seconds("X", 7.5) == 7.5


@pytest.mark.parametrize("text", ["many", "-1", "1.5", "1e9", "\u0663", "9" * 12])
def test_numbers_that_are_none(
    text: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("X", text)
    assert helper._number("X", 7) == 7
    assert capsys.readouterr().err == f"X={text!r} is no number: 7 it is\n"
    monkeypatch.setenv("X", "0")
    assert helper._number("X", 7) == 0


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

    monkeypatch.setitem(helper.VERBS, "start", fail)
    assert run("start", "web") == code
    assert capsys.readouterr().err == text


def test_mistakes_of_ours_are_told_line_by_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(name: str, host: HostPaths) -> None:
        raise ZeroDivisionError("oh")

    monkeypatch.setitem(helper.VERBS, "start", fail)
    assert run("start", "web") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ZeroDivisionError: oh"


def test_install_of_a_declared_vm(host: HostPaths, web: Path) -> None:
    packages.put(Path(host.declarations), "db.toml", f'runner = "{web}"\n')
    assert run("install", "db") == 0
    assert os.readlink(host.current("db")) == str(web)
    packages.put(Path(host.declarations), "db.toml", "runner = 1\n")
    assert run("install", "db") == 78
    assert os.readlink(host.current("db")) == str(web)
