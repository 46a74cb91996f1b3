# SPDX-License-Identifier: MIT
"""The options of hypervisors that these tests cannot run, as each project documents them.

Written down from the sources that are named, in words of our own; only what packages use or might.
A package's command line is held against this by `wrong`: an option, a key or a choice that is not
here is one that the hypervisor does not know either.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ON_OFF, TRUTH, NUMBER, TEXT = "on|off", "true|false", r"\d+", r".+"
MAC = r"[0-9a-f]{2}(:[0-9a-f]{2}){5}"
MEGABYTES = r"\d+M"


@dataclass(frozen=True)
class Value:
    """An option's value; `pattern` is what all of it looks like."""

    pattern: str = TEXT


@dataclass(frozen=True)
class Keys:
    """A value of key=value with commas between.

    `first` is the pattern of a first part without a key. `kinds` are what the first part may be,
    each with its keys. `flags` are parts that are words alone. `many`: several values follow.
    """

    keys: Mapping[str, str]
    first: str | None = None
    kinds: Mapping[str, Mapping[str, str]] | None = None
    flags: tuple[str, ...] = ()
    many: bool = False


@dataclass(frozen=True)
class Syntax:
    source: str
    options: Mapping[str, Value | Keys | None]
    """None: it takes no value."""
    commands: tuple[str, ...] = ()
    """What the first word has to be."""
    last: bool = False
    """Whether a word without an option ends it: the kernel."""
    repeated: tuple[str, ...] = ()
    """Options that may be there several times; the parser takes the others once."""


CLOUD_HYPERVISOR = Syntax(
    source="--help of version 53 (cloud-hypervisor/src/main.rs, SYNTAX in vmm/src/vm_config.rs), "
    "docs/memory.md, docs/balloon.md, docs/vsock.md",
    options={
        "--api-socket": Keys({"path": TEXT}),
        "--cpus": Keys({"boot": NUMBER, "max": NUMBER}),
        "--memory": Keys(
            {
                "size": MEGABYTES,
                "mergeable": ON_OFF,
                "shared": ON_OFF,
                "hugepages": ON_OFF,
                "hotplug_method": "acpi|virtio-mem",
                "hotplug_size": MEGABYTES,
                # 0 is invalid (docs/memory.md).
                "hotplugged_size": r"[1-9]\d*M",
                "prefault": ON_OFF,
                "thp": ON_OFF,
            }
        ),
        "--platform": Keys(
            {
                "uuid": r"[0-9a-f-]{36}",
                "serial_number": TEXT,
                "oem_strings": r"\[[^][]+\]",
                "num_pci_segments": NUMBER,
            }
        ),
        "--kernel": Value(),
        "--initramfs": Value(),
        "--cmdline": Value(),
        "--serial": Value(r"off|null|pty|tty|file=.+|socket=.+"),
        "--console": Value(r"off|null|pty|tty|file=.+"),
        "--seccomp": Value("true|false|log"),
        "--watchdog": None,
        "--balloon": Keys(
            {"size": MEGABYTES, "deflate_on_oom": ON_OFF, "free_page_reporting": ON_OFF}
        ),
        "--disk": Keys(
            {
                "path": TEXT,
                "readonly": ON_OFF,
                "direct": ON_OFF,
                "serial": TEXT,
                "num_queues": NUMBER,
                "image_type": "raw|qcow2|vhd|vhdx",
            },
            many=True,
        ),
        "--net": Keys(
            {"tap": TEXT, "mac": MAC, "fd": r"\[[3-9](,[3-9])*\]", "num_queues": NUMBER},
            many=True,
        ),
        "--fs": Keys({"tag": TEXT, "socket": TEXT, "num_queues": NUMBER}, many=True),
        "--device": Keys({"path": TEXT, "iommu": ON_OFF}, many=True),
        "--vsock": Keys({"cid": NUMBER, "socket": TEXT}),
        "--pvpanic": None,
        "-v": None,
    },
    repeated=("-v",),
)

