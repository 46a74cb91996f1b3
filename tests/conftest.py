# SPDX-License-Identifier: MIT
"""Which tests may run beside each other: those in virtual hosts, and all others.

Each kind keeps a processor busy, and takes about as long as the other. More processes would not do:
each boots hosts of its own, and several container hosts must not start from one cgroup.
"""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = "virtual" if item.get_closest_marker("virtual") else "container"
        item.add_marker(pytest.mark.xdist_group(group))
