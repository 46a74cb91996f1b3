# SPDX-License-Identifier: MIT
"""What holds for any input: the reader raises nothing but its own error, names do not collide."""

from __future__ import annotations

import os
import shutil
import string
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from microvm_host import declaration, names, runner
from microvm_host.errors import DeclarationError, MicrovmHostError, NameInvalid, PackageError
from microvm_host.runner import (
    SHARE,
    ControlSocket,
    Macvtap,
    NotifySocket,
    Package,
    Share,
    Tap,
)

from . import packages

FILES = (
    "tap-interfaces",
    "tap-flags",
    "tap-bridges",
    "tap-mtus",
    "macvtap-interfaces",
    "macvtap-mtus",
    "pci-devices",
    "usb-devices",
    "hypervisor",
    "vsock-cid",
    "readiness",
    "notify-socket",
    "control-socket",
    "control-protocol",
    "console-socket",
    "agent-socket",
    "machine-uuid",
    "virtiofs/t/source",
    "virtiofs/t/socket",
    "virtiofs/t/read-only",
    "virtiofs/t/cache",
    "virtiofs/t/posix-acl",
    "virtiofs/t/extra-args",
    "virtiofs/t/other",
)
# Bytes that get further than noise: what the files hold, cut and mixed.
PIECES = st.sampled_from(
    [b"vm0", b"02:00:00:00:00:01", b"eth0", b"bridge", b" ", b"\t", b"\n", b"\r\n", b"\0", b"0"]
    + [b"vnet_hdr", b"multi_queue", b"true", b"qmp", b"..", b"/", b"*", b"01:00.0", b"-", b"\xff"]
    + ["ü".encode(), b"%d", b"99999999999", b"auto", b"--fd=4", b"guest"]
    + [b"vsock:2:", b"vsock-stream:2:8888", b"7"]
)
CONTENT = st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=12).map(b"".join))
# No database: nothing is written into the checkout.
# CI runs the same examples each time: what it finds anew belongs to whoever changed something.
QUICK = settings(
    max_examples=100,
    deadline=None,
    database=None,
    derandomize=os.environ.get("CI") == "true",
)


@contextmanager
def package_directory() -> Iterator[Path]:
    # Not tmp_path, which one test has for all of its examples.
    with tempfile.TemporaryDirectory() as directory:
        yield packages.minimal(Path(directory).resolve() / "package")


@QUICK
@given(st.dictionaries(st.sampled_from(FILES), CONTENT, max_size=5))
def test_any_bytes_are_read_or_refused(contents: dict[str, bytes]) -> None:
    with package_directory() as package:
        for file, content in contents.items():
            packages.put(package, f"{SHARE}/{file}", content)
        try:
            runner.load(str(package))
        except PackageError as error:
            assert error.path is not None and error.path.startswith(str(package))
            assert str(error).isprintable()


@QUICK
@given(st.binary(min_size=1, max_size=40), st.sampled_from(["", "virtiofs", "virtiofs/t"]))
def test_any_file_name_is_read_or_refused(name: bytes, below: str) -> None:
    assume(b"/" not in name and b"\0" not in name and name not in (b".", b".."))
    with package_directory() as package:
        directory = packages.put(package, f"{SHARE}/{below}/x", "").parent
        (directory / "x").unlink()
        path = bytes(directory) + b"/" + name
        with open(path, "wb") as target:
            target.write(b"/srv\n")
        try:
            runner.load(str(package))
        except PackageError as error:
            assert str(error).isprintable()


# What str.isprintable() accepts.
PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")
INTERFACE_CHARACTERS = st.characters(exclude_categories=("C", "Z"), exclude_characters="/:%")
INTERFACES = st.text(INTERFACE_CHARACTERS, min_size=1, max_size=15).filter(
    lambda text: text not in (".", "..") and len(text.encode()) <= 15
)
MACS = st.binary(min_size=6, max_size=6).map(
    lambda octets: ":".join(f"{octet:02x}" for octet in (octets[0] & 0xFE | 2, *octets[1:]))
)
PARTS = st.text(
    st.characters(exclude_categories=("C", "Z"), exclude_characters="/", include_characters=" "),
    min_size=1,
    max_size=9,
)
TAGS = (
    st.lists(PARTS.filter(lambda part: part not in (".", "..")), min_size=1, max_size=3)
    .map("/".join)
    .filter(lambda tag: len(tag.encode()) <= 36)
)
SOURCES = st.text(st.characters(codec="utf-8", exclude_characters="\n\0"), min_size=1, max_size=40)
SOCKETS = (
    st.lists(PARTS, min_size=1, max_size=3)
    .filter(lambda parts: not {".", ".."} & set(parts))
    .map("/".join)
)
ARGUMENTS = st.text(PRINTABLE, min_size=1, max_size=20).map(lambda text: f"--x{text}")
FIELD = st.text(string.hexdigits.lower()[:16], min_size=2, max_size=2)
PCI = st.builds(
    "{}{}:{}:{:02x}.{}".format,
    st.sampled_from(["", "1"]),
    st.text("0123456789abcdef", min_size=4, max_size=4),
    FIELD,
    st.integers(0, 31),
    st.integers(0, 7),
)


