# SPDX-License-Identifier: MIT
"""What programs and daemons of the host answer, and what it tells of its PCI devices.

None of these is an enemy. But they have versions, pass on words of others, such as names of mount
points, and the readers of what they say run as root.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from types import SimpleNamespace

from microvm_host import (
    aftermath,
    bus,
    environment,
    guard,
    lostshares,
    machined,
    names,
    pcibus,
    pcilisting,
    process,
    service,
    systemd,
    timespan,
)
from microvm_host.cli import pci as cli_pci
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths
from microvm_host.pciids import Names
from microvm_host.record import Record

from .engine import promise, read_input, replaced
from .peers import Peer, dialing

VM = "web"
UNIT = names.unit(VM)
SHARE = names.share_unit(VM, "t", ".service")
MACHINE = machined.Machine(VM, "12345678-1234-1234-1234-123456789abc", UNIT, 42)
# As they were before `isolate`.
_ASKING = ((systemd, "states", systemd.states), (systemd, "jobs", systemd.jobs))
_STOP = systemd.stop
_TAKE_NOTE = aftermath.take_note
_NET_DEVICE = HostPaths.net_device

# ---- systemctl, machinectl, machined


_VERBS = ("list-units", "list-jobs", "show", "stop", "kill")


class _Programs:
    """Runs programs that all print the same, and looks at their arguments."""

    def __init__(self, text: str) -> None:
        self._text = text

    def output(self, argv: list[str], *, errors: bool = False) -> str:
        verb = argv[1]
        units = argv[argv.index("--") + 1 :] if "--" in argv else []
        promise(
            (argv[0], verb) == ("machinectl", "show")
            or (argv[0] == "busctl" and argv[-3:] == ["UnregisterMachine", "s", VM])
            or (verb in _VERBS and {*units} <= {UNIT, SHARE, names.foreground_unit(VM)}),
            f"runs {argv}",
        )
        return self._text


def host_answers(root: str) -> None:
    answer = read_input(root)
    text = answer.decode(errors="replace")
    refused: list[MicrovmHostError] = []

    def attempt(call: Callable[[], object]) -> None:
        try:
            call()
        except MicrovmHostError as error:
            promise(str(error).isprintable(), f"it says {error!s}")
            refused.append(error)

    with replaced((process, "output", _Programs(text).output), *_ASKING):
        attempt(lambda: systemd.states(UNIT))
        attempt(lambda: systemd.jobs(UNIT))
        attempt(lambda: _STOP([UNIT, SHARE]))
        attempt(lambda: _guard(text))
        attempt(lambda: _aftermath(text, root))
        attempt(lambda: _lost_shares(text, HostPaths(root)))
        attempt(lambda: machined._forget_earlier(MACHINE, HostPaths(root), by_varlink=False))
        # Without end rarely: it is a lot to read.
        for then in ("hangs up", "is silent" if zlib.crc32(answer) % 16 else "goes on"):
            is_endless = then == "goes on"
            said = answer * (4096 // len(answer) + 1) if is_endless and answer else answer
            size = 4096 if is_endless else min(len(answer) // 15 + 3, 4096)
            peer = Peer(said, size, then)
            with replaced(dialing(machined, peer), (machined, "ANSWER_WITHIN", 1.0)):
                attempt(lambda: machined._varlink("Register", "{}", HostPaths(root)))
            promise(peer.ours.fileno() < 0, "the connection is left open")
            promise(peer.given <= machined.ANSWER_MAX + 4096, f"reads {peer.given} bytes")
            peer.heard()
        attempt(lambda: _bus(answer))
    # Two of the readers refuse nearly all that is meant for the others.
    if len(refused) > 2:
        raise refused[0]


def _bus(answer: bytes) -> None:
    """As the answer to a question to systemd: behind its greeting, and mostly with a good head."""
    head = b"" if zlib.crc32(answer) % 4 else HEAD
    peer = Peer(b"OK 0\r\n" + head + answer, 65536, "hangs up")
    try:
        with replaced(dialing(bus, peer), (bus, "WITHIN", 5.0)):
            found = bus.properties("private", bus.unit(UNIT), ("Unit", "Job"))
        promise(len(found) == 1, f"{len(found)} answers to one question")
    finally:
        promise(peer.ours.fileno() < 0, "the connection is left open")
        promise(len(peer.heard()) < 400, "asks for more than it was told to")


# An answer to the first question, of as many bytes as its last field says, behind its fields.
HEAD = b"l\2\1\1\x10\0\0\0\1\0\0\0\x0f\0\0\0\5\1u\0\1\0\0\0\x08\1g\0\1v\0\0"


def _guard(text: str) -> None:
    for assignment in environment._of_file(text):
        promise("=" in assignment, f"no assignment: {assignment!r}")
    for line in text.splitlines()[:20]:
        span = timespan.parse(line.partition("=")[2])
        promise(span is None or span >= 0, f"a time of {span} s")
    rounds = 0
    clock = SimpleNamespace(now=0.0)
    states = text.split()

    def look() -> guard.Seen:
        nonlocal rounds
        rounds += 1
        if rounds > 4 or not states:
            return "inactive", False, 0
        return states.pop(), len(text) % 2 == 0, len(text)

    def wait(_pid: int, _otherwise: float) -> None:
        clock.now += 1.0

    fake = SimpleNamespace(monotonic=lambda: clock.now)
    with replaced((guard, "time", fake), (guard, "_wait", wait)):
        guard.watch(UNIT, VM, lambda: 2.0, look)
    promise(rounds <= 5, "watches for ever")


def _aftermath(text: str, root: str) -> None:
    words = [*text.split(), *[""] * 4]
    end = aftermath.End(words[0], words[1], words[2], words[3] or "qemu")
    ends = Record(f"{root}/ends")
    job, unit = (words[0], words[1]), [words[2], len(text), len(words), len(text) * len(words)]
    with replaced(
        (service, "pending_job", lambda name: job), (service, "properties", lambda *_: unit)
    ):
        for said in (None, "rebooted"):
            promise(_TAKE_NOTE(VM, end, said, 2, ends) in (0, 1), "another exit status")
            for line in ends.read():
                promise(len(line) == 3 and line[0] == "end", f"writes down {line}")
        aftermath.forget_unless_it_goes_on(VM, ends)


def _lost_shares(text: str, host: HostPaths) -> None:
    """What systemd says of units, states of all sorts and numbers; both kinds of shares."""
    words, own = text.split() or [""], Record(host.record(VM, "served-shares"))
    state = ("active", words[0])[len(words) % 2]
    own.append("share", "t", f"{host.vm(VM)}/t.sock", str(len(text)))

    def properties(_socket: str, unit: str, *wanted: bus.Property) -> list[str | int]:
        said = "active" if unit == bus.unit(UNIT) else state
        return [
            said if name == "ActiveState" else zlib.crc32(f"{text}{name}".encode())
            for _, name in wanted
        ]

    with replaced((bus, "properties", properties)):
        for tag in ("t", ""):
            lostshares.tell(VM, tag, host)
    for line in Record(host.record(VM, "lost-shares")).read():
        promise(line == ["share", "t"], f"writes down {line}")


# ---- the host's devices


def pci_devices(root: str) -> None:
    """A host's devices, with lists and mounts of all sorts; what sysfs says is believed."""
    host = HostPaths(root)
    for path in (*host.pci_ids_places(), host.kernel_command_line, host.mounts, host.swaps):
        # Where only the kernel and the distribution write, all are files.
        if os.path.lexists(path) and not os.path.isfile(path):
            return
    _sysfs(f"{os.path.dirname(root)}/kernel")
    os.symlink(f"{os.path.dirname(root)}/kernel/sys", f"{root}/sys")
    with replaced((HostPaths, "net_device", _NET_DEVICE)):
        rows = pcilisting.rows(host, Names(host))
        promise(len(rows) == len(_DEVICES), "devices are missing")
        for row in rows:
            cells = cli_pci._cells(row)
            promise(all(map(str.isprintable, cells)), f"it lists {cells}")
            promise("; ".join(row.host_uses).isprintable(), f"it lists {row.host_uses}")
            with replaced((process, "call_apart", lambda call, *_: call())):
                json.dumps(pcilisting.as_json(row))
        if os.path.exists(host.kernel_command_line):
            raise pcibus.no_iommu(host)


