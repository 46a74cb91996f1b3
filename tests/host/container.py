# SPDX-License-Identifier: MIT
"""The container host: a systemd machine that boots in a moment, for the daily loop.

systemd-nspawn boots an overlay over the cached root, so every host starts fresh and costs no
copy.  It has namespaces of its own for network, processes, mounts and names, and so far as tap
devices, virtiofsd, transient units and machined go it is a whole machine.  What it is not, and
the virtual host is: there is no udev, `/sys` is read-only, cgroup limits are not enforced, and
its `/dev` is its own, so the node of a macvtap does not appear.

It needs root, and can neither load kernel modules nor set the clock, since those are shared with
the machine that it runs on.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from tests.host import cache, leftovers, root
from tests.host.interface import CommandHost, HostError, inner_argv

# What nspawn returns when the machine inside asked for a reboot and somebody else (here: we) is
# to start it again.
_EXIT_REBOOT = 133

# Device nodes that a host is given if the machine has them.  /dev/kvm is not here: it opens on
# machines whose CPU cannot do it, and whoever finds it hangs; see `kvm_works`.
_DEVICES = ("/dev/net/tun", "/dev/fuse", "/dev/vhost-net", "/dev/vhost-vsock", "/dev/vsock")

_NEEDLESS_MOUNTS = (
    "dev-hugepages.mount",
    "run-lock.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "var-lib-machines.mount",
)

_numbers = itertools.count(1)


def kvm_works() -> bool:
    """Whether KVM can be used: by what the CPU says, since the node alone proves nothing."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    return ("vmx" in flags or "svm" in flags) and os.access("/dev/kvm", os.R_OK | os.W_OK)


def missing() -> str | None:
    """What this machine lacks for a container host, or None."""
    if os.geteuid() != 0:
        return "a container host needs root"
    for program in ("systemd-nspawn", "mmdebstrap", "nsenter"):
        if not shutil.which(program):
            return f"{program} is not installed (tests/prerequisites installs it)"
    if "overlay" not in Path("/proc/filesystems").read_text(encoding="utf-8") and not _modprobed():
        return "the kernel has no overlay file system"
    if not Path("/dev/net/tun").exists():
        return "/dev/net/tun does not exist (modprobe tun)"
    return None


def _modprobed() -> bool:
    if not shutil.which("modprobe"):
        return False
    return subprocess.run(["modprobe", "overlay"], stderr=subprocess.DEVNULL).returncode == 0


def nspawn_argv(*, tree: Path, name: str, devices: Sequence[str]) -> list[str]:
    """Boots a tree as a machine of its own."""
    return [
        "systemd-nspawn",
        f"--directory={tree}",
        f"--machine={name}",
        # The same name in every host, so that what a test compares is the same as well.
        "--hostname=host",
        # The machine may have no systemd, and no machined to register with.
        "--register=no",
        "--keep-unit",
        "--private-network",
        "--boot",
        "--console=pipe",
        # Readiness is PID 1's own word and comes with its pid.
        "--notify-ready=yes",
        # The toolkit creates interfaces, raises limits and changes users as an administrator
        # may; modules, clock and the kernel's log belong to the machine, and systemd skips the
        # units that need them where the capability is missing.
        "--capability=all",
        "--drop-capability=CAP_SYS_MODULE,CAP_SYS_TIME",
        *(f"--bind={device}" for device in devices),
        # systemd takes notice of five mounts a second and of further ones in the next second.
        # Without mounts that nobody uses in here, boot stays below that: 0.3 s, not 1.3 s.
        *(f"systemd.mask={unit}" for unit in _NEEDLESS_MOUNTS),
    ]


