# SPDX-License-Identifier: MIT
"""Registers a running VM with systemd-machined, by which `machinectl` knows it.

machined 257 and later is asked by Varlink, which takes the vsock CID and ssh's address; earlier
ones by D-Bus, through busctl(1) (org.freedesktop.machine1(5)). Registering changes nothing of the
VM: machined finds the unit by the leader's cgroup, ends the machine when the unit ends, and stops
the unit when it is told to terminate the machine.

No JSON module: what is asked is made of names, numbers and hexadecimal digits that were checked.
"""

from __future__ import annotations

import os
import stat
from _socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, socket

from . import names, process
from .errors import MicrovmHostError, NameInvalid, one_line
from .frozen import frozen

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .paths import HostPaths

SERVICE = "microvm-host"
ANSWER_WITHIN = 10.0  # seconds
ANSWER_MAX = 64 * 1024
SCRIPT_MAX = 64 * 1024
_EXISTS = "io.systemd.Machine.MachineExists"
_BUSCTL = ("busctl", "--quiet", "call", "org.freedesktop.machine1", "/org/freedesktop/machine1")
_MANAGER = "org.freedesktop.machine1.Manager"


@frozen
class Machine:
    """A running VM, as machined is to know it.

    `unit` is the service that runs it, `leader` its main process, `interfaces` the indices of the
    host's side of its network.
    """

    name: str
    uuid: str
    unit: str
    leader: int
    interfaces: tuple[int, ...] = ()
    vsock_cid: int | None = None


def register(machine: Machine, host: HostPaths) -> None:
    """Register a VM, in place of an earlier run of it.

    Raises:
        MicrovmHostError: machined cannot be asked, refuses, or has another machine of that name.
    """
    answers = _answers(host)
    if not answers:
        # Nobody starts it by connecting to the socket, which is its own: only D-Bus does.
        process.output(["systemctl", "start", "systemd-machined.service"], errors=True)
        answers = _answers(host)
    if not _register(machine, host, by_varlink=answers):
        _forget_earlier(machine, host, by_varlink=answers)
        if not _register(machine, host, by_varlink=answers):
            raise MicrovmHostError(f"there is a machine {machine.name} already")


def uuid_of_script(path: str) -> str | None:
    """The guest's UUID out of the script by which a package of microvm.nix registers it: the value
    of `UUID="…"`, which the guest has in SMBIOS and in its /etc/machine-id. None without one.
    """
    try:
        # Not waiting: it could be a FIFO.
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except OSError:
        return None
    try:
        is_file = stat.S_ISREG(os.fstat(file).st_mode)
        text = os.read(file, SCRIPT_MAX).decode(errors="replace") if is_file else ""
    except OSError:
        return None
    finally:
        os.close(file)
    for line in text.splitlines():
        name, equals, value = line.strip().partition("=")
        if equals and name.split()[-1:] == ["UUID"] and not name.startswith("#"):
            try:
                return names.machine_uuid(
                    value.partition(";")[0].partition(" #")[0].strip().strip("'\"")
                )
            except NameInvalid:
                return None
    return None


def derived_uuid(name: str, host: HostPaths) -> str:
    """A UUID for a VM whose package has none: the same on this host at any time.

    Made of the host's machine-id(5), which is not to be told, and the name, by a hash: version 8
    of RFC 9562.
    """
    import hashlib

    try:
        with open(host.machine_id, "rb") as file:
            machine_id = file.read(64).strip()
    except FileNotFoundError:
        machine_id = b""
    digest = hashlib.sha256(b"\0".join((b"microvm-host", machine_id, name.encode()))).digest()
    given = bytearray(digest[:16])
    given[6] = given[6] & 0x0F | 0x80
    given[8] = given[8] & 0x3F | 0x80
    text = given.hex()
    return "-".join((text[:8], text[8:12], text[12:16], text[16:20], text[20:]))


