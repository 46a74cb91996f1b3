# SPDX-License-Identifier: MIT
"""Runs a program and takes its output, for the helpers.

`subprocess` costs more to import (11 ms) than most programs that they call take to run.
"""

from __future__ import annotations

import os

from .errors import MicrovmHostError


def output(argv: list[str]) -> str:
    """Run a program, found in $PATH, and give its standard output.

    Its standard error goes where ours goes.

    Raises:
        MicrovmHostError: it is missing or did not exit with 0.
    """
    # Programs of systemd's report to $NOTIFY_SOCKET if there is one: they are not the service.
    environment = {key: value for key, value in os.environ.items() if key != "NOTIFY_SOCKET"}
    reader, writer = os.pipe()
    try:
        try:
            child = os.posix_spawnp(
                argv[0], argv, environment, file_actions=[(os.POSIX_SPAWN_DUP2, writer, 1)]
            )
        except OSError as error:
            raise MicrovmHostError(f"cannot run {argv[0]}: {error.strerror}") from error
        finally:
            os.close(writer)
        chunks = []
        while chunk := os.read(reader, 65536):
            chunks.append(chunk)
    finally:
        os.close(reader)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code:
        raise MicrovmHostError(f"`{' '.join(argv)}` failed with {code}")
    return b"".join(chunks).decode(errors="replace")
