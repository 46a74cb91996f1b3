# SPDX-License-Identifier: MIT
"""What is asked of systemctl, which is a stand-in here, and how its answers are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from microvm_host import process, systemd
from microvm_host.errors import MicrovmHostError

from . import packages

LISTED = """\
microvm@web.service loaded active running MicroVM web
microvm@db.service loaded failed failed MicroVM db with a description
microvm-virtiofsd-a\\x2db-t.socket loaded inactive dead Socket of share t
microvm@gone.service not-found inactive dead microvm@gone.service
"""


JOBS = """\
1234 microvm@web.service start waiting
 999 microvm-set-booted@web.service start running
"""


@pytest.fixture
def calls(root: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """A systemctl that lists units, and fails to stop if the file `fail` is there."""
    packages.put(root, "listed", LISTED)
    packages.put(root, "jobs", JOBS)
    packages.program(
        root,
        "bin/systemctl",
        f"""#!/bin/sh
printf '%s\\n' "$*" >>{root}/calls
case $1 in
list-jobs) exec /bin/cat {root}/jobs ;;
list-units) exec /bin/cat {root}/listed ;;
stop) [ ! -e {root}/fail ]; code=$?; [ ! -e {root}/after ] || /bin/mv {root}/after {root}/listed
    exit $code ;;
esac
""",
    )
    monkeypatch.setenv("PATH", str(root / "bin"))
    return lambda: (root / "calls").read_text().splitlines()


def test_states(calls: Callable[[], list[str]]) -> None:
    assert systemd.states("microvm@*.service", "a\\x2db.socket") == {
        "microvm@web.service": "active",
        "microvm@db.service": "failed",
        "microvm-virtiofsd-a\\x2db-t.socket": "inactive",
        "microvm@gone.service": "inactive",
    }
    # systemctl takes backslashes for those of a glob.
    assert calls()[0].endswith(" -- microvm@*.service a?x2db.socket")


def test_jobs(calls: Callable[[], list[str]], root: Path) -> None:
    found = {"microvm@web.service", "microvm-set-booted@web.service"}
    assert systemd.jobs("microvm@*.service", "a\\x2db.socket") == found
    assert calls()[0].endswith(" -- microvm@*.service a?x2db.socket")
    (root / "jobs").write_text("No jobs running.\n")
    assert systemd.jobs("microvm@*.service") == set()


def test_stop(calls: Callable[[], list[str]]) -> None:
    systemd.stop(["microvm@web.service", "microvm@db.service"])
    assert calls()[1:] == ["stop -- microvm@web.service"]


def test_stop_of_what_has_stopped(calls: Callable[[], list[str]], root: Path) -> None:
    (root / "listed").write_text("")
    systemd.stop(["microvm@web.service"])
    assert len(calls()) == 1


def test_stop_of_what_goes_away_meanwhile(calls: Callable[[], list[str]], root: Path) -> None:
    (root / "fail").touch()
    (root / "after").write_text("")
    systemd.stop(["microvm@web.service"])
    assert len(calls()) == 3


def test_stop_that_fails(calls: Callable[[], list[str]], root: Path) -> None:
    (root / "fail").touch()
    with pytest.raises(MicrovmHostError, match=r"`systemctl stop -- .*` failed with 1"):
        systemd.stop(["microvm@web.service"])


def test_output_of_a_program(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/none")
    packages.program(root, "bin/show", '#!/bin/sh\necho "${NOTIFY_SOCKET-unset} $1"\n')
    monkeypatch.setenv("PATH", str(root / "bin"))
    # A program that we call is not the service, and must not speak for it.
    assert process.output(["show", "a b"]) == "unset a b\n"


def test_large_output(root: Path) -> None:
    program = packages.program(root, "many", "#!/bin/sh\nexec head -c 300000 /dev/zero\n")
    assert len(process.output([str(program)])) == 300000


def test_program_that_is_missing() -> None:
    with pytest.raises(MicrovmHostError, match="cannot run /nonexistent/x: No such file"):
        process.output(["/nonexistent/x"])


def test_program_that_fails(root: Path) -> None:
    program = packages.program(root, "fail", "#!/bin/sh\nexit 7\n")
    with pytest.raises(MicrovmHostError, match="failed with 7"):
        process.output([str(program), "x"])
