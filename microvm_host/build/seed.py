# SPDX-License-Identifier: MIT
"""A seed for cloud-init: a small read-only disk labelled CIDATA, cloud-init's source NoCloud.

What stands in the declaration is not secret and lies in the package as finished files. What stands
in files of the host may be (user-data holds password hashes): the package has but their paths, and
root hands the files themselves to the VM's user at each start (`share/microvm/private-files`). Of
both the package's script makes the disk, as that user, in the state directory, from where root
removes it when the VM is down (`share/microvm/temporary-files`).

The disk is a FAT, which cloud-init reads as it does an ISO: mkfs.vfat and mcopy need no root, hosts
and guests have FAT for their EFI partitions, and with a date and a serial number given the same
files make the same bytes.
"""

from __future__ import annotations

import json
from shlex import quote

from ..declaration.guest import Volume
from ..paths import private_file
from .refused import Refused
from .shell import PACKAGE_VARIABLE, quoted, word
from .tools import SEED_FS
from .tree import File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..declaration.guest import CloudInit, Guest
    from .tools import Tools

IMAGE = "cloud-init.img"
PLACE = "lib/cloud-init"
# Four files of at most 1 MiB each, and what FAT takes for itself; sparse.
_SIZE = "6M"
# FAT's first moment, 1980-01-01: of the files, and for mkfs.vfat.
_DATE = 315532800
# How user-data and vendor-data begin (INCLUSION_TYPES_MAP of cloudinit/handlers/__init__.py), in
# lower case; or compressed, by gzip.
_KINDS = (
    *(b"#cloud-config", b"#!", b"#include", b"#cloud-boothook", b"#part-handler"),
    *(b"#upstart-job", b"## template: jinja", b"\x1f\x8b"),
)
_MIME = (b"content-", b"mime-version:", b"from ", b"from:", b"received:", b"subject:", b"to:")
_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
# What a guest asks for has to be told apart from what else is handed over.
_PREFIX = "cloud-init."


def volumes(guest: Guest) -> tuple[Volume, ...]:
    """The disk as one of the guest's, to come after its own; none for a guest without a seed."""
    if guest.cloud_init is None:
        return ()
    # It is found by its label; only some hypervisors have serial numbers.
    serial = "cidata" if guest.hypervisor == "qemu" else None
    return (Volume(image=IMAGE, auto_create=False, read_only=True, serial=serial),)


def disks(guest: Guest) -> tuple[Volume, ...]:
    """All disks that the guest has, its volumes first."""
    return (*guest.volumes, *volumes(guest))


def private_files(guest: Guest) -> tuple[tuple[str, str], ...]:
    """What of the host's files goes into it: names for the hand-over, and paths."""
    cloud = guest.cloud_init
    return tuple((f"{_PREFIX}{name}", path) for name, path in _sources(cloud)) if cloud else ()


def files(guest: Guest) -> dict[str, File]:
    """What of the package's files goes into it, by their paths there."""
    cloud = guest.cloud_init
    if cloud is None:
        return {}
    found = {}
    if cloud.meta_data is None:
        found[f"{PLACE}/meta-data"] = _json(
            {"instance-id": cloud.instance_id, "local-hostname": cloud.hostname}
        )
    if cloud.user_data is None:
        found[f"{PLACE}/user-data"] = _json(_user_data(cloud), "#cloud-config\n")
    return found


def _check_kinds(cloud: CloudInit, tools: Tools) -> None:
    """Refuse a file that cloud-init would pass over, but for a warning in the guest."""
    heads = dict(tools.heads)
    for key, path in cloud.kinds.items():
        # Not shown: it may be secret.
        head = heads.get(path, b"").lstrip().lower()
        if head.startswith(_BYTE_ORDER_MARKS):
            raise Refused(
                ("cloudInit", key),
                f"cloudInit.{key} = {path!r} begins with a byte order mark, with which cloud-init "
                "does not know its first line",
                "save it as UTF-8 without one",
            )
        if head and not head.startswith((*_KINDS, *_MIME)):
            raise Refused(
                ("cloudInit", key),
                f"cloudInit.{key} = {path!r} does not say in its first line what it is, and "
                "cloud-init would pass over it",
                'begin it with "#cloud-config", or with "#!" if it is a script',
            )


def creation(guest: Guest, tools: Tools) -> str:
    """The lines of the script that make the disk; raises Refused."""
    cloud = guest.cloud_init
    if cloud is None:
        return ""
    _check_kinds(cloud, tools)
    mkfs, mcopy = dict(tools.mkfs).get(SEED_FS), tools.mcopy
    for program, package, path in (("mkfs.vfat", "dosfstools", mkfs), ("mcopy", "mtools", mcopy)):
        if path is None:
            raise Refused(
                ("cloudInit",),
                f"cloudInit: this host has no {program}, by which the seed is made",
                f"install it (on Debian: {package})",
            )
    sources = [
        (quoted(word(PACKAGE_VARIABLE, f"/{path}")), path.rpartition("/")[2])
        for path in files(guest)
    ]
    sources += [
        (quote(private_file(guest.name, f"{_PREFIX}{name}")), name) for name, _ in _sources(cloud)
    ]
    return "\n".join(
        [
            "# cloud-init's seed, at each start: the files of the host may be others by now.",
            f"rm -f {IMAGE}",
            f"truncate -s {_SIZE} {IMAGE}",
            f"export SOURCE_DATE_EPOCH={_DATE}",
            f"{mkfs} --invariant -n CIDATA {IMAGE} >/dev/null",
            *(f"{mcopy} -i {IMAGE} {source} ::{name}" for source, name in sources),
            "unset SOURCE_DATE_EPOCH",
        ]
    )


def _sources(cloud: CloudInit) -> list[tuple[str, str]]:
    named = (
        ("meta-data", cloud.meta_data),
        ("user-data", cloud.user_data),
        ("network-config", cloud.network_config),
        ("vendor-data", cloud.vendor_data),
    )
    return [(name, path) for name, path in named if path is not None]


def _user_data(cloud: CloudInit) -> dict[str, Any]:
    """What cloud-init's modules take (their names of keys)."""
    found: dict[str, Any] = {}
    if cloud.ssh_authorized_keys:
        found["ssh_authorized_keys"] = list(cloud.ssh_authorized_keys)
    if cloud.users:
        # The keys above are the default user's, which a list of users leaves out unless named.
        found["users"] = ["default"] if cloud.ssh_authorized_keys else []
    for user in cloud.users:
        given = {
            "name": user.name,
            "gecos": user.gecos,
            "groups": list(user.groups),
            "shell": user.shell,
            "sudo": user.sudo,
            "ssh_authorized_keys": list(user.ssh_authorized_keys),
        }
        found["users"].append({key: value for key, value in given.items() if value})
    return found


def _json(value: dict[str, Any], head: str = "") -> File:
    # Which is YAML, too.
    return File(f"{head}{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode())
