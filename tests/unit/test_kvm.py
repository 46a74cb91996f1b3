# SPDX-License-Identifier: MIT
"""What keeps a VM from KVM is told by the CPU's flags and the node's owner and mode, unopened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from microvm_host import kvm
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths

VM = Identity("nobody", 65534, "nogroup", 65534)


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    (tmp_path / "proc").mkdir()
    (tmp_path / "dev").mkdir()
    return HostPaths(str(tmp_path))


def cpu(host: HostPaths, flags: str) -> None:
    Path(host.cpu_info).write_text(f"processor\t: 0\nflags\t\t: fpu {flags} lm\nbugs\t\t: vmx\n")


def test_a_cpu_without_it(host: HostPaths) -> None:
    # The node is there, as it may be where no guest runs; and a FIFO would hang who opens it.
    os.mkfifo(host.kvm, 0o666)
    assert "CPU" in str(kvm.why_not(VM, host))
    cpu(host, "vmxx svm_lock")
    assert "CPU" in str(kvm.why_not(VM, host))


@pytest.mark.parametrize("flag", ["vmx", "svm"])
def test_a_module_that_is_not_loaded(host: HostPaths, flag: str) -> None:
    cpu(host, flag)
    assert "modprobe" in str(kvm.why_not(VM, host))


@pytest.mark.parametrize(
    ("mode", "group", "is_right"),
    [
        (0o666, 0, True),
        (0o660, 0, False),
        (0o660, 65534, True),
        (0o640, 65534, False),
        (0o606, 65534, False),
    ],
)
def test_who_may_open_the_node(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch, mode: int, group: int, is_right: bool
) -> None:
    cpu(host, "vmx")
    os.mkfifo(host.kvm)
    os.chmod(host.kvm, mode)
    found = os.stat(host.kvm)
    shown = os.stat_result((mode, 0, 0, 1, 0, group, *found[6:]))
    monkeypatch.setattr(os, "stat", lambda _: shown)
    reason = kvm.why_not(VM, host)
    assert (reason is None) == is_right
    if reason is not None:
        assert "nobody may not open" in reason
    assert kvm.why_not(Identity("root", 0, "root", 0), host) is None
    assert kvm.why_not(None, host) is None


def test_groups_that_the_vms_unit_adds(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(host, "svm")
    monkeypatch.setattr(os, "stat", lambda _: os.stat_result((0o660, 0, 0, 1, 0, 104, 0, 0, 0, 0)))
    assert kvm.why_not(Identity("nobody", 65534, "nogroup", 65534, (7, 104)), host) is None
    # Whatever the group is called: SupplementaryGroups= may have been emptied.
    assert "may not open" in str(kvm.why_not(VM, host))


def test_a_cpu_that_has_no_flags(host: HostPaths) -> None:
    Path(host.cpu_info).write_text("processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n")
    os.mkfifo(host.kvm, 0o666)
    os.chmod(host.kvm, 0o666)
    assert kvm.why_not(VM, host) is None
