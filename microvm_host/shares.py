# SPDX-License-Identifier: MIT
"""Shares of a VM: a socket that systemd holds for each, and a virtiofsd behind it on demand.

Each share is a transient socket and service. systemd listens, owned by the VM's user alone, and
starts virtiofsd when the hypervisor connects; nothing of ours stays, and after the hypervisor has
gone and come back the socket starts a new virtiofsd. Where a package brings its own
`bin/virtiofsd-run` and gives no share options, that script runs instead, in one transient
service, since it alone knows which shares are read-only.

A virtiofsd that fails starts the unit that tells of lost shares; one that ends in order may do so
because its hypervisor has ended, and starts a timer first. Where that is so, all of these units
are stopped before the timer elapses: an ordinary stop costs no process for it.
"""

from __future__ import annotations

import errno
import os
import stat
import time

from . import log, names, trust
from .errors import MicrovmHostError, PackageError
from .frozen import frozen
from .paths import NOTIFY_SOCKET, VIRTIOFSD_RUN
from .place import Place, is_roots_directory
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    from .identity import Identity
    from .paths import HostPaths
    from .plan import Step
    from .runner import Share
    from .systemd import Properties

    class Systemd(Protocol):
        """What is asked of systemd.Connection."""

        def start_transient(
            self, unit: str, properties: Properties, auxiliary: dict[str, Properties]
        ) -> None: ...

        def active_state(self, unit: str) -> str: ...


# Enough for any file tree in use; virtiofsd holds a descriptor for each file that the guest knows.
OPEN_FILES = 1048576
# A package's own supervisor was measured to take 3 s.
OWN_SCRIPT_WITHIN = 30.0  # seconds
# How long all of its sockets have to be listened at: a virtiofsd makes its socket first, and may
# fail right after that.
LISTENS_FOR = 0.2  # seconds
# From the end of a virtiofsd until it is asked whether its hypervisor has ended, too. That may give
# memory back first, systemd has to notice, and we to stop the timer; or it connects anew.
TOLD_AFTER = 5.0  # seconds
# The record of shares whose virtiofsd is not to end: `share`, the tag and, where a package's own
# script serves it, the socket and whose it was made.
SERVED = "served-shares"


@frozen
class Virtiofsd:
    """A virtiofsd of this host: the program in Rust, or QEMU's former one in C."""

    path: str
    is_legacy: bool = False


@frozen
class ServeShare:
    """A share whose socket systemd holds."""

    vm: str
    share: Share
    source: str
    socket: str
    state_directory: str
    identity: Identity
    virtiofsd: Virtiofsd
    systemd: Systemd
    # Whether virtiofsd runs as the VM's user, and not as root.
    as_user: bool = False

    def describe(self) -> str:
        mode = ", read-only" if self.share.read_only else ""
        if self.as_user:
            mode += f", with the rights of {self.identity.user} alone"
        return f"listen for share {self.share.tag} ({self.source}{mode})"

    def apply(self, record: Record) -> None:
        socket_unit = names.share_unit(self.vm, self.share.tag, ".socket")
        service_unit = names.share_unit(self.vm, self.share.tag, ".service")
        timer = names.share_lost_unit(self.vm, self.share.tag, ".timer")
        record.append("unit", socket_unit)
        record.append("unit", service_unit)
        record.append("unit", timer)
        record.append("socket", self.socket)
        served = _served(record)
        served.append("share", self.share.tag)
        with Place(self.socket, self.state_directory) as place:
            # Ours before systemd comes by, which would follow a link that is put there meanwhile.
            place.make_directories()
            self.systemd.start_transient(
                socket_unit,
                self.socket_properties(),
                {
                    service_unit: self.service_properties(),
                    timer: _timer_properties(self.vm, served.path),
                },
            )
            place.give(self.identity)

    def socket_properties(self) -> Properties:
        return {
            **_common(self.vm, f"Socket of share {self.share.tag} of microVM {self.vm}"),
            # By default a socket stops after all services, when the host shuts down: after the
            # unit that waits, in stopping, for this one. What else the default gives is here.
            "DefaultDependencies": ("b", False),
            "Conflicts": ("as", ["shutdown.target"]),
            "Before": ("as", [*_vm_units(self.vm), "shutdown.target"]),
            "Listen": ("a(ss)", [("Stream", self.socket)]),
            # Root's at first. SocketUser= would make it the VM's at the price of a process.
            "SocketMode": ("u", 0o600),
            "RemoveOnStop": ("b", True),
        }

    def service_properties(self) -> Properties:
        argv = virtiofsd_argv(self.virtiofsd, self.share, self.source)
        properties: dict[str, tuple[str, object]] = {
            **_common(self.vm, f"Share {self.share.tag} of microVM {self.vm}"),
            **_command(argv),
            **_confined(RIGHTS_OF_A_USER if self.as_user else RIGHTS),
            # What is shared may lie on any of these, and is in use until this has ended.
            "After": ("as", ["local-fs.target", "remote-fs.target"]),
            # It is not started anew by itself: a new one knows nothing of the files that the guest
            # has open. The socket still starts one for a hypervisor that connects anew.
            "OnFailure": ("as", [names.share_lost_unit(self.vm, self.share.tag)]),
            # To have been told to end is no failure for systemd, and an error of the protocol none
            # for virtiofsd.
            "OnSuccess": ("as", [names.share_lost_unit(self.vm, self.share.tag, ".timer")]),
            "LimitNOFILE": ("t", OPEN_FILES),
            **(
                {"User": ("s", str(self.identity.uid)), "Group": ("s", str(self.identity.gid))}
                if self.as_user
                else {}
            ),
            # Not even a virtiofsd that the guest took over writes to a read-only share.
            **({"ReadOnlyPaths": ("as", [self.source])} if self.share.read_only else {}),
        }
        return properties


