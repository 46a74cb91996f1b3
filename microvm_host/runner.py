# SPDX-License-Identifier: MIT
"""Reads a runner package, the directory that says everything about one microVM.

The only reader of the contract (docs/runner-package.md): a directory goes in, frozen values come
out, and whatever breaks the contract raises PackageError with the file, the line and the value.
Reading changes nothing and asks nothing of the host: whether a source exists or an interface is
free is for those who use them.

Packages may come from anywhere, so that each file is taken for hostile: it is opened without
waiting (it may be a FIFO), read up to a limit, and every line is checked before it is believed.
"""

from __future__ import annotations

import os
import stat
from errno import ELOOP, ENOENT, ENOTDIR

from . import names
from .errors import NameInvalid, PackageError
from .frozen import frozen
from .paths import MICROVM_RUN, MICROVM_SHUTDOWN, VIRTIOFSD_RUN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import TypeVar

    _T = TypeVar("_T")

SHARE = "share/microvm"
# No real file comes near these; a package that does is broken or means harm.
FILE_MAX = 64 * 1024
ENTRIES_MAX = 256

IMAGE_FORMATS = ("raw", "qcow2", "vhd", "vhdx")
CACHE_POLICIES = ("auto", "always", "never", "metadata")
READINESS = ("exec", "guest")
CONTROL_PROTOCOLS = ("qmp", "cloud-hypervisor", "firecracker")
# Hypervisors that carry vsock themselves, to UNIX sockets of the host.
VSOCK_BY_UNIX_SOCKET = ("cloud-hypervisor", "firecracker")
# As microvm.nix has it: the port, and the hypervisor's own socket.
NOTIFY_PORT = 8888
VSOCK_SOCKET = "notify.vsock"


@frozen
class Tap:
    """A tap that the hypervisor opens by name; `bridge` is what the host joins it to.

    `mtu` None is that of the bridge, or the kernel's default.
    """

    name: str
    vnet_hdr: bool = True
    multi_queue: bool = False
    bridge: str | None = None
    mtu: int | None = None


@frozen
class Macvtap:
    """A macvtap `name` on the host's interface `link`, opened as `/dev/tapIFINDEX`.

    `mtu` None is that of `link`.
    """

    name: str
    mac: str
    link: str
    mode: str
    mtu: int | None = None


@frozen
class Share:
    """A directory `source` of the host that the guest mounts by `tag`.

    `source` and `socket` may be relative to the VM's state directory.
    `options_given` tells whether the package says anything of the options after it; if not, only
    its own `bin/virtiofsd-run` may know them.
    """

    tag: str
    source: str
    socket: str
    options_given: bool = False
    read_only: bool = False
    cache: str | None = None
    posix_acl: bool = False
    extra_arguments: tuple[str, ...] = ()


@frozen
class PrivateFile:
    """A file of root's, `source`, that the VM's user finds by `name` while the VM runs."""

    name: str
    source: str


@frozen
class Image:
    """A disk of the VM; `path` may be relative to the state directory."""

    path: str
    format: str
    read_only: bool = False


@frozen
class ControlSocket:
    """Where the hypervisor takes commands, relative to the state directory, and in which words."""

    path: str
    protocol: str


@frozen
class NotifySocket:
    """Where the guest's systemd says that it is ready: a vsock port of the host.

    `is_stream` tells its kind of socket, a stream or sequenced packets. Where the hypervisor
    carries vsock itself, it connects to the UNIX socket `path`, relative to the state directory.
    """

    port: int
    is_stream: bool = False
    path: str | None = None


