# SPDX-License-Identifier: MIT
"""Waits beside the hypervisor until the guest's own systemd says that it is ready.

The guest's systemd is told by the credential `vmm.notify_socket` to send what sd_notify(3) sends
to a vsock port of the host (systemd(1), from 253 on). The port is listened on before the
hypervisor is executed, so that no message can be lost, by a process that is the VM's main one
until the guest is ready, and ends then: nothing of ours stays.

Two ways lead to the host. Where the kernel carries vsock (QEMU, crosvm, …) the guest comes from
its own CID to an AF_VSOCK port, of which the host has one for all VMs. Where the hypervisor does
(cloud-hypervisor, firecracker), it connects to a UNIX socket in the state directory, named for
the port.

What comes is a guest's word and taken for hostile: bounded in size, number and time, and of all
that sd_notify(3) knows just READY= and STATUS= are passed on, in our own words. MAINPID=,
FDSTORE=, EXTEND_TIMEOUT_USEC= and whatever else would steer the host's systemd are not.
"""

from __future__ import annotations

import os
import select
import stat
import time
from _socket import (
    AF_UNIX,
    AF_VSOCK,
    SCM_RIGHTS,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
    VMADDR_CID_ANY,
    socket,
)
from errno import EADDRINUSE
from sys import byteorder

from . import log
from .errors import MicrovmHostError
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# systemd's own limit for a message (NOTIFY_BUFFER_MAX, which is PIPE_BUF).
MESSAGE_MAX = 4096
STATUS_MAX = 200  # characters
CONNECTIONS_MAX = 8
# A hypervisor does not wait where the queue is full, and the guest's message is lost.
BACKLOG = 128
# A message is whole when its sender closes. cloud-hypervisor keeps a shutdown(2) of just one side
# from us, for whose answer newer systemd in the guest waits: silence ends a message as well.
SILENCE = 0.3  # seconds
CONNECTION_MAX = 5.0  # seconds
# The host's systemd tells everybody on the bus about each status.
STATUS_EVERY = 0.25  # seconds
LOOK_AFTER_SOCKET_EVERY = 0.1  # seconds
TAKEN_EVERY = 0.1  # seconds
BARRIER_WITHIN = 30.0  # seconds

# How a wait ends.
READY = "ready"
ENDED = "the hypervisor has ended"
ASKED = "asked to stop"

# A guest in one of these has finished booting and says READY=1, but has given up on the rest.
EMERGENCIES = ("emergency.target", "rescue.target")


@frozen
class Address:
    """Where the guest's messages arrive.

    `path` is the UNIX socket that the hypervisor connects to, relative to the state directory; or
    else `port` is a vsock port of the host that the guest reaches from `cid`.
    """

    path: str = ""
    port: int = 0
    cid: int = 0
    is_stream: bool = False


class Word:
    """What the guest has said up to now."""

    def __init__(self) -> None:
        self.status = ""
        self._said_ready = False
        self._emergency = ""

    @property
    def is_ready(self) -> bool:
        return self._said_ready and not self._emergency

    def hear(self, message: bytes) -> None:
        """Take in one message; what is not of use is ignored, as sd_notify(3) wants it."""
        for line in message.split(b"\n"):
            key, _, value = line.partition(b"=")
            if key == b"READY" and value == b"1":
                self._said_ready = True
            elif key == b"STATUS":
                self.status = printable(value)
            elif key == b"X_SYSTEMD_UNIT_ACTIVE" and _text(value) in EMERGENCIES:
                # systemd(1), from 256 on. It comes before the READY=1.
                self._emergency = _text(value)
            elif key == b"X_SYSTEMD_UNIT_INACTIVE" and _text(value) == self._emergency:
                self._emergency = ""

    def describe(self) -> str:
        """What there is to tell of a guest that is not ready."""
        if self._emergency:
            return f"it is in its {self._emergency}"
        return f"it says: {self.status}" if self.status else "it has said nothing"


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace")


def printable(value: bytes) -> str:
    """A guest's text for the host's terminals: one line, bounded, no control characters."""
    # Cut first, since a status may be as long as a message.
    text = value[: 4 * STATUS_MAX].decode("utf-8", "replace")
    text = "".join(each if each.isprintable() else "?" for each in text).strip()
    return text if len(text) <= STATUS_MAX else f"{text[: STATUS_MAX - 1]}…"


