# SPDX-License-Identifier: MIT
"""Builds the Debian root that both kinds of test host boot, and keeps it.

A root is named after its suite and a hash of everything that goes into it, so a change of the
recipe makes a new root and never a stale one.  It is built under a temporary name and renamed
when it is whole: a build that was interrupted leaves nothing that could be taken for a root, and
of two builds at the same time one waits for the other.

The mirror comes from the machine's own apt configuration.  No host is named here: whoever runs
the tests has already said where Debian is to be fetched from.

Root builds and keeps an unpacked tree, for the container host's overlay, and makes the image of
the virtual host from it when one is wanted.  A plain user builds inside a user namespace, where
files belong to sub-ids that mean nothing outside, and keeps the image alone.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tests.host import cache
from tests.host.interface import HostError
from tests.host.progress import step

SUITES = ("bookworm", "trixie", "sid")
DEFAULT_SUITE = "trixie"

PACKAGES = (
    # what makes it a systemd machine
    "systemd",
    "systemd-sysv",
    "systemd-container",
    "dbus",
    "udev",
    "kmod",
    "libpam-systemd",
    "procps",
    "iproute2",
    "iputils-ping",
    "linux-image-amd64",
    "initramfs-tools",
    "zstd",
    # what the toolkit needs
    "python3",
    "python3-pystemd",
    "python3-pyroute2",
    "python3-click",
    "qemu-system-x86",
    # runs in guests, which take it from their host
    "qemu-guest-agent",
    "openssh-client",
    "nix-bin",
    # what a small guest is made of
    "busybox-static",
    "cpio",
    # what disks of declared guests are made with
    "btrfs-progs",
    "dosfstools",
    "e2fsprogs",
    "erofs-utils",
    "mtools",
    "qemu-utils",
    "xfsprogs",
    # what tests and people at `make demo-shell` use
    "make",
    "man-db",
    "less",
    "sudo",
    "socat",
    "bash-completion",
    # packages that bring their own virtiofsd supervision run supervisord
    "supervisor",
    # the way into the virtual host
    "openssh-server",
)

# Debian's bookworm has no virtiofsd of its own; the old one in C comes with QEMU there. And its
# mke2fs reads no archives, which the later ones do by this library.
PACKAGES_OF_SUITE = {
    "trixie": ("virtiofsd", "libarchive13t64"),
    "sid": ("virtiofsd", "libarchive13t64"),
}

# Documentation of several hundred packages is a quarter of the files, and nobody reads it there.
# The options are dropped from the finished root, so that what a test installs keeps its pages.
DPKG_OPTIONS = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/doc/*",
    "path-exclude=/usr/share/info/*",
    "path-exclude=/usr/share/locale/*",
)

# Runs before the kernel package does: an initrd of these modules alone is a tenth of the usual
# size, which counts where the CPU is emulated.  The initrd serves the virtual host, so what it
# needs is known.
BEFORE_PACKAGES = r"""
mkdir -p "$1"/etc/initramfs-tools/conf.d "$1"/usr/share/initramfs-tools/modules.d
printf 'MODULES=list\nCOMPRESS=zstd\n' > "$1"/etc/initramfs-tools/conf.d/test-host
printf 'virtio_pci\nvirtio_blk\next4\n' > "$1"/usr/share/initramfs-tools/modules.d/test-host
"""

# The harness's own files come in through the environment: where the build happens in a user
# namespace, the caller's directories are often closed to it.
ADD_FILES = 'umask 022; printf %s "$TEST_HOST_FILES" | base64 -d | tar -xz -C "$1"'

# Runs in the finished root.  Timers and services that wake up on their own are put to rest: a
# test host does what a test tells it, and a supervisord that nobody asked for would make "no
# Python process is left" false.
AFTER_PACKAGES = r"""
rm -f "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
        e2scrub_reap.service fstrim.timer man-db.timer ssh.service ssh.socket supervisor.service \
        getty@.service systemd-pstore.service systemd-network-generator.service; do
    chroot "$1" systemctl --quiet disable "$unit" 2>/dev/null || :
done
chroot "$1" systemctl --quiet enable test-host-channel.service
chroot "$1" passwd -d root >/dev/null
: > "$1"/etc/machine-id
# What systemd does once after an update (caches of linker, journal, users) is done by the packages'
# own scripts already; without these stamps every host would do it again at its first boot.
touch "$1"/etc/.updated "$1"/var/.updated
rm -f "$1"/etc/hostname "$1"/etc/resolv.conf
"""

# The network card behind the channel and the spare one are told apart by their addresses, and
# named so that a test can rely on the name whatever else is plugged in.
OUTER_MAC = "52:54:00:6d:00:01"
SPARE_MAC = "52:54:00:6d:00:02"

# What the virtual host writes to its second serial port once commands can come.
CHANNEL_LISTENS = "test-host: the channel listens"

# Files of the harness inside the root.  They do nothing in a container: the units ask for a word
# on the kernel command line that only the virtual host gives.
FILES = {
    "usr/lib/systemd/network/10-test-host-outer0.link": f"""\
