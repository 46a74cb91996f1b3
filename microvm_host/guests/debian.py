# SPDX-License-Identifier: MIT
"""The Debian guest: an archive of its root, made by mmdebstrap, with kernel and initrd beside it.

It is what a distribution's cloud image is. Nothing in it knows of its host or of its VM: name,
users, keys and network are what cloud-init takes from the seed, so that VMs may share one archive.

An archive is named by what it is made of and when. It is never made anew in place: a declaration
that names it has an image with the modules of its kernel, and would get another kernel.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tarfile
import time
from contextlib import contextmanager
from hashlib import sha256

from ..errors import MicrovmHostError
from ..frozen import frozen
from . import bootstrap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ..paths import HostPaths
    from .archives import Origin

LABEL = "debian"
PACKAGES = (
    *("systemd", "systemd-sysv", "systemd-resolved", "systemd-timesyncd", "libpam-systemd"),
    *("dbus", "udev", "kmod", "iproute2", "iputils-ping", "procps", "ca-certificates"),
    *("linux-image-amd64", "initramfs-tools", "zstd", "e2fsprogs"),
    *("cloud-init", "openssh-server", "qemu-guest-agent", "sudo", "less", "nano"),
)
# Before systemd 256, which has sshd listen on vsock by itself.
WITHOUT_VSOCK_SSH = ("bullseye", "bookworm", "oldoldstable", "oldstable")
# Seconds; security updates come by the day, and a guest can take those of a week by itself.
MAX_AGE = 7 * 24 * 3600
ROOT, KERNEL, INITRD = "root.tar", "vmlinuz", "initrd"
# Where Debian's links to the newest kernel and its initrd are.
_LINKS = ((KERNEL, "vmlinuz"), (INITRD, "initrd.img"))
# The root unpacked, and its archive.
_NEEDS_SPACE = 2 << 30
_STAMP = "%Y%m%dT%H%M%S"

# Before the kernel package: an initrd of what its disk needs, instead of all that there is, is a
# tenth in size, which each start unpacks, and loads nothing in vain.
BEFORE_PACKAGES = r"""
set -eu
mkdir -p "$1"/etc/initramfs-tools/conf.d "$1"/usr/share/initramfs-tools/modules.d
printf 'MODULES=list\n' >"$1"/etc/initramfs-tools/conf.d/microvm-host
printf '%s\n' virtio_pci virtio_mmio virtio_blk ext4 \
    >"$1"/usr/share/initramfs-tools/modules.d/microvm-host
"""
# In the finished root. What makes a machine this one and no other is left to its first boot:
# its id, its name, and the keys of its sshd, which cloud-init makes.
AFTER_PACKAGES = r"""
set -eu
rm -f "$1"/etc/hostname "$1"/etc/ssh/ssh_host_* "$1"/etc/resolv.conf
: >"$1"/etc/machine-id
printf 'LANG=C.UTF-8\n' >"$1"/etc/default/locale
printf '127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n' >"$1"/etc/hosts
ln -s ../run/systemd/resolve/stub-resolv.conf "$1"/etc/resolv.conf
chroot "$1" systemctl --quiet enable systemd-networkd.service systemd-resolved.service
# Is about snapshots by LVM.
chroot "$1" systemctl --quiet disable e2scrub_reap.service e2scrub_all.timer

# What systemd makes anew where /usr is newer (caches of linker, journal, hardware) is done already.
touch "$1"/etc/.updated "$1"/var/.updated

# Root has the keys of the declaration, as the other users have. RSA takes long, and nobody needs
# it any more. The console is for who logs in: cloud-init keeps what it has to say in its log.
cat >"$1"/etc/cloud/cloud.cfg.d/90-microvm-host.cfg <<'END'
datasource_list: [NoCloud, None]
disable_root: false
ssh_genkeytypes: [ed25519, ecdsa]
ssh_quiet_keygen: true
no_ssh_fingerprints: true
ssh: {emit_keys_to_console: false}
output: {all: ">>/var/log/cloud-init-output.log"}
apt: {preserve_sources_list: true}
locale: false
END

