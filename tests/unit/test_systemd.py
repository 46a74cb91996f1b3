# SPDX-License-Identifier: MIT
"""What is asked of systemctl, which is a stand-in here, and how its answers are read."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


# ---- transient units


class DBusError(Exception):
    """As pystemd raises it: with sd-bus's negative errno, and a message in bytes."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.errno = -number
        self.err_message = message.encode()


class FakeBus:
    """systemd, which has units of these states, and forgets each at a number of calls."""

    def __init__(self, units: dict[str, str], *, forgets_at: int = 0) -> None:
        self.units = units
        self.forgets_at = forgets_at
        self.created: list[list[str]] = []
        self.calls = 0

    def call_method(self, *call: Any) -> Any:
        method, arguments = call[3:]
        self.calls += 1
        if self.calls == self.forgets_at:
            self.units.clear()
        wanted = [each for each in arguments if isinstance(each, str) and each != "fail"]
        if method == b"GetUnit":
            if wanted[0] not in self.units:
                raise DBusError(errno.ENOENT, f"Unit {wanted[0]} not loaded.")
            return type("Reply", (), {"body": wanted[0].encode()})
        assert method == b"StartTransientUnit"
        for name in wanted:
            if name in self.units:
                raise DBusError(
                    errno.EEXIST, f"Unit {name} was already loaded or has a fragment file."
                )
        self.created.append(wanted)
        self.units.update(dict.fromkeys(wanted, "active"))
        return type("Reply", (), {"body": b"/job"})

    def get_property(self, _: bytes, path: bytes, interface: bytes, *__: bytes) -> bytes:
        if interface.endswith(b".Job"):
            raise DBusError(errno.ENOENT, "Unknown object")
        return self.units[path.decode()].encode()


def connection(bus: FakeBus) -> systemd.Connection:
    """A connection to it, whose arguments are the names in them."""
    made = systemd.Connection.__new__(systemd.Connection)
    made._bus = bus
    made._apply_signature = lambda _, values: [
        value.decode() for value in values if isinstance(value, bytes)
    ]
    made._marshal_properties = lambda properties: []  # type: ignore[method-assign]
    return made


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("kept", ["a.service", "a.timer"])
@pytest.mark.parametrize("state", ["inactive", "failed", "deactivating"])
def test_a_former_unit_that_has_stopped_is_waited_for(kept: str, state: str) -> None:
    """systemd keeps it while it starts the unit of its OnFailure=, after a restart's stop."""
    bus = FakeBus({kept: state}, forgets_at=20)
    connection(bus).start_transient("a.service", {}, {"a.timer": {}})
    assert bus.created == [["a.service", "a.timer"]]


@pytest.mark.usefixtures("quick")
def test_a_former_unit_that_runs_is_not_waited_for() -> None:
    bus = FakeBus({"a.service": "active"})
    with pytest.raises(MicrovmHostError, match=r"was already loaded.*systemctl stop"):
        connection(bus).start_transient("a.service", {})
    assert bus.calls == 2


@pytest.mark.usefixtures("quick")
def test_a_former_unit_that_stays_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "_FORGETS_WITHIN", 0)
    with pytest.raises(MicrovmHostError, match="was already loaded"):
        connection(FakeBus({"a.service": "failed"})).start_transient("a.service", {})
