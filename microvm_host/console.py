# SPDX-License-Identifier: MIT
"""The serial console of a running VM, on this terminal.

The console's socket takes one client at a time, who types and sees each byte as it comes. Others
follow the journal, in which the console is in any case, and see whole lines; so there is no need
for a process that keeps the console and hands it out. Who has the socket is told by a lock on the
VM's directory, which goes with its owner, however that ends.
"""

from __future__ import annotations

import fcntl
import os
import pwd
import select
import signal
import subprocess
import sys
import termios
import time
import tty

from . import names, systemd, terminal_text
from .errors import MicrovmHostError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from types import FrameType, TracebackType

    from .attach import Running
    from .paths import HostPaths

# Of what the guest says and this terminal does not take. Beyond that the oldest is forgotten: a
# reader who stands still must not hold up the guest, whose console waits for the slowest.
SCREEN_MAX = 1 << 20
_KEYS_MAX = 64 << 10
# At once to the terminal: what poll(2) promises that a pipe takes.
_PIECE = 4096
_LAST_WORDS = 2.0  # seconds that the journal may take for what an ended VM said

DETACHED, ENDED = "detached", "ended"


def escape_key(text: str) -> bytes | None:
    """The key that detaches: `^]`, one character, or `none`; raises UsageError."""
    if text == "none":
        return None
    if len(text) == 2 and text[0] == "^" and 0x40 <= ord(text[1].upper()) <= 0x5F:
        return bytes([ord(text[1].upper()) & 0x1F])
    if len(text) == 1 and text.isascii():
        return text.encode()
    raise UsageError(f"{text!r} is no key", hint="^] is, one character, or none")


class Keyboard:
    """The right to type: one at a time has it."""

    def __init__(self, vm: Running, host: HostPaths) -> None:
        try:
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            self._directory = os.open(vm.directory, flags)
        except PermissionError as error:
            raise MicrovmHostError(
                "cannot be read", path=vm.directory, hint="this needs root"
            ) from error
        self._host = host

    def take(self) -> bool:
        """Whether it is ours now."""
        try:
            fcntl.flock(self._directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def holder(self) -> str:
        """Who has it, for people."""
        status = os.fstat(self._directory)
        device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
        try:
            with open(self._host.locks, encoding="ascii", errors="replace") as locks:
                # proc_locks(5)
                for _, kind, *rest in map(str.split, locks):
                    if kind == "FLOCK" and rest[3] == device:
                        return f"process {rest[2]}{self._of_whom(rest[2])}"
        except (OSError, IndexError, ValueError):
            pass
        return "somebody else"

    def _of_whom(self, pid: str) -> str:
        try:
            return f" of {pwd.getpwuid(os.stat(self._host.process(int(pid))).st_uid).pw_name}"
        except (OSError, KeyError, ValueError):
            return ""

    def close(self) -> None:
        os.close(self._directory)


class Terminal:
    """The terminal on standard input, if there is one, made to hand on each key.

    Raw, it hands on all of them; otherwise those stay that send signals. It is as it was before
    when this ends, whatever ends it but SIGKILL: other signals become errors meanwhile.
    """

    def __init__(self, *, raw: bool) -> None:
        self._raw = raw
        self._saved: list[object] | None = None
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> Terminal:
        for number in (signal.SIGTERM, signal.SIGHUP):
            # nohup(1) has the latter ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, _end)
        if os.isatty(0):
            self._saved = termios.tcgetattr(0)
            (tty.setraw if self._raw else tty.setcbreak)(0, termios.TCSANOW)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if self._saved is not None:
                termios.tcsetattr(0, termios.TCSANOW, self._saved)  # type: ignore[arg-type]
        except termios.error:
            # The terminal has gone.
            pass
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]


def _end(number: int, frame: FrameType | None) -> None:
    error = MicrovmHostError(f"ended by {signal.Signals(number).name}")
    error.exit_code = 128 + number
    raise error


