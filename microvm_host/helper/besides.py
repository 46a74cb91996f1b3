# SPDX-License-Identifier: MIT
"""What is no part of a start, though it goes with one: packages brought in, VMs made known."""

from __future__ import annotations

from .. import log, names
from ..errors import MicrovmHostError
from ..paths import MICROVM_REGISTER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..paths import HostPaths


def register(name: str, host: HostPaths) -> None:
    """Have systemd-machined know the VM, which runs already and does without as well."""
    from .. import machined, runner, systemd

    unit = names.unit(name)
    try:
        leader = int(systemd.show(unit, "MainPID").get("MainPID", "0"))
        if not leader:
            # It did not come up, or has ended.
            return
        package = runner.load(host.booted(name))
        links = [tap.name for tap in package.taps]
        links += [macvtap.name for macvtap in package.macvtaps]
        interfaces = []
        for link in links:
            with open(f"{host.net_device(link)}/ifindex", encoding="ascii") as file:
                interfaces.append(int(file.read()))
        machine = machined.Machine(
            name=name,
            uuid=package.machine_uuid
            or machined.uuid_of_script(f"{package.path}/{MICROVM_REGISTER}")
            or machined.derived_uuid(name, host),
            unit=unit,
            leader=leader,
            interfaces=tuple(interfaces),
            # The kernel knows no CID of a guest whose hypervisor carries vsock itself.
            vsock_cid=None if package.has_own_vsock else package.vsock_cid,
        )
        machined.register(machine, host)
    except (MicrovmHostError, OSError) as error:
        log.notice(f"not registered with systemd-machined: {error}", vm=name)
        return
    log.status("registered")


def install(name: str, host: HostPaths) -> None:
    """Bring `current` of a declared VM up to date."""
    from .. import install

    # Mostly so, and found out without reading the declaration.
    change = install.if_unchanged(name, host)
    if change is not None:
        log.status(change.describe())
        return
    from .. import declaration

    declared = declaration.load(host.declaration(name))
    log.status(f"Installing {declared.source}")
    change = install.declared(declared, host)
    log.status(change.describe())
    if change.is_new and declared.source.kind != "declaration":
        from .. import microvm_nix, runner

        for notice in microvm_nix.notices(runner.load(change.after), host.vm(name)):
            log.notice(notice, vm=name)
