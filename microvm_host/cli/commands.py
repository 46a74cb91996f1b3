# SPDX-License-Identifier: MIT
"""The sub-commands of `microvm`, as click knows them."""

from __future__ import annotations

import os
import sys

import click

from .. import __version__, names
from ..errors import EXIT_CONFIG, EXIT_FAILED, MicrovmHostError, UsageError
from ..paths import HostPaths
from ..source import Source
from .group import Commands
from .later import Later

TYPE_CHECKING = False
if TYPE_CHECKING:
    import json
    import shlex
    from collections.abc import Callable

    from .. import adopt as adoption
    from .. import apply as application
    from .. import balloon as ballooning
    from .. import (
        closures,
        install,
        listing,
        microvm_nix,
        pcilisting,
        reconcile,
        runner,
        service,
        state,
        systemd,
        users,
    )
    from .. import console as consoles
    from .. import init as initial
    from .. import network as networking
    from .. import remove as removal
    from . import access, built, emulation, jobs, networks, pausing, progress, start_many, table
    from . import fresh as fresh_guests
    from . import history as histories
    from . import pci as pci_commands
    from . import status as status_pages
else:
    json, shlex = Later("json"), Later("shlex")
    closures, emulation = Later("..closures"), Later(".emulation")
    microvm_nix = Later("..microvm_nix")
    adoption, application = Later("..adopt"), Later("..apply")
    ballooning, consoles = Later("..balloon"), Later("..console")
    install, listing, pcilisting = Later("..install"), Later("..listing"), Later("..pcilisting")
    reconcile, runner, state = Later("..reconcile"), Later("..runner"), Later("..state")
    service, systemd, users = Later("..service"), Later("..systemd"), Later("..users")
    access, built, fresh_guests = Later(".access"), Later(".built"), Later(".fresh")
    initial, jobs, networks = Later("..init"), Later(".jobs"), Later(".networks")
    histories = Later(".history")
    start_many, status_pages = Later(".start_many"), Later(".status")
    networking, removal = Later("..network"), Later("..remove")
    pausing, progress = Later(".pausing"), Later(".progress")
    pci_commands, table = Later(".pci"), Later(".table")

HOST = HostPaths.from_environment()

_EPILOG = """Other names: ls and ps for list, rm for remove. The flags of microvm.nix work
too: -l, -c NAME [-f FLAKE], -u NAMES [-R], -r NAME, -s NAME."""


NAME = names.vm_name


def _name_or_glob(text: str) -> str:
    return text if listing.is_glob(text) else names.vm_name(text)


def _at_least(megabytes: int) -> Callable[[str], int]:
    """What reads a size as people write it, and takes none that is smaller."""

    def read(text: str) -> int:
        size: int = ballooning.megabytes(text)
        if size < megabytes:
            raise UsageError(f"{text!r} is too small", hint=f"at least {megabytes}M")
        return size

    return read


NAMES = click.argument("vms", metavar="NAME...", type=_name_or_glob, nargs=-1, required=True)
OPTIONAL_NAMES = click.argument("vms", metavar="[NAME...]", type=_name_or_glob, nargs=-1)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")


@click.group(cls=Commands, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="microvm-host")
def microvm() -> None:
    """Run microVMs as services of this host.

    A VM is the unit microvm@NAME.service: systemctl and journalctl know it like any other.
    """


@microvm.command("list")
@OPTIONAL_NAMES
@click.option(
    "--check", is_flag=True, help="Ask what flakes and declarations would give now; nix is slow."
)
@click.option("-a", "--all", is_flag=True, expose_value=False, help="Show all VMs, as without it.")
@click.option(
    "-l",
    "--lines",
    "as_lines",
    is_flag=True,
    help="A line each, with what to do next, as `microvm -l`.",
)
@JSON
def list_(vms: tuple[str, ...], check: bool, as_lines: bool, as_json: bool) -> None:
    """Show the VMs: state, version, address, memory."""
    newest = _newest if check else None
    only = tuple(listing.select(vms, HOST))
    if as_json:
        rows = listing.rows(HOST, only, newest, neighbours=True, details=True)
        click.echo(json.dumps([listing.as_json(row) for row in rows], indent=2))
    else:
        table.show_list(HOST, only, newest, as_lines=as_lines)


