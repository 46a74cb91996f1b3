# SPDX-License-Identifier: MIT
"""`microvm build` and `show`: packages that are made of declarations."""

from __future__ import annotations

import os
import subprocess

from .. import state, store
from ..errors import MicrovmHostError
from ..paths import MICROVM_RUN, HostPaths


def build(path: str, output: str) -> None:
    """Write the package of a declaration into a directory; raises MicrovmHostError."""
    from ..build import declared
    from ..declaration import derived

    declared.tree(path, host_id=derived.host_id(HostPaths().machine_id)).write(output)


def command_line(vm: str, host: HostPaths) -> list[str]:
    """The words of the command line that a start of a VM would be now.

    Raises:
        MicrovmHostError: its package is not one that could be asked.
    """
    # What runs is what counts; a VM that is down shows what would run.
    link = host.booted(vm) if state.booted(vm, host) else host.current(vm)
    package = os.path.realpath(link)
    if not store.is_ours(package, host):
        raise MicrovmHostError(
            f"the package of {vm} was not made of a declaration, and does not tell",
            path=package,
            hint=f"look into {MICROVM_RUN} there",
        )
    done = subprocess.run(
        [f"{package}/{MICROVM_RUN}"],
        env={**os.environ, "MICROVM_SHOW": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise MicrovmHostError(f"{MICROVM_RUN} ended with {done.returncode}", path=package)
    return done.stdout.splitlines()