def relay(
    source: int,
    *,
    types: bool,
    escape: bytes | None = None,
    keys: int | None = 0,
    screen: int = 1,
    ended: int | None = None,
    successor: Callable[[], int | None] = lambda: None,
    clean: Callable[[bytes], bytes] = bytes,
) -> str:
    """Carry what comes to the screen, and keys back, until one side ends it.

    Args:
        source: the guest's output; does not block.
        types: whether keys go there. Otherwise they are looked at for `escape` alone.
        escape: the key that detaches.
        keys: where keys come from; None for nowhere.
        ended: becomes readable when the VM has ended, if the source does not end by that.
        successor: asked then; gives another such, if the VM has not ended after all.
        clean: what comes to the screen goes through it.

    Returns:
        DETACHED or ENDED.
    """
    to_screen, to_guest = bytearray(), bytearray()
    lost, until, is_over, detaches = 0, float("inf"), False, False
    while not is_over or to_screen:
        poll = select.poll()
        if not is_over:
            poll.register(source, select.POLLIN | (select.POLLOUT if to_guest else 0))
        if to_screen:
            poll.register(screen, select.POLLOUT)
        if keys is not None and len(to_guest) < _KEYS_MAX:
            poll.register(keys, select.POLLIN)
        if ended is not None:
            poll.register(ended, select.POLLIN)
        wait = until - time.monotonic()
        if wait <= 0:
            break
        ready = dict(poll.poll(None if until == float("inf") else wait * 1000))
        if ended is not None and ended in ready:
            ended = successor()
            if ended is None:
                # What it said last is still on its way.
                detaches = False
                until = time.monotonic() + _LAST_WORDS
        if keys is not None and keys in ready:
            typed = _read(keys)
            if typed == b"":
                # Nobody types any more. The answer to what was typed last is still shown.
                keys = None
                detaches = True
                until = min(until, time.monotonic() + _LAST_WORDS)
            before, found, _ = (typed or b"").partition(escape or b"\0\0")
            to_guest += before if types else b""
            if found:
                if to_guest:
                    _write(source, to_guest)
                return DETACHED
        if ready.get(source, 0) & ~select.POLLOUT:
            data = _read(source)
            is_over = data == b""
            to_screen += clean(data or b"")
            if len(to_screen) > SCREEN_MAX:
                lost += len(to_screen) - SCREEN_MAX
                del to_screen[: len(to_screen) - SCREEN_MAX]
        if to_guest and ready.get(source, 0) & select.POLLOUT:
            _write(source, to_guest)
        if to_screen and screen in ready:
            if lost:
                to_screen[:0] = b"\r\n[%d bytes were not shown in time]\r\n" % lost
                lost = 0
            del to_screen[: os.write(screen, to_screen[:_PIECE])]
    return DETACHED if detaches and not is_over else ENDED


def _read(source: int) -> bytes | None:
    """What has come; nothing if it is at its end, None if there is nothing after all."""
    try:
        return os.read(source, 65536)
    except BlockingIOError:
        return None
    except OSError:
        # A connection that was reset, a terminal that has gone.
        return b""


def _write(sink: int, data: bytearray) -> None:
    try:
        del data[: os.write(sink, data)]
    except BlockingIOError:
        pass
    except (BrokenPipeError, ConnectionResetError):
        # That it has ended is read from it.
        data.clear()


def has_process(vm: str) -> bool:
    """Whether a VM's hypervisor runs, or who is about to become it."""
    process = _Process(vm)
    try:
        return process.next() is not None
    finally:
        process.close()


def show_before(vm: Running, lines: int) -> None:
    """Show the last lines that the journal has of the console, since the VM's start.

    They are without what commands a terminal: the guest's questions were answered already.
    """
    if lines:
        found = subprocess.run(
            _journalctl(vm, lines), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
        )
        clean = terminal_text.Lines()
        sys.stdout.buffer.write(clean(found.stdout) + clean.rest())
        sys.stdout.flush()


def attach(guest: socket.socket, escape: bytes | None) -> str:
    """Be the one who types; gives DETACHED or ENDED."""
    guest.setblocking(False)
    # Elsewhere than on a terminal no byte has a meaning of its own.
    key = escape if os.isatty(0) else None
    with Terminal(raw=True):
        return relay(guest.fileno(), types=True, escape=key)


def follow(vm: Running, lines: int, escape: bytes | None, *, ends_with_input: bool = False) -> str:
    """Show whole lines from the journal; gives DETACHED or ENDED.

    Args:
        ends_with_input: the end of an input that is no terminal ends it, too.
    """
    main = _Process(vm.name)
    reader = subprocess.Popen(
        [*_journalctl(vm, lines), "--follow"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE
    )
    assert reader.stdout is not None
    try:
        with Terminal(raw=False):
            return relay(
                reader.stdout.fileno(),
                types=False,
                escape=escape,
                keys=0 if os.isatty(0) or ends_with_input else None,
                clean=terminal_text.Lines(),
                ended=main.next(),
                successor=main.next,
            )
    except KeyboardInterrupt:
        return DETACHED
    finally:
        reader.kill()
        reader.wait()
        main.close()


def _journalctl(vm: Running, lines: int) -> list[str]:
    """What shows the last lines of a VM's console, and of what tells its state."""
    argv = ["journalctl", "--quiet", "--no-pager", "--output=cat", "--all", f"--lines={lines}"]
    start = systemd.show(names.unit(vm.name), "InvocationID").get("InvocationID", "")
    argv += [f"_SYSTEMD_INVOCATION_ID={start}"] if start else []
    return [*argv, f"SYSLOG_IDENTIFIER=microvm@{vm.name}"]


class _Process:
    """The main process of a VM's unit: the hypervisor, after who waited for the guest perhaps."""

    def __init__(self, vm: str) -> None:
        self._units = (names.unit(vm), names.foreground_unit(vm))
        self._descriptor: int | None = None

    def next(self) -> int | None:
        """A descriptor that is readable when the one of now has ended; None if there is none."""
        self.close()
        for unit in self._units:
            main = systemd.show(unit, "MainPID").get("MainPID", "0")
            try:
                if names.is_number(main) and int(main):
                    self._descriptor = os.pidfd_open(int(main))
                    return self._descriptor
            except ProcessLookupError:
                continue
        return None

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None
