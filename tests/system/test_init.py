# SPDX-License-Identifier: MIT
"""A newcomer's three commands: install, `microvm init`, `systemctl start`; then a login prompt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .test_access import Console
from .toolkit import Toolkit, eventually

pytestmark = pytest.mark.container

# A guest is emulated, and its host may be busy.
BOOTS_WITHIN = 300


@contextmanager
def console(toolkit: Toolkit, vm: str, *arguments: str) -> Iterator[Console]:
    """`microvm console` for as long as the block takes."""
    shown = Console(toolkit, *arguments, vm=vm)
    try:
        yield shown
    finally:
        shown.process.kill()
        shown.process.wait()


def log_in(shown: Console, vm: str) -> None:
    """From the prompt on; one that was there before anybody looked comes again by Enter."""
    shown.await_text(f"[microvm: {vm}: connected", BOOTS_WITHIN)
    shown.type("\r")
    shown.await_text(f"{vm} login: ", BOOTS_WITHIN)
    shown.type("root\r")
    shown.await_text(f"root@{vm}:/root#")


def test_the_third_command_is_a_login_prompt(toolkit: Toolkit, vm: str) -> None:
    said = toolkit.sh(f"microvm init {vm}")
    assert f"declared /etc/microvms/{vm}.toml" in said
    assert f"start it: systemctl start microvm@{vm}.service" in said
    toolkit.systemctl("start", f"microvm@{vm}")
    with console(toolkit, vm) as shown:
        log_in(shown, vm)
        shown.type("id\r")
        shown.await_text("uid=0(root)")
    toolkit.await_line(vm, "log in as root")
    toolkit.await_line(vm, f"{vm}: eth0 has 10.0.2.15")
    # It has no agent, and no port for one.
    done = toolkit.host.run(["microvm", "exec", vm, "true"], check=False)
    assert done.returncode == 255 and "has no port for a guest agent" in done.stderr
    # What is missing is a line, and where that goes.
    text = toolkit.host.read(f"/etc/microvms/{vm}.toml").splitlines()
    number = next(at for at, line in enumerate(text, 1) if line.startswith("["))
    assert (
        f"write `qemu.guestAgent = true` into /etc/microvms/{vm}.toml above line {number}, the "
        f"first that begins with '['; then: microvm update -R {vm}" in done.stderr
    )
    assert "256 MB of 256 MB" in toolkit.sh(f"microvm balloon {vm}")
    toolkit.systemctl("stop", f"microvm@{vm}", timeout=120)
    journal = "\n".join(toolkit.journal(vm))
    # Asked again after a second, as any guest that may still boot.
    assert "the guest powered off in" in journal, journal
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    # Once more: it is there, and stays as it is.
    again = toolkit.host.run(["microvm", "init", vm], check=False)
    assert again.returncode == 2 and "is declared already" in again.stderr


def test_a_guest_with_more_than_was_proposed(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh(f"microvm init --memory 200 {vm}")
    toolkit.sh(f"mkdir -p /etc/microvms/{vm}.toml.d")
    toolkit.host.write(
        f"/etc/microvms/{vm}.toml.d/disk.toml",
        '[[volumes]]\nimage = "data.img"\nsize = 16\nfsType = "none"\n',
    )
    toolkit.sh(f"microvm update {vm}")
    toolkit.systemctl("start", f"microvm@{vm}")
    with console(toolkit, vm, "--wait") as shown:
        log_in(shown, vm)
        shown.type("id; hostname; grep MemTotal /proc/meminfo; cat /sys/class/block/vda/size\r")
        shown.await_text("32768")
        seen = shown.text.replace("\r", "")
        assert "uid=0(root)" in seen and f"\n{vm}\n" in seen, seen
        total = int(seen.partition("MemTotal:")[2].split()[0])
        assert 120_000 < total < 200 * 1024
        # From inside.
        shown.type("poweroff\r")
        assert shown.ends() == 0
        assert f"[microvm: {vm}: the VM has ended]" in shown.text
    toolkit.await_line(vm, "the guest powered itself off")
    # As its declaration has it, it stays so.
    eventually(
        lambda: toolkit.property(f"microvm@{vm}", "ActiveState"),
        lambda state: state == "inactive",
        60,
        "it is up again",
    )


def test_a_host_that_lacks_something_is_told(toolkit: Toolkit, vm: str) -> None:
    done = toolkit.host.run(["microvm", "init", vm, "--kernel", "/none"], check=False)
    assert done.returncode == 1
    assert "/none: cannot be read: No such file" in done.stderr
    assert "apt install linux-image-amd64" in done.stderr
    printed = toolkit.host.run(["microvm", "init", vm, "-o", "-"]).stdout
    assert 'kernel = "/var/lib/microvm-host/guests/small-' in printed
    assert not toolkit.host.exists(f"/etc/microvms/{vm}.toml")
