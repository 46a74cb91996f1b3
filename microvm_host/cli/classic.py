# SPDX-License-Identifier: MIT
"""The flags that microvm.nix's users have in their fingers, put into sub-commands.

`microvm -Ru web` is `microvm update --restart web`. Long options go through as they are.
"""

from __future__ import annotations

from ..errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# Flag -> the sub-command that it stands for; these take a VM's name.
_ACTIONS = {"c": "create", "u": "update", "r": "run", "s": "ssh"}
_HINT = "`microvm --help` shows the sub-commands, `man microvm` the flags"


def translate(arguments: list[str]) -> list[str]:
    """Give the sub-command and its arguments for a command line in either form.

    Raises:
        UsageError: the flags do not go together.
    """
    if not arguments or not arguments[0].startswith("-") or arguments[0].startswith("--"):
        return arguments
    if arguments[0] == "-h":
        return ["--help"]
    action, rest = "", list[str]()
    flake, restart = None, False
    words = iter(arguments)
    for word in words:
        if not word.startswith("-") or word.startswith("--") or word == "-":
            rest.append(word)
            continue
        letters = word[1:]
        while letters:
            letter, letters = letters[0], letters[1:]
            if letter == "R":
                restart = True
            elif letter == "l" or letter in _ACTIONS:
                chosen = "list" if letter == "l" else _ACTIONS[letter]
                if action:
                    raise UsageError(f"-{letter} does not go with {action}", hint=_HINT)
                action = chosen
                if letter == "s":
                    # What follows the name is ssh's, flags and all.
                    return [action, _value(letter, letters, words), *words]
                if letter != "l":
                    rest = [*_value(letter, letters, words).split(), *rest]
                    letters = ""
            elif letter == "f":
                flake = _value(letter, letters, words)
                letters = ""
            else:
                raise UsageError(f"there is no flag -{letter}", hint=_HINT)
    if not action:
        raise UsageError("none of -l, -c, -u, -r and -s is given", hint=_HINT)
    if flake is not None:
        if action != "create":
            raise UsageError(f"-f goes with -c, not with {action}", hint=_HINT)
        rest += ["--flake", flake]
    if restart:
        if action != "update":
            raise UsageError(f"-R goes with -u, not with {action}", hint=_HINT)
        rest += ["--restart"]
    return [action, *rest]


def _value(letter: str, attached: str, words: Iterator[str]) -> str:
    """The value of a flag: what is attached to it, or the next word."""
    value = attached or next(words, "")
    if not value:
        raise UsageError(f"-{letter} needs a value", hint=_HINT)
    return value
