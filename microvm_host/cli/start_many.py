# SPDX-License-Identifier: MIT
"""Has systemd start many VMs at once, and says of each that failed why."""

from __future__ import annotations

import subprocess
import sys
import time

from .. import names, systemd
from ..errors import MicrovmHostError, PackageError
from . import jobs
from .progress import Line

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_LOOKS_EACH = 0.5  # seconds
_UP = ("active", "reloading", "refreshing")
# On one line of a terminal.
_NAMES_SHOWN = 3


def bring_up(vms: Sequence[str], running: Sequence[str]) -> dict[str, MicrovmHostError]:
    """Start VMs and restart those that run, in one transaction; waits until all are ready.

    Args:
        vms: all of them, those that others come after first.
        running: those of them to restart.

    Returns:
        What went wrong, by VM. The reasons that the journal has were printed.
    """
    since = f"@{time.time():.6f}"
    units = [names.unit(vm) for vm in vms]
    # systemctl queues one job after the other, and systemd begins with the first at once. What
    # comes after others is to be stopped before them, and started after them.
    restarted = [unit for vm, unit in zip(vms, units, strict=True) if vm in running]
    queue = [*reversed(restarted), *(unit for unit in units if unit not in restarted)]
    # `restart` starts what does not run.
    verb = "restart" if running else "start"
    began = time.monotonic()
    job = subprocess.Popen(["systemctl", verb, "--", *queue], stderr=subprocess.PIPE, text=True)
    line = Line()
    try:
        while True:
            try:
                _, complaint = job.communicate(timeout=_LOOKS_EACH)
                break
            except subprocess.TimeoutExpired:
                if line.is_seen:
                    line.show(_progress(vms, time.monotonic() - began))
    finally:
        line.clear()
    if job.returncode == 0:
        return {}
    states = systemd.states(*units)
    failed = [vm for vm in vms if states.get(names.unit(vm), "inactive") not in _UP]
    return {vm: _error(vm, vm in running, since, complaint) for vm in failed}


def _error(vm: str, did_run: bool, since: str, complaint: str) -> MicrovmHostError:
    for line in (jobs.reasons([vm], since) or complaint).splitlines():
        # Many VMs may have failed, and few messages name theirs.
        sys.stderr.write(f"{vm}: {line}\n")
    kind = PackageError if jobs.is_wrong_package([vm]) else MicrovmHostError
    return kind(
        f"could not {'restart' if did_run else 'start'} {vm}",
        hint=f"`microvm status {vm}` shows more",
    )


def _progress(vms: Sequence[str], seconds: float) -> str:
    states = systemd.states(*(names.unit(vm) for vm in vms))
    up = [vm for vm in vms if states.get(names.unit(vm)) in _UP]
    failed = [vm for vm in vms if states.get(names.unit(vm)) == "failed"]
    missing = [vm for vm in vms if vm not in {*up, *failed}]
    text = f"starting: {len(up)} of {len(vms)} VMs are up"
    if failed:
        text += f", {len(failed)} failed"
    if missing:
        more = " and more" if len(missing) > _NAMES_SHOWN else ""
        text += f", waiting for {', '.join(missing[:_NAMES_SHOWN])}{more}"
    return f"{text} … {seconds:.0f} s"
