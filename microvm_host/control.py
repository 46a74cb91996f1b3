# SPDX-License-Identifier: MIT
"""Talks to a hypervisor over its control socket: power button, pause, resume, how the guest ended.

Speaks QMP, cloud-hypervisor's and firecracker's HTTP over a UNIX socket, as little of each as this
needs. Runs as the VM's user, but takes the other end for hostile: the guest may have
taken the hypervisor over. Each exchange has one deadline and a limit on what is read, every
answer is checked, and of what the hypervisor says only known words are repeated.

Nothing here is on the way to a start, and `json` is imported when something is asked.
"""

from __future__ import annotations

import os
import stat
import time
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket

from .errors import MicrovmHostError, NoGuest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, TypeVar

    T = TypeVar("T")

# Of one message, and of all that is read in one exchange. QMP's longest here is the greeting.
LINE_MAX = 64 * 1024
EXCHANGE_MAX = 1024 * 1024
# Of the end of an event log: the last events are what counts.
LOG_TAIL = 64 * 1024

POWERED_OFF, REBOOTED, PANICKED = "powered-off", "rebooted", "panicked"
# QEMU's ShutdownCause (qapi/run-state.json), as far as the guest is the cause.
_CAUSES = {"guest-shutdown": POWERED_OFF, "guest-reset": REBOOTED, "guest-panic": PANICKED}

RUNNING = "running"
# Of QEMU's RunState (same file), those in which no guest runs: a full disk of the host, somebody's
# monitor, a KVM that failed. The other hypervisors know `paused`.
PAUSED = (
    *("io-error", "paused", "prelaunch", "debug", "internal-error", "guest-panicked"),
    *("suspended", "watchdog", "shutdown", "postmigrate"),
)
# In these there is no guest: it has never run, has powered off (-no-shutdown), or runs elsewhere.
NO_GUEST = ("prelaunch", "shutdown", "postmigrate")
# A stop resumes these, since the guest would go on as if nothing had been. QEMU refuses to resume
# the rest.
RESUMABLE = ("io-error", "paused", "debug", "suspended", "watchdog")
# The command that resumes a guest, where it is not `cont`.
_RESUMES = {"suspended": "system_wakeup"}


class Refusal(MicrovmHostError):
    """The hypervisor refuses a command; `kind` is QMP's class of the error."""

    kind = ""


class Pressed:
    """A power button that was pressed, and the connection by which QEMU tells what came of it."""

    def __init__(self, stream: _Stream, remark: str = "", *, tells: bool = False) -> None:
        self._stream = stream
        # What comes over HTTP is no event, whatever it looks like.
        self._tells = tells
        # Why the guest may not react, if that is known.
        self.remark = remark

    def heard(self) -> str | None:
        """How the guest ended, as far as the hypervisor has said so by now: one of the words."""
        return self._stream.ending() if self._tells else None

    def close(self) -> None:
        self._stream.close()


def press(protocol: str, path: str, within: float) -> Pressed:
    """Press the power button; over QMP, resume a paused guest first.

    Args:
        protocol: one of runner.CONTROL_PROTOCOLS.
        path: the control socket, relative to the working directory perhaps.
        within: seconds until the exchange is given up.

    Raises:
        NoGuest: there is none.
        MicrovmHostError: the hypervisor cannot be reached, refuses, or does not answer sensibly.
    """
    hypervisor = Hypervisor(protocol, path, within)
    try:
        # The others may hang up after an answer: wake() has a connection of its own.
        remark = hypervisor.wake() if protocol == "qmp" else ""
        hypervisor.press()
    except MicrovmHostError:
        hypervisor.close()
        raise
    return Pressed(hypervisor.stream, remark, tells=protocol == "qmp")


def wake(protocol: str, path: str, within: float) -> str:
    """Resume a paused guest, so that it can shut down; gives what there is to say of it.

    Raises:
        MicrovmHostError: as press() does.
    """
    hypervisor = Hypervisor(protocol, path, within)
    try:
        return hypervisor.wake()
    finally:
        hypervisor.close()


