# SPDX-License-Identifier: MIT
"""`microvm init`: a guest of the host's own packages, and the declaration that starts it.

All or nothing, as with other packages: what fails, or is interrupted, leaves the declarations as
they were.
"""

from __future__ import annotations

import os
import time
import tomllib

from . import declaration, install, names, network, state, systemd, users
from .declaration import derived
from .errors import MicrovmHostError, UsageError
from .frozen import frozen
from .guests import archives, bootstrap, debian, kernel, keys, small, template

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .install import Change
    from .paths import HostPaths

SMALL, DEBIAN = "small", "debian"
# In MB.
MEM_DEFAULT = {SMALL: 256, DEBIAN: 1024}
LOGIN_DEFAULT = "admin"
DISK = "root.img"
# In MiB; sparse.
DISK_DEFAULT = 10240


@frozen
class Wish:
    """What a VM is to be; None is what fits. `mem` is in MB, `kernel` the path of an image.

    What comes after `mem` is for Debian: `ssh_keys` are files, `disk` is in MiB, and `fresh` has
    its root made anew.
    """

    name: str
    guest: str = SMALL
    kernel: str | None = None
    mem: int | None = None
    suite: str | None = None
    mirror: str | None = None
    login: str | None = None
    ssh_keys: tuple[str, ...] = ()
    disk: int | None = None
    fresh: bool = False

    def check(self) -> None:
        """Raise UsageError for what goes with another guest."""
        debians = {
            "--suite": self.suite,
            "--mirror": self.mirror,
            "--login": self.login,
            "--ssh-key": self.ssh_keys,
            "--disk": self.disk,
            "--fresh": self.fresh,
        }
        smalls = {"--kernel": self.kernel}
        options, only = (debians, DEBIAN) if self.guest == SMALL else (smalls, SMALL)
        for option, value in options.items():
            if value:
                raise UsageError(f"{option} is for --guest {only} alone")


def make(
    wish: Wish, host: HostPaths, say: Callable[[str], object], *, has_own_user: bool = True
) -> str:
    """Make the guest, and give the text of its declaration; nothing is declared by that.

    Args:
        say: is told what takes a while, and what has to be known.
        has_own_user: whether the VM runs as a user of its own, and not as all others.

    Raises:
        UsageError: the wish cannot be.
        MicrovmHostError: this host lacks something that the guest is made of.
    """
    wish.check()
    made = _debian(wish, host, say) if wish.guest == DEBIAN else _small(wish, host, say)
    return template.declaration(made, has_own_user=has_own_user)


def _small(wish: Wish, host: HostPaths, say: Callable[[str], object]) -> template.Guest:
    found = kernel.find(host, os.uname().release, wish.kernel)
    busybox = small.find_busybox(host)
    image, initrd = small.make(found, busybox, host, say)
    return template.Guest(
        name=wish.name,
        about=(
            f"Its guest is Linux {found.version} with busybox, all in memory: what is written",
            "there is gone when it ends. Log in as root, without a password.",
        ),
        kernel=image,
        initrd=initrd,
        kernel_params=("quiet", f"hostname={wish.name}"),
        mem=wish.mem or MEM_DEFAULT[SMALL],
        bridge=_bridge(host),
        mac=_mac(wish.name, host),
    )


