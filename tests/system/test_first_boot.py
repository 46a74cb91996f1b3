# SPDX-License-Identifier: MIT
"""What a guest has at its first boot: a seed for cloud-init and credentials, seen from inside.

Secrets of both stand in files of root's, and nowhere else than there, in the memory of the guest,
and with the VM's user while the VM runs.
"""

from __future__ import annotations

import json

import pytest

from .toolkit import IMAGE, Toolkit, eventually

pytestmark = pytest.mark.container

SECRET = "s3cr3t-of-a-test"
DECLARATION = """\
autostart = false
kernel = "{image}/vmlinuz"
initrd = "{image}/initrd"
mem = 256
kernelParams = [
    "quiet", "loglevel=3", "guest.name={vm}",
    "guest.mount=cidata,vfat,CIDATA", "guest.credentials=1",
]
{more}
"""


def declare(toolkit: Toolkit, vm: str, more: str) -> None:
    toolkit.sh("mkdir -p /etc/microvms /etc/secrets && chmod 700 /etc/secrets")
    toolkit.host.write(
        f"/etc/microvms/{vm}.toml", DECLARATION.format(vm=vm, image=IMAGE, more=more)
    )


def boot(toolkit: Toolkit, vm: str) -> list[str]:
    """Start it, and give what the guest said."""
    toolkit.systemctl("start", f"microvm@{vm}", timeout=120)
    lines = toolkit.await_line(vm, f"GUEST {vm}: ready", timeout=180)
    return [line.partition(": ")[2] for line in lines if line.startswith(f"GUEST {vm}: ")]


def places_of(toolkit: Toolkit, text: str) -> list[str]:
    """The files of the host that hold a text, and processes whose command line does."""
    # Not on the command line of who looks.
    toolkit.host.write("/root/pattern", text)
    found = toolkit.sh(
        "grep -rlaF -f /root/pattern /etc /run /var /proc/[0-9]*/cmdline 2>/dev/null",
        check=False,
    )
    # The test's guest shows what it has on its console.
    return sorted(place for place in found.split() if "/journal/" not in place)


@pytest.mark.core
def test_secrets_of_files(toolkit: Toolkit, vm: str) -> None:
    declare(
        toolkit,
        vm,
        'credentialFiles.KEY = "/etc/secrets/key"\n'
        '[cloudInit]\nhostname = "shop"\nuserData = "/etc/secrets/user-data"\n'
        'networkConfig = "/etc/secrets/network-config"',
    )
    for name, text in (
        ("key", f"{SECRET}-key"),
        ("user-data", f"#cloud-config\npassword: {SECRET}-password\n"),
        ("network-config", "version: 2\nethernets: {}\n"),
    ):
        toolkit.host.write(f"/etc/secrets/{name}", text)
    toolkit.sh("chmod 600 /etc/secrets/*")
    before = toolkit.footprint()
    toolkit.sh("microvm apply")
    # Installed, nothing has been read.
    assert places_of(toolkit, SECRET) == ["/etc/secrets/key", "/etc/secrets/user-data"]
    said = boot(toolkit, vm)
    assert f"credential KEY: {SECRET}-key" in said
    assert "disk cidata label CIDATA is of /dev/vda, and the disk vda" in said
    assert f"disk cidata file user-data: password: {SECRET}-password" in said
    assert "disk cidata file network-config: version: 2" in said
    meta = [line for line in said if line.startswith("disk cidata file meta-data: ")]
    text = "".join(line.removeprefix("disk cidata file meta-data: ") for line in meta)
    assert json.loads(text) == {"instance-id": f"iid-{vm}", "local-hostname": "shop"}
    assert any("serial cidata" in line and " ro 1 " in line for line in said)
    # Where they are while it runs: below /run, and on the disk for the guest; the user's alone.
    private, image = f"/run/microvm-host-private/{vm}", f"/var/lib/microvms/{vm}/cloud-init.img"
    assert places_of(toolkit, SECRET) == sorted(
        [
            *("/etc/secrets/key", "/etc/secrets/user-data"),
            *(f"{private}/credential.KEY", f"{private}/cloud-init.user-data", image),
        ]
    )
    modes = toolkit.sh(f"stat -c '%U %a %n' {private} {private}/* {image}").splitlines()
    assert modes == [
        f"root 711 {private}",
        f"microvm 400 {private}/cloud-init.network-config",
        f"microvm 400 {private}/cloud-init.user-data",
        f"microvm 400 {private}/credential.KEY",
        f"microvm 600 {image}",
    ]
    for command in (f"ls {private}", f"rm -f {private}/credential.KEY"):
        assert toolkit.host.run(["sh", "-c", command], user="microvm", check=False).returncode
    digest = toolkit.sh(f"sha256sum {image}")
    toolkit.systemctl("stop", f"microvm@{vm}", timeout=120)
    toolkit.await_footprint(before)
    # Gone with the VM, whatever way it ended.
    kept = ["/etc/secrets/key", "/etc/secrets/user-data"]
    assert places_of(toolkit, SECRET) == kept
    assert not toolkit.host.exists(image)
    # The same again, byte for byte.
    toolkit.systemctl("start", f"microvm@{vm}", timeout=120)
    eventually(
        # Its VM makes it after systemd has called it started.
        lambda: toolkit.sh(f"sha256sum {image}", check=False),
        lambda found: found == digest,
        60,
        "the seed is another one",
    )
    toolkit.sh(f"systemctl kill -s KILL microvm@{vm}; systemctl stop microvm@{vm}")
    toolkit.systemctl("reset-failed", f"microvm*{vm}*", check=False)
    # By units that end after it; the last that they do is to take the link away. QEMU's sockets
    # stay, which it was killed over.
    eventually(
        lambda: toolkit.sh(f"ls -A /var/lib/microvms/{vm}", check=False),
        lambda listed: "booted" not in listed.split(),
        60,
        "it was not undone",
    )
    assert places_of(toolkit, SECRET) == kept
    toolkit.sh(f"rm /etc/microvms/{vm}.toml; microvm remove -y {vm}")
    assert places_of(toolkit, SECRET) == kept


