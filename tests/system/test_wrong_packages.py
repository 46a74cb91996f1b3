# SPDX-License-Identifier: MIT
"""Wrong packages through systemd: exit 78, one clear line, nothing set up, nothing left."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.guest.package import Share, Stub, Tap
from tests.unit.wrong_packages import CASES, Case

from .toolkit import Toolkit

pytestmark = pytest.mark.container

# Fewer than the unit tests have: each start takes a moment, and the reader is the same. One of
# each kind of file and of each kind of damage, more than 40 in all.
CHOSEN = [case for case in CASES if not case.but_root]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good package with a tap and a share, to be broken."""
    return Stub(
        name="good",
        taps=(Tap(name="wrong0", mac="02:00:00:00:00:01"),),
        shares=(Share(tag="data", source="/srv", mount="/mnt"),),
        vsock_cid=77,
    ).write(tmp_path_factory.mktemp("good") / "package", prefix="/opt/packages/good")


def test_wrong_packages(toolkit: Toolkit, good: Path, tmp_path: Path) -> None:
    """All of them on one host, started one after the other; the failures are listed together."""
    chosen = [case for case in CHOSEN if case.exit_code == 78]
    assert len(chosen) >= 40
    packages = tmp_path / "packages"
    for case in chosen:
        package = packages / case.name
        shutil.copytree(good, package, symlinks=True)
        case.break_(package)
    # Not by way of copy(): a FIFO or a link loop is part of the case, and tar keeps both.
    toolkit.host.copy(packages, "/opt/wrong")
    before = toolkit.footprint()
    failures = []
    for case in chosen:
        complaint = _start(toolkit, case)
        if complaint:
            failures.append(f"{case.name}: {complaint}")
    toolkit.sh("systemctl reset-failed; rm -rf /opt/wrong /var/lib/microvms/wrong-*")
    assert not failures, "\n".join(failures)
    toolkit.await_footprint(before)


def _start(toolkit: Toolkit, case: Case) -> str:
    """Start one; gives what is not as it should be."""
    name = f"wrong-{case.name}"[:63].rstrip("-")
    toolkit.link(name, f"/opt/wrong/{case.name}")
    if toolkit.host.run(["systemctl", "start", f"microvm@{name}"], check=False).returncode == 0:
        toolkit.systemctl("stop", f"microvm@{name}")
        return "it started"
    unit = "microvm-set-booted" if case.stage == "read" else "microvm-virtiofsd"
    code = toolkit.property(f"{unit}@{name}", "ExecMainStatus")
    if code != "78":
        return f"{unit} ended with {code}"
    # The package's path tells our line from systemd's own, which name the unit alone.
    lines = [
        line
        for line in toolkit.status(name).splitlines()
        if case.message in line and f"/opt/wrong/{case.name}" in line
    ]
    if len(lines) != 1:
        return f"{case.message!r} is in {len(lines)} lines of\n{toolkit.status(name)}"
    if case.file and case.file not in lines[0]:
        return f"no {case.file!r} in {lines[0]!r}"
    if case.line is not None and f":{case.line}: " not in lines[0]:
        return f"no line {case.line} in {lines[0]!r}"
    return ""


@pytest.mark.core
def test_a_current_that_leads_nowhere(toolkit: Toolkit, vm: str) -> None:
    toolkit.link(vm, "/opt/gone")
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert toolkit.property(f"microvm-set-booted@{vm}", "ExecMainStatus") == "78"
    complaint = f"/var/lib/microvms/{vm}/current: points to '/opt/gone', which does not exist"
    assert complaint in toolkit.status(vm)
    toolkit.systemctl("reset-failed")


def test_a_current_of_somebody_elses_is_not_followed(toolkit: Toolkit, vm: str) -> None:
    toolkit.link(vm, toolkit.put(Stub(name=vm)))
    toolkit.sh(f"chown -h microvm /var/lib/microvms/{vm}/current")
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert "does not belong to root" in toolkit.status(vm)
    toolkit.systemctl("reset-failed")


def test_a_program_that_only_root_may_run(toolkit: Toolkit, vm: str) -> None:
    path = toolkit.put(Stub(name=vm))
    toolkit.sh(f"chmod 700 {path}/bin/microvm-run")
    toolkit.link(vm, path)
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert toolkit.property(f"microvm@{vm}", "ExecMainStatus") == "78"
    assert "bin/microvm-run: cannot be executed by this user" in toolkit.status(vm)
    # A wrong package is not started again and again.
    assert toolkit.property(f"microvm@{vm}", "NRestarts") == "0"
    toolkit.systemctl("reset-failed")
