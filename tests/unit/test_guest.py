# SPDX-License-Identifier: MIT
"""What is derived, what is claimed, the schema, and microvm.nix's own files for its examples."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

from microvm_host import declaration, names, runner
from microvm_host.build.tree import File
from microvm_host.declaration import claims, derived, guest, schema
from microvm_host.declaration.kinds import Choice, List, Map, Number, Table, Text, Truth
from microvm_host.declaration.nearest import nearest
from microvm_host.errors import DeclarationError
from microvm_host.paths import HostPaths

from .test_declared_golden import DIRECTORY, RIGHT, tree

REPOSITORY = Path(__file__).parents[2]


def test_the_generator_knows_the_keys_of_guests() -> None:
    assert tuple(schema.GUEST.keys) == declaration.GUEST_KEYS
    assert set(schema._HOST) == set(declaration._KEYS)
    assert not set(declaration.GUEST_KEYS) & set(declaration._KEYS)
    assert schema.RESERVED_ARGUMENTS == runner._RESERVED_ARGUMENTS


# ---- derived


def test_derived_names_stay() -> None:
    """They are in guests' configurations by now: another algorithm would be another machine."""
    assert derived.mac("web", "web0") == "02:81:32:80:a5:9f"
    assert derived.cid("web") == 1950326604
    # As options.nix of microvm.nix makes it: echo -n microvm.nix:web | sha256sum
    assert derived.machine_id("web") == "dc449f31-234a-af5f-a0e8-2c21ab644d76"


def test_hosts_derive_other_names(host: HostPaths) -> None:
    """Two hosts have a VM of the same name on one network."""
    assert derived.host_id(host.machine_id) == ""
    Path(host.machine_id).parent.mkdir(parents=True)
    Path(host.machine_id).write_text("0123456789abcdef0123456789abcdef\n")
    found = derived.host_id(host.machine_id)
    assert found == "0123456789abcdef0123456789abcdef"
    # Stable, whatever version comes.
    assert derived.mac("web", "web0", found) == "02:73:87:42:71:89"
    assert derived.machine_id("web", found) == "f87b1fdd-a39d-960b-8e3d-508560df8049"
    hosts = ("", found, found[::-1])
    assert len({derived.mac("web", "web0", each) for each in hosts}) == 3
    assert len({derived.machine_id("web", each) for each in hosts}) == 3


def test_derived_names_are_right_and_apart() -> None:
    macs = {derived.mac(f"vm{n}", f"eth{m}") for n in range(100) for m in range(10)}
    assert len(macs) == 1000
    for mac in macs:
        assert names.mac_address(mac) == mac
        # Locally administered.
        assert int(mac[:2], 16) & 2
    cids = {derived.cid(f"vm{n}") for n in range(1000)}
    assert len(cids) == 1000
    assert all(3 <= cid < 0xFFFFFFFF for cid in cids)
    # Neither name runs into the other.
    assert derived.mac("a", "bc") != derived.mac("ab", "c")


def declared(directory: Path, vm: str, share: str) -> guest.Guest:
    path = directory / f"{vm}.toml"
    path.write_text(
        f'kernel = "/k"\ninitrd = "/i"\n[[shares]]\nproto = "virtiofs"\nsource = "/srv"\n{share}\n'
    )
    return guest.load(str(path))[0]


@pytest.mark.parametrize("length", [1, 36, 37, 61, names.VM_NAME_MAX])
def test_a_default_socket_is_one_whatever_the_names(tmp_path: Path, length: int) -> None:
    """The start would be refused over a path that is too long, and nobody chose it."""
    vm = "v" * length
    tags = ["d", "t" * names.TAG_MAX, "t" * (names.TAG_MAX - 1)]
    sockets = []
    for tag in tags:
        (share,) = declared(tmp_path, vm, f'tag = "{tag}"').virtiofs
        assert share.socket is not None
        sockets.append(share.socket)
        assert len(f"/var/lib/microvms/{vm}/{share.socket}") <= 107
    assert len({*sockets}) == len(tags)
    # What fits is called as microvm.nix calls it.
    assert (sockets[0] == f"{vm}-virtiofs-d.sock") == (length < 37)


@pytest.mark.parametrize(("vm", "length"), [("web", 85), ("v" * names.VM_NAME_MAX, 25)])
def test_a_socket_of_a_declaration_that_makes_too_long_a_path(
    tmp_path: Path, vm: str, length: int
) -> None:
    fits = "s" * length
    (share,) = declared(tmp_path, vm, f'tag = "t"\nsocket = "{fits}"').virtiofs
    assert share.socket == fits
    with pytest.raises(
        DeclarationError, match="makes a path that is too long for a socket"
    ) as caught:
        declared(tmp_path, vm, f'tag = "t"\nsocket = "{fits}s"')
    assert (caught.value.path, caught.value.line) == (str(tmp_path / f"{vm}.toml"), 7)


# ---- claims


