# SPDX-License-Identifier: MIT
"""What a service may find in its environment: nothing is missed, nobody else has a say."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm_host import environment
from microvm_host.paths import HostPaths
from microvm_host.trust import Suspect

from .fake_systemd import FakeSystemd

UNIT = "microvm@web.service"
# Somebody who has nothing here.
EVE = Suspect(os.getuid() + 12345, frozenset({os.getgid() + 12345}))


@pytest.fixture
def systemd(root: Path, host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeSystemd]:
    monkeypatch.setenv("MICROVM_HOST_ROOT", host.root)
    fake = FakeSystemd(root / "run/systemd/private")
    fake.properties |= {
        ("Manager", "Environment"): ("as", ["LANG=C.UTF-8", "X=1"]),
        ("Service", "Environment"): ("as", ["X=2", "Y=a b"]),
        ("Service", "EnvironmentFiles"): ("a(sb)", []),
        ("Service", "UnsetEnvironment"): ("as", []),
    }
    yield fake
    fake.close()


def files(systemd: FakeSystemd, *paths: str) -> None:
    systemd.properties["Service", "EnvironmentFiles"] = ("a(sb)", [(path, 1) for path in paths])


def put(root: Path, path: str, text: str) -> Path:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def found(host: HostPaths, by: Suspect | None = EVE) -> list[str]:
    return environment.assignments(UNIT, "web", by, host)


def test_of_systemd_and_of_the_unit(systemd: FakeSystemd, host: HostPaths) -> None:
    assert found(host) == ["LANG=C.UTF-8", "X=1", "X=2", "Y=a b"]


def test_what_is_taken_away(systemd: FakeSystemd, host: HostPaths) -> None:
    systemd.properties["Service", "UnsetEnvironment"] = ("as", ["X", "Y=a b"])
    # The latter only where that is the value.
    assert found(host)[-1:] == ["X="]
    assert "Y=" not in found(host)


def test_files(systemd: FakeSystemd, root: Path, host: HostPaths) -> None:
    put(root, "etc/default/web", "X=3\n")
    put(root, "etc/web.d/1.conf", "X=4")
    put(root, "etc/web.d/2.conf", "X=5")
    put(root, "etc/web.d/3.else", "X=6")
    files(systemd, "/etc/default/web", "/etc/none", "/etc/web.d/*.conf", "/etc/none.d/*")
    assert {each for each in found(host) if each.startswith("X=")} == {
        f"X={n}" for n in range(1, 6)
    }


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("X=600", {"600"}),
        ("X=600\r\nY=1\r", {"600"}),
        (" X = 600 ", {"600"}),
        ("X=\"600\"\nX='7'", {"600", "7"}),
        ("X='6'\"0\"0", {"600"}),
        ("X=6\\\n00", {"6", "600"}),
        # systemd 252 takes the second line for a comment, 257 does not.
        ("# as before \\\nX=600", {"600"}),
        # No assignments to systemd.
        ("#X=600\n;X=7\nexport X=8\nXX=9\nX", set()),
        ("X=600 # or so", {"600 # or so"}),
        ("", set()),
        ("=\n==\n\\\n'", set()),
        ("\udcff\nX=600\nY=\udcfe", {"600"}),
    ],
)
def test_how_files_are_read(
    systemd: FakeSystemd, root: Path, host: HostPaths, text: str, values: set[str]
) -> None:
    path = put(root, "etc/default/web", "")
    path.write_bytes(text.encode(errors="surrogateescape"))
    files(systemd, "/etc/default/web")
    systemd.properties["Manager", "Environment"] = ("as", [])
    systemd.properties["Service", "Environment"] = ("as", [])
    pairs = [each.partition("=") for each in found(host)]
    # With nothing as its value it is one that is taken away.
    assert {value for key, _, value in pairs if key == "X" and value} == values


def test_files_that_do_not_count(
    systemd: FakeSystemd, root: Path, host: HostPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever could change them would have their own stop wait for ever."""
    before = found(host)
    put(root, "etc/open", "X=600\n").chmod(0o666)
    put(root, "tmp/in-there", "X=600\n")
    (root / "tmp").chmod(0o777)
    (root / "etc/link").symlink_to(root / "tmp/in-there")
    os.mkfifo(root / "etc/fifo")
    files(systemd, "/etc/open", "/tmp/in-there", "/etc/link", "/etc/fifo", "/etc")
    assert found(host) == before
    said = capsys.readouterr().err.splitlines()
    there = [line.removeprefix(f"{root}/").partition(":")[0] for line in said]
    assert there == ["etc/open", "tmp/in-there", "etc/link", "etc/fifo", "etc"]
    assert f"could change {root}/etc/open" in said[0]
    assert f"could change {root}/tmp/in-there" in said[2]
    assert said[3].endswith("it is no regular file")


def test_where_nobody_knows_whom_it_runs_as(
    systemd: FakeSystemd, root: Path, host: HostPaths
) -> None:
    put(root, "etc/default/web", "X=600\n")
    files(systemd, "/etc/default/web")
    assert "X=600" in found(host)
    assert "X=600" not in found(host, None)


def test_a_long_file(systemd: FakeSystemd, root: Path, host: HostPaths) -> None:
    put(root, "etc/default/web", "X=600\n" + "#" * environment.SIZE_MAX + "\nX=7\n")
    files(systemd, "/etc/default/web")
    assert "X=600" in found(host)
    assert "X=7" not in found(host)
