# SPDX-License-Identifier: MIT
"""`python3 -m tests.host`: build the roots, get a shell in a host, clear everything away."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tests.host import cache, leftovers, root
from tests.host.container import ContainerHost
from tests.host.interface import HostError
from tests.host.progress import step
from tests.host.virtual import VirtualHost


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tests.host", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    shell = verbs.add_parser("shell", help="boot a host, give a shell in it, throw it away")
    shell.add_argument("--suite", choices=root.SUITES, default=root.DEFAULT_SUITE)
    shell.add_argument("--virtual", action="store_true", help="a virtual host, not a container")
    shell.add_argument(
        "--spare-devices", action="store_true", help="a virtual one with PCI devices for microVMs"
    )
    build = verbs.add_parser("build", help="build roots (all suites if none is named)")
    build.add_argument("suites", nargs="*", metavar="SUITE", help=", ".join(root.SUITES))
    build.add_argument("--image", action="store_true", help="the virtual host's images as well")
    verbs.add_parser("clean", help="remove abandoned hosts and all built roots")
    return parser


def _shell(suite: str, *, virtual: bool, spare_devices: bool) -> int:
    if virtual or spare_devices:
        host: VirtualHost | ContainerHost = VirtualHost(suite, spare_devices=spare_devices)
    else:
        host = ContainerHost(suite)
    with step(f"booting a {host.kind} host of {suite}"):
        host.start()
    try:
        print("leave with exit or Ctrl-D; the host is then thrown away", file=sys.stderr)
        return host.shell()
    finally:
        host.stop()


def _build(suites: Sequence[str], *, image: bool) -> int:
    for suite in suites or root.SUITES:
        built = root.with_image(suite) if image else root.with_either(suite)
        print(built.directory)
    return 0


def _clean() -> int:
    for name in leftovers.clean():
        print(f"removed the abandoned host {name}")
    if left := [path.name for path in cache.hosts().glob("*/owner")]:
        # Their overlays stand on the roots that would go.
        print(f"{len(left)} hosts are running; the roots stay", file=sys.stderr)
        return 1
    for place in (cache.roots(), cache.guests()):
        if place.is_dir():
            with step(f"removing {place}"):
                root.discard(place)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; errors of the hosts end in one line and exit code 1."""
    options = _parser().parse_args(argv)
    try:
        match options.verb:
            case "shell":
                return _shell(
                    options.suite, virtual=options.virtual, spare_devices=options.spare_devices
                )
            case "build":
                return _build(options.suites, image=options.image)
            case _:
                return _clean()
    except HostError as error:
        print(f"tests.host: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
