# SPDX-License-Identifier: MIT
"""What a builder raises for what a hypervisor, or this host, cannot do."""

from __future__ import annotations

from ..errors import DeclarationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..declaration.locate import Path


class Refused(DeclarationError):
    """A guest that cannot be built: `at` is the key of its declaration that asks for too much."""

    def __init__(self, at: Path, message: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.at = at
