# SPDX-License-Identifier: MIT
"""Disks, ports and sockets are one VM's, whatever path or address they are called by."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from microvm_host import taken
from microvm_host.declaration import guest
from microvm_host.errors import DeclarationError
from microvm_host.paths import HostPaths
from microvm_host.runner import ControlSocket, Package, Share

from . import packages


@pytest.fixture(autouse=True)
def made_up_host(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROVM_HOST_ROOT", host.root)
    Path(host.declarations).mkdir(parents=True)


def declare(host: HostPaths, name: str, text: str) -> str:
    path = Path(host.declaration(name))
    path.write_text(f'kernel = "/kernel"\n{text}')
    return str(path)


def disk(image: object, *more: str) -> str:
    head = f'[[volumes]]\nimage = "{image}"\nautoCreate = false\n'
    return head + "".join(f"{line}\n" for line in more)


def refusal(host: HostPaths, one: str, other: str) -> str:
    """What is said of `one` on a host that has the VM `other`; nothing if both can be."""
    declare(host, "other", other)
    try:
        guest.load(declare(host, "web", one), taken.gather(host))
    except DeclarationError as error:
        return error.message
    return ""


def both_ways(host: HostPaths, one: str, other: str) -> bool:
    found = {bool(refusal(host, one, other)), bool(refusal(host, other, one))}
    assert len(found) == 1
    return found.pop()


def test_one_image_by_many_paths(host: HostPaths, root: Path) -> None:
    data = root / "data"
    data.mkdir()
    (data / "a.img").write_text("data")
    (root / "link").symlink_to(data)
    (data / "symbolic.img").symlink_to("a.img")
    os.link(data / "a.img", root / "hard.img")
    os.mkdir(host.vm("other"))
    os.link(data / "a.img", f"{host.vm('other')}/own.img")
    mine = disk(data / "a.img")
    for path in ("data/a.img", "link/a.img", "data/symbolic.img", "hard.img"):
        assert refusal(host, mine, disk(root / path)) == (
            f"image {data}/a.img is that of microVM other"
        ), path
        assert both_ways(host, mine, disk(root / path)), path
    assert refusal(host, mine, disk("own.img"))
    assert refusal(host, mine, disk(f"{host.vm('other')}/own.img"))
    # Of one that is not there yet as well, and not of another.
    assert both_ways(host, disk(root / "link/new.img"), disk(data / "new.img"))
    assert not both_ways(host, disk(root / "link/new.img"), disk(data / "b.img"))
    assert not both_ways(host, disk("root.img"), disk("root.img"))
    assert both_ways(host, disk("rbd:pool/x"), disk("rbd:pool/x"))


def test_images_that_are_only_read_may_be_shared(host: HostPaths, root: Path) -> None:
    writes, reads = disk(root / "a.img"), disk(root / "a.img", "readOnly = true")
    assert not both_ways(host, reads, reads)
    assert both_ways(host, reads, writes)


def test_one_image_twice_in_a_vm(host: HostPaths, root: Path) -> None:
    (root / "a.img").write_text("data")
    (root / "b.img").symlink_to("a.img")
    twice = disk(root / "a.img") + disk(root / "b.img")
    assert refusal(host, twice, "") == f"image {root}/b.img is given twice, by different paths"
    more = disk(root / "a.img", "readOnly = true") + disk(root / "b.img", "readOnly = true")
    assert refusal(host, more, "") == ""
    assert refusal(host, disk("a.img") + disk(f"{host.vm('web')}/a.img"), "")


def block(host: HostPaths, name: str, number: str, disk: str = "", holder: str = "") -> None:
    """A block device in sysfs; `disk` is the one that it is a partition of."""
    place = Path(host.at(f"/sys/devices/{disk}/{name}" if disk else f"/sys/devices/{name}"))
    (place / "holders").mkdir(parents=True)
    (place / "dev").write_text(f"{number}\n")
    if disk:
        (place / "partition").write_text("1\n")
    if holder:
        (place / "holders" / holder).symlink_to("/")
    for link in (host.block_number(number), host.block_device(name)):
        Path(link).parent.mkdir(parents=True, exist_ok=True)
        Path(link).symlink_to(place)


def test_a_partition_and_its_disk_overlap(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block(host, "sda", "8:0")
    block(host, "sda1", "8:1", "sda")
    block(host, "sda2", "8:2", "sda", holder="dm-0")
    block(host, "dm-0", "253:0")
    block(host, "loop0", "7:0")
    block(host, "loop0p1", "259:0", "loop0", holder="dm-1")
    block(host, "loop0p2", "259:1", "loop0")
    block(host, "dm-1", "253:1")
    block(host, "loop1", "7:1")
    for device, file in (("7:0", "backing.img"), ("7:1", "sda1")):
        loop = Path(host.block_number(device), "loop")
        loop.mkdir()
        (loop / "backing_file").write_text(f"{root}/{file}\n")
    (root / "backing.img").write_text("data")
    nodes = {"sda": (8, 0), "sda1": (8, 1), "sda2": (8, 2), "dm-0": (253, 0), "loop0": (7, 0)}
    nodes |= {"loop0p1": (259, 0), "loop0p2": (259, 1), "dm-1": (253, 1), "loop1": (7, 1)}
    for name in nodes:
        (root / name).write_text("")
    (root / "by-id").symlink_to("sda2")
    real = os.stat

    def fake(path: Any, **options: Any) -> Any:
        number = nodes.get(os.path.basename(str(path)))
        if number is None or os.path.dirname(path) != str(root):
            return real(path, **options)
        return SimpleNamespace(st_mode=stat.S_IFBLK | 0o600, st_rdev=os.makedev(*number))

    monkeypatch.setattr(os, "stat", fake)
    overlapping = [
        *(("sda", "sda1"), ("sda", "sda2"), ("sda", "dm-0"), ("sda2", "dm-0"), ("sda", "by-id")),
        *(("sda2", "by-id"), ("dm-0", "by-id"), ("loop0", "backing.img")),
        *(("loop0", "loop0p1"), ("loop0", "loop0p2"), ("loop0", "dm-1"), ("loop0p1", "dm-1")),
        *(("loop0p1", "backing.img"), ("loop0p2", "backing.img"), ("dm-1", "backing.img")),
        *(("sda", "loop1"), ("sda1", "loop1")),
    ]
    things = [*nodes, "by-id", "backing.img"]
    for number, one in enumerate(things):
        for other in things[number + 1 :]:
            expected = (one, other) in overlapping
            assert both_ways(host, disk(root / one), disk(root / other)) == expected, (one, other)


def port(address: str, number: int, proto: str = "tcp") -> str:
    return (
        '[[interfaces]]\ntype = "user"\nid = "u"\n'
        f'[[forwardPorts]]\nproto = "{proto}"\nhost.port = {number}\nguest.port = 80\n'
        + (f'host.address = "{address}"\n' if address else "")
    )


def test_a_port_of_the_host_is_one_vms(host: HostPaths) -> None:
    assert refusal(host, port("127.0.0.1", 8080), port("", 8080)) == (
        "port of the host tcp 127.0.0.1:8080 is that of microVM other"
    )
    for one, other, expected in (
        (port("0.0.0.0", 8080), port("", 8080), True),
        (port("0.0.0.0", 8080), port("10.0.0.1", 8080), True),
        (port("10.0.0.1", 8080), port("10.0.0.1", 8080), True),
        (port("10.0.0.1", 8080), port("10.0.0.2", 8080), False),
        (port("", 8080), port("", 8080, "udp"), False),
        (port("", 8080), port("", 8081), False),
    ):
        assert both_ways(host, one, other) == expected


def test_sockets(host: HostPaths, root: Path) -> None:
    package = root / "package"
    packages.write(
        package,
        Package(
            path=str(package),
            shares=(Share("s", "/srv", f"{root}/s.sock"),),
            control_socket=ControlSocket("own.sock", "qmp"),
        ),
    )
    os.makedirs(host.vm("foreign"))
    os.symlink(package, host.current("foreign"))
    (root / "link").symlink_to(root)
    share = '[[shares]]\nproto = "virtiofs"\ntag = "x"\nsource = "/srv"\nsocket = '
    assert refusal(host, f'{share}"{root}/link/s.sock"\n', "") == (
        f"socket {root}/link/s.sock is that of microVM foreign"
    )
    assert refusal(host, f'{share}"own.sock"\n', f'{share}"own.sock"\n') == ""
