# SPDX-License-Identifier: MIT
"""pytest fixtures that hand out test hosts; a conftest names this module as a plugin.

A host is booted when the first test asks for its kind and suite and serves the rest of the
session.  A test that would spoil it for others makes one of its own (`with ContainerHost(...)`).

Tests are skipped for one reason only, that the machine lacks something a host needs, and the
reason names it.  Where CI is true there is no such excuse, and the test fails instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import pytest

from tests.host import container, virtual
from tests.host.container import ContainerHost
from tests.host.interface import CommandHost, HostError
from tests.host.root import DEFAULT_SUITE
from tests.host.virtual import VirtualHost

Started = TypeVar("Started", bound=CommandHost)


def require(lack: str | None) -> None:
    """Skip the test for what the machine lacks; fail it in CI."""
    if lack is None:
        return
    if os.environ.get("CI") == "true":
        pytest.fail(f"no test host in CI: {lack}", pytrace=False)
    pytest.skip(lack)


def require_container() -> None:
    """Skip or fail where no container host can run."""
    require(container.missing())


def require_virtual() -> None:
    """Skip or fail where no virtual host can run."""
    require(virtual.missing())


@pytest.fixture(scope="session")
def container_host() -> Iterator[Callable[..., ContainerHost]]:
    """`container_host(suite="trixie")`: the session's container host of a suite."""
    running: dict[str, ContainerHost] = {}

    def give(suite: str = DEFAULT_SUITE) -> ContainerHost:
        require_container()
        if suite not in running:
            running[suite] = _started(ContainerHost(suite))
        return running[suite]

    yield give
    _stop_all(running.values())


@pytest.fixture(scope="session")
def virtual_host() -> Iterator[Callable[..., VirtualHost]]:
    """`virtual_host(suite="trixie")`: the session's virtual host of a suite."""
    running: dict[str, VirtualHost] = {}

    def give(suite: str = DEFAULT_SUITE) -> VirtualHost:
        require_virtual()
        if suite not in running:
            running[suite] = _started(VirtualHost(suite))
        return running[suite]

    yield give
    _stop_all(running.values())


def _started(host: Started) -> Started:
    try:
        host.start()
    except BaseException:
        host.stop()
        raise
    return host


def _stop_all(hosts: Iterable[CommandHost]) -> None:
    # One that leaves something behind must not keep the others from being stopped.
    errors = []
    for host in hosts:
        try:
            host.stop()
        except HostError as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup("hosts left something behind", errors)
