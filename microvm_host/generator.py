# SPDX-License-Identifier: MIT
"""Makes the VMs declared under /etc/microvms start at boot (systemd.generator(7)).

For each declaration: a link by which microvms.target wants the VM, unless it says
`autostart = false`, and one by which the VM wants install-microvm@, which brings its package up to
date first. Runs before /var is mounted and delays boot: it reads /etc/microvms, writes links, and
must neither import more than `declaration` needs nor talk to any process.

One broken declaration is logged and skipped; the others, and the boot, go on.
"""

from __future__ import annotations

import os
import sys

from . import declaration, log, names
from .errors import DeclarationError
from .paths import HostPaths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TARGET = "microvms.target"


def generate(
    directory: str, units: str, host: HostPaths, complain: Callable[[DeclarationError], None]
) -> None:
    """Write the links for all declarations.

    Args:
        directory: the generator's output, the first one that systemd names.
        units: where the unit files are installed.
        complain: takes the error of each declaration that is skipped.
    """
    for declared in declaration.load_all(host.declarations):
        if isinstance(declared, DeclarationError):
            complain(declared)
            continue
        vm = names.unit(declared.name)
        _want(directory, vm, f"install-microvm@{declared.name}.service", units)
        if declared.autostart:
            _want(directory, TARGET, vm, units)


def _want(directory: str, unit: str, wanted: str, units: str) -> None:
    """Make `unit` want an instance of a template."""
    wants = f"{directory}/{unit}.wants"
    os.makedirs(wants, exist_ok=True)
    template = wanted.partition("@")[0] + "@.service"
    os.symlink(f"{units}/{template}", f"{wants}/{wanted}")


def main(argv: list[str], units: str) -> int:
    """Entry point: systemd names three output directories, of which we use the first."""
    if len(argv) not in (2, 4):
        sys.stderr.write("usage: microvm-generator DIRECTORY [EARLY-DIRECTORY LATE-DIRECTORY]\n")
        return 2
    host = HostPaths.from_environment()
    generate(
        argv[1], units, host, lambda error: log.kernel(log.ERR, f"{error}; skipped", host.kmsg)
    )
    return 0
