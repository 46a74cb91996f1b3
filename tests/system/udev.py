# SPDX-License-Identifier: MIT
"""What udev makes of device nodes on a virtual host, where it runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .toolkit import Toolkit

VOLATILE_RULES = "/run/udev/rules.d"


def owners(machine: Toolkit, *nodes: str) -> list[str]:
    """The `owner:group mode` of each node."""
    return machine.sh(f"stat -c '%U:%G %a' {' '.join(nodes)}").splitlines()


@contextmanager
def rules_of_others(machine: Toolkit, name: str, text: str) -> Iterator[None]:
    """Have udev read a further rules file, or one in the place of one that it has."""
    machine.host.write(f"{VOLATILE_RULES}/{name}", text)
    machine.sh("udevadm control --reload")
    try:
        yield
    finally:
        machine.sh(f"rm {VOLATILE_RULES}/{name}; udevadm control --reload")


def check_that_udev_keeps(machine: Toolkit, device: str, node: str) -> None:
    """Check that no event, in whatever company, changes a node, and that each mends it."""
    found = owners(machine, node)
    # As it is passed around for setting up passthrough.
    rule = 'SUBSYSTEM=="macvtap|vfio|vfio-dev", OWNER="root", GROUP="kvm", MODE="0666"\n'
    for name in ("10-of-others.rules", "99-of-others.rules"):
        with rules_of_others(machine, name, rule):
            # The second one as if the kernel had made the node anew.
            seen = machine.sh(
                f"udevadm trigger --settle --action=change {device}; stat -c '%U:%G %a' {node}; "
                f"chown root:root {node}; chmod 644 {node}; "
                f"udevadm trigger --settle --action=add {device}; stat -c '%U:%G %a' {node}"
            )
            assert seen.splitlines() == found * 2, name


def check_what_udev_would_do(machine: Toolkit, device: str, user: str) -> None:
    """Check by `udevadm test` that our rule gives a VM's node to its user."""
    uid = machine.sh(f"id -u {user}").strip()
    told = machine.sh(f"udevadm test {device} 2>&1")
    ours = [line for line in told.splitlines() if "49-microvm-host.rules" in line]
    assert any(f"OWNER {uid}" in line for line in ours), told
    assert f"MICROVM_NODE_USER={uid}" in told