def test_claims(host: HostPaths) -> None:
    directory = Path(host.declarations)
    directory.mkdir(parents=True)
    tap = '[[interfaces]]\ntype = "tap"\nid = "t0"\nmac = "02:AB:00:00:00:01"\n'
    (directory / "one.toml").write_text(f"vsock = {{}}\n{tap}")
    (directory / "two.toml").write_text('vsock.cid = 5\n[[interfaces]]\ntype = "user"\nid = "t0"\n')
    (directory / "odd.toml").write_text("interfaces = [1, {}, {id = 5}, {id = 'x', mac = 5}]\n")
    (directory / "broken.toml").write_text("x")
    (directory / "no name.toml").write_text("vsock.cid = 5")
    (directory / "runner.toml").write_text('runner = "/srv/x"')
    assert claims.gather(str(directory)) == {
        (claims.CID, str(derived.cid("one"))): ["one"],
        (claims.CID, "5"): ["two"],
        (claims.INTERFACE, "t0"): ["one"],
        (claims.INTERFACE, "x"): ["odd"],
        (claims.MAC, "02:ab:00:00:00:01"): ["one"],
    }
    assert claims.gather(host.at("/nonexistent")) == {}


# ---- the schema for editors


def test_schema_for_editors_is_up_to_date() -> None:
    path = REPOSITORY / "data/microvm.schema.json"
    text = json.dumps(schema.json_schema(), indent=2) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.read_text() == text, "UPDATE_GOLDEN=1 would write it"


def fits(value: object, wanted: dict[str, object]) -> bool:
    """Whether a value is one of a schema, as far as ours use the language."""
    kinds = {"string": str, "boolean": bool, "integer": int, "array": list, "object": dict}
    if "enum" in wanted:
        return value in wanted["enum"]  # type: ignore[operator]
    if isinstance(wanted["type"], list):
        return isinstance(value, str | int | float) and not isinstance(value, bool)
    if isinstance(value, bool):
        return wanted["type"] == "boolean"
    if not isinstance(value, kinds[str(wanted["type"])]):
        return False
    if isinstance(value, int):
        return wanted["minimum"] <= value <= wanted["maximum"]  # type: ignore[operator]
    if isinstance(value, str):
        pattern = str(wanted.get("pattern", ""))
        return len(value) >= int(str(wanted.get("minLength", 0))) and bool(
            re.search(pattern, value)
        )
    if isinstance(value, list):
        return all(fits(each, wanted["items"]) for each in value)  # type: ignore[arg-type]
    assert isinstance(value, dict)
    properties: dict[str, dict[str, object]] = wanted.get("properties", {})  # type: ignore[assignment]
    other = wanted["additionalProperties"]
    if any(key not in value for key in wanted.get("required", ())):  # type: ignore[attr-defined]
        return False
    return all(
        fits(each, properties[key])
        if key in properties
        else isinstance(other, dict) and fits(each, other)
        for key, each in value.items()
    )


CASES = sorted(DIRECTORY.glob("*/*.toml"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}/{case.stem}")
def test_schema_takes_what_the_toolkit_takes(case: Path) -> None:
    """And refuses what is wrong in a single key, by its type, its name or its choices."""
    try:
        table = tomllib.loads(case.read_text())
    except tomllib.TOMLDecodeError:
        return
    found = fits(table, schema.json_schema())
    if case.parent.name == "right":
        assert found
    elif case.parent.name == "wrong":
        said = case.with_suffix(".expected").read_text()
        plain = ("is not a whole number", "is none of", "is not true or false", "there is no key")
        if any(word in said for word in (*plain, "is not a list", "is not between")):
            assert not found or ".toml.d/" in said


DROP_INS = sorted(DIRECTORY.glob("right/*.toml.d/*.toml"))
DOCUMENTED = [
    block.partition("\n```")[0]
    for page in sorted((REPOSITORY / "docs").glob("*.md"))
    for block in page.read_text().split("```toml\n")[1:]
]


@pytest.mark.parametrize("text", [*(case.read_text() for case in DROP_INS), *DOCUMENTED])
def test_schema_takes_drop_ins_and_what_is_documented(text: str) -> None:
    """A drop-in says of an element of a list what it changes, and which one it means."""
    assert fits(tomllib.loads(text), schema.json_schema())


def test_schema_wants_to_know_which_element_is_changed() -> None:
    assert len(DROP_INS) >= 2 and len(DOCUMENTED) >= 10
    assert not fits({"interfaces": [{"mac": "02:00:00:00:00:01"}]}, schema.json_schema())


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("VCPU", ["mem", "vcpu"], "vcpu"),
        ("restart-delay", ["restart_delay"], "restart_delay"),
        ("kernal", ["kernel", "key"], "kernel"),
        ("macAddress", ["id", "mac", "macvtap"], "mac"),
        ("memory", ["me", "mem"], "mem"),
        ("colour", ["id", "mac"], None),
        ("id", ["identical", "inside"], None),
        ("", ["id"], None),
    ],
)
def test_nearest_name(word: str, known: list[str], meant: str | None) -> None:
    assert nearest(word, known) == meant


