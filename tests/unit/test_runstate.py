# SPDX-License-Identifier: MIT
"""Asking many hypervisors at once whether their guests are paused, hostile ones among them."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from microvm_host import attach, runner, runstate
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths
from microvm_host.record import Record

Serve = Callable[[socket.socket], None]


@pytest.fixture
def vm(host: HostPaths) -> Iterator[Callable[..., None]]:
    """Makes a running VM, whose hypervisor does with each client what is given."""
    listeners: list[socket.socket] = []

    def make(name: str, serve: Serve | None, *, uid: int | None = None) -> None:
        directory = Path(host.vm(name))
        directory.mkdir(parents=True)
        record = Record(host.record(name, "booted"))
        record.append("user", "me", str(os.getuid() if uid is None else uid), "us", "0")
        record.append("control", "qmp", "c.sock")
        listening = socket.socket(socket.AF_UNIX)
        listening.bind(str(directory / "c.sock"))
        listening.listen(1)
        listeners.append(listening)

        def accept() -> None:
            while serve is not None:
                try:
                    client, _ = listening.accept()
                    with client:
                        serve(client)
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()

    yield make
    for listening in listeners:
        listening.close()


def qemu(states: list[str], *, wakes: bool = True) -> Serve:
    """A QEMU in the last of these states; `cont` makes it run, unless it does not wake."""

    def serve(client: socket.socket) -> None:
        client.sendall(b'{"QMP": {}}\r\n')
        for line in client.makefile("rb"):
            asked = json.loads(line)
            if asked["execute"] == "cont" and wakes:
                states.append("running")
            if asked["execute"] == "stop":
                states.append("paused")
            result = {"status": states[-1]} if asked["execute"] == "query-status" else {}
            answer = {"return": result, **({"id": asked["id"]} if "id" in asked else {})}
            client.sendall(json.dumps(answer).encode() + b"\r\n")

    return serve


def hangs(client: socket.socket) -> None:
    while client.recv(4096):
        pass


def floods(client: socket.socket) -> None:
    while True:
        client.sendall(bytes(65536))


def test_those_that_are_paused(host: HostPaths, vm: Callable[..., None]) -> None:
    vm("runs", qemu(["running"]))
    vm("full", qemu(["io-error"]))
    vm("odd", qemu(["\x1b[2J"]))
    vm("others", qemu(["paused"]), uid=os.getuid() + 1)
    vm("hangs", hangs)
    vm("floods", floods)
    vm("deaf", None)
    (Path(host.vm("link"))).mkdir()
    os.symlink(f"{host.vm('full')}/c.sock", f"{host.vm('link')}/c.sock")
    for name in ("link", "nothing"):
        Record(host.record(name, "booted")).append("user", "me", str(os.getuid()), "us", "0")
        Record(host.record(name, "booted")).append("control", "qmp", "c.sock")
    began = time.monotonic()
    names = ["runs", "full", "odd", "others", "hangs", "floods", "deaf", "link", "nothing", "gone"]
    assert runstate.paused(names, host) == {"full": "io-error"}
    assert time.monotonic() - began < 2 * runstate.ANSWERS_WITHIN


def test_many_that_hang_have_one_bound(
    host: HostPaths, vm: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runstate, "AT_ONCE", 2)
    monkeypatch.setattr(runstate, "ALL_WITHIN", 0.7)
    names = [f"h{number}" for number in range(9)]
    for name in names:
        vm(name, None)
    vm("full", qemu(["io-error"]))
    began = time.monotonic()
    assert runstate.paused(["full", *names], host) == {"full": "io-error"}
    assert time.monotonic() - began < 2


def running(host: HostPaths, name: str) -> attach.Running:
    package = runner.Package(path="/package", control_socket=runner.ControlSocket("c.sock", "qmp"))
    return attach.Running(name, host.vm(name), package, os.getuid(), os.getgid(), "me")


def test_pause_and_resume(host: HostPaths, vm: Callable[..., None]) -> None:
    states = ["running"]
    vm("web", qemu(states))
    web = running(host, "web")
    assert [runstate.pause(web), runstate.pause(web)] == ["running", "paused"]
    assert [runstate.resume(web), runstate.resume(web)] == ["paused", "running"]
    assert states == ["running", "paused", "running"]


def test_a_disk_that_is_still_full(host: HostPaths, vm: Callable[..., None]) -> None:
    vm("web", qemu(["io-error"], wakes=False))
    with pytest.raises(MicrovmHostError, match=r"paused microVM web again \(io-error\)") as caught:
        runstate.resume(running(host, "web"))
    assert "free space" in caught.value.hint


def test_a_package_that_names_no_control_socket(host: HostPaths) -> None:
    nameless = attach.Running("web", host.vm("web"), runner.Package(path="/p"), 0, 0, "me")
    with pytest.raises(MicrovmHostError, match="names no control socket"):
        runstate.pause(nameless)
