# SPDX-License-Identifier: MIT
"""The files below `share/microvm`, one fact a file (docs/runner-package.md).

Those that microvm.nix writes have its bytes; the others are this project's additions.
"""

from __future__ import annotations

from ..paths import MICROVM_REGISTER, MICROVM_UNREGISTER
from . import credentials, seed, shell, volumes
from .tree import File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..declaration.guest import Guest, Share
    from .tools import Tools
    from .tree import Copy, Link

SHARE = "share/microvm"
# systemd's vmm.notify_socket: above those that administrators use for services of their own.
_NOTIFY_PORTS = 9000
_PORT_MAX = 0xFFFFFFFE


def notify_port(cid: int) -> int:
    """The port of the host at which a guest says that it is ready: no two VMs have the same."""
    port = cid + _NOTIFY_PORTS
    return port if port <= _PORT_MAX else cid - _NOTIFY_PORTS


def notify_socket(cid: int) -> str:
    return f"vsock:2:{notify_port(cid)}"


# Of hypervisors that carry vsock themselves, by UNIX sockets of the state directory, where all VMs
# may have the same port, and know streams alone: the hypervisor's own socket, and the guest's text.
OWN_VSOCK = "notify.vsock"
OWN_NOTIFY_SOCKET = "vsock-stream:2:8888"


def notify_word(socket: str) -> str:
    """A word of the kernel's command line by which the guest's systemd knows where to say that it
    is ready (systemd(1), systemd.set_credential=), for machines that have no other way.
    """
    return f"systemd.set_credential=vmm.notify_socket:{socket}"


def private_files(guest: Guest) -> list[tuple[str, str]]:
    """What root hands to the VM's user at each start: names, and paths of the host."""
    return [*credentials.private_files(guest), *seed.private_files(guest)]


def facts(
    guest: Guest,
    tools: Tools,
    *,
    multi_queue: bool,
    control: tuple[str, str] | None = None,
    event_log: str | None = None,
    has_own_vsock: bool = False,
    console: str | None = None,
    agent: str | None = None,
) -> dict[str, File | Copy | Link]:
    """The files that tell the host of a guest, by their paths in the package.

    Args:
        multi_queue: whether the hypervisor opens several queues of each tap.
        control: socket and protocol of the hypervisor's, for the host alone.
        event_log: where the hypervisor writes what happens to the guest.
        has_own_vsock: whether the hypervisor carries vsock by itself, not the host's kernel.
        console: socket that is the guest's serial console.
        agent: socket that is the port of QEMU's guest agent.
    """
    lines: dict[str, Sequence[str]] = {
        "hypervisor": [guest.hypervisor],
        "tap-flags": ["vnet_hdr", *(["multi_queue"] if multi_queue else [])],
        "tap-interfaces": [each.id for each in guest.taps],
        "tap-bridges": [f"{each.id} {each.bridge}" for each in guest.taps if each.bridge],
        "tap-mtus": [f"{each.id} {each.mtu}" for each in guest.taps if each.mtu],
        "tap-macs": [f"{each.id} {each.mac}" for each in guest.taps],
        "macvtap-interfaces": [
            f"{each.id} {each.mac} {each.link} {each.mode}" for each in guest.macvtaps
        ],
        "macvtap-mtus": [f"{each.id} {each.mtu}" for each in guest.macvtaps if each.mtu],
        "pci-devices": [each.path for each in guest.pci_devices],
        "usb-devices": [each.path for each in guest.usb_devices],
        "machine-uuid": [guest.machine_id],
    }
    if guest.vsock_cid is not None:
        lines["vsock-cid"] = [str(guest.vsock_cid)]
        if guest.readiness == "guest":
            lines["readiness"] = ["guest"]
            lines["notify-socket"] = [
                OWN_NOTIFY_SOCKET if has_own_vsock else notify_socket(guest.vsock_cid)
            ]
    if control is not None:
        lines["control-socket"], lines["control-protocol"] = [control[0]], [control[1]]
    if event_log is not None:
        lines["event-log"] = [event_log]
    if console is not None:
        lines["console-socket"] = [console]
    if agent is not None:
        lines["agent-socket"] = [agent]
    lines["image-sources"] = [volume.source or "" for _, volume in volumes.filled(guest)]
    lines["images"] = volumes.images(guest)
    lines["image-origins"] = volumes.origins(guest)
    lines["private-files"] = [f"{name} {path}" for name, path in private_files(guest)]
    lines["temporary-files"] = [volume.image for volume in seed.volumes(guest)]
    for share in guest.virtiofs:
        lines |= _share(share)
    found: dict[str, File | Copy | Link] = {
        f"{SHARE}/{name}": File("".join(f"{line}\n" for line in content).encode())
        for name, content in lines.items()
        if content
    }
    if guest.register_with_machined:
        # That they are there asks for it; the host registers by itself, and never runs them.
        text = shell.script(tools.shell, "echo 'microvm-machined@ does this' >&2\nexit 1")
        found[MICROVM_REGISTER] = found[MICROVM_UNREGISTER] = File(text, 0o755)
    return found


def _share(share: Share) -> dict[str, Sequence[str]]:
    assert share.socket is not None
    below = f"virtiofs/{share.tag}"
    return {
        f"{below}/source": [share.source],
        f"{below}/socket": [share.socket],
        # All of them: with one there, what the others do not say is off.
        f"{below}/read-only": ["true" if share.read_only else "false"],
        f"{below}/cache": [share.cache],
        f"{below}/posix-acl": ["true" if share.posix_acl else "false"],
        f"{below}/extra-args": share.extra_args,
    }
