# SPDX-License-Identifier: MIT
"""Has systemd start, stop and run VMs, showing what happens meanwhile and why it failed."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress

from .. import listing, names, systemd, terminal_text, vsock
from ..errors import EXIT_CONFIG, MicrovmHostError, PackageError, one_line
from .progress import Line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from ..paths import HostPaths

_OF_SERVICE = ("ActiveState", "User", "Group", "SupplementaryGroups", "Environment") + (
    "TimeoutStopUSec",
    "ExecStart",
)
# Of microvm@.service, where the reasons are. A test compares the two.
CONFINEMENT = (
    "UMask=0077",
    "CapabilityBoundingSet=CAP_SETUID CAP_SETGID",
    "NoNewPrivileges=yes",
    "DevicePolicy=closed",
    "DeviceAllow=/dev/kvm rw",
    "DeviceAllow=/dev/net/tun rw",
    "DeviceAllow=/dev/vhost-net rw",
    "DeviceAllow=/dev/vhost-vsock rw",
    "DeviceAllow=/dev/vfio/vfio rw",
    "DeviceAllow=/dev/iommu rw",
    "DeviceAllow=char-macvtap rw",
    "DeviceAllow=char-vfio* rw",
    "DeviceAllow=char-usb_device rw",
    "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK AF_VSOCK",
    "SystemCallArchitectures=native",
    "SystemCallFilter=~@clock @cpu-emulation @module @obsolete @raw-io @reboot @swap",
    "SystemCallErrorNumber=EPERM",
    "LockPersonality=yes",
    "RestrictRealtime=yes",
    "RestrictSUIDSGID=yes",
    "ProtectClock=yes",
    "ProtectHostname=yes",
)
# What it ends before when the host shuts down; the same test.
AFTER = ("network.target", "remote-fs.target", "nss-user-lookup.target")
# getopt(3) of ssh.c: letters of options that take a value.
_SSH_OPTIONS_WITH_VALUE = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
_DOING = {"start": "starting", "stop": "stopping", "restart": "restarting"}
# Debian's packages of programs that a host may lack.
_PACKAGES = {"ssh": "openssh-client"}
# systemctl's words where polkit does not allow it.
_REFUSALS = ("Access denied", "authentication required")
_GONE_WITHIN = 30.0  # seconds


def run(verb: str, vms: Sequence[str]) -> None:
    """`systemctl VERB` for VMs, with the time on a terminal and the reason of a failure.

    Raises:
        PackageError: a package is wrong; what about it, was printed.
        MicrovmHostError: it failed; the reasons that the journal has were printed.
    """
    began = time.monotonic()
    since = f"@{time.time():.6f}"
    units, running = _units(verb, vms)
    progress = _Progress(f"{_DOING[verb]} {', '.join(vms)}")
    # Its standard error, which says "see journalctl", is replaced by what journalctl would show.
    job = subprocess.Popen(["systemctl", verb, "--", *units], stderr=subprocess.PIPE, text=True)
    try:
        while True:
            try:
                _, complaint = job.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                progress.show(time.monotonic() - began, lambda: _waited_for(units))
    except KeyboardInterrupt:
        job.wait()
        error = MicrovmHostError(
            f"interrupted; systemd goes on {_DOING[verb]} {', '.join(vms)}",
            hint=f"`microvm status {vms[0]}` shows how far it is",
        )
        error.exit_code = 130
        raise error from None
    finally:
        progress.clear()
    # A stop that ended in force is a stop to systemctl; the unit has it as a failure. So has a
    # set-up unit that could not undo something.
    failed = [unit for unit, state in systemd.states(*running).items() if state == "failed"]
    if job.returncode or failed:
        if os.geteuid() != 0 and any(word in complaint for word in _REFUSALS):
            raise MicrovmHostError("this needs root", hint=f"sudo microvm {verb} {' '.join(vms)}")
        sys.stderr.write(reasons(vms, since) or complaint)
        if not job.returncode and not {*failed} & {*_services(vms)}:
            raise MicrovmHostError(
                f"{', '.join(vms)} stopped, but not all that was set up could be undone: "
                f"{', '.join(failed)} failed",
                hint="`microvm reconcile --apply` tries again",
            )
        kind = PackageError if is_wrong_package(vms) else MicrovmHostError
        raise kind(
            f"could not {verb} {', '.join(vms)}", hint=f"`microvm status {vms[0]}` shows more"
        )


def select(verb: str, patterns: Sequence[str], host: HostPaths) -> list[str]:
    """The VMs that names and globs stand for; raises MicrovmHostError for one that is not there.

    A VM whose directory somebody deleted under it can still be stopped.
    """
    gone = [vm for vm in patterns if not listing.is_glob(vm) and not os.path.isdir(host.vm(vm))]
    running = _units(verb, gone)[1] if gone and verb == "stop" else []
    there = [vm for vm in patterns if vm not in gone or names.unit(vm) not in running]
    chosen = listing.select(there, host, declared_too=True)
    return [*dict.fromkeys([*chosen, *(vm for vm in patterns if vm not in there)])]


def _units(verb: str, vms: Sequence[str]) -> tuple[list[str], list[str]]:
    """The units to start or stop for VMs, and for a stop those of them that run now."""
    services = [names.unit(vm) for vm in vms]
    if verb != "stop":
        return services, []
    # systemd stops these with the VM anyway, but systemctl waits for none that it is not given.
    set_up = [unit for vm in vms for unit in names.set_up_units(vm)]
    states = systemd.states(*_services(vms), *set_up)
    running = [unit for unit, state in states.items() if state not in ("inactive", "failed")]
    return list(dict.fromkeys([*services, *running])), running


def _services(vms: Sequence[str]) -> list[str]:
    """The services that run VMs, in the foreground as well."""
    return [unit for vm in vms for unit in (names.unit(vm), names.foreground_unit(vm))]


def is_wrong_package(vms: Sequence[str]) -> bool:
    """Whether it is for a wrong package that one of the VMs is not up."""
    units = [unit for vm in vms for unit in (*names.set_up_units(vm), names.unit(vm))]
    failed = [unit for unit, state in systemd.states(*units).items() if state == "failed"]
    return any(
        systemd.show(unit, "ExecMainStatus").get("ExecMainStatus") == str(EXIT_CONFIG)
        for unit in failed
    )


def _wait_until_undone(vms: Sequence[str], progress: _Progress, began: float) -> None:
    # For who waits for a stop that somebody else has asked for.
    units = [unit for vm in vms for unit in (names.unit(vm), *names.set_up_units(vm))]
    deadline = time.monotonic() + _GONE_WITHIN
    while time.monotonic() < deadline:
        if not {"active", "activating", "deactivating"} & set(systemd.states(*units).values()):
            return
        progress.show(time.monotonic() - began)
        time.sleep(0.02)


def reasons(vms: Sequence[str], since: str) -> str:
    """The errors that the journal has of VMs, each once."""
    # What was said a moment ago may not be written yet.
    subprocess.run(["journalctl", "--sync"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    argv = ["journalctl", "--no-pager", "--quiet", "--output=cat", "--priority=3"]
    argv += [f"--since={since}"]
    for vm in vms:
        argv.append(f"--unit={names.unit(vm)}")
    found = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    lines = [line for line in found.stdout.splitlines() if not line.startswith("Failed to start")]
    return "".join(f"{line}\n" for line in dict.fromkeys(lines))


def _waited_for(units: Sequence[str]) -> str:
    """What the first unit on its way up or down says of itself in its status."""
    for unit in units:
        found = systemd.show(unit, "ActiveState", "StatusText")
        if found.get("ActiveState") in ("activating", "deactivating"):
            return one_line(found.get("StatusText", ""))
    return ""


class _Progress:
    """A line on a terminal that counts the seconds, from the first on."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._line = Line()

    def show(self, seconds: float, waited_for: Callable[[], str] = str) -> None:
        """Count the seconds, from the first on.

        Args:
            waited_for: what is waited for; nothing if that is not known.
        """
        if seconds >= 1 and self._line.is_seen:
            more = waited_for()
            self._line.show(f"{self._text} … {seconds:.0f} s{more and f': {more}'}")

    def clear(self) -> None:
        self._line.clear()