@frozen
class Package:
    """A runner package, whole and checked."""

    path: str
    taps: tuple[Tap, ...] = ()
    macvtaps: tuple[Macvtap, ...] = ()
    shares: tuple[Share, ...] = ()
    pci_devices: tuple[str, ...] = ()
    usb_devices: str | None = None
    has_shutdown: bool = False
    has_virtiofsd_run: bool = False
    hypervisor: str | None = None
    system: str | None = None
    vsock_cid: int | None = None
    readiness: str = "exec"
    # Also where readiness is `exec`, since the host may want it otherwise.
    notify_socket: NotifySocket | None = None
    control_socket: ControlSocket | None = None
    # Sockets below the state directory: the guest's serial console, and its agent's port.
    console_socket: str | None = None
    agent_socket: str | None = None
    event_log: str | None = None
    machine_uuid: str | None = None
    private_files: tuple[PrivateFile, ...] = ()
    # Files of the state directory that each start makes anew, and that are gone when it is down.
    temporary_files: tuple[str, ...] = ()
    images: tuple[Image, ...] = ()

    @property
    def version(self) -> str:
        """What tells this version of the guest from another: its system, else the package."""
        return self.system or self.path

    @property
    def has_own_vsock(self) -> bool:
        """Whether the guest's vsock is behind VSOCK_SOCKET, and not the kernel's."""
        return self.vsock_cid is not None and self.hypervisor in VSOCK_BY_UNIX_SOCKET


def load(path: str) -> Package:
    """Read the package at `path`, following links to it.

    Raises:
        PackageError: the package is missing or breaks the contract.
    """
    reader = _Reader(path)
    reader.check_runnable()
    reader.check_no_share_escaped()
    taps, macvtaps = reader.taps(), reader.macvtaps()
    reader.check_distinct(taps, macvtaps)
    hypervisor, vsock_cid = reader.hypervisor(), reader.vsock_cid()
    control_socket = reader.control_socket()
    readiness = reader.choice(f"{SHARE}/readiness", READINESS)
    if readiness is None:
        # microvm.nix's for cloud-hypervisor forward what a guest with a vsock says, and NixOS waits
        # for it. Packages that tell of a control socket tell of readiness as well.
        is_forwarded = hypervisor == "cloud-hypervisor" and vsock_cid is not None
        readiness = "guest" if is_forwarded and control_socket is None else "exec"
    return Package(
        path=reader.root,
        taps=taps,
        macvtaps=macvtaps,
        shares=reader.shares(),
        pci_devices=reader.pci_devices(),
        usb_devices=reader.text(f"{SHARE}/usb-devices"),
        has_shutdown=reader.is_program(MICROVM_SHUTDOWN),
        has_virtiofsd_run=reader.is_program(VIRTIOFSD_RUN),
        hypervisor=hypervisor,
        system=reader.system(),
        vsock_cid=vsock_cid,
        readiness=readiness,
        notify_socket=reader.notify_socket(hypervisor, vsock_cid, readiness),
        control_socket=control_socket,
        console_socket=reader.one(f"{SHARE}/console-socket", _relative),
        agent_socket=reader.one(f"{SHARE}/agent-socket", _relative),
        event_log=reader.one(f"{SHARE}/event-log", _relative),
        machine_uuid=reader.one(f"{SHARE}/machine-uuid", names.machine_uuid),
        private_files=reader.private_files(),
        temporary_files=reader.names_in(f"{SHARE}/temporary-files", names.file_name),
        images=reader.images(),
    )


def load_taps(path: str) -> tuple[Tap, ...]:
    """Read just the taps of the package at `path`; raises PackageError."""
    return _Reader(path).taps()


def load_macvtaps(path: str) -> tuple[Macvtap, ...]:
    """Read just the macvtaps of the package at `path`; raises PackageError."""
    return _Reader(path).macvtaps()


def load_vsock_cid(path: str) -> int | None:
    """Read just the vsock CID of the package at `path`; raises PackageError."""
    return _Reader(path).vsock_cid()


def load_pci_devices(path: str) -> tuple[str, ...]:
    """Read just the PCI addresses of the package at `path`; raises PackageError."""
    return _Reader(path).pci_devices()


def load_images(path: str) -> tuple[Image, ...]:
    """Read just the images that the package at `path` tells of; raises PackageError."""
    return _Reader(path).images()


def load_control_socket(path: str) -> ControlSocket | None:
    """Read just the control socket of the package at `path`; raises PackageError."""
    return _Reader(path).control_socket()