def test_each_kind_describes_itself() -> None:
    for kind in (Text(), Truth(), Number(1, 2), Choice("a"), List(Text()), Map(Text(), Text())):
        assert kind.schema()
    assert Table({}).schema() == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }


# ---- microvm.nix's files

# What microvm.nix writes for the same configuration, from its lib/runner.nix: echo, one fact a
# file. Without the sources' own names of derivations, and with all else.
EXAMPLES: dict[str, dict[str, str]] = {
    "example-tap": {"tap-flags": "vnet_hdr\nmulti_queue\n", "tap-interfaces": "vm-a1\n"},
    "example-user": {"tap-flags": "vnet_hdr\n"},
    "example-shares": {
        "tap-flags": "vnet_hdr\n",
        "virtiofs/ro-store/source": "/nix/store\n",
        "virtiofs/ro-store/socket": "example-shares-virtiofs-ro-store.sock\n",
        "virtiofs/home/alice/source": "/srv/home alice\n",
        "virtiofs/home/alice/socket": "alice.sock\n",
    },
    "example-passthrough": {
        "tap-flags": "vnet_hdr\n",
        "pci-devices": "0000:06:00.1\n06:10.4\n",
        "usb-devices": "vendorid=0xabcd,productid=0x0123\n",
    },
    "example-vsock": {"tap-flags": "vnet_hdr\n", "vsock-cid": "42\n"},
    "macvtap": {
        "tap-flags": "vnet_hdr\n",
        "macvtap-interfaces": "m0 02:00:00:00:00:0a eth0 bridge\n",
    },
}
# This project's additions, which microvm.nix does not write (docs/runner-package.md).
ADDITIONS = {"control-protocol", "control-socket", "event-log", "machine-uuid", "readiness"} | {
    *("agent-socket", "console-socket", "image-sources", "notify-socket", "private-files"),
    *("tap-bridges", "tap-macs", "tap-mtus", "macvtap-mtus", "temporary-files"),
    *("image-origins", "images"),
    *("read-only", "cache", "posix-acl", "extra-args"),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_have_the_bytes_of_microvm_nix(name: str) -> None:
    case = next(case for case in RIGHT if case.stem == name)
    found = {
        path.removeprefix("share/microvm/"): entry.content.decode()
        for path, entry in tree(case).entries
        if path.startswith("share/microvm/") and isinstance(entry, File)
    }
    ours = {path: text for path, text in found.items() if path.split("/")[-1] not in ADDITIONS}
    assert ours == {**EXAMPLES[name], "hypervisor": "qemu\n"}
    programs = {path for path, _ in tree(case).entries if path.startswith("bin/")}
    registers = {"bin/microvm-register", "bin/microvm-unregister"}
    assert programs >= {"bin/microvm-run", "bin/microvm-shutdown"}
    assert (programs >= registers) == (name == "example-vsock")


def test_documented_examples_are_the_tested_ones() -> None:
    text = (REPOSITORY / "docs/declarations.md").read_text()
    shown = re.findall(r"^```toml\n# (example-[a-z]+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in shown} == {name for name in EXAMPLES if name != "macvtap"}
    for name, body in shown:
        assert tomllib.loads(body) == tomllib.loads((DIRECTORY / f"right/{name}.toml").read_text())


# ---- the scripts


@pytest.mark.parametrize("shell", ["sh", "bash"])
def test_scripts_are_shell(shell: str) -> None:
    for case in RIGHT:
        for path, entry in tree(case).entries:
            if isinstance(entry, File) and entry.content.startswith(b"#!/bin/sh"):
                done = subprocess.run([shell, "-n"], input=entry.content, capture_output=True)
                assert (done.returncode, done.stderr) == (0, b""), f"{case.stem}: {path}"


def test_an_image_is_made_once_and_whole(tmp_path: Path) -> None:
    """The script as it is, but for QEMU, which says that it ran."""
    case = next(case for case in RIGHT if case.stem == "volume-colon")
    text = tree(case).text("bin/microvm-run").replace("/usr/bin/qemu-system-x86_64", "echo")
    script = tmp_path / "pkg/bin/microvm-run"
    script.parent.mkdir(parents=True)
    script.write_text(text)
    state = tmp_path / "state"
    state.mkdir()
    for _ in range(2):
        done = subprocess.run(["sh", "-eu", str(script)], cwd=state, capture_output=True, text=True)
        assert done.returncode == 0 and "-name volume-colon" in done.stdout, done.stderr
        assert sorted(os.listdir(state)) == ["-rf", "nbd:disk.img"]
        (state / "nbd:disk.img").write_bytes(b"data")
    assert (state / "nbd:disk.img").read_bytes() == b"data"
