# SPDX-License-Identifier: MIT
"""A hypervisor that a guest has taken over tries to make root act for it.

Each test is one way, tried for real on a host: somebody with all that the VM's user has plants
something, or does so in a loop, while root starts, stops and lists. What is asserted is that the
thing which root alone may touch is as it was, and that the VM still runs, or fails with a reason.

The attacker is `microvm`, the user of all VMs that have no other, so that a process of one VM is
at hand while root sets up another: that is the most that a hypervisor can have. Hard links to what
is root's are made by root on its behalf, as they could be where fs.protected_hardlinks is off.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.guest.package import Share, Stub, Tap

from .toolkit import IMAGE, Toolkit, eventually
from .vms import declare, hasty_guard

pytestmark = pytest.mark.container

EVE = "microvm"
# Root's, in a directory of root's.
PROTECTED = "/etc/protected"
# Root's too, with all that root would remove on behalf of a VM.
DIRECTORY = "/etc/protected.d"
SOCKETS = ("vm.sock", *(f"vm{number}.sock" for number in range(10)))
_FILL = f"""
import os, socket
for directory in ("{DIRECTORY}", "{DIRECTORY}/deep"):
    os.mkdir(directory)
    for name in {SOCKETS}:
        socket.socket(socket.AF_UNIX).bind(f"{{directory}}/{{name}}")
        open(f"{{directory}}/{{name}}.pid", "x").close()
os.mkdir("{DIRECTORY}/empty")
"""


class Arena:
    """A VM, its state directory, and somebody who has its user."""

    def __init__(self, toolkit: Toolkit, vm: str) -> None:
        self.toolkit = toolkit
        self.vm = vm
        self.state = f"/var/lib/microvms/{vm}"
        self.before = self.directory()

    def eve(self, line: str, *, check: bool = True) -> str:
        """Run a line of shell as the VM's user in the state directory; gives what it printed."""
        argv = ["sh", "-c", f"cd {self.state} && {{ {line}\n}} 2>&1"]
        done = self.toolkit.host.run(argv, user=EVE, check=check)
        return done.stdout

    @contextlib.contextmanager
    def keeps(self, line: str) -> Iterator[None]:
        """Have the VM's user do something over and over, as fast as it goes."""
        loop = f"cd {self.state} && echo go && while :; do {line}; done 2>/dev/null"
        process = self.toolkit.host.spawn(["bash", "-c", loop], user=EVE)
        try:
            assert process.stdout is not None and process.stdout.readline() == "go\n"
            yield
            assert process.poll() is None, "the attacker gave up"
        finally:
            process.kill()
            process.communicate()

    def hard_link(self, target: str, name: str) -> None:
        """What the kernel may keep the VM's user from, and some kernels do not."""
        self.toolkit.sh(f"rm -f {self.state}/{name}; ln -P {target} {self.state}/{name}")

    def make(self, **fields: object) -> None:
        package = Stub(name=self.vm, **fields)  # type: ignore[arg-type]
        self.toolkit.create(package)

    def start(self) -> str:
        """Start the VM; gives what was said if that failed."""
        done = self.toolkit.host.run(["microvm", "start", self.vm], check=False)
        return done.stderr if done.returncode else ""

    def stop(self) -> None:
        self.toolkit.host.run(["microvm", "stop", self.vm])

    def is_up(self) -> bool:
        return self.toolkit.property(f"microvm@{self.vm}", "ActiveState") == "active"

    def unharmed(self) -> None:
        """Assert that what is root's is as it was made."""
        shown = self.toolkit.sh(f"stat -c '%u:%g %a %h' {PROTECTED}; cat {PROTECTED}")
        assert shown == "0:0 644 1\nroot's\n" or shown == "0:0 644 2\nroot's\n", shown
        assert self.directory() == self.before

    def directory(self) -> str:
        """What is in the directory of root's, and whose."""
        return self.toolkit.sh(f"find {DIRECTORY} -printf '%P %y %U:%G %m %n %i\\n' | sort")


@pytest.fixture
def arena(toolkit: Toolkit, vm: str) -> Iterator[Arena]:
    toolkit.sh(
        f'rm -rf {PROTECTED} {DIRECTORY}; echo "root\'s" >{PROTECTED}; chmod 644 {PROTECTED}; '
        "mkdir -p /srv/data"
    )
    toolkit.host.run(["python3", "-c", _FILL])
    arena = Arena(toolkit, vm)
    yield arena
    arena.unharmed()
    toolkit.sh(f"rm -rf {PROTECTED} {DIRECTORY}; systemctl reset-failed", check=False)


def uid(arena: Arena) -> str:
    """The number of the VM's user."""
    return arena.toolkit.sh(f"id -u {EVE}").strip()


def data(**fields: object) -> tuple[Share, ...]:
    """One share of a directory of root's."""
    return (Share(**{"tag": "data", "source": "/srv/data", **fields}),)  # type: ignore[arg-type]


# ---- the links that say what runs


@pytest.mark.parametrize("link", ["current", "booted"])
def test_replacing_a_link_to_the_package(arena: Arena, link: str) -> None:
    arena.make()
    assert not arena.start()
    before = arena.toolkit.sh(f"readlink {arena.state}/{link}")
    arena.toolkit.sh("mkdir -p /opt/evil")
    for line in (
        f"rm -f {link}",
        f"mv {link} {link}.old",
        f"ln -sfn /opt/evil {link}",
        f"ln -s /opt/evil new && mv -T new {link}",
        f"unlink {link}",
    ):
        assert "Operation not permitted" in arena.eve(line, check=False), line
    assert arena.toolkit.sh(f"readlink {arena.state}/{link}") == before


def test_racing_for_the_link_to_the_package(arena: Arena) -> None:
    """`booted` comes and goes with each start: it is taken in between."""
    arena.make()
    with arena.keeps("ln -s /opt/evil booted; ln -sfn /opt/evil booted; rm -f booted"):
        for _ in range(4):
            assert not arena.start()
            target = arena.toolkit.sh(f"stat -c '%u %N' {arena.state}/booted")
            assert target.startswith("0 ") and "/opt/evil" not in target
            arena.stop()


def test_planting_a_link_to_a_package_where_there_is_none(arena: Arena) -> None:
    arena.make()
    other = arena.toolkit.sh(f"readlink {arena.state}/current").strip()
    arena.toolkit.sh(f"rm {arena.state}/current; ln -s {other} {arena.state}-link")
    arena.eve(f"ln -s {other} current")
    assert "does not belong to root" in arena.start()
    # A second name of a link that root made elsewhere.
    arena.eve("rm current")
    arena.hard_link(f"{arena.state}-link", "current")
    assert arena.toolkit.sh(f"stat -c %u {arena.state}/current").strip() == "0"
    assert "has another name elsewhere (a hard link)" in arena.start()
    arena.toolkit.sh(f"rm {arena.state}-link")


