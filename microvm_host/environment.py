# SPDX-License-Identifier: MIT
"""What a service may find in its environment, as root can tell without asking its processes.

Those are the VM's user's, who may have told them anything. systemd makes their environment of its
own, of Environment= and of EnvironmentFile=, less UnsetEnvironment= (systemd.exec(5), "Environment
Variables in Spawned Processes"). What it may be is gathered here, not what it is: how it reads
files has changed between versions, and nobody here needs to know better. PassEnvironment= and PAM
are left out, since only the first process and root's own modules know what is in there.
"""

from __future__ import annotations

import os
import stat

from . import log, service, trust

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .paths import HostPaths

# systemd's own limit is far above; these hold a few settings.
SIZE_MAX = 1 << 20


def assignments(unit: str, vm: str, by: trust.Suspect | None, host: HostPaths) -> list[str]:
    """All assignments that the processes of a service may find.

    Of several of one name the last counts. One that is taken away is there with nothing as its
    value. Of values that are quoted, and of parts of them, only the quotes and backslashes are
    missing: enough for numbers.

    Args:
        vm: whose log tells of files that cannot be read.
        by: who may have no say in it, so that files of theirs do not count; no file does for None.

    Raises:
        MicrovmHostError: systemd does not answer.
    """
    given, paths, unset = service.environment(unit)
    found = [*given]
    for path in paths:
        if by is None:
            break
        for file in _matches(host.at(path)):
            try:
                found += _of_file(_read(file, by))
            except FileNotFoundError:
                # Without it systemd starts no process, or it is one that may be missing.
                continue
            except OSError as error:
                log.warning(f"{file}: its settings cannot be read here: {error.strerror}", vm=vm)
    # systemd takes these away last. Those with a value it takes away only where that is the value.
    return [*found, *(f"{name}=" for name in unset if "=" not in name)]


def _matches(path: str) -> list[str]:
    """The files that a path means, which may be a glob."""
    if not {"*", "?", "["} & {*path}:
        return [path]
    from glob import glob  # Rarely; it is half a helper's time.

    return glob(path)


def _read(path: str, by: trust.Suspect) -> str:
    """The beginning of a file; raises OSError."""
    if changed := trust.changeable(path, by):
        raise PermissionError(0, f"the VM's user could change {changed}")
    # Whatever it is, it is not waited for.
    source = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(source).st_mode):
            raise OSError(0, "it is no regular file")
        return os.pread(source, SIZE_MAX, 0).decode(errors="replace")
    finally:
        os.close(source)


def _of_file(text: str) -> Iterator[str]:
    """What stands in a file of assignments, in each way in which it may be read."""
    text = text.replace("\r", "\n")
    # Whether a backslash goes on with a comment depends on the version.
    for whole in (text, text.replace("\\\n", "")):
        for line in whole.split("\n"):
            name, _, value = line.partition("=")
            for mark in "'\"\\":
                value = value.replace(mark, "")
            yield f"{name.strip()}={value.strip()}"
