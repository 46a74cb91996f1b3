# SPDX-License-Identifier: MIT
"""The generator: a directory of declarations gives just the links and drop-ins in tests/golden."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from microvm_host import generator
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths

from . import golden

REPOSITORY = Path(__file__).parents[2]
GOLDEN = golden.DIRECTORY / "generator"
UNITS = "/usr/lib/systemd/system"


def tree(directory: Path) -> dict[str, str]:
    """All that is in a directory: links with their targets, directories with a `/`."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = os.readlink(path)
        else:
            found[name] = "/" if path.is_dir() else path.read_text()
    return found


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    host = HostPaths(str(tmp_path / "root"))
    shutil.copytree(GOLDEN / "declarations", host.declarations)
    return host


def test_tree_is_the_golden_one(host: HostPaths, tmp_path: Path) -> None:
    complaints: list[MicrovmHostError] = []
    (tmp_path / "out").mkdir()
    generator.generate(str(tmp_path / "out"), UNITS, host, complaints.append)
    assert tree(tmp_path / "out") == tree(GOLDEN / "expected")
    said = "".join(f"{error}\n" for error in complaints).replace(host.declarations, "@DIR@")
    golden.compare("generator/complaints.txt", said)


def test_program_as_systemd_calls_it(host: HostPaths, tmp_path: Path) -> None:
    outputs = [tmp_path / name for name in ("normal", "early", "late")]
    for output in outputs:
        output.mkdir()
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from microvm_host.generator import main\n"
        f"sys.exit(main(sys.argv, {UNITS!r}))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-I", "-S", "-c", code, *map(str, outputs)],
        env={"MICROVM_HOST_ROOT": host.root},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert tree(outputs[0]) == tree(GOLDEN / "expected")
    assert [*tree(outputs[1]), *tree(outputs[2])] == []
    # There is no /dev/kmsg below that root, so that the complaints are here.
    complaints = (GOLDEN / "complaints.txt").read_text().replace("@DIR@", host.declarations)
    assert done.stderr.splitlines() == [f"{line}; skipped" for line in complaints.splitlines()]


def test_nothing_declared(tmp_path: Path) -> None:
    complaints: list[MicrovmHostError] = []
    (tmp_path / "out").mkdir()
    generator.generate(str(tmp_path / "out"), UNITS, HostPaths(str(tmp_path)), complaints.append)
    assert (tree(tmp_path / "out"), complaints) == ({}, [])


def test_a_vm_requires_the_mounts_of_its_disks_and_shares(tmp_path: Path) -> None:
    host = HostPaths(str(tmp_path))
    Path(host.declarations).mkdir(parents=True)
    Path(host.declaration("web")).write_text(
        'kernel = "/srv/kernel"\n'
        '[[volumes]]\nimage = "root.img"\nsize = 8\n'
        '[[volumes]]\nimage = "/srv/my disks/a\\"b%h.img"\nsize = 8\n'
        '[[shares]]\nproto = "virtiofs"\ntag = "s"\nsource = "/srv/../mnt/share/"\n'
    )
    Path(host.declaration("other")).write_text('kernel = "/k"\nvolumes = 7\nshares = [7]\n')
    complaints: list[MicrovmHostError] = []
    (tmp_path / "out").mkdir()
    generator.generate(str(tmp_path / "out"), UNITS, host, complaints.append)
    drop_in = tmp_path / "out/microvm@web.service.d/00-declaration.conf"
    assert drop_in.read_text().splitlines()[1:] == [
        "",
        "[Unit]",
        'RequiresMountsFor="/srv/my disks/a\\"b%%h.img"',
        'RequiresMountsFor="/mnt/share"',
    ]
    assert not (tmp_path / "out/microvm@other.service.d").exists()
    assert complaints == []


def test_wrong_call(capsys: pytest.CaptureFixture[str]) -> None:
    assert generator.main(["microvm-generator"], UNITS) == 2
    assert "usage: microvm-generator" in capsys.readouterr().err
