# SPDX-License-Identifier: MIT
"""Shares: virtiofsd's command line, where sockets and sources may lie, the units' properties."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from microvm_host import place, plan, shares, trust
from microvm_host.errors import MicrovmHostError, PackageError
from microvm_host.identity import Identity
from microvm_host.paths import VIRTIOFSD_PLACES, HostPaths
from microvm_host.record import Record
from microvm_host.runner import Share
from microvm_host.shares import Virtiofsd

from . import packages

RUST = Virtiofsd("/usr/libexec/virtiofsd")
LEGACY = Virtiofsd("/usr/lib/qemu/virtiofsd", is_legacy=True)
# Who runs the tests may give away to themselves alone.
ALICE = Identity("alice", os.getuid(), "kvm", os.getgid())
IS_ROOT = os.geteuid() == 0

SOURCES = ["/srv", "/srv/$HOME ${x}", "/srv/100%i %h", "/srv/a,b", "/srv/back\\slash", "/ü '\""]


@pytest.fixture(autouse=True)
def trusted_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sources are beyond the VM's user, whoever runs the tests and wherever."""
    monkeypatch.setattr(trust, "exchangeable", lambda path, by: None)


@pytest.fixture(autouse=True)
def roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who runs the tests stands for root."""
    monkeypatch.setattr(place, "ROOT", os.getuid())


def given(**options: Any) -> Share:
    return Share("t", "/srv", "t.sock", options_given=True, **options)


# ---- virtiofsd's command line

BASE = ["/usr/libexec/virtiofsd", "--fd=3", "--shared-dir=/srv", "--xattr"]
LEGACY_BASE = ["/usr/lib/qemu/virtiofsd", "--fd=3", "-o", "source=/srv", "-o", "xattr"]


@pytest.mark.parametrize(
    ("share", "more", "legacy"),
    [
        # A package that says nothing of options: as on NixOS.
        (Share("t", "/srv", "t.sock"), ["--posix-acl"], ["-o", "posix_acl"]),
        (given(), [], []),
        (given(posix_acl=True), ["--posix-acl"], ["-o", "posix_acl"]),
        # The C program has no option for it; the unit's ReadOnlyPaths= has to do.
        (given(read_only=True), ["--readonly"], []),
        (given(cache="auto"), ["--cache=auto"], ["-o", "cache=auto"]),
        (given(cache="always"), ["--cache=always"], ["-o", "cache=always"]),
        (given(cache="never"), ["--cache=never"], ["-o", "cache=none"]),
        (given(extra_arguments=("-x", "--y=$z %n")), ["-x", "--y=$z %n"], ["-x", "--y=$z %n"]),
        (
            given(read_only=True, posix_acl=True, cache="always", extra_arguments=("-x",)),
            ["--posix-acl", "--readonly", "--cache=always", "-x"],
            ["-o", "posix_acl", "-o", "cache=always", "-x"],
        ),
    ],
)
def test_options(share: Share, more: list[str], legacy: list[str]) -> None:
    assert shares.virtiofsd_argv(RUST, share, "/srv") == BASE + more
    assert shares.virtiofsd_argv(LEGACY, share, "/srv") == LEGACY_BASE + legacy


def test_cache_metadata() -> None:
    share = given(cache="metadata")
    assert shares.virtiofsd_argv(RUST, share, "/srv") == [*BASE, "--cache=metadata"]
    with pytest.raises(MicrovmHostError, match="'t' wants cache=metadata") as caught:
        shares.virtiofsd_argv(LEGACY, share, "/srv")
    assert caught.value.path == LEGACY.path


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_is_one_argument_as_it_is(source: str) -> None:
    assert shares.virtiofsd_argv(RUST, given(), source)[2] == f"--shared-dir={source}"


@pytest.mark.parametrize(
    ("source", "escaped"),
    [
        ("/a,b", "/a\\,b"),
        ("/a\\b", "/a\\\\b"),
        ("/a\\,b", "/a\\\\\\,b"),
        ("/a $x %i", "/a $x %i"),
        ("/o,cache=none", "/o\\,cache=none"),
    ],
)
def test_legacy_source_is_one_option(source: str, escaped: str) -> None:
    assert shares.virtiofsd_argv(LEGACY, given(), source)[3] == f"source={escaped}"


# ---- which virtiofsd


def test_find_virtiofsd(host: HostPaths) -> None:
    with pytest.raises(MicrovmHostError, match="has no virtiofsd") as caught:
        shares.find_virtiofsd(host.virtiofsd_places())
    assert "install the package virtiofsd" in caught.value.hint
    assert all(host.at(place) in caught.value.hint for place in VIRTIOFSD_PLACES)

    packages.program(Path(host.root), "usr/lib/qemu/virtiofsd")
    found = shares.find_virtiofsd(host.virtiofsd_places())
    assert (found.path, found.is_legacy) == (host.at("/usr/lib/qemu/virtiofsd"), True)

    # What cannot be executed is none.
    packages.put(Path(host.root), "usr/local/libexec/virtiofsd", "")
    packages.program(Path(host.root), "usr/libexec/virtiofsd")
    found = shares.find_virtiofsd(host.virtiofsd_places())
    assert (found.path, found.is_legacy) == (host.at("/usr/libexec/virtiofsd"), False)


# ---- where a socket may lie


@pytest.fixture
def state(host: HostPaths) -> str:
    os.mkdir(host.vm("web"))
    return host.vm("web")


def socket_path(text: str, state: str) -> str:
    return shares.socket_path(Share("t", "/srv", text), state, "/package")


@pytest.mark.parametrize("text", ["t.sock", "run/sub.sock", "a/b/c.sock", "with space.sock"])
def test_socket_below_the_state_directory(text: str, state: str) -> None:
    assert socket_path(text, state) == f"{state}/{text}"
    assert socket_path(f"{state}/{text}", state) == f"{state}/{text}"
    # Looking changes nothing.
    assert os.listdir(state) == []


@pytest.mark.parametrize("text", ["/etc/x.sock", "/run/x.sock", "/x", "{state}", "{state}-2/x"])
def test_socket_elsewhere(text: str, state: str) -> None:
    with pytest.raises(PackageError, match="lies outside of the VM's state directory") as caught:
        socket_path(text.format(state=state), state)
    assert caught.value.path == "/package/share/microvm/virtiofs/t/socket"


def test_socket_of_another_vm(state: str) -> None:
    with pytest.raises(PackageError, match="lies outside"):
        socket_path(f"{os.path.dirname(state)}/web2/x.sock", state)


def test_socket_with_a_long_path(state: str) -> None:
    most = 107 - len(state) - 1
    assert len(socket_path("s" * most, state)) == 107
    with pytest.raises(PackageError, match="more than 107 bytes"):
        socket_path("s" * (most + 1), state)


@pytest.mark.parametrize("kind", ["link", "dangling", "file"])
def test_socket_below_what_is_no_directory(kind: str, state: str, root: Path) -> None:
    (root / "elsewhere").mkdir()
    if kind == "file":
        Path(state, "run").write_text("")
    else:
        os.symlink(root / ("elsewhere" if kind == "link" else "none"), f"{state}/run")
    with pytest.raises(MicrovmHostError, match="not a directory of root's") as caught:
        socket_path("run/x.sock", state)
    assert caught.value.path == f"{state}/run"


def test_socket_below_a_directory_of_another_user(state: str) -> None:
    os.mkdir(f"{state}/run", 0o755)
    assert socket_path("run/x.sock", state) == f"{state}/run/x.sock"
    if IS_ROOT:
        os.chown(f"{state}/run", 12345, -1)
    else:
        os.chmod(f"{state}/run", 0o775)
    with pytest.raises(MicrovmHostError, match="not a directory of root's"):
        socket_path("run/x.sock", state)


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_socket_in_place_of_something_else(kind: str, state: str) -> None:
    path = Path(state, "disk.img")
    if kind == "file":
        path.write_text("data")
    elif kind == "link":
        os.symlink("/nonexistent", path)
    else:
        path.mkdir()
    with pytest.raises(MicrovmHostError, match="this is no socket") as caught:
        socket_path("disk.img", state)
    assert caught.value.path == str(path)


def test_socket_that_was_left_behind(state: str) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{state}/t.sock")
    assert socket_path("t.sock", state) == f"{state}/t.sock"


# ---- which sources there are


def source_path(text: str, state: str) -> str:
    return shares.source_path(Share("t", text, "t.sock"), state)


def test_sources(state: str, root: Path) -> None:
    (root / "with space").mkdir()
    assert source_path(f"{root}/with space", state) == f"{root}/with space"
    os.symlink(root / "with space", root / "link")
    # Absolute ones are the administrator's own; a link there is meant.
    assert source_path(f"{root}/link", state) == f"{root}/link"
    os.makedirs(f"{state}/data/deep")
    assert source_path("data/deep", state) == f"{state}/data/deep"


def test_source_that_is_missing(state: str) -> None:
    with pytest.raises(MicrovmHostError) as caught:
        source_path("/nonexistent/a b", state)
    assert str(caught.value) == (
        "/nonexistent/a b: the source '/nonexistent/a b' of share 't' does not exist; "
        "create it: mkdir -p '/nonexistent/a b'"
    )
    assert caught.value.exit_code == 1


@pytest.mark.parametrize("source", ["/dev/null", "a-file", "dangling"])
def test_source_that_is_no_directory(source: str, state: str) -> None:
    Path(state, "a-file").write_text("")
    os.symlink("/nonexistent", f"{state}/dangling")
    with pytest.raises(MicrovmHostError, match="is not a directory"):
        source_path(source, state)


@pytest.mark.parametrize("source", ["link", "link/deep", "..", "../..", "a/../..", "."])
def test_relative_source_that_leads_out(source: str, state: str, root: Path) -> None:
    (root / "secret/deep").mkdir(parents=True)
    os.mkdir(f"{state}/a")
    # The VM's user may make this one.
    os.symlink(root / "secret", f"{state}/link")
    with pytest.raises(MicrovmHostError, match="leads out of the state directory"):
        source_path(source, state)


# ---- the plan


class FakeSystemd:
    """Notes what it is to start; its units are as active as they are told to be."""

    def __init__(self, active: str = "active", binds: Sequence[str] = ()) -> None:
        """`binds` are where the package's own script listens."""
        self.started: list[tuple[str, Any, Any]] = []
        self.active = active
        self.binds = binds
        self.listeners: list[socket.socket] = []

    def start_transient(self, unit: str, properties: Any, auxiliary: Any) -> None:
        self.started.append((unit, properties, auxiliary))
        listened = [path for _kind, path in properties.get("Listen", ("", []))[1]]
        for path in listened or (self.binds if unit.endswith(".service") else ()):
            self.bind(path)

    def bind(self, path: str) -> None:
        # Its directory is there: systemd is not to make any.
        self.listeners.append(socket.socket(socket.AF_UNIX))
        self.listeners[-1].bind(path)

    def active_state(self, unit: str) -> str:
        return self.active


