# SPDX-License-Identifier: MIT
"""A newcomer's three commands: install, `microvm init`, `systemctl start`; then a login prompt."""

from __future__ import annotations

import pytest

from .toolkit import Toolkit, eventually

pytestmark = pytest.mark.container

# Somebody at the guest's serial port: that is QEMU's standard input and output otherwise.
TERMINAL = """\
kernelParams = ["console=ttyS0"]

[qemu]
serialConsole = false
extraArgs = [
    "-chardev", "socket,id=terminal,path=terminal.sock,server=on,wait=off,logfile=terminal.log",
    "-serial", "chardev:terminal",
]
"""


class Terminal:
    """The guest's console, as somebody sees it who may type there."""

    def __init__(self, toolkit: Toolkit, vm: str) -> None:
        self._toolkit = toolkit
        self._state = f"/var/lib/microvms/{vm}"

    def screen(self) -> str:
        return self._toolkit.sh(f"cat {self._state}/terminal.log", check=False).replace("\r", "")

    def expect(self, text: str, timeout: float = 180) -> str:
        return eventually(self.screen, lambda seen: text in seen, timeout, f"no {text!r}")

    def type(self, line: str) -> None:
        self._toolkit.sh(f"echo '{line}' | socat -t3 - UNIX-CONNECT:{self._state}/terminal.sock")


def with_terminal(toolkit: Toolkit, vm: str) -> Terminal:
    toolkit.sh(f"mkdir -p /etc/microvms/{vm}.toml.d")
    toolkit.host.write(f"/etc/microvms/{vm}.toml.d/terminal.toml", TERMINAL)
    toolkit.sh(f"microvm update {vm}")
    return Terminal(toolkit, vm)


def test_the_second_command_starts_a_guest(toolkit: Toolkit, vm: str) -> None:
    said = toolkit.sh(f"microvm init {vm}")
    assert f"declared /etc/microvms/{vm}.toml" in said
    assert f"start it: systemctl start microvm@{vm}.service" in said
    toolkit.systemctl("start", f"microvm@{vm}")
    toolkit.await_line(vm, "log in as root")
    toolkit.await_line(vm, f"{vm}: eth0 has 10.0.2.15")
    # It has no agent, and no port for one.
    done = toolkit.host.run(["microvm", "exec", vm, "true"], check=False)
    assert done.returncode == 255 and "tells of no port of a guest agent" in done.stderr
    assert "[qemu] guestAgent = true in its declaration makes one" in done.stderr
    toolkit.systemctl("stop", f"microvm@{vm}", timeout=120)
    journal = "\n".join(toolkit.journal(vm))
    assert "asked once, by its package's script" in journal, journal
    assert toolkit.property(f"microvm@{vm}", "Result") == "success"
    # Once more: it is there, and stays as it is.
    again = toolkit.host.run(["microvm", "init", vm], check=False)
    assert again.returncode == 2 and "is declared already" in again.stderr


def test_its_prompt_lets_root_in(toolkit: Toolkit, vm: str) -> None:
    toolkit.sh(f"microvm init --memory 200 {vm}")
    terminal = with_terminal(toolkit, vm)
    toolkit.host.write(
        f"/etc/microvms/{vm}.toml.d/disk.toml",
        '[[volumes]]\nimage = "data.img"\nsize = 16\nfsType = "none"\n',
    )
    toolkit.sh(f"microvm update {vm}")
    toolkit.systemctl("start", f"microvm@{vm}")
    terminal.expect(f"\n{vm} login: ")
    terminal.type("root")
    terminal.expect(f"root@{vm}:/root#")
    terminal.type("id; hostname; grep MemTotal /proc/meminfo; cat /sys/class/block/vda/size")
    seen = terminal.expect("32768\n")
    assert "uid=0(root)" in seen and f"\n{vm}\n" in seen
    total = int(seen.partition("MemTotal:")[2].split()[0])
    assert 120_000 < total < 200 * 1024
    # From inside.
    terminal.type("poweroff")
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
