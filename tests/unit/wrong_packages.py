# SPDX-License-Identifier: MIT
"""Wrong runner packages: a table of ways to break a good one, and what is to be said of each.

Each case takes the directory of any good package and breaks it in place; it makes the files and
directories that it needs. Used by the unit tests of the reader, and by the tests on a host, which
have systemd start the same packages. Standard library only, no pytest: it is copied to hosts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SHARE = "share/microvm"
FILE_MAX = 64 * 1024
ENTRIES_MAX = 256


@dataclass(frozen=True)
class Case:
    """One way to break a package.

    Attributes:
        name: for people and for the names of VMs: letters, digits and dashes.
        break_: breaks the good package in the directory that it is given.
        message: stands in the error's text.
        file: the file of the package that the error names, `` for the package itself.
        line: the line that it names.
        stage: `read` if reading the package finds it (microvm-set-booted@); `shares` if only
            planning the shares does (microvm-virtiofsd@), since it depends on the host.
        exit_code: 78, or 1 where it is the host that lacks something.
        but_root: root reads the package all the same.
    """

    name: str
    break_: Callable[[Path], None]
    message: str
    file: str = ""
    line: int | None = None
    stage: str = "read"
    exit_code: int = 78
    but_root: bool = False


def _clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)


def holds(file: str, content: str | bytes) -> Callable[[Path], None]:
    """`file` holds `content`."""

    def break_(package: Path) -> None:
        path = package / file
        _clear(path)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return break_


def links(file: str, target: str) -> Callable[[Path], None]:
    """`file` is a symbolic link to `target`."""

    def break_(package: Path) -> None:
        _clear(package / file)
        os.symlink(target, package / file)

    return break_


def is_directory(file: str) -> Callable[[Path], None]:
    def break_(package: Path) -> None:
        _clear(package / file)
        (package / file).mkdir()

    return break_


def is_fifo(file: str) -> Callable[[Path], None]:
    def break_(package: Path) -> None:
        _clear(package / file)
        os.mkfifo(package / file)

    return break_


def has_mode(file: str, content: str, mode: int) -> Callable[[Path], None]:
    def break_(package: Path) -> None:
        holds(file, content)(package)
        (package / file).chmod(mode)

    return break_


def is_missing(file: str) -> Callable[[Path], None]:
    def break_(package: Path) -> None:
        _clear(package / file)

    return break_


def has_share(tag: str, **files: str | bytes) -> Callable[[Path], None]:
    """A share with these files, `read_only` for `read-only`; source and socket unless given."""

    def break_(package: Path) -> None:
        given: dict[str, str | bytes] = {"source": "/", "socket": f"{tag.replace('/', '-')}.sock"}
        given.update({name.replace("_", "-"): content for name, content in files.items()})
        for name, content in given.items():
            holds(f"{SHARE}/virtiofs/{tag}/{name}", content)(package)

    return break_


def both(*breaks: Callable[[Path], None]) -> Callable[[Path], None]:
    def break_(package: Path) -> None:
        for each in breaks:
            each(package)

    return break_


def _share_without(name: str) -> Callable[[Path], None]:
    return both(has_share("t"), is_missing(f"{SHARE}/virtiofs/t/{name}"))


def _many_shares(package: Path) -> None:
    # Few directories that links make many: 2^17 shares.
    for depth in range(17):
        for side in "ab":
            links(f"deep/{depth}/{side}", f"../{depth + 1}")(package)
    holds("deep/17/source", "/")(package)
    holds("deep/17/socket", "a.sock")(package)
    links(f"{SHARE}/virtiofs", "../../deep/0")(package)


TAPS = f"{SHARE}/tap-interfaces"
FLAGS = f"{SHARE}/tap-flags"
BRIDGES = f"{SHARE}/tap-bridges"
MTUS = f"{SHARE}/tap-mtus"
MACVTAP_MTUS = f"{SHARE}/macvtap-mtus"
MACVTAPS = f"{SHARE}/macvtap-interfaces"
PCI = f"{SHARE}/pci-devices"
VIRTIOFS = f"{SHARE}/virtiofs"
CID = f"{SHARE}/vsock-cid"
UUID = f"{SHARE}/machine-uuid"
PRIVATE = f"{SHARE}/private-files"
TEMPORARY = f"{SHARE}/temporary-files"
READINESS = f"{SHARE}/readiness"
NOTIFY = f"{SHARE}/notify-socket"
HYPERVISOR = f"{SHARE}/hypervisor"
RUN = "bin/microvm-run"
MAC = "02:00:00:00:00:01"


CASES = (
    # The package itself and its programs.
    Case("no-run", is_missing(RUN), "has no bin/microvm-run"),
    Case("run-directory", is_directory(RUN), "is not a regular file, so no program", RUN),
    Case("run-dangling", links(RUN, "/nonexistent/run"), "points to '/nonexistent/run'", RUN),
    Case("run-loop", links(RUN, "microvm-run"), "is a loop of symbolic links", RUN),
    Case("run-fifo", is_fifo(RUN), "is not a regular file, so no program", RUN),
    Case("run-not-executable", has_mode(RUN, "#!/bin/sh\n", 0o644), "is not executable", RUN),
    Case("bin-file", holds("bin", "x"), "is not a directory, or lies below a file", RUN),
    Case(
        "shutdown-not-executable",
        has_mode("bin/microvm-shutdown", "#!/bin/sh\n", 0o600),
        "is not executable",
        "bin/microvm-shutdown",
    ),
    Case(
        "shutdown-dangling",
        links("bin/microvm-shutdown", "/nonexistent"),
        "points to '/nonexistent', which does not exist",
        "bin/microvm-shutdown",
    ),
    Case(
        "virtiofsd-run-directory",
        is_directory("bin/virtiofsd-run"),
        "so no program",
        "bin/virtiofsd-run",
    ),
    Case("share-file", holds(SHARE, "x"), "is not a directory", SHARE),
    Case("share-dangling", links(SHARE, "/nonexistent"), "points to '/nonexistent'", SHARE),
    # Taps.
    Case("tap-empty-name", holds(TAPS, "a\n\nb\n"), "an interface name is empty", TAPS, 2),
    Case("tap-16-bytes", holds(TAPS, "vm-abcdefghijklm\n"), "'vm-abcdefghijklm' is l", TAPS, 1),
    Case("tap-16-bytes-utf-8", holds(TAPS, "ok\nüüüüüüüü\n"), "longer than 15 bytes", TAPS, 2),
    Case("tap-pattern", holds(TAPS, "vm%d\n"), "'vm%d' holds '%'", TAPS, 1),
    Case("tap-slash", holds(TAPS, "vm/0\n"), "'vm/0' holds '/'", TAPS, 1),
    Case("tap-colon", holds(TAPS, "vm:0\n"), "'vm:0' holds ':'", TAPS, 1),
    Case("tap-space", holds(TAPS, "vm 0\n"), "'vm 0' holds ' '", TAPS, 1),
    Case("tap-trailing-space", holds(TAPS, "vm0 \n"), "'vm0 ' holds ' '", TAPS, 1),
    Case("tap-dot", holds(TAPS, ".\n"), "'.' cannot be an interface name", TAPS, 1),
    Case("tap-dot-dot", holds(TAPS, "a\n..\n"), "'..' cannot be an interface name", TAPS, 2),
    Case("tap-crlf", holds(TAPS, "vm0\r\nvm1\r\n"), "'vm0\\r' cannot be", TAPS, 1),
    Case("tap-tab", holds(TAPS, "vm0\tvm1\n"), "'vm0\\tvm1' cannot be", TAPS, 1),
    Case("tap-twice", holds(TAPS, "a\nb\na\n"), "'a' stands here twice, first in line 1", TAPS, 3),
    Case("tap-garbage", holds(TAPS, b"\x7fELF\x02\x01\x80\xff"), "is not UTF-8", TAPS, 1),
    Case("tap-invalid-utf-8", holds(TAPS, b"a\nb\nc\xff\n"), "byte 0xff", TAPS, 3),
    Case("tap-nul", holds(TAPS, b"a\nb\0c\n"), "holds a NUL byte", TAPS, 2),
    Case("tap-escape", holds(TAPS, "a\x1b[31m\n"), "'a\\x1b[31m' cannot be", TAPS, 1),
    Case("tap-fifo", is_fifo(TAPS), "is not a regular file", TAPS),
    Case("tap-directory", is_directory(TAPS), "is not a regular file", TAPS),
    Case("tap-device", links(TAPS, "/dev/zero"), "is not a regular file", TAPS),
    Case("tap-dangling", links(TAPS, "nowhere"), "points to 'nowhere'", TAPS),
    Case("tap-loop", links(TAPS, "tap-interfaces"), "is a loop of symbolic links", TAPS),
    Case(
        "tap-unreadable",
        has_mode(TAPS, "vm0\n", 0),
        "cannot be read: Permission denied",
        TAPS,
        but_root=True,
    ),
    Case("tap-too-large", holds(TAPS, "a" * (FILE_MAX + 1)), "is larger than 64 KiB", TAPS),
    Case(
        "tap-too-many",
        holds(TAPS, "".join(f"t{number}\n" for number in range(ENTRIES_MAX + 1))),
        "has more than 256 lines",
        TAPS,
    ),
    Case("tap-flag-unknown", holds(FLAGS, "vnet_hdr\none_queue\n"), "'one_queue'", FLAGS, 2),
    Case("tap-flag-spaces", holds(FLAGS, "vnet_hdr multi_queue\n"), "is none of", FLAGS, 1),
    Case("private-relative", holds(PRIVATE, "a b\n"), "'b' is not an absolute", PRIVATE, 1),
    Case("private-alone", holds(PRIVATE, "a /b\nc\n"), "'' is not an absolute", PRIVATE, 2),
    Case("private-up", holds(PRIVATE, "../a /b\n"), "'../a' cannot be the name", PRIVATE, 1),
    Case("private-hidden", holds(PRIVATE, ".a /b\n"), "'.a' cannot be the name", PRIVATE, 1),
    Case("private-nameless", holds(PRIVATE, " /b\n"), "'' cannot be the name", PRIVATE, 1),
    Case("private-twice", holds(PRIVATE, "a /b\na /c\n"), "'a' stands here twice", PRIVATE, 2),
    Case("private-control", holds(PRIVATE, "a /b\x1b\n"), "is not an absolute", PRIVATE, 1),
    Case("temporary-below", holds(TEMPORARY, "a/b\n"), "'a/b' cannot be the", TEMPORARY, 1),
    Case("temporary-hidden", holds(TEMPORARY, "a\n.b\n"), "'.b' cannot be the", TEMPORARY, 2),
    Case("temporary-twice", holds(TEMPORARY, "a\na\n"), "'a' stands here twice", TEMPORARY, 2),
    Case("bridge-columns", both(holds(TAPS, "a\n"), holds(BRIDGES, "a\n")), "1 col", BRIDGES, 1),
    Case("bridge-no-tap", both(holds(TAPS, "a\n"), holds(BRIDGES, "b br0\n")), "'b'", BRIDGES, 1),
    Case(
        "bridge-twice",
        both(holds(TAPS, "a\n"), holds(BRIDGES, "a br0\na br1\n")),
        "tap 'a' stands here twice",
        BRIDGES,
        2,
    ),
    Case("bridge-name", both(holds(TAPS, "a\n"), holds(BRIDGES, "a br%d\n")), "'br%d'", BRIDGES, 1),
    Case("mtu-no-tap", both(holds(TAPS, "a\n"), holds(MTUS, "b 9000\n")), "'b'", MTUS, 1),
    Case("mtu-word", both(holds(TAPS, "a\n"), holds(MTUS, "a jumbo\n")), "'jumbo' is", MTUS, 1),
    Case("mtu-small", both(holds(TAPS, "a\n"), holds(MTUS, "a 67\n")), "68 and 65521", MTUS, 1),
    Case("mtu-large", both(holds(TAPS, "a\n"), holds(MTUS, "a 65522\n")), "65521", MTUS, 1),
    Case("mtu-long", both(holds(TAPS, "a\n"), holds(MTUS, f"a 1{'0' * 999}\n")), "MTU", MTUS, 1),
    # Macvtaps.
    Case(
        "macvtap-mtu-no-macvtap",
        both(holds(MACVTAPS, f"m {MAC} eth0 bridge\n"), holds(MACVTAP_MTUS, "n 9000\n")),
        "'n' is not in macvtap-interfaces",
        MACVTAP_MTUS,
        1,
    ),
    Case(
        "macvtap-also-tap",
        both(holds(TAPS, "same\n"), holds(MACVTAPS, f"same {MAC} eth0 bridge\n")),
        "'same' is also a tap",
        MACVTAPS,
        1,
    ),
    Case(
        "macvtap-mac-twice",
        holds(MACVTAPS, f"m0 {MAC} eth0 bridge\nm1 {MAC} eth0 bridge\n"),
        f"MAC address {MAC} is also that of m0",
        MACVTAPS,
        2,
    ),
    Case("macvtap-3", holds(MACVTAPS, f"m {MAC} eth0\n"), "3 columns instead of 4", MACVTAPS, 1),
    Case(
        "macvtap-5",
        holds(MACVTAPS, f"m {MAC} eth0 bridge x\n"),
        "5 columns instead of 4",
        MACVTAPS,
        1,
    ),
    Case("macvtap-blank", holds(MACVTAPS, f"\nm {MAC} eth0 bridge\n"), "'' has 0", MACVTAPS, 1),
    Case("macvtap-mode", holds(MACVTAPS, f"m {MAC} eth0 hub\n"), "mode 'hub'", MACVTAPS, 1),
    Case("macvtap-mac", holds(MACVTAPS, "m 02:00:00:00:01 eth0 vepa\n"), "no", MACVTAPS, 1),
    Case(
        "macvtap-mac-letters", holds(MACVTAPS, "m 02:00:00:00:00:0g e vepa\n"), "0g'", MACVTAPS, 1
    ),
    Case(
        "macvtap-multicast",
        holds(MACVTAPS, "m 01:00:5e:00:00:01 eth0 bridge\n"),
        "'01:00:5e:00:00:01' is a multicast address",
        MACVTAPS,
        1,
    ),
    Case(
        "macvtap-zeroes",
        holds(MACVTAPS, "m 00:00:00:00:00:00 eth0 bridge\n"),
        "is all zeroes",
        MACVTAPS,
        1,
    ),
    Case(
        "macvtap-16-bytes",
        holds(MACVTAPS, f"m {MAC} e bridge\nabcdefghijklmnop {MAC} e bridge\n"),
        "'abcdefghijklmnop'",
        MACVTAPS,
        2,
    ),
    Case("macvtap-link", holds(MACVTAPS, f"m {MAC} eth%d bridge\n"), "'eth%d'", MACVTAPS, 1),
    Case("macvtap-own-link", holds(MACVTAPS, f"m {MAC} m bridge\n"), "its own link", MACVTAPS, 1),
    Case(
        "macvtap-twice",
        holds(MACVTAPS, f"m {MAC} e bridge\nm {MAC} f bridge\n"),
        "'m' stands here twice",
        MACVTAPS,
        2,
    ),
    # Devices.
    Case("pci-word", holds(PCI, "01:00.0\neth0\n"), "'eth0' is not a PCI address", PCI, 2),
    Case("pci-function", holds(PCI, "01:00.8\n"), "'01:00.8'", PCI, 1),
    Case("pci-slot", holds(PCI, "01:20.0\n"), "'01:20.0'", PCI, 1),
    Case("pci-path", holds(PCI, "../../../etc:00.0\n"), "is not a PCI address", PCI, 1),
    Case("pci-same-twice", holds(PCI, "01:00.0\n0000:01:00.0\n"), "twice", PCI, 2),
    Case(
        "usb-garbage", holds(f"{SHARE}/usb-devices", b"\xc3("), "UTF-8", f"{SHARE}/usb-devices", 1
    ),
    # Tags. One with `..` has left virtiofs/ when it lands on disk.
    Case("tag-beside", has_share("../t"), "lies outside of virtiofs/", f"{SHARE}/t"),
    Case("tag-up", holds(f"{SHARE}/source", "/etc\n"), "outside of virtiofs/", f"{SHARE}/source"),
    Case("tag-up-socket", holds(f"{SHARE}/socket", "s\n"), "has a '..'", f"{SHARE}/socket"),
    Case("tag-empty", holds(f"{VIRTIOFS}/source", "/\n"), "without a tag", f"{VIRTIOFS}/source"),
    Case("tag-long", has_share("t" * 37), "longer than 36 bytes", f"{VIRTIOFS}/{'t' * 37}"),
    Case("tag-newline", has_share("a\nb"), "'a\\nb' cannot be a share's tag", VIRTIOFS),
    Case("tag-loop", links(f"{VIRTIOFS}/a", "."), "is longer than 36 bytes", VIRTIOFS),
    Case("tag-without-files", is_directory(f"{VIRTIOFS}/t"), "without source", f"{VIRTIOFS}/t"),
    Case("tags-by-links", _many_shares, "is also that of the share", VIRTIOFS, 1),
    Case("virtiofs-file", holds(VIRTIOFS, "x"), "is not a directory", VIRTIOFS),
    Case("virtiofs-dangling", links(VIRTIOFS, "gone"), "points to 'gone'", VIRTIOFS),
    Case(
        "virtiofs-unreadable",
        both(has_share("t"), lambda package: (package / VIRTIOFS).chmod(0)),
        "cannot be read: Permission denied",
        VIRTIOFS,
        but_root=True,
    ),
    # Shares.
    Case("share-no-source", _share_without("source"), "without source", f"{VIRTIOFS}/t"),
    Case("share-no-socket", _share_without("socket"), "without socket", f"{VIRTIOFS}/t"),
    Case(
        "source-newline",
        has_share("t", source="/srv/a\n/srv/b\n"),
        "has more than one line",
        f"{VIRTIOFS}/t/source",
        2,
    ),
    Case("source-empty", has_share("t", source="\n"), "is empty", f"{VIRTIOFS}/t/source", 1),
    Case("source-nul", has_share("t", source=b"/a\0b"), "NUL", f"{VIRTIOFS}/t/source", 1),
    Case(
        "source-directory",
        both(has_share("t"), is_directory(f"{VIRTIOFS}/t/source")),
        "is not a regular file",
        f"{VIRTIOFS}/t/source",
    ),
    Case(
        "source-fifo",
        both(has_share("t"), is_fifo(f"{VIRTIOFS}/t/source")),
        "is not a regular file",
        f"{VIRTIOFS}/t/source",
    ),
    Case(
        "socket-dot-dot",
        has_share("t", socket="../x.sock"),
        "socket '../x.sock' has a '..' in it",
        f"{VIRTIOFS}/t/socket",
        1,
    ),
    Case(
        "socket-inner-dot-dot",
        has_share("t", socket="run/../../x.sock"),
        "has a '..' in it",
        f"{VIRTIOFS}/t/socket",
        1,
    ),
    Case("socket-empty", has_share("t", socket=""), "'' cannot be", f"{VIRTIOFS}/t/socket", 1),
    Case("socket-dot", has_share("t", socket="."), "'.' cannot be", f"{VIRTIOFS}/t/socket", 1),
    Case("socket-slash", has_share("t", socket="a/"), "'a/' cannot", f"{VIRTIOFS}/t/socket", 1),
    Case("socket-slashes", has_share("t", socket="a//b"), "shortest", f"{VIRTIOFS}/t/socket", 1),
    Case("socket-tab", has_share("t", socket="a\tb"), "'a\\tb'", f"{VIRTIOFS}/t/socket", 1),
    Case(
        "socket-twice",
        both(has_share("t", socket="x.sock"), has_share("u", socket="x.sock")),
        "socket 'x.sock' is also that of the share 't'",
        f"{VIRTIOFS}/u/socket",
        1,
    ),
    Case("option-unknown", has_share("t", uid="1"), "is no share option", f"{VIRTIOFS}/t/uid"),
    Case("option-backup", holds(f"{VIRTIOFS}/t/source~", "/"), "is no", f"{VIRTIOFS}/t/source~"),
    Case("read-only-word", has_share("t", read_only="yes"), "'yes'", f"{VIRTIOFS}/t/read-only", 1),
    Case("read-only-empty", has_share("t", read_only=""), "''", f"{VIRTIOFS}/t/read-only", 1),
    Case("cache-word", has_share("t", cache="none\n"), "'none'", f"{VIRTIOFS}/t/cache", 1),
    Case("acl-word", has_share("t", posix_acl="1\n"), "'1' is", f"{VIRTIOFS}/t/posix-acl", 1),
    Case(
        "argument-reserved",
        has_share("t", extra_args="--log-level=info\n--shared-dir=/etc\n"),
        "'--shared-dir=/etc' is not for a package to give",
        f"{VIRTIOFS}/t/extra-args",
        2,
    ),
    Case(
        "argument-socket",
        has_share("t", extra_args="--socket-path=/etc/x\n"),
        "'--socket-path=/etc/x'",
        f"{VIRTIOFS}/t/extra-args",
        1,
    ),
    Case(
        "argument-blank",
        has_share("t", extra_args="--xattr\n\n--xattr\n"),
        "'' cannot be an argument",
        f"{VIRTIOFS}/t/extra-args",
        2,
    ),
    # Single values.
    Case("cid-2", holds(CID, "2\n"), "'2' is not a vsock CID", CID, 1),
    Case("cid-any", holds(CID, "4294967295\n"), "'4294967295' is not", CID, 1),
    Case("cid-word", holds(CID, "three\n"), "'three' is not a vsock CID", CID, 1),
    Case("cid-negative", holds(CID, "-3\n"), "'-3'", CID, 1),
    Case("cid-other-digits", holds(CID, "٣٣\n"), "'٣٣'", CID, 1),
    Case("cid-long", holds(CID, "00000000003" + "0" * 5000), "is not a vsock CID", CID, 1),
    Case("cid-empty", holds(CID, "\n"), "'' is not a vsock CID", CID, 1),
    Case("uuid", holds(UUID, "1234\n"), "'1234' is not a UUID", UUID, 1),
    Case("uuid-dashes", holds(UUID, "0-0-0-0-" + "0" * 28), "is not a UUID", UUID, 1),
    Case("hypervisor", holds(HYPERVISOR, "../qemu\n"), "'../qemu' is not the name", HYPERVISOR, 1),
    Case("hypervisor-two", holds(HYPERVISOR, "qemu\nkvmtool\n"), "than one line", HYPERVISOR, 2),
    Case("hypervisor-fifo", is_fifo(HYPERVISOR), "is not a regular file", HYPERVISOR),
    Case("readiness", holds(READINESS, "soon"), "'soon'", READINESS, 1),
    Case(
        "readiness-no-cid",
        both(holds(HYPERVISOR, "qemu\n"), is_missing(CID), holds(READINESS, "guest\n")),
        "wants the guest's vsock CID",
        READINESS,
    ),
    Case("notify-word", holds(NOTIFY, "8888\n"), "'8888' is not a vsock address", NOTIFY, 1),
    Case("notify-dgram", holds(NOTIFY, "vsock-dgram:2:8888\n"), "is not a vsock addr", NOTIFY, 1),
    Case("notify-cid", holds(NOTIFY, "vsock:3:8888\n"), "is not a vsock address", NOTIFY, 1),
    Case("notify-unix", holds(NOTIFY, "/run/systemd/notify"), "is not a vsock addre", NOTIFY, 1),
    Case("notify-path", holds(NOTIFY, "vsock:2:1/../../x"), "'1/../../x' is not a v", NOTIFY, 1),
    Case("notify-low", holds(NOTIFY, "vsock:2:1023\n"), "'1023' is not a vsock port", NOTIFY, 1),
    Case("notify-any", holds(NOTIFY, "vsock:2:4294967295"), "is not a vsock port", NOTIFY, 1),
    Case("notify-none", holds(NOTIFY, "vsock:2:\n"), "'' is not a vsock port", NOTIFY, 1),
    Case("notify-digits", holds(NOTIFY, "vsock:2:٩٩٩٩"), "is not a vsock port", NOTIFY, 1),
    Case(
        "control-alone", holds(f"{SHARE}/control-socket", "a.sock"), "control-protocol is m", SHARE
    ),
    Case("protocol-alone", holds(f"{SHARE}/control-protocol", "qmp"), "control-socket is m", SHARE),
    Case(
        "protocol",
        both(
            holds(f"{SHARE}/control-socket", "a.sock"), holds(f"{SHARE}/control-protocol", "http")
        ),
        "'http' is none of qmp",
        f"{SHARE}/control-protocol",
        1,
    ),
    Case(
        "control-dot-dot",
        holds(f"{SHARE}/control-socket", "../../x"),
        "'../../x' has a '..'",
        f"{SHARE}/control-socket",
        1,
    ),
    Case(
        "console-absolute",
        holds(f"{SHARE}/console-socket", "/run/x.sock"),
        "'/run/x.sock' is absolute",
        f"{SHARE}/console-socket",
        1,
    ),
    Case(
        "agent-dot-dot",
        holds(f"{SHARE}/agent-socket", "../web2/agent.sock"),
        "has a '..' in it",
        f"{SHARE}/agent-socket",
        1,
    ),
    Case(
        "event-log-absolute",
        holds(f"{SHARE}/event-log", "/etc/passwd"),
        "'/etc/passwd' is absolute",
        f"{SHARE}/event-log",
        1,
    ),
    Case(
        "event-log-dot-dot",
        holds(f"{SHARE}/event-log", "../web2/log"),
        "has a '..' in it",
        f"{SHARE}/event-log",
        1,
    ),
    Case("system-file", holds(f"{SHARE}/system", "x"), "not a symbolic", f"{SHARE}/system"),
    Case("system-name", links(f"{SHARE}/system", "/a\nb"), "not printable", f"{SHARE}/system"),
    # What depends on the host is found when the shares are planned.
    Case(
        "socket-in-etc",
        has_share("t", socket="/etc/evil.sock"),
        "the socket '/etc/evil.sock' of share 't' lies outside",
        f"{VIRTIOFS}/t/socket",
        1,
        stage="shares",
    ),
    Case(
        "socket-long",
        has_share("t", socket="s" * 120),
        "a path of more than 107 bytes",
        f"{VIRTIOFS}/t/socket",
        1,
        stage="shares",
    ),
    Case(
        "socket-on-current",
        has_share("t", socket="current"),
        "this is no socket",
        stage="shares",
        exit_code=1,
    ),
    Case(
        "source-missing",
        has_share("t", source="/nonexistent/data"),
        "the source '/nonexistent/data' of share 't' does not exist",
        stage="shares",
        exit_code=1,
    ),
    Case(
        "source-no-directory",
        has_share("t", source="/dev/null"),
        "is not a directory",
        stage="shares",
        exit_code=1,
    ),
    Case(
        "source-leads-out",
        has_share("t", source="../../.."),
        "leads out of the state directory",
        stage="shares",
        exit_code=1,
    ),
)
