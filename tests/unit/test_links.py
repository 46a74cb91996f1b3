# SPDX-License-Identifier: MIT
"""Taps and macvtaps: what is planned on a host whose /sys/class/net is made up."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from microvm_host import interfaces, links, log, netlink, nodes
from microvm_host.errors import MicrovmHostError
from microvm_host.identity import Identity
from microvm_host.links import AdoptTap, CreateMacvtap, CreateTap
from microvm_host.paths import HostPaths
from microvm_host.record import Record
from microvm_host.runner import Macvtap, Tap

NOBODY = Identity("nobody", 65534, "nogroup", 65534)
PLAIN = "0x5002"  # IFF_TAP | IFF_NO_PI | IFF_VNET_HDR


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    for word in ("notice", "warning", "error"):
        monkeypatch.setattr(log, word, lambda text, word=word: lines.append(text))
    return lines


def interface(host: HostPaths, name: str, **attributes: str) -> Path:
    """A made-up interface with attributes, `DIRECTORY=""` for an empty directory."""
    device = Path(host.net_device(name))
    device.mkdir(parents=True)
    for attribute, value in {"ifindex": "7", **attributes}.items():
        if value:
            (device / attribute).write_text(f"{value}\n")
        else:
            (device / attribute).mkdir()
    return device


def tap(
    host: HostPaths, name: str, flags: str = PLAIN, owner: int = 65534, group: int = 65534
) -> None:
    interface(host, name, tun_flags=flags, owner=str(owner), group=str(group))


# ---- flags


@pytest.mark.parametrize(
    ("vnet_hdr", "multi_queue", "flags"),
    [(False, False, 0x1002), (True, False, 0x5002), (False, True, 0x1102), (True, True, 0x5102)],
)
def test_tap_flags(vnet_hdr: bool, multi_queue: bool, flags: int) -> None:
    assert links.tap_flags(Tap("a", vnet_hdr, multi_queue)) == flags


# ---- taps


def test_new_taps(host: HostPaths) -> None:
    interface(host, "br0", bridge="")
    wanted = [Tap("a"), Tap("b", bridge="br0")]
    steps = links.plan_taps("web", wanted, NOBODY, host)
    assert steps == [CreateTap(each, NOBODY, host) for each in wanted]
    assert [step.describe() for step in steps] == [
        "create tap a for nobody",
        "create tap b for nobody, joined to br0",
    ]


def test_tap_that_is_just_right(host: HostPaths) -> None:
    tap(host, "a")
    tap(host, "b", "0x5102", group=-1)
    steps = links.plan_taps("web", [Tap("a"), Tap("b", multi_queue=True)], NOBODY, host)
    assert steps == [AdoptTap(Tap("a"), host), AdoptTap(Tap("b", multi_queue=True), host)]
    assert steps[0].describe() == "use tap a, which is there already"


def test_flags_that_do_not_matter(host: HostPaths) -> None:
    # IFF_PERSIST, which the kernel adds.
    tap(host, "a", "0x5802")
    assert links.plan_taps("web", [Tap("a")], NOBODY, host) == [AdoptTap(Tap("a"), host)]


@pytest.mark.parametrize(
    ("flags", "owner", "group", "message"),
    [
        (PLAIN, 0, 65534, "tap a exists and belongs to user root, group nogroup, not to nobody"),
        (PLAIN, 65534, 0, "belongs to user nobody, group root, not to nobody:nogroup"),
        (PLAIN, -1, -1, "belongs to user nobody in particular, group any"),
        (PLAIN, 4000000000, 65534, "belongs to user 4000000000"),
        ("0x1002", 65534, 65534, "is without vnet_hdr and multi_queue, not vnet_hdr"),
        ("0x5102", 65534, 65534, "tap a exists and is vnet_hdr multi_queue, not vnet_hdr"),
        ("0x4002", 65534, 65534, "is vnet_hdr with packet information, not vnet_hdr"),
        ("0x1001", 65534, 65534, "is a tun, not vnet_hdr"),
    ],
)
def test_tap_that_is_not_right(
    host: HostPaths, flags: str, owner: int, group: int, message: str
) -> None:
    tap(host, "a", flags, owner, group)
    with pytest.raises(MicrovmHostError) as caught:
        links.plan_taps("web", [Tap("new"), Tap("a")], NOBODY, host)
    assert message in str(caught.value).replace("group 65534", "group nogroup")
    assert "ip link del a" in caught.value.hint
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("attributes", "kind"),
    [
        ({"bridge": ""}, "a bridge"),
        ({"device": ""}, "a network card"),
        ({"uevent": "DEVTYPE=vlan\nINTERFACE=a"}, "a vlan interface"),
        ({"uevent": "INTERFACE=a"}, "an interface of another kind"),
        ({}, "an interface of another kind"),
    ],
)
def test_name_of_something_else(host: HostPaths, attributes: dict[str, str], kind: str) -> None:
    interface(host, "a", **attributes)
    with pytest.raises(MicrovmHostError, match=f"a is no tap but {kind}"):
        links.plan_taps("web", [Tap("a")], NOBODY, host)


@pytest.mark.parametrize("verb", ["tap", "adopted"])
def test_tap_of_another_vm(host: HostPaths, verb: str) -> None:
    tap(host, "a")
    Record(host.record("db", "tap-interfaces")).append(verb, "a", "7")
    with pytest.raises(MicrovmHostError, match="tap a is in use by microVM db"):
        links.plan_taps("web", [Tap("a")], NOBODY, host)


def port(host: HostPaths, name: str, bridge: str) -> None:
    """Make a made-up interface a port of a made-up bridge."""
    os.symlink(f"../{bridge}", f"{host.net_device(name)}/master")


def test_tap_that_has_to_join_its_bridge(host: HostPaths) -> None:
    interface(host, "br0", bridge="")
    for name in ("a", "b"):
        tap(host, name)
    port(host, "b", "br0")
    steps = links.plan_taps("web", [Tap("a", bridge="br0"), Tap("b", bridge="br0")], NOBODY, host)
    assert [step.describe() for step in steps] == [
        "use tap a, which is there already, and join it to br0",
        "use tap b, which is there already",
    ]


def test_tap_on_another_bridge(host: HostPaths) -> None:
    for name in ("br0", "br1"):
        interface(host, name, bridge="")
    tap(host, "a")
    port(host, "a", "br1")
    with pytest.raises(MicrovmHostError, match="tap a exists and is on br1, not on br0") as caught:
        links.plan_taps("web", [Tap("a", bridge="br0")], NOBODY, host)
    assert caught.value.hint == "take it off: ip link set a nomaster"


def test_tap_of_a_larger_mtu_than_its_bridge(host: HostPaths) -> None:
    interface(host, "br0", bridge="", mtu="1500")
    assert links.plan_taps("web", [Tap("a", bridge="br0", mtu=1400)], NOBODY, host)
    with pytest.raises(MicrovmHostError, match="has an MTU of 9000, but its bridge br0 has 1500"):
        links.plan_taps("web", [Tap("a", bridge="br0", mtu=9000)], NOBODY, host)


def test_altnames_are_told(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """sysfs has no directory for them, and the kernel takes no interface of such a name."""
    monkeypatch.setattr(interfaces, "main_name", lambda name: {"enp1s0": "eth0"}.get(name))
    interface(host, "eth0")
    with pytest.raises(MicrovmHostError, match="enp1s0, the bridge of tap a, is another") as caught:
        links.plan_taps("web", [Tap("a", bridge="enp1s0")], NOBODY, host)
    assert caught.value.hint.startswith("write eth0, or remove the altname: ip link property")
    macvtap = Macvtap("m", MACVTAP.mac, "enp1s0", "vepa")
    with pytest.raises(MicrovmHostError, match=r"below macvtap m, is another .* interface eth0"):
        links.plan_macvtaps([macvtap], NOBODY, host)


@pytest.mark.parametrize("exists", [False, True])
def test_bridge_that_is_none(
    host: HostPaths, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "BRIDGE_APPEARS_WITHIN", 0.1)
    if exists:
        interface(host, "eth0", device="")
    with pytest.raises(MicrovmHostError, match="join eth0, which is no bridge of this host"):
        links.plan_taps("web", [Tap("a", bridge="eth0")], NOBODY, host)
    with pytest.raises(MicrovmHostError) as caught:
        links.plan_taps("web", [Tap("a", bridge="mvbr0")], NOBODY, host)
    assert caught.value.hint == "create it: microvm network enable"


def test_bridge_that_comes_late(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    def sleep(seconds: float) -> None:
        os.makedirs(f"{host.net_device('br0')}/bridge")

    monkeypatch.setattr("time.sleep", sleep)
    (step,) = links.plan_taps("web", [Tap("a", bridge="br0")], NOBODY, host)
    assert step.describe() == "create tap a for nobody, joined to br0"


def test_without_tun(host: HostPaths) -> None:
    (step,) = links.plan_taps("web", [Tap("a")], NOBODY, host)
    record = Record(host.record("web", "tap-interfaces"))
    with pytest.raises(MicrovmHostError, match="cannot make taps: No such file") as caught:
        step.apply(record)
    assert (caught.value.path, caught.value.hint) == (host.tun, "modprobe tun")
    assert record.read() == []


# ---- macvtaps

MACVTAP = Macvtap("m0", "02:00:00:00:00:01", "eth0", "bridge")


def test_new_macvtap(host: HostPaths) -> None:
    interface(host, "eth0")
    steps = links.plan_macvtaps([MACVTAP], NOBODY, host)
    assert steps == [CreateMacvtap(MACVTAP, NOBODY, host)]
    assert steps[0].describe() == "create macvtap m0 on eth0 for nobody"


def test_macvtap_on_nothing(host: HostPaths) -> None:
    with pytest.raises(MicrovmHostError, match="m0 is to stand on eth0, which this host lacks"):
        links.plan_macvtaps([MACVTAP], NOBODY, host)


def test_macvtap_of_a_name_that_is_taken(host: HostPaths) -> None:
    interface(host, "eth0")
    interface(host, "m0", uevent="DEVTYPE=macvtap")
    with pytest.raises(MicrovmHostError, match="the name belongs to a macvtap interface"):
        links.plan_macvtaps([MACVTAP], NOBODY, host)


def test_macvtaps_node_is_handed_over_and_then_claimed(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = Path(host.macvtap_node(7))
    node.parent.mkdir()
    node.write_text("")
    record = Record(host.record("web", "macvtap-interfaces"))
    seen: list[tuple[str, Identity, bool, list[list[str]]]] = []
    monkeypatch.setattr(links, "interface_index", lambda name: {"m0": 7}[name])
    monkeypatch.setattr(
        nodes,
        "hand_over",
        lambda path, identity: seen.append(
            (path, identity, os.path.exists(host.node_owner("tap7")), record.read())
        ),
    )
    CreateMacvtap(MACVTAP, NOBODY, host)._hand_over_node(record)
    assert seen == [(str(node), NOBODY, False, [])]
    assert record.read() == [["node", "tap7"]]
    assert "=65534\n" in Path(host.node_owner("tap7")).read_text()

    assert links.undo_macvtaps(record, host) == []
    assert os.listdir(host.records) == []


def test_claim_that_fails_is_written_down_before(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(host.macvtap_node(7)).parent.mkdir()
    Path(host.macvtap_node(7)).write_text("")
    record = Record(host.record("web", "macvtap-interfaces"))
    monkeypatch.setattr(links, "interface_index", lambda _: 7)
    monkeypatch.setattr(nodes, "hand_over", lambda *_: None)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(nodes, "claim", killed)
    with pytest.raises(KeyboardInterrupt):
        CreateMacvtap(MACVTAP, NOBODY, host)._hand_over_node(record)
    assert record.read() == [["node", "tap7"]]


# ---- undoing: what has gone, and what is another's by now


def test_undo_of_what_never_happened(host: HostPaths, said: list[str]) -> None:
    for undo, what, fields in (
        (links.undo_taps, "tap-interfaces", ("tap", "mvh-no-such", "7")),
        (links.undo_taps, "tap-interfaces", ("adopted", "mvh-no-such", "7")),
        (links.undo_taps, "tap-interfaces", ("raised", "mvh-no-such")),
        (links.undo_taps, "tap-interfaces", ("raised", "mvh-no-such", "7")),
        (links.undo_taps, "tap-interfaces", ("joined", "mvh-no-such", "7", "br0", "1500")),
        (links.undo_macvtaps, "macvtap-interfaces", ("macvtap", "mvh-no-such", "7")),
        (links.undo_macvtaps, "macvtap-interfaces", ("node", "tap7")),
    ):
        record = Record(host.record("web", what))
        record.append(*fields)
        assert undo(record, host) == []
        assert record.read() == []
    assert said == []


def test_undo_leaves_what_somebody_else_made(host: HostPaths, said: list[str]) -> None:
    tap(host, "mvh-no-such")
    for fields in (
        ("tap", "mvh-no-such", "6"),
        ("raised", "mvh-no-such", "6"),
        ("joined", "mvh-no-such", "6", "br0", "1500"),
    ):
        said.clear()
        record = Record(host.record("web", "tap-interfaces"))
        record.append(*fields)
        assert links.undo_taps(record, host) == []
        assert said == ["mvh-no-such was made anew by somebody else and is left alone"]

    interface(host, "mvh-no-mac", address=MACVTAP.mac)
    record = Record(host.record("web", "macvtap-interfaces"))
    record.append("macvtap", "mvh-no-mac", "6")
    assert links.undo_macvtaps(record, host) == []
    assert said == [
        f"{name} was made anew by somebody else and is left alone"
        for name in ("mvh-no-such", "mvh-no-mac")
    ]


def test_node_of_a_macvtap_that_has_gone_is_released(host: HostPaths) -> None:
    record = Record(host.record("web", "macvtap-interfaces"))
    for number, name in ((7, "mvh-no-such"), (8, "mvh-neither")):
        record.append("macvtap", name, str(number))
        record.append("node", f"tap{number}")
        nodes.claim(f"tap{number}", NOBODY, host)
    nodes.claim("tap9", NOBODY, host)
    assert links.undo_macvtaps(record, host) == []
    assert record.read() == []
    # That of another VM.
    assert os.listdir(os.path.dirname(host.node_owner("tap9"))) == ["tap9"]


def test_node_that_cannot_be_released_keeps_nothing_else(
    host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[str] = []

    def delete(doomed: dict[str, int], _: HostPaths) -> list[str]:
        deleted.extend(doomed)
        return []

    monkeypatch.setattr(links, "delete", delete)
    # The VM's user, who may open its node, has given it another address.
    interface(host, "m0", address="02:00:00:00:00:99")
    os.makedirs(host.node_owner("tap7"))
    record = Record(host.record("web", "macvtap-interfaces"))
    record.append("macvtap", "m0", "7")
    record.append("node", "tap7")
    (problem,) = links.undo_macvtaps(record, host)
    assert "cannot be released" in problem
    assert deleted == ["m0"]
    assert len(record.read()) == 2


def test_undo_names_what_stays(
    host: HostPaths, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The kernel answers, but the interfaces are still there.
    asked: list[tuple[int, int, bytes]] = []
    monkeypatch.setattr(
        netlink,
        "request",
        lambda _, kind, index, attributes=b"": asked.append((kind, index, attributes)),
    )
    for name, index in (("a", "11"), ("b", "12")):
        interface(host, name, ifindex=index)
    record = Record(host.record("web", "tap-interfaces"))
    record.append("tap", "a", "11")
    record.append("tap", "b", "12")
    assert links.undo_taps(record, host) == [
        "interface b could not be deleted",
        "interface a could not be deleted",
    ]
    assert len(record.read()) == 2
    group = asked[0][2]
    # Two at one stroke, by a group that is nobody else's.
    assert asked == [(19, 12, group), (19, 11, group), (17, 0, group)]
    length, kind, number = struct.unpack("=HHI", group)
    assert (length, kind) == (8, 27) and 2**30 <= number < 2**31


def test_one_tap_is_deleted_by_its_index(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def request(_: object, kind: int, index: int) -> None:
        asked.append((kind, index))
        os.rename(host.net_device("a"), host.at("/gone"))

    monkeypatch.setattr(netlink, "request", request)
    tap(host, "a")
    record = Record(host.record("web", "tap-interfaces"))
    record.append("tap", "a", "7")
    assert links.undo_taps(record, host) == []
    assert asked == [(17, 7)]
    assert record.read() == []


# ---- the kernel's word, for which no right is needed


def test_loopback() -> None:
    if not os.path.isdir(HostPaths().net_device("lo")):
        pytest.skip("this host has no interface lo")
    assert interfaces.interface_index("lo") == 1
    interfaces.get_flags("lo")


def test_interface_that_is_missing() -> None:
    with pytest.raises(MicrovmHostError, match="interface mvh-no-such: No such device"):
        interfaces.interface_index("mvh-no-such")


@pytest.mark.usefixtures("said")
def test_undo_of_lines_that_nobody_writes(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is done for them, the rest is undone, and the record stays to tell."""
    deleted: dict[str, int] = {}

    def delete(doomed: dict[str, int], _: HostPaths) -> list[str]:
        deleted.update(doomed)
        return []

    monkeypatch.setattr(links, "delete", delete)
    interface(host, "a")
    strange = [["tap"], ["tap", "a"], ["tap", "../a", "7"], ["x", "a", "7"]]
    strange += [["raised", "a b"], [""]]
    for what, undo, right in (
        ("tap-interfaces", links.undo_taps, ["tap", "a", "7"]),
        ("macvtap-interfaces", links.undo_macvtaps, ["macvtap", "a", "7"]),
    ):
        record = Record(host.record("web", what))
        for line in (*strange, right):
            record.append(*line)
        deleted.clear()
        problems = undo(record, host)
        assert deleted == {"a": 7}
        assert [problem.count("is no line of this record") for problem in problems] == [1] * 6
        assert len(record.read()) == 7