def load_shares(path: str) -> tuple[Share, ...]:
    """Read just the shares of the package at `path`; raises PackageError."""
    return _Reader(path).shares()


class _Reader:
    """Reads the files of one package."""

    def __init__(self, path: str) -> None:
        try:
            self.root = os.path.realpath(path, strict=True)
        except OSError as error:
            if error.errno == ENOENT and os.path.islink(path):
                raise PackageError(
                    f"points to {os.readlink(path)!r}, which does not exist", path=path
                ) from error
            raise PackageError(
                f"no runner package: {error.strerror or error}", path=path
            ) from error
        if not os.path.isdir(self.root):
            raise PackageError("is not a directory, so no runner package", path=self.root)

    def at(self, file: str) -> str:
        return f"{self.root}/{file}"

    def text(self, file: str) -> str | None:
        """The text of a file without its trailing newlines; None if it is not there."""
        path = self.at(file)
        try:
            # Before opening it, since opening alone has effects on some devices.
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise PackageError("is not a regular file", path=path)
            # Not waiting: open(2) of a FIFO would wait for a writer for ever.
            source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError as error:
            if error.errno == ENOENT and not os.path.islink(path):
                return None
            raise PackageError(_open_failure(path, error), path=path) from error
        try:
            if not stat.S_ISREG(os.fstat(source).st_mode):
                raise PackageError("is not a regular file", path=path)
            content = b""
            while chunk := os.read(source, FILE_MAX + 1 - len(content)):
                content += chunk
        except OSError as error:
            raise PackageError(f"cannot be read: {error.strerror}", path=path) from error
        finally:
            os.close(source)
        if len(content) > FILE_MAX:
            raise PackageError(f"is larger than {FILE_MAX // 1024} KiB", path=path)
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise PackageError(
                f"is not UTF-8 text: byte {content[error.start]:#04x}", path=path, line=line
            ) from error
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise PackageError("is not text: holds a NUL byte", path=path, line=line)
        return text.rstrip("\n")

    def lines(self, file: str) -> Iterator[tuple[int, str]]:
        """The lines of a file with their numbers, from 1; none if it is empty or not there."""
        text = self.text(file)
        if not text:
            return
        found = text.split("\n")
        if len(found) > ENTRIES_MAX:
            raise PackageError(f"has more than {ENTRIES_MAX} lines", path=self.at(file))
        yield from enumerate(found, 1)

    def checked(self, file: str, line: int, text: str, check: Callable[[str], _T]) -> _T:
        """`check(text)`, its complaint said with file and line."""
        try:
            return check(text)
        except NameInvalid as error:
            hint = _of_an_editor(text) or error.hint
            raise PackageError(error.message, path=self.at(file), line=line, hint=hint) from error

    def names_in(self, file: str, check: Callable[[str], str]) -> tuple[str, ...]:
        """A file of one name a line, none of them twice."""
        found: dict[str, int] = {}
        for line, text in self.lines(file):
            name = self.checked(file, line, text, check)
            if name in found:
                raise PackageError(
                    f"{name!r} stands here twice, first in line {found[name]}",
                    path=self.at(file),
                    line=line,
                )
            found[name] = line
        return tuple(found)

    def one(self, file: str, check: Callable[[str], _T]) -> _T | None:
        """A file of one line; None if it is not there."""
        text = self.text(file)
        if text is None:
            return None
        if "\n" in text:
            raise PackageError("has more than one line", path=self.at(file), line=2)
        return self.checked(file, 1, text, check)

    def choice(self, file: str, choices: tuple[str, ...]) -> str | None:
        """A file of one word out of `choices`; None if it is not there."""

        def check(text: str) -> str:
            if text not in choices:
                raise NameInvalid(f"{text!r} is none of {', '.join(choices)}")
            return text

        return self.one(file, check)

    def flag(self, file: str) -> bool | None:
        """A file that says `true` or `false`; None if it is not there."""
        word = self.choice(file, ("true", "false"))
        return None if word is None else word == "true"

    def entries(self, directory: str) -> tuple[str, ...]:
        """The names in a directory, sorted; none if it is not there."""
        path = self.at(directory)
        try:
            found = sorted(os.listdir(path))
        except OSError as error:
            if error.errno == ENOENT and not os.path.islink(path):
                return ()
            raise PackageError(_open_failure(path, error), path=path) from error
        if len(found) > ENTRIES_MAX:
            raise PackageError(f"has more than {ENTRIES_MAX} entries", path=path)
        return tuple(found)

    def is_program(self, file: str) -> bool:
        """Whether a program is there; one that is there but cannot be one is an error."""
        path = self.at(file)
        try:
            status = os.stat(path)
        except OSError as error:
            if error.errno == ENOENT and not os.path.islink(path):
                return False
            raise PackageError(_open_failure(path, error), path=path) from error
        if not stat.S_ISREG(status.st_mode):
            raise PackageError("is not a regular file, so no program", path=path)
        if not status.st_mode & 0o111:
            raise PackageError("is not executable", path=path, hint="chmod +x it in the package")
        return True

    def check_runnable(self) -> None:
        if not self.is_program(MICROVM_RUN):
            raise PackageError(
                f"has no {MICROVM_RUN}, so it is no runner package",
                path=self.root,
                hint="a NixOS system is not one: build config.microvm.declaredRunner",
            )

    def check_no_share_escaped(self) -> None:
        """Refuse what a tag with `..` leaves behind: the files of a share beside `virtiofs/`."""
        for name in self.entries(SHARE):
            inner = self.at(f"{SHARE}/{name}")
            escaped = name in ("source", "socket") or (
                name != "virtiofs"
                and os.path.isdir(inner)
                # `system` is a whole operating system, which has directories of any name.
                and not os.path.islink(inner)
                and any(os.path.lexists(f"{inner}/{file}") for file in ("source", "socket"))
            )
            if escaped:
                raise PackageError(
                    "belongs to a share, but lies outside of virtiofs/",
                    path=inner,
                    hint="a share's tag has a '..' in it",
                )

    def taps(self) -> tuple[Tap, ...]:
        file = f"{SHARE}/tap-flags"
        flags = set()
        for line, text in self.lines(file):
            if text not in ("vnet_hdr", "multi_queue"):
                raise PackageError(
                    f"{text!r} is none of vnet_hdr, multi_queue", path=self.at(file), line=line
                )
            flags.add(text)
        # Packages from before the file was invented run hypervisors that want the header.
        if self.text(file) is None:
            flags.add("vnet_hdr")
        found = self.names_in(f"{SHARE}/tap-interfaces", names.interface_name)
        bridges = self._by_interface("tap", "bridges", found, names.interface_name)
        mtus = self._by_interface("tap", "mtus", found, names.mtu)
        return tuple(
            Tap(
                name,
                "vnet_hdr" in flags,
                "multi_queue" in flags,
                bridges.get(name),
                mtus.get(name),
            )
            for name in found
        )

    def _by_interface(
        self, kind: str, what: str, interfaces: tuple[str, ...], check: Callable[[str], _T]
    ) -> dict[str, _T]:
        """The values of the optional file KIND-WHAT, by interface; `kind` is tap or macvtap."""
        file = f"{SHARE}/{kind}-{what}"
        found: dict[str, _T] = {}
        for line, text in self.lines(file):
            name, value = self._columns(file, line, text, 2)
            problem = ""
            if name not in interfaces:
                problem = f"{name!r} is not in {kind}-interfaces"
            elif name in found:
                problem = f"{kind} {name!r} stands here twice"
            if problem:
                raise PackageError(problem, path=self.at(file), line=line)
            found[name] = self.checked(file, line, value, check)
        return found

    def check_distinct(self, taps: tuple[Tap, ...], macvtaps: tuple[Macvtap, ...]) -> None:
        """Refuse what the host could not have at once, though each file alone is right."""
        names_taken = {tap.name for tap in taps}
        macs: dict[str, str] = {}
        for line, macvtap in enumerate(macvtaps, 1):
            other = macs.setdefault(macvtap.mac, macvtap.name)
            problem = ""
            if macvtap.name in names_taken:
                problem = f"{macvtap.name!r} is also a tap"
            elif other != macvtap.name:
                problem = f"MAC address {macvtap.mac} is also that of {other}"
            if problem:
                path = self.at(f"{SHARE}/macvtap-interfaces")
                raise PackageError(problem, path=path, line=line)

    def _columns(self, file: str, line: int, text: str, count: int) -> list[str]:
        # Split by space and tab alone: split() knows many more, and a name may hold none of them.
        columns = [column for column in text.replace("\t", " ").split(" ") if column]
        if len(columns) != count:
            raise PackageError(
                f"{text!r} has {len(columns)} columns instead of {count}",
                path=self.at(file),
                line=line,
            )
        return columns

    def macvtaps(self) -> tuple[Macvtap, ...]:
        file = f"{SHARE}/macvtap-interfaces"
        found: dict[str, Macvtap] = {}
        for line, text in self.lines(file):
            name, mac, link, mode = self._columns(file, line, text, 4)
            macvtap = Macvtap(
                self.checked(file, line, name, names.interface_name),
                self.checked(file, line, mac, names.mac_address),
                self.checked(file, line, link, names.interface_name),
                mode,
            )
            problem = ""
            if mode not in names.MACVTAP_MODES:
                problem = f"mode {mode!r} is none of {', '.join(names.MACVTAP_MODES)}"
            elif name in found:
                problem = f"{name!r} stands here twice"
            elif name == link:
                problem = f"{name!r} cannot be its own link"
            if problem:
                raise PackageError(problem, path=self.at(file), line=line)
            found[name] = macvtap
        mtus = self._by_interface("macvtap", "mtus", tuple(found), names.mtu)
        return tuple(
            Macvtap(each.name, each.mac, each.link, each.mode, mtus.get(each.name))
            for each in found.values()
        )

    def pci_devices(self) -> tuple[str, ...]:
        return self.names_in(f"{SHARE}/pci-devices", names.pci_address)

    def private_files(self) -> tuple[PrivateFile, ...]:
        file = f"{SHARE}/private-files"
        found: dict[str, PrivateFile] = {}
        for line, text in self.lines(file):
            # A path may hold spaces, and a name none.
            name, _, source = text.partition(" ")
            self.checked(file, line, name, names.file_name)
            problem = ""
            if not source.startswith("/") or not source.isprintable():
                problem = f"{source!r} is not an absolute path"
            elif name in found:
                problem = f"{name!r} stands here twice"
            if problem:
                raise PackageError(problem, path=self.at(file), line=line)
            found[name] = PrivateFile(name, source)
        return tuple(found.values())

    def images(self) -> tuple[Image, ...]:
        file = f"{SHARE}/images"
        found = []
        for line, text in self.lines(file):
            # A path may hold spaces.
            form, _, rest = text.partition(" ")
            access, _, path = rest.partition(" ")
            if form not in IMAGE_FORMATS or access not in ("ro", "rw") or not path.isprintable():
                raise PackageError(
                    f"{text!r} is not FORMAT ro|rw PATH, with FORMAT one of "
                    f"{', '.join(IMAGE_FORMATS)}",
                    path=self.at(file),
                    line=line,
                )
            found.append(Image(path, form, access == "ro"))
        return tuple(found)

    def shares(self) -> tuple[Share, ...]:
        shares: list[Share] = []
        sockets: dict[str, str] = {}
        # Checked one by one: links can make a few directories look like millions of shares, of
        # which the second has the first one's socket.
        for share in self._shares_below(f"{SHARE}/virtiofs", ""):
            shares.append(share)
            other = sockets.setdefault(share.socket, share.tag)
            if other != share.tag:
                raise PackageError(
                    f"socket {share.socket!r} is also that of the share {other!r}",
                    path=self.at(f"{SHARE}/virtiofs/{share.tag}/socket"),
                    line=1,
                )
        return tuple(shares)

    def _shares_below(self, directory: str, tag: str) -> Iterator[Share]:
        entries = self.entries(directory)
        files = [name for name in entries if not os.path.isdir(self.at(f"{directory}/{name}"))]
        if files:
            yield self._share(directory, tag, files)
        for name in entries:
            if name not in files:
                inner = f"{tag}/{name}" if tag else name
                try:
                    # Checked on the way down: it also ends a loop of links, since tags are short.
                    names.share_tag(inner)
                except NameInvalid as error:
                    raise PackageError(
                        error.message, path=self.at(f"{directory}/{name}"), hint=error.hint
                    ) from error
                yield from self._shares_below(f"{directory}/{name}", inner)
        if tag and not entries:
            raise PackageError("is a share without source and socket", path=self.at(directory))

    def _share(self, directory: str, tag: str, files: list[str]) -> Share:
        if not tag:
            raise PackageError(
                "belongs to a share without a tag", path=self.at(f"{directory}/{files[0]}")
            )
        for name in files:
            if name not in ("source", "socket", *_SHARE_OPTIONS):
                raise PackageError(
                    "is no share option that this version knows",
                    path=self.at(f"{directory}/{name}"),
                    hint=f"known are {', '.join(_SHARE_OPTIONS)}",
                )
        source = self.one(f"{directory}/source", _share_source)
        socket = self.one(f"{directory}/socket", _relative_or_absolute)
        for name, value in (("source", source), ("socket", socket)):
            if value is None:
                raise PackageError(f"is a share without {name}", path=self.at(directory))
        assert source is not None and socket is not None
        return Share(
            tag=tag,
            source=source,
            socket=socket,
            options_given=any(name in files for name in _SHARE_OPTIONS),
            read_only=self.flag(f"{directory}/read-only") or False,
            cache=self.choice(f"{directory}/cache", CACHE_POLICIES),
            posix_acl=self.flag(f"{directory}/posix-acl") or False,
            extra_arguments=tuple(
                self.checked(f"{directory}/extra-args", line, text, _argument)
                for line, text in self.lines(f"{directory}/extra-args")
            ),
        )

    def hypervisor(self) -> str | None:
        def check(text: str) -> str:
            if not text or not text.isascii() or not text.replace("-", "").isalnum():
                raise NameInvalid(f"{text!r} is not the name of a hypervisor")
            return text

        return self.one(f"{SHARE}/hypervisor", check)

    def system(self) -> str | None:
        """What `system` points to; it may dangle, since the host may lack the guest's store."""
        path = self.at(f"{SHARE}/system")
        try:
            target = os.readlink(path)
        except OSError as error:
            if error.errno == ENOENT:
                return None
            raise PackageError("is not a symbolic link", path=path) from error
        if not target.isprintable():
            # It ends on terminals, and in JSON.
            raise PackageError(f"points to {target!r}, which is not printable", path=path)
        return target

    def vsock_cid(self) -> int | None:
        def check(text: str) -> int:
            # vsock(7): 0 to 2 are taken, and 2^32-1 is VMADDR_CID_ANY.
            cid = int(text) if text.isascii() and text.isdigit() and len(text) <= 10 else 0
            if not 3 <= cid < 0xFFFFFFFF:
                raise NameInvalid(f"{text[:80]!r} is not a vsock CID from 3 to 4294967294")
            return cid

        return self.one(f"{SHARE}/vsock-cid", check)

    def notify_socket(
        self, hypervisor: str | None, cid: int | None, readiness: str
    ) -> NotifySocket | None:
        """Where the guest says that it is ready; None if it cannot, for want of a vsock."""
        file = f"{SHARE}/notify-socket"
        given = self.one(file, _vsock_address)
        port, is_stream = given or (NOTIFY_PORT, False)
        if hypervisor in VSOCK_BY_UNIX_SOCKET:
            return NotifySocket(port, True, f"{VSOCK_SOCKET}_{port}")
        if cid is not None:
            return NotifySocket(port, is_stream)
        for name, asks in (("notify-socket", given), ("readiness", readiness == "guest")):
            if asks:
                raise PackageError(
                    "wants the guest's vsock CID beside it",
                    path=self.at(f"{SHARE}/{name}"),
                    hint="write it into vsock-cid",
                )
        return None

    def control_socket(self) -> ControlSocket | None:
        path = self.one(f"{SHARE}/control-socket", _relative_or_absolute)
        protocol = self.choice(f"{SHARE}/control-protocol", CONTROL_PROTOCOLS)
        if path is None and protocol is None:
            return None
        for name, value in (("control-socket", path), ("control-protocol", protocol)):
            if value is None:
                raise PackageError(
                    f"{name} is missing, but its companion is there", path=self.at(SHARE)
                )
        assert path is not None and protocol is not None
        return ControlSocket(path, protocol)


