# SPDX-License-Identifier: MIT
"""Declarations in tests/golden/declarations: what each gives, be it a package or one line of error.

`right/` and `wrong/` are about one declaration each, `taken/` about those of one host. Beside each
NAME.toml stands NAME.expected. Each right one is also written, read back by the host's own reader
of packages, and run as far as its command line; each wrong one leaves nothing.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from microvm_host import runner
from microvm_host.build import declared, kernels
from microvm_host.build.tools import PROGRAMS, Blob, Tools
from microvm_host.build.tree import Copy, File, Link, Tree
from microvm_host.declaration import claims
from microvm_host.declaration import guest as guests
from microvm_host.declaration.guest import Guest
from microvm_host.errors import DeclarationError

from . import golden
from .test_kernels import BZIMAGE, PVH_NOTE, elf

PROJECT = Path(__file__).resolve().parents[2]
DIRECTORY = golden.DIRECTORY / "declarations"
CASES = sorted(DIRECTORY.glob("*/*.toml"))
RIGHT = [case for case in CASES if case.parent.name == "right"]
# Programs whose text is the same in all packages; one case of each shows the rest of the scripts.
WHOLE = ("everything", *(f"{name}-everything" for name in PROGRAMS))
CONTROL = {"qemu": "qmp", "cloud-hypervisor": "cloud-hypervisor", "firecracker": "firecracker"}
# By the file's name.
FORMATS = {"vmlinux": kernels.PVH, "vmlinux-no-pvh": kernels.ELF, "strange": ""}
VERSIONS = {"cloud-hypervisor": (53, 0), "firecracker": (1, 13)}
OLD_VERSIONS = {
    "cloud-hypervisor-too-old": (35, 1),
    "cloud-hypervisor-38": (38, 0),
    "cloud-hypervisor-38-bzimage": (38, 0),
    "cloud-hypervisor-47-cpus": (47, 0),
    "cloud-hypervisor-50.0-disk": (50, 0),
    "cloud-hypervisor-50.1-disk": (50, 1),
    "firecracker-mmio": (1, 12),
}


def tools(guest: Guest) -> Tools:
    """A host that has everything but btrfs's tools, unless a case is named for them.

    Cases that end in `-old` have programs of Debian 12.
    """
    is_old = guest.name.endswith("-old")
    kinds = ("ext4", "xfs", "vfat", "erofs", *(["btrfs"] if guest.name == "volume-btrfs" else []))
    blobs = [
        Blob(guest.kernel, "0" * 64, False, FORMATS.get(Path(guest.kernel).name, kernels.BZIMAGE))
    ]
    if guest.initrd is not None:
        blobs.append(Blob(guest.initrd, "0" * 64))
    program = PROGRAMS.get(guest.hypervisor)
    is_there = program and not guest.name.endswith("-missing")
    return Tools(
        python="/usr/bin/python3",
        qemu="/usr/bin/qemu-system-x86_64",
        qemu_version=(8, 0) if guest.name == "cpus-q35-8.0" else (10, 0),
        program=f"/usr/bin/{program}" if is_there else None,
        program_version=OLD_VERSIONS.get(guest.name, VERSIONS.get(guest.hypervisor, (0, 0))),
        qemu_img=None if guest.name == "volume-qcow2-no-qemu-img" else "/usr/bin/qemu-img",
        e2fs_version=(1, 47, 0) if is_old else (1, 47, 2),
        erofs_version=(1, 5) if is_old else (1, 8, 6),
        mcopy=None if guest.name == "cloud-init-no-mcopy" else "/usr/bin/mcopy",
        mkfs=tuple((kind, f"/usr/sbin/mkfs.{kind}") for kind in kinds),
        blobs=tuple(blobs),
    )


def tree(case: Path) -> Tree:
    others = claims.gather(str(case.parent)) if case.parent.name == "taken" else None
    return declared.tree(str(case), others, tools)


def described(package: Tree, *, whole: bool) -> str:
    """A package for people to read over."""
    lines = []
    for path, entry in package.entries:
        if isinstance(entry, File):
            text = entry.content.decode()
            if path == "bin/microvm-run" and not whole:
                # Between what looks at the host and what `microvm show` is for, and after that.
                command, _, rest = text.partition("\nset -- ")[2].partition("\nif [ -n ")
                text = f"set -- {command}\n{rest.partition('fi')[2].strip()}\n"
                text = text.replace('\nexec "$@"\n', "\n")
            elif path.startswith(("lib/cloud-init/", "bin/microvm-prepare")):
                pass
            elif path.startswith(("lib/", "bin/")) and not whole and not path.endswith(".json"):
                text = ""
            lines.append(f"==== {path} {entry.mode:04o}\n{text}")
        elif isinstance(entry, Copy):
            lines.append(f"==== {path} {entry.mode:04o} copy of {entry.source}\n")
        else:
            assert isinstance(entry, Link)
            lines.append(f"==== {path} -> {entry.target}\n")
    return "".join(lines)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.stem}")
def test_is_the_golden_one(case: Path) -> None:
    try:
        found = described(tree(case), whole=case.stem in WHOLE)
        assert case.parent.name != "wrong"
    except DeclarationError as error:
        assert case.parent.name != "right", error
        assert error.exit_code == 78
        # One line, that of the file in which it is wrong.
        found = f"{error}\n".replace(f"{case.parent}/", "")
        assert found.count("\n") == 1
    golden.compare(f"declarations/{case.parent.name}/{case.stem}.expected", found)


def test_there_are_enough_of_them_and_none_is_left_over() -> None:
    assert len(CASES) > 180
    expected = {path.stem for path in DIRECTORY.glob("*/*.expected")}
    assert expected == {case.stem for case in CASES}


def written(case: Path, directory: Path) -> str:
    """Write a right one's package into a directory; gives its path."""
    blob = directory / "blob"
    blob.write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    package = Tree(
        tuple(
            (path, Copy(str(blob), empty) if isinstance(entry, Copy) else entry)
            for path, entry in tree(case).entries
        )
    )
    package.write(str(directory / "package"))
    return str(directory / "package")


