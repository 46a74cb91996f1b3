# SPDX-License-Identifier: MIT
"""Which running guests are paused: asks the control sockets of many VMs at the same time.

A guest is paused when somebody paused it, or when its hypervisor did: QEMU pauses a guest whose
disk it cannot write, since the host's file system is full. systemd does not see that, and nothing
of the toolkit stays beside a VM to be told. So everything that lists VMs asks.

The hypervisor is taken for hostile. What is connected to is a socket of the VM's user with a
process of that user behind it; an answer has a limit in size and in time; all VMs together have
one in time; and only known words are repeated. A hypervisor that does not answer is left out.
"""

from __future__ import annotations

import os
import stat
import time
from _socket import (
    AF_UNIX,
    SO_PEERCRED,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from sys import byteorder

from . import control, names
from .errors import MicrovmHostError
from .frozen import frozen
from .paths import OPENED
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .attach import Running
    from .paths import HostPaths

# A hypervisor answers within milliseconds. QEMU does not while another client is connected.
ANSWERS_WITHIN = 0.5  # seconds
ALL_WITHIN = 2.0  # seconds
# Descriptors that are open at a time: most processes may have 1024.
AT_ONCE = 256
ANSWER_MAX = 256 * 1024

# For an administrator who waits for one hypervisor.
WITHIN = 10.0  # seconds
# A guest whose disk is still full is paused again as soon as it has tried to write.
PAUSES_AGAIN_WITHIN = 0.5  # seconds


@frozen
class Target:
    """The control socket of a VM that runs."""

    name: str
    protocol: str
    path: str
    uid: int


def targets(vms: Sequence[str], host: HostPaths) -> Iterator[Target]:
    """The control sockets of those VMs whose records name one."""
    for vm in vms:
        try:
            lines = Record(host.record(vm, "booted")).read()
        except MicrovmHostError:
            # Whoever sets the VM up or stops it says what is wrong with the record.
            continue
        found = {line[0]: line[1:] for line in lines if line}
        match found.get("user"), found.get("control"):
            case ([_, uid, *_], [("qmp" | "cloud-hypervisor" | "firecracker") as protocol, path]):
                if names.is_number(uid):
                    yield Target(vm, protocol, os.path.join(host.vm(vm), path), int(uid))


def paused(vms: Sequence[str], host: HostPaths) -> dict[str, str]:
    """The VMs whose guest is paused, each with one of the words control.PAUSED."""
    waiting = list(targets(vms, host))
    found: dict[str, str] = {}
    deadline = time.monotonic() + ALL_WITHIN
    asked: dict[int, _Question] = {}
    if not waiting:
        return found
    from select import POLLIN, poll

    waiting.reverse()
    try:
        while waiting or asked:
            while waiting and len(asked) < AT_ONCE:
                question = _ask(waiting.pop())
                if question is not None:
                    asked[question.fileno()] = question
            now = time.monotonic()
            if now >= deadline:
                break
            ready = poll()
            for fd in asked:
                ready.register(fd, POLLIN)
            until = min((each.deadline for each in asked.values()), default=now)
            readable = {fd for fd, _ in ready.poll(max(0.0, min(until, deadline) - now) * 1000 + 1)}
            now = time.monotonic()
            for fd, question in list(asked.items()):
                state = question.hear() if fd in readable else None
                if state is None and now < question.deadline:
                    continue
                asked.pop(fd).close()
                if state in control.PAUSED:
                    found[question.target.name] = state
    finally:
        for question in asked.values():
            question.close()
    return found


class _Question:
    """A hypervisor that was asked for its state."""

    def __init__(self, target: Target, connected: socket) -> None:
        self.target = target
        self.deadline = time.monotonic() + ANSWERS_WITHIN
        self._socket = connected
        self._heard = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def hear(self) -> str | None:
        """The state; None if more has to come, an empty word if nothing of use will."""
        try:
            data = self._socket.recv(65536)
        except BlockingIOError:
            return None
        except OSError:
            return ""
        self._heard += data
        if not data or len(self._heard) > ANSWER_MAX:
            return ""
        return control.answered(self.target.protocol, self._heard)

    def close(self) -> None:
        self._socket.close()


def _ask(target: Target) -> _Question | None:
    """Connect and ask; None where nobody can be asked."""
    try:
        # What is looked at here is what is connected to, whatever the path means by then.
        there = os.open(target.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    peer = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
    try:
        status = os.fstat(there)
        if stat.S_ISSOCK(status.st_mode) and status.st_uid == target.uid:
            peer.connect(f"{OPENED}/{there}")
            # unix(7): pid, uid and gid of who listens, as they were when they began to.
            credentials = peer.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)
            if int.from_bytes(credentials[4:8], byteorder) == target.uid:
                peer.send(control.question(target.protocol))
                return _Question(target, peer)
    except OSError:
        # Nobody listens, too many wait to be heard, or others may not ask.
        pass
    finally:
        os.close(there)
    peer.close()
    return None


def pause(vm: Running) -> str:
    """Pause the guest of a VM; gives the state in which it was (control.Hypervisor.state()).

    Raises:
        MicrovmHostError: its hypervisor cannot be asked, or refuses.
    """
    hypervisor = _connected(vm)
    try:
        state = hypervisor.state()
        if state not in control.PAUSED:
            hypervisor.pause()
        return state
    finally:
        hypervisor.close()


def resume(vm: Running) -> str:
    """Resume the guest of a VM; gives the state in which it was.

    Raises:
        MicrovmHostError: its hypervisor cannot be asked or refuses, or has paused it again.
    """
    hypervisor = _connected(vm)
    try:
        state = hypervisor.state()
        if state not in control.PAUSED:
            return state
        try:
            hypervisor.resume(state)
        except control.Refusal as error:
            raise MicrovmHostError(
                f"microVM {vm.name} is paused ({state}), and its hypervisor refuses to resume it",
                hint=f"microvm restart {vm.name}",
            ) from error
        deadline = time.monotonic() + PAUSES_AGAIN_WITHIN
        while time.monotonic() < deadline:
            time.sleep(0.1)
            again = hypervisor.state()
            if again == state and state == "io-error":
                raise MicrovmHostError(
                    f"the hypervisor has paused microVM {vm.name} again (io-error)",
                    hint="one of its disks cannot be written: free space on its file system",
                )
        return state
    finally:
        hypervisor.close()


def _connected(vm: Running) -> control.Hypervisor:
    at = vm.package.control_socket
    if at is None:
        raise MicrovmHostError(
            "the package names no control socket, by which its hypervisor could be asked",
            path=vm.package.path,
            hint="share/microvm/control-socket and control-protocol name one",
        )
    return control.Hypervisor(at.protocol, at.path, WITHIN, vm.connect(at.path, WITHIN))
