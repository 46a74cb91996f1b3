# SPDX-License-Identifier: MIT
"""The house holds: arrows run down only, and what runs at each start imports little.

Arrows are read from the code; imports under `if TYPE_CHECKING` are for type checkers and do not
count. What is really loaded is looked at in a fresh interpreter, called as the helpers are.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.fake_systemd import FakeSystemd

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "microvm_host"

# From the ground up: a module imports only what is in layers below its own.
LAYERS: tuple[set[str], ...] = (
    {"errors", "frozen", "supervised"},
    {
        "names",
        "paths",
        "identity",
        "interpreter",
        "process",
        "record",
        "terminal_text",
        "source",
        "state",
        "sysfs",
        "file_stamp",
        "timespan",
    },
    {
        "bus",
        "image_changes",
        "image_format",
        "interfaces",
        "netlink",
        "leases",
        "log",
        "mounts",
        "pcibus",
        "place",
        "runner",
        "control",
        "trust",
        "users",
    },
    {"attach", "build_record", "declaration", "hostuse", "install_lock", "kvm", "nodes", "pci_lock"}
    | {"mount_units", "package_paths", "pciids"},
    {"build", "guests", "microvm_nix", "plan", "reborn", "service", "store", "systemd", "taken"}
    | {"runstate", "vsock"},
    {"environment"},
    # What changes the host; these do not know of each other.
    {
        "links",
        "pci",
        "shares",
        "hypervisor",
        "aftermath",
        "lostshares",
        "machined",
        "readiness",
        "adopt",
        "guard",
        "handover",
        "images",
        # Into a guest that runs.
        "balloon",
        "console",
        "guestagent",
    },
    {"diff", "install", "listing", "network", "pcilisting"},
    {"apply", "closures", "init", "reconcile", "remove"},
    # Entry points, which nothing imports.
    {"generator", "helper", "cli"},
)
LAYER = {module: number for number, layer in enumerate(LAYERS) for module in layer}
# Third parties, and the only modules that may import them.
KEEPERS = {
    "pystemd": {"systemd"},
    "pyroute2": {"netlink"},
    "click": {"cli"},
    "lxml": set[str](),
    "argparse": set[str](),
    "asyncio": set[str](),
    "dataclasses": set[str](),
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(path: Path) -> str:
    """The part of the house that a file belongs to: `links`, or `cli` for all of cli/."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            for other in node.orelse:
                yield other
                yield from runtime_nodes(other)
            continue
        yield node
        yield from runtime_nodes(node)


def imports(path: Path) -> Iterator[tuple[int, str, str]]:
    """What a file imports: line, module of the toolkit (or ``), module of others (or ``)."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top, _, inner = alias.name.partition(".")
                ours = top == "microvm_host"
                yield node.lineno, inner.split(".")[0] if ours else "", "" if ours else top
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0:
                yield node.lineno, "", (node.module or "").split(".")[0]
            elif node.level == depth + 1:
                found = [node.module] if node.module else [alias.name for alias in node.names]
                for name in found:
                    if (PACKAGE / name.split(".")[0]).is_dir() or (
                        PACKAGE / f"{name.split('.')[0]}.py"
                    ).is_file():
                        yield node.lineno, name.split(".")[0], ""


def test_each_module_has_its_layer() -> None:
    assert {module_of(path) for path in FILES} == {*LAYER, "__init__"}
    assert sum(map(len, LAYERS)) == len(LAYER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_run_down(path: Path) -> None:
    module = module_of(path)
    if module == "__init__":
        assert list(imports(path)) in ([], [(0, "", "__future__")])
        return
    for line, ours, theirs in imports(path):
        if ours and ours != module:
            assert LAYER[ours] < LAYER[module], f"{path}:{line}: {module} must not import {ours}"
        if theirs in KEEPERS:
            assert module in KEEPERS[theirs], f"{path}:{line}: {module} must not import {theirs}"


def test_builders_and_effects_never_meet() -> None:
    effects = next(layer for layer in LAYERS if "links" in layer)
    for path in FILES:
        for line, ours, _ in imports(path):
            assert module_of(path) not in effects or ours != "build", f"{path}:{line}"
            # Nor does what reads packages help those who make them.
            assert module_of(path) != "build" or ours not in (*effects, "runner", "store"), (
                f"{path}:{line}"
            )


def test_ground_imports_nothing() -> None:
    for name in ("errors.py", "frozen.py"):
        found = [each for each in imports(PACKAGE / name) if each[2] != "__future__"]
        assert found == []


def test_nothing_below_an_entry_point_exits() -> None:
    for path in FILES:
        # `process` and `supervised` end processes that they forked themselves.
        if module_of(path) in ("cli", "helper", "process", "supervised", "vsock"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = isinstance(node, ast.Attribute) and ast.unparse(node) in (
                "sys.exit",
                "os._exit",
            )
            raised = isinstance(node, ast.Name) and node.id in ("SystemExit", "exit", "quit")
            assert not named and not raised, f"{path}:{getattr(node, 'lineno', 0)}: exits"


# ---- paths of the host

HOST = ("/bin", "/boot", "/dev", "/etc", "/home", "/proc", "/run", "/sys", "/tmp", "/usr", "/var")


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """The strings of a file that are no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            if isinstance(node.value, bytes):
                yield node.lineno, node.value.decode(errors="replace")
            elif isinstance(node.value, str):
                yield node.lineno, node.value


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_paths_of_the_host_stand_in_one_place(path: Path) -> None:
    if module_of(path) == "paths":
        return
    for line, text in literals(path):
        # At the beginning of a string: a message may tell of /etc, and /share/… is the package's.
        named = [place for place in HOST if text == place or text.startswith(f"{place}/")]
        assert not named, f"{path}:{line}: {text!r} belongs into paths.py"