def _newest(name: str, source: Source) -> listing.Version | None:
    try:
        if source.kind == "declaration":
            path = install.would_be(name, source, HOST)
            return listing.Version(path) if path else None
        click.echo(f"evaluating {source.reference} for {name} …", err=True)
        found = install.evaluate(name, source.reference)
    except MicrovmHostError as error:
        click.echo(f"microvm: {name}: {error}", err=True)
        return None
    try:
        return listing.Version(found, os.readlink(f"{found}/share/microvm/system"))
    except OSError:
        # Not built yet, so the package's own path is all there is to compare.
        current = os.path.realpath(HOST.current(name))
        return None if found == current else listing.Version(found)


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@click.option("-f", "--flake", metavar="FLAKE", help="Build the package of NAME from this flake.")
@click.option("--runner", "path", metavar="PATH", help="Use the runner package at PATH.")
@click.option("--user", metavar="USER", help="Run it as USER; `auto` makes one of its own.")
@click.option("--start", is_flag=True, help="Start it at once.")
def create(vm: str, flake: str | None, path: str | None, user: str | None, start: bool) -> None:
    """Make a VM from a flake or a runner package.

    nix builds a flake. Without --flake and --runner, the flake is git+file:///etc/nixos, as with
    microvm.nix.
    """
    if flake and path:
        raise UsageError("--flake and --runner do not go together")
    _as_root()
    if path:
        source = Source("runner", os.path.abspath(path))
    else:
        source = Source("flake", _absolute_flake(flake or "git+file:///etc/nixos"))
    chosen = None if user is None else users.checked(user)
    change = install.create(vm, source.checked(), HOST, chosen)
    click.echo(change.describe())
    _say_what_is_not_done(vm)
    if start:
        jobs.run("start", [vm])
    else:
        click.echo(f"start it: systemctl start {names.unit(vm)}")


def _say_what_is_not_done(vm: str) -> None:
    package = runner.load(HOST.current(vm))
    for notice in microvm_nix.notices(package, HOST.vm(vm)):
        click.echo(f"microvm: {vm}: {notice}", err=True)


def _absolute_flake(flake: str) -> str:
    """A flake given by a path is remembered by its absolute path."""
    return os.path.abspath(flake) if flake.startswith(".") else flake


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@click.option("--from", "former", metavar="USER", help="Whose files to take; default: microvm.")
@click.option("--user", metavar="USER", help="Run it as USER from now on; `auto` makes one.")
def adopt(vm: str, former: str | None, user: str | None) -> None:
    """Give a VM's files to the user that it runs as.

    For a VM whose user was changed. What belongs to others than the former user stays as it is,
    and is listed.
    """
    _as_root()
    _existing(vm)
    with removal.kept_down(vm, HOST):
        adoption.check(vm, HOST)
        before = users.uid(former) if former else service.identity(vm).uid
        if user is not None:
            if os.path.exists(HOST.declaration(vm)):
                raise MicrovmHostError(
                    f"microVM {vm} is declared, and its declaration says which user it has",
                    path=HOST.declaration(vm),
                    hint=f'write user = "{users.checked(user)}" there',
                )
            users.ensure(vm, users.checked(user), HOST)
            users.write_drop_in(vm, user, HOST)
        identity = service.identity(vm)
        if before == identity.uid:
            before = users.uid(users.SHARED)
        done = adoption.adopt(vm, before, identity, HOST)
    for line in done.left:
        click.echo(f"{vm}: left as it is: {line}", err=True)
    click.echo(f"{vm}: runs as {identity.user}, who was given {len(done.given)} files")


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@click.argument("size", metavar="[SIZE]", required=False)
@JSON
def balloon(vm: str, size: str | None, as_json: bool) -> None:
    """Show or set how much memory a guest has.

    SIZE is what the guest keeps of its memory: 512M, 2G, or a number of MB.
    """
    wanted = None if size is None else ballooning.megabytes(size)
    _existing(vm)
    access.show_or_set_balloon(vm, HOST, wanted, as_json=as_json)