class _Connection:
    """One connection of the guest, which brings one message."""

    def __init__(self, source: socket, now: float) -> None:
        self.source = source
        self._packets: list[bytes] = []
        self._size = 0
        self._ends = now + CONNECTION_MAX
        self._silent = self._ends

    @property
    def deadline(self) -> float:
        return min(self._ends, self._silent)

    def read(self, now: float) -> bool:
        """Take what has come; False at the end."""
        try:
            # One byte more than is allowed tells that there was more.
            data = self.source.recv(MESSAGE_MAX + 1)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._packets.append(data)
        self._size += len(data)
        self._silent = now + SILENCE
        return bool(data) and self._size <= MESSAGE_MAX

    @property
    def message(self) -> bytes:
        """The message; nothing if it was too large."""
        return b"".join(self._packets) if self._size <= MESSAGE_MAX else b""


class Listener:
    """Listens for one guest.

    Raises:
        MicrovmHostError: it cannot listen there, or the port stayed taken.
    """

    def __init__(
        self,
        address: Address,
        *,
        timeout: float | None,
        others: Callable[[], Sequence[str]],
    ) -> None:
        """
        Args:
            timeout: seconds until systemd gives up the start (TimeoutStartSec=); None is never.
            others: asks for the VMs that have the same vsock port.
        """
        self._address = address
        self._word = Word()
        self._timeout = timeout
        # A little before systemd's own, which began when it started this process.
        self._patience = None if timeout is None else timeout - min(1.0, timeout / 10)
        self._inode = 0
        # Closed when the hypervisor is executed, as all here.
        self._socket = self._bind_unix() if address.path else self._bind_vsock(others)
        self._began = time.monotonic()

    @property
    def status(self) -> str:
        """What the guest has said last; may be empty."""
        return self._word.status

    def _bind_unix(self) -> socket:
        path = self._address.path
        listening = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
        # For the VM's user alone.
        mask = os.umask(0o177)
        try:
            try:
                # Left by a run that was killed, perhaps.
                if stat.S_ISSOCK(os.lstat(path).st_mode):
                    os.unlink(path)
            except FileNotFoundError:
                pass
            listening.bind(path)
            listening.listen(BACKLOG)
            self._inode = os.lstat(path).st_ino
        except OSError as error:
            listening.close()
            raise MicrovmHostError(
                f"cannot listen there for the guest to be ready: {error.strerror}", path=path
            ) from error
        finally:
            os.umask(mask)
        return listening

    def _bind_vsock(self, others: Callable[[], Sequence[str]]) -> socket:
        # A port is taken only until a guest is ready. VMs that were given the same one start one
        # after the other then, and none of them before it is listened to.
        began = time.monotonic()
        port = self._address.port
        said = False
        while True:
            try:
                return _vsock(port, is_stream=self._address.is_stream)
            except OSError as error:
                if error.errno != EADDRINUSE:
                    raise MicrovmHostError(
                        f"cannot listen on vsock port {port} for the guest to be ready: "
                        f"{error.strerror}"
                    ) from error
            holders = ", ".join(others())
            taken = f"vsock port {port} is taken" + (
                f", perhaps by microVM {holders}" if holders else " by what is no microVM"
            )
            if self._patience is not None and time.monotonic() - began >= self._patience:
                raise MicrovmHostError(taken, hint="give each VM a port of its own")
            if not said:
                said = True
                log.notice(f"{taken}: waiting for it")
                log.status(f"Waiting: {taken}")
            time.sleep(TAKEN_EVERY)

    def run(self, hypervisor: int, asked: int) -> str:
        """Listen until the guest is ready, the hypervisor has ended, or somebody asks to stop.

        Args:
            hypervisor: a descriptor that is readable when that has ended.
            asked: one that is when the VM is to be stopped.

        Returns:
            READY, ENDED or ASKED.
        """
        log.status("Waiting for the guest to be ready")
        if self._timeout is not None:
            # Time spent waiting for the port is not the guest's.
            log.notify(f"EXTEND_TIMEOUT_USEC={int(self._timeout * 1e6)}")
        try:
            return self._listen(hypervisor, asked)
        finally:
            self._unlink()
            self._socket.close()

    def _listen(self, hypervisor: int, asked: int) -> str:
        word, shown, show_at = self._word, "", 0.0
        complain_at = None if self._patience is None else self._began + self._patience
        connections: dict[int, _Connection] = {}
        while True:
            now = time.monotonic()
            if word.is_ready:
                log.info(f"the guest is ready after {now - self._began:.1f} s")
                return READY
            if complain_at is not None and now >= complain_at:
                complain_at = None
                self._complain()
            elif word.describe() != shown and now >= show_at:
                if shown or word.status:
                    log.status(f"Waiting for the guest to be ready; {word.describe()}")
                    show_at = now + STATUS_EVERY
                shown = word.describe()
            times = [each.deadline for each in connections.values()]
            times += [complain_at] if complain_at is not None else []
            times += [show_at] if word.describe() != shown else []
            times += [now + LOOK_AFTER_SOCKET_EVERY] if self._address.path else []
            readable = self._wait(
                [hypervisor, asked, *connections],
                accept=len(connections) < CONNECTIONS_MAX,
                until=min(times, default=None),
            )
            if hypervisor in readable:
                log.notice("the hypervisor ended before the guest was ready")
                return ENDED
            now = time.monotonic()
            if asked in readable:
                if complain_at is not None and now >= complain_at:
                    # Both at once, on a busy machine: it is for this that systemd asks.
                    self._complain()
                return ASKED
            for fd, connection in list(connections.items()):
                more = connection.read(now) if fd in readable else now < connection.deadline
                if not more:
                    word.hear(connection.message)
                    connections.pop(fd).source.close()
            if self._socket.fileno() in readable:
                self._accept(connections, now)
            if self._address.path:
                self._look_after_socket()

    def _complain(self) -> None:
        reason = (
            f"the guest did not become ready within {self._timeout:.0f} s "
            f"(TimeoutStartSec=): {self._word.describe()}"
        )
        log.error(reason)
        log.status(reason)

    def _wait(self, fds: Sequence[int], *, accept: bool, until: float | None) -> set[int]:
        poll = select.poll()
        for fd in fds:
            poll.register(fd, select.POLLIN)
        if accept:
            poll.register(self._socket.fileno(), select.POLLIN)
        # Rounded up: woken too early, it would run in circles.
        wait = None if until is None else max(0, until - time.monotonic()) * 1000 + 1
        return {fd for fd, _ in poll.poll(wait)}

    def _accept(self, connections: dict[int, _Connection], now: float) -> None:
        for _ in range(BACKLOG):
            if len(connections) == CONNECTIONS_MAX:
                return
            try:
                fd, peer = self._socket._accept()  # type: ignore[attr-defined]
            except OSError:
                # No more, or it has gone again.
                return
            source = socket(fileno=fd)
            # The port is open to every guest and process of the host.
            if not self._address.path and peer[0] != self._address.cid:
                source.close()
                continue
            source.setblocking(False)
            connections[fd] = _Connection(source, now)

    def _look_after_socket(self) -> None:
        """Listen anew where the package's own script has removed what was left, as it thought."""
        try:
            if os.lstat(self._address.path).st_ino == self._inode:
                return
        except FileNotFoundError:
            former = self._socket
            try:
                self._socket = self._bind_unix()
            except MicrovmHostError:
                # Somebody else was quicker.
                return
            former.close()
        except OSError:
            return

    def _unlink(self) -> None:
        try:
            if self._address.path and os.lstat(self._address.path).st_ino == self._inode:
                os.unlink(self._address.path)
        except OSError:
            pass