@frozen
class RunOwnScript:
    """The package's own supervision of virtiofsd, for all of its shares."""

    vm: str
    program: str
    state_directory: str
    # By tag.
    sockets: dict[str, str]
    sources: tuple[str, ...]
    identity: Identity
    systemd: Systemd

    def describe(self) -> str:
        return f"run {VIRTIOFSD_RUN} of the package for {len(self.sockets)} shares"

    def apply(self, record: Record) -> None:
        unit = names.own_share_unit(self.vm)
        teller, timer, watch = (
            names.share_lost_unit(self.vm, "", each) for each in (".service", ".timer", ".path")
        )
        # The teller last: it may wait a while, and systemd keeps the unit that long which it is
        # the OnFailure= of.
        for each in (watch, unit, timer, teller):
            record.append("unit", each)
        served = _served(record)
        # What says here whose the sockets were is not of another start.
        served.clear()
        for socket in self.sockets.values():
            record.append("socket", socket)
            with Place(socket, self.state_directory) as place:
                place.make_directories()
                # One of an earlier run would be taken for a sign that virtiofsd is there.
                place.remove_socket()
        for path in self._files():
            record.append("file", path)
            with Place(path, self.state_directory) as place:
                place.reserve()
        self.systemd.start_transient(
            unit, self.properties(), {timer: _timer_properties(self.vm, served.path)}
        )
        self._wait_for_sockets(unit)
        for tag, socket in self.sockets.items():
            # The script gave it to a group, perhaps.
            with Place(socket, self.state_directory) as place:
                place.give(self.identity)
            served.append("share", tag, socket, str(self.identity.uid))
        try:
            self.systemd.start_transient(watch, self._watch_properties(), {})
        except MicrovmHostError as error:
            # The VM is well without; systemd has only so many watches.
            log.warning(f"if a share is lost, that may not be noticed: {error}", vm=self.vm)

    def _files(self) -> tuple[str, ...]:
        """What virtiofsd and supervisord write beside the sockets, through links if there are."""
        supervisord = ("supervisord.log", "supervisord.pid")
        return (
            *(f"{socket}.pid" for socket in self.sockets.values()),
            *(f"{self.state_directory}/{name}" for name in supervisord),
        )

    def properties(self) -> Properties:
        return {
            **_common(self.vm, f"Shares of microVM {self.vm}"),
            **_command([self.program]),
            "WorkingDirectory": ("s", self.state_directory),
            "OnFailure": ("as", [names.share_lost_unit(self.vm)]),
            "OnSuccess": ("as", [names.share_lost_unit(self.vm, "", ".timer")]),
            # One virtiofsd that is killed for lack of memory is one share, and not all.
            "OOMPolicy": ("s", "continue"),
            "LimitNOFILE": ("t", OPEN_FILES),
            # Scripts report to systemd, and may end where they cannot. What they say is not
            # heard: after STOPPING=1 systemd would kill all of this when TimeoutStopSec= is over.
            "NotifyAccess": ("s", "none"),
            "Environment": ("as", [f"NOTIFY_SOCKET={NOTIFY_SOCKET}"]),
            "PrivateTmp": ("b", True),
            **_confined(RIGHTS_OF_A_SCRIPT),
            # It runs as root in a directory where the VM's user makes files, and links.
            "ProtectSystem": ("s", "strict"),
            "ReadWritePaths": ("as", [self.state_directory, *self.sources]),
            # QEMU's former virtiofsd locks in there.
            "RuntimeDirectory": ("as", ["virtiofsd"]),
            "RuntimeDirectoryPreserve": ("s", "yes"),
        }

    def _watch_properties(self) -> Properties:
        """The script may start a virtiofsd again that died, which makes its socket anew."""
        return {
            **_described(f"Watch over the sockets of shares of microVM {self.vm}"),
            "Paths": ("a(ss)", [("PathChanged", socket) for socket in self.sockets.values()]),
        }

    def _wait_for_sockets(self, unit: str) -> None:
        # Its own word, sd_notify, is not in packages of all years; the sockets are.
        deadline = time.monotonic() + OWN_SCRIPT_WITHIN
        since: float | None = None
        while since is None or time.monotonic() - since < LISTENS_FOR:
            missing = [path for path in self.sockets.values() if not self._is_listened_at(path)]
            if not missing:
                since = since or time.monotonic()
            elif self.systemd.active_state(unit) != "active":
                raise MicrovmHostError(
                    f"{VIRTIOFSD_RUN} ended before it listened at {missing[0]}",
                    path=self.program,
                    hint=f"`journalctl -u '{unit}'` says more",
                )
            elif time.monotonic() > deadline:
                raise MicrovmHostError(
                    f"{VIRTIOFSD_RUN} does not listen at {missing[0]} after "
                    f"{OWN_SCRIPT_WITHIN:.0f} s",
                    path=self.program,
                    hint=f"`journalctl -u '{unit}'` says more",
                )
            else:
                since = None
            time.sleep(0.02)

    def _is_listened_at(self, path: str) -> bool:
        with Place(path, self.state_directory) as place:
            return place.is_listened_at()


