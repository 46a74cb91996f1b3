# SPDX-License-Identifier: MIT
"""Which mount units a VM waits for, by its paths; systemd is a stand-in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import bus, log, mount_units, package_paths, process, trust
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths
from microvm_host.runner import Package, PrivateFile, Share

from .test_mounts import mountinfo


class Systemd:
    """Mounts what it is asked for at the second look, unless that is in `broken`."""

    def __init__(self, host: HostPaths) -> None:
        self.started: list[str] = []
        self.broken: set[str] = set()
        self.mounted: list[str] = []
        self._host = host

    def output(self, argv: list[str], *, errors: bool = False) -> str:
        assert argv[:4] == ["systemctl", "start", "--no-block", "--"]
        self.started += argv[4:]
        return ""

    def properties(self, socket: str, path: str, *wanted: bus.Property) -> list[object]:
        unit = self.started[-1]
        assert path == bus.unit(unit)
        if unit in self.broken:
            return ["failed", (0, "/")]
        where = self._host.at("/" + unit.removesuffix(".mount").replace("-", "/"))
        self.mounted.append(where)
        mountinfo(self._host, *(f"{each} rw - ext4 /dev/vdb rw" for each in self.mounted))
        return ["active", (0, "/")]


@pytest.fixture
def systemd(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    fake = Systemd(host)
    monkeypatch.setattr(process, "output", fake.output)
    monkeypatch.setattr(bus, "properties", fake.properties)
    monkeypatch.setattr(log, "notice", lambda *_, **__: None)
    return fake


def unit(host: HostPaths, name: str, where: str = "/run/systemd/generator") -> None:
    path = Path(host.at(where), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[Mount]\n")


def require(host: HostPaths, *paths: str) -> bool:
    return mount_units.require("web", lambda: [host.at(path) for path in paths], host)


def test_nothing_is_asked_where_all_is_mounted(host: HostPaths, systemd: Systemd) -> None:
    assert require(host, "/srv/data/x") is False
    unit(host, "srv-data.mount")
    mountinfo(host, f"{host.at('/srv/data')} rw - ext4 /dev/vdb rw")
    assert require(host, "/srv/data/x") is False
    assert systemd.started == []


@pytest.mark.parametrize("path", ["/srv/data", "/srv/data/images/x.img", "/srv/../srv/data/x"])
def test_what_carries_a_path_is_mounted(path: str, host: HostPaths, systemd: Systemd) -> None:
    for name in ("srv-data.mount", "srv-dat.mount", "srv-data-images.mount.d", "opt.mount"):
        unit(host, name)
    assert require(host, path) is True
    assert systemd.started == ["srv-data.mount"]


def test_outer_ones_come_first_and_links_are_followed(host: HostPaths, systemd: Systemd) -> None:
    for name in ("srv.mount", "srv-data.mount", "mnt-disk.mount"):
        unit(host, name)
    Path(host.at("/srv/data")).mkdir(parents=True)
    Path(host.at("/srv/data/link")).symlink_to(host.at("/mnt/disk"))
    require(host, "/srv/data/link/x.img")
    assert systemd.started == ["mnt-disk.mount", "srv.mount", "srv-data.mount"]


def test_the_state_directory_and_what_is_in_it(host: HostPaths, systemd: Systemd) -> None:
    for inner in ("web", "web-disks", "db"):
        unit(host, f"var-lib-microvms-{inner}.mount", "/etc/systemd/system")
    require(host)
    assert systemd.started == ["var-lib-microvms-web.mount", "var-lib-microvms-web-disks.mount"]


def test_what_is_masked_or_the_distributions_is_not_waited_for(
    host: HostPaths, systemd: Systemd
) -> None:
    unit(host, "srv-data.mount")
    unit(host, "tmp.mount", "/usr/lib/systemd/system")
    etc = Path(host.at("/etc/systemd/system"))
    etc.mkdir(parents=True)
    (etc / "srv-data.mount").symlink_to(os.devnull)
    assert require(host, "/srv/data/x", "/tmp/x") is False
    assert systemd.started == []


def test_an_automount_point_counts_as_not_mounted(host: HostPaths, systemd: Systemd) -> None:
    unit(host, "srv-data.mount")
    mountinfo(host, f"{host.at('/srv/data')} rw - autofs systemd-1 rw")
    require(host, "/srv/data/x")
    assert systemd.started == ["srv-data.mount"]


def test_a_mount_that_fails_is_told_by_its_unit(host: HostPaths, systemd: Systemd) -> None:
    unit(host, "srv-data.mount")
    systemd.broken.add("srv-data.mount")
    with pytest.raises(MicrovmHostError) as raised:
        require(host, "/srv/data/x.img")
    assert str(raised.value) == (
        f"{host.at('/srv/data/x.img')}: lies on {host.at('/srv/data')}, which is not mounted: "
        "srv-data.mount is failed; `systemctl status srv-data.mount` tells why"
    )


def test_paths_in_text() -> None:
    found = set(
        package_paths.in_text(
            "exec /usr/bin/qemu -drive 'file=/srv/my disks/a,b.img,format=raw' \\\n"
            '  --disk path=/srv/c.img,readonly=on "$X"/not --fs {"path_on_host": "/srv/d.img"}\n'
        )
    )
    assert {"/usr/bin/qemu", "/srv/my disks/a", "/srv/c.img", "/srv/d.img"} <= found
    assert all(path.startswith("/") for path in found)


def test_paths_of_a_package(root: Path) -> None:
    package = root / "package"
    (package / "bin").mkdir(parents=True)
    (package / "lib").mkdir()
    (package / "bin/microvm-run").write_text(f"exec fc --config-file {root}/config.json /srv/a\n")
    (root / "config.json").write_text('{"path": "/srv/b"}')
    (package / "lib/vm.json").write_text('{"path": "/srv/c"}')
    (package / "lib/kernel").write_bytes(bytes(1 << 20))
    os.mkfifo(package / "bin/fifo")
    (package / "bin/dangling").symlink_to("/nowhere")
    given = Package(
        path=str(package),
        shares=(Share("s", "/srv/share", "s.sock"), Share("t", "relative", "/run/t.sock")),
        private_files=(PrivateFile("key", "/srv/key"),),
    )
    nobody = trust.Suspect(61000, frozenset())
    found = set(package_paths.named_by(given, nobody))
    assert {str(package), "/srv/share", "/run/t.sock", "/srv/key"} <= found
    assert {"/srv/a", "/srv/b", "/srv/c"} <= found
    # What the VM's user could write has root mount nothing.
    (package / "bin/microvm-run").chmod(0o666)
    found = set(package_paths.named_by(given, nobody))
    assert "/srv/c" in found and not {"/srv/a", "/srv/b"} & found
