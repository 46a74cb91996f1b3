# SPDX-License-Identifier: MIT
"""The ready-made network of VMs: a bridge with addresses and a way out, by systemd-networkd.

It is files for networkd, which an administrator has used or not: enabling links them into
/etc/systemd/network, and everything else is networkd's. No daemon of ours, and nothing of it is
needed by VMs that do not name the bridge.
"""

from __future__ import annotations

import os
import time
from ipaddress import IPv4Interface, IPv4Network

from . import leases, links, process
from .errors import MicrovmHostError
from .frozen import frozen
from .interfaces import interface_index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .paths import HostPaths

BRIDGE = leases.BRIDGE
NETDEV, NETWORK = "60-microvm-host.netdev", "60-microvm-host.network"
FILES = (NETDEV, NETWORK)
_SERVICE = "systemd-networkd.service"
_APPEARS_WITHIN = 10.0  # seconds
_ELSEWHERE = 'or have a bridge made by other means, and name it: bridge = "…"'


@frozen
class State:
    """How the network is now; `address` is the host's own on it, as its file has it."""

    enabled: bool
    up: bool
    # systemd's word for networkd: active, inactive, failed; or unknown where it is not installed.
    networkd: str
    # Whether it starts at boot.
    at_boot: bool
    address: str
    # Interfaces on the bridge.
    members: tuple[str, ...]


def bridge_is_there(host: HostPaths) -> bool:
    return os.path.isdir(f"{host.net_device(BRIDGE)}/bridge")


def state(host: HostPaths) -> State:
    """Look how the network is; raises MicrovmHostError."""
    networkd, at_boot = _networkd()
    return State(
        enabled=all(os.path.exists(_file(name, host)) for name in FILES),
        up=bridge_is_there(host),
        networkd=networkd,
        at_boot=at_boot,
        address=str(_address(host)),
        members=_members(host),
    )


def enable(host: HostPaths) -> list[str]:
    """Have networkd make the network now, and at each boot; gives what was done, a line each.

    Raises:
        MicrovmHostError: networkd does not run, something is in the way, or the bridge does not
            appear; then nothing is changed.
    """
    networkd, at_boot = _networkd()
    if networkd != "active":
        raise _no_networkd(networkd)
    missing = [name for name in FILES if not os.path.lexists(_file(name, host))]
    if missing and bridge_is_there(host):
        raise MicrovmHostError(
            f"there is a bridge {BRIDGE} already, which somebody else made",
            hint=f"VMs may use it as it is; to have it made anew: ip link del {BRIDGE}",
        )
    if missing:
        _check_range_is_free(host)
    done = []
    try:
        for name in missing:
            os.makedirs(host.networkd_files, exist_ok=True)
            os.symlink(f"{_shipped()}/{name}", _file(name, host))
            done.append(f"{_file(name, host)} → {_shipped()}/{name}")
        process.output(["networkctl", "reload"])
        _await_bridge(host)
    except BaseException:
        for name in missing:
            if os.path.islink(_file(name, host)):
                os.unlink(_file(name, host))
        if missing:
            process.output(["networkctl", "reload"])
        raise
    done.append(f"{BRIDGE} is up with {_address(host)}")
    if not at_boot:
        done.append(f"{_SERVICE} does not start at boot: systemctl enable {_SERVICE}")
    return done


def disable(host: HostPaths) -> list[str]:
    """Take the network away; gives what was done, a line each.

    Raises:
        MicrovmHostError: VMs are on it, or it cannot be taken away.
    """
    members = _members(host)
    if members:
        raise MicrovmHostError(
            f"{', '.join(members)} {'is' if len(members) == 1 else 'are'} on {BRIDGE}",
            hint="stop these VMs first: `microvm list` shows those that run",
        )
    done = []
    for name in FILES:
        path = _file(name, host)
        if os.path.islink(path):
            os.unlink(path)
            done.append(f"removed {path}")
        elif os.path.exists(path):
            done.append(f"{path} is no link of ours, and stays")
    if _networkd()[0] == "active":
        process.output(["networkctl", "reload"])
    if bridge_is_there(host) and not os.path.lexists(_file(NETDEV, host)):
        problems = links.delete({BRIDGE: interface_index(BRIDGE)}, host)
        if problems:
            raise MicrovmHostError(problems[0], hint=f"ip link del {BRIDGE}")
        done.append(f"deleted {BRIDGE}")
    return done


