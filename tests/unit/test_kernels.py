# SPDX-License-Identifier: MIT
"""Formats of kernels are told apart by their first bytes, whatever else a file says of itself."""

from __future__ import annotations

import io
import os
import random
import struct
from hashlib import sha256
from pathlib import Path

import pytest

from microvm_host.build import kernels, tools
from microvm_host.build.refused import Refused
from microvm_host.declaration.guest import Guest

BZIMAGE = b"MZ" + bytes(0x200) + b"HdrS" + bytes(1000)


def note(owner: bytes, number: int, value: bytes = b"") -> bytes:
    def padded(data: bytes) -> bytes:
        return data + bytes(-len(data) % 4)

    return struct.pack("<3I", len(owner), len(value), number) + padded(owner) + padded(value)


def elf(*segments: tuple[int, bytes]) -> bytes:
    """An ELF file of program headers with what each has."""
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, len(segments), 0, 0, 0)
    at, headers, contents = len(head) + 56 * len(segments), b"", b""
    for kind, data in segments:
        headers += struct.pack(
            "<IIQQQQQQ", kind, 4, at + len(contents), 0, 0, len(data), len(data), 4
        )
        contents += data
    return head + headers + contents


PVH_NOTE = note(b"Xen\0", 18, struct.pack("<Q", 0x1000000))
OTHERS = note(b"GNU\0", 3, b"id" * 10) + note(b"Linux\0", 18, b"1234")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BZIMAGE, kernels.BZIMAGE),
        (elf((1, b"code")), kernels.ELF),
        (elf(), kernels.ELF),
        (elf((1, b"code" * 10), (4, OTHERS)), kernels.ELF),
        (elf((1, b"code"), (4, OTHERS + PVH_NOTE)), kernels.PVH),
        (elf((4, OTHERS), (4, PVH_NOTE)), kernels.PVH),
        # Where it is no note, it is none.
        (elf((1, PVH_NOTE)), kernels.ELF),
        (b"", ""),
        (b"\x7fELF", ""),
        (b"\x7fELF\x01\x01" + bytes(100), ""),
        (b"\x1f\x8b" + bytes(0x300), ""),
        (BZIMAGE[:0x204], ""),
    ],
)
def test_formats(content: bytes, expected: str) -> None:
    assert kernels.kind(io.BytesIO(content)) == expected


def test_nonsense_is_survived() -> None:
    rng = random.Random(1)
    whole = elf((1, b"code"), (4, OTHERS + PVH_NOTE))
    for _ in range(2000):
        broken = bytearray(whole[: rng.randrange(6, len(whole) + 1)])
        for _ in range(rng.randrange(1, 6)):
            broken[rng.randrange(len(broken))] = rng.choice((0, 0x7F, 0xFF, rng.randrange(256)))
        assert kernels.kind(io.BytesIO(bytes(broken))) in ("", kernels.ELF, kernels.PVH)


def test_the_kernel_of_this_distribution() -> None:
    found = sorted(Path("/boot").glob("vmlinuz-*"))
    if not found:
        pytest.skip("there is no kernel in /boot")
    with found[-1].open("rb") as file:
        assert kernels.kind(file) == kernels.BZIMAGE


def guest(kernel: Path, hypervisor: str) -> Guest:
    return Guest(name="web", kernel=str(kernel), machine_id="x", hypervisor=hypervisor)


def put(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_what_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(elf((4, PVH_NOTE)))
    monkeypatch.setattr(tools, "PROGRAM_PLACES", (str(tmp_path / "bin"),))
    monkeypatch.setattr(tools.program, "__defaults__", ((str(tmp_path / "bin"),),))
    (tmp_path / "bin").mkdir()
    missing = tools.find(guest(kernel, "firecracker"))
    assert missing.program is None
    with pytest.raises(Refused, match="this host has no firecracker"):
        tools.hypervisor(guest(kernel, "firecracker"), missing)
    for name, said, version in (
        ("firecracker", "Firecracker v1.13.1\n\nSupported snapshot", (1, 13, 1)),
        ("cloud-hypervisor", "cloud-hypervisor v48.0-12-gabcdef-dirty", (48, 0)),
        # Not asked: that could be anything for all that is known.
        ("lkvm", "", (0, 0)),
    ):
        path = put(tmp_path / f"bin/{name}", f"#!/bin/sh\n[ -n '{said}' ] && echo '{said}'\n")
        hypervisor = "kvmtool" if name == "lkvm" else name
        found = tools.find(guest(kernel, hypervisor))
        assert (found.program, found.program_version) == (str(path), version)
        assert tools.hypervisor(guest(kernel, hypervisor), found) == str(path)
        blob = found.blob(str(kernel))
        assert blob.format == kernels.PVH
        assert blob.sha256 == sha256(kernel.read_bytes()).hexdigest()


def test_on_another_machine_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = tmp_path / "vmlinux"
    kernel.write_bytes(elf())
    one = os.uname()
    other = os.uname_result((one.sysname, one.nodename, one.release, one.version, "riscv64"))
    monkeypatch.setattr(os, "uname", lambda: other)
    with pytest.raises(Refused, match="not yet built on riscv64"):
        tools.find(guest(kernel, "crosvm"))
