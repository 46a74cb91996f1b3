# SPDX-License-Identifier: MIT
"""`microvm init`: a guest of the host's own packages, and the declaration that starts it.

All or nothing, as with other packages: what fails, or is interrupted, leaves the declarations as
they were.
"""

from __future__ import annotations

import os

from . import declaration, install, network, process
from .errors import MicrovmHostError, UsageError
from .frozen import frozen
from .guests import kernel, small, template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .install import Change
    from .paths import HostPaths

SMALL = "small"
GUESTS = (SMALL,)
# In MB.
MEM_DEFAULT = {SMALL: 256}


@frozen
class Wish:
    """What a VM is to be; None is what fits. `mem` is in MB, `kernel` the path of an image."""

    name: str
    guest: str = SMALL
    kernel: str | None = None
    mem: int | None = None


def make(wish: Wish, host: HostPaths, say: Callable[[str], object]) -> str:
    """Make the guest, and give the text of its declaration; nothing is declared by that.

    Args:
        say: is told what takes a while.

    Raises:
        MicrovmHostError: this host lacks something that the guest is made of.
    """
    found = kernel.find(host, os.uname().release, wish.kernel)
    busybox = small.find_busybox(host)
    image, initrd = small.make(found, busybox, host, say)
    return template.declaration(
        template.Guest(
            name=wish.name,
            about=(
                f"Its guest is Linux {found.version} with busybox, all in memory: what is written",
                "there is gone when it ends. Log in as root, without a password.",
            ),
            kernel=image,
            initrd=initrd,
            kernel_params=("quiet", f"hostname={wish.name}"),
            mem=wish.mem or MEM_DEFAULT[wish.guest],
            bridge=network.BRIDGE if network.bridge_is_there(host) else None,
        )
    )


def declare(
    wish: Wish, host: HostPaths, say: Callable[[str], object], *, replaces: bool = False
) -> Change:
    """Make the guest, declare it, and install its package; does not start it.

    Args:
        replaces: a declaration that is there is kept as NAME.toml.old, and makes way.

    Raises:
        UsageError: there is such a VM.
        MicrovmHostError: it could not be made; no declaration was changed.
    """
    path = host.declaration(wish.name)
    is_declared = os.path.lexists(path)
    if is_declared and not replaces:
        raise UsageError(
            f"microVM {wish.name} is declared already",
            path=path,
            hint="--force replaces that, and keeps it as .old",
        )
    if not is_declared and os.path.lexists(host.vm(wish.name)):
        raise UsageError(
            f"microVM {wish.name} exists already, and is not declared",
            path=host.vm(wish.name),
            hint=f"take another name, or delete it: microvm remove {wish.name}",
        )
    text = make(wish, host, say)
    former = f"{path}.old"
    if is_declared:
        say(f"the former {path} is kept as {former}")
        _copy(path, former)
    try:
        write(path, text)
        process.output(["systemctl", "daemon-reload"])
        return install.declared(declaration.load(path), host)
    except BaseException:
        if is_declared:
            _copy(former, path)
        elif os.path.exists(path):
            os.unlink(path)
        raise


def _copy(source: str, target: str) -> None:
    with open(source, encoding="utf-8", errors="surrogateescape") as file:
        write(target, file.read())


def write(path: str, text: str) -> None:
    """Have a file with a text, at one stroke; raises MicrovmHostError."""
    temporary = f"{path}.new"
    try:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(temporary, "w", encoding="utf-8", errors="surrogateescape") as target:
            target.write(text)
            os.fchmod(target.fileno(), 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise MicrovmHostError(
            f"cannot be written: {error.strerror or error}", path=path
        ) from error
