# SPDX-License-Identifier: MIT
"""Where a VM's package comes from: a path of this host, or a flake or a declaration to build."""

from __future__ import annotations

import os
import stat

from .errors import NameInvalid
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

# Files in the state directory that remember it, one line each; `flake` as on NixOS.
KINDS = ("runner", "flake", "declaration")
# Beside them, an empty file: a declaration says that this VM is to be.
DECLARED = "declared"
# Far more than a flake reference is long.
_REFERENCE_MAX = 4096


def remembered(state_directory: str) -> Source | None:
    """Where a VM's package came from; None if somebody put it there by hand.

    The VM's user may make files in that directory, too: only what is root's is believed.
    """
    for kind in KINDS:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(f"{state_directory}/{kind}", flags)
        except OSError:
            continue
        try:
            if _is_roots_file(os.fstat(file)):
                text = os.read(file, _REFERENCE_MAX).decode(errors="replace")
                # People write these, too, with editors of any kind.
                return Source(kind, text.removeprefix("\ufeff").rstrip("\r\n"))
        finally:
            os.close(file)
    return None


def is_from_declaration(state_directory: str) -> bool:
    """Whether a declaration made this VM, be it there still or not."""
    try:
        return _is_roots_file(os.lstat(f"{state_directory}/{DECLARED}"))
    except OSError:
        return False


def is_undeclared(vm: str, host: HostPaths) -> bool:
    """Whether a declaration made this VM, and the declaration was deleted since."""
    return is_from_declaration(host.vm(vm)) and not os.path.lexists(host.declaration(vm))


def _is_roots_file(status: os.stat_result) -> bool:
    # A file with a second name was made elsewhere, to say something else. The group's bits are the
    # mask of an access control list, too.
    is_roots = status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return stat.S_ISREG(status.st_mode) and is_roots and status.st_nlink == 1


@frozen
class Source:
    """`kind` says what `reference` is.

    `runner`: a package's path; `flake`: a flake reference; `declaration`: the path of a declaration
    that says itself what the guest is like.
    """

    kind: str
    reference: str

    def checked(self) -> Source:
        """This source; raises NameInvalid if nothing can come from there."""
        reference = self.reference
        if not reference or not reference.isprintable():
            raise NameInvalid(f"{self.kind} {reference!r} is empty or not printable")
        if self.kind != "flake" and not reference.startswith("/"):
            raise NameInvalid(
                f"{self.kind} {reference!r} is not an absolute path", hint="it begins with /"
            )
        if self.kind == "flake" and "#" in reference:
            raise NameInvalid(
                f"flake {reference!r} has a '#'",
                hint="name the flake alone; the VM's name picks the output",
            )
        if self.kind == "flake" and reference.startswith("-"):
            raise NameInvalid(f"flake {reference!r} looks like an option")
        return self

    def __str__(self) -> str:
        return f"{self.kind} {self.reference}"
