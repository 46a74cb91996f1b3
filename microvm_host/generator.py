# SPDX-License-Identifier: MIT
"""Makes the VMs declared under /etc/microvms start at boot (systemd.generator(7)).

For each declaration a link by which microvms.target wants the VM, unless it says
`autostart = false`; for all of them one drop-in by which a VM wants install-microvm@, which brings
a declared VM's package up to date first; and drop-ins with whom a VM runs as, where its disks and
shares lie and what it says on starts and stops, if anything. Runs before /var is mounted and
delays boot: it reads /etc/microvms, writes these, and must neither import more than `declaration`
needs nor talk to any process.

One broken declaration is logged and skipped; the others, and the boot, go on.
"""

from __future__ import annotations

import os
import sys

from . import declaration, log, names, timespan, users
from .errors import DeclarationError
from .paths import HostPaths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .declaration import Declaration

# systemd reads drop-ins in the order of their names: those of the administrator (10-timeout.conf,
# systemctl edit's override.conf) come after the declaration's and have the last word. An instance's
# drop-in takes the place of one of the same name of its template, so that they have two names.
_ALL = "50-declared.conf"
_ONE = "00-declaration.conf"
# To build a flake may be to fetch it.
_FETCHES = ["Wants=network-online.target", "After=network-online.target"]
# systemd's words for the declaration's.
_RESTART = {"on-failure": "on-failure", "never": "no"}


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
        else:
            found.append(declared)
    if not found:
        return
    # Of the template, since one for each would be two more files each. Where nothing is declared by
    # an instance's name, the condition of install-microvm@ skips it.
    _write(f"{directory}/microvm@.service.d", _ALL, {"Unit": ["Wants=install-microvm@%i.service"]})
    _link(f"{directory}/microvms.target.wants", units, [each for each in found if each.autostart])
    earlier = _earlier(found)
    for declared in found:
        _write_user(directory, declared)
        order = declared.order
        _write_service(directory, declared, [] if order is None else earlier[order])
        if declared.source.kind == "flake":
            install = f"{directory}/install-microvm@{declared.name}.service.d"
            _write(install, _ONE, {"Unit": _FETCHES})


def _link(wants: str, units: str, wanted: list[Declaration]) -> None:
    """Have VMs wanted. Not by a line of a drop-in each: `systemctl status` calls them disabled."""
    if wanted:
        _make_directory(wants)
    for each in wanted:
        os.symlink(f"{units}/microvm@.service", f"{wants}/{names.unit(each.name)}")


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


def _write_service(directory: str, declared: Declaration, earlier: list[str]) -> None:
    """Write what a declaration says on starts and stops, where it differs from the unit's own."""
    service = [f"Restart={_RESTART[declared.restart]}"] if declared.restart != "always" else []
    guest, terminate = declared.shutdown_timeout, declared.terminate_timeout
    if guest is not None or terminate is not None:
        guest = timespan.Parts.guest if guest is None else guest
        service.append(f"TimeoutStopSec={timespan.stop_for(guest, terminate):.15g}")
    for variable, value in (
        ("MICROVM_ASK_AGAIN_SECONDS", declared.ask_again_after),
        ("MICROVM_TERMINATE_SECONDS", declared.terminate_timeout),
        ("MICROVM_RESTART_SECONDS", declared.restart_delay),
        ("MICROVM_RESTART_LIMIT", declared.restart_limit),
    ):
        if value is not None:
            service.append(f"Environment={variable}={value:.15g}")
    unit = [f"After={names.unit(name)}" for name in earlier]
    # For the order of a shutdown above all: a start looks at more than a declaration has
    # (mount_units), and nothing else has a VM stop before its disks are unmounted.
    unit += [f"RequiresMountsFor={_quoted(path)}" for path in declared.storage]
    if unit or service:
        drop_ins = f"{directory}/{names.unit(declared.name)}.d"
        _write(drop_ins, _ONE, {"Unit": unit, "Service": service})


def _quoted(path: str) -> str:
    """A path as a word of a unit file (systemd.syntax(7), systemd.unit(5), "Specifiers")."""
    for character in ("\\", '"'):
        path = path.replace(character, f"\\{character}")
    return '"' + path.replace("%", "%%") + '"'


def _write(drop_ins: str, name: str, sections: dict[str, list[str]]) -> None:
    """Write a drop-in."""
    _make_directory(drop_ins)
    with open(f"{drop_ins}/{name}", "w", encoding="utf-8") as file:
        file.write("# By microvm-generator, for what /etc/microvms declares.\n")
        for section, lines in sections.items():
            if lines:
                file.write("\n".join(["", f"[{section}]", *lines, ""]))


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
