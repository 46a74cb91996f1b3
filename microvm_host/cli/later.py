# SPDX-License-Identifier: MIT
"""Modules that are imported when they are first used.

A sub-command needs few of those that all of them together do, and `microvm --help` none.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Later:
    """Stands for a module, named from the package of the commands, such as `..listing`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name, __package__), attribute)
