# SPDX-License-Identifier: MIT
"""The plain way: units with shell scripts around `ip`, supervisord, and a listing in shell.

Written as microvm.nix's host module does the work, unit by unit and process by process, where that
is fair to it: no start limit, which would refuse the sixth start of a loop; no evaluation by nix
in the listing, which takes seconds; and of its ways to do a thing, the quicker one. Its VMs live
in a directory of their own, and may be of the same packages as the toolkit's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePosixPath

from tests.guest.package import BASH, Stub
from tests.host.interface import Host

STATE = "/var/lib/plain"
LISTING = "/usr/local/libexec/plain/list"
UNITS = "/etc/systemd/system"

# What sets a VM up: ordered before it, part of it, and skipped by a condition on the package.
_SET_UP = """\
[Unit]
Before=plain@%i.service
PartOf=plain@%i.service
ConditionPathExists=/var/lib/plain/%i/current/bin/{condition}
StartLimitIntervalSec=0
[Service]
WorkingDirectory=/var/lib/plain/%i
SyslogIdentifier=plain-{unit}@%i
{service}"""
_ONESHOT = "Type=oneshot\nRemainAfterExit=yes\n"
_CURRENT, _BOOTED = "/var/lib/plain/%i/current/bin", "/var/lib/plain/%i/booted/bin"
_SERVICES = {
    "set-booted": (
        "microvm-run",
        f"{_ONESHOT}ExecStart=/usr/local/libexec/plain/set-booted\n"
        "ExecStop=/usr/local/libexec/plain/unset-booted\n",
    ),
    "tap-interfaces": (
        "tap-up",
        f"{_ONESHOT}ExecStart={_CURRENT}/tap-up\nExecStop={_BOOTED}/tap-down\n",
    ),
    "macvtap-interfaces": (
        "macvtap-up",
        f"{_ONESHOT}ExecStart={_CURRENT}/macvtap-up\nExecStop={_BOOTED}/macvtap-down\n",
    ),
    "pci-devices": ("pci-setup", f"{_ONESHOT}ExecStart={_CURRENT}/pci-setup\n"),
    "virtiofsd": (
        "virtiofsd-run",
        f"Type=notify\nNotifyAccess=all\nExecStart={_CURRENT}/virtiofsd-run\n"
        "LimitNOFILE=1048576\nPrivateTmp=yes\n",
    ),
}
SET_UP_UNITS = tuple(f"plain-{unit}" for unit in _SERVICES)
_ALL = " ".join(f"{unit}@%i.service" for unit in SET_UP_UNITS)

# Type=simple, as for all guests that cannot tell when they are ready: systemd waits for the fork,
# not even for the exec.
_VM = f"""\
[Unit]
Requires={_ALL}
After=network.target {_ALL}
ConditionPathExists={_CURRENT}/microvm-run
StartLimitIntervalSec=0
[Service]
Type=simple
WorkingDirectory=/var/lib/plain/%i
ExecStart={_CURRENT}/microvm-run
ExecStop={_BOOTED}/microvm-shutdown
TimeoutStopSec=150
Restart=always
RestartSec=5s
User=microvm
Group=kvm
SyslogIdentifier=plain@%i
LimitNOFILE=1048576
LimitMEMLOCK=infinity
"""

_SCRIPTS = {
    "set-booted": f"{BASH}rm -f booted\nln -s $(readlink current) booted\n",
    "unset-booted": f"{BASH}rm booted\n",
    # Where a version is cut to what people read, bash does it without another process.
    "list": f"""{BASH}
for dir in {STATE}/*; do
  name=$(basename $dir)
  if [ -d $dir ]; then
    current_system=$(readlink $dir/current/share/microvm/system)
    current=${{current_system#*-}}
    if systemctl is-active -q plain@$name; then
      echo -n -e "\\033[1;32m"
    elif [ -e $dir/booted ]; then
      echo -n -e "\\033[1;33m"
    else
      echo -n -e "\\033[1;31m"
    fi
    echo -n -e "$name\\033[0m: "
    if [ -L $dir/booted ]; then
      booted_system=$(readlink $dir/booted/share/microvm/system)
      booted=${{booted_system#*-}}
      if [ "$current_system" = "$booted_system" ]; then
        echo -e "current($booted)"
      else
        echo -e "stale($booted), reboot($current): systemctl restart plain@$name.service"
      fi
    else
      echo -e "current($current), not booted: systemctl start plain@$name.service"
    fi
  fi
done
""",
}


def install(host: Host) -> None:
    """Write the plain units and scripts, and have systemd read them."""
    for unit, (condition, service) in _SERVICES.items():
        text = _SET_UP.format(unit=unit, condition=condition, service=service)
        host.write(f"{UNITS}/plain-{unit}@.service", text)
    host.write(f"{UNITS}/plain@.service", _VM)
    for name, script in _SCRIPTS.items():
        host.write(f"/usr/local/libexec/plain/{name}", script, mode=0o755)
    host.run(["systemctl", "daemon-reload"])


def remove(host: Host) -> None:
    """Take all of it away again."""
    units = [f"{UNITS}/{name}@.service" for name in ("plain", *SET_UP_UNITS)]
    host.run(["rm", "-rf", "/usr/local/libexec/plain", STATE, *units])
    host.run(["systemctl", "daemon-reload"])


@dataclass(frozen=True, kw_only=True)
class PlainStub(Stub):
    """A stub for either way, that does nothing at all and has what the plain way runs.

    The scripts for taps are what microvm.nix's packages have; the toolkit reads the list instead.
    """

    def scripts(self, prefix: PurePosixPath) -> dict[str, str]:
        scripts = super().scripts(prefix)
        scripts["microvm-run"] = f"#! /bin/sh\n{self.run or 'exec sleep infinity'}\n"
        if self.taps:
            up, down = BASH, BASH
            for tap in self.taps:
                up += (
                    f"if [ -e /sys/class/net/{tap.name} ]; then\n  ip link delete {tap.name}\nfi\n"
                    f"ip tuntap add name {tap.name} mode tap user microvm vnet_hdr\n"
                    f"ip link set {tap.name} up\n"
                )
                down += f"ip link delete {tap.name}\n"
            scripts |= {"tap-up": up, "tap-down": down}
        return scripts
