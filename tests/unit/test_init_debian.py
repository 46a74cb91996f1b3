# SPDX-License-Identifier: MIT
"""`microvm init --guest debian`: where its root comes from, how it is made, and who may log in."""

from __future__ import annotations

import io
import os
import pwd
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from microvm_host import init, process
from microvm_host.declaration import guest as guests
from microvm_host.errors import MicrovmHostError, NameInvalid, UsageError
from microvm_host.guests import archives, bootstrap, debian, keys
from microvm_host.guests.archives import Origin
from microvm_host.init import Wish
from microvm_host.paths import HostPaths

from . import golden

KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIGb1dWfbLqjxHQfWJ0x3Cx3l0yE1mYwq6rW5b7s0Qd4T"
ORIGIN = Origin("trixie", "http://mirror/debian", ("deb http://mirror/debian trixie main",))
RECIPE = debian.Recipe(ORIGIN)


def nothing(text: str) -> None:
    del text


# ---- where packages come from


def is_distribution(host: HostPaths, text: str) -> None:
    path = Path(host.os_release_places()[0])
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)


@pytest.fixture
def on_debian(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> HostPaths:
    """A Debian whose apt has fetched lists."""
    is_distribution(host, 'ID=debian\nVERSION_CODENAME="trixie"\n')
    lists = (
        "Other\tOther\thttp://other/apt\n"
        "Debian\tDebian Backports\thttp://backports\n"
        "Debian\tDebian\thttp://near/debian/\n"
        "Debian\tDebian\thttp://far/debian/\n"
        "Debian\tDebian-Security\thttp://near/security/\n"
    )
    monkeypatch.setattr(process, "output", lambda argv: lists)
    return host


def test_packages_come_from_where_the_host_has_its_own(on_debian: HostPaths) -> None:
    assert archives.origin(on_debian) == Origin(
        "trixie",
        "http://near/debian",
        (
            "deb http://near/debian trixie main",
            "deb http://near/debian trixie-updates main",
            "deb http://near/security trixie-security main",
        ),
    )
    # It has nothing beside it.
    assert archives.origin(on_debian, "sid").sources == ("deb http://near/debian sid main",)


def test_a_mirror_that_was_given_is_the_only_one(on_debian: HostPaths) -> None:
    found = archives.origin(on_debian, "forky", "https://mine:8080/debian/")
    assert found.sources == ("deb https://mine:8080/debian forky main",)


@pytest.mark.parametrize("lists", ["", "\n", "Debian", "Debian\tDebian\tcdrom:[Debian]/\n"])
def test_a_host_whose_apt_has_no_mirror_takes_debians(
    lists: str, on_debian: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "output", lambda argv: lists)
    assert archives.origin(on_debian).sources == (
        "deb http://deb.debian.org/debian trixie main",
        "deb http://deb.debian.org/debian trixie-updates main",
        "deb http://deb.debian.org/debian-security trixie-security main",
    )

    def fails(argv: list[str]) -> str:
        raise MicrovmHostError("no apt")

    monkeypatch.setattr(process, "output", fails)
    assert archives.origin(on_debian).mirror == archives.MIRROR


def test_another_distribution_needs_debians_keys(host: HostPaths) -> None:
    is_distribution(host, "ID=fedora\nVERSION_CODENAME=x\n")
    with pytest.raises(MicrovmHostError, match=r"no keys of Debian.*debian-archive-keyring"):
        archives.origin(host)
    keyring = Path(host.debian_keyring)
    keyring.parent.mkdir(parents=True)
    keyring.touch()
    found = archives.origin(host)
    assert (found.suite, found.mirror, found.keyring) == ("stable", archives.MIRROR, str(keyring))
    argv = debian.mmdebstrap_argv(debian.Recipe(found), "/root.tar")
    assert f"--keyring={keyring}" in argv
    # The same packages make the same root, whoever knows their keys.
    assert debian.Recipe(found).name == debian.Recipe(archives.origin(host)).name


@pytest.mark.parametrize("suite", ["", "../x", "a b", "-x", "Trixie", "trixie\n", "a/b", "$(x)"])
def test_what_is_no_suite_is_refused(suite: str, on_debian: HostPaths) -> None:
    with pytest.raises(UsageError, match="cannot be a suite"):
        archives.origin(on_debian, suite)


@pytest.mark.parametrize(
    "mirror", ["", "near", "file:///srv", "http://a b", "http://a\n", "ftp://a"]
)
def test_what_is_no_mirror_is_refused(mirror: str, on_debian: HostPaths) -> None:
    with pytest.raises(UsageError, match="cannot be a mirror"):
        archives.origin(on_debian, "trixie", mirror)


# ---- the keys


@pytest.fixture
def homes(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> HostPaths:
    """Two administrators, one of whom called sudo."""
    users = {"alice": "/home/alice", "root": "/root"}

    def entry(user: str) -> pwd.struct_passwd:
        return pwd.struct_passwd((user, "x", 0, 0, "", users[user], "/bin/sh"))

    monkeypatch.setattr(pwd, "getpwnam", entry)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: entry("root"))
    for user, files in {
        "alice": {"id_ed25519.pub": f"{KEY} alice@home\n", "id_ed25519": "secret"},
        "root": {
            "a.pub": f"# mine\n\n{KEY} alice@home\n",
            "b.pub": f'from="10.0.0.0/8"  {KEY} root\n',
            "b-cert.pub": f"{KEY} root",
            "c.pub": "nonsense",
        },
    }.items():
        directory = Path(host.ssh_directory(users[user]))
        directory.mkdir(parents=True)
        for name, text in files.items():
            (directory / name).write_text(text)
    return host


def test_who_calls_it_has_their_keys_let_in(homes: HostPaths) -> None:
    of_alice = (f"{KEY} alice@home",)
    of_both = (*of_alice, f'from="10.0.0.0/8" {KEY} root')
    found, files = keys.own(homes, {"SUDO_USER": "alice"})
    assert found == of_both
    # The file with nonsense is none of them.
    assert [os.path.basename(file) for file in files] == ["id_ed25519.pub", "a.pub", "b.pub"]
    assert keys.own(homes, {})[0] == of_both
    # Who has gone since.
    assert keys.own(homes, {"SUDO_USER": "nobody-there"})[0] == of_both


def test_who_has_no_keys_has_none(host: HostPaths) -> None:
    assert keys.own(host, {}) == ((), ())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "holds no ssh public key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----\n", r"is a private key.*key\.pub"),
        (f"{KEY} one\nnonsense\n", r"key:2: 'nonsense' is not the line of an ssh public key"),
        (f"{KEY} one\x1b[0m\n", "is not one printable line"),
    ],
)
def test_a_file_without_keys_is_refused(text: str, complaint: str, root: Path) -> None:
    path = root / "key"
    path.write_text(text)
    with pytest.raises(MicrovmHostError, match=complaint):
        keys.named((str(path),))
    path.unlink()
    with pytest.raises(MicrovmHostError, match="cannot be read: No such file"):
        keys.named((str(path),))


