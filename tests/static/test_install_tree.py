# SPDX-License-Identifier: MIT
"""`make install` gives the tree in tests/golden, which compiles; `make uninstall` removes it."""

from __future__ import annotations

import os
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit import golden

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")


def make(target: str, destination: Path, *settings: str) -> None:
    done = subprocess.run(
        ["make", "-s", target, f"DESTDIR={destination}", f"PYTHON={sys.executable}", *settings],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(destination)},
        umask=0o022,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    destination = tmp_path_factory.mktemp("install")
    make("install", destination, "PREFIX=/usr")
    yield destination


def files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if not path.is_dir())


def is_module(path: Path) -> bool:
    return path.suffix in (".py", ".pyc")


def test_tree_is_the_golden_one(tree: Path) -> None:
    found = [
        f"{path.stat().st_mode & 0o7777:04o} /{path.relative_to(tree)}\n"
        for path in files(tree)
        if not is_module(path)
    ]
    golden.compare("install-tree.txt", "".join(found))


def test_directories_can_be_entered(tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_dir():
            assert path.stat().st_mode & 0o7777 == 0o755, path


def test_each_module_is_there_and_compiled(tree: Path, tmp_path: Path) -> None:
    package = tree / "usr/lib/microvm-host/microvm_host"
    sources = {
        path.relative_to(REPOSITORY / "microvm_host")
        for path in (REPOSITORY / "microvm_host").rglob("*.py")
    }
    installed = {path.relative_to(package) for path in package.rglob("*.py")}
    assert installed == sources
    for number, path in enumerate(sorted(installed)):
        py_compile.compile(str(package / path), str(tmp_path / f"{number}.pyc"), doraise=True)
        compiled = list((package / path).parent.glob(f"__pycache__/{path.stem}.*.pyc"))
        assert len(compiled) == 1
        # Tracebacks name the path that it runs from.
        content = compiled[0].read_bytes()
        assert b"/usr/lib/microvm-host/microvm_host" in content or path.stem == "__init__"
        assert str(tree).encode() not in content


def test_nothing_is_left_to_be_filled_in(tree: Path) -> None:
    for path in files(tree):
        if not is_module(path):
            text = path.read_text()
            assert not re.search(r"@(python|pkgdir|libexecdir|unitdir|statedir|datadir)@", text), (
                path
            )
            assert str(tree) not in text, path


def test_programs_start(tree: Path) -> None:
    for name, arguments in (
        ("usr/bin/microvm", ["-x"]),
        ("usr/libexec/microvm-host/helper", []),
        ("usr/lib/systemd/system-generators/microvm-generator", []),
    ):
        # As they are, but for the place that they are in here.
        text = (tree / name).read_text()
        assert text.startswith(f"#!{sys.executable} -IS\n")
        text = text.replace('"/usr/lib/microvm-host"', repr(str(tree / "usr/lib/microvm-host")))
        done = subprocess.run(
            [sys.executable, "-BIS", "-c", text, *arguments], capture_output=True, text=True
        )
        # Called wrongly, all three say how they are to be called.
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr


def test_nothing_that_systemd_runs_lies_below_lib(tree: Path) -> None:
    """SELinux's policies let init run no program there (lib_t), but below libexec (bin_t)."""
    found = 0
    for unit in (tree / "usr/lib/systemd/system").iterdir():
        for line in unit.read_text().splitlines():
            if line.startswith("Exec"):
                assert line.partition("=")[2].lstrip("+-!").startswith("/usr/libexec/"), line
                found += 1
    assert found > 10


@pytest.mark.parametrize(
    ("version", "works"), [("3, 10, 9", False), ("3, 11, 0", True), ("4, 0", True)]
)
def test_an_old_python_is_refused_before_anything_is_there(
    tmp_path: Path, version: str, works: bool
) -> None:
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exit 0\n'
        f'exec {sys.executable} -c "import sys; sys.version_info = ({version}); $2"\n'
    )
    python.chmod(0o755)
    done = subprocess.run(
        ["make", "install", f"DESTDIR={tmp_path}/x", f"PYTHON={python}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        # Without what another make says to those that it calls.
        env={"PATH": os.environ["PATH"]},
    )
    assert (done.returncode == 0) == works, done.stderr
    # Nothing is echoed, and nothing is half there.
    assert done.stdout == ""
    if not works:
        assert (
            "is missing, or older than 3.11: PYTHON=/path/to/python3 names another" in done.stderr
        )
        assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("version", "works"),
    [
        ("systemd 251 (251.4-1)", False),
        ("", False),
        ("systemd 252 (252.39-1~deb12u1)", True),
        ("systemd 258~rc1 (258~rc1-1)", True),
    ],
)
def test_an_old_systemd_is_refused(tmp_path: Path, version: str, works: bool) -> None:
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(f"#!/bin/sh\necho '{version}'\n")
    systemctl.chmod(0o755)
    done = subprocess.run(
        ["make", "check-host", f"PYTHON={sys.executable}"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )
    assert ("252 or newer is needed" in done.stderr) == (not works)
    if works and os.geteuid() != 0:
        assert "needs root: sudo make install" in done.stderr
    else:
        assert (done.returncode == 0) == works


def test_ssh_is_led_to_the_installed_proxy(tree: Path) -> None:
    lines = (tree / "usr/lib/tmpfiles.d/microvm-host.conf").read_text().splitlines()
    (link,) = [line.split() for line in lines if line.startswith("L ")]
    # After systemd's own, by its name: ssh takes the first word that it finds.
    assert Path(link[1]).name > "20-systemd-ssh-proxy.conf"
    # What is removed is what is made.
    assert f"\nsshlink = {link[1]}\n" in (REPOSITORY / "Makefile").read_text()
    words = (tree / link[-1].lstrip("/")).read_text().split()
    program, flags, script = words[words.index("ProxyCommand") + 1 :][:3]
    assert (program, flags) == (sys.executable, "-IS")
    assert (tree / script.lstrip("/")).is_file()


def test_settings_are_honoured(tmp_path: Path) -> None:
    make(
        "install",
        tmp_path,
        "PREFIX=/opt/x",
        "unitdir=/lib/systemd/system",
        "pkgdir=/opt/x/share/mvh",
        "helperdir=/opt/x/libexec/mvh",
        "mandir=/opt/x/man",
    )
    unit = (tmp_path / "lib/systemd/system/microvm@.service").read_text()
    assert "ExecStart=/opt/x/libexec/mvh/helper start %i" in unit
    assert "WorkingDirectory=/var/lib/microvms/%i" in unit
    assert '"/opt/x/share/mvh"' in (tmp_path / "opt/x/bin/microvm").read_text()
    generator = tmp_path / "opt/x/lib/systemd/system-generators/microvm-generator"
    assert '"/lib/systemd/system"' in generator.read_text()
    assert (tmp_path / "opt/x/man/man8/microvm.8").is_file()
    assert not (tmp_path / "usr").exists()


def test_uninstall_leaves_no_file(tmp_path: Path) -> None:
    make("install", tmp_path, "PREFIX=/usr")
    others = [tmp_path / "usr/lib/systemd/system/other.service", tmp_path / "usr/bin/other"]
    kept = [tmp_path / "var/lib/microvms/web/disk.img", tmp_path / "etc/microvms/web.toml"]
    for path in (*others, *kept):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
    make("uninstall", tmp_path, "PREFIX=/usr")
    assert files(tmp_path) == sorted([*others, *kept])
    for directory in ("usr/lib/microvm-host", "usr/libexec/microvm-host"):
        assert not (tmp_path / directory).exists()
    # Once more: there is nothing to remove, which is no failure.
    make("uninstall", tmp_path, "PREFIX=/usr")
