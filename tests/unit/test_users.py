# SPDX-License-Identifier: MIT
"""The user of a VM: its name, its drop-in, and who is taken for it."""

from __future__ import annotations

import os
import pwd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvm_host import names, process, users
from microvm_host.errors import MicrovmHostError, NameInvalid
from microvm_host.paths import HostPaths

VM_NAMES = st.from_regex(r"[A-Za-z0-9:_][A-Za-z0-9:_.-]{0,62}", fullmatch=True)


@pytest.mark.parametrize(
    ("vm", "user"),
    [
        ("web", "microvm-web"),
        ("a_b-3", "microvm-a_b-3"),
        ("x" * 22, f"microvm-{'x' * 22}"),
        # Stable, a host that is made anew gives the same: `printf %s NAME | sha256sum`.
        ("x" * 23, "microvm-xxxxxxxxxxxx-564b146b27"),
        ("Web", "microvm-web-2975104784a401e3880"),
        ("web.example", "microvm-web_example-03bbe82aa48"),
        ("a:b", "microvm-a_b-6783a31eabf68ccc066"),
    ],
)
def test_own_user(vm: str, user: str) -> None:
    assert names.own_user(vm) == user


@given(VM_NAMES)
def test_own_user_is_one(vm: str) -> None:
    assert names.user_name(names.own_user(names.vm_name(vm))).startswith("microvm-")


@given(VM_NAMES, VM_NAMES)
def test_no_two_vms_have_one(one: str, other: str) -> None:
    assert (names.own_user(one) == names.own_user(other)) == (one == other)


def test_the_two_kinds_of_names_do_not_meet() -> None:
    # A VM that is called like the other one's user is cut short itself.
    long = names.own_user("x" * 40).removeprefix("microvm-")
    assert names.own_user(long) not in (names.own_user("x" * 40), f"microvm-{long}")


@pytest.mark.parametrize("text", ["alice", "auto", "_x", "A-1", "x" * 31])
def test_users_that_can_be(text: str) -> None:
    assert users.checked(text) == text


@pytest.mark.parametrize(
    "text", ["", "root", "0", "1000", "-x", "a b", "a.b", "a:b", "ü", "x" * 32, "a\nUser=root"]
)
def test_users_that_cannot_be(text: str) -> None:
    with pytest.raises(NameInvalid):
        users.checked(text)


def test_drop_in() -> None:
    for user, name in (("auto", "microvm-web"), ("alice", "alice")):
        lines = users.drop_in("web", user).splitlines()
        assert [line for line in lines if not line.startswith("#")] == [
            *("[Service]", f"User={name}", "Group=")
        ]


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What was run, in place of running it."""
    argvs: list[list[str]] = []

    def note(argv: list[str]) -> str:
        argvs.append(argv)
        return ""

    monkeypatch.setattr(process, "output", note)
    return argvs


def account(monkeypatch: pytest.MonkeyPatch, name: str, comment: str) -> None:
    entry = pwd.struct_passwd((name, "x", 990, 990, comment, "/", "/bin/false"))
    monkeypatch.setattr(pwd, "getpwnam", lambda asked: entry if asked == name else {}[asked])


def test_a_user_is_made_once(
    host: HostPaths, called: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    account(monkeypatch, "microvm-web", "microVM web")
    users.ensure("web", "auto", host)
    assert called == []
    users.ensure("a:b", "auto", host)
    name = names.own_user("a:b")
    assert called == [
        ["systemd-sysusers", "--inline"]
        + [f'u {name} - "microVM a/b" {host.state}', f"m {name} kvm"]
    ]


def test_a_user_of_somebody_else_is_not_taken(
    host: HostPaths, called: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    account(monkeypatch, "microvm-web", "Web Person")
    with pytest.raises(MicrovmHostError, match="was not made for microVM web") as caught:
        users.ensure("web", "auto", host)
    assert "'Web Person'" in caught.value.message
    # By name it is what the administrator wants.
    users.ensure("web", "microvm-web", host)
    with pytest.raises(MicrovmHostError, match="'nobody-here', who does not exist"):
        users.ensure("web", "nobody-here", host)
    assert called == []


def test_drop_in_of_a_vm_comes_and_goes(host: HostPaths, called: list[list[str]]) -> None:
    path = host.user_drop_in("web")
    assert os.path.basename(path) == users.DROP_IN
    users.remove_drop_in("web", host)
    assert called == []
    users.write_drop_in("web", "auto", host)
    with open(path) as source:
        assert source.read() == users.drop_in("web", "auto")
    users.remove_drop_in("web", host)
    assert not os.path.exists(os.path.dirname(path))
    assert called == [["systemctl", "daemon-reload"]] * 2

    # With one of the administrator's beside it.
    users.write_drop_in("web", "auto", host)
    with open(f"{os.path.dirname(path)}/mine.conf", "w"):
        pass
    users.remove_drop_in("web", host)
    assert os.listdir(os.path.dirname(path)) == ["mine.conf"]


def test_number_of_a_user() -> None:
    assert (users.uid("root"), users.uid("1234")) == (0, 1234)
    with pytest.raises(MicrovmHostError, match="there is no user 'nobody-here'"):
        users.uid("nobody-here")
