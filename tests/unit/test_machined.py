# SPDX-License-Identifier: MIT
"""Registration with systemd-machined: what it is asked, and what is made of its answers.

`Machined` is a fake on a real Varlink socket; busctl, machinectl and systemctl are scripts that
note down how they were called. The real machined of three versions is met by tests/system.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from microvm_host import log, machined, systemd
from microvm_host.errors import MicrovmHostError
from microvm_host.helper import entry
from microvm_host.machined import Machine
from microvm_host.paths import HostPaths

from . import packages

UUID = "12345678-1234-1234-1234-123456789abc"
WEB = Machine("web", UUID, "microvm@web.service", 77, (3, 4), 42)
LEAST = Machine("web", UUID, "microvm@web.service", 77)
EXISTS = {"error": "io.systemd.Machine.MachineExists", "parameters": {}}


class Machined:
    """A fake machined: gives one answer after the other, in pieces."""

    def __init__(self, path: str, answers: list[dict[str, Any] | bytes]) -> None:
        os.makedirs(os.path.dirname(path))
        self.calls: list[dict[str, Any]] = []
        self._answers = list(answers)
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                text = b""
                while not text.endswith(b"\0"):
                    if not (chunk := connection.recv(4096)):
                        break
                    text += chunk
                if text == b"end\0":
                    return
                if not text:
                    # Somebody looked whether it is there.
                    continue
                self.calls.append(json.loads(text[:-1]))
                answer = self._answers.pop(0)
                whole = answer if isinstance(answer, bytes) else json.dumps(answer).encode() + b"\0"
                with contextlib.suppress(BrokenPipeError):
                    for number in range(0, len(whole), 7):
                        connection.sendall(whole[number : number + 7])

    def end(self, path: str) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(path)
            connection.sendall(b"end\0")
        self._thread.join(5)
        self._socket.close()


Start = Callable[..., Machined]


@pytest.fixture
def start(host: HostPaths) -> Iterator[Start]:
    begun: list[Machined] = []

    def start(*answers: dict[str, Any] | bytes) -> Machined:
        begun.append(Machined(host.machined_socket, list(answers)))
        return begun[-1]

    yield start
    for each in begun:
        each.end(host.machined_socket)


Programs = Callable[..., None]


@pytest.fixture
def programs(root: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """Puts scripts in the place of programs; each notes its arguments in `ROOT/called` first."""
    (root / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{root}/bin:/usr/bin:/bin")

    def put(**scripts: str) -> None:
        for name, body in scripts.items():
            packages.program(
                root, f"bin/{name}", f'#!/bin/sh\necho "{name} $*" >> {root}/called\n{body}\n'
            )

    put(systemctl="exit 1", busctl="exit 1", machinectl="exit 1")
    return put


def called(root: Path) -> list[str]:
    try:
        return (root / "called").read_text().splitlines()
    except FileNotFoundError:
        return []


def test_by_varlink(start: Start, host: HostPaths, programs: Programs, root: Path) -> None:
    fake = start({"parameters": {}})
    machined.register(WEB, host)
    assert fake.calls == [
        {
            "method": "io.systemd.Machine.Register",
            "parameters": {
                "name": "web",
                "id": UUID.replace("-", ""),
                "service": "microvm-host",
                "class": "vm",
                "leader": 77,
                "ifIndices": [3, 4],
                "allocateUnit": False,
                "vSockCid": 42,
                "sshAddress": "vsock/42",
            },
        }
    ]
    assert called(root) == []


def test_by_varlink_without_vsock(start: Start, host: HostPaths) -> None:
    fake = start({"parameters": {}})
    machined.register(LEAST, host)
    assert "vSockCid" not in fake.calls[0]["parameters"]
    assert "sshAddress" not in fake.calls[0]["parameters"]
    assert fake.calls[0]["parameters"]["ifIndices"] == []


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        (
            {"error": "org.varlink.service.PermissionDenied", "parameters": {}},
            'refuses: {"error": "org.varlink.service.PermissionDenied"',
        ),
        (b"", "refuses: no answer"),
        (b"half an ans", "refuses: half an ans"),
        (b"\x1b[2J\nhalf\xffan\nans", "refuses: [2J half�an ans"),
        (b"\0", None),
        # An answer without end is not read to it.
        (b"x" * (machined.ANSWER_MAX + 10000), "refuses: xxxx"),
    ],
)
def test_answers(
    start: Start, host: HostPaths, answer: dict[str, Any] | bytes, complaint: str | None
) -> None:
    start(answer)
    if complaint is None:
        machined.register(WEB, host)
        return
    with pytest.raises(MicrovmHostError) as caught:
        machined.register(WEB, host)
    assert complaint in str(caught.value)
    assert len(str(caught.value)) < 600


OURS = "echo Unit=microvm@web.service; echo Service=microvm-host"


def test_an_earlier_run_is_replaced(
    start: Start, host: HostPaths, programs: Programs, root: Path
) -> None:
    programs(machinectl=OURS)
    fake = start(EXISTS, {"parameters": {}}, {"parameters": {}})
    machined.register(WEB, host)
    assert [call["method"].rpartition(".")[2] for call in fake.calls] == [
        "Register",
        "Unregister",
        "Register",
    ]
    assert fake.calls[1]["parameters"] == {"name": "web"}
    assert called(root) == ["machinectl show --property=Unit --property=Service -- web"]


@pytest.mark.parametrize(
    "shown",
    [
        "echo Unit=systemd-nspawn@web.service; echo Service=systemd-nspawn",
        # Somebody's own registration of the very VM.
        "echo Unit=microvm@web.service; echo Service=libvirt-qemu",
        "echo Unit=microvm@other.service; echo Service=microvm-host",
        "exit 1",
    ],
)
def test_anothers_machine_is_left(
    start: Start, host: HostPaths, programs: Programs, shown: str
) -> None:
    programs(machinectl=shown)
    fake = start(EXISTS)
    with pytest.raises(MicrovmHostError):
        machined.register(WEB, host)
    assert len(fake.calls) == 1


def test_by_dbus(host: HostPaths, programs: Programs, root: Path) -> None:
    programs(systemctl="exit 0", busctl="exit 0")
    machined.register(WEB, host)
    given = " ".join(str(byte) for byte in bytes.fromhex(UUID.replace("-", "")))
    assert called(root) == [
        "systemctl start systemd-machined.service",
        "busctl --quiet call org.freedesktop.machine1 /org/freedesktop/machine1 "
        "org.freedesktop.machine1.Manager RegisterMachineWithNetwork sayssusai web "
        f"16 {given} microvm-host vm 77  2 3 4",
    ]


def test_by_dbus_in_place_of_an_earlier_run(
    host: HostPaths, programs: Programs, root: Path
) -> None:
    programs(
        systemctl="exit 0",
        machinectl=OURS,
        busctl=f"grep -q Unregister {root}/called && exit 0\n"
        "echo \"Call failed: Machine 'web' already exists\" >&2; exit 1",
    )
    machined.register(WEB, host)
    methods = [line.split()[6] for line in called(root) if line.startswith("busctl")]
    assert methods == [
        "RegisterMachineWithNetwork",
        "UnregisterMachine",
        "RegisterMachineWithNetwork",
    ]


def test_what_busctl_says_is_told(host: HostPaths, programs: Programs) -> None:
    programs(systemctl="exit 0", busctl="echo 'Call failed: Access denied' >&2; exit 1")
    with pytest.raises(MicrovmHostError, match="failed with 1: Call failed: Access denied"):
        machined.register(WEB, host)


def test_started_when_it_is_not_running(
    host: HostPaths, programs: Programs, monkeypatch: pytest.MonkeyPatch, root: Path
) -> None:
    """It answers once systemctl was called: then it is asked by Varlink."""
    asked: list[str] = []
    monkeypatch.setattr(machined, "_answers", lambda host: bool(called(root)))
    monkeypatch.setattr(machined, "_varlink", lambda method, *_: asked.append(method))
    programs(systemctl="exit 0")
    machined.register(WEB, host)
    assert (asked, called(root)) == (["Register"], ["systemctl start systemd-machined.service"])


def test_derived_uuid(host: HostPaths) -> None:
    without = machined.derived_uuid("web", host)
    path = Path(host.machine_id)
    path.parent.mkdir(parents=True)
    path.write_text("0123456789abcdef0123456789abcdef\n")
    derived = machined.derived_uuid("web", host)
    assert derived == machined.derived_uuid("web", host)
    # Stable, whatever version comes: guests and machinectl know the VM by it.
    assert derived == "c6561599-1173-8cd8-9db0-b3baec2f4d0e"
    assert len({without, derived, machined.derived_uuid("db", host)}) == 3
    assert (derived[14], derived[19] in "89ab") == ("8", True)
    assert "0123456789abcdef" not in derived.replace("-", "")


# ---- the verb


@pytest.fixture
def web(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MICROVM_HOST_ROOT", host.root)
    package = packages.minimal(Path(host.at("/packages/web")))
    os.mkdir(host.vm("web"))
    os.symlink(package, host.booted("web"))
    packages.put(package, "share/microvm/tap-interfaces", "web0\n")
    packages.put(package, "share/microvm/macvtap-interfaces", "web1 02:00:00:00:00:01 eth0 vepa\n")
    packages.put(package, "share/microvm/vsock-cid", "42\n")
    for number, link in enumerate(("web0", "web1"), 5):
        os.makedirs(host.net_device(link))
        Path(f"{host.net_device(link)}/ifindex").write_text(f"{number}\n")
    monkeypatch.setattr(systemd, "show", lambda *_: {"MainPID": "77"})
    return package


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> list[Machine]:
    found: list[Machine] = []
    monkeypatch.setattr(machined, "register", lambda machine, host: found.append(machine))
    return found


def test_register(host: HostPaths, web: Path, registered: list[Machine]) -> None:
    assert entry.main(["helper", "register", "web"]) == 0
    uuid = machined.derived_uuid("web", host)
    assert registered == [Machine("web", uuid, "microvm@web.service", 77, (5, 6), 42)]


def test_register_by_the_packages_uuid(web: Path, registered: list[Machine]) -> None:
    packages.put(web, "share/microvm/machine-uuid", UUID)
    assert entry.main(["helper", "register", "web"]) == 0
    assert registered[0].uuid == UUID


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (f'#! /nix/store/x-bash/bin/bash -e\n\nUUID="{UUID}"\nbusctl call "$UUID"\n', UUID),
        (f"#!/bin/sh\n  export UUID='{UUID.upper()}'; echo\n", UUID),
        (f"readonly UUID={UUID.replace('-', '')}\n", UUID),
        (f'# UUID="{"0" * 32}"\nUUID="{UUID}" # the guest has it, too\n', UUID),
        ("#!/bin/sh\necho UUID=\n", None),
        ('UUID="$(cat /etc/machine-id)"\n', None),
        (f'OTHER_UUID="{UUID}"\n', None),
        ("\0\xff" * 10, None),
    ],
)
def test_the_uuid_of_microvm_nixs_own_script(
    web: Path, host: HostPaths, registered: list[Machine], script: str, expected: str | None
) -> None:
    packages.put(web, "bin/microvm-register", script)
    assert entry.main(["helper", "register", "web"]) == 0
    assert registered[0].uuid == (expected or machined.derived_uuid("web", host))


def test_a_fifo_is_no_script(web: Path, host: HostPaths, registered: list[Machine]) -> None:
    os.mkfifo(web / "bin/microvm-register")
    assert entry.main(["helper", "register", "web"]) == 0
    assert registered[0].uuid == machined.derived_uuid("web", host)


@pytest.mark.parametrize("hypervisor", ["cloud-hypervisor", "firecracker", "qemu", "crosvm"])
def test_only_a_vsock_of_the_kernels_is_told(
    web: Path, registered: list[Machine], hypervisor: str
) -> None:
    packages.put(web, "share/microvm/hypervisor", hypervisor)
    assert entry.main(["helper", "register", "web"]) == 0
    has_kernels = hypervisor in ("qemu", "crosvm")
    assert registered[0].vsock_cid == (42 if has_kernels else None)


def test_nobody_to_register(
    web: Path,
    registered: list[Machine],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(systemd, "show", lambda *_: {"MainPID": "0"})
    assert entry.main(["helper", "register", "web"]) == 0
    assert registered == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["refused", "no link", "no systemd", "wrong package"])
def test_never_fatal(
    host: HostPaths,
    web: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    def refuse(*_: object) -> None:
        raise MicrovmHostError("not today")

    monkeypatch.setattr(machined, "register", refuse)
    if kind == "no link":
        os.unlink(f"{host.net_device('web1')}/ifindex")
    elif kind == "no systemd":
        monkeypatch.setattr(systemd, "show", refuse)
    elif kind == "wrong package":
        packages.put(web, "share/microvm/vsock-cid", "1")
    notices: list[str] = []
    monkeypatch.setattr(log, "notice", lambda text, *, vm: notices.append(f"{vm}: {text}"))
    assert entry.main(["helper", "register", "web"]) == 0
    assert len(notices) == 1
    assert notices[0].startswith("web: not registered with systemd-machined: ")
    assert capsys.readouterr().err == ""