def varlink_register(machine: Machine) -> str:
    """The parameters of io.systemd.Machine.Register for a VM."""
    found = [
        f'"name":"{machine.name}"',
        f'"id":"{machine.uuid.replace("-", "")}"',
        f'"service":"{SERVICE}"',
        '"class":"vm"',
        f'"leader":{machine.leader}',
        f'"ifIndices":[{",".join(map(str, machine.interfaces))}]',
        # It is in a unit already.
        '"allocateUnit":false',
    ]
    if machine.vsock_cid is not None:
        found += [
            f'"vSockCid":{machine.vsock_cid}',
            # As systemd's own ssh proxy has it, systemd-ssh-proxy(1).
            f'"sshAddress":"vsock/{machine.vsock_cid}"',
        ]
    return "{" + ",".join(found) + "}"


def dbus_register(machine: Machine) -> list[str]:
    """The signature and the arguments of RegisterMachineWithNetwork for a VM, for busctl."""
    given = bytes.fromhex(machine.uuid.replace("-", ""))
    return [
        "sayssusai",
        machine.name,
        *(str(len(given)), *map(str, given)),
        *(SERVICE, "vm", str(machine.leader)),
        # No root directory: it is not the host's to see.
        "",
        *(str(len(machine.interfaces)), *map(str, machine.interfaces)),
    ]


def _answers(host: HostPaths) -> bool:
    try:
        _connected(host).close()
    except OSError:
        return False
    return True


def _register(machine: Machine, host: HostPaths, *, by_varlink: bool) -> bool:
    """Register it; False if the name is taken."""
    try:
        if by_varlink:
            _varlink("Register", varlink_register(machine), host)
        else:
            _dbus("RegisterMachineWithNetwork", dbus_register(machine))
    except MicrovmHostError as error:
        # D-Bus has words only: "Machine 'web' already exists".
        if _EXISTS in error.message or "already exists" in error.message:
            return False
        raise
    return True


def _forget_earlier(machine: Machine, host: HostPaths, *, by_varlink: bool) -> None:
    """Forget an earlier run of the VM, and nothing else that has its name.

    machined may not have noticed yet that its unit has another main process now.
    """
    text = process.output(
        ["machinectl", "show", "--property=Unit", "--property=Service", "--", machine.name],
        errors=True,
    )
    found = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    if (found.get("Unit"), found.get("Service")) != (machine.unit, SERVICE):
        holder = one_line(found.get("Unit", "")) or "no unit"
        raise MicrovmHostError(f"there is a machine {machine.name} already, of {holder}")
    if by_varlink:
        _varlink("Unregister", f'{{"name":"{machine.name}"}}', host)
    else:
        _dbus("UnregisterMachine", ["s", machine.name])


def _dbus(method: str, arguments: Sequence[str]) -> None:
    process.output([*_BUSCTL, _MANAGER, method, *arguments], errors=True)


def _varlink(method: str, parameters: str, host: HostPaths) -> None:
    """Call a method of machined's; raises MicrovmHostError with the error that it gives."""
    call = f'{{"method":"io.systemd.Machine.{method}","parameters":{parameters}}}'
    answer = b""
    try:
        connection = _connected(host)
        try:
            connection.sendall(call.encode() + b"\0")
            while b"\0" not in answer and len(answer) <= ANSWER_MAX:
                if not (chunk := connection.recv(4096)):
                    break
                answer += chunk
        finally:
            connection.close()
    except OSError as error:
        raise MicrovmHostError(
            f"systemd-machined does not answer: {error}", path=host.machined_socket
        ) from error
    text = answer.partition(b"\0")[0].decode(errors="replace")
    if b"\0" not in answer or '"error"' in text:
        raise MicrovmHostError(f"systemd-machined refuses: {one_line(text[:400]) or 'no answer'}")


def _connected(host: HostPaths) -> socket:
    connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC)
    try:
        connection.settimeout(ANSWER_WITHIN)
        connection.connect(host.machined_socket)
    except BaseException:
        connection.close()
        raise
    return connection
