# SPDX-License-Identifier: MIT
"""The toolkit as installed on a test host, and what tests ask of it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.guest.package import Package
from tests.host.interface import Host

PROJECT = Path(__file__).resolve().parents[2]
SOURCES = "/usr/src/microvm-host"
IMAGE = "/opt/image"

_T = TypeVar("_T")

# What a VM may leave behind, each by a line that names it: interfaces, units that are not plainly
# down, sockets, records, links to a booted package, and processes of units.
_FOOTPRINT = r"""
for link in /sys/class/net/*; do echo "interface ${link##*/}"; done
systemctl list-units --all --plain --full --no-legend --no-pager 'microvm*' |
    while read -r unit load active sub rest; do
        case $unit:$active in *:inactive|microvms.target:*) ;; *) echo "unit $unit $active" ;; esac
    done
find /var/lib/microvms -type s -o -name booted | sed 's/^/left /'
find /run/microvm-host -mindepth 1 | sed 's/^/record /'
find /run/microvm-host-private -mindepth 1 2>/dev/null | sed 's/^/private /'
find /sys/fs/cgroup/machine.slice -name cgroup.procs 2>/dev/null | while read -r procs; do
    while read -r pid; do echo "process $(tr '\0' ' ' </proc/$pid/cmdline)"; done <"$procs"
done 2>/dev/null
true
"""


class Toolkit:
    """One test host with the toolkit installed."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def install(self) -> None:
        """Install from the checkout, as an administrator would: `make install`."""
        self.host.copy(
            PROJECT, SOURCES, exclude=(".git", ".venv", ".mypy_cache", "__pycache__", ".hypothesis")
        )
        self.host.run(["make", "-C", SOURCES, "install"], timeout=600)

    def build_image(self) -> None:
        """Make the real guest from the host's own kernel and busybox."""
        self.python("-m", "tests.guest", "image", "--root", "/", "-o", IMAGE)

    def python(self, *arguments: str) -> str:
        """Run the project's own Python tools in there."""
        argv = ["env", "-C", SOURCES, "PYTHONDONTWRITEBYTECODE=1", "python3", *arguments]
        return self.host.run(argv, timeout=600).stdout

    def put(self, package: Package, path: str | None = None) -> str:
        """Write a package and copy it to the host; gives where it is there."""
        target = path or f"/opt/packages/{package.name}"
        self.host.run(["rm", "-rf", target])
        with tempfile.TemporaryDirectory() as scratch:
            package.write(Path(scratch) / "package", prefix=target)
            self.host.copy(Path(scratch) / "package", target)
        return target

    def create(self, package: Package) -> str:
        """Make a VM of a package, by the command; gives the package's path."""
        path = self.put(package)
        self.host.run(["microvm", "create", package.name, "--runner", path])
        return path

    def link(self, name: str, package: str) -> None:
        """Make a VM as another tool would: a directory with a link."""
        self.sh(
            f"mkdir -p /var/lib/microvms/{name} && ln -sfn {package} "
            f"/var/lib/microvms/{name}/current"
        )

    def systemctl(self, *arguments: str, check: bool = True, timeout: float = 180) -> str:
        return self.host.run(["systemctl", *arguments], check=check, timeout=timeout).stdout

    def sh(self, line: str, *, check: bool = True, timeout: float = 180) -> str:
        """Run a line of shell; gives its standard output."""
        return self.host.run(["sh", "-c", line], check=check, timeout=timeout).stdout

    def status(self, name: str) -> str:
        self.host.run(["journalctl", "--sync"])
        return self.systemctl("status", "--no-pager", "--lines=50", f"microvm@{name}", check=False)

    def property(self, unit: str, name: str) -> str:
        return self.systemctl("show", f"--property={name}", "--value", unit).strip()

    def journal(self, name: str, *, sync: bool = True) -> list[str]:
        """What the journal shows for a VM's unit, the guest's console included.

        Args:
            sync: with all that was said until now.
        """
        if sync:
            self.host.run(["journalctl", "--sync"])
        return self.host.run(
            ["journalctl", "--no-pager", "--output=cat", f"--unit=microvm@{name}"]
        ).stdout.splitlines()

    def await_line(self, name: str, text: str, timeout: float = 120) -> list[str]:
        """Wait until a line of the VM's journal has a text; gives all lines so far."""
        return eventually(
            lambda: self.journal(name, sync=False),
            lambda lines: any(text in line for line in lines),
            timeout,
            f"no line of {name} has {text!r}",
        )

    def footprint(self) -> set[str]:
        """All that VMs have set up on the host now, a line each."""
        return set(self.sh(_FOOTPRINT).splitlines())

    def await_footprint(self, expected: set[str], timeout: float = 60) -> None:
        """Wait until nothing but `expected` is set up; what is set up beside it is shown."""
        found: set[str] = set()
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = self.footprint()
            if found == expected:
                return
            time.sleep(0.1)
        raise AssertionError(f"left: {sorted(found - expected)}; lost: {sorted(expected - found)}")

    def remove(self, name: str) -> None:
        """Take a VM away, whatever state a test left it in."""
        self.sh(
            f"systemctl kill -s KILL microvm@{name} 2>/dev/null; systemctl stop microvm@{name}; "
            f"systemctl reset-failed 'microvm*{name}*' 2>/dev/null; "
            f"systemctl disable -q microvm@{name}; "
            f"rm -rf /var/lib/microvms/{name} /opt/packages/{name} /etc/microvms/{name}.toml* "
            f"/var/lib/microvm-host/*/{name}.json /var/lib/microvm-host/packages/*-{name} "
            f"/etc/systemd/system/microvm@{name}.service.d; systemctl daemon-reload",
            check=False,
            timeout=200,
        )


def eventually(
    look: Callable[[], _T], enough: Callable[[_T], bool], timeout: float, complaint: str
) -> _T:
    """Look again and again until it is enough; gives what was seen, or fails showing it."""
    deadline = time.monotonic() + timeout
    while True:
        seen = look()
        if enough(seen):
            return seen
        if time.monotonic() > deadline:
            shown = "\n".join(seen) if isinstance(seen, list) else repr(seen)
            raise AssertionError(f"{complaint} after {timeout:.0f} s; seen:\n{shown}")
        time.sleep(0.1)