class ContainerHost(CommandHost):
    """One container; several may run at once."""

    kind = "container"

    def __init__(self, suite: str = root.DEFAULT_SUITE) -> None:
        super().__init__(suite)
        self.name = f"test-host-c{os.getpid()}-{next(_numbers)}"
        self._work = cache.hosts() / self.name
        self._owner: IO[str] | None = None
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        self._cgroups: list[Path] = []
        self._network = ""

    # -- life -------------------------------------------------------------------------------

    def start(self) -> None:
        if self._nspawn is not None and self._nspawn.poll() is None:
            raise HostError(f"{self.name} runs already")
        if lack := missing():
            raise HostError(lack)
        if self._owner is None:
            leftovers.clean()
            self._owner = cache.claim(self._work)
            self._prepare(root.with_tree(self.suite))
        began = time.monotonic()
        self._boot()
        self.start_seconds = time.monotonic() - began

    def _prepare(self, built: root.Root) -> None:
        for part in ("upper", "work", "tree"):
            (self._work / part).mkdir()
        # An overlay of the cached tree: nothing is copied, and what the host writes goes with it.
        options = f"lowerdir={built.tree},upperdir={self._work}/upper,workdir={self._work}/work"
        argv = ["mount", "-t", "overlay", "test-host", "-o", options, str(self._work / "tree")]
        done = subprocess.run(argv, capture_output=True, text=True)
        if done.returncode:
            raise HostError(
                f"{done.stderr.strip()}; an overlay needs a real file system below "
                f"{cache.directory()} (MICROVM_HOST_TEST_CACHE chooses another place)"
            )

    def _boot(self) -> None:
        notify_path = self._work / "notify"
        notify_path.unlink(missing_ok=True)
        devices = [device for device in _DEVICES if Path(device).exists()]
        if kvm_works():
            devices.append("/dev/kvm")
        argv = nspawn_argv(tree=self._work / "tree", name=self.name, devices=devices)
        self._cgroups = leftovers.make_cgroups(self.name)
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify,
            (self._work / "console.log").open("ab") as console,
        ):
            notify.bind(str(notify_path))
            self._nspawn = subprocess.Popen(
                leftovers.in_cgroups_argv(self._cgroups, argv),
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                # An interrupt typed at the terminal is for the test, which then stops the host.
                start_new_session=True,
                env={
                    **os.environ,
                    "NOTIFY_SOCKET": str(notify_path),
                    # Without it systemd 257 and later refuse a machine with legacy cgroups.
                    "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                },
            )
            self._leader = self._await_ready(notify)
        self._network = os.readlink(f"/proc/{self._leader}/ns/net")
        self._make_command_cgroup()
        # READY= comes when the default target is reached; the state also counts queued jobs.
        self.run(["systemctl", "is-system-running", "--wait"], check=False, timeout=60)
        state = self.run(["systemctl", "is-system-running"], check=False).stdout.strip()
        if state not in ("running", "degraded"):
            raise HostError(f"{self.name} came up as {state!r}\n{self.diagnosis()}")

    def _await_ready(self, notify: socket.socket, timeout: float = 240) -> int:
        assert self._nspawn is not None
        leader = 0
        notify.settimeout(0.2)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if (code := self._nspawn.poll()) is not None:
                raise HostError(f"systemd-nspawn ended at once ({code})\n{self.diagnosis()}")
            try:
                message = notify.recv(4096).decode(errors="replace").splitlines()
            except TimeoutError:
                continue
            for line in message:
                if line.startswith("X_NSPAWN_LEADER_PID="):
                    leader = int(line.partition("=")[2])
                elif line == "READY=1" and leader:
                    return leader
        raise HostError(f"{self.name} was not ready in {timeout:.0f} s\n{self.diagnosis()}")

    def _make_command_cgroup(self) -> None:
        # A command that nsenter brings in would stay in a cgroup that does not exist inside, and
        # what asks systemd "which unit is this process?" would get an error for an answer.  So
        # commands get a cgroup beside init.scope; systemd leaves alone what it did not make.
        inside = leftovers.cgroup_of(self._leader)
        self._commands = inside.parent / "commands" if inside.name == "init.scope" else None
        if self._commands:
            with contextlib.suppress(FileExistsError):
                self._commands.mkdir()

    def poweroff(self) -> None:
        self._end(["systemctl", "poweroff"], expect=0)

    def reboot(self) -> None:
        self._end(["systemctl", "reboot"], expect=_EXIT_REBOOT)
        began = time.monotonic()
        self._boot()
        self.start_seconds = time.monotonic() - began

    def _end(self, argv: Sequence[str], *, expect: int) -> None:
        assert self._nspawn is not None, "the host was never started"
        # The command may be cut off in the middle by the very thing that it asks for.
        self.run(argv, check=False)
        try:
            code = self._nspawn.wait(timeout=90)
        except subprocess.TimeoutExpired:
            raise HostError(f"{argv} did not end {self.name}\n{self.diagnosis()}") from None
        if code != expect:
            raise HostError(f"{argv}: systemd-nspawn exited {code}\n{self.diagnosis()}")
        leftovers.remove_cgroups(self._cgroups)

    def stop(self) -> None:
        if self._owner is None:
            return
        # All goes to the bin, so nothing is asked to end in order: killing PID 1 of a namespace
        # kills everything in it, and nspawn then cleans up after itself.
        if self._nspawn is not None and self._nspawn.poll() is None:
            if self._leader:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._leader, signal.SIGKILL)
            try:
                self._nspawn.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self._nspawn.kill()
                self._nspawn.wait()
        self._nspawn = None
        self._leader = 0
        leftovers.discard(self._work, self._cgroups, self._network)
        cache.release(self._work, self._owner)
        self._owner = None

    # -- commands ---------------------------------------------------------------------------

    def _enter_argv(self, inner: Sequence[str], *, terminal: bool) -> list[str]:
        del terminal  # the caller's own terminal is inherited as it is
        if self._nspawn is None or self._nspawn.poll() is not None:
            raise HostError(f"{self.name} does not run\n{self.diagnosis()}")
        enter = ["nsenter", f"--target={self._leader}", "--mount", "--uts", "--ipc", "--net"]
        # setpriv: nsenter waits outside for a child inside, and that child must not outlive it.
        enter += ["--pid", "--cgroup", "--", "setpriv", "--pdeathsig=KILL", "--", *inner]
        return leftovers.in_cgroups_argv([self._commands] if self._commands else [], enter)

    def shell(self) -> int:
        # The caller's terminal has no name in here, and programs that ask for one refuse to work;
        # script makes a terminal of the host's own between the two.
        words = ["script", "--quiet", "--return", "--command", "bash --login", "/dev/null"]
        argv = self._enter_argv(inner_argv(words), terminal=True)
        return subprocess.run(argv).returncode

    def diagnosis(self) -> str:
        log = self._work / "console.log"
        if not log.exists():
            return "(no console log)"
        return "console:\n" + log.read_text(encoding="utf-8", errors="replace")[-4000:]
