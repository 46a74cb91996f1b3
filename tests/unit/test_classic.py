# SPDX-License-Identifier: MIT
"""The flags of microvm.nix's command, put into sub-commands."""

from __future__ import annotations

import pytest

from microvm_host.cli.classic import translate
from microvm_host.errors import UsageError

TABLE = [
    ("", ""),
    ("list", "list"),
    ("create web --runner /x", "create web --runner /x"),
    ("--help", "--help"),
    ("--version", "--version"),
    ("-h", "--help"),
    ("-l", "list"),
    ("-l --json", "list --json"),
    ("-l --check", "list --check"),
    ("-c web", "create web"),
    ("-cweb", "create web"),
    ("-c web -f /etc/nixos", "create web --flake /etc/nixos"),
    ("-f /etc/nixos -c web", "create web --flake /etc/nixos"),
    ("-f/etc/nixos -cweb", "create web --flake /etc/nixos"),
    ("-c web --runner /p", "create web --runner /p"),
    ("-u web", "update web"),
    ("-u web db", "update web db"),
    ("-R -u web", "update web --restart"),
    ("-Ru web", "update web --restart"),
    ("-u web -R", "update web --restart"),
    ("-u web db -R", "update web db --restart"),
    ("-r web", "run web"),
    ("-s web", "ssh web"),
    ("-s root@web", "ssh root@web"),
    ("-s web ls -l -R", "ssh web ls -l -R"),
    ("-s web -v -- -x", "ssh web -v -- -x"),
]


@pytest.mark.parametrize(("line", "expected"), TABLE)
def test_translation(line: str, expected: str) -> None:
    assert translate(line.split()) == expected.split()


def test_names_in_one_word() -> None:
    # As microvm.nix's own command takes them.
    assert translate(["-u", "web db"]) == ["update", "web", "db"]


def test_a_flake_may_have_spaces() -> None:
    assert translate(["-c", "web", "-f", "/a b"]) == ["create", "web", "--flake", "/a b"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("-x", "there is no flag -x"),
        ("-lx", "there is no flag -x"),
        ("-R", "none of -l, -c, -u, -r and -s"),
        ("-f flake", "none of -l"),
        ("-l -c web", "-c does not go with list"),
        ("-c web -u web", "-u does not go with create"),
        ("-c", "-c needs a value"),
        ("-c web -f", "-f needs a value"),
        ("-u web -f x", "-f goes with -c, not with update"),
        ("-l -f x", "-f goes with -c, not with list"),
        ("-lR", "-R goes with -u, not with list"),
        ("-R -r web", "-R goes with -u, not with run"),
    ],
)
def test_errors(line: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        translate(line.split())
    assert message in str(caught.value)
    assert caught.value.exit_code == 2
