# SPDX-License-Identifier: MIT
"""The hypervisor's own power button, and what the hypervisor says of how the guest ended.

Speaks QMP, cloud-hypervisor's and firecracker's HTTP over a UNIX socket, as little of each as a
shutdown needs. Runs as the VM's user, but takes the other end for hostile: the guest may have
taken the hypervisor over. Each exchange has one deadline and a limit on what is read, every
answer is checked, and of what the hypervisor says only known words are repeated.

Nothing here is on the way to a start, and `json` is imported when something is asked.
"""

from __future__ import annotations

import os
import stat
import time
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket

from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Of one message, and of all that is read in one exchange. QMP's longest here is the greeting.
LINE_MAX = 64 * 1024
EXCHANGE_MAX = 1024 * 1024
# Of the end of an event log: the last events are what counts.
LOG_TAIL = 64 * 1024

POWERED_OFF, REBOOTED, PANICKED = "powered-off", "rebooted", "panicked"
# QEMU's ShutdownCause (qapi/run-state.json), as far as the guest is the cause.
_CAUSES = {"guest-shutdown": POWERED_OFF, "guest-reset": REBOOTED, "guest-panic": PANICKED}

# Of QEMU's RunState (same file): a full disk of the host, somebody's monitor, a KVM that failed.
_STOPPED = (
    *("io-error", "paused", "prelaunch", "debug", "internal-error", "guest-panicked"),
    *("suspended", "watchdog", "shutdown"),
)


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
    """Press the power button.

    Args:
        protocol: one of runner.CONTROL_PROTOCOLS.
        path: the control socket, relative to the working directory perhaps.
        within: seconds until the exchange is given up.

    Raises:
        MicrovmHostError: the hypervisor cannot be reached, refuses, or does not answer sensibly.
    """
    stream = _Stream(path, time.monotonic() + within)
    try:
        if protocol == "qmp":
            return Pressed(stream, _press_by_qmp(stream), tells=True)
        if protocol == "cloud-hypervisor":
            # docs/api.md of cloud-hypervisor.
            _put(stream, "/api/v1/vm.power-button")
        elif protocol == "firecracker":
            # docs/api_requests/actions.md of firecracker; x86 alone has it.
            _put(stream, "/actions", b'{"action_type":"SendCtrlAltDel"}')
        else:
            raise MicrovmHostError(f"there is no control protocol {protocol!r}", path=path)
        return Pressed(stream)
    except OSError as error:
        stream.close()
        raise _unheard(error, path) from error
    except MicrovmHostError:
        stream.close()
        raise


def _press_by_qmp(stream: _Stream) -> str:
    """Gives a remark on the guest's state, if it is one that hears no button."""
    _greet(stream)
    answer = stream.execute("query-status")
    state = answer.get("status") if isinstance(answer, dict) else None
    stream.execute("system_powerdown")
    if state in _STOPPED:
        return f"the guest is stopped ({state}) and cannot react"
    return ""


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


def _put(stream: _Stream, target: str, body: bytes = b"") -> None:
    head = f"PUT {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
    if body:
        head += "Content-Type: application/json\r\n"
    stream.send(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    status = stream.line()
    version, _, rest = status.partition(b" ")
    code = rest[:3]
    if version not in (b"HTTP/1.1", b"HTTP/1.0") or len(code) != 3 or not code.isdigit():
        raise stream.nonsense("no answer of HTTP")
    if not code.startswith(b"2"):
        raise MicrovmHostError(f"the hypervisor refuses: HTTP status {int(code)}", path=stream.path)


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
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line.rstrip(b"\r")

    def _receive(self) -> None:
        data = self._socket.recv(65536)
        self._left -= len(data)
        self._buffer += data
        if not data:
            raise MicrovmHostError("the hypervisor hung up", path=self.path)
        is_endless = len(self._buffer) > LINE_MAX and b"\n" not in self._buffer
        if self._left < 0 or is_endless:
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
