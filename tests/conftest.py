# SPDX-License-Identifier: MIT
"""Which tests `make test` runs beside each other: those in virtual hosts, and all others.

Each kind keeps a processor busy, and takes about as long as the other. More processes would not do:
each boots hosts of its own, and several container hosts must not start from one cgroup.
"""

from __future__ import annotations

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling


def _kind(nodeid: str) -> str:
    # Who hands out the tests knows no more of them than this.
    return "virtual" if "virtual" in nodeid else "others"


class _ByKind(LoadScopeScheduling):  # type: ignore[misc]
    """Gives each kind to one process.

    Not xdist's own groups (`--dist loadgroup`), which xdist 3.8 silently loses with pytest 9.2.
    """

    def _split_scope(self, nodeid: str) -> str:
        return _kind(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> _ByKind | None:
    return _ByKind(config, log) if config.getvalue("dist") == "loadscope" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.nodeid.startswith("tests/unit/"):
            continue
        is_virtual = item.get_closest_marker("virtual") is not None
        if is_virtual != (_kind(item.nodeid) == "virtual"):
            raise pytest.UsageError(
                f"{item.nodeid}: `virtual` stands in the names of tests in virtual hosts, and in "
                "no others"
            )
