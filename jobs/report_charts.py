"""Shapes of charts: numbers in, paths and bars in a box of 1000 by 100 out, for the page to label."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 1000, 100
_TICKS = 4


@dataclass(frozen=True, slots=True)
class Tick:
    """A round value on the vertical axis, and how high it is, in percent of the chart."""

    value: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A column: where it begins, how wide and how high it is."""

    x: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart's ticks and shapes: an ``outline``, and what it encloses, as SVG paths, or ``bars``."""

    ticks: tuple[Tick, ...]
    outline: str = ""
    filled: str = ""
    bars: tuple[Bar, ...] = ()


def area(values: Sequence[float]) -> Chart:
    """Values in the middle of equal spans, joined by lines."""
    ticks, top = axis(max(values))
    width = WIDTH / len(values)
    points = [(width * (place + 0.5), _y(value, top)) for place, value in enumerate(values)]
    points = [(0.0, points[0][1]), *points, (float(WIDTH), points[-1][1])]
    return _enclosed(points, ticks)


def steps(values: Sequence[float]) -> Chart:
    """Values that hold for a span each."""
    ticks, top = axis(max(values))
    width = WIDTH / len(values)
    points = []
    for place, value in enumerate(values):
        points += [(width * place, _y(value, top)), (width * (place + 1), _y(value, top))]
    return _enclosed(points, ticks)


def columns(values: Sequence[float]) -> Chart:
    """A bar for each value, with a gap between them where there is room for one."""
    ticks, top = axis(max(values))
    width = WIDTH / len(values)
    gap = min(width * 0.2, 6.0)
    bars = tuple(
        Bar(round(width * place + gap / 2, 2), round(width - gap, 2), round(HEIGHT * value / top, 2))
        for place, value in enumerate(values)
    )
    return Chart(ticks, bars=bars)


def axis(highest: float) -> tuple[tuple[Tick, ...], float]:
    """Ticks at round values from 0 to the first that is not below ``highest``, and that one's value."""
    if highest <= 0:
        return (Tick(0.0, 0.0), Tick(1.0, 100.0)), 1.0
    power = 1.0
    while power * _TICKS < highest:
        power *= 10
    while power * _TICKS >= highest * 10:
        power /= 10
    step = next(
        power * factor / 10 for factor in (1, 2, 2.5, 5, 10) if power * factor / 10 * _TICKS >= highest
    )
    number = next(count for count in range(1, _TICKS + 1) if step * count >= highest * (1 - 1e-12))
    top = step * number
    return tuple(Tick(step * count, 100 * count / number) for count in range(number + 1)), top


def _y(value: float, top: float) -> float:
    return HEIGHT * (1 - value / top)


def _enclosed(points: Sequence[tuple[float, float]], ticks: tuple[Tick, ...]) -> Chart:
    outline = "M" + " L".join(f"{x:.1f},{y:.2f}" for x, y in points)
    return Chart(ticks, outline, f"{outline} L{WIDTH},{HEIGHT} L0,{HEIGHT} Z")
