# SPDX-License-Identifier: MIT
"""What a test may ask of a test host, whichever kind it is.

Commands, files and copies are the same for both kinds, because both are reached by one thing: a
command line that runs another command line inside (`CommandHost._enter_argv`).  Files go through
`cat` and `tar` in there rather than through a path outside, so that they appear with the host's
own users, mounts and caches, as if an administrator had made them.
"""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import signal
import subprocess
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self


class HostError(Exception):
    """A test host could not be built, started, entered or removed."""


class CommandFailed(subprocess.CalledProcessError):
    """A command inside a host failed; says what it wrote, which is what a reader needs first."""

    def __str__(self) -> str:
        command = self.cmd if isinstance(self.cmd, str) else shlex.join(self.cmd)
        text = f"exit {self.returncode} from: {command}"
        for name, output in (("stdout", self.stdout), ("stderr", self.stderr)):
            if output:
                text += f"\n--- {name}\n{str(output)[-4000:].rstrip()}"
        return text


class Host(Protocol):
    """A throw-away systemd machine."""

    @property
    def kind(self) -> str:
        """`container` or `virtual`."""

    @property
    def suite(self) -> str:
        """The Debian suite that it runs."""

    @property
    def start_seconds(self) -> float:
        """How long the last start took, until systemd called the system running."""

    def start(self) -> None:
        """Boot, and return once `systemctl is-system-running` says running or degraded.

        After `stop` this is a fresh host; after `poweroff` it has the files it had.
        """

    def poweroff(self) -> None:
        """Shut down in order and keep the files, for a later `start`."""

    def reboot(self) -> None:
        """Reboot in order, files kept; returns like `start`."""

    def stop(self) -> None:
        """End the host at once, throw its files away, and prove that nothing is left of it."""

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        user: str | None = None,
        input: str | None = None,
        timeout: float = 180,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command inside, with a clean environment and `/` as working directory.

        A command that a signal ended returns 128 and the signal, as a shell would have it.
        With `check` a failure raises CommandFailed, which shows the output.
        """

    def spawn(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Start a command inside with pipes on its standard input, output and error.

        Its signals (`terminate`, `kill`, `send_signal`) reach the command inside.
        """

    def copy(self, source: Path | str, target: str, *, exclude: Sequence[str] = ()) -> None:
        """Copy a file to be the file `target`, or a directory's content into directory `target`.

        Parents are made; all belongs to root; modes and symbolic links are kept.  `exclude` names
        entries that are left out at any depth.
        """

    def read(self, path: str) -> str:
        """The text of a file."""

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file, making its parents."""

    def exists(self, path: str) -> bool:
        """Whether anything has this path; a dangling symbolic link has."""

    def shell(self) -> int:
        """An interactive shell on the caller's terminal; returns its exit code."""

    def diagnosis(self) -> str:
        """The end of the console log, for a report on what went wrong."""


# What a login as root has; tests must not see the environment of whoever runs them.
ENVIRONMENT = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LANG": "C.UTF-8",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
}

# Becomes another user without PAM: runuser and su would open a login session, whose user manager
# and runtime directory a unit of that user does not have either.
_AS_USER = (
    'u=$1; shift; e=$(getent passwd "$u") || { echo "no such user: $u" >&2; exit 1; }; '
    'h=$(echo "$e" | cut -d: -f6); g=$(id -g "$u"); '
    'exec env HOME="$h" USER="$u" LOGNAME="$u" '
    'setpriv --reuid="$u" --regid="$g" --init-groups -- "$@"'
)

# The pid is told first, so that signals can find the command from outside.
_TELL_PID = 'echo $$ >"$1" && shift && exec "$@"'


def inner_argv(
    argv: Sequence[str],
    *,
    user: str | None = None,
    env: Mapping[str, str] | None = None,
    pid_file: str | None = None,
) -> list[str]:
    """The command as it runs inside: clean environment, chosen user, pid told."""
    if isinstance(argv, str):
        raise TypeError("argv is a sequence of words; for a line of shell use ['sh', '-c', line]")
    variables = {**ENVIRONMENT, "TERM": os.environ.get("TERM", "dumb"), **(env or {})}
    inner = ["env", "-i", "-C", "/", *(f"{name}={value}" for name, value in variables.items())]
    if pid_file:
        inner += ["sh", "-c", _TELL_PID, "sh", pid_file]
    if user not in (None, "root"):
        inner += ["sh", "-c", _AS_USER, "sh", str(user)]
    return [*inner, *argv]


def _end_session(leader: subprocess.Popen[bytes]) -> None:
    # The program that leads inside goes last: it is the parent of the command, and a command
    # whose parent is gone would stay as a zombie until the machine's init takes notice, which
    # not every init does, and which holds up the host's shutdown.
    from tests.host import leftovers

    for pid in leftovers.session_members(leader.pid):
        if pid != leader.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    try:
        leader.wait(timeout=1)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()


