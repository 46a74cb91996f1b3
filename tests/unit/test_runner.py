# SPDX-License-Identifier: MIT
"""The reader of the contract: each file of each year, and each way to break it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import runner
from microvm_host.errors import EXIT_CONFIG, MicrovmHostError, PackageError
from microvm_host.paths import HostPaths
from microvm_host.runner import (
    SHARE,
    ControlSocket,
    Macvtap,
    NotifySocket,
    Package,
    PrivateFile,
    Share,
    Tap,
)
from microvm_host.shares import socket_path, source_path

from . import packages, wrong_packages

READ = [case for case in wrong_packages.CASES if case.stage == "read"]
SHARES = [case for case in wrong_packages.CASES if case.stage == "shares"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return packages.minimal(tmp_path / "package")


def share(package: Path, tag: str, source: str, socket: str = "t.sock") -> None:
    packages.put(package, f"{SHARE}/virtiofs/{tag}/source", f"{source}\n")
    packages.put(package, f"{SHARE}/virtiofs/{tag}/socket", f"{socket}\n")


# ---- what is right


def test_least(package: Path) -> None:
    assert runner.load(str(package)) == Package(path=str(package))


def test_everything(tmp_path: Path) -> None:
    whole = Package(
        path=str(tmp_path),
        taps=(Tap("vm0", multi_queue=True), Tap("vm1", multi_queue=True, bridge="br0", mtu=1400)),
        macvtaps=(Macvtap("m0", "02:00:00:00:00:01", "eth0", "bridge", 9000),),
        shares=(
            Share("ro", "/srv", "ro.sock", options_given=True, read_only=True, cache="never"),
            Share(
                "x",
                "/x",
                "x.sock",
                options_given=True,
                posix_acl=True,
                extra_arguments=("--log-level=debug", "--thread-pool-size", "4"),
            ),
        ),
        pci_devices=("0000:01:00.0",),
        usb_devices="vendorid=0x1,productid=0x2\nvendorid=0x3,productid=0x4",
        has_shutdown=True,
        has_virtiofsd_run=True,
        hypervisor="cloud-hypervisor",
        system="/nix/store/x-nixos-system-web-24.05",
        vsock_cid=4294967294,
        readiness="guest",
        notify_socket=NotifySocket(9999, is_stream=True, path="notify.vsock_9999"),
        control_socket=ControlSocket("web.sock", "cloud-hypervisor"),
        event_log="run/events.json",
        machine_uuid="12345678-1234-1234-1234-123456789abc",
        private_files=(PrivateFile("key", "/etc/a key"), PrivateFile("b.C_d-1", "/é")),
        temporary_files=("seed.img", "b-1"),
    )
    packages.write(tmp_path, whole)
    assert runner.load(str(tmp_path)) == whole
    assert whole.version == "/nix/store/x-nixos-system-web-24.05"
    # The parts that the helpers read by themselves.
    assert runner.load_taps(str(tmp_path)) == whole.taps
    assert runner.load_macvtaps(str(tmp_path)) == whole.macvtaps
    assert runner.load_shares(str(tmp_path)) == whole.shares


@pytest.mark.parametrize(
    ("file", "text", "hint"),
    [
        ("tap-interfaces", "web0\r\nweb1\r\n", "UNIX line ends"),
        ("tap-interfaces", "\ufeffweb0\n", "byte order mark"),
        ("vsock-cid", "42\r\n", "UNIX line ends"),
        ("machine-uuid", "\ufeff12345678-1234-1234-1234-123456789abc", "byte order mark"),
        ("readiness", "guest\r\n", "UNIX line ends"),
        ("pci-devices", "0000:01:00.0\r\n", "UNIX line ends"),
    ],
)
def test_files_of_any_editor(tmp_path: Path, file: str, text: str, hint: str) -> None:
    packages.minimal(tmp_path)
    packages.put(tmp_path, f"share/microvm/{file}", text)
    with pytest.raises(PackageError, match=hint) as raised:
        runner.load(str(tmp_path))
    assert raised.value.line == 1


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "exec"),
        ({"hypervisor": "cloud-hypervisor"}, "exec"),
        ({"vsock-cid": "7"}, "exec"),
        ({"vsock-cid": "7", "hypervisor": "qemu"}, "exec"),
        ({"vsock-cid": "7", "hypervisor": "firecracker"}, "exec"),
        # As NixOS has it.
        ({"vsock-cid": "7", "hypervisor": "cloud-hypervisor"}, "guest"),
        ({"vsock-cid": "7", "hypervisor": "cloud-hypervisor", "readiness": "exec"}, "exec"),
        # Of a declaration that says nothing of readiness.
        (
            {
                "vsock-cid": "7",
                "hypervisor": "cloud-hypervisor",
                "control-socket": "web.sock",
                "control-protocol": "cloud-hypervisor",
            },
            "exec",
        ),
    ],
)
def test_readiness_of_a_package_that_says_nothing(
    tmp_path: Path, files: dict[str, str], expected: str
) -> None:
    packages.minimal(tmp_path)
    for name, text in files.items():
        packages.put(tmp_path, f"share/microvm/{name}", f"{text}\n")
    assert runner.load(str(tmp_path)).readiness == expected


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"hypervisor": "qemu"}, None),
        ({"vsock-cid": "7"}, NotifySocket(8888)),
        ({"vsock-cid": "7", "hypervisor": "qemu"}, NotifySocket(8888)),
        ({"vsock-cid": "7", "notify-socket": "vsock:2:1024"}, NotifySocket(1024)),
        ({"vsock-cid": "7", "notify-socket": "vsock-seqpacket:2:1024"}, NotifySocket(1024)),
        ({"vsock-cid": "7", "notify-socket": "vsock-stream:2:1024"}, NotifySocket(1024, True)),
        # The hypervisor carries it, by streams whatever the guest asked for.
        (
            {"hypervisor": "cloud-hypervisor"},
            NotifySocket(8888, True, "notify.vsock_8888"),
        ),
        (
            {"hypervisor": "firecracker", "vsock-cid": "7", "notify-socket": "vsock:2:5000"},
            NotifySocket(5000, True, "notify.vsock_5000"),
        ),
    ],
)
def test_notify_socket(package: Path, files: dict[str, str], expected: NotifySocket | None) -> None:
    for name, value in files.items():
        packages.put(package, f"{SHARE}/{name}", f"{value}\n")
    assert runner.load(str(package)).notify_socket == expected


def test_before_tap_flags(package: Path) -> None:
    packages.put(package, f"{SHARE}/tap-interfaces", "a\nb\n")
    assert runner.load_taps(str(package)) == (Tap("a", vnet_hdr=True), Tap("b", vnet_hdr=True))


@pytest.mark.parametrize(
    ("flags", "vnet_hdr", "multi_queue"),
    [
        ("", False, False),
        ("\n", False, False),
        ("vnet_hdr\n", True, False),
        ("vnet_hdr", True, False),
        ("multi_queue\n", False, True),
        ("vnet_hdr\nmulti_queue\n", True, True),
        ("multi_queue\nvnet_hdr\n\n", True, True),
    ],
)
def test_tap_flags(package: Path, flags: str, vnet_hdr: bool, multi_queue: bool) -> None:
    packages.put(package, f"{SHARE}/tap-interfaces", "a\n")
    packages.put(package, f"{SHARE}/tap-flags", flags)
    assert runner.load_taps(str(package)) == (Tap("a", vnet_hdr, multi_queue),)


def test_tap_flags_without_taps(package: Path) -> None:
    packages.put(package, f"{SHARE}/tap-flags", "vnet_hdr\n")
    assert runner.load(str(package)).taps == ()


@pytest.mark.parametrize("content", ["", "\n", "\n\n"])
def test_empty_lists(package: Path, content: str) -> None:
    for file in ("tap-interfaces", "macvtap-interfaces", "pci-devices", "usb-devices"):
        packages.put(package, f"{SHARE}/{file}", content)
    found = runner.load(str(package))
    assert (found.taps, found.macvtaps, found.pci_devices) == ((), (), ())


@pytest.mark.parametrize("name", ["vm-abcdefghijkl", "übung", "a.b", "eth0@x", "a*b", "-x", "vm#1"])
def test_interface_names(package: Path, name: str) -> None:
    packages.put(package, f"{SHARE}/tap-interfaces", f"{name}\n")
    assert runner.load_taps(str(package)) == (Tap(name),)


@pytest.mark.parametrize("mode", ["private", "vepa", "bridge", "passthru", "source"])
def test_macvtap_modes(package: Path, mode: str) -> None:
    packages.put(package, f"{SHARE}/macvtap-interfaces", f"m0 02:AB:00:00:00:01 eth0 {mode}\n")
    assert runner.load_macvtaps(str(package)) == (Macvtap("m0", "02:ab:00:00:00:01", "eth0", mode),)


def test_macvtap_columns_apart_by_tabs_and_spaces(package: Path) -> None:
    packages.put(
        package,
        f"{SHARE}/macvtap-interfaces",
        "m0\t02:00:00:00:00:01  eth0 bridge \nm1 02:00:00:00:00:02 m0 vepa",
    )
    first, second = runner.load_macvtaps(str(package))
    assert (first.link, first.mode, second.link) == ("eth0", "bridge", "m0")


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:01:00.1", "0000:01:00.1"),
        ("01:00.1", "0000:01:00.1"),
        ("0000:AF:1F.7", "0000:af:1f.7"),
        ("10000:e1:00.0", "10000:e1:00.0"),
        ("*:02:00.0", "*:02:00.0"),
        ("0000:*:00.*", "0000:*:00.*"),
    ],
)
def test_pci_addresses(package: Path, text: str, address: str) -> None:
    packages.put(package, f"{SHARE}/pci-devices", f"{text}\n")
    assert runner.load(str(package)).pci_devices == (address,)
    assert runner.load_pci_devices(str(package)) == (address,)


def test_only_pci_devices_are_read(package: Path) -> None:
    packages.put(package, f"{SHARE}/tap-interfaces", "vm%d\n")
    assert runner.load_pci_devices(str(package)) == ()
    packages.put(package, f"{SHARE}/pci-devices", "10000:e1:00.0\n*:02:00.0\n")
    assert runner.load_pci_devices(str(package)) == ("10000:e1:00.0", "*:02:00.0")
    packages.put(package, f"{SHARE}/pci-devices", "01:00.0\neth0\n")
    with pytest.raises(PackageError) as caught:
        runner.load_pci_devices(str(package))
    assert (caught.value.path, caught.value.line) == (f"{package}/{SHARE}/pci-devices", 2)


@pytest.mark.parametrize(
    "tag",
    [
        "t",
        "home/alice",
        "a/b/c/d",
        ".hidden",
        ".a/.b",
        "...",
        "a.b:c+d_e-f@g",
        "with space",
        "ü",
        "*",
        "t" * 36,
        "source/socket",
    ],
)
def test_tags(package: Path, tag: str) -> None:
    share(package, tag, "/srv")
    assert runner.load(str(package)).shares == (Share(tag, "/srv", "t.sock"),)


def test_tag_within_tag(package: Path) -> None:
    share(package, "a/b", "/inner", "inner.sock")
    share(package, "a", "/outer", "outer.sock")
    assert runner.load(str(package)).shares == (
        Share("a", "/outer", "outer.sock"),
        Share("a/b", "/inner", "inner.sock"),
    )


@pytest.mark.parametrize(
    "source",
    [
        "/srv",
        "/srv/with inner space",
        "/srv/trailing ",
        " /leading",
        "/srv/ümläut/日本",
        "/srv/\"quoted\" and 'so'",
        "/srv/back\\slash\\n",
        "/srv/*/?[a]",
        "/srv/$HOME/%h/${x}",
        "/srv/tab\there",
        "relative/data",
        "..",
        "-o",
        "/srv/cr\r",
        "/",
    ],
)
def test_sources(package: Path, source: str) -> None:
    share(package, "t", source)
    assert runner.load(str(package)).shares[0].source == source


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n"])
def test_ends_of_values(package: Path, end: str) -> None:
    packages.put(package, f"{SHARE}/virtiofs/t/source", f"/srv/a {end}")
    packages.put(package, f"{SHARE}/virtiofs/t/socket", f"t.sock{end}")
    assert runner.load(str(package)).shares == (Share("t", "/srv/a ", "t.sock"),)


@pytest.mark.parametrize(
    ("text", "socket"),
    [
        ("web-virtiofs-t.sock", "web-virtiofs-t.sock"),
        ("run/sub.sock", "run/sub.sock"),
        ("./x.sock", "x.sock"),
        ("/var/lib/microvms/web/x.sock", "/var/lib/microvms/web/x.sock"),
        ("/run/elsewhere.sock", "/run/elsewhere.sock"),
        ("with space.sock", "with space.sock"),
        ("...", "..."),
    ],
)
def test_sockets(package: Path, text: str, socket: str) -> None:
    share(package, "t", "/srv", text)
    assert runner.load(str(package)).shares[0].socket == socket


@pytest.mark.parametrize("option", ["read-only", "cache", "posix-acl", "extra-args"])
def test_any_option_counts_as_given(package: Path, option: str) -> None:
    share(package, "t", "/srv")
    values = {"read-only": "false", "cache": "auto", "posix-acl": "false", "extra-args": ""}
    packages.put(package, f"{SHARE}/virtiofs/t/{option}", values[option])
    (found,) = runner.load(str(package)).shares
    assert found.options_given
    assert not found.read_only


def test_system_may_dangle_and_be_missing(package: Path) -> None:
    assert runner.load(str(package)).version == str(package)
    packages.link(package, f"{SHARE}/system", "/nix/store/none")
    assert runner.load(str(package)).system == "/nix/store/none"


def test_system_is_not_searched_for_shares(package: Path) -> None:
    packages.put(package, "root/source/x", "")
    packages.link(package, f"{SHARE}/system", "../../root")
    assert runner.load(str(package)).shares == ()


def test_programs_and_files_may_be_links(package: Path, tmp_path: Path) -> None:
    target = packages.program(tmp_path, "store/shutdown")
    packages.link(package, "bin/microvm-shutdown", str(target))
    packages.put(tmp_path, "store/taps", "vm0\n")
    packages.link(package, f"{SHARE}/tap-interfaces", str(tmp_path / "store/taps"))
    found = runner.load(str(package))
    assert found.has_shutdown
    assert found.taps == (Tap("vm0"),)


def test_path_is_the_real_one(package: Path, tmp_path: Path) -> None:
    os.symlink(package, tmp_path / "current")
    assert runner.load(str(tmp_path / "current")).path == str(package)


def test_unknown_files_are_left_alone(package: Path) -> None:
    packages.put(package, f"{SHARE}/of-tomorrow", b"\xff")
    packages.put(package, f"{SHARE}/tomorrow/x", "")
    packages.program(package, "bin/tap-up")
    assert runner.load(str(package)) == Package(path=str(package))


@pytest.mark.parametrize(
    "text", ["12345678-1234-1234-1234-123456789ABC", "12345678123412341234123456789abc"]
)
def test_machine_uuid(package: Path, text: str) -> None:
    packages.put(package, f"{SHARE}/machine-uuid", text)
    assert runner.load(str(package)).machine_uuid == "12345678-1234-1234-1234-123456789abc"


# ---- what is wrong


def test_table_is_what_it_says() -> None:
    names = [case.name for case in wrong_packages.CASES]
    assert len(set(names)) == len(names) >= 100
    # They become names of VMs.
    assert all(name.replace("-", "").isalnum() and len(name) < 60 for name in names)


@pytest.mark.parametrize("case", READ, ids=lambda case: case.name)
def test_wrong_package(package: Path, case: wrong_packages.Case) -> None:
    if case.but_root and os.geteuid() == 0:
        pytest.skip("root reads files of any mode")
    case.break_(package)
    try:
        with pytest.raises(PackageError) as caught:
            runner.load(str(package))
    finally:
        virtiofs = package / wrong_packages.VIRTIOFS
        if case.but_root and virtiofs.is_dir():
            virtiofs.chmod(0o755)
    error = caught.value
    assert error.exit_code == EXIT_CONFIG == case.exit_code
    assert case.message in str(error)
    assert (error.path or "").startswith(os.path.join(package, case.file).rstrip("/"))
    assert error.line == case.line
    if case.line is not None:
        assert str(error).startswith(f"{error.path}:{case.line}: ")
    # One line, that no terminal takes for commands.
    assert str(error).isprintable()


@pytest.mark.parametrize("case", SHARES, ids=lambda case: case.name)
def test_wrong_share_on_this_host(
    package: Path, host: HostPaths, case: wrong_packages.Case
) -> None:
    os.mkdir(host.vm("web"))
    os.symlink(package, host.current("web"))
    case.break_(package)
    (found,) = runner.load(str(package)).shares
    with pytest.raises(MicrovmHostError) as caught:
        socket_path(found, host.vm("web"), str(package))
        source_path(found, host.vm("web"))
    assert caught.value.exit_code == case.exit_code
    assert case.message in str(caught.value)
    assert str(caught.value).isprintable()
    if case.line is not None:
        assert str(caught.value).startswith(f"{package / case.file}:{case.line}: ")


@pytest.mark.parametrize("kind", ["missing", "dangling", "loop", "file", "below a file"])
def test_no_package(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "current"
    if kind == "dangling":
        os.symlink("/nonexistent/package", path)
    elif kind == "loop":
        os.symlink("current", path)
    elif kind != "missing":
        path.write_text("x")
    if kind == "below a file":
        path = path / "x"
    with pytest.raises(PackageError) as caught:
        runner.load(str(path))
    assert str(path) in str(caught.value)
    if kind == "dangling":
        assert "points to '/nonexistent/package', which does not exist" in str(caught.value)


def test_part_readers_refuse_too(package: Path) -> None:
    packages.put(package, f"{SHARE}/tap-interfaces", "vm%d\n")
    packages.put(package, f"{SHARE}/macvtap-interfaces", "x\n")
    packages.put(package, f"{SHARE}/virtiofs/t/source", "/\n")
    for load in (runner.load_taps, runner.load_macvtaps, runner.load_shares):
        with pytest.raises(PackageError):
            load(str(package))


def test_fifo_is_not_waited_for(package: Path) -> None:
    # Opening it in the usual way would hang here for ever.
    os.mkfifo(package / "bin/fifo")
    packages.link(package, f"{SHARE}/vsock-cid", "../../bin/fifo")
    with pytest.raises(PackageError, match="is not a regular file"):
        runner.load(str(package))
