# SPDX-License-Identifier: MIT
"""Credentials for the guest's systemd, which stand in files that only root may read.

The package has but their paths. Root hands the files to the VM's user at each start, and the
hypervisor reads them from there: what they hold stands neither in the package nor on a command
line.
"""

from __future__ import annotations

from ..paths import private_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..declaration.guest import Guest

# So that none has the name of something else that is handed over.
_PREFIX = "credential."


def private_files(guest: Guest) -> list[tuple[str, str]]:
    """What is handed over: names for that, and paths of the host."""
    return [(f"{_PREFIX}{name}", path) for name, path in guest.credential_files]


def files(guest: Guest) -> list[tuple[str, str]]:
    """The credentials' own names, and where the hypervisor finds them."""
    return [
        (name, private_file(guest.name, f"{_PREFIX}{name}")) for name, _ in guest.credential_files
    ]
