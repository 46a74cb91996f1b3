# SPDX-License-Identifier: MIT
"""What to say of microvm.nix's options that a declaration has not, since they are done elsewhere.

Not one of these is silently ignored: whoever copies an example learns what takes its place.
"""

from __future__ import annotations

_NIXOS = "it is for NixOS guests alone, whose packages `flake = …` brings in"
_MOUNTS = "the guest itself mounts it: write it into the guest's fstab, or its kernelParams"

_PASSWORDS = "passwords stand in a file that is root's alone: cloudInit.userData"

_HINTS = {
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


def hint(key: str) -> str:
    """What takes the place of an option of microvm.nix; `` if it is none."""
    return _HINTS.get(key, "")
