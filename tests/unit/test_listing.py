# SPDX-License-Identifier: MIT
"""The listing behind `microvm -l`: each state in its exact words, for people and as JSON."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from microvm_host import listing, source, state, systemd
from microvm_host.cli import table
from microvm_host.errors import MicrovmHostError
from microvm_host.listing import Row, Version
from microvm_host.paths import HostPaths
from microvm_host.record import Record

from . import golden

STORE = "/nix/store/00000000000000000000000000000000"
ACTIVE = {
    "microvm@current.service": "active",
    "microvm@stale.service": "active",
    "microvm@stale-system.service": "active",
    "microvm@outdated-up.service": "active",
    "microvm@starting.service": "activating",
    "microvm@stopping.service": "deactivating",
    "microvm@failed.service": "failed",
    "microvm@same-label.service": "active",
    "microvm@same-system.service": "active",
    "microvm@gone.service": "active",
    "microvm@hostile.service": "active",
    "microvm-foreground-foreground.service": "active",
    "microvm@lost.service": "active",
    "microvm-virtiofsd-lost-kept.service": "active",
    "microvm-virtiofsd-lost-data.service": "failed",
}

NOW = 1_000_000
DETAILS = {
    "microvm@current.service": {"StateChangeTimestamp": f"@{NOW - 59}", "MemoryCurrent": "1048576"},
    # No times and numbers: none, and the largest that there is.
    "microvm@stale.service": {
        "StateChangeTimestamp": "",
        "MemoryCurrent": "18446744073709551615",
    },
    "microvm@failed.service": {
        "StateChangeTimestamp": f"@{NOW - 90000}",
        "MemoryCurrent": "[not set]",
    },
    "microvm-foreground-foreground.service": {"StateChangeTimestamp": f"@{NOW - 7200}"},
}


class Scene:
    """VMs in a made-up state directory."""

    def __init__(self, host: HostPaths) -> None:
        self.host = host

    def package(self, name: str, system: str | None = None) -> str:
        path = Path(self.host.at(f"/packages/{name}"))
        (path / "share/microvm").mkdir(parents=True, exist_ok=True)
        if system is not None and not (path / "share/microvm/system").is_symlink():
            os.symlink(system, path / "share/microvm/system")
        return str(path)

    def vm(self, name: str, current: str | None, booted: str | None = None) -> str:
        os.mkdir(self.host.vm(name))
        for link, target in ((self.host.current(name), current), (self.host.booted(name), booted)):
            if target is not None:
                os.symlink(target, link)
        return self.host.vm(name)


@pytest.fixture
def scene(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Scene:
    monkeypatch.setattr(systemd, "states", lambda *patterns: ACTIVE)
    monkeypatch.setattr(systemd, "show_all", lambda *asked: DETAILS)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(state, "_is_roots", lambda status: True)
    scene = Scene(host)
    one, two = scene.package("runner-1"), scene.package("runner-2")
    old = scene.package("old", f"{STORE}-nixos-system-web-24.05")
    new = scene.package("new", f"{STORE}-nixos-system-web-24.11")
    scene.vm("current", one, one)
    scene.vm("stale", two, one)
    scene.vm("stale-system", new, old)
    scene.vm("down", one)
    scene.vm("starting", one, one)
    scene.vm("stopping", one, one)
    scene.vm("failed", one)
    scene.vm("foreground", one, one)
    # Of three shares whose virtiofsd failed, one was connected to anew.
    scene.vm("lost", one, one)
    for tag in ("data", "kept", "home/a", "data"):
        Record(host.record("lost", "lost-shares")).append("share", tag)
    # Another package of the same system is the same version.
    scene.vm("same-system", scene.package("new-2", f"{STORE}-nixos-system-web-24.11"), new)
    # Two versions whose labels are the same are told apart by all of their names.
    again = scene.package("again", "/nix/store/11111111111111111111111111111111-x-24.05")
    scene.vm("same-label", old, again)
    scene.vm("outdated-up", one, one)
    scene.vm("outdated-down", one)
    for name in ("outdated-up", "outdated-down"):
        Path(host.vm(name), "runner").write_text(f"{two}\n")
    # What a source would give is gone: nothing is known of it.
    scene.vm("source-gone", one)
    Path(host.vm("source-gone"), "runner").write_text("/nonexistent\n")
    scene.vm("flake", one)
    Path(host.vm("flake"), "flake").write_text("git+file:///etc/nixos\n")
    scene.vm("gone", "/nonexistent/package", one)
    scene.vm("empty", None)
    scene.vm("hostile", scene.package("hostile", "/x/\x1b[31mred\nline"), one)
    # Made by declarations, one of which is gone.
    for name in ("declared", "undeclared"):
        scene.vm(name, scene.package("0123456789abcdef0123456789abcdef-web"), None)
        Path(host.vm(name), "declared").write_text("")
    Path(host.declarations).mkdir(parents=True)
    Path(host.declaration("declared")).write_text("")
    # No VMs: a file, a name that none can have, a hidden directory.
    Path(host.vm("a-file")).write_text("")
    os.mkdir(host.vm("not a name"))
    os.mkdir(host.vm(".hidden"))
    return scene


def plain(colours: str, text: str) -> str:
    return text


def text(scene: Scene, *only: str) -> str:
    lines = [listing.as_text(row, plain) for row in listing.rows(scene.host, only)]
    return "".join(f"{line}\n" for line in lines).replace(scene.host.root, "@ROOT@")


def test_texts_are_the_golden_ones(scene: Scene) -> None:
    golden.compare("listing.txt", text(scene))


def test_json_is_the_golden_one(scene: Scene) -> None:
    rows = [listing.as_json(row) for row in listing.rows(scene.host)]
    found = json.dumps(rows, indent=2).replace(scene.host.root, "@ROOT@")
    golden.compare("listing.json", found + "\n")


def test_only_some_in_their_order(scene: Scene) -> None:
    rows = listing.rows(scene.host, ("stale", "current"))
    assert [row.name for row in rows] == ["stale", "current"]


def test_one_that_is_not_there(scene: Scene) -> None:
    with pytest.raises(MicrovmHostError, match="there is no microVM zzz") as caught:
        listing.rows(scene.host, ("current", "zzz"))
    assert "`microvm list` shows" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("curent", "did you mean current?"),
        ("Stale", "did you mean stale?"),
        ("source_gone", "did you mean source-gone?"),
        ("later", "did you mean laterr?"),
        ("zzz", "`microvm list` shows those that there are"),
    ],
)
def test_one_that_was_meant(scene: Scene, name: str, hint: str) -> None:
    Path(scene.host.declaration("laterr")).write_text("")
    with pytest.raises(MicrovmHostError, match=f"there is no microVM {name}") as caught:
        listing.require(name, scene.host)
    assert caught.value.hint == hint


def test_one_that_is_declared_alone(scene: Scene) -> None:
    Path(scene.host.declaration("new")).write_text("")
    listing.require("new", scene.host, declared_will_do=True)
    with pytest.raises(MicrovmHostError, match="declared, but not installed yet"):
        listing.require("new", scene.host)


def test_globs(scene: Scene) -> None:
    Path(scene.host.declaration("stale-new")).write_text("")
    host = scene.host
    assert listing.select(["stale*"], host) == ["stale", "stale-system"]
    assert listing.select(["stale*"], host, declared_too=True) == [
        "stale",
        "stale-new",
        "stale-system",
    ]
    # Each once, names and globs in their order; a file and what no VM can be called are none.
    assert listing.select(["down", "d*n", "?own", "a*", "[.n]*"][:3], host) == ["down"]
    for pattern in ("a-f*", "*name", ".h*", "x?"):
        with pytest.raises(MicrovmHostError, match="no microVM matches"):
            listing.select([pattern], host)


def test_table_is_the_golden_one(scene: Scene) -> None:
    rows = listing.rows(scene.host, details=True)
    lines = table.table(rows, NOW, None)
    found = "".join(f"{line}\n" for line in lines).replace(scene.host.root, "@ROOT@")
    golden.compare("listing-table.txt", re.sub(r" +\n", "\n", found))
    # On a terminal no line is longer than that.
    assert all(len(line) <= 60 for line in table.table(rows, NOW, 60))


def test_table_without_notes_has_no_such_column(scene: Scene) -> None:
    rows = listing.rows(scene.host, ("current",), details=True)
    assert table.table(rows, NOW, None) == [
        "NAME     STATE    SINCE    VERSION   ADDRESS  MEMORY",
        "current  running  59s ago  runner-1  -        1 MB",
    ]


def test_table_says_why_a_guest_is_paused(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"current": "io-error", "foreground": "paused"}
    monkeypatch.setattr(listing, "_paused", lambda running, host: states)
    rows = listing.rows(scene.host, ("current", "foreground"), details=True)
    assert [(line.split()[1], line.split()[-1]) for line in table.table(rows, NOW, None)[1:]] == [
        ("paused", "io-error"),
        ("paused", "-"),
    ]


def test_no_state_directory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "states", lambda *patterns: {})
    assert listing.rows(HostPaths(str(root / "none"))) == []


def test_what_a_flake_would_give_is_asked_for_flakes_alone(scene: Scene) -> None:
    asked = []

    def newest(name: str, given: source.Source) -> Version:
        asked.append((name, str(given)))
        return Version("/nix/store/2222222222-microvm")

    rows = {row.name: row for row in listing.rows(scene.host, (), newest)}
    assert asked == [("flake", "flake git+file:///etc/nixos")]
    assert rows["flake"].state == "outdated"
    assert (
        listing.as_text(rows["flake"], plain)
        == "flake: outdated(runner-1), rebuild(22222222): microvm -u flake"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root looks into any directory")
def test_one_that_may_not_be_read(scene: Scene) -> None:
    os.chmod(scene.host.vm("current"), 0)
    try:
        (row,) = listing.rows(scene.host, ("current",))
    finally:
        os.chmod(scene.host.vm("current"), 0o755)
    assert listing.as_text(row, plain) == "current: broken, cannot be read: this needs root"


@pytest.mark.parametrize(
    ("version", "label"),
    [
        (Version("/srv/runner-1"), "runner-1"),
        (Version(f"{STORE}-microvm-qemu-web"), "00000000"),
        (Version("/x", f"{STORE}-nixos-system-web-24.05.1234.abc"), "24.05.1234.abc"),
        (Version("/srv/x", "/srv/system-2"), "system-2"),
    ],
)
def test_labels(version: Version, label: str) -> None:
    assert version.label == label


@pytest.mark.parametrize(
    ("active", "booted", "colour"),
    [
        ("active", True, "bold green"),
        ("activating", False, "bold green"),
        ("deactivating", True, "bold yellow"),
        ("inactive", True, "bold yellow"),
        ("inactive", False, "bold red"),
        ("failed", False, "bold red"),
    ],
)
def test_colours_of_names(active: str, booted: bool, colour: str) -> None:
    version = Version("/srv/a")
    row = Row("web", active, version, version if booted else None)
    assert listing.as_text(row, lambda colours, text: f"<{colours}>{text}</>").startswith(
        f"<{colour}>web</>: <green>current</>(<green>a</>)"
    )


def test_paint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    for variable in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(variable, raising=False)
    assert table.paint("bold green", "web") == "\033[1;32mweb\033[0m"
    monkeypatch.setenv("TERM", "dumb")
    assert table.paint("red", "web") == "web"
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert table.paint("red", "web") == "web"


def test_no_colour_but_on_a_terminal(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    table.show_list(scene.host, as_lines=True)
    out = capsys.readouterr().out
    assert "\033" not in out
    golden.compare("listing.txt", out.replace(scene.host.root, "@ROOT@"))


def test_nothing_to_list(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(systemd, "states", lambda *patterns: {})
    monkeypatch.setattr(systemd, "show_all", lambda *asked: {})
    table.show_list(host)
    found = capsys.readouterr()
    assert found.out == ""
    assert found.err.startswith(f"no microVMs in {host.state}; `microvm init")


def test_a_package_whose_path_commands_the_terminal(scene: Scene) -> None:
    scene.vm("sly", scene.package("a\x1b[2J\tb"))
    (line,) = text(scene, "sly").splitlines()
    assert line.isprintable()
    assert "\\x1b[2J\\tb" in line


def test_a_damaged_record_of_lost_shares_hides_no_vm(host: HostPaths) -> None:
    for line in (("share", "a", "more"), ("share",), ("share", "\x1b[2J"), ("",), ("share", "b")):
        Record(host.record("web", "lost-shares")).append(*line)
    assert listing._lost("web", {}, host) == ("b",)
    Path(host.record("web", "lost-shares")).write_bytes(b"\xff\n")
    assert listing._lost("web", {}, host) == ()


@pytest.mark.parametrize(
    ("vm", "again", "shown"),
    [
        ("inactive", "activating", "activating"),
        ("failed", "activating", "activating"),
        ("inactive", "inactive", "failed"),
        ("active", "activating", "active"),
    ],
)
def test_one_that_waits_to_be_set_up_again(vm: str, again: str, shown: str) -> None:
    active = {
        "microvm@web.service": vm,
        "microvm-again@web.service": again,
        "microvm-tap-interfaces@web.service": "failed",
    }
    assert listing._active("web", active) == shown