def test_being_taken_for_booted(arena: Arena) -> None:
    """What the VM is said to run is root's word, and does not command root's terminal."""
    arena.make()
    arena.eve(
        "mkdir -p \"$(printf 'evil\\033[31m')/bin\" \"$(printf 'evil\\033[31m')/share/microvm\"; "
        "cd evil*; printf '#!/bin/sh\\n' >bin/microvm-run; chmod +x bin/microvm-run; "
        'echo 4 >share/microvm/vsock-cid; cd ..; ln -s "$(echo evil*)" booted'
    )
    assert "\033" not in arena.toolkit.sh("microvm -l")
    (row,) = json.loads(arena.toolkit.sh(f"microvm list --json {arena.vm}"))
    assert row["booted"] is None
    shown = arena.toolkit.host.run(["microvm", "ssh", arena.vm], check=False).stderr
    assert "has no vsock CID" in shown


def test_a_directory_in_the_way_of_booted(arena: Arena) -> None:
    arena.make()
    arena.eve("mkdir booted booted/inner")
    assert not arena.start()
    assert arena.toolkit.sh(f"stat -c %u {arena.state}/booted").strip() == "0"
    assert arena.toolkit.sh(f"ls {arena.state}/booted.moved.*").split() == ["inner"]
    assert any("made a directory `booted`" in line for line in arena.toolkit.journal(arena.vm))


def test_directories_in_the_way_of_an_update(arena: Arena) -> None:
    """Nothing that the VM's user makes keeps a VM from a newer package."""
    arena.make()
    # As after a start, which gives the directory its owner.
    assert not arena.start()
    arena.eve("mkdir flake declaration declared .build current.d; ln -s /etc .builds")
    newer = arena.toolkit.put(Stub(name=arena.vm), "/opt/newer")
    arena.toolkit.host.write(f"/etc/microvms/{arena.vm}.toml", f'runner = "{newer}"\n')
    arena.toolkit.host.run(["microvm", "update", arena.vm])
    assert arena.toolkit.sh(f"readlink {arena.state}/current").strip() == newer
    assert arena.toolkit.sh(f"stat -c '%u %F' {arena.state}/declared") == "0 regular empty file\n"
    # The note that root writes is taken for a directory over and over.
    arena.toolkit.sh(f"rm {arena.state}/runner; rm -r {arena.state}/declared")
    with arena.keeps("mkdir runner declared; rmdir runner declared"):
        for package in (f"/opt/packages/{arena.vm}", newer) * 2:
            line = f'runner = "{package}"\n'
            arena.toolkit.host.write(f"/etc/microvms/{arena.vm}.toml", line)
            arena.toolkit.host.run(["microvm", "update", arena.vm])
    assert arena.toolkit.sh(f"stat -c %u {arena.state}/runner").strip() == "0"


def test_taking_the_names_that_root_uses_in_between(arena: Arena) -> None:
    """Files that root makes beside a link or a note, and then renames, have the pid in them."""
    arena.make()
    code = (
        f"import os; first = os.getpid(); to = '{PROTECTED}'; [(os.mkdir(f'.booted.{{i}}'), "
        "os.symlink(to, f'runner.{i}'), os.symlink(to, f'.current.{i}')) "
        "for i in range(first, first + 1000)]"
    )
    arena.eve(f'python3 -c "{code}"')
    assert not arena.start()
    arena.toolkit.host.run(["microvm", "update", arena.vm])
    assert arena.toolkit.sh(f"stat -c %u {arena.state}/runner").strip() == "0"
    assert arena.toolkit.sh(f"stat -c %u {arena.state}/booted").strip() == "0"


# ---- what remembers where the package came from


def test_notes_of_eves_are_not_believed(arena: Arena) -> None:
    path = arena.toolkit.put(Stub(name=arena.vm))
    arena.toolkit.link(arena.vm, path)
    # As after a start, which gives the directory its owner.
    assert not arena.start()
    arena.stop()
    arena.toolkit.sh(f"echo /opt/evil >{arena.state}-note")
    for line in (
        "rm -f runner; echo /opt/evil >runner",
        "rm -f runner; mkfifo runner",
        f"rm -f runner; ln -s {arena.state}-note runner",
        "",
    ):
        if line:
            arena.eve(line)
        else:
            arena.hard_link(f"{arena.state}-note", "runner")
        done = arena.toolkit.host.run(["microvm", "update", arena.vm], check=False, timeout=60)
        assert "nothing tells where the package" in done.stderr, line
        assert arena.toolkit.host.run(["microvm", "-l"], timeout=60).returncode == 0
    arena.toolkit.sh(f"rm {arena.state}-note")


def test_an_access_control_list_from_when_the_directory_was_eves(arena: Arena) -> None:
    """Root's note says where the next package comes from; eve would write to it."""
    toolkit, state = arena.toolkit, arena.state
    path = toolkit.put(Stub(name=arena.vm))
    toolkit.link(arena.vm, path)
    # As under microvm.nix, whose users are told to.
    toolkit.sh(f"chown {EVE} {state}")
    code = (
        "import os, struct; e = [(1, 7, -1), (2, 7, os.getuid()), (4, 7, -1), (16, 7, -1), "
        "(32, 7, -1)]; v = struct.pack('<I', 2) + b''.join(struct.pack('<HHi', *a) for a in e); "
        f"[os.setxattr('{state}', f'system.posix_acl_{{k}}', v) for k in ('access', 'default')]"
    )
    arena.eve(f'python3 -c "{code}"')
    assert not arena.start()
    toolkit.host.write(f"/etc/microvms/{arena.vm}.toml", f'runner = "{path}"\n')
    toolkit.host.run(["microvm", "update", arena.vm])
    toolkit.sh(f"rm /etc/microvms/{arena.vm}.toml*")
    assert "ermission denied" in arena.eve("echo /opt/evil >runner", check=False)
    assert toolkit.sh(f"cat {state}/runner").strip() == path
    arena.stop()


def test_a_package_that_eve_could_change(arena: Arena) -> None:
    """Its files say what root exports, and to whom it gives which interface."""
    package = Stub(name=arena.vm, taps=(Tap(name="evil0", mac="02:00:00:00:00:01"),))
    arena.toolkit.put(package, "/opt/hers")
    for part in ("", "/share/microvm", "/share/microvm/tap-interfaces"):
        arena.toolkit.sh(f"chown -R root: /opt/hers; chown {EVE} /opt/hers{part}")
        arena.toolkit.link(arena.vm, "/opt/hers")
        assert f"user '{EVE}', which runs this VM, can change this" in arena.start(), part
        assert not arena.toolkit.host.exists("/sys/class/net/evil0")
    arena.toolkit.sh("chown -R root: /opt/hers")
    assert not arena.start()


# ---- sockets that root makes and gives away


@pytest.mark.parametrize(
    "plant",
    [
        f"ln -s {PROTECTED} vm.sock",
        "",
        "ln -s current vm.sock",
        "mkfifo vm.sock",
        "echo precious >vm.sock",
        "mkdir vm.sock",
    ],
)
def test_something_in_the_place_of_a_socket(arena: Arena, plant: str) -> None:
    arena.make(shares=data(socket="vm.sock"))
    if plant:
        arena.eve(plant)
    else:
        arena.hard_link(PROTECTED, "vm.sock")
    before = arena.toolkit.sh(f"stat -c '%i %u:%g %a %F' {arena.state}/vm.sock")
    assert "this is no socket" in arena.start()
    assert arena.toolkit.sh(f"stat -c '%i %u:%g %a %F' {arena.state}/vm.sock") == before


