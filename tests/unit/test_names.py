# SPDX-License-Identifier: MIT
"""Names: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import pytest

from microvm_host import names
from microvm_host.errors import EXIT_USAGE, NameInvalid


@pytest.mark.parametrize(
    "name", ["a", "web", "Web-1", "a.b", "a:b", "_x", "1", ":x", "a" * 63, "a..b", "x-"]
)
def test_vm_names(name: str) -> None:
    assert names.vm_name(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "is empty"),
        (".", "'.' cannot be the name of a VM"),
        ("..", "cannot be"),
        (".hidden", "cannot be"),
        ("-l", "'-l' cannot be"),
        ("a/b", "cannot be"),
        ("a b", "cannot be"),
        ("a@b", "cannot be"),
        ("microvm@a", "'microvm@a' is a unit, not the name of a VM; did you mean a?"),
        ("microvm@a\nb", "'microvm@a\\nb' cannot be the name of a VM"),
        ("microvm@", "'microvm@' cannot be the name of a VM"),
        ("microvm@a.service", "did you mean a?"),
        ("a\\x2db", "cannot be"),
        ("ä", "cannot be"),
        ("a\n", "'a\\n' cannot be"),
        ("a%i", "cannot be"),
        ("*", "cannot be"),
        ("a" * 64, "longer than 63"),
        ("\udcff", "cannot be"),
    ],
)
def test_wrong_vm_names(name: str, message: str) -> None:
    with pytest.raises(NameInvalid) as caught:
        names.vm_name(name)
    assert message in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a b", "a:b", "a%d", "a" * 16, "é" * 8])
def test_wrong_interface_names(name: str) -> None:
    with pytest.raises(NameInvalid):
        names.interface_name(name)


@pytest.mark.parametrize("name", ["a", "a" * 15, "é" * 7, "eth0.100", "br-lan", "a@b"])
def test_interface_names(name: str) -> None:
    assert names.interface_name(name) == name


@pytest.mark.parametrize("tag", ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "a\tb", "t" * 37])
def test_wrong_tags(tag: str) -> None:
    with pytest.raises(NameInvalid):
        names.share_tag(tag)


@pytest.mark.parametrize("tag", ["a", "a/b", ".a", "...", "a b", "ü", "t" * 36])
def test_tags(tag: str) -> None:
    assert names.share_tag(tag) == tag


@pytest.mark.parametrize(
    ("text", "address"),
    [("02:00:00:00:00:01", "02:00:00:00:00:01"), ("FE:ff:0A:00:00:01", "fe:ff:0a:00:00:01")],
)
def test_mac_addresses(text: str, address: str) -> None:
    assert names.mac_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "02-00-00-00-00-01", "2:0:0:0:0:1", "02:00:00:00:00", "02:00:00:00:00:01:02"]
    + ["ff:ff:ff:ff:ff:ff", "01:00:00:00:00:00", "00:00:00:00:00:00", "02:00:00:00:00:0x"],
)
def test_wrong_mac_addresses(text: str) -> None:
    with pytest.raises(NameInvalid):
        names.mac_address(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0000:01:00.0", "0000:01:00.0"),
        ("01:00.1", "0000:01:00.1"),
        ("ABCDE:1f:1F.7", "abcde:1f:1f.7"),
        ("*:02:00.0", "*:02:00.0"),
        ("*:*.*", "0000:*:*.*"),
    ],
)
def test_pci_addresses(text: str, address: str) -> None:
    assert names.pci_address(text) == address


@pytest.mark.parametrize(
    "text",
    ["", "01", "01:00", "000:01:00.0", "100000:01:00.0", "0000:1:00.0", "0000:01:20.0"]
    + ["0000:01:00.8", "0000:01:00.", "0000:01:00.00", "a:b:c:d.0", "01:00.0 ", "**:00.0"],
)
def test_wrong_pci_addresses(text: str) -> None:
    with pytest.raises(NameInvalid, match="is not a PCI address"):
        names.pci_address(text)


@pytest.mark.parametrize(
    "text", ["", "x" * 32, "1" * 31, "1-" * 4 + "1" * 28, "{" + "1" * 32 + "}"]
)
def test_wrong_uuids(text: str) -> None:
    with pytest.raises(NameInvalid):
        names.machine_uuid(text)


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a", "a"),
        ("home/alice", "home-alice"),
        ("a-b", "a\\x2db"),
        (".a.b", "\\x2ea.b"),
        ("a b", "a\\x20b"),
        ("ü", "\\xc3\\xbc"),
        ("a@b", "a\\x40b"),
        ("\\", "\\x5c"),
    ],
)
def test_escape(text: str, escaped: str) -> None:
    assert names.escape(text) == escaped


def test_units() -> None:
    assert names.unit("web") == "microvm@web.service"
    assert (
        names.share_unit("web-1", "home/alice", ".socket")
        == "microvm-virtiofsd-web\\x2d1-home-alice.socket"
    )


@pytest.mark.parametrize("vm", ["web", "web-1", "a.b:c_d"])
@pytest.mark.parametrize("tag", ["t", "home/alice", "b-c", "ü x", "a@b.c"])
def test_the_vm_of_a_units_name(vm: str, tag: str) -> None:
    for suffix in (".socket", ".service"):
        assert names.vm_of_share_unit(names.share_unit(vm, tag, suffix)) == vm
    assert names.vm_of_share_unit(names.own_share_unit(vm)) == vm


@pytest.mark.parametrize(
    "unit",
    [
        "microvm-virtiofsd-web-t.target",
        "microvm-virtiofsd-web-t",
        "microvm-virtiofsd-.socket",
        "microvm-virtiofsd--t.socket",
        "microvm-virtiofsd-\\x2eweb-t.socket",
        # Not how systemd-escape(1) writes them.
        "microvm-virtiofsd-web-\\x41.socket",
        "microvm-virtiofsd-web-\\x2D.socket",
        "microvm-virtiofsd-web-\\x2.socket",
        "microvm-virtiofsd-web-\\xff.socket",
        "microvm-virtiofsd@web.service",
        "virtiofsd-web-t.socket",
    ],
)
def test_units_of_others(unit: str) -> None:
    assert names.vm_of_share_unit(unit) is None
