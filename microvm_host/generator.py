# SPDX-License-Identifier: MIT
"""Makes the VMs declared under /etc/microvms start at boot (systemd.generator(7)).

For each declaration: a link by which microvms.target wants the VM, unless it says
`autostart = false`, one by which the VM wants install-microvm@, which brings its package up to
date first, and drop-ins with whom it runs as and what it says on starts and stops, if anything.
Runs before /var is mounted and delays boot: it reads /etc/microvms, writes these, and must neither
import more than `declaration` needs nor talk to any process.

One broken declaration is logged and skipped; the others, and the boot, go on.
"""

from __future__ import annotations

import os
import sys

from . import declaration, log, names, users
from .errors import DeclarationError
from .paths import HostPaths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .declaration import Declaration

TARGET = "microvms.target"


def generate(
    directory: str, units: str, host: HostPaths, complain: Callable[[DeclarationError], None]
) -> None:
    """Write the links and drop-ins for all declarations.

    Args:
        directory: the generator's output, the first one that systemd names.
        units: where the unit files are installed.
        complain: takes the error of each declaration that is skipped.
    """
    found = []
    for declared in declaration.load_all(host.declarations):
        if isinstance(declared, DeclarationError):
            complain(declared)
            continue
        found.append(declared)
        vm = names.unit(declared.name)
        _want(directory, vm, units, f"install-microvm@{declared.name}.service")
    started = [names.unit(declared.name) for declared in found if declared.autostart]
    if started:
        _want(directory, TARGET, units, *started)
    earlier = _earlier(found)
    for declared in found:
        _write_user(directory, declared)
        order = declared.order
        _write_drop_in(directory, declared, [] if order is None else earlier[order])


def _write_user(directory: str, declared: Declaration) -> None:
    """Have the VM run as the user that its declaration names."""
    if declared.user is not None:
        drop_ins = f"{directory}/{names.unit(declared.name)}.d"
        _make_directory(drop_ins)
        with open(f"{drop_ins}/{users.DROP_IN}", "w", encoding="utf-8") as target:
            target.write(users.drop_in(declared.name, declared.user))


def _earlier(declarations: list[Declaration]) -> dict[int, list[str]]:
    """For each `order`, the VMs that start before those that have it, and stop after them."""
    ordered = [(each.order, each.name) for each in declarations if each.order is not None]
    # All of them, not just the nearest: systemd orders what it starts or stops at the moment.
    return {
        order: [name for other, name in ordered if other < order]
        for order in {order for order, _ in ordered}
    }


def _write_drop_in(directory: str, declared: Declaration, earlier: list[str]) -> None:
    """Write what a declaration says on starts and stops, where it differs from the unit's own."""
    unit = [f"After={names.unit(name)}" for name in earlier]
    service = [f"Restart={_RESTART[declared.restart]}"] if declared.restart != "always" else []
    for variable, value in (
        ("MICROVM_SHUTDOWN_SECONDS", declared.shutdown_timeout),
        ("MICROVM_ASK_AGAIN_SECONDS", declared.ask_again_after),
        ("MICROVM_TERMINATE_SECONDS", declared.terminate_timeout),
        ("MICROVM_RESTART_SECONDS", declared.restart_delay),
        ("MICROVM_RESTART_LIMIT", declared.restart_limit),
    ):
        if value is not None:
            service.append(f"Environment={variable}={value:.15g}")
    if not unit and not service:
        return
    # Sorts before systemctl edit's override.conf, which therefore has the last word.
    path = f"{directory}/{names.unit(declared.name)}.d/50-declaration.conf"
    _make_directory(os.path.dirname(path))
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"# What {declared.name}.toml says, by microvm-generator.\n")
        for section, lines in (("Unit", unit), ("Service", service)):
            if lines:
                file.write("\n".join(["", f"[{section}]", *lines, ""]))


# systemd's words for the declaration's.
_RESTART = {"on-failure": "on-failure", "never": "no"}


def _want(directory: str, unit: str, units: str, *wanted: str) -> None:
    """Make `unit` want instances of templates."""
    wants = f"{directory}/{unit}.wants"
    _make_directory(wants)
    for each in wanted:
        template = each.partition("@")[0] + "@.service"
        os.symlink(f"{units}/{template}", f"{wants}/{each}")


def _make_directory(path: str) -> None:
    # Not os.makedirs, which looks for each parent: systemd has made the only one.
    try:
        os.mkdir(path)
    except FileExistsError:
        pass


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
