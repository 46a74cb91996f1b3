# SPDX-License-Identifier: MIT
"""Each source file says under which licence it is."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# Other than source: they have no comments, or are compared byte by byte.
WITHOUT = {"LICENSE", ".gitignore", "requirements.txt", "benchmarks.json"}
# Debian's own formats; debian/copyright speaks for them.
WITHOUT |= {"changelog", "control", "copyright", "format"}
WITHOUT |= {"microvm-host.README.Debian", "microvm-host.docs"}
LEFT_OUT = {"golden", "corpus", "__pycache__"}
LEFT_OUT_AT_TOP = {"build", "dist"}


def sources() -> list[Path]:
    found = []
    for directory, subdirectories, files in os.walk(REPOSITORY):
        top = Path(directory) == REPOSITORY
        subdirectories[:] = [
            name
            for name in subdirectories
            if name not in LEFT_OUT
            and not (top and name in LEFT_OUT_AT_TOP)
            and (not name.startswith(".") or (top and name == ".ci"))
        ]
        found += [
            Path(directory, file)
            for file in files
            if file not in WITHOUT and not file.startswith(".") and not file.endswith("~")
        ]
    return sorted(found)


def test_headers() -> None:
    found = sources()
    assert len(found) > 60
    without = [
        str(path.relative_to(REPOSITORY))
        for path in found
        if b"SPDX-License-Identifier: MIT" not in b"".join(path.read_bytes().splitlines()[:3])
    ]
    assert without == []
