# SPDX-License-Identifier: MIT
"""Whether a VM runs with KVM: by what the CPU says it can do, and by who may open /dev/kvm.

Nothing is opened: /dev/kvm may be there, and open, where no guest would ever run.
"""

from __future__ import annotations

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .identity import Identity
    from .paths import HostPaths

_FLAGS = frozenset(("vmx", "svm"))


def why_not(identity: Identity | None, host: HostPaths) -> str | None:
    """What keeps a VM from KVM, so that its guest is emulated or does not run; None for nothing.

    Args:
        identity: the VM's user, who is not asked about if they are not known.
    """
    if not _has_flags(host):
        return "this host's CPU offers none: neither vmx nor svm is in /proc/cpuinfo"
    try:
        status = os.stat(host.kvm)
    except OSError:
        return f"this host has no {host.kvm}: `modprobe kvm_intel`, or kvm_amd, makes it"
    if identity is None or _may_open(identity, status):
        return None
    return f"{identity.user} may not open {host.kvm}: `usermod -aG kvm {identity.user}`"


def _has_flags(host: HostPaths) -> bool:
    """Whether the CPU offers KVM, as far as it says so: those of x86 do, by their flags."""
    try:
        with open(host.cpu_info, encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("flags"):
                    return not _FLAGS.isdisjoint(line.split())
    except OSError:
        return False
    return True


def _may_open(identity: Identity, status: os.stat_result) -> bool:
    if identity.uid == 0:
        return True
    if status.st_uid == identity.uid:
        wanted = stat.S_IRUSR | stat.S_IWUSR
    elif status.st_gid in _groups(identity):
        wanted = stat.S_IRGRP | stat.S_IWGRP
    else:
        wanted = stat.S_IROTH | stat.S_IWOTH
    return status.st_mode & wanted == wanted


def _groups(identity: Identity) -> set[int]:
    """Those of the user, and those that the VM's unit adds (kvm, or what a drop-in says)."""
    try:
        found = os.getgrouplist(identity.user, identity.gid)
    except OSError:
        found = []
    return {identity.gid, *identity.groups, *found}