CROSVM = Syntax(
    source="`crosvm run --help` (src/crosvm/cmdline.rs), docs/book/src/devices",
    commands=("run",),
    options={
        "--socket": Value(),
        "--cpus": Value(NUMBER),
        "--mem": Value(NUMBER),
        "--serial": Keys(
            {
                "type": "stdout|syslog|sink|file",
                "hardware": "serial|virtio-console|debugcon",
                "num": "[1-4]",
                "console": TRUTH,
                "earlycon": TRUTH,
                "stdin": TRUTH,
                "path": TEXT,
            }
        ),
        "--pivot-root": Value(),
        "--params": Value(),
        "--initrd": Value(),
        "--no-balloon": None,
        "--balloon-page-reporting": None,
        "--strict-balloon": None,
        "--block": Keys(
            {
                "path": TEXT,
                "ro": TRUTH,
                "root": TRUTH,
                "sparse": TRUTH,
                "o_direct": TRUTH,
                "block_size": NUMBER,
                "id": r".{1,20}",
            }
        ),
        "--net": Keys({"tap-name": TEXT, "tap-fd": "[3-9]", "mac": MAC, "vq-pairs": NUMBER}),
        "--vhost-user-fs": Keys({"socket": TEXT, "tag": TEXT}),
        "--shared-dir": Value(r"[^:]+:[^:]+(:type=(p9|fs))?"),
        "--vfio": Keys({"iommu": "viommu|coiommu|off", "guest-address": TEXT}, first=r"/.+"),
        "--vsock": Keys({"cid": NUMBER, "device": TEXT}),
        "--disable-sandbox": None,
    },
    last=True,
    repeated=(
        *("--serial", "--params", "--block", "--net", "--vhost-user-fs", "--shared-dir", "--vfio"),
    ),
)

KVMTOOL = Syntax(
    source="`lkvm run --help` (builtin-run.c), disk/core.c, virtio/net.c, vfio/core.c",
    commands=("run",),
    options={
        "--name": Value(),
        "--cpus": Value(NUMBER),
        "--mem": Value(NUMBER),
        "--console": Value("serial|virtio|hv"),
        "--rng": None,
        "--kernel": Value(),
        "--initrd": Value(),
        "--params": Value(),
        "--balloon": None,
        "--disk": Keys({}, first=r"[./].*", flags=("ro", "direct")),
        "--9p": Value(r"[^,]+,[^,]+"),
        "--network": Keys(
            {
                "mode": "user|tap|none",
                "tapif": TEXT,
                "guest_mac": MAC,
                "host_mac": MAC,
                "vhost": "0|1",
                "fd": NUMBER,
            }
        ),
        "--vfio-pci": Value(r"([0-9a-f]{4}:)?[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]"),
        "--vsock": Value(NUMBER),
    },
    repeated=("--disk", "--9p", "--network", "--vfio-pci"),
)

