"""Small charts as inline SVG: axes, lines, dots, bars. Colours are classes of the page's style sheet."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_ABOVE, _BELOW, _LEFT, _RIGHT = 34, 46, 56, 56  # pixels around the plot; above, the legend
_LINE = 18  # pixels between the lines of the legend
_LETTER = 6.8  # pixels: the mean width of one

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """The scale of a chart's side.

    Attributes:
        low, high: its ends.
        ticks: values and what is written there.
        label: what it shows.
        log: logarithmic.
    """

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    label: str = ""
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low and 1 at the high end."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)


def linear(low: float, high: float, label: str = "", *, count: int = 5) -> Axis:
    """An axis with about ``count`` round numbers; where both ends are the same, one unit wide."""
    high = high if high > low else low + 1
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    ticks = [k * step for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return Axis(low, high, [(tick, f"{tick:.6g}") for tick in ticks], label)


def logarithmic(low: float, high: float, label: str = "") -> Axis:
    """An axis of positive numbers that names decades, or where they are less than three 1, 2 and 5 of each, or more."""
    low, high = low / 1.1, high * 1.1
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for subs in ((1,), (1, 2, 5), range(1, 10)):
        ticks = [sub * 10.0**decade for decade in decades for sub in subs if low <= sub * 10.0**decade <= high]
        if len(ticks) > 2:
            return Axis(low, high, [(tick, f"{tick:.6g}") for tick in ticks], label, log=True)
    return Axis(low, high, linear(low, high).ticks, label, log=True)


class Chart:
    """A picture with an x and a y axis, and perhaps a second y axis at its right.

    Args:
        name: what it shows, for those who cannot see it.
        x, y: the axes.
        right: the second y axis.
        width, height: in pixels.
        grid: draw a line at each tick of the y axis.
    """

    def __init__(
        self,
        name: str,
        x: Axis,
        y: Axis,
        *,
        right: Axis | None = None,
        width: int = 640,
        height: int = 340,
        grid: bool = True,
    ) -> None:
        self._name, self._x, self._y, self._right = name, x, y, right
        self._width, self._height = width, height
        self._slanted = any(len(text) * _LETTER > self._room(len(x.ticks)) for _, text in x.ticks)
        self._below = _BELOW + (50 if self._slanted else 0)
        self._parts: list[str] = []
        self._legend: list[tuple[str, str]] = []
        self._axes(grid)

    def legend(self, kind: str, text: str) -> None:
        """Name what is drawn in the colours of ``kind``."""
        self._legend.append((kind, text))

    def line(self, points: Iterable[Point], kind: str, *, right: bool = False) -> None:
        """Draw a line through points."""
        path = "L".join(self._at(x, y, right) for x, y in points)
        if path:
            self._parts.append(f'<path class="line {kind}" d="M{path}"/>')

    def area(self, points: Sequence[Point], kind: str, *, right: bool = False) -> None:
        """Fill what lies between a line through points and the x axis."""
        axis = self._right if right and self._right is not None else self._y
        closed = [(points[0][0], axis.low), *points, (points[-1][0], axis.low)]
        path = "L".join(self._at(x, y, right) for x, y in closed)
        self._parts.append(f'<path class="area {kind}" d="M{path}Z"/>')

    def dots(self, points: Sequence[Point], kind: str, titles: Sequence[str] = ()) -> None:
        """Draw a dot at each point; with titles, each says its own where the pointer rests."""
        if titles:
            for (x, y), title in zip(points, titles, strict=True):
                self._parts.append(
                    f'<path class="dot {kind}" d="M{self._at(x, y)}h0"><title>{html.escape(title)}</title></path>'
                )
        elif points:
            path = "M".join(f"{self._at(x, y)}h0" for x, y in points)
            self._parts.append(f'<path class="dot {kind}" d="M{path}"/>')

    def bar(self, left: float, right: float, bottom: float, top: float, kind: str, title: str) -> None:
        """Draw a rectangle; it says its title where the pointer rests."""
        x0, x1 = (self._horizontal(value) for value in (left, right))
        y0, y1 = (self._vertical(value) for value in (bottom, top))
        self._parts.append(
            f'<rect class="bar {kind}" x="{x0:.1f}" y="{y1:.1f}" width="{x1 - x0:.1f}" height="{y0 - y1:.1f}">'
            f"<title>{html.escape(title)}</title></rect>"
        )

    def text(self, x: float, y: float, text: str, kind: str = "") -> None:
        """Write a text whose middle is at a point."""
        place = f'x="{self._horizontal(x):.1f}" y="{self._vertical(y):.1f}"'
        self._parts.append(f'<text class="middle {kind}" dy=".35em" {place}>{html.escape(text)}</text>')

    def image(self, address: str) -> None:
        """Fill the plot with a picture, each of whose pixels stays a rectangle."""
        x, y, right, bottom = _LEFT, _ABOVE, self._width - _RIGHT, self._height - self._below
        self._parts.append(
            f'<image x="{x}" y="{y}" width="{right - x}" height="{bottom - y}" preserveAspectRatio="none" '
            f'href="{address}"/>'
        )

    def render(self) -> str:
        """The ``<svg>`` element."""
        keys, x, line = [], float(_LEFT), 0
        for kind, text in self._legend:
            wide = 41 + _LETTER * len(text)
            if x > _LEFT and x + wide > self._width:
                x, line = float(_LEFT), line + 1
            keys.append((x, line, kind, text))
            x += wide
        above = _LINE * line  # what the legend needs beyond its usual line
        legend = "".join(
            f'<path class="line key {kind}" d="M{x:.0f} {14 - above + _LINE * line}h18"/>'
            f'<text x="{x + 23:.0f}" y="{18 - above + _LINE * line}">{html.escape(text)}</text>'
            for x, line, kind, text in keys
        )
        return (
            f'<svg viewBox="0 {-above} {self._width} {self._height + above}" role="img" '
            f'aria-label="{html.escape(self._name)}">'
            f"{''.join(self._parts)}{legend}</svg>"
        )

    def _room(self, ticks: int) -> float:
        return (self._width - _LEFT - _RIGHT) / max(1, ticks)

    def _horizontal(self, value: float) -> float:
        return _LEFT + self._x.place(value) * (self._width - _LEFT - _RIGHT)

    def _vertical(self, value: float, right: bool = False) -> float:
        axis = self._right if right and self._right is not None else self._y
        return self._height - self._below - axis.place(value) * (self._height - self._below - _ABOVE)

    def _at(self, x: float, y: float, right: bool = False) -> str:
        return f"{self._horizontal(x):.1f} {self._vertical(y, right):.1f}"

    def _axes(self, grid: bool) -> None:
        left, end = _LEFT, self._width - _RIGHT
        bottom = self._height - self._below
        for value, text in self._y.ticks:
            y = self._vertical(value)
            if grid:
                self._parts.append(f'<path class="grid" d="M{left} {y:.1f}H{end}"/>')
            self._parts.append(f'<text class="end" x="{left - 7}" y="{y:.1f}" dy=".35em">{html.escape(text)}</text>')
        for value, text in self._right.ticks if self._right is not None else ():
            y = self._vertical(value, right=True)
            self._parts.append(f'<text class="second" x="{end + 7}" y="{y:.1f}" dy=".35em">{html.escape(text)}</text>')
        for value, text in self._x.ticks:
            x = self._horizontal(value)
            self._parts.append(f'<path class="grid" d="M{x:.1f} {bottom}v4"/>')
            place = f'x="{x:.1f}" y="{bottom + 17}"'
            if self._slanted:
                place = f'class="end" transform="translate({x + 4:.1f} {bottom + 14}) rotate(-35)"'
            else:
                place = f'class="middle" {place}'
            self._parts.append(f"<text {place}>{html.escape(text)}</text>")
        self._parts.append(f'<path class="axis" d="M{left} {_ABOVE}V{bottom}H{end}"/>')
        middle, height = (left + end) / 2, (_ABOVE + bottom) / 2
        self._parts.append(
            f'<text class="middle" x="{middle:.1f}" y="{self._height - 7}">{html.escape(self._x.label)}</text>'
            f'<text class="middle" transform="translate(13 {height:.1f}) rotate(-90)">'
            f"{html.escape(self._y.label)}</text>"
        )
        if self._right is not None:
            self._parts.append(
                f'<text class="middle second" transform="translate({self._width - 5} {height:.1f}) rotate(-90)">'
                f"{html.escape(self._right.label)}</text>"
            )
