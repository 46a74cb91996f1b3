# SPDX-License-Identifier: MIT
"""The store keeps what somebody needs, and a VM's history tells what it had."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from microvm_host import declaration, install, remove, runner, service, source, state, store
from microvm_host.build import declared
from microvm_host.build.tools import Blob, Tools
from microvm_host.build.tree import Copy, File, Tree
from microvm_host.declaration import Declaration
from microvm_host.declaration.guest import Guest
from microvm_host.errors import DeclarationError, MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths
from microvm_host.runner import Macvtap, Package, Tap
from microvm_host.source import Source

from . import packages

DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.fixture(autouse=True)
def without_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """systemd is not asked, root's files are ours, and each host has a QEMU."""
    ours = Identity("me", os.getuid(), "us", os.getgid())
    monkeypatch.setattr(service, "identity", lambda name: ours)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(state, "_is_roots", lambda status: True)
    (root / "kernel").write_bytes(b"")

    def tools(guest: Guest) -> Tools:
        return Tools(
            python="/usr/bin/python3",
            qemu="/usr/bin/qemu-system-x86_64",
            qemu_version=(10, 0),
            blobs=(Blob(guest.kernel, DIGEST),),
        )

    monkeypatch.setattr(declared, "find", lambda guest, inputs: tools(guest))


def declare(host: HostPaths, name: str, text: str = "") -> Source:
    Path(host.declarations).mkdir(parents=True, exist_ok=True)
    Path(host.declaration(name)).write_text(f'kernel = "{host.at("/kernel")}"\n{text}')
    return Source("declaration", host.declaration(name))


def update(host: HostPaths, name: str, text: str = "", *, is_declared: bool = False) -> str:
    """Install what a declaration says; gives the package's name."""
    found = install.from_source(name, declare(host, name, text), host, is_declared=is_declared)
    return os.path.basename(found.after)


def current(host: HostPaths, name: str) -> str:
    return os.path.basename(os.readlink(host.current(name)))


def stored(host: HostPaths) -> set[str]:
    return set(os.listdir(host.packages))


def test_a_declaration_is_installed(host: HostPaths) -> None:
    name = update(host, "web")
    assert name.endswith("-web") and stored(host) == {name}
    assert current(host, "web") == name
    assert runner.load(host.current("web")).hypervisor == "qemu"
    assert source.remembered(host.vm("web")) == Source("declaration", host.declaration("web"))
    assert [entry.package for entry in store.history("web", host)] == [f"{host.packages}/{name}"]
    # Once more: nothing changed, and nothing is noted.
    assert update(host, "web") == name
    assert len(store.history("web", host)) == 1


def test_a_wrong_declaration_changes_nothing(host: HostPaths) -> None:
    name = update(host, "web")
    for text in ("mem = 0\n", 'hypervisor = "crosvm"\n', "x\n"):
        with pytest.raises(DeclarationError) as caught:
            update(host, "web", text)
        assert caught.value.line == 2
    assert (stored(host), current(host, "web")) == ({name}, name)
    with pytest.raises(DeclarationError):
        update(host, "new", "mem = 0\n")
    assert not os.path.exists(host.vm("new")) and not os.path.exists(host.history("new"))


