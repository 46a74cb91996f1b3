# SPDX-License-Identifier: MIT
"""Says what a new package does not do to an image that is there: it was made once, as it was asked.

Size, file system, label and content of a volume count when its image is made. A declaration that
changes them is right all the same, so that it is said, and how it is done by hand.
"""

from __future__ import annotations

import json
import os
from shlex import quote

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

ORIGINS = "share/microvm/image-origins"
_MIB = 1 << 20


def not_done(
    name: str, before: str | None, after: str, directory: str, *, text: str | None = None
) -> Iterator[str]:
    """What the step from one package to another leaves undone, a line each.

    Args:
        before: the package that the VM has.
        after: the package that it is given.
        directory: the VM's state directory.
        text: what ORIGINS of that package says, where it is not written yet.
    """
    if before is None:
        return
    old = _origins(_text(before))
    for image, wanted in _origins(_text(after) if text is None else text).items():
        path = os.path.join(directory, image)
        try:
            size = os.stat(path).st_size
        except OSError:
            # It is made as it is asked for now.
            continue
        # A package of an older version does not tell.
        told = old.get(image)
        had = {**wanted} if told is None else {**told}
        is_sized = wanted.get("imageType") == "raw" and isinstance(wanted.get("size"), int)
        # A raw image tells its size itself: an administrator may have grown it. If the key is as
        # it was, nothing more was asked for.
        if is_sized and (told is None or told.get("size") != wanted["size"]):
            had["size"] = size // _MIB
        for key, value in wanted.items():
            if value != had.get(key):
                yield _line(name, path, key, had.get(key), value, wanted)


def _line(name: str, path: str, key: str, had: Any, value: Any, wanted: dict[str, Any]) -> str:
    what = f"{path} stays as it was made: volumes.{key} = {_toml(value)} instead of {_toml(had)}"
    is_number = isinstance(had, int) and isinstance(value, int)
    if key == "size" and is_number and value > had:
        grow = (
            f"truncate -s {value}M {quote(path)}"
            if wanted.get("imageType") == "raw"
            else f"qemu-img resize -f {wanted.get('imageType')} {quote(path)} {value}M"
        )
        return f"{what} does not grow it; by hand: stop {name}, `{grow}`, grow what is in it"
    return (
        f"{what} counts when an image is made; by hand: change it in the guest, or stop {name} and "
        f"have it made again, without what is in it: rm {quote(path)}"
    )


def _toml(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, ensure_ascii=False)


def _text(package: str) -> str:
    try:
        with open(f"{package}/{ORIGINS}", encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def _origins(text: str) -> dict[str, dict[str, Any]]:
    """How each image of a package is made, by its name; nothing of what is broken."""
    found = {}
    for line in text.splitlines():
        try:
            origin = json.loads(line)
            found[origin.pop("image")] = origin
        except (ValueError, KeyError, AttributeError, TypeError):
            continue
    return found
