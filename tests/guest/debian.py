# SPDX-License-Identifier: MIT
"""A guest of Debian with cloud-init, as the archive of its root, kept in the tests' cache.

It is what a distribution's cloud image is, and nothing in it knows of its host: name, users, keys
and network are what cloud-init takes from a seed. When all is up, it says on its console what has
become of that, a line each, as `GUEST: FACT`.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

from tests.host import cache
from tests.host.progress import step
from tests.host.root import DPKG_OPTIONS, mirror

SUITE = "trixie"
PACKAGES = (
    *("systemd", "systemd-sysv", "systemd-resolved", "dbus", "udev", "kmod", "iproute2"),
    *("linux-image-amd64", "cloud-init"),
    # What it resizes the disk with, and makes keys of the host with.
    *("e2fsprogs", "openssh-client"),
)
REPORT = """\
#!/bin/sh
say() { echo "GUEST: $*" >/dev/console; }
say "host name $(cat /proc/sys/kernel/hostname)"
say "cloud-init $(cloud-init status | head -n 1)"
say "instance $(cat /var/lib/cloud/data/instance-id)"
for home in /home/* /root; do
    user=${home##*/}
    say "user $user $(id -nG "$user")"
    [ -f "$home/.ssh/authorized_keys" ] && say "key $user $(tail -n 1 "$home/.ssh/authorized_keys")"
done
ip -4 -o address | while read -r _ link _ address _; do say "address $link $address"; done
for file in /run/credentials/@system/*; do say "credential ${file##*/} $(cat "$file")"; done
say "ready"
"""
UNIT = """\
[Unit]
After=cloud-final.service multi-user.target
[Service]
Type=oneshot
ExecStart=/usr/local/sbin/report
[Install]
WantedBy=cloud-init.target
"""
HOOK = r"""
printf %s "$REPORT" >"$1"/usr/local/sbin/report && chmod 755 "$1"/usr/local/sbin/report
printf %s "$UNIT" >"$1"/etc/systemd/system/report.service
chroot "$1" systemctl --quiet enable report.service systemd-networkd.service
# Nothing waits for a network that nobody needs, nor for what an image does once a day.
chroot "$1" systemctl --quiet disable systemd-networkd-wait-online.service
chroot "$1" systemctl --quiet mask apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer
printf 'datasource_list: [NoCloud]\n' >"$1"/etc/cloud/cloud.cfg.d/99-test.cfg
rm -f "$1"/etc/hostname "$1"/initrd.img* "$1"/boot/initrd*
: >"$1"/etc/machine-id
"""


def archive() -> Path:
    """The root of the guest as a tar, built if need be."""
    parts = (SUITE, *PACKAGES, *DPKG_OPTIONS, REPORT, UNIT, HOOK)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
    path = cache.guests() / f"{SUITE}-cloud-init-{digest}.tar"
    with cache.locked(path.with_suffix(".lock"), waiting="waiting for who builds this guest"):
        if not path.exists():
            with step(f"{SUITE}: building a guest with cloud-init"):
                _build(path)
    return path


def _build(path: Path) -> None:
    partial = path.with_suffix(".partial")
    argv = [
        "mmdebstrap",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=minbase",
        "--format=tar",
        f"--include={','.join(PACKAGES)}",
        '--aptopt=Acquire::Check-Valid-Until "false"',
        *(f"--dpkgopt={option}" for option in DPKG_OPTIONS),
        f"--customize-hook={HOOK}",
        SUITE,
        str(partial),
        mirror(),
    ]
    environment = {**os.environ, "REPORT": REPORT, "UNIT": UNIT}
    subprocess.run(argv, check=True, env=environment, stdin=subprocess.DEVNULL)
    partial.rename(path)