@pytest.fixture
def package(root: Path) -> Path:
    return packages.minimal(root / "package")


@pytest.fixture
def virtiofsd(host: HostPaths) -> str:
    return str(packages.program(Path(host.root), "usr/libexec/virtiofsd"))


@pytest.mark.usefixtures("state")
def test_a_share_is_a_socket_and_a_service(
    host: HostPaths, package: Path, virtiofsd: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    systemd = FakeSystemd()
    share = Share("home/alice", str(root), "run/a.sock", options_given=True, read_only=True)
    given_away: list[tuple[str, int, int]] = []
    monkeypatch.setattr(
        os, "chown", lambda path, uid, gid: given_away.append((os.readlink(path), uid, gid))
    )
    os.mkdir(host.vm("web-1"))
    (step,) = shares.plan("web-1", str(package), [share], ALICE, host, systemd)
    assert step.describe() == f"listen for share home/alice ({root}, read-only)"
    record = Record(host.record("web-1", "virtiofsd"))
    step.apply(record)

    socket_unit = "microvm-virtiofsd-web\\x2d1-home-alice.socket"
    service_unit = "microvm-virtiofsd-web\\x2d1-home-alice.service"
    path = f"{host.vm('web-1')}/run/a.sock"
    timer_unit = "microvm-share-lost@web\\x2d1-home-alice.timer"
    units = (socket_unit, service_unit, timer_unit)
    assert record.read() == [*(["unit", unit] for unit in units), ["socket", path]]
    ((unit, properties, auxiliary),) = systemd.started
    assert unit == socket_unit
    expected = {
        "Listen": ("a(ss)", [("Stream", path)]),
        "SocketMode": ("u", 0o600),
        "RemoveOnStop": ("b", True),
        # Its unit waits for it in stopping: nothing else may order the two.
        "DefaultDependencies": ("b", False),
        "Conflicts": ("as", ["shutdown.target"]),
        "Before": (
            "as",
            ["microvm@web-1.service", "microvm-foreground-web\\x2d1.service", "shutdown.target"],
        ),
        "Slice": ("s", "machine.slice"),
        "CollectMode": ("s", "inactive-or-failed"),
    }
    assert {name: properties[name] for name in expected} == expected
    # The VM's user alone may connect.
    assert given_away == [(path, ALICE.uid, ALICE.gid)]
    service = auxiliary[service_unit]
    argv = [virtiofsd, "--fd=3", f"--shared-dir={root}", "--xattr", "--readonly"]
    assert service["ExecStartEx"] == ("a(sasas)", [(virtiofsd, argv, ["no-env-expand"])])
    assert service["LimitNOFILE"] == ("t", 1048576)
    assert service["ReadOnlyPaths"] == ("as", [str(root)])
    assert service["StartLimitIntervalUSec"] == ("t", 0)
    # Stopped with the unit that made it, it would let down a hypervisor that has connected, and
    # the socket one that is started before the stop has come to that unit.
    assert not {"BindsTo", "PartOf", "Requires"} & {*service, *properties}
    # Failed, it is told of, and not started again.
    lost = "microvm-share-lost@web\\x2d1-home-alice.service"
    assert service["OnFailure"] == ("as", [lost])
    # Ended in order, it may have done so with its hypervisor, and the timer is stopped.
    assert service["OnSuccess"] == ("as", [timer_unit])
    timer = auxiliary[timer_unit]
    assert timer["TimersMonotonic"] == ("a(st)", [("OnActiveSec", 5_000_000)])
    # By default, that would be a minute, and another end would not start it again.
    assert timer["AccuracyUSec"][1] <= 1_000_000
    assert timer["RemainAfterElapse"] == ("b", False)
    # What it stands on is gone before the units are stopped, by which virtiofsd ends in order, too.
    served = Record(host.record("web-1", "served-shares"))
    condition = ("ConditionPathExists", False, False, served.path)
    assert timer["Conditions"] == ("a(sbbs)", [condition])
    assert served.read() == [["share", "home/alice"]]
    left: list[list[list[str]]] = []
    shares.undo(record, host.vm("web-1"), lambda _: left.append(served.read()))
    assert left == [[]]
    assert "Restart" not in service
    assert service["After"] == ("as", ["local-fs.target", "remote-fs.target"])
    assert "User" not in service
    rights = service["CapabilityBoundingSet"][1]
    # capability.h: CAP_SYS_ADMIN and CAP_SETFCAP it needs, CAP_SYS_PTRACE and CAP_NET_ADMIN not.
    assert [bool(rights >> bit & 1) for bit in (21, 31, 19, 12)] == [True, True, False, False]
    assert service["DevicePolicy"] == ("s", "closed")
    assert service["RestrictAddressFamilies"] == ("(bas)", (True, ["AF_UNIX"]))


@pytest.mark.usefixtures("state", "virtiofsd")
def test_a_source_that_the_vms_user_could_exchange_is_served_with_their_rights(
    host: HostPaths, package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust, "exchangeable", lambda path, by: "/home/alice")
    systemd = FakeSystemd()
    share = Share("t", str(root), "t.sock", options_given=True)
    (step,) = shares.plan("web", str(package), [share], ALICE, host, systemd)
    assert step.describe() == f"listen for share t ({root}, with the rights of alice alone)"
    step.apply(Record(host.record("web", "virtiofsd")))
    service = systemd.started[0][2]["microvm-virtiofsd-web-t.service"]
    assert service["User"] == ("s", str(ALICE.uid))
    assert service["Group"] == ("s", str(ALICE.gid))
    assert service["CapabilityBoundingSet"] == ("t", 0)

    # Neither QEMU's former virtiofsd nor a package's own script can be run so.
    packages.program(package, "bin/virtiofsd-run")
    plain = Share("t", str(root), "t.sock")
    with pytest.raises(MicrovmHostError, match="would export as root") as caught:
        shares.plan("web", str(package), [plain], ALICE, host, systemd)
    assert caught.value.path == "/home/alice"
    assert "move what is shared to a directory that only root can write, or" in caught.value.hint
    own = f"{host.vm('web')}/data"
    monkeypatch.setattr(trust, "exchangeable", lambda path, by: own)
    with pytest.raises(MicrovmHostError, match="would export as root") as caught:
        shares.plan("web", str(package), [plain], ALICE, host, systemd)
    assert f"chown root: '{own}'" in caught.value.hint
    monkeypatch.setattr(trust, "exchangeable", lambda path, by: "/home/alice")
    monkeypatch.setattr(shares, "find_virtiofsd", lambda _: LEGACY)
    with pytest.raises(MicrovmHostError, match="former one cannot") as caught:
        shares.plan("web", str(package), [share], ALICE, host, systemd)
    assert caught.value.path == "/home/alice"


@pytest.mark.usefixtures("state", "virtiofsd")
def test_a_directory_for_a_socket_that_somebody_was_quicker_to_make(
    host: HostPaths, package: Path, root: Path, state: str
) -> None:
    systemd = FakeSystemd()
    share = Share("t", str(root), "run/t.sock", options_given=True)
    (step,) = shares.plan("web", str(package), [share], ALICE, host, systemd)
    os.mkdir(root / "elsewhere")
    os.symlink(root / "elsewhere", f"{state}/run")
    with pytest.raises(MicrovmHostError, match="not a directory of root's alone"):
        step.apply(Record(host.record("web", "virtiofsd")))
    assert systemd.started == []
    assert os.listdir(root / "elsewhere") == []


@pytest.mark.usefixtures("state", "virtiofsd")
def test_a_writable_share_is_not_read_only(host: HostPaths, package: Path, root: Path) -> None:
    systemd = FakeSystemd()
    share = Share("t", str(root), "t.sock", options_given=True)
    (step,) = shares.plan("web", str(package), [share], ALICE, host, systemd)
    assert step.describe() == f"listen for share t ({root})"
    step.apply(Record(host.record("web", "virtiofsd")))
    service = systemd.started[0][2]["microvm-virtiofsd-web-t.service"]
    assert "ReadOnlyPaths" not in service
    assert "--readonly" not in service["ExecStartEx"][1][0][1]


@pytest.mark.usefixtures("state")
def test_what_virtiofsd_cannot_do_is_found_while_planning(
    host: HostPaths, package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "find_virtiofsd", lambda _: LEGACY)
    both = [
        Share("a", str(root), "a.sock"),
        Share("b", str(root), "b.sock", True, False, "metadata"),
    ]
    systemd = FakeSystemd()
    with pytest.raises(MicrovmHostError, match="'b' wants cache=metadata"):
        shares.plan("web", str(package), both, ALICE, host, systemd)
    assert systemd.started == []


@pytest.mark.usefixtures("state", "virtiofsd")
def test_one_socket_for_two(host: HostPaths, package: Path, root: Path, state: str) -> None:
    both = [Share("a", str(root), "x.sock"), Share("b", str(root), f"{state}/x.sock")]
    with pytest.raises(PackageError, match="the shares 'a' and 'b' have one socket"):
        shares.plan("web", str(package), both, ALICE, host, FakeSystemd())


@pytest.mark.usefixtures("state")
def test_own_script_where_only_it_knows_the_options(
    host: HostPaths, package: Path, root: Path, state: str
) -> None:
    script = str(packages.program(package, "bin/virtiofsd-run"))
    done: list[tuple[list[list[str]], list[str]]] = []
    # No virtiofsd of the host is asked for.
    plain = [Share("a", str(root), "a.sock"), Share("b", str(root), "b.sock")]
    systemd = FakeSystemd(binds=[f"{state}/a.sock", f"{state}/b.sock"])
    (step,) = shares.plan("web", str(package), plain, ALICE, host, systemd)
    assert step.describe() == "run bin/virtiofsd-run of the package for 2 shares"

    record = Record(host.record("web", "virtiofsd"))
    # Of an earlier run.
    systemd.bind(f"{state}/a.sock")
    # What root's programs would write to, through a link.
    os.mkdir(root / "elsewhere")
    Path(root / "elsewhere/file").write_text("of somebody else's")
    os.symlink(root / "elsewhere/file", f"{state}/supervisord.log")
    os.link(root / "elsewhere/file", f"{state}/a.sock.pid")
    step.apply(record)
    reserved = ["a.sock.pid", "b.sock.pid", "supervisord.log", "supervisord.pid"]
    watch, timer = "microvm-share-lost@web.path", "microvm-share-lost@web.timer"
    units = [watch, "microvm-virtiofsd-web.service", timer, "microvm-share-lost@web.service"]
    assert record.read() == [
        *(["unit", unit] for unit in units),
        ["socket", f"{state}/a.sock"],
        ["socket", f"{state}/b.sock"],
        *(["file", f"{state}/{name}"] for name in reserved),
    ]
    for name in reserved:
        status = os.lstat(f"{state}/{name}")
        assert stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size == 0
    assert Path(root / "elsewhere/file").read_text() == "of somebody else's"
    for name in ("a.sock", "b.sock"):
        assert stat.S_IMODE(os.stat(f"{state}/{name}").st_mode) == 0o600
    ((unit, properties, auxiliary), watching) = systemd.started
    assert unit == "microvm-virtiofsd-web.service"
    assert properties["OnFailure"] == ("as", ["microvm-share-lost@web.service"])
    assert properties["OnSuccess"] == ("as", [timer])
    assert properties["OOMPolicy"] == ("s", "continue")
    own = Record(host.record("web", "served-shares"))
    assert own.read() == [
        ["share", tag, f"{state}/{tag}.sock", str(ALICE.uid)] for tag in ("a", "b")
    ]
    # Stopped in order, the script starts no timer.
    assert list(auxiliary) == [timer]
    condition = ("ConditionPathExists", False, False, own.path)
    assert auxiliary[timer]["Conditions"] == ("a(sbbs)", [condition])
    shares.undo(record, state, lambda units: done.append((own.read(), [*units])))
    assert done == [([], units)]
    paths = [("PathChanged", f"{state}/{tag}.sock") for tag in ("a", "b")]
    assert (watching[0], watching[1]["Paths"]) == (watch, ("a(ss)", paths))
    assert properties["ExecStartEx"][1] == [(script, [script], ["no-env-expand"])]
    assert properties["WorkingDirectory"] == ("s", state)
    assert properties["ProtectSystem"] == ("s", "strict")
    assert properties["ReadWritePaths"] == ("as", [state, str(root), str(root)])
    assert not {"BindsTo", "PartOf", "Requires"} & {*properties}


@pytest.mark.usefixtures("state")
def test_own_script_that_ends(host: HostPaths, package: Path, root: Path) -> None:
    packages.program(package, "bin/virtiofsd-run")
    (step,) = shares.plan(
        "web", str(package), [Share("a", str(root), "a.sock")], ALICE, host, FakeSystemd("failed")
    )
    with pytest.raises(MicrovmHostError, match="ended before it listened at") as caught:
        step.apply(Record(host.record("web", "virtiofsd")))
    assert "journalctl -u 'microvm-virtiofsd-web.service'" in caught.value.hint


@pytest.mark.usefixtures("state")
def test_own_script_that_does_not_listen(
    host: HostPaths, package: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "OWN_SCRIPT_WITHIN", 0.1)
    packages.program(package, "bin/virtiofsd-run")
    (step,) = shares.plan(
        "web", str(package), [Share("a", str(root), "a.sock")], ALICE, host, FakeSystemd()
    )
    with pytest.raises(MicrovmHostError, match="does not listen at"):
        step.apply(Record(host.record("web", "virtiofsd")))


@pytest.mark.usefixtures("state")
def test_a_socket_that_nobody_listens_at_is_not_served(
    host: HostPaths, package: Path, root: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A virtiofsd that died at once has left its socket, at the first look or a moment later."""
    monkeypatch.setattr(shares, "OWN_SCRIPT_WITHIN", 0.5)
    packages.program(package, "bin/virtiofsd-run")
    plain = [Share("a", str(root), "a.sock"), Share("b", str(root), "b.sock")]
    systemd = FakeSystemd(binds=[f"{state}/a.sock", f"{state}/b.sock"])
    (step,) = shares.plan("web", str(package), plain, ALICE, host, systemd)
    looks: list[str] = []
    look = shares.RunOwnScript._is_listened_at

    def dies_after_a_look(step: shares.RunOwnScript, path: str) -> bool:
        found = look(step, path)
        looks.append(path)
        systemd.listeners[-1].close()
        return found

    monkeypatch.setattr(shares.RunOwnScript, "_is_listened_at", dies_after_a_look)
    record = Record(host.record("web", "virtiofsd"))
    with pytest.raises(MicrovmHostError, match=f"does not listen at {state}/b.sock") as caught:
        step.apply(record)
    assert "journalctl -u 'microvm-virtiofsd-web.service'" in caught.value.hint
    assert looks[:2] == [f"{state}/a.sock", f"{state}/b.sock"]
    assert Record(host.record("web", "served-shares")).read() == []


# ---- what holds for all units that are made


def made(systemd: FakeSystemd) -> dict[str, Any]:
    """The units that were asked for, with their properties."""
    return {
        unit: properties
        for name, main, others in systemd.started
        for unit, properties in {name: main, **others}.items()
    }


@pytest.fixture
def all_units(host: HostPaths, package: Path, root: Path, state: str) -> dict[str, Any]:
    """All units of shares: by systemd's sockets, and by a package's own script."""
    packages.program(Path(host.root), "usr/libexec/virtiofsd")
    record = Record(host.record("web", "virtiofsd"))
    systemd = FakeSystemd(binds=[f"{state}/b.sock"])
    given = Share("a", str(root), "a.sock", options_given=True)
    for step in shares.plan("web", str(package), [given], ALICE, host, systemd):
        step.apply(record)
    packages.program(package, "bin/virtiofsd-run")
    own = Share("b", str(root), "b.sock")
    for step in shares.plan("web", str(package), [own], ALICE, host, systemd):
        step.apply(record)
    return made(systemd)


def test_isolate_stops_no_unit_of_a_running_vm(all_units: dict[str, Any]) -> None:
    """`systemctl isolate` stops what no unit requires, and nothing requires transient units."""
    assert {unit.rpartition(".")[2] for unit in all_units} == {"socket", "service", "timer", "path"}
    for unit, properties in all_units.items():
        assert properties.get("IgnoreOnIsolate") == ("b", True), unit


def test_no_message_of_a_virtiofsd_or_a_script_steers_its_unit(all_units: dict[str, Any]) -> None:
    services = {unit for unit in all_units if unit.endswith(".service")}
    assert services == {"microvm-virtiofsd-web-a.service", "microvm-virtiofsd-web.service"}
    for unit in services:
        # Without the property, a service of systemd's default type hears nobody (systemd.service).
        assert all_units[unit].get("NotifyAccess", ("s", "none")) == ("s", "none"), unit
        assert not {"Type", "WatchdogUSec", "BusName"} & {*all_units[unit]}, unit
    # A script that reports ends by `set -e` if there is nowhere to report to.
    environment = all_units["microvm-virtiofsd-web.service"]["Environment"]
    assert environment == ("as", ["NOTIFY_SOCKET=/run/systemd/notify"])


@pytest.mark.usefixtures("state", "virtiofsd")
def test_options_in_files_win_over_the_script(host: HostPaths, package: Path, root: Path) -> None:
    packages.program(package, "bin/virtiofsd-run")
    mixed = [
        Share("a", str(root), "a.sock"),
        Share("b", str(root), "b.sock", options_given=True, read_only=True),
    ]
    steps = shares.plan("web", str(package), mixed, ALICE, host, FakeSystemd())
    assert [type(step) for step in steps] == [shares.ServeShare, shares.ServeShare]


# ---- undoing


UNIT, OWN_UNIT = "microvm-virtiofsd-web-a.socket", "microvm-virtiofsd-web.service"


def test_undo(host: HostPaths, state: str) -> None:
    record = Record(host.record("web", "virtiofsd"))
    for verb, name in (("unit", UNIT), ("unit", OWN_UNIT)):
        record.append(verb, name)
    os.mkdir(f"{state}/run")
    paths = [f"{state}/run/left.sock", f"{state}/gone.sock", f"{state}/file"]
    for path in paths:
        record.append("socket", path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(paths[0])
    Path(paths[2]).write_text("put there by the VM's user")
    stopped: list[str] = []
    assert shares.undo(record, state, stopped.extend) == []
    assert stopped == [UNIT, OWN_UNIT]
    assert os.path.exists(paths[2])
    assert not os.path.exists(paths[0])
    # Made for the socket.
    assert not os.path.exists(f"{state}/run")
    assert os.path.isdir(state)
    assert record.read() == []


def test_undo_keeps_the_record_of_what_it_could_not(host: HostPaths, state: str) -> None:
    record = Record(host.record("web", "virtiofsd"))
    record.append("unit", UNIT)
    os.mkdir(f"{state}/run", 0o755)
    record.append("socket", f"{state}/run/a.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{state}/run/a.sock")

    def refuse(units: Sequence[str]) -> None:
        raise MicrovmHostError("systemd does not answer")

    assert shares.undo(record, state, refuse) == ["systemd does not answer"]
    # It goes on past the failure.
    assert os.listdir(f"{state}/run") == []
    # But systemd, which listens still, will remove its socket by the path: nobody else is to say
    # where that leads.
    assert os.path.isdir(f"{state}/run")
    assert len(record.read()) == 2
    assert shares.undo(record, state, lambda units: None) == []
    assert os.listdir(state) == []


def test_undo_touches_nothing_of_others(host: HostPaths, state: str) -> None:
    """Whatever a record says: it is root's, but might come from another version, or be damaged."""
    record = Record(host.record("web", "virtiofsd"))
    foreign = host.at("/run.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(foreign)
    lines = [
        ("unit", "sshd.service"),
        ("unit", "microvm-virtiofsd-db-a.socket"),
        ("socket", foreign),
        ("socket", f"{state}/../../../../run.sock"),
        ("socket", state),
        ("socket",),
        ("unit", UNIT, "more"),
        ("mount", "/"),
    ]
    for line in lines:
        record.append(*line)
    stopped: list[str] = []
    problems = shares.undo(record, state, stopped.extend)
    assert stopped == []
    assert len(problems) == len(lines)
    assert "is no line of this record" in problems[0]
    assert os.path.exists(foreign)
    assert len(record.read()) == len(lines)


# ---- what the VM's user puts where root goes


class Elsewhere:
    """What the VM's user may not touch, with all names in it that root would look for."""

    def __init__(self, directory: Path) -> None:
        self.path = directory
        for part in (directory, directory / "deep"):
            part.mkdir()
            for name in ("a.sock", "b.sock"):
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(str(part / name))
                (part / f"{name}.pid").touch(0o644)
        (directory / "empty").mkdir()
        self._before = self._all()

    def _all(self) -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mode) for path in self.path.rglob("*"))

    def is_as_it_was(self) -> bool:
        return self._all() == self._before


@pytest.fixture
def elsewhere(root: Path) -> Elsewhere:
    return Elsewhere(root / "elsewhere")


def undone(record: Record, state: str) -> list[str]:
    return shares.undo(record, state, lambda units: None)


@pytest.mark.parametrize("has_script", [False, True])
@pytest.mark.parametrize("inner", ["run", "run/deep"])
@pytest.mark.usefixtures("virtiofsd")
def test_a_link_that_comes_after_the_plan(
    host: HostPaths,
    package: Path,
    root: Path,
    state: str,
    elsewhere: Elsewhere,
    inner: str,
    has_script: bool,
) -> None:
    """Set-up refuses it, and what is undone then does not go through it either."""
    if has_script:
        packages.program(package, "bin/virtiofsd-run")
    both = [Share(tag, str(root), f"{inner}/{tag}.sock") for tag in ("a", "b")]
    systemd = FakeSystemd()
    steps = shares.plan("web", str(package), both, ALICE, host, systemd)
    os.symlink(elsewhere.path, f"{state}/run")
    record = Record(host.record("web", "virtiofsd"))
    with pytest.raises(MicrovmHostError, match="not a directory of root's alone") as caught:
        plan.carry_out(steps, record, lambda done: undone(done, state))
    assert caught.value.path == f"{state}/run"
    assert systemd.started == []
    assert elsewhere.is_as_it_was()
    assert os.listdir(state) == ["run"]
    assert record.read() == []


@pytest.mark.parametrize("verb", ["socket", "file"])
@pytest.mark.parametrize("path", ["run/a.sock", "run/deep/a.sock", "run/empty/a.sock"])
def test_undo_follows_no_link(
    host: HostPaths, state: str, elsewhere: Elsewhere, verb: str, path: str
) -> None:
    record = Record(host.record("web", "virtiofsd"))
    record.append(verb, f"{state}/{path}" + (".pid" if verb == "file" else ""))
    os.symlink(elsewhere.path, f"{state}/run")
    # Nothing of ours is behind it: what is root's would have stayed.
    assert undone(record, state) == []
    assert elsewhere.is_as_it_was()
    assert record.read() == []


def test_undo_goes_into_no_directory_of_others(host: HostPaths, state: str) -> None:
    """They may have moved it there, and what they could not have removed in it with it."""
    record = Record(host.record("web", "virtiofsd"))
    os.mkdir(f"{state}/run")
    os.chmod(f"{state}/run", 0o1777)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{state}/run/a.sock")
    record.append("socket", f"{state}/run/a.sock")
    assert undone(record, state) == []
    assert os.listdir(f"{state}/run") == ["a.sock"]


def test_undo_of_two_in_one_directory(
    host: HostPaths, state: str, elsewhere: Elsewhere, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd has removed the sockets; the directory's name is taken as soon as it is free."""
    record = Record(host.record("web", "virtiofsd"))
    os.mkdir(f"{state}/run", 0o755)
    for name in ("a.sock", "b.sock"):
        record.append("socket", f"{state}/run/{name}")
    rmdir = os.rmdir

    def taken_at_once(*arguments: Any, **named: Any) -> None:
        rmdir(*arguments, **named)
        os.symlink(elsewhere.path, f"{state}/run")

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", taken_at_once)
        assert undone(record, state) == []
    assert os.path.islink(f"{state}/run")
    assert elsewhere.is_as_it_was()


def test_undo_of_a_state_directory_that_is_none(
    host: HostPaths, state: str, elsewhere: Elsewhere
) -> None:
    record = Record(host.record("web", "virtiofsd"))
    for _ in range(2):
        record.append("socket", f"{state}/a.sock")
        assert undone(record, state) == []
        assert record.read() == []
        if os.path.isdir(state):
            os.rmdir(state)
    os.symlink(elsewhere.path, state)
    record.append("socket", f"{state}/a.sock")
    assert undone(record, state) == []
    assert elsewhere.is_as_it_was()


@pytest.mark.parametrize("is_hard", [False, True])
@pytest.mark.usefixtures("state")
def test_a_link_in_the_place_of_a_socket_that_is_to_be_given_away(
    host: HostPaths,
    package: Path,
    root: Path,
    state: str,
    monkeypatch: pytest.MonkeyPatch,
    is_hard: bool,
) -> None:
    """Root's virtiofsd makes its socket anew when somebody disconnected, after it was seen."""
    packages.program(package, "bin/virtiofsd-run")
    plain = [Share("a", str(root), "a.sock")]
    (step,) = shares.plan("web", str(package), plain, ALICE, host, FakeSystemd())
    secret = root / "secret"
    secret.touch(0o644)

    def seen(_: shares.RunOwnScript, path: str) -> bool:
        if os.path.lexists(path):
            return True
        if is_hard:
            os.link(secret, path)
        else:
            os.symlink(secret, path)
        return True

    monkeypatch.setattr(shares.RunOwnScript, "_is_listened_at", seen)
    with pytest.raises(MicrovmHostError, match="is to be a socket of root's"):
        step.apply(Record(host.record("web", "virtiofsd")))
    assert stat.S_IMODE(secret.stat().st_mode) == 0o644


@pytest.mark.usefixtures("state")
def test_a_second_name_of_another_socket_is_not_waited_for(
    host: HostPaths, package: Path, root: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shares, "OWN_SCRIPT_WITHIN", 0.1)
    packages.program(package, "bin/virtiofsd-run")
    plain = [Share("a", str(root), "a.sock")]
    systemd = FakeSystemd()
    (step,) = shares.plan("web", str(package), plain, ALICE, host, systemd)
    systemd.bind(str(root / "other.sock"))
    os.chmod(root / "other.sock", 0o755)
    start = systemd.start_transient

    def start_and_link(*arguments: Any) -> None:
        start(*arguments)
        os.link(root / "other.sock", f"{state}/a.sock")

    monkeypatch.setattr(systemd, "start_transient", start_and_link)
    with pytest.raises(MicrovmHostError, match="does not listen at"):
        step.apply(Record(host.record("web", "virtiofsd")))
    assert stat.S_IMODE(os.stat(root / "other.sock").st_mode) == 0o755