def plan(
    vm: str,
    package: str,
    shares: Sequence[Share],
    identity: Identity,
    host: HostPaths,
    systemd: Systemd,
) -> list[Step]:
    """What makes the shares of a VM reachable.

    Args:
        package: the directory of the runner package.

    Raises:
        PackageError: a socket would lie outside of the state directory, or two at one place.
        MicrovmHostError: a source does not exist, or there is no virtiofsd to serve it.
    """
    state = host.vm(vm)
    sockets = {share.tag: socket_path(share, state, package) for share in shares}
    # The reader compared what the package says; here `x` and `STATE-DIRECTORY/x` are the same.
    tags = {path: tag for tag, path in sockets.items()}
    for tag, path in sockets.items():
        if tags[path] != tag:
            raise PackageError(f"the shares {tag!r} and {tags[path]!r} have one socket", path=path)
    sources = {share.tag: source_path(share, state) for share in shares}
    by = trust.suspect(identity)
    weak = {tag: trust.exchangeable(source, by) for tag, source in sources.items()}
    script = f"{package}/{VIRTIOFSD_RUN}"
    if os.path.exists(script) and not any(share.options_given for share in shares):
        for tag, place in weak.items():
            if place:
                raise MicrovmHostError(
                    f"is on the way to the source of share {tag!r}, and {identity.user} could put "
                    f"something else there, which the package's {VIRTIOFSD_RUN} would export as "
                    "root",
                    path=place,
                    hint=f"{_how_to_keep(place, state)}, or give the share's options in files: "
                    f"virtiofsd then runs as {identity.user}",
                )
        return [
            RunOwnScript(
                vm,
                script,
                state,
                sockets,
                tuple(sources.values()),
                identity,
                systemd,
            )
        ]
    virtiofsd = find_virtiofsd(host.virtiofsd_places())
    steps = [
        ServeShare(
            vm,
            share,
            sources[share.tag],
            sockets[share.tag],
            state,
            identity,
            virtiofsd,
            systemd,
            # As root it would export whatever they put there between now and its start.
            as_user=weak[share.tag] is not None,
        )
        for share in shares
    ]
    for step in steps:
        place = weak[step.share.tag]
        if place is not None and virtiofsd.is_legacy:
            raise MicrovmHostError(
                f"is on the way to the source of share {step.share.tag!r}, and {identity.user} "
                "could put something else there: virtiofsd has to run as that user, which QEMU's "
                "former one cannot",
                path=place,
                hint=f"{_how_to_keep(place, state)}, or install a newer virtiofsd",
            )
        # Raises what the program cannot do, before the first share is set up.
        step.service_properties()
    return [*steps]


