# SPDX-License-Identifier: MIT
"""The documentation names what there is: each sub-command, option, unit page and link."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from microvm_host import declaration, errors
from microvm_host.cli import classic, commands
from microvm_host.declaration import kinds, schema

TOP = Path(__file__).parents[2]
PAGES = sorted((TOP / "man").glob("*.[1-8]"))
MARKDOWN = sorted([*TOP.glob("*.md"), *(TOP / "docs").rglob("*.md")])


def section(page: str, title: str) -> list[str]:
    """The lines of one section of a manual page."""
    lines = (TOP / "man" / page).read_text(encoding="utf-8").splitlines()
    start = lines.index(f".Sh {title}") + 1
    end = next(at for at in range(start, len(lines)) if lines[at].startswith(".Sh "))
    return lines[start:end]


def flags(line: str) -> set[str]:
    """The flags that an item of a list describes: `.It Fl n , Fl -dry-run`."""
    return {f"-{word}" for word in re.findall(r"\bFl (\S+)", line)}


def options_of(command: click.Command) -> set[str]:
    return {
        text
        for parameter in command.params
        if isinstance(parameter, click.Option)
        for text in parameter.opts
    }


def all_commands() -> dict[str, click.Command]:
    """The sub-commands, and those of theirs: `pci`, `pci check`."""
    found = dict(commands.microvm.commands)
    for name, command in commands.microvm.commands.items():
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": each for inner, each in command.commands.items()}
    return found


def documented_commands() -> dict[str, tuple[str, set[str]]]:
    """For each sub-command of microvm(8) its synopsis and the options listed below it."""
    found: dict[str, tuple[str, set[str]]] = {}
    name = ""
    for line in section("microvm.8", "COMMANDS"):
        if line.startswith(".It Ic "):
            # `Ic pci check Oo Ar option`: up to the first macro, all of which begin in upper case.
            name = " ".join(itertools.takewhile(str.islower, line.split()[2:]))
            assert name not in found, f"{name} stands there twice"
            found[name] = (line, set())
        elif line.startswith(".It "):
            found[name][1].update(flags(line))
    return found


def test_manual_lists_each_sub_command() -> None:
    documented = list(documented_commands())
    assert documented == sorted(all_commands())


@pytest.mark.parametrize("name", sorted(all_commands()))
def test_manual_lists_each_option(name: str) -> None:
    synopsis, options = documented_commands()[name]
    assert options == options_of(all_commands()[name])
    assert ("Ar option" in synopsis) == bool(options)


def test_manual_lists_the_options_before_a_sub_command() -> None:
    items = [line for line in section("microvm.8", "DESCRIPTION") if line.startswith(".It ")]
    known = options_of(commands.microvm) | set(
        commands.microvm.context_settings["help_option_names"]
    )
    assert {flag for line in items for flag in flags(line)} == known


def test_manual_lists_the_flags_of_microvm_nix() -> None:
    items = [
        line for line in section("microvm.8", "FLAGS OF MICROVM.NIX") if line.startswith(".It ")
    ]
    described = {line.split()[2] for line in items}
    assert described == {"l", "f", "R", *classic._ACTIONS}
    for letter in described - {"f", "R"}:
        assert classic.translate([f"-{letter}", "web"])[1:] == ["web"]


def test_manual_lists_the_exit_codes() -> None:
    items = [line for line in section("microvm.8", "EXIT STATUS") if line.startswith(".It ")]
    codes = {0, errors.EXIT_FAILED, errors.EXIT_USAGE, errors.EXIT_CONFIG}
    assert {int(line.split()[1]) for line in items} == codes


def test_manual_lists_the_keys_of_a_declaration() -> None:
    items = [line for line in section("microvm.toml.5", "KEYS") if line.startswith(".It ")]
    assert [line.split()[2] for line in items] == list(declaration._KEYS)


def leaves(table: kinds.Table, at: str = "") -> Iterator[str]:
    """The keys of a table as the manual has them: `volumes.size`."""
    for name, key in table.keys.items():
        inner = key.kind._of if isinstance(key.kind, kinds.List) else key.kind
        if isinstance(inner, kinds.Table):
            yield from leaves(inner, f"{at}{name}.")
        else:
            yield f"{at}{name}"


def test_manual_lists_the_keys_of_a_guest() -> None:
    lines = section("microvm.toml.5", "KEYS OF THE GUEST")
    items = [line for line in lines if line.startswith(".It ")]
    assert [line.split()[2] for line in items] == list(leaves(schema.GUEST))


def test_manual_names_each_unit() -> None:
    units = {path.name.removesuffix(".in") for path in (TOP / "units").iterdir()}
    items = [line for line in section("microvm-host.7", "UNITS") if line.startswith(".It Pa ")]
    assert {line.split()[2] for line in items} == units


@pytest.mark.parametrize("unit", sorted((TOP / "units").iterdir()), ids=lambda path: path.name)
def test_documentation_of_units_exists(unit: Path) -> None:
    text = unit.read_text(encoding="utf-8")
    pages = re.findall(r"man:([\w.-]+)\((\d)\)", text)
    assert re.search("^Documentation=", text, re.MULTILINE), "no Documentation="
    for name, number in pages:
        assert (TOP / f"man/{name}.{number}").is_file(), f"man/{name}.{number} is missing"


def test_documentation_of_transient_units_exists() -> None:
    for source in (TOP / "microvm_host").rglob("*.py"):
        for name, number in re.findall(r'"man:([\w.-]+)\((\d)\)"', source.read_text("utf-8")):
            assert (TOP / f"man/{name}.{number}").is_file(), f"{source.name}: {name}({number})"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_manual_page_has_its_name_and_licence(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    name, _, number = page.name.rpartition(".")
    assert text.startswith('.\\" SPDX-License-Identifier: MIT\n')
    assert f"\n.Dt {name.upper()} {number}\n" in text
    assert f"\n.Nm {name}\n" in text
    # Ours among those that it refers to exist.
    for other, section_number in re.findall(r"^\.Xr (microvm[\w.-]*) (\d)", text, re.MULTILINE):
        assert (TOP / f"man/{other}.{section_number}").is_file(), f"{other}({section_number})"


@pytest.mark.skipif(shutil.which("man") is None, reason="no man")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_man_has_no_warnings(page: Path) -> None:
    done = subprocess.run(
        [
            "man",
            # Not all of them: how lines break depends on groff, and is no fault of the page.
            "--warnings=mac,reg,char,font,scale,syntax,escape,missing",
            "--encoding=UTF-8",
            "--local-file",
            "--ditroff",
            str(page),
        ],
        env={**os.environ, "LC_ALL": "C.UTF-8", "MANROFFSEQ": "", "MANWIDTH": "80"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="no mandoc")
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_mandoc_has_no_warnings(page: Path) -> None:
    argv = ["mandoc", "-Tlint", "-Wwarning", str(page)]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


# Raised by these are what an administrator has to make sense of.
_ERRORS = ("MicrovmHostError", "InUse", "_Hangs")


def messages(module: str) -> Iterator[str]:
    """The errors that a module raises, with `…` for what differs each time."""
    tree = ast.parse((TOP / f"microvm_host/{module}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in _ERRORS and node.args:
            first = node.args[0]
            parts = first.values if isinstance(first, ast.JoinedStr) else [first]
            yield "".join(
                str(part.value)
                if isinstance(part, ast.Constant)
                else ("vfio-pci" if "VFIO_PCI" in ast.dump(part) else "…")
                for part in parts
            )


def test_each_error_of_passthrough_is_explained_and_there_is_no_other() -> None:
    text = (TOP / "docs/passthrough.md").read_text(encoding="utf-8")
    tables = re.findall(r"^\| it says \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)
    rows = [
        line.split(" | ")[0].removeprefix("| ") for table in tables for line in table.split("\n")
    ]
    explained = {row: ".*".join(map(re.escape, row.split("…"))) for row in rows if row}
    assert len(explained) > 10
    raised = [*messages("pci"), *messages("pci_lock"), *messages("pcibus"), *messages("reborn")]
    assert len(raised) > 10
    for message in raised:
        assert any(re.search(pattern, message) for pattern in explained.values()), message
    # What is not raised but noted in the journal.
    noted = (TOP / "microvm_host/pci.py").read_text(encoding="utf-8")
    for row, pattern in explained.items():
        assert any(re.search(pattern, each) for each in [*raised, noted]), row


def headings(text: str) -> set[str]:
    """The anchors that a Markdown file's headings have."""
    found = set()
    for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        kept = re.sub(r"[^\w\- ]", "", title.lower())
        found.add(kept.replace(" ", "-"))
    return found


def links(path: Path) -> Iterator[str]:
    """The relative links of a Markdown file; code is left out."""
    text = path.read_text(encoding="utf-8")
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.name)
def test_links_resolve(path: Path) -> None:
    for target in links(path):
        file, _, anchor = target.partition("#")
        destination = path.parent / file if file else path
        assert destination.exists(), f"{target} leads nowhere"
        if anchor and destination.suffix == ".md":
            assert anchor in headings(destination.read_text(encoding="utf-8")), target
