# SPDX-License-Identifier: MIT
"""Progress on standard error: what is being done and, once it is done, how long it took.

Building a root takes the better part of a minute, and a silent minute looks like a hang.
Standard output is left alone, since it may carry a command's own output.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def step(what: str, *, quiet: bool = False) -> Iterator[None]:
    """Announce a step that takes longer than a second, and say what it cost or that it failed."""
    if quiet:
        yield
        return
    print(f"{what} ...", file=sys.stderr, flush=True)
    began = time.monotonic()
    try:
        yield
    except BaseException:
        print(f"{what}: failed after {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        raise
    print(f"{what}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