def _how_to_keep(place: str, state_directory: str) -> str:
    """What keeps the VM's user from putting something else in a place on the way to a source."""
    if os.path.dirname(place) == os.path.realpath(state_directory):
        # The state directory is sticky.
        return f"make it root's, whoever owns what is in it: chown root: '{place}'"
    return "move what is shared to a directory that only root can write"


def socket_path(share: Share, state_directory: str, package: str) -> str:
    """Where to listen for a share: below the state directory, in directories of root's.

    Args:
        package: the directory of the runner package, which an error names.

    Raises:
        PackageError: outside of it.
        MicrovmHostError: on the way lies what the VM's user could turn elsewhere.
    """
    path = os.path.join(state_directory, share.socket)
    file = f"{package}/share/microvm/virtiofs/{share.tag}/socket"
    if not path.startswith(f"{state_directory}/"):
        raise PackageError(
            f"the socket {share.socket!r} of share {share.tag!r} lies outside of the VM's state "
            f"directory {state_directory}",
            path=file,
            line=1,
            hint="give a path relative to it",
        )
    if not names.is_socket_path(path):
        raise PackageError(
            f"the socket {share.socket!r} of share {share.tag!r} makes a path of more than 107 "
            "bytes",
            path=file,
            line=1,
            hint="give it a shorter name",
        )
    directory = state_directory
    for part in path[len(state_directory) + 1 :].split("/")[:-1]:
        directory += f"/{part}"
        try:
            status = os.lstat(directory)
        except FileNotFoundError:
            break
        if not is_roots_directory(status):
            raise MicrovmHostError(
                f"the socket of share {share.tag!r} is to lie in here, but it is not a directory "
                "of root's alone",
                path=directory,
                hint="remove it; it is made anew at start",
            )
    # systemd would remove whatever lies there, a disk's image or the link to the package too.
    if os.path.lexists(path) and not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise MicrovmHostError(
            f"the socket of share {share.tag!r} is to lie here, but this is no socket",
            path=path,
            hint="give the socket another name in the package",
        )
    return path


def source_path(share: Share, state_directory: str) -> str:
    """The directory that a share exports; a relative one is below the state directory.

    Raises:
        MicrovmHostError: it does not exist, is no directory, or a relative one leads elsewhere.
    """
    path = os.path.join(state_directory, share.source)
    if not os.path.isdir(path):
        exists = os.path.lexists(path)
        raise MicrovmHostError(
            f"the source {share.source!r} of share {share.tag!r} "
            + ("is not a directory" if exists else "does not exist"),
            path=path,
            hint="" if exists else f"create it: mkdir -p '{path}'",
        )
    if not os.path.isabs(share.source):
        # The VM's user may write here: its link must not make root export something else.
        inside = os.path.realpath(state_directory)
        if not os.path.realpath(path).startswith(f"{inside}/"):
            raise MicrovmHostError(
                f"the source {share.source!r} of share {share.tag!r} leads out of the state "
                "directory",
                path=path,
                hint="give the directory's own absolute path in the package",
            )
    return path


def find_virtiofsd(places: Sequence[str]) -> Virtiofsd:
    """The first virtiofsd of `places`; raises MicrovmHostError if there is none."""
    for place in places:
        if os.access(place, os.X_OK):
            return Virtiofsd(place, is_legacy="/qemu/" in place)
    raise MicrovmHostError(
        "this host has no virtiofsd to serve the VM's shares",
        hint="install the package virtiofsd (on Debian 12: qemu-system-common); looked for "
        + ", ".join(places),
    )


def virtiofsd_argv(virtiofsd: Virtiofsd, share: Share, source: str) -> list[str]:
    """The command line that serves one share at descriptor 3.

    Without options in the package, ACLs and extended attributes are on, as on NixOS.

    Raises:
        MicrovmHostError: the C program lacks what the share asks for.
    """
    posix_acl = share.posix_acl or not share.options_given
    if virtiofsd.is_legacy:
        return _legacy_argv(virtiofsd, share, source, posix_acl=posix_acl)
    return [
        virtiofsd.path,
        "--fd=3",
        f"--shared-dir={source}",
        "--xattr",
        *(["--posix-acl"] if posix_acl else []),
        *(["--readonly"] if share.read_only else []),
        *([f"--cache={share.cache}"] if share.cache else []),
        *share.extra_arguments,
    ]


