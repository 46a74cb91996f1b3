# SPDX-License-Identifier: MIT
"""Packages for firecracker (src/firecracker/swagger/firecracker.yaml and docs/ of its sources).

What the guest is like stands in a file of the package, which cannot name files of the package by
their paths: kernel and initrd are given open.
"""

from __future__ import annotations

import json

from ..paths import MICROVM_BALLOON, MICROVM_RUN, MICROVM_SHUTDOWN, OPENED
from . import command_line, inside, kernels, limits, once, payload, programs, scripts, seed, shell
from .facts import OWN_NOTIFY_SOCKET, OWN_VSOCK, facts, notify_word
from .refused import Refused
from .shell import PACKAGE_VARIABLE, word
from .tools import hypervisor
from .tree import File, Tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..declaration.guest import Guest
    from .shell import Words
    from .tools import Tools

_CANNOT: limits.Cannot = {
    **limits.NOT_QEMU,
    **limits.NO_SHARES,
    **limits.NO_MACVTAP,
    **limits.NO_VHOST,
    **limits.NO_HOTPLUG,
    **limits.NO_PCI,
    **limits.RAW_ONLY,
    **limits.NO_SERIAL,
    **limits.NO_DIRECT,
}
_CONFIGURATION = "lib/firecracker.json"
_VCPU_MAX = 32
# Devices on PCI instead of MMIO, as microvm.nix has it wherever it can be had.
_PCI_SINCE = (1, 13)
# Descriptors of the shell for the kernel and the initrd.
_KERNEL, _INITRD = 3, 4
# A keyboard that is found without a search, for Ctrl-Alt-Del; and a reset by it, which is the way
# in which a guest ends firecracker.
_CONSOLE = (
    *("console=ttyS0,115200", "reboot=k", "panic=1"),
    *("i8042.noaux", "i8042.nomux", "i8042.nopnp", "i8042.dumbkbd"),
)


def build(guest: Guest, tools: Tools) -> Tree:
    """The package; raises Refused."""
    path = hypervisor(guest, tools)
    limits.check(guest, _CANNOT)
    kernels.check(guest, tools, kernels.ELF)
    if guest.vcpu > _VCPU_MAX:
        raise Refused(
            ("vcpu",), f"vcpu = {guest.vcpu} is more than firecracker's {_VCPU_MAX} virtual CPUs"
        )
    # It serves several clients at a time: the package's scripts and the host have the same.
    socket = guest.socket or inside.control(guest)
    entries = facts(
        guest, tools, multi_queue=False, control=(socket, "firecracker"), has_own_vsock=True
    )
    entries |= payload.files(guest, tools)
    text = json.dumps(_configuration(guest, tools), indent=2, ensure_ascii=False)
    entries[_CONFIGURATION] = File(f"{text}\n".encode())
    vsock = [OWN_VSOCK] if guest.vsock_cid is not None else []
    opened = [f'exec {_KERNEL}<"$package"/lib/kernel']
    opened += [f'exec {_INITRD}<"$package"/lib/initrd'] if guest.initrd is not None else []
    argv: Words = [
        *("--api-sock", socket),
        *("--config-file", word(PACKAGE_VARIABLE, f"/{_CONFIGURATION}")),
    ]
    if tools.program_version >= _PCI_SINCE:
        argv.append("--enable-pci")
    entries[MICROVM_RUN] = File(
        scripts.run(
            guest,
            tools,
            [path, *once.merged(guest, argv)],
            last=[scripts.stale(socket, *vsock), "\n".join(opened)],
        ),
        0o755,
    )
    if guest.socket is not None:
        quoted = shell.quoted(socket)
        entries["lib/api"] = File(programs.api(tools.python), 0o755)
        entries[MICROVM_SHUTDOWN] = File(
            scripts.shutdown(
                tools,
                socket,
                f'"$package"/lib/api --wait {quoted} PUT /actions '
                """'{"action_type":"SendCtrlAltDel"}'""",
                "Presses Ctrl-Alt-Del, and waits until the hypervisor has gone or the input ends.",
            ),
            0o755,
        )
        if guest.balloon:
            entries[MICROVM_BALLOON] = File(_balloon(guest, tools, quoted), 0o755)
    return Tree.of(entries)


def _configuration(guest: Guest, tools: Tools) -> dict[str, Any]:
    words = [*_CONSOLE, *guest.kernel_params]
    if guest.readiness == "guest":
        words.append(notify_word(OWN_NOTIFY_SOCKET))
    added = 0
    if tools.program_version < _PCI_SINCE:
        # Beside these: random numbers, the balloon, the vsock.
        count = len(seed.disks(guest)) + len(guest.interfaces)
        count += 1 + guest.balloon + (guest.vsock_cid is not None)
        added = len(" pci=off") + count * command_line.MMIO_DEVICE
    line = command_line.joined(guest, tools, words, added=added)
    source = {"kernel_image_path": f"{OPENED}/{_KERNEL}", "boot_args": line}
    if guest.initrd is not None:
        source["initrd_path"] = f"{OPENED}/{_INITRD}"
    found: dict[str, Any] = {
        "boot-source": source,
        "machine-config": {
            "vcpu_count": guest.vcpu,
            "mem_size_mib": guest.mem,
            # Which an odd number of them does not go with.
            "smt": guest.vcpu % 2 == 0,
        },
        "drives": [
            {
                "drive_id": f"vd{number}",
                "path_on_host": volume.image,
                "is_root_device": False,
                "is_read_only": volume.read_only,
                # By default the guest's wish to have it on the disk is not listened to.
                "cache_type": "Writeback",
            }
            for number, volume in enumerate(seed.disks(guest))
        ],
        "network-interfaces": [
            {
                "iface_id": f"net{number}",
                "host_dev_name": interface.id,
                "guest_mac": interface.mac,
            }
            for number, interface in enumerate(guest.interfaces)
        ],
        "entropy": {},
    }
    if guest.balloon:
        found["balloon"] = {
            "amount_mib": guest.initial_balloon_mem,
            "deflate_on_oom": guest.deflate_on_oom,
        }
    if guest.vsock_cid is not None:
        found["vsock"] = {"guest_cid": guest.vsock_cid, "uds_path": OWN_VSOCK}
    return found


def _balloon(guest: Guest, tools: Tools, socket: str) -> bytes:
    """It is told what it takes, in MiB."""
    return scripts.balloon(
        tools,
        f"taken=$(({guest.mem} - $1))",
        '[ "$taken" -ge 0 ] || taken=0',
        f'exec "$package"/lib/api {socket} PATCH /balloon "{{\\"amount_mib\\":$taken}}"',
    )
