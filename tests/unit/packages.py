# SPDX-License-Identifier: MIT
"""Writes runner packages for the unit tests, in the form that the contract gives them."""

from __future__ import annotations

import os
from pathlib import Path

from microvm_host.runner import SHARE, Package, Tap

PROGRAM = "#! /bin/sh -e\nexit 0\n"


def put(package: Path, file: str, content: str | bytes) -> Path:
    """Write one file of a package, its directories too."""
    path = package / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def program(package: Path, file: str, content: str = PROGRAM) -> Path:
    """Write one program of a package."""
    path = put(package, file, content)
    path.chmod(0o755)
    return path


def link(package: Path, file: str, target: str) -> None:
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    os.symlink(target, package / file)


def minimal(directory: Path) -> Path:
    """The least that is a package: `bin/microvm-run`."""
    program(directory, "bin/microvm-run")
    return directory


def _lines(package: Path, file: str, values: list[str]) -> None:
    if values:
        put(package, f"{SHARE}/{file}", "".join(f"{value}\n" for value in values))


def _one(package: Path, file: str, value: object | None) -> None:
    if value is not None:
        put(package, f"{SHARE}/{file}", f"{value}\n")


def _flags(package: Path, taps: tuple[Tap, ...]) -> None:
    if taps:
        given = (("vnet_hdr", taps[0].vnet_hdr), ("multi_queue", taps[0].multi_queue))
        put(package, f"{SHARE}/tap-flags", "".join(f"{word}\n" for word, is_on in given if is_on))


def write(directory: Path, package: Package) -> Path:
    """Write a package down; its `path` is ignored, and the first tap's flags are those of all."""
    minimal(directory)
    if package.has_shutdown:
        program(directory, "bin/microvm-shutdown")
    if package.has_virtiofsd_run:
        program(directory, "bin/virtiofsd-run")
    _lines(directory, "tap-interfaces", [tap.name for tap in package.taps])
    _flags(directory, package.taps)
    _lines(
        directory, "tap-bridges", [f"{tap.name} {tap.bridge}" for tap in package.taps if tap.bridge]
    )
    _lines(directory, "tap-mtus", [f"{tap.name} {tap.mtu}" for tap in package.taps if tap.mtu])
    _lines(
        directory,
        "macvtap-interfaces",
        [f"{each.name} {each.mac} {each.link} {each.mode}" for each in package.macvtaps],
    )
    _lines(
        directory,
        "macvtap-mtus",
        [f"{each.name} {each.mtu}" for each in package.macvtaps if each.mtu],
    )
    _lines(directory, "pci-devices", list(package.pci_devices))
    for share in package.shares:
        place = f"virtiofs/{share.tag}"
        _one(directory, f"{place}/source", share.source)
        _one(directory, f"{place}/socket", share.socket)
        if share.options_given:
            _one(directory, f"{place}/read-only", str(share.read_only).lower())
            _one(directory, f"{place}/cache", share.cache)
            _one(directory, f"{place}/posix-acl", str(share.posix_acl).lower())
            _lines(directory, f"{place}/extra-args", list(share.extra_arguments))
    _one(directory, "usb-devices", package.usb_devices)
    _one(directory, "hypervisor", package.hypervisor)
    if package.system is not None:
        link(directory, f"{SHARE}/system", package.system)
    _one(directory, "vsock-cid", package.vsock_cid)
    _one(directory, "readiness", package.readiness)
    if package.notify_socket is not None:
        kind = "vsock-stream" if package.notify_socket.is_stream else "vsock"
        _one(directory, "notify-socket", f"{kind}:2:{package.notify_socket.port}")
    if package.control_socket is not None:
        _one(directory, "control-socket", package.control_socket.path)
        _one(directory, "control-protocol", package.control_socket.protocol)
    _one(directory, "console-socket", package.console_socket)
    _one(directory, "agent-socket", package.agent_socket)
    _one(directory, "event-log", package.event_log)
    _one(directory, "machine-uuid", package.machine_uuid)
    _lines(
        directory, "private-files", [f"{each.name} {each.source}" for each in package.private_files]
    )
    _lines(directory, "temporary-files", list(package.temporary_files))
    return directory
