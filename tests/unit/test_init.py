# SPDX-License-Identifier: MIT
"""`microvm init`: the guest that it makes of a host, and the declaration, whole or not at all."""

from __future__ import annotations

import lzma
import os
import re
import struct
from pathlib import Path

import pytest

from microvm_host import declaration, init, install, process
from microvm_host.declaration import derived
from microvm_host.declaration import guest as guests
from microvm_host.errors import MicrovmHostError, UsageError
from microvm_host.guests import kernel, small, template
from microvm_host.init import Wish
from microvm_host.paths import HostPaths

# (inode, mode, uid, gid, nlink, mtime, size, …) of a newc header.
_MODE, _SIZE, _NAME_SIZE = 1, 6, 11
ALIASES = "alias virtio:d00000001v* virtio_net\nalias virtio:d00000018v* virtio_mem\n"


def image(version: str) -> bytes:
    """As much of a kernel's image as says its version."""
    setup = bytearray(0x400)
    setup[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", setup, 0x20E, 0x100)
    text = f"{version} (somebody@somewhere) #1 SMP\0".encode()
    setup[0x300 : 0x300 + len(text)] = text
    return bytes(setup)


def add_kernel(host: HostPaths, version: str, *, drivers: bool = True) -> None:
    """Install a kernel: two drivers as modules, one of them packed, and one built in."""
    modules = Path(host.modules_places(version)[0])
    (modules / "kernel/net").mkdir(parents=True)
    boot = Path(host.kernel_places(version)[0])
    boot.parent.mkdir(exist_ok=True)
    boot.write_bytes(image(version))
    lines = ["kernel/other.ko: kernel/failover.ko"]
    if drivers:
        lines.append("kernel/net/virtio_net.ko.xz: kernel/net/failover.ko")
        lines.append("kernel/virtio-blk.ko:")
    lines.append("kernel/net/failover.ko:")
    (modules / "modules.dep").write_text("\n".join([*lines, ""]))
    (modules / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    (modules / "modules.alias").write_text(ALIASES)
    (modules / "kernel/net/virtio_net.ko.xz").write_bytes(lzma.compress(b"net"))
    (modules / "kernel/virtio-blk.ko").write_bytes(b"blk")
    (modules / "kernel/net/failover.ko").write_bytes(b"failover")


def add_busybox(host: HostPaths, *, kind: int = 1) -> None:
    """Install an ELF file with one program header of a type."""
    header = bytearray(b"\x7fELF\x02".ljust(64, b"\0"))
    struct.pack_into("<Q", header, 32, 64)
    struct.pack_into("<HH", header, 54, 56, 1)
    path = Path(host.busybox_places()[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + struct.pack("<I", kind).ljust(56, b"\0"))


@pytest.fixture
def whole(host: HostPaths) -> HostPaths:
    """A host with all that a small guest takes."""
    add_kernel(host, "6.12.9")
    add_busybox(host)
    return host


def unpacked(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content of each entry, by its name."""
    found: dict[str, tuple[int, bytes]] = {}
    at = 0
    while True:
        assert at % 4 == 0 and archive[at : at + 6] == b"070701"
        numbers = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        start = at + 110
        name = archive[start : start + numbers[_NAME_SIZE] - 1].decode()
        start += numbers[_NAME_SIZE]
        start += -start % 4
        content = archive[start : start + numbers[_SIZE]]
        if name == "TRAILER!!!":
            return found
        assert name not in found
        found[name] = (numbers[_MODE], content)
        at = start + numbers[_SIZE]
        at += -at % 4


def nothing(text: str) -> None:
    del text


# ---- the kernel


def test_the_running_kernel_comes_first(host: HostPaths) -> None:
    for version in ("6.12.9", "6.12.10", "6.1.0"):
        add_kernel(host, version)
    assert kernel.find(host, "6.12.9").version == "6.12.9"
    # A container has no image of the one that runs.
    found = kernel.find(host, "6.18.0-other")
    assert (found.version, found.image) == ("6.12.10", host.kernel_places("6.12.10")[0])
    assert found.modules == host.modules_places("6.12.10")[0]


def test_a_kernel_by_its_path_is_asked_for_its_version(host: HostPaths, root: Path) -> None:
    add_kernel(host, "6.12.9")
    (root / "other").write_bytes(image("6.12.9"))
    assert kernel.find(host, "none", f"{root}/other").version == "6.12.9"
    (root / "other").write_bytes(image("5.0"))
    with pytest.raises(MicrovmHostError, match=r"the modules of kernel 5\.0 are missing"):
        kernel.find(host, "none", f"{root}/other")


@pytest.mark.parametrize("content", [b"", b"\x7fELF" + bytes(4096), image("../x"), image("")[:500]])
def test_what_is_no_kernel_is_refused(content: bytes, host: HostPaths, root: Path) -> None:
    (root / "other").write_bytes(content)
    with pytest.raises(MicrovmHostError, match="is no image of a Linux kernel"):
        kernel.find(host, "none", f"{root}/other")


def test_a_host_without_a_kernel_is_told_what_to_install(host: HostPaths) -> None:
    with pytest.raises(MicrovmHostError, match=r"no kernel.*apt install linux-image.*--kernel"):
        kernel.find(host, "6.1")


def test_modules_come_unpacked_with_what_they_need(whole: HostPaths) -> None:
    found = kernel.modules(kernel.find(whole, ""), ("virtio_net", "virtio_blk", "unknown"))
    assert found == {
        "kernel/net/virtio_net.ko": b"net",
        "kernel/net/failover.ko": b"failover",
        "kernel/virtio-blk.ko": b"blk",
        "modules.dep": b"kernel/virtio-blk.ko:\n"
        b"kernel/net/virtio_net.ko: kernel/net/failover.ko\nkernel/net/failover.ko:\n",
        "modules.alias": b"alias virtio:d00000001v* virtio_net\n",
    }


def test_a_module_that_is_broken_is_named(whole: HostPaths) -> None:
    path = Path(whole.modules_places("6.12.9")[0]) / "kernel/net/virtio_net.ko.xz"
    path.write_bytes(b"torn")
    with pytest.raises(MicrovmHostError, match=r"virtio_net\.ko\.xz: cannot be unpacked"):
        kernel.modules(kernel.find(whole, ""), ("virtio_net",))
    path.unlink()
    with pytest.raises(MicrovmHostError, match=r"virtio_net\.ko\.xz: is missing"):
        kernel.modules(kernel.find(whole, ""), ("virtio_net",))


# ---- the small guest


def test_the_small_guest_has_what_it_boots_by(whole: HostPaths) -> None:
    found = kernel.find(whole, "")
    files = unpacked(small.initrd(found, small.find_busybox(whole)))
    assert files["bin/busybox"][0] == 0o100755
    assert files["init"] == (0o120777, b"bin/busybox")
    assert files["dev/console"][0] == 0o020600
    assert files["lib/modules/6.12.9/kernel/net/virtio_net.ko"][1] == b"net"
    assert files["etc/rc"][0] == 0o100755
    # Each directory before what is in it.
    seen = {""}
    for name, (mode, _) in files.items():
        assert os.path.dirname(name) in seen, name
        if mode & 0o170000 == 0o040000:
            seen.add(name)
    # What init and its scripts call is there.
    for line in files["etc/inittab"][1].decode().splitlines():
        program = line.split(":")[3].split()[0].lstrip("/")
        assert program in files or program.startswith("bin/"), line
    assert small.initrd(found, small.find_busybox(whole)) == small.initrd(
        found, small.find_busybox(whole)
    )


def test_a_kernel_without_drivers_is_refused(host: HostPaths) -> None:
    add_kernel(host, "6.12.9", drivers=False)
    add_busybox(host)
    with pytest.raises(MicrovmHostError, match="has no virtio_blk, virtio_net"):
        small.initrd(kernel.find(host, ""), small.find_busybox(host))


def test_busybox_must_be_static(host: HostPaths) -> None:
    with pytest.raises(MicrovmHostError, match=r"needs busybox.*apt install busybox-static"):
        small.find_busybox(host)
    # PT_INTERP.
    add_busybox(host, kind=3)
    with pytest.raises(MicrovmHostError, match=r"is not a static program.*busybox-static"):
        small.find_busybox(host)


def test_a_guest_is_written_whole_or_not_at_all(
    whole: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, busybox = kernel.find(whole, ""), small.find_busybox(whole)

    def interrupted(source: str, target: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.make(found, busybox, whole, nothing)
    assert os.listdir(whole.guests) == []
    image_path, initrd = small.make(found, busybox, whole, nothing)
    assert Path(image_path).read_bytes() == image("6.12.9")
    before = os.stat(initrd).st_mtime_ns
    # The same again is what is there.
    assert small.make(found, busybox, whole, nothing) == (image_path, initrd)
    assert os.stat(initrd).st_mtime_ns == before
    assert len(os.listdir(whole.guests)) == 1
    # A kernel that not everybody may read stays so.
    os.chmod(found.image, 0o600)
    add_busybox(whole, kind=2)
    image_path, _ = small.make(found, busybox, whole, nothing)
    assert os.stat(image_path).st_mode & 0o777 == 0o600


# ---- the declaration


@pytest.mark.parametrize("bridge", [None, "mvbr0"])
@pytest.mark.parametrize("name", ["web", "a:b_c.d", "a-name-of-a-vm-that-is-long"])
def test_the_declaration_is_right(name: str, bridge: str | None, root: Path) -> None:
    text = template.declaration(
        template.Guest(
            name,
            ("A guest.",),
            "/k",
            "/i",
            ("quiet", f"hostname={name}"),
            mem=300,
            bridge=bridge,
            mac="02:00:00:00:00:07",
        )
    )
    path = root / f"{name}.toml"
    path.write_text(text)
    guest, _ = guests.load(str(path))
    assert (guest.kernel, guest.initrd, guest.mem) == ("/k", "/i", 300)
    assert guest.kernel_params == ("quiet", f"hostname={name}")
    (nic,) = guest.interfaces
    assert (nic.type, nic.bridge) == (("tap", "mvbr0") if bridge else ("user", None))
    assert (nic.mac == "02:00:00:00:00:07") == bool(bridge)
    # So is what it proposes.
    text = re.sub(r"^# (\[\[.*|\w+ = .*|guest\.port.*)$", r"\1", text, flags=re.MULTILINE)
    path.write_text(text)
    guest, _ = guests.load(str(path))
    assert (len(guest.volumes), len(guest.shares)) == (1, 1)
    assert len(guest.forward_ports) == (0 if bridge else 1)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What would be installed, by name; nothing is."""
    found: list[str] = []

    def declared(declaration: object, host: HostPaths) -> install.Change:
        name = declaration.name  # type: ignore[attr-defined]
        found.append(name)
        return install.Change(name, None, "/package", None)

    monkeypatch.setattr(install, "declared", declared)
    monkeypatch.setattr(process, "output", lambda argv: found.append(" ".join(argv)))
    return found


def test_a_guest_is_declared_and_installed(whole: HostPaths, installed: list[str]) -> None:
    said: list[str] = []
    init.declare(Wish("web", mem=128), whole, said.append)
    assert installed == ["systemctl daemon-reload", "web"]
    text = Path(whole.declaration("web")).read_text()
    assert "\nmem = 128\n" in text and 'type = "user"' in text
    assert os.listdir(whole.declarations) == ["web.toml"]
    assert len(said) == 1 and said[0].startswith("making a small guest of Linux 6.12.9")


def test_a_guest_has_a_user_of_its_own(whole: HostPaths, installed: list[str]) -> None:
    init.declare(Wish("web"), whole, nothing)
    path = whole.declaration("web")
    assert declaration.load(path).user == "auto"
    init.declare(Wish("web"), whole, nothing, replaces=True)
    assert declaration.load(path).user == "auto"
    # What is in the directory of one that is there already belongs to the user that it has.
    Path(path).write_text('kernel = "/k"\n')
    init.declare(Wish("web"), whole, nothing, replaces=True)
    assert declaration.load(path).user is None


def test_the_network_is_used_where_it_is(whole: HostPaths, installed: list[str]) -> None:
    os.makedirs(whole.net_device("mvbr0") + "/bridge")
    init.declare(Wish("web"), whole, nothing)
    text = Path(whole.declaration("web")).read_text()
    assert 'id = "vm-web"\nbridge = "mvbr0"' in text
    # Written down, so that it stays where the file is moved to another host.
    host_id = derived.host_id(whole.machine_id)
    assert f'\nmac = "{derived.mac("web", "vm-web", host_id)}"\n' in text


def test_a_vm_that_is_there_is_left_alone(whole: HostPaths, installed: list[str]) -> None:
    path = Path(whole.declaration("web"))
    path.parent.mkdir(parents=True)
    path.write_text("# mine\n")
    with pytest.raises(UsageError, match=r"is declared already; --force"):
        init.declare(Wish("web"), whole, nothing)
    assert path.read_text() == "# mine\n"
    os.mkdir(whole.vm("db"))
    Path(whole.vm("db"), "disk.img").write_text("data")
    with pytest.raises(UsageError, match="exists already, and is not declared"):
        init.declare(Wish("db"), whole, nothing, replaces=True)
    assert os.listdir(whole.declarations) == ["web.toml"] and installed == []
    # The mount point of a file system that was made for the VM.
    os.mkdir(whole.vm("new"))
    init.declare(Wish("new"), whole, nothing)
    said: list[str] = []
    init.declare(Wish("web"), whole, said.append, replaces=True)
    assert Path(f"{path}.old").read_text() == "# mine\n"
    assert "kernel =" in path.read_text()
    assert any(f"is kept as {path}.old" in line for line in said)
    # What was there is not the network of another kind that it gets.
    assert "its network was none, and is QEMU's own now" in said


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MicrovmHostError("no QEMU")])
@pytest.mark.parametrize("former", [None, "# mine\n"])
def test_what_fails_leaves_declarations_alone(
    error: BaseException,
    former: str | None,
    whole: HostPaths,
    installed: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(install, "declared", fails)
    path = Path(whole.declaration("web"))
    if former is not None:
        path.parent.mkdir(parents=True)
        path.write_text(former)
    with pytest.raises(type(error)):
        init.declare(Wish("web"), whole, nothing, replaces=True)
    assert (path.read_text() if path.exists() else None) == former
    assert not list(path.parent.glob("*.new"))


def test_a_host_that_lacks_something_has_nothing_declared(host: HostPaths) -> None:
    with pytest.raises(MicrovmHostError, match="no kernel"):
        init.declare(Wish("web"), host, nothing)
    assert not os.path.exists(host.declarations)