def _debian(wish: Wish, host: HostPaths, say: Callable[[str], object]) -> template.Guest:
    user = names.guest_user_name(wish.login or LOGIN_DEFAULT)
    # All that can be wrong at once, before what takes minutes.
    origin = archives.origin(host, wish.suite, wish.mirror)
    if wish.ssh_keys:
        lines, files = keys.named(wish.ssh_keys), wish.ssh_keys
    else:
        lines, files = keys.own(host, os.environ)
    recipe = debian.Recipe(origin)
    has_root = not wish.fresh and debian.newest(recipe, host, time.time()) is not None
    bootstrap.check_host(has_root=has_root)
    archive = debian.make(recipe, host, say, fresh=wish.fresh)
    for path in debian.superseded(recipe, host, archive.root):
        say(f"no declaration names {path} any more: rm -r {path}")
    who = user if user == template.ROOT else f"{template.ROOT} and {user}"
    if lines:
        say(f"{who} may log in by ssh with the keys of {', '.join(files)}")
    else:
        say(f"no ssh key was found by which {who} could log in: --ssh-key FILE gives one")
    by_password = (
        f"Nobody has a password. For one, to log in with on the console, while {wish.name} runs:",
        f"    microvm exec -i {wish.name} -- chpasswd",
        f"and type {user}:PASSWORD, Enter and Ctrl-D.",
    )
    say("\n".join(by_password))
    has_vsock = os.path.exists(host.vhost_vsock) and origin.suite not in debian.WITHOUT_VSOCK_SSH
    bridge = _bridge(host)
    if bridge is None and not has_vsock:
        say(
            f"`microvm ssh {wish.name}` has no way into it: have a network first, by "
            "`microvm network enable`"
        )
    return template.Guest(
        name=wish.name,
        about=(
            f"Its guest is Debian {origin.suite} with cloud-init, of {origin.mirror}.",
            "By ssh one logs in as root"
            + ("." if user == template.ROOT else f", or as {user}, who may do all by sudo."),
            *by_password,
        ),
        kernel=archive.kernel,
        initrd=archive.initrd,
        kernel_params=(f"root=LABEL={debian.LABEL}", "rw", "quiet"),
        mem=wish.mem or MEM_DEFAULT[DEBIAN],
        bridge=bridge,
        mac=_mac(wish.name, host),
        disk=template.Disk(DISK, wish.disk or DISK_DEFAULT, debian.LABEL, archive.root),
        login=template.Login(user, lines),
        vsock=has_vsock,
    )


def _mac(name: str, host: HostPaths) -> str:
    return derived.mac(name, template.interface(name), derived.host_id(host.machine_id))


def _bridge(host: HostPaths) -> str | None:
    return network.BRIDGE if network.bridge_is_there(host) else None


def declare(
    wish: Wish, host: HostPaths, say: Callable[[str], object], *, replaces: bool = False
) -> Change:
    """Make the guest, declare it, and install its package; does not start it.

    Args:
        replaces: a declaration that is there is kept as NAME.toml.old, and makes way.

    Raises:
        UsageError: there is such a VM, or its disk.
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
    has_state = os.path.lexists(host.vm(wish.name)) and not state.is_unused(wish.name, host)
    if not is_declared and has_state:
        raise UsageError(
            f"microVM {wish.name} exists already, and is not declared",
            path=host.vm(wish.name),
            hint=f"take another name, or delete it: microvm remove {wish.name}",
        )
    disk = f"{host.vm(wish.name)}/{DISK}"
    if wish.guest == DEBIAN and os.path.lexists(disk):
        raise UsageError(
            f"microVM {wish.name} has a disk already, which goes with the kernel that it has",
            path=disk,
            hint="change its declaration by hand; or, to begin anew, stop it and delete the disk",
        )
    # What is in the directory of a VM that there is belongs to the user that it has.
    text = make(wish, host, say, has_own_user=not is_declared or _has_own_user(path))
    former = f"{path}.old"
    if is_declared:
        say(f"the former {path} is kept as {former}")
        _say_what_differs(path, text, say)
        _copy(path, former)
    try:
        write(path, text)
        systemd.reload()
        return install.declared(declaration.load(path), host)
    except BaseException:
        if is_declared:
            _copy(former, path)
        elif os.path.exists(path):
            os.unlink(path)
        raise


def _say_what_differs(path: str, text: str, say: Callable[[str], object]) -> None:
    """Say where the network of the new declaration is of another kind than that of the former."""
    try:
        before = _networks(declaration.read(path).table)
    except MicrovmHostError:
        # It was wrong, and is being replaced for that.
        return
    after = _networks(tomllib.loads(text))
    if before != after:
        say(f"its network was {before}, and is {after} now")


def _networks(table: dict[str, Any]) -> str:
    """What a guest is connected to, for people."""
    found = []
    interfaces = table.get("interfaces")
    for each in interfaces if isinstance(interfaces, list) else ():
        kind = each.get("type") if isinstance(each, dict) else None
        if kind == "user":
            found.append("QEMU's own")
        elif kind is not None:
            bridge = f" on {each['bridge']}" if each.get("bridge") else ""
            found.append(f"a {kind}{bridge}")
    return " and ".join(found) or "none"


def _has_own_user(path: str) -> bool:
    try:
        return declaration.load(path).user == users.AUTO
    except MicrovmHostError:
        return False


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
