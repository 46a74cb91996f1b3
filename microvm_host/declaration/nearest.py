# SPDX-License-Identifier: MIT
"""The name that somebody meant who wrote another."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

_SHORTEST = 3  # letters: shorter ones begin too many words


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that is most like a word; None if none is.

    It is the same but for its case and hyphens, or much alike, or one begins or ends the other.
    """
    # Boot reads declarations as well, and has no mistakes to explain, as a rule.
    import difflib

    folded = {_folded(each): each for each in known}
    wanted = _folded(word)
    if wanted in folded:
        return folded[wanted]
    near = difflib.get_close_matches(wanted, folded, 1)
    if near:
        return folded[near[0]]
    parts = [each for each in folded if _is_part(each, wanted) or _is_part(wanted, each)]
    return folded[max(parts, key=len)] if parts else None


def _is_part(short: str, long: str) -> bool:
    return len(short) >= _SHORTEST and (long.startswith(short) or long.endswith(short))


def _folded(word: str) -> str:
    return word.casefold().replace("_", "").replace("-", "")
