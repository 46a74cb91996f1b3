# SPDX-License-Identifier: MIT
"""`microvm history` says what changed in the words of the declaration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from microvm_host import diff, store
from microvm_host.cli import history
from microvm_host.paths import HostPaths

BEFORE = {
    "mem": 256,
    "kernelParams": ["quiet"],
    "qemu": {"machine": "microvm"},
    "volumes": [{"image": "a.img", "size": 16}, {"image": "b.img", "size": 32}],
    "shares": [{"tag": "x", "source": "/x"}],
}
AFTER = {
    "mem": 512,
    "kernelParams": ["quiet", "debug"],
    "qemu": {"machine": "q35", "guestAgent": True},
    # In another order.
    "volumes": [{"image": "b.img", "size": 64}, {"image": "a.img", "size": 16}],
}


def test_keys_that_changed() -> None:
    assert diff.changed_keys(BEFORE, BEFORE) == []
    assert diff.changed_keys(BEFORE, AFTER) == [
        ("mem", 256, 512),
        ("kernelParams", ["quiet"], ["quiet", "debug"]),
        ("qemu.machine", "microvm", "q35"),
        ("volumes[b.img].size", 32, 64),
        ("shares[x].tag", "x", None),
        ("shares[x].source", "/x", None),
        ("qemu.guestAgent", None, True),
    ]


def test_a_history_is_short(host: HostPaths, capsys: pytest.CaptureFixture[str]) -> None:
    for number in (1, 2, 3):
        package = Path(host.packages, f"{number}" * 32 + "-web")
        (package / "bin").mkdir(parents=True)
        (package / "bin/microvm-run").write_text(f"{min(number, 2)}\n")
        (package / "kernel").write_text(f"{number}\n")
    one, two, three = sorted(map(str, Path(host.packages).iterdir()))
    secret = {"cloudInit": {"users": [{"name": "root", "hashedPassword": "x"}]}}
    store.note("web", one, host, declared={**BEFORE, **secret})
    store.note("web", two, host, declared={**BEFORE, "mem": 512, "vcpu": 2})
    store.note("web", three, host, declared={**BEFORE, "mem": 512, "vcpu": 2})
    # Back to what was built of these keys.
    store.note("web", one, host, instead_of=three)
    history.show("web", host, as_json=False, as_diff=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
    assert lines == [
        "    mem: 256 → 512",
        "    vcpu = 2 (new)",
        "    changed: kernel",
        "    mem: 512 → 256",
        "    vcpu: 2 → gone",
    ]
    history.show("web", host, as_json=False, as_diff=True)
    assert "    -1\n    +2\n" in capsys.readouterr().out
    history.show("web", host, as_json=True, as_diff=False)
    rows = json.loads(capsys.readouterr().out)
    assert rows[0]["keys"] is None
    assert rows[1]["keys"][0] == {"key": "mem", "before": 256, "after": 512}
    # Everybody may read it.
    assert "hashedPassword" not in Path(host.history("web")).read_text()


def test_a_history_of_before_has_no_keys(
    host: HostPaths, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(host.histories).mkdir(parents=True)
    entries = [{"package": f"/gone/{n}-web", "time": n, "instead_of": None} for n in (1, 2)]
    Path(host.history("web")).write_text(json.dumps(entries))
    history.show("web", host, as_json=False, as_diff=False)
    assert len(capsys.readouterr().out.splitlines()) == 2