class Hypervisor:
    """A conversation with a hypervisor, for which there are so many seconds.

    All methods raise MicrovmHostError where it cannot be reached, refuses, or makes no sense.
    """

    def __init__(
        self, protocol: str, path: str, within: float, connected: socket | None = None
    ) -> None:
        """
        Args:
            protocol: one of runner.CONTROL_PROTOCOLS.
            path: the control socket, relative to the working directory perhaps.
            connected: a connection that somebody has made to it.
        """
        if protocol not in _PROTOCOLS:
            raise MicrovmHostError(f"there is no control protocol {protocol!r}", path=path)
        self._protocol = protocol
        self.stream = _Stream(path, time.monotonic() + within, connected)
        if protocol == "qmp":
            try:
                self._say(lambda: _greet(self.stream))
            except MicrovmHostError:
                self.close()
                raise

    def state(self) -> str:
        """RUNNING, one of PAUSED, or nothing for what is neither."""
        if self._protocol == "qmp":
            found = self._execute("query-status")
            state = found.get("status") if isinstance(found, dict) else None
        else:
            state = as_state(self._request("GET", _STATE_AT[self._protocol]))
        return state if isinstance(state, str) and state in (RUNNING, *PAUSED) else ""

    def pause(self) -> None:
        if self._protocol == "qmp":
            self._execute("stop")
        elif self._protocol == "cloud-hypervisor":
            self._request("PUT", "/api/v1/vm.pause")
        else:
            # docs/snapshotting/snapshot-support.md of firecracker.
            self._request("PATCH", "/vm", b'{"state":"Paused"}')

    def resume(self, state: str) -> None:
        """Resume a guest that is in this one of the states PAUSED."""
        if self._protocol == "qmp":
            self._execute(_RESUMES.get(state, "cont"))
        elif self._protocol == "cloud-hypervisor":
            self._request("PUT", "/api/v1/vm.resume")
        else:
            self._request("PATCH", "/vm", b'{"state":"Resumed"}')

    def press(self) -> None:
        """Press the power button."""
        if self._protocol == "qmp":
            self._execute("system_powerdown")
        elif self._protocol == "cloud-hypervisor":
            # docs/api.md of cloud-hypervisor.
            self._request("PUT", "/api/v1/vm.power-button")
        else:
            # docs/api_requests/actions.md of firecracker; x86 alone has it.
            self._request("PUT", "/actions", b'{"action_type":"SendCtrlAltDel"}')

    def wake(self) -> str:
        """Resume a paused guest that can go on; gives what there is to say of it.

        Raises:
            NoGuest: there is none.
        """
        try:
            state = self.state()
        except Refusal:
            # One that does not tell has a button nevertheless.
            return ""
        if state in ("", RUNNING):
            return ""
        if state in NO_GUEST:
            raise NoGuest(f"no guest runs in the hypervisor ({state})")
        if state not in RESUMABLE:
            return f"the guest is stopped ({state}) and cannot react"
        try:
            self.resume(state)
        except Refusal as error:
            return f"the guest is paused ({state}) and cannot react: {error}"
        return f"the guest was paused ({state}): resumed it, so that it can shut down"

    def close(self) -> None:
        self.stream.close()

    def _execute(self, command: str) -> object:
        return self._say(lambda: self.stream.execute(command))

    def _request(self, method: str, target: str, body: bytes = b"") -> bytes:
        return self._say(lambda: _request(self.stream, method, target, body))

    def _say(self, exchange: Callable[[], T]) -> T:
        try:
            return exchange()
        except OSError as error:
            raise _unheard(error, self.stream.path) from error


_PROTOCOLS = ("qmp", "cloud-hypervisor", "firecracker")
# Where the others tell their state.
_STATE_AT = {"cloud-hypervisor": "/api/v1/vm.info", "firecracker": "/"}


def question(protocol: str) -> bytes:
    """All that has to be sent to a hypervisor to have it tell its state."""
    if protocol == "qmp":
        return b'{"execute":"qmp_capabilities"}\n{"execute":"query-status"}\n'
    return _http("GET", _STATE_AT[protocol])


