# SPDX-License-Identifier: MIT
"""What to say of a key that a declaration has not: another that was meant, or what takes its place.

Options of microvm.nix are done elsewhere, then. Not one of these is silently ignored: whoever
copies an example learns where it went.
"""

from __future__ import annotations

from .nearest import nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection

_NIXOS = "it is for NixOS guests alone, whose packages `flake = …` brings in"
_MOUNTS = "the guest itself mounts it: write it into the guest's fstab, or its kernelParams"

_SOCKETS = "the host makes the share's socket and knows where it is"
_PROGRAMS = "the hypervisor is the one that the host has installed"
_TEMPLATES = "no key here gives firecracker a template of processors"

_PASSWORDS = "passwords stand in a file that is root's alone: cloudInit.userData"

_HINTS = {
    "cpus": "vcpu says how many processors there are, and cpu of which model",
    "cores": "vcpu says how many processors there are",
    # cloud-init's, which declarations, that anybody may read, have not.
    "passwd": _PASSWORDS,
    "password": _PASSWORDS,
    "hashed_passwd": _PASSWORDS,
    "hashedPasswd": _PASSWORDS,
    "plain_text_passwd": _PASSWORDS,
    "mountPoint": _MOUNTS,
    "initrdPath": 'here it is initrd = "/path/to/initrd"',
    "balloonMem": "here, as with microvm.nix since 2025, it is balloon = true",
    "preStart": "write ExecStartPre= into a drop-in: systemctl edit microvm@NAME",
    "extraArgsScript": "give the arguments in qemu.extraArgs",
    "prettyProcnames": "systemd knows the process by its unit, microvm@NAME",
    "virtiofsd": "each share has its own cache, posixAcl and extraArgs",
    "hugepageMem": "give qemu.extraArgs a memory backend of its own",
    "graphics": "no VM that runs as a service has a display; qemu.extraArgs can give it one",
    "pcieRootPorts": 'give them in qemu.extraArgs: ["-device", "pcie-root-port,id=…"]',
    "storeOverlay": _NIXOS,
    "server": _SOCKETS,
    "dax": "virtiofsd of today's distributions has none",
    "pivotRoot": "its unit confines the hypervisor already",
    "package": _PROGRAMS,
    "firecracker.cpu": _TEMPLATES,
    "driveIoEngine": "firecracker's own default, Sync, is what it is started with",
    "extraConfig": "what has no key here cannot be said to firecracker; extraArgs are for its "
    "command line",
    "optimize": _NIXOS,
    "guest": _NIXOS,
    "storeOnDisk": _NIXOS,
    "storeDiskType": _NIXOS,
    "writableStoreOverlay": _NIXOS,
    "registerClosure": _NIXOS,
    "systemSymlink": _NIXOS,
    "binScripts": _NIXOS,
    "vmHostPackages": _NIXOS,
    "declaredRunner": _NIXOS,
}


def advice(key: str, known: Collection[str], table: str = "") -> str:
    """What to write in place of a key that is not known.

    Args:
        known: the keys that the table has.
        table: the table's own name, dotted; `` for the declaration itself.
    """
    whole = f"{table}.{key}" if table else key
    if told := _HINTS.get(whole) or _HINTS.get(key):
        return told
    near = nearest(key, known)
    return f"did you mean {near}?" if near else f"known are {', '.join(known)}"
