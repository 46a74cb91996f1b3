# SPDX-License-Identifier: MIT
"""Device nodes that the kernel makes for one VM, given to the VM's user for as long as it runs.

A node's owner is changed here and now: nobody is to wait for udev, and containers have none. But
udev may come by later, for an event that it had not got to yet or that somebody triggers, and apply
what other rules say of such nodes; and a node that the kernel makes anew is root's again. So each
node is also claimed: a small file says whose it is, and udev/49-microvm-host.rules reads it.

Nodes are told apart by their kernel names, which udev calls %k: `tap7` (of /dev/tap7, a macvtap's),
`12` (of /dev/vfio/12, an IOMMU group's) and `vfio0` (of /dev/vfio/devices/vfio0, a device's).
"""

from __future__ import annotations

import os
import stat

from .errors import MicrovmHostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .identity import Identity
    from .paths import HostPaths

NODE_MODE = 0o600
# No two of these have devices of the same name.
SUBSYSTEMS = ("macvtap", "vfio", "vfio-dev")


def is_kernel_name(text: str) -> bool:
    """Whether a device node of these may be called so."""
    return text.isascii() and text.isalnum()


def claim(kernel_name: str, identity: Identity, host: HostPaths) -> None:
    """Have udev give a node to a VM's user, each time that it looks at it, until it is released.

    Nobody waits until it has: see hand_over.

    Raises:
        MicrovmHostError: the claim cannot be written.
    """
    path = host.node_owner(kernel_name)
    # Lines of udev(7)'s IMPORT{file}.
    text = f"MICROVM_NODE_USER={identity.uid}\nMICROVM_NODE_GROUP={identity.gid}\n"
    try:
        claimed = _open(_unfinished(path))
        try:
            os.write(claimed, text.encode())
        finally:
            os.close(claimed)
        # udev may read it at any time, and must not find half of it.
        os.rename(_unfinished(path), path)
    except OSError as error:
        raise MicrovmHostError(
            f"cannot be claimed for {identity.user}: {error.strerror}", path=path
        ) from error
    _have_udev_look(kernel_name, host)


def hand_over(path: str, identity: Identity) -> None:
    """Make a device node the VM's user's, and nobody else's.

    Raises:
        MicrovmHostError: it is no device node, or the kernel refuses.
    """
    try:
        # The node itself, not what a link leads to. Only root may put another in its place: the
        # directory is root's.
        if not stat.S_ISCHR(os.lstat(path).st_mode):
            raise MicrovmHostError("is to be a device node, but is none", path=path)
        # In this order: once it is the user's, changing the mode takes one more capability.
        os.chmod(path, NODE_MODE)
        os.chown(path, identity.uid, identity.gid, follow_symlinks=False)
    except OSError as error:
        raise MicrovmHostError(
            f"cannot be given to {identity.user}: {error.strerror}", path=path
        ) from error


def release(kernel_name: str, host: HostPaths) -> None:
    """Have udev do with a node what others say, from its next look at it on.

    Leaves the node as it is, and does nothing for one that is not claimed.

    Raises:
        MicrovmHostError: the claim cannot be removed.
    """
    path = host.node_owner(kernel_name)
    try:
        # The unfinished one is there if its writer was killed.
        for each in (_unfinished(path), path):
            try:
                os.unlink(each)
            except FileNotFoundError:
                pass
    except OSError as error:
        raise MicrovmHostError(f"cannot be released: {error.strerror}", path=path) from error
    try:
        os.rmdir(os.path.dirname(path))
    except OSError:
        # Other nodes are claimed, or none ever was.
        pass


def _have_udev_look(kernel_name: str, host: HostPaths) -> None:
    """Send an event for a device, as `udevadm trigger` does; in vain, where that is impossible.

    udev may have seen that there is no claim just before there was one, and then do what others
    say of the node after we have handed it over. One device's events wait for each other.
    """
    for subsystem in SUBSYSTEMS:
        try:
            event = os.open(host.uevent(subsystem, kernel_name), os.O_WRONLY | os.O_CLOEXEC)
        except OSError:
            # Another kind of device, or a container.
            continue
        try:
            os.write(event, b"change")
        except OSError:
            pass
        finally:
            os.close(event)


def _unfinished(path: str) -> str:
    """A claim that is being written; no kernel name ends so."""
    return f"{path}.new"


def _open(path: str) -> int:
    """Open a file anew, for writing, in a directory that is made if need be; raises OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        try:
            return os.open(path, flags, 0o644)
        except FileNotFoundError:
            # Another VM has released the last node just now, and the directory went with it.
            pass