@microvm.command()
@click.argument("declaration", metavar="FILE")
@click.option("-o", "--output", metavar="DIR", required=True, help="Where to write the package.")
def build(declaration: str, output: str) -> None:
    """Make the package of a declaration without installing it.

    Needs no root.
    """
    built.build(os.path.abspath(declaration), output)
    click.echo(f"built {output}")


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@click.option("-r", "--read-only", is_flag=True, help="Do not type, only look.")
@click.option(
    *("-e", "--escape"),
    metavar="KEY",
    default="^]",
    help="The key that detaches, `none` for none; default: ^].",
)
@click.option(
    *("-n", "--lines"),
    metavar="N",
    type=click.IntRange(min=0),
    default=20,
    help="Show so many lines from before; default: 20.",
)
@click.option("-w", "--wait", is_flag=True, help="Wait until the VM runs.")
def console(vm: str, read_only: bool, escape: str, lines: int, wait: bool) -> None:
    """Attach to a VM's serial console; Ctrl-] detaches.

    The first one types, others look on.
    """
    key = consoles.escape_key(escape)
    _existing(vm)
    how = f"; {escape} detaches" if key and sys.stdin.isatty() else ""
    access.show_console(vm, HOST, read_only=read_only, key=key, how=how, lines=lines, wait=wait)


@microvm.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("-i", "--stdin", "has_input", is_flag=True, help="Give it what is on this input.")
@click.option(
    *("-t", "--timeout"),
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    help="How long the guest's agent may take to answer; default: 10.",
)
@click.argument("vm", metavar="NAME", type=NAME)
@click.argument("argv", metavar="[--] COMMAND...", nargs=-1, type=click.UNPROCESSED)
def execute(vm: str, argv: tuple[str, ...], has_input: bool, timeout: float) -> None:
    """Run a command in a guest, through QEMU's guest agent.

    Exits with the command's code.
    """
    words = argv[1:] if argv[:1] == ("--",) else argv
    if not words:
        raise UsageError("no command is given")
    access.execute(vm, HOST, words, has_input=has_input, timeout=timeout, check=_existing)


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@JSON
def show(vm: str, as_json: bool) -> None:
    """Show the command line of a declared VM's hypervisor.

    One word a line, as a start would have it now.
    """
    _existing(vm)
    words = built.command_line(vm, HOST)
    click.echo(json.dumps(words, indent=2) if as_json else "\n".join(words))


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@click.option("--diff", "as_diff", is_flag=True, help="Show what changed in the packages' files.")
@JSON
def history(vm: str, as_diff: bool, as_json: bool) -> None:
    """Show the packages that a VM had, and what changed."""
    _existing(vm)
    histories.show(vm, HOST, as_json=as_json, as_diff=as_diff)


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@click.argument("to", metavar="[TO]", required=False)
@click.option("-R", "--restart", is_flag=True, help="Restart it if it runs.")
def rollback(vm: str, to: str | None, restart: bool) -> None:
    """Give a VM the package that it had before.

    Or the one whose digest begins with TO. It keeps that until its declaration changes, or
    `microvm update` is asked for.
    """
    _as_root()
    _existing(vm)
    change = install.roll_back(vm, to, HOST)
    click.echo(f"{vm}: rolled back from {change.before} to {change.after}")
    runs = listing.rows(HOST, (vm,))[0].runs
    if runs and change.wants_restart and restart:
        jobs.run("restart", [vm])
    elif runs and change.wants_restart:
        click.echo(f"it still runs the former: systemctl restart {names.unit(vm)}")


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
@click.option(
    "--guest",
    type=click.Choice(("small", "debian")),
    default="small",
    help="small: this host's kernel and busybox, in memory. debian: Debian with cloud-init.",
)
@click.option(
    "--memory", metavar="SIZE", type=_at_least(64), help="Memory of the guest: 512M, 2G, or MB."
)
@click.option(
    "--kernel", metavar="PATH", help="small: the kernel's image; default: the host's own."
)
@click.option(
    "--suite", metavar="SUITE", help="debian: trixie, for example; default: the host's own."
)
@click.option(
    "--mirror", metavar="URL", help="debian: where packages come from; default: as apt's."
)
@click.option("--login", metavar="USER", help="debian: a user who may log in; default: admin.")
@click.option(
    "--ssh-key",
    "ssh_keys",
    metavar="FILE",
    multiple=True,
    help="debian: public keys that let them in; default: those in your ~/.ssh.",
)
@click.option(
    "--disk",
    metavar="SIZE",
    type=_at_least(2048),
    help="debian: size of its disk: 20G, or MB; default: 10240.",
)
@click.option("--fresh", is_flag=True, help="debian: make its root anew, of the newest packages.")
@click.option("--force", is_flag=True, help="Replace a declaration, which is kept as .old.")
@click.option("-o", "--output", metavar="FILE", help="Write the declaration there alone; - prints.")
def init(
    vm: str,
    guest: str,
    memory: int | None,
    kernel: str | None,
    suite: str | None,
    mirror: str | None,
    login: str | None,
    ssh_keys: tuple[str, ...],
    disk: int | None,
    fresh: bool,
    force: bool,
    output: str | None,
) -> None:
    """Make a guest, and a declaration that starts it.

    It is made of this host's own packages, or of Debian's, and boots to a login prompt.
    """
    _as_root()
    image = None if kernel is None else os.path.abspath(kernel)
    files = tuple(map(os.path.abspath, ssh_keys))
    wish = initial.Wish(vm, guest, image, memory, suite, mirror, login, files, disk, fresh)
    fresh_guests.make(wish, HOST, output, replaces=force)