def _no_networkd(networkd: str) -> MicrovmHostError:
    if networkd == "unknown":
        return MicrovmHostError(
            "this host has no systemd-networkd, which makes the network",
            hint=f"install it (on Fedora: systemd-networkd), {_ELSEWHERE}",
        )
    return MicrovmHostError(
        f"systemd-networkd does not run on this host ({networkd})",
        hint=f"systemctl enable --now {_SERVICE}, which leaves interfaces alone that none of its "
        f"files is about; {_ELSEWHERE}",
    )


def _networkd() -> tuple[str, bool]:
    """How networkd is, and whether it starts at boot."""
    said = process.output(
        [
            "systemctl",
            "show",
            "-p",
            "LoadState",
            "-p",
            "ActiveState",
            "-p",
            "UnitFileState",
            _SERVICE,
        ]
    )
    found = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    if found.get("LoadState") in ("not-found", "masked"):
        return "unknown" if found["LoadState"] == "not-found" else "masked", False
    at_boot = found.get("UnitFileState") in ("enabled", "static", "alias", "indirect")
    return found.get("ActiveState", "unknown"), at_boot


def _check_range_is_free(host: HostPaths) -> None:
    wanted = _address(host).network
    for interface, network in _routes(host):
        if network.prefixlen and network.overlaps(wanted) and interface != BRIDGE:
            raise MicrovmHostError(
                f"{wanted}, the addresses of the network, is in use: {network} is on {interface}",
                path=f"{_shipped()}/{NETWORK}",
                hint=f"copy this file and {NETDEV} to {host.networkd_files} and change Address=",
            )


def _routes(host: HostPaths) -> list[tuple[str, IPv4Network]]:
    """The host's routes (proc_pid_net(5)): interface, destination, …, mask in the eighth column."""
    found = []
    try:
        with open(host.ipv4_routes, encoding="ascii") as source:
            rows = [line.split() for line in source][1:]
        for row in rows:
            # In the order of this machine's bytes.
            address, mask = (int(row[at], 16).to_bytes(4, "little") for at in (1, 7))
            prefix = sum(byte.bit_count() for byte in mask)
            found.append((row[0], IPv4Network((address, prefix), strict=False)))
    except (OSError, ValueError, LookupError) as error:
        raise MicrovmHostError(f"cannot be understood: {error}", path=host.ipv4_routes) from error
    return found


def _await_bridge(host: HostPaths) -> None:
    deadline = time.monotonic() + _APPEARS_WITHIN
    while not bridge_is_there(host):
        if time.monotonic() > deadline:
            raise MicrovmHostError(
                f"networkd has not made {BRIDGE}", hint=f"journalctl -u {_SERVICE} may say why"
            )
        time.sleep(0.05)


def _members(host: HostPaths) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(f"{host.net_device(BRIDGE)}/brif")))
    except OSError:
        return ()


def _file(name: str, host: HostPaths) -> str:
    return f"{host.networkd_files}/{name}"


def _shipped() -> str:
    """Where the files are: in `data` beside this package, which is a link once installed."""
    beside = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    return os.path.realpath(f"{beside}/data/network")


def _address(host: HostPaths) -> IPv4Interface:
    """The host's address on the network; the administrator may have a file of another one.

    Drop-ins are not read, which the file itself says.
    """
    own = _file(NETWORK, host)
    path = own if os.path.exists(own) else f"{_shipped()}/{NETWORK}"
    try:
        with open(path, encoding="utf-8") as source:
            section = ""
            for line in source:
                section = line.strip() if line.startswith("[") else section
                key, _, value = line.partition("=")
                # A static lease has an address as well.
                if key.strip() == "Address" and section in ("[Network]", "[Address]"):
                    return IPv4Interface(value.strip())
    except (OSError, ValueError) as error:
        raise MicrovmHostError(f"cannot be read: {error}", path=path) from error
    raise MicrovmHostError("has no Address=", path=path)
