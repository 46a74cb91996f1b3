# SPDX-License-Identifier: MIT
"""ssh's ProxyCommand into a guest: connects to it and hands the connection to ssh.

Run as a program, `vsock.py PORT WAY...`, by `microvm ssh`, or `vsock.py vsock/CID PORT`, which is
the first of these ways. The first that answers is taken:

- `cid:CID`, the kernel's vsock. systemd has a proxy like it from 256 on; this works with any.
- `unix:UID:PATH`, the socket of a hypervisor that carries vsock itself, and the VM's user: it is
  told `CONNECT PORT`, and answers `OK` and a number when the guest has accepted (docs/vsock.md of
  firecracker's sources, which cloud-hypervisor follows).
- `tcp:ADDRESS`.
"""

from __future__ import annotations

import os
import socket
import sys
import time

# A guest's kernel accepts at once. Where there is no other way, a busy one may take longer.
_QUICKLY = 5.0  # seconds
_AT_LAST = 10.0  # seconds
# Of `OK` and a port.
_ANSWER_MAX = 32


def main(argv: list[str]) -> int:
    """Connect, and pass the connection over standard output (ssh_config(5), ProxyUseFdpass)."""
    words = argv[1:]
    cid = words[0].removeprefix("vsock/") if len(words) == 2 else ""
    if cid and _is_number(cid) and _is_number(words[1]):
        words = [words[1], f"cid:{cid}"]
    if len(words) < 2 or not _is_number(words[0]):
        sys.stderr.write("usage: vsock.py PORT WAY...\n       vsock.py CID|vsock/CID PORT\n")
        return 2
    port, ways = int(words[0]), words[1:]
    while ways:
        way = ways.pop(0)
        try:
            connection = _connect(way, port, _QUICKLY if ways else _AT_LAST)
        except OSError as error:
            _say(f"cannot reach port {port} of {_named(way)}: {error.strerror or error}", ways)
        except (ValueError, OverflowError) as error:
            _say(f"cannot reach port {port} of {_named(way)}: {error}", ways)
        else:
            with connection, socket.socket(fileno=1) as ssh:
                connection.settimeout(None)
                socket.send_fds(ssh, [b"\0"], [connection.fileno()])
                ssh.detach()
            return 0
    return 1


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _say(problem: str, ways: list[str]) -> None:
    then = f"trying {_named(ways[0])}" if ways else "does the guest's sshd listen there?"
    sys.stderr.write(f"microvm: {problem}; {then}\n")


def _named(way: str) -> str:
    kind, _, rest = way.partition(":")
    if kind == "unix":
        return f"the guest's vsock, behind {rest.partition(':')[2]}"
    return f"vsock CID {rest}" if kind == "cid" else rest


def _connect(way: str, port: int, within: float) -> socket.socket:
    """Raises OSError or ValueError."""
    kind, _, rest = way.partition(":")
    if kind == "tcp":
        return socket.create_connection((rest, port), within)
    if kind == "unix":
        uid, _, path = rest.partition(":")
        return _connect_by_hypervisor(path, int(uid), port, within)
    if kind != "cid":
        raise ValueError(f"there is no way {kind!r}")
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.settimeout(within)
        connection.connect((int(rest), port))
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_by_hypervisor(path: str, uid: int, port: int, within: float) -> socket.socket:
    # As the file that it is, it does not know the package that it belongs to.
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from microvm_host import attach, errors

    deadline = time.monotonic() + within
    try:
        peer = attach.connect(path, uid, within)
    except errors.MicrovmHostError as error:
        raise ValueError(f"{error.message}{error.hint and f' ({error.hint})'}") from error
    try:
        peer.settimeout(within)
        peer.sendall(b"CONNECT %d\n" % port)
        answer = b""
        # One at a time: what comes after the line is for ssh.
        while not answer.endswith(b"\n") and len(answer) < _ANSWER_MAX:
            peer.settimeout(max(deadline - time.monotonic(), 0.01))
            byte = peer.recv(1)
            if not byte:
                raise ValueError("nobody listens in the guest")
            answer += byte
        if not answer.startswith(b"OK ") or not answer.endswith(b"\n"):
            raise ValueError("the hypervisor's answer makes no sense")
    except BaseException:
        peer.close()
        raise
    return peer


if __name__ == "__main__":
    sys.exit(main(sys.argv))
