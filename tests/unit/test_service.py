# SPDX-License-Identifier: MIT
"""What is asked of a VM's service, and how the answers are read; systemd is a stand-in."""

from __future__ import annotations

import grp
import os
import pwd
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm_host import service
from microvm_host.errors import MicrovmHostError
from microvm_host.identity import Identity

from .fake_systemd import FakeSystemd

UNIT = "/org/freedesktop/systemd1/unit/microvm_40web_2eservice"
JOB = "/org/freedesktop/systemd1/job/7"
ME = pwd.getpwuid(os.getuid())
MINE = grp.getgrgid(ME.pw_gid)


@pytest.fixture
def systemd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSystemd]:
    monkeypatch.setenv("MICROVM_HOST_ROOT", str(tmp_path))
    fake = FakeSystemd(tmp_path / "run/systemd/private")
    yield fake
    fake.close()


def runs_as(
    systemd: FakeSystemd, user: str, group: str, *further: str, is_dynamic: bool = False
) -> None:
    systemd.properties |= {
        ("Service", "SupplementaryGroups"): ("as", list(further)),
        ("Service", "User"): ("s", user),
        ("Service", "Group"): ("s", group),
        ("Service", "DynamicUser"): ("b", int(is_dynamic)),
    }


@pytest.mark.parametrize("user", [ME.pw_name, str(ME.pw_uid)])
@pytest.mark.parametrize("group", ["", MINE.gr_name, str(MINE.gr_gid)])
def test_identity(systemd: FakeSystemd, user: str, group: str) -> None:
    runs_as(systemd, user, group)
    found = Identity(ME.pw_name, ME.pw_uid, MINE.gr_name, MINE.gr_gid)
    assert service.identity("web") == found
    assert {path for path, _, _ in systemd.asked} == {UNIT}


def test_further_groups(systemd: FakeSystemd) -> None:
    other = next(each for each in grp.getgrall() if each.gr_gid not in (ME.pw_gid, 0))
    number = max(each.gr_gid for each in grp.getgrall() if each.gr_gid < 60000) + 1
    runs_as(systemd, ME.pw_name, other.gr_name, other.gr_name, str(number))
    found = service.identity("web")
    # The group of the user's passwd entry is among them where Group= names another.
    assert found.gid == other.gr_gid
    assert found.groups == tuple(sorted({ME.pw_gid, number}))
    runs_as(systemd, ME.pw_name, "", "no-such-group")
    with pytest.raises(MicrovmHostError, match="'no-such-group', which does not exist") as caught:
        service.identity("web")
    assert "SupplementaryGroups=" in caught.value.hint


def test_no_user_is_root(systemd: FakeSystemd) -> None:
    runs_as(systemd, "", "")
    assert service.identity("web") == Identity("root", 0, "root", 0)


@pytest.mark.parametrize(
    ("user", "group", "is_dynamic", "message"),
    [
        (
            "nobody-of-that-name",
            "",
            False,
            "runs as user 'nobody-of-that-name', who does not exist",
        ),
        ("root", "no-such-group", False, "runs as group 'no-such-group', which does not exist"),
        ("root", "", True, "has DynamicUser=yes"),
    ],
)
def test_nobody(
    systemd: FakeSystemd, user: str, group: str, message: str, *, is_dynamic: bool
) -> None:
    runs_as(systemd, user, group, is_dynamic=is_dynamic)
    with pytest.raises(MicrovmHostError, match=message):
        service.identity("web")


@pytest.mark.parametrize(
    ("microseconds", "seconds"), [(150_000_000, 150.0), (1_500_000, 1.5), (2**64 - 1, None)]
)
def test_start_timeout(systemd: FakeSystemd, microseconds: int, seconds: float | None) -> None:
    systemd.properties["Service", "TimeoutStartUSec"] = ("t", microseconds)
    assert service.start_timeout("web") == seconds


def test_pending_job(systemd: FakeSystemd) -> None:
    systemd.properties |= {
        ("Unit", "Job"): ("(uo)", (7, JOB)),
        ("Job", "JobType"): ("s", "stop"),
        ("Job", "State"): ("s", "running"),
    }
    assert service.pending_job("web") == ("stop", "running")
    assert [path for path, _, _ in systemd.asked] == [UNIT, JOB, JOB]
    # One that came to its end between the two questions.
    systemd.gone.add(JOB)
    assert service.pending_job("web") is None
    systemd.properties["Unit", "Job"] = ("(uo)", (0, "/"))
    assert service.pending_job("web") is None


@pytest.mark.parametrize(
    ("state", "job", "is_busy"),
    [
        ("inactive", 0, False),
        ("failed", 0, False),
        ("active", 0, False),
        ("active", 7, True),
        ("inactive", 7, True),
        ("activating", 0, True),
        ("deactivating", 0, True),
    ],
)
def test_busy(systemd: FakeSystemd, state: str, job: int, *, is_busy: bool) -> None:
    systemd.properties |= {
        ("Unit", "Job"): ("(uo)", (job, JOB if job else "/")),
        ("Unit", "ActiveState"): ("s", state),
    }
    assert service.is_busy("microvm@web.service") == is_busy
    assert {path for path, _, _ in systemd.asked} == {UNIT}


def test_pending_job_of_a_systemd_that_does_not_tell(systemd: FakeSystemd) -> None:
    systemd.properties["Unit", "Job"] = ("(uo)", (7, JOB))
    with pytest.raises(MicrovmHostError, match="does not tell: no JobType"):
        service.pending_job("web")
