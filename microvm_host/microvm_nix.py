# SPDX-License-Identifier: MIT
"""What a package of microvm.nix asks of its own scripts, which the host never runs.

Read when a package is installed, to say then what will not happen, and what to do for it.
"""

from __future__ import annotations

import os
import shlex
import stat
from itertools import pairwise

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .runner import Package

_TAP_UP, _RUN, _VIRTIOFSD_RUN = "bin/tap-up", "bin/microvm-run", "bin/virtiofsd-run"
# The other ones that are known line by line, and what of the VM's unit does such things.
_OTHER_SCRIPTS = (
    ("bin/tap-down", "ExecStopPost"),
    ("bin/macvtap-up", "ExecStartPre"),
    ("bin/macvtap-down", "ExecStopPost"),
)
# More is no script.
_SCRIPT_MAX = 1 << 20
# Lines shown of a script.
_SHOWN = 3
# What QEMU takes a network by.
_QEMU_NETWORKS = ("-netdev", "-nic", "-net")


def notices(package: Package, state_directory: str) -> list[str]:
    """What of a package the host does not do, and what to do for it, a line each."""
    found = []
    taps = [tap.name for tap in package.taps]
    if own := _own_lines(_script(f"{package.path}/{_TAP_UP}")):
        tap = taps[0] if taps else "TAP"
        found.append(
            f"{_TAP_UP} of the package has lines of its own, which do not run here: "
            f"{_in_short(own)}. To have a tap join a bridge, write it into a file like "
            f"/etc/systemd/network/50-{tap}.network: [Match] Name={tap}, [Network] "
            f"Bridge={_bridge(own)}"
        )
    vm = os.path.basename(state_directory)
    for script, setting in _OTHER_SCRIPTS:
        if own := _own_lines(_script(f"{package.path}/{script}")):
            found.append(
                f"{script} of the package has lines of its own, which do not run here: "
                f"{_in_short(own)}. To run them, write {setting}=+/PATH/TO/SCRIPT in [Service] "
                f"with `systemctl edit microvm@{vm}`"
            )
    if _has_bridge_helper(_script(f"{package.path}/{_RUN}")):
        found.append(
            'the package has an interface of type = "bridge", which QEMU sets up by a set-user-ID '
            'helper, and a VM may not gain rights here: give it type = "tap" and a bridge by '
            "systemd-networkd, or share/microvm/tap-bridges"
        )
    relative = [each.source for each in package.shares if not each.source.startswith("/")]
    if relative and package.has_virtiofsd_run:
        shown = " ".join(shlex.quote(f"{state_directory}/{each}") for each in relative)
        found.append(
            f"{_VIRTIOFSD_RUN} exports directories of the state directory as root, so that they "
            f"must belong to root, with files of any owner: chown root: {shown}"
        )
    return found


def _script(path: str) -> str:
    """The text of a script; empty for what is none."""
    try:
        # Not waiting: it could be a FIFO.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return ""
    with os.fdopen(file, "rb") as source:
        try:
            is_file = stat.S_ISREG(os.fstat(file).st_mode)
            return source.read(_SCRIPT_MAX).decode(errors="replace") if is_file else ""
        except OSError:
            return ""


def _own_lines(script: str) -> list[str]:
    """The lines of a script that make or delete no link, and so were added by somebody."""
    return [
        " ".join(_printable(line).split())
        for line in script.splitlines()
        if not _makes_links(line.strip())
    ]


def _in_short(lines: list[str]) -> str:
    return "; ".join(lines[:_SHOWN]) + (" …" if len(lines) > _SHOWN else "")


def _makes_links(line: str) -> bool:
    if not line or line.startswith(("#", "set -")):
        return True
    if line == "fi" or (line.startswith("if [ ") and "sys/class/net/" in line):
        return True
    # The host does it for each macvtap.
    if line.startswith(("if [ ", "echo 1 >")) and "/disable_ipv6" in line:
        return True
    try:
        words = shlex.split(line)
    except ValueError:
        return False
    match [os.path.basename(each) for each in words[:1]] + words[1:]:
        case ["ip", "link", "delete" | "del", *_] | ["ip", "tuntap", "add", *_]:
            return True
        case ["ip", "link", "add", *rest]:
            return "macvtap" in rest
        case ["ip", "link", "set", _, "allmulticast", "on"]:
            return True
        case ["chown", _, node, *_]:
            return "/tap$(" in node
        case ["ip", "link", "set", *rest]:
            # `ip link set web0 up`: nothing but that.
            return rest[-1:] == ["up"] and len([each for each in rest if each != "dev"]) == 2
    return False


def _bridge(lines: list[str]) -> str:
    """The bridge that lines have a tap join."""
    for line in lines:
        words = line.replace("'", " ").replace('"', " ").split()
        if "master" in words[:-1]:
            return words[words.index("master") + 1]
    return "BRIDGE"


def _has_bridge_helper(script: str) -> bool:
    words = [each for each in script.replace("'", " ").replace('"', " ").split() if each != "\\"]
    return any(
        each.partition(",")[0] in ("bridge", "type=bridge") and before in _QEMU_NETWORKS
        for before, each in pairwise(words)
    )


def _printable(text: str) -> str:
    return "".join(each if each.isprintable() else " " for each in text)
