# SPDX-License-Identifier: MIT
"""`microvm apply` installs all, and starts all at once; systemd and nix are made up."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from microvm_host import apply as application
from microvm_host import install, names, service, source, state, systemd, taken
from microvm_host.cli import start_many
from microvm_host.errors import MicrovmHostError, PackageError
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.record import Record

from . import packages


class Starts:
    """What was started, one entry for each transaction."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.transactions: list[tuple[list[str], list[str]]] = []
        self.failing: dict[str, MicrovmHostError] = {}

    def bring_up(self, vms: Sequence[str], running: Sequence[str]) -> dict[str, MicrovmHostError]:
        self.transactions.append((list(vms), list(running)))
        return {vm: self.failing[vm] for vm in vms if vm in self.failing}


@pytest.fixture
def starts(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Starts:
    fake = Starts()
    ours = Identity("me", os.getuid(), "us", os.getgid())
    monkeypatch.setattr(service, "identity", lambda name: ours)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(state, "_is_roots", lambda status: True)
    monkeypatch.setattr(systemd, "reload", lambda: None)
    monkeypatch.setattr(systemd, "states", lambda *_: dict(fake.states))
    return fake


def declare(host: HostPaths, name: str, more: str = "", kind: str = "runner") -> str:
    Path(host.declarations).mkdir(parents=True, exist_ok=True)
    package = host.at(f"/packages/{name}")
    if not os.path.exists(package):
        packages.minimal(Path(package))
    reference = package if kind == "runner" else "/etc/nixos"
    Path(host.declaration(name)).write_text(f'{kind} = "{reference}"\n{more}')
    return package


def run(host: HostPaths, starts: Starts) -> dict[str, application.Outcome]:
    return {each.name: each for each in application.apply(host, starts.bring_up)}


def test_all_are_started_at_once_and_by_their_order(host: HostPaths, starts: Starts) -> None:
    for name, more in {
        "a": "order = 20\n",
        "b": "order = 3\n",
        "c": "",
        "d": "autostart = false\n",
        "e": "order = 4\n",
    }.items():
        declare(host, name, more)
    found = run(host, starts)
    assert starts.transactions == [(["c", "b", "e", "a"], [])]
    assert [*found] == ["a", "b", "c", "d", "e"]
    assert found["a"].text.endswith(", started") and not found["d"].text.endswith("started")


def test_those_that_run_are_restarted_in_the_same_transaction(
    host: HostPaths, starts: Starts
) -> None:
    for name, more in {
        "new": "",
        "changed": "",
        "kept": "restart_if_changed = false\n",
        "same": "",
    }.items():
        package = declare(host, name, more)
        if name != "new":
            starts.states[f"microvm@{name}.service"] = "active"
            os.mkdir(host.vm(name))
            booted = package if name == "same" else "/former"
            os.symlink(booted, host.booted(name))
    found = run(host, starts)
    assert starts.transactions == [(["changed", "new"], ["changed"])]
    assert found["changed"].text.endswith(", restarted") and found["new"].text.endswith("started")
    assert found["kept"].text.endswith(
        "still runs the former: systemctl restart microvm@kept.service"
    )
    # It has a `current` now, and had none.
    assert found["same"].text.startswith("same: installed ")


def test_one_that_fails_keeps_no_other_from_its_start(host: HostPaths, starts: Starts) -> None:
    for name in ("a", "b", "c"):
        declare(host, name)
    os.unlink(host.at("/packages/a/bin/microvm-run"))
    packages.put(Path(host.declarations), "wrong.toml", "runner = 1\n")
    starts.failing["b"] = PackageError("could not start b", hint="`microvm status b` shows more")
    found = run(host, starts)
    assert starts.transactions == [(["b", "c"], [])]
    assert isinstance(found["a"].error, PackageError) and found["wrong.toml"].error is not None
    assert found["b"].text.endswith(", but: could not start b; `microvm status b` shows more")
    assert found["b"].error is starts.failing["b"] and found["c"].error is None


def test_a_flake_that_hangs_delays_only_what_comes_after_it(
    host: HostPaths, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = declare(host, "slow", "order = 5\n", "flake")
    declare(host, "first", "order = 4\n")
    declare(host, "after", "order = 6\n")
    declare(host, "any")
    others_are_up = threading.Event()

    def build(name: str, flake: str, host: HostPaths) -> str:
        assert others_are_up.wait(30), "the others wait for this build"
        return package

    monkeypatch.setattr(install, "_build", build)

    def bring_up(vms: Sequence[str], running: Sequence[str]) -> dict[str, MicrovmHostError]:
        others_are_up.set()
        return starts.bring_up(vms, running)

    found = {each.name: each for each in application.apply(host, bring_up)}
    assert starts.transactions == [(["any", "first"], []), (["slow", "after"], [])]
    assert [each.error for each in found.values()] == [None] * 4


def test_claims_are_read_once_and_only_for_what_is_built(
    host: HostPaths, starts: Starts, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = []

    def gather(host: HostPaths) -> dict[tuple[str, str], list[str]]:
        gathered.append(host)
        return {}

    monkeypatch.setattr(taken, "gather", gather)
    declare(host, "a")
    run(host, starts)
    assert gathered == []
    for name in ("x", "y", "z"):
        Path(host.declaration(name)).write_text('kernel = "/nonexistent"\n')
    assert [each.error is None for each in run(host, starts).values()].count(False) == 3
    assert len(gathered) == 1


# ---- systemd's part


def test_each_failed_vm_has_its_own_reason(
    host: HostPaths,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    packages.program(
        root,
        "bin/systemctl",
        f'#!/bin/sh\necho "$*" >>{root}/calls\n'
        'case $1 in start|restart) echo "Job for x failed." >&2; exit 1 ;; esac\n'
        'case $1 in list-units) echo "microvm@a.service loaded active running A"\n'
        'echo "microvm@c.service loaded active running C"\n'
        'echo "microvm@b.service loaded failed failed B" ;; esac\n',
    )
    packages.program(
        root, "bin/journalctl", '#!/bin/sh\ncase $* in *microvm@b*) echo "no such tap" ;; esac\n'
    )
    monkeypatch.undo()
    monkeypatch.setenv("PATH", f"{root}/bin:/usr/bin:/bin")
    found = start_many.bring_up(["a", "b", "c"], ["b", "c"])
    assert [*found] == ["b"]
    assert str(found["b"]) == "could not restart b; `microvm status b` shows more"
    assert capfd.readouterr().err == "b: no such tap\n"
    calls = (root / "calls").read_text().splitlines()
    # Of those that run the last one is stopped first.
    assert calls[0] == "restart -- microvm@c.service microvm@b.service microvm@a.service"


def test_another_user_counts_from_the_next_start(host: HostPaths, starts: Starts) -> None:
    """The VM is not restarted for it: its files are still the former user's."""
    for name, uid in (("same", os.getuid()), ("other", os.getuid() + 1), ("down", 4321)):
        declare(host, name, "autostart = false\n")
        run(host, starts)
        starts.states |= {names.unit(name): "inactive" if name == "down" else "active"}
        Record(host.record(name, "booted")).append("user", "former", str(uid), "us", "1")
    outcomes = run(host, starts)
    assert [name for name in outcomes if "former" in outcomes[name].text] == ["other"]
    assert outcomes["other"].text.endswith(
        ", runs as former until it is stopped, then as me: microvm stop other && "
        "microvm adopt --from former other && microvm start other"
    )


def test_a_terminal_shows_who_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"microvm@a.service": "active", "microvm@b.service": "failed"}
    monkeypatch.setattr(systemd, "states", lambda *_: states)
    assert start_many._progress(["a", "b", "c", "d", "e", "f"], 7.2) == (
        "starting: 1 of 6 VMs are up, 1 failed, waiting for c, d, e and more … 7 s"
    )
    assert start_many._progress(["a"], 1) == "starting: 1 of 1 VMs are up … 1 s"


def test_vms_that_are_no_longer_declared_are_listed(
    host: HostPaths, starts: Starts, capsys: pytest.CaptureFixture[str]
) -> None:
    """They stay, running or not; a VM that no declaration made is not said to be one of them."""
    for name in ("kept", "runs", "stopped"):
        declare(host, name)
    run(host, starts)
    for name in ("runs", "stopped"):
        os.unlink(host.declaration(name))
    by_hand = Path(host.vm("by-hand"))
    by_hand.mkdir()
    (by_hand / "current").symlink_to(host.at("/packages/kept"))
    starts.states = {names.unit("runs"): "active", names.unit("kept"): "active"}
    starts.transactions.clear()
    texts = {
        "runs": "runs: no longer declared, still runs: microvm stop runs",
        "stopped": "stopped: no longer declared; `microvm remove stopped` deletes it and its disks",
    }
    for dry_run in (False, True):
        found = list(application.apply(host, starts.bring_up, dry_run=dry_run))
        assert {each.name: each.text for each in found if each.is_undeclared} == texts
        assert [each.name for each in found if not each.is_undeclared] == ["kept"]
        assert not any(each.changed or each.error for each in found)
    assert starts.transactions == []
