# SPDX-License-Identifier: MIT
"""Deletes a VM, or keeps one down while its files change hands.

Asking systemd whether a VM runs is not enough: it may be started while an administrator reads the
question, or a moment after the answer. So `current` is taken away before systemd is asked. A start
that came earlier is seen then, and one that comes later fails, since its check finds no package.
"""

from __future__ import annotations

import os
import shlex
import time
from contextlib import contextmanager

from . import install, install_lock, mounts, names, state, store, systemd, users
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .paths import HostPaths

# A VM that has just stopped is undone in less, and one that is being started runs in less.
_SETTLED_WITHIN = 30.0  # seconds
_IS_DOWN = ("inactive", "failed")


def check(name: str, host: HostPaths) -> None:
    """Check that a VM may be deleted; nothing is changed.

    Raises:
        MicrovmHostError: it runs, is declared, or something is mounted in its state directory.
    """
    _check_down(name, systemd.states(names.unit(name), names.foreground_unit(name)))
    declaration, directory = host.declaration(name), host.vm(name)
    if os.path.lexists(declaration):
        raise MicrovmHostError(
            f"microVM {name} is declared and would come back at boot",
            path=declaration,
            hint="delete this file first",
        )
    if mounts.is_mount_point(directory, host):
        raise MicrovmHostError(
            "is a mount point; not deleting what is mounted",
            path=directory,
            hint=f"`umount {shlex.quote(directory)}` and remove {name} again: the VM's files stay "
            "on that file system, for you to delete",
        )
    found = mounts.below(directory, host)
    if found:
        raise MicrovmHostError(
            "is a mount point; not deleting what is mounted",
            path=found[0],
            hint=f"unmount it first: umount {shlex.quote(found[0])}",
        )


@contextmanager
def kept_down(name: str, host: HostPaths) -> Iterator[None]:
    """Keep a VM from being started; afterwards it can be, if it is still there.

    Raises:
        MicrovmHostError: it runs, or is being started; it can go on.
    """
    # Nobody installs it meanwhile.
    with install_lock.of_vm(name, host, f"removes {name} or changes its files"):
        _check_down(name, systemd.states(names.unit(name), names.foreground_unit(name)))
        current = host.current(name)
        package = state.pointed_to(current)
        if package is not None:
            os.unlink(current)
        try:
            _wait_until_settled(name)
            yield
        finally:
            is_there = os.path.isdir(host.vm(name))
            if package is not None and is_there and not os.path.lexists(current):
                state.link(current, package)


def remove(name: str, host: HostPaths) -> None:
    """Delete a VM that was checked and is kept down, with all of its state; its user stays."""
    mounts.remove_tree(host.vm(name))
    store.forget(name, host)
    users.remove_drop_in(name, host)
    install.forget_gc_roots(name, host)
    if os.path.isdir(host.packages):
        with store.locked(host):
            store.collect(host)


def _check_down(name: str, states: dict[str, str]) -> None:
    for unit in (names.unit(name), names.foreground_unit(name)):
        if states.get(unit, "inactive") not in _IS_DOWN:
            raise MicrovmHostError(f"microVM {name} is running", hint=f"microvm stop {name}")


def _wait_until_settled(name: str) -> None:
    """Wait until nothing of a start or a stop is under way, and the VM is down."""
    set_up = names.set_up_units(name)
    deadline = time.monotonic() + _SETTLED_WITHIN
    while True:
        states = systemd.states(names.unit(name), names.foreground_unit(name), *set_up)
        _check_down(name, states)
        busy = [unit for unit in set_up if states.get(unit, "inactive") not in _IS_DOWN]
        if not busy:
            return
        if time.monotonic() > deadline:
            raise MicrovmHostError(
                f"{busy[0]} is {states[busy[0]]}", hint=f"systemctl stop {busy[0]}"
            )
        time.sleep(0.05)
