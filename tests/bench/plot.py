# SPDX-License-Identifier: MIT
"""Draws the figures as SVG: each ratio with its limit, and what grows with the number of VMs."""

from __future__ import annotations

from math import ceil, floor, log10
from xml.sax.saxutils import escape

from .rows import Growth, Results, Row

WIDTH = 860
_LEFT, _RIGHT, _LINE = 330, 110, 26
_TOOLKIT, _PLAIN, _LIMIT = "#2563ab", "#c2571a", "#333333"
_PANEL, _GAP, _PANEL_HEIGHT = 240, 50, 170


def plot(results: Results) -> str:
    """Both halves, one above the other."""
    ratios, height = _ratios([row for row in results.rows if row.plain and row.limit])
    growth, more = _growth(results.growth, height)
    height += more
    return (
        "<!-- SPDX-License-Identifier: MIT -->\n"
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">\n'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
        + "\n".join([*ratios, *growth])
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, *, anchor: str = "start", bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )


def _ratios(rows: list[Row]) -> tuple[list[str], int]:
    """A bar for each ratio, from 1 to the left where the toolkit is faster; a tick is its limit."""
    if not rows:
        return [], 0
    drawn = [_text(10, 22, "toolkit : plain way, and the limit (black)", bold=True)]
    values = [value for row in rows for value in (row.figure, row.limit)]
    low, high = floor(log10(min(values))), ceil(log10(max(*values, 1.0)) + 0.01)
    right = WIDTH - _RIGHT

    def x(value: float) -> float:
        return _LEFT + (right - _LEFT) * (log10(value) - low) / (high - low)

    top, bottom = 50, 50 + _LINE * len(rows)
    for power in range(low, high + 1):
        drawn.append(_line(x(10.0**power), top - 8, x(10.0**power), bottom, "#dddddd"))
        drawn.append(_text(x(10.0**power), top - 12, f"{10.0**power:g}", anchor="middle"))
    for number, row in enumerate(rows):
        y = top + number * _LINE
        left, end = sorted((x(row.figure), x(1)))
        colour = _TOOLKIT if row.holds else _PLAIN
        drawn.append(_text(_LEFT - 8, y + 14, row.work, anchor="end"))
        drawn.append(
            f'<rect x="{left:.1f}" y="{y + 4}" width="{max(end - left, 1):.1f}" height="14" '
            f'fill="{colour}"/>'
        )
        drawn.append(_line(x(row.limit), y + 1, x(row.limit), y + 21, _LIMIT, 2))
        drawn.append(_text(right + 12, y + 15, f"{row.figure:.3g}"))
    return drawn, bottom + 20


def _growth(growth: list[Growth], top: int) -> tuple[list[str], int]:
    """A panel for each kind of work, both axes logarithmic."""
    works = list(dict.fromkeys(each.work for each in growth if each.unit == "ms"))
    if not works:
        return [], 0
    drawn = [
        _text(10, top + 22, "milliseconds at a number of VMs:", bold=True),
        f'<g fill="{_TOOLKIT}">{_text(240, top + 22, "toolkit", bold=True)}</g>',
        f'<g fill="{_PLAIN}">{_text(300, top + 22, "plain way", bold=True)}</g>',
    ]
    for number, work in enumerate(works):
        left = 60 + number % 3 * (_PANEL + _GAP - 25)
        upper = top + 60 + number // 3 * (_PANEL_HEIGHT + _GAP)
        drawn += _panel(work, [each for each in growth if each.work == work], left, upper)
    return drawn, 60 + ceil(len(works) / 3) * (_PANEL_HEIGHT + _GAP)


def _panel(work: str, growth: list[Growth], left: float, upper: float) -> list[str]:
    values = [each.toolkit.median for each in growth]
    values += [each.plain.median for each in growth if each.plain]
    low, high = floor(log10(min(values))), ceil(log10(max(values)) + 0.01)
    most = max(1.0, log10(max(each.count for each in growth)))

    def place(count: int, value: float) -> tuple[float, float]:
        x = left + _PANEL * 0.9 * log10(count) / most
        return x, upper + _PANEL_HEIGHT * (high - log10(value)) / (high - low)

    drawn = [_text(left, upper - 8, work, bold=True)]
    for power in range(low, high + 1):
        x, y = place(1, 10.0**power)
        drawn.append(_line(x, y, x + _PANEL * 0.9, y, "#dddddd"))
        drawn.append(_text(x - 4, y + 4, f"{10.0**power:g}", anchor="end"))
    for each in growth:
        x, _ = place(each.count, 10.0**low)
        drawn.append(_text(x, upper + _PANEL_HEIGHT + 15, f"{each.count}", anchor="middle"))
    for colour, points in (
        (_PLAIN, [place(each.count, each.plain.median) for each in growth if each.plain]),
        (_TOOLKIT, [place(each.count, each.toolkit.median) for each in growth]),
    ):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        drawn.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return drawn
