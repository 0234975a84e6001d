"""Line charts as inline SVG, drawn without a plotting library; colours come from the page's CSS variables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape

# Names of series that the training loop logs and the report draws in its own way.
SKIPPED = "skipped_steps"
DATA_WAIT = "data_wait"  # share of a step's time spent waiting for data

Point = tuple[float, float]

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 14, 40
MAX_POINTS = 240
COLOURS = 6  # --c1 .. --c6
_SMALLEST, _ALIKE = 1e-200, 1e-12  # a distance, and a relative one, that floats cannot divide into ticks


@dataclass(frozen=True)
class Series:
    """A line, or a level: one value across the whole chart.

    Args:
        points: (x, y); points that are not finite are left out.
        level: a horizontal line at this value instead of points.
        colour: 1..6, to give one thing the same colour in several charts; by default by place.
        dashed: the line's look, which every level has.
    """

    name: str
    points: Sequence[Point] = ()
    level: float | None = None
    colour: int | None = None
    dashed: bool = False

    @property
    def is_dashed(self) -> bool:
        """Return whether the line is drawn dashed."""
        return self.dashed or self.level is not None


def line_chart(series: Sequence[Series], x_label: str, percent: bool = False) -> str:
    """Draw an SVG element with axes, one line per series, and a legend when there is more than one.

    Args:
        percent: y values are shares 0..1, shown as percent.

    Returns:
        The element, or "" when no series has a finite value.
    """
    drawn = [s for s in map(_finite, series) if s.points or s.level is not None]
    drawn = [replace(s, colour=s.colour or number % COLOURS + 1) for number, s in enumerate(drawn)]
    points = [p for s in drawn for p in s.points]
    if not points:
        return ""
    factor = 100.0 if percent else 1.0
    levels = [s.level for s in drawn if s.level is not None]
    x_axis = _Axis([x for x, _ in points], LEFT, WIDTH - RIGHT, whole=True)
    y_axis = _Axis([factor * y for y in [*(y for _, y in points), *levels]], HEIGHT - BOTTOM, TOP)
    lines = [_line(s, x_axis, y_axis, factor) for s in drawn]
    label = escape(f"{', '.join(s.name for s in drawn)}, by {x_label}")
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f"{_grid(x_axis, y_axis, '%' if percent else '')}{''.join(lines)}"
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">'
        f"{escape(x_label)}</text></svg>"
    )
    return svg + (_legend(drawn) if len(drawn) > 1 else "")


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers (1, 2 or 5 times a power of ten apart) from at most ``low`` to at least ``high``."""
    if high - low <= max(_SMALLEST, _ALIKE * max(abs(low), abs(high))):
        pad = abs(low) * 0.1 if abs(low) > _SMALLEST else 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


class _Axis:
    """Maps values to pixels; its ticks enclose every value."""

    def __init__(self, values: Sequence[float], start: float, end: float, whole: bool = False) -> None:
        self.ticks = ticks(min(values), max(values))
        if whole and min(values) < max(values):  # steps: do not stretch the axis beyond the last one
            self.low, self.high = min(values), max(values)
            self.ticks = [t for t in self.ticks if self.low <= t <= self.high]
        else:
            self.low, self.high = self.ticks[0], self.ticks[-1]
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        return self._start + (value - self.low) / (self.high - self.low) * (self._end - self._start)


def _finite(series: Series) -> Series:
    """Return the series without values that are not finite, thinned to what a chart can show."""
    points = [(x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y)]
    level = series.level if series.level is not None and math.isfinite(series.level) else None
    return replace(series, points=_thinned(points), level=level)


def _thinned(points: list[Point]) -> list[Point]:
    """Return at most ``MAX_POINTS``: means of neighbouring points."""
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _grid(x_axis: _Axis, y_axis: _Axis, unit: str) -> str:
    elements = []
    for tick in y_axis.ticks:
        y = y_axis(tick)
        elements.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        elements.append(
            f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_short(tick)}{unit}</text>'
        )
    for tick in x_axis.ticks:
        elements.append(
            f'<text class="tick" x="{x_axis(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">'
            f"{_short(tick)}</text>"
        )
    return "".join(elements)


def _line(series: Series, x_axis: _Axis, y_axis: _Axis, factor: float) -> str:
    dash = ' stroke-dasharray="6 5"' if series.is_dashed else ""
    style = f'class="line" style="stroke:var(--c{series.colour})"{dash}'
    if series.level is not None:
        y = y_axis(factor * series.level)
        return f'<line {style} x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
    places = [(x_axis(x), y_axis(factor * y)) for x, y in series.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    drawn = f'<polyline {style} points="{path}"/>'
    if len(places) > 24:
        return drawn
    # few points: each is marked, with its value for a pointer
    marks = [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" style="fill:var(--c{series.colour})">'
        f"<title>{escape(series.name)}, {_short(at)}: {_short(factor * value)}</title></circle>"
        for (x, y), (at, value) in zip(places, series.points, strict=True)
    ]
    return drawn + "".join(marks)


def _legend(series: Sequence[Series]) -> str:
    entries = []
    for s in series:
        look = f'class="{"dash" if s.is_dashed else "full"}" style="color:var(--c{s.colour})"'
        entries.append(f"<span><i {look}></i>{escape(s.name)}</span>")
    return f'<div class="legend">{"".join(entries)}</div>'


def _short(value: float) -> str:
    """Return few digits: 1200 -> 1,200; 0.30000000000000004 -> 0.3; 0.00002 -> 2e-05."""
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"
