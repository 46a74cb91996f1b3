# SPDX-License-Identifier: MIT
"""`python -m tests.fuzz`: fuzzes, and shows what was found and how to see it again."""

from __future__ import annotations

import argparse
import hashlib
import io
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from . import engine, inputs, worker
from .engine import Report
from .targets import BY_NAME, TARGETS

# So that each process ends after some minutes at most, and all are kept busy to the end.
CHUNK = 20_000


def _pool(jobs: int) -> ProcessPoolExecutor:
    # A hook of audit and a limit of memory last for the rest of a process.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(BY_NAME))
    parser.add_argument("--runs", type=int, default=1_000_000, help="inputs of all targets")
    parser.add_argument("--seed", default="1", help="the same seed gives the same inputs")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seconds", type=float, default=3600, help="of each process at most")
    parser.add_argument("--findings", help="directory for inputs that were not borne")
    parser.add_argument("--grow", action="store_true", help="write the corpus anew")
    options = parser.parse_args()
    unknown = {*options.targets} - {*BY_NAME}
    if unknown:
        parser.error(f"there is no target {', '.join(sorted(unknown))}")
    chosen = [BY_NAME[name] for name in options.targets] or list(TARGETS)
    began = time.monotonic()
    tasks = []
    for target in chosen:
        runs = int(options.runs * target.share / sum(each.share for each in chosen))
        chunks = max(1, -(-runs // CHUNK))
        tasks += [
            (target.name, -(-runs // chunks), f"{options.seed}.{chunk}", options.seconds)
            for chunk in range(chunks)
        ]
    reports = {target.name: Report(target.name) for target in chosen}
    with _pool(options.jobs) as pool:
        for number, report in enumerate(pool.map(worker.chunk, tasks), 1):
            reports[report.target].add(report)
            if sys.stderr.isatty():
                sys.stderr.write(f"\r{number} of {len(tasks)} parts done ")
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
    for report in reports.values():
        print(
            f"{report.target:>12}: {report.runs:9,} inputs, {report.refused:9,} of them refused, "
            f"{len(report.lines):5,} lines of code, {report.runs / report.seconds:7,.0f}/s"
        )
    print(
        f"{'all':>12}: {sum(report.runs for report in reports.values()):9,} inputs in "
        f"{time.monotonic() - began:.0f} s"
    )
    findings = [finding for report in reports.values() for finding in report.findings]
    if findings:
        # A finding may repeat what cannot be printed.
        assert isinstance(sys.stdout, io.TextIOWrapper)
        sys.stdout.reconfigure(errors="backslashreplace")
        directory = options.findings or tempfile.mkdtemp(prefix="microvm-fuzz-")
        for finding in findings:
            path = Path(directory) / finding.target / _file_name(finding.tree)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(inputs.dump(finding.tree))
            print(f"\n{finding.target}: {finding.what} at {finding.where}\n{path}\n{finding.trace}")
        print(f"{len(findings)} findings: put the input of each into {engine.CORPUS}, and mend it")
    elif options.grow:
        for report in reports.values():
            _grow(report, options.jobs)
    return 1 if findings else 0


def _grow(report: Report, jobs: int) -> None:
    """Add inputs that reach lines of code which no kept one reaches, made small."""
    old = engine.kept(BY_NAME[report.target])
    with _pool(jobs) as pool:
        (trees,) = pool.map(worker.least, [(report.target, [*old, *report.found])])
    for tree in trees:
        path = engine.CORPUS / report.target / _file_name(tree)
        if tree not in old:
            path.write_bytes(inputs.dump(tree))
            print(f"kept {path}")


def _file_name(tree: inputs.Tree) -> str:
    return hashlib.sha256(inputs.dump(tree)).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
