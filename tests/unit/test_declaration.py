# SPDX-License-Identifier: MIT
"""Declarations: what a file may say, and what is said of one that is wrong."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microvm_host import declaration
from microvm_host.declaration import Declaration, plain
from microvm_host.errors import DeclarationError
from microvm_host.source import Source


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('runner = "/a"', Declaration("web", Source("runner", "/a"))),
        ('flake = "github:x/y"', Declaration("web", Source("flake", "github:x/y"))),
        (
            'runner = "/a"\nautostart = false\nrestart_if_changed = false\n',
            Declaration("web", Source("runner", "/a"), False, False),
        ),
        (
            "# a comment\nautostart=true\nrunner='/a b'",
            Declaration("web", Source("runner", "/a b")),
        ),
        (
            'runner = "/a"\norder = 20\nrestart = "on-failure"\nrestart_delay = 0.5\n'
            'restart_limit = 0\nshutdown_timeout = "1h 30min"\nask_again_after = "15"\n'
            'terminate_timeout = "500ms"\n',
            Declaration(
                "web",
                Source("runner", "/a"),
                order=20,
                restart="on-failure",
                restart_delay=0.5,
                restart_limit=0,
                shutdown_timeout=5400.0,
                ask_again_after=15.0,
                terminate_timeout=0.5,
            ),
        ),
        (
            'runner = "/a"\nshutdown_timeout = 5\nrestart_delay = "1min30s"',
            Declaration("web", Source("runner", "/a"), restart_delay=90.0, shutdown_timeout=5.0),
        ),
        ('"runner" = "/ü"\r\n', Declaration("web", Source("runner", "/ü"))),
        ('runner = "/a"\nallow_host_devices = []', Declaration("web", Source("runner", "/a"))),
        (
            'runner = "/a"\nallow_host_devices = [\n  "0000:03:00.0", # the card\n  "AF:1f.7",\n'
            '  "10000:e1:00.0",\n]\n',
            Declaration(
                "web",
                Source("runner", "/a"),
                allow_host_devices=("0000:03:00.0", "0000:af:1f.7", "10000:e1:00.0"),
            ),
        ),
    ],
)
def test_right(tmp_path: Path, text: str, expected: Declaration) -> None:
    path = tmp_path / "web.toml"
    path.write_bytes(text.encode())
    assert declaration.load(str(path)) == expected


@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("more", ["", "[vsock]"])
def test_files_of_any_editor(tmp_path: Path, start: str, end: str, more: str) -> None:
    path = tmp_path / "web.toml"
    path.write_bytes((start + end.join(['runner = "/a"', "order = 3", more, ""])).encode())
    directory = tmp_path / "web.toml.d"
    directory.mkdir()
    (directory / "10.toml").write_bytes((start + f"autostart = true{end}").encode())
    assert declaration.read(str(path)).table["order"] == 3
    assert declaration.read(str(path)).table["autostart"] is True
    # The lines of errors are those that the editor shows.
    (directory / "10.toml").write_bytes((start + f"{end}puzzle = 1{end}").encode())
    with pytest.raises(DeclarationError) as raised:
        declaration.load(str(path))
    assert raised.value.line == 2


WRONG: list[tuple[str | bytes, int | None, str]] = [
    ("", None, "says not what to run; give one of runner"),
    ("autostart = true\n", None, "says not what to run"),
    ('runner = "/a"\nflake = "b"\n', 2, "has both runner and flake"),
    ('\nruner = "/a"\n', 2, "there is no key 'runer'; did you mean runner?"),
    ('runner = "/a"\nauto_start = false\n', 2, "did you mean autostart?"),
    ('runner = "/a"\nrestart-if-changed = true\n', 2, "did you mean restart_if_changed?"),
    ('runner = "/a"\nmemory = 512\n', 2, "there is no key 'memory'; did you mean mem?"),
    ('runner = "/a"\npuzzle = 512\n', 2, "there is no key 'puzzle'; known are runner, flake"),
    ('runner = "/a"\n[network]\nx = 1\n', 2, "there is no key 'network'"),
    ('runner = "/a"\nautostart = "yes"\n', 2, "autostart = 'yes' is not true or false"),
    ('runner = "/a"\nautostart = 1\n', 2, "autostart = 1 is not true or false"),
    ("runner = 3\n", 1, "runner = 3 is not a string"),
    ('runner = ["/a"]\n', 1, "runner = ['/a'] is not a string"),
    ('runner = "/a"\nrestart = "no"\n', 2, "restart = 'no' is none of always, on-failure, never"),
    ('runner = "/a"\nrestart = false\n', 2, "restart = False is none of always"),
    ('runner = "/a"\nrestart_limit = -1\n', 2, "restart_limit = -1 is not between 0 and"),
    ('runner = "/a"\nrestart_limit = 1.0\n', 2, "restart_limit = 1.0 is not a whole number"),
    ('runner = "/a"\norder = true\n', 2, "order = True is not a whole number"),
    ('runner = "/a"\norder = "first"\n', 2, "order = 'first' is not a whole number"),
    ('# x\nrunner = "a"\n', 2, "runner 'a' is not an absolute path; it begins with /"),
    ('runner = ""\n', 1, "is empty"),
    ('runner = "/a\\n/b"\n', 1, "not printable"),
    ('flake = "x#web"\n', 1, "has a '#'"),
    ('flake = "--impure"\n', 1, "looks like an option"),
    (
        'runner = "/a"\nallow_host_devices = "03:00.0"\n',
        2,
        "allow_host_devices = '03:00.0' is not a list",
    ),
    ('runner = "/a"\nallow_host_devices = true\n', 2, "allow_host_devices = True is not a list"),
    (
        'allow_host_devices = ["03:00.0", 3]\nrunner = "/a"\n',
        1,
        "allow_host_devices has 3, which is not a string",
    ),
    (
        'runner = "/a"\n\nallow_host_devices = ["eth0"]\n',
        3,
        "'eth0' is not a PCI address; it looks like 0000:01:00.0, as lspci -D prints it",
    ),
    (
        'runner = "/a"\nallow_host_devices = ["*:03:00.0"]\n',
        2,
        "allow_host_devices has '*:03:00.0', which may stand for several devices; name each by its "
        "address",
    ),
    (
        'runner = "/a"\nallow_host_device = []\n',
        2,
        "there is no key 'allow_host_device'; did you mean allow_host_devices?",
    ),
    ('runner = "/a"\nautostart = yes\n', 2, "is not TOML: Invalid value"),
    ('runner = "/a\n', 1, "is not TOML:"),
    ('runner = "/a"\nrunner = "/b"\n', 2, "is not TOML: Cannot overwrite a value"),
    ("runner", None, "is not TOML:"),
    (b"runner = '\xff'", None, "is not UTF-8 text"),
    (b"\0\x7fELF", 1, "is not TOML:"),
    ("x = " + "1" * 5000, None, "is not TOML:"),
    ("x = " + "[" * 5000, None, "is not TOML:"),
    *(
        (f'runner = "/a"\nshutdown_timeout = {text}\n', 2, "is not a time; write 90")
        for text in (
            *('"soon"', '"90 second s"', '""', '" "', '"s"', '"-5s"', '"1.5.1s"', '"5 5 parsecs"'),
            *('"\u0663s"', "true", "[90]"),
        )
    ),
    *(
        (f'runner = "/a"\nrestart_delay = {text}\n', 2, "is not between 100ms and 24h")
        for text in ("0", "-1", '"0s"', '"99ms"', "86401", '"25h"', "nan", "inf", "1e300")
    ),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG)
def test_wrong(tmp_path: Path, text: str | bytes, line: int | None, message: str) -> None:
    path = tmp_path / "web.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DeclarationError) as caught:
        declaration.load(str(path))
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}:{line}: " if line else f"{path}: ")
    assert caught.value.line == line
    assert caught.value.exit_code == 78
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["-x", "a b", ".a", "a" * 64, "ä"])
def test_wrong_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / f"{name}.toml"
    path.write_text('runner = "/a"')
    with pytest.raises(DeclarationError) as caught:
        declaration.load(str(path))
    assert caught.value.exit_code == 78
    assert str(path) in str(caught.value)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="microVM web is not declared"):
        declaration.load(str(tmp_path / "web.toml"))


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "web.toml").mkdir()
    with pytest.raises(DeclarationError, match="cannot be read: Is a directory"):
        declaration.load(str(tmp_path / "web.toml"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads files of any mode")
def test_unreadable(tmp_path: Path) -> None:
    (tmp_path / "web.toml").write_text('runner = "/a"')
    (tmp_path / "web.toml").chmod(0)
    with pytest.raises(DeclarationError, match="cannot be read: Permission denied"):
        declaration.load(str(tmp_path / "web.toml"))


# ---- plain TOML

# What lines are made of, right and wrong, put together so that many of those drawn are TOML.
_KEYS = ["a", "b-1", "_", "0", "a.b", '"a"', "é", "", " a", "\ta", "a b", "\ufeffa", "[a]"]
_EQUALS = ["=", " = ", "  =", "\t=", "", "=="]
_VALUES = ["true", "True", "false", "0", "7", "01", "+1", "-1", "1_0", "0x1", "123456789", "1e3"]
_VALUES += [
    "1234567890",
    "٣",
    '""',
    '"x y"',
    '"é"',
    "'x'",
    '"""x"""',
    '"\\n"',
    '"\t"',
    '"\x7f"',
    "inf",
]
_VALUES += ["", '"', '"a"b"', '"\u2028"', '"#"', "[1]", "{}", "1979-05-27", "2.5", '"a', "\x7f"]
_ENDS = ["", "", "", " ", " # x", ' # "', "\t", "\r", " x", "#é", "# \x01"]


def _lines() -> st.SearchStrategy[str]:
    parts = (st.sampled_from(each) for each in (_KEYS, _EQUALS, _VALUES, _ENDS))
    line = st.tuples(*parts).map("".join) | st.sampled_from(_ENDS) | st.text(max_size=10)
    return st.lists(line, max_size=3).map("\n".join)


@given(_lines())
def test_plain_toml_is_what_tomllib_reads(text: str) -> None:
    found = plain.table(text)
    if found is not None:
        read = tomllib.loads(text)
        assert found == read
        assert [*map(type, found.values())] == [*map(type, read.values())]


@pytest.mark.parametrize(
    "text",
    [
        "",
        '# one é\n\n  runner = "/a b"  \nautostart=true\norder = 0\n',
        'a-b_1 = "é # \'"\nx = false\ny = 999999999',
    ],
)
def test_usual_declarations_are_plain(text: str) -> None:
    assert plain.table(text) == tomllib.loads(text)


@pytest.mark.parametrize(
    "text",
    ["a = 1\na = 2", "a = 01", 'a = "b" # "c"', 'a = "\\n"', "a = '1'", "a.b = 1", "a = ٣"]
    + ["a = 1\r\n", "[a]", "a", "= 1", 'a = """b"""', 'a = "', "a = 1_0", '"a" = 1', "a = [1]"],
)
def test_what_is_not_plain_is_left_to_tomllib(text: str) -> None:
    assert plain.table(text) is None
