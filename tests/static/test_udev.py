# SPDX-License-Identifier: MIT
"""The udev rules: well formed, and giving each node to whom it belongs.

What they do is tried by a reader of the few keys that they use, after udev(7); udev itself tries it
on the virtual host (tests/system/test_virtual.py).
"""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from microvm_host import nodes
from microvm_host.identity import Identity
from microvm_host.paths import HostPaths

REPOSITORY = Path(__file__).parents[2]
(FILE,) = (REPOSITORY / "udev").iterdir()
TEXT = FILE.read_text()

_TOKEN = re.compile(r'([A-Z]+)(?:\{([\w-]+)\})?(==|!=|:=|\+=|=)"([^"]*)"')
_MATCHES = {"ACTION", "SUBSYSTEM", "KERNEL", "ENV", "IMPORT"}

Token = tuple[str, str, str, str]


def rules() -> list[list[Token]]:
    """The rules, each a list of (key, attribute, operator, value)."""
    found = []
    for line in TEXT.splitlines():
        if line and not line.startswith("#"):
            tokens = line.split(", ")
            matched = [_TOKEN.fullmatch(token) for token in tokens]
            assert all(matched), f"cannot be read: {line}"
            found.append([(m[1], m[2] or "", m[3], m[4]) for m in matched if m])
    return found


def apply(subsystem: str, kernel: str, host: HostPaths, action: str = "add") -> dict[str, str]:
    """What the rules assign to a device, by key; `RUN` among them."""
    event = {"ACTION": action, "SUBSYSTEM": subsystem, "KERNEL": kernel}
    environment = {"$kernel": kernel, "$devnode": "/dev/NODE"}
    given: dict[str, str] = {}
    label = ""

    def filled(value: str) -> str:
        for name in sorted(environment, key=len, reverse=True):
            value = value.replace(name, environment[name])
        assert "$" not in value, value
        return value

    def matches(key: str, attribute: str, value: str) -> bool:
        if key == "IMPORT":
            assert attribute == "file"
            path = Path(host.at(filled(value)))
            if not path.is_file():
                return False
            for line in path.read_text().splitlines():
                name, _, text = line.partition("=")
                environment[f"$env{{{name}}}"] = text
            return True
        found = environment.get(f"$env{{{attribute}}}", "") if key == "ENV" else event[key]
        return any(fnmatch.fnmatchcase(found, each) for each in value.split("|"))

    for rule in rules():
        if label:
            if ("LABEL", "", "=", label) in rule:
                label = ""
            continue
        conditions = [token for token in rule if token[0] in _MATCHES]
        if not all(matches(k, a, v) == (op == "==") for k, a, op, v in conditions):
            continue
        for key, _, operator, value in rule:
            if key == "GOTO":
                label = value
            elif key not in (*_MATCHES, "LABEL"):
                given[key + operator.rstrip("=")] = filled(value)
    assert not label, f"{label} is nowhere"
    return given


# ---- form


def test_labels_are_the_files_own_and_lead_on() -> None:
    labels = [value for rule in rules() for key, _, _, value in rule if key == "LABEL"]
    jumps = [value for rule in rules() for key, _, _, value in rule if key == "GOTO"]
    assert len(set(labels)) == len(labels)
    assert set(jumps) == set(labels)
    assert all(label.startswith("microvm_host_") for label in labels)
    assert rules()[-1] == [("LABEL", "", "=", "microvm_host_end")]


def test_guards_come_first() -> None:
    assert rules()[0] == [
        ("ACTION", "", "==", "remove"),
        ("GOTO", "", "=", "microvm_host_end"),
    ]
    assert {rule[0][0] for rule in rules()[1:3]} == {"SUBSYSTEM"}
    assert {rule[-1][0] for rule in rules()[1:3]} == {"GOTO"}


def test_each_block_says_why() -> None:
    header, guards, *blocks, end = TEXT.strip().split("\n\n")
    assert header.startswith("# SPDX-License-Identifier: MIT\n#")
    assert end == 'LABEL="microvm_host_end"'
    assert guards.startswith("ACTION==")
    assert blocks
    for block in blocks:
        assert block.startswith("# "), block
    assert max(map(len, TEXT.splitlines())) <= 100


