# SPDX-License-Identifier: MIT
"""The declaration that `microvm init` writes: whole as it stands, and with what to change next."""

from __future__ import annotations

import json
from hashlib import sha256

from .. import names
from ..errors import NameInvalid
from ..frozen import frozen

_LONGEST_INTERFACE = 15
ROOT = "root"


@frozen
class Disk:
    """The disk that a guest boots from, made once of an archive; `size` is in MiB."""

    image: str
    size: int
    label: str
    source: str


@frozen
class Login:
    """Who may log in, besides root, and by which lines of ssh public keys."""

    user: str
    keys: tuple[str, ...]


@frozen
class Guest:
    """What is to be declared. `mem` is in MB; `bridge` None is a network without the host's help.

    `about` says what it is, a line each. A guest with a login has cloud-init in it.
    """

    name: str
    about: tuple[str, ...]
    kernel: str
    initrd: str
    kernel_params: tuple[str, ...]
    mem: int
    bridge: str | None = None
    # The guest's MAC address on that bridge.
    mac: str = ""
    disk: Disk | None = None
    login: Login | None = None
    vsock: bool = False


def declaration(guest: Guest, *, has_own_user: bool = True) -> str:
    """The text of a guest's declaration."""
    name = guest.name
    lines = [
        f"# {name}: a microVM, by `microvm init`.",
        *(f"# {line}".rstrip() for line in guest.about),
        "#",
        f"#     systemctl start microvm@{name}      starts it",
        f"#     microvm console {name}              is on its console; Ctrl-] leaves it",
        f"#     microvm update -R {name}            makes a change of this file hold",
        "#",
        "# microvm.toml(5) has all keys. Write those of the VM itself above the first line that",
        "# begins with '[': below it, they would belong to that table.",
        "",
        *(_USER if has_own_user else []),
        "# true: it starts when the host boots, and with `microvm apply`.",
        "autostart = false",
        '# "always": a guest that powers itself off is started again.',
        'restart = "on-failure"',
        "",
        *([] if guest.disk is None else _KERNEL_OF_DISK),
        f"kernel = {_quoted(guest.kernel)}",
        f"initrd = {_quoted(guest.initrd)}",
        f"kernelParams = [{', '.join(map(_quoted, guest.kernel_params))}]",
        "",
        "vcpu = 1",
        "# In MB.",
        f"mem = {guest.mem}",
        f"# `microvm balloon {name} SIZE` takes memory back while it runs.",
        "balloon = true",
        "",
        *(_VSOCK if guest.vsock else []),
        *(_NO_AGENT if guest.login is None else _AGENT),
        *_network(guest),
        "",
        *([] if guest.disk is None else _root(guest, guest.disk)),
        "# A disk, which is made empty on the first start"
        + ("; the small guest has it on /mnt/vda." if guest.disk is None else "."),
        "# [[volumes]]",
        '# image = "data.img"',
        "# size = 1024",
        "",
        f"# A directory of this host: in the guest, mount -t virtiofs {name} /mnt",
        "# [[shares]]",
        f"# tag = {_quoted(name)}",
        f"# source = {_quoted(f'/srv/{name}')}",
        '# proto = "virtiofs"',
        *([] if guest.login is None else _cloud_init(guest, guest.login)),
    ]
    return "\n".join([*lines, ""])


_USER = (
    "# The VM runs as a user of its own, microvm-NAME, who may not touch what other VMs have.",
    'user = "auto"',
    "",
)
_KERNEL_OF_DISK = (
    "# What the host boots, whatever kernels the guest's own apt installs: its modules are those",
    "# that the disk was made with.",
)
_VSOCK = (
    "# `microvm ssh` goes by this, and needs no network.",
    "vsock = {}",
    '# A start waits until the guest has booted: readiness = "guest"',
    "",
)

_NO_AGENT = (
    "# `microvm exec` needs the first and qemu-guest-agent in the guest, `microvm ssh` the second",
    "# and sshd. The small guest has neither; that of `microvm init --guest debian` has both.",
    "# qemu.guestAgent = true",
    "# vsock = {}",
    "",
)
_AGENT = (
    "# `microvm exec` goes by this, and by qemu-guest-agent, which is installed in the guest.",
    "qemu.guestAgent = true",
    "",
)


def _root(guest: Guest, disk: Disk) -> list[str]:
    return [
        "# Made of the archive when there is none yet, and the guest's own from then on. To begin",
        f"# anew: stop it, and delete /var/lib/microvms/{guest.name}/{disk.image}",
        "[[volumes]]",
        f"image = {_quoted(disk.image)}",
        "# In MiB; it takes as much of the host as is written to it.",
        f"size = {disk.size}",
        f"label = {_quoted(disk.label)}",
        f"source = {_quoted(disk.source)}",
        "",
    ]


def _cloud_init(guest: Guest, login: Login) -> list[str]:
    lines = [
        "",
        "# What cloud-init sets up at the first boot, and once: for a change of this,",
        '# instanceId = "another" has it do so again.',
        "[cloudInit]",
        f"hostname = {_quoted(host_name(guest.name))}",
    ]
    if login.user != ROOT:
        lines += [
            "",
            "[[cloudInit.users]]",
            f"name = {_quoted(login.user)}",
            'groups = ["adm", "sudo"]',
            'shell = "/bin/bash"',
            'sudo = "ALL=(ALL) NOPASSWD:ALL"',
            *_keys(login),
        ]
    lines += [
        "",
        f"# `microvm ssh {guest.name}` is root's.",
        "[[cloudInit.users]]",
        f"name = {_quoted(ROOT)}",
        *_keys(login),
    ]
    return lines


def _keys(login: Login) -> list[str]:
    if not login.keys:
        return ['# sshAuthorizedKeys = ["ssh-ed25519 AAAAC3… alice@example.org"]']
    return ["sshAuthorizedKeys = [", *(f"    {_quoted(key)}," for key in login.keys), "]"]


def host_name(vm: str) -> str:
    """A host name for a VM: its own where that can be one."""
    if names.is_host_name(vm):
        return vm
    allowed = (each if each.isascii() and each.isalnum() else "-" for each in vm)
    return "".join(allowed).strip("-") or "guest"


def _network(guest: Guest) -> list[str]:
    if guest.bridge is not None:
        return [
            f"# On the network of {guest.bridge}, where it gets an address: `microvm -l` has it.",
            "[[interfaces]]",
            'type = "tap"',
            f"id = {_quoted(interface(guest.name))}",
            f"bridge = {_quoted(guest.bridge)}",
            "# The guest keeps this address where the declaration is moved to another host.",
            f"mac = {_quoted(guest.mac)}",
        ]
    return [
        "# It reaches what this host reaches, and is reached by forwarded ports alone.",
        "# In the network of `microvm network enable` it has an address of its own, by",
        f'#     type = "tap", id = {_quoted(interface(guest.name))}, bridge = "mvbr0"',
        "[[interfaces]]",
        'type = "user"',
        'id = "net"',
        "",
        "# From 127.0.0.1:8080 of this host to port 80 of the guest.",
        "# [[forwardPorts]]",
        '# host = { address = "127.0.0.1", port = 8080 }',
        "# guest.port = 80",
    ]


def interface(vm: str) -> str:
    """A name for the tap of a VM."""
    name = f"vm-{vm}"
    try:
        return names.interface_name(name)
    except NameInvalid:
        return f"vm-{sha256(vm.encode()).hexdigest()[: _LONGEST_INTERFACE - 3]}"


def _quoted(text: str) -> str:
    # JSON's strings are TOML's, but for DEL, which no name or path of ours has.
    return json.dumps(text, ensure_ascii=False)
