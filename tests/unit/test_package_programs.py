# SPDX-License-Identifier: MIT
"""Programs and scripts that packages bring along, run against sockets and stand-ins."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from microvm_host.build import programs

from .test_declared_golden import DIRECTORY, command_line, tree, written

NO_CONTENT = b"HTTP/1.1 204 No Content\r\nServer: stand-in\r\n\r\n"
REFUSAL = b'{"fault_message":"not started"}'


class Server:
    """Takes one request over HTTP at a UNIX socket, answers, and hangs up when it is told."""

    def __init__(self, path: Path, answer: bytes) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._answer = answer
        self.request = b""
        self.hangs_up = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client:
            while b"\r\n\r\n" not in self.request:
                self.request += client.recv(4096)
            client.sendall(self._answer)
            self.hangs_up.wait(10)

    def close(self) -> None:
        self.hangs_up.set()
        self._thread.join()
        self._listener.close()


@pytest.fixture
def api(tmp_path: Path) -> Path:
    program = tmp_path / "api"
    program.write_bytes(programs.api(sys.executable))
    program.chmod(0o755)
    return program


@pytest.fixture
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    found = Server(tmp_path / "vmm.sock", getattr(request, "param", NO_CONTENT))
    yield found
    found.close()


def run(api: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(api), *arguments], cwd=api.parent, capture_output=True, text=True, timeout=20
    )


def test_a_request(api: Path, server: Server) -> None:
    done = run(api, "vmm.sock", "PUT", "/actions", '{"action_type":"SendCtrlAltDel"}')
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    head, _, body = server.request.partition(b"\r\n\r\n")
    assert head.startswith(b"PUT /actions HTTP/1.1\r\nHost: ")
    assert b"Content-Type: application/json" in head
    assert b"Content-Length: 32" in head
    assert body == b'{"action_type":"SendCtrlAltDel"}'


@pytest.mark.parametrize(
    "server",
    [b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(REFUSAL) + REFUSAL, b""],
    indirect=True,
    ids=["refuses", "hangs-up"],
)
def test_a_refusal(api: Path, server: Server) -> None:
    server.hangs_up.set()
    done = run(api, "vmm.sock", "PUT", "/actions")
    assert done.returncode == 1
    assert done.stderr.startswith("vmm.sock: PUT /actions: ")
    assert "400 Bad Request" in done.stderr or "no answer" in done.stderr


def test_nobody_there(api: Path) -> None:
    done = run(api, "vmm.sock", "PUT", "/actions")
    assert (done.returncode, done.stderr) == (1, "vmm.sock: No such file or directory\n")
    # One that is to be waited for has gone then.
    assert run(api, "--wait", "vmm.sock", "PUT", "/actions").returncode == 0


@pytest.mark.parametrize("which", ["the hypervisor goes", "the input ends"])
def test_it_waits(api: Path, server: Server, which: str) -> None:
    child = subprocess.Popen(
        [str(api), "--wait", "vmm.sock", "PUT", "/api/v1/vm.power-button"],
        cwd=api.parent,
        stdin=subprocess.PIPE,
    )
    assert child.stdin is not None
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.7)
    if which == "the hypervisor goes":
        server.hangs_up.set()
    else:
        child.stdin.close()
    assert child.wait(10) == 0


def script(case: str, name: str, directory: Path, **programs: str) -> Path:
    """A script of a golden case's package, with stand-ins in place of what it calls."""
    text = tree(DIRECTORY / f"right/{case}.toml").text(f"bin/{name}")
    (directory / "bin").mkdir(exist_ok=True)
    for program, what in programs.items():
        stand_in = directory / program
        stand_in.write_text(f"#!/bin/sh\n{what}\n")
        stand_in.chmod(0o755)
        text = text.replace(f"/usr/bin/{program}", str(stand_in))
        text = text.replace(f'"$package"/lib/{program}', str(stand_in))
    found = directory / f"bin/{name}"
    found.write_text(text)
    found.chmod(0o755)
    return found


