# SPDX-License-Identifier: MIT
"""`microvm console`, `exec`, `ssh` and `balloon`: into a guest that runs."""

from __future__ import annotations

import json
import sys
import time

import click

from .. import attach, balloon, console, guestagent, leases, runner, state
from ..attach import NobodyThere, Running
from ..errors import MicrovmHostError
from ..runner import VSOCK_SOCKET

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from ..paths import HostPaths

# As ssh(1) has it: any other code is the command's.
EXIT_NOT_RUN = 255
_LOOK_EVERY = 0.2  # seconds
# Between the start of the hypervisor and its sockets.
_STARTS_WITHIN = 5.0
_CONNECTS_WITHIN = 10.0
_BALLOONS_WITHIN = 5.0


def running(vm: str, host: HostPaths) -> Running:
    """A VM that runs; raises MicrovmHostError for one that does not."""
    found = attach.running(vm, host)
    if found is None:
        raise MicrovmHostError(f"microVM {vm} does not run", hint=f"microvm start {vm}")
    return found


def show_console(
    vm: str,
    host: HostPaths,
    *,
    read_only: bool,
    key: bytes | None,
    how: str,
    lines: int,
    wait: bool,
) -> None:
    """Be on a VM's console until it ends, or the key is pressed; raises MicrovmHostError.

    Args:
        how: what to say of the key, at the end of a line.
    """
    patience = time.monotonic() + _STARTS_WITHIN
    while True:
        try:
            end = _be_on_console(vm, host, read_only=read_only, key=key, how=how, lines=lines)
            break
        except NobodyThere as error:
            # On its way up perhaps, which is not to be told by its unit's state.
            is_starting = attach.running(vm, host) is not None and time.monotonic() < patience
            if not is_starting and not wait:
                if error.path is None:
                    error.hint = f"microvm start {vm}, or wait for it: --wait"
                raise
            time.sleep(_LOOK_EVERY)
    _say(f"{vm}: detached" if end == console.DETACHED else f"{vm}: the VM has ended")


def _be_on_console(
    vm: str, host: HostPaths, *, read_only: bool, key: bytes | None, how: str, lines: int
) -> str:
    """Gives how it ended; raises NobodyThere before anything is shown."""
    found = attach.running(vm, host)
    if found is None or not console.has_process(vm):
        raise NobodyThere(f"microVM {vm} does not run")
    reason = ""
    if not read_only and found.package.console_socket is None:
        reason = f": its package tells of no console to type at{_because(found.package)}"
    elif not read_only and found.package.console_socket is not None:
        keyboard = console.Keyboard(found, host)
        try:
            if keyboard.take():
                with found.connect(found.package.console_socket, _CONNECTS_WITHIN) as guest:
                    console.show_before(found, lines)
                    _say(f"{vm}: connected{how}")
                    return console.attach(guest, key)
            reason = f": {keyboard.holder()} has the keyboard"
        finally:
            keyboard.close()
    _say(f"{vm}: read-only{reason}{how}")
    return console.follow(found, lines, key, ends_with_input=not read_only)


def _because(package: runner.Package) -> str:
    if package.hypervisor in (None, "qemu"):
        return ""
    # Their consoles go to one place, and not to the journal and a socket at once: what is built
    # for them has its own on standard input, which is nothing in a service, and output.
    return f", since {package.hypervisor}'s is in the journal alone; `microvm ssh` logs in"


