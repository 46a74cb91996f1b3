# SPDX-License-Identifier: MIT
"""The absolute paths that a package or a declaration names, found in text.

Only some of them are facts of a package. Images and kernels of other builders stand just in its
scripts, so that any word which looks like an absolute path is taken for one: whoever asks compares
them with what is to be mounted, and a path too many does no harm there.
"""

from __future__ import annotations

import os
import stat

from . import trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .runner import Package
    from .trust import Suspect

# Scripts are a few kilobytes; what is larger is a program or a kernel.
_TEXT_MAX = 256 * 1024
# What may stand before and after a path in a shell's word, in an option, and in JSON.
_MARKS = "\"'`=,;:()<>|&[]{}\n\t"
_IS_MARK = dict.fromkeys(map(ord, _MARKS), "\n")


def in_text(text: str) -> Iterator[str]:
    """The words of a text that are absolute paths; one with spaces is given whole and in part."""
    for word in text.translate(_IS_MARK).split("\n"):
        for part in {word.strip(), word.strip().split(" ")[0], *word.split(" ")}:
            if part.startswith("/"):
                yield part


def in_table(value: object) -> Iterator[str]:
    """The same in all strings of a declaration's table."""
    if isinstance(value, str):
        yield from in_text(value)
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from in_table(each)


def named_by(package: Package, by: Suspect) -> Iterator[str]:
    """The absolute paths that a package names.

    Args:
        by: the VM's user. What they could write is not read: it would have root mount things.
    """
    yield package.path
    for share in package.shares:
        yield from (path for path in (share.source, share.socket) if path.startswith("/"))
    for file in package.private_files:
        yield file.source
    if package.control_socket is not None and package.control_socket.path.startswith("/"):
        yield package.control_socket.path
    for directory in ("bin", "lib"):
        try:
            files = sorted(os.listdir(f"{package.path}/{directory}"))
        except OSError:
            continue
        for name in files:
            for path in in_text(_text(f"{package.path}/{directory}/{name}", by)):
                yield path
                # A hypervisor's configuration, which lies beside the package.
                if path.endswith(".json"):
                    yield from in_text(_text(path, by))


def _text(path: str, by: Suspect) -> str:
    """What a file says; nothing if it is no text, or the VM's user could change it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode) or trust.changeable(path, by):
            return ""
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return ""
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _TEXT_MAX:
            return ""
        return os.read(file, _TEXT_MAX).decode(errors="replace")
    except OSError:
        return ""
    finally:
        os.close(file)
