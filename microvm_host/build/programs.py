# SPDX-License-Identifier: MIT
"""Small programs that packages bring along: what runs a package has Python, and may lack all else.

They stand here as text, since a package must not need the toolkit that made it.
"""

from __future__ import annotations

_QMP = '''\
"""Says one thing to QEMU: qmp [--wait] SOCKET system_powerdown, or qmp SOCKET balloon SIZE-IN-MB.

With --wait, stays until QEMU has gone, or nothing comes on standard input any more.
"""
import json, select, socket, sys

words = sys.argv[1:]
wait = words[0] == "--wait"
path, command, *values = words[wait:]
qemu = socket.socket(socket.AF_UNIX)
try:
    qemu.settimeout(10)
    qemu.connect(path)
    lines = qemu.makefile("r")

    def ask(command, **arguments):
        request = {"execute": command, "arguments": arguments}
        qemu.sendall(json.dumps(request).encode() + b"\\n")
        for line in lines:
            answer = json.loads(line)
            if "error" in answer:
                sys.exit(f"{path}: {command}: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]
        sys.exit(f"{path}: QEMU has gone")

    lines.readline()
    ask("qmp_capabilities")
    if command == "balloon":
        ask("balloon", value=int(values[0]) << 20)
        print(ask("query-balloon")["actual"] >> 20)
    else:
        ask(command)
    while wait:
        ready, _, _ = select.select([qemu, sys.stdin], [], [])
        if any(not each.recv(4096) if each is qemu else not each.buffer.read1() for each in ready):
            break
except OSError as error:
    # One that went away on the way has done what it was asked for.
    if command != "system_powerdown":
        sys.exit(f"{path}: {error.strerror or error}")
'''

_CONNECT = '''\
"""Connects its standard input and output with a port: connect ADDRESS PORT."""
import os, select, socket, sys

peer = socket.create_connection((sys.argv[1], int(sys.argv[2])), 10)
peer.settimeout(None)
sources = [0, peer]
while sources:
    for source in select.select(sources, [], [])[0]:
        data = os.read(0, 65536) if source == 0 else peer.recv(65536)
        if not data and source == 0:
            sources.remove(0)
            peer.shutdown(socket.SHUT_WR)
        elif not data:
            sys.exit()
        elif source == 0:
            peer.sendall(data)
        else:
            while data:
                data = data[os.write(1, data) :]
'''

_PROGRESS = '''\
"""Runs a program that makes a file, and says how far it is: with-progress FILE WHAT PROGRAM …

Nothing is said of what takes less than a second.
"""
import os, subprocess, sys, time

file, what, *argv = sys.argv[1:]
began, patience = time.monotonic(), 1
child = subprocess.Popen(argv)
while True:
    try:
        code = child.wait(patience)
        break
    except subprocess.TimeoutExpired:
        patience = 5
        try:
            size = os.stat(file).st_blocks * 512 >> 20
        except OSError:
            size = 0
        seconds = time.monotonic() - began
        print(f"{what}: {size} MB after {seconds:.0f} s", file=sys.stderr, flush=True)
if code:
    sys.exit(f"{what}: {argv[0]} failed with {code}")
'''


def with_progress(python: str) -> bytes:
    """Runs what may take long, and says how far it is."""
    return f"#!{python} -IS\n{_PROGRESS}".encode()


_API = '''\
"""Asks a hypervisor one thing over its HTTP socket: api [--wait] SOCKET METHOD TARGET [JSON].

With --wait, stays until the hypervisor has gone, or nothing comes on standard input any more.
"""
import select, socket, sys

words = sys.argv[1:]
wait = words[0] == "--wait"
path, method, target, *rest = words[wait:]
body = "".join(rest).encode()
head = f"{method} {target} HTTP/1.1\\r\\nHost: localhost\\r\\nAccept: application/json\\r\\n"
if body:
    head += "Content-Type: application/json\\r\\n"
vmm = socket.socket(socket.AF_UNIX)
try:
    vmm.settimeout(10)
    vmm.connect(path)
    vmm.sendall(f"{head}Content-Length: {len(body)}\\r\\n\\r\\n".encode() + body)
    answer = vmm.makefile("rb")
    status = answer.readline().decode().partition(" ")[2].strip()
    length = 0
    while line := answer.readline().strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    said = answer.read(length).decode()
    if not status.startswith("2"):
        sys.exit(f"{path}: {method} {target}: {status or 'no answer'} {said}".strip())
    if said:
        print(said)
    while wait:
        ready, _, _ = select.select([vmm, sys.stdin], [], [])
        if any(not each.recv(4096) if each is vmm else not each.buffer.read1() for each in ready):
            break
except OSError as error:
    # One that went away on the way has done what it was asked for.
    if not wait:
        sys.exit(f"{path}: {error.strerror or error}")
'''


_SURPLUS = '''\
"""How many bytes to take of a guest of cloud-hypervisor's to leave it SIZE MB: surplus SIZE INFO.

INFO is what vm.info says: what the guest was asked to have, which it may not have yet, and what it
has now, without what its balloon holds. The balloon's own size is the one that was asked for.
"""
import json, sys

info = json.loads(sys.argv[2])
memory, balloon = info["config"]["memory"], info["config"].get("balloon") or {}
asked = memory["size"] + (memory.get("hotplugged_size") or 0)
has = info["memory_actual_size"] + balloon.get("size", 0)
print(max(min(asked, has) - int(sys.argv[1]) * 1048576, 0))
'''


def surplus(python: str) -> bytes:
    """Tells how large a balloon has to be in a guest of cloud-hypervisor's."""
    return f"#!{python} -IS\n{_SURPLUS}".encode()


def qmp(python: str) -> bytes:
    """Says one thing to QEMU over a QMP socket."""
    return f"#!{python} -IS\n{_QMP}".encode()


def connect(python: str) -> bytes:
    """Carries one connection of a guest to a port of the host (QEMU's guestfwd)."""
    return f"#!{python} -IS\n{_CONNECT}".encode()


def api(python: str) -> bytes:
    """Asks one thing over HTTP: cloud-hypervisor's and firecracker's API."""
    return f"#!{python} -IS\n{_API}".encode()
