# SPDX-License-Identifier: MIT
"""The ssh public keys that let an administrator into a guest."""

from __future__ import annotations

import os
import pwd

from ..declaration.schema import SSH_KEY
from ..errors import MicrovmHostError, NameInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..paths import HostPaths

_SUFFIX, _CERTIFICATE = ".pub", "-cert.pub"
# More is no file of keys.
_LONGEST = 1 << 16


def named(paths: tuple[str, ...]) -> tuple[str, ...]:
    """The keys in files that were given by name, each once; raises MicrovmHostError."""
    return tuple(dict.fromkeys(key for path in paths for key in _read(path)))


def own(host: HostPaths, environment: Mapping[str, str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of who calls this, by sudo or as root, and the files that they are in.

    A file that cannot be read, or holds something else, is none of these.
    """
    files, keys = [], []
    for home in _homes(environment):
        directory = host.ssh_directory(home)
        try:
            names = sorted(os.listdir(directory))
        except OSError:
            continue
        for name in names:
            if not name.endswith(_SUFFIX) or name.endswith(_CERTIFICATE):
                continue
            try:
                keys += _read(f"{directory}/{name}")
            except MicrovmHostError:
                continue
            files.append(f"{directory}/{name}")
    return tuple(dict.fromkeys(keys)), tuple(files)


def _homes(environment: Mapping[str, str]) -> list[str]:
    found = []
    for user in (environment.get("SUDO_USER"), environment.get("DOAS_USER")):
        try:
            if user:
                found.append(pwd.getpwnam(user).pw_dir)
        except KeyError:
            continue
    found.append(pwd.getpwuid(os.getuid()).pw_dir)
    return [*dict.fromkeys(found)]


def _read(path: str) -> list[str]:
    """The keys of a file such as authorized_keys (sshd(8)); raises MicrovmHostError."""
    try:
        # Not waiting: it could be a FIFO.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(file, encoding="utf-8-sig", errors="replace") as source:
            text = source.read(_LONGEST)
    except OSError as error:
        raise MicrovmHostError(f"cannot be read: {error.strerror}", path=path) from error
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    if any("PRIVATE KEY" in line for line in lines):
        raise MicrovmHostError(
            "is a private key, which is nobody's but yours",
            path=path,
            hint=f"the public one is in {path}{_SUFFIX}",
        )
    if not lines:
        raise MicrovmHostError("holds no ssh public key", path=path)
    for number, line in enumerate(lines, 1):
        try:
            SSH_KEY.check(line)
        except NameInvalid as error:
            raise MicrovmHostError(error.message, path=path, line=number, hint=error.hint) from None
        except ValueError as error:
            raise MicrovmHostError(f"{line[:40]!r} {error}", path=path, line=number) from None
    return lines