def test_a_socket_of_eves_in_the_place_of_roots(arena: Arena) -> None:
    """Another VM's hypervisor would like to be the virtiofsd of this one."""
    arena.make(shares=data(socket="vm.sock"))
    code = "import socket as s, time; l = s.socket(s.AF_UNIX); l.bind('vm.sock'); l.listen()"
    arena.eve(f'python3 -c "{code}"')
    assert not arena.start()
    assert arena.state in arena.toolkit.sh(f"ss -xlp | grep {arena.state}/vm.sock | grep systemd")


def test_racing_for_the_socket(arena: Arena) -> None:
    """Between the look at the place and the chown lies systemd's bind."""
    arena.make(shares=data(socket="vm.sock"))
    swap = f"ln -s {PROTECTED} vm.sock; rm -f vm.sock; ln {PROTECTED} vm.sock; rm -f vm.sock"
    with arena.keeps(swap):
        for _ in range(5):
            said = arena.start()
            assert not said or "vm.sock" in said or "socket" in said, said
            arena.unharmed()
            arena.toolkit.sh(f"systemctl stop microvm@{arena.vm}; systemctl reset-failed")


@pytest.mark.parametrize("target", [DIRECTORY, f"../../../..{DIRECTORY}"])
def test_a_link_in_the_place_of_a_sockets_directory(arena: Arena, target: str) -> None:
    arena.make(shares=data(socket="run/vm.sock"))
    arena.eve(f"ln -s {target} run")
    assert "not a directory of root's" in arena.start()
    arena.eve("rm run; mkdir run")
    assert "not a directory of root's" in arena.start()
    arena.eve("rmdir run")
    assert not arena.start()


def test_racing_for_a_sockets_directory(arena: Arena) -> None:
    """systemd makes missing directories, and follows links that are there."""
    arena.make(shares=data(socket="run/vm.sock"))
    with arena.keeps(f"ln -s {DIRECTORY} run; rm -f run; mkdir run; rmdir run"):
        for _ in range(5):
            said = arena.start()
            assert not said or "/run: " in said or "run/vm.sock" in said, said
            arena.unharmed()
            arena.toolkit.sh(f"systemctl stop microvm@{arena.vm}; systemctl reset-failed")


def several(*sockets: str) -> tuple[Share, ...]:
    """A share for each socket, in the order in which they are set up."""
    return tuple(
        Share(tag=f"t{number}", source="/srv/data", socket=socket)
        for number, socket in enumerate(sockets)
    )


def await_undone(arena: Arena) -> None:
    """Wait until no share is set up, which is a moment after the VM has stopped."""
    record = f"/run/microvm-host/{arena.vm}/virtiofsd"
    eventually(
        lambda: arena.toolkit.host.exists(record), lambda there: not there, 60, "shares are set up"
    )


@pytest.mark.parametrize("socket", ["run/vm.sock", "run/deep/vm.sock", "run/empty/vm.sock"])
def test_a_link_that_comes_while_shares_are_set_up(arena: Arena, socket: str) -> None:
    """Its record is written before its directory is refused, and is undone."""
    arena.make(shares=several("first.sock", socket))
    # Readable by all, and written when the first of them is set up: all were looked at by then.
    wait = f"until [ -e /run/microvm-host/{arena.vm}/virtiofsd ]; do :; done"
    deadline = time.monotonic() + 120
    while True:
        await_undone(arena)
        line = f"cd {arena.state} && echo go && {wait} && ln -s {DIRECTORY} run"
        process = arena.toolkit.host.spawn(["bash", "-c", line], user=EVE)
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        said = arena.start()
        process.communicate(timeout=60)
        arena.unharmed()
        arena.toolkit.sh(f"systemctl stop microvm@{arena.vm}; systemctl reset-failed")
        arena.unharmed()
        if "a socket is to lie in here" in said:
            break
        assert time.monotonic() < deadline, f"never in time; said last: {said}"
        arena.eve("rm -f run")


# What a helper that was killed leaves, taken back as the next stop would, so often that somebody
# who takes the directory's name gets it in the midst of that.
_TAKE_BACK = """
import os, subprocess, sys
vm, rounds, *sockets = sys.argv[1:]
os.chdir(f"/var/lib/microvms/{vm}")
for _ in range(int(rounds)):
    while True:
        try:
            os.mkdir("run")
            break
        except FileExistsError:
            os.unlink("run")
    os.makedirs(f"/run/microvm-host/{vm}", exist_ok=True)
    with open(f"/run/microvm-host/{vm}/virtiofsd", "x") as record:
        record.writelines(f"socket\\t{os.getcwd()}/run/{socket}\\n" for socket in sockets)
    subprocess.run(["/usr/local/libexec/microvm-host/helper", "virtiofsd-down", vm], check=True)
"""


def test_a_link_that_comes_while_shares_are_taken_back(arena: Arena) -> None:
    """systemd has removed all sockets then, so that their directory goes, and its name is free.

    What is looked for by a path after that is looked for behind the link.
    """
    arena.make(shares=several(*(f"run/{socket}" for socket in SOCKETS)))
    assert not arena.start()
    code = (
        "import os\nprint('go', flush=True)\nwhile True:\n"
        f" try: os.symlink('{DIRECTORY}', 'run')\n except OSError: pass\n"
    )
    line = f'cd {arena.state} && exec python3 -c "{code}"'
    process = arena.toolkit.host.spawn(["bash", "-c", line], user=EVE)
    try:
        assert process.stdout is not None and process.stdout.readline() == "go\n"
        arena.stop()
        await_undone(arena)
        arena.unharmed()
        argv = ["python3", "-c", _TAKE_BACK, arena.vm, "25", *SOCKETS]
        arena.toolkit.host.run(argv, timeout=300)
        assert process.poll() is None, "the attacker gave up"
        arena.eve(f'until [ "$(readlink run)" = {DIRECTORY} ]; do sleep 0.1; done')
    finally:
        process.kill()
        process.communicate()
    arena.unharmed()


# ---- what root exports


def virtiofsd_of(arena: Arena, wanted: str) -> str:
    """Connect to the share as the hypervisor would, until a text is seen.

    Tells what was ever seen of each virtiofsd that this started, and in its journal.
    """
    code = (
        "import socket, time; s = socket.socket(socket.AF_UNIX); s.connect('vm.sock'); "
        "time.sleep(600)"
    )
    look = (
        "for p in $(pgrep virtiofsd); do echo runs as $(stat -c %U /proc/$p) and sees "
        "$(ls -A /proc/$p/root); done; journalctl --sync; "
        f"journalctl --no-pager -o json -u microvm-virtiofsd-{arena.vm}-data.service | "
        'grep -o \'"_UID":"[0-9]*"\\|is not a directory\\|does not exist\' | sort | uniq -c'
    )
    seen: list[str] = []

    def all_seen() -> str:
        seen.append(arena.toolkit.sh(look, check=False))
        return "".join(seen)

    client = arena.toolkit.host.spawn(["env", "-C", arena.state, "python3", "-c", code], user=EVE)
    try:
        return eventually(all_seen, lambda text: wanted in text, 60, "virtiofsd was not seen")
    finally:
        client.kill()
        client.communicate()


