# SPDX-License-Identifier: MIT
"""Runner packages for tests, in microvm.nix's style.

``Guest`` becomes a package that starts the real guest of ``image`` under QEMU; ``Stub`` becomes one
whose ``microvm-run`` is a few lines of shell, for tests of units that need no guest. Both carry the
same description of taps, macvtaps, shares and devices, and write the same files under
``share/microvm``. This module knows the contract from its own side and must not import anything
of the host: a mistake shared by both sides would be seen by neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

from .image import Image

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

Cache = Literal["auto", "always", "never", "metadata"]
Accelerator = Literal["auto", "kvm", "tcg"]
Machine = Literal["microvm", "q35"]
Keyboard = Literal["i8042", "virtio", "none"]
ImagePlacement = Literal["hardlink", "copy", "refer"]
Shutdown = Literal["power-button", "power-button-early", "ctrl-alt-del", "none"]
StubShutdown = Literal["terminate", "early", "fail", "hang", "none"]
Era = Literal["2023-10", "2023-11", "2024-04", "2025-06", "2026-08"]

BASH = "#! /bin/bash -e\n"


class PackageError(Exception):
    """The description cannot become a package; the message says what is wrong with it."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """A tap that the host makes and the guest sees as a virtio NIC."""

    name: str
    mac: str
    address: str | None = None
    """``ADDRESS/PREFIX[,GATEWAY]`` that the guest gives itself."""
    bridge: str | None = None


@dataclass(frozen=True, kw_only=True)
class Macvtap:
    """A macvtap that the host makes on one of its own interfaces."""

    name: str
    mac: str
    link: str
    mode: str = "bridge"
    address: str | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """A network card that comes with one of the PCI devices, and that the guest configures."""

    mac: str
    address: str
    """``ADDRESS/PREFIX[,GATEWAY]``."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """A directory of the host, seen by the guest through virtiofs."""

    tag: str
    source: str
    mount: str | None = None
    """Where the guest mounts it; without, it does not."""
    socket: str | None = None
    """Default: ``NAME-virtiofs-TAG.sock``; a nested tag makes it lie in a sub-directory."""
    read_only: bool = False
    cache: Cache | None = None
    posix_acl: bool = False
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Volume:
    """An image file in the state directory, made by ``microvm-run`` when it is missing."""

    image: str
    size_mb: int
    file_system: str | None = None
    """Made with ``mkfs.TYPE`` when the image is new."""
    read_only: bool = False
    serial: str | None = None


@dataclass(frozen=True, kw_only=True)
class Package:
    """What every package can say to the host; the base of ``Guest`` and ``Stub``."""

    name: str
    taps: tuple[Tap, ...] = ()
    macvtaps: tuple[Macvtap, ...] = ()
    shares: tuple[Share, ...] = ()
    pci_devices: tuple[str, ...] = ()
    """As written, also in the odd forms; a ``Guest`` wants real addresses."""
    usb_devices: tuple[str, ...] = ()
    vsock_cid: int | None = None
    system: str | None = None
    """Target of the ``system`` link; it may dangle."""
    vsock_cid_file: bool = True
    hypervisor_file: bool = True
    hypervisor: str = "qemu"
    tap_flags_file: bool = True
    multi_queue: bool = False
    """Whether ``tap-flags`` has ``multi_queue``; a ``Guest`` adds it with more than one CPU."""
    share_options: bool = True
    """Whether the share options stand in files beside ``source`` and ``socket``."""
    virtiofsd_run: bool = False
    """Whether the package brings its own ``bin/virtiofsd-run``."""
    virtiofsd: str | None = None
    """Default: whichever of Debian's places has one, decided when it runs."""
    virtiofsd_group: str | None = "kvm"
    """Who may connect to the sockets of the package's own virtiofsd, beside root."""
    supervisord: str = "/usr/bin/supervisord"
    own_scripts: bool = False
    """Whether there are ``tap-up`` and the like; a host that runs them fails, and says so."""
    register: bool = False
    symlinks: bool = False
    """Whether ``bin/*`` are links to scripts elsewhere in the package, as nix makes them."""
    readiness: Literal["exec", "guest"] | None = None
    notify_socket: str | None = None
    """What the guest's systemd has in ``vmm.notify_socket``."""
    control_socket: str | None = None
    control_protocol: Literal["qmp", "cloud-hypervisor", "firecracker"] | None = None
    event_log: str | None = None
    """Where the hypervisor writes its events; a ``Guest`` has QEMU do so (from 8.1 on)."""
    machine_uuid: str | None = None
    extra_files: Mapping[str, bytes] = field(default_factory=dict)
    """Written last, below the package: replaces any file, so that a wrong package can be made."""

    def socket_of(self, share: Share) -> str:
        """The vhost-user socket of a share."""
        return share.socket or f"{self.name}-virtiofs-{share.tag}.sock"

    @property
    def has_multi_queue(self) -> bool:
        """Whether the taps have a queue for each CPU."""
        return self.multi_queue

    def facts(self) -> dict[str, bytes]:
        """The files below ``share/microvm``, byte for byte."""
        lines: dict[str, Sequence[str]] = {
            "tap-interfaces": [tap.name for tap in self.taps],
            "macvtap-interfaces": [
                f"{link.name} {link.mac} {link.link} {link.mode}" for link in self.macvtaps
            ],
            "pci-devices": self.pci_devices,
            "usb-devices": self.usb_devices,
            "tap-bridges": [f"{tap.name} {tap.bridge}" for tap in self.taps if tap.bridge],
        }
        if self.tap_flags_file:
            lines["tap-flags"] = ["vnet_hdr", *(["multi_queue"] if self.has_multi_queue else [])]
        if self.hypervisor_file:
            lines["hypervisor"] = [self.hypervisor]
        if self.vsock_cid is not None and self.vsock_cid_file:
            lines["vsock-cid"] = [str(self.vsock_cid)]
        for name, value in (
            ("readiness", self.readiness),
            ("notify-socket", self.notify_socket),
            ("control-socket", self.control_socket),
            ("control-protocol", self.control_protocol),
            ("event-log", self.event_log),
            ("machine-uuid", self.machine_uuid),
        ):
            lines[name] = [value] if value is not None else []
        for share in self.shares:
            below = f"virtiofs/{share.tag}"
            lines[f"{below}/source"] = [share.source]
            lines[f"{below}/socket"] = [self.socket_of(share)]
            if self.share_options:
                lines[f"{below}/read-only"] = ["true"] if share.read_only else []
                lines[f"{below}/cache"] = [share.cache] if share.cache else []
                lines[f"{below}/posix-acl"] = ["true"] if share.posix_acl else []
                lines[f"{below}/extra-args"] = share.extra_args
        return {
            name: "".join(f"{line}\n" for line in content).encode()
            for name, content in lines.items()
            if content
        }

    def scripts(self, prefix: PurePosixPath) -> dict[str, str]:
        """The scripts below ``bin``, for a package that will live at the prefix."""
        scripts: dict[str, str] = {}
        if self.virtiofsd_run and self.shares:
            scripts["virtiofsd-run"] = (
                BASH + f"exec {shlex.quote(self.supervisord)} --configuration \\\n"
                f'    {shlex.quote(str(prefix / "lib/supervisord.conf"))} "$@"\n'
            )
        if self.own_scripts:
            for name in ("tap-up", "tap-down", "macvtap-up", "macvtap-down", "pci-setup"):
                scripts[name] = BASH + f'echo "{name}: not for this host" >&2\nexit 1\n'
        if self.register:
            for name in ("microvm-register", "microvm-unregister"):
                scripts[name] = BASH + f'echo "{name}: asked for"\n'
        return scripts

    def library(self, prefix: PurePosixPath) -> dict[str, str]:
        """Further files below ``lib``; those that start with ``#!`` become executable."""
        if not (self.virtiofsd_run and self.shares):
            return {}
        library = {
            "supervisord.conf": _supervisord_conf(self, prefix),
            "supervisord-listener": _listener(1 + len(self.shares)),
        }
        for number, share in enumerate(self.shares):
            library[f"virtiofsd-{number}"] = _virtiofsd_script(self, share)
        return library

    def write(self, directory: Path, *, prefix: str | os.PathLike[str] | None = None) -> Path:
        """Write the package.

        Scripts name their own files by absolute path, as nix's do: a package that is written here
        and copied into a test host is told by ``prefix`` where it will live there.
        """
        home = PurePosixPath(os.fspath(prefix) if prefix is not None else directory.absolute())
        scripts = self.scripts(home)
        library = self.library(home)
        facts = self.facts()
        if directory.exists() and any(directory.iterdir()):
            raise PackageError(f"{directory}: exists and is not empty")
        for name, text in scripts.items():
            if self.symlinks:
                _write(directory / "lib/scripts" / name, text.encode(), 0o755)
                (directory / "bin").mkdir(exist_ok=True)
                (directory / "bin" / name).symlink_to(f"../lib/scripts/{name}")
            else:
                _write(directory / "bin" / name, text.encode(), 0o755)
        for name, text in library.items():
            _write(directory / "lib" / name, text.encode(), 0o755 if text[:2] == "#!" else 0o644)
        for name, data in facts.items():
            _write(directory / "share/microvm" / name, data)
        if self.system is not None:
            (directory / "share/microvm").mkdir(parents=True, exist_ok=True)
            (directory / "share/microvm/system").symlink_to(self.system)
        for name, data in self.extra_files.items():
            target = directory / name
            if target.is_symlink():
                target.unlink()
            mode = 0o755 if name.startswith("bin/") else 0o644
            _write(target, data, mode)
        return directory


