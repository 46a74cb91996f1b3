# SPDX-License-Identifier: MIT
"""Which tests `make test` runs beside each other.

A process takes one part after the other: the tests of one file in one suite. Each process keeps
the container hosts that it has booted, one a suite. The virtual hosts come first, since their parts
take longest.
"""

from __future__ import annotations

import re

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

_SUITE = re.compile(r"\[.*\b(bookworm|sid)\b.*\]")


def _is_virtual(nodeid: str) -> bool:
    # The process that hands out the tests knows no more of them than this.
    return "virtual" in nodeid


def _part(nodeid: str) -> str:
    path, _, name = nodeid.partition("::")
    suite = _SUITE.search(name)
    kind = "virtual" if _is_virtual(nodeid) else "container"
    return f"{path} {kind} {suite[1] if suite else 'trixie'}"


class _ByPart(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each part to one process.

    Not xdist's own groups (`--dist loadgroup`), which xdist 3.8 silently loses with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _part(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByPart | None:
    return _ByPart(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/unit/"):
            continue
        is_virtual = item.get_closest_marker("virtual") is not None
        if is_virtual != _is_virtual(item.nodeid):
            raise pytest.UsageError(
                f"{item.nodeid}: `virtual` stands in the names of tests in virtual hosts, and in "
                "no others"
            )
    items.sort(key=lambda item: not _is_virtual(item.nodeid))