@pytest.mark.parametrize("source", ["shared", "{state}/shared"])
def test_exchanging_a_source_before_virtiofsd_starts(arena: Arena, source: str) -> None:
    """It was checked when the VM was set up, and is opened when the hypervisor connects."""
    arena.make(shares=data(source=source.format(state=arena.state), socket="vm.sock"))
    arena.toolkit.sh("mkdir -p /root/secret && echo x >/root/secret/key && chmod 755 /root/secret")
    arena.eve("mkdir shared")
    assert not arena.start()
    arena.eve("mv shared old; ln -s /root/secret shared")
    found = virtiofsd_of(arena, "does not exist")
    assert "runs as root" not in found and "key" not in found, found
    # It ran, as the VM's user, and did not get there.
    uid = arena.toolkit.sh(f"id -u {EVE}").strip()
    assert f'"_UID":"{uid}"' in found, found


def test_a_source_of_roots_is_served_as_root(arena: Arena) -> None:
    """The counterpart: without it, the test above could not fail."""
    arena.toolkit.sh("echo x >/srv/data/hello")
    arena.make(shares=data(socket="vm.sock"))
    assert not arena.start()
    found = virtiofsd_of(arena, "hello")
    assert "runs as root" in found, found


GRANTS = {
    "the unit's further groups": "chgrp lent /srv/lent; chmod 775 /srv/lent",
    "a list that names the user": "grant 2 $(id -u microvm)",
    "a list that names a group": "grant 8 $(getent group lent | cut -d: -f3)",
    "a group in a sticky directory": "chgrp lent /srv/lent; chmod 1775 /srv/lent; "
    "chown microvm /srv/lent/data",
}
# setfacl is not everywhere; linux/posix_acl_xattr.h.
_GRANT = """\
grant() { python3 -c '
import os, struct, sys
named = (int(sys.argv[1]), 7, int(sys.argv[2]))
entries = sorted([(1, 7, -1), (4, 5, -1), (16, 7, -1), (32, 5, -1), named])
value = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
os.setxattr("/srv/lent", "system.posix_acl_access", value)' "$@"; }
"""


@pytest.mark.parametrize("grant", GRANTS)
def test_a_source_in_a_directory_that_was_lent(arena: Arena, grant: str) -> None:
    """The right to write there is the VM's by its unit, or by an access control list."""
    toolkit, vm = arena.toolkit, arena.vm
    toolkit.sh(
        f"{_GRANT} groupadd -f lent; rm -rf /srv/lent; mkdir -p /srv/lent/data; {GRANTS[grant]}"
    )
    toolkit.host.write(
        f"/etc/systemd/system/microvm@{vm}.service.d/lent.conf",
        "[Service]\nSupplementaryGroups=lent\n",
    )
    toolkit.systemctl("daemon-reload")
    arena.make(shares=data(source="/srv/lent/data", socket="vm.sock"))
    assert not arena.start()
    # It is true: what runs in the unit can do it.
    line = ["setpriv", f"--reuid={EVE}", f"--regid={EVE}", "--groups", "lent", "sh", "-c"]
    toolkit.host.run([*line, "mv /srv/lent/data /srv/lent/old && ln -s /root /srv/lent/data"])
    assert toolkit.property(f"microvm-virtiofsd-{vm}-data.service", "User") == uid(arena)
    arena.stop()
    toolkit.sh("rm /srv/lent/data && mv /srv/lent/old /srv/lent/data")
    shares = data(source="/srv/lent/data", socket="vm.sock")
    toolkit.put(Stub(name=vm, shares=shares, share_options=False, virtiofsd_run=True))
    assert "would export as root" in arena.start()
    toolkit.sh("rm -r /srv/lent; groupdel lent")


def test_a_link_on_the_way_from_current(arena: Arena) -> None:
    """Another package of root's than the one that root chose: of another VM, or from a store."""
    toolkit = arena.toolkit
    mine = toolkit.put(Stub(name=arena.vm))
    other = toolkit.put(Stub(name=arena.vm, shares=data(socket="vm.sock")), "/opt/others")
    toolkit.sh(f"rm -rf /srv/hers; mkdir /srv/hers; ln -s {mine} /srv/hers/result")
    toolkit.link(arena.vm, "/srv/hers/result")
    assert not arena.start()
    arena.stop()
    toolkit.sh(f"chown {EVE} /srv/hers")
    arena.eve(f"ln -sfn {other} /srv/hers/result")
    said = arena.start()
    assert f"/srv/hers/result: user '{EVE}', which runs this VM, can replace this" in said
    for argv in (["create", f"{arena.vm}c"], ["create", f"{arena.vm}c", "--user", EVE]):
        line = ["microvm", *argv, "--runner", "/srv/hers/result"]
        assert "can replace this" in toolkit.host.run(line, check=False).stderr
        assert not toolkit.host.exists(f"/var/lib/microvms/{arena.vm}c")
    toolkit.sh("rm -r /srv/hers")


@pytest.mark.parametrize("key", ["kernel", "initrd"])
def test_a_kernel_that_leads_to_what_root_alone_reads(arena: Arena, key: str) -> None:
    """Root copies both into the package, where the VM's group may read them."""
    toolkit, vm = arena.toolkit, arena.vm
    toolkit.sh(
        f"rm -rf /srv/hers; mkdir /srv/hers; chown {EVE} /srv/hers; "
        f"cp {IMAGE}/vmlinuz /root/kernel; echo 'the secret of root' >/root/initrd; "
        "chmod 600 /root/kernel /root/initrd"
    )
    arena.toolkit.host.run(["ln", "-s", f"/root/{key}", f"/srv/hers/{key}"], user=EVE)
    files = {"kernel": f"{IMAGE}/vmlinuz", key: f"/srv/hers/{key}"}
    lines = "".join(f'{name} = "{path}"\n' for name, path in files.items())
    toolkit.host.write(f"/etc/microvms/{vm}.toml", f"autostart = false\nmem = 256\n{lines}")
    said = toolkit.host.run(["microvm", "apply"], check=False).stderr
    assert f"/srv/hers/{key}: user '{EVE}', which runs this VM, can replace this" in said
    packages = "/var/lib/microvm-host/packages"
    assert toolkit.sh(f"ls -d {packages}/*-{vm} 2>/dev/null", check=False) == ""
    toolkit.sh("rm -r /srv/hers /root/kernel /root/initrd")


def EVE_ID(arena: Arena) -> str:
    return arena.toolkit.sh(f"id -u {EVE}").strip()


def own_script(arena: Arena, **fields: object) -> None:
    share = Share(**{"tag": "data", "source": "/srv/data", "socket": "vm.sock", **fields})  # type: ignore[arg-type]
    arena.make(shares=(share,), share_options=False, virtiofsd_run=True)