def answered(protocol: str, heard: bytes) -> str | None:
    """The state that is told by what was heard up to now, as Hypervisor.state() gives it.

    None if more has to be heard. Reads QMP without `json`: a listing has many to hear, and a stop
    few milliseconds.
    """
    if protocol == "qmp":
        for line in heard.split(b"\n")[:-1]:
            _, is_answer, rest = line.partition(b'"status"')
            if b'"return"' in line and is_answer:
                word = rest.partition(b'"')[2].partition(b'"')[0].decode("ascii", "replace")
                return word if word in (RUNNING, *PAUSED) else ""
        return None
    head, is_whole, body = heard.partition(b"\r\n\r\n")
    length = _content_length(head.split(b"\r\n"))
    if not is_whole or len(body) < length:
        return None
    return as_state(body[:length])


def as_state(answer: bytes) -> str:
    """The state in an answer of cloud-hypervisor or firecracker."""
    found = parsed(answer) or {}
    return {"Running": RUNNING, "Paused": "paused"}.get(str(found.get("state")), "")


class Qmp:
    """A conversation with QEMU, over a connection that somebody has made."""

    def __init__(self, connected: socket, path: str, within: float) -> None:
        self._stream = _Stream(path, time.monotonic() + within, connected)
        try:
            _greet(self._stream)
        except OSError as error:
            self.close()
            raise _unheard(error, path) from error
        except MicrovmHostError:
            self.close()
            raise

    def ask(
        self, command: str, arguments: dict[str, object] | None = None, within: float = 10.0
    ) -> object:
        """Run a command; gives what it returned.

        Raises:
            Refusal: QEMU does not do it.
            MicrovmHostError: it does not answer within these seconds, or not sensibly.
        """
        self._stream.begin_anew(within)
        try:
            return self._stream.execute(command, arguments)
        except OSError as error:
            raise _unheard(error, self._stream.path) from error

    def close(self) -> None:
        self._stream.close()


def _greet(stream: _Stream) -> None:
    greeting = stream.message()
    if not isinstance(greeting.get("QMP"), dict):
        raise stream.nonsense("no greeting of QMP")
    stream.execute("qmp_capabilities")


def _unheard(error: OSError, path: str) -> MicrovmHostError:
    reason = "does not answer"
    if not isinstance(error, TimeoutError):
        reason = f"hung up: {error.strerror}"
    return MicrovmHostError(f"the hypervisor {reason}", path=path)


def _http(method: str, target: str, body: bytes = b"") -> bytes:
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if body:
        head += "Content-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def _request(stream: _Stream, method: str, target: str, body: bytes = b"") -> bytes:
    """Send a request of HTTP; gives the body of the answer."""
    stream.send(_http(method, target, body))
    status = stream.line()
    version, _, rest = status.partition(b" ")
    code = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(code) != 3 or not code.isdigit():
        raise stream.nonsense("no answer of HTTP")
    headers = []
    while header := stream.line():
        headers.append(header)
    found = stream.bytes(_content_length(headers))
    if not code.startswith(b"2"):
        raise Refusal(f"the hypervisor refuses: HTTP status {int(code)}", path=stream.path)
    return found


def _content_length(headers: Sequence[bytes]) -> int:
    for header in headers:
        name, _, value = header.partition(b":")
        if name.strip().lower() == b"content-length" and value.strip().isdigit():
            return min(int(value[:20]), EXCHANGE_MAX + 1)
    return 0