def _legacy_argv(virtiofsd: Virtiofsd, share: Share, source: str, *, posix_acl: bool) -> list[str]:
    if share.cache == "metadata":
        raise MicrovmHostError(
            f"share {share.tag!r} wants cache=metadata, which QEMU's former virtiofsd lacks",
            path=virtiofsd.path,
            hint="install a newer virtiofsd, from virtio-fs.gitlab.io",
        )
    # Commas part the options of -o, and fuse_opt_parse(3) takes a backslash before one as it is.
    escaped = source.replace("\\", "\\\\").replace(",", "\\,")
    cache = "none" if share.cache == "never" else share.cache
    return [
        virtiofsd.path,
        "--fd=3",
        "-o",
        f"source={escaped}",
        "-o",
        "xattr",
        *(["-o", "posix_acl"] if posix_acl else []),
        *(["-o", f"cache={cache}"] if cache else []),
        *share.extra_arguments,
    ]


def _capabilities(*numbers: int) -> int:
    """A set of capabilities, as systemd has it on its bus: a bit for each."""
    return sum(1 << number for number in numbers)


# capability.h's numbers. What virtiofsd needs to act for all users of a guest: it changes to the
# guest's user for each request (SETUID, SETGID), makes files theirs (CHOWN, FOWNER, FSETID) and
# device nodes for them (MKNOD), reads what is anybody's (DAC_OVERRIDE, DAC_READ_SEARCH), and
# stores capabilities of files (SETFCAP).
_CHOWN, _DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _FSETID = 0, 1, 2, 3, 4
_KILL, _SETGID, _SETUID, _SETPCAP, _SYS_CHROOT, _SYS_ADMIN = 5, 6, 7, 8, 18, 21
_SYS_RESOURCE, _MKNOD, _SETFCAP = 24, 27, 31
RIGHTS = _capabilities(
    *(_CHOWN, _DAC_OVERRIDE, _DAC_READ_SEARCH, _FOWNER, _FSETID),
    *(_SETGID, _SETUID, _MKNOD, _SETFCAP),
    # It gives up what is above before it serves the guest, and shuts itself into its share with
    # mounts of its own; these it gives up then. It does not raise LimitNOFILE= if that is high.
    *(_SETPCAP, _SYS_ADMIN, _SYS_CHROOT, _SYS_RESOURCE),
)
# Its supervisor stops it, too.
RIGHTS_OF_A_SCRIPT = RIGHTS | _capabilities(_KILL)
# A user namespace of its own is all that it asks for.
RIGHTS_OF_A_USER = 0


# As microvm@.service has it: what only hostile code would call, at no cost that can be measured.
_DENIED_CALLS = [
    f"@{group}"
    for group in ("clock", "cpu-emulation", "module", "obsolete", "raw-io", "reboot", "swap")
]


def _confined(capabilities: int) -> dict[str, tuple[str, object]]:
    """What bounds a virtiofsd beside its own sandbox, which has a narrower filter of system calls.

    No RestrictSUIDSGID=: guests keep whole operating systems in shares. No RestrictNamespaces=:
    its own sandbox is made of them. No ProtectSystem= and the like, but for the script: it goes
    where nothing but the share can be seen, and the sources may be anywhere.
    """
    return {
        "CapabilityBoundingSet": ("t", capabilities),
        "NoNewPrivileges": ("b", True),
        # The hypervisor's socket was given to it; the journal is its standard error.
        "RestrictAddressFamilies": ("(bas)", (True, ["AF_UNIX"])),
        # A guest may have device nodes made in its share: the harmless ones.
        "DevicePolicy": ("s", "closed"),
        "LockPersonality": ("b", True),
        "MemoryDenyWriteExecute": ("b", True),
        "RestrictRealtime": ("b", True),
        "SystemCallArchitectures": ("as", ["native"]),
        # For the time until that, and for what starts it.
        "SystemCallFilter": ("(bas)", (False, _DENIED_CALLS)),
        "SystemCallErrorNumber": ("i", errno.EPERM),
        "ProtectHostname": ("b", True),
    }