def called(path: Path, *arguments: str) -> list[str]:
    done = subprocess.run(
        [str(path), *arguments], cwd=path.parents[1], capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("case", "program", "expected"),
    [
        (
            "cloud-hypervisor-balloon",
            "api",
            'cloud-hypervisor-balloon.sock PUT /api/v1/vm.resize {"desired_balloon":268435456}',
        ),
        (
            "firecracker-everything",
            "api",
            'firecracker-everything.sock PATCH /balloon {"amount_mib":256}',
        ),
        ("crosvm-everything", "crosvm", "balloon 268435456 crosvm-everything.sock"),
        ("stratovirt-everything", "qmp", "stratovirt-everything.sock balloon 768"),
    ],
)
def test_what_a_guest_is_left_with(case: str, program: str, expected: str, tmp_path: Path) -> None:
    """The same number means the same for all; these guests have 1024 MB."""
    balloon = script(case, "microvm-balloon", tmp_path, **{program: 'echo "$@"'})
    assert called(balloon, "768") == [expected]
    # Nobody is given more than there is.
    if program != "qmp":
        (all_of_it,) = called(balloon, "5000")
        assert all_of_it == expected.replace("268435456", "0").replace(":256", ":0")
    done = subprocess.run([str(balloon), "1G"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Usage: " in done.stderr


@pytest.mark.parametrize(
    ("plugged", "inflated", "size", "expected"),
    [
        (512, 0, 768, 768),
        (512, 768, 1536, 0),
        (512, 768, 5000, 0),
        (0, 0, 768, 256),
        # What was asked for is not there yet, or not all.
        (128, 0, 1152, 0),
        (128, 100, 1000, 152),
    ],
)
def test_a_balloon_where_memory_was_plugged(
    plugged: int, inflated: int, size: int, expected: int, tmp_path: Path
) -> None:
    """A guest that was started with 1024 MB, and to be given 512 more."""
    case = "cloud-hypervisor-everything"
    info = {
        "config": {
            "memory": {"size": 1024 << 20, "hotplugged_size": 512 << 20},
            "balloon": {"size": inflated << 20},
        },
        "memory_actual_size": 1024 + plugged - inflated << 20,
    }
    (tmp_path / "info").write_text(json.dumps(info))
    answer = f'case "$*" in *.info) cat {tmp_path}/info ;; *) echo "$@" ;; esac'
    balloon = script(case, "microvm-balloon", tmp_path, api=answer)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/surplus").write_bytes(programs.surplus(sys.executable))
    (tmp_path / "lib/surplus").chmod(0o755)
    said = f'{case}.sock PUT /api/v1/vm.resize {{"desired_balloon":{expected << 20}}}'
    assert called(balloon, str(size)) == [said]
    # It takes nothing by an answer that does not tell.
    (tmp_path / "info").write_text("{}")
    done = subprocess.run([str(balloon), "768"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")


def test_a_balloon_that_is_told_by_how_much(tmp_path: Path) -> None:
    case = "kvmtool-everything"
    balloon = script(case, "microvm-balloon", tmp_path, lkvm='echo "$HOME $@"')
    say = f"{tmp_path} balloon --name {case}"
    assert called(balloon, "768") == [f"{say} --inflate 256"]
    assert called(balloon, "768") == []
    assert called(balloon, "512") == [f"{say} --inflate 256"]
    assert called(balloon, "1000") == [f"{say} --deflate 488"]
    assert called(balloon, "2000") == [f"{say} --deflate 24"]
    # A start begins anew.
    assert (tmp_path / f"{case}-balloon").read_text() == "0\n"


def test_the_power_button_of_crosvm(tmp_path: Path) -> None:
    case = "crosvm-everything"
    shutdown = script(case, "microvm-shutdown", tmp_path, crosvm='echo "$@"')
    assert called(shutdown) == []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / f"{case}.sock"))
        assert called(shutdown) == [f"powerbtn {case}.sock"]


@pytest.mark.parametrize("case", ["cloud-hypervisor-minimal", "crosvm-minimal"])
def test_a_socket_that_was_left_is_removed_and_nothing_else(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = case.removesuffix("-minimal")
    package = written(DIRECTORY / f"right/{case}.toml", tmp_path)
    words = command_line(package, tmp_path)
    assert words[0] == f"/usr/bin/{program}"
    run = Path(package) / "bin/microvm-run"
    stand_in = tmp_path / "program"
    stand_in.write_text("#!/bin/sh\nls\n")
    stand_in.chmod(0o755)
    run.write_text(run.read_text().replace(words[0], str(stand_in)))
    state = tmp_path / "state"
    state.mkdir()
    left = state / f"{case}.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        # By its bare name: the whole path may be longer than those of sockets can be.
        monkeypatch.chdir(state)
        listening.bind(left.name)
        done = subprocess.run([str(run)], cwd=state, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert not left.exists()
    left.write_text("no socket")
    subprocess.run([str(run)], cwd=state, check=True, capture_output=True)
    assert left.read_text() == "no socket"


def test_firecracker_is_given_kernel_and_initrd_open(tmp_path: Path) -> None:
    package = written(DIRECTORY / "right/firecracker-everything.toml", tmp_path)
    (Path(package) / "lib/kernel").write_text("the kernel")
    (Path(package) / "lib/initrd").write_text("the initrd")
    run = Path(package) / "bin/microvm-run"
    stand_in = tmp_path / "program"
    stand_in.write_text("#!/bin/sh\ncat /proc/self/fd/3; echo; cat /proc/self/fd/4\n")
    stand_in.chmod(0o755)
    text = run.read_text().replace("/usr/bin/firecracker", str(stand_in))
    # There it has no mkfs, and no such disk.
    run.write_text(text.replace("/usr/sbin/mkfs.ext4", "true").replace("/dev/vg/data", "/dev/zero"))
    done = subprocess.run([str(run)], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("the kernel\nthe initrd", "")
    assert os.path.getsize(tmp_path / "root.img") == 8192 << 20


@pytest.mark.parametrize(
    ("case", "place", "said"),
    [
        ("minimal", "with blanks 'and' more", ""),
        ("minimal", "a,b", "a comma"),
        ("example-user", "plain-0.1_a", ""),
        ("example-user", "a b", "anything but letters, digits"),
        ("example-user", "it's", "anything but letters, digits"),
    ],
)
def test_a_package_says_where_qemu_cannot_have_it(
    case: str, place: str, said: str, tmp_path: Path
) -> None:
    package = written(DIRECTORY / f"right/{case}.toml", tmp_path)
    there = tmp_path / place / "package"
    there.parent.mkdir()
    os.rename(package, there)
    run = [str(there / "bin/microvm-run")]
    done = subprocess.run(run, env={"MICROVM_SHOW": "1"}, capture_output=True, text=True)
    assert done.returncode == (78 if said else 0)
    assert said in done.stderr and bool(done.stderr) == bool(said)
    assert bool(done.stdout) != bool(said)
