# SPDX-License-Identifier: MIT
"""Kills a helper in the middle of its work: just before the n-th thing that it would do.

It is the real helper, run by its unit with all that bounds it there. What starts it is a script
that first asks Python to be told of what the program is about to do (sys.addaudithook), and kills
the process when that has happened so often. So each moment between two effects can be hit, and hit
again, however fast the machine is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .toolkit import Toolkit

# Where others than root may write as well: helpers of a VM run as its user.
_PLACE = "/opt/shooting"

_SCRIPT = r"""
import os, sys
place, verb = "@place@", sys.argv[1]
EFFECTS = {
    "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.symlink", "os.link", "os.chown",
    "os.chmod", "os.truncate", "os.posix_spawn", "os.fork", "os.exec", "os.kill", "os.putenv",
    "fcntl.ioctl", "socket.connect", "socket.bind", "socket.sendto",
}
WRITING = os.O_WRONLY | os.O_RDWR
try:
    # Once: what systemd starts again is not shot again.
    with open(f"{place}/{verb}") as armed:
        at = int(armed.read())
    os.remove(f"{place}/{verb}")
except FileNotFoundError:
    at = None
seen, busy = 0, False

def note(event, arguments):
    global seen, busy
    if busy or event not in EFFECTS and not (event == "open" and arguments[2] & WRITING):
        return
    busy = True
    seen += 1
    if at in (0, seen):
        with open(f"{place}/shot", "a") as shot:
            shot.write(f"{event} {arguments!r}\n".replace("\\n", " "))
    if at == seen:
        os.kill(os.getpid(), 9)
    busy = False

if at is not None:
    sys.addaudithook(note)
sys.argv[0] = "@helper@"
with open(sys.argv[0]) as helper:
    exec(compile(helper.read(), sys.argv[0], "exec"))
"""

# Verb -> the unit that calls it, and by what.
_CALLED_BY = {
    "set-booted": ("microvm-set-booted@", "ExecStart="),
    "unset-booted": ("microvm-set-booted@", "ExecStopPost="),
    "tap-interfaces-up": ("microvm-tap-interfaces@", "ExecStart="),
    "tap-interfaces-down": ("microvm-tap-interfaces@", "ExecStopPost="),
    "macvtap-interfaces-up": ("microvm-macvtap-interfaces@", "ExecStart="),
    "macvtap-interfaces-down": ("microvm-macvtap-interfaces@", "ExecStopPost="),
    "virtiofsd-up": ("microvm-virtiofsd@", "ExecStart="),
    "virtiofsd-down": ("microvm-virtiofsd@", "ExecStopPost="),
    "register": ("microvm-machined@", "ExecStart="),
    "again": ("microvm-again@", "ExecStart="),
    "again-over": ("microvm-again@", "ExecStopPost="),
    "install": ("install-microvm@", "ExecStart="),
    "guard": ("microvm-guard@", "ExecStop="),
    "share-lost": ("microvm-share-lost@", "ExecStart="),
    "start": ("microvm@", "ExecStart="),
    "stop": ("microvm@", "ExecStop="),
    "ended": ("microvm@", "ExecStopPost=+"),
}


class Shooting:
    """One verb's helper, which is shot when it is armed, for all VMs of a host."""

    def __init__(self, toolkit: Toolkit, verb: str) -> None:
        self._toolkit = toolkit
        self._verb = verb

    def arm(self, at: int) -> None:
        """Have the next helper killed before its `at`-th effect."""
        self._toolkit.sh(f"rm -f {_PLACE}/shot; echo {at} >{_PLACE}/{self._verb}")

    def watch(self) -> None:
        """Have the next helper only tell what it does."""
        self.arm(0)

    def seen(self) -> list[str]:
        """What it was killed before, or all that it did; nothing if it ended before that.

        Not armed any more then.
        """
        return self._toolkit.sh(
            f"rm -f {_PLACE}/{self._verb}; cat {_PLACE}/shot", check=False
        ).splitlines()


@contextlib.contextmanager
def shooting(toolkit: Toolkit, verb: str) -> Iterator[Shooting]:
    """Put the script in the way of a verb's helper."""
    unit, setting = _CALLED_BY[verb]
    helper = "/usr/local/libexec/microvm-host/helper"
    directory = f"/run/systemd/system/{unit}.service.d"
    # There may be another verb that is shot at the same time.
    toolkit.sh(f"mkdir -p -m 777 {_PLACE}; rm -f {_PLACE}/{verb} {_PLACE}/shot")
    toolkit.host.write(
        f"{_PLACE}/helper", _SCRIPT.replace("@place@", _PLACE).replace("@helper@", helper)
    )
    toolkit.host.write(
        f"{directory}/shooting.conf",
        f"[Service]\n{setting.rstrip('+')}\n{setting}/usr/bin/python3 -IS {_PLACE}/helper {verb} "
        f"%i\nReadWritePaths=-{_PLACE}\n",
    )
    toolkit.systemctl("daemon-reload")
    try:
        yield Shooting(toolkit, verb)
    finally:
        toolkit.sh(f"rm -rf {directory} {_PLACE}; systemctl daemon-reload")
