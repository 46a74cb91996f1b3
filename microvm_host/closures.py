# SPDX-License-Identifier: MIT
"""What a VM's packages differ in, as nix sees it: `nix store diff-closures`, as microvm.nix's
`microvm -u` shows it.
"""

from __future__ import annotations

import subprocess

from .install import NIX

STORE = "/nix/store/"


def difference(before: str | None, after: str) -> str:
    """The packages that came, went or changed their size, a line each.

    Empty where there is nothing to compare: nothing before, not of nix's store, or no nix.
    """
    if (
        before is None
        or before == after
        or not (before.startswith(STORE) and after.startswith(STORE))
    ):
        return ""
    argv = [*NIX, "store", "diff-closures", before, after]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
    except OSError:
        return ""
    # A former package may be collected already: what is new was installed all the same.
    return done.stdout.decode(errors="replace") if done.returncode == 0 else ""