@microvm.command()
@NAMES
@click.option(
    "-R",
    "--restart",
    is_flag=True,
    help="Restart those that run another version, start those that are down.",
)
def update(vms: tuple[str, ...], restart: bool) -> None:
    """Bring VMs up to date from where their packages come from."""
    _as_root()
    vms = tuple(listing.select(vms, HOST, declared_too=True))
    if any(os.path.lexists(HOST.declaration(vm)) for vm in vms):
        # What a declaration says of the unit holds from then on.
        systemd.reload()
    failed: MicrovmHostError | None = None
    for vm in vms:
        try:
            _update(vm, restart=restart)
        except MicrovmHostError as error:
            # One that fails does not keep the others from being updated.
            click.echo(f"microvm: {vm}: {error}", err=True)
            failed = failed or error
    if failed:
        sys.exit(failed.exit_code)


def _update(vm: str, *, restart: bool) -> None:
    change = install.update(vm, HOST)
    click.echo(change.describe())
    if change.is_new:
        _say_what_is_not_done(vm)
    # What runs counts, and then what would have run, as with microvm.nix.
    click.echo(closures.difference(change.booted or change.before, change.after), nl=False)
    runs = listing.rows(HOST, (vm,))[0].runs
    if restart and (change.wants_restart or not runs):
        jobs.run("restart", [vm])
    elif change.wants_restart:
        click.echo(f"it still runs the former: systemctl restart {names.unit(vm)}")


@microvm.command()
@NAMES
def start(vms: tuple[str, ...]) -> None:
    """Start VMs and wait until they run."""
    chosen = jobs.select("start", vms, HOST)
    emulation.warn(chosen, HOST)
    jobs.run("start", chosen)


@microvm.command()
@NAMES
def stop(vms: tuple[str, ...]) -> None:
    """Shut VMs down, and wait until nothing of them is left."""
    jobs.run("stop", jobs.select("stop", vms, HOST))


@microvm.command()
@NAMES
def restart(vms: tuple[str, ...]) -> None:
    """Stop VMs and start their current version."""
    chosen = jobs.select("restart", vms, HOST)
    emulation.warn(chosen, HOST)
    jobs.run("restart", chosen)


@microvm.command()
@NAMES
def pause(vms: tuple[str, ...]) -> None:
    """Pause guests, which keep their memory and devices."""
    pausing.pause(listing.select(vms, HOST), HOST)


@microvm.command()
@NAMES
def resume(vms: tuple[str, ...]) -> None:
    """Resume paused guests.

    QEMU pauses a guest by itself when the host's disk is full.
    """
    pausing.resume(listing.select(vms, HOST), HOST)


@microvm.command()
@click.argument("vm", metavar="NAME", type=NAME)
def run(vm: str) -> None:
    """Run a VM in the foreground until it ends."""
    _as_root()
    _existing(vm)
    jobs.run_in_foreground(vm, HOST)


