# SPDX-License-Identifier: MIT
"""The units: documented, commented, bound to the VM, and understood by systemd."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
UNITS = sorted((REPOSITORY / "units").iterdir())
SET_UP = [
    "microvm-macvtap-interfaces@.service.in",
    "microvm-pci-devices@.service.in",
    "microvm-set-booted@.service.in",
    "microvm-tap-interfaces@.service.in",
    "microvm-virtiofsd@.service.in",
]
MORE_SERVICES = [
    "install-microvm@.service.in",
    "microvm-again@.service.in",
    "microvm-guard@.service.in",
    "microvm-machined@.service.in",
    "microvm-share-lost@.service.in",
    "microvm@.service.in",
]
STATE = "/var/lib/microvms"
# Directives that take rights away, or give some; each has a reason beside it.
HARDENING = re.compile(
    r"(CapabilityBoundingSet|AmbientCapabilities|DevicePolicy|DeviceAllow|NoNewPrivileges"
    r"|Protect\w+|Private\w+|Restrict\w+|SystemCall\w+|ReadOnlyPaths|InaccessiblePaths"
    r"|MemoryDenyWriteExecute|LockPersonality|UMask|Limit\w+|KillMode|Restart\w*|Timeout\w+)="
)
# Where a reason would only say the same again.
PLAIN = {"TimeoutStartSec=60"}

named = pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)


def lines(name: str) -> list[str]:
    return (REPOSITORY / "units" / name).read_text().splitlines()


def values(name: str, key: str) -> list[str]:
    """All words that a unit gives to a key."""
    found = [line.partition("=")[2] for line in lines(name) if line.startswith(f"{key}=")]
    return [word for value in found for word in value.split()]


def test_each_unit_is_known_here() -> None:
    assert [path.name for path in UNITS] == sorted(
        [*SET_UP, *MORE_SERVICES]
        + ["microvm-set-up@.target", "microvm-undo@.target", "microvms.target"]
    )


@named
def test_documentation_names_pages_that_exist(path: Path) -> None:
    pages = values(path.name, "Documentation")
    assert pages
    for page in pages:
        match = re.fullmatch(r"man:([\w.-]+)\((\d)\)", page)
        assert match, page
        assert (REPOSITORY / f"man/{match[1]}.{match[2]}").is_file(), f"{page} is not in man/"


@named
def test_each_unit_says_what_it_is(path: Path) -> None:
    assert len(values(path.name, "Description")) >= 1
    assert lines(path.name)[1] == "[Unit]"


@named
def test_hardening_has_its_reason_beside_it(path: Path) -> None:
    before = ""
    for line in lines(path.name):
        if HARDENING.match(line) and line not in PLAIN:
            # One comment may speak for the settings that follow each other.
            said = before.startswith("#") or (HARDENING.match(before) and before not in PLAIN)
            assert said, f"{path.name}: no comment above {line}"
        before = line


@pytest.mark.parametrize(
    "name", [*SET_UP, *(name for name in MORE_SERVICES if name != "microvm@.service.in")]
)
def test_root_is_bounded_or_it_is_said_why_not(name: str) -> None:
    text = "\n".join(lines(name))
    bounded = values(name, "NoNewPrivileges") == ["yes"] and any(
        line.startswith("CapabilityBoundingSet=") for line in lines(name)
    )
    assert bounded or "# No sandbox" in text
    assert (
        "ProtectSystem=strict" in text
        or "# No sandbox" in text
        or "# No ProtectSystem=" in text
        or "file system sandbox" in text
    )


@pytest.mark.parametrize("name", SET_UP)
def test_set_up_ends_with_the_vm(name: str) -> None:
    assert values(name, "PartOf") == ["microvm@%i.service"]
    assert values(name, "StopWhenUnneeded") == ["yes"]
    assert "microvm@%i.service" in values(name, "Before")
    assert values(name, "Type") == ["oneshot"]
    assert values(name, "RemainAfterExit") == ["yes"]
    # ExecStop= does not run when starting failed.
    assert values(name, "ExecStop") == []
    # One that was killed is followed by another only where no next start may be waited for.
    after = [line for line in lines(name) if line.startswith("ExecStopPost=")]
    assert len(after) == 1 + ("pci-devices" in name)


@pytest.mark.parametrize("name", SET_UP)
def test_vm_requires_and_follows_what_sets_it_up(name: str) -> None:
    unit = name.removesuffix(".in").replace("@.", "@%i.")
    assert unit in values("microvm@.service.in", "Requires")
    assert unit in values("microvm@.service.in", "After")


@pytest.mark.parametrize("name", [name for name in SET_UP if "set-booted" not in name])
def test_set_up_follows_set_booted_and_is_skipped_where_not_asked_for(name: str) -> None:
    assert values(name, "Requires") == ["microvm-set-booted@%i.service"]
    assert "microvm-set-booted@%i.service" in values(name, "After")
    (condition,) = values(name, "ConditionPathExists")
    # What was booted, not what is current by now.
    assert condition.startswith("@statedir@/%i/booted/share/microvm/")


def test_vm_ends_before_what_it_needs_of_the_host_when_that_shuts_down() -> None:
    # Units stop in the opposite order. Each thing of the host's that a guest may need has a target
    # or a mount that it is up before: network managers, network file systems, the state directory.
    name = "microvm@.service.in"
    assert {"network.target", "remote-fs.target"} <= {*values(name, "After")}
    assert values(name, "RequiresMountsFor") == ["@statedir@"]
    # What stops a unit at shutdown at all, and has it run after local-fs.target.
    assert values(name, "DefaultDependencies") == []


def test_devices_may_take_their_time_to_be_given_back() -> None:
    """systemd hears of that from none but the main process, unless it is told to."""
    assert values("microvm-pci-devices@.service.in", "NotifyAccess") == ["exec"]


def test_what_failed_to_start_is_undone_and_what_failed_to_end_is_not() -> None:
    """In a restart, the latter would take back the start."""
    target, units = (
        "microvm-set-up@.target",
        [name.removesuffix(".in").replace("@.", "@%i.") for name in SET_UP],
    )
    assert sorted(values(target, "Requires")) == sorted(values(target, "After")) == sorted(units)
    assert values(target, "PartOf") == ["microvm@%i.service"]
    assert values(target, "StopWhenUnneeded") == ["yes"]
    for key in ("Requires", "After"):
        assert "microvm-set-up@%i.target" in values("microvm@.service.in", key)
    # Only one of those may be what leads there, and each to a start anew.
    leads = {path.name: values(path.name, "OnFailure") for path in UNITS}
    assert {name: found for name, found in leads.items() if found} == {
        target: ["microvm-undo@%i.target"],
        **{name: ["microvm-again@%i.service"] for name in SET_UP},
    }
    assert values("microvm-again@.service.in", "PartOf") == ["microvm@%i.service"]


def test_guard_is_stopped_with_the_vm_and_not_after_it() -> None:
    name, unit = "microvm-guard@.service.in", "microvm-guard@%i.service"
    assert values(name, "PartOf") == ["microvm@%i.service"]
    assert values(name, "StopWhenUnneeded") == ["yes"]
    assert values(name, "Requires") == ["microvm-set-booted@%i.service"] == values(name, "After")
    assert values(name, "Before") == values(name, "ExecStart") == []
    assert unit in values("microvm@.service.in", "Wants")
    assert unit not in values("microvm@.service.in", "After")


@pytest.mark.parametrize(
    "name",
    [*SET_UP, *MORE_SERVICES],
)
def test_services(name: str) -> None:
    assert values(name, "StartLimitIntervalSec") == ["0"]
    assert values(name, "Slice") == ["machine.slice"]
    for key in ("ExecStart", "ExecStop", "ExecStopPost"):
        for line in lines(name):
            if line.startswith(f"{key}="):
                assert re.fullmatch(rf"{key}=[+!-]?@libexecdir@/helper [a-z-]+ %i", line)


def test_registration_is_in_nobodys_way() -> None:
    name = "microvm-machined@.service.in"
    assert name.removesuffix(".in").replace("@.", "@%i.") in values("microvm@.service.in", "Wants")
    assert values(name, "After") == ["microvm@%i.service"]
    assert values(name, "PartOf") == ["microvm@%i.service"]
    # The next start registers anew; and machined is not started for VMs that do not ask for it.
    assert values(name, "RemainAfterExit") == []
    assert values(name, "Wants") == values(name, "Requires") == []


# ---- what holds for all units of the toolkit, those too that are made when they are needed

# Verbs of the helper that become, or run, what is a package's or a guest's.
RUNS_PACKAGES = {"start", "stop"}
# Who is heard beside the main process, and what for. A hypervisor is the main process of these two
# units: it is not given $NOTIFY_SOCKET, and microvm-guard@ bounds what it could do with it anyway.
HEARD = {
    # The helper that starts the VM says when it is ready, the one that stops it waits longer.
    "microvm@.service.in": "exec",
    # The helper that gives devices back may need time.
    "microvm-pci-devices@.service.in": "exec",
}
# Units that a running VM does not need, and why `systemctl isolate` may stop each.
NEEDLESS = {
    # Waits to start a VM again that is down; isolating starts it at once, or it is not wanted.
    "microvm-again@.service.in",
    # Stops units that are down.
    "microvm-undo@.target",
    # Brings in what the next start takes.
    "install-microvm@.service.in",
    # Wants VMs, and nothing else.
    "microvms.target",
}


def code(*suffixes: str) -> str:
    """All of the toolkit's code, or of some modules."""
    found = [REPOSITORY / "microvm_host" / name for name in suffixes]
    return "\n".join(
        path.read_text() for path in found or sorted((REPOSITORY / "microvm_host").rglob("*.py"))
    )


