# SPDX-License-Identifier: MIT
"""A short run of the fuzzer over each target, and that it sees what it is there to see.

What it finds here it finds each time: the seed is always the same. `make fuzz` is the long run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from tests.fuzz import engine, inputs
from tests.fuzz.inputs import Entry, Mutator
from tests.fuzz.targets import TARGETS

REPOSITORY = Path(__file__).parents[2]
# Some tenths of a second each, beside all that is kept.
RUNS = {
    **{"names": 800, "declaration": 400, "package": 120, "host": 60, "control": 150},
    **{"notify": 100, "answers": 120, "pci": 40},
}


def in_a_process(code: str) -> list[list[str]]:
    """Run code that prints findings; a process of its own, for what the engine does lasts."""
    done = subprocess.run(
        [sys.executable, "-B", "-c", code],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("target", [target.name for target in TARGETS])
def test_nothing_is_found(target: str) -> None:
    code = f"""
import json
from tests.fuzz import worker
report = worker.chunk(({target!r}, {RUNS.get(target, 500)}, "check", 60.0))
assert 0 < report.refused < report.runs
print(json.dumps([[finding.what, finding.where, finding.trace] for finding in report.findings]))
"""
    found = in_a_process(code)
    assert found == [], "\n".join(found[0])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise ValueError('x')", "ValueError: x"),
        ("raise MicrovmHostError('two\\nlines')", "not one line: two\nlines"),
        ("open('/dev/null', 'w')", "Escaped: open '/dev/null'"),
        ("os.open('OUTSIDE', os.O_CREAT | os.O_WRONLY)", "Escaped: open 'OUTSIDE'"),
        ("os.unlink(f'{root}/../../x')", "Escaped: os.remove"),
        ("os.symlink('/etc', f'{root}/e'); os.mkdir(f'{root}/e/x')", "Escaped: os.mkdir"),
        ("os.symlink('/etc/x', f'{root}/e'); open(f'{root}/e', 'w')", "Escaped: open"),
        ("os.rename(f'{root}/input', 'OUTSIDE')", "Escaped: os.rename"),
        ("os.posix_spawnp('true', ['true'], {})", "Escaped: os.posix_spawn"),
        ("socket.socket(socket.AF_UNIX).bind('OUTSIDE')", "Escaped: socket.bind 'OUTSIDE'"),
        ("socket.socket(socket.AF_UNIX).connect('\\0x')", "Escaped: socket.connect"),
        ("socket.socket().connect(('127.0.0.1', 1))", "Escaped: socket.connect"),
        ("os.open(f'{root}/input', os.O_RDONLY)", "Broken: leaves a descriptor open"),
        ("os.dup(0); raise MicrovmHostError('x')", "Broken: leaves a descriptor open"),
        ("os.kill(1, 0)", "Escaped: os.kill"),
        ("bytearray(4 << 30)", "MemoryError"),
        ("os.mkfifo(f'{root}/f'); open(f'{root}/f')", "Hung: after 0.2 s"),
        ("while True: pass", "Hung: after 0.2 s"),
        ("promise(False, 'a promise')", "Broken: a promise"),
    ],
)
def test_each_kind_of_finding_is_seen(root: Path, body: str, expected: str) -> None:
    # A path of this test alone, whatever others on this machine do in /tmp.
    outside = f"{root}/x"
    body, expected = (text.replace("OUTSIDE", outside) for text in (body, expected))
    # What does not hang has all the time that a busy machine needs for it.
    seconds = 0.2 if expected.startswith("Hung") else engine.SECONDS
    code = f"""
import json, os, socket
from microvm_host.errors import MicrovmHostError
from tests.fuzz import engine, inputs
from tests.fuzz.engine import promise
engine.SECONDS = {seconds}
def run(root):
    {body}
target = engine.Target("x", run, (MicrovmHostError,), ())
with engine.guarded() as scratch:
    _, found = engine.try_one(target, inputs.single(b"x"), scratch)
print(json.dumps([[found.what]] if found else []))
"""
    ((what,),) = in_a_process(code)
    assert what.startswith(expected)
    assert not os.path.exists(outside)


def test_what_is_allowed_is_no_finding() -> None:
    code = """
import json, os
from tests.fuzz import engine, inputs
def run(root):
    with open(f"{root}/input", "rb") as file:
        assert file.read() == b"x"
    with open(f"{root}/new", "w") as file:
        file.write("y")
    os.symlink("/etc/passwd", f"{root}/link")
    os.rename(f"{root}/new", f"{root}/newer")
    os.unlink(f"{root}/link")
    os.listdir("/etc")
target = engine.Target("x", run, (), ())
with engine.guarded() as scratch:
    print(json.dumps([[str(engine.try_one(target, inputs.single(b"x"), scratch)[1])]]))
    assert os.listdir(scratch) == []
"""
    assert in_a_process(code) == [["None"]]


def test_a_finding_is_made_small() -> None:
    tree = (
        Entry(b"a", "file", b"nothing"),
        Entry(b"b", "file", b"some text with a needle in it\n" * 9),
        Entry(b"c", "link", b"/nowhere"),
    )
    found = engine.smaller(tree, lambda tree: any(b"needle" in each.content for each in tree))
    assert found == (Entry(b"b", "file", b"needle"),)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_the_same_seed_gives_the_same_inputs(target: engine.Target) -> None:
    pool = engine.kept(target)
    assert sum(len(inputs.dump(tree)) for tree in pool) < 32 * 1024

    def some(seed: int) -> list[inputs.Tree]:
        mutator = Mutator(Random(seed), target.words, target.paths)
        return [mutator.changed(tree, pool) for tree in pool * 3]

    assert some(1) == some(1) != some(2)


def test_trees_are_written_inside(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside").mkdir()
    tree = (
        Entry(b"../escaped", "file", b"x"),
        Entry(b"link", "link", b"../outside"),
        Entry(b"link/file", "file", b"x"),
        Entry(b"link/other", "link", b"x"),
        Entry(b"a/b", "file", b"x"),
        Entry(b"a", "file", b"x"),
        Entry(b"fifo", "fifo", b""),
        Entry(b"fifo", "file", b"not waited for"),
        Entry(b"n\0ul", "file", b""),
        Entry(b"n" * 300, "file", b""),
    )
    inputs.write(tree, str(root))
    assert sorted(os.listdir(tmp_path)) == ["outside", "root"]
    assert os.listdir(tmp_path / "outside") == []
    assert sorted(os.listdir(root)) == ["a", "fifo", "link"]
    assert (root / "a/b").read_bytes() == b"x"
    # Both forms read back as they were.
    assert inputs.load(inputs.dump(tree), is_tree=True) == tree
    assert inputs.load(b"\xff\0", is_tree=False) == inputs.single(b"\xff\0")
