# SPDX-License-Identifier: MIT
"""The small guest: the host's kernel with an initrd of busybox, which boots to a login prompt.

All of it is in memory, a few megabytes, and gone when it ends: a guest to look around with, and to
see that a host runs VMs at all.
"""

from __future__ import annotations

import io
import os
import shutil
import stat
from hashlib import sha256

from ..errors import MicrovmHostError
from . import kernel as kernels
from .cpio import Archive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..paths import HostPaths
    from .kernel import Kernel

# Without these it would not see its devices; kernels have some of them built in.
_NEEDED = ("virtio_pci", "virtio_net", "virtio_blk")
_MODULES = (
    *_NEEDED,
    *("virtio_mmio", "virtio_console", "virtio_rng", "virtio_balloon", "virtio_mem"),
    *("vmw_vsock_virtio_transport", "virtiofs", "9p", "9pnet_virtio"),
    # The power button, and what busybox hears it by.
    *("button", "evdev", "pvpanic_pci"),
    *("ext4", "vfat", "nls_ascii", "nls_cp437", "isofs", "af_packet"),
)

_INITTAB = """\
::sysinit:/etc/rc
::respawn:/etc/console
::respawn:/bin/acpid -f -p /run/acpid.pid -l /dev/null
::ctrlaltdel:/bin/poweroff
::shutdown:/bin/umount -a -r
"""

_RC = """\
#!/bin/busybox sh
# Made by `microvm init`.
PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/pts /run /tmp
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=755 run /run

read -r cmdline </proc/cmdline
for word in $cmdline; do
    case $word in hostname=*) hostname "${word#*=}" ;; esac
done
name=$(hostname)
echo "127.0.0.1 localhost $name" >/etc/hosts

# Devices show up behind devices: on until a round finds no further one.
found=
while :; do
    all=$(find /sys/devices -name modalias -exec cat {} + 2>/dev/null | sort -u)
    [ "$all" != "$found" ] || break
    found=$all
    IFS='
'
    modprobe -qa $all af_packet 2>/dev/null
    unset IFS
done

ip link set lo up
for nic in /sys/class/net/*; do
    nic=${nic##*/}
    [ "$nic" != lo ] || continue
    ip link set "$nic" up
    udhcpc -f -S -i "$nic" -s /etc/dhcp -x "hostname:$name" -A 5 >/dev/null 2>&1 &
done
for disk in /sys/class/block/vd*; do
    disk=${disk##*/}
    [ -e "/dev/$disk" ] || continue
    mkdir -p "/mnt/$disk"
    if mount "/dev/$disk" "/mnt/$disk" 2>/dev/null; then
        echo "$name: disk $disk is on /mnt/$disk"
    else
        rmdir "/mnt/$disk"
    fi
done
"""

_CONSOLE = """\
#!/bin/sh
read -r consoles </sys/class/tty/console/active
[ "$consoles" ] || exec sleep 86400
# The first prompt waits a moment for the address, so as to come below it.
for _ in 1 2 3 4 5 6 7 8 9 10; do
    [ ! -e /run/prompted ] && ls /sys/class/net | grep -qvx lo && [ ! -e /run/bound ] || break
    usleep 200000
done
: >/run/prompted
exec /bin/getty -L 0 "${consoles##* }" vt100
"""

_DHCP = """\
#!/bin/sh
# Called by udhcpc with what to do, and the lease in variables.
case $1 in
    deconfig)
        ip address flush dev "$interface" scope global
        ;;
    bound | renew)
        ip address replace "$ip/${mask:-24}" dev "$interface"
        [ -z "$router" ] || ip route replace default via "${router%% *}" dev "$interface"
        : >/etc/resolv.conf
        [ -z "$domain" ] || echo "search $domain" >>/etc/resolv.conf
        for server in $dns; do echo "nameserver $server" >>/etc/resolv.conf; done
        [ "$1" = renew ] || echo "$(hostname): $interface has $ip" >/dev/console
        : >/run/bound
        ;;
esac
"""

_FILES = {
    "etc/inittab": (_INITTAB, 0o644),
    "etc/rc": (_RC, 0o755),
    "etc/console": (_CONSOLE, 0o755),
    "etc/dhcp": (_DHCP, 0o755),
    # acpid's name for the power button.
    "etc/acpi/PWRF/00000080": ("#!/bin/sh\npoweroff\n", 0o755),
    "etc/passwd": ("root::0:0:root:/root:/bin/sh\n", 0o644),
    "etc/group": ("root:x:0:\n", 0o644),
    "etc/profile": ('PATH=/bin\nPS1="root@$(hostname):\\$PWD# "\n', 0o644),
    "etc/issue": (
        "\nThe small guest of microvm-host, Linux \\r: log in as root, without a password.\n\n",
        0o644,
    ),
}