def _of_an_editor(text: str) -> str:
    """What makes a line right that an editor of another system wrote; empty for any other."""
    if text.startswith("\ufeff"):
        return "save the file without a byte order mark"
    return "save the file with UNIX line ends, without carriage returns" if "\r" in text else ""


_SHARE_OPTIONS = ("read-only", "cache", "posix-acl", "extra-args")

# What the toolkit itself says to virtiofsd: an extra argument must not say it otherwise.
_RESERVED_ARGUMENTS = (
    "--fd",
    "--socket-path",
    "--socket-group",
    "--shared-dir",
    "--readonly",
    "--print-capabilities",
    "--daemonize",
)


def _vsock_address(text: str) -> tuple[int, bool]:
    """What the guest has in `vmm.notify_socket` (systemd(1)); gives the port and if by stream."""
    kind, _, rest = text.partition(":")
    cid, _, number = rest.partition(":")
    port = int(number) if number.isascii() and number.isdigit() and len(number) <= 10 else 0
    if kind not in ("vsock", "vsock-stream", "vsock-seqpacket") or cid != "2":
        # No hypervisor has datagrams.
        raise NameInvalid(
            f"{text[:80]!r} is not a vsock address of the host",
            hint="vsock:2:PORT, vsock-seqpacket:2:PORT and vsock-stream:2:PORT are",
        )
    # vsock(7): lower ones are root's, and the highest means any.
    if not 1024 <= port < 0xFFFFFFFF:
        raise NameInvalid(f"{number[:80]!r} is not a vsock port from 1024 to 4294967294")
    return port, kind == "vsock-stream"