# Address, class, vendor and device, and what is below it: a disk, an interface, a bridge.
_DEVICES = {
    "0000:00:1f.2": ("0x010601", "0x8086", "0x2922", "ata1/block/sda"),
    "0000:01:00.0": ("0x020000", "0x8086", "0x10d3", "net/eth0"),
    "0000:02:00.0": ("0x0c0330", "0x1b36", "0x000d", "usb1/block/sdb"),
}


def _sysfs(kernel: str) -> None:
    if os.path.isdir(kernel):
        return
    for number, (address, (code, vendor, device, below)) in enumerate(_DEVICES.items()):
        directory = f"{kernel}/sys/devices/{address}"
        kind, name = below.split("/")[-2:]
        os.makedirs(f"{directory}/{below}")
        for link, target in (
            (f"bus/pci/devices/{address}", directory),
            (f"class/{kind}/{name}", f"{directory}/{below}"),
        ):
            os.makedirs(os.path.dirname(f"{kernel}/sys/{link}"), exist_ok=True)
            os.symlink(target, f"{kernel}/sys/{link}")
        for file, text in (
            *(("class", code), ("vendor", vendor), ("device", device)),
            (f"{below}/dev", f"8:{number}"),
        ):
            with open(f"{directory}/{file}", "w") as target_file:
                target_file.write(f"{text}\n")
