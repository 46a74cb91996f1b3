# SPDX-License-Identifier: MIT
"""Command line: ``python3 -m tests.guest image|package|stub …``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import image, package


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command; 0 when it worked, 1 when it failed, 2 on wrong usage."""
    parser = argparse.ArgumentParser(
        prog="guest", description="Make a small real guest, and runner packages that start it."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    image.add_command(commands)
    package.add_commands(commands)
    options = parser.parse_args(argv)
    try:
        options.run(options)
    except (image.ImageError, package.PackageError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