def test_links_where_the_packages_own_virtiofsd_writes(arena: Arena) -> None:
    own_script(arena)
    for name in ("supervisord.log", "supervisord.pid", "vm.sock.pid", "vm.sock"):
        arena.eve(f"ln -s {PROTECTED} {name}")
    said = arena.start()
    assert "this is no socket" in said
    arena.eve("rm vm.sock")
    assert not arena.start()
    assert arena.toolkit.sh(f"stat -c '%U %a' {arena.state}/vm.sock") == f"{EVE} 600\n"


def test_racing_the_packages_own_virtiofsd(arena: Arena) -> None:
    """It runs as root in a directory where others make links: outside it can write nothing."""
    own_script(arena)
    names = ("supervisord.log", "supervisord.pid", "vm.sock.pid")
    with arena.keeps("; ".join(f"ln -s {PROTECTED} {name}" for name in names)):
        arena.start()
        arena.unharmed()
    arena.toolkit.sh(f"systemctl stop microvm@{arena.vm}; systemctl reset-failed")


def test_a_source_of_eves_for_the_packages_own_virtiofsd(arena: Arena) -> None:
    own_script(arena, source="shared")
    arena.eve("mkdir shared")
    assert "which the package's bin/virtiofsd-run would export as root" in arena.start()


# ---- images that are made for the VM's user

IMAGES = """autostart = false
kernel = "{image}/vmlinuz"
mem = 256

[[volumes]]
image = "root.qcow2"
imageType = "qcow2"
size = 16
source = "/srv/images/root"
"""
MKFS = "/usr/local/sbin/mkfs.ext4"


@pytest.fixture
def images(arena: Arena) -> Iterator[Callable[[str], str]]:
    """A declared VM whose disk is made of what root alone reads; gives what makes it.

    A line of shell runs between mkfs and the next program: the best moment that somebody who
    looks for it can have. It finds the image's name in `$image`.
    """
    toolkit = arena.toolkit
    toolkit.sh(
        "rm -rf /srv/images; mkdir -p /srv/images/root && chmod 700 /srv/images && "
        "echo content >/srv/images/root/file && chmod 600 /srv/images/root/file && "
        "echo 'the secret of root' >/root/key && chmod 600 /root/key"
    )
    toolkit.host.write(f"/etc/microvms/{arena.vm}.toml", IMAGES.format(image=IMAGE))

    def make(line: str) -> str:
        toolkit.host.write(
            MKFS,
            '#!/bin/sh\n[ "$1" != -V ] || exec /usr/sbin/mkfs.ext4 "$@"\n'
            f'/usr/sbin/mkfs.ext4 "$@" && for image; do :; done && {line}\n',
        )
        toolkit.sh(f"chmod 755 {MKFS}")
        # On a terminal, as an administrator would.
        argv = ["script", "-qec", "microvm apply", "/dev/null"]
        return toolkit.host.run(argv, check=False).stdout

    yield make
    toolkit.sh(f"rm -rf {MKFS} /srv/images /root/key")


def test_a_link_in_the_place_of_an_image_that_is_made(
    arena: Arena, images: Callable[[str], str]
) -> None:
    said = images('rm "$image" && ln -s /root/key "$image"')
    assert "Permission denied" in said, said
    assert arena.toolkit.sh(f"grep -rl 'the secret of root' {arena.state}", check=False) == ""


def test_the_terminal_of_who_has_an_image_made(arena: Arena, images: Callable[[str], str]) -> None:
    """Whoever has it can type in the name of root (TIOCSTI), and read what root types."""
    said = images(
        "for number in 0 1 2; do [ ! -t $number ] || echo descriptor $number; done; "
        "if (: <>/dev/tty) 2>/dev/null; then echo terminal; fi; printf 'said \\033[31mred\\n'"
    )
    assert "said [31mred" in said and "\033[31m" not in said, said
    assert "descriptor" not in said and "terminal" not in said, said
    assert arena.toolkit.host.exists(f"{arena.state}/root.qcow2")


# ---- records, messages, signals


def test_planting_records(arena: Arena) -> None:
    arena.make(taps=(Tap(name=f"{arena.vm}a", mac="02:00:00:00:00:01"),))
    assert not arena.start()
    for line in (
        "mkdir /run/microvm-host/other",
        f"echo 'tap\teth0' >>/run/microvm-host/{arena.vm}/tap-interfaces",
        f"rm -f /run/microvm-host/{arena.vm}/tap-interfaces",
        f"mv /run/microvm-host/{arena.vm} /run/microvm-host/x",
        "mkdir /var/lib/microvms/other",
        "ln -s /srv /etc/microvms/other.toml",
    ):
        said = arena.eve(line, check=False)
        assert "ermission denied" in said, (line, said)
    arena.stop()
    assert not arena.toolkit.host.exists(f"/sys/class/net/{arena.vm}a")


NOTIFY = """
import os, socket, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("hears nothing", flush=True)
# The environment does not tell, but everybody knows.
address = "/run/systemd/notify"
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
while True:
    for message in MESSAGES:
        try:
            s.sendto(message.encode(), address)
            null = open("/dev/null").fileno().to_bytes(4, "little")
            s.sendmsg([b"FDSTORE=1"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null)], 0, address)
        except OSError:
            pass
    time.sleep(0.05)
"""


def talker(*messages: str) -> str:
    """Shell that becomes a hypervisor which tells systemd things, and ignores SIGTERM."""
    code = NOTIFY.replace("MESSAGES", repr(messages))
    return f"exec python3 -c '{code.replace(chr(39), chr(34))}'"


def test_telling_systemd_of_another_main_process(arena: Arena) -> None:
    """Whoever is the main process is killed at a stop: systemd itself, or another VM."""
    victim = f"{arena.vm}v"
    arena.toolkit.create(Stub(name=victim))
    try:
        arena.toolkit.systemctl("start", f"microvm@{victim}")
        pid = arena.toolkit.property(f"microvm@{victim}", "MainPID")
        arena.make(run=talker("MAINPID=1", f"MAINPID={pid}", "MAINPID=0"))
        assert not arena.start()
        main = arena.toolkit.property(f"microvm@{arena.vm}", "MainPID")
        arena.toolkit.await_line(arena.vm, "hears nothing")
        arena.toolkit.sh("sleep 0.5")
        assert arena.toolkit.property(f"microvm@{arena.vm}", "MainPID") == main
        assert arena.toolkit.property(f"microvm@{arena.vm}", "NFileDescriptorStore") == "0"
        arena.toolkit.sh(f"systemctl kill -s KILL microvm@{arena.vm}")
        arena.toolkit.sh(f"systemctl stop microvm@{arena.vm}")
        assert arena.toolkit.property(f"microvm@{victim}", "MainPID") == pid
        assert arena.toolkit.host.exists(f"/proc/{pid}")
    finally:
        arena.toolkit.remove(victim)


@pytest.fixture
def impatient(arena: Arena) -> Iterator[None]:
    """All patience of a stop in seconds, not minutes."""
    with hasty_guard(arena.toolkit, 3):
        arena.toolkit.host.write(
            f"/etc/systemd/system/microvm@{arena.vm}.service.d/quick.conf",
            "[Service]\nEnvironment=MICROVM_SHUTDOWN_SECONDS=1 MICROVM_TERMINATE_SECONDS=1\n"
            "TimeoutStopSec=2\nRestart=no\n",
        )
        arena.toolkit.systemctl("daemon-reload")
        yield


