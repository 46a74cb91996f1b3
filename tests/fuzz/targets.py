# SPDX-License-Identifier: MIT
"""The readers that are fuzzed.

A new one:

1. write a function that takes the scratch directory, reads the input from `ROOT/input` (or, if it
   is a tree, from the files below ROOT), feeds the reader, and raises Broken if what that gives is
   not what it promises; those that listen to a socket are in `peers`, and those that ask the host
   in `hosts`;
2. add it to TARGETS, with the exceptions by which it may refuse, and the words of its language;
3. put a few right inputs into `corpus/NAME/`;
4. `python -m tests.fuzz NAME --grow` adds those that reach other lines of code.

What would change the host is replaced here by what only looks at its arguments, once for the
process (`isolate`): a fuzzing process does nothing else.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from math import isfinite
from types import SimpleNamespace

from microvm_host import (
    adopt,
    aftermath,
    control,
    declaration,
    generator,
    hypervisor,
    interfaces,
    links,
    listing,
    log,
    mounts,
    names,
    pci,
    place,
    process,
    readiness,
    reborn,
    reconcile,
    runner,
    service,
    shares,
    source,
    state,
    systemd,
    trust,
)
from microvm_host.build import declared, kernels
from microvm_host.build.tools import Blob, Tools
from microvm_host.build.tree import File
from microvm_host.declaration import guest as guests
from microvm_host.errors import DeclarationError, MicrovmHostError, NameInvalid, PackageError
from microvm_host.helper import booted, booting, ending, running
from microvm_host.identity import Identity
from microvm_host.paths import OPENED, HostPaths
from microvm_host.record import Record
from microvm_host.runner import Package
from microvm_host.shares import Virtiofsd

from . import agent, hosts, peers
from .engine import Broken, Target, promise, read_input, replaced

VM = "web"


# ---- names

_CHECKS = (
    *(names.vm_name, names.interface_name, names.share_tag, names.mac_address, names.pci_address),
    names.machine_uuid,
)


def _names(root: str) -> None:
    # As names of files and arguments are decoded.
    text = os.fsdecode(read_input(root))
    refused: list[NameInvalid] = []
    for check in _CHECKS:
        try:
            name = check(text)
        except NameInvalid as error:
            refused.append(error)
            promise(str(error).isprintable(), f"{check.__name__}: {error!s}")
            continue
        promise(check(name) == name, f"{check.__name__} gives {name!r}, and then another")
        promise(name.isprintable(), f"{check.__name__} takes {text!r}")
        promise(names.unescape(names.escape(name)) == name, f"{name!r} does not unescape")
        if check is names.share_tag:
            unit = names.share_unit(VM, name, ".socket")
            promise(names.vm_of_share_unit(unit) == VM, f"{unit} is of nobody")
    names.unescape(text)
    with suppress(NameInvalid):
        vm_and_tag = names.share_of(text)
        promise(all(map(str.isprintable, vm_and_tag)), f"it is of {vm_and_tag}")
    vm = names.vm_of_share_unit(text)
    promise(vm is None or names.is_vm_name(vm), f"{text!r} is of {vm!r}")
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
        promise(len(refused) == 1, "the generator takes what does not load")
        promise(str(error).startswith(error.path or "?"), f"it is about {error}")
        promise(os.listdir(f"{root}/out") == [], "the generator acts on what it refused")
        raise
    promise(not refused, "the generator refuses what loads")
    promise(declared.name == VM, f"its name is {declared.name!r}")
    promise(declared.source.checked() == declared.source, "its source is none")
    for directory, _, files in os.walk(f"{root}/out"):
        for file in files:
            if not os.path.islink(f"{directory}/{file}"):
                with open(f"{directory}/{file}", encoding="utf-8") as text:
                    # Each line of a drop-in is one of ours.
                    for line in text.read().split("\n"):
                        promise(line.isprintable(), f"{file} has {line!r}")


def _tools(guest: guests.Guest) -> Tools:
    """A host that has all that a package may take."""
    found = [Blob(guest.kernel, "0" * 64, False, kernels.BZIMAGE)]
    if guest.initrd is not None:
        found.append(Blob(guest.initrd, "1" * 64))
    return Tools(
        python="/usr/bin/python3",
        qemu="/usr/bin/qemu-system-x86_64",
        qemu_version=(10, 0),
        program=f"/usr/bin/{guest.hypervisor}",
        program_version=(99, 0),
        mkfs=tuple((kind, f"/usr/sbin/mkfs.{kind}") for kind in ("ext4", "xfs", "vfat", "erofs")),
        mcopy="/usr/bin/mcopy",
        qemu_img="/usr/bin/qemu-img",
        e2fs_version=(1, 47, 2),
        erofs_version=(1, 8),
        blobs=tuple(found),
    )


def _guest(root: str) -> None:
    """A declared guest, and the package that would be made of it."""
    os.mkdir(f"{root}/etc")
    path = f"{root}/etc/{VM}.toml"
    given = read_input(root)
    with open(path, "wb") as target:
        # Few inputs would come to have one by themselves.
        if b"kernel" not in given and zlib.crc32(given) % 8:
            target.write(b'kernel = "/boot/vmlinuz"\n')
        target.write(given)
    try:
        package = declared.tree(path, tools=_tools)
    except DeclarationError as error:
        promise(str(error).startswith(path), f"it is about {error}")
        promise(str(error).isprintable(), f"it says {error!s}")
        raise
    promise(package.digest == declared.tree(path, tools=_tools).digest, "another one each time")
    for name, entry in package.entries:
        promise(not {"", ".", ".."} & {*name.split("/")}, f"it has a file {name!r}")
        if isinstance(entry, File) and name.startswith("share/"):
            for line in entry.content.decode().split("\n"):
                promise(line.isprintable(), f"{name} has {line!r}")


# ---- packages


def _package(root: str) -> None:
    path = f"{root}/package"
    try:
        package = runner.load(path)
    except PackageError as error:
        promise(error.path is not None and error.path.startswith(root), f"it is about {error}")
        raise
    promise(package.path.startswith(root), f"it lies in {package.path}")
    _check_package(package, root)
    with suppress(OSError):
        # Whoever runs this could change it; those in question, nothing of it.
        trust.check_package(package.path, Identity("microvm-web", 4242, "microvm-web", 4242))


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
            promise(str(error).isprintable(), f"it says {error}")
            continue
        promise(
            os.path.normpath(socket) == socket and socket.startswith(f"{directory}/"),
            f"socket {socket!r}",
        )
        record.append("socket", socket)
        for suffix in (".socket", ".service"):
            unit = names.share_unit(VM, share.tag, suffix)
            record.append("unit", unit)
            promise(unit.isascii() and unit.isprintable() and len(unit) < 256, f"unit {unit}")
        for program in ("/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"):
            virtiofsd = Virtiofsd(program, is_legacy="qemu" in program)
            try:
                argv = shares.virtiofsd_argv(virtiofsd, share, share.source)
            except MicrovmHostError:
                continue
            promise("\0" not in "".join(argv) and "\n" not in "".join(argv[1:]), f"runs {argv}")
    record.read()
    version = listing._version(package.path)
    promise(version is not None and version.label.isprintable(), f"version {version}")


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
    for path in (host.state, host.records):
        # Whoever can put something else in place of these is root already.
        if os.path.realpath(path) != path:
            return
        with suppress(OSError):
            os.makedirs(path)
        if not os.path.isdir(path):
            return
    if not os.path.isdir(host.net_device("web0")):
        for name, attribute, value in _INTERFACES:
            os.makedirs(host.net_device(name))
            with open(f"{host.net_device(name)}/{attribute}", "w") as file:
                file.write(f"{value}\n")
    refused: list[MicrovmHostError] = []
    _adopt(host)
    by = trust.Suspect(4242, frozenset({4242}))
    for path in (host.vm(VM), host.current(VM)):
        with suppress(OSError):
            trust.changeable(path, by)

    def attempt(call: object, *arguments: object) -> None:
        promise(callable(call), "is no function")
        try:
            call(*arguments)  # type: ignore[operator]
        except MicrovmHostError as error:
            promise(str(error).isprintable(), f"it says {error!s}")
            refused.append(error)

    attempt(state.check_current, VM, host)
    found = source.remembered(host.vm(VM))
    if found is not None:
        attempt(found.checked)
    for states in ({}, {names.unit(VM): "active"}):
        with replaced((systemd, "states", lambda *_, states=states: states)):
            rows = listing.rows(host)
        for row in rows:
            line = listing.as_text(row, lambda _, text: text)
            promise(line.isprintable(), f"it lists {line!r}")
            listing.as_json(row)
    attempt(reconcile.find, host)
    _start_and_end(host)
    for what, undo in reconcile.UNDO.items():
        record = Record(host.record(VM, what))
        try:
            before = len(record.read())
            problems = undo(record, VM, host)
        except MicrovmHostError as error:
            promise(str(error).isprintable(), f"it says {error!s}")
            refused.append(error)
            continue
        promise(all(map(str.isprintable, problems)), f"it says {problems}")
        # Forgotten only if there is nothing more to do.
        left = len(record.read())
        promise(bool(problems) == (0 < left <= before), f"{what} is forgotten")
        refused += map(MicrovmHostError, problems)
    if refused:
        raise refused[0]


_FORMER = 1000


class _OsOfFormer:
    """What the walk uses of `os`, where all files are the former user's."""

    open, close, listdir = os.open, os.close, os.listdir
    O_PATH, O_NOFOLLOW, O_CLOEXEC = os.O_PATH, os.O_NOFOLLOW, os.O_CLOEXEC
    O_RDONLY, O_DIRECTORY = os.O_RDONLY, os.O_DIRECTORY

    @staticmethod
    def fstat(descriptor: int) -> os.stat_result:
        fields = [*os.fstat(descriptor)]
        fields[stat.ST_UID] = _FORMER
        return os.stat_result(fields)


