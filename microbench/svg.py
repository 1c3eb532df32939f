"""Panels as SVG text, which pages of a repository show without scripts; the same text for the same results."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from blackwell_kernels.microbench.implementations import OURS
from blackwell_kernels.microbench.plots import Panel, Series

COLUMNS, WIDTH, HEIGHT, LINE = 2, 460, 300, 16
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 30, 44


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from the one at or below `low` to the one at or above `high`: powers of ten, or 1, 2, 5 of each."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1.0,) if math.log10(high / low) > 3 else (1.0, 2.0, 5.0)
    every = [step * 10.0**decade for decade in decades for step in steps]
    first = max((i for i, tick in enumerate(every) if tick <= low), default=0)
    last = next((i for i, tick in enumerate(every) if tick >= high), len(every) - 1)
    return every[first : last + 1]


def document(panels: Sequence[Panel]) -> str:
    """One SVG with the panels in two columns, each with its own legend below it."""
    below = LINE * max((len(panel.series) for panel in panels), default=0)
    step = HEIGHT + below
    rows = -(-len(panels) // COLUMNS)
    width, height = WIDTH * min(COLUMNS, max(1, len(panels))), step * rows
    drawn = [
        f'<g transform="translate({WIDTH * (i % COLUMNS)},{step * (i // COLUMNS)})">\n{_panel(panel)}</g>\n'
        for i, panel in enumerate(panels)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{"".join(drawn)}</svg>\n'
    )


def _panel(panel: Panel) -> str:
    xs = [x for series in panel.series for x in series.x]
    ys = [y for series in panel.series for y in series.y]
    if not xs:
        return f'<text x="{LEFT}" y="{TOP}">{escape(panel.title)}: not measured</text>\n'
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM

    def x_at(value: float) -> float:
        return LEFT + (right - LEFT) * _place(value, x_ticks)

    def y_at(value: float) -> float:
        return bottom - (bottom - TOP) * _place(value, y_ticks)

    size = min(11.0, (right - LEFT) / (0.62 * len(panel.title)))  # a bold letter is about that share of its height wide
    parts = [f'<text x="{LEFT}" y="18" font-weight="bold" font-size="{size:.1f}">{escape(panel.title)}</text>']
    for tick in x_ticks:
        x = x_at(tick)
        parts.append(f'<path d="M{x:.1f} {TOP}V{bottom}" stroke="#e0e0e0"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{_number(tick)}</text>')
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e0e0e0"/>')
        parts.append(f'<text x="{LEFT - 4}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 30}" text-anchor="end">{escape(panel.x_title)}</text>')
    parts.append(f'<text x="4" y="16">{escape(panel.y_title)}</text>')
    for i, series in enumerate(panel.series):
        parts += _series(series, [(x_at(x), y_at(y)) for x, y in zip(series.x, series.y, strict=True)])
        y = HEIGHT - 8 + LINE * i
        parts.append(f'<path d="M{LEFT} {y}h22" {_stroke(series)}/>')
        parts.append(f'<text x="{LEFT + 28}" y="{y + 4}">{escape(series.name)}</text>')
    return "\n".join(parts) + "\n"


def _series(series: Series, points: list[tuple[float, float]]) -> list[str]:
    made = []
    if series.lines and points:
        way = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        made.append(f'<path d="M{way}" fill="none" {_stroke(series)}/>')
    if not series.lines or series.spread is not None:
        made += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{series.colour}"/>' for x, y in points]
    return made


def _stroke(series: Series) -> str:
    dashes = ' stroke-dasharray="3 3"' if series.dashed else ""
    return f'stroke="{series.colour}" stroke-width="{2.5 if series.name == OURS else 1.5}"{dashes}'


def _place(value: float, scale: Sequence[float]) -> float:
    """Where a value lies between the first and the last tick, 0 to 1."""
    if scale[0] == scale[-1]:
        return 0.5
    return math.log(value / scale[0]) / math.log(scale[-1] / scale[0])


def _number(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
