# SPDX-License-Identifier: MIT
"""What `microvm remove` refuses, and that no start slips in between its check and the deletion."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import adopt, remove, systemd
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths

from .test_mounts import mountinfo


class Systemd:
    """Gives the states of units, one answer after the other, and the last one for ever."""

    def __init__(self, host: HostPaths, *answers: dict[str, str]) -> None:
        self.answers = list(answers)
        self.had_package: list[bool] = []
        self._host = host

    def states(self, *patterns: str) -> dict[str, str]:
        self.had_package.append(os.path.lexists(self._host.current("web")))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        return {unit: state for unit, state in answer.items() if unit in patterns}


@pytest.fixture
def web(host: HostPaths) -> Path:
    directory = Path(host.vm("web"))
    directory.mkdir()
    (directory / "current").symlink_to("/a/package")
    (directory / "disk.img").write_text("data")
    return directory


def answering(
    monkeypatch: pytest.MonkeyPatch, host: HostPaths, *answers: dict[str, str]
) -> Systemd:
    fake = Systemd(host, *answers)
    monkeypatch.setattr(systemd, "states", fake.states)
    return fake


UP = {"microvm@web.service": "active"}


def test_nothing_starts_while_it_is_kept_down(
    host: HostPaths, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = answering(monkeypatch, host, {})
    with remove.kept_down("web", host):
        # `current` is gone before systemd has the last word.
        assert fake.had_package[-1] is False
        assert not os.path.lexists(web / "current")
    assert os.readlink(web / "current") == "/a/package"
    with remove.kept_down("web", host):
        remove.remove("web", host)
    assert not web.exists()


@pytest.mark.parametrize(
    "answers",
    [
        (UP,),
        ({}, UP),
        ({"microvm-foreground-web.service": "active"},),
        # A start that was checked before `current` was taken away.
        ({}, {"microvm-set-booted@web.service": "activating"}, UP),
        ({}, {"microvm-virtiofsd@web.service": "active"}, {"microvm@web.service": "activating"}),
    ],
)
def test_a_vm_that_runs_or_starts_goes_on(
    answers: tuple[dict[str, str], ...],
    host: HostPaths,
    web: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answering(monkeypatch, host, *answers)
    with pytest.raises(MicrovmHostError, match="is running"), remove.kept_down("web", host):
        raise AssertionError("not kept down")
    assert os.readlink(web / "current") == "/a/package"
    assert (web / "disk.img").exists()


def test_a_stop_that_is_still_undone_is_waited_for(
    host: HostPaths, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undoing = {"microvm-tap-interfaces@web.service": "deactivating"}
    answering(monkeypatch, host, undoing, undoing, {})
    with remove.kept_down("web", host):
        pass
    monkeypatch.setattr(remove, "_SETTLED_WITHIN", 0.1)
    answering(monkeypatch, host, undoing)
    with pytest.raises(MicrovmHostError, match="is deactivating"), remove.kept_down("web", host):
        raise AssertionError("not kept down")


def test_a_package_that_came_meanwhile_stays(
    host: HostPaths, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, host, {})
    with remove.kept_down("web", host):
        (web / "current").symlink_to("/another")
    assert os.readlink(web / "current") == "/another"


def test_mounts_are_refused_by_name(
    host: HostPaths, web: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, host, {})
    remove.check("web", host)
    adopt.check("web", host)
    mountinfo(host, f"{web}/my\\040data rw - ext4 /dev/sda1 rw")
    for check in (remove.check, adopt.check):
        with pytest.raises(MicrovmHostError) as raised:
            check("web", host)
        assert raised.value.path == f"{web}/my data"
        assert f"umount '{web}/my data'" in (raised.value.hint or "")
    # A file system of the VM's own: its files change hands, and are not deleted.
    mountinfo(host, f"{web} rw - ext4 /dev/sda1 rw")
    adopt.check("web", host)
    with pytest.raises(MicrovmHostError, match="is a mount point") as raised:
        remove.check("web", host)
    assert f"umount {web}" in (raised.value.hint or "")
