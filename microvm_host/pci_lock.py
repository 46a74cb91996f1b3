# SPDX-License-Identifier: MIT
"""Locks between the helpers that take PCI devices or give them back at the same time.

A device may take a minute to change hands, so that there is a lock for each IOMMU group and none
for all devices; only while network interfaces get their names back, one device waits for another.
"""

from __future__ import annotations

import os
import time
from fcntl import LOCK_EX, LOCK_NB, LOCK_UN, flock

from . import log, pcibus
from .errors import MicrovmHostError
from .sysfs import linked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .paths import HostPaths

LOCKED_FOR = 120.0  # seconds
# One device of another VM, or a slow one.
NAMED_WITHIN = 60.0


class Exclusive:
    """Keeps other helpers from the IOMMU groups of PCI devices while this one changes them.

    Two VMs that ask for devices of one group must not both find it free.
    """

    def __init__(self, vm: str, addresses: Iterable[str], host: HostPaths) -> None:
        """Name the devices, by addresses or globs; those that are not there need no lock."""
        self._vm, self._host = vm, host
        self._addresses = tuple(addresses)
        self._locks: list[int] = []

    def __enter__(self) -> None:
        """Wait for whoever has them, for some time; raises MicrovmHostError if that is too long."""
        found = {
            linked(self._host.pci_device(match), "iommu_group")
            for address in self._addresses
            for match in pcibus.find(address, self._host)
        }
        try:
            # In one order for all, so that no two wait for each other.
            for group in sorted(filter(None, found)):
                self._locks.append(_open_lock(self._host.pci_lock(group)))
                self._await(group)
        except BaseException:
            self.__exit__()
            raise

    def _await(self, group: str) -> None:
        lock = self._locks[-1]
        if not _is_locked_now(lock):
            self._await_holder(lock, group)
        os.ftruncate(lock, 0)
        os.pwrite(lock, self._vm.encode(), 0)

    def _await_holder(self, lock: int, group: str) -> None:
        status = f"waiting while IOMMU group {group} is taken or given back for microVM "
        for _ in patiently(LOCKED_FOR, status + _holder_of(lock)):
            if _is_locked_now(lock):
                return
        holder = _holder_of(lock)
        raise MicrovmHostError(
            f"PCI devices of IOMMU group {group} are being taken or given back for microVM "
            f"{holder}, for more than {LOCKED_FOR:.0f} s now",
            hint=f"`systemctl status microvm-pci-devices@{holder}.service` may say what it waits "
            "for",
        )

    def __exit__(self, *_: object) -> None:
        while self._locks:
            _unlock(self._locks.pop())


class Naming:
    """Keeps others from naming network interfaces while those of one device come back.

    The kernel gives a new interface any free name, perhaps one that another device is to have back.
    Nobody waits for ever: a name that is taken is told of.
    """

    def __init__(self, host: HostPaths, *, is_needed: bool) -> None:
        self._host, self._is_needed = host, is_needed

    def __enter__(self) -> None:
        if not self._is_needed:
            return
        self._lock = _open_lock(self._host.pci_lock("names"))
        if not _is_locked_now(self._lock):
            status = "waiting for the interfaces of another microVM's PCI device"
            for _ in patiently(NAMED_WITHIN, status):
                if _is_locked_now(self._lock):
                    break

    def __exit__(self, *_: object) -> None:
        if self._is_needed:
            _unlock(self._lock)


def _open_lock(path: str) -> int:
    # Root's alone: whoever can open a file can lock it.
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _is_locked_now(lock: int) -> bool:
    try:
        flock(lock, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder_of(lock: int) -> str:
    """The VM for which it is held, if that has been written down yet."""
    return os.pread(lock, 256, 0).decode(errors="replace") or "another"


def _unlock(lock: int) -> None:
    # Closing it is not enough: a process of call_apart that is stuck in the kernel has it, too.
    flock(lock, LOCK_UN)
    os.close(lock)


def patiently(seconds: float, status: str) -> Iterator[None]:
    """Come round again for some time, at short intervals, with a status for the unit meanwhile."""
    deadline = time.monotonic() + seconds
    told = 0.0
    while (now := time.monotonic()) < deadline:
        if now > told + 1:
            log.waiting(status)
            told = now
        time.sleep(0.05)
        yield
