# SPDX-License-Identifier: MIT
"""Connects to the sockets of a running VM: its console, its guest's agent, its hypervisor.

They lie where the VM's user may put something else in their place, and who connects is root more
often than not. So nothing is reached but a socket that belongs to that user, with a process of
that user's at the other end: by a link, they get no more than they could have by themselves.
"""

from __future__ import annotations

import os
import socket
import stat
import struct
import time

from . import runner, state
from .errors import MicrovmHostError
from .frozen import frozen
from .paths import OPENED
from .record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths


class NobodyThere(MicrovmHostError):
    """There is no such socket, or nobody listens: not yet, or no longer."""


@frozen
class Running:
    """A VM that runs, or is being started: its package, and whom it runs as."""

    name: str
    directory: str
    package: runner.Package
    uid: int
    gid: int
    user: str
    # Those that the unit gives it beside the user's own.
    groups: tuple[int, ...] = ()

    def connect(self, path: str, within: float) -> socket.socket:
        """Connect to one of its sockets, by a path relative to its directory perhaps.

        Raises:
            NobodyThere: nobody listens.
            MicrovmHostError: it cannot be reached within these seconds, or is not the VM's.
        """
        return connect(os.path.join(self.directory, path), self.uid, within)


def running(name: str, host: HostPaths) -> Running | None:
    """The VM, if it runs by us; raises PackageError, or MicrovmHostError for a strange record."""
    if state.booted(name, host) is None:
        return None
    lines = Record(host.record(name, "booted")).read()
    for verb, *fields in lines:
        if verb == "user" and len(fields) == 4 and fields[1].isdigit() and fields[3].isdigit():
            user, uid, gid = fields[0], int(fields[1]), int(fields[3])
            break
    else:
        # It is being started or stopped at this moment.
        return None
    package = runner.load(host.booted(name))
    groups = tuple(
        int(each) for verb, *found in lines if verb == "groups" for each in found if each.isdigit()
    )
    return Running(name, host.vm(name), package, uid, gid, user, groups)


def connect(path: str, uid: int, within: float) -> socket.socket:
    """Connect to a socket of a user's, on which a process of theirs listens.

    Raises:
        NobodyThere: there is no such socket, or nobody listens.
        MicrovmHostError: it is not theirs, or cannot be reached within these seconds.
    """
    deadline = time.monotonic() + within
    try:
        # What is looked at here is what is connected to, whatever the path means by then.
        there = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NobodyThere("there is no such socket", path=path) from error
    except OSError as error:
        raise _unreachable(path, error) from error
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        status = os.fstat(there)
        if not stat.S_ISSOCK(status.st_mode) or status.st_uid != uid:
            raise MicrovmHostError("is not a socket of the VM's user", path=path)
        _connect(peer, f"{OPENED}/{there}", deadline)
        # unix(7): who listens, as it was when they began to.
        size = struct.calcsize("3i")
        credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        if struct.unpack("3i", credentials)[1] != uid:
            raise MicrovmHostError("does not lead to a process of the VM's user", path=path)
    except ConnectionRefusedError as error:
        peer.close()
        raise NobodyThere("nobody listens at this socket", path=path) from error
    except OSError as error:
        peer.close()
        raise _unreachable(path, error) from error
    except MicrovmHostError:
        peer.close()
        raise
    finally:
        os.close(there)
    return peer


def _connect(peer: socket.socket, path: str, deadline: float) -> None:
    while True:
        peer.settimeout(max(deadline - time.monotonic(), 0.01))
        try:
            peer.connect(path)
            return
        except BlockingIOError as error:
            # unix(7): EAGAIN where too many wait already to be accepted.
            if time.monotonic() > deadline - 0.05:
                raise TimeoutError("others are connected, and it takes no more") from error
            time.sleep(0.05)


def _unreachable(path: str, error: OSError) -> MicrovmHostError:
    hint = "this needs root" if isinstance(error, PermissionError) and os.geteuid() else ""
    return MicrovmHostError(
        f"cannot be connected to: {error.strerror or error}", path=path, hint=hint
    )
