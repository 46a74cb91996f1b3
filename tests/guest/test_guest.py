# SPDX-License-Identifier: MIT
"""The guest boots and tells; the packages have the contract's bytes.

Boots run under QEMU on this machine, as this user, without any of its network. The guest is made
from the root of the test hosts; ``MICROVM_GUEST_IMAGE`` names a finished image instead, and
``MICROVM_GUEST_ROOT`` another Debian tree.
"""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

import pytest

from tests.host.fixtures import require, require_container
from tests.host.root import DEFAULT_SUITE, with_tree

from . import __main__ as command
from .image import Image, ImageError, build, find_kernel
from .package import (
    Era,
    Guest,
    Macvtap,
    Package,
    PackageError,
    Share,
    Stub,
    Tap,
    Volume,
    imitate,
)

# A boot takes 2 to 4 s under TCG; a machine that is busy with other tests takes longer.
PATIENCE = 60.0
NOWHERE = Image(Path("/nonexistent/image"))


class Console:
    """A started package and what its guest says."""

    def __init__(self, package: Path, state: Path) -> None:
        self.package = package
        self.state = state
        self.lines: list[str] = []
        self._incoming: queue.Queue[str | None] = queue.Queue()
        state.mkdir(exist_ok=True)
        self.process = subprocess.Popen(
            [package / "bin/microvm-run"],
            cwd=state,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._incoming.put(line.decode(errors="replace").rstrip("\r\n"))
        self._incoming.put(None)

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join(PATIENCE)

    def expect(self, text: str, *, patience: float = PATIENCE) -> str:
        """Wait for a line that has the text; already seen ones count."""
        for line in self.lines:
            if text in line:
                return line
        deadline = time.monotonic() + patience
        while True:
            try:
                line_or_end = self._incoming.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                pytest.fail(f"no {text!r} within {patience:g} s; console:\n{self}")
            if line_or_end is None:
                pytest.fail(f"the console ended without {text!r}:\n{self}")
            self.lines.append(line_or_end)
            if text in line_or_end:
                return line_or_end

    def ends(self, *, patience: float = PATIENCE) -> int:
        """Wait for the hypervisor to exit and take the rest of the console; its status."""
        status = self.process.wait(patience)
        self._reader.join(PATIENCE)
        while (line := self._incoming.get()) is not None:
            self.lines.append(line)
        return status

    def shutdown(self) -> subprocess.CompletedProcess[str]:
        """Run the package's shutdown script with nothing on its standard input."""
        return subprocess.run(
            [self.package / "bin/microvm-shutdown"],
            cwd=self.state,
            env={**os.environ, "MAINPID": str(self.process.pid)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def __str__(self) -> str:
        return "\n".join(self.lines)


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The guest's kernel and initrd."""
    require(None if shutil.which("qemu-system-x86_64") else "qemu-system-x86_64 is not installed")
    ready = os.environ.get("MICROVM_GUEST_IMAGE")
    if ready:
        return Image(Path(ready))
    tree = os.environ.get("MICROVM_GUEST_ROOT")
    if tree is None:
        require_container()
        tree = str(with_tree(DEFAULT_SUITE).tree)
    return build(Path(tree), tmp_path_factory.mktemp("image"))


@pytest.fixture
def state(tmp_path: Path) -> Iterator[Path]:
    """A state directory."""
    directory = tmp_path / "state"
    directory.mkdir()
    yield directory


def start(guest: Guest, tmp_path: Path) -> Console:
    """Write the package and start it."""
    return Console(guest.write(tmp_path / "package"), tmp_path / "state")


# The guest.


def test_guest_tells_what_it_sees(image: Image, tmp_path: Path) -> None:
    guest = Guest(
        name="web",
        image=image,
        cpus=2,
        user_net=True,
        pings=("10.0.2.2",),
        volumes=(Volume(image="data.img", size_mb=3, serial="data"),),
    )
    with start(guest, tmp_path) as console:
        console.expect("GUEST web: ready")
        console.expect("GUEST web: hello from Linux ")
        console.expect("GUEST web: cpus 2")
        console.expect("GUEST web: power buttons 1")
        console.expect("52:54:00:00:02:0f 10.0.2.15/24 driver virtio_net mq 1")
        console.expect("GUEST web: block vda 3145728 bytes ro 0 serial data")
        console.expect("1af4:1000 driver virtio-pci")
        console.expect("GUEST web: ping 10.0.2.2 ok")
        assert not any("\r" in line for line in console.lines if "GUEST" in line)


def test_guest_uses_disks_and_random_numbers(image: Image, tmp_path: Path, state: Path) -> None:
    disk = state / "data.img"
    disk.write_bytes(b"put there before\n".ljust(1 << 20, b"\0"))
    guest = Guest(
        name="web",
        image=image,
        volumes=(Volume(image=disk.name, size_mb=1, serial="data"),),
        disks=("data", "other"),
        qemu_args=("-device", "virtio-rng-pci"),
    )
    with start(guest, tmp_path) as console:
        console.expect("GUEST web: ready")
        console.expect("GUEST web: disk data holds: put there before")
        console.expect("GUEST web: disk data write: ok")
        console.expect("GUEST web: disk other missing")
        console.expect("GUEST web: rng virtio_rng.0 gave 16 bytes")
    assert disk.read_bytes()[512:].startswith(b"written by web\n\0")


@pytest.mark.parametrize("machine", ["microvm", "q35"])
def test_power_button_stops_the_guest_in_order(image: Image, tmp_path: Path, machine: str) -> None:
    guest = Guest(name="web", image=image, machine="q35" if machine == "q35" else "microvm")
    with start(guest, tmp_path) as console:
        console.expect("GUEST web: ready")
        result = console.shutdown()
        assert result.returncode == 0, result.stderr
        # This kind of script waits until QEMU no longer listens.
        assert console.ends(patience=30) == 0
        said = [line.partition("GUEST web: ")[2] for line in console.lines if "GUEST" in line]
        assert said[-2:] == ["shutting down (power-button)", "powering off"]


@pytest.mark.parametrize("keyboard", ["i8042", "virtio"])
def test_ctrl_alt_del_stops_the_guest(image: Image, tmp_path: Path, keyboard: str) -> None:
    guest = Guest(
        name="web",
        image=image,
        keyboard="virtio" if keyboard == "virtio" else "i8042",
        shutdown="ctrl-alt-del",
    )
    with start(guest, tmp_path) as console:
        console.expect("GUEST web: ready")
        assert console.shutdown().returncode == 0
        console.expect("GUEST web: shutting down (ctrl-alt-del)")
        assert console.ends() == 0


def test_ctrl_alt_del_without_a_keyboard_is_refused(image: Image, tmp_path: Path) -> None:
    guest = Guest(name="web", image=image, shutdown="ctrl-alt-del")
    with start(guest, tmp_path) as console:
        console.expect("GUEST web: ready")
        result = console.shutdown()
        assert "Input handler not found" in result.stdout
        assert result.returncode == 0
        with pytest.raises(subprocess.TimeoutExpired):
            console.process.wait(1)


def test_early_script_is_back_before_a_slow_guest_has_stopped(image: Image, tmp_path: Path) -> None:
    guest = Guest(name="web", image=image, shutdown="power-button-early", slow_stop=10)
    with start(guest, tmp_path) as console:
        console.expect("GUEST web: ready")
        assert console.shutdown().returncode == 0
        assert console.process.poll() is None
        console.expect("GUEST web: stopping takes 10 s")
        assert console.ends() == 0
        assert "GUEST web: powering off" in str(console)


def test_deaf_guest_hears_and_stays(image: Image, tmp_path: Path) -> None:
    guest = Guest(name="web", image=image, shutdown="power-button-early", deaf=True)
    with start(guest, tmp_path) as console:
        console.expect("GUEST web: ready")
        console.shutdown()
        console.expect("GUEST web: ignoring power-button")
        with pytest.raises(subprocess.TimeoutExpired):
            console.process.wait(1)


def test_guest_ends_by_itself(image: Image, tmp_path: Path) -> None:
    with start(Guest(name="web", image=image, exit_after=0), tmp_path) as console:
        assert console.ends() == 0
        assert "GUEST web: shutting down (unasked)" in str(console)


def test_guest_crashes(image: Image, tmp_path: Path) -> None:
    with start(Guest(name="web", image=image, crash_after=0), tmp_path) as console:
        # A panic becomes a reboot, and that is an orderly exit of QEMU.
        assert console.ends() == 0
        assert "Kernel panic" in str(console)


def test_guest_makes_the_hypervisor_fail(image: Image, tmp_path: Path) -> None:
    with start(Guest(name="web", image=image, fail_after=0), tmp_path) as console:
        assert console.ends() == 3


def test_command_line_makes_a_package_that_boots(image: Image, tmp_path: Path) -> None:
    package = tmp_path / "package"
    arguments = ["package", "--name", "demo", "--image", str(image.directory), "-o", str(package)]
    assert command.main([*arguments, "--exit-after", "0"]) == 0
    with Console(package, tmp_path / "state") as console:
        assert console.ends() == 0
        assert "GUEST demo: ready" in str(console)


def test_a_bare_copy_of_this_directory_works(tmp_path: Path) -> None:
    shutil.copytree(Path(__file__).parent, tmp_path / "guest")
    arguments = ["stub", "--name", "x", "-o", str(tmp_path / "stub")]
    subprocess.run(
        [sys.executable, "-I", "-c", RUN_COPY, str(tmp_path), *arguments],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    assert (tmp_path / "stub/bin/microvm-run").is_file()


RUN_COPY = """
import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("guest", run_name="__main__")
"""


def test_a_tree_without_a_kernel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="no kernel with modules"):
        find_kernel(tmp_path)


# The packages' bytes.


def contents(package: Package, tmp_path: Path) -> dict[str, str]:
    """Every file below share/microvm; a link as ``-> TARGET``."""
    share = package.write(tmp_path / "package", prefix="/srv/package") / "share/microvm"
    return {
        str(path.relative_to(share)): f"-> {path.readlink()}"
        if path.is_symlink()
        else path.read_text()
        for path in sorted(share.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def test_every_file_of_the_contract(tmp_path: Path) -> None:
    package = Stub(
        name="web",
        taps=(
            Tap(name="web0", mac="02:00:00:00:00:01", bridge="br0"),
            Tap(name="web1", mac="02:00:00:00:00:02"),
        ),
        multi_queue=True,
        macvtaps=(Macvtap(name="mac0", mac="02:00:00:00:00:03", link="eth0", mode="vepa"),),
        shares=(
            Share(tag="data", source="/srv/da ta"),
            Share(
                tag="home/alice",
                source="rel",
                socket="run/sub.sock",
                read_only=True,
                cache="never",
                posix_acl=True,
                extra_args=("--thread-pool-size", "2"),
            ),
        ),
        pci_devices=("01:00.1", "*:02:00.0"),
        vsock_cid=42,
        system="/nonexistent/system",
        readiness="exec",
        control_socket="web.sock",
        control_protocol="qmp",
        machine_uuid="6f7b2ab2-0000-4000-8000-000000000001",
    )
    assert contents(package, tmp_path) == {
        "tap-interfaces": "web0\nweb1\n",
        "tap-flags": "vnet_hdr\nmulti_queue\n",
        "tap-bridges": "web0 br0\n",
        "macvtap-interfaces": "mac0 02:00:00:00:00:03 eth0 vepa\n",
        "pci-devices": "01:00.1\n*:02:00.0\n",
        "hypervisor": "qemu\n",
        "vsock-cid": "42\n",
        "system": "-> /nonexistent/system",
        "readiness": "exec\n",
        "control-socket": "web.sock\n",
        "control-protocol": "qmp\n",
        "machine-uuid": "6f7b2ab2-0000-4000-8000-000000000001\n",
        "virtiofs/data/source": "/srv/da ta\n",
        "virtiofs/data/socket": "web-virtiofs-data.sock\n",
        "virtiofs/home/alice/source": "rel\n",
        "virtiofs/home/alice/socket": "run/sub.sock\n",
        "virtiofs/home/alice/read-only": "true\n",
        "virtiofs/home/alice/cache": "never\n",
        "virtiofs/home/alice/posix-acl": "true\n",
        "virtiofs/home/alice/extra-args": "--thread-pool-size\n2\n",
    }


def test_a_package_that_says_little(tmp_path: Path) -> None:
    package = Stub(name="web", hypervisor_file=False, tap_flags_file=False, shutdown="none")
    assert package.write(tmp_path / "package") == tmp_path / "package"
    files = [path for path in (tmp_path / "package").rglob("*") if path.is_file()]
    assert files == [tmp_path / "package/bin/microvm-run"]


def test_a_queue_for_each_cpu(tmp_path: Path) -> None:
    tap = Tap(name="web0", mac="02:00:00:00:00:01")
    guest = Guest(name="web", image=NOWHERE, placement="refer", cpus=2, taps=(tap,))
    assert contents(guest, tmp_path)["tap-flags"] == "vnet_hdr\nmulti_queue\n"
    script = (tmp_path / "package/bin/microvm-run").read_text()
    assert "ifname=web0,script=no,downscript=no,vhost=off,queues=2" in script
    assert "mac=02:00:00:00:00:01,romfile=,mq=on,vectors=6" in script


def test_macvtaps_are_opened_by_number(tmp_path: Path) -> None:
    macvtaps = tuple(
        Macvtap(name=f"mac{number}", mac=f"02:00:00:00:00:0{number}", link="eth0")
        for number in range(2)
    )
    guest = Guest(
        name="web", image=NOWHERE, placement="refer", macvtaps=macvtaps, macvtap_queues=2, cpus=2
    )
    script = (guest.write(tmp_path / "package") / "bin/microvm-run").read_text()
    assert "exec 3<>/dev/tap$(< /sys/class/net/mac0/ifindex)\n" in script
    assert "exec 6<>/dev/tap$(< /sys/class/net/mac1/ifindex)\n" in script
    assert "tap,id=mac0,fds=3:4,vhost=off" in script
    assert "tap,id=mac1,fds=5:6,vhost=off" in script


def test_scripts_name_where_the_package_will_live(tmp_path: Path) -> None:
    directory = tmp_path / "image"
    directory.mkdir()
    for name in ("vmlinuz", "initrd"):
        (directory / name).write_bytes(name.encode())
    guest = Guest(name="web", image=Image(directory), virtiofsd_run=True, shares=(DATA,))
    package = guest.write(tmp_path / "package", prefix="/srv/package")
    assert (package / "lib/initrd").read_bytes() == b"initrd"
    for path in package.rglob("*"):
        if path.is_file():
            assert str(tmp_path) not in path.read_text()
    assert "-kernel /srv/package/lib/vmlinuz" in (package / "bin/microvm-run").read_text()


DATA = Share(tag="data", source='/srv/it\'s "data"', read_only=True)


@pytest.mark.parametrize(
    ("era", "files"),
    [
        ("2023-10", {"system", "tap-interfaces"}),
        ("2023-11", {"system", "tap-interfaces", "tap-flags"}),
        ("2024-04", {"system", "tap-interfaces", "tap-flags"}),
        ("2025-06", {"system", "tap-interfaces", "tap-flags"}),
        ("2026-08", {"tap-interfaces", "tap-flags", "hypervisor", "vsock-cid"}),
    ],
)
def test_packages_of_their_time(era: Era, files: set[str], tmp_path: Path) -> None:
    guest = Guest(
        name="web",
        image=NOWHERE,
        placement="refer",
        taps=(Tap(name="web0", mac="02:00:00:00:00:01", bridge="br0"),),
        shares=(DATA,),
        vsock_cid=3,
        readiness="exec",
    )
    share = {"virtiofs/data/source", "virtiofs/data/socket"}
    assert set(contents(imitate(guest, era), tmp_path)) == files | share
    assert (tmp_path / "package/bin/microvm-run").is_symlink()
    assert (tmp_path / "package/bin/virtiofsd-run").exists() == (era >= "2025")
    options = {
        "--readonly" in path.read_text() for path in tmp_path.glob("package/lib/virtiofsd-*")
    }
    assert options == ({True} if era >= "2025" else set())


@pytest.mark.parametrize("kind", ["guest", "stub"])
def test_scripts_are_shell(kind: str, tmp_path: Path) -> None:
    package: Package = Stub(name="it's", seconds=3, status=2, deaf=True)
    if kind == "guest":
        package = Guest(
            name="it's",
            image=NOWHERE,
            placement="refer",
            balloon=True,
            shares=(DATA,),
            virtiofsd_run=True,
            volumes=(Volume(image="a b.img", size_mb=1, file_system="ext4"),),
        )
    package.write(tmp_path / "package")
    for script in tmp_path.glob("package/*/*"):
        if script.is_file() and script.read_bytes().startswith(b"#! /bin/bash"):
            subprocess.run(["bash", "-n", script], check=True)


def test_what_the_guest_cannot_be_told_is_refused(tmp_path: Path) -> None:
    share = Share(tag="a,b", source="/srv", mount="/mnt/a")
    guest = Guest(name="web", image=NOWHERE, placement="refer", shares=(share,))
    with pytest.raises(PackageError, match="cannot be told"):
        guest.write(tmp_path / "package")
    assert not (tmp_path / "package").exists()


def test_extra_files_make_a_wrong_package(tmp_path: Path) -> None:
    package = Stub(name="web", extra_files={"share/microvm/tap-interfaces": b"\xff\n"})
    package.write(tmp_path / "package")
    assert (tmp_path / "package/share/microvm/tap-interfaces").read_bytes() == b"\xff\n"


# The stubs.


def test_stub_runs_until_it_is_told(state: Path, tmp_path: Path) -> None:
    with Console(Stub(name="web").write(tmp_path / "package"), state) as console:
        console.expect(f"in {state}")
        assert console.shutdown().returncode == 0
        assert console.ends() == -15


def test_stub_fails_as_told(state: Path, tmp_path: Path) -> None:
    package = Stub(name="web", seconds=0, status=7).write(tmp_path / "package")
    with Console(package, state) as console:
        assert console.ends() == 7


def test_deaf_stub_ignores_sigterm(state: Path, tmp_path: Path) -> None:
    package = Stub(name="web", deaf=True, shutdown="early").write(tmp_path / "package")
    with Console(package, state) as console:
        console.expect("STUB web: started")
        assert console.shutdown().returncode == 0
        time.sleep(0.2)
        console.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            console.process.wait(0.5)