def test_a_seed_of_keys(toolkit: Toolkit, vm: str) -> None:
    declare(
        toolkit,
        vm,
        '[cloudInit]\nsshAuthorizedKeys = ["ssh-ed25519 AAAA one"]\n[[cloudInit.users]]\n'
        'name = "alice"\nsudo = "ALL=(ALL) NOPASSWD:ALL"\n'
        'sshAuthorizedKeys = ["ssh-ed25519 BBBB two"]',
    )
    toolkit.sh("microvm apply")
    said = boot(toolkit, vm)
    prefix = "disk cidata file user-data: "
    lines = [line.removeprefix(prefix) for line in said if line.startswith(prefix)]
    assert lines[0] == "#cloud-config"
    assert json.loads("".join(lines[1:])) == {
        "ssh_authorized_keys": ["ssh-ed25519 AAAA one"],
        "users": [
            "default",
            {
                "name": "alice",
                "sudo": "ALL=(ALL) NOPASSWD:ALL",
                "ssh_authorized_keys": ["ssh-ed25519 BBBB two"],
            },
        ],
    }
    # Nothing is handed over, and so nothing noted.
    assert not toolkit.host.exists(f"/run/microvm-host-private/{vm}")
    assert not toolkit.host.exists(f"/run/microvm-host/{vm}/private-files")


def test_root_reads_nothing_that_the_user_chose(toolkit: Toolkit, vm: str) -> None:
    declare(toolkit, vm, f'credentialFiles.KEY = "/var/lib/microvms/{vm}/key"')
    toolkit.sh("microvm apply")
    toolkit.host.run(["ln", "-s", "/etc/shadow", f"/var/lib/microvms/{vm}/key"], user="microvm")
    before = toolkit.footprint()
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert any(
        "user 'microvm', which runs this VM, can replace this" in line
        for line in toolkit.journal(vm)
    )
    toolkit.systemctl("reset-failed", f"microvm*{vm}*", check=False)
    toolkit.await_footprint(before)
    # And what is not there is named.
    declare(toolkit, vm, 'credentialFiles.KEY = "/etc/secrets/none"')
    toolkit.sh("microvm apply")
    assert toolkit.host.run(["systemctl", "start", f"microvm@{vm}"], check=False).returncode
    assert any(
        "/etc/secrets/none: cannot be handed to microvm" in line for line in toolkit.journal(vm)
    )
    toolkit.systemctl("reset-failed", f"microvm*{vm}*", check=False)
    toolkit.await_footprint(before)
