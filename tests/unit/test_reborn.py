# SPDX-License-Identifier: MIT
"""Interfaces that a driver makes anew: which is which, their names, and whether they are up."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable

import pytest

from microvm_host import interfaces, pcibus, reborn
from microvm_host.errors import MicrovmHostError
from microvm_host.reborn import Interface

from .sysfs_trees import Kernel, Sysfs

CARD = "0000:03:00.0"
ONE, OTHER = "52:54:00:00:00:01", "52:54:00:00:00:02"


@pytest.fixture(autouse=True)
def kernel(sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    kernel = Kernel(sysfs)
    kernel.install(monkeypatch)
    monkeypatch.setattr(reborn, "APPEARS_WITHIN", 0.05)
    return kernel


def mac(address: str, *, kind: str = "0", port: str = "0") -> dict[str, str]:
    return {"address": address, "addr_assign_type": kind, "dev_port": port}


def port(number: int) -> dict[str, str]:
    return {"dev_port": f"{number}"}


def card(sysfs: Sysfs, kernel: Kernel, **given: dict[str, str]) -> list[str]:
    """A card with interfaces of these names, of which the first is up; and what is recorded."""
    sysfs.device(CARD, "e1000e", 7)
    for number, (name, attributes) in enumerate(given.items()):
        sysfs.interface(name, sysfs.pci(CARD), up=number == 0, attributes=attributes)
    kernel.adopt()
    return fields(sysfs)


def fields(sysfs: Sysfs) -> list[str]:
    device = pcibus.device(CARD, sysfs.host)
    assert device is not None
    return reborn.to_fields(device, sysfs.host)


def bear(sysfs: Sysfs, kernel: Kernel, **given: dict[str, str]) -> None:
    """Have the driver make interfaces anew."""
    kernel.interfaces[CARD] = tuple(given)
    kernel.attributes[CARD] = tuple(given.values())
    kernel.put(f"{sysfs.host.pci_driver('e1000e')}/unbind", CARD)
    kernel.put(f"{sysfs.host.pci_driver('e1000e')}/bind", CARD)


def restored(sysfs: Sysfs, recorded: list[str]) -> list[str]:
    was = reborn.from_fields(*recorded)
    assert was is not None
    return reborn.restore(CARD, was, sysfs.host)


def test_fields(sysfs: Sysfs, kernel: Kernel) -> None:
    assert card(sysfs, kernel, lan=mac(ONE), wan=port(1), eth0={}) == [
        "lan",
        "eth0 wan",
        f"lan {ONE} 0",
        "wan - 1",
    ]


@pytest.mark.parametrize("kind", ["1", "2", "3"])
def test_a_mac_address_that_is_not_the_cards_own_says_nothing(
    sysfs: Sysfs, kernel: Kernel, kind: str
) -> None:
    """Made up anew each time, or set by somebody, a bond say."""
    assert card(sysfs, kernel, lan=mac(ONE, kind=kind)) == ["lan", "", "lan - 0"]


@pytest.mark.parametrize(
    "odd",
    [("lan/0", ""), ("lan", "..", ""), ("lan", "", "lan"), ("lan", "", "lan - 0 0")]
    + [("lan", "", "lan \x1b 0"), ("lan", "", "lan - x")],
)
def test_fields_of_somebody_elses(odd: tuple[str, ...]) -> None:
    assert reborn.from_fields(*(*odd, "")[: max(2, len(odd))]) is None


def test_fields_of_a_former_version() -> None:
    assert reborn.from_fields("lan wan", "eth0") == [
        Interface("lan", True),
        Interface("wan", True),
        Interface("eth0", False),
    ]


def test_a_device_without_interfaces(sysfs: Sysfs, kernel: Kernel) -> None:
    assert card(sysfs, kernel) == ["", ""]
    assert restored(sysfs, ["", ""]) == []
    # Gone again.
    assert reborn.restore("0000:09:00.0", [Interface("lan")], sysfs.host) == []


@pytest.mark.parametrize("was_up", [True, False])
@pytest.mark.parametrize("sets_up", [True, False])
def test_whoever_manages_the_network_was_quicker(
    sysfs: Sysfs, kernel: Kernel, was_up: bool, sets_up: bool
) -> None:
    """Under another name it was set up, and an interface that is up keeps its name."""
    recorded = card(sysfs, kernel, lan=mac(ONE))
    if not was_up:
        recorded[:2] = reversed(recorded[:2])
    kernel.sets_up = sets_up
    bear(sysfs, kernel, enp3s0=mac(ONE))
    assert restored(sysfs, recorded) == []
    assert os.listdir(sysfs.pci(CARD) / "net") == ["lan"]
    assert bool(kernel.get_flags("lan") & interfaces.IFF_UP) == was_up


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (port(0), port(1)),
        (mac(ONE), mac(OTHER)),
        # One address for two ports, as some cards have it.
        (mac(ONE), mac(ONE, port="1")),
        # Told apart by elimination.
        (mac(ONE, port="0"), {}),
    ],
)
@pytest.mark.parametrize(
    "names", [("eth0", "eth1"), ("eth1", "eth0"), ("lan", "wan"), ("lan", "x")]
)
@pytest.mark.parametrize("sets_up", [True, False])
def test_two_that_come_back_under_other_names(
    sysfs: Sysfs,
    kernel: Kernel,
    one: dict[str, str],
    other: dict[str, str],
    names: tuple[str, str],
    sets_up: bool,
) -> None:
    """Exchanged ones too: a name that is another's way out would be the wrong network's."""
    recorded = card(sysfs, kernel, wan=one, lan=other)
    kernel.sets_up = sets_up
    bear(sysfs, kernel, **dict(zip(names, (one, other), strict=True)))
    assert restored(sysfs, recorded) == []
    assert kernel.get_flags("wan") & interfaces.IFF_UP
    assert not kernel.get_flags("lan") & interfaces.IFF_UP
    found = {
        entry.name: {
            file.name: file.read_text() for file in entry.iterdir() if file.name != "flags"
        }
        for entry in (sysfs.pci(CARD) / "net").iterdir()
    }
    assert found == {
        name: {key: f"{text}\n" for key, text in attributes.items()}
        for name, attributes in (("wan", one), ("lan", other))
    }


def test_two_that_cannot_be_told_apart(sysfs: Sysfs, kernel: Kernel) -> None:
    """A record of a version that did not look: not exchanged, but told."""
    card(sysfs, kernel, wan=port(0), lan=port(1))
    bear(sysfs, kernel, eth0=port(0), eth1=port(1))
    found = restored(sysfs, ["wan", "lan"])
    assert [line.partition(";")[0] for line in found] == [
        f"{CARD} is with its driver again, but its interface {name} is not there"
        for name in ("wan", "lan")
    ]
    assert sorted(os.listdir(sysfs.pci(CARD) / "net")) == ["eth0", "eth1"]


def test_another_one_in_its_place(sysfs: Sysfs, kernel: Kernel) -> None:
    """Plugged into the same USB controller while the VM ran."""
    recorded = card(sysfs, kernel, lan=mac(ONE))
    bear(sysfs, kernel, enx2=mac(OTHER))
    [line] = restored(sysfs, recorded)
    assert "its interface lan is not there" in line
    assert os.listdir(sysfs.pci(CARD) / "net") == ["enx2"]


def test_a_virtual_function_that_got_another_address(sysfs: Sysfs, kernel: Kernel) -> None:
    recorded = card(sysfs, kernel, enp3s0=mac(ONE))
    bear(sysfs, kernel, enp3s0=mac(OTHER))
    assert restored(sysfs, recorded) == []
    assert kernel.get_flags("enp3s0") & interfaces.IFF_UP


def test_a_name_that_somebody_else_has(sysfs: Sysfs, kernel: Kernel) -> None:
    recorded = card(sysfs, kernel, lan=mac(ONE), wan=mac(OTHER, port="1"))
    bear(sysfs, kernel, eth0=mac(ONE), eth1=mac(OTHER, port="1"))
    sysfs.interface("lan")
    assert restored(sysfs, recorded) == [
        f"{CARD} is with its driver again, but its interface eth0 cannot be called lan as before: "
        "interface eth0: File exists; `ip link set dev eth0 down && ip link set dev eth0 name lan` "
        "does it when that is mended"
    ]
    # It is up, as it was, and the other has its name.
    assert kernel.get_flags("eth0") & interfaces.IFF_UP
    assert sorted(os.listdir(sysfs.pci(CARD) / "net")) == ["eth0", "wan"]


def test_killed_while_names_are_exchanged(
    sysfs: Sysfs, kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = card(sysfs, kernel, wan=port(0), lan=port(1))
    before = sysfs.picture()
    left = 0

    def counted(change: Callable[..., None]) -> Callable[..., None]:
        def counting(*given: object, **also: object) -> None:
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            change(*given, **also)

        return counting

    # Two are set down, and one of them up again; each gets two names.
    for changes in range(7):
        bear(sysfs, kernel, lan=port(0), wan=port(1))
        left = changes
        with monkeypatch.context() as patch:
            for change in (kernel.rename, kernel.set_flags):
                patch.setattr(reborn, change.__name__, counted(change))
            with pytest.raises(KeyboardInterrupt):
                restored(sysfs, recorded)
        assert restored(sysfs, recorded) == []
        assert sysfs.picture() == before, changes


def test_an_interface_that_is_being_renamed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a moment the kernel finds it by neither name."""
    errors = [OSError(errno.ENODEV, "No such device")] * 2

    def get_flags(name: str) -> int:
        if errors:
            raise MicrovmHostError(f"interface {name}: No such device") from errors.pop()
        return 0

    up = []
    monkeypatch.setattr(reborn, "get_flags", get_flags)
    monkeypatch.setattr(reborn, "set_flags", lambda name, flags: up.append((name, flags)))
    reborn._set_up("lan0", time.monotonic() + 5)
    assert up == [("lan0", interfaces.IFF_UP)]
    errors.append(OSError(errno.ENODEV, "No such device"))
    with pytest.raises(MicrovmHostError, match="No such device"):
        reborn._set_up("lan0", time.monotonic() - 1)