@pytest.mark.parametrize("name", [*SET_UP, *MORE_SERVICES])
def test_only_helpers_steer_units_by_messages(name: str) -> None:
    access = values(name, "NotifyAccess") or ["none"]
    assert access[0] in ("none", HEARD.get(name, "main")), name
    verbs = {line.split()[1] for line in lines(name) if line.startswith(("ExecStart=", "ExecStop"))}
    if RUNS_PACKAGES & verbs:
        assert name == "microvm@.service.in"
    assert "Watchdog" not in "\n".join(lines(name))


def test_code_that_makes_units_says_who_is_heard() -> None:
    """A new unit has to be thought of here: by whom it may be steered, and what stops it."""
    modules = {
        path.name
        for path in (REPOSITORY / "microvm_host").rglob("*.py")
        if re.search(r"\.start_transient\(|\"systemd-run\"", path.read_text())
    }
    # tests/unit/test_shares.py looks at each unit of the first.
    assert modules == {"shares.py", "jobs.py", "reconcile.py"}
    heard = re.findall(r'NotifyAccess(?:": |=)(.*?),?\n', code())
    # Of a package's script nothing; of a VM in the foreground as of microvm@.
    assert sorted(heard) == ['"exec"', '("s", "none")']
    # What holds back starts while `reconcile` works does so when the host isolates a target, too.
    assert code("reconcile.py").count("--property=IgnoreOnIsolate=yes") == 1


