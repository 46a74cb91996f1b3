# SPDX-License-Identifier: MIT
"""Compares with the files in tests/golden; UPDATE_GOLDEN=1 writes them, for a look at the diff."""

from __future__ import annotations

import os
from pathlib import Path

DIRECTORY = Path(__file__).parents[1] / "golden"


def compare(name: str, found: str) -> None:
    """Assert that `found` is the text of a golden file."""
    path = DIRECTORY / name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(found)
    assert found == path.read_text(), f"{path} says otherwise; UPDATE_GOLDEN=1 would write it"
