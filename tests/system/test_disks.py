# SPDX-License-Identifier: MIT
"""Disks of declared guests: each made with its label, filled, and seen from inside."""

from __future__ import annotations

import pytest

from .toolkit import IMAGE, Toolkit, eventually

pytestmark = pytest.mark.container

HEAD = """\
autostart = false
kernel = "{image}/vmlinuz"
initrd = "{image}/initrd"
mem = 256
kernelParams = ["quiet", "loglevel=3", "guest.name={vm}", {words}]
"""
MADE = (
    # file system, label, size in MiB, format
    ("ext4", "an ext4 label", 64, "raw"),
    ("xfs", "an_xfs_label", 320, "raw"),
    ("btrfs", "a btrfs label", 128, "raw"),
    ("vfat", "A VFAT", 16, "raw"),
    ("ext4", "in qcow2", 64, "qcow2"),
    ("none", "", 32, "qcow2"),
)


def declare(toolkit: Toolkit, vm: str, volumes: str, *words: str) -> None:
    toolkit.sh("mkdir -p /etc/microvms")
    head = HEAD.format(image=IMAGE, vm=vm, words=", ".join(f'"{word}"' for word in words))
    toolkit.host.write(f"/etc/microvms/{vm}.toml", head + volumes)


def boot(toolkit: Toolkit, vm: str) -> list[str]:
    """Start it, and give what the guest said."""
    toolkit.systemctl("start", f"microvm@{vm}", timeout=120)
    lines = toolkit.await_line(vm, f"GUEST {vm}: ready", timeout=180)
    return [line.partition(": ")[2] for line in lines if line.startswith(f"GUEST {vm}: ")]


def blkid(toolkit: Toolkit, image: str) -> tuple[str, str]:
    """File system and label of an image, as util-linux has them."""
    tags = [f"blkid -p -s {tag} -o value '{image}'" for tag in ("TYPE", "LABEL")]
    kind, label = (toolkit.sh(line, check=False).rstrip("\n") for line in tags)
    return kind, label


@pytest.mark.core
def test_each_file_system_is_made_with_its_label(toolkit: Toolkit, vm: str) -> None:
    volumes = ""
    for number, (kind, label, size, form) in enumerate(MADE):
        volumes += f'[[volumes]]\nimage = "{number}.img"\nsize = {size}\nserial = "s{number}"\n'
        volumes += f'fsType = "{kind}"\nimageType = "{form}"\n'
        volumes += f'label = "{label}"\n' if label else ""
    declare(
        toolkit,
        vm,
        volumes,
        "guest.mount=s0,ext4,-",
        "guest.mount=s3,vfat,-",
        "guest.mount=s4,ext4,-",
    )
    toolkit.sh("microvm apply")
    said = boot(toolkit, vm)
    state = f"/var/lib/microvms/{vm}"
    for number, (_, _, size, _) in enumerate(MADE):
        letter = "abcdef"[number]
        assert f"block vd{letter} {size << 20} bytes ro 0 serial s{number}" in said, said
    # Each of these was mounted.
    assert not any("failed" in line for line in said)
    assert any(line.startswith("disk s0 file lost+found 0:0 700") for line in said)
    assert any(line.startswith("disk s4 file lost+found 0:0 700") for line in said)
    toolkit.systemctl("stop", f"microvm@{vm}", timeout=120)
    for number, (kind, label, size, form) in enumerate(MADE):
        image = f"{state}/{number}.img"
        owner, used = toolkit.sh(f"stat -c '%U:%G.%a %b' {image}").split()
        assert owner == "microvm:microvm.600"
        # Sparse: xfs's log is the largest part that is written.
        assert int(used) * 512 < (size << 20) * 3 // 4, (kind, used)
        if form == "qcow2":
            assert '"format": "qcow2"' in toolkit.sh(f"qemu-img info --output=json {image}")
            toolkit.sh(f"qemu-img convert -O raw {image} /root/raw.img")
            image = "/root/raw.img"
        assert blkid(toolkit, image) == ("" if kind == "none" else kind, label)
    left = toolkit.sh(f"ls {state}").split()
    assert not [name for name in left if name.endswith((".new", ".raw"))]


