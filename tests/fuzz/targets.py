# SPDX-License-Identifier: MIT
"""The readers that are fuzzed.

A new one, such as of what a control socket answers or of messages to $NOTIFY_SOCKET:

1. write a function that takes the scratch directory, reads the input from `ROOT/input` (or, if it
   is a tree, from the files below ROOT), feeds the reader, and raises Broken if what that gives is
   not what it promises; for answers on a socket, give it the bytes by `socketpair`;
2. add it to TARGETS, with the exceptions by which it may refuse, and the words of its language;
3. put a few right inputs into `corpus/NAME/`;
4. `python -m tests.fuzz NAME --grow` adds those that reach other lines of code.

What would change the host is replaced here by what only looks at its arguments, once for the
process (`isolate`): a fuzzing process does nothing else.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import suppress

from microvm_host import (
    declaration,
    generator,
    helper,
    interfaces,
    links,
    listing,
    log,
    names,
    pci,
    process,
    reconcile,
    runner,
    shares,
    source,
    state,
    systemd,
)
from microvm_host.errors import DeclarationError, MicrovmHostError, NameInvalid, PackageError
from microvm_host.paths import HostPaths
from microvm_host.record import Record
from microvm_host.runner import Package
from microvm_host.shares import Virtiofsd

from .engine import Broken, Target

VM = "web"


def _promise(is_kept: bool, what: str) -> None:
    if not is_kept:
        raise Broken(what)


def _read(root: str) -> bytes:
    with open(f"{root}/input", "rb") as file:
        return file.read()


# ---- names

_CHECKS = (
    *(names.vm_name, names.interface_name, names.share_tag, names.mac_address, names.pci_address),
    names.machine_uuid,
)


def _names(root: str) -> None:
    # As names of files and arguments are decoded.
    text = os.fsdecode(_read(root))
    refused: list[NameInvalid] = []
    for check in _CHECKS:
        try:
            name = check(text)
        except NameInvalid as error:
            refused.append(error)
            _promise(str(error).isprintable(), f"{check.__name__}: {error!s}")
            continue
        _promise(check(name) == name, f"{check.__name__} gives {name!r}, and then another")
        _promise(name.isprintable(), f"{check.__name__} takes {text!r}")
        _promise(names.unescape(names.escape(name)) == name, f"{name!r} does not unescape")
        if check is names.share_tag:
            unit = names.share_unit(VM, name, ".socket")
            _promise(names.vm_of_share_unit(unit) == VM, f"{unit} is of nobody")
    names.unescape(text)
    vm = names.vm_of_share_unit(text)
    _promise(vm is None or names.is_vm_name(vm), f"{text!r} is of {vm!r}")
    reconcile._vm_of(text)
    if len(refused) == len(_CHECKS):
        raise refused[0]


# ---- declarations


def _declaration(root: str) -> None:
    os.mkdir(f"{root}/etc")
    host = HostPaths(root)
    os.mkdir(host.declarations)
    os.rename(f"{root}/input", host.declaration(VM))
    os.mkdir(f"{root}/out")
    refused: list[DeclarationError] = []
    # As at boot, which must go on whatever is declared.
    generator.generate(f"{root}/out", "/lib", host, refused.append)
    try:
        declared = declaration.load(host.declaration(VM))
    except DeclarationError as error:
        # Not in the same words: how deep it may nest depends on how deep it was called.
        _promise(len(refused) == 1, "the generator takes what does not load")
        _promise(str(error).startswith(error.path or "?"), f"it is about {error}")
        _promise(os.listdir(f"{root}/out") == [], "the generator acts on what it refused")
        raise
    _promise(not refused, "the generator refuses what loads")
    _promise(declared.name == VM, f"its name is {declared.name!r}")
    _promise(declared.source.checked() == declared.source, "its source is none")
    for directory, _, files in os.walk(f"{root}/out"):
        for file in files:
            if not os.path.islink(f"{directory}/{file}"):
                with open(f"{directory}/{file}", encoding="utf-8") as text:
                    # Each line of a drop-in is one of ours.
                    for line in text.read().split("\n"):
                        _promise(line.isprintable(), f"{file} has {line!r}")


# ---- packages


def _package(root: str) -> None:
    path = f"{root}/package"
    try:
        package = runner.load(path)
    except PackageError as error:
        _promise(error.path is not None and error.path.startswith(root), f"it is about {error}")
        raise
    _promise(package.path.startswith(root), f"it lies in {package.path}")
    _check_package(package, root)


def _check_package(package: Package, root: str) -> None:
    """What those who use a package rely upon."""
    # Undoing needs each name to fit in a line of a record.
    record = Record(f"{root}/record")
    for tap in package.taps:
        record.append("tap", names.interface_name(tap.name), "7")
    for macvtap in package.macvtaps:
        record.append("macvtap", names.interface_name(macvtap.name), macvtap.mac)
    for share in package.shares:
        directory = f"{root}/state"
        try:
            socket = shares.socket_path(share, directory, package.path)
        except MicrovmHostError as error:
            _promise(str(error).isprintable(), f"it says {error}")
            continue
        _promise(
            os.path.normpath(socket) == socket and socket.startswith(f"{directory}/"),
            f"socket {socket!r}",
        )
        record.append("socket", socket)
        for suffix in (".socket", ".service"):
            unit = names.share_unit(VM, share.tag, suffix)
            record.append("unit", unit)
            _promise(unit.isascii() and unit.isprintable() and len(unit) < 256, f"unit {unit}")
        for place in ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"):
            virtiofsd = Virtiofsd(place, is_legacy="qemu" in place)
            try:
                argv = shares.virtiofsd_argv(virtiofsd, share, share.source)
            except MicrovmHostError:
                continue
            _promise("\0" not in "".join(argv) and "\n" not in "".join(argv[1:]), f"runs {argv}")
    record.read()
    version = listing._version(package.path)
    _promise(version is not None and version.label.isprintable(), f"version {version}")


# ---- the host: records, and what the hypervisor's user may put into the state directory


_INTERFACES = (
    ("web0", "ifindex", "7"),
    ("web1", "ifindex", "8"),
    ("m0", "address", "02:00:00:00:00:01"),
)


def _net_device(host: HostPaths, interface: str) -> str:
    # Not among the files of an input: the kernel is believed.
    return f"{os.path.dirname(host.root)}/net/{interface}"


def _host(root: str) -> None:
    host = HostPaths(root)
    for place in (host.state, host.records):
        # Whoever can put something else in place of these is root already.
        if os.path.realpath(place) != place:
            return
        with suppress(OSError):
            os.makedirs(place)
        if not os.path.isdir(place):
            return
    if not os.path.isdir(host.net_device("web0")):
        for name, attribute, value in _INTERFACES:
            os.makedirs(host.net_device(name))
            with open(f"{host.net_device(name)}/{attribute}", "w") as file:
                file.write(f"{value}\n")
    refused: list[MicrovmHostError] = []

    def attempt(call: object, *arguments: object) -> None:
        _promise(callable(call), "is no function")
        try:
            call(*arguments)  # type: ignore[operator]
        except MicrovmHostError as error:
            _promise(str(error).isprintable(), f"it says {error!s}")
            refused.append(error)

    attempt(helper._identity, VM, host)
    attempt(state.check_current, VM, host)
    found = source.remembered(host.vm(VM))
    if found is not None:
        attempt(found.checked)
    for row in listing.rows(host):
        line = listing.as_text(row, lambda _, text: text)
        _promise(line.isprintable(), f"it lists {line!r}")
        listing.as_json(row)
    attempt(reconcile.find, host)
    for what, undo in reconcile.UNDO.items():
        record = Record(host.record(VM, what))
        try:
            before = len(record.read())
            problems = undo(record, VM, host)
        except MicrovmHostError as error:
            _promise(str(error).isprintable(), f"it says {error!s}")
            refused.append(error)
            continue
        _promise(all(map(str.isprintable, problems)), f"it says {problems}")
        # Forgotten only if there is nothing more to do.
        _promise(bool(problems) <= (len(record.read()) == before), f"{what} is forgotten")
        refused += map(MicrovmHostError, problems)
    if refused:
        raise refused[0]


def isolate() -> None:
    """Put what only looks in place of all that would ask or change the host."""

    def stop(units: Sequence[str]) -> None:
        for unit in units:
            _promise(names.vm_of_share_unit(unit) == VM, f"stops {unit!r}")

    def delete(doomed: dict[str, int], _host: HostPaths) -> list[str]:
        for name, index in doomed.items():
            _promise(names.interface_name(name) == name, f"deletes {name!r}")
            _promise(index > 0, f"deletes index {index}")
        return []

    def set_flags(name: str, flags: int, *, clear: int = 0) -> None:
        _promise(names.interface_name(name) == name, f"changes {name!r}")

    def index(name: str) -> int:
        _promise(names.interface_name(name) == name, f"asks for {name!r}")
        return 7

    def give_back(address: str, driver: str, override: str, _host: HostPaths) -> bool:
        _promise(names.pci_address(address) == address and "*" not in address, f"{address!r}")
        _promise("/" not in driver + override, f"driver {driver!r} or {override!r}")
        return True

    def bring_up(_address: str, up: list[str], down: list[str], _host: HostPaths) -> None:
        for name in (*up, *down):
            _promise(names.interface_name(name) == name, f"brings up {name!r}")

    def nothing(*_arguments: object, **_named: object) -> None:
        return None

    def asked(argv: list[str]) -> str:
        raise Broken(f"runs {argv}")

    for module, name, instead in (
        (systemd, "stop", stop),
        (systemd, "states", lambda *patterns: {}),
        (systemd, "jobs", lambda *patterns: set()),
        (links, "delete", delete),
        (links, "set_flags", set_flags),
        (links, "interface_index", index),
        (interfaces, "_interface_ioctl", asked),
        (pci, "_give_back", give_back),
        (pci, "_bring_up", bring_up),
        (process, "output", asked),
        (HostPaths, "net_device", _net_device),
        (log, "write", nothing),
        # Who runs this stands for root.
        (source, "_is_roots_file", lambda status: stat.S_ISREG(status.st_mode)),
        (reconcile, "_is_roots", lambda status: True),
        (shares, "_is_roots", lambda path, directory: path.startswith(f"{directory}/")),
    ):
        _promise(hasattr(module, name), f"{module.__name__} has no {name} to replace")
        setattr(module, name, instead)


_PACKAGE_FILES = (
    *(b"bin/microvm-run", b"bin/microvm-shutdown", b"bin/virtiofsd-run"),
    *(
        b"share/microvm/" + name
        for name in (
            *(b"tap-interfaces", b"tap-flags", b"tap-bridges", b"macvtap-interfaces"),
            *(b"pci-devices", b"usb-devices", b"hypervisor", b"system", b"vsock-cid", b"readiness"),
            *(b"control-socket", b"control-protocol", b"machine-uuid", b"virtiofs", b"source"),
            *(
                b"virtiofs/" + tag + b"/" + file
                for tag in (b"t", b"home/alice", b"home", b".x", b"\xc3\xbc b")
                for file in (b"source", b"socket", b"read-only", b"cache", b"extra-args")
            ),
            *(b"virtiofs/t/posix-acl", b"virtiofs/t", b"virtiofs/t/other", b"x/source"),
        )
    ),
)
_STATE = b"var/lib/microvms/web/"
_RECORD = b"run/microvm-host/web/"
_HOST_FILES = (
    *(_RECORD + kind.encode() for kind in (*reconcile.UNDO, "other")),
    *(_STATE + name for name in (b"runner", b"flake", b"declared", b"current", b"booted")),
    *(_STATE + name for name in (b"a.sock", b"run/b.sock", b"disk.img", b".build", b"x/y/c.sock")),
    *(b"nix/var/nix/gcroots/microvm/" + name for name in (b"web", b"gone", b"booted-gone")),
    *(b"dev/vfio/12", b"dev/vfio/devices/vfio0", b"run/microvm-host/.nodes/12"),
    *(b"etc/microvms/web.toml", b"run/microvm-host/gone/tap-interfaces", b"srv/package/x"),
)

TARGETS = (
    Target(
        "names",
        _names,
        (NameInvalid,),
        (
            *(b"web", b"vm0", b"02:00:00:00:00:01", b"0000:01:00.0", b"01:00.1", b"*:02:00.0"),
            *(b"1f", b"home/alice", b"microvm-virtiofsd-", b".socket", b".service", b"\\x2e"),
            *(b"microvm@", b"microvm-tap-interfaces@", b"12345678-1234-1234-1234-123456789abc"),
        ),
        share=2.0,
    ),
    Target(
        "declaration",
        _declaration,
        (DeclarationError,),
        (
            *(key.encode() for key in declaration._KEYS),
            *(b"true", b"false", b' = "', b"/srv/web", b"git+file:///etc/nixos", b"'''", b'"""'),
            *(b"1979-05-27T07:32:00Z", b"inf", b"nan", b"0x1f", b"1e5", b"[[", b"]]", b"{ a = 1 }"),
            *(b"\\u0000", b"\\U0010FFFF", b"\\n", b"[x.y]", b"90", b"-1", b"0.5", b"1_000"),
        ),
    ),
    Target(
        "package",
        _package,
        (PackageError,),
        (
            *(b"vm0", b"vm1", b"br0", b"eth0", b"02:00:00:00:00:01", b"bridge", b"passthru"),
            *(b"vnet_hdr", b"multi_queue", b"true", b"false", b"auto", b"metadata", b"qmp"),
            *(b"cloud-hypervisor", b"firecracker", b"guest", b"exec", b"qemu", b"42", b"--fd=4"),
            *(b"--cache=never", b"/srv/data", b"web.sock", b"run/sub.sock", b"0000:01:00.0"),
            *(b"12345678-1234-1234-1234-123456789abc", b"/dev/zero", b"/proc/self/mem", b"../.."),
            *(b"#! /bin/sh\n", b"share", b"microvm", b"virtiofs", b"source", b"socket", b"x" * 40),
            *(b"/nix/store/00000000000000000000000000000000-nixos-system-web-24.05",),
        ),
        tuple(b"package/" + path for path in _PACKAGE_FILES),
    ),
    Target(
        "host",
        _host,
        (MicrovmHostError,),
        (
            *(b"tap", b"adopted", b"raised", b"macvtap", b"unit", b"socket", b"user", b"device"),
            *(b"\t", b"\ttap\t", b"web0", b"web1", b"m0", b"7", b"02:00:00:00:00:01", b"microvm"),
            *(b"microvm-virtiofsd-web-t.socket", b"microvm-virtiofsd-web.service", b"hypervisor"),
            *(b"sshd.service", b"/etc/passwd", b"/run/systemd/private", b"../../../..", b"/"),
            *(b"0000:01:00.0", b"e1000e", b"vfio-pci", b"node", b"12", b"/dev/vfio/12", b"20600"),
            *(b"/srv/package", b"../current", b"current", b"git+file:///etc/nixos", b"#x"),
        ),
        _HOST_FILES,
    ),
)

BY_NAME = {target.name: target for target in TARGETS}
