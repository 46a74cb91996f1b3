# SPDX-License-Identifier: MIT
"""Runs a target with many inputs, and says which of them it did not bear.

A finding is: an exception that is none of the target's clean ones; one that is clean but cannot be
shown in one line; anything that takes longer than SECONDS; more memory than MEMORY; a descriptor
that is left open; and anything done to the machine outside of the scratch directory. The latter is
seen by an audit hook (PEP 578), which refuses it, so that nothing comes of it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import Any

from . import inputs
from .inputs import Mutator, Tree

# What takes as long on a busy machine has hung.
SECONDS = 20.0
MEMORY = 2 << 30
TRACED = 1500
CORPUS = Path(__file__).parent / "corpus"
CODE = f"{Path(__file__).parents[2]}/microvm_host/"


class Escaped(BaseException):
    """Something was about to be done outside of the scratch directory."""


class Hung(BaseException):
    """It took too long."""


class Broken(AssertionError):
    """What the target gave is not what it promises."""


def promise(is_kept: bool, what: str) -> None:
    """Raise Broken where a target does not keep what it promises."""
    if not is_kept:
        raise Broken(what)


def read_input(root: str) -> bytes:
    """What a target of single files is fed with."""
    with open(f"{root}/input", "rb") as file:
        return file.read()


@contextmanager
def replaced(*parts: tuple[object, str, object]) -> Iterator[None]:
    """Have other values for some attributes of modules and classes, each (WHOSE, NAME, VALUE)."""
    former = [getattr(whose, name) for whose, name, _ in parts]
    for whose, name, value in parts:
        setattr(whose, name, value)
    try:
        yield
    finally:
        for (whose, name, _), value in zip(parts, former, strict=True):
            setattr(whose, name, value)


@dataclass(frozen=True)
class Target:
    """What is fed with inputs.

    Args:
        name: of its directory in the corpus.
        run: takes the scratch directory, in which the input's files are; raises Broken.
        clean: the exceptions with which it may refuse an input.
        words, paths: see Mutator.
        share: of all inputs, how many are this target's; quick ones can have more.
    """

    name: str
    run: Callable[[str], None]
    clean: tuple[type[Exception], ...]
    words: Sequence[bytes]
    paths: Sequence[bytes] = ()
    share: float = 1.0


@dataclass
class Finding:
    """An input that a target did not bear."""

    target: str
    tree: Tree
    what: str
    where: str
    trace: str

    @property
    def signature(self) -> tuple[str, str, str]:
        """Tells one mistake from another."""
        return self.target, self.what.partition(":")[0], self.where


@dataclass
class Report:
    """What became of some inputs of a target."""

    target: str
    runs: int = 0
    refused: int = 0
    seconds: float = 0.0
    lines: set[tuple[str, int]] = field(default_factory=set)
    findings: list[Finding] = field(default_factory=list)
    # Those that reached a line first.
    found: list[Tree] = field(default_factory=list)

    def add(self, other: Report) -> None:
        self.runs += other.runs
        self.refused += other.refused
        self.seconds += other.seconds
        self.lines |= other.lines
        known = {finding.signature for finding in self.findings}
        self.findings += [each for each in other.findings if each.signature not in known]
        self.found += other.found


# ---- what is refused

_scratch = ""
_is_armed = False
# Events of `sys.audit` and at which place of their arguments paths stand.
_CHANGES = {
    **dict.fromkeys(("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown"), (0,)),
    **dict.fromkeys(("os.truncate", "os.utime", "os.setxattr", "os.removexattr"), (0,)),
    **{"os.rename": (0, 1), "os.link": (0, 1), "os.symlink": (1,), "shutil.rmtree": (0,)},
}
_NEVER = frozenset(
    # Sockets by their names are left alone where these are paths: see below.
    ("socket.connect", "socket.bind")
    + ("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.kill")
    + ("subprocess.Popen", "socket.sendto", "socket.sendmsg")
    + ("fcntl.ioctl", "os.killpg", "ctypes.dlopen", "os.chroot", "os.putenv", "os.unsetenv")
)
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    global _is_armed
    if not _is_armed:
        return
    places: tuple[int, ...] = ()
    if event == "open":
        # Descriptors are opened by their number once more; what they are was asked before.
        if isinstance(arguments[0], str | bytes) and arguments[2] & _WRITES:
            places = (0,)
    elif event in ("socket.connect", "socket.bind") and isinstance(arguments[1], str):
        # A UNIX socket's, whose name begins with NUL where it is none of a file.
        places = (1,)
    elif event in _NEVER:
        _is_armed = False
        raise Escaped(f"{event} {arguments!r}")
    else:
        places = _CHANGES.get(event, ())
    for place in places:
        path = arguments[place]
        if isinstance(path, str | bytes | os.PathLike):
            _is_armed = False
            text = os.fsdecode(path)
            if "\0" in text:
                raise Escaped(f"{event} {text!r}")
            # What the last part leads to counts for what is opened, and not for the rest.
            parent = os.path.realpath(os.path.dirname(text) or ".")
            whole = os.path.realpath(text) if event in ("open", "socket.connect") else parent
            if not f"{whole}/".startswith(f"{_scratch}/"):
                raise Escaped(f"{event} {text!r}")
            _is_armed = True


def _ring(_signal: int, _frame: FrameType | None) -> None:
    raise Hung(f"after {SECONDS:.1f} s")


@contextmanager
def guarded() -> Iterator[str]:
    """A scratch directory, out of which nothing gets; for the whole process, once."""
    global _scratch
    # In memory where there is such a place: files are made and removed all the time.
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=memory) as directory:
        _scratch = os.path.realpath(directory)
        sys.addaudithook(_audit)
        signal.signal(signal.SIGALRM, _ring)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        os.chdir(_scratch)
        yield _scratch
        os.chdir("/")


# ---- which lines are reached


class Tracer:
    """Notes the lines of the toolkit that run; code whose lines all ran costs nothing more."""

    def __init__(self) -> None:
        self.lines: set[tuple[str, int]] = set()
        self._left: dict[CodeType, set[int]] = {}

    def __call__(self, frame: FrameType, event: str, _argument: object) -> Any:
        code = frame.f_code
        left = self._left.get(code)
        if left is None:
            left = set()
            if code.co_filename.startswith(CODE):
                left = {line for _, _, line in code.co_lines() if line is not None}
            self._left[code] = left
        if not left:
            return None

        def local(frame: FrameType, event: str, _argument: object) -> Any:
            if event == "line" and frame.f_lineno in left:
                left.discard(frame.f_lineno)
                self.lines.add((code.co_filename.removeprefix(CODE), frame.f_lineno))
            return local if left else None

        return local


# ---- one input, and many


def try_one(target: Target, tree: Tree, scratch: str) -> tuple[bool, Finding | None]:
    """Feed a target with an input; gives whether it was refused, and what is wrong."""
    global _is_armed
    root = f"{scratch}/host"
    os.mkdir(root)
    inputs.write(tree, root)
    refused = False
    caught: tuple[BaseException, str] | None = None
    # The least number that is free: what stays open takes it.
    free = _free_descriptor()
    _is_armed = True
    try:
        # In here: on a busy machine the time may be over before anything has run.
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        target.run(root)
        promise(_free_descriptor() <= free, "leaves a descriptor open")
    except target.clean as error:
        refused = True
        if not str(error).isprintable():
            caught = error, f"not one line: {error!s:.200}"
        elif _free_descriptor() > free:
            caught = error, "Broken: leaves a descriptor open"
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        caught = error, f"{type(error).__name__}: {error!s:.200}"
    finally:
        _is_armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(root)
    if caught is None:
        return refused, None
    broken, what = caught
    stack = traceback.extract_tb(broken.__traceback__)
    frames = [frame for frame in stack if frame.name != "promise"]
    ours = [frame for frame in frames if frame.filename.startswith(CODE)] or frames
    where = f"{ours[-1].filename.removeprefix(CODE)}:{ours[-1].lineno}"
    trace = "".join(traceback.format_exception(broken))
    return refused, Finding(target.name, tree, what, where, trace)


def _free_descriptor() -> int:
    descriptor = os.dup(0)
    os.close(descriptor)
    return descriptor


def kept(target: Target) -> list[Tree]:
    """The inputs of a target in the corpus."""
    files = sorted((CORPUS / target.name).iterdir())
    return [inputs.load(file.read_bytes(), is_tree=bool(target.paths)) for file in files]


def fuzz(target: Target, runs: int, seed: str, *, until: float = float("inf")) -> Report:
    """Feed a target with the corpus, then with changed inputs of it.

    Args:
        runs: how many changed ones.
        seed: what the changes depend upon; of the same seed come the same inputs.
        until: on the clock of time.monotonic(); then it ends earlier.
    """
    report = Report(target.name)
    random = Random(f"{target.name} {seed}")
    mutator = Mutator(random, target.words, target.paths)
    pool = kept(target)
    tracer = Tracer()
    began = time.monotonic()
    with guarded() as scratch:
        as_kept = len(pool)
        for number in range(as_kept + runs):
            is_kept = number < as_kept
            if is_kept:
                tree = pool[number]
            else:
                # Rather of two the one with more files: most kept ones are as small as can be.
                tree = max(random.choice(pool), random.choice(pool), key=len)
                tree = mutator.changed(tree, pool)
            # Tracing takes three times as long: what it finds, it finds early.
            is_traced = number < as_kept + min(runs // 5, TRACED)
            reached = len(tracer.lines)
            if is_traced:
                sys.settrace(tracer)
            refused, finding = try_one(target, tree, scratch)
            sys.settrace(None)
            report.runs += 1
            report.refused += refused
            if not is_kept and len(tracer.lines) > reached:
                pool.append(tree)
                report.found.append(tree)
            if finding is not None and finding.signature not in {
                known.signature for known in report.findings
            }:
                finding.tree = smaller(tree, partial(_same, target, finding, scratch))
                report.findings.append(finding)
            if time.monotonic() > until:
                break
    report.lines = tracer.lines
    report.seconds = time.monotonic() - began
    return report


def _same(target: Target, like: Finding, scratch: str, tree: Tree) -> bool:
    _, found = try_one(target, tree, scratch)
    return found is not None and found.signature == like.signature


def smaller(tree: Tree, is_enough: Callable[[Tree], bool]) -> Tree:
    """The least of an input that is enough: without files, then without parts of them."""
    deadline = time.monotonic() + 20
    for at in reversed(range(len(tree))):
        shorter = (*tree[:at], *tree[at + 1 :])
        if shorter and time.monotonic() < deadline and is_enough(shorter):
            tree = shorter
    for at in range(len(tree)):
        size = len(tree[at].content)
        while size and time.monotonic() < deadline:
            begin = 0
            while begin < len(tree[at].content):
                content = tree[at].content
                entry = tree[at]._replace(content=content[:begin] + content[begin + size :])
                shorter = (*tree[:at], entry, *tree[at + 1 :])
                if is_enough(shorter):
                    tree = shorter
                else:
                    begin += size
            size //= 2
    return tree


def least(target: Target, trees: Sequence[Tree]) -> list[Tree]:
    """Of many inputs a few small ones, which together reach each line that all of them reach."""
    chosen: list[Tree] = []
    known: set[tuple[str, int]] = set()
    with guarded() as scratch, suppress(KeyboardInterrupt):

        def reached(tree: Tree) -> set[tuple[str, int]]:
            tracer = Tracer()
            sys.settrace(tracer)
            try_one(target, tree, scratch)
            sys.settrace(None)
            return tracer.lines

        for tree in trees:
            new = reached(tree) - known
            if new:
                tree = smaller(tree, lambda tree, new=new: new <= reached(tree))  # type: ignore[misc]
                known |= reached(tree)
                chosen.append(tree)
    return chosen