_NET_DEVICE = {"id": TEXT, "netdev": TEXT, "mac": MAC, "mq": ON_OFF}
STRATOVIRT = Syntax(
    source="docs/config_guidebook.md and docs/qmp.md, for the machine microvm",
    options={
        "-name": Value(),
        "-machine": Keys({"type": "microvm|q35", "mem-share": ON_OFF, "dump-guest-core": ON_OFF}),
        "-smp": Value(NUMBER),
        "-m": Value(MEGABYTES),
        "-kernel": Value(),
        "-initrd": Value(),
        "-append": Value(),
        "-serial": Value("stdio|pty"),
        "-qmp": Value(r"unix:[^,]+,server,nowait"),
        "-object": Keys({}, kinds={"rng-random": {"id": TEXT, "filename": TEXT}}),
        "-drive": Keys(
            {
                "id": TEXT,
                "file": TEXT,
                # Others are for machines with PCI.
                "format": "raw",
                "if": "none",
                "readonly": ON_OFF,
                "direct": ON_OFF,
                "aio": "native|io_uring|off",
                "discard": "unmap|ignore",
            }
        ),
        "-chardev": Keys({}, kinds={"socket": {"id": TEXT, "path": TEXT}}),
        "-netdev": Keys(
            {},
            kinds={
                "tap": {
                    "id": TEXT,
                    "ifname": TEXT,
                    "fd": "[3-9]",
                    "fds": r"[3-9](:[3-9])*",
                    "queues": r"[1-9]|1[0-6]",
                    "vhost": ON_OFF,
                }
            },
        ),
        "-device": Keys(
            {},
            kinds={
                "virtio-rng-device": {"rng": TEXT, "id": TEXT},
                "virtio-balloon-device": {
                    "id": TEXT,
                    "deflate-on-oom": TRUTH,
                    "free-page-reporting": TRUTH,
                },
                "virtio-blk-device": {"drive": TEXT, "id": TEXT, "serial": TEXT},
                "vhost-user-fs-device": {"id": TEXT, "chardev": TEXT, "tag": TEXT},
                "virtio-net-device": _NET_DEVICE,
                "vhost-vsock-device": {"id": TEXT, "guest-cid": NUMBER},
            },
        ),
    },
    repeated=("-qmp", "-object", "-drive", "-chardev", "-netdev", "-device"),
)

_TAP = {"if_name": TEXT, "tap": TEXT, "mac": MAC, "mtu": NUMBER, "queue_pairs": NUMBER}
ALIOTH = Syntax(
    source="`alioth boot --help` (alioth-cli/src/boot; alioth/src/virtio/dev, board, mem)",
    commands=("boot",),
    options={
        "--memory": Keys({"size": MEGABYTES, "backend": "memfd"}),
        "--cpu": Keys({"count": NUMBER}),
        "--kernel": Value(),
        "--pvh": Value(),
        "--initramfs": Value(),
        "--cmdline": Value(),
        "--entropy": None,
        "--blk": Keys({}, kinds={"file": {"path": TEXT, "readonly": TRUTH}}),
        "--net": Keys({}, kinds={"tap": _TAP}),
        "--fs": Keys({}, kinds={"vu": {"socket": TEXT, "tag": TEXT}}),
        "--vsock": Keys({}, kinds={"vhost": {"cid": NUMBER}}),
    },
    repeated=("--blk", "--net", "--fs"),
)

FIRECRACKER = Syntax(
    source="`firecracker --help` (src/firecracker/src/main.rs), docs/getting-started.md",
    options={
        "--api-sock": Value(),
        "--config-file": Value(),
        "--enable-pci": None,
        "--level": Value("Off|Trace|Debug|Info|Warning|Warn|Error"),
    },
)

SYNTAXES = {
    "cloud-hypervisor": CLOUD_HYPERVISOR,
    "firecracker": FIRECRACKER,
    "crosvm": CROSVM,
    "kvmtool": KVMTOOL,
    "stratovirt": STRATOVIRT,
    "alioth": ALIOTH,
}

# firecracker's configuration file has its API's objects (src/firecracker/swagger/firecracker.yaml):
# keys with their types, and those that are required. A list is one of such objects.
FIRECRACKER_OBJECTS: dict[str, tuple[dict[str, type], tuple[str, ...]]] = {
    "boot-source": (
        {"kernel_image_path": str, "initrd_path": str, "boot_args": str},
        ("kernel_image_path",),
    ),
    "machine-config": (
        {"vcpu_count": int, "mem_size_mib": int, "smt": bool, "track_dirty_pages": bool},
        ("vcpu_count", "mem_size_mib"),
    ),
    "drives": (
        {
            "drive_id": str,
            "path_on_host": str,
            "is_root_device": bool,
            "is_read_only": bool,
            "cache_type": str,
            "io_engine": str,
            "partuuid": str,
        },
        ("drive_id", "is_root_device", "path_on_host"),
    ),
    "network-interfaces": (
        {"iface_id": str, "host_dev_name": str, "guest_mac": str},
        ("iface_id", "host_dev_name"),
    ),
    "balloon": (
        {"amount_mib": int, "deflate_on_oom": bool, "stats_polling_interval_s": int},
        ("amount_mib", "deflate_on_oom"),
    ),
    "vsock": ({"guest_cid": int, "uds_path": str, "vsock_id": str}, ("guest_cid", "uds_path")),
    "entropy": ({"rate_limiter": dict}, ()),
}
FIRECRACKER_LISTS = ("drives", "network-interfaces")
FIRECRACKER_CHOICES = {"cache_type": ("Unsafe", "Writeback"), "io_engine": ("Sync", "Async")}
FIRECRACKER_REQUIRED = ("boot-source", "machine-config", "drives")