def _described(description: str) -> dict[str, tuple[str, object]]:
    """What all units have that are made here."""
    return {
        "Description": ("s", description),
        "Documentation": ("as", ["man:microvm-host(7)"]),
        # Gone from systemd's memory as well, failed or not.
        "CollectMode": ("s", "inactive-or-failed"),
        # No unit requires these, so that `systemctl isolate` would stop them under VMs that go on
        # running. Those that it stops have their shares stopped by the unit that made these.
        "IgnoreOnIsolate": ("b", True),
    }


def _timer_properties(vm: str, served: str) -> dict[str, tuple[str, object]]:
    """A timer that has the service of its name tell of lost shares, unless it is stopped before.

    Args:
        served: the record without which it does not start, for virtiofsd is being stopped then.
    """
    return {
        **_described(f"Wait whether microVM {vm} ends like its virtiofsd"),
        # By default it would be refused, with a warning, while the host shuts down.
        "DefaultDependencies": ("b", False),
        "Conditions": ("a(sbbs)", [("ConditionPathExists", False, False, served)]),
        "TimersMonotonic": ("a(st)", [("OnActiveSec", int(TOLD_AFTER * 1e6))]),
        "AccuracyUSec": ("t", 500_000),
        "RemainAfterElapse": ("b", False),
    }


def _vm_units(vm: str) -> list[str]:
    """The units that may run a VM."""
    return [names.unit(vm), names.foreground_unit(vm)]


def _common(vm: str, description: str) -> dict[str, tuple[str, object]]:
    """What the sockets and services of a VM's shares have.

    Bound to the unit that made them they are not: systemd would stop them in one transaction with
    it, but earlier, and a start that comes in between takes back the rest of that. The VM would
    run without its shares. Who made them stops them.
    """
    return {
        **_described(description),
        # They end after the VM.
        "Before": ("as", _vm_units(vm)),
        "Slice": ("s", "machine.slice"),
    }


def _command(argv: list[str]) -> dict[str, tuple[str, object]]:
    return {
        # The flag keeps systemd from taking `$` in a path for a variable.
        "ExecStartEx": ("a(sasas)", [(argv[0], argv, ["no-env-expand"])]),
        # What restarts quickly here is the VM, at its administrator's wish.
        "StartLimitIntervalUSec": ("t", 0),
    }


def undo(
    record: Record, state_directory: str, stop_units: Callable[[Sequence[str]], None]
) -> list[str]:
    """Stop the units that a record names and remove the sockets that they left.

    Args:
        state_directory: of the VM; directories made in it for sockets go if they are empty.
        stop_units: systemd.stop.

    Returns:
        What could not be undone, a line each; the record is cleared if there is nothing.
    """
    problems: list[str] = []
    vm = os.path.basename(state_directory)
    try:
        # Before their units, whose end is none under a running guest from here on. A timer that it
        # starts would be in the way of the next start's.
        _served(record).clear()
    except MicrovmHostError as error:
        problems.append(str(error))
    units: list[str] = []
    places: list[tuple[str, str]] = []
    for line in record.read():
        match line:
            # Whatever a record says, nobody else's units and files go.
            case ["unit", name] if names.vm_of_share_unit(name) == vm:
                units.append(name)
            case ["socket" | "file" as verb, path] if _is_below(path, state_directory):
                places.append((verb, path))
            case _:
                problems.append(str(record.strange(line)))
    try:
        stop_units(units)
        are_stopped = True
    except MicrovmHostError as error:
        problems.append(str(error))
        are_stopped = False
    for kind, path in places:
        try:
            with Place(path, state_directory) as place:
                if kind == "socket":
                    place.remove_socket()
                else:
                    place.remove_file()
        except OSError as error:
            problems.append(f"{kind} {path} could not be removed: {error.strerror}")
    # Whoever runs on will make or remove its socket by the path, as root: that must not lead
    # elsewhere then.
    for _, path in places if are_stopped else ():
        try:
            with Place(path, state_directory) as place:
                place.remove_directories()
        except OSError as error:
            problems.append(f"directories of {path} could not be removed: {error.strerror}")
    if not problems:
        record.clear()
    return problems


def _served(record: Record) -> Record:
    """The record of what is served, beside that of what has to be undone."""
    return Record(f"{os.path.dirname(record.path)}/{SERVED}")


def _is_below(path: str, directory: str) -> bool:
    """Whether a path, by its words, is one of something in a directory."""
    is_plain = path.isprintable() and os.path.normpath(path) == path
    return is_plain and path.startswith(f"{directory}/")