@st.composite
def taps(draw: st.DrawFn) -> tuple[Tap, ...]:
    vnet_hdr, multi_queue = draw(st.booleans()), draw(st.booleans())
    return tuple(
        Tap(name, vnet_hdr, multi_queue, draw(st.none() | INTERFACES))
        for name in draw(st.lists(INTERFACES, max_size=4, unique=True))
    )


@st.composite
def macvtaps(draw: st.DrawFn) -> tuple[Macvtap, ...]:
    chosen = draw(st.lists(INTERFACES, max_size=6, unique=True))
    # No macvtap stands on itself: the first half are names, the second half links.
    half = len(chosen) // 2
    macs = draw(st.lists(MACS, min_size=half, max_size=half, unique=True))
    return tuple(
        Macvtap(name, mac, link, draw(st.sampled_from(names.MACVTAP_MODES)))
        for name, mac, link in zip(chosen[:half], macs, chosen[half : 2 * half], strict=True)
    )


def _files_of(tag: str) -> set[str]:
    options = ("source", "socket", "read-only", "cache", "posix-acl", "extra-args")
    return {f"{tag}/{option}" for option in options}


@st.composite
def shares(draw: st.DrawFn) -> tuple[Share, ...]:
    tags = draw(st.lists(TAGS, max_size=3, unique=True))
    # A tag `a/source` beside the tag `a` is a file and a directory at once.
    files = [f"{file}/" for tag in tags for file in _files_of(tag)]
    assume(not any(f"{tag}/".startswith(file) for tag in tags for file in files))
    sockets = draw(st.lists(SOCKETS, min_size=len(tags), max_size=len(tags), unique=True))
    found = []
    for tag, socket in zip(tags, sockets, strict=True):
        plain = Share(tag, draw(SOURCES), socket)
        if draw(st.booleans()):
            plain = Share(
                tag,
                plain.source,
                socket,
                True,
                draw(st.booleans()),
                draw(st.none() | st.sampled_from(runner.CACHE_POLICIES)),
                draw(st.booleans()),
                tuple(draw(st.lists(ARGUMENTS, max_size=2))),
            )
        found.append(plain)
    return tuple(found)


PACKAGES = st.builds(
    Package,
    path=st.just(""),
    taps=taps(),
    macvtaps=macvtaps(),
    shares=shares(),
    pci_devices=st.lists(PCI, max_size=3, unique=True).map(tuple),
    usb_devices=st.none() | st.text(PRINTABLE, max_size=20),
    has_shutdown=st.booleans(),
    has_virtiofsd_run=st.booleans(),
    hypervisor=st.none() | st.sampled_from(["qemu", "cloud-hypervisor", "alioth"]),
    system=st.none() | PARTS.map(lambda part: f"/nix/store/{part}"),
    vsock_cid=st.none() | st.integers(3, 0xFFFFFFFE),
    readiness=st.sampled_from(runner.READINESS),
    notify_socket=st.none()
    | st.builds(NotifySocket, st.integers(1024, 0xFFFFFFFE), st.booleans(), st.none()),
    control_socket=st.none()
    | st.builds(ControlSocket, SOCKETS, st.sampled_from(runner.CONTROL_PROTOCOLS)),
    console_socket=st.none() | SOCKETS.filter(lambda path: not path.startswith("/")),
    agent_socket=st.none() | SOCKETS.filter(lambda path: not path.startswith("/")),
    machine_uuid=st.none() | st.uuids().map(str),
)


def _depth_first(share: Share) -> list[str]:
    return share.tag.split("/")