def holds_up(vm: str) -> str:
    """Shell that halts who asks the guest, and has systemd wait for that for ever."""
    return (
        f"while :; do for p in $(pgrep -u $(id -u) -f 'helper stop {vm}$'); do kill -STOP $p; "
        f"done; sleep 0.05; done & {talker('EXTEND_TIMEOUT_USEC=600000000')}"
    )


@pytest.mark.usefixtures("impatient")
def test_talking_systemd_out_of_a_stop(arena: Arena) -> None:
    arena.make(run=talker("EXTEND_TIMEOUT_USEC=600000000", "RELOADING=1", "WATCHDOG=1"))
    assert not arena.start()
    arena.toolkit.await_line(arena.vm, "hears nothing")
    arena.toolkit.systemctl("stop", f"microvm@{arena.vm}", check=False)
    assert arena.toolkit.property(f"microvm@{arena.vm}", "ActiveState") == "failed"


def guard_said(arena: Arena, unit: str) -> bool:
    lines = arena.toolkit.journal(arena.vm)
    return any(line.startswith(f"{unit}.service is there ") for line in lines)


@pytest.mark.usefixtures("impatient")
def test_holding_up_a_stop_that_others_come_before(arena: Arena) -> None:
    """Its guard is there, however long the others take."""
    first = f"{arena.vm}f"
    units = (f"microvm@{first}", f"microvm@{arena.vm}")
    try:
        declare(arena.toolkit, Stub(name=first, shutdown_delay=3), order=2)
        declare(
            arena.toolkit, Stub(name=arena.vm, run=holds_up(arena.vm), shutdown="hang"), order=1
        )
        arena.toolkit.systemctl("start", *units)
        arena.toolkit.await_line(arena.vm, "hears nothing")
        arena.toolkit.systemctl("stop", *units, check=False)
        assert arena.toolkit.property(units[0], "Result") == "success"
        assert arena.toolkit.property(units[1], "ActiveState") == "failed"
        assert guard_said(arena, units[1])
        # The one was down before the other began to go.
        down, up = (
            int(arena.toolkit.property(unit, f"{moment}TimestampMonotonic"))
            for unit, moment in zip(units, ("InactiveEnter", "ActiveExit"), strict=True)
        )
        assert 0 < down <= up
    finally:
        arena.toolkit.remove(first)


@pytest.mark.usefixtures("impatient")
def test_holding_up_a_stop_in_the_foreground(arena: Arena) -> None:
    arena.make(run=holds_up(arena.vm), shutdown="hang")
    running = arena.toolkit.host.spawn(["microvm", "run", arena.vm])
    try:
        assert running.stdout is not None
        while (line := running.stdout.readline()) != "hears nothing\n":
            assert line, "it does not come up"
        arena.toolkit.host.run(["microvm", "stop", arena.vm])
        assert guard_said(arena, f"microvm-foreground-{arena.vm}")
        assert running.wait(60)
    finally:
        running.kill()
        running.communicate()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["KILL", "STOP"])
def test_signals_to_the_helper_that_asks(arena: Arena, name: str) -> None:
    """It runs as the VM's user, who may send it any; what stands behind it is root's."""
    arena.make(
        run="trap '' TERM; echo up; while :; do for p in $(pgrep -u $(id -u) -f 'helper stop'); do "
        f"kill -{name} $p; done; sleep 0.05; done",
        shutdown="hang",
    )
    assert not arena.start()
    arena.toolkit.systemctl("stop", f"microvm@{arena.vm}", check=False, timeout=90)
    assert arena.toolkit.property(f"microvm@{arena.vm}", "ActiveState") == "failed"
    assert arena.toolkit.host.run(["pgrep", "-f", "helper stop"], check=False).stdout == ""


def test_signals_to_everything(arena: Arena) -> None:
    """What the VM's user may kill is the hypervisor; the set-up is root's, and is undone."""
    before = arena.toolkit.footprint()
    arena.make(
        taps=(Tap(name=f"{arena.vm}a", mac="02:00:00:00:00:01"),), shares=data(socket="vm.sock")
    )
    shooter = arena.toolkit.host.spawn(["python3", "-c", _SHOOT], user=EVE)
    try:
        assert shooter.stdout is not None and shooter.stdout.readline() == "go\n"
        for _ in range(4):
            arena.toolkit.sh(f"systemctl start microvm@{arena.vm}", check=False)
            units = f"microvm-set-booted@{arena.vm} microvm-tap-interfaces@{arena.vm}"
            failed = arena.toolkit.sh(f"systemctl is-failed {units}", check=False).split()
            assert "failed" not in failed
            arena.toolkit.sh(f"systemctl stop microvm@{arena.vm}; systemctl reset-failed")
    finally:
        shooter.kill()
        shooter.communicate()
    arena.toolkit.await_footprint(before)


_SHOOT = """
import os, signal
print("go", flush=True)
me = os.getpid()
while True:
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) not in (me, os.getppid(), 1):
            try:
                os.kill(int(entry), signal.SIGKILL)
            except OSError:
                pass
"""


LOCK = """
import fcntl, os, signal, time
held = []
for directory, _, files in os.walk("/run"):
    if "microvm-host" in directory or directory == "/run":
        for name in [".", *files]:
            if directory != "/run" or "microvm" in name:
                try:
                    file = os.open(f"{directory}/{name}", os.O_RDONLY | os.O_NONBLOCK)
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    held.append(file)
                except OSError:
                    pass
# Whoever opens one of these waits 45 s for us to let go of it (fcntl(2), F_SETLEASE).
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGIO})
for name in ("disk.img", "events", "flake", "declared"):
    file = os.open(name, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644)
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_RDLCK if name == "disk.img" else fcntl.F_WRLCK)
    held.append(file)
print("go", len(held), flush=True)
while True:
    time.sleep(1)
"""


def test_locks_and_leases_on_what_root_opens(arena: Arena) -> None:
    """Root waits for nobody who holds a file of theirs, or one of root's that all may read."""
    toolkit = arena.toolkit
    arena.make(event_log="events", shares=data(socket="vm.sock"))
    assert not arena.start()
    toolkit.host.write("/opt/packages/lock.py", LOCK)
    line = f"cd {arena.state} && exec python3 /opt/packages/lock.py"
    holder = toolkit.host.spawn(["bash", "-c", line], user=EVE)
    try:
        assert holder.stdout is not None and holder.stdout.readline().startswith("go ")
        began = time.monotonic()
        for argv in (
            ["microvm", "-l"],
            ["microvm", "status", arena.vm],
            ["microvm", "stop", arena.vm],
            ["microvm", "update", arena.vm],
            ["microvm", "start", arena.vm],
            ["microvm", "stop", arena.vm],
            ["microvm", "adopt", arena.vm],
            ["microvm", "remove", "--yes", arena.vm],
        ):
            toolkit.host.run(argv, check=False, timeout=60)
        assert time.monotonic() - began < 30
        assert not toolkit.host.exists(arena.state)
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.communicate()