[Match]
MACAddress={OUTER_MAC}
[Link]
Name=outer0
""",
    "usr/lib/systemd/network/10-test-host-spare0.link": f"""\
[Match]
MACAddress={SPARE_MAC}
[Link]
Name=spare0
""",
    "usr/lib/systemd/system/test-host-channel.service": f"""\
[Unit]
Description=Channel of the test host
ConditionKernelCommandLine=test_host.channel
DefaultDependencies=no
# The first unit that could need names, users and devices has them from here on; waiting for
# all of boot would only delay the first command.
After=local-fs.target systemd-sysusers.service sys-subsystem-net-devices-outer0.device
BindsTo=sys-subsystem-net-devices-outer0.device
# The channel outlives everything else at shutdown, so that a test sees the reboot it asked for.
Before=basic.target
[Service]
Type=notify
RuntimeDirectory=sshd
RuntimeDirectoryPreserve=yes
ExecStartPre=ip link set outer0 up
ExecStartPre=ip address replace 10.0.2.15/24 dev outer0
ExecStartPre=ip route replace default via 10.0.2.2
ExecStartPre=-ip link set spare0 up
ExecStart=/usr/sbin/sshd -D -e -f /usr/lib/test-host/sshd_config
ExecStartPost=sh -c 'echo "{CHANNEL_LISTENS}" >/dev/ttyS1'
# A command that runs on may outlive a restart of the channel.
KillMode=process
Restart=always
[Install]
WantedBy=sysinit.target
""",
    "usr/lib/test-host/sshd_config": """\
# PAM would make a login session of every command; a unit's command has none either.
UsePAM no
UseDNS no
PermitRootLogin prohibit-password
PasswordAuthentication no
AuthorizedKeysFile /usr/lib/test-host/authorized_keys
# One connection carries all commands of a test run.
MaxSessions 200
PrintMotd no
PrintLastLog no
PidFile none
HostKey /etc/ssh/ssh_host_ed25519_key
""",
    # Only used where the virtual host switches forwarding on.  It is the second port, because a
    # getty hangs up the first.
    "usr/lib/systemd/journald.conf.d/test-host.conf": """\
[Journal]
TTYPath=/dev/ttyS1
MaxLevelConsole=notice
""",
}

_IMAGE_SIZE = "12G"  # sparse; what is not written costs nothing


@dataclass(frozen=True)
class Root:
    """A root as it lies in the cache."""

    suite: str
    directory: Path

    @property
    def tree(self) -> Path:
        """The unpacked root; there for root only."""
        return self.directory / "tree"

    @property
    def image(self) -> Path:
        """The same as an ext4 image, raw and sparse."""
        return self.directory / "root.ext4"

    @property
    def kernel(self) -> Path:
        """Debian's kernel, copied out so that QEMU can read it as any user."""
        return self.directory / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initrd that belongs to the kernel."""
        return self.directory / "initrd.img"

    @property
    def key(self) -> Path:
        """The key that opens the virtual host's channel."""
        return self.directory / "key"


def packages_of(suite: str) -> tuple[str, ...]:
    """The packages of a suite's root."""
    return PACKAGES + PACKAGES_OF_SUITE.get(suite, ())