# ---- the root


def test_what_makes_the_root() -> None:
    argv = debian.mmdebstrap_argv(RECIPE, "/a b/root.tar")
    assert argv[argv.index("mmdebstrap") - 1] == "--"
    # What the administrator gave comes where it can be no option.
    assert argv[-4:] == ["--", "trixie", "/a b/root.tar", ORIGIN.sources[0]]
    (included,) = (word for word in argv if word.startswith("--include="))
    assert {"cloud-init", "openssh-server", "qemu-guest-agent", "linux-image-amd64"} <= {
        *included.partition("=")[2].split(",")
    }
    hooks = [word for word in argv if "-hook=" in word]
    assert len(hooks) == 2
    for hook in hooks:
        subprocess.run(["sh", "-n", "-c", hook.partition("=")[2]], check=True)


def test_whatever_it_is_made_of_names_it() -> None:
    others = (
        debian.Recipe(Origin("trixie", ORIGIN.mirror, (*ORIGIN.sources, "deb x"))),
        debian.Recipe(ORIGIN, packages=("systemd",)),
        debian.Recipe(ORIGIN, before="true"),
        debian.Recipe(ORIGIN, after="true"),
    )
    assert len({RECIPE.name, *(each.name for each in others)}) == 5
    assert RECIPE.name.startswith("debian-trixie-")


