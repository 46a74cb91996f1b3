# SPDX-License-Identifier: MIT
"""Hosts for the tests, each started once and shared; VMs, each taken away after its test."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator

import pytest

from tests.host.container import ContainerHost
from tests.host.fixtures import require_container

from .toolkit import Toolkit

# trixie runs everything; the others what is marked `core`.
SUITES = ("trixie", "bookworm", "sid")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "toolkit" in metafunc.fixturenames:
        is_core = metafunc.definition.get_closest_marker("core") is not None
        chosen = os.environ.get("MICROVM_HOST_TEST_SUITES", " ".join(SUITES)).split()
        suites = [suite for suite in SUITES if suite in chosen and (is_core or suite == "trixie")]
        metafunc.parametrize("toolkit", suites, indirect=True, scope="session")


@pytest.fixture(scope="session")
def toolkits() -> Iterator[dict[str, Toolkit]]:
    """The container hosts that were booted so far, by suite."""
    with contextlib.ExitStack() as hosts:
        yield _Toolkits(hosts)


class _Toolkits(dict[str, Toolkit]):
    """Boots a host at the first look, installs the toolkit, and builds the guest's image."""

    def __init__(self, hosts: contextlib.ExitStack) -> None:
        super().__init__()
        self._hosts = hosts

    def __missing__(self, suite: str) -> Toolkit:
        require_container()
        toolkit = Toolkit(self._hosts.enter_context(ContainerHost(suite)))
        toolkit.install()
        toolkit.build_image()
        self[suite] = toolkit
        return toolkit


@pytest.fixture(scope="session")
def toolkit(request: pytest.FixtureRequest, toolkits: dict[str, Toolkit]) -> Toolkit:
    """A container host of the suite, with the toolkit installed and the guest's image built."""
    return toolkits[request.param]


_numbers = itertools.count(1)


@pytest.fixture
def vm(toolkit: Toolkit) -> Iterator[str]:
    """A name for a VM, which is gone after the test with all that it left."""
    name = f"vm{next(_numbers)}"
    before = toolkit.footprint()
    yield name
    toolkit.remove(name)
    toolkit.await_footprint(before)
