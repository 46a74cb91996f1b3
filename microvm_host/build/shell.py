# SPDX-License-Identifier: MIT
"""Pieces of the shell scripts in packages: words quoted so that nothing in them is ever run."""

from __future__ import annotations

from itertools import pairwise
from os.path import dirname
from shlex import quote

from ..frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Words = list["str | Word"]


@frozen
class Variable:
    """A variable of the script, as a part of a word."""

    name: str


@frozen
class Word:
    """A word of a command line that holds variables."""

    parts: tuple[str | Variable, ...]


def word(*parts: str | Variable) -> Word:
    return Word(parts)


def quoted(each: str | Word) -> str:
    """A word for a script; one word whatever it holds."""
    if isinstance(each, str):
        return quote(each)
    return "".join(
        f'"${{{part.name}}}"' if isinstance(part, Variable) else (quote(part) if part else "")
        for part in each.parts
    )


def directories(*paths: str) -> str:
    """Lines that make the directories below the state directory which these paths are in.

    Each for the VM's user alone; an absolute path is in a directory that is somebody's already.
    """
    parents = dict.fromkeys(dirname(path) for path in paths if not path.startswith("/"))
    return "\n".join(f"mkdir -p -m 700 {quote(f'./{each}')}" for each in parents if each)


def script(shell: str, *blocks: str) -> bytes:
    """A whole script of blocks with an empty line between; an empty block is left out."""
    # Errors end it, and so does a variable that has no value.
    head = f"#!{shell} -eu\n# Made by microvm-host from a declaration: change that one instead."
    return "\n".join(f"{block}\n" for block in (head, *blocks) if block).encode()


# Where the package is, in `package`. The digest of a package goes into its name, so that it cannot
# hold its own path.
PACKAGE = """\
case $0 in
    /*/bin/*) package=${0%/bin/*} ;;
    *) package=$(readlink -f "$0") && package=${package%/bin/*} ;;
esac"""
PACKAGE_VARIABLE = Variable("package")


def assigned(argv: Sequence[str | Word]) -> str:
    """`set --` with a command line: each option on a line of its own, with its value."""
    lines = [[quoted(argv[0])]]
    for before, each in pairwise(argv):
        if _is_option(each) or not _is_option(before):
            lines.append([])
        lines[-1].append(quoted(each))
    return "set -- \\\n    " + " \\\n    ".join(" ".join(line) for line in lines)


def _is_option(each: str | Word) -> bool:
    return isinstance(each, str) and each.startswith("-")