# A password is for the console. sshd takes the first word that it finds: cloud-init's comes before.
printf 'PasswordAuthentication no\n' >"$1"/etc/ssh/sshd_config.d/90-microvm-host.conf

# Comes after cloud-init's own files, which name interfaces by the address that they had at the
# first boot: another interface in the declaration has another one.
cat >"$1"/etc/systemd/network/80-microvm-host.network <<'END'
[Match]
Type=ether
Kind=!*
[Network]
DHCP=yes
END

# One interface with an address is enough, and a guest without any comes up as well.
mkdir -p "$1"/etc/systemd/system/systemd-networkd-wait-online.service.d
cat >"$1"/etc/systemd/system/systemd-networkd-wait-online.service.d/microvm-host.conf <<'END'
[Service]
ExecStart=
ExecStart=-/usr/lib/systemd/systemd-networkd-wait-online --any --timeout=20
END
"""


@frozen
class Archive:
    """A root, its kernel and its initrd, by their paths."""

    root: str
    kernel: str
    initrd: str


@frozen
class Recipe:
    """What a root is made of: two of the same digest differ by their age alone."""

    origin: Origin
    packages: tuple[str, ...] = PACKAGES
    before: str = BEFORE_PACKAGES
    after: str = AFTER_PACKAGES

    @property
    def name(self) -> str:
        """What all archives of this recipe begin with."""
        parts = (*self.origin.sources, *self.packages, self.before, self.after)
        digest = sha256("\0".join(parts).encode()).hexdigest()
        return f"debian-{self.origin.suite}-{digest[:8]}-"


def mmdebstrap_argv(recipe: Recipe, target: str) -> list[str]:
    """What makes the archive `target` of a recipe; none of it is read by a shell but the hooks."""
    keyring = [f"--keyring={recipe.origin.keyring}"] if recipe.origin.keyring else []
    return [
        # What it mounts is gone with its processes, whatever ends them.
        *("unshare", "--mount", "--"),
        *("mmdebstrap", "--mode=root", "--variant=minbase", "--format=tar", *keyring),
        f"--include={','.join(recipe.packages)}",
        f"--essential-hook={recipe.before}",
        f"--customize-hook={recipe.after}",
        *("--", recipe.origin.suite, target, *recipe.origin.sources),
    ]


def make(
    recipe: Recipe, host: HostPaths, say: Callable[[str], object], *, fresh: bool = False
) -> Archive:
    """Have an archive of a recipe among the host's guests; one that is not too old serves again.

    Args:
        fresh: make one whatever is there.
        say: is told what takes a while.

    Raises:
        MicrovmHostError: the host lacks something, or it cannot be made; nothing of it is there
            then.
    """
    found = None if fresh else newest(recipe, host, time.time())
    if found is not None:
        say(f"taking the Debian root {found}")
        return _archive(found)
    with _alone(host, say):
        # Made by whoever had the lock before.
        found = None if fresh else newest(recipe, host, time.time())
        if found is None:
            found = f"{host.guests}/{recipe.name}{time.strftime(_STAMP, time.gmtime())}"
            _make(recipe, found, host, say)
    return _archive(found)


def newest(recipe: Recipe, host: HostPaths, now: float) -> str | None:
    """The directory of the newest archive of a recipe, unless that is too old by now."""
    stamps = []
    for name in _listed(host.guests):
        if name.startswith(recipe.name):
            stamp = name.removeprefix(recipe.name)
            age = now - _time(stamp)
            # One of tomorrow is of a clock that was wrong.
            if 0 <= age < MAX_AGE:
                stamps.append(stamp)
    return f"{host.guests}/{recipe.name}{max(stamps)}" if stamps else None


def superseded(recipe: Recipe, host: HostPaths, kept: str) -> list[str]:
    """Other archives of the same suite that no declaration of this host names."""
    declared = "".join(_declarations(host))
    found = [f"{host.guests}/{name}" for name in _listed(host.guests)]
    prefix = f"{host.guests}/debian-{recipe.origin.suite}-"
    return [
        path
        for path in found
        if path.startswith(prefix) and path != os.path.dirname(kept) and path not in declared
    ]


def _declarations(host: HostPaths) -> Iterator[str]:
    for directory, _, files in os.walk(host.declarations):
        for name in files:
            with open(f"{directory}/{name}", encoding="utf-8", errors="replace") as source:
                yield source.read()


def _time(stamp: str) -> float:
    """Seconds since 1970 that a stamp tells; 0 for what is none."""
    from calendar import timegm

    try:
        return float(timegm(time.strptime(stamp, _STAMP)))
    except ValueError:
        return 0.0


def _listed(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _archive(directory: str) -> Archive:
    return Archive(*(f"{directory}/{name}" for name in (ROOT, KERNEL, INITRD)))


@contextmanager
def _alone(host: HostPaths, say: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of who makes archives, which is on their directory."""
    try:
        os.makedirs(host.guests, exist_ok=True)
        # Whatever the umask: who builds packages of it need not be root.
        os.chmod(host.guests, 0o755)
        lock = os.open(host.guests, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise MicrovmHostError(
            f"guests cannot be kept there: {error.strerror}", path=host.guests
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another `microvm init`, which is making a Debian root")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)


def _make(recipe: Recipe, directory: str, host: HostPaths, say: Callable[[str], object]) -> None:
    prefix = f"{host.guests}/.debian-"
    for name in _listed(host.guests):
        # Of one that was killed: nobody else holds the lock.
        if f"{host.guests}/{name}".startswith(prefix):
            bootstrap.discard(f"{host.guests}/{name}")
    free = shutil.disk_usage(host.guests).free
    if free < _NEEDS_SPACE:
        raise MicrovmHostError(
            f"has {free >> 20} MB left, and making a Debian root takes {_NEEDS_SPACE >> 20}",
            path=host.guests,
            hint="make room there; guests that no declaration names any more may be deleted",
        )
    say(f"making a Debian root of {recipe.origin.suite} from {recipe.origin.mirror}: some minutes")
    temporary = f"{prefix}{os.getpid()}"
    work, guest = f"{temporary}/work", f"{temporary}/guest"
    try:
        for path in (temporary, work, guest):
            os.mkdir(path)
            # Whatever the umask: apt fetches as a user of its own, below it.
            os.chmod(path, 0o755)
        bootstrap.run(mmdebstrap_argv(recipe, f"{guest}/{ROOT}"), work, recipe.origin, say)
        os.chmod(f"{guest}/{ROOT}", 0o644)
        _take_out(f"{guest}/{ROOT}", guest)
        os.rename(guest, directory)
    except OSError as error:
        raise MicrovmHostError(
            f"the guest cannot be written: {error.strerror or error}", path=directory
        ) from error
    finally:
        bootstrap.discard(temporary)


def _take_out(archive: str, directory: str) -> None:
    """Copy kernel and initrd out of the archive, where they stay as well: the guest's apt has them.

    Raises:
        MicrovmHostError: they are not in there.
    """
    with tarfile.open(archive) as source:
        for name, link in _LINKS:
            try:
                target = source.getmember(f"./{link}").linkname
                content = source.extractfile(f"./{target.lstrip('/')}")
            except KeyError as error:
                raise MicrovmHostError(
                    f"the Debian root has no /{link}: its kernel was not installed"
                ) from error
            assert content is not None
            with content, open(f"{directory}/{name}", "wb") as copy:
                shutil.copyfileobj(content, copy)
                os.fchmod(copy.fileno(), 0o644)