@settings(QUICK, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
@given(PACKAGES)
def test_what_is_written_reads_back_the_same(package: Package) -> None:
    taken = {tap.name for tap in package.taps}
    assume(not any(macvtap.name in taken for macvtap in package.macvtaps))
    # That a guest cannot say it without a vsock is a case of wrong_packages.
    needs = package.readiness == "guest" or package.notify_socket is not None
    is_hybrid = package.hypervisor == "cloud-hypervisor"
    assume(package.vsock_cid is not None or is_hybrid or not needs)
    with package_directory() as directory:
        packages.write(directory, package)
        found = runner.load(str(directory))
    expected = {name: getattr(package, name) for name in Package.__match_args__}
    expected["path"] = str(directory)
    notify = package.notify_socket or NotifySocket(8888)
    if is_hybrid:
        expected["notify_socket"] = NotifySocket(notify.port, True, f"notify.vsock_{notify.port}")
    elif package.vsock_cid is not None:
        expected["notify_socket"] = notify
    expected["shares"] = tuple(sorted(package.shares, key=_depth_first))
    assert found == Package(**expected)


CHECKS = (
    names.vm_name,
    names.interface_name,
    names.share_tag,
    names.mac_address,
    names.pci_address,
    names.machine_uuid,
)
# Half-surrogates too: names of files and arguments may have them.
ANY_TEXT = st.text(st.characters(codec=None), max_size=80) | st.text(
    "0123456789abcdefABCDEF:.*-/%", max_size=40
)


@pytest.mark.parametrize("check", CHECKS)
@given(text=ANY_TEXT)
@QUICK
def test_chosenraise_nothing_else(check: object, text: str) -> None:
    assert callable(check)
    try:
        name = check(text)
    except NameInvalid as error:
        assert str(error).isprintable()
    else:
        # What was accepted stays so.
        assert check(name) == name
        assert str(name).isprintable() and str(name).encode()


VM_CHARACTERS = string.ascii_letters + string.digits + ":_.-"


@QUICK
@given(st.text(VM_CHARACTERS, min_size=1, max_size=63).filter(lambda text: text[0] not in ".-"))
def test_chosenof_vms_stay_as_they_are(text: str) -> None:
    assert names.vm_name(text) == text


SIMILAR = st.text("a-/._x2d\\:@é", min_size=1, max_size=6)


@QUICK
@given(SIMILAR, SIMILAR)
def test_escape_is_injective(one: str, other: str) -> None:
    assert (names.escape(one) == names.escape(other)) == (one == other)


VMS = st.text("ab-.:", min_size=1, max_size=5)
SHORT_TAGS = st.text("ab-/.:@ ", min_size=1, max_size=5)


@QUICK
@given(st.tuples(VMS, SHORT_TAGS), st.tuples(VMS, SHORT_TAGS))
def test_units_of_shares_do_not_collide(one: tuple[str, str], other: tuple[str, str]) -> None:
    if one != other:
        units = {
            names.share_unit(vm, tag, suffix)
            for vm, tag in (one, other)
            for suffix in (".socket", ".service")
        }
        assert len(units) == 4


@pytest.mark.skipif(not shutil.which("systemd-escape"), reason="systemd-escape is not installed")
def test_escape_is_systemds() -> None:
    texts = [
        "a",
        "a-b",
        "home/alice",
        ".hidden",
        "a.b:c+d_e-f@g",
        "with space",
        "ümläut",
        "日本",
        "a\\b",
        "$x%i",
        "*?[a]",
        "//a//",
        "'\"",
        "-x",
    ]
    done = subprocess.run(
        ["systemd-escape", "--", *texts], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [names.escape(text) for text in texts]


TOML_PIECES = st.sampled_from(
    ["runner", "flake", "autostart", " = ", '"/a"', "true", "\n", "[", "]", "'", '"""', "#", "1e9"]
)


@QUICK
@given(st.binary(max_size=40) | st.lists(TOML_PIECES, max_size=9).map("".join).map(str.encode))
def test_any_declaration_is_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = packages.put(Path(directory), "web.toml", content)
        try:
            assert declaration.load(str(path)).name == "web"
        except DeclarationError as error:
            assert error.path == str(path)
            assert "\n" not in str(error)


@QUICK
@given(ANY_TEXT, st.none() | st.text(max_size=20), ANY_TEXT)
def test_errors_are_one_line(message: str, path: str | None, hint: str) -> None:
    assume(message.isprintable() and hint.isprintable())
    assert "\n" not in str(MicrovmHostError(message, path=path, hint=hint))