def _vsock(port: int, *, is_stream: bool) -> socket:
    """Listen on a vsock port; raises OSError."""
    kind = SOCK_STREAM if is_stream else SOCK_SEQPACKET
    listening = socket(AF_VSOCK, kind | SOCK_CLOEXEC | SOCK_NONBLOCK)
    try:
        listening.bind((VMADDR_CID_ANY, port))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def announce(main_pid: int, running: str, status: str) -> None:
    """Tell systemd that the VM is started, and of the guest what it has said last."""
    said = f"; the guest says: {status}" if status else ""
    tell(f"MAINPID={main_pid}\nREADY=1\n{log.status_assignment(running + said)}")


def tell(state: str) -> None:
    """Send systemd a message and wait until it was taken in.

    systemd finds the unit of a message by the process that sent it: sent by one that has ended
    meanwhile, it is lost. A descriptor that goes with a last message is closed when all were
    taken in (sd_notify_barrier(3)).
    """
    log.notify(state)
    address = os.environ.get("NOTIFY_SOCKET", "")
    ours, theirs = os.pipe()
    target = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC)
    try:
        target.sendmsg(
            [b"BARRIER=1"],
            [(SOL_SOCKET, SCM_RIGHTS, theirs.to_bytes(4, byteorder))],
            0,
            "\0" + address[1:] if address[:1] == "@" else address,
        )
    except OSError:
        # Nobody listens: then there is nobody to wait for.
        os.close(ours)
        return
    finally:
        os.close(theirs)
        target.close()
    poll = select.poll()
    # POLLHUP is always waited for.
    poll.register(ours, 0)
    poll.poll(BARRIER_WITHIN * 1000)
    os.close(ours)