def _write(path: Path, data: bytes, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.chmod(mode)


@dataclass(frozen=True, kw_only=True)
class Guest(Package):
    """A package that starts the real guest under QEMU."""

    image: Image
    placement: ImagePlacement = "hardlink"
    """How kernel and initrd get into the package; ``refer`` leaves them where they are."""
    image_prefix: str | None = None
    """With ``refer``: where the image's directory will be when the package runs."""
    cpus: int = 1
    memory_mb: int = 256
    machine: Machine = "microvm"
    accelerator: Accelerator = "auto"
    queues: int | None = None
    """Queues of each tap; default: one a CPU, which is what makes the taps multi-queue."""
    macvtap_queues: int = 1
    keyboard: Keyboard = "none"
    """What Ctrl-Alt-Del is typed on; without one, QEMU refuses it."""
    user_net: bool = False
    """A NIC of QEMU's own user-mode network (10.0.2.0/24, MAC 52:54:00:00:02:0f)."""
    volumes: tuple[Volume, ...] = ()
    control: bool = True
    """Whether QEMU listens on ``NAME.sock``."""
    shutdown: Shutdown = "power-button"
    balloon: bool = False
    qemu: str = "/usr/bin/qemu-system-x86_64"
    qemu_args: tuple[str, ...] = ()

    # What the guest does; see the head of "init".
    panic_device: bool = False
    """Whether the guest's kernel can tell QEMU that it panicked."""
    mark: bool = False
    """Whether the first volume is marked when the guest is up, and again when it has shut down."""
    slow_stop: int = 0
    deaf: bool = False
    exit_after: int | None = None
    reboot_after: int | None = None
    crash_after: int | None = None
    fail_after: int | None = None
    cards: tuple[Card, ...] = ()
    disks: tuple[str, ...] = ()
    """Serial numbers of disks to read the first line of, and to write to."""
    pings: tuple[str, ...] = ()
    shell_port: int | None = None
    notify_tree: str | None = None
    """A mounted share with a Debian tree, whose systemd-notify says that the guest is ready."""
    systemd_tree: str | None = None
    """A mounted share with a Debian tree, whose systemd takes over."""
    kernel_args: tuple[str, ...] = ()

    @property
    def socket(self) -> str:
        """The control socket, relative to the state directory."""
        return f"{self.name}.sock"

    @property
    def tap_queues(self) -> int:
        """Queues of each tap."""
        return self.queues if self.queues is not None else self.cpus

    @property
    def has_multi_queue(self) -> bool:
        """A tap made with ``multi_queue`` can only be opened by a QEMU that asks for queues."""
        return self.multi_queue or self.tap_queues > 1

    def check(self) -> None:
        """Refuse what the guest's command line cannot carry or QEMU cannot start."""
        if self.tap_queues > self.cpus:
            raise PackageError(f"{self.name}: {self.tap_queues} queues want as many CPUs")
        if self.multi_queue and self.tap_queues < 2:
            raise PackageError(f"{self.name}: multi_queue wants at least 2 queues")
        for share in self.shares:
            if share.mount is not None:
                for text in (share.tag, share.mount):
                    if any(character in text for character in ', \t\n"'):
                        raise PackageError(
                            f"{self.name}: share {text!r}: a comma, a quote or white space cannot "
                            "be told to the guest; leave `mount` out"
                        )
            if len(share.tag.encode()) > 36:
                raise PackageError(f"{self.name}: share {share.tag!r}: more than 36 bytes")

    def guest_args(self) -> list[str]:
        """The kernel arguments that ``init`` reads."""
        args = [f"guest.name={self.name}"]
        nics: tuple[Tap | Macvtap | Card, ...] = (*self.taps, *self.macvtaps, *self.cards)
        args += [f"guest.net={nic.mac.lower()},{nic.address}" for nic in nics if nic.address]
        if self.user_net:
            args.append(f"guest.net={USER_MAC},10.0.2.15/24,10.0.2.2")
        args += [f"guest.share={s.tag},{s.mount}" for s in self.shares if s.mount]
        args += [f"guest.disk={serial}" for serial in self.disks]
        args += [f"guest.ping={address}" for address in self.pings]
        if self.mark:
            args.append("guest.mark=1")
        if self.slow_stop:
            args.append(f"guest.slow-stop={self.slow_stop}")
        if self.deaf:
            args.append("guest.deaf=1")
        for name, value in (
            ("exit-after", self.exit_after),
            ("reboot-after", self.reboot_after),
            ("crash-after", self.crash_after),
            ("fail-after", self.fail_after),
            ("shell", self.shell_port),
            ("systemd", self.systemd_tree),
        ):
            if value is not None:
                args.append(f"guest.{name}={value}")
        if self.notify_tree:
            args.append(f"guest.notify={self.notify_tree},{self.notify_socket or NOTIFY_SOCKET}")
        return [*args, *self.kernel_args]

    def qemu_argv(self, kernel: str, initrd: str) -> list[str]:
        """QEMU's command line, but for what is decided when it starts: CPU and kernel line."""
        argv = [
            *("-name", _quoted(self.name), "-m", f"{self.memory_mb}M", "-smp", str(self.cpus)),
            # Not -nographic: with it, newer firmware draws on the serial console.
            *("-nodefaults", "-no-user-config", "-display", "none"),
            # A guest that reboots ends QEMU: systemd starts it again.
            "-no-reboot",
            *("-kernel", kernel, "-initrd", initrd),
            *("-chardev", "stdio,id=stdio,signal=off", "-serial", "chardev:stdio"),
        ]
        if self.control:
            argv += ["-qmp", f"unix:{_quoted(self.socket)},server=on,wait=off"]
        if self.machine_uuid:
            argv += ["-uuid", self.machine_uuid]
        if self.keyboard != "none":
            argv += ["-device", "i8042" if self.keyboard == "i8042" else "virtio-keyboard-pci"]
        if self.fail_after is not None:
            argv += ["-device", "isa-debug-exit"]
        if self.panic_device:
            argv += ["-device", "pvpanic-pci"]
        if self.balloon:
            argv += ["-device", "virtio-balloon-pci,id=balloon0"]
        for address in self.pci_devices:
            argv += ["-device", f"vfio-pci,host={_quoted(address)},rombar=0"]
        for number, volume in enumerate(self.volumes):
            only = "on" if volume.read_only else "off"
            drive = (
                f"id=vd{number},format=raw,file={_quoted(volume.image)},if=none,read-only={only}"
            )
            serial = f",serial={_quoted(volume.serial)}" if volume.serial else ""
            argv += ["-drive", drive, "-device", f"virtio-blk-pci,drive=vd{number}{serial}"]
        if self.shares:
            # vhost-user: the device's other half maps the guest's memory.
            memory = f"memory-backend-memfd,id=mem,size={self.memory_mb}M,share=on"
            argv += ["-object", memory]
        for number, share in enumerate(self.shares):
            argv += ["-chardev", f"socket,id=fs{number},path={_quoted(self.socket_of(share))}"]
            argv += ["-device", f"vhost-user-fs-pci,chardev=fs{number},tag={_quoted(share.tag)}"]
        for number, tap in enumerate(self.taps):
            queues = self.tap_queues
            netdev = f"tap,id=tap{number},ifname={_quoted(tap.name)},script=no,downscript=no"
            netdev += f",vhost=off,queues={queues}" if queues > 1 else ",vhost=off"
            argv += ["-netdev", netdev, "-device", _nic(f"tap{number}", tap.mac, queues)]
        for number, descriptors in enumerate(self.macvtap_fds()):
            macvtap = self.macvtaps[number]
            key = "fd" if len(descriptors) == 1 else "fds"
            netdev = f"tap,id=mac{number},{key}={':'.join(map(str, descriptors))},vhost=off"
            argv += ["-netdev", netdev]
            argv += ["-device", _nic(f"mac{number}", macvtap.mac, len(descriptors))]
        if self.user_net:
            argv += ["-netdev", "user,id=user0", "-device", _nic("user0", USER_MAC, 1)]
        if self.vsock_cid is not None:
            argv += ["-device", f"vhost-vsock-pci,guest-cid={self.vsock_cid}"]
            # The microvm machine has no such tables: there, QEMU ignores it.
            credential = f"vmm.notify_socket={self.notify_socket or NOTIFY_SOCKET}"
            argv += ["-smbios", f"type=11,value=io.systemd.credential:{_quoted(credential)}"]
        return [*argv, *self.qemu_args]

    def macvtap_fds(self) -> list[list[int]]:
        """The descriptors that ``microvm-run`` opens for each macvtap, from 3 on."""
        each = self.macvtap_queues
        return [
            list(range(3 + number * each, 3 + (number + 1) * each))
            for number in range(len(self.macvtaps))
        ]

    def scripts(self, prefix: PurePosixPath) -> dict[str, str]:
        """``microvm-run`` and what goes with it."""
        self.check()
        scripts = super().scripts(prefix)
        scripts["microvm-run"] = self._run_script(prefix)
        socket = shlex.quote(self.socket)
        if self.control and self.shutdown != "none":
            scripts["microvm-shutdown"] = self._shutdown_script(prefix, socket)
        if self.balloon:
            scripts["microvm-balloon"] = (
                BASH + '[ -n "$1" ] || { echo "Usage: $0 <balloon-size-mb>"; exit 1; }\n'
                f"(\n    echo '{_qmp('qmp_capabilities')}'\n"
                '    printf \'{"execute":"balloon","arguments":{"value":%d}}\\n\' '
                "$(($1 * 1024 * 1024))\n"
                f") | {self._socat(prefix)} STDIO UNIX:{socket},shut-none\n"
            )
        return scripts

    def library(self, prefix: PurePosixPath) -> dict[str, str]:
        """What the scripts call."""
        library = {**super().library(prefix), "socat": SOCAT}
        if self.event_log:
            library["qmp-hello"] = _qmp("qmp_capabilities") + "\n"
        return library

    def _socat(self, prefix: PurePosixPath) -> str:
        return shlex.quote(str(prefix / "lib/socat"))

    def _run_script(self, prefix: PurePosixPath) -> str:
        if self.placement == "refer":
            directory = PurePosixPath(self.image_prefix or self.image.directory.absolute())
        else:
            directory = prefix / "lib"
        argv = self.qemu_argv(str(directory / "vmlinuz"), str(directory / "initrd"))
        if self.event_log:
            # A second monitor that nobody sits at: what it is asked stands in a file, and its
            # events go to another, which is there when QEMU has gone.
            hello = _quoted(str(prefix / "lib/qmp-hello"))
            argv += [
                *("-chardev", f"file,id=events,path={_quoted(self.event_log)},input-path={hello}"),
                *("-mon", "chardev=events,mode=control"),
            ]
        lines = [*_volume_lines(self.volumes), *_accelerator_lines(self.accelerator, self.machine)]
        for macvtap, descriptors in zip(self.macvtaps, self.macvtap_fds(), strict=True):
            index = shlex.quote(f"/sys/class/net/{macvtap.name}/ifindex")
            lines += [f"exec {fd}<>/dev/tap$(< {index})" for fd in descriptors]
        append = [
            "console=ttyS0",
            "quiet",
            "loglevel=3",
            "reboot=t",
            "panic=-1",
            *self.guest_args(),
        ]
        options = "accel=$accel"
        if self.machine == "microvm":
            options += ",pcie=on,rtc=on,acpi=on"
        if self.shares:
            options += ",memory-backend=mem"
        lines.append(
            f'exec {shlex.quote(self.qemu)} -M "{self.machine},{options}" -cpu "$cpu" \\\n    '
            + " \\\n    ".join(_argument_lines(argv))
            + f' \\\n    -append {shlex.quote(" ".join(append))}"$clock"'
        )
        return BASH + "\n" + "\n".join(lines) + "\n"

    def _shutdown_script(self, prefix: PurePosixPath, socket: str) -> str:
        """Three ways that have been seen.

        ``ctrl-alt-del`` and ``power-button-early`` wait on their standard input, so with
        ``/dev/null`` there they are back long before the guest has stopped. ``power-button`` waits
        until QEMU no longer listens.
        """
        capabilities = _qmp("qmp_capabilities")
        if self.shutdown == "ctrl-alt-del":
            command = _qmp("input-send-event", {"events": [_key(k) for k in CTRL_ALT_DELETE]})
        else:
            command = _qmp("system_powerdown")
        wait = self.shutdown == "power-button"
        script = BASH + "\n"
        if wait:
            script += f"[ -S {socket} ] || exit 0\n"
        script += f"(\n    echo '{capabilities}'\n    echo '{command}'\n"
        script += "" if wait else "    # wait for exit\n    cat\n"
        script += f") | {self._socat(prefix)} STDIO UNIX:{socket},shut-none\n"
        if wait:
            script += f"while {self._socat(prefix)} -u /dev/null UNIX:{socket} 2>/dev/null; do\n"
            script += "    sleep 0.2\ndone\n"
        return script

    def write(self, directory: Path, *, prefix: str | os.PathLike[str] | None = None) -> Path:
        """Write the package, with kernel and initrd unless they are only referred to."""
        super().write(directory, prefix=prefix)
        if self.placement != "refer":
            for source in (self.image.kernel, self.image.initrd):
                target = directory / "lib" / source.name
                try:
                    if self.placement == "copy":
                        raise OSError
                    os.link(source, target)
                except OSError:
                    # Another file system, or one that knows no links.
                    shutil.copyfile(source, target)
        return directory


NOTIFY_SOCKET = "vsock:2:8888"
USER_MAC = "52:54:00:00:02:0f"
CTRL_ALT_DELETE = ("ctrl", "alt", "delete")


def _key(code: str) -> dict[str, object]:
    return {"type": "key", "data": {"down": True, "key": {"type": "qcode", "data": code}}}


def _qmp(command: str, arguments: Mapping[str, object] | None = None) -> str:
    message: dict[str, object] = {"execute": command}
    if arguments is not None:
        message["arguments"] = arguments
    return json.dumps(message)


def _quoted(value: str) -> str:
    """A value inside one of QEMU's option strings: commas are doubled there."""
    return value.replace(",", ",,")


def _nic(netdev: str, mac: str, queues: int) -> str:
    # No option ROM: it would be looked for in a package that a small host lacks.
    nic = f"virtio-net-pci,netdev={netdev},mac={mac},romfile="
    return f"{nic},mq=on,vectors={2 * queues + 2}" if queues > 1 else nic


def _argument_lines(argv: Sequence[str]) -> list[str]:
    """The command line with each option and its value on a line of its own."""
    lines: list[str] = []
    for word in argv:
        if lines and not word.startswith("-") and " " not in lines[-1]:
            lines[-1] += f" {shlex.quote(word)}"
        else:
            lines.append(shlex.quote(word))
    return lines


def _accelerator_lines(accelerator: Accelerator, machine: Machine) -> list[str]:
    """Choose KVM where it can work, and tell an emulated CPU its clock.

    The device node alone proves nothing: it may open on a machine whose CPU has no virtualization,
    and a guest hangs there.

    Under TCG, the kernel measures its clock against a timer and sometimes fails (one boot in five
    on a busy machine). The microvm machine has no other timer to fall back to, and the guest hangs
    before its first message. The emulated clock is the host's, so the kernel can be told. That is
    not enough for TCG inside TCG, which still hangs: use KVM there.
    """
    lines = [f"accel={accelerator} cpu={'host' if accelerator == 'kvm' else 'max'} clock="]
    lines.append("cpuinfo=$(< /proc/cpuinfo)")
    if accelerator == "auto":
        lines = [
            "accel=tcg cpu=max clock=",
            "cpuinfo=$(< /proc/cpuinfo)",
            "if [ -r /dev/kvm ] && [ -w /dev/kvm ] &&",
            "    [[ $cpuinfo =~ [[:space:]](vmx|svm)[[:space:]] ]]; then",
            "    accel=kvm cpu=host",
            "fi",
        ]
    if machine == "microvm":
        lines += [
            "if [ $accel = tcg ] &&",
            r"    [[ $cpuinfo =~ cpu\ MHz[[:space:]]*:\ ([0-9]+)\.([0-9]{3}) ]]; then",
            '    clock=" tsc_early_khz=${BASH_REMATCH[1]}${BASH_REMATCH[2]}"',
            "fi",
        ]
    return lines


def _volume_lines(volumes: Sequence[Volume]) -> list[str]:
    lines = []
    for volume in volumes:
        image = shlex.quote(volume.image)
        lines += [f"if [ ! -e {image} ]; then", f"    truncate -s {volume.size_mb}M {image}"]
        if volume.file_system:
            lines.append(f"    PATH=$PATH:/usr/sbin:/sbin mkfs.{volume.file_system} -q {image}")
        lines.append("fi")
    return lines


# Calls socat where there is one. The rest does what the scripts above use of it, since a test host
# need not have it: copy both ways, and half a second after the end of the input be gone.
SOCAT = """\
#! /bin/bash -e

if command -v socat >/dev/null; then
    exec socat "$@"
fi
exec python3 -I -S - "$@" 3<&0 <<'END'
import os, select, socket, sys

address = sys.argv[-1].removeprefix("UNIX:").removesuffix(",shut-none")
peer = socket.socket(socket.AF_UNIX)
try:
    peer.connect(address)
except OSError as error:
    sys.exit(f"{address}: {error.strerror}")
source = os.open("/dev/null", os.O_RDONLY) if "-u" in sys.argv else 3
sources, timeout = [source, peer], None
while ready := select.select(sources, [], [], timeout)[0]:
    if source in ready:
        data = os.read(source, 65536)
        if data:
            peer.sendall(data)
        else:
            sources, timeout = [peer], 0.5
    if peer in ready:
        data = peer.recv(65536)
        if not data:
            break
        os.write(1, data)
    if "-u" in sys.argv:
        break
END
"""


def _virtiofsd_script(package: Package, share: Share) -> str:
    """Start virtiofsd for one share; this alone knows the options in a package of the old kind."""
    binary = shlex.quote(package.virtiofsd or "/usr/libexec/virtiofsd")
    socket = shlex.quote(package.socket_of(share))
    if package.virtiofsd_group is not None:
        socket += f" --socket-group={shlex.quote(package.virtiofsd_group)}"
    source = shlex.quote(share.source)
    flags = []
    if share.posix_acl:
        flags += ["--posix-acl", "--xattr"]
    flags.append(f"--cache={share.cache or 'auto'}")
    if share.read_only:
        flags.append("--readonly")
    flags += share.extra_args
    words = " ".join(shlex.quote(flag) for flag in flags)
    old = ""
    if package.virtiofsd is None and not share.read_only and not share.posix_acl:
        # QEMU's old virtiofsd has other options, and no read-only mode.
        old = (
            f"if [ ! -x {binary} ]; then\n"
            f"    exec /usr/lib/qemu/virtiofsd --socket-path={socket} \\\n"
            f"        -o source={source} -o cache={share.cache or 'auto'}\nfi\n"
        )
    return (
        BASH + old + f"exec {binary} \\\n    --socket-path={socket} \\\n"
        f"    --shared-dir={source} {words}\n"
    )


def _supervisord_conf(package: Package, prefix: PurePosixPath) -> str:
    """One program a share, and a listener that tells systemd when all of them run."""
    sections = [
        "[supervisord]\nnodaemon = true\nuser = root\nlogfile = /dev/null\nlogfile_maxbytes = 0\n"
        "pidfile = supervisord.pid\n",
        "[eventlistener:notify]\n"
        f"buffer_size = {16 * (1 + len(package.shares))}\n"
        f"command = {prefix}/lib/supervisord-listener\nevents = PROCESS_STATE\n",
    ]
    for number in range(len(package.shares)):
        # Named by number: a tag may hold what a section's name cannot.
        sections.append(
            f"[program:virtiofsd-{number}]\ncommand = {prefix}/lib/virtiofsd-{number}\n"
            # Not /dev/stderr: under systemd that is a socket, which cannot be opened anew.
            "stdout_syslog = true\nredirect_stderr = true\n"
        )
    return "\n".join(sections)


def _listener(count: int) -> str:
    """Speaks supervisord's event protocol; ready once this many processes run, itself included."""
    return f"""\
#! /usr/bin/python3 -IS
import os, socket, sys

running, told = set(), False
while True:
    print("READY", flush=True)
    header = dict(word.split(":", 1) for word in sys.stdin.readline().split())
    body = dict(word.split(":", 1) for word in sys.stdin.read(int(header["len"])).split())
    if header["eventname"] == "PROCESS_STATE_RUNNING":
        running.add(body["processname"])
    else:
        running.discard(body["processname"])
    address = os.environ.get("NOTIFY_SOCKET")
    if len(running) >= {count} and address and not told:
        told = True
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        notify.connect(address.replace("@", "\\0", 1))
        notify.send(b"READY=1")
    print("RESULT 2\\nOK", end="", flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Stub(Package):
    """A package with no hypervisor in it, for tests of units alone.

    Its ``microvm-run`` says ``STUB NAME: …`` and becomes ``sleep``.
    """

    hypervisor: str = "qemu"
    seconds: float | None = None
    """Exits by itself after that time; without, it sleeps for ever."""
    status: int = 0
    """With ``seconds``: the exit status."""
    deaf: bool = False
    """Ignores SIGTERM: only SIGKILL ends it."""
    prepare: str = ""
    """Shell to run first, in the state directory."""
    run: str | None = None
    """Shell to end with, in place of the above; it is to ``exec`` something."""
    shutdown: StubShutdown = "terminate"
    shutdown_delay: float = 0
    """Seconds until the shutdown script does what it does."""

    def scripts(self, prefix: PurePosixPath) -> dict[str, str]:
        """``microvm-run`` and ``microvm-shutdown``."""
        scripts = super().scripts(prefix)
        name = shlex.quote(self.name)
        # Before it says that it has started: who has read that may rely on it.
        run = BASH + ("trap '' TERM\n" if self.deaf else "")
        run += f'echo STUB {name}: started as "$(id -un):$(id -gn)" in "$PWD"\n'
        run += f"{self.prepare}\n" if self.prepare else ""
        if self.run is not None:
            run += f"{self.run}\n"
        elif self.seconds is None:
            run += "exec sleep infinity\n"
        elif self.status == 0:
            run += f"exec sleep {self.seconds}\n"
        else:
            run += f"exec sh -c 'sleep {self.seconds}; exit {self.status}'\n"
        scripts["microvm-run"] = run
        if self.shutdown != "none":
            body = f"echo STUB {name}: shutdown script, main process ${{MAINPID:-unknown}}\n"
            body += f"sleep {self.shutdown_delay}\n" if self.shutdown_delay else ""
            body += {
                "terminate": 'kill -TERM "$MAINPID"\n',
                "early": "exit 0\n",
                "fail": "exit 1\n",
                "hang": "exec sleep infinity\n",
            }[self.shutdown]
            scripts["microvm-shutdown"] = BASH + body
        return scripts


PackageT = TypeVar("PackageT", bound=Package)


def imitate(package: PackageT, era: Era) -> PackageT:
    """The same package as microvm.nix of that time would have laid it out.

    None of them has this project's own additions, so a share's options are then in
    ``virtiofsd-run`` or nowhere.
    """
    eras: list[Era] = ["2023-10", "2023-11", "2024-04", "2025-06", "2026-08"]
    year = eras.index(era)
    changes: dict[str, object] = {
        "symlinks": True,
        "share_options": False,
        "readiness": None,
        "notify_socket": None,
        "control_socket": None,
        "control_protocol": None,
        "machine_uuid": None,
        "taps": tuple(dataclasses.replace(tap, bridge=None) for tap in package.taps),
        "tap_flags_file": year >= 1,
        "own_scripts": year >= 3,
        "virtiofsd_run": year >= 3,
        "hypervisor_file": year >= 4,
        "vsock_cid_file": year >= 4,
        "register": package.register and year >= 4,
        "system": None if year >= 4 else package.system or f"/nix/store/0-{package.name}-{era}",
    }
    if isinstance(package, Guest):
        changes["shutdown"] = "power-button" if year >= 4 else "ctrl-alt-del"
        changes["keyboard"] = "i8042"
        changes["balloon"] = package.balloon and year >= 2
        if year == 0:
            # Older packages have single-queue taps.
            changes["queues"] = 1
    return dataclasses.replace(package, **changes)  # type: ignore[arg-type]


def parse_tap(text: str) -> Tap:
    """``NAME,MAC[,ADDRESS/PREFIX[,GATEWAY]][,bridge=BRIDGE]``."""
    words = text.split(",")
    bridge = None
    if words[-1].startswith("bridge="):
        bridge = words.pop().removeprefix("bridge=")
    if not 2 <= len(words) <= 4:
        raise argparse.ArgumentTypeError(f"{text!r}: want NAME,MAC[,ADDRESS/PREFIX[,GATEWAY]]")
    address = ",".join(words[2:]) or None
    return Tap(name=words[0], mac=words[1], address=address, bridge=bridge)


def parse_macvtap(text: str) -> Macvtap:
    """``NAME,MAC,LINK,MODE[,ADDRESS/PREFIX]``."""
    words = text.split(",")
    if not 4 <= len(words) <= 5:
        raise argparse.ArgumentTypeError(f"{text!r}: want NAME,MAC,LINK,MODE[,ADDRESS/PREFIX]")
    name, mac, link, mode = words[:4]
    return Macvtap(
        name=name, mac=mac, link=link, mode=mode, address=words[4] if words[4:] else None
    )


def parse_card(text: str) -> Card:
    """``MAC,ADDRESS/PREFIX[,GATEWAY]``."""
    mac, comma, address = text.partition(",")
    if not comma:
        raise argparse.ArgumentTypeError(f"{text!r}: want MAC,ADDRESS/PREFIX[,GATEWAY]")
    return Card(mac=mac, address=address)


def parse_share(text: str) -> Share:
    """``TAG:SOURCE[:MOUNT[:ro]]``, or a JSON object with the fields of ``Share``."""
    if text.startswith("{"):
        try:
            fields = json.loads(text)
            fields["extra_args"] = tuple(fields.get("extra_args", ()))
            return Share(**fields)
        except (ValueError, TypeError) as error:
            raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    words = text.split(":")
    if not 2 <= len(words) <= 4 or (words[3:] and words[3] != "ro"):
        raise argparse.ArgumentTypeError(f"{text!r}: want TAG:SOURCE[:MOUNT[:ro]], or JSON")
    return Share(
        tag=words[0],
        source=words[1],
        mount=words[2] if words[2:] and words[2] else None,
        read_only=bool(words[3:]),
    )


def parse_volume(text: str) -> Volume:
    """``IMAGE:MB[:FILE-SYSTEM]``."""
    words = text.split(":")
    if not 2 <= len(words) <= 3 or not words[1].isdigit():
        raise argparse.ArgumentTypeError(f"{text!r}: want IMAGE:MB[:FILE-SYSTEM]")
    return Volume(
        image=words[0], size_mb=int(words[1]), file_system=words[2] if words[2:] else None
    )


ERAS: tuple[Era, ...] = get_args(Era)


def add_commands(commands: Commands) -> None:
    """Add ``package`` and ``stub`` to the command line."""
    guest = commands.add_parser(
        "package", help="write a runner package that starts the real guest under QEMU"
    )
    _common_options(guest)
    add = guest.add_argument
    add("--image", type=Path, required=True, metavar="DIR", help="made by `image`")
    add("--placement", choices=get_args(ImagePlacement), default="hardlink")
    add("--image-prefix", metavar="DIR", help="with `--placement refer`: where DIR will be")
    add("--cpus", type=int, default=1, metavar="N", help="more than one: multi-queue taps")
    add("--queues", type=int, metavar="N", help="of each tap; default: one a CPU")
    add("--macvtap-queues", type=int, default=1, metavar="N")
    add("--memory", dest="memory_mb", type=int, default=256, metavar="MB")
    add("--machine", choices=get_args(Machine), default="microvm")
    add("--accelerator", choices=get_args(Accelerator), default="auto")
    add("--keyboard", choices=get_args(Keyboard), default="none")
    add("--user-net", action="store_true", help="a NIC of QEMU's user-mode network")
    _repeat(guest, "--volume", "volumes", "IMAGE:MB[:FS]", parse_volume)
    add("--no-control", dest="control", action="store_false", help="no QMP socket")
    add("--shutdown", choices=get_args(Shutdown), default="power-button")
    add("--balloon", action="store_true")
    add("--qemu", default=Guest.qemu, metavar="PATH")
    _repeat(guest, "--qemu-arg", "qemu_args", "ARG")
    add("--slow-stop", type=int, default=0, metavar="SECONDS")
    add("--deaf", action="store_true", help="ignores every request to stop")
    for name in ("exit", "reboot", "crash", "fail"):
        add(f"--{name}-after", type=int, metavar="SECONDS")
    _repeat(guest, "--card", "cards", "MAC,ADDRESS/PREFIX[,GATEWAY]", parse_card)
    _repeat(guest, "--disk", "disks", "SERIAL")
    _repeat(guest, "--ping", "pings", "ADDRESS")
    add("--shell-port", type=int, metavar="PORT")
    _repeat(guest, "--kernel-arg", "kernel_args", "ARG")
    guest.set_defaults(run=_run_guest)

    stub = commands.add_parser("stub", help="write a runner package without any hypervisor")
    _common_options(stub)
    add = stub.add_argument
    add("--seconds", type=float, metavar="S", help="exit by itself after that time")
    add("--status", type=int, default=0, help="… with this status")
    add("--deaf", action="store_true", help="ignore SIGTERM")
    add("--prepare", default="", metavar="SHELL")
    add("--exec", dest="run_script", metavar="SHELL", help="what to run instead of sleep")
    add("--shutdown", choices=get_args(StubShutdown), default="terminate")
    add("--shutdown-delay", type=float, default=0, metavar="S")
    stub.set_defaults(run=_run_stub)


def _common_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-o", "--output", type=Path, required=True, metavar="PACKAGE")
    add("--prefix", metavar="DIR", help="where the package will live; default: PACKAGE itself")
    add("--era", choices=ERAS, help="lay it out as microvm.nix of that time did")
    add("--name", required=True)
    _repeat(parser, "--tap", "taps", "NAME,MAC[,ADDRESS/PREFIX[,GATEWAY]][,bridge=BR]", parse_tap)
    _repeat(parser, "--macvtap", "macvtaps", "NAME,MAC,LINK,MODE[,ADDRESS/PREFIX]", parse_macvtap)
    _repeat(parser, "--share", "shares", "TAG:SOURCE[:MOUNT[:ro]] or JSON", parse_share)
    _repeat(parser, "--pci", "pci_devices", "ADDRESS")
    add("--vsock-cid", type=int, metavar="CID")
    add("--system", metavar="TARGET", help="target of share/microvm/system; it may dangle")
    add("--hypervisor", default="qemu", help="what share/microvm/hypervisor says")
    add("--no-hypervisor-file", dest="hypervisor_file", action="store_false")
    add("--no-tap-flags", dest="tap_flags_file", action="store_false")
    add("--no-share-options", dest="share_options", action="store_false")
    add("--multi-queue", action="store_true", help="write multi_queue whatever the CPUs")
    add("--virtiofsd-run", action="store_true", help="with its own supervisord")
    add("--virtiofsd", metavar="PATH")
    add("--supervisord", default=Package.supervisord, metavar="PATH")
    add("--own-scripts", action="store_true", help="with tap-up and the like, which must not run")
    add("--register", action="store_true", help="with microvm-register and -unregister")
    add("--symlinks", action="store_true", help="bin/* are links")
    add("--readiness", choices=("exec", "guest"))
    add("--notify-socket", metavar="ADDRESS", help="where the guest says that it is ready")
    add("--control-socket", metavar="PATH")
    add("--control-protocol", choices=("qmp", "cloud-hypervisor", "firecracker"))
    add("--machine-uuid", metavar="UUID")


def _repeat(
    parser: argparse.ArgumentParser,
    flag: str,
    name: str,
    metavar: str,
    parse: Callable[[str], object] = str,
) -> None:
    parser.add_argument(
        flag, dest=name, action="append", default=[], type=parse, metavar=metavar, help="repeatable"
    )


def _fields(options: argparse.Namespace, kind: type[Package]) -> dict[str, Any]:
    """The options that are fields of the description; a repeated one becomes a tuple."""
    wanted = {item.name for item in dataclasses.fields(kind)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(options).items()
        if name in wanted and name != "run"
    }


def _run_guest(options: argparse.Namespace) -> None:
    fields = _fields(options, Guest)
    fields["image"] = Image(options.image)
    _write_one(Guest(**fields), options)


def _run_stub(options: argparse.Namespace) -> None:
    _write_one(Stub(**_fields(options, Stub), run=options.run_script), options)


def _write_one(package: Package, options: argparse.Namespace) -> None:
    if options.era:
        package = imitate(package, options.era)
    print(package.write(options.output, prefix=options.prefix))
