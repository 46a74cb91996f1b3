# SPDX-License-Identifier: MIT
"""What the package of a declared VM was built from, so that the next install need not build it.

A record is written when all is done: the package is `current` and the images are there. It names
everything that the build looked at: the declaration with its drop-ins, kernel and initrd, programs
of the host by each place where they could be, the toolkit's own modules, the machine's id. As long
as all of it is as it was, the package would be the same, and a few stat(2) calls say so.

What cannot be recorded for certain is not: the install then builds, as the first one did. A record
without its last line was cut short, and counts as none.
"""

from __future__ import annotations

import os
import sys

from . import __version__, file_stamp
from .file_stamp import Inputs
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

_HEAD, _END = "microvm-host 1", "end"
# Modules decide about packages from here on, and in all directories of builder and declarations.
_OURS = os.path.dirname(os.path.abspath(__file__))
_PARTS = ("build", "declaration")


@frozen
class Built:
    """A package that was built, with what else was done for it.

    `images` are files that were made of something; `user` is as the declaration names it.
    """

    package: str
    user: str | None = None
    images: tuple[str, ...] = ()


class Looks:
    """Looks at what records name, each thing once, for one VM or for all of them."""

    def __init__(self, host: HostPaths) -> None:
        self._host = host
        self._inputs = Inputs(host)
        self._stamps: dict[str, str] = {}
        self._surroundings = ""

    def unchanged(self, name: str) -> Built | None:
        """What was built for a VM, if building it again would give the same; else None."""
        lines = _read(self._host.build_record(name))
        if lines[:1] != [_HEAD] or lines[-1:] != [_END] or lines[1] != self._current_surroundings():
            return None
        package, user, images = "", None, []
        for line in lines[2:-1]:
            kind, _, value = line.partition(" ")
            if kind == "file":
                stamp, _, path = value.partition(" ")
                if stamp != self._stamp(path):
                    return None
            elif kind == "package":
                package = value
            elif kind == "user":
                user = value
            elif kind == "image":
                images.append(value)
            else:
                return None
        return Built(package, user, tuple(images)) if package else None

    def _stamp(self, path: str) -> str:
        if path not in self._stamps:
            self._stamps[path] = self._inputs.stamp(path)
        return self._stamps[path]

    def _current_surroundings(self) -> str:
        self._surroundings = self._surroundings or surroundings(self._host)
        return self._surroundings


def surroundings(host: HostPaths) -> str:
    """What a build depends on beside files of its own: the toolkit, its Python and the machine."""
    inputs = Inputs(host)
    modules = [_OURS]
    for part in _PARTS:
        with os.scandir(f"{_OURS}/{part}") as found:
            modules += sorted(each.path for each in found if each.name.endswith(".py"))
    try:
        with open(host.machine_id, encoding="utf-8", errors="replace") as file:
            machine = file.read().strip()
    except OSError:
        machine = file_stamp.ABSENT
    words = [__version__, sys.executable, os.uname().machine, machine]
    return f"by {' '.join(words + [inputs.stamp(module) for module in modules])}"


def write(name: str, built: Built, inputs: Inputs, before: str, host: HostPaths) -> None:
    """Record what a package was built from, or that nothing can be said.

    Args:
        before: the surroundings before the build.
    """
    lines = [_HEAD, before, f"package {built.package}"]
    lines += [f"user {built.user}"] if built.user is not None else []
    lines += [f"image {image}" for image in built.images]
    lines += [f"file {stamp} {path}" for path, stamp in inputs.stamps.items()]
    lines.append(_END)
    path = host.build_record(name)
    is_certain = inputs.is_settled and inputs.are_as_seen() and before == surroundings(host)
    if not is_certain or not all(line.isprintable() for line in lines):
        forget(name, host)
        return
    temporary = f"{path}.new"
    try:
        os.makedirs(host.build_records, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as target:
            target.write("\n".join(lines) + "\n")
        os.replace(temporary, path)
    except OSError:
        # The install is done all the same; the next one builds again.
        forget(name, host)


def forget(name: str, host: HostPaths) -> None:
    """Have the next install build the package."""
    for path in (host.build_record(name), f"{host.build_record(name)}.new"):
        try:
            os.unlink(path)
        except OSError:
            continue


def _read(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as source:
            text = source.read()
    except OSError:
        return []
    return text.removesuffix("\n").split("\n") if text.endswith("\n") else []
