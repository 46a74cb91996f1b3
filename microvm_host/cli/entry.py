# SPDX-License-Identifier: MIT
"""Where the `microvm` command begins.

`microvm -l` is typed all day, so that the plain listing is done before click is imported, which
takes longer than the listing itself.
"""

from __future__ import annotations

import os
import sys

from ..errors import EXIT_FAILED, MicrovmHostError
from ..interpreter import add_distribution_packages
from ..paths import HostPaths


def main(argv: list[str] | None = None) -> int:
    """Run the command; gives the exit code."""
    from .classic import translate

    try:
        arguments = translate((sys.argv if argv is None else argv)[1:])
        if arguments == ["list"]:
            from .table import show_list

            show_list(HostPaths.from_environment())
        else:
            add_distribution_packages()
            try:
                from .commands import microvm
            except ModuleNotFoundError as error:
                raise MicrovmHostError(
                    f"cannot import {error.name}", hint=f"install python3-{error.name}"
                ) from error
            microvm.main(arguments, prog_name="microvm")
    except MicrovmHostError as error:
        sys.stderr.write(f"microvm: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # The reader, `head` or so, has enough. Python would complain once more at its own end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except OSError as error:
        # A full disk, or something in the way that nobody thought of: no traceback for that.
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"microvm: {where}{error.strerror or error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130
    return 0
