# SPDX-License-Identifier: MIT
"""Fixtures of the unit tests."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm_host.paths import HostPaths

from .sysfs_trees import Sysfs

# Where hypothesis keeps its tables of Unicode; by default that is the checkout.
CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.join(Path.home(), ".cache")
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", f"{CACHE}/microvm-host/hypothesis")


@pytest.fixture(autouse=True)
def no_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test takes itself for a service, though a service may run them."""
    for variable in (
        *("INVOCATION_ID", "JOURNAL_STREAM", "MAINPID", "MICROVM_HOST_ROOT"),
        *("MICROVM_READINESS", "MICROVM_SHUTDOWN_SECONDS", "NOTIFY_SOCKET", "SYSTEMD_EXEC_PID"),
    ):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """What becomes another program gives up Python's signals, and in a test it does not become one.

    With SIGPIPE at its default, a fake that writes to a closed socket would end the whole run.
    """
    numbers = (signal.SIGPIPE, signal.SIGXFSZ)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, action in zip(numbers, before, strict=True):
        signal.signal(number, action)


@pytest.fixture
def root() -> Iterator[Path]:
    """A directory with a short name, so that paths of sockets below it fit in 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="mvh-") as directory:
        yield Path(directory).resolve()


@pytest.fixture
def host(root: Path) -> HostPaths:
    """A host below that directory, with the state directory of all VMs."""
    host = HostPaths(str(root))
    Path(host.state).mkdir(parents=True)
    return host


@pytest.fixture
def sysfs(root: Path) -> Sysfs:
    """A sysfs of its own below that directory."""
    return Sysfs(root)
