# SPDX-License-Identifier: MIT
"""Where a VM's package comes from: a path of this host, or a flake to build."""

from __future__ import annotations

from .errors import NameInvalid
from .frozen import frozen

# Files in the state directory that remember it, one line each; `flake` as on NixOS.
KINDS = ("runner", "flake")


def remembered(state_directory: str) -> Source | None:
    """Where a VM's package came from; None if somebody put it there by hand."""
    for kind in KINDS:
        try:
            with open(f"{state_directory}/{kind}", encoding="utf-8") as file:
                return Source(kind, file.read().rstrip("\n"))
        except OSError:
            continue
    return None


@frozen
class Source:
    """`kind` is `runner`, with a path as `reference`, or `flake`, with a flake reference."""

    kind: str
    reference: str

    def checked(self) -> Source:
        """This source; raises NameInvalid if nothing can come from there."""
        reference = self.reference
        if not reference or not reference.isprintable():
            raise NameInvalid(f"{self.kind} {reference!r} is empty or not printable")
        if self.kind == "runner" and not reference.startswith("/"):
            raise NameInvalid(
                f"runner {reference!r} is not an absolute path", hint="it begins with /"
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