def test_distribution_has_the_last_word_on_shared_nodes() -> None:
    assert FILE.name < "50-udev-default.rules"
    shared = [rule for rule in rules() if rule[0][0] == "KERNEL"]
    assert len(shared) == 3
    assert not any(operator == ":=" for rule in shared for _, _, operator, _ in rule)


@pytest.mark.skipif(not shutil.which("udevadm"), reason="udevadm is not installed")
def test_udev_understands_them() -> None:
    # `udevadm verify` came with systemd 254.
    known = subprocess.run(["udevadm", "verify", "--help"], capture_output=True)
    if known.returncode:
        pytest.skip("this machine's udevadm cannot verify")
    done = subprocess.run(
        ["udevadm", "verify", "--resolve-names=never", str(FILE)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


# ---- effect

MICROVM = Identity("microvm", 987, "kvm", 104)
ALICE = Identity("alice", 1000, "kvm", 104)
SYSTEM_USER_OF_PEOPLES_GROUP = Identity("backup", 34, "people", 1000)


@pytest.fixture
def host(tmp_path: Path) -> HostPaths:
    return HostPaths(str(tmp_path))


OF_ONE_VM = [("macvtap", "tap7"), ("vfio", "12"), ("vfio-dev", "vfio0")]
of_one_vm = pytest.mark.parametrize(("subsystem", "kernel"), OF_ONE_VM)


def test_subsystems_are_those_that_nodes_knows() -> None:
    assert [subsystem for subsystem, _ in OF_ONE_VM] == list(nodes.SUBSYSTEMS)
    assert f'SUBSYSTEM!="{"|".join(nodes.SUBSYSTEMS)}"' in TEXT


@of_one_vm
@pytest.mark.parametrize("action", ["add", "change", "bind"])
def test_node_of_a_vm(host: HostPaths, subsystem: str, kernel: str, action: str) -> None:
    nodes.claim(kernel, MICROVM, host)
    # All by the operator that later rules cannot change.
    assert apply(subsystem, kernel, host, action) == {
        "OWNER:": "987",
        "GROUP:": "104",
        "MODE:": "0600",
    }


@of_one_vm
@pytest.mark.parametrize("identity", [ALICE, SYSTEM_USER_OF_PEOPLES_GROUP])
def test_node_of_a_persons_vm(
    host: HostPaths, subsystem: str, kernel: str, identity: Identity
) -> None:
    nodes.claim(kernel, identity, host)
    assert apply(subsystem, kernel, host) == {
        "MODE:": "0600",
        "RUN+": f"/bin/chown {identity.uid}:{identity.gid} /dev/NODE",
    }


@of_one_vm
def test_node_that_is_none_of_ours(host: HostPaths, subsystem: str, kernel: str) -> None:
    nodes.claim("another", MICROVM, host)
    assert apply(subsystem, kernel, host) == {}
    nodes.claim(kernel, MICROVM, host)
    assert apply(subsystem, kernel, host, "remove") == {}
    nodes.release(kernel, host)
    assert apply(subsystem, kernel, host) == {}


@pytest.mark.parametrize("subsystem", ["net", "misc", "block"])
def test_claim_is_for_its_subsystems_only(host: HostPaths, subsystem: str) -> None:
    nodes.claim("tap7", MICROVM, host)
    assert apply(subsystem, "tap7", host) == {}


@pytest.mark.parametrize("kernel", ["vhost-net", "vhost-vsock"])
def test_shared_nodes(host: HostPaths, kernel: str) -> None:
    given = {"GROUP": "kvm", "MODE": "0660"}
    assert apply("misc", kernel, host) == {**given, "OPTIONS+": f"static_node={kernel}"}
    assert apply("misc", "iommu", host) == given
    assert apply("net", kernel, host) == {}
    # The kernel's own mode is right.
    assert apply("misc", "vfio", host) == {}
    assert apply("misc", "kvm", host) == {}
