# SPDX-License-Identifier: MIT
"""The figures as a table, as JSON and as a plot, and kept in docs/ when that is asked for."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.system.toolkit import Toolkit

from .plot import plot
from .rows import Figures, Growth, Results, Row

# What stands between these in docs/benchmarks.md is written by `make bench BENCH=--keep`.
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def machine(toolkit: Toolkit) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "day": datetime.date.today().isoformat(),
        "suite": toolkit.host.suite,
        "systemd": toolkit.sh("systemctl --version").split()[1],
        "python": toolkit.sh("python3 --version").split()[1],
        "processors": os.cpu_count(),
        "instructions": "counted" if _counts_instructions() else "not available on this machine",
    }


def _counts_instructions() -> bool:
    argv = ["perf", "stat", "-x,", "-e", "instructions", "true"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True)
    except FileNotFoundError:
        return False
    return done.returncode == 0 and "<not" not in done.stderr


def markdown(machine: dict[str, Any], results: Results) -> str:
    """The tables, for people."""
    lines = [
        f"Debian {machine['suite']}, systemd {machine['systemd']}, Python {machine['python']}, "
        f"{machine['processors']} processors, load {machine['load']}, {machine['day']}, "
        f"in {machine['took']}. Instructions: {machine['instructions']}.",
        "",
    ]
    if results.rows:
        lines += [
            "| work | toolkit | plain | ratio (of the best) | at most | | CPU, toolkit : plain |",
            "|---|---|---|---|---|---|---|",
            *map(_line, results.rows),
            "",
            "Medians, quartiles in brackets. CPU is for the whole round, stop included.",
            "",
        ]
    if results.growth:
        counts = sorted({each.count for each in results.growth})
        lines += [
            f"| work (toolkit / plain) | {' | '.join(f'{count} VMs' for count in counts)} |",
            "|---|" + "---|" * len(counts),
        ]
        for work in dict.fromkeys(each.work for each in results.growth):
            found = {each.count: each for each in results.growth if each.work == work}
            cells = [
                _growth(found[count]) if count in found else "not measured" for count in counts
            ]
            lines.append(f"| {work} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"- {note}" for note in results.notes]
    return "\n".join(lines).rstrip() + "\n"


def _growth(each: Growth) -> str:
    plain = _number(each.plain.median) if each.plain else "–"
    return f"{_number(each.toolkit.median)} / {plain} {each.unit}"


def _line(row: Row) -> str:
    if row.plain is None:
        ratio = f"{_number(row.figure)} {row.unit} ({_number(row.best)})"
        plain, limit = "–", f"{row.limit:g} {row.unit}"
    else:
        ratio = f"{row.figure:.3g} ({row.best:.3g})"
        plain, limit = _cell(row.plain, row.unit), f"{row.limit:g}"
    cpu = ""
    if row.toolkit.cpu is not None:
        cpu = f"{_number(row.toolkit.cpu)}"
        if row.plain is not None and row.plain.cpu is not None:
            cpu += f" : {_number(row.plain.cpu)}"
        cpu += " ms"
    verdict = "holds" if row.holds else "**missed**"
    work = row.work if row.beside == "plain" else f"{row.work} : `{row.beside}`"
    cells = (work, _cell(row.toolkit, row.unit), plain, ratio, limit, verdict, cpu)
    return f"| {' | '.join(cells)} |"


def _cell(figures: Figures, unit: str) -> str:
    low, high = figures.quartiles
    spread = f" [{_number(low)}–{_number(high)}]" if len(figures.samples) > 1 else ""
    return f"{_number(figures.median)} {unit}{spread}"


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) < 10 and value else f"{value:,.0f}"


def as_json(machine: dict[str, Any], results: Results) -> str:
    """All samples, for machines."""

    def figures(given: Figures | None) -> dict[str, Any] | None:
        if given is None:
            return None
        low, high = given.quartiles
        return {
            "median": round(given.median, 2),
            "quartiles": [round(low, 2), round(high, 2)],
            "cpu": None if given.cpu is None else round(given.cpu, 2),
            "samples": [round(sample, 2) for sample in given.samples],
        }

    whole = {
        "machine": machine,
        "rows": [
            {
                "part": row.part,
                "work": row.work,
                "unit": row.unit,
                "toolkit": figures(row.toolkit),
                "plain": figures(row.plain),
                "beside": row.beside,
                "figure": round(row.figure, 4),
                "figure_of_best": round(row.best, 4),
                "limit": row.limit,
                "holds": row.holds,
            }
            for row in results.rows
        ],
        "growth": [
            {
                "work": each.work,
                "count": each.count,
                "unit": each.unit,
                "toolkit": figures(each.toolkit),
                "plain": figures(each.plain),
            }
            for each in results.growth
        ],
        "notes": results.notes,
    }
    return json.dumps(whole, indent=1) + "\n"


def keep(directory: Path, machine: dict[str, Any], results: Results) -> None:
    """Write table, JSON and plot; what else stands in the page stays."""
    page = directory / "benchmarks.md"
    text = page.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{markdown(machine, results)}{END}{after}")
    (directory / "benchmarks.json").write_text(as_json(machine, results))
    (directory / "benchmarks.svg").write_text(plot(results))