def wrong(syntax: Syntax, words: Sequence[str]) -> Iterator[str]:
    """What of a command line, after the program, is not documented."""
    rest = list(words)
    for command in syntax.commands:
        if not rest or rest.pop(0) != command:
            yield f"does not begin with {command}"
    seen = set[str]()
    while rest:
        option = rest.pop(0)
        if option not in syntax.options:
            if syntax.last and not rest and not option.startswith("-"):
                return
            yield f"there is no option {option}"
            continue
        value = syntax.options[option]
        if option in seen and option not in syntax.repeated:
            yield f"{option} is there twice"
        if isinstance(value, Keys) and value.many:
            count = next((n for n, word in enumerate(rest) if word.startswith("-")), len(rest))
            values, rest = rest[:count], rest[count:]
            if not values:
                yield f"{option} has no value"
        else:
            values = [rest.pop(0)] if value is not None and rest else []
            if value is not None and not values:
                yield f"{option} has no value"
        seen.add(option)
        for each in values:
            assert value is not None
            yield from (f"{option} {each}: {what}" for what in _wrong_value(value, each))
    if syntax.last:
        yield "does not end with the kernel"


def _wrong_value(value: Value | Keys, text: str) -> Iterator[str]:
    if isinstance(value, Value):
        if not re.fullmatch(value.pattern, text, re.DOTALL):
            yield f"is not like {value.pattern}"
        return
    # Commas within brackets are a list's.
    parts = re.split(r",(?![^\[]*\])", text)
    keys = value.keys
    if value.kinds is not None:
        kind = parts.pop(0)
        if kind not in value.kinds:
            yield f"there is no {kind}"
            return
        keys = value.kinds[kind]
    elif value.first is not None:
        first = parts.pop(0)
        if not re.fullmatch(value.first, first):
            yield f"{first} is not like {value.first}"
    for part in parts:
        if part in value.flags:
            continue
        key, _, given = part.partition("=")
        if key not in keys:
            yield f"there is no key {key}"
        elif not re.fullmatch(keys[key], given):
            yield f"{key}={given} is not like {keys[key]}"


def wrong_configuration(found: Mapping[str, Any]) -> Iterator[str]:
    """What of a configuration of firecracker's is not documented."""
    for name in FIRECRACKER_REQUIRED:
        if name not in found:
            yield f"{name} is missing"
    for name, value in found.items():
        if name not in FIRECRACKER_OBJECTS:
            yield f"there is no {name}"
            continue
        is_list = name in FIRECRACKER_LISTS
        if isinstance(value, list) != is_list:
            yield f"{name} is {'no ' if is_list else 'a '}list"
            continue
        keys, required = FIRECRACKER_OBJECTS[name]
        for each in value if isinstance(value, list) else [value]:
            yield from (f"{name}: {key} is missing" for key in required if key not in each)
            for key, inner in each.items():
                if key not in keys:
                    yield f"{name}: there is no {key}"
                elif type(inner) is not keys[key]:
                    yield f"{name}: {key} = {inner!r} is of another type"
                elif inner not in FIRECRACKER_CHOICES.get(key, (inner,)):
                    yield f"{name}: {key} = {inner!r} is no choice"
