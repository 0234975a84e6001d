"""The curves of ``pairs_budget.py`` as an SVG file: R-sum against K on a logarithmic axis, a panel per student."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lavis_dcd.reporting.charts import ticks

Point = tuple[int, float, float | None]  # K, R-sum, its standard deviation over seeds


@dataclass(frozen=True)
class Curve:
    """One strategy: its points by ascending K."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Panel:
    """One student.

    Args:
        detail: second line of the title.
        levels: a name -> an R-sum that does not depend on K.
    """

    title: str
    detail: str
    curves: Sequence[Curve]
    levels: Mapping[str, float]


_PLOT_WIDTH, _PLOT_HEIGHT = 252, 260
_LEFT, _TOP, _BETWEEN, _RIGHT, _BOTTOM = 60, 136, 56, 30, 66
_LEAST_SPAN = 24.0  # of R-sum: what seeds move fills no axis
_APART = 3.0  # pixels between the error bars of neighbouring curves
# colour and mark, which tell curves apart in print too
_LOOKS = {
    "stratified": ("#1f6fb2", "circle"),
    "mixed": ("#8b6bb8", "square"),
    "hardest": ("#c2571a", "triangle"),
    "random": ("#66737f", "diamond"),
    "stratified, reweighted": ("#2f8f55", "square"),
}
_LEVELS = {"all pairs": "7 4", "teacher": "1.5 4"}
_STYLE = """
    text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif }
    .title { font-size: 16px; font-weight: 650; fill: #1d2733 }
    .head { font-size: 13px; font-weight: 600; fill: #1d2733 }
    .text { font-size: 12.5px; fill: #46535f }
    .tick { font-size: 11.5px; fill: #66737f }
    .grid { stroke: #e3e8ee }
    .axis { stroke: #9aa5b1 }
    .level { stroke: #46535f; stroke-width: 1.3; fill: none }
"""


def draw(panels: Sequence[Panel], path: Path, title: str = "R-sum by the pairs that a student pays for") -> None:
    """Write the figure.

    Args:
        panels: from the left; those without a point are left out.
    """
    shown = [panel for panel in panels if any(curve.points for curve in panel.curves)]
    width = _LEFT + len(shown) * (_PLOT_WIDTH + _BETWEEN) - _BETWEEN + _RIGHT
    width, height = max(width, 640), _TOP + _PLOT_HEIGHT + _BOTTOM
    names = list(dict.fromkeys(curve.name for panel in shown for curve in panel.curves))
    names.sort(key=list(_LOOKS).index)
    levels = [name for name in _LEVELS if any(name in panel.levels for panel in shown)]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img"><title>{escape(title)}</title><style>{_STYLE}</style>',
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="14" fill="#f6f8fb" stroke="#dde3ea"/>',
        f'<text class="title" x="24" y="34">{escape(title)}</text>',
        _legend(names, levels),
    ]
    for number, panel in enumerate(shown):
        parts += _drawn(panel, _LEFT + number * (_PLOT_WIDTH + _BETWEEN), names)
    path.write_text("\n".join([*parts, "</svg>"]) + "\n", encoding="utf-8")


def _legend(names: Sequence[str], levels: Sequence[str]) -> str:
    parts, x, y = [], 24.0, 62
    for name in names:
        colour, _ = _LOOKS[name]
        parts.append(f'<line x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>')
        parts.append(_mark(name, x + 13, y))
        parts.append(f'<text class="text" x="{x + 33}" y="{y + 4}">{escape(name)}</text>')
        x += 33 + 6.6 * len(name) + 22
    for name in levels:
        parts.append(
            f'<line class="level" x1="{x}" x2="{x + 26}" y1="{y}" y2="{y}" stroke-dasharray="{_LEVELS[name]}"/>'
        )
        parts.append(f'<text class="text" x="{x + 33}" y="{y + 4}">{escape(name)}</text>')
        x += 33 + 6.6 * len(name) + 22
    return "".join(parts)


def _drawn(panel: Panel, left: float, names: Sequence[str]) -> list[str]:
    points = [point for curve in panel.curves for point in curve.points]
    counts = sorted({count for count, _, _ in points})
    ends = [value + sign * (spread or 0) for _, value, spread in points for sign in (-1, 1)]
    low, high = min([*ends, *panel.levels.values()]), max([*ends, *panel.levels.values()])
    pad = max(0.04 * (high - low), (_LEAST_SPAN - (high - low)) / 2)
    low, high = low - pad, high + pad
    marks = [mark for mark in ticks(low, high, about=7) if low <= mark <= high]
    x_of = _scale(math.log2(counts[0]), math.log2(counts[-1]), left + 18, left + _PLOT_WIDTH - 18)
    y_of = _scale(low, high, _TOP + _PLOT_HEIGHT, _TOP)
    bottom, right = _TOP + _PLOT_HEIGHT, left + _PLOT_WIDTH
    parts = [
        f'<text class="head" x="{left}" y="{_TOP - 34}">{escape(panel.title)}</text>',
        f'<text class="text" x="{left}" y="{_TOP - 16}">{escape(panel.detail)}</text>',
    ]
    for mark in marks:
        y = y_of(mark)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:g}</text>')
    parts.append(f'<line class="axis" x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    for count in counts:
        x = x_of(math.log2(count))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{bottom}" y2="{bottom + 5}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 19}" text-anchor="middle">{count}</text>')
    middle = left + _PLOT_WIDTH / 2
    parts.append(
        f'<text class="text" x="{middle}" y="{bottom + 42}" text-anchor="middle">candidates per query, K</text>'
    )
    for name, value in panel.levels.items():
        y = y_of(value)
        parts.append(
            f'<line class="level" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke-dasharray="{_LEVELS[name]}"><title>{escape(name)}: {value:.1f}</title></line>'
        )
    # the first of the legend is drawn last, above the others
    for curve in sorted(panel.curves, key=lambda curve: -names.index(curve.name)):
        shift = _APART * (names.index(curve.name) - (len(names) - 1) / 2)
        parts += _curve(curve, x_of, y_of, shift)
    return parts


def _curve(curve: Curve, x_of: Callable[[float], float], y_of: Callable[[float], float], shift: float) -> list[str]:
    colour, _ = _LOOKS[curve.name]
    places = [(x_of(math.log2(count)) + shift, y_of(value)) for count, value, _ in curve.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']
    for (x, y), (count, value, spread) in zip(places, curve.points, strict=True):
        if spread:
            high, low = y_of(value + spread), y_of(value - spread)
            bar = f"M{x - 3.5:.1f} {high:.1f}h7m-3.5 0V{low:.1f}m-3.5 0h7"
            parts.append(f'<path d="{bar}" fill="none" stroke="{colour}" stroke-width="1.3"/>')
        plus_minus = f" ± {spread:.1f}" if spread else ""
        parts.append(_mark(curve.name, x, y, f"{curve.name}, K {count}: {value:.1f}{plus_minus}"))
    return parts


def _mark(name: str, x: float, y: float, words: str = "") -> str:
    colour, shape = _LOOKS[name]
    title = f"<title>{escape(words)}</title>" if words else ""
    look = f'fill="{colour}" stroke="#f6f8fb" stroke-width="1.2"'
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.2" {look}>{title}</circle>'
    paths = {"square": "m-4-4h8v8h-8z", "triangle": "m0-5.2 5 9h-10z", "diamond": "m0-5.4 5.4 5.4-5.4 5.4-5.4-5.4z"}
    return f'<path d="M{x:.1f} {y:.1f}{paths[shape]}" {look}>{title}</path>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    if low == high:
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)
