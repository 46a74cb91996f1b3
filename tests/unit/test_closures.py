# SPDX-License-Identifier: MIT
"""The difference of closures is nix's own, and where there is none nothing is said."""

from __future__ import annotations

import subprocess

import pytest

from microvm_host import closures

OLD, NEW = "/nix/store/aaa-microvm-web", "/nix/store/bbb-microvm-web"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    found: list[list[str]] = []

    def run(argv: list[str], **_: object) -> subprocess.CompletedProcess[bytes]:
        found.append(argv)
        return subprocess.CompletedProcess(argv, 0, "linux: 6.6 → 6.12\n".encode())

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_two_packages_of_nix(asked: list[list[str]]) -> None:
    assert closures.difference(OLD, NEW) == "linux: 6.6 → 6.12\n"
    assert asked[0][-4:] == ["store", "diff-closures", OLD, NEW]


@pytest.mark.parametrize(
    ("before", "after"), [(None, NEW), (NEW, NEW), ("/srv/web", NEW), (OLD, "/srv/web")]
)
def test_nothing_to_compare(asked: list[list[str]], before: str | None, after: str) -> None:
    assert closures.difference(before, after) == ""
    assert asked == []


def test_a_host_without_nix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closures, "NIX", ("/nonexistent/nix",))
    assert closures.difference(OLD, NEW) == ""
    monkeypatch.setattr(closures, "NIX", ("false",))
    assert closures.difference(OLD, NEW) == ""
