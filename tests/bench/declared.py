# SPDX-License-Identifier: MIT
"""Many declared guests of one kernel: what installing them costs, and a boot with them.

Their hypervisor is a stand-in that only sleeps, under a name whose version nobody asks for; so the
figures are the toolkit's own. Kernel and initrd are as large as those of a distribution.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from tests.system.toolkit import Toolkit

KERNEL_MB, INITRD_MB = 10, 32
_PLACE = "/srv/declared"
_COPIES = "/opt/declared"

_PREPARE = f"""
mkdir -p {_PLACE} /etc/microvms
# A header of Linux's, x86; the rest is as good as any kernel.
head -c 514 /dev/zero >{_PLACE}/vmlinuz
printf HdrS >>{_PLACE}/vmlinuz
head -c {KERNEL_MB << 20} /dev/urandom >>{_PLACE}/vmlinuz
head -c {INITRD_MB << 20} /dev/urandom >{_PLACE}/initrd
printf '#!/bin/sh\\nexec sleep infinity\\n' >/usr/local/bin/lkvm
chmod 755 /usr/local/bin/lkvm
"""


def prepare(toolkit: Toolkit) -> None:
    """Make what the guests boot from."""
    toolkit.sh(_PREPARE)


def declare(toolkit: Toolkit, count: int) -> list[str]:
    """Declare guests, which do not start by themselves; gives their names."""
    clear(toolkit)
    names = [f"guest{number}" for number in range(count)]
    toolkit.sh(
        f"for name in {' '.join(names)}; do cat >/etc/microvms/$name.toml <<END\n"
        f'autostart = false\nhypervisor = "kvmtool"\nkernel = "{_PLACE}/vmlinuz"\n'
        f'initrd = "{_PLACE}/initrd"\nmem = 64\nEND\ndone\n'
        # Older than what is believed of a file that was just written.
        "sleep 0.2"
    )
    return names


def clear(toolkit: Toolkit) -> None:
    """Leave nothing of them but what they boot from."""
    toolkit.sh(
        "rm -rf /etc/microvms/* /var/lib/microvms/guest* /var/lib/microvm-host/* "
        f"/run/microvm-host-facts {_COPIES}; "
        "rm -f /etc/systemd/system/multi-user.target.wants/microvm@guest*; sync"
    )


def apply(toolkit: Toolkit) -> float:
    """Seconds of `microvm apply`."""
    return (
        float(
            toolkit.sh(
                "began=$(date +%s%N); microvm apply >/dev/null || exit 1; "
                "ended=$(date +%s%N); echo $(((ended - began) / 1000))",
                timeout=1200,
            )
        )
        / 1e6
    )


def as_runners(toolkit: Toolkit, names: Sequence[str]) -> None:
    """Declare the same packages by their paths."""
    toolkit.sh(
        f"mkdir -p {_COPIES}; for name in {' '.join(names)}; do "
        f"cp -a $(readlink /var/lib/microvms/$name/current) {_COPIES}/$name && "
        f"printf 'autostart = false\\nrunner = \"{_COPIES}/%s\"\\n' $name "
        ">/etc/microvms/$name.toml || exit 1; done; sleep 0.2",
        timeout=600,
    )
    apply(toolkit)


def boot(toolkit: Toolkit, names: Sequence[str]) -> float:
    """Seconds from the start of systemd until all of these are up, in a boot of the host."""
    # Not by `autostart`, which would change the declarations.
    toolkit.systemctl("enable", "--quiet", *(f"microvm@{name}" for name in names))
    toolkit.host.reboot()
    deadline = time.monotonic() + 300
    while True:
        shown = toolkit.sh(
            "systemctl show --property=UserspaceTimestampMonotonic --value; systemctl show "
            "--property=ActiveState,ActiveEnterTimestampMonotonic 'microvm@guest*.service'"
        )
        began, *lines = shown.split()
        if lines.count("ActiveState=active") == len(names):
            break
        if time.monotonic() > deadline:
            raise AssertionError(f"not all are up: {lines}")
        time.sleep(0.5)
    entered = [int(line.partition("=")[2]) for line in lines if line.startswith("ActiveEnter")]
    return (max(entered) - int(began)) / 1e6
