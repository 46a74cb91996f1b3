# SPDX-License-Identifier: MIT
"""ssh's ProxyCommand over vsock: connects to a guest and hands the socket to ssh.

Run as a program, `vsock.py CID PORT`, by `microvm ssh`, and by ssh itself for `ssh vsock/CID`
(data/ssh_config.in). systemd has a proxy like it from 256 on; this one works with any. It must not
import anything of the toolkit: it runs as the file it is.
"""

from __future__ import annotations

import socket
import sys


def main(argv: list[str]) -> int:
    """Connect, and pass the connection over standard output (ssh_config(5), ProxyUseFdpass)."""
    words = [argv[1].removeprefix("vsock/"), *argv[2:]] if len(argv) == 3 else []
    if not words or not all(word.isascii() and word.isdigit() for word in words):
        sys.stderr.write("usage: vsock.py CID|vsock/CID PORT\n")
        return 2
    cid, port = map(int, words)
    try:
        connection = _connected(cid, port)
    except (OSError, OverflowError) as error:
        sys.stderr.write(
            f"cannot reach port {port} of vsock CID {cid}: {error}; does the guest's sshd "
            "listen there?\n"
        )
        return 1
    with connection, socket.socket(fileno=1) as ssh:
        socket.send_fds(ssh, [b"\0"], [connection.fileno()])
        ssh.detach()
    return 0


def _connected(cid: int, port: int) -> socket.socket:
    # Raises OSError here already on a host without vsock.
    connection = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    try:
        connection.settimeout(10)
        connection.connect((cid, port))
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection


if __name__ == "__main__":
    sys.exit(main(sys.argv))