def run_in_foreground(vm: str, host: HostPaths) -> NoReturn:
    """Become `systemd-run`, which runs the hypervisor on this terminal.

    The units that set up what the VM needs are required by this transient one in place of
    microvm@NAME, and stop with it. The guard's work begins with a stop of microvm@NAME, which
    `microvm stop` asks for as well, or with the host's shutdown. It is not bound to this unit:
    starting microvm@NAME, which wants the guard and ends this, would contradict itself.

    Raises:
        MicrovmHostError: the VM runs already.
    """
    shown = subprocess.run(
        ["systemctl", "show", f"--property={','.join(_OF_SERVICE)}", "--", names.unit(vm)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    found = dict(line.split("=", 1) for line in shown.splitlines())
    # systemd refuses to start what is being stopped.
    if found["ActiveState"] in ("inactive", "failed", "deactivating"):
        progress = _Progress(f"waiting for the stop of {vm}")
        try:
            _wait_until_undone([vm], progress, time.monotonic())
        finally:
            progress.clear()
    else:
        raise MicrovmHostError(
            f"microVM {vm} is {found['ActiveState']} already", hint=f"microvm stop {vm}"
        )
    set_up = [*names.set_up_units(vm), names.set_up_target(vm)]
    # `{ path=/usr/libexec/microvm-host/helper ; argv[]=…`
    helper = found["ExecStart"].partition("path=")[2].partition(" ;")[0]
    properties = {
        "Description": f"MicroVM {vm} in the foreground",
        "Requires": " ".join(set_up),
        "Wants": names.guard_unit(vm),
        "After": " ".join([*set_up, *AFTER]),
        "Conflicts": names.unit(vm),
        # Stopped with all other VMs by `systemctl stop microvms.target`.
        "PartOf": "microvms.target",
        "Type": "exec",
        # What stops it says what it waits for.
        "NotifyAccess": "exec",
        "ExecStop": f"!{helper} stop {vm}",
        "TimeoutStopSec": found["TimeoutStopUSec"],
        "KillMode": "mixed",
        # The times of a stop, as its drop-ins have them.
        "Environment": " ".join(
            word for word in found["Environment"].split() if word.startswith("MICROVM_")
        ),
        "User": found["User"],
        "Group": found["Group"],
        "SupplementaryGroups": found["SupplementaryGroups"],
        "WorkingDirectory": host.vm(vm),
        "LimitNOFILE": "1048576",
        "LimitMEMLOCK": "infinity",
        "Slice": "machine.slice",
    }
    is_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    argv = ["systemd-run", "--quiet", "--wait", "--collect", "--pty" if is_terminal else "--pipe"]
    argv.append(f"--unit={names.foreground_unit(vm)}")
    argv += [f"--property={key}={value}" for key, value in properties.items() if value]
    argv += [f"--property={setting}" for setting in CONFINEMENT]
    sys.stderr.write(
        f"[microvm: {vm} runs on this terminal until its guest powers off; "
        f"`microvm stop {vm}` on another one shuts it down]\n"
    )
    sys.stderr.flush()
    _become([*argv, helper, "start", vm])


def become_ssh(
    user: str, vm: str, to: str, ways: Sequence[str], arguments: Sequence[str]
) -> NoReturn:
    """Become ssh, connected to a guest.

    Args:
        user: whom to log in as; empty if the arguments say it.
        to: what ssh is to call it: its address, for ssh to connect to, unless there are ways.
        ways: how vsock.py is to reach it; they come before what is written in ssh's configuration.
    """
    # CIDs and addresses are given anew to other VMs; a VM's name stays.
    alias = f"microvm-{vm}"
    argv = ["ssh"]
    if ways:
        words = [sys.executable, "-IS", os.path.abspath(vsock.__file__)]
        proxy = [*map(_for_ssh, words), "%p", *map(_for_ssh, ways)]
        argv += ["-o", f"ProxyCommand={' '.join(proxy)}", "-o", "ProxyUseFdpass=yes"]
        # Not vsock/CID, for which systemd's own configuration has no key checked.
        to = alias
    argv += ["-o", "CheckHostIP=no", "-o", f"HostKeyAlias={alias}"]
    # ssh takes the first user that it is given: this one, if there is one.
    argv += ["-l", user] if user else []
    _become([*argv, to, *arguments])


def names_user(arguments: Sequence[str]) -> bool:
    """Whether arguments for ssh say whom to log in as, before the command begins (ssh(1))."""
    words = iter(arguments)
    for word in words:
        if word == "--" or not word.startswith("-") or word == "-":
            return False
        for number, letter in enumerate(word[1:], 2):
            if letter in _SSH_OPTIONS_WITH_VALUE:
                value = word[number:] or next(words, "")
                option = value.replace("=", " ").split()[:1]
                if letter == "l" or (
                    letter == "o" and [each.lower() for each in option] == ["user"]
                ):
                    return True
                break
    return False


def _for_ssh(word: str) -> str:
    """A word of a ProxyCommand, in which ssh replaces what begins with % and a shell the rest."""
    return shlex.quote(word).replace("%", "%%")


def show_journal(vm: str, arguments: Sequence[str]) -> NoReturn:
    """Show the journal of a VM and all that belongs to it, and exit as journalctl does."""
    units = [names.unit(vm), *names.set_up_units(vm)]
    units += [f"microvm-machined@{vm}.service"]
    units += [f"install-microvm@{vm}.service", f"microvm-virtiofsd-{names.escape(vm)}-*"]
    # --all: lines with colours, too, which would be "[735B blob data]" otherwise.
    argv = ["journalctl", "--all", *(f"--unit={unit}" for unit in units), *arguments]
    sys.exit(_run_cleaned(argv, has_pager=not {"-f", "--follow", "--no-pager"} & {*arguments}))


def readiness(vm: str) -> str:
    """What the administrator has a VM's start wait for (MICROVM_READINESS=); `` for nothing."""
    try:
        words = systemd.show(names.unit(vm), "Environment").get("Environment", "").split()
    except MicrovmHostError:
        return ""
    given = [word.partition("=")[2] for word in words if word.startswith("MICROVM_READINESS=")]
    return given[-1] if given else ""


def show_unit(vm: str) -> int:
    """Print `systemctl status` of a VM; gives its exit code, 3 for one that does not run."""
    return _run_cleaned(["systemctl", "status", "--all", "--", names.unit(vm)], has_pager=False)


def _run_cleaned(argv: Sequence[str], *, has_pager: bool) -> int:
    """Run a program that shows what guests said, without what commands a terminal.

    Args:
        has_pager: on a terminal, the program's output goes through a pager.
    """
    environment = dict(os.environ)
    is_terminal = sys.stdout.isatty()
    if is_terminal and not environment.get("NO_COLOR"):
        # To a pipe it would write none.
        environment.setdefault("SYSTEMD_COLORS", "1")
    pager = _start_pager() if is_terminal and has_pager else None
    sink = sys.stdout.buffer if pager is None or pager.stdin is None else pager.stdin
    clean = terminal_text.Lines()
    words = [argv[0], "--no-pager", *argv[1:]]
    try:
        source = subprocess.Popen(words, stdout=subprocess.PIPE, env=environment)
    except FileNotFoundError as error:
        raise MicrovmHostError(f"this host has no {argv[0]}") from error
    code = 0
    with source:
        assert source.stdout is not None
        try:
            while data := os.read(source.stdout.fileno(), 65536):
                sink.write(clean(data))
                sink.flush()
            sink.write(clean.rest())
            sink.flush()
            code = source.wait()
        except KeyboardInterrupt:
            # So one leaves what follows.
            source.terminate()
            code = 130
        except BrokenPipeError:
            source.terminate()
            if pager is None:
                raise
    if pager is not None:
        with suppress(BrokenPipeError):
            sink.close()
        pager.wait()
    return code


def _start_pager() -> subprocess.Popen[bytes] | None:
    """What systemd's own programs would take for one; None without any."""
    wanted = os.environ.get("SYSTEMD_PAGER", os.environ.get("PAGER", "less"))
    if wanted in ("", "cat"):
        return None
    # As systemctl(1) sets it: only colours reach the terminal as they are.
    environment = {**os.environ, "LESS": os.environ.get("SYSTEMD_LESS", "FRSXMK")}
    try:
        return subprocess.Popen(shlex.split(wanted), stdin=subprocess.PIPE, env=environment)
    except (FileNotFoundError, ValueError):
        return None


def disable(vm: str) -> None:
    """Do not start a VM at boot any more."""
    subprocess.run(["systemctl", "disable", "--quiet", "--", names.unit(vm)], check=False)


def _become(argv: list[str]) -> NoReturn:
    # Python ignores it, and `microvm logs | head` is to end journalctl.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)
    except FileNotFoundError as error:
        package = _PACKAGES.get(argv[0])
        hint = f"install it (on Debian: {package})" if package else ""
        raise MicrovmHostError(f"this host has no {argv[0]}", hint=hint) from error
