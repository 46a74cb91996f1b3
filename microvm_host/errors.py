# SPDX-License-Identifier: MIT
"""The errors of the toolkit and the exit codes they lead to.

An error names what it is about (a path and, in a file of lines, the line), what is wrong with
which value, and what mends it. Entry points print it and exit with its code; nothing below them
exits. This module imports nothing, since everything else imports it.
"""

from __future__ import annotations

EXIT_FAILED = 1
EXIT_USAGE = 2
# sysexits.h's EX_CONFIG; the units list it in RestartPreventExitStatus=, since starting again
# does not mend a wrong package.
EXIT_CONFIG = 78


class MicrovmHostError(Exception):
    """Something failed on this host: exit code 1.

    Args:
        message: what is wrong, with the value in it.
        path: the file, directory or device that it is about.
        line: the line in that file, from 1.
        hint: what mends it.
    """

    exit_code = EXIT_FAILED

    def __init__(
        self, message: str, *, path: str | None = None, line: int | None = None, hint: str = ""
    ) -> None:
        super().__init__(message)
        self.message = message
        self.path = path
        self.line = line
        self.hint = hint

    def __str__(self) -> str:
        """The whole error in one line: `PATH:LINE: MESSAGE; HINT`."""
        where = ""
        if self.path is not None:
            # A path is untrusted text as well: one that holds a newline must not make two lines.
            where = self.path if self.path.isprintable() else repr(self.path)
            where += f":{self.line}: " if self.line is not None else ": "
        return f"{where}{self.message}" + (f"; {self.hint}" if self.hint else "")


def one_line(text: str) -> str:
    """Text of others, such as a program's complaint, as a part of an error's one line."""
    return " ".join("".join(each if each.isprintable() else " " for each in text).split())


class PackageError(MicrovmHostError):
    """A runner package that breaks the contract: exit code 78."""

    exit_code = EXIT_CONFIG


class NoGuest(MicrovmHostError):
    """The hypervisor runs, and no guest in it that could be asked to shut down."""


class DeclarationError(MicrovmHostError):
    """A declaration under `/etc/microvms` that is wrong: exit code 78."""

    exit_code = EXIT_CONFIG


class NameInvalid(MicrovmHostError):
    """A name of a VM, an interface, a tag or a device that nothing may be called.

    Exit code 2, since it was typed; a reader that met it in a file raises its own error from it.
    """

    exit_code = EXIT_USAGE


class UsageError(MicrovmHostError):
    """A command that was called wrongly: exit code 2."""

    exit_code = EXIT_USAGE
