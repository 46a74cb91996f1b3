# SPDX-License-Identifier: MIT
"""VMs from a flake, built by Debian's own nix from nothing but what stands in the flake."""

from __future__ import annotations

import pytest

from .toolkit import Toolkit

pytestmark = [pytest.mark.container, pytest.mark.core]

# A flake without inputs: its package is a stub, written by the shell alone, since the builder
# has no coreutils.
FLAKE = """\
{
  outputs = { self }: {
    nixosConfigurations."@VM@".config.microvm.declaredRunner = derivation {
      name = "microvm-stub-@VM@";
      system = "x86_64-linux";
      builder = "/bin/sh";
      args = [ "-c" ''
        PATH=/usr/bin:/bin
        mkdir -p $out/bin $out/share/microvm
        printf '#!/bin/sh\\nexec sleep infinity\\n' >$out/bin/microvm-run
        printf '#!/bin/sh\\nkill $MAINPID\\n' >$out/bin/microvm-shutdown
        chmod +x $out/bin/microvm-run $out/bin/microvm-shutdown
        ln -s /nix/store/00000000000000000000000000000000-nixos-system-@VM@-@VERSION@ \\
          $out/share/microvm/system
        @MORE@
      '' ];
    };
  };
}
"""


def write_flake(toolkit: Toolkit, vm: str, version: str, more: str = "true") -> None:
    text = FLAKE.replace("@VM@", vm).replace("@VERSION@", version).replace("@MORE@", more)
    toolkit.host.write(f"/opt/flakes/{vm}/flake.nix", text)


@pytest.fixture
def nix(toolkit: Toolkit) -> Toolkit:
    """The host, with nix set up for one user and no network."""
    toolkit.host.write(
        "/etc/nix/nix.conf",
        "sandbox = false\nbuild-users-group =\nsubstituters =\nflake-registry =\n",
    )
    return toolkit


def test_create_and_update_from_a_flake(nix: Toolkit, vm: str) -> None:
    flake, state = f"path:/opt/flakes/{vm}", f"/var/lib/microvms/{vm}"
    write_flake(nix, vm, "24.05")
    nix.host.run(["microvm", "-f", flake, "-c", vm], timeout=120)
    first = nix.sh(f"readlink {state}/current").strip()
    assert first.startswith("/nix/store/")
    assert nix.host.read(f"{state}/flake") == f"{flake}\n"
    roots = "/nix/var/nix/gcroots/microvm"
    assert nix.sh(f"readlink {roots}/{vm} {roots}/booted-{vm}").split() == [
        f"{state}/current",
        f"{state}/booted",
    ]
    nix.sh("nix-collect-garbage 2>&1", timeout=120)
    assert nix.host.exists(f"{first}/bin/microvm-run")
    nix.host.run(["microvm", "start", vm])
    assert nix.sh(f"microvm -l {vm}") == f"{vm}: current(24.05)\n"

    # What does not build, or builds to something else, leaves what there is.
    for more in ("exit 1", "rm $out/bin/microvm-run"):
        write_flake(nix, vm, "24.11", more)
        failed = nix.host.run(["microvm", "update", vm], check=False, timeout=120)
        assert failed.returncode in (1, 78)
        assert nix.sh(f"readlink {state}/current").strip() == first
        assert not nix.host.exists(f"{state}/.build")

    write_flake(nix, vm, "25.05")
    # The plain listing starts no nix and so knows nothing of it; --check asks.
    assert nix.sh(f"microvm -l {vm}") == f"{vm}: current(24.05)\n"
    assert "outdated" in nix.sh(f"microvm -l --check {vm} 2>/dev/null", timeout=120)
    nix.host.run(["microvm", "update", vm], timeout=120)
    assert nix.sh(f"microvm -l {vm}") == (
        f"{vm}: stale(24.05), reboot(25.05): systemctl restart microvm@{vm}.service\n"
    )
    # The running version is kept too, by its own root.
    nix.sh("nix-collect-garbage 2>&1", timeout=120)
    assert nix.host.exists(f"{first}/bin/microvm-run")
    nix.host.run(["microvm", "-Ru", vm], timeout=120)
    assert nix.sh(f"microvm -l {vm}") == f"{vm}: current(25.05)\n"
    nix.host.run(["microvm", "stop", vm])
    nix.host.run(["microvm", "remove", "-y", vm])
    assert nix.sh(f"ls {roots}").split() == []


def test_a_flake_that_does_not_build_leaves_no_vm(nix: Toolkit, vm: str) -> None:
    write_flake(nix, vm, "1", "exit 1")
    failed = nix.host.run(
        ["microvm", "create", vm, "--flake", f"path:/opt/flakes/{vm}"], check=False, timeout=120
    )
    assert failed.returncode == 1
    assert f"nix could not build path:/opt/flakes/{vm}" in failed.stderr
    assert not nix.host.exists(f"/var/lib/microvms/{vm}")


def test_without_nix_the_error_says_so(toolkit: Toolkit, vm: str) -> None:
    failed = toolkit.host.run(
        ["env", "PATH=/opt/nowhere:/usr/local/bin", "/usr/local/bin/microvm", "create", vm]
        + ["--flake", "path:/x"],
        check=False,
    )
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
    assert not toolkit.host.exists(f"/var/lib/microvms/{vm}")
