# SPDX-License-Identifier: MIT
"""ssh's proxy into guests, run as ssh runs it, against made-up hypervisors on real sockets.

tests/system/test_virtual.py has the kernel's vsock, which not every machine has.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm_host import vsock
from microvm_host.cli import jobs

BANNER = b"SSH-2.0-Guest\r\n"


def hypervisor(client: socket.socket) -> None:
    """What firecracker and cloud-hypervisor do, of a guest that listens at port 22 alone."""
    line = b""
    while not line.endswith(b"\n"):
        line += client.recv(1)
    if line == b"CONNECT 22\n":
        # At one stroke, as it may come.
        client.sendall(b"OK 1073741824\n" + BANNER)
        assert client.recv(100) == b"SSH-2.0-Client\r\n"
        client.sendall(b"bye")


@pytest.fixture
def listen(root: Path) -> Iterator[Callable[..., str]]:
    """Gives a function that serves one client at a socket, and gives the way to it."""
    kept = []

    def start(answer: Callable[[socket.socket], object], family: int = socket.AF_UNIX) -> str:
        listener = socket.socket(family)
        listener.bind(("127.0.0.1", 0) if family == socket.AF_INET else str(root / "own vsock%p"))
        listener.listen()

        def serve() -> None:
            try:
                client, _ = listener.accept()
            except OSError:
                # Nobody came.
                return
            with client:
                client.settimeout(30)
                answer(client)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        kept.append((listener, thread))
        if family == socket.AF_INET:
            return str(listener.getsockname()[1])
        return f"unix:{os.getuid()}:{root}/own vsock%p"

    yield start
    for listener, thread in kept:
        # Which ends the accepting.
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)
        listener.close()


def proxy(port: int | str, *ways: str) -> tuple[socket.socket | None, int, str]:
    """Run it as ssh does; gives the connection that it handed over, its exit code, its words."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        done = subprocess.run(
            [sys.executable, "-B", "-IS", os.path.abspath(vsock.__file__), str(port), *ways],
            stdout=theirs.fileno(),
            stderr=subprocess.PIPE,
            text=True,
            cwd="/",
        )
        theirs.close()
        _, handed, _, _ = socket.recv_fds(ours, 1, 2)
    connection = socket.socket(fileno=handed[0]) if handed else None
    return connection, done.returncode, done.stderr


def talk(connection: socket.socket | None) -> bytes:
    assert connection is not None
    with connection:
        connection.settimeout(30)
        heard = connection.recv(len(BANNER), socket.MSG_WAITALL)
        connection.sendall(b"SSH-2.0-Client\r\n")
        assert connection.recv(3, socket.MSG_WAITALL) == b"bye"
    return heard


def sshd(client: socket.socket) -> None:
    client.sendall(BANNER)
    client.recv(100)
    client.sendall(b"bye")


def says(text: bytes) -> Callable[[socket.socket], object]:
    def answer(client: socket.socket) -> None:
        client.recv(100)
        client.sendall(text)

    return answer


def test_by_a_hypervisors_own_socket(listen: Callable[..., str]) -> None:
    way = listen(hypervisor)
    connection, code, said = proxy(22, way, "tcp:192.0.2.1")
    assert (code, said) == (0, "")
    # Nothing of it was lost, or comes before it.
    assert talk(connection) == BANNER


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda client: client.recv(100), "nobody listens in the guest"),
        (says(b"NO 1\n"), "the hypervisor's answer makes no sense"),
        (says(b"OK " + b"1" * 99), "the hypervisor's answer makes no sense"),
    ],
)
def test_by_the_address_where_vsock_does_not_lead(
    listen: Callable[..., str], answer: Callable[[socket.socket], object], message: str
) -> None:
    port = listen(sshd, socket.AF_INET)
    connection, code, said = proxy(port, listen(answer), "tcp:127.0.0.1")
    assert code == 0
    assert message in said and said.endswith("; trying 127.0.0.1\n")
    assert talk(connection) == BANNER


def test_a_hypervisor_that_does_not_answer(
    listen: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(vsock, "_AT_LAST", 0.2)
    over = threading.Event()
    assert vsock.main(["vsock.py", "22", listen(lambda client: over.wait(30))]) == 1
    over.set()
    assert "timed out; does the guest's sshd listen there?" in capfd.readouterr().err


def test_what_is_not_the_vms_user_is_not_reached(listen: Callable[..., str], root: Path) -> None:
    """Root is not to be led to a socket of somebody else's, with bytes of a guest's choice."""
    heard: list[bytes] = []
    way = listen(lambda client: heard.append(client.recv(100)))
    path = way.partition(":")[2].partition(":")[2]
    (root / "link").symlink_to(path)
    for wrong in (f"unix:{os.getuid()}:{root}/link", f"unix:{os.getuid() + 1}:{path}"):
        connection, code, said = proxy(22, wrong)
        assert (connection, code) == (None, 1)
        assert "is not a socket of the VM's user" in said
    assert proxy(22, f"unix:{os.getuid()}:{root}/none")[2].count("there is no such socket") == 1
    assert heard == []


def test_no_way(root: Path) -> None:
    assert proxy("x", "tcp:127.0.0.1")[1] == proxy(22)[1] == 2
    connection, code, said = proxy(22, "fax:1", f"unix:{os.getuid()}:{root}/none")
    assert (connection, code) == (None, 1)
    assert "there is no way 'fax'" in said


def test_the_command_that_ssh_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(jobs, "_become", called.append)
    ways = ["unix:7:/a b/100%.vsock", "tcp:fe80::1%mvbr0"]
    jobs.become_ssh("root", "web", "vsock/42", ways, [])
    (command,) = (word for word in called[0] if word.startswith("ProxyCommand="))
    # As ssh does it, and then a shell.
    command = command.replace("%p", "22").replace("%%", "%").removeprefix("ProxyCommand=")
    assert shlex.split(command)[2:] == [os.path.abspath(vsock.__file__), "22", *ways]