def test_content_that_root_alone_may_read(toolkit: Toolkit, vm: str) -> None:
    source = f"/srv/{vm}/root"
    toolkit.sh(
        # Closed above, and open to all of the guest's users.
        f"mkdir -p {source}/etc && chmod 700 /srv/{vm} && cd {source} && "
        "echo key >etc/shadow && chown 0:42 etc/shadow && chmod 640 etc/shadow && "
        "echo hello >a && chown 1000:1001 a && chmod 4755 a && "
        f"tar -cf {source}.tar . && chmod 600 {source}.tar"
    )
    volumes = f"""
[[volumes]]
image = "root.img"
serial = "root"
size = 32
label = "root fs"
source = "{source}"

[[volumes]]
image = "usr.img"
serial = "usr"
fsType = "erofs"
label = "usr"
readOnly = true
source = "{source}.tar"

[[volumes]]
image = "tar.qcow2"
serial = "tar"
imageType = "qcow2"
size = 32
source = "{source}.tar"
"""
    declare(
        toolkit,
        vm,
        volumes,
        "guest.mount=root,ext4,-",
        "guest.mount=usr,erofs,-",
        "guest.mount=tar,ext4,-",
    )
    state = f"/var/lib/microvms/{vm}"
    toolkit.sh("microvm apply")
    # Already made, before the first start, as the VM's user.
    for name in ("root.img", "usr.img", "tar.qcow2"):
        assert toolkit.sh(f"stat -c '%U:%G.%a' {state}/{name}").strip() == "microvm:microvm.600"
    assert blkid(toolkit, f"{state}/root.img") == ("ext4", "root fs")
    assert blkid(toolkit, f"{state}/usr.img") == ("erofs", "usr")
    before = toolkit.sh(f"stat -c %i.%Y {state}/*.img")
    # Once made, it is the guest's, and what it was made of may go.
    toolkit.sh(f"rm -r /srv/{vm}; microvm update {vm}")
    assert toolkit.sh(f"stat -c %i.%Y {state}/*.img") == before
    said = boot(toolkit, vm)
    for serial in ("root", "usr", "tar"):
        assert f"disk {serial} file etc/shadow 0:42 640 4" in said, said
        assert f"disk {serial} file etc/shadow: key" in said
        assert f"disk {serial} file a 1000:1001 4755 6" in said
        assert f"disk {serial} file a: hello" in said


def test_root_reads_nothing_that_the_user_may_meddle_with(toolkit: Toolkit, vm: str) -> None:
    volumes = '[[volumes]]\nimage = "root.img"\nsize = 32\nsource = "/srv/open"\n'
    declare(toolkit, vm, volumes)
    toolkit.sh(
        "rm -rf /srv/open; mkdir /srv/open && echo key >/srv/open/key && chmod 600 /srv/open/*"
    )
    done = toolkit.host.run(["microvm", "apply"], check=False)
    assert done.returncode == 1
    assert f"the images of {vm} could not be made" in done.stderr
    assert "/srv/open is read with the rights of microvm alone" in done.stderr
    assert "keep it in a directory that root alone may enter" in done.stderr
    # Nothing is left of it.
    assert not toolkit.host.exists(f"/var/lib/microvms/{vm}")
    # What everybody may read takes no right of root's, at the first start either.
    toolkit.sh("chmod 644 /srv/open/key && microvm apply")
    toolkit.sh(f"rm /var/lib/microvms/{vm}/root.img")
    boot(toolkit, vm)
    assert toolkit.host.exists(f"/var/lib/microvms/{vm}/root.img")


def test_progress_of_what_takes_long(toolkit: Toolkit, vm: str) -> None:
    """A mke2fs that takes its time."""
    toolkit.sh("mkdir -p /srv/slow")
    slow = "/usr/local/sbin/mkfs.ext4"
    # Found before the distribution's.
    toolkit.host.write(
        slow, '#!/bin/sh\n[ "$1" = -V ] || sleep 1.5\nexec /usr/sbin/mkfs.ext4 "$@"\n'
    )
    toolkit.sh(f"chmod 755 {slow}")
    try:
        volumes = '[[volumes]]\nimage = "a b.img"\nsize = 32\nsource = "/srv/slow"\n'
        declare(toolkit, vm, volumes)
        done = toolkit.host.run(["microvm", "apply"])
    finally:
        toolkit.sh(f"rm {slow}")
    assert "making a b.img of /srv/slow: 0 MB after " in done.stderr
    assert "making" not in done.stdout


def test_a_device_that_is_closed_to_the_vm(toolkit: Toolkit, vm: str) -> None:
    node = f"/dev/{vm}-disk"
    declare(toolkit, vm, f'[[volumes]]\nimage = "{node}"\n')
    toolkit.sh("microvm apply")
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/once.conf", "[Service]\nRestart=no\n"
    )
    toolkit.systemctl("daemon-reload")
    # It counts as started when its script runs.
    toolkit.systemctl("start", f"microvm@{vm}", check=False)
    toolkit.await_line(vm, f"{node}: there is no such device")
    toolkit.sh(f"mknod {node} b 7 200 && chmod 600 {node}")
    try:
        toolkit.systemctl("reset-failed", f"microvm@{vm}", check=False)
        toolkit.systemctl("start", f"microvm@{vm}", check=False)
        lines = toolkit.await_line(vm, f"{node}: this VM may not open it")
        assert any(f"DeviceAllow={node} rw" in line for line in lines)
        eventually(
            lambda: toolkit.property(f"microvm@{vm}", "ExecMainStatus"),
            lambda status: status == "78",
            60,
            "it is no wrong package",
        )
    finally:
        toolkit.sh(f"rm {node}")
    toolkit.systemctl("reset-failed", f"microvm*{vm}*", check=False)
