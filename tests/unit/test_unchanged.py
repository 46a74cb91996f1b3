# SPDX-License-Identifier: MIT
"""An install of what did not change builds nothing; what did change is never taken for the same.

What is counted: files that were hashed and programs that were run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microvm_host import (
    build_record,
    declaration,
    file_stamp,
    install,
    process,
    remove,
    service,
    source,
    state,
    store,
)
from microvm_host.build import tools
from microvm_host.file_stamp import Inputs
from microvm_host.identity import Identity
from microvm_host.install import Change
from microvm_host.paths import HostPaths

# A kernel's header is all that is looked at.
KERNEL = bytes(0x202) + b"HdrS" + bytes(100)


class Counts:
    """What an install did that takes long."""

    def __init__(self) -> None:
        self.hashed: list[str] = []
        self.run: list[str] = []
        self.built = 0

    def taken(self) -> tuple[int, int, int]:
        """How many files were hashed, programs run and packages built since the last time."""
        found = len(self.hashed), len(self.run), self.built
        self.hashed, self.run, self.built = [], [], 0
        return found


@pytest.fixture
def counts(root: Path, host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Counts:
    """A host with a kernel, an initrd and a QEMU, that counts what is done with them."""
    counted = Counts()
    ours = Identity("me", os.getuid(), "us", os.getgid())
    monkeypatch.setattr(service, "identity", lambda name: ours)
    monkeypatch.setattr(os, "fchown", lambda *_: None)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    monkeypatch.setattr(state, "_is_roots", lambda status: True)
    monkeypatch.setattr(tools, "PROGRAM_PLACES", (str(root / "local"), str(root / "bin")))
    monkeypatch.setattr(tools, "QEMU_PLACES", (str(root / "local"), str(root / "bin")))
    # Files of this test are as old as the test.
    monkeypatch.setattr(file_stamp, "_SETTLED_AFTER", 0)
    monkeypatch.setattr(file_stamp, "_SETTLED_AFTER_ON_FAT", 0)
    # A file system that is mounted read-only is another test's.
    monkeypatch.setattr(file_stamp, "_is_read_only", lambda path: False)

    def digest(file: object, kind: str) -> hashlib._Hash:
        counted.hashed.append(file.name)  # type: ignore[attr-defined]
        return hashlib.file_digest(file, kind)  # type: ignore[arg-type]

    def output(argv: list[str], **_: object) -> str:
        counted.run.append(argv[0])
        return "QEMU emulator version 10.0.2\n"

    monkeypatch.setattr(tools, "file_digest", digest)
    monkeypatch.setattr(process, "output", output)
    whole = install._plan

    def plan(*arguments: object) -> object:
        counted.built += 1
        return whole(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(install, "_plan", plan)
    for directory in ("bin", "local", "etc/microvms"):
        (root / directory).mkdir(parents=True, exist_ok=True)
    (root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
    (root / "vmlinuz").write_bytes(KERNEL)
    (root / "initrd").write_bytes(b"initrd")
    program(root / "bin/qemu-system-x86_64")
    return counted


def program(path: Path, text: bytes = b"\x7fELF") -> None:
    path.write_bytes(text)
    path.chmod(0o755)


def declare(host: HostPaths, root: Path, name: str, more: str = "") -> None:
    text = f'kernel = "{root}/vmlinuz"\ninitrd = "{root}/initrd"\n{more}'
    Path(host.declaration(name)).write_text(text)


def bring(host: HostPaths, name: str = "web") -> Change:
    return install.declared(declaration.load(host.declaration(name)), host, dict)


def test_the_second_install_builds_nothing(host: HostPaths, root: Path, counts: Counts) -> None:
    declare(host, root, "web")
    first = bring(host)
    assert first.is_new and counts.taken() == (2, 1, 1)
    second = bring(host)
    assert second.describe() == f"web: up to date ({first.after})"
    assert counts.taken() == (0, 0, 0)
    # As install-microvm@ asks, without reading the declaration.
    assert install.if_unchanged("web", host) == second
    assert install.would_be(
        "web", declaration.load(host.declaration("web")).source, host, dict
    ) == (first.after)
    assert counts.taken() == (0, 0, 0)


def test_many_guests_of_one_kernel_hash_it_once(
    host: HostPaths, root: Path, counts: Counts
) -> None:
    names = [f"vm{number}" for number in range(12)]
    found = []
    for name in names:
        declare(host, root, name)
        found.append(bring(host, name).after)
    assert counts.taken() == (2, 1, 12)
    # It is on the disk once, beside its source.
    assert len({os.stat(f"{package}/lib/kernel").st_ino for package in found}) == 1
    assert len(os.listdir(host.blobs)) == 2
    # What nobody links to any more is collected.
    for name in names:
        os.unlink(host.declaration(name))
        remove.remove(name, host)
    assert os.listdir(host.blobs) == [] == os.listdir(host.packages)
    assert os.listdir(host.build_records) == []


def test_an_unchanged_guest_costs_a_few_stat_calls(
    host: HostPaths, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"vm{number}" for number in range(12)]
    for name in names:
        declare(host, root, name)
        bring(host, name)
    looked = []
    stat_ = os.stat

    def counted(path: Any, **more: Any) -> os.stat_result:
        looked.append(path)
        return stat_(path, **more)

    monkeypatch.setattr(os, "stat", counted)
    looks = build_record.Looks(host)
    for name in names:
        found = declaration.load(host.declaration(name))
        assert not install.declared(found, host, dict, looks=looks).is_new
        # The toolkit and what the guests share are looked at once for all.
        if name == names[0]:
            looked.clear()
    assert len(looked) <= 8 * (len(names) - 1)


def _replace(path: Path, text: bytes) -> None:
    """As a package manager does: a new file with the times and the size of the former."""
    times = path.stat()
    new = path.with_name(f"{path.name}.new")
    new.write_bytes(text)
    new.chmod(times.st_mode & 0o777)
    os.utime(new, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.replace(new, path)


def _write_in_place(path: Path, text: bytes) -> None:
    """With the time of the last write put back, which leaves that of the last change."""
    times = path.stat()
    path.write_bytes(text)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


CHANGES: dict[str, Callable[[Path], None]] = {
    "declaration": lambda root: _write_in_place(
        root / "etc/microvms/web.toml", (root / "etc/microvms/web.toml").read_bytes() + b"vcpu = 2"
    ),
    "first drop-in": lambda root: _drop_in(root, "vcpu = 2\n"),
    "kernel replaced": lambda root: _replace(root / "vmlinuz", KERNEL[:-1] + b"x"),
    "kernel in place": lambda root: _write_in_place(root / "vmlinuz", KERNEL[:-1] + b"x"),
    "initrd by a link": lambda root: _relink(root),
    "kernel closed to others": lambda root: (root / "vmlinuz").chmod(0o600),
    "another QEMU": lambda root: _replace(root / "bin/qemu-system-x86_64", b"\x7fELE"),
    "a QEMU before it": lambda root: program(root / "local/qemu-system-x86_64"),
    "another machine": lambda root: _replace(
        root / "etc/machine-id", b"fedcba9876543210fedcba9876543210\n"
    ),
}


def _drop_in(root: Path, text: str) -> None:
    (root / "etc/microvms/web.toml.d").mkdir()
    (root / "etc/microvms/web.toml.d/10.toml").write_text(text)


def _relink(root: Path) -> None:
    (root / "other").write_bytes(b"dritin")
    (root / "initrd").unlink()
    (root / "initrd").symlink_to("other")


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(host: HostPaths, root: Path, counts: Counts, change: str) -> None:
    declare(host, root, "web")
    bring(host)
    bring(host)
    counts.taken()
    CHANGES[change](root)
    assert install.if_unchanged("web", host) is None
    bring(host)
    assert counts.taken()[2] == 1
    bring(host)
    assert counts.taken() == (0, 0, 0)


def test_a_drop_in_that_changes_or_goes_is_seen(
    host: HostPaths, root: Path, counts: Counts
) -> None:
    declare(host, root, "web")
    _drop_in(root, "vcpu = 2\n")
    first = bring(host).after
    drop_in = root / "etc/microvms/web.toml.d/10.toml"
    _write_in_place(drop_in, b"vcpu = 3\n")
    second = bring(host).after
    drop_in.unlink()
    assert len({first, second, bring(host).after}) == 3
    assert counts.taken()[2] == 3


def test_another_toolkit_builds_again(
    host: HostPaths, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(host, root, "web")
    bring(host)
    # Its modules, though the version is the same.
    copy = root / "microvm_host"
    shutil.copytree(build_record._OURS, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(build_record, "_OURS", str(copy))
    assert install.if_unchanged("web", host) is None
    bring(host)
    assert install.if_unchanged("web", host) is not None
    _write_in_place(copy / "build/qemu.py", (copy / "build/qemu.py").read_bytes() + b"#")
    assert install.if_unchanged("web", host) is None


def test_a_program_that_is_a_script_is_asked_each_time(
    host: HostPaths, root: Path, counts: Counts
) -> None:
    program(root / "bin/qemu-system-x86_64", b'#!/bin/sh\nexec /opt/qemu/latest/bin/qemu "$@"\n')
    declare(host, root, "web")
    bring(host)
    bring(host)
    assert counts.taken() == (2, 2, 2)


def test_what_was_written_a_moment_ago_is_not_believed_yet(
    host: HostPaths, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second write within the same tick of the clock leaves all times as they were."""
    declare(host, root, "web")
    monkeypatch.setattr(file_stamp, "_SETTLED_AFTER", 1 << 62)
    monkeypatch.setattr(file_stamp, "_SETTLED_AFTER_ON_FAT", 1 << 62)
    bring(host)
    bring(host)
    # Neither the package nor the digest of a file.
    assert counts.taken() == (4, 2, 2)
    assert not os.path.exists(host.build_record("web"))