def test_a_status_cannot_be_more_than_that() -> None:
    """What goes into a message to systemd passes log.status_assignment, which has one line."""
    found = [line.strip() for line in code().splitlines() if re.search(r"[\"']STATUS=", line)]
    assert len(found) == 1 and "_folded" in found[0], found


def test_isolate_stops_nothing_that_a_running_vm_needs() -> None:
    """Units that it does not name are pulled in by the VM, or say that they are to be left."""
    pulled = {"microvm@%i.service"}
    while True:
        files = [name.replace("@%i.", "@.") for name in pulled]
        more = {
            unit
            for path in UNITS
            if path.name.removesuffix(".in") in files
            for key in ("Requires", "Wants", "BindsTo")
            for unit in values(path.name, key)
        }
        if more <= pulled:
            break
        pulled |= more
    for path in UNITS:
        unit = path.name.removesuffix(".in").replace("@.", "@%i.")
        if unit not in pulled and path.name not in NEEDLESS:
            assert values(path.name, "IgnoreOnIsolate") == ["yes"], path.name


def test_vms_are_part_of_the_target_that_wants_them() -> None:
    assert values("microvm@.service.in", "PartOf") == ["microvms.target"]
    assert '"PartOf": "microvms.target"' in code("cli/jobs.py")


@pytest.mark.parametrize(
    "name",
    ["microvm@.service.in", "microvm-set-booted@.service.in", "install-microvm@.service.in"],
)
def test_users_of_a_directory_service_are_known_first(name: str) -> None:
    assert "nss-user-lookup.target" in values(name, "After")