@microvm.command(context_settings={"ignore_unknown_options": True})
@click.argument("target", metavar="[USER@]NAME")
@click.argument("arguments", metavar="[SSH-ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
def ssh(target: str, arguments: tuple[str, ...]) -> None:
    """Log in to a guest by ssh.

    Over vsock, or else by its address; as root unless USER, or ssh's own -l USER, is given.
    """
    user, at, vm = target.rpartition("@")
    names.vm_name(vm)
    _existing(vm)
    to, ways = access.ways_in(vm, HOST)
    if not at and not jobs.names_user(arguments):
        user = "root"
    jobs.become_ssh(user, vm, to, ways, arguments)


@microvm.command()
@OPTIONAL_NAMES
@JSON
def status(vms: tuple[str, ...], as_json: bool) -> None:
    """Show all about VMs, or without a NAME how all are."""
    if not vms:
        status_pages.show_all(HOST, as_json=as_json)
        return
    chosen = listing.select(vms, HOST)
    for vm in chosen:
        _existing(vm)
    is_glob = len(vms) > 1 or any(map(listing.is_glob, vms))
    sys.exit(status_pages.show(chosen, HOST, as_json=as_json, is_glob=is_glob))


@microvm.group(cls=Commands, invoke_without_command=True)
@click.option("-a", "--all", "bridges", is_flag=True, help="Show bridges too.")
@JSON
@click.pass_context
def pci(context: click.Context, bridges: bool, as_json: bool) -> None:
    """Show PCI devices, their IOMMU groups and their VMs."""
    if context.invoked_subcommand is None:
        pci_commands.show(HOST, bridges=bridges, as_json=as_json)
    elif bridges or as_json:
        raise UsageError(f"options of {context.invoked_subcommand} stand behind it")


@pci.command("check")
@click.argument("vm", metavar="NAME", type=NAME)
@JSON
def check_pci(vm: str, as_json: bool) -> None:
    """Show what a start would do about a VM's PCI devices.

    Or all that stands against it.
    """
    _as_root()
    _existing(vm)
    pci_commands.check(vm, HOST, as_json=as_json)


@microvm.group(cls=Commands, invoke_without_command=True)
@JSON
@click.pass_context
def network(context: click.Context, as_json: bool) -> None:
    """Show the ready-made network of VMs.

    systemd-networkd makes it once it is enabled.
    """
    if context.invoked_subcommand is None:
        networks.show(HOST, as_json=as_json)
    elif as_json:
        raise UsageError(f"options of {context.invoked_subcommand} stand behind it")


@network.command("enable")
def enable_network() -> None:
    """Make the network, now and at each boot: a bridge with DHCP and a way out."""
    _as_root()
    for line in networking.enable(HOST):
        click.echo(line)


@network.command("disable")
def disable_network() -> None:
    """Take the network away, once no VM is on it."""
    _as_root()
    for line in networking.disable(HOST):
        click.echo(line)


@microvm.command(context_settings={"ignore_unknown_options": True})
@click.argument("vm", metavar="NAME", type=NAME)
@click.argument("arguments", metavar="[JOURNALCTL-ARGUMENT...]", nargs=-1, type=click.UNPROCESSED)
def logs(vm: str, arguments: tuple[str, ...]) -> None:
    """Show the console and the messages of a VM.

    Those of the units that set it up are among them.

    Further arguments are journalctl's: -f follows, -b is this boot, -n 20 the last 20 lines.
    """
    _existing(vm)
    jobs.show_journal(vm, arguments)


@microvm.command()
@NAMES
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def remove(vms: tuple[str, ...], yes: bool) -> None:
    """Delete VMs that do not run, with their disks.

    Everything in their state directories is deleted.
    """
    _as_root()
    chosen = listing.select(vms, HOST)
    # All of them, before the first is deleted.
    for vm in chosen:
        removal.check(vm, HOST)
    for vm in chosen:
        question = f"Delete {vm} with all of its disks and data in {HOST.vm(vm)}?"
        if not yes and not _confirmed(question):
            raise MicrovmHostError(
                f"{vm} was not deleted: nobody confirmed it", hint="--yes deletes it unasked"
            )
        with removal.kept_down(vm, HOST):
            removal.check(vm, HOST)
            jobs.disable(vm)
            removal.remove(vm, HOST)
        click.echo(f"{vm}: removed")


@microvm.command()
@click.option("-n", "--dry-run", is_flag=True, help="Say what would be done, and do nothing.")
@JSON
def apply(dry_run: bool, as_json: bool) -> None:
    """Do now what boot would do with the declared VMs.

    Their declarations are in /etc/microvms.
    """
    if not dry_run:
        _as_root()
    outcomes, failed = [], 0
    line = progress.Line()
    for outcome in application.apply(HOST, start_many.bring_up, line.show, dry_run=dry_run):
        outcomes.append(outcome)
        if outcome.error is not None:
            failed = max(failed, outcome.error.exit_code)
            click.echo(f"microvm: {outcome.text}", err=True)
        elif not as_json:
            click.echo(outcome.text)
    if not dry_run:
        # What has not changed was said before, and to find it out again would take long.
        new = [each for each in outcomes if each.changed and each.error is None]
        emulation.warn([each.name for each in new if not each.is_undeclared], HOST)
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "name": outcome.name,
                        "changed": outcome.changed,
                        "message": outcome.text,
                        "failed": outcome.error is not None,
                        "undeclared": outcome.is_undeclared,
                    }
                    for outcome in outcomes
                ],
                indent=2,
            )
        )
    elif not outcomes:
        click.echo(f"no declarations in {HOST.declarations}", err=True)
    if failed:
        sys.exit(EXIT_CONFIG if failed == EXIT_CONFIG else EXIT_FAILED)


