# SPDX-License-Identifier: MIT
"""How much memory a running guest has, and a balloon in it that takes some back for the host.

QEMU is asked by QMP, at the host's own control socket. The packages of other hypervisors may
bring a script for it, which sets a size and is run as the VM's user.
"""

from __future__ import annotations

import os
import subprocess
import time

from . import control
from .errors import MicrovmHostError, UsageError, one_line
from .frozen import frozen
from .paths import MICROVM_BALLOON

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .attach import Running


class NoBalloon(MicrovmHostError):
    """The guest was started without one."""


MEBIBYTE = 1 << 20
_WITHIN = 10.0  # seconds that QEMU may take to answer
_UNITS = {"": 1, "M": 1, "MB": 1, "MIB": 1, "G": 1 << 10, "GB": 1 << 10, "GIB": 1 << 10}
_UNITS |= {"T": 1 << 20, "TB": 1 << 20, "TIB": 1 << 20}


@frozen
class Memory:
    """A guest's memory in bytes: what it was given, and what its balloon leaves it of that.

    QEMU's balloon knows nothing of `beyond`, which is part of both: what virtio-mem has plugged.
    """

    whole: int
    actual: int
    beyond: int = 0


def megabytes(text: str) -> int:
    """A size as people write it, `512`, `512M` or `2G`, in MB; raises UsageError."""
    digits = text.rstrip("MGTBIbimgt")
    unit = _UNITS.get(text[len(digits) :].upper())
    size = int(digits) if digits.isascii() and digits.isdigit() and len(digits) < 10 else 0
    if unit is None or not size:
        raise UsageError(f"{text!r} is not a size", hint="512M and 2G are, and a number of MB")
    return size * unit


def memory(vm: Running) -> Memory:
    """What the guest has now; raises MicrovmHostError."""
    qemu = _Qemu(vm)
    try:
        return qemu.memory()
    finally:
        qemu.close()


def resize(vm: Running, size: int, patience: float) -> Memory | None:
    """Leave the guest as many MB, and wait until it has come to that, or patience ends.

    Returns:
        What the guest has then; None where the package's script does not tell.

    Raises:
        MicrovmHostError: it has no balloon, or less memory.
    """
    if not _speaks_qmp(vm):
        _run_script(vm, size)
        return None
    qemu = _Qemu(vm)
    try:
        given = qemu.memory()
        if size * MEBIBYTE > given.whole:
            raise MicrovmHostError(
                f"{vm.name} was started with {given.whole // MEBIBYTE} MB, and cannot have {size}",
                hint="mem in its declaration says how much that is",
            )
        # Of nothing at all it makes an error.
        if size * MEBIBYTE <= given.beyond:
            raise MicrovmHostError(
                f"{vm.name} has {given.beyond // MEBIBYTE} MB by hotplugMem, which its balloon "
                f"does not count, and cannot be left {size}",
            )
        qemu.ask("balloon", {"value": size * MEBIBYTE - given.beyond})
        deadline = time.monotonic() + patience
        while (found := qemu.memory()).actual != size * MEBIBYTE:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return found
    finally:
        qemu.close()


def _speaks_qmp(vm: Running) -> bool:
    socket = vm.package.control_socket
    return socket is not None and socket.protocol == "qmp"


class _Qemu:
    """QEMU, at the other end of a connection."""

    def __init__(self, vm: Running) -> None:
        socket = vm.package.control_socket
        if socket is None or socket.protocol != "qmp":
            raise MicrovmHostError(
                f"microVM {vm.name} does not tell its memory: its package names no control socket "
                "of QEMU's"
            )
        self._name = vm.name
        self._qmp = control.Qmp(vm.connect(socket.path, _WITHIN), socket.path, _WITHIN)

    def ask(self, command: str, arguments: dict[str, object] | None = None) -> dict[str, object]:
        try:
            answer = self._qmp.ask(command, arguments, _WITHIN)
        except control.Refusal as error:
            if error.kind == "DeviceNotActive":
                raise NoBalloon(f"microVM {self._name} has no balloon") from error
            raise
        return answer if isinstance(answer, dict) else {}

    def memory(self) -> Memory:
        summary = self.ask("query-memory-size-summary")
        sizes = [summary.get(key, 0) for key in ("base-memory", "plugged-memory")]
        actual = self.ask("query-balloon").get("actual")
        numbers = [_size(each) for each in (*sizes, actual)]
        # Its summary counts what all memory devices have plugged, its balloon the DIMMs alone
        # (get_current_ram_size in hw/virtio/virtio-balloon.c).
        beyond = self._plugged_by_virtio_mem() if numbers[1] else 0
        return Memory(numbers[0] + numbers[1], numbers[2] + beyond, beyond)

    def _plugged_by_virtio_mem(self) -> int:
        devices = self._qmp.ask("query-memory-devices", None, _WITHIN)
        found = 0
        for each in devices if isinstance(devices, list) else ():
            if isinstance(each, dict) and each.get("type") == "virtio-mem":
                data = each.get("data")
                found += _size(data.get("size") if isinstance(data, dict) else None)
        return found

    def close(self) -> None:
        self._qmp.close()


def _size(value: object) -> int:
    if type(value) is int and value >= 0:
        return value
    raise MicrovmHostError("the hypervisor does not make sense: no sizes of memory")


def _run_script(vm: Running, size: int) -> None:
    script = f"{vm.package.path}/{MICROVM_BALLOON}"
    if not os.access(script, os.X_OK):
        raise NoBalloon(
            f"microVM {vm.name} has no balloon: there is no {MICROVM_BALLOON} in its package"
        )
    # It acts on sockets of the VM's user, and with no more rights than theirs.
    whom: dict[str, object] = {}
    if os.geteuid() == 0:
        groups = sorted({*os.getgrouplist(vm.user, vm.gid), *vm.groups})
        whom = {"user": vm.uid, "group": vm.gid, "extra_groups": groups}
    done = subprocess.run(
        [script, str(size)],
        cwd=vm.directory,
        env={"PATH": os.environ.get("PATH", os.defpath)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        errors="replace",
        # The VM's user can trace it, and could type into a terminal of its session as root.
        start_new_session=True,
        **whom,  # type: ignore[call-overload]
    )
    if done.returncode:
        said = f": {one_line(done.stdout[-500:])}" if done.stdout.strip() else ""
        raise MicrovmHostError(f"{MICROVM_BALLOON} ended with {done.returncode}{said}", path=script)