def test_verbs_are_the_helpers() -> None:
    from microvm_host.helper.entry import SHARE_VERBS, VERBS

    used = {
        line.split()[1]
        for path in UNITS
        for line in lines(path.name)
        if line.startswith(("ExecStart=", "ExecStop=", "ExecStopPost="))
    }
    assert used == {*VERBS, *SHARE_VERBS}


def test_vm() -> None:
    name = "microvm@.service.in"
    assert values(name, "Type") == ["notify"]
    assert values(name, "RestartPreventExitStatus") == ["78"]
    assert values(name, "KillMode") == ["mixed"]
    # The one command of root's in there: it keeps count where the VM's user must not write.
    assert [line for line in lines(name) if "=+" in line] == [
        "ExecStopPost=+@libexecdir@/helper ended %i"
    ]
    assert values(name, "WorkingDirectory") == ["@statedir@/%i"]
    assert (values(name, "User"), values(name, "Group")) == (["microvm"], ["microvm"])
    assert values(name, "SupplementaryGroups") == ["kvm"]
    assert values(name, "WantedBy") == ["microvms.target"]


def test_a_vm_in_the_foreground_is_confined_like_a_service() -> None:
    from microvm_host.cli.jobs import AFTER, CONFINEMENT

    keys = {setting.partition("=")[0] for setting in CONFINEMENT}
    unit = [
        line for line in lines("microvm@.service.in") if HARDENING.match(line) or "UMask" in line
    ]
    others = ("Limit", "Timeout", "Restart=", "RestartSec", "RestartPrevent", "KillMode")
    assert [line for line in unit if not line.startswith(others)] == list(CONFINEMENT)
    assert "UMask" in keys and "DeviceAllow" in keys
    set_up = {name.removesuffix(".in").replace("@.", "@%i.") for name in SET_UP}
    set_up.add("microvm-set-up@%i.target")
    assert [unit for unit in values("microvm@.service.in", "After") if unit not in set_up] == [
        *AFTER
    ]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_understands_them(tmp_path: Path) -> None:
    helper = tmp_path / "helper"
    helper.write_text("#!/bin/sh\n")
    helper.chmod(0o755)
    units = tmp_path / "units"
    units.mkdir()
    for path in UNITS:
        text = path.read_text()
        for placeholder, value in (("@libexecdir@", str(tmp_path)), ("@statedir@", STATE)):
            text = text.replace(placeholder, value)
        assert not re.search(r"@\w+@/", text), path
        # Pages are looked for on this machine, where they need not be installed.
        text = re.sub(r"^Documentation=.*\n", "", text, flags=re.MULTILINE)
        (units / path.name.removesuffix(".in")).write_text(text)
    instances = [path.name.removesuffix(".in").replace("@.", "@web.") for path in UNITS]
    done = subprocess.run(
        ["systemd-analyze", "verify", *(str(units / name) for name in instances)],
        capture_output=True,
        text=True,
        env={
            "SYSTEMD_UNIT_PATH": f"{units}:",
            "PATH": "/usr/bin:/bin",
            "SYSTEMD_LOG_LEVEL": "warning",
        },
    )
    # Units of this machine may have faults of their own.
    said = [line for line in done.stderr.splitlines() if str(tmp_path) in line or "microvm" in line]
    assert said == []