def command_line(package: str, directory: Path) -> list[str]:
    """What `microvm show` shows of a package."""
    done = subprocess.run(
        [f"{package}/bin/microvm-run"],
        env={"MICROVM_SHOW": "1", "PATH": "/nonexistent"},
        capture_output=True,
        text=True,
        cwd=directory,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


@pytest.mark.parametrize("case", RIGHT, ids=lambda case: case.stem)
def test_the_host_reads_it_and_the_shell_runs_it(case: Path, tmp_path: Path) -> None:
    """The contract, from the other side; and words go through the shell as they are."""
    loaded = runner.load(written(case, tmp_path))
    guest, _ = guests.load(str(case))
    assert loaded.hypervisor == guest.hypervisor
    control = loaded.control_socket
    assert (control.protocol if control else None) == CONTROL.get(guest.hypervisor)
    assert (loaded.event_log is not None) == (guest.hypervisor == "qemu")
    assert all(share.options_given for share in loaded.shares)
    words = command_line(loaded.path, tmp_path)
    assert words[0] == f"/usr/bin/{PROGRAMS.get(guest.hypervisor, 'qemu-system-x86_64')}"
    # It looked, and did nothing.
    assert sorted(os.listdir(tmp_path)) == ["blob", "package"]
    if case.stem == "odd-paths":
        append = words[words.index("-append") + 1]
        assert "a='b c' x=$(reboot) y=`id` z=\"q\"" in append
    if case.stem == "extra-args":
        assert words[-1] == "it's $HOME"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_console_without_a_hub(tmp_path: Path, *, is_terminal: bool) -> None:
    """QEMU of before 10.0: the console is the socket, and cat carries its log to the output."""
    qemu = tmp_path / "qemu"
    # Writes to the log, as that QEMU would.
    qemu.write_text(
        "#!/bin/sh\nfor word; do case $word in socket,id=console,*)\n"
        'echo "said by the guest" >"${word##*logfile=}" ;; stdio,id=console,*)\n'
        'echo "on the terminal" ;; esac; done\n'
    )
    qemu.chmod(0o755)
    case = next(case for case in RIGHT if case.stem == "minimal")
    found = declared.tree(
        str(case),
        None,
        lambda guest: Tools(qemu=str(qemu), qemu_version=(7, 2), blobs=tools(guest).blobs),
    )
    script = next(entry for path, entry in found.entries if path == "bin/microvm-run")
    assert isinstance(script, File)
    (tmp_path / "run").write_bytes(script.content)
    master, slave = pty.openpty()
    done = subprocess.run(
        ["sh", str(tmp_path / "run")],
        stdin=slave if is_terminal else subprocess.DEVNULL,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=20,
    )
    os.close(master)
    os.close(slave)
    # That it is emulated, where this host has no KVM.
    assert [line for line in done.stderr.splitlines() if "without KVM" not in line] == []
    assert done.stdout == ("on the terminal\n" if is_terminal else "said by the guest\n")


def test_directories_are_made_for_images_and_sockets(tmp_path: Path) -> None:
    declaration = tmp_path / "web.toml"
    declaration.write_text(
        'kernel = "/boot/vmlinuz"\nsocket = "-run/vm/control.sock"\n'
        '[[volumes]]\nimage = "disks/a b.img"\nsize = 1\nfsType = "none"\n'
    )
    found = declared.tree(
        str(declaration),
        None,
        lambda guest: Tools(qemu="true", qemu_version=(10, 0), blobs=tools(guest).blobs),
    )
    (tmp_path / "run").write_text(found.text("bin/microvm-run"))
    state = tmp_path / "state"
    state.mkdir()
    # A second start finds them.
    for _ in range(2):
        subprocess.run(
            ["sh", str(tmp_path / "run")], check=True, cwd=state, stdin=subprocess.DEVNULL
        )
    assert (state / "disks/a b.img").stat().st_size == 1 << 20
    for directory in ("disks", "-run/vm"):
        assert (state / directory).stat().st_mode & 0o777 == 0o700


# A process of its own: `microvm build FILE -o DIR` of each, with programs from one directory.
_BUILD_ALL = """
import sys
from pathlib import Path
from microvm_host.build import tools
from microvm_host.cli.commands import microvm

declarations, programs, output = sys.argv[1:]
look = tools.program
tools.program = lambda name, places=(): look(name, (programs,))
for path in sorted(Path(declarations).glob("*.toml")):
    microvm.main(["build", str(path), "-o", f"{output}/{path.stem}"], standalone_mode=False)
"""
# What each says when it is asked for its version.
_SAID = {
    "qemu-system-x86_64": "QEMU emulator version 10.0.0",
    "mkfs.ext4": "mke2fs 1.47.2 (1-Jan-2025)",
    "mkfs.erofs": "mkfs.erofs 1.8.6",
}


def test_twice_the_same(tmp_path: Path) -> None:
    """All of them, by two processes that agree in little: names, bytes, modes and links."""
    programs, boot, declarations = (tmp_path / name for name in ("bin", "it's", "declarations"))
    for directory in (programs, boot / "$(init)", declarations):
        directory.mkdir(parents=True)
    others = ("mcopy", "qemu-img", *(f"mkfs.{kind}" for kind in ("xfs", "vfat", "btrfs")))
    for name in (*_SAID, *PROGRAMS.values(), *others):
        (programs / name).write_text(f"#!/bin/sh\necho '{_SAID.get(name, f'{name} 53.0.0')}'\n")
        (programs / name).chmod(0o755)
    for name, content in (
        ("vmlinuz", BZIMAGE),
        ("vmlinux", elf((4, PVH_NOTE))),
        ("vmlinux-no-pvh", elf()),
        *((name, b"initrd") for name in ("initrd", "initrd.img", "$(init)/rd")),
    ):
        (boot / name).write_bytes(content)
    for case in RIGHT:
        text = case.read_text().replace("/srv/it's here/$(init) rd", f"{boot}/$(init)/rd")
        text = text.replace('"/boot/', f'"{boot}/')
        (declarations / case.name).write_text(text)
    environments = (
        {"PYTHONHASHSEED": "1", "LC_ALL": "C.UTF-8", "TZ": "UTC"},
        {"PYTHONHASHSEED": "2", "LC_ALL": "C", "TZ": "Asia/Tokyo", "HOME": "/nonexistent"},
    )
    built = []
    for number, environment in enumerate(environments):
        output = tmp_path / f"output{number}"
        output.mkdir()
        subprocess.run(
            [sys.executable, "-B", "-c", _BUILD_ALL, declarations, programs, output],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT), **environment},
            umask=(0o022, 0o077)[number],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        built.append({str(path.relative_to(output)): entry(path) for path in output.rglob("*")})
    assert {path.partition("/")[0] for path in built[0]} == {case.stem for case in RIGHT}
    differs = [path for path in built[0] if built[0][path] != built[1].get(path)]
    assert (differs, built[0].keys() ^ built[1].keys()) == ([], set())


def entry(path: Path) -> tuple[int, bytes]:
    """What a file, link or directory is, but for its times."""
    mode = path.lstat().st_mode
    if path.is_symlink():
        return mode, os.readlink(path).encode()
    return mode, b"" if path.is_dir() else path.read_bytes()
