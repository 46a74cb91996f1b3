# SPDX-License-Identifier: MIT
"""`make bench`: boots a container host, measures both ways in it by turns, and tells."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.host import container
from tests.host.container import ContainerHost
from tests.host.interface import CommandFailed, HostError
from tests.host.progress import step
from tests.system.toolkit import PROJECT, Toolkit

from . import plain, report, rows

KEPT = PROJECT / "docs"


def main() -> int:
    """Run it; gives the exit code: 0 too where a limit is missed, which the table says."""
    parser = argparse.ArgumentParser(
        prog="make bench", description="Measure the toolkit beside the plain way."
    )
    parser.add_argument(
        "parts",
        nargs="*",
        metavar="PART",
        help=f"these alone, of: {', '.join(rows.PARTS)}; else all but {', '.join(rows.LONG)}",
    )
    parser.add_argument("--suite", default="trixie", help="of the host (default: %(default)s)")
    parser.add_argument(
        "--keep", action="store_true", help="write docs/benchmarks.*; takes all parts, 20 minutes"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    for part in options.parts:
        if part not in rows.PARTS:
            parser.error(f"there is no part {part!r}")
    if options.keep and options.parts:
        parser.error("--keep takes all parts")
    if lack := container.missing():
        print(f"bench: {lack}", file=sys.stderr)
        return 1
    began = time.monotonic()
    load = os.getloadavg()[0]
    try:
        with ContainerHost(options.suite) as host:
            bench = rows.Bench(Toolkit(host))
            with step("installing the toolkit, and the plain way beside it"):
                bench.toolkit.install()
                plain.install(host)
            machine = report.machine(bench.toolkit)
            usual = [part for part in rows.PARTS if options.keep or part not in rows.LONG]
            for part in options.parts or usual:
                try:
                    with step(part):
                        rows.PARTS[part](bench, part)
                except KeyboardInterrupt:
                    # What was measured so far took its time, and is shown.
                    bench.results.notes.append(f"Interrupted in {part}: the rest is not measured.")
                    break
    except (AssertionError, HostError, CommandFailed, subprocess.TimeoutExpired) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    machine["load"] = f"{load:.1f} at the beginning, {os.getloadavg()[0]:.1f} at the end"
    machine["took"] = f"{time.monotonic() - began:.0f} s"
    results = bench.results
    print(report.markdown(machine, results))
    if options.json:
        options.json.write_text(report.as_json(machine, results))
    if options.keep:
        report.keep(KEPT, machine, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
