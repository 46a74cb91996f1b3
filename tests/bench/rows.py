# SPDX-License-Identifier: MIT
"""What is measured: each part by its name, with its limit, and what it takes on the host."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from tests.guest.package import Share, Tap
from tests.host.progress import step
from tests.system.toolkit import IMAGE, SOURCES, Toolkit

from . import declared, plain

STATE = "/var/lib/microvms"
PACKAGES = "/opt/bench"
GENERATOR = "/usr/local/lib/systemd/system-generators/microvm-generator"
COUNTS = (1, 10, 100)
# MB.
GUEST_MEM = 256
# Of one kernel, to see how it grows.
DECLARED = (60, 200)

Command = list[str]


@dataclass(frozen=True)
class Figures:
    """Samples of one way, in milliseconds, or in the unit of the row."""

    samples: tuple[float, ...]
    # What the processor had to do for it, in ms a round, wherever it ran; None if not counted.
    cpu: float | None = None

    @property
    def median(self) -> float:
        return median(self.samples)

    @property
    def best(self) -> float:
        return min(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.samples) < 3:
            return min(self.samples), max(self.samples)
        low, _, high = quantiles(self.samples, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    work: str
    toolkit: Figures
    # What it is compared with; None where the limit is in milliseconds.
    plain: Figures | None
    limit: float
    unit: str = "ms"
    # How the plain way is called, where it is none.
    beside: str = "plain"

    @property
    def figure(self) -> float:
        """What is held against the limit: the ratio of the medians, or the median itself."""
        if self.plain is None:
            return self.toolkit.median
        return self.toolkit.median / self.plain.median if self.plain.median else float("inf")

    @property
    def best(self) -> float:
        """The same of the quickest rounds, in which the machine did the least besides."""
        if self.plain is None:
            return self.toolkit.best
        return self.toolkit.best / self.plain.best if self.plain.best else float("inf")

    @property
    def holds(self) -> bool:
        return self.figure <= self.limit


@dataclass(frozen=True)
class Growth:
    """What one kind of work costs at a number of VMs."""

    work: str
    count: int
    toolkit: Figures
    plain: Figures | None
    unit: str = "ms"


@dataclass
class Results:
    """All that was measured."""

    rows: list[Row] = field(default_factory=list)
    growth: list[Growth] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Bench:
    """The host, prepared; measures one part after the other."""

    def __init__(self, toolkit: Toolkit) -> None:
        self.toolkit = toolkit
        self.results = Results()

    # -- what the parts stand on ---------------------------------------------------------------

    def make(self, stubs: Sequence[plain.PlainStub]) -> None:
        """Write packages and make a VM of each, for both ways."""
        with tempfile.TemporaryDirectory() as scratch:
            for stub in stubs:
                stub.write(Path(scratch) / stub.name, prefix=f"{PACKAGES}/{stub.name}")
            self.toolkit.sh(f"rm -rf {PACKAGES} {STATE}/* {plain.STATE}; mkdir -p {PACKAGES}")
            self.toolkit.host.copy(Path(scratch), PACKAGES)
        # The user of the plain way writes sockets and links there, as microvm.nix has it.
        self.toolkit.sh(
            f"cd {PACKAGES} && for name in *; do for state in {STATE} {plain.STATE}; do "
            f"mkdir -p $state/$name && ln -s {PACKAGES}/$name $state/$name/current || exit 1; "
            f"done; done && chown -R microvm:kvm {plain.STATE} && chmod 755 {PACKAGES}",
            timeout=120,
        )

    def ask(self, timeout: float = 1200, **job: Any) -> Any:
        """Have the probe do a job; gives what it found."""
        argv = ["python3", "-IS", f"{SOURCES}/tests/bench/probe.py"]
        done = self.toolkit.host.run(argv, input=json.dumps(job), timeout=timeout)
        return json.loads(done.stdout)

    def time(
        self,
        rounds: int,
        ways: dict[str, dict[str, Any]],
        *,
        by_systemd: bool = False,
        warm_ups: int = 1,
    ) -> dict[str, Figures]:
        """Time ways by turns.

        Args:
            rounds: how often each is done, beside the first time, which is not counted.
            ways: by name, with the command lines `before`, `timed` and `after`.
            by_systemd: systemd does the work, and is to come to rest in between.
        """
        found = self.ask(
            kind="times", rounds=rounds, ways=ways, settle=by_systemd, warm_ups=warm_ups
        )
        figures = {}
        for name, result in found.items():
            cpu = result["systemd_cpu"] / rounds if by_systemd else median(result["cpu"])
            samples = tuple(1000 * seconds for seconds in result["seconds"])
            figures[name] = Figures(samples, 1000 * cpu)
        return figures

    def row(self, part: str, work: str, found: dict[str, Figures], limit: float) -> None:
        """Add a row of both ways."""
        self.results.rows.append(Row(part, work, found["toolkit"], found["plain"], limit))

    # -- starts and stops ----------------------------------------------------------------------

    def starts(self, part: str, work: str, limit: float, rounds: int, **what: Any) -> None:
        """How long `systemctl start` takes until it returns."""
        self.make([plain.PlainStub(name="vm", **what)])
        ways = {
            way: {"timed": start(way, ["vm"]), "after": [stop(way, ["vm"])]}
            for way in ("toolkit", "plain")
        }
        self.row(part, work, self.time(rounds, ways, by_systemd=True), limit)

    def start_nothing(self, part: str) -> None:
        self.starts(part, "start, nothing to set up", 1.0, 15)

    def start_tap(self, part: str) -> None:
        self.starts(part, "start, one tap", 1.0, 15, taps=taps("vm", 1))

    def start_16_taps(self, part: str) -> None:
        self.starts(part, "start, 16 taps", 0.5, 9, taps=taps("vm", 16))

    def start_share(self, part: str) -> None:
        what = with_shares(1)
        self.toolkit.sh("mkdir -p /srv/data0 /srv/data1")
        self.starts(part, "start, one virtiofs share", 0.02, 5, **what)

    def start_100(self, part: str) -> None:
        names = [f"vm{number}" for number in range(100)]
        self.make([plain.PlainStub(name=name, taps=taps(name, 1)) for name in names])
        ways = {
            way: {"timed": start(way, names), "after": [stop(way, names)]}
            for way in ("toolkit", "plain")
        }
        found = self.time(2, ways, by_systemd=True)
        self.row(part, "start of 100 VMs with a tap each, all at once", found, 0.8)

    def stop_16_taps(self, part: str) -> None:
        self.make([plain.PlainStub(name="vm", taps=taps("vm", 16))])
        ways = {
            way: {"before": [start(way, ["vm"])], "timed": stop(way, ["vm"])}
            for way in ("toolkit", "plain")
        }
        found = self.time(9, ways, by_systemd=True)
        self.row(part, "stop of a VM with 16 taps, until they are gone", found, 0.3)

    def memory(self, part: str) -> None:
        """What is resident for a running VM with two shares, its guest connected to both."""
        self.toolkit.sh("mkdir -p /srv/data0 /srv/data1")
        connect = "until socat -u UNIX-CONNECT:{} PIPE 2>/dev/null; do sleep 0.1; done"
        sockets = [f"vm-virtiofs-data{number}.sock" for number in (0, 1)]
        run = f"{connect.format(sockets[0])} &\n{connect.format(sockets[1])}"
        self.make([plain.PlainStub(name="vm", run=run, **with_shares(2))])
        ways = {
            way: {"before": [start(way, ["vm"])], "after": [stop(way, ["vm"])]}
            for way in ("toolkit", "plain")
        }
        found = self.ask(kind="memory", ways=ways)
        # Of the guest, which is a line of shell here, and virtiofsd itself.
        beside = ("sh", "sleep", "socat", "virtiofsd", "microvm-run")
        held = {}
        for way, commands in found.items():
            if len(commands.get("virtiofsd", ())) < 2:
                raise AssertionError(f"{way}: no virtiofsd for each share: {commands}")
            others = {name: sizes for name, sizes in commands.items() if name not in beside}
            held[way] = Figures((float(sum(map(sum, others.values()))),))
            listed = ", ".join(f"{name} {sum(sizes)} kB" for name, sizes in others.items())
            self.results.notes.append(
                f"Held by a VM with two shares, {way}: {listed or 'nothing'}."
            )
        work = "memory held by a running VM with two shares, beside virtiofsd"
        row = Row(part, work, held["toolkit"], held["plain"], 0.0, unit="kB PSS")
        self.results.rows.append(row)

    # -- the command, the generator ------------------------------------------------------------

    def lists(self, part: str, count: int, limit: float, rounds: int) -> None:
        self.make([plain.PlainStub(name=f"vm{number}", system=SYSTEM) for number in range(count)])
        work = f"microvm -l, {count} VMs"
        # A thousand take the plain way many seconds: none of them is for warming up.
        warm_ups = 1 if count < 1000 else 0
        self.row(part, work, self.time(rounds, LISTINGS, warm_ups=warm_ups), limit)

    def list_10(self, part: str) -> None:
        self.lists(part, 10, 0.5, 15)

    def list_1000(self, part: str) -> None:
        self.lists(part, 1000, 0.01, 2)

    def declare(self, count: int) -> dict[str, dict[str, Any]]:
        """Declare VMs; gives how the generator is run for them."""
        self.toolkit.sh(
            "rm -rf /etc/microvms; mkdir -p /etc/microvms; i=0; "
            f"while [ $i -lt {count} ]; do "
            "printf 'runner = \"/opt/packages/vm%s\"\\norder = 10\\n' $i "
            "> /etc/microvms/vm$i.toml; i=$((i+1)); done"
        )
        output = "/tmp/generated"
        empty = ["sh", "-c", f"rm -rf {output}; mkdir {output}"]
        return {"toolkit": {"before": [empty], "timed": [GENERATOR, output, output, output]}}

    def generator(self, part: str) -> None:
        for count, limit in ((100, 30.0), (1000, 60.0)):
            found = self.time(15, self.declare(count))
            work = f"generator, {count} declared VMs"
            self.results.rows.append(Row(part, work, found["toolkit"], None, limit))
        self.toolkit.sh("rm -rf /etc/microvms")

    def help(self, part: str) -> None:
        ways = {
            "toolkit": {"timed": ["microvm", "--help"]},
            "plain": {"timed": ["python3", "-c", "import click"]},
        }
        found = self.time(25, ways)
        beside = "python3 -c 'import click'"
        row = Row(part, "microvm --help", found["toolkit"], found["plain"], 1.5, beside=beside)
        self.results.rows.append(row)

    # -- the guest -----------------------------------------------------------------------------

    def guest(self, part: str) -> None:
        """A declared guest beside a command line of QEMU with nothing but what it boots by."""
        self.toolkit.build_image()
        words = "quiet loglevel=3 guest.name=vm"
        self.toolkit.host.write(
            "/root/vm.toml",
            f'kernel = "{IMAGE}/vmlinuz"\ninitrd = "{IMAGE}/initrd"\nmem = {GUEST_MEM}\n'
            f"kernelParams = {json.dumps(words.split())}\n",
        )
        self.toolkit.sh("microvm build /root/vm.toml -o /opt/guest && mkdir -p /root/state")
        clock = self.toolkit.sh("sed -n 's/^cpu MHz.*: //p' /proc/cpuinfo").split()[0]
        by_hand = [
            *("qemu-system-x86_64", "-M", "microvm,accel=tcg,pcie=on,rtc=on,acpi=on"),
            *("-cpu", "max", "-m", str(GUEST_MEM), "-smp", "1", "-nodefaults", "-no-user-config"),
            *("-display", "none", "-no-reboot"),
            *("-kernel", f"{IMAGE}/vmlinuz", "-initrd", f"{IMAGE}/initrd"),
            *("-append", f"console=ttyS0 {words} tsc_early_khz={clock.replace('.', '')}"),
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
        ]
        ways = {
            "toolkit": {"argv": ["/opt/guest/bin/microvm-run"], "directory": "/root/state"},
            "plain": {"argv": by_hand, "directory": "/root/state"},
        }
        found = self.ask(kind="boots", rounds=9, ways=ways)

        def figures(of: Callable[[dict[str, float]], float]) -> dict[str, Figures]:
            return {way: Figures(tuple(map(of, rounds))) for way, rounds in found.items()}

        for work, unit, of in (
            ("exec to the guest's first process", "ms", lambda each: 1000 * each["boots"]),
            ("memory of the hypervisor's process", "kB PSS", lambda each: each["pss"]),
            (
                f"memory that the guest lacks of {GUEST_MEM} MB",
                "MB",
                lambda each: GUEST_MEM - each["memory"],
            ),
        ):
            pair = figures(of)
            self.results.rows.append(
                Row(part, work, pair["toolkit"], pair["plain"], 1.05, unit, "QEMU by hand")
            )

    def declared(self, part: str) -> None:
        """Installing declared guests of one kernel, and a boot with them."""
        toolkit, few, many = self.toolkit, *DECLARED
        declared.prepare(toolkit)
        seconds: dict[tuple[int, str], float] = {}
        for count in (many, few):
            names = declared.declare(toolkit, count)
            for which in ("first", "second"):
                with step(f"{part}: {which} apply of {count}"):
                    seconds[count, which] = declared.apply(toolkit)
        guests = f"{few} declared guests of {declared.KERNEL_MB + declared.INITRD_MB} MB"
        for which, limit in (("first", 10_000.0), ("second", 1_000.0)):
            found = Figures((1000 * seconds[few, which],))
            self.results.rows.append(
                Row(part, f"{which} microvm apply, {guests}", found, None, limit)
            )
            each = {count: Figures((1000 * seconds[count, which] / count,)) for count in DECLARED}
            work = f"{which} microvm apply, for each of {many}"
            # Work that grew with the square would show 3.3 here.
            row = Row(part, work, each[many], each[few], 1.5, beside=f"for each of {few}")
            self.results.rows.append(row)
        boots: dict[str, list[float]] = {"guests": [], "runners": []}
        # The first boot with each fills the caches.
        for kind, samples in boots.items():
            if kind == "runners":
                declared.as_runners(toolkit, names)
            with step(f"{part}: boots with {few} {kind}"):
                samples += [1000 * declared.boot(toolkit, names) for _ in range(4)][1:]
        pair = {kind: Figures(tuple(samples)) for kind, samples in boots.items()}
        work = f"boot until {guests} are up"
        row = Row(part, work, pair["guests"], pair["runners"], 1.1, beside="by runner =")
        self.results.rows.append(row)
        declared.clear(toolkit)

    # -- growth --------------------------------------------------------------------------------

    def growth(self, part: str) -> None:
        """The same work at ever more VMs, all of them running."""
        self.grow_to(part, *COUNTS)

    def growth_1000(self, part: str) -> None:
        """That at a thousand, which takes longer than all else."""
        self.grow_to(part, 1000)

    def grow_to(self, part: str, *counts: int) -> None:
        for count in counts:
            with step(f"{part}: {count}"):
                self.grow(count)

    def grow(self, count: int) -> None:
        names = [f"vm{number}" for number in range(count)]
        self.make([plain.PlainStub(name=name, system=SYSTEM) for name in names])
        rounds = {1: 4, 10: 3, 100: 2, 1000: 1}[count]
        ups: dict[str, list[float]] = {}
        downs: dict[str, list[float]] = {}
        lists: dict[str, list[float]] = {}
        reloads: dict[str, list[float]] = {}
        # The first round shows systemd the units; with a thousand of them that takes too long
        # to be thrown away.
        warm_ups = 1 if count < 1000 else 0
        for number in range(rounds + warm_ups):
            for way in ("toolkit", "plain") if number % 2 else ("plain", "toolkit"):
                up = self.time(1, {way: {"timed": start(way, names)}}, by_systemd=True, warm_ups=0)
                listed = self.time(1, {way: LISTINGS[way]}, warm_ups=0)
                reload = {way: {"timed": ["systemctl", "daemon-reload"]}}
                reloaded = self.time(1, reload, by_systemd=True, warm_ups=0)
                down = self.time(1, {way: {"timed": stop(way, names)}}, by_systemd=True, warm_ups=0)
                if number >= warm_ups:
                    ups.setdefault(way, []).extend(up[way].samples)
                    downs.setdefault(way, []).extend(down[way].samples)
                    lists.setdefault(way, []).extend(listed[way].samples)
                    reloads.setdefault(way, []).extend(reloaded[way].samples)
        for work, samples, unit in (
            ("start all", ups, "ms"),
            ("stop all", downs, "ms"),
            ("list", lists, "ms"),
            ("daemon-reload, all running", reloads, "ms"),
        ):
            found = {way: Figures(tuple(values)) for way, values in samples.items()}
            self.results.growth.append(Growth(work, count, found["toolkit"], found["plain"], unit))
        generated = self.time(max(5, rounds), self.declare(count))
        self.toolkit.sh("rm -rf /etc/microvms")
        self.results.growth.append(Growth("generator", count, generated["toolkit"], None))


SYSTEM = "/nix/store/00000000000000000000000000000000-nixos-system-vm-24.11"
LISTINGS: dict[str, dict[str, Any]] = {
    "toolkit": {"timed": ["microvm", "-l"]},
    "plain": {"timed": [plain.LISTING]},
}


def taps(vm: str, count: int) -> tuple[Tap, ...]:
    return tuple(
        Tap(name=f"{vm}t{number}", mac=f"02:00:00:00:00:{number:02x}") for number in range(count)
    )


def with_shares(count: int) -> dict[str, Any]:
    """A package that brings its own supervisord, and the files by which the toolkit does without.

    It takes an option in those files: without one, only that supervisord would know them.
    """
    shares = tuple(
        Share(tag=f"data{number}", source=f"/srv/data{number}", posix_acl=True)
        for number in range(count)
    )
    return {"shares": shares, "virtiofsd_run": True}


def start(way: str, names: Sequence[str]) -> Command:
    template = {"toolkit": "microvm", "plain": "plain"}[way]
    return ["systemctl", "start", *(f"{template}@{name}.service" for name in names)]


def stop(way: str, names: Sequence[str]) -> Command:
    """All units of the VMs by name: systemctl waits for those that it is told to stop, alone."""
    if way == "toolkit":
        # All others stand on this one, and are therefore stopped before it.
        templates: tuple[str, ...] = ("microvm", "microvm-set-booted")
    else:
        templates = ("plain", *plain.SET_UP_UNITS)
    return [
        "systemctl",
        "stop",
        *(f"{unit}@{name}.service" for name in names for unit in templates),
    ]


PARTS: dict[str, Callable[[Bench, str], None]] = {
    "start-nothing": Bench.start_nothing,
    "start-tap": Bench.start_tap,
    "start-16-taps": Bench.start_16_taps,
    "start-share": Bench.start_share,
    "start-100": Bench.start_100,
    "stop-16-taps": Bench.stop_16_taps,
    "memory": Bench.memory,
    "list-10": Bench.list_10,
    "list-1000": Bench.list_1000,
    "generator": Bench.generator,
    "help": Bench.help,
    "declared": Bench.declared,
    "guest": Bench.guest,
    "growth": Bench.growth,
    "growth-1000": Bench.growth_1000,
}
# Not without being asked for: they take longer than the rest together.
LONG = {"growth-1000"}