@microvm.command("reconcile")
@click.option("--apply", "is_wanted", is_flag=True, help="Undo it, not only show it.")
@click.option("-y", "--yes", is_flag=True, help="Stop undeclared VMs without asking.")
@JSON
def reconcile_(is_wanted: bool, yes: bool, as_json: bool) -> None:
    """Show what VMs left behind; --apply undoes it.

    Exit code 1 says that something is left.
    """
    if yes and not is_wanted:
        raise UsageError("--yes goes with --apply")
    if is_wanted:
        _as_root()
    found = reconcile.find(HOST)
    # How each is now: left, undone, failed, in-use or kept.
    states = ["kept" if each.is_kept else "left" for each in found]
    problems: list[tuple[str, ...]] = [() for _ in found]
    if is_wanted:
        places = {leftover: at for at, leftover in enumerate(found)}
        for outcome in reconcile.undo(found, HOST):
            at = places[outcome.leftover]
            problems[at] = outcome.problems
            states[at] = "failed" if outcome.problems else "undone"
            if outcome.is_in_use:
                states[at] = "in-use"
        for at, leftover in enumerate(found):
            if leftover.kind == "vm" and _may_stop(leftover, yes=yes):
                try:
                    jobs.run("stop", [leftover.vm])
                    states[at] = "undone"
                except MicrovmHostError as error:
                    states[at], problems[at] = "failed", (str(error),)
    if as_json:
        rows = zip(found, states, problems, strict=True)
        click.echo(json.dumps([_as_json(*row) for row in rows], indent=2))
    else:
        for leftover, state, lines in zip(found, states, problems, strict=True):
            click.echo(f"{leftover.vm}: {leftover.describe()}" + _AFTER[state])
            for line in lines:
                click.echo(f"microvm: {leftover.vm}: {line}", err=True)
        if not found:
            click.echo("nothing is left behind", err=True)
        elif "left" in states and not is_wanted:
            click.echo("`microvm reconcile --apply` undoes it", err=True)
    if {"left", "failed"} & set(states):
        sys.exit(EXIT_FAILED)


_AFTER = {"left": "", "kept": "", "undone": ": undone", "failed": ": stays"} | {
    "in-use": ": in use now",
}


def _as_json(leftover: reconcile.Leftover, state: str, problems: tuple[str, ...]) -> object:
    return {
        "vm": leftover.vm,
        "kind": leftover.kind,
        "what": leftover.what,
        "message": leftover.describe(),
        "state": state,
        "problems": list(problems),
    }


def _may_stop(leftover: reconcile.Leftover, *, yes: bool) -> bool:
    """Ask whether an undeclared VM may be stopped; without a terminal nobody can say so."""
    if yes:
        return True
    return _is_terminal() and _confirmed(f"{leftover.vm} {leftover.describe()}. Stop it?")


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _confirmed(question: str) -> bool:
    """Ask on the terminal; Ctrl-C and the end of the input are no yes."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        click.echo(err=True)
        return False


def _as_root() -> None:
    if os.geteuid() != 0:
        raise MicrovmHostError("this needs root", hint=f"sudo microvm {shlex.join(sys.argv[1:])}")


def _existing(vm: str) -> None:
    listing.require(vm, HOST)
    if state.pointed_to(HOST.current(vm)) is None and not os.access(HOST.vm(vm), os.X_OK):
        raise MicrovmHostError("cannot be read", path=HOST.vm(vm), hint="this needs root")
