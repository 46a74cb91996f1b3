# SPDX-License-Identifier: MIT
"""The `microvm` command: its help, its exit codes, and what it costs where click is not needed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from microvm_host import (
    __version__,
    apply,
    attach,
    console,
    install,
    service,
    source,
    state,
    systemd,
)
from microvm_host.cli import access, commands, entry, jobs
from microvm_host.errors import MicrovmHostError
from microvm_host.paths import HostPaths
from microvm_host.runner import Macvtap, Package, Share, Tap

from . import packages

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ["adopt", "apply", "balloon", "build", "console", "create", "exec", "history"] + [
    "init",
    "list",
    "logs",
    "network",
    "pause",
    "pci",
    "reconcile",
    "remove",
    "restart",
    "resume",
    "rollback",
    "run",
    "show",
    "ssh",
    "start",
    "status",
    "stop",
    "update",
]


@pytest.fixture(autouse=True)
def made_up_host(host: HostPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "HOST", host)
    monkeypatch.setenv("MICROVM_HOST_ROOT", host.root)
    monkeypatch.setattr(systemd, "states", lambda *patterns: {"microvm@web.service": "active"})
    monkeypatch.setattr(systemd, "show_all", lambda *asked: {})
    # Nothing of this machine is started, stopped or shown.
    monkeypatch.setenv("PATH", f"{host.root}/bin")


def microvm(*arguments: str) -> Result:
    return CliRunner().invoke(commands.microvm, arguments, prog_name="microvm")


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The whole command, as bin/microvm runs it: exit code, output, errors."""
    try:
        code = entry.main(["microvm", *arguments])
    except SystemExit as ended:
        assert isinstance(ended.code, int)
        code = ended.code
    found = capfd.readouterr()
    return code, found.out, found.err


@pytest.fixture
def web(host: HostPaths, root: Path) -> Package:
    """The VM `web`, which runs the package that is current."""
    package = Package(
        path=str(root / "packages/web-1"),
        taps=(Tap("vm0"), Tap("vm1")),
        macvtaps=(Macvtap("m0", "02:00:00:00:00:01", "eth0", "bridge"),),
        shares=(Share("data", "/srv/data", "d.sock", options_given=True, read_only=True),),
        pci_devices=("0000:01:00.0",),
        hypervisor="qemu",
        vsock_cid=42,
    )
    packages.write(Path(package.path), package)
    os.mkdir(host.vm("web"))
    for link in (host.current("web"), host.booted("web")):
        os.symlink(package.path, link)
    return package


# ---- help


def test_commands_are_what_the_manual_has() -> None:
    assert sorted(commands.microvm.commands) == COMMANDS


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(arguments: list[str], flag: str) -> None:
    done = microvm(*arguments, flag)
    assert done.exit_code == 0
    assert done.output.startswith(" ".join(["Usage: microvm", *arguments]))
    # A sentence that says what it does, and what each option does.
    command = commands.microvm.commands[arguments[0]] if arguments else commands.microvm
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name != "version":
            assert parameter.help and parameter.help.endswith(".")
    assert "click" not in done.output


def test_version() -> None:
    done = microvm("--version")
    assert done.exit_code == 0
    assert __version__ in done.output


