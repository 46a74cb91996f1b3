# SPDX-License-Identifier: MIT
"""ssh's ProxyCommand over vsock: connects to a guest and hands the socket to ssh.

Run as a program, `vsock.py CID PORT`, by `microvm ssh`. systemd has a proxy like it from 256 on;
this one works with any. It must not import anything of the toolkit: it runs as the file it is.
"""

from __future__ import annotations

import socket
import sys


def main(argv: list[str]) -> int:
    """Connect, and pass the connection over standard output (ssh_config(5), ProxyUseFdpass)."""
    if len(argv) != 3 or not all(word.isdigit() for word in argv[1:]):
        sys.stderr.write("usage: vsock.py CID PORT\n")
        return 2
    cid, port = int(argv[1]), int(argv[2])
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as connection:
        connection.settimeout(10)
        try:
            connection.connect((cid, port))
        except OSError as error:
            sys.stderr.write(
                f"cannot reach port {port} of vsock CID {cid}: {error}; does the guest's sshd "
                "listen there?\n"
            )
            return 1
        connection.settimeout(None)
        with socket.socket(fileno=1) as ssh:
            socket.send_fds(ssh, [b"\0"], [connection.fileno()])
            ssh.detach()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
