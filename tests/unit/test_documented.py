# SPDX-License-Identifier: MIT
"""Command lines for hypervisors that are not run here, against their documented options.

And that these checks would find what they are for: each word of each command line, misspelt.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microvm_host.build.tools import PROGRAMS

from . import documented
from .test_declared_golden import RIGHT, command_line, tree, written

CASES = [case for case in RIGHT if tree(case).text("share/microvm/hypervisor") != "qemu\n"]


def hypervisor(case: Path) -> str:
    return tree(case).text("share/microvm/hypervisor").strip()


def test_all_hypervisors_are_documented_and_tried() -> None:
    assert set(documented.SYNTAXES) == set(PROGRAMS) == {hypervisor(case) for case in CASES}
    assert len(CASES) >= 5 * len(PROGRAMS)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_a_command_line_is_documented(case: Path, tmp_path: Path) -> None:
    syntax = documented.SYNTAXES[hypervisor(case)]
    words = command_line(written(case, tmp_path), tmp_path)[1:]
    assert list(documented.wrong(syntax, words)) == []
    # An option that is misspelt, or whose keys are, is found.
    for number, word in enumerate(words):
        for misspelt in misspellings(word, syntax):
            found = list(
                documented.wrong(syntax, [*words[:number], misspelt, *words[number + 1 :]])
            )
            assert found, f"{misspelt!r} for {word!r}"
    # So is one that is there twice, unless it may be.
    before = len(syntax.commands)
    for number in range(before, len(words)):
        if words[number] in syntax.options and words[number] not in syntax.repeated:
            value = words[number + 1 : number + 2] if syntax.options[words[number]] else []
            twice = [*words[:before], words[number], *value, *words[before:]]
            assert f"{words[number]} is there twice" in documented.wrong(syntax, twice)


def misspellings(word: str, syntax: documented.Syntax) -> Iterator[str]:
    """A word of a command line with one letter too many in an option or in one of its keys."""
    if word in syntax.options:
        yield f"{word}x"
    elif not any(word.startswith(start) for start in ("/", "console=", "earlyprintk=", "reboot=")):
        parts = word.split(",")
        for number, part in enumerate(parts):
            key, equals, value = part.partition("=")
            # What is in brackets, and what is free text, may be anything.
            if equals and "[" not in word and not key.startswith("unix:") and ":" not in key:
                yield ",".join((*parts[:number], f"{key}x={value}", *parts[number + 1 :]))


FIRECRACKER = [case for case in CASES if hypervisor(case) == "firecracker"]


def configuration(case: Path) -> dict[str, Any]:
    found = json.loads(tree(case).text("lib/firecracker.json"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("case", FIRECRACKER, ids=lambda case: case.stem)
def test_a_configuration_is_documented(case: Path) -> None:
    found = configuration(case)
    assert list(documented.wrong_configuration(found)) == []
    for name in found:
        broken = copy.deepcopy(found)
        broken[f"{name}x"] = broken.pop(name)
        assert list(documented.wrong_configuration(broken))
        listed = found[name] if isinstance(found[name], list) else [found[name]]
        for number, each in enumerate(listed):
            for key in each:
                broken = copy.deepcopy(found)
                inner = broken[name][number] if isinstance(broken[name], list) else broken[name]
                inner[f"{key}x"] = inner.pop(key)
                assert list(documented.wrong_configuration(broken))


def test_firecracker_is_given_what_its_configuration_names() -> None:
    """The descriptors that the script opens are those that the file says."""
    for case in FIRECRACKER:
        source = configuration(case)["boot-source"]
        script = tree(case).text("bin/microvm-run")
        assert source["kernel_image_path"] == "/proc/self/fd/3"
        assert 'exec 3<"$package"/lib/kernel' in script
        assert ("initrd_path" in source) == ('exec 4<"$package"/lib/initrd' in script)
        assert source.get("initrd_path", "/proc/self/fd/4") == "/proc/self/fd/4"