# ---- exit codes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such"], "No such command"),
        (["lits"], "No such command 'lits'. Did you mean `microvm list`?"),
        (["shutdown", "web"], "Did you mean `microvm stop`?"),
        (["enable", "web"], "Did you mean `systemctl enable microvm@NAME`?"),
        (["help"], "Did you mean `microvm --help`?"),
        (["pci", "chek", "web"], "No such command 'chek'. Did you mean `microvm pci check`?"),
        (["network", "enalbe"], "Did you mean `microvm network enable`?"),
        # Other names are those of the command itself.
        (["network", "ls"], "No such command 'ls'."),
        (["--no-such"], "No such option"),
        (["create"], "Missing argument"),
        (["start"], "Missing argument"),
        (["list", "--jsn"], "No such option"),
        (["start", "a/b"], "'a/b' cannot be the name of a VM"),
        (["start", "--", "-x"], "'-x' cannot be the name of a VM"),
        (["ssh", "root@"], "the name of a VM is empty"),
        (["create", "web", "--flake", "a", "--runner", "b"], "do not go together"),
        (["console", "web", "--escape", "ab"], "'ab' is no key"),
        (["balloon", "web", "1.5G"], "'1.5G' is not a size"),
        (["init", "web", "--memory", "1X"], "'1X' is not a size; 512M and 2G are"),
        (["init", "web", "--memory", "63"], "'63' is too small; at least 64M"),
        (["init", "web", "--disk", "1G"], "'1G' is too small; at least 2048M"),
        (["exec", "web"], "no command is given"),
        (["-x"], "there is no flag -x"),
        (["-c"], "-c needs a value"),
        (["-l", "-u", "web"], "-u does not go with list"),
    ],
)
def test_wrong_usage(capfd: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = run(capfd, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err


def takes_a_vm() -> list[str]:
    """The sub-commands that are about VMs which are there."""
    makes_one = {"create", "init", "build"}
    return [
        name
        for name, command in commands.microvm.commands.items()
        if name not in makes_one
        and any(each.human_readable_name in ("vm", "vms", "target") for each in command.params)
    ]


@pytest.mark.skipif(os.geteuid() != 0, reason="some ask for root first")
@pytest.mark.parametrize("words", [*([name] for name in takes_a_vm()), ["rm"], ["pci", "check"]])
def test_vm_that_does_not_exist(
    capfd: pytest.CaptureFixture[str], words: list[str], host: HostPaths
) -> None:
    """Whatever is asked of it, the answer is the same, and systemd is asked for nothing."""
    os.mkdir(host.vm("webb"))
    rest = {"exec": ["true"], "rollback": [], "rm": ["-y"]}.get(words[0], [])
    code, out, err = run(capfd, *words, "none", *rest)
    assert (code, out) == (255 if words == ["exec"] else 1, "")
    expected = "microvm: there is no microVM none; `microvm list` shows those that there are\n"
    assert err == expected
    code, _, err = run(capfd, *words, "web", *rest)
    assert err == "microvm: there is no microVM web; did you mean webb?\n"


@pytest.mark.parametrize("command", ["list", "status", "start", "stop", "restart", "update", "rm"])
def test_glob_that_matches_nothing(capfd: pytest.CaptureFixture[str], command: str) -> None:
    code, out, err = run(capfd, command, "x*")
    assert (code, out) == (1, "")
    assert "no microVM matches 'x*'" in err or os.geteuid()


def test_start_of_globs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, host: HostPaths
) -> None:
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(jobs, "run", lambda verb, vms: asked.append((verb, vms)))
    for name in ("a1", "a2", "b1"):
        os.mkdir(host.vm(name))
    packages.put(Path(host.declarations), "a3.toml", "")
    assert run(capfd, "start", "b1", "a*")[0] == 0
    assert run(capfd, "stop", "a1", "a?")[0] == 0
    assert asked == [("start", ["b1", "a1", "a2", "a3"]), ("stop", ["a1", "a2", "a3"])]


def test_vm_whose_directory_is_gone_is_stopped_while_it_runs(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fixture's systemd says that microvm@web runs."""
    asked: list[list[str]] = []
    monkeypatch.setattr(jobs, "run", lambda verb, vms: asked.append(vms))
    assert run(capfd, "stop", "web")[0] == 0
    assert asked == [["web"]]
    assert run(capfd, "start", "web")[0] == 1


@pytest.mark.parametrize(
    ("hypervisor", "reason", "hint"),
    [
        ("qemu", "", "which for a declaration is `qemu.guestAgent = true`"),
        (
            "firecracker",
            ", since firecracker's is in the journal alone; `microvm ssh` logs in",
            "QEMU's alone is known, not firecracker's; `microvm ssh` runs commands, too",
        ),
    ],
)
def test_what_only_qemu_has(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    host: HostPaths,
    web: Package,
    hypervisor: str,
    reason: str,
    hint: str,
) -> None:
    package = Package(path=web.path, hypervisor=hypervisor)
    vm = attach.Running("web", host.vm("web"), package, os.getuid(), os.getgid(), "me")
    monkeypatch.setattr(attach, "running", lambda name, host: vm)
    monkeypatch.setattr(console, "has_process", lambda name: True)
    monkeypatch.setattr(console, "follow", lambda vm, lines, key, **rest: console.DETACHED)
    code, _, err = run(capfd, "console", "web")
    assert code == 0
    assert f"web: read-only: its package tells of no console to type at{reason}]\n" in err
    code, _, err = run(capfd, "exec", "web", "true")
    assert code == 255 and hint in err


def test_exec_that_ran_nothing(capfd: pytest.CaptureFixture[str], web: Package) -> None:
    """Not 1, which would be the command's own code."""
    code, out, err = run(capfd, "exec", "none", "false")
    assert (code, out) == (255, "")
    assert "there is no microVM none" in err and "`microvm list` shows" in err
    code, _, err = run(capfd, "exec", "web", "false")
    assert code == 255
    assert "microVM web does not run" in err


@pytest.mark.skipif(os.geteuid() == 0, reason="is about those who are not root")
@pytest.mark.parametrize(
    "arguments",
    [["create", "x", "--runner", "/p"], ["update", "web"], ["remove", "web"], ["run", "web"]]
    + [["apply"]],
)
def test_needs_root(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, _, err = run(capfd, *arguments)
    assert code == 1
    assert err.startswith("microvm: this needs root; sudo microvm ")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_wrong_package(
    capfd: pytest.CaptureFixture[str],
    web: Package,
    flags: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "show_unit", lambda vm: click.echo(f"unit of {vm}"))
    packages.put(Path(web.path), "share/microvm/vsock-cid", "1\n")
    code, out, err = run(capfd, "status", "web", *flags)
    # The unit says what became of it; but a program that wants JSON is given no other text.
    assert (code, out) == (78, "" if flags else "unit of web\n")
    assert f"{web.path}/share/microvm/vsock-cid:1: '1' is not a vsock CID" in err


# ---- showing


def test_list(capfd: pytest.CaptureFixture[str], web: Package) -> None:
    table = (
        "NAME  STATE    SINCE  VERSION  ADDRESS  MEMORY\n"
        "web   running  -      web-1    -        -\n"
    )
    for words in (["list"], ["list", "web"], ["ls"], ["ps", "w*"]):
        assert run(capfd, *words) == (0, table, "")
    # By the flag, in the words of microvm.nix.
    for words in (["-l"], ["-l", "web"], ["list", "--lines"], ["ls", "--lines", "*"]):
        assert run(capfd, *words) == (0, "web: current(web-1)\n", "")
    assert run(capfd, "status") == (0, f"1 microVM: 1 running\n{table}", "")
    code, out, _ = run(capfd, "status", "--json")
    assert (code, [row["name"] for row in json.loads(out)]) == (0, ["web"])


def test_list_json(capfd: pytest.CaptureFixture[str], web: Package) -> None:
    code, out, err = run(capfd, "-l", "--json")
    assert (code, err) == (0, "")
    (row,) = json.loads(out)
    assert (row["name"], row["state"], row["current"]["package"]) == ("web", "current", web.path)


def has_kvm(host: HostPaths) -> None:
    packages.put(Path(host.cpu_info), "", "flags\t\t: fpu vmx lm\n")
    packages.put(Path(host.kvm), "", "")


def test_what_is_emulated_is_told(
    capfd: pytest.CaptureFixture[str],
    host: HostPaths,
    web: Package,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jobs, "show_unit", lambda vm: 0)
    started: list[str] = []
    monkeypatch.setattr(jobs, "run", lambda verb, vms: started.extend((verb, *vms)))
    slow = "without KVM, about ten times slower: this host's CPU offers none"
    code, _, err = run(capfd, "start", "web")
    assert code == 0 and err.count(f"microvm: web: {slow}") == 1
    assert " without KVM: about ten times slower: " in run(capfd, "status", "web")[1]
    assert json.loads(run(capfd, "status", "web", "--json")[1])["without_kvm"]
    has_kvm(host)
    assert run(capfd, "restart", "web")[2] == ""
    assert json.loads(run(capfd, "status", "web", "--json")[1])["without_kvm"] is None
    # Others do not run without it, and say so.
    os.unlink(host.kvm)
    packages.put(Path(web.path), "share/microvm/hypervisor", "crosvm\n")
    assert run(capfd, "start", "web")[2] == ""
    assert started == ["start", "web", "restart", "web", "start", "web"]


def test_status(
    capfd: pytest.CaptureFixture[str],
    host: HostPaths,
    web: Package,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    has_kvm(host)
    monkeypatch.setattr(jobs, "show_unit", lambda vm: 0)
    code, out, _ = run(capfd, "status", "web")
    assert code == 0
    assert out.splitlines() == [
        "web: current(web-1)",
        f"     package: {web.path}",
        "  hypervisor: qemu",
        "   vsock CID: 42",
        "        taps: vm0, vm1",
        "    macvtaps: m0 on eth0",
        "         PCI: 0000:01:00.0 (not there)",
        "       share: data → /srv/data (read-only)",
    ]


def test_status_json(capfd: pytest.CaptureFixture[str], web: Package) -> None:
    code, out, _ = run(capfd, "status", "web", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["taps"] == ["vm0", "vm1"]
    assert found["shares"] == [{"tag": "data", "source": "/srv/data", "read_only": True}]
    assert found["vsock_cid"] == 42
    assert found["readiness"] == "exec"


@pytest.mark.parametrize(
    ("hypervisor", "has_shares", "ksm", "merges"),
    [
        ("qemu", False, "0", False),
        ("qemu", False, "1", True),
        # A kernel without it.
        ("cloud-hypervisor", False, None, False),
        # virtiofsd has the memory as well.
        ("qemu", True, "0", None),
        ("firecracker", False, "0", None),
    ],
)
def test_status_tells_of_memory_that_is_not_merged(
    capfd: pytest.CaptureFixture[str],
    host: HostPaths,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    hypervisor: str,
    has_shares: bool,
    ksm: str | None,
    merges: bool | None,
) -> None:
    monkeypatch.setattr(jobs, "show_unit", lambda vm: 0)
    shares = (Share("data", "/srv/data", "d.sock"),) if has_shares else ()
    package = Package(path=str(root / "packages/web-1"), hypervisor=hypervisor, shares=shares)
    packages.write(Path(package.path), package)
    os.mkdir(host.vm("web"))
    os.symlink(package.path, host.current("web"))
    if ksm is not None:
        Path(host.ksm_run).parent.mkdir(parents=True)
        Path(host.ksm_run).write_text(f"{ksm}\n")
    _, out, _ = run(capfd, "status", "web")
    assert ("memory: not merged with other VMs' memory" in out) == (merges is False)
    _, out, _ = run(capfd, "status", "web", "--json")
    assert json.loads(out)["merges_memory"] is merges


@pytest.mark.parametrize(
    ("file", "setting", "active", "shown"),
    [
        ("guest", "", "activating", "guest, which is waited for"),
        ("guest", "", "active", "guest, which is ready"),
        ("guest", "", "failed", "guest"),
        ("guest", "A=1 MICROVM_READINESS=exec", "active", None),
        ("exec", "MICROVM_READINESS=guest B=2", "active", "guest, which is ready"),
    ],
)
def test_status_tells_what_is_waited_for(
    capfd: pytest.CaptureFixture[str],
    web: Package,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    setting: str,
    active: str,
    shown: str | None,
) -> None:
    packages.put(Path(web.path), "share/microvm/readiness", f"{file}\n")
    monkeypatch.setattr(jobs, "show_unit", lambda vm: 0)
    monkeypatch.setattr(systemd, "show", lambda unit, what: {what: setting})
    monkeypatch.setattr(systemd, "states", lambda *units: {"microvm@web.service": active})
    _, out, _ = run(capfd, "status", "web")
    lines = [line for line in out.splitlines() if "readiness" in line]
    assert lines == ([f"   readiness: {shown}"] if shown else [])


def ssh_calls(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[object]:
    called: list[object] = []
    monkeypatch.setattr(jobs, "become_ssh", lambda *arguments: called.append(arguments))
    done = microvm("ssh", *arguments)
    assert done.exit_code == 0, done.output
    return called


def has_address(monkeypatch: pytest.MonkeyPatch, web: Package, host: HostPaths) -> str:
    """Have the VM run, and the host know its address."""
    monkeypatch.setattr(state, "_is_roots", lambda status: True)
    packages.put(Path(web.path), "share/microvm/tap-macs", "vm0 02:00:00:00:00:07\n")
    packages.put(Path(host.arp_table), "", "head\n192.0.2.7 0x1 0x2 02:00:00:00:00:07 * br0\n")
    return "192.0.2.7"


def test_ssh(monkeypatch: pytest.MonkeyPatch, host: HostPaths, web: Package) -> None:
    for arguments, user, rest in (
        (["web"], "root", ()),
        (["alice@web"], "alice", ()),
        (["web", "ls", "-l"], "root", ("ls", "-l")),
    ):
        (call,) = ssh_calls(monkeypatch, *arguments)
        assert call == (user, "web", "vsock/42", ["cid:42"], rest)
    # Where its vsock does not lead.
    address = has_address(monkeypatch, web, host)
    (call,) = ssh_calls(monkeypatch, "web")
    assert call == ("root", "web", "vsock/42", ["cid:42", f"tcp:{address}"], ())


@pytest.mark.parametrize("hypervisor", ["cloud-hypervisor", "firecracker"])
def test_ssh_by_a_hypervisors_own_vsock(
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    host: HostPaths,
    web: Package,
    hypervisor: str,
) -> None:
    packages.put(Path(web.path), "share/microvm/hypervisor", f"{hypervisor}\n")
    monkeypatch.setattr(attach, "running", lambda vm, host: None)
    code, _, err = run(capfd, "ssh", "web")
    assert code == 1 and "microVM web does not run" in err
    vm = attach.Running("web", host.vm("web"), web, 12345, 12345, "me")
    monkeypatch.setattr(attach, "running", lambda vm_name, host: vm)
    (call,) = ssh_calls(monkeypatch, "web")
    assert call == ("root", "web", "vsock/42", [f"unix:12345:{host.vm('web')}/notify.vsock"], ())


@pytest.mark.parametrize(
    ("arguments", "user"),
    [
        ("-l alice", ""),
        ("-lalice", ""),
        ("-vl alice ls", ""),
        ("-p 22 -o User=alice", ""),
        ("-ouser=alice", ""),
        ("-o 'User alice'", ""),
        ("-v", "root"),
        ("-o UserKnownHostsFile=/x", "root"),
        ("-p 22 -i -l ls", "root"),
        # The guest's command's.
        ("ls -l alice", "root"),
        ("-- -l alice", "root"),
    ],
)
def test_whom_sshs_own_options_log_in_as(
    monkeypatch: pytest.MonkeyPatch, web: Package, arguments: str, user: str
) -> None:
    words = shlex.split(arguments)
    (call,) = ssh_calls(monkeypatch, "web", "--", *words)
    assert call == (user, "web", "vsock/42", ["cid:42"], tuple(words))
    (call,) = ssh_calls(monkeypatch, "bob@web", "--", *words)
    assert call == ("bob", "web", "vsock/42", ["cid:42"], tuple(words))


def test_ssh_without_cid(capfd: pytest.CaptureFixture[str], web: Package) -> None:
    os.unlink(f"{web.path}/share/microvm/vsock-cid")
    code, _, err = run(capfd, "ssh", "web")
    assert code == 1
    assert "microVM web has no vsock CID to reach it by, and no address" in err


def test_what_a_declaration_lacks_is_a_line_with_its_place(host: HostPaths) -> None:
    path = host.declaration("web")
    packages.put(Path(host.declarations), "web.toml", "mem = 256\n# [[shares]]\n\n [[volumes]]\n")
    assert access.line_to_add("balloon = true", "web", host) == (
        f"write `balloon = true` into {path} above line 4, the first that begins with '['; "
        "then: microvm update -R web"
    )
    packages.put(Path(host.declarations), "web.toml", "mem = 256\n")
    assert access.line_to_add("balloon = true", "web", host) == (
        f"write `balloon = true` into {path}; then: microvm update -R web"
    )


def test_ssh_by_address(monkeypatch: pytest.MonkeyPatch, host: HostPaths, web: Package) -> None:
    os.unlink(f"{web.path}/share/microvm/vsock-cid")
    address = has_address(monkeypatch, web, host)
    assert ssh_calls(monkeypatch, "alice@web", "ls") == [("alice", "web", address, [], ("ls",))]


@pytest.mark.parametrize(
    ("to", "ways", "words"),
    [
        ("192.0.2.7", [], ["-l", "alice", "192.0.2.7", "ls"]),
        # Not vsock/42, for which systemd has no key checked.
        ("vsock/42", ["cid:42"], ["-l", "alice", "microvm-web", "ls"]),
    ],
)
def test_command_line_of_ssh(
    monkeypatch: pytest.MonkeyPatch, to: str, ways: list[str], words: list[str]
) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(jobs, "_become", called.append)
    jobs.become_ssh("alice", "web", to, ways, ["ls"])
    assert called[0][-4:] == words
    # Whatever it is reached by, its key is that of the VM.
    assert "HostKeyAlias=microvm-web" in called[0]
    assert any("ProxyCommand" in word for word in called[0]) == bool(ways)


def test_a_host_without_ssh() -> None:
    """The fixture's PATH has no programs."""
    with pytest.raises(MicrovmHostError) as caught:
        jobs.become_ssh("root", "web", "192.0.2.7", [], [])
    assert str(caught.value) == "this host has no ssh; install it (on Debian: openssh-client)"


@pytest.mark.parametrize("newer", ["/packages/web-2", None])
def test_check_of_a_declaration(
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    host: HostPaths,
    web: Package,
    newer: str | None,
) -> None:
    packages.put(Path(host.vm("web")), "declaration", "/etc/microvms/web.toml\n")
    (Path(host.vm("web")) / "runner").unlink(missing_ok=True)
    monkeypatch.setattr(source, "_is_roots_file", lambda status: True)
    asked: list[object] = []

    def would_be(name: str, found: source.Source, host: HostPaths) -> str:
        asked.append((name, found.reference))
        return newer or web.path

    monkeypatch.setattr(install, "would_be", would_be)
    monkeypatch.setattr(systemd, "states", lambda *units: {})
    _, out, _ = run(capfd, "-l")
    assert (asked, "outdated" in out) == ([], False)
    _, out, _ = run(capfd, "-l", "--check")
    assert asked == [("web", "/etc/microvms/web.toml")]
    assert ("outdated" in out) == bool(newer)


def test_apply_with_nothing_declared(capfd: pytest.CaptureFixture[str], host: HostPaths) -> None:
    code, out, err = run(capfd, "apply", "--dry-run")
    assert (code, out, err) == (0, "", f"no declarations in {host.declarations}\n")


def test_apply_looks_for_kvm_where_something_changed(
    capfd: pytest.CaptureFixture[str], host: HostPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def identity(vm: str) -> None:
        asked.append(vm)
        raise MicrovmHostError("nobody")

    outcomes = [apply.Outcome("old", "old: up to date", False), apply.Outcome("new", "new", True)]
    monkeypatch.setattr(commands, "_as_root", lambda: None)
    monkeypatch.setattr(service, "identity", identity)
    monkeypatch.setattr(apply, "apply", lambda *_, **__: iter(outcomes))
    for vm in ("old", "new"):
        package = packages.minimal(Path(host.at(f"/packages/{vm}")))
        packages.put(package / "share/microvm", "hypervisor", "qemu\n")
        os.makedirs(host.vm(vm))
        os.symlink(package, host.current(vm))
    slow = "without KVM, about ten times slower"
    assert f"microvm: new: {slow}" in run(capfd, "apply")[2]
    # The CPU was enough to know it.
    assert asked == []
    has_kvm(host)
    assert run(capfd, "apply")[2] == ""
    assert asked == ["new"]


def test_apply_dry_run(capfd: pytest.CaptureFixture[str], host: HostPaths, web: Package) -> None:
    new = packages.minimal(Path(host.at("/packages/web-2")))
    for name, text in {
        "web": f'runner = "{new}"',
        "db": f'runner = "{web.path}"',
        "broken": "runner = 1",
    }.items():
        packages.put(Path(host.declarations), f"{name}.toml", text)
    before = sorted(Path(host.state).rglob("*"))
    code, out, err = run(capfd, "apply", "--dry-run")
    assert out.splitlines() == [
        f"db: would install {web.path}, would start it",
        f"web: would update from {web.path} to {new}, would restart it if it changed",
    ]
    assert err == f"microvm: {host.declaration('broken')}:1: runner = 1 is not a string\n"
    assert code == 78
    assert sorted(Path(host.state).rglob("*")) == before


# ---- what it costs


def test_plain_listing_does_not_import_click(host: HostPaths, web: Package, root: Path) -> None:
    packages.program(root, "bin/systemctl", "#!/bin/sh\nexit 0\n")
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from microvm_host.cli.entry import main\n"
        "code = main(['microvm', '-l'])\n"
        "costly = {'click', 'json', 'subprocess', 'argparse', 'pystemd', 'site', 're'}\n"
        "print(code, sorted(costly & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-I", "-S", "-c", code],
        env={"PATH": f"{root}/bin", "MICROVM_HOST_ROOT": host.root},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "web: current(web-1), not booted: systemctl start microvm@web.service",
        "0 []",
    ]


def test_what_nobody_thought_of_is_no_traceback(
    host: HostPaths, capfd: pytest.CaptureFixture[str]
) -> None:
    os.rmdir(host.state)
    Path(host.state).write_text("a file")
    assert entry.main(["microvm", "list"]) == 1
    assert capfd.readouterr().err == f"microvm: {host.state}: Not a directory\n"


@pytest.mark.parametrize("arguments", [["-l"], ["list"], ["list", "--json"], ["--help"]])
def test_output_that_cannot_be_written(
    arguments: list[str], host: HostPaths, web: Package, root: Path
) -> None:
    packages.program(root, "bin/systemctl", "#!/bin/sh\nexit 0\n")
    code = (
        f"import sys; sys.path[:0] = [{str(REPOSITORY)!r}, "
        f"{str(Path(click.__file__).parents[1])!r}]\n"
        "from microvm_host.cli.entry import main\n"
        f"sys.exit(main(['microvm', *{arguments!r}]))"
    )
    argv = [sys.executable, "-B", "-I", "-S", "-c", code]
    environment = {"PATH": f"{root}/bin", "MICROVM_HOST_ROOT": host.root}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(argv, env=environment, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.stderr == "microvm: standard output: No space left on device\n"
    assert done.returncode == 1
    # Nobody reads any more.
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(argv, env=environment, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
    # None at all: the next file that is opened is not taken for it.
    closed = ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *argv]
    done = subprocess.run(closed, env=environment, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_is_not_cut(capfd: pytest.CaptureFixture[str]) -> None:
    """Each sub-command has a first sentence that fits into a line of a terminal."""
    code, out, _ = run(capfd, "--help")
    lines = out[out.index("Commands:") :].splitlines()
    assert code == 0
    assert [line for line in lines if "..." in line or "…" in line] == []
    assert len([line for line in lines if line.endswith(".")]) >= len(COMMANDS)