def root_tar(path: Path, *, kernel: bool = True) -> None:
    """As much of a root as is taken out of it."""
    with tarfile.open(path, "w") as target:
        for link, content in (("vmlinuz", b"kernel"), ("initrd.img", b"initrd")):
            if kernel:
                entry = tarfile.TarInfo(f"./{link}")
                entry.type, entry.linkname = tarfile.SYMTYPE, f"boot/{link}-6.12"
                target.addfile(entry)
                entry = tarfile.TarInfo(f"./boot/{link}-6.12")
                entry.size = len(content)
                target.addfile(entry, io.BytesIO(content))


@pytest.fixture
def made(root: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for mmdebstrap, which copies a root, and keeps count; gives what it was told."""
    called: list[str] = []
    root_tar(root / "done.tar")
    (root / "mmdebstrap").write_text(
        "#!/bin/sh\n"
        "echo 'I: downloading packages with apt...' >&2\n"
        "echo 'I: chroot architecture amd64 is equal' >&2; echo 'I: removing tempdir x...' >&2\n"
        "echo 'W: dull' >&2\n"
        f"mkdir $TMPDIR/unpacked && cp {root}/done.tar $1\n"
    )
    (root / "mmdebstrap").chmod(0o755)
    monkeypatch.setattr(bootstrap, "_PATH", f"{root}:/usr/bin:/bin")

    def argv(recipe: debian.Recipe, target: str) -> list[str]:
        called.append(recipe.origin.suite)
        return [f"{root}/mmdebstrap", target]

    monkeypatch.setattr(debian, "mmdebstrap_argv", argv)
    return called


def test_an_archive_serves_until_it_is_old(
    host: HostPaths, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = time.time()
    said: list[str] = []
    former = os.umask(0o077)
    try:
        first = debian.make(RECIPE, host, said.append)
    finally:
        os.umask(former)
    assert Path(first.kernel).read_bytes() == b"kernel"
    assert Path(first.initrd).read_bytes() == b"initrd"
    assert tarfile.is_tarfile(first.root)
    directory = os.path.dirname(first.root)
    assert os.listdir(host.guests) == [os.path.basename(directory)]
    assert sorted(os.listdir(directory)) == ["initrd", "root.tar", "vmlinuz"]
    # Who builds packages of it need not be root.
    modes = {os.stat(f"{directory}/{name}").st_mode & 0o777 for name in os.listdir(directory)}
    assert modes == {0o644} and os.stat(directory).st_mode & 0o777 == 0o755
    assert said == [
        "making a Debian root of trixie from http://mirror/debian: some minutes",
        "  downloading packages with apt...",
    ]
    # The same again is what is there, also where none could be made.
    monkeypatch.setattr(bootstrap, "_PATH", "/none")
    assert debian.make(RECIPE, host, nothing) == first and made == ["trixie"]
    with pytest.raises(MicrovmHostError, match=r"made with mmdebstrap, mkfs\.ext4, "):
        bootstrap.check_host(has_root=False)
    assert debian.newest(RECIPE, host, now + debian.MAX_AGE - 60) == directory
    assert debian.newest(RECIPE, host, now + debian.MAX_AGE + 60) is None
    # Its clock was wrong, or it is none of ours.
    assert debian.newest(RECIPE, host, now - 3600) is None
    os.rename(directory, f"{host.guests}/{RECIPE.name}x")
    assert debian.newest(RECIPE, host, now) is None


def test_a_newer_one_leaves_the_former_alone(
    host: HostPaths, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = debian.make(RECIPE, host, nothing)
    later = time.time() + 60
    monkeypatch.setattr(time, "time", lambda: later)
    monkeypatch.setattr(time, "gmtime", lambda: time.localtime(later))
    second = debian.make(RECIPE, host, nothing, fresh=True)
    assert second != first and os.path.exists(first.root) and len(made) == 2
    os.makedirs(f"{host.declarations}/web.toml.d")
    former = os.path.dirname(first.root)
    assert debian.superseded(RECIPE, host, second.root) == [former]
    # A declaration has it still.
    Path(host.declarations, "web.toml.d", "x.toml").write_text(f'source = "{first.root}"\n')
    assert debian.superseded(RECIPE, host, second.root) == []


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            "E: The repository 'http://mirror/debian nosuch Release' does not have a Release file.",
            r"no Debian root of trixie could be made from http://mirror/debian: The repository.*"
            "has the mirror such a suite",
        ),
        (
            "Err:1 http://mirror/debian trixie InRelease\n  Could not resolve 'mirror'\nE: failed",
            "debian: failed; is the mirror reachable from this host",
        ),
        ("E: NO_PUBKEY 0E98404D386FA1D9", "install debian-archive-keyring"),
        ("dpkg: error processing package", r"mmdebstrap failed; what it said stands above"),
    ],
)
def test_what_fails_tells_why_and_leaves_nothing(
    lines: str, expected: str, host: HostPaths, made: list[str], root: Path
) -> None:
    (root / "mmdebstrap").write_text(
        f'#!/bin/sh\nmkdir $TMPDIR/x; cat >&2 <<"END"\nI: running x...\n{lines}\nEND\nexit 25\n'
    )
    said: list[str] = []
    with pytest.raises(MicrovmHostError, match=expected):
        debian.make(RECIPE, host, said.append)
    assert os.listdir(host.guests) == []
    assert [f"  {line.strip()}" for line in lines.splitlines()] == said[2:]


def test_a_root_without_a_kernel_is_none(host: HostPaths, made: list[str], root: Path) -> None:
    root_tar(root / "done.tar", kernel=False)
    with pytest.raises(MicrovmHostError, match="has no /vmlinuz"):
        debian.make(RECIPE, host, nothing)
    assert os.listdir(host.guests) == []


def test_hooks_that_it_writes_out_are_not_told(root: Path) -> None:
    said: list[str] = []
    script = "echo 'I: running hook...' >&2; echo 'set -eu' >&2; echo real >&2; exit 1"
    with pytest.raises(MicrovmHostError):
        bootstrap.run(["sh", "-c", script, "--hook=\n  set -eu\n"], str(root), ORIGIN, said.append)
    assert said == ["  running hook...", "  real"]


INTERRUPTED = """\
import os, signal, sys
sys.path.insert(0, os.environ["TOP"])
# Tests that a shell runs in the background are born deaf to it (POSIX, 2.11 of the shell).
signal.signal(signal.SIGINT, signal.default_int_handler)
from microvm_host.guests import bootstrap, debian
from microvm_host.guests.archives import Origin
from microvm_host.paths import HostPaths
from microvm_host.errors import MicrovmHostError
bootstrap._PATH = os.environ["PATH"]
debian.mmdebstrap_argv = lambda recipe, target: ["sh", "-c", os.environ["SCRIPT"]]

recipe = debian.Recipe(Origin("trixie", "http://m", ()))
print(debian.make(recipe, HostPaths(sys.argv[1]), lambda text: print(text, flush=True)))
"""


def has_ended(pid: int) -> bool:
    """Whether a process has, though its parent may not have noticed (proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupt_ends_all_of_it(number: int, host: HostPaths, root: Path) -> None:
    # Its own clearing up is waited for, and what does not heed it is killed.
    script = (
        "trap 'echo cleared >\"$MARK\"; exit 1' TERM; touch $TMPDIR/half; "
        'sh -c \'trap "" TERM; exec sleep 1000\' & echo $! >"$MARK.pid"; '
        "echo 'I: working...' >&2; wait"
    )
    mark = root / "mark"
    environment = {**os.environ, "TOP": str(Path(__file__).parents[2])}
    environment |= {"SCRIPT": script, "MARK": str(mark)}
    with subprocess.Popen(
        [sys.executable, "-B", "-c", INTERRUPTED, host.root],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
    ) as child:
        assert child.stdout is not None
        try:
            assert any("working" in line for line in child.stdout)
            child.send_signal(number)
            assert child.wait(30) != 0
        finally:
            child.kill()
    assert mark.read_text() == "cleared\n"
    assert os.listdir(host.guests) == []
    assert has_ended(int(Path(f"{mark}.pid").read_text()))


def test_what_a_killed_one_left_is_removed(host: HostPaths, made: list[str]) -> None:
    left = Path(host.guests, ".debian-1")
    (left / "unpacked").mkdir(parents=True)
    other = Path(host.guests, "debian-sid-00000000-20200101T000000")
    other.mkdir()
    debian.make(RECIPE, host, nothing)
    assert not left.exists() and other.exists()


def test_a_full_disk_is_told_beforehand(
    host: HostPaths, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(debian, "_NEEDS_SPACE", 1 << 60)
    with pytest.raises(MicrovmHostError, match=r"has \d+ MB left.*make room there"):
        debian.make(RECIPE, host, nothing)
    assert made == [] and os.listdir(host.guests) == []


def test_a_host_that_makes_no_disks_of_archives_is_told_beforehand(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "_PATH", str(root))
    with pytest.raises(MicrovmHostError, match=r"mkfs\.ext4, mkfs\.vfat, mcopy, which this host"):
        bootstrap.check_host(has_root=True)
    for name in ("mkfs.vfat", "mcopy", "mkfs.ext4"):
        (root / name).write_text("#!/bin/sh\necho 'mke2fs: no libarchive' >&2; exit 1\n")
        (root / name).chmod(0o755)
    with pytest.raises(MicrovmHostError, match=r"of archives: mke2fs: no libarchive.*1\.47\.1"):
        bootstrap.check_host(has_root=True)
    (root / "mkfs.ext4").write_text("#!/bin/sh\n")
    bootstrap.check_host(has_root=True)


@pytest.mark.parametrize(
    ("there", "has_root", "line"),
    [
        ("", False, "mmdebstrap e2fsprogs dosfstools mtools libarchive13t64"),
        ("", True, "e2fsprogs dosfstools mtools libarchive13t64"),
        ("mmdebstrap mkfs.ext4", False, "dosfstools mtools libarchive13t64"),
        ("mkfs.vfat mcopy mkfs.ext4", False, "mmdebstrap libarchive13t64"),
    ],
)
def test_all_that_is_missing_is_one_line_to_install(
    root: Path, monkeypatch: pytest.MonkeyPatch, there: str, has_root: bool, line: str
) -> None:
    monkeypatch.setattr(bootstrap, "_PATH", str(root))
    for name in there.split():
        (root / name).write_text("#!/bin/sh\necho 'no libarchive' >&2; exit 1\n")
        (root / name).chmod(0o755)
    with pytest.raises(MicrovmHostError) as caught:
        bootstrap.check_host(has_root=has_root)
    assert f"(on Debian 13: apt install {line})" in caught.value.hint


# ---- the declaration


@pytest.fixture
def ready(
    host: HostPaths, on_debian: HostPaths, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> HostPaths:
    """A host that makes roots and disks of them."""
    monkeypatch.setattr(bootstrap, "check_host", lambda *, has_root: None)
    return host


def test_the_whole_declaration(ready: HostPaths, root: Path) -> None:
    """Compared with a golden file; the root's own name has a date."""
    key = root / "key.pub"
    key.write_text(f"{KEY} alice@home\n")
    os.makedirs(f"{ready.root}/dev")
    Path(ready.vhost_vsock).touch()
    said: list[str] = []
    text = init.make(Wish("web", "debian", ssh_keys=(str(key),)), ready, said.append)
    (name,) = os.listdir(ready.guests)
    golden.compare("init-debian.toml", text.replace(f"{ready.guests}/{name}", "/GUESTS/debian"))
    assert f"root and admin may log in by ssh with the keys of {key}" in said


def declared(text: str, root: Path, name: str) -> guests.Guest:
    path = root / f"{name}.toml"
    path.write_text(text)
    return guests.load(str(path))[0]


# Names that are no host names, and one that only looks like an option.
@pytest.mark.parametrize(
    ("name", "host_name"),
    [("web", "web"), ("a:b_c.d", "a-b-c-d"), ("_", "guest"), ("web-", "web"), ("a.b-c", "a.b-c")],
)
@pytest.mark.parametrize("bridge", [False, True])
def test_the_declaration_is_right(
    name: str, host_name: str, bridge: bool, ready: HostPaths, root: Path
) -> None:
    if bridge:
        os.makedirs(ready.net_device("mvbr0") + "/bridge")
    key = root / "key.pub"
    awkward = f'command="echo \\"it\'s\\" ${{x}}" {KEY} ålice # 1'
    key.write_text(f"{awkward}\n{KEY} b\n")
    wish = Wish(name, "debian", mem=2048, login="deploy", ssh_keys=(str(key),), disk=4096)
    guest = declared(init.make(wish, ready, nothing), root, name)
    (volume,) = guest.volumes
    assert (volume.size, volume.label, volume.image) == (4096, "debian", "root.img")
    assert volume.source is not None and tarfile.is_tarfile(volume.source)
    assert guest.initrd is not None and Path(guest.initrd).read_bytes() == b"initrd"
    assert guest.kernel_params[:2] == ("root=LABEL=debian", "rw")
    assert guest.mem == 2048 and guest.vsock_cid is None
    assert [nic.type for nic in guest.interfaces] == ["tap" if bridge else "user"]
    assert guest.cloud_init is not None and guest.cloud_init.hostname == host_name
    user, superuser = guest.cloud_init.users
    assert (user.name, user.sudo) == ("deploy", "ALL=(ALL) NOPASSWD:ALL")
    assert superuser.name == "root" and superuser.sudo is None
    assert user.ssh_authorized_keys == superuser.ssh_authorized_keys == (awkward, f"{KEY} b")


def test_without_keys_it_says_how_to_get_in(ready: HostPaths, root: Path) -> None:
    said: list[str] = []
    text = init.make(Wish("web", "debian", login="root"), ready, said.append)
    assert "no ssh key was found by which root could log in: --ssh-key FILE gives one" in said
    assert any("microvm exec -i web -- chpasswd\nand type root:PASSWORD" in each for each in said)
    guest = declared(text, root, "web")
    assert guest.cloud_init is not None
    (user,) = guest.cloud_init.users
    assert (user.name, user.ssh_authorized_keys) == ("root", ())


def test_vsock_is_for_guests_whose_sshd_listens_there(ready: HostPaths, root: Path) -> None:
    os.makedirs(f"{ready.root}/dev")
    Path(ready.vhost_vsock).touch()
    for suite, has_vsock in (("trixie", True), ("bookworm", False)):
        text = init.make(Wish("web", "debian", suite=suite), ready, nothing)
        assert (declared(text, root, "web").vsock_cid is not None) == has_vsock


@pytest.mark.parametrize(
    ("wish", "complaint"),
    [
        (Wish("web", suite="trixie"), "--suite is for --guest debian alone"),
        (Wish("web", mirror="http://x"), "--mirror is for --guest debian alone"),
        (Wish("web", login="x"), "--login is for --guest debian alone"),
        (Wish("web", ssh_keys=("x",)), "--ssh-key is for --guest debian alone"),
        (Wish("web", disk=1), "--disk is for --guest debian alone"),
        (Wish("web", fresh=True), "--fresh is for --guest debian alone"),
        (Wish("web", "debian", kernel="/k"), "--kernel is for --guest small alone"),
    ],
)
def test_options_of_another_guest_are_refused(wish: Wish, complaint: str, host: HostPaths) -> None:
    with pytest.raises(UsageError, match=complaint):
        init.make(wish, host, nothing)


def test_what_is_wrong_is_told_before_anything_is_made(ready: HostPaths, made: list[str]) -> None:
    with pytest.raises(NameInvalid, match="cannot be the name of a guest's user"):
        init.make(Wish("web", "debian", login="Alice!"), ready, nothing)
    with pytest.raises(MicrovmHostError, match="/none: cannot be read"):
        init.make(Wish("web", "debian", ssh_keys=("/none",)), ready, nothing)
    assert made == []


def test_a_disk_keeps_its_kernel(ready: HostPaths, made: list[str]) -> None:
    path = Path(ready.declaration("web"))
    path.parent.mkdir(parents=True)
    path.write_text("# mine\n")
    os.mkdir(ready.vm("web"))
    Path(ready.vm("web"), "root.img").touch()
    with pytest.raises(UsageError, match=r"root\.img: microVM web has a disk already.*delete"):
        init.declare(Wish("web", "debian"), ready, nothing, replaces=True)
    assert path.read_text() == "# mine\n" and made == []
