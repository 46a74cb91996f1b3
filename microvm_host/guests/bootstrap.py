# SPDX-License-Identifier: MIT
"""Runs mmdebstrap: tells how far it is, why it failed, and ends it with who called it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
from collections import deque
from contextlib import contextmanager, suppress

from ..errors import MicrovmHostError, one_line
from ..paths import PROGRAM_PLACES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from .archives import Origin

# Programs of the host, with Debian's packages that have them.
_FOR_ROOTS = (("mmdebstrap", "mmdebstrap"),)
_FOR_DISKS = (
    ("mkfs.ext4", "e2fsprogs"),
    ("mkfs.vfat", "dosfstools"),
    ("mcopy", "mtools"),
)
# What mkfs.ext4 reads archives with, and does not depend on.
_LIBARCHIVE = "libarchive13t64"
_PATH = os.pathsep.join(PROGRAM_PLACES)
# Words of apt's, and what they mostly mean.
_HINTS = (
    (
        ("does not have a Release file", " 404 ", " 400 "),
        "has the mirror such a suite? --suite and --mirror give others",
    ),
    (
        ("resolve", "resolving", "connect", "timed out", "unreachable", "Connection failed"),
        "is the mirror reachable from this host? --mirror URL gives another",
    ),
    (
        ("NO_PUBKEY", "not signed", "signature", "EXPKEYSIG"),
        "this host does not know the mirror's keys: install debian-archive-keyring, or a newer one",
    ),
    (("No space left", "not enough free space"), "make room there"),
)
_LINES_KEPT = 15
# What it does about itself.
_DULL = ("I: main()", "I: removing tempdir", "I: finding correct signed-by")
# How long it may take to clear up, in seconds, before it is killed.
_ENDS_WITHIN = 20


def check_host(*, has_root: bool) -> None:
    """See that this host can make a root, a disk of it, and a seed.

    Making the root takes minutes, after which it is too late to be told.

    Args:
        has_root: there is one already, and nothing is needed to make it.

    Raises:
        MicrovmHostError: something is missing; names all of it, and one line that installs it.
    """
    programs = _FOR_DISKS if has_root else (*_FOR_ROOTS, *_FOR_DISKS)
    missing = [each for each in programs if not shutil.which(each[0], path=_PATH)]
    has_mkfs = shutil.which("mkfs.ext4", path=_PATH) is not None
    complaint = _disk_complaint() if has_mkfs else ""
    if missing:
        packages = [package for _, package in missing]
        # Without mkfs.ext4 nobody can tell whether it would find the library.
        packages += [_LIBARCHIVE] if complaint or not has_mkfs else []
        names = ", ".join(program for program, _ in missing)
        raise MicrovmHostError(
            f"a Debian guest is made with {names}, which this host does not have",
            hint=f"install what has it (on Debian 13: apt install {' '.join(packages)})",
        )
    if complaint:
        raise MicrovmHostError(
            f"this host's mkfs.ext4 makes no disks of archives: {complaint}",
            hint="it does from e2fsprogs 1.47.1 on, with libarchive (on Debian 13: apt install "
            f"{_LIBARCHIVE})",
        )


def _disk_complaint() -> str:
    """What mkfs.ext4 says against making a disk of an archive; nothing if it makes one."""
    with tempfile.TemporaryDirectory() as scratch:
        # An archive with nothing in it.
        with open(f"{scratch}/empty.tar", "wb") as target:
            target.write(bytes(10240))
        argv = ["mkfs.ext4", "-q", "-F", "-d", f"{scratch}/empty.tar", f"{scratch}/image", "4M"]
        done = subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PATH": _PATH},
        )
    return (one_line(done.stdout) or f"it ended with {done.returncode}") if done.returncode else ""


def run(argv: list[str], directory: str, origin: Origin, say: Callable[[str], object]) -> None:
    """Run mmdebstrap with a directory for what it unpacks, which is to be thrown away after it.

    Raises:
        MicrovmHostError: it failed; what apt said was told.
    """
    environment = {
        **os.environ,
        # /tmp is memory on many hosts, and not much.
        "TMPDIR": directory,
        # The administrator's words are not the guest's.
        "LC_ALL": "C.UTF-8",
        "PATH": _PATH,
    }
    with _interrupted_by_signals():
        # In a session of its own: Ctrl-C is for us, who see to it that all of it ends.
        child = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
        try:
            lines = _follow(child, argv, say)
        except BaseException:
            _end(child)
            raise
    if child.returncode:
        raise failure(lines, origin)


def failure(lines: list[str], origin: Origin) -> MicrovmHostError:
    """What the last lines of mmdebstrap's mean."""
    # Its own last one only says that something failed.
    reasons = [line[3:] for line in lines if line.startswith("E: ")]
    reason = reasons[0] if reasons else "mmdebstrap failed"
    text = "\n".join(lines)
    hint = next((hint for words, hint in _HINTS if any(word in text for word in words)), "")
    return MicrovmHostError(
        f"no Debian root of {origin.suite} could be made from {origin.mirror}: {reason}",
        hint=hint or "what it said stands above",
    )


def _follow(
    child: subprocess.Popen[str], argv: list[str], say: Callable[[str], object]
) -> list[str]:
    """Tell its steps until it ends; gives its last lines, told too if it failed."""
    # It writes out the hooks that it runs.
    echoed = {line.strip() for word in argv for line in word.splitlines()}
    last: deque[str] = deque(maxlen=_LINES_KEPT)
    assert child.stderr is not None
    for line in child.stderr:
        line = line.strip()
        if line.startswith("I: "):
            # `I: downloading packages with apt...`, among what is about itself.
            if line.endswith("...") and not line.startswith(_DULL):
                say(f"  {line[3:]}")
        elif line and line not in echoed:
            last.append(line)
    if child.wait():
        for line in last:
            say(f"  {line}")
    return [*last]


def _end(child: subprocess.Popen[str]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(_ENDS_WITHIN)
    except subprocess.TimeoutExpired:
        pass
    # Also what it left running.
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


@contextmanager
def _interrupted_by_signals() -> Iterator[None]:
    """Have a terminal that is closed, and a plain kill, end us as Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        del number, frame
        raise KeyboardInterrupt

    former = {
        number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def discard(directory: str) -> None:
    """Remove what was being made; what might be mounted in there is not gone into."""
    subprocess.run(["rm", "-rf", "--one-file-system", "--", directory], check=False)
