# SPDX-License-Identifier: MIT
"""The packages that were built on this host, and which VM had which of them, when.

A package lies at DIGEST-NAME and is never changed. Kernels and initrds that everybody may read are
hard links to blobs, files that are named by their SHA-256: a put looks for one name, however many
packages there are.

What is kept: what a VM's `current` or `booted` points to, the last few that each VM had, so that
there is something to roll back to, and what is just being installed. The rest is collected after a
package was put there, and so are blobs that no package links to.
"""

from __future__ import annotations

import os
import stat
import time

from . import install_lock, names
from .errors import MicrovmHostError
from .frozen import frozen
from .install_lock import Lock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    # Types alone: what is put there is handed over, and the store knows no builder.
    from .build.tree import Copy, Tree
    from .paths import HostPaths

KEPT = 5
# Keys of a declaration that only root may read, unlike a history.
_PRIVATE = ("cloudInit", "credentialFiles")
# As many as anybody looks at; those before them are forgotten.
_ENTRIES_MAX = 100
_DIGEST = frozenset("0123456789abcdef")
# What of a package's `lib` are copies of the host's files, and the mode of those of them that not
# everybody may read (build.tree.Copy).
_COPIED = ("kernel", "initrd")
PRIVATE_MODE = 0o640
# The end of a blob's name until it has its own.
_NEW = ".new"


@frozen
class Entry:
    """A package that a VM was given: when, in seconds since 1970, and how.

    `instead_of` is what a rollback, or several in a row, turned away from: that one is not
    installed again by itself. It is the package itself where a rollback led back to that.
    `declared` are the keys that it was built from, where that is known.
    """

    package: str
    time: float
    instead_of: str | None = None
    declared: dict[str, Any] | None = None


def locked(host: HostPaths, doing: str = "changes the store of packages") -> Lock:
    """The store's lock, for moments: it keeps others from collecting what is just put there."""
    return Lock(host.packages_lock, doing)


def path_of(tree: Tree, name: str, host: HostPaths) -> str:
    """Where the package of a VM is, or would be."""
    return f"{host.packages}/{tree.digest}-{name}"


def put(tree: Tree, name: str, gid: int, host: HostPaths) -> str:
    """Have a package in the store, and give its path.

    The caller holds the VM's lock, and has that keep the package. The store's lock is not needed:
    what is copied may lie on a network that hangs.

    Raises:
        MicrovmHostError: it cannot be written; nothing of it is there then.
    """
    path = path_of(tree, name, host)
    if os.path.isdir(path):
        give(path, gid)
    else:
        _make(host.packages)
        _make(host.blobs)
        tree.write(path, gid=gid, same=lambda copy: _blob(copy, host))
        _add_blobs(tree, path, host)
    return path


def give(package: str, gid: int) -> None:
    """Have the private files of a package that is there be for this group.

    The VM's user may be another one by now, and a group is no part of what a package is.

    Raises:
        MicrovmHostError: they cannot be given away.
    """
    for path in map(f"{package}/lib/{{}}".format, _COPIED):
        try:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise MicrovmHostError(f"cannot be opened: {error.strerror}", path=path) from error
        try:
            status = os.fstat(file)
            if status.st_mode & 0o777 == PRIVATE_MODE and status.st_gid != gid:
                os.fchown(file, -1, gid)
        except OSError as error:
            message = f"cannot be given to group {gid}: {error.strerror}"
            raise MicrovmHostError(message, path=path) from error
        finally:
            os.close(file)


def is_private(package: str) -> bool:
    """Whether a package has files that are for its VM's user alone."""
    for file in _COPIED:
        try:
            if stat.S_IMODE(os.lstat(f"{package}/lib/{file}").st_mode) == PRIVATE_MODE:
                return True
        except OSError:
            continue
    return False


def is_ours(package: str, host: HostPaths) -> bool:
    """Whether a path is that of a package of the store."""
    return os.path.dirname(os.path.realpath(package)) == os.path.realpath(host.packages)


def _blob(copy: Copy, host: HostPaths) -> str | None:
    """The file that has the content of a copy already."""
    path = f"{host.blobs}/{copy.sha256}"
    try:
        status, wanted = os.lstat(path), os.stat(copy.source)
    except OSError:
        return None
    # One that was cut short by a disk that failed, or by hand, must not get into every package.
    return path if stat.S_ISREG(status.st_mode) and status.st_size == wanted.st_size else None


def _add_blobs(tree: Tree, package: str, host: HostPaths) -> None:
    """Have the files that a package has copied found by the next one."""
    for file, sha256 in tree.shared():
        blob = f"{host.blobs}/{sha256}"
        source = f"{package}/{file}"
        try:
            if not _is_same(source, blob):
                # At one stroke: a blob that is no longer right makes way.
                temporary = f"{blob}.{os.urandom(8).hex()}{_NEW}"
                os.link(source, temporary, follow_symlinks=False)
                os.replace(temporary, blob)
        except OSError:
            # Another file system, or one without hard links: then each package has its own. Or it
            # was just collected, and the next package brings it again.
            continue