def test_names_that_command_a_terminal(arena: Arena) -> None:
    """What eve calls her files is printed by root in what becomes of them."""
    arena.make()
    assert not arena.start()
    code = (
        "import os, socket; e = chr(27) + '[2J' + chr(10) + 'microvm: all is well'; "
        "os.mkdir(e + 'd'); open(e + 'd/' + e, 'w'); os.symlink(e, e + 'l'); os.mkfifo(e + 'f'); "
        "socket.socket(socket.AF_UNIX).bind(e + 's'); os.mkdir('declared' + e)"
    )
    arena.eve(f'python3 -c "{code}"')
    vm = arena.vm
    said = ""
    for argv in (
        ["-l"],
        ["list", "--json"],
        ["status", vm],
        ["stop", vm],
        ["adopt", vm, "--user", "auto", "--from", EVE],
        ["reconcile"],
        ["start", vm],
        ["stop", vm],
        ["remove", "--yes", vm],
    ):
        done = arena.toolkit.host.run(["microvm", *argv], check=False)
        said += done.stdout + done.stderr
    # systemctl and journalctl colour nothing that is no terminal.
    assert "\033" not in said, said
    assert not any(line.startswith("microvm: all is well") for line in said.splitlines())
    assert not arena.toolkit.host.exists(arena.state)


def test_the_terminal_of_who_resizes_a_balloon(arena: Arena) -> None:
    """The package's script runs as the VM's user, who can trace it and type in its terminal."""
    toolkit = arena.toolkit
    path = toolkit.put(Stub(name=arena.vm))
    toolkit.host.write(
        f"{path}/bin/microvm-balloon",
        "#!/bin/sh\nif (: <>/dev/tty) 2>/dev/null; then touch has-a-terminal; fi\ntouch has-run\n",
    )
    toolkit.sh(f"chmod 755 {path}/bin/microvm-balloon")
    toolkit.host.run(["microvm", "create", arena.vm, "--runner", path])
    assert not arena.start()
    argv = ["script", "-qec", f"microvm balloon {arena.vm} 64", "/dev/null"]
    said = toolkit.host.run(argv, check=False).stdout
    assert toolkit.host.exists(f"{arena.state}/has-run"), said
    assert not toolkit.host.exists(f"{arena.state}/has-a-terminal")


def test_speaking_in_the_name_of_another_vm(arena: Arena) -> None:
    arena.make()
    assert not arena.start()
    code = (
        "import socket; s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM); "
        "s.sendto(b'MESSAGE=I am root\\nPRIORITY=3\\nSYSLOG_IDENTIFIER=microvm-host\\n"
        f"OBJECT_SYSTEMD_UNIT=microvm@{arena.vm}.service\\nUNIT=microvm@{arena.vm}.service\\n"
        f"_SYSTEMD_UNIT=microvm@{arena.vm}.service\\nMICROVM_NAME={arena.vm}\\n', "
        "'/run/systemd/journal/socket')"
    )
    arena.eve(f'python3 -c "{code}"')
    arena.toolkit.sh("journalctl --sync")
    assert "I am root" in arena.toolkit.sh("journalctl --no-pager -o cat -n 200")
    for argv in (["microvm", "logs", arena.vm], ["journalctl", "-u", f"microvm@{arena.vm}"]):
        assert "I am root" not in arena.toolkit.host.run([*argv, "--no-pager"]).stdout


# ---- what is open, and is the user's to change

_TAKE_OVER = """
import fcntl, os, struct, sys
tun = os.open("/dev/net/tun", os.O_RDWR)
# Of the flags, vnet_hdr is missing.
fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", sys.argv[1].encode(), 0x1002))
for request, value in ((0x400454CC, 4321), (0x400454CE, 4321), (0x400454CB, int(sys.argv[2]))):
    fcntl.ioctl(tun, request, value)
print("taken over", flush=True)
os.execvp("sleep", ["sleep", "infinity"])
"""


def without_teardown(arena: Arena) -> contextlib.ExitStack:
    """Have the taps stay at a stop, as if the helper had been killed, until this is closed."""
    drop_in = f"/run/systemd/system/microvm-tap-interfaces@{arena.vm}.service.d"
    arena.toolkit.host.write(f"{drop_in}/killed.conf", "[Service]\nExecStopPost=\n")
    arena.toolkit.systemctl("daemon-reload")
    undone = contextlib.ExitStack()
    undone.callback(lambda: arena.toolkit.sh(f"rm -r {drop_in}; systemctl daemon-reload"))
    return undone


def make_taker(arena: Arena, *, persists: bool) -> None:
    """Make a VM that gives its tap away."""
    arena.toolkit.host.write("/opt/take-over.py", _TAKE_OVER)
    arena.make(
        taps=(Tap(name=f"{arena.vm}a", mac="02:00:00:00:00:66"),),
        run=f"exec python3 /opt/take-over.py {arena.vm}a {int(persists)}",
    )


def start_and_stop(arena: Arena) -> None:
    assert not arena.start()
    arena.toolkit.await_line(arena.vm, "taken over")
    arena.stop()


def test_giving_a_tap_away_that_a_killed_helper_leaves(arena: Arena) -> None:
    make_taker(arena, persists=True)
    with without_teardown(arena):
        start_and_stop(arena)
    assert arena.toolkit.sh(f"cat /sys/class/net/{arena.vm}a/owner") == "4321\n"
    # It is made again for the VM.
    start_and_stop(arena)
    eventually(
        lambda: arena.toolkit.host.exists(f"/sys/class/net/{arena.vm}a"),
        lambda exists: not exists,
        30,
        "the tap stays",
    )


def test_a_tap_that_goes_away_and_what_comes_by_its_name(arena: Arena) -> None:
    """A tap of somebody else, which was set up for the VM, ends with it: that is no tap to undo."""
    tap = f"{arena.vm}a"
    arena.toolkit.sh(f"ip tuntap add {tap} mode tap user {EVE} vnet_hdr")
    make_taker(arena, persists=False)
    with without_teardown(arena):
        start_and_stop(arena)
    assert not arena.toolkit.host.exists(f"/sys/class/net/{tap}")
    arena.toolkit.sh(f"ip link add {tap} up type bridge")
    try:
        assert "is no tap" in arena.start()
        assert ",UP" in arena.toolkit.sh(f"ip link show {tap}")
    finally:
        arena.toolkit.sh(f"ip link del {tap}")


# ---- what takes state directories over, or away


