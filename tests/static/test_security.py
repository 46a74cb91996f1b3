# SPDX-License-Identifier: MIT
"""`systemd-analyze security` of every unit stays at or below a bound, and each gap is spoken of.

The figure runs from 0.0, all shut, to 10.0. It weighs what could be switched off in any service,
not what one needs; the bounds are what is left when the rest is off, and each unit says beside its
settings why a gap is there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]
SERVICES = sorted(REPOSITORY.glob("units/*.service.in"))

# systemd 252 to 262 differ by 0.1.
SET_UP = 3.9
BOUNDS = {
    # Runs hypervisors of all kinds, wherever their packages and disks are.
    "microvm@.service.in": 4.9,
    # Loads vfio-pci, opens disks to see who uses them, and sets interfaces up.
    "microvm-pci-devices@.service.in": 4.5,
    # Runs nix, whose builds are in sandboxes of its own making, as root.
    "install-microvm@.service.in": 9.6,
}
# Settings that go by another name in there.
CALLED = {
    "UserOrDynamicUser": "User",
    "RootDirectoryOrRootImage": "RootDirectory",
    # ProtectClock= adds to the list of devices that the clock may be read.
    "DeviceAllow": "DevicePolicy",
}

pytestmark = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed"
)
named = pytest.mark.parametrize("path", SERVICES, ids=lambda path: path.name)


def analyzed(path: Path, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Have an instance of a unit analyzed, off-line."""
    for unit in REPOSITORY.glob("units/*"):
        text = unit.read_text().replace("@libexecdir@/helper", "/bin/true")
        (directory / unit.name.removesuffix(".in")).write_text(
            text.replace("@statedir@", "/var/lib/microvms")
        )
    instance = path.name.removesuffix(".in").replace("@.", "@web.")
    return subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", *options]
        + [str(directory / instance)],
        capture_output=True,
        text=True,
        env={**os.environ, "SYSTEMD_UNIT_PATH": f"{directory}:", "SYSTEMD_LOG_LEVEL": "err"},
    )


@named
def test_exposure_is_bounded(path: Path, tmp_path: Path) -> None:
    bound = BOUNDS.get(path.name, SET_UP)
    done = analyzed(path, tmp_path, f"--threshold={bound * 10:.0f}")
    summary = next(line for line in done.stdout.splitlines() if "exposure level" in line)
    assert done.returncode == 0, f"{summary}, and is to be {bound}"


@named
def test_each_gap_is_spoken_of(path: Path, tmp_path: Path) -> None:
    text = path.read_text()
    if "# No sandbox" in text:
        return
    findings: list[dict[str, Any]] = json.loads(analyzed(path, tmp_path, "--json=short").stdout)
    gaps = {each["json_field"] for each in findings if float(each["exposure"] or 0) > 0}
    assert gaps
    for gap in sorted(gaps):
        setting = re.sub("_.*", "", gap)
        assert f"{CALLED.get(setting, setting)}=" in text, f"{path.name} says nothing of {gap}"