def test_what_changes_while_it_is_built_is_not_recorded(
    host: HostPaths, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    declare(host, root, "web")
    put = store.put

    def change_meanwhile(*arguments: object) -> str:
        declare(host, root, "web", "vcpu = 2\n")
        return put(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(store, "put", change_meanwhile)
        first = bring(host).after
    assert bring(host).after != first
    assert counts.taken()[2] == 2


def test_what_is_gone_is_made_again(host: HostPaths, root: Path, counts: Counts) -> None:
    declare(host, root, "web")
    package = bring(host).after
    shutil.rmtree(package)
    assert bring(host).after == package and os.path.isdir(package)
    # Turned elsewhere by hand.
    state.link(host.current("web"), "/srv/other")
    assert bring(host).after == package
    counts.taken()
    # A record that was cut short, by a disk that was full.
    record = Path(host.build_record("web"))
    whole = record.read_text()
    for text in (whole[: len(whole) // 2], "", whole.removesuffix("end\n"), whole[:-1], "\0" * 99):
        record.write_text(text)
        bring(host)
        assert counts.taken()[2] == 1
        assert record.read_text() == whole


def test_an_image_that_is_gone_is_made_again(
    host: HostPaths, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    from microvm_host import images

    made = []

    def make(name: str, package: str, sources: object, identity: object, directory: str) -> None:
        if not os.path.exists(f"{directory}/disk.img"):
            made.append(name)
            Path(directory, "disk.img").touch()

    monkeypatch.setattr(images, "make", make)
    program(root / "bin/mkfs.ext4")
    declare(
        host,
        root,
        "web",
        '[[volumes]]\nimage = "disk.img"\nsize = 16\nfsType = "ext4"\nsource = "/srv/root"\n',
    )
    bring(host)
    bring(host)
    assert made == ["web"] and counts.taken()[2] == 1
    os.unlink(f"{host.vm('web')}/disk.img")
    bring(host)
    assert made == ["web", "web"]


def test_a_rollback_stays_and_builds_nothing(host: HostPaths, root: Path, counts: Counts) -> None:
    declare(host, root, "web")
    first = bring(host).after
    declare(host, root, "web", "vcpu = 2\n")
    second = bring(host).after
    install.roll_back("web", None, host)
    counts.taken()
    change = bring(host)
    assert (change.after, change.passed_over) == (first, second)
    assert counts.taken() == (0, 0, 0)
    assert install.update("web", host).after == second


def test_a_private_kernel_follows_the_user_without_a_build(
    host: HostPaths, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "vmlinuz").chmod(0o600)
    declare(host, root, "web")
    package = bring(host).after
    assert stat.S_IMODE(os.stat(f"{package}/lib/kernel").st_mode) == 0o640
    counts.taken()
    given = []
    monkeypatch.setattr(service, "identity", lambda name: Identity("x", 61001, "x", 61002))
    monkeypatch.setattr(os, "fchown", lambda file, *owner: given.append(owner))
    bring(host)
    assert given == [(-1, 61002)] and counts.taken() == (0, 0, 0)


def test_systemd_is_not_asked_about_what_did_not_change(
    host: HostPaths, root: Path, counts: Counts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would load all units of each VM to answer."""
    declare(host, root, "web")
    bring(host)

    def asked(name: str) -> Identity:
        raise AssertionError(f"systemd was asked about {name}")

    monkeypatch.setattr(service, "identity", asked)
    assert not bring(host).is_new


# ---- stamps


def test_a_read_only_file_system_counts_for_one_boot(
    host: HostPaths, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image with fixed times and numbers may be another one after a boot."""
    monkeypatch.setattr(file_stamp, "_is_read_only", lambda path: True)
    boot = Path(host.boot_id)
    boot.parent.mkdir(parents=True)
    (root / "vmlinuz").write_bytes(KERNEL)
    stamps = set()
    for text in ("one\n", "one\n", "two\n"):
        boot.write_text(text)
        stamps.add(Inputs(host).stamp(f"{root}/vmlinuz"))
    assert len(stamps) == 2


def test_whole_seconds_are_those_of_fat(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000_000_000_500_000_000
    monkeypatch.setattr(time, "time_ns", lambda: now)

    def settled(nanoseconds: int) -> bool:
        status = os.stat_result(range(10), {"st_mtime_ns": 0, "st_ctime_ns": nanoseconds})
        return file_stamp._is_settled(status)

    assert settled(now - 200_000_000) and not settled(now - 50_000_000)
    assert not settled(now - 500_000_000) and not settled(now - 1_500_000_000)
    assert settled(now - 2_500_000_000)
    # The clock was turned back since.
    assert not settled(now + 3_600_000_000_000)


def test_a_fact_is_found_out_once(host: HostPaths, root: Path, counts: Counts) -> None:
    calls = []

    def find_out() -> str:
        calls.append(1)
        return "fact"

    def ask(inputs: Inputs) -> str:
        with open(root / "vmlinuz", "rb") as file:
            return inputs.fact("kind", str(root / "vmlinuz"), file.fileno(), find_out)

    assert [ask(Inputs(host)) for _ in range(3)] == ["fact"] * 3 and len(calls) == 1
    assert ask(Inputs(host, remembers=False)) == "fact" and len(calls) == 2
    (memory,) = Path(host.file_facts).iterdir()
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600
    # One that was cut short is none.
    memory.write_text(memory.read_text()[:-3])
    assert ask(Inputs(host)) == "fact" and len(calls) == 3
    _write_in_place(root / "vmlinuz", KERNEL)
    assert ask(Inputs(host)) == "fact" and len(calls) == 4
