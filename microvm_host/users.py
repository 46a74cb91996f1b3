# SPDX-License-Identifier: MIT
"""The user of a VM: the drop-in that names it, and a system user that is one VM's alone.

By default all VMs run as the user of microvm@.service. Each that has one of its own is closed to
the others: its files, sockets and devices are that user's. The user is made when the package is
installed and is never deleted, since files of its number may lie anywhere.

The generator writes drop-ins at boot, so that this module imports little.
"""

from __future__ import annotations

import os

from . import names
from .errors import MicrovmHostError, NameInvalid

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

AUTO = "auto"
# Whom all VMs run as that have no other: the User= of microvm@.service.
SHARED = "microvm"
# Drop-ins are read in the order of their names, whichever directory they lie in
# (systemd.unit(5)): an administrator's own comes later, and so has the last word.
DROP_IN = "00-microvm-user.conf"


def checked(user: str) -> str:
    """A user as a declaration or `microvm create` may give it; raises NameInvalid."""
    if user == "root":
        raise NameInvalid(
            "user 'root' would make the hypervisor root", hint='user = "auto" makes one of its own'
        )
    return names.user_name(user)


def account(vm: str, user: str) -> str:
    """The name of the account that `user`, which may be AUTO, stands for."""
    return names.own_user(vm) if user == AUTO else user


def uid(user: str) -> int:
    """The number of a user, given by name or number; raises MicrovmHostError."""
    import pwd

    try:
        return int(user) if user.isdigit() else pwd.getpwnam(user).pw_uid
    except KeyError as error:
        raise MicrovmHostError(f"there is no user {user!r}") from error


def drop_in(vm: str, user: str) -> str:
    """What makes a VM's unit run as `user`, in the user's own group."""
    return (
        f"# Whom microVM {vm} runs as. A drop-in whose name comes later may say otherwise.\n"
        f"[Service]\nUser={account(vm, user)}\n"
        "# The user's own group. The unit adds kvm to it.\nGroup=\n"
    )


def ensure(vm: str, user: str, host: HostPaths) -> None:
    """Make the user of a VM, if it is AUTO and not there yet.

    Raises:
        MicrovmHostError: another user does not exist, or the one to be made exists and is
            somebody else's.
    """
    import pwd

    from . import process

    name = account(vm, user)
    # A colon would part the fields of passwd(5), and no VM's name has a slash.
    comment = f"microVM {vm}".replace(":", "/")
    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        if user != AUTO:
            raise MicrovmHostError(
                f"microVM {vm} is to run as user {name!r}, who does not exist",
                hint='create the user, or give "auto" for one that is made',
            ) from error
    else:
        if user == AUTO and found.pw_gecos != comment:
            raise MicrovmHostError(
                f"user {name!r} exists and was not made for microVM {vm}: passwd says "
                f"{found.pw_gecos!r} of it",
                hint=f"give the user by name to have it anyway: {name}",
            )
        return
    process.output(
        ["systemd-sysusers", "--inline", f'u {name} - "{comment}" {host.state}', f"m {name} kvm"]
    )


def write_drop_in(vm: str, user: str, host: HostPaths) -> None:
    """Have a VM that is not declared run as `user`; systemd is told."""
    path = host.user_drop_in(vm)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as target:
        target.write(drop_in(vm, user))
    os.replace(temporary, path)
    _reload()


def remove_drop_in(vm: str, host: HostPaths) -> None:
    """Take that back, if it was done."""
    path = host.user_drop_in(vm)
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    try:
        os.rmdir(os.path.dirname(path))
    except OSError:
        # The administrator has drop-ins there as well.
        pass
    _reload()


def _reload() -> None:
    from . import process

    process.output(["systemctl", "daemon-reload"])
