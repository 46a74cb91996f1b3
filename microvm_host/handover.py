# SPDX-License-Identifier: MIT
"""Hands files that only root may read to the user of one VM, for as long as the VM runs.

A package names them (`share/microvm/private-files`) and never holds them: credentials, and what
cloud-init is to know. At each start their contents are copied to a directory below /run, which is
memory and not a disk; there the VM's user may read them and nobody else, and can neither add nor
change anything. They go when the VM is down.

Root reads on behalf of that user, and so only what they could not have chosen themselves: a path
that they could lead elsewhere is refused.
"""

from __future__ import annotations

import os
import stat

from . import trust
from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .identity import Identity
    from .paths import HostPaths
    from .record import Record
    from .runner import PrivateFile

WHAT = "private-files"
# systemd takes credentials up to this size (systemd.exec(5)); and what is copied stays in memory.
SIZE_MAX = 1024 * 1024


def hand_over(
    name: str,
    files: Sequence[PrivateFile],
    identity: Identity,
    record: Record,
    host: HostPaths,
) -> None:
    """Copy a VM's private files to where its user finds them.

    Args:
        record: is told before anything is there, and clears it all by `take_back`.

    Raises:
        MicrovmHostError: one is not there, or is nothing that may be handed over.
    """
    take_back(name, record, host)
    directory = host.private(name)
    record.append("files", directory)
    # One may pass, to a file whose name one knows, but not look around.
    os.makedirs(os.path.dirname(directory), mode=0o711, exist_ok=True)
    os.mkdir(directory, 0o711)
    for file in files:
        try:
            trust.refuse_exchangeable(file.source, identity, "read")
            content = _content(file.source)
        except OSError as error:
            raise MicrovmHostError(
                f"cannot be handed to {identity.user}, whom the VM runs as: {error.strerror}",
                path=file.source,
            ) from error
        _write(f"{directory}/{file.name}", content, identity)


def take_back(name: str, record: Record, host: HostPaths) -> None:
    """Remove what was handed to a VM's user, if anything was; raises OSError, MicrovmHostError."""
    directory = host.private(name)
    try:
        # Root's own directory: nothing is in there but what `hand_over` wrote.
        for file in os.listdir(directory):
            os.unlink(f"{directory}/{file}")
        os.rmdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        pass
    record.clear()


def _content(path: str) -> bytes:
    # Not waiting: it could be a FIFO.
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise MicrovmHostError("is to be handed over, but is no regular file", path=path)
        content = b""
        while chunk := os.read(source, SIZE_MAX + 1 - len(content)):
            content += chunk
    finally:
        os.close(source)
    if len(content) > SIZE_MAX:
        raise MicrovmHostError(
            f"is larger than {SIZE_MAX // 1024} KiB, the most that is handed over", path=path
        )
    return content


def _write(path: str, content: bytes, identity: Identity) -> None:
    # Nobody's until it is whole.
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0)
    try:
        while content:
            content = content[os.write(target, content) :]
        os.fchmod(target, 0o400)
        os.fchown(target, identity.uid, identity.gid)
    finally:
        os.close(target)
