# SPDX-License-Identifier: MIT
"""The demonstration behind `make demo`: the main job, on a throw-away host, in a minute.

Boots a systemd machine in a container, installs the toolkit into it, makes a runner package with a
real kernel and a small real guest, and does with it what an administrator would do, showing each
command and what it printed. `--shell` stops in the middle, for the reader to go on by hand.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from tests.host import container
from tests.host.container import ContainerHost
from tests.host.interface import CommandFailed, HostError
from tests.system.toolkit import IMAGE, Toolkit

NAME = "demo"
PACKAGE = "/opt/demo-package"
# A guest that the toolkit makes itself.
INITIAL = "web"
HOST_ADDRESS, GUEST_ADDRESS = "10.77.0.1", "10.77.0.2"


class Failed(Exception):
    """The demonstration did not show what it promises."""


class Show:
    """Prints what is done, with the time that it took."""

    def __init__(self, toolkit: Toolkit | None = None) -> None:
        self.toolkit = toolkit
        self._began = time.monotonic()
        self._colours = ("\033[1m", "\033[36m", "\033[0m") if sys.stdout.isatty() else ("",) * 3

    def step(self, text: str) -> None:
        """A heading, with the seconds since the beginning."""
        bold, _, end = self._colours
        print(f"\n{bold}[{time.monotonic() - self._began:5.1f} s] {text}{end}", flush=True)

    def command(self, line: str, expect: str = "") -> str:
        """Run a line on the host, and show it with its output.

        Raises:
            Failed: it failed, or its output has not what it is to have.
        """
        assert self.toolkit is not None
        _, cyan, end = self._colours
        print(f"{cyan}host# {line}{end}", flush=True)
        began = time.monotonic()
        done = self.toolkit.host.run(["sh", "-c", f"{{ {line}; }} 2>&1"], check=False, timeout=120)
        for text in done.stdout.splitlines():
            print(f"      {text}")
        print(f"      ({(time.monotonic() - began) * 1000:.0f} ms)", flush=True)
        if done.returncode or expect not in done.stdout:
            raise Failed(f"`{line}` exited with {done.returncode}; expected {expect!r}")
        return done.stdout


def demonstrate(toolkit: Toolkit, show: Show, *, with_shell: bool) -> None:
    """The whole story, on a host that has booted."""
    show.step("Installing the toolkit into it: make install")
    toolkit.install()
    show.step("Making a guest of the host's own kernel and busybox, and a runner package of it")
    toolkit.build_image()
    toolkit.sh("mkdir -p /srv/demo; echo 'written by the host' > /srv/demo/hello")
    toolkit.python(
        *("-m", "tests.guest", "package", "--name", NAME, "--image", IMAGE, "-o", PACKAGE),
        *("--tap", f"{NAME}0,02:00:00:00:00:01,{GUEST_ADDRESS}/24", "--ping", HOST_ADDRESS),
        *("--share", "data:/srv/demo:/mnt/data"),
    )
    show.command(f"find {PACKAGE} -type f | sort")
    before = toolkit.footprint()

    show.step("A VM of that package, started by systemctl")
    show.command(f"microvm create {NAME} --runner {PACKAGE}")
    show.command(f"systemctl start microvm@{NAME}")
    show.command(f"ip address add {HOST_ADDRESS}/24 dev {NAME}0")
    lines = toolkit.await_line(NAME, f"GUEST {NAME}: ready")
    show.step("The guest's console is in the journal")
    show.command(f"journalctl -u microvm@{NAME} -o cat | grep GUEST", "hello from Linux")
    show.step("Host and guest reach each other over the tap, made for the VM's own user")
    show.command(f"ip -details link show {NAME}0 | grep tun", "user microvm")
    show.command(f"ping -c 2 -W 5 {GUEST_ADDRESS}", "0% packet loss")
    if f"GUEST {NAME}: ping {HOST_ADDRESS} ok" not in lines:
        toolkit.await_line(NAME, f"GUEST {NAME}: ping {HOST_ADDRESS} ok")
    show.command(f"journalctl -u microvm@{NAME} -o cat | grep 'ping {HOST_ADDRESS}'", "ok")
    show.step("A file through the share, from both sides")
    show.command(f"journalctl -u microvm@{NAME} -o cat | grep 'file hello'", "written by the host")
    show.command("head /srv/demo/*", "from-guest")
    show.step("What there is, and how it is")
    show.command("microvm -l", f"{NAME}: current")
    show.command(f"systemctl status --no-pager -n 3 microvm@{NAME}", "Running qemu")
    if with_shell:
        show.step("A shell on that host; `exit` ends it and throws the host away")
        toolkit.host.shell()
        return

    show.step("A graceful stop")
    show.command(f"systemctl stop microvm@{NAME}")
    show.command(
        f"journalctl -u microvm@{NAME} -o cat -n 12 | grep -E 'shutting|powering|shut down'",
        "powering off",
    )
    show.command("microvm -l", "not booted")

    show.step(
        "Without a package: a guest of the host's own kernel and busybox, and its declaration"
    )
    show.command(f"microvm init {INITIAL}", f"declared /etc/microvms/{INITIAL}.toml")
    show.command(f"systemctl start microvm@{INITIAL}")
    toolkit.await_line(INITIAL, "log in as root")
    show.command(f"journalctl -u microvm@{INITIAL} -o cat -n 3", "log in as root")
    show.command(f"systemctl stop microvm@{INITIAL}")
    show.step("Nothing is left behind: interfaces, sockets, units, processes, records")
    toolkit.await_footprint(before)
    show.command("ip -brief link; systemctl list-units 'microvm@*'; ls -A /run/microvm-host")


def main() -> int:
    """Run it; gives the exit code."""
    parser = argparse.ArgumentParser(prog="demo", description="Run a microVM on a throw-away host.")
    parser.add_argument("--shell", action="store_true", help="end in a shell of that host")
    parser.add_argument("--suite", default="trixie", help="its Debian suite (default: %(default)s)")
    options = parser.parse_args()
    if lack := container.missing():
        print(f"demo: {lack}", file=sys.stderr)
        return 1
    show = Show()
    show.step(f"Booting a throw-away Debian {options.suite} (the first time, building it)")
    try:
        with ContainerHost(options.suite) as host:
            show.toolkit = Toolkit(host)
            show.command("systemctl is-system-running; systemctl --version | head -1")
            demonstrate(show.toolkit, show, with_shell=options.shell)
    except (Failed, AssertionError, HostError, CommandFailed, subprocess.TimeoutExpired) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    show.step("Done; the host is gone, and this machine is as it was")
    return 0


if __name__ == "__main__":
    sys.exit(main())
