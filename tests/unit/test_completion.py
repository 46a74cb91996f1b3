# SPDX-License-Identifier: MIT
"""Completion for bash offers what the command knows, no more and no less."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import click
import pytest

from microvm_host.cli import classic, commands

SCRIPT = Path(__file__).parents[2] / "completion/microvm.bash"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host with VMs in each state that matters."""
    for name, files in {
        "down": ["flake"],
        "up": ["runner", "booted"],
        "by-hand": [],
        "declared": ["runner"],
        "a:b": ["runner", "booted"],
    }.items():
        directory = tmp_path / "var/lib/microvms" / name
        directory.mkdir(parents=True)
        for file in files:
            if file == "booted":
                (directory / file).symlink_to("/nowhere")
            else:
                (directory / file).touch()
    (tmp_path / "var/lib/microvms/file").touch()
    (tmp_path / "var/lib/microvm-host/packages").mkdir(parents=True)
    for vm, digits in (("up", "123"), ("re-up", "4")):
        for digit in digits:
            (tmp_path / f"var/lib/microvm-host/packages/{digit * 32}-{vm}").mkdir()
    current = tmp_path / "var/lib/microvms/up/current"
    current.symlink_to(tmp_path / f"var/lib/microvm-host/packages/{'1' * 32}-up")
    (tmp_path / "etc/microvms").mkdir(parents=True)
    (tmp_path / "etc/microvms/declared.toml").touch()
    return tmp_path


def complete(line: str, root: Path = Path("/nonexistent")) -> list[str]:
    """What bash would offer at the end of a command line; an empty PATH: it may start nothing."""
    script = f"""
    source {shlex.quote(str(SCRIPT))}
    PATH= COMP_LINE={shlex.quote(line)} COMP_POINT={len(line)}
    read -ra COMP_WORDS <<< "$COMP_LINE"
    [[ $COMP_LINE == *' ' ]] && COMP_WORDS+=('')
    COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
    _microvm microvm "${{COMP_WORDS[-1]}}" "${{COMP_WORDS[-2]}}"
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(
        ["bash", "--norc", "-uc", script],
        env={"MICROVM_HOST_ROOT": str(root)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return sorted(done.stdout.split())


def test_is_registered() -> None:
    script = f"source {shlex.quote(str(SCRIPT))}; complete -p microvm"
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True)
    assert done.stdout == "complete -F _microvm microvm\n"


def test_offers_the_sub_commands_that_click_knows() -> None:
    assert complete("microvm ") == sorted(commands.microvm.commands)
    assert complete("microvm st") == ["start", "status", "stop"]


def test_offers_the_flags_of_microvm_nix() -> None:
    flags = {f"-{letter}" for letter in ["l", *classic._ACTIONS]}
    assert set(complete("microvm -")) == flags | {"-h", "--help", "--version"}


@pytest.mark.parametrize("name", sorted(commands.microvm.commands))
def test_offers_the_options_that_click_knows(name: str) -> None:
    options = {"-h", "--help"}
    for parameter in commands.microvm.commands[name].params:
        if isinstance(parameter, click.Option):
            options |= {*parameter.opts}
    assert set(complete(f"microvm {name} -")) == options


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("microvm status ", "a:b by-hand declared down up"),
        ("microvm list ", "a:b by-hand declared down up"),
        ("microvm -l ", "a:b by-hand declared down up"),
        ("microvm start ", "by-hand declared down"),
        ("microvm run ", "by-hand declared down"),
        ("microvm -r d", "declared down"),
        ("microvm stop ", "a:b up"),
        ("microvm ssh ", "a:b up"),
        ("microvm update ", "a:b declared down up"),
        ("microvm -Ru ", "a:b declared down up"),
        ("microvm -u -R d", "declared down"),
        ("microvm remove ", "by-hand down"),
        ("microvm remove -y d", "down"),
        # Those that stand there are not offered again, and some commands take one alone.
        ("microvm start down ", "by-hand declared"),
        ("microvm status up ", "a:b by-hand declared down"),
        ("microvm show up ", ""),
        ("microvm ls ", "a:b by-hand declared down up"),
        ("microvm rm ", "by-hand down"),
        # Packages that the VM had, but for the current one.
        ("microvm rollback up ", "222222222222 333333333333"),
        ("microvm rollback up 2", "222222222222"),
        ("microvm rollback up 2222 ", ""),
        ("microvm rollback -R up 3", "333333333333"),
        ("microvm rollback a:b ", ""),
        ("microvm create ", ""),
        ("microvm apply ", ""),
        ("microvm ssh up l", ""),
        ("microvm network ", "disable enable"),
        ("microvm network enable ", ""),
        # Readline parts words at these: only what comes after is for us to give.
        ("microvm stop a:", "b"),
        ("microvm ssh root@u", "up"),
        ("microvm ssh root@a:", "b"),
    ],
)
def test_offers_the_vms_that_fit(line: str, expected: str, host: Path) -> None:
    assert complete(line, host) == expected.split()


@pytest.mark.parametrize(
    "line", ["microvm create web --runner ", "microvm create web --flake ", "microvm -c web -f "]
)
def test_offers_directories_for_a_package(line: str, tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "file").touch()
    assert complete(f"{line}{tmp_path}/") == [f"{tmp_path}/package"]


def test_bears_a_host_without_vms(tmp_path: Path) -> None:
    assert complete("microvm stop ", tmp_path) == []
