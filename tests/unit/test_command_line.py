# SPDX-License-Identifier: MIT
"""A kernel command line that is too long is refused, to the byte, for each hypervisor."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from microvm_host.build import declared, kernels
from microvm_host.build.command_line import LINUX_MAX
from microvm_host.build.tools import PROGRAMS, Blob, Tools
from microvm_host.build.tree import File, Tree
from microvm_host.declaration.guest import Guest
from microvm_host.errors import DeclarationError

from .test_kernels import BZIMAGE

VERSIONS = {"cloud-hypervisor": (53, 0), "firecracker": (1, 13)}
FORMATS = {"firecracker": kernels.ELF}


def built(path: Path, params: str, *lines: str, hypervisor: str = "qemu", says: int = 0) -> Tree:
    """The package of a declaration with these kernelParams, and a kernel that says so much."""
    head = f'hypervisor = "{hypervisor}"\nkernel = "/k"\ninitrd = "/i"\n'
    rest = "".join(f"{line}\n" for line in lines)
    path.write_text(f'{head}kernelParams = ["{params}"]\n{rest}')

    def tools(guest: Guest) -> Tools:
        kind = FORMATS.get(hypervisor, kernels.BZIMAGE)
        return Tools(
            python="/usr/bin/python3",
            qemu="/usr/bin/qemu-system-x86_64",
            qemu_version=(10, 0),
            program=f"/usr/bin/{PROGRAMS.get(hypervisor)}",
            program_version=VERSIONS.get(hypervisor, (0, 0)),
            blobs=(Blob("/k", "0" * 64, False, kind, says), Blob("/i", "0" * 64)),
        )

    return declared.tree(str(path), None, tools)


def surplus(path: Path, *lines: str, hypervisor: str = "qemu", says: int = 0) -> int:
    """By how much 3000 bytes are too many, as the error says."""
    with pytest.raises(DeclarationError) as raised:
        built(path, "x" * 3000, *lines, hypervisor=hypervisor, says=says)
    assert raised.value.exit_code == 78
    assert raised.value.line == 4 and "kernelParams" in str(raised.value)
    found = re.search(r"shorten it by (\d+)", str(raised.value))
    assert found
    return int(found[1])


@pytest.mark.parametrize("hypervisor", ["qemu", *PROGRAMS])
@pytest.mark.parametrize("says", [0, 500])
def test_to_the_byte(tmp_path: Path, hypervisor: str, says: int) -> None:
    path = tmp_path / "web.toml"
    longest = 3000 - surplus(path, "vcpu = 1", hypervisor=hypervisor, says=says)
    # The package's own words are there as well.
    assert (says or LINUX_MAX) - 300 < longest < (says or LINUX_MAX) - 20
    built(path, "x" * longest, "vcpu = 1", hypervisor=hypervisor, says=says)
    with pytest.raises(DeclarationError):
        built(path, "x" * (longest + 1), "vcpu = 1", hypervisor=hypervisor, says=says)


def test_what_qemu_is_given_fits(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    longest = 3000 - surplus(path, "vcpu = 1")
    script = dict(built(path, "x" * longest, "vcpu = 1").entries)["bin/microvm-run"]
    assert isinstance(script, File)
    (line,) = re.findall(r"-append '([^']*)'\"\$\{clock}\"", script.content.decode())
    assert len(line) + len(" tsc_early_khz=99999999") == LINUX_MAX


def test_bytes_count_and_not_letters(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    built(path, "é" * 900, "vcpu = 1")
    with pytest.raises(DeclarationError):
        built(path, "é" * 1023, "vcpu = 1")


def test_a_kernel_that_takes_more(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    built(path, "x" * 3000, "vcpu = 1", says=4095)
    built(path, "x" * 3000, "vcpu = 1", hypervisor="cloud-hypervisor", says=4095)
    # These have no more room themselves.
    for hypervisor in ("crosvm", "kvmtool", "firecracker"):
        assert surplus(path, "vcpu = 1", hypervisor=hypervisor, says=4095)


def test_devices_that_are_named_on_the_line(tmp_path: Path) -> None:
    path = tmp_path / "web.toml"
    disk = '[[volumes]]\nimage = "/dev/vg/{}"'
    no_tables = '[qemu]\nmachineOpts = { acpi = "off", pcie = "off" }'
    none = surplus(path, no_tables)
    assert surplus(path, no_tables, disk.format(1), disk.format(2)) == none + 2 * 37
    bus = surplus(path, "vcpu = 1", hypervisor="stratovirt")
    assert surplus(path, disk.format(1), hypervisor="stratovirt") == bus + 37


@pytest.mark.parametrize(
    ("version", "size", "expected"),
    [(0x20F, 2047, 2047), (0x20F, 4095, 4095), (0x206, 500, 500), (0x205, 2047, 0)],
)
def test_what_a_bzimage_says(version: int, size: int, expected: int) -> None:
    kernel = bytearray(BZIMAGE)
    kernel[0x206:0x208] = version.to_bytes(2, "little")
    kernel[0x238:0x23C] = size.to_bytes(4, "little")
    assert kernels.command_line_max(io.BytesIO(bytes(kernel))) == expected