def make(
    kernel: Kernel, busybox: str, host: HostPaths, say: Callable[[str], object]
) -> tuple[str, str]:
    """Have the small guest of a kernel among the host's guests; gives its kernel and initrd.

    One that is there already, with the same contents, serves again.

    Args:
        busybox: a static one.
        say: is told what takes a while.

    Raises:
        MicrovmHostError: something it is made of is missing, or it cannot be written; nothing of
            it is there then.
    """
    say(f"making a small guest of Linux {kernel.version} and {busybox}")
    content = initrd(kernel, busybox)
    digest = sha256(content)
    with open(kernel.image, "rb") as source:
        digest.update(source.read())
    directory = f"{host.guests}/small-{kernel.version}-{digest.hexdigest()[:8]}"
    if not os.path.isdir(directory):
        _write(directory, kernel.image, content)
    return f"{directory}/vmlinuz", f"{directory}/initrd"


def find_busybox(host: HostPaths) -> str:
    """A static busybox, which needs no libraries in the guest; raises MicrovmHostError."""
    hint = "install a static one (on Debian: apt install busybox-static)"
    for place in host.busybox_places():
        if os.path.isfile(place):
            break
    else:
        place = host.busybox_places()[0]
        raise MicrovmHostError("the small guest needs busybox", path=place, hint=hint)
    with open(place, "rb") as source:
        content = source.read()
    if content[:5] != b"\x7fELF\x02":
        raise MicrovmHostError("is no program for a 64-bit CPU", path=place, hint=hint)
    if _is_dynamic(content):
        raise MicrovmHostError("is not a static program", path=place, hint=hint)
    return place


def _is_dynamic(elf: bytes) -> bool:
    """Whether a 64-bit ELF file asks for an interpreter, by a PT_INTERP header (elf(5))."""
    start = int.from_bytes(elf[32:40], "little")
    size, count = (int.from_bytes(elf[at : at + 2], "little") for at in (54, 56))
    kinds = (elf[start + number * size :][:4] for number in range(count))
    return any(int.from_bytes(kind, "little") == 3 for kind in kinds)


def initrd(kernel: Kernel, busybox: str) -> bytes:
    """The guest's root, not compressed: unpacking costs an emulated CPU more than reading it."""
    missing = sorted({*_NEEDED} - kernels.known(kernel))
    if missing:
        raise MicrovmHostError(
            f"kernel {kernel.version} has no {', '.join(missing)}",
            path=kernel.modules,
            hint="take another kernel by --kernel",
        )
    target = io.BytesIO()
    archive = Archive(target)
    for directory in ("dev", "proc", "sys", "run", "mnt", "root", "bin"):
        archive.directory(directory)
    archive.directory("tmp", 0o1777)
    # The first program's own input and output, before there is a devtmpfs.
    archive.node("dev/console", 5, 1)
    with open(busybox, "rb") as source:
        archive.file("bin/busybox", source.read(), 0o755)
    archive.link("init", "bin/busybox")
    # Where the kernel looks for what loads modules.
    archive.link("sbin", "bin")
    for path, content in kernels.modules(kernel, _MODULES).items():
        archive.file(f"lib/modules/{kernel.version}/{path}", content)
    for path, (text, mode) in _FILES.items():
        archive.file(path, text.encode(), mode)
    archive.end()
    return target.getvalue()


def _write(directory: str, kernel: str, content: bytes) -> None:
    parent, name = os.path.split(directory)
    temporary = f"{parent}/.{name}.{os.getpid()}"
    try:
        os.makedirs(temporary)
        # Whatever the umask: who builds packages of it need not be root.
        for path in (parent, temporary):
            os.chmod(path, 0o755)
        shutil.copyfile(kernel, f"{temporary}/vmlinuz")
        # Some distributions keep their kernels from everybody but root.
        os.chmod(f"{temporary}/vmlinuz", 0o600 | stat.S_IMODE(os.stat(kernel).st_mode) & 0o044)
        with open(f"{temporary}/initrd", "wb") as target:
            target.write(content)
            os.fchmod(target.fileno(), 0o644)
        os.rename(temporary, directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            raise MicrovmHostError(
                f"the guest cannot be written: {error.strerror or error}", path=directory
            ) from error
        raise