def test_handing_over_what_is_somebody_elses(arena: Arena) -> None:
    """Links to what root and other VMs have, laid out for `microvm adopt`, and moved under it."""
    victim = "/var/lib/microvms/victims.img"
    arena.toolkit.sh(f"echo disk >{victim}; chown {EVE}:{EVE} {victim}; chmod 600 {victim}")
    arena.make()
    arena.eve(
        f"ln -s {PROTECTED} a; ln {PROTECTED} b; ln {victim} c; ln -s {DIRECTORY} d; "
        "mkdir e; echo mine >disk.img; mkfifo f"
    )
    before = arena.toolkit.sh(f"stat -c '%u %a' {PROTECTED} {victim}")
    swap = (
        f"rm -rf x y; echo mine >x; ln -f {PROTECTED} x; rm -f x; ln -s {PROTECTED} x; "
        f"mkdir y; echo mine >y/z; mv y y2; ln -s /etc y; ln {victim} y2/v; rm -rf y y2"
    )
    with arena.keeps(swap):
        for user in ("auto", "microvm") * 2:
            done = arena.toolkit.host.run(
                ["microvm", "adopt", arena.vm, "--user", user, "--from", EVE], check=False
            )
            assert "Traceback" not in done.stderr
            assert arena.toolkit.sh(f"stat -c '%u %a' {PROTECTED} {victim}") == before
    own = arena.toolkit.sh(f"stat -c %U {arena.state}/disk.img").strip()
    assert own == f"microvm-{arena.vm}"
    arena.toolkit.sh(f"rm {victim}")


def test_removing_what_is_somebody_elses(arena: Arena) -> None:
    arena.toolkit.sh("mkdir -p /srv/precious && echo x >/srv/precious/file")
    arena.make()
    arena.eve("mkdir -p a/b; ln -s /srv/precious link; echo x >a/b/c")
    with arena.keeps("mv a/b a/d; ln -s /srv/precious a/b; rm -f a/b; mv a/d a/b; mkdir -p a/b"):
        arena.toolkit.host.run(["microvm", "remove", "--yes", arena.vm], check=False)
    assert arena.toolkit.host.read("/srv/precious/file") == "x\n"
    arena.toolkit.sh(f"rm -rf {arena.state} /srv/precious")


# ---- from inside of the unit

PROBE = r"""
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def said(what, call):
    try:
        call()
        print("PROBE", what, "done")
    except OSError as error:
        print("PROBE", what, error.errno)
def libc_call(*arguments):
    ctypes.set_errno(0)
    if libc.syscall(*arguments) < 0:
        raise OSError(ctypes.get_errno(), "")
open("file", "w").close()
print("PROBE umask", oct(os.stat("file").st_mode & 0o777))
said("packet", lambda: socket.socket(17, socket.SOCK_RAW))
said("alg", lambda: socket.socket(38, socket.SOCK_SEQPACKET))
said("setuid-bit", lambda: os.chmod("file", 0o4755))
said("personality", lambda: libc_call(135, 0x0400000))
said("init_module", lambda: libc_call(175, 0, 0, 0))
said("reboot", lambda: libc_call(169, 0, 0, 0, 0))
said("sethostname", lambda: socket.sethostname("evil"))
said("realtime", lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)))
status = dict(line.split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
print("PROBE rights", status["CapBnd"].strip(), status["NoNewPrivs"].strip(), flush=True)
os.execvp("sleep", ["sleep", "infinity"])
"""


@pytest.mark.parametrize("how", ["service", "foreground"])
def test_what_a_hypervisor_cannot_even_ask_for(arena: Arena, how: str) -> None:
    package = Stub(name=arena.vm, run="exec python3 /opt/packages/probe.py", shutdown="terminate")
    arena.toolkit.create(package)
    arena.toolkit.host.write("/opt/packages/probe.py", PROBE)
    process: subprocess.Popen[str] | None = None
    if how == "service":
        assert not arena.start()
        lines = arena.toolkit.await_line(arena.vm, "PROBE rights")
    else:
        process = arena.toolkit.host.spawn(["microvm", "run", arena.vm])
        assert process.stdout is not None
        lines = []
        while not lines or "PROBE rights" not in lines[-1]:
            line = process.stdout.readline()
            assert line, "\n".join(lines)
            lines.append(line.rstrip())
    probed = dict(line.split(" ", 2)[1:] for line in lines if line.startswith("PROBE "))
    EPERM, EAFNOSUPPORT = "1", "97"
    assert probed == {
        "umask": "0o600",
        "packet": EAFNOSUPPORT,
        "alg": EAFNOSUPPORT,
        "setuid-bit": EPERM,
        "personality": EPERM,
        "init_module": EPERM,
        "reboot": EPERM,
        "sethostname": EPERM,
        "realtime": EPERM,
        # CAP_SETGID and CAP_SETUID, for ExecStop= alone: with no new privileges nobody gains them.
        "rights": "00000000000000c0 1",
    }
    arena.toolkit.host.run(["microvm", "stop", arena.vm])
    if process is not None:
        process.communicate(timeout=10)


def exposure(toolkit: Toolkit, unit: str) -> float:
    """What `systemd-analyze security` makes of a unit that is loaded, from 0.0 to 10.0."""
    shown = toolkit.host.run(["systemd-analyze", "security", "--no-pager", unit]).stdout
    return float(shown.split("Overall exposure level for", 1)[1].split(":", 1)[1].split()[0])


# The transient units, whose bounds tests/static/test_security.py cannot hold. Measured on 252, 257
# and 262 together; what is left has its reason beside `shares.RIGHTS` and in `shares._confined`.
BOUNDS = {
    # Acts as whichever user of the guest asks, and makes its own sandbox: nine capabilities for the
    # one and four for the other, namespaces, mounts, and any file system to find the source in.
    "root": 5.8,
    # The same without being root, and without capabilities.
    "user": 4.5,
    # Root's again, and its supervisor's; but for the sources it sees what is read-only.
    "script": 5.6,
    # As microvm@.service.
    "foreground": 4.9,
}


@pytest.mark.core
@pytest.mark.parametrize("how", BOUNDS)
def test_transient_units_are_bounded(arena: Arena, how: str) -> None:
    """The guest's requests end in virtiofsd, and it in its unit."""
    toolkit, unit = arena.toolkit, f"microvm-virtiofsd-{arena.vm}-data.service"
    if how == "user" and toolkit.host.suite == "bookworm":
        pytest.skip("QEMU's former virtiofsd cannot run as the VM's user")
    toolkit.sh(f"mkdir -p /srv/hers/data && chown {EVE} /srv/hers")
    process: subprocess.Popen[str] | None = None
    if how == "foreground":
        arena.make()
        unit = f"microvm-foreground-{arena.vm}.service"
        process = toolkit.host.spawn(["microvm", "run", arena.vm])
        eventually(
            lambda: toolkit.property(unit, "ActiveState"), lambda at: at == "active", 60, "not up"
        )
    elif how == "script":
        arena.make(shares=data(), share_options=False, virtiofsd_run=True)
        unit = f"microvm-virtiofsd-{arena.vm}.service"
        assert not arena.start()
    else:
        arena.make(shares=data(source="/srv/hers/data" if how == "user" else "/srv/data"))
        assert not arena.start()
    assert exposure(toolkit, unit) <= BOUNDS[how]
    assert (toolkit.property(unit, "User") not in ("", "0")) == (how in ("user", "foreground"))
    assert toolkit.property(unit, "NoNewPrivileges") == "yes"
    if how != "foreground":
        assert toolkit.property(unit, "DevicePolicy") == "closed"
        assert toolkit.property(unit, "RestrictAddressFamilies") == "AF_UNIX"
    toolkit.host.run(["microvm", "stop", arena.vm])
    if process is not None:
        process.communicate(timeout=60)
    toolkit.sh("rm -r /srv/hers")
