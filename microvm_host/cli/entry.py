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
    _open_standard_files()
    try:
        try:
            code = _run((sys.argv if argv is None else argv)[1:])
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else EXIT_FAILED
        # Not at the end of the interpreter, which would complain in words of its own.
        sys.stdout.flush()
        return code
    except MicrovmHostError as error:
        sys.stderr.write(f"microvm: {error}\n")
        return error.exit_code
    except BrokenPipeError:
        # The reader, `head` or so, has enough.
        _drop_output()
        return EXIT_FAILED
    except OSError as error:
        # A full disk, or something in the way that nobody thought of: no traceback for that.
        where = f"{error.filename}: " if error.filename else ""
        if _drop_output():
            where = "standard output: "
        sys.stderr.write(f"microvm: {where}{error.strerror or error}\n")
        return EXIT_FAILED
    except KeyboardInterrupt:
        return 130


def _run(given: list[str]) -> int:
    from .classic import translate

    arguments = translate(given)
    # By the flag, the listing has microvm.nix's words.
    as_lines = arguments[:1] == ["list"] and given[0] != "list"
    if arguments == ["list"]:
        from .table import show_list

        show_list(HostPaths.from_environment(), as_lines=as_lines)
        return 0
    if as_lines:
        arguments.insert(1, "--lines")
    add_distribution_packages()
    try:
        from .commands import microvm
        from .group import run
    except ModuleNotFoundError as error:
        raise MicrovmHostError(
            f"cannot import {error.name}", hint=f"install python3-{error.name}"
        ) from error
    return run(microvm, arguments)


def _open_standard_files() -> None:
    """Have standard input, output and errors, if only /dev/null: the caller may have closed some.

    Otherwise the next file that is opened would take the number of one of them, and what programs
    print would go there.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(number, True)
    os.close(number)
    # Python has None for those that were closed when it started.
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _drop_output() -> bool:
    """Drop what is still to be written to standard output; whether it could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), 1)
        return True
    return False
