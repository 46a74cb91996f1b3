# SPDX-License-Identifier: MIT
"""Starting a VM again whose setting up failed in an automatic restart."""

from __future__ import annotations

import os

from .. import aftermath, names
from ..errors import MicrovmHostError
from ..record import Record
from . import settings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..paths import HostPaths


def again(name: str, host: HostPaths) -> None:
    """Start the VM again when it is its turn, or say why not."""
    from .. import environment, service, trust

    # As the VM's own unit has them, from wherever it has them.
    try:
        by = trust.suspect(service.identity(name))
    except MicrovmHostError:
        # Without knowing the user, no file is trusted.
        by = None
    for assignment in environment.assignments(names.unit(name), name, by, host):
        key, _, value = assignment.partition("=")
        if key.startswith("MICROVM_RESTART_"):
            os.environ[key] = value
    aftermath.start_again(
        name,
        _ends(name, host),
        settings.number("MICROVM_RESTART_LIMIT", aftermath.LIMIT),
        settings.seconds("MICROVM_RESTART_SECONDS", aftermath.FIRST_DELAY),
    )


def over(name: str, host: HostPaths) -> None:
    """Forget about it, where somebody has ended the waiting."""
    aftermath.forget_if_told_to(name, _ends(name, host))


def _ends(name: str, host: HostPaths) -> Record:
    return Record(host.record(name, "ends"))