# ---- what is really loaded

BASE = "import sys; before = set(sys.modules)\n"
REPORT = "import json; print(json.dumps(sorted(set(loaded) - before)))\n"


def loaded(code: str, root: Path, **environment: str) -> set[str]:
    """The modules that code loads in an interpreter that was started as the helpers are."""
    done = subprocess.run(
        [sys.executable, "-B", "-I", "-S", "-c", code],
        env={"PATH": "/usr/bin:/bin", "MICROVM_HOST_ROOT": str(root), **environment},
        capture_output=True,
        text=True,
        cwd=root,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def ours(*names: str) -> set[str]:
    return {"microvm_host", *(f"microvm_host.{name}" for name in names)}


# What each program of the toolkit loads, whatever it does.
GROUND = {
    *("__future__", "_socket"),
    # Built in: `os` of Python 3.13 has it too.
    "errno",
    *("os", "os.path", "posixpath", "genericpath", "stat", "_stat", "_collections_abc", "abc"),
}
ALWAYS = GROUND | ours(
    *("errors", "frozen", "helper", "helper.entry", "helper.outcome", "log", "names", "paths"),
    # By the modules of all verbs.
    *("helper.booted", "record"),
)
BOOTING, SETUP = ours("helper.booting"), ours("helper.setup")
RUNNING = ours("helper.running", "helper.settings", "timespan")
ENDING = ours("helper.ending", "helper.settings", "timespan")
READS = ours("runner")
LINKS = (
    SETUP
    | ours("identity", "interfaces", "interpreter", "links", "netlink", "nodes", "plan", "runner")
    | {
        *ours("sysfs"),
        *("_struct", "fcntl", "struct", "time"),
    }
)
SERVICE = ours("bus", "identity", "service")
# `site` is what knows where the distribution's packages are; the rest stands for pystemd.
SYSTEMD = ours("identity", "interpreter", "process", "systemd") | {
    *("_sitebuiltins", "site", "time"),
    *("pystemd.dbuslib",),
}
PCI = (
    SETUP
    | ours(
        "hostuse",
        "identity",
        "interfaces",
        "nodes",
        "pci",
        "pci_lock",
        "pcibus",
        "plan",
        "process",
        "reborn",
    )
    | {
        *ours("runner", "sysfs"),
        *("_struct", "fcntl", "struct", "time"),
    }
)
AGAIN = (
    SERVICE
    | ours("aftermath", "control", "environment", "helper.again", "helper.settings", "process")
    | ours("timespan", "trust")
    | {"grp", "pwd", "time"}
)
BUDGET: dict[str, set[str]] = {
    "set-booted": BOOTING
    | READS
    | SERVICE
    | ours("mount_units", "mounts", "state", "trust")
    | {"grp", "pwd"},
    "unset-booted": BOOTING,
    "tap-interfaces-up": LINKS,
    "tap-interfaces-down": LINKS,
    "macvtap-interfaces-up": LINKS,
    "macvtap-interfaces-down": LINKS,
    "pci-devices-up": PCI,
    "pci-devices-down": PCI,
    "pci-devices-down-again": PCI,
    "virtiofsd-up": SETUP | READS | SYSTEMD | ours("place", "plan", "shares", "trust"),
    "virtiofsd-down": SETUP | SYSTEMD | ours("place", "plan", "shares", "trust"),
    "start": RUNNING | ours("hypervisor") | {"_signal", "select", "time"},
    # After the start, and for those VMs alone that ask for it.
    "register": READS | SYSTEMD | ours("helper.besides", "machined"),
    "guard": ENDING | SERVICE | ours("guard", "process") | {"_signal", "select", "time"},
    # As root, it asks systemd how long the stop may take.
    "stop": RUNNING | SERVICE | ours("hypervisor") | {"_signal", "select", "time"},
    # Where a start has failed.
    "again": AGAIN,
    "again-over": AGAIN,
    # After the hypervisor has gone.
    "ended": ENDING | SERVICE | ours("aftermath", "control", "process") | {"time"},
}
# Loaded by the importing of extension modules and by `python -c`, whatever the code.
MACHINERY = {"importlib", "importlib._bootstrap", "importlib._bootstrap_external"} | {
    *("importlib.machinery", "_frozen_importlib", "_frozen_importlib_external", "warnings"),
}
GENERATOR = ours(
    *("declaration", "declaration.checks", "declaration.document", "declaration.plain"),
    *("errors", "frozen", "generator", "log", "names", "paths", "source", "timespan", "users"),
)
LISTING = (
    GROUND
    | ours(
        *("cli", "cli.classic", "cli.entry", "cli.table", "errors", "frozen", "identity"),
        *("interpreter", "leases", "listing", "names", "paths", "process", "record", "source"),
        *("state", "systemd"),
    )
    | {"time"}
)
HELP = ours(
    *(
        "cli",
        "cli.classic",
        "cli.commands",
        "cli.entry",
        "cli.group",
        "cli.later",
        "errors",
        "frozen",
    ),
    *("interpreter", "names", "paths", "source"),
)
COSTLY = {"re", "dataclasses", "subprocess", "json", "typing", "inspect", "enum", "signal"} | {
    *("collections", "socket", "pathlib", "contextlib", "click", "pyroute2", "lxml", "logging")
}

FAKE_PYSTEMD = """
class DBusAddress:
    def __init__(self, address, peer_to_peer=False):
        pass

    def open(self):
        pass

    def close(self):
        pass

def apply_signature(signature, values):
    return []
"""
# What systemd says of the VM's service.
SAYS = {
    ("Service", "User"): ("s", str(os.getuid())),
    ("Service", "Group"): ("s", ""),
    ("Service", "SupplementaryGroups"): ("as", []),
    ("Service", "DynamicUser"): ("b", 0),
    ("Service", "TimeoutStartUSec"): ("t", 90_000_000),
    ("Service", "Restart"): ("s", "always"),
    ("Service", "MainPID"): ("u", 0),
    ("Service", "TimeoutStopUSec"): ("t", 105_000_000),
    ("Service", "EnvironmentFiles"): ("a(sb)", []),
    ("Service", "UnsetEnvironment"): ("as", []),
    ("Manager", "Environment"): ("as", []),
    ("Service", "Environment"): ("as", ["MICROVM_RESTART_SECONDS=0.1"]),
    ("Service", "Result"): ("s", "exit-code"),
    ("Service", "ExecMainCode"): ("i", 1),
    ("Service", "ExecMainStatus"): ("i", 1),
    ("Service", "StatusText"): ("s", "it is not there"),
    ("Service", "ExecMainStartTimestampMonotonic"): ("t", 1_000_000),
    ("Service", "ExecMainExitTimestampMonotonic"): ("t", 3_000_000),
    ("Unit", "ActiveEnterTimestampMonotonic"): ("t", 2_000_000),
    ("Unit", "ActiveState"): ("s", "inactive"),
    ("Unit", "StateChangeTimestampMonotonic"): ("t", 2_000_000),
    ("Unit", "InactiveEnterTimestampMonotonic"): ("t", 4_000_000),
    ("Unit", "InactiveExitTimestampMonotonic"): ("t", 4_000_000),
    ("Unit", "Job"): ("(uo)", (0, "/")),
}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    """A host with the VM `web`, whose package has all kinds of files and nothing in them."""
    package, state = tmp_path / "package", tmp_path / "var/lib/microvms/web"
    for directory in (package / "bin", package / "share/microvm/virtiofs", state):
        directory.mkdir(parents=True)
    for program in ("bin/microvm-run", "bin/microvm-shutdown"):
        (package / program).write_text("#!/bin/sh\n")
        (package / program).chmod(0o755)
    for file in ("tap-interfaces", "macvtap-interfaces", "pci-devices"):
        (package / "share/microvm" / file).write_text("")
    (state / "current").symlink_to(package)
    (state / "booted").symlink_to(package)
    record = tmp_path / "run/microvm-host/web/booted"
    record.parent.mkdir(parents=True)
    record.write_text(f"user\tme\t{os.getuid()}\tus\t{os.getgid()}\nhypervisor\tqemu\n")
    (tmp_path / "usr/libexec").mkdir(parents=True)
    (tmp_path / "usr/libexec/virtiofsd").write_text("")
    (tmp_path / "usr/libexec/virtiofsd").chmod(0o755)
    (tmp_path / "lib/pystemd").mkdir(parents=True)
    (tmp_path / "lib/pystemd/dbuslib.py").write_text(FAKE_PYSTEMD)
    # A host that runs nothing.
    (tmp_path / "programs").mkdir()
    (tmp_path / "programs/systemctl").write_text("#!/bin/sh\necho ActiveState=inactive\n")
    (tmp_path / "programs/systemctl").chmod(0o755)
    # Costly, as the real one is: nobody is to load it.
    (tmp_path / "lib/pystemd/__init__.py").write_text("import dataclasses, json\n")
    systemd = FakeSystemd(tmp_path / "run/systemd/private")
    systemd.properties.update(SAYS)
    yield tmp_path
    systemd.close()


def test_budget_names_each_verb_of_a_start_and_a_stop() -> None:
    tree = ast.parse((PACKAGE / "helper/entry.py").read_text())
    verbs = next(
        {ast.literal_eval(key) for key in node.value.keys if key is not None}
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and ast.unparse(node.targets[0]) == "VERBS"
        and isinstance(node.value, ast.Dict)
    )
    # Bringing a package in is no part of a start; a build takes longer than any import.
    assert verbs == {*BUDGET, "install"}


def test_waiting_for_a_guest_imports_little(tmp_path: Path) -> None:
    found = loaded(
        f"{BASE}sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import microvm_host.helper.running, microvm_host.readiness, microvm_host.supervised\n"
        f"loaded = list(sys.modules)\n{REPORT}",
        tmp_path,
    )
    assert not found & COSTLY
    needed = ours("readiness", "supervised") | {"_signal", "select", "time"}
    assert found <= ALWAYS | RUNNING | needed | MACHINERY


@pytest.mark.parametrize("declares", ['runner = "/a/package"\nautostart = true\norder = 3\n', None])
def test_generator_imports_little(declares: str | None, tmp_path: Path) -> None:
    (tmp_path / "etc/microvms").mkdir(parents=True)
    (tmp_path / "output").mkdir()
    if declares is not None:
        (tmp_path / "etc/microvms/web.toml").write_text(f"# A web server.\n{declares}")
    code = f"""{BASE}sys.path.insert(0, {str(REPOSITORY)!r})
from microvm_host import generator
if generator.main(["generator", {str(tmp_path / "output")!r}], "/units"): sys.exit(1)
loaded = list(sys.modules)
{REPORT}"""
    found = loaded(code, tmp_path)
    assert (declares is None) != (tmp_path / "output/microvms.target.wants").exists()
    assert not found & COSTLY
    assert found <= GENERATOR | GROUND | MACHINERY


def test_listing_imports_little(root: Path) -> None:
    code = f"""{BASE}sys.path.insert(0, {str(REPOSITORY)!r})
from microvm_host.cli import entry
if entry.main(["microvm", "-l"]): sys.exit(1)
loaded = list(sys.modules)
{REPORT}"""
    found = loaded(code, root, PATH=f"{root}/programs:/usr/bin:/bin")
    assert not found & COSTLY
    assert found <= LISTING | GROUND | MACHINERY


def test_help_imports_click_and_none_of_what_does_the_work(root: Path) -> None:
    click = pytest.importorskip("click")
    code = f"""{BASE}sys.path[:0] = [{str(REPOSITORY)!r}, {str(Path(click.__file__).parents[1])!r}]
from microvm_host.cli import entry
try:
    entry.main(["microvm", "--help"])
except SystemExit as end:
    if end.code: raise
loaded = list(sys.modules)
{REPORT}"""
    found = {name for name in loaded(code, root) if name.startswith("microvm_host")}
    assert found <= HELP


@pytest.mark.parametrize("verb", BUDGET)
def test_helper_imports_no_more_than_its_verb_needs(verb: str, root: Path) -> None:
    # What takes root, or would replace this process, is put aside; nothing else.
    code = f"""{BASE}
sys.path[:0] = [{str(REPOSITORY)!r}, {str(root / "lib")!r}]
import os
os.fchown = os.chown = os.fchmod = lambda *_, **__: None
class Became(BaseException): pass
def become(*_): raise Became
os.execv = become
def roots(real):
    def told(path, **named):
        status = list(real(path, **named))
        status[4] = 0
        return os.stat_result(status)
    return told
os.lstat, os.stat = roots(os.lstat), roots(os.stat)
from microvm_host.helper import entry
code = 0
try:
    code = entry.main(["helper", {verb!r}, "web"])
except Became:
    pass
loaded = list(sys.modules)
if code: sys.exit(code)
{REPORT}"""
    # A process that is there no more, so that there is nobody to wait for.
    child = os.posix_spawn("/bin/true", ["true"], {})
    os.waitpid(child, 0)
    path = f"{root}/programs:/usr/bin:/bin"
    found = loaded(code, root, MAINPID=str(child), PATH=path)
    assert not found & COSTLY
    assert found <= ALWAYS | BUDGET[verb] | MACHINERY
