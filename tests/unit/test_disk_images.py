# SPDX-License-Identifier: MIT
"""Images are looked at before a hypervisor has them, and what is not done to them is said."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from microvm_host import image_changes, image_format
from microvm_host.build import declared
from microvm_host.build.tools import Blob, Tools
from microvm_host.declaration.guest import Guest
from microvm_host.errors import DeclarationError, PackageError
from microvm_host.helper import booting
from microvm_host.paths import HostPaths
from microvm_host.runner import Image, Package

HEADS = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "qcow": b"QFI\xfb\0\0\0\1",
    "vhdx": b"vhdxfile",
    "vhd": b"conectix",
    "vmdk": b"KDMV",
    "qed": b"QED\0",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>".ljust(0x40, b"\0") + b"\x7f\x10\xda\xbe",
    "parallels": b"WithoutFreeSpace",
    "raw": b"\0" * 64,
}


@pytest.mark.parametrize("form", HEADS)
@pytest.mark.parametrize("stated", ["raw", "qcow2", "vhd", "vhdx"])
def test_the_first_bytes_tell(root: Path, form: str, stated: str) -> None:
    image = root / "a.img"
    image.write_bytes(HEADS[form].ljust(4096, b"\0"))
    assert image_format.detect(str(image)) == form
    assert (image_format.mismatch(str(image), stated) == "") == (form == stated)
    assert image_format.hint(str(image), stated)


def test_what_is_not_known_is_not_refused(root: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "empty").write_bytes(b"")
    (root / "luks").write_bytes(b"LUKS\xba\xbe" + bytes(600))
    # Of fixed size: only its end tells.
    (root / "fixed").write_bytes(bytes(8192) + b"conectix" + bytes(504))
    for name in ("none", "fifo", "empty", "."):
        assert image_format.mismatch(f"{root}/{name}", "qcow2") == ""
    assert image_format.detect(f"{root}/luks") == "raw"
    assert image_format.detect(f"{root}/fixed") == "vhd"


def test_a_start_refuses_it(root: Path) -> None:
    (root / "a.img").write_bytes(HEADS["qcow2"] + bytes(600))
    package = Package(path="/p", images=(Image("a.img", "raw"), Image("/none", "raw")))
    with pytest.raises(PackageError) as raised:
        booting._check_images(package, str(root))
    assert str(raised.value) == (
        f"{root}/a.img: is a qcow2 image, by its first bytes, and not raw; give imageType = "
        "'qcow2', or convert it: qemu-img convert -O raw …"
    )
    booting._check_images(Package(path="/p", images=(Image("a.img", "qcow2"),)), str(root))


def test_a_declaration_refuses_it(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROVM_HOST_ROOT", host.root)
    kernel = Path(host.at("/kernel"))
    kernel.write_bytes(b"")
    path = Path(host.declaration("web"))
    path.parent.mkdir(parents=True)
    volume = '[[volumes]]\nimage = "a.img"\nautoCreate = false\n'
    path.write_text(f'kernel = "{kernel}"\n{volume}')
    Path(host.vm("web")).mkdir()
    Path(host.vm("web"), "a.img").write_bytes(HEADS["vmdk"] + bytes(600))

    def tools(guest: Guest) -> Tools:
        return Tools(
            python="/usr/bin/python3",
            qemu="/usr/bin/qemu-system-x86_64",
            qemu_version=(10, 0),
            blobs=(Blob(guest.kernel, "0" * 64),),
        )

    with pytest.raises(DeclarationError) as raised:
        declared.tree(str(path), None, tools)
    assert raised.value.line == 3
    assert "volumes.image = 'a.img' is a vmdk image" in str(raised.value)
    path.write_text(
        f'kernel = "{kernel}"\n{volume.replace("false", "true")}size = 8\nfsType = "none"\n'
    )
    Path(host.vm("web"), "a.img").write_bytes(bytes(8 << 20))
    tree = declared.tree(str(path), None, tools)
    assert tree.text("share/microvm/images") == "raw rw a.img\n"
    assert json.loads(tree.text(image_changes.ORIGINS))["size"] == 8


ORIGIN: dict[str, object] = {
    **{"image": "a.img", "imageType": "raw", "size": 8, "fsType": "ext4", "label": None},
    **{"mkfsExtraArgs": [], "source": None},
}


def package(root: Path, name: str, *origins: Mapping[str, object]) -> str:
    file = root / name / image_changes.ORIGINS
    file.parent.mkdir(parents=True)
    file.write_text("".join(f"{json.dumps(origin)}\n" for origin in origins))
    return str(root / name)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"size": 16}, "`truncate -s 16M {0}/a.img`"),
        ({"size": 16, "imageType": "qcow2"}, "`qemu-img resize -f qcow2 {0}/a.img 16M`"),
        ({"size": 4}, "volumes.size = 4 instead of 8 counts when an image is made"),
        ({"fsType": "xfs"}, 'volumes.fsType = "xfs" instead of "ext4" counts when'),
        ({"label": "x"}, 'volumes.label = "x" instead of nothing counts when'),
        ({"mkfsExtraArgs": ["-O"]}, 'volumes.mkfsExtraArgs = ["-O"] instead of [] counts'),
        ({"source": "/srv"}, 'volumes.source = "/srv" instead of nothing counts when'),
    ],
)
def test_what_is_not_done_is_said(root: Path, changed: dict[str, object], says: str) -> None:
    before = package(root, "before", ORIGIN)
    after = package(root, "after", {**ORIGIN, **changed})
    # Nothing is there yet: it is made as it is asked for.
    assert list(image_changes.not_done("web", before, after, str(root))) == []
    (root / "a.img").write_bytes(bytes(8 << 20))
    found = list(image_changes.not_done("web", before, after, str(root)))
    assert any(says.format(root) in line for line in found), found
    assert all(line.startswith(f"{root}/a.img stays as it was made: ") for line in found)
    assert list(image_changes.not_done("web", after, after, str(root))) == []
    assert list(image_changes.not_done("web", None, after, str(root))) == []


def test_what_was_done_by_hand_is_not_asked_for(root: Path) -> None:
    """An administrator grows an image first, or has declared a size that it never got."""
    (root / "a.img").write_bytes(bytes(16 << 20))

    def said(before: int, after: int) -> list[str]:
        one = package(root, f"before-{before}-{after}", {**ORIGIN, "size": before})
        other = package(root, f"after-{before}-{after}", {**ORIGIN, "size": after})
        return list(image_changes.not_done("web", one, other, str(root)))

    assert said(8, 16) == said(64, 16) == said(8, 8) == []
    (line,) = said(24, 32)
    assert "volumes.size = 32 instead of 16 does not grow it" in line


def test_an_older_package_does_not_tell_and_the_image_does(root: Path) -> None:
    (root / "a.img").write_bytes(bytes(8 << 20))
    old, same = package(root, "old"), package(root, "same", ORIGIN)
    assert list(image_changes.not_done("web", old, same, str(root))) == []
    (line,) = image_changes.not_done(
        "web", old, package(root, "more", {**ORIGIN, "size": 9}), str(root)
    )
    assert "volumes.size = 9 instead of 8 does not grow it" in line