def _share_source(text: str) -> str:
    if not text:
        raise NameInvalid("the share's source is empty")
    return text


def _relative(text: str) -> str:
    """A file's path below the state directory."""
    if text.startswith("/"):
        raise NameInvalid(f"{text!r} is absolute", hint="give a path below the state directory")
    return _relative_or_absolute(text)


def _relative_or_absolute(text: str) -> str:
    """A socket's path: printable, and not leaving the directory that it is relative to."""
    if not text or not text.isprintable() or text.endswith(("/", "/.")) or text == ".":
        raise NameInvalid(f"{text!r} cannot be the path of a socket")
    if ".." in text.split("/"):
        raise NameInvalid(
            f"socket {text!r} has a '..' in it", hint="give a path below the state directory"
        )
    if os.path.normpath(text) != text.removeprefix("./"):
        raise NameInvalid(f"socket {text!r} is not in its shortest form")
    return text.removeprefix("./")


def _argument(text: str) -> str:
    """An extra argument for virtiofsd: an option, and none that the toolkit gives itself."""
    if not text or not text.isprintable():
        raise NameInvalid(f"{text!r} cannot be an argument of virtiofsd")
    if text.split("=", 1)[0] in _RESERVED_ARGUMENTS:
        raise NameInvalid(
            f"argument {text!r} is not for a package to give",
            hint="source, socket and read-only have files of their own",
        )
    return text


def _open_failure(path: str, error: OSError) -> str:
    if error.errno == ENOENT:
        return f"points to {os.readlink(path)!r}, which does not exist"
    if error.errno == ELOOP:
        return "is a loop of symbolic links"
    if error.errno == ENOTDIR:
        return "is not a directory, or lies below a file"
    return f"cannot be read: {error.strerror}"
