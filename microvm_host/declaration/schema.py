# SPDX-License-Identifier: MIT
"""The keys by which a declaration says what its guest is like: one table for all who ask.

Names, meaning and defaults are those of microvm.nix's options (`microvm.NAME` there), wherever it
has the option; what is an addition says so. The checks, the JSON Schema for editors and the test
of the manual page all read this table.
"""

from __future__ import annotations

from os.path import normpath

from .. import names
from ..errors import NameInvalid
from .document import IDENTITIES
from .kinds import REQUIRED, Choice, Key, List, Map, Number, Table, Text, Truth

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HYPERVISORS = (
    *("qemu", "cloud-hypervisor", "firecracker", "crosvm", "kvmtool", "stratovirt", "alioth"),
)
# Hypervisors that have a table of their own, as with microvm.nix; QEMU's has more in it.
OWN_TABLES = ("cloud-hypervisor", "crosvm", "firecracker")
_PORT = Number(1, 65535)
# More than any host has, in MB.
_MEMORY_MAX = 16 * 1024 * 1024


def _absolute(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("is not an absolute path; it begins with /")
    return text


def _inner(text: str) -> str:
    """A path of a file that the VM's user makes: in the state directory, or given whole."""
    if ".." in text.split("/") or text.endswith("/"):
        raise ValueError("is not a path of a file below the state directory, nor an absolute one")
    return text


def _socket(text: str) -> str:
    if normpath(_inner(text)) != text:
        raise ValueError("is not a path in its shortest form")
    return text


def _word(text: str) -> str:
    if " " in text:
        raise ValueError("holds a space")
    return text


def _serial(text: str) -> str:
    # virtio 1.2, 5.2.6: the serial number is a field of 20 bytes.
    if len(text.encode()) > 20:
        raise ValueError("is longer than 20 bytes")
    return text


def _label(text: str) -> str:
    if text.startswith("-"):
        raise ValueError("begins with a '-'")
    return text


def _ipv4(text: str) -> str:
    parts = text.split(".")
    if len(parts) != 4 or not all(
        part.isascii() and part.isdigit() and len(part) <= 3 and int(part) <= 255 for part in parts
    ):
        raise ValueError("is not an IPv4 address")
    return text


def _credential(text: str) -> str:
    # systemd.exec(5): a credential's name is that of a file; QEMU ends it at a comma or `=`.
    if not text.replace("-", "").replace("_", "").replace(".", "").isalnum() or not text.isascii():
        raise NameInvalid(
            f"{text!r} cannot be the name of a credential",
            hint="letters, digits, '-', '_' and '.' can",
        )
    return text


def _host_name(text: str) -> str:
    # hostname(7); dots part the names of a domain.
    if not names.is_host_name(text):
        raise NameInvalid(
            f"{text!r} cannot be a host name",
            hint="letters, digits and '-' can, in parts of at most 63 that neither begin nor end "
            "with '-'",
        )
    return text


def _ssh_key(text: str) -> str:
    # sshd(8), AUTHORIZED_KEYS FILE FORMAT: options, type, key, comment.
    kinds = ("ssh-", "ecdsa-", "sk-ssh-", "sk-ecdsa-")
    if not any(word.startswith(kinds) for word in text.split(" ")[:-1]):
        raise NameInvalid(
            f"{text[:40]!r} is not the line of an ssh public key",
            hint="it looks like ssh-ed25519 AAAAC3… alice@example.org",
        )
    return text


def _machine_option(text: str) -> str:
    if not text.replace("-", "").replace("_", "").isalnum() or not text.isascii():
        raise NameInvalid(f"{text!r} is not a name of a machine option")
    return text


# What the host says to virtiofsd itself; docs/runner-package.md has the same.
RESERVED_ARGUMENTS = (
    *("--fd", "--socket-path", "--socket-group", "--shared-dir", "--readonly"),
    *("--print-capabilities", "--daemonize"),
)


def _virtiofsd_argument(text: str) -> str:
    if text.split("=", 1)[0] in RESERVED_ARGUMENTS:
        raise ValueError("is the host's to give; source, socket and readOnly are keys")
    return text


_PATH = Text(_absolute, "^/")
_INTERFACE = Text(names.interface_name, "^[^/ :%]{1,15}$")

_VOLUME = Table(
    {
        "image": Key(
            Text(_inner),
            REQUIRED,
            "The image: a file below the VM's state directory, or by an absolute path; a block "
            "device below /dev; or rbd:POOL/NAME.",
        ),
        "size": Key(
            Number(1, 1 << 40), None, "Size in MiB of an image that is made on the first start."
        ),
        "autoCreate": Key(
            Truth(), True, "Whether an image that is not there is made. Devices never are."
        ),
        "fsType": Key(
            Text(_word),
            "ext4",
            "File system of an image that is made: ext4, xfs, btrfs or vfat; additions are erofs, "
            "with a source, and none, which leaves it empty.",
        ),
        "source": Key(
            _PATH,
            None,
            "An addition: a directory of the host, or a tar archive of one, that the image is "
            "made of, once; for ext4 and erofs.",
        ),
        "label": Key(Text(_label), None, "Label of that file system."),
        "mkfsExtraArgs": Key(List(Text()), (), "Further arguments for the mkfs that makes it."),
        "imageType": Key(
            Choice("raw", "qcow2", "vhd", "vhdx"),
            "raw",
            "Format of the image. Those that are raw or qcow2 are made by themselves.",
        ),
        "readOnly": Key(Truth(), False, "Whether the guest may only read it."),
        "direct": Key(Truth(), False, "Whether the host's page cache is passed by (O_DIRECT)."),
        "serial": Key(
            Text(_serial), None, "Serial number, by which the guest has it in /dev/disk/by-id."
        ),
    }
)
_NIC = Table(
    {
        "type": Key(
            Choice("tap", "macvtap", "bridge", "user"),
            REQUIRED,
            "tap and macvtap are made by the host; bridge is a tap that is joined to `bridge`; "
            "user is QEMU's own network, which needs nothing of the host.",
        ),
        "id": Key(_INTERFACE, REQUIRED, "Name of the interface on the host."),
        "mac": Key(
            Text(names.mac_address, "^[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}$"),
            None,
            "MAC address that the guest sees; by default one that is made of the names of VM and "
            "interface and of the host's machine-id(5), and stays.",
        ),
        "bridge": Key(
            _INTERFACE, None, "The host's bridge that the tap is joined to; also for type tap."
        ),
        "mtu": Key(
            Number(names.MTU_MIN, names.MTU_MAX),
            None,
            "An addition. MTU of the interface, up to that of its bridge or of what a macvtap is "
            "on; by default the host's side has that one, or 1500. QEMU, cloud-hypervisor and "
            "alioth tell the guest; in others it is set by hand.",
        ),
        "macvtap": Key(
            Table(
                {
                    "link": Key(_INTERFACE, None, "The host's interface that a macvtap is on."),
                    "mode": Key(
                        Choice(*names.MACVTAP_MODES), "bridge", "The macvtap's mode (ip-link(8))."
                    ),
                }
            ),
            None,
            "For type macvtap.",
        ),
        "tap": Key(
            Table(
                {
                    "vhost": Key(
                        Truth(),
                        None,
                        "Whether the host's kernel carries the packets (vhost-net); by default, "
                        "where QEMU runs by KVM and the VM's user may open /dev/vhost-net.",
                    )
                }
            ),
            None,
            "For types tap and bridge.",
        ),
    }
)
_END = {
    "address": Key(Text(_ipv4, may_be_empty=True), "", "IPv4 address; empty is QEMU's default."),
    "port": Key(_PORT, REQUIRED, "The port."),
}
_FORWARD = Table(
    {
        "from": Key(
            Choice("host", "guest"),
            "host",
            "host: what connects to the host's port reaches the guest's; guest: the other way.",
        ),
        "proto": Key(Choice("tcp", "udp"), "tcp", "The protocol."),
        "host": Key(Table(_END), REQUIRED, "The end on the host."),
        "guest": Key(Table(_END), REQUIRED, "The end in the guest's network."),
    }
)
_SHARE = Table(
    {
        "tag": Key(
            Text(names.share_tag), REQUIRED, "What the guest mounts it by; it may nest by /."
        ),
        "source": Key(
            Text(), REQUIRED, "The host's directory; a relative one is below the state directory."
        ),
        "proto": Key(Choice("9p", "virtiofs"), "9p", "The protocol."),
        "readOnly": Key(Truth(), False, "Whether the guest may only read it."),
        "cache": Key(
            Choice("auto", "always", "never", "metadata"),
            "auto",
            "virtiofs: what the guest may keep of it.",
        ),
        "posixAcl": Key(Truth(), True, "virtiofs: whether POSIX ACLs work."),
        "socket": Key(
            Text(_socket),
            None,
            "virtiofs: the socket between hypervisor and virtiofsd; by default "
            "NAME-virtiofs-TAG.sock, or a digest of these where they are too long.",
        ),
        "extraArgs": Key(
            List(Text(_virtiofsd_argument)), (), "virtiofs: further arguments for virtiofsd."
        ),
        "securityModel": Key(
            Choice("none", "passthrough", "mapped", "mapped-file"),
            "none",
            "9p: how owners and modes are kept (qemu(1), -fsdev local).",
        ),
    }
)
SSH_KEY = Text(_ssh_key)
_SSH_KEYS = List(SSH_KEY)
_CLOUD_USER = Table(
    {
        "name": Key(
            Text(names.guest_user_name),
            REQUIRED,
            "Name of a user that cloud-init makes; to have the image's own default user as well, "
            "give sshAuthorizedKeys beside users.",
        ),
        "gecos": Key(Text(), None, "Their real name."),
        "groups": Key(List(Text(names.guest_user_name)), (), "Further groups of theirs."),
        "shell": Key(_PATH, None, "Their shell."),
        "sudo": Key(
            Text(), None, "What they may do by sudo, as sudoers(5) has it: ALL=(ALL) NOPASSWD:ALL."
        ),
        "sshAuthorizedKeys": Key(_SSH_KEYS, (), "ssh public keys that let them in."),
    }
)
_CLOUD_INIT = Table(
    {
        "hostname": Key(
            Text(_host_name),
            None,
            "The guest's host name (local-hostname of the meta-data); by default the VM's name.",
        ),
        "instanceId": Key(
            Text(_word),
            None,
            "What cloud-init knows this machine by: with another one, it sets up all anew; by "
            "default one that is made of the VM's name, and stays.",
        ),
        "sshAuthorizedKeys": Key(
            _SSH_KEYS, (), "ssh public keys that let in the image's default user."
        ),
        "users": Key(List(_CLOUD_USER), (), "Users that cloud-init makes."),
        "userData": Key(
            _PATH,
            None,
            "File of the host with the whole user-data, in place of sshAuthorizedKeys and users.",
        ),
        "metaData": Key(
            _PATH,
            None,
            "File of the host with the whole meta-data, in place of hostname and instanceId.",
        ),
        "networkConfig": Key(_PATH, None, "File of the host with the network configuration."),
        "vendorData": Key(
            _PATH, None, "File of the host with vendor-data, which user-data is laid over."
        ),
    }
)
_DEVICE = Table(
    {
        "bus": Key(Choice("pci", "usb"), REQUIRED, "Which bus of the host it is on."),
        "path": Key(
            Text(_word),
            REQUIRED,
            "pci: its address, 0000:01:00.0; usb: QEMU's words for it, "
            "vendorid=0xabcd,productid=0x0123.",
        ),
        "qemu": Key(
            Table(
                {
                    "id": Key(Text(_word), None, "QEMU's name for it."),
                    "bus": Key(Text(_word), None, "QEMU's bus that it is put on."),
                    "deviceExtraArgs": Key(Text(_word), None, "Further options of -device."),
                }
            ),
            None,
            "For QEMU.",
        ),
    }
)

GUEST = Table(
    {
        "hypervisor": Key(Choice(*HYPERVISORS), "qemu", "What runs the VM."),
        "kernel": Key(
            _PATH, REQUIRED, "The guest's kernel, by an absolute path; the package has a copy."
        ),
        "initrd": Key(_PATH, None, "Its initial RAM disk; the package has a copy."),
        "kernelParams": Key(
            List(Text()), (), "Words of the kernel's command line, after the builder's own."
        ),
        "vcpu": Key(Number(1, 1024), 1, "Number of virtual CPUs."),
        "mem": Key(
            Number(1, _MEMORY_MAX),
            512,
            "Memory in MB. QEMU's machine microvm boots no initrd with 2048, and gives 2047.",
        ),
        "balloon": Key(
            Truth(), False, "Whether memory can be taken back from the guest while it runs."
        ),
        "deflateOnOOM": Key(
            Truth(), True, "Whether a guest that runs out of memory is given back what was taken."
        ),
        "initialBalloonMem": Key(
            Number(0, _MEMORY_MAX),
            0,
            "Memory in MB that is taken at the start, with cloud-hypervisor and firecracker.",
        ),
        "hotplugMem": Key(
            Number(0, _MEMORY_MAX),
            0,
            "Memory in MB that can be added while the VM runs, at most (virtio-mem).",
        ),
        "hotpluggedMem": Key(
            Number(0, _MEMORY_MAX), None, "How much of that there is at the start; by default all."
        ),
        "cpu": Key(
            Text(_word),
            None,
            "Model of the CPU, as QEMU's -cpu has it; by default the host's own with KVM.",
        ),
        "volumes": Key(List(_VOLUME), (), "Disks."),
        "interfaces": Key(List(_NIC), (), "Network interfaces."),
        "forwardPorts": Key(
            List(_FORWARD), (), "Ports that are forwarded by an interface of type user."
        ),
        "shares": Key(List(_SHARE), (), "Directories of the host that the guest can mount."),
        "devices": Key(List(_DEVICE), (), "Devices of the host that are passed through."),
        "vsock": Key(
            Table(
                {
                    "cid": Key(
                        Number(3, 0xFFFFFFFE),
                        None,
                        "The guest's address; by default, if there is a table vsock, one that is "
                        "made of the VM's name, and stays.",
                    )
                }
            ),
            None,
            "Sockets between host and guest, for microvm ssh and readiness.",
        ),
        "readiness": Key(
            Choice("exec", "guest"),
            "exec",
            "An addition. guest: the VM counts as started when the guest's systemd says so, over "
            "vsock.",
        ),
        "socket": Key(
            Text(_socket, may_be_empty=True),
            None,
            "Control socket of the hypervisor, below the state directory; by default NAME.sock. "
            "Empty for none; there is no microvm-shutdown and no microvm-balloon then.",
        ),
        "machineId": Key(
            Text(names.machine_uuid),
            None,
            "UUID of the machine; by default one that is made of the VM's name and the host's "
            "machine-id(5), and stays.",
        ),
        "registerWithMachined": Key(
            Truth(), False, "Whether systemd-machined of the host knows the VM."
        ),
        "credentialFiles": Key(
            Map(Text(_credential), _PATH),
            (),
            "Files of the host whose contents the guest's systemd has as credentials, by name. "
            "Root reads them when the VM starts; they may be root's alone.",
        ),
        "cloudInit": Key(
            _CLOUD_INIT,
            None,
            "If there is such a table, the guest has a seed for cloud-init: a read-only disk "
            "labelled CIDATA (NoCloud), made when the VM starts. Its files are read by root "
            "then, and may be root's alone.",
        ),
        "qemu": Key(
            Table(
                {
                    "machine": Key(
                        Choice("microvm", "q35"),
                        None,
                        "The machine; by default microvm, and q35 with PCI devices or hotplugMem.",
                    ),
                    "machineOpts": Key(
                        Map(Text(_machine_option), Text(_word)),
                        (),
                        "Options of -M, laid over the builder's own: pcie = \"off\" is microvm's "
                        "MMIO.",
                    ),
                    "extraArgs": Key(List(Text()), (), "Further arguments for QEMU."),
                    "serialConsole": Key(
                        Truth(), True, "Whether the guest's console is the VM's output."
                    ),
                    "guestAgent": Key(
                        Truth(),
                        False,
                        "Whether there is a port for qemu-guest-agent, by which microvm exec runs "
                        "commands.",
                    ),
                }
            ),
            None,
            "For QEMU.",
        ),
        "cloud-hypervisor": Key(
            Table(
                {
                    "extraArgs": Key(List(Text()), (), "Further arguments for cloud-hypervisor."),
                    "platformOEMStrings": Key(
                        List(Text()), (), "OEM strings of SMBIOS, which the guest can read."
                    ),
                }
            ),
            None,
            "For cloud-hypervisor.",
        ),
        "crosvm": Key(
            Table({"extraArgs": Key(List(Text()), (), "Further arguments for crosvm run.")}),
            None,
            "For crosvm.",
        ),
        "firecracker": Key(
            Table({"extraArgs": Key(List(Text()), (), "Further arguments for firecracker.")}),
            None,
            "For firecracker.",
        ),
    }
)


# The host's own keys, for editors; what they mean is checked where they are read.
_TIME = {"type": ["number", "string"]}
_HOST: dict[str, dict[str, Any]] = {
    "runner": {"type": "string", "pattern": "^/", "description": "The runner package."},
    "flake": {"type": "string", "description": "A flake that gives the package."},
    "autostart": {"type": "boolean", "default": True, "description": "Start it at boot."},
    "restart_if_changed": {
        "type": "boolean",
        "default": True,
        "description": "Whether `microvm apply` restarts it if it runs another package.",
    },
    "user": {"type": "string", "description": "Whom it runs as; `auto` makes a user of its own."},
    "allow_host_devices": {
        "type": "array",
        "items": {"type": "string"},
        "description": "PCI devices that it may have although the host uses them.",
    },
    "order": {
        "type": "integer",
        "minimum": 0,
        "maximum": 1000000,
        "description": "VMs of a lower order start before it and stop after it.",
    },
    "restart": {
        "enum": ["always", "on-failure", "never"],
        "default": "always",
        "description": "What it is started again after.",
    },
    "restart_delay": {**_TIME, "description": "How long a start again waits."},
    "restart_limit": {
        "type": "integer",
        "minimum": 0,
        "maximum": 1000000,
        "default": 10,
        "description": "How often in a row it is started again; 0 is for ever.",
    },
    "shutdown_timeout": {**_TIME, "description": "How long the guest has for shutting down."},
    "ask_again_after": {
        **_TIME,
        "description": "How long it is waited for before it is asked anew.",
    },
    "terminate_timeout": {**_TIME, "description": "How long the hypervisor has for ending."},
}


def json_schema() -> dict[str, Any]:
    """The schema of a declaration, for editors, be it the file itself or a drop-in.

    A drop-in has the keys that it adds or changes, so that none is required here but what tells
    which element of a list it changes.
    """
    guest = GUEST.schema()["properties"]
    for name, described in guest.items():
        of = described.get("items", described)
        of.pop("required", None)
        if name in IDENTITIES:
            of["required"] = [IDENTITIES[name]]
    return {
        "$comment": "SPDX-License-Identifier: MIT",
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Declaration of a microVM, microvm.toml(5)",
        "type": "object",
        "properties": {**_HOST, **guest},
        "additionalProperties": False,
    }
