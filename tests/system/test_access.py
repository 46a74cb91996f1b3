# SPDX-License-Identifier: MIT
"""Into a guest that runs: its console, commands by its agent, its balloon; and what it has.

One guest serves all of these, and the last test ends it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator

import pytest

from tests.host.interface import CommandFailed

from .toolkit import IMAGE, Toolkit, eventually

pytestmark = pytest.mark.container

VM = "access"
# The agent and its libraries come from the host's own tree.
DECLARATION = f"""\
autostart = false
kernel = "{IMAGE}/vmlinuz"
initrd = "{IMAGE}/initrd"
mem = 256
balloon = true
qemu.guestAgent = true
# What the balloon takes, the guest's kernel takes off its total then.
deflateOnOOM = false
kernelParams = [
    "quiet", "loglevel=3", "guest.name={VM}", "guest.share=tree,/tree", "guest.9p=nine,/nine",
    "guest.agent=/tree", "guest.prompt=1",
]

[[shares]]
tag = "tree"
source = "/srv/tree"
proto = "virtiofs"
readOnly = true

[[shares]]
tag = "nine"
source = "/srv/nine"
proto = "9p"
"""


@pytest.fixture(scope="module")
def guest(toolkit: Toolkit) -> Iterator[str]:
    """The VM, up, with its agent listening."""
    before = toolkit.footprint()
    toolkit.sh(
        "mkdir -p /etc/microvms /srv/tree /srv/nine; mount --bind / /srv/tree; "
        "echo 'from nine' >/srv/nine/hello; chown microvm /srv/nine"
    )
    toolkit.host.write(f"/etc/microvms/{VM}.toml", DECLARATION)
    toolkit.sh("microvm apply")
    # Nobody is there yet.
    for command in ("console", "exec", "balloon"):
        arguments = ["true"] if command == "exec" else []
        done = toolkit.host.run(["microvm", command, VM, *arguments], check=False)
        assert done.returncode == (255 if command == "exec" else 1)
        assert f"microVM {VM} does not run; microvm start {VM}" in done.stderr
    toolkit.systemctl("start", f"microvm@{VM}", timeout=120)
    try:
        toolkit.await_line(VM, f"GUEST {VM}: ready", timeout=180)
        eventually(
            lambda: toolkit.host.run(["microvm", "exec", VM, "true"], check=False).returncode,
            lambda code: code == 0,
            60,
            "the agent does not answer",
        )
        yield VM
    finally:
        toolkit.remove(VM)
        toolkit.sh("umount /srv/tree; rm -r /srv/nine", check=False)
    toolkit.await_footprint(before)


class Console:
    """A command that shows a console: what it has shown, and what is typed."""

    def __init__(
        self, toolkit: Toolkit, *arguments: str, terminal: bool = False, vm: str = VM
    ) -> None:
        command = ["microvm", "console", *arguments, vm]
        if terminal:
            # A terminal, and how it is afterwards.
            line = f'stty -a; {" ".join(command)}; echo "code $?"; stty -a'
            command = ["script", "--quiet", "--command", line, "/dev/null"]
        words = ["sh", "-c", 'exec 2>&1; exec "$@"', "sh", *command]
        self.process = toolkit.host.spawn(words)
        assert self.process.stdout is not None
        os.set_blocking(self.process.stdout.fileno(), False)
        self.text = ""

    def look(self) -> str:
        """All that it has shown by now."""
        assert self.process.stdout is not None
        try:
            while data := os.read(self.process.stdout.fileno(), 65536):
                self.text += data.decode(errors="replace")
        except BlockingIOError:
            pass
        return self.text

    def await_text(self, text: str, timeout: float = 180) -> None:
        eventually(self.look, lambda shown: text in shown, timeout, f"no {text!r}")

    def type(self, text: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(text)
        self.process.stdin.flush()

    def ends(self) -> int:
        code = self.process.wait(120)
        self.look()
        return code


@pytest.fixture
def show(toolkit: Toolkit, guest: str) -> Iterator[Callable[..., Console]]:
    """Shows the console; what is left of that ends with the test."""
    shown: list[Console] = []

    def console(*arguments: str, terminal: bool = False) -> Console:
        shown.append(Console(toolkit, *arguments, terminal=terminal))
        return shown[-1]

    yield console
    for each in shown:
        each.process.kill()
        each.process.wait()


def test_devices_from_inside(toolkit: Toolkit, guest: str) -> None:
    lines = toolkit.journal(guest)
    text = "\n".join(lines)
    # Over PCIe: QEMU's own bridge, the panic device, and virtio by virtio 1.2's numbers: random
    # numbers, console, balloon, file system, 9p.
    found = [line.split()[4] for line in lines if line.startswith(f"GUEST {guest}: pci ")]
    assert found[:2] == ["1b36:0008", "1b36:0011"]
    assert sorted(found[2:]) == ["1af4:1002", "1af4:1003", "1af4:1005", "1af4:1009", "1af4:105a"]
    assert text.count("driver virtio-pci") == 5, text
    assert f"GUEST {guest}: port org.qemu.guest_agent.0" in lines, text
    assert f"GUEST {guest}: balloon driver virtio_balloon free-page-reporting on" in lines, text
    assert f"GUEST {guest}: share nine file hello: from nine" in lines, text
    assert f"GUEST {guest}: share nine write: ok" in lines, text
    assert toolkit.host.read("/srv/nine/from-guest") == f"written by {guest}\n"
    assert f"GUEST {guest}: share tree write: Read-only file system" in lines, text
    assert any(f"GUEST {guest}: rng virtio_rng" in line for line in lines), text


@pytest.mark.core
def test_console_on_a_terminal(toolkit: Toolkit, guest: str, show: Callable[..., Console]) -> None:
    console = show(terminal=True)
    console.await_text(f"[microvm: {guest}: connected; ^] detaches]")
    # What was before, from the journal.
    assert "GUEST access: port org.qemu.guest_agent.0" in console.look()
    console.type("\r")
    # No line yet: it has no end.
    console.await_text(f"GUEST {guest} asks: ")
    console.type("what\x03 \x1a I type\r")
    # Each key is the guest's, those that send signals too: there, Ctrl-C ends the line.
    console.await_text("I type")
    console.type("again\r")
    console.await_text("console read: again")
    console.type("last\r\x1dnot sent")
    assert console.ends() == 0
    assert f"[microvm: {guest}: detached]" in console.text
    assert "code 0" in console.text
    # The terminal is as it was.
    settings = re.findall(r"-?icanon|-?isig|-?opost|-?(?<!\w)echo(?!\w)", console.text)
    assert len(settings) >= 8 and settings[:4] == settings[-4:], settings
    assert "console read: again" in "\n".join(toolkit.journal(guest))


@pytest.mark.core
def test_one_types_and_all_see(toolkit: Toolkit, guest: str, show: Callable[..., Console]) -> None:
    first = show()
    first.await_text("connected")
    second, third = show(), show("--read-only")
    second.await_text("read-only: process ")
    assert re.search(r"read-only: process \d+ of root has the keyboard", second.look())
    third.await_text(f"[microvm: {guest}: read-only]")
    # What is typed at the others goes nowhere.
    second.type("from the second\n")
    first.type("from the first\r")
    for each in (first, second, third):
        each.await_text("console read: from the first")
        assert "from the second" not in each.look()
    # The keyboard is free when its owner is gone, however.
    first.process.kill()
    first.ends()
    fourth = show("--lines=0")
    fourth.await_text("connected")
    fourth.type("from the fourth\r")
    fourth.await_text("console read: from the fourth")
    third.await_text("console read: from the fourth")
    for each in (second, third, fourth):
        each.process.terminate()
        each.ends()
    assert toolkit.sh("pgrep -x journalctl", check=False) == ""


def test_exec(toolkit: Toolkit, guest: str) -> None:
    run = toolkit.host.run
    script = "echo out; echo err >&2; uname -n; exit 3"
    done = run(["microvm", "exec", guest, "--", "sh", "-c", script], check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n(none)\n", "err\n")
    done = run(["sh", "-c", f"seq 100000 | microvm exec -i {guest} md5sum"])
    assert done.stdout == run(["sh", "-c", "seq 100000 | md5sum"]).stdout
    done = run(["microvm", "exec", guest, "sh", "-c", "kill -TERM $$"], check=False)
    assert done.returncode == 128 + 15
    done = run(["microvm", "exec", guest, "/no/such"], check=False)
    assert done.returncode == 255
    assert "the guest's agent refuses guest-exec: Failed to execute child process" in done.stderr
    # One that takes long does not keep others out.
    wait = "touch /run/begun; until [ -e /run/enough ]; do sleep 0.2; done; echo long"
    long = toolkit.host.spawn(["microvm", "exec", guest, "--", "sh", "-c", wait])
    eventually(
        lambda: run(["microvm", "exec", guest, "test", "-e", "/run/begun"], check=False).returncode,
        lambda code: code == 0,
        60,
        "it does not begin",
    )
    assert run(["microvm", "exec", guest, "echo", "short"]).stdout == "short\n"
    assert long.poll() is None
    run(["microvm", "exec", guest, "touch", "/run/enough"])
    assert long.communicate(timeout=60)[0] == "long\n"


def test_balloon(toolkit: Toolkit, guest: str) -> None:
    def total() -> int:
        text = toolkit.sh(f"microvm exec {guest} cat /proc/meminfo")
        return int(re.findall(r"MemTotal: *(\d+) kB", text)[0]) // 1024

    assert toolkit.sh(f"microvm balloon {guest}") == f"{guest}: 256 MB of 256 MB\n"
    before = total()

    # It says how far it came within its patience, and may be asked again.
    def asked(words: str, answer: object) -> None:
        eventually(
            lambda: toolkit.sh(f"microvm balloon {guest} {words}"),
            lambda said: (json.loads(said) if "--json" in words else said) == answer,
            60,
            "the guest does not give or take",
        )

    asked("200M", f"{guest}: 200 MB of 256 MB\n")
    assert total() == before - 56
    whole = 256 << 20
    asked("256 --json", {"name": guest, "memory": whole, "actual": whole, "asked": whole})
    assert total() == before
    with pytest.raises(CommandFailed, match="was started with 256 MB, and cannot have 1024"):
        toolkit.sh(f"microvm balloon {guest} 1G")


def test_the_users_rights_are_enough_for_no_other(toolkit: Toolkit, guest: str) -> None:
    state = f"/var/lib/microvms/{guest}"
    for name in ("console", "agent", "control"):
        shown = toolkit.sh(f"stat -c '%U %a' {state}/{guest}-{name}.sock").split()
        assert shown[0] == "microvm" and shown[1][1:] == "00"
    done = toolkit.host.run(["microvm", "exec", guest, "true"], user="nobody", check=False)
    assert done.returncode == 255 and "Permission denied; this needs root" in done.stderr


@pytest.mark.core
def test_an_end_is_told(toolkit: Toolkit, guest: str, show: Callable[..., Console]) -> None:
    console, reader = show(), show("-r")
    console.await_text("connected")
    reader.await_text("read-only")
    running = toolkit.host.spawn(["microvm", "exec", guest, "sleep", "100"])
    time.sleep(1)
    toolkit.systemctl("stop", f"microvm@{guest}", timeout=120)
    for each in (console, reader):
        assert each.ends() == 0
        assert f"GUEST {guest}: powering off" in each.text
        assert each.text.endswith(f"[microvm: {guest}: the VM has ended]\n")
    _, complaint = running.communicate(timeout=30)
    assert running.returncode == 255 and complaint.startswith("microvm: ")
    # One that waits is there from the first line on.
    waiting = show("--wait", "--lines=1000")
    time.sleep(1)
    assert waiting.look() == ""
    toolkit.systemctl("start", f"microvm@{guest}", timeout=120)
    waiting.await_text(f"GUEST {guest}: hello from Linux")
    toolkit.sh(f"systemctl kill -s KILL microvm@{guest}; systemctl stop microvm@{guest}")
    assert waiting.ends() == 0