class _Stream:
    """A connection to a hypervisor, with one deadline for all that is said at first."""

    def __init__(self, path: str, deadline: float, connected: socket | None = None) -> None:
        self.path = path
        self._deadline = deadline
        self._buffer = b""
        self._left = EXCHANGE_MAX
        self._commands = 0
        self._ending: str | None = None
        self._socket = connected or socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
        try:
            if connected is None:
                self._connect()
        except OSError as error:
            self._socket.close()
            raise MicrovmHostError(
                f"the hypervisor cannot be reached: {error.strerror or error}", path=path
            ) from error

    def _connect(self) -> None:
        while True:
            self._wait_at_most()
            try:
                self._socket.connect(self.path)
                return
            except BlockingIOError:
                # unix(7): EAGAIN where too many wait already to be accepted.
                if time.monotonic() > self._deadline - 0.05:
                    raise
                time.sleep(0.05)

    def _wait_at_most(self) -> None:
        rest = self._deadline - time.monotonic()
        if rest <= 0:
            raise TimeoutError("timed out")
        self._socket.settimeout(rest)

    def send(self, data: bytes) -> None:
        self._wait_at_most()
        self._socket.sendall(data)

    def line(self) -> bytes:
        """The next line without its end."""
        while b"\n" not in self._buffer:
            self._wait_at_most()
            self._receive()
            if len(self._buffer) > LINE_MAX and b"\n" not in self._buffer:
                raise self.nonsense("more than any answer has")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def bytes(self, count: int) -> bytes:
        """So many bytes."""
        while len(self._buffer) < count:
            self._wait_at_most()
            self._receive()
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        self._left -= len(data)
        self._buffer += data
        if not data:
            raise MicrovmHostError("the hypervisor hung up", path=self.path)
        if self._left < 0:
            raise self.nonsense("more than any answer has")

    def message(self) -> dict[str, Any]:
        """The next message of QMP."""
        message = parsed(self.line())
        if message is None:
            raise self.nonsense("no message of QMP")
        if self._ending != PANICKED:
            # A panic is followed by the shutdown that it leads to.
            self._ending = ending(message) or self._ending
        return message

    def begin_anew(self, within: float) -> None:
        """Another exchange, with limits of its own."""
        self._deadline = time.monotonic() + within
        self._left = EXCHANGE_MAX

    def execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """Run a command of QMP; gives what it returned."""
        import json

        self._commands += 1
        rest = b"" if arguments is None else b',"arguments":' + json.dumps(arguments).encode()
        self.send(b'{"execute":"%s","id":%d%s}\n' % (command.encode(), self._commands, rest))
        while True:
            message = self.message()
            if "event" in message:
                continue
            if message.get("id") != self._commands:
                raise self.nonsense("an answer to no question")
            if "return" in message:
                return message["return"]
            refusal = Refusal(f"the hypervisor refuses {command}", path=self.path)
            error = message.get("error")
            if isinstance(error, dict) and isinstance(error.get("class"), str):
                refusal.kind = error["class"]
            raise refusal

    def ending(self) -> str | None:
        """Take what has arrived since, not waiting, and give the last word on how it ended."""
        try:
            self._socket.settimeout(0)
            while True:
                while b"\n" in self._buffer:
                    self.message()
                self._receive()
        except OSError:
            # Nothing more has come.
            pass
        except MicrovmHostError:
            # Whatever comes after nonsense is not asked for.
            self.close()
        return self._ending

    def close(self) -> None:
        self._socket.close()

    def nonsense(self, what: str) -> MicrovmHostError:
        return MicrovmHostError(f"the hypervisor does not make sense: {what}", path=self.path)


def parsed(line: bytes) -> dict[str, Any] | None:
    """A message of QMP, which is an object in JSON; None if it is none."""
    import json

    try:
        message = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) else None


def ending(message: dict[str, Any]) -> str | None:
    """How the guest ended, if that is what a message of QMP says: one of the words."""
    data = message.get("data")
    if message.get("event") == "SHUTDOWN" and isinstance(data, dict):
        reason = data.get("reason")
        return _CAUSES.get(reason) if isinstance(reason, str) else None
    return PANICKED if message.get("event") == "GUEST_PANICKED" else None


def last_words(path: str) -> str | None:
    """How the guest ended, by the event log that QEMU left: one of the words, or None.

    Opens what the VM's user may have put there: to be called with no more rights than theirs.
    """
    try:
        log = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        status = os.fstat(log)
        if not stat.S_ISREG(status.st_mode):
            return None
        text = os.pread(log, LOG_TAIL, max(status.st_size - LOG_TAIL, 0))
    except OSError:
        return None
    finally:
        os.close(log)
    found = None
    for line in text.split(b"\n"):
        message = parsed(line) if line else None
        if message is not None and found != PANICKED:
            found = ending(message) or found
    return found