class HostProcess(subprocess.Popen[str]):
    """A command inside a host whose signals reach it, not the program that leads there."""

    def __init__(self, host: CommandHost, argv: Sequence[str], pid_file: str) -> None:
        self._host = host
        self._pid_file = pid_file
        super().__init__(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def send_signal(self, sig: int) -> None:
        """Send a signal to the command; one that has ended is no error."""
        if self.poll() is not None:
            return
        # The command may not have told its pid yet: it is a few milliseconds behind.
        line = (
            'for i in 1 2 3 4 5 6 7 8 9 10; do test -s "$1" && break; sleep 0.2; done; '
            'kill -s "$2" "$(cat "$1")"'
        )
        name = signal.Signals(sig).name.removeprefix("SIG")
        self._host.run(["sh", "-c", line, "sh", self._pid_file, name], check=False)


class CommandHost(ABC):
    """The part of a host that is the same for both kinds."""

    kind = "none"

    def __init__(self, suite: str) -> None:
        self.suite = suite
        self.start_seconds = 0.0
        self._spawned = 0

    @abstractmethod
    def _enter_argv(self, inner: Sequence[str], *, terminal: bool) -> list[str]:
        """The command line, outside, that runs a command line inside."""

    def _bounded(self, inner: Sequence[str], timeout: float) -> list[str]:
        """The command line inside, if it takes something there to end it after a timeout."""
        del timeout
        return list(inner)

    def _check_channel(self, returncode: int) -> None:
        """Raise if an exit code is the channel's own failure and not the command's."""
        del returncode

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def poweroff(self) -> None: ...

    @abstractmethod
    def reboot(self) -> None: ...

    @abstractmethod
    def diagnosis(self) -> str: ...

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _run_bytes(
        self, inner: Sequence[str], *, input: bytes | None, timeout: float
    ) -> subprocess.CompletedProcess[bytes]:
        argv = self._enter_argv(self._bounded(inner, timeout), terminal=False)
        # A session of its own, so that a timeout can end what the command has started as well,
        # and so that an interrupt typed at the terminal is the test's to handle.
        with subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if input is not None else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(input, timeout=timeout)
            except BaseException:
                _end_session(process)
                raise
        code = process.returncode
        self._check_channel(code)
        return subprocess.CompletedProcess(list(inner), 128 - code if code < 0 else code, out, err)

    def run(
        self,
        argv: Sequence[str],
        *,
        check: bool = True,
        user: str | None = None,
        input: str | None = None,
        timeout: float = 180,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        inner = inner_argv(argv, user=user, env=env)
        data = None if input is None else input.encode()
        try:
            done = self._run_bytes(inner, input=data, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            error.cmd = list(argv)  # the way in is noise in a report
            raise
        # Output of broken programs is evidence too, so it never fails to decode.
        out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
        if check and done.returncode:
            raise CommandFailed(done.returncode, list(argv), out, err)
        return subprocess.CompletedProcess(list(argv), done.returncode, out, err)

    def spawn(
        self,
        argv: Sequence[str],
        *,
        user: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        self._spawned += 1
        pid_file = f"/run/test-host-spawned-{self._spawned}"
        inner = inner_argv(argv, user=user, env=env, pid_file=pid_file)
        return HostProcess(self, self._enter_argv(inner, terminal=False), pid_file)

    def copy(self, source: Path | str, target: str, *, exclude: Sequence[str] = ()) -> None:
        source = Path(source)
        if not source.is_dir():
            data = source.read_bytes()
            self._put(target, data, source.stat().st_mode & 0o7777)
            return

        def chosen(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
            if Path(entry.name).name in exclude:
                return None
            entry.uid = entry.gid = 0
            entry.uname = entry.gname = "root"
            return entry

        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(source, arcname=".", filter=chosen)
        line = 'mkdir -p "$1" && exec tar -x -p -C "$1"'
        self._must(["sh", "-c", line, "sh", target], packed.getvalue())

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        self._put(path, text.encode(), mode)

    def _put(self, path: str, data: bytes, mode: int) -> None:
        # A new file takes the name, as an editor would do it: what runs from the old one, or has
        # it open, keeps it.
        line = (
            'mkdir -p "$(dirname "$1")" && cat >"$1.partial" && chmod "$2" "$1.partial" '
            '&& exec mv -fT "$1.partial" "$1"'
        )
        self._must(["sh", "-c", line, "sh", path, f"{mode:o}"], data)

    def read(self, path: str) -> str:
        return self._must(["cat", "--", path]).decode(errors="replace")

    def exists(self, path: str) -> bool:
        line = 'test -e "$1" || test -L "$1"'
        return self.run(["sh", "-c", line, "sh", path], check=False).returncode == 0

    def _must(self, argv: Sequence[str], data: bytes | None = None) -> bytes:
        done = self._run_bytes(inner_argv(argv), input=data, timeout=300)
        if done.returncode:
            err = done.stderr.decode(errors="replace")
            raise CommandFailed(done.returncode, list(argv), "", err)
        return done.stdout

    def shell(self) -> int:
        # A login shell, for the completion and the prompt that people expect.
        argv = self._enter_argv(inner_argv(["bash", "--login"]), terminal=True)
        return subprocess.run(argv).returncode
