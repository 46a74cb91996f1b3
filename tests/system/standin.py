#!/usr/bin/python3
# SPDX-License-Identifier: MIT
"""Stands in for a hypervisor that the test hosts do not have, by the name that it is called by.

No guest runs in it. It does on the host what the real one does: takes documented options alone,
loads kernels of its formats, opens taps, disks and shares as the VM's user, refuses to bind a
socket that is there, and speaks the real API on its sockets: HTTP of cloud-hypervisor and
firecracker, with vsock over UNIX sockets as both have it, and QMP of StratoVirt. crosvm's own
socket is its own affair: `crosvm powerbtn` is crosvm, too, and here both ends are made up.

Runs from the checkout on the test host. `standin.py kernel PATH` makes a file with a kernel's
first bytes.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any, NoReturn

sys.path.insert(0, "/usr/src/microvm-host")

from tests.unit import documented

VERSIONS = {"cloud-hypervisor": "cloud-hypervisor v53.0", "firecracker": "Firecracker v1.13.1"}
NAMES = {"lkvm": "kvmtool"}
# if_tun.h
TUNSETIFF, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x400454CA, 2, 0x1000, 0x4000, 0x100
BOOT, SHUTDOWN = 0.3, 0.5  # seconds
# What is held until the end.
kept: list[object] = []


def say(text: str) -> None:
    print(f"STAND-IN: {text}", flush=True)


def fail(text: str) -> NoReturn:
    say(text)
    os._exit(2)


def options(syntax: documented.Syntax, words: list[str]) -> dict[str, list[str]]:
    """The values of each option."""
    found: dict[str, list[str]] = {}
    last = ""
    for word in words[len(syntax.commands) :]:
        if word in syntax.options:
            last = word
            found.setdefault(last, [])
        elif word == words[-1] and syntax.last:
            found["kernel"] = [word]
        else:
            found[last].append(word)
    return found


def keys(value: str) -> dict[str, str]:
    """key=value with commas between; a part without a key is its own."""
    parts = (part.partition("=") for part in re.split(r",(?![^\[]*\])", value))
    return {key: inner if equals else key for key, equals, inner in parts}


# ---- what is opened on the host


def load(path: str, *formats: bytes) -> None:
    with open(path, "rb") as file:
        head = file.read(0x206)
    if not any(each in (head[:4], head[0x202:]) for each in formats):
        fail(f"{path} is no kernel that it loads")
    say(f"loaded {head[:4]!r}")


def read(path: str) -> None:
    with open(path, "rb") as file:
        say(f"initrd of {len(file.read())} bytes")


def disk(path: str, read_only: bool) -> None:
    file = os.open(path, os.O_RDONLY if read_only else os.O_RDWR)
    kept.append(file)
    say(f"disk {path} of {os.lseek(file, 0, os.SEEK_END)} bytes")


def tap(name: str, queues: int) -> None:
    for _ in range(queues):
        file = os.open("/dev/net/tun", os.O_RDWR)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
        fcntl.ioctl(file, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        kept.append(file)
    say(f"tap {name} with {queues} queues")


def share(tag: str, path: str) -> None:
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    kept.append(client)
    say(f"share {tag} connected")


def bind(path: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
    # As it is for all of them: one that is there is in use.
    listening = socket.socket(socket.AF_UNIX, kind)
    try:
        listening.bind(path)
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    listening.listen()
    return listening


def shut_down(why: str, *left: str) -> bool:
    """Have the guest shut down by and by; the sockets that are named are removed at the end."""
    say(f"guest: {why}")

    def end() -> None:
        time.sleep(SHUTDOWN)
        say("guest: off")
        for path in left:
            os.unlink(path)
        os._exit(0)

    threading.Thread(target=end).start()
    return True


# ---- APIs


def vsock(path: str, text: str) -> None:
    """The vsock of cloud-hypervisor and firecracker: the guest's systemd says that it is ready.

    Who connects to the guest asks for a port first; at 22 is a guest's sshd, as far as its name.
    """
    listening = bind(path)

    def accept() -> None:
        while True:
            client, _ = listening.accept()
            with client, client.makefile("rb") as stream:
                asked = stream.readline().decode().split()
                say(f"vsock {' '.join(asked)}")
                if asked == ["CONNECT", "22"]:
                    client.sendall(b"OK 1073741824\nSSH-2.0-StandIn\r\n")
                    say(f"sshd hears {stream.readline().decode().split('-')[0]}")

    threading.Thread(target=accept).start()
    address = re.search(r"vsock-stream:2:(\d+)", text)

    def boot() -> None:
        for message in (b"STATUS=Standing in\n", b"READY=1\nSTATUS=Stood in\n"):
            time.sleep(BOOT)
            assert address is not None
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(f"{path}_{address.group(1)}")
                client.sendall(message)

    if address is not None:
        threading.Thread(target=boot).start()


def http(path: str, answers: dict[str, Any]) -> None:
    """Serve HTTP as micro_http does: connections are kept, and clients are served side by side.

    An answer is whether the body is right, or what is said to it.
    """
    listening = bind(path)

    def serve(client: socket.socket) -> None:
        stream = client.makefile("rb")
        while line := stream.readline():
            request = " ".join(line.decode().split()[:2])
            length = 0
            while header := stream.readline().strip():
                name, _, value = header.partition(b":")
                length = int(value) if name.lower() == b"content-length" else length
            body = stream.read(length)
            say(f"{request} {body.decode()}".strip())
            code, answer, said = "204 No Content", answers.get(request), b""
            found = answer and answer(json.loads(body) if body else {})
            if answer is None:
                code = "404 Not Found"
            elif not found:
                code = "400 Bad Request"
            elif found is not True:
                code, said = "200 OK", json.dumps(found).encode()
            head = f"HTTP/1.1 {code}\r\nConnection: keep-alive\r\n"
            head += f"Content-Length: {len(said)}\r\n" if said else ""
            client.sendall(f"{head}\r\n".encode() + said)

    def accept() -> None:
        while True:
            client, _ = listening.accept()
            threading.Thread(target=serve, args=(client,)).start()

    threading.Thread(target=accept).start()


def qmp(path: str) -> None:
    """QMP, one client at a time."""
    listening = bind(path)

    def serve() -> None:
        actual = 0
        while True:
            client, _ = listening.accept()
            client.sendall(b'{"QMP":{"version":{"StratoVirt":{}},"capabilities":[]}}\r\n')
            for line in client.makefile("rb"):
                asked = json.loads(line)
                say(f"qmp {asked['execute']}")
                if asked["execute"] == "balloon":
                    actual = asked["arguments"]["value"]
                found = {"actual": actual} if asked["execute"] == "query-balloon" else {}
                client.sendall(json.dumps({"return": found}).encode() + b"\r\n")

    threading.Thread(target=serve).start()


# ---- hypervisors

ELF, BZIMAGE = b"\x7fELF", b"HdrS"


def cloud_hypervisor(given: dict[str, list[str]]) -> None:
    load(given["--kernel"][0], ELF, BZIMAGE)
    read(given["--initramfs"][0])
    for each in map(keys, given.get("--disk", [])):
        disk(each["path"], each["readonly"] == "on")
    for each in map(keys, given.get("--net", [])):
        tap(each["tap"], int(each.get("num_queues", 2)) // 2)
    for each in map(keys, given.get("--fs", [])):
        if keys(given["--memory"][0])["shared"] != "on":
            fail("vhost-user needs shared memory")
        share(each["tag"], each["socket"])
    vsock(keys(given["--vsock"][0])["socket"], given["--platform"][0])
    path = keys(given["--api-socket"][0])["path"]
    button = "PUT /api/v1/vm.power-button"
    memory = keys(given["--memory"][0])
    sizes = {key: int(value[:-1]) << 20 for key, value in memory.items() if key.endswith("size")}
    info = {
        "config": {"memory": sizes, "balloon": {"size": 0}},
        "state": "Running",
        "memory_actual_size": sizes["size"] + sizes.get("hotplugged_size", 0),
    }
    http(
        path,
        {
            button: lambda body: not body and shut_down("power button", path),
            "PUT /api/v1/vm.resize": lambda body: list(body) == ["desired_balloon"],
            "GET /api/v1/vm.info": lambda body: not body and info,
        },
    )


def firecracker(given: dict[str, list[str]]) -> None:
    with open(given["--config-file"][0], "rb") as file:
        configuration = json.load(file)
    for wrong in documented.wrong_configuration(configuration):
        fail(wrong)
    source = configuration["boot-source"]
    load(source["kernel_image_path"], ELF)
    read(source["initrd_path"])
    for each in configuration["drives"]:
        disk(each["path_on_host"], each["is_read_only"])
    for each in configuration["network-interfaces"]:
        tap(each["host_dev_name"], 1)
    vsock(configuration["vsock"]["uds_path"], source["boot_args"])
    # It leaves its sockets behind.
    http(
        given["--api-sock"][0],
        {
            "PUT /actions": lambda body: (
                body == {"action_type": "SendCtrlAltDel"} and shut_down("Ctrl-Alt-Del")
            ),
            "PATCH /balloon": lambda body: list(body) == ["amount_mib"],
        },
    )


def crosvm(given: dict[str, list[str]]) -> None:
    load(given["kernel"][0], ELF, BZIMAGE)
    read(given["--initrd"][0])
    if os.listdir(given["--pivot-root"][0]):
        fail("the pivot root is not empty")
    for each in map(keys, given.get("--block", [])):
        disk(each["path"], each["ro"] == "true")
    for each in map(keys, given.get("--net", [])):
        tap(each["tap-name"], 1)
    for each in map(keys, given.get("--vhost-user-fs", [])):
        share(each["tag"], each["socket"])
    path = given["--socket"][0]
    listening = bind(path, socket.SOCK_SEQPACKET)

    def serve() -> None:
        while True:
            client, _ = listening.accept()
            if client.recv(4096) == b'"Powerbtn"':
                shut_down("power button", path)

    threading.Thread(target=serve).start()


def crosvm_client(command: str, path: str) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as client:
        client.connect(path)
        client.send(json.dumps(command.capitalize()).encode())


def kvmtool(given: dict[str, list[str]]) -> None:
    load(given["--kernel"][0], BZIMAGE)
    read(given["--initrd"][0])
    for image in given.get("--disk", []):
        disk(image.partition(",")[0], image.endswith(",ro"))
    for each in map(keys, given["--network"]):
        if each["mode"] == "tap":
            tap(each["tapif"], 1)
    home = f"{os.environ['HOME']}/.lkvm"
    os.makedirs(home, exist_ok=True)
    path = f"{home}/{given['--name'][0]}.sock"
    # This one finds out whether somebody is there.
    if os.path.exists(path):
        os.unlink(path)
    kept.append(bind(path))


def stratovirt(given: dict[str, list[str]]) -> None:
    load(given["-kernel"][0], BZIMAGE)
    read(given["-initrd"][0])
    for each in map(keys, given.get("-drive", [])):
        disk(each["file"], each["readonly"] == "on")
    for each in map(keys, given.get("-netdev", [])):
        tap(each["ifname"], int(each.get("queues", 1)))
    for each in map(keys, given.get("-chardev", [])):
        if keys(given["-machine"][0])["mem-share"] != "on":
            fail("vhost-user needs shared memory")
        share(each["id"], each["path"])
    qmp(given["-qmp"][0].removeprefix("unix:").partition(",")[0])


def alioth(given: dict[str, list[str]]) -> None:
    load(given["--kernel"][0], BZIMAGE)
    read(given["--initramfs"][0])
    for each in map(keys, given.get("--blk", [])):
        disk(each["path"], each["readonly"] == "true")
    for each in map(keys, given.get("--net", [])):
        tap(each["if_name"], int(each.get("queue_pairs", 1)))
    for each in map(keys, given.get("--fs", [])):
        share(each["tag"], each["socket"])


def main() -> None:
    called, words = os.path.basename(sys.argv[0]), sys.argv[1:]
    name = NAMES.get(called, called)
    if name == "standin.py":
        with open(words[1], "wb") as file:
            # An ELF file with one note, that for PVH.
            head = struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
            segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, 24, 24, 4)
            note = struct.pack("<3I4sQ", 4, 8, 18, b"Xen\0", 0x1000000)
            file.write(b"\x7fELF\x02\x01\x01" + bytes(9) + head + segment + note)
        return
    if words == ["--version"]:
        print(VERSIONS[name])
        return
    if name == "crosvm" and words[0] != "run":
        crosvm_client(words[0], words[-1])
        return
    syntax = documented.SYNTAXES[name]
    for wrong in documented.wrong(syntax, words):
        fail(wrong)
    start = {
        "cloud-hypervisor": cloud_hypervisor,
        "firecracker": firecracker,
        "crosvm": crosvm,
        "kvmtool": kvmtool,
        "stratovirt": stratovirt,
        "alioth": alioth,
    }
    start[name](options(syntax, words))
    say(f"{name} runs")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
