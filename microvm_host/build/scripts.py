# SPDX-License-Identifier: MIT
"""The scripts that all packages have, around what is a hypervisor's own."""

from __future__ import annotations

from . import seed, shell, volumes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..declaration.guest import Guest
    from .shell import Words
    from .tools import Tools

# For `microvm show`: the command line as it would be now.
_SHOW = """\
if [ -n "${MICROVM_SHOW-}" ]; then
    printf '%s\\n' "$@"
    exit
fi"""
_SIZE = """\
case ${1-} in
    "" | *[!0-9]*) echo "Usage: $0 SIZE-IN-MB" >&2 && exit 2 ;;
esac"""


def stale(*sockets: str) -> str:
    """The lines that make room for sockets: their directories, and what a hypervisor that was
    killed has left is removed.
    """
    lines = [shell.directories(*sockets)]
    for each in sockets:
        path = shell.quoted(f"./{each}" if each.startswith("-") else each)
        lines.append(f"[ ! -S {path} ] || rm -f {path}")
    return "\n".join(filter(None, lines))


def run(
    guest: Guest,
    tools: Tools,
    argv: Words,
    *,
    looks: Sequence[str] = (),
    last: Sequence[str] = (),
) -> bytes:
    """`bin/microvm-run`; raises Refused.

    Args:
        looks: what finds out about the host before the command line is put together, and changes
            nothing.
        last: what is done right before the hypervisor is executed.
    """
    return shell.script(
        tools.shell,
        shell.PACKAGE,
        *looks,
        shell.assigned(argv),
        _SHOW,
        volumes.creation(guest, tools),
        seed.creation(guest, tools),
        volumes.opening(guest),
        *last,
        'exec "$@"',
    )


def shutdown(tools: Tools, socket: str, command: str, about: str) -> bytes:
    """`bin/microvm-shutdown`, which has nothing to do where the socket has gone."""
    return shell.script(
        tools.shell,
        shell.PACKAGE,
        f"# {about}\n[ -S {shell.quoted(socket)} ] || exit 0\nexec {command}",
    )


def balloon(tools: Tools, *lines: str) -> bytes:
    """`bin/microvm-balloon`, with the memory that the guest is left with, in MB, in `$1`."""
    return shell.script(tools.shell, shell.PACKAGE, _SIZE, "\n".join(lines))