def _is_same(one: str, other: str) -> bool:
    try:
        return os.path.samestat(os.lstat(one), os.lstat(other))
    except FileNotFoundError:
        return False


def history(name: str, host: HostPaths) -> tuple[Entry, ...]:
    """The packages that a VM was given, oldest first.

    Raises:
        MicrovmHostError: the file that tells is broken.
    """
    # It takes longer to import than an install of what did not change; so does shutil.
    import json

    path = host.history(name)
    try:
        with open(path, encoding="utf-8") as source:
            return tuple(Entry(**each) for each in json.load(source))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise MicrovmHostError(f"cannot be read: {error.strerror}", path=path) from error
    except (ValueError, TypeError) as error:
        raise MicrovmHostError(
            "is broken", path=path, hint="remove it: VMs run without, and it begins anew"
        ) from error


def note(
    name: str,
    package: str,
    host: HostPaths,
    instead_of: str | None = None,
    declared: dict[str, Any] | None = None,
) -> None:
    """Write down that a VM was given a package, unless that is what was written down last."""
    import json

    entries = history(name, host)
    last = entries[-1] if entries else None
    if last and last.package == package and last.instead_of in (instead_of, package):
        return
    if declared is None:
        # A rollback, to what was built of them earlier.
        declared = next((each.declared for each in entries if each.package == package), None)
    elif declared:
        declared = {key: value for key, value in declared.items() if key not in _PRIVATE}
    entry = Entry(package, round(time.time(), 3), instead_of, declared)
    entries = (*entries, entry)[-_ENTRIES_MAX:]
    _make(host.histories)
    path = host.history(name)
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as target:
        json.dump([vars(entry) for entry in entries], target, indent=1)
        target.write("\n")
        target.flush()
        os.fsync(target.fileno())
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def turned_away_from(name: str, host: HostPaths) -> str | None:
    """The package that rollbacks replaced, if nothing was installed since."""
    last = (history(name, host) or (None,))[-1]
    return last.instead_of if last and last.instead_of != last.package else None


def forget(name: str, host: HostPaths) -> None:
    """Forget a VM that is gone; what it alone had is collected next time."""
    for path in (host.history(name), host.build_record(name)):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass


def kept(name: str, host: HostPaths) -> tuple[str, ...]:
    """The last packages that a VM had and could have again, newest first, each once."""
    found = dict.fromkeys(entry.package for entry in reversed(history(name, host)))
    return tuple(package for package in found if os.path.isdir(package))[:KEPT]


def came_before(name: str, package: str | None, host: HostPaths) -> tuple[str, ...]:
    """What a VM had before the package that it has, and could have again; newest first, each once.

    A rollback goes back to where that package stood: before it is what came before it there, so
    that one after the other leads to the first of all.
    """
    entries = history(name, host)
    places: list[int] = []
    for number, entry in enumerate(entries):
        same = [each for each in range(number) if entries[each].package == entry.package]
        if entry.instead_of is None or not same:
            places.append(number)
            continue
        earlier = [each for each in same if each < places[-1]]
        places.append(places[(earlier or same)[-1]])
    is_last = bool(entries) and entries[-1].package == package
    before = entries[: places[-1]] if is_last else entries
    found = dict.fromkeys(entry.package for entry in reversed(before))
    return tuple(each for each in found if each != package and os.path.isdir(each))


def collect(host: HostPaths) -> list[str]:
    """Delete the packages that nobody needs any more, and say which; the caller holds the lock."""
    import shutil

    kept_by_locks = install_lock.kept(host)
    needed = {os.path.realpath(package) for package in kept_by_locks}
    being_written = {os.path.basename(package) for package in kept_by_locks}
    for name in _listed(host.state):
        for link in (host.current(name), host.booted(name)):
            needed.add(os.path.realpath(link))
    for file in _listed(host.histories):
        name = file.removesuffix(".json")
        if names.is_vm_name(name):
            try:
                needed.update(map(os.path.realpath, kept(name, host)))
            except MicrovmHostError:
                # Nobody can tell what it needs.
                return []
    gone = []
    for package in _listed(host.packages):
        path = f"{host.packages}/{package}"
        # Hidden ones are what a writer that was killed left behind.
        if package.startswith("."):
            is_needed = package[1:].rpartition(".")[0] in being_written
        else:
            is_needed = not _is_package(package) or os.path.realpath(path) in needed
        if not is_needed:
            shutil.rmtree(path, ignore_errors=True)
            gone.append(path)
    for blob in _listed(host.blobs):
        path = f"{host.blobs}/{blob}"
        try:
            if os.lstat(path).st_nlink == 1 or blob.endswith(_NEW):
                os.unlink(path)
        except FileNotFoundError:
            # It has its own name by now.
            continue
    return gone


def _is_package(name: str) -> bool:
    digest, dash, vm = name.partition("-")
    return bool(dash) and len(digest) == 32 and _DIGEST.issuperset(digest) and names.is_vm_name(vm)


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def _make(directory: str) -> None:
    os.makedirs(directory, exist_ok=True)
    # VMs' users read packages, whatever the umask of who was first.
    for path in (os.path.dirname(directory), directory):
        os.chmod(path, 0o755)
