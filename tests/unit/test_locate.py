# SPDX-License-Identifier: MIT
"""Each key and value of a TOML text is found in its line."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microvm_host.declaration.locate import line, lines

Path = tuple[str | int, ...]

TEXT = """\
# comment = 1
a = 1
"b c" = "x = 2 # no comment"  # kernel = 3
d.e."f.g" = [
    1, # one
    "two",
    [ 3,
      4 ],
]
h = { i = 1, j.k = '''
l = 2
''', m = [ { n = 1 }, { n = 2 } ] }
o = \"\"\"
p = 1 \\" \"\"\"\"\"

[t]
u = 1979-05-27 07:32:00
[t.'v w']
x = -inf
[[y]]
id = "one"
[[y.z]]
q = 1
[[y.z]]
q = 2
[[ y ]]
id = "two"
[y.sub]
r = true
[[y.z]]
q = 3
"\\u0073" = 1
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (("a",), 2),
        (("b c",), 3),
        (("d",), 4),
        (("d", "e", "f.g"), 4),
        (("d", "e", "f.g", 0), 5),
        (("d", "e", "f.g", 1), 6),
        (("d", "e", "f.g", 2), 7),
        (("d", "e", "f.g", 2, 1), 8),
        (("h", "i"), 10),
        (("h", "j", "k"), 10),
        (("h", "m"), 12),
        (("h", "m", 1, "n"), 12),
        (("o",), 13),
        (("t",), 16),
        (("t", "u"), 17),
        (("t", "v w"), 18),
        (("t", "v w", "x"), 19),
        (("y",), 20),
        (("y", 0), 20),
        (("y", 0, "id"), 21),
        (("y", 0, "z", 1, "q"), 25),
        (("y", 1), 26),
        (("y", 1, "id"), 27),
        (("y", 1, "sub", "r"), 29),
        (("y", 1, "z", 0, "q"), 31),
        (("y", 1, "z", 0, "s"), 32),
        # What is not there is where it would have to be.
        (("y", 1, "missing"), 26),
        (("nowhere",), None),
    ],
)
def test_lines(path: Path, expected: int | None) -> None:
    tomllib.loads(TEXT)
    assert line(TEXT, path) == expected


def test_no_text_is_too_odd() -> None:
    assert line("", ("a",)) is None
    assert line("a = ", ("a",)) in (1, None)
    assert line("x = " + "[" * 5000, ("x",)) is None


def paths(value: object, at: Path = ()) -> list[Path]:
    found = [at] if at else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += paths(inner, (*at, key))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            found += paths(inner, (*at, number))
    return found


KEYS = st.text("abc._- '\"#=[]{}\\é", min_size=1, max_size=4)
SCALARS = st.one_of(
    st.integers(0, 9), st.booleans(), st.text("ab'\"#=[]{},\n\\ é", max_size=6), st.floats(0, 1)
)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def inline(value: object) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{quoted(k)} = {inline(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[\n" + "".join(f"{inline(each)}, # ]\n" for each in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return quoted(value)
    return repr(value)


VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(KEYS, SCALARS, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(KEYS, VALUES, max_size=4), st.lists(st.dictionaries(KEYS, VALUES), max_size=3)
)
def test_all_of_any_text_is_found(table: dict[str, object], array: list[dict[str, object]]) -> None:
    text = "".join(f"{quoted(key)} = {inline(value)}\n" for key, value in table.items())
    for each in array:
        text += "# [[\n[[array]]\n"
        text += "".join(f"{quoted(key)} = {inline(value)}\n" for key, value in each.items())
    try:
        read = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        # An inline table of several lines is none.
        return
    found = lines(text)
    assert set(paths(read)) <= set(found)
    shown = text.split("\n")
    for path, number in found.items():
        if isinstance(path[-1], str) and path != ("array",):
            assert quoted(path[-1]) in shown[number - 1], (path, number)
