# SPDX-License-Identifier: MIT
"""Where Debian's packages come from: suite and mirror, by what this host says of its own."""

from __future__ import annotations

import re

from .. import process
from ..errors import MicrovmHostError, UsageError
from ..frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..paths import HostPaths

# What is told of hosts that are no Debian.
SUITE = "stable"
MIRROR, SECURITY = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
# Suites that have neither updates nor security updates beside them.
_ALONE = ("sid", "unstable", "experimental", "rc-buggy")
_FORMAT = "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)"


@frozen
class Origin:
    """A suite, its mirror, and all lines of its sources.list(5); the keyring by which it is known,
    None where apt of this host knows it already."""

    suite: str
    mirror: str
    sources: tuple[str, ...]
    keyring: str | None = None


def origin(host: HostPaths, suite: str | None = None, mirror: str | None = None) -> Origin:
    """Where a root is made from; None is what this host's own apt has, or else Debian's own.

    A mirror that was given has all packages: who gives one may not reach anything else.

    Raises:
        UsageError: what was given can be neither suite nor mirror.
        MicrovmHostError: this host is no Debian, and has no keys of Debian's archive.
    """
    about = _os_release(host)
    is_debian = about.get("ID") == "debian"
    if suite is None:
        # Testing and unstable have none, and take their name from what they are becoming.
        suite = about.get("VERSION_CODENAME", SUITE) if is_debian else SUITE
    if not re.fullmatch(r"[a-z][a-z0-9.-]*", suite):
        raise UsageError(
            f"{suite!r} cannot be a suite of Debian", hint="trixie, stable or sid are such"
        )
    if mirror is not None:
        if not re.fullmatch(r"https?://[^\s\[\]]+", mirror):
            raise UsageError(
                f"{mirror!r} cannot be a mirror", hint=f"it looks like {MIRROR}, without spaces"
            )
        found, security = mirror.rstrip("/"), None
    else:
        found, security = _of_apt() if is_debian else (MIRROR, SECURITY)
    sources = [f"deb {found} {suite} main"]
    if security is not None and suite not in _ALONE:
        sources.append(f"deb {found} {suite}-updates main")
        sources.append(f"deb {security} {suite}-security main")
    return Origin(suite, found, tuple(sources), None if is_debian else _keyring(host))


def _os_release(host: HostPaths) -> dict[str, str]:
    for path in host.os_release_places():
        try:
            with open(path, encoding="utf-8") as source:
                pairs = (line.strip().partition("=") for line in source)
                return {key: value.strip("\"'") for key, _, value in pairs}
        except OSError:
            continue
    return {}


def _of_apt() -> tuple[str, str]:
    """Mirror and security archive that this host's apt has fetched lists from."""
    try:
        said = process.output(
            ["apt-get", "indextargets", "--format", _FORMAT, "Created-By: Packages"]
        )
    except MicrovmHostError:
        said = ""
    return of_lists(said)


def of_lists(text: str) -> tuple[str, str]:
    """Mirror and security archive of apt's list of what it has; Debian's own where there is none.

    The security archive has Debian's origin and a label of its own; it holds no suite whole.
    """
    found: dict[str, str] = {}
    for line in text.splitlines():
        source, label, uri = (*line.split("\t"), "", "")[:3]
        if source == "Debian" and uri.startswith(("http://", "https://")):
            found.setdefault(label, uri.rstrip("/"))
    return found.get("Debian", MIRROR), found.get("Debian-Security", SECURITY)


def _keyring(host: HostPaths) -> str:
    import os

    path = host.debian_keyring
    if not os.path.exists(path):
        raise MicrovmHostError(
            "this host has no keys of Debian's archive",
            path=path,
            hint="install them: the package is called debian-archive-keyring in most distributions",
        )
    return path
