# SPDX-License-Identifier: MIT
"""The Debian package: installed, upgraded under a running guest, removed and purged.

It is built on this machine, once, and installed with dpkg into a fresh host of each suite, whose
root has what the package depends on.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.container import ContainerHost
from tests.host.fixtures import require_container

from .conftest import SUITES
from .toolkit import PROJECT, Toolkit

pytestmark = pytest.mark.container

DEB = "/root/microvm-host.deb"
# What stays after a purge where there are VMs.
STAYS = {"/etc/microvms", "/var/lib/microvm-host", "/var/lib/microvms"}


@pytest.fixture(scope="module")
def deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built package."""
    source = tmp_path_factory.mktemp("deb") / "source"
    files = subprocess.run(
        ["git", "-C", PROJECT, "ls-files", "-z"], capture_output=True, check=True, text=True
    ).stdout
    for name in filter(None, files.split("\0")):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (PROJECT / name).is_symlink():
            target.symlink_to((PROJECT / name).readlink())
        elif (PROJECT / name).exists():
            target.write_bytes((PROJECT / name).read_bytes())
            target.chmod((PROJECT / name).stat().st_mode)
    built = subprocess.run(
        ["dpkg-buildpackage", "-b", "-us", "-uc"], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (package,) = source.parent.glob("*.deb")
    return package


@pytest.fixture(params=SUITES)
def fresh(request: pytest.FixtureRequest, deb: Path) -> Iterator[Toolkit]:
    """A host that never saw the toolkit, with the package to install."""
    require_container()
    with ContainerHost(request.param) as host:
        host.copy(deb, DEB)
        yield Toolkit(host)


def left(toolkit: Toolkit) -> set[str]:
    """Paths under the toolkit's name; of a directory, the directory alone."""
    found = toolkit.sh("find / -xdev -name '*microvm*' -prune -not -path '/proc/*' 2>/dev/null")
    return {*found.splitlines()}


def test_from_installation_to_purge(fresh: Toolkit) -> None:
    before = left(fresh)
    fresh.sh(f"dpkg -i {DEB} && dpkg -P microvm-host")
    assert left(fresh) == before

    fresh.sh(f"dpkg -i {DEB}")
    assert fresh.sh("systemctl is-enabled microvms.target; systemctl is-system-running") == (
        "enabled\nrunning\n"
    )
    # Root's helpers load no site-packages and heed no PYTHONPATH.
    programs = fresh.sh(
        "dpkg -L microvm-host | grep -E '/(microvm-host/helper|microvm-generator|bin/microvm)$'"
    ).split()
    assert len(programs) == 3
    for program in programs:
        assert fresh.sh(f"head -n 1 {program}") == "#!/usr/bin/python3 -IS\n", program

    fresh.sh("microvm init web --memory 256")
    fresh.systemctl("start", "microvm@web")
    fresh.await_line("web", "log in as root", timeout=240)
    main = fresh.property("microvm@web", "MainPID")

    # An upgrade stops nothing and starts nothing, though the target wants the VM that is down.
    fresh.sh(
        "systemctl start microvms.target && microvm init down --memory 256 && "
        "sed -i 's/^autostart = false/autostart = true/' /etc/microvms/down.toml && "
        f"systemctl daemon-reload && dpkg -i {DEB}"
    )
    assert "microvm@down.service" in fresh.property("microvms.target", "Wants")
    assert fresh.property("microvm@web", "MainPID") == main
    assert fresh.property("microvm@down", "ActiveState") == "inactive"
    fresh.sh(f"systemctl disable microvms.target && dpkg -i {DEB}")
    assert fresh.property("microvm@web", "MainPID") == main
    assert fresh.sh("systemctl is-enabled microvms.target", check=False) == "disabled\n"

    # Removing stops the guest in order, since nobody could later.
    removed = fresh.sh("dpkg -r microvm-host 2>&1")
    assert "Stopping microVMs in order: microvm@web.service" in removed
    assert any("the guest powered off in" in line for line in fresh.journal("web"))
    fresh.sh("dpkg -P microvm-host")
    assert left(fresh) - before == STAYS
    assert fresh.sh("ls /etc/microvms /var/lib/microvms").split() == [
        *("/etc/microvms:", "down.toml", "web.toml"),
        *("/var/lib/microvms:", "down", "web"),
    ]
    assert "microvm" not in fresh.sh("systemctl --failed --plain --no-legend")
