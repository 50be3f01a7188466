"""Where everything of a chart stands, for the SVG that the page's template writes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ray_dmml.report.data import Chart

WIDTH, HEIGHT = 480, 270
LEFT, RIGHT, TOP, BOTTOM = 66, 12, 14, 42
"""Margins around the plot, in the units of the SVG."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Stroke:
    """A line of a chart. ``path`` and ``band`` are paths of an SVG."""

    name: str
    style: int
    path: str
    band: str
    dots: tuple[Point, ...]
    """Its points, where they are few enough to be seen one by one."""


@dataclass(frozen=True)
class Drawing:
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    strokes: tuple[Stroke, ...]
    marks: tuple[tuple[float, float, str, str], ...]
    """(x, y, text, ``text-anchor`` of the text)"""

    hover: dict[str, Any]
    """For the script: the names and points of the lines, and the range of both axes."""


MAX_DOTS = 40


def draw(chart: Chart) -> Drawing:
    """Places the axes, ticks and lines of a chart."""
    steps = [step for line in chart.lines for step, _ in line.points]
    values = [value for line in chart.lines for _, value in line.points]
    x_ticks = ticks(min(steps), max(steps), 5, whole=True)
    y_ticks = ticks(0, max(values) or 1, 5) if chart.from_zero else ticks(min(values), max(values), 5)
    first, last = min(steps), max(steps)
    if first == last:
        first, last = first - 1, last + 1
    low, high = y_ticks[0], y_ticks[-1]

    def x(step: float) -> float:
        return round(LEFT + (step - first) / (last - first) * (WIDTH - LEFT - RIGHT), 1)

    def y(value: float) -> float:
        place = (value - low) / (high - low)
        return round(HEIGHT - BOTTOM - min(max(place, 0.0), 1.0) * (HEIGHT - TOP - BOTTOM), 1)

    strokes = tuple(
        Stroke(
            line.name,
            line.style,
            path((x(step), y(value)) for step, value in line.points),
            _band([(x(step), y(top), y(bottom)) for step, bottom, top in line.band]),
            tuple((x(step), y(value)) for step, value in line.points) if len(line.points) <= MAX_DOTS else (),
        )
        for line in chart.lines
    )
    marks = tuple(
        (x(mark.step), y(mark.value), mark.text, "end" if x(mark.step) > WIDTH / 2 else "start") for mark in chart.marks
    )
    hover = {
        "unit": chart.unit,
        "x": [first, last],
        "y": [low, high],
        "lines": [{"name": line.name, "points": [list(point) for point in line.points]} for line in chart.lines],
    }
    return Drawing(
        tuple((x(tick), number(tick)) for tick in x_ticks if first <= tick <= last),
        tuple((y(tick), number(tick)) for tick in y_ticks),
        strokes,
        marks,
        hover,
    )


def ticks(low: float, high: float, count: int, *, whole: bool = False) -> list[float]:
    """Round numbers of which the first is at most ``low`` and the last at least ``high``."""
    if not high > low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    step = _round_step((high - low) / count)
    if whole:
        step = max(1.0, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{n * step:.12g}") for n in range(first, last + 1)]


def number(value: float) -> str:
    """A number on an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.6g}"


def path(points: Iterable[Point]) -> str:
    """The path of a line through the points."""
    return "M" + "L".join(f"{x:g} {y:g}" for x, y in points)


def _band(points: Sequence[tuple[float, float, float]]) -> str:
    """The outline of (x, upper y, lower y)."""
    if not points:
        return ""
    return path([*((x, top) for x, top, _ in points), *((x, bottom) for x, _, bottom in reversed(points))]) + "Z"


def _round_step(step: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least ``step``."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))
