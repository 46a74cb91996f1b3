# SPDX-License-Identifier: MIT
"""Messages of the helpers: to the journal, under the VM's own unit too, and to systemd's status.

The set-up units have no standard error: connecting one to the journal takes systemd and journald
9 ms of each start, message or not. What there is to say goes to journald's own socket instead,
with OBJECT_SYSTEMD_UNIT= naming the units that it is about, by which `systemctl status
microvm@NAME` and `journalctl -u microvm@NAME` show it, as they do with messages of any process of
root (systemd.journal-fields(7), journalctl(1)).

`_socket` is what `socket` wraps; the wrapper's own imports take 7 ms of each start.
"""

from __future__ import annotations

import os
import sys
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_DGRAM, socket

from . import names
from .paths import HostPaths

ERR, WARNING, NOTICE, INFO = 3, 4, 5, 6
_PATIENCE = 30.0  # seconds
# How long one message may wait for a full queue. journald empties its own within milliseconds.
JOURNAL_WITHIN = 0.5  # seconds
# systemd does not read messages while it reloads its units, and READY=1 must not be lost.
SYSTEMD_WITHIN = 60.0  # seconds

# Sockets that let a message wait too long. Further messages do not wait for them.
_hung: set[str] = set()


def write(priority: int, message: str, *, vm: str | None = None) -> None:
    """Log one line.

    Args:
        priority: of syslog(3), ERR to INFO.
        message: the line; line breaks in it are folded.
        vm: the VM that it is about, whose unit then shows it as well.
    """
    if _to_journal(priority, message, vm) or sys.stderr is None:
        return
    # sd-daemon(3): the prefix sets the priority of the line, where the journal reads it.
    prefix = ""
    if "JOURNAL_STREAM" in os.environ:
        prefix = f"<{priority}>"
        if not _takes_more(2):
            return
    sys.stderr.write(f"{prefix}{_folded(message)}\n")
    sys.stderr.flush()


def error(message: str, *, vm: str | None = None) -> None:
    write(ERR, message, vm=vm)


def warning(message: str, *, vm: str | None = None) -> None:
    write(WARNING, message, vm=vm)


def notice(message: str, *, vm: str | None = None) -> None:
    write(NOTICE, message, vm=vm)


def info(message: str, *, vm: str | None = None) -> None:
    write(INFO, message, vm=vm)


def _to_journal(priority: int, message: str, vm: str | None) -> bool:
    """Send the message to journald itself; False where that is not the way.

    The format is systemd's "Journal Native Protocol": fields a line, and a value that has a line
    break of its own as its length in eight bytes, little-endian, before it. We fold those.
    """
    # Set for services alone. Only root's word counts for another unit; the VM's user runs as the
    # VM's own unit, which has a standard error, since the guest's console is there.
    if "INVOCATION_ID" not in os.environ or os.geteuid() != 0:
        return False
    host = HostPaths.from_environment()
    # Our own unit is named too. journald looks it up by our pid, which is gone by then.
    units = {_own_unit(host)} | ({names.unit(vm)} if vm is not None else set())
    fields = [
        f"MESSAGE={_folded(message)}",
        f"PRIORITY={priority}",
        "SYSLOG_IDENTIFIER=microvm-host",
        *(f"OBJECT_SYSTEMD_UNIT={unit}" for unit in sorted(units) if unit),
        *([f"MICROVM_NAME={vm}"] if vm is not None else []),
    ]
    text = "".join(f"{field}\n" for field in fields)
    return _send(host.journal_socket, text, JOURNAL_WITHIN)


def _folded(message: str) -> str:
    return message.replace("\n", " ").replace("\r", " ")


def _own_unit(host: HostPaths) -> str:
    """The service that this process belongs to; nothing if it is in none (cgroups(7))."""
    try:
        with open(host.own_cgroup, encoding="utf-8", errors="replace") as file:
            units = [line.rstrip("\n").rsplit("/", 1)[-1] for line in file]
    except OSError:
        return ""
    return next((unit for unit in units if unit.endswith(".service")), "")


def notify(state: str) -> None:
    """Tell systemd the state of this service, as sd_notify(3) does; nothing without a listener.

    Args:
        state: assignments, one a line, e.g. `STATUS=Waiting for the guest`.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        _send("\0" + address[1:] if address[0] == "@" else address, state, SYSTEMD_WITHIN)


def status_assignment(text: str) -> str:
    """`STATUS=` with any text, as a line of a message to systemd.

    A line break would begin another assignment, which steers systemd. A backslash is systemd's
    own: it drops one, and with one at the end the whole message.
    """
    return "STATUS=" + _folded(text).replace("\\", "\\\\")


def status(text: str) -> None:
    """Say in `systemctl status` what is being done."""
    notify(status_assignment(text))


def waiting(text: str) -> None:
    """Say so in `systemctl status`, and have systemd be as patient; to be called again and again.

    The unit's timeout is put off, if need be, until some time after the last call. Whoever waits
    has to see to it that this ends.
    """
    notify(f"{status_assignment(text)}\nEXTEND_TIMEOUT_USEC={_PATIENCE * 1e6:.0f}")


def kernel(priority: int, message: str, path: str) -> None:
    """Log one line to the kernel's ring buffer, for what runs before there is a journal."""
    try:
        target = os.open(path, os.O_WRONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        write(priority, message)
        return
    try:
        # The facility 3 (daemon) marks it as user space's: kernel.org, ABI/testing/dev-kmsg.
        os.write(target, f"<{3 << 3 | priority}>microvm-generator: {message}\n".encode())
    finally:
        os.close(target)


def _send(address: str, datagram: str, within: float) -> bool:
    """Send a datagram to a UNIX socket; False if nobody took it within these seconds."""
    connection = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        connection.settimeout(0 if address in _hung else within)
        connection.sendto(datagram.encode(errors="backslashreplace"), address)
    except TimeoutError:
        _hung.add(address)
        return False
    except OSError:
        return False
    finally:
        connection.close()
    return True


def _takes_more(fd: int) -> bool:
    """Whether a pipe or stream to journald has room for a line, or has it soon."""
    from select import POLLOUT, poll

    name = f"fd {fd}"
    room = poll()
    room.register(fd, POLLOUT)
    if room.poll(0 if name in _hung else JOURNAL_WITHIN * 1000):
        return True
    _hung.add(name)
    return False