def recipe_hash(suite: str) -> str:
    """Names what a root is made of: any change of the recipe changes it."""
    parts = [suite, *packages_of(suite), *DPKG_OPTIONS, BEFORE_PACKAGES, ADD_FILES, AFTER_PACKAGES]
    parts += [f"{path}\n{text}" for path, text in sorted(FILES.items())]
    parts += [_IMAGE_SIZE]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def mirror() -> str:
    """The Debian mirror that this machine's apt is configured with."""
    if chosen := os.environ.get("MICROVM_HOST_TEST_MIRROR"):
        return chosen
    form = "$(ORIGIN)\t$(LABEL)\t$(REPO_URI)"
    try:
        listing = subprocess.run(
            ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise HostError(
            "the mirror could not be read from apt's configuration; "
            "set MICROVM_HOST_TEST_MIRROR to one"
        ) from error
    for line in listing.splitlines():
        origin, label, uri = line.split("\t")
        # The security archive has Debian's origin and a label of its own; it holds no suite whole.
        if origin == "Debian" and label == "Debian":
            return uri
    raise HostError(
        "apt's configuration names no Debian mirror whose lists are downloaded; "
        "run apt-get update, or set MICROVM_HOST_TEST_MIRROR"
    )


def mmdebstrap_argv(suite: str, uri: str) -> list[str]:
    """The build of a suite's root; the finished root goes to standard output as a tar."""
    return [
        "mmdebstrap",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        "--variant=minbase",
        "--format=tar",
        f"--include={','.join(packages_of(suite))}",
        # Outdated lists are refused by default, and sid's are now and then on a slow mirror.
        '--aptopt=Acquire::Check-Valid-Until "false"',
        *(f"--dpkgopt={option}" for option in DPKG_OPTIONS),
        f"--essential-hook={BEFORE_PACKAGES}",
        f"--customize-hook={ADD_FILES}",
        f"--customize-hook={AFTER_PACKAGES}",
        suite,
        "-",
        uri,
    ]


def as_root_argv(argv: Sequence[str]) -> list[str]:
    """Runs a command with all of a tree's owners at hand: as root, or in a user namespace."""
    if os.geteuid() == 0:
        return list(argv)
    # The caller is root in there and the sub-ids of /etc/subuid are the other users.
    return ["unshare", "--user", "--map-root-user", "--map-auto", "--", *argv]


def with_tree(suite: str) -> Root:
    """The root of a suite with its unpacked tree, built if need be."""
    root = _locate(suite)
    if not root.tree.is_dir():
        _build(root)
    return root


def with_image(suite: str) -> Root:
    """The root of a suite with its image, built if need be."""
    root = _locate(suite)
    if not root.image.exists():
        if not root.directory.is_dir():
            _build(root)
        if not root.image.exists():
            with _lock_of(root):
                if not root.image.exists():
                    _make_image(root.tree, root.image, suite)
    return root


def with_either(suite: str) -> Root:
    """The root of a suite in the form that this user can have: tree for root, else image."""
    return with_tree(suite) if os.geteuid() == 0 else with_image(suite)


def _locate(suite: str) -> Root:
    if suite not in SUITES:
        raise HostError(f"no such suite: {suite!r}; known are {', '.join(SUITES)}")
    return Root(suite=suite, directory=cache.roots() / f"{suite}-{recipe_hash(suite)}")


def _lock_of(root: Root) -> AbstractContextManager[None]:
    return cache.locked(
        root.directory.with_suffix(".lock"),
        waiting=f"{root.suite}: waiting for another process that builds this root",
    )


def _build(root: Root) -> None:
    with _lock_of(root):
        if root.directory.is_dir():
            return  # built by whoever had the lock before
        # The name is the same for every attempt, so that the next one finds what an interrupted
        # one left; the lock says that nobody works on it now.
        partial = root.directory.with_suffix(".partial")
        discard(partial)
        partial.mkdir(parents=True)
        with step(f"{root.suite}: building the root with mmdebstrap"):
            _bootstrap(Root(suite=root.suite, directory=partial))
        partial.rename(root.directory)


def _bootstrap(root: Root) -> None:
    """Fill a directory with a root: tree or image, kernel, initrd, key."""
    plain = os.geteuid() != 0
    _run_quietly(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(root.key)])
    public = root.key.with_suffix(".pub").read_text(encoding="utf-8")
    files = _packed({**FILES, "usr/lib/test-host/authorized_keys": public})

    # The tree is made by root of a namespace that may be another than the one mmdebstrap makes
    # for itself, so a tar goes between them, and device nodes, which no namespace may make, are
    # left out of it: both kinds of host mount a /dev of their own.
    unpack = ["tar", "--extract", "--directory", str(root.tree), "--numeric-owner"]
    unpack += ["--xattrs", "--xattrs-include=*", "--exclude=./dev/*"]
    root.tree.mkdir()
    log_path = root.directory / "build.log"
    with log_path.open("w", encoding="utf-8") as log:
        build = subprocess.Popen(
            mmdebstrap_argv(root.suite, mirror()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**os.environ, "TEST_HOST_FILES": base64.b64encode(files).decode()},
        )
        unpacking = subprocess.Popen(as_root_argv(unpack), stdin=build.stdout, stderr=log)
        assert build.stdout is not None
        build.stdout.close()
        try:
            built, unpacked = build.wait(), unpacking.wait()
        except BaseException:
            # An interrupt is the user's; mmdebstrap removes its own directory on SIGTERM.
            build.terminate()
            unpacking.terminate()
            build.wait()
            raise
    if built or unpacked:
        tail = log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        hint = " (a plain user needs uidmap and a line in /etc/subuid and /etc/subgid)"
        raise HostError(
            f"the root of {root.suite} was not built{hint if plain else ''}:\n" + "\n".join(tail)
        )
    for link, copy in (("vmlinuz", root.kernel), ("initrd.img", root.initrd)):
        # Debian's links at the top of the tree name the newest kernel.
        shutil.copyfile(root.tree / os.readlink(root.tree / link), copy)
    if plain:
        _make_image(root.tree, root.image, root.suite)
        discard(root.tree)


def _packed(files: dict[str, str]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text.encode())
            entry.mode = 0o644
            archive.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


def _make_image(tree: Path, image: Path, suite: str) -> None:
    partial = image.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with step(f"{suite}: making the image"):
        argv = ["mke2fs", "-q", "-t", "ext4", "-L", "root", "-d", str(tree), str(partial)]
        _run_quietly(as_root_argv([*argv, _IMAGE_SIZE]))
    partial.rename(image)


def _run_quietly(argv: Sequence[str]) -> None:
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        raise HostError(f"{argv[0]} failed ({done.returncode}): {done.stderr.strip()}")


def discard(directory: Path) -> None:
    """Remove a root, or part of one, whoever its files belong to."""
    if directory.exists():
        _run_quietly(as_root_argv(["rm", "-rf", "--one-file-system", str(directory)]))
