# SPDX-License-Identifier: MIT
"""VMs of the kinds that several tests use, and what is done with them."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.guest.image import Image
from tests.guest.package import Guest, Stub

from .toolkit import IMAGE, Toolkit, eventually


def guest(name: str, **fields: object) -> Guest:
    """A real guest whose kernel and initrd are those of the host's image."""
    fields = {"image": Image(Path(IMAGE)), "placement": "refer", "image_prefix": IMAGE, **fields}
    return Guest(name=name, **fields)  # type: ignore[arg-type]


def control(name: str) -> dict[str, object]:
    """The fields of a package that tells its control socket."""
    return {"control_socket": f"{name}.sock", "control_protocol": "qmp"}


def saying(line: str) -> str:
    """Shell that says a guest's message, made by printf, over the hypervisor's own vsock."""
    return f"printf '{line}' | socat - UNIX-CONNECT:notify.vsock_8888"


def declare(toolkit: Toolkit, package: Guest | Stub, **settings: object) -> None:
    """Make a VM and declare it, not to start at boot, with these settings."""
    toolkit.create(package)
    lines = [f'runner = "/opt/packages/{package.name}"', "autostart = false"]
    for key, value in settings.items():
        lines.append(f'{key} = "{value}"' if isinstance(value, str) else f"{key} = {value}")
    toolkit.host.write(f"/etc/microvms/{package.name}.toml", "\n".join([*lines, ""]))
    toolkit.systemctl("daemon-reload")


def start(toolkit: Toolkit, vm: str, *, ready: bool = True) -> None:
    toolkit.systemctl("start", f"microvm@{vm}")
    if ready:
        toolkit.await_line(vm, f"GUEST {vm}: ready")


def stop(toolkit: Toolkit, vm: str) -> tuple[list[str], str, float]:
    """Stop a VM; gives the lines since, the unit's result, and the seconds that it took."""
    before = len(toolkit.journal(vm))
    began = time.monotonic()
    toolkit.systemctl("stop", f"microvm@{vm}", timeout=120)
    seconds = time.monotonic() - began
    lines = toolkit.journal(vm)[before:]
    return lines, toolkit.property(f"microvm@{vm}", "Result"), seconds


def ours(lines: list[str]) -> list[str]:
    """What the helper said on the way, without the times."""
    rungs = ("asked the guest", "sending SIG", "was not shut down", "asked once", "at last by")
    found = [line for line in lines if any(rung in line for rung in rungs)]
    return [line.partition(" s: ")[2] if line.startswith("at ") else line for line in found]


@contextmanager
def hasty_guard(toolkit: Toolkit, waits: float) -> Iterator[None]:
    """Have the guard kill so many seconds after a stop's bound, and look out for that at once."""
    code = "/usr/local/lib/microvm-host/microvm_host"
    toolkit.sh(
        f"cp {code}/guard.py {code}/helper/ending.py /tmp; "
        f"sed -i 's/^GUARD_WAITS = .*/GUARD_WAITS = {waits}/' {code}/helper/ending.py; "
        "sed -i 's/^\\(NEVER_TOO_SOON\\|BEGINS_WITHIN\\) = .*/\\1 = 1.0/' "
        f"{code}/guard.py; grep -c ' = 1.0$' {code}/guard.py | grep -qx 2"
    )
    try:
        yield
    finally:
        # Each in one step: the last helper of the stop may just be reading it.
        toolkit.sh(f"mv /tmp/guard.py {code}/guard.py; mv /tmp/ending.py {code}/helper/ending.py")


def no_helper_stays(toolkit: Toolkit) -> None:
    """Assert that no process of ours goes on beside what runs."""
    # The kernel has them by the script's name, not the interpreter's. Not at once: systemd hears
    # of a start a moment before the helper becomes the hypervisor.
    eventually(
        lambda: toolkit.sh("pgrep -ax helper", check=False),
        lambda found: not found,
        30,
        "a helper has stayed",
    )


@contextmanager
def connected(toolkit: Toolkit, vm: str, *tags: str) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """Connect to shares as a hypervisor would, until each virtiofsd has taken that."""
    clients = {}
    try:
        for tag in tags:
            unit = f"microvm-virtiofsd-{vm}-{tag}.service"
            said = f"journalctl --output=cat --unit={unit} | grep -ci 'client connected\\|received'"
            before = toolkit.sh(said, check=False)
            socket = f"/var/lib/microvms/{vm}/{vm}-virtiofs-{tag}.sock"
            clients[tag] = toolkit.host.spawn(["socat", f"UNIX:{socket}", "STDIO"])
            eventually(
                lambda said=said: toolkit.sh(said, check=False),  # type: ignore[misc]
                lambda count, before=before: count != before,  # type: ignore[misc]
                60,
                f"the virtiofsd of {tag} takes no connection",
            )
        yield clients
    finally:
        for client in clients.values():
            client.kill()
            client.communicate()