def test_a_failure_leaves_neither_package_nor_vm(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for where in (state, "link"), (store, "note"), (runner, "load"), (os, "rename"):
        with monkeypatch.context() as patch:
            patch.setattr(*where, fail)
            with pytest.raises(KeyboardInterrupt):
                update(host, "web")
        assert not os.path.exists(host.vm("web")), where
        assert stored(host) == set(), where


def test_the_last_few_are_kept(host: HostPaths) -> None:
    packages = [update(host, "web", f"vcpu = {number}\n") for number in range(1, 9)]
    assert stored(host) == set(packages[-store.KEPT :])
    # What is running, and what another VM has, is kept all the same.
    other = update(host, "db")
    os.symlink(f"{host.packages}/{packages[-2]}", host.booted("web"))
    for number in range(10, 18):
        update(host, "web", f"vcpu = {number}\n")
    assert {other, packages[-2]} < stored(host)
    assert len(stored(host)) == store.KEPT + 2
    remove.remove("web", host)
    assert stored(host) == {other}
    assert not os.path.exists(host.history("web"))


def test_what_a_killed_writer_left_is_collected(host: HostPaths) -> None:
    name = update(host, "web")
    os.mkdir(f"{host.packages}/.{'0' * 32}-web.0123456789abcdef")
    os.mkdir(f"{host.packages}/an-administrators")
    update(host, "web")
    assert stored(host) == {name, "an-administrators"}


def test_nothing_is_collected_by_a_broken_history(host: HostPaths) -> None:
    packages = [update(host, "web", f"vcpu = {number}\n") for number in range(1, 4)]
    Path(host.history("web")).write_text("{")
    with pytest.raises(MicrovmHostError, match=r"web\.json: is broken; remove it"):
        update(host, "web", "vcpu = 9\n")
    assert set(packages) <= stored(host)


def test_rollback(host: HostPaths) -> None:
    first, second, third = (update(host, "web", f"vcpu = {number}\n") for number in (1, 2, 3))
    assert os.path.basename(install.roll_back("web", None, host).after) == second
    assert current(host, "web") == second
    # As at boot: the declaration still gives the third, which was turned away from.
    change = install.declared(install_declaration(host, "web"), host)
    assert change.describe().startswith("web: stays rolled back to ")
    assert not change.is_new and current(host, "web") == second
    assert install.would_be("web", declare(host, "web", "vcpu = 3\n"), host) == os.readlink(
        host.current("web")
    )
    # Once it says something else, that is installed.
    fourth = update(host, "web", "vcpu = 4\n", is_declared=True)
    assert current(host, "web") == fourth
    assert os.path.basename(install.roll_back("web", first[:8], host).after) == first
    # And `microvm update` is an explicit wish.
    assert update(host, "web", "vcpu = 4\n") == fourth
    for to, message in (("ffff", "no other package that begins with 'ffff'"), ("", "several")):
        with pytest.raises(MicrovmHostError, match=message):
            install.roll_back("web", to, host)
    assert stored(host) == {first, second, third, fourth}


def back(host: HostPaths, to: str | None = None) -> str:
    return os.path.basename(install.roll_back("web", to, host).after)


def test_rolling_back_again_goes_further_back(host: HostPaths) -> None:
    first, second, third = (update(host, "web", f"vcpu = {number}\n") for number in (1, 2, 3))
    assert [back(host), back(host)] == [second, first]
    with pytest.raises(
        MicrovmHostError, match="no other package before, or none is left; `microvm"
    ):
        back(host)
    assert current(host, "web") == first
    # What the declaration gives is still what was turned away from.
    assert install.declared(install_declaration(host, "web"), host).passed_over is not None
    assert current(host, "web") == first
    # Forth again, and from there one back at a time.
    assert [back(host, second[:8]), back(host)] == [second, first]
    assert back(host, third[:8]) == third
    change = install.declared(install_declaration(host, "web"), host)
    assert change.describe().startswith("web: up to date")
    assert [back(host), back(host)] == [second, first]
    # What was had before an update counts, not what it is older than.
    fourth = update(host, "web", "vcpu = 4\n")
    assert [back(host)] == [first]
    with pytest.raises(MicrovmHostError, match="no other package before"):
        back(host)
    # Nor does what is the same as something earlier.
    assert update(host, "web", "vcpu = 4\n") == fourth
    assert update(host, "web", "vcpu = 2\n") == second
    assert [back(host), back(host)] == [fourth, first]


def test_rolling_back_passes_over_what_is_gone(host: HostPaths) -> None:
    first, second, _ = (update(host, "web", f"vcpu = {number}\n") for number in (1, 2, 3))
    shutil.rmtree(f"{host.packages}/{second}")
    assert back(host) == first


def install_declaration(host: HostPaths, name: str) -> Declaration:
    return declaration.load(host.declaration(name))


def test_rollback_without_a_past(host: HostPaths) -> None:
    update(host, "web")
    with pytest.raises(MicrovmHostError, match="microVM web had no other package before"):
        install.roll_back("web", None, host)


# ---- what others have


def interface(kind: str, name: str, mac: str) -> str:
    more = 'macvtap = { link = "eth0", mode = "bridge" }\n' if kind == "macvtap" else ""
    return f'[[interfaces]]\ntype = "{kind}"\nid = "{name}"\nmac = "{mac}"\n{more}'


WANTED = {
    "vsock CID 77": "vsock.cid = 77\n",
    "interface t0": interface("tap", "t0", "02:00:00:00:00:11"),
    "interface m0": interface("macvtap", "m0", "02:00:00:00:00:11"),
    "MAC address 02:00:00:00:00:0a": interface("tap", "x0", "02:00:00:00:00:0a"),
    "MAC address 02:00:00:00:00:0b": interface("tap", "x0", "02:00:00:00:00:0b"),
}


def refused(host: HostPaths) -> set[str]:
    """What of these a declared VM cannot have, because the VM `other` has it."""
    found = set()
    for what, text in WANTED.items():
        try:
            update(host, "web", text)
        except DeclarationError as error:
            assert f"{what} is that of microVM other" in str(error)
            found.add(what)
        else:
            remove.remove("web", host)
        os.unlink(host.declaration("web"))
    return found


def other_package(root: Path, name: str, **fields: object) -> str:
    given: dict[str, object] = {
        "taps": (Tap("t0"),),
        "macvtaps": (Macvtap("m0", "02:00:00:00:00:0b", "eth0", "bridge"),),
        "vsock_cid": 77,
        **fields,
    }
    path = root / name
    packages.write(path, Package(path=str(path), **given))  # type: ignore[arg-type]
    packages.put(path, "share/microvm/tap-macs", "t0 02:00:00:00:00:0a\n")
    return str(path)


def test_what_a_package_of_another_vm_has_is_taken(host: HostPaths, root: Path) -> None:
    path = other_package(root, "first")
    install.create("other", Source("runner", path), host)
    assert refused(host) == {*WANTED}
    # Not by itself, though.
    for text in WANTED.values():
        update(host, "other", text)
        Path(host.declaration("other")).unlink()
    # A package that is broken claims what can be read of it.
    state.link(host.current("other"), path)
    packages.put(Path(path), "share/microvm/vsock-cid", "1\n")
    assert refused(host) == {*WANTED} - {"vsock CID 77"}
    packages.put(Path(path), "share/microvm/tap-interfaces", "a/b\n")
    assert refused(host) == {"interface m0", "MAC address 02:00:00:00:00:0b"}
    # What runs has what it has, whatever is next.
    os.symlink(path, host.booted("other"))
    state.link(host.current("other"), other_package(root, "next", taps=(), macvtaps=()))
    packages.put(root / "next", "share/microvm/tap-macs", "")
    assert refused(host) == {"vsock CID 77", "interface m0", "MAC address 02:00:00:00:00:0b"}
    os.unlink(host.booted("other"))
    assert refused(host) == {"vsock CID 77"}
    # One that leads nowhere, and one that is gone.
    state.link(host.current("other"), str(root / "none"))
    assert refused(host) == set()
    state.link(host.current("other"), path)
    remove.remove("other", host)
    assert refused(host) == set()


def test_of_a_declared_guest_its_declaration_counts(host: HostPaths) -> None:
    update(host, "other", "vsock.cid = 77\n")
    assert refused(host) == {"vsock CID 77"}
    # Two may exchange theirs.
    declare(host, "other", "vsock.cid = 78\n")
    assert refused(host) == set()
    # Declared no more, but still there.
    Path(host.declaration("other")).unlink()
    assert refused(host) == {"vsock CID 77"}


# ---- on the disk


def test_a_kernel_is_on_the_disk_once(host: HostPaths, root: Path) -> None:
    first, second = (update(host, "web", f"vcpu = {number}\n") for number in (1, 2))
    inodes = {os.stat(f"{host.packages}/{each}/lib/kernel").st_ino for each in (first, second)}
    assert len(inodes) == 1


def test_a_private_kernel_goes_with_the_vms_user(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package is the same for whomever the VM runs as, and what it holds is for them alone."""
    given: dict[str, int] = {}

    def fchown(file: int, uid: int, gid: int) -> None:
        assert uid == -1
        given[os.readlink(f"/proc/self/fd/{file}")] = gid

    monkeypatch.setattr(os, "fchown", fchown)
    (root / "kernel").chmod(0o600)
    (root / "open").write_bytes(b"")
    tree = Tree.of(
        {
            "lib/kernel": Copy(str(root / "kernel"), DIGEST, is_private=True),
            "lib/initrd": Copy(str(root / "open"), DIGEST),
        }
    )
    path = store.put(tree, "web", 61001, host)
    assert [*given.values()] == [61001]
    given.clear()
    assert store.put(tree, "web", 61002, host) == path
    assert given == {f"{path}/lib/kernel": 61002}
    # What is no file of its own is not followed.
    (Path(path) / "lib/kernel").unlink()
    (Path(path) / "lib/kernel").symlink_to(root / "kernel")
    given.clear()
    with pytest.raises(MicrovmHostError, match="lib/kernel: cannot be opened"):
        store.put(tree, "web", 61003, host)
    assert given == {}


def test_a_rollback_gives_a_private_kernel_to_the_vms_user(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = (update(host, "web", f"vcpu = {number}\n") for number in (1, 2))
    kernel = Path(host.packages) / first / "lib/kernel"
    kernel.unlink()
    kernel.write_bytes(b"")
    kernel.chmod(0o640)
    given = []
    monkeypatch.setattr(service, "identity", lambda name: Identity("other", 61002, "o", 61003))
    monkeypatch.setattr(
        os,
        "fchown",
        lambda file, *owner: given.append((os.readlink(f"/proc/self/fd/{file}"), owner)),
    )
    install.roll_back("web", None, host)
    assert given == [(str(kernel), (-1, 61003))]


def test_a_store_behind_a_link_is_known(host: HostPaths, root: Path) -> None:
    (root / "elsewhere").mkdir()
    os.symlink(root / "elsewhere", root / "var/lib/microvm-host")
    names = [update(host, "web", f"vcpu = {number}\n") for number in (1, 2)]
    assert stored(host) == set(names)
    assert store.is_ours(os.readlink(host.current("web")), host)
    assert not store.is_ours("/srv/web", host)


def test_two_trees_of_one_digest_are_written_once(host: HostPaths, root: Path) -> None:
    tree = Tree.of({"bin/microvm-run": File(b"#!/bin/sh\n", 0o755)})
    path = store.put(tree, "web", -1, host)
    (Path(path) / "mark").touch()
    assert store.put(tree, "web", -1, host) == path
    assert (Path(path) / "mark").exists()
    shutil.rmtree(path)
    blob = Copy(str(root / "kernel"), "0" * 64)
    with pytest.raises(MicrovmHostError, match="was changed"):
        store.put(Tree.of({"lib/kernel": blob}), "web", -1, host)
    assert stored(host) == set()


def test_vms_do_not_take_each_others_addresses(host: HostPaths) -> None:
    update(host, "web", "vsock.cid = 5\n")
    with pytest.raises(DeclarationError, match="vsock CID 5 is that of microVM web") as caught:
        update(host, "db", "mem = 64\nvsock.cid = 5\n")
    assert caught.value.line == 3