def execute(
    vm: str,
    host: HostPaths,
    argv: Sequence[str],
    *,
    has_input: bool,
    timeout: float,
    check: Callable[[str], None],
) -> NoReturn:
    """Run a command in a guest, and exit with its code, or EXIT_NOT_RUN.

    Args:
        check: raises MicrovmHostError for a VM that there is not.
    """
    try:
        check(vm)
        found = running(vm, host)
        path = found.package.agent_socket
        if path is None:
            is_qemu = found.package.hypervisor in (None, "qemu")
            raise MicrovmHostError(
                f"microVM {vm} has no port for a guest agent",
                hint=line_to_add("qemu.guestAgent = true", vm, host)
                if is_qemu
                else f"QEMU's alone is known, not {found.package.hypervisor}'s; `microvm ssh` "
                "runs commands, too",
            )
        given = sys.stdin.buffer.read() if has_input else None
        ended = guestagent.run(lambda within: found.connect(path, within), argv, given, timeout)
    except MicrovmHostError as error:
        click.echo(f"microvm: {error}", err=True)
        sys.exit(EXIT_NOT_RUN)
    except KeyboardInterrupt:
        click.echo(f"microvm: {vm}: the command runs on in the guest", err=True)
        sys.exit(130)
    sys.stdout.buffer.write(ended.out)
    sys.stdout.flush()
    sys.stderr.buffer.write(ended.err)
    sys.stderr.flush()
    if ended.is_cut:
        click.echo(f"microvm: {vm}: the agent kept only the beginning of the output", err=True)
    sys.exit(ended.code)


def ways_in(vm: str, host: HostPaths) -> tuple[str, list[str]]:
    """What ssh is to call a guest, and the ways that vsock.py may try to reach it.

    Without any, it is the guest's address, which ssh reaches by itself.

    Raises:
        MicrovmHostError: there is neither a vsock nor an address.
    """
    is_booted = state.booted(vm, host) is not None
    package = runner.load(host.booted(vm) if is_booted else host.current(vm))
    known = leases.known(host, neighbours=True) if is_booted else {}
    found = (each for mac in leases.macs(package.path) for each in known.get(mac, ()))
    address = next(found, None)
    if package.vsock_cid is None:
        if address is None:
            raise MicrovmHostError(
                f"microVM {vm} has no vsock CID to reach it by, and no address that this host "
                "knows",
                hint=line_to_add("vsock = {}", vm, host),
            )
        return address, []
    if package.has_own_vsock:
        # Of nobody but the VM's user, who is known while it runs.
        ways = [f"unix:{running(vm, host).uid}:{host.vm(vm)}/{VSOCK_SOCKET}"]
    else:
        ways = [f"cid:{package.vsock_cid}"]
    if address is not None:
        ways.append(f"tcp:{address}")
    return f"vsock/{package.vsock_cid}", ways


def show_or_set_balloon(vm: str, host: HostPaths, wanted: int | None, *, as_json: bool) -> None:
    """Print a guest's memory, after its balloon left it as many MB; raises MicrovmHostError."""
    found = running(vm, host)
    try:
        if wanted is None:
            memory: balloon.Memory | None = balloon.memory(found)
        else:
            memory = balloon.resize(found, wanted, _BALLOONS_WITHIN)
    except balloon.NoBalloon as error:
        error.hint = line_to_add("balloon = true", vm, host)
        raise
    if as_json:
        found_now = {
            "name": vm,
            "memory": memory and memory.whole,
            "actual": memory and memory.actual,
            "asked": wanted and wanted * balloon.MEBIBYTE,
        }
        click.echo(json.dumps(found_now, indent=2))
    elif memory is None:
        click.echo(f"{vm}: asked for {wanted} MB")
    else:
        actual, whole = (each // balloon.MEBIBYTE for each in (memory.actual, memory.whole))
        text = f"{vm}: {actual} MB of {whole} MB"
        if wanted is not None and memory.actual != wanted * balloon.MEBIBYTE:
            text += f", on the way to {wanted} MB as far as the guest goes along"
        click.echo(text)


def line_to_add(line: str, vm: str, host: HostPaths) -> str:
    """What to do for a VM that lacks something which a line of its declaration gives it."""
    path = host.declaration(vm)
    try:
        with open(path, encoding="utf-8", errors="replace") as source:
            texts = source.read().splitlines()
    except OSError:
        return f"its package has to be made with it, which for a declaration is `{line}`"
    tables = (number for number, text in enumerate(texts, 1) if text.lstrip().startswith("["))
    first = next(tables, None)
    # Below, it would be a key of that table.
    place = "" if first is None else f" above line {first}, the first that begins with '['"
    return f"write `{line}` into {path}{place}; then: microvm update -R {vm}"


def _say(text: str) -> None:
    """To people, beside what the guest says; a guest may have left the cursor anywhere."""
    click.echo(f"[microvm: {text}]", err=True)
