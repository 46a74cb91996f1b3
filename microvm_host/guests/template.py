# SPDX-License-Identifier: MIT
"""The declaration that `microvm init` writes: whole as it stands, and with what to change next."""

from __future__ import annotations

import json
from hashlib import sha256

from .. import names
from ..errors import NameInvalid
from ..frozen import frozen

_LONGEST_INTERFACE = 15


@frozen
class Guest:
    """What is to be declared. `mem` is in MB; `bridge` None is a network without the host's help.

    `about` says what it is, a line each; `image` is the disk that it starts with, if it has one.
    """

    name: str
    about: tuple[str, ...]
    kernel: str
    initrd: str
    kernel_params: tuple[str, ...]
    mem: int
    bridge: str | None = None


def declaration(guest: Guest) -> str:
    """The text of a guest's declaration."""
    name = guest.name
    lines = [
        f"# {name}: a microVM, by `microvm init`.",
        *(f"# {line}" for line in guest.about),
        "#",
        f"#     systemctl start microvm@{name}      starts it",
        f"#     microvm console {name}              is on its console; Ctrl-] leaves it",
        f"#     microvm update -R {name}            makes a change of this file hold",
        "#",
        "# microvm.toml(5) has all keys.",
        "",
        "# true: it starts when the host boots, and with `microvm apply`.",
        "autostart = false",
        '# "always": a guest that powers itself off is started again.',
        'restart = "on-failure"',
        "",
        f"kernel = {_quoted(guest.kernel)}",
        f"initrd = {_quoted(guest.initrd)}",
        f"kernelParams = [{', '.join(map(_quoted, guest.kernel_params))}]",
        "",
        "vcpu = 1",
        "# In MB.",
        f"mem = {guest.mem}",
        "",
        *_network(guest),
        "",
        "# A disk, which is made empty on the first start; the small guest has it on /mnt/vda.",
        "# [[volumes]]",
        '# image = "data.img"',
        "# size = 1024",
        "",
        f"# A directory of this host: in the guest, mount -t virtiofs {name} /mnt",
        "# [[shares]]",
        f"# tag = {_quoted(name)}",
        f"# source = {_quoted(f'/srv/{name}')}",
        '# proto = "virtiofs"',
    ]
    return "\n".join([*lines, ""])


def _network(guest: Guest) -> list[str]:
    if guest.bridge is not None:
        return [
            f"# On the network of {guest.bridge}, where it gets an address: `microvm -l` has it.",
            "[[interfaces]]",
            'type = "tap"',
            f"id = {_quoted(interface(guest.name))}",
            f"bridge = {_quoted(guest.bridge)}",
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