def _adopt(host: HostPaths) -> None:
    """As if the files of whoever runs this were a former user's."""
    state = host.vm(VM)
    if not os.path.isdir(state) or os.path.islink(state):
        return
    walk = adopt._Walk(_FORMER, Identity("microvm-web", 4242, "microvm-web", 4242))
    directory = os.open(state, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        walk.mount = mounts.mount_id(directory)

        def give(entry: int, status: os.stat_result) -> None:
            place = os.readlink(f"{OPENED}/{entry}")
            promise(place.startswith(f"{state}/"), f"gives {place!r} away")
            promise(stat.S_IFMT(status.st_mode) not in (stat.S_IFBLK, stat.S_IFCHR), "is a device")

        with replaced((walk, "_give", give), (adopt, "os", _OsOfFormer)):
            walk.enter(directory, "", 0)
    finally:
        os.close(directory)
    for line in walk.left:
        promise(line.isprintable(), f"it says {line!r}")


def _start_and_end(host: HostPaths) -> None:
    """What helpers do by the records of a start, which most inputs do not have."""
    for call in (
        lambda: booted.identity(VM, host),
        lambda: running._listener(VM, host),
        lambda: _wait_for_turn(Record(host.record(VM, "ends"))),
        lambda: _stop(host),
        lambda: ending.ended(VM, host),
        lambda: booting.unset_booted(VM, host),
    ):
        try:
            call()
        except (MicrovmHostError, OSError) as error:
            promise(isinstance(error, OSError) or str(error).isprintable(), f"it says {error!s}")


def _stop(host: HostPaths) -> None:
    """As root begins it, but for becoming the VM's user."""
    with replaced(
        (service, "stop_timeout", lambda name: 105.0),
        (service, "ran", lambda name: 1.0),
        (service, "stopping_for", lambda name: 0.1),
        (running, "_become_user_of_start", lambda name, host: booted.identity(name, host)),
    ):
        running.stop(VM, host)


def _wait_for_turn(ends: Record) -> None:
    began = 1000.0
    clock = SimpleNamespace(now=began)

    def sleep(seconds: float) -> None:
        # As much as a whole delay is slept in.
        clock.now += seconds * 50

    fake = SimpleNamespace(
        CLOCK_BOOTTIME=0, clock_gettime=lambda _: clock.now, sleep=sleep, monotonic=lambda: began
    )
    with replaced((aftermath, "time", fake)):
        aftermath.wait_for_turn(ends, 5.0)
    promise(clock.now - began <= aftermath.LONGEST_DELAY + 50, f"waits for {clock.now - began} s")


def _listen(
    address: readiness.Address, *, timeout: float | None, others: Callable[[], object], **_: str
) -> None:
    promise(timeout is None or (isfinite(timeout) and timeout >= 0), f"waits for {timeout}")
    promise(bool(address.path) or address.port >= 0, f"listens at {address}")
    others()


def _note(_name: str, end: aftermath.End, said: str | None, *_: object) -> int:
    promise(said in peers.WORDS, f"it ended by {said!r}")
    end.describe(said)
    return 0


def isolate() -> None:
    """Put what only looks in place of all that would ask or change the host."""

    def stop(units: Sequence[str]) -> None:
        for unit in units:
            promise(names.vm_of_share_unit(unit) == VM, f"stops {unit!r}")

    def delete(doomed: dict[str, int], _host: HostPaths) -> list[str]:
        for name, index in doomed.items():
            promise(names.interface_name(name) == name, f"deletes {name!r}")
            promise(index > 0, f"deletes index {index}")
        return []

    def set_flags(name: str, flags: int, *, clear: int = 0) -> None:
        promise(names.interface_name(name) == name, f"changes {name!r}")

    def index(name: str) -> int:
        promise(names.interface_name(name) == name, f"asks for {name!r}")
        return 7

    def restore(_address: str, was: list[reborn.Interface], _host: HostPaths) -> list[str]:
        for each in was:
            promise(names.interface_name(each.name) == each.name, f"brings up {each.name!r}")
            promise(f"{each.mac}{each.port}".isprintable(), f"{each.mac!r}, {each.port!r}")
        return []

    def give_back(
        address: str, driver: str, override: str, was: list[reborn.Interface], *_: object
    ) -> list[str]:
        promise(names.pci_address(address) == address and "*" not in address, f"{address!r}")
        promise("/" not in driver + override, f"driver {driver!r} or {override!r}")
        return restore(address, was, HostPaths())

    def nothing(*_arguments: object, **_named: object) -> None:
        return None

    def asked(argv: list[str], **_named: object) -> str:
        raise Broken(f"runs {argv}")

    # What systemd gives helpers.
    os.environ.update(MAINPID="42", NOTIFY_SOCKET="none", MICROVM_READINESS="guest")
    os.environ.update(SERVICE_RESULT="success", EXIT_CODE="exited", EXIT_STATUS="0")
    for module, name, instead in (
        (systemd, "stop", stop),
        (systemd, "states", lambda *patterns: {}),
        (systemd, "jobs", lambda *patterns: set()),
        (links, "delete", delete),
        (links, "set_flags", set_flags),
        (links, "interface_index", index),
        (interfaces, "_interface_ioctl", asked),
        (pci, "_give_back", give_back),
        (reborn, "restore", restore),
        (process, "output", asked),
        (service, "pending_job", lambda name: None),
        (service, "is_busy", lambda unit: False),
        (aftermath, "take_note", _note),
        (hypervisor, "stop", lambda pid, ways, times: None),
        (readiness, "Listener", _listen),
        # With the rights that there are.
        (ending, "_last_words", lambda path, identity: control.last_words(path)),
        (HostPaths, "net_device", _net_device),
        (log, "write", nothing),
        # Who runs this stands for root.
        (source, "_is_roots_file", lambda status: stat.S_ISREG(status.st_mode)),
        (reconcile, "_is_roots", lambda status: True),
        (place, "ROOT", os.getuid()),
    ):
        promise(hasattr(module, name), f"{module.__name__} has no {name} to replace")
        setattr(module, name, instead)


_PACKAGE_FILES = (
    *(b"bin/microvm-run", b"bin/microvm-shutdown", b"bin/virtiofsd-run"),
    *(
        b"share/microvm/" + name
        for name in (
            *(b"tap-interfaces", b"tap-flags", b"tap-bridges", b"tap-mtus"),
            *(b"macvtap-interfaces", b"macvtap-mtus"),
            *(b"pci-devices", b"usb-devices", b"hypervisor", b"system", b"vsock-cid", b"readiness"),
            *(b"control-socket", b"control-protocol", b"machine-uuid", b"virtiofs", b"source"),
            *(b"private-files", b"temporary-files"),
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
    *(_RECORD + kind for kind in (b"booted", b"ends", b"lost-shares")),
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
        share=3.0,
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
        "guest",
        _guest,
        (DeclarationError,),
        (
            *(key.encode() for key in declaration.GUEST_KEYS),
            *(b"[[volumes]]\nimage = ", b"[[interfaces]]\ntype = ", b"[[shares]]\ntag = "),
            *(b"[[devices]]\nbus = ", b"[[forwardPorts]]\n", b"[cloudInit]\n", b"[vsock]\n"),
            *(b"source", b"proto", b"id", b"mac", b"bridge", b"size = 64\n", b"fsType", b"label"),
            *(b"serial", b"readOnly = true\n", b"host.port = 1\n", b"guest.port = 2\n", b"path"),
            *(b'"tap"', b'"user"', b'"macvtap"', b'"virtiofs"', b'"9p"', b'"pci"', b'"qemu"'),
            *(b'"cloud-hypervisor"', b'"firecracker"', b'"crosvm"', b'"kvmtool"', b'"alioth"'),
            *(b'"stratovirt"', b" = ", b"\n", b"true", b"false", b"1", b"4096", b'"/srv/a b,c"'),
            *(b'"02:00:00:00:00:01"', b'"0000:01:00.0"', b'"vendorid=0x1,productid=0x2"'),
            *(
                b'"$(id)`id`"',
                b"'a\"b'",
                b'"a\\nb"',
                b'"\\u0000"',
                b'"-x"',
                b'"../x"',
                b"[]",
                b"{}",
            ),
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
            *(
                b"user\tmicrovm\t1\tkvm\t2\n",
                b"notify\tvsock\t",
                b"notify\tunix\tnotify.vsock_8888",
            ),
            *(
                b"control\tqmp\tweb.sock",
                b"event-log\tlog",
                b"temporary\tlog",
                b"readiness\tguest\n",
                b"\t3\tstream\n",
            ),
            *(b"start-timeout\t90.000000\n", b"end\t12.5\tit died\n", b"share\tt\n", b"9" * 5000),
            *(b"\t", b"\ttap\t", b"web0", b"web1", b"m0", b"7", b"02:00:00:00:00:01", b"microvm"),
            *(b"microvm-virtiofsd-web-t.socket", b"microvm-virtiofsd-web.service", b"hypervisor"),
            *(b"sshd.service", b"/etc/passwd", b"/run/systemd/private", b"../../../..", b"/"),
            *(b"0000:01:00.0", b"e1000e", b"vfio-pci", b"node", b"12", b"/dev/vfio/12", b"20600"),
            *(b"/srv/package", b"../current", b"current", b"git+file:///etc/nixos", b"#x"),
        ),
        _HOST_FILES,
        share=0.7,
    ),
    Target(
        "control",
        peers.control_answers,
        (MicrovmHostError,),
        (
            *(b'{"QMP": {}}\r\n', b'{"return": {}, "id": 1}\r\n', b'{"return": {}, "id": 3}\r\n'),
            *(b'{"return": {"status": "io-error"}, "id": 2}\n', b'"status": "running"', b'"error"'),
            *(b'{"event": "GUEST_PANICKED", "data": {}}\n', b'"reason": ', b'"guest-shutdown"'),
            *(b'{"event": "SHUTDOWN", "data": {"reason": "guest-reset"}}\n', b'"guest-panic"'),
            *(b'"id": ', b'"event"', b'"data"', b"null", b"true", b"[]", b"{}", b"[" * 2000),
            *(b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.0 ", b"400 Bad Request", b"100 Continue"),
            *(b"Content-Length: 0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n", b"\\u000a"),
            *(b"NaN", b"1e400", b"9" * 5000, b'"' * 3, b"\\ud800", b'{"a":' * 2000, b"x" * 66000),
        ),
        share=1.2,
    ),
    Target(
        "notify",
        peers.notify_messages,
        (peers.NotReady,),
        (
            *(peers.CLOSES, peers.LEAVES, peers.PAUSES) * 4,
            *(b"READY=1\n", b"READY=0\n", b"READY=1 ", b"STATUS=", b"STATUS=Booting\xe2\x80\xa6\n"),
            *(b"X_SYSTEMD_UNIT_ACTIVE=", b"X_SYSTEMD_UNIT_INACTIVE=", b"emergency.target"),
            *(b"rescue.target\n", b"MAINPID=1\n", b"FDSTORE=1\n", b"EXTEND_TIMEOUT_USEC=9\n"),
            *(b"BARRIER=1\n", b"STOPPING=1\n", b"ready=1\n", b"x" * 200, b"y" * 4096),
        ),
        share=0.7,
    ),
    Target(
        "agent",
        agent.agent_answers,
        (MicrovmHostError,),
        (
            *(b'{"return": 7}\n', b'\xff{"return": 7}\n', b'{"return": {"pid": 4}}\n', agent.NEXT),
            *(b'{"return": {"exited": false}}\n', b'{"return": {"exited": true, "exitcode": 0}}\n'),
            *(
                b'"signal": 9',
                b'"out-data": "aGVsbG8K"',
                b'"err-data": "',
                b'"out-truncated": true',
            ),
            *(
                b'{"error": {"class": "CommandNotFound", "desc": "disabled"}}\n',
                b'"desc": "\\u001b',
            ),
            *(b"null", b"true", b"[]", b"{}", b"NaN", b"1e400", b"9" * 5000, b"-1", b"\xff", b"\n"),
            *(b'{"a":' * 2000, b"[" * 2000, b"\\ud800", b"=", b"====", b"x" * 66000),
        ),
        share=0.7,
    ),
    Target(
        "answers",
        hosts.host_answers,
        (MicrovmHostError,),
        (
            *(b"ActiveState=deactivating\n", b"Job=12\n", b"MainPID=42\n", b"Restart=on-failure\n"),
            *(b"Restart=always\n", b"ActiveEnterTimestampMonotonic=", b"inactive", b"active"),
            *(b"ExecMainStartTimestampMonotonic=", b"ExecMainExitTimestampMonotonic=", b"failed"),
            *(b"MICROVM_SHUTDOWN_SECONDS=", b"MICROVM_TERMINATE_SECONDS=5", b"Unit=", b"Service="),
            *(b"MICROVM_SHUTDOWN_SECONDS=inf\n", b"MICROVM_TERMINATE_SECONDS=nan\n"),
            *(hosts.UNIT.encode(), hosts.SHARE.encode(), b"loaded active running", b"stop waiting"),
            *(b"exited", b"killed", b"success", b"timeout", b"KILL", b"78", b"32", b"crosvm"),
            *(b'{"error":"io.systemd.Machine.MachineExists"}', b'{"parameters":{}}\0', b"nan"),
            *(hosts.HEAD, b"\1u\0\1\0\0\0", b"\1s\0\4\0\0\0a.b\0", b"\5(uo)\0", b"\2as\0"),
        ),
        share=1.2,
    ),
    Target(
        "pci",
        hosts.pci_devices,
        (MicrovmHostError,),
        (
            *(
                b"8086  Intel Corporation\n",
                b"\t2922  82801IR\n",
                b"C 01  Mass storage\n",
                b"10d3  ",
            ),
            *(b"\t06  SATA\n", b"\n1b36  Red Hat\n", b"\t\t8086 0001  ", b"# comment\n", b"C 0c  "),
            *(b"29 1 8:0 / /srv rw - ext4 /dev/sda rw\n", b" 8:2 ", b" - ", b"\\012", b"\\134"),
            *(b"/dev/sda", b"swap", b"device", b"0000:01:00.0", b"*:02:00.0", b"intel_iommu=off"),
        ),
        (
            *(b"usr/share/misc/pci.ids", b"usr/share/hwdata/pci.ids", b"proc/cmdline"),
            *(b"proc/self/mountinfo", b"proc/swaps", b"run/microvm-host/web/pci-devices"),
            *(b"run/microvm-host/b/pci-devices", b"dev/sda", b"var/lib/microvms/web/current"),
            b"var/lib/microvms/web/current/share/microvm/pci-devices",
        ),
        share=0.4,
    ),
)

BY_NAME = {target.name: target for target in TARGETS}
