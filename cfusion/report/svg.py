"""A small plot, written as SVG text: axes, lines, steps, bands and points, with a title and a description.

Colours are classes of the page's style sheet, so figures adapt to light mode, dark mode and print. Figures for 100
models take about a second, which a plotting library does not achieve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from cfusion.report.number_words import significant

Point = tuple[float, float]


def number(value: float, digits: int = 1) -> str:
    """Format a coordinate briefly."""
    return f"{value:.{digits}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def shortened(words: str, most: int) -> str:
    """Shorten text to at most `most` letters by cutting the middle."""
    if len(words) <= most:
        return words
    return f"{words[: most * 2 // 3]}…{words[-(most - most * 2 // 3 - 1) :]}"


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return about `about` round values from `low` to `high`."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _tick(value: float) -> str:
    return significant(value, 6)


@dataclass
class Plot:
    """A plot under construction.

    Attributes:
        x: Range of the horizontal axis.
        y: Range of the vertical axis.
        width: In CSS px.
        height: In CSS px.
        margins: Left, top, right, bottom, in px.
    """

    x: tuple[float, float]
    y: tuple[float, float]
    width: float = 380
    height: float = 260
    margins: tuple[float, float, float, float] = (46, 12, 14, 40)
    parts: list[str] = field(default_factory=list)

    def px(self, value: float) -> float:
        """Return the horizontal position of a value."""
        left, _, right, _ = self.margins
        return left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (self.width - left - right)

    def py(self, value: float) -> float:
        """Return the vertical position of a value."""
        _, top, _, bottom = self.margins
        return self.height - bottom - (value - self.y[0]) / (self.y[1] - self.y[0]) * (self.height - top - bottom)

    def add(self, part: str) -> None:
        """Append unmodified SVG text."""
        self.parts.append(part)

    def text(self, x: float, y: float, words: str, css: str = "tick", anchor: str = "middle", extra: str = "") -> None:
        """Add text at a position in px."""
        self.add(
            f'<text x="{number(x)}" y="{number(y)}" class="{css}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'
        )

    def segment(self, start: Point, end: Point, css: str) -> None:
        """Add a straight line between two values."""
        (x1, y1), (x2, y2) = ((self.px(x), self.py(y)) for x, y in (start, end))
        self.add(f'<path class="{css}" d="M{number(x1)} {number(y1)}L{number(x2)} {number(y2)}"/>')

    def axes(
        self, x_label: str, y_label: str, *, x_ticks: Sequence[float] | None = None,
        x_format: Callable[[float], str] = _tick, y_format: Callable[[float], str] = _tick,
    ) -> None:  # fmt: skip
        """Add ticks, labels and a light horizontal grid."""
        for tick in nice_ticks(*self.y):
            self.segment((self.x[0], tick), (self.x[1], tick), "grid")
            self.text(self.margins[0] - 6, self.py(tick) + 3.5, y_format(tick), anchor="end")
        self.segment((self.x[0], self.y[0]), (self.x[1], self.y[0]), "axis")
        base = self.height - self.margins[3]
        for tick in x_ticks if x_ticks is not None else nice_ticks(*self.x):
            self.add(f'<path class="axis" d="M{number(self.px(tick))} {number(base)}v4"/>')
            self.text(self.px(tick), base + 16, x_format(tick))
        middle = (self.px(self.x[0]) + self.px(self.x[1])) / 2
        self.text(middle, base + 32, x_label, "label")
        centre = (self.py(self.y[0]) + self.py(self.y[1])) / 2
        self.text(10, centre, y_label, "label", extra=f' transform="rotate(-90 10 {number(centre)})"')

    def line(self, points: Iterable[Point], css: str) -> None:
        """Add a line through points; it breaks at NaN."""
        commands, pen_up = [], True
        for x, y in points:
            if math.isnan(x) or math.isnan(y):
                pen_up = True
                continue
            commands.append(f"{'M' if pen_up else 'L'}{number(self.px(x))} {number(self.py(y))}")
            pen_up = False
        if commands:
            self.add(f'<path class="{css}" d="{"".join(commands)}"/>')

    def steps(self, x: Sequence[float], y: Sequence[float], css: str) -> None:
        """Add a right-continuous step function."""
        commands = [f"M{number(self.px(x[0]))} {number(self.py(y[0]))}"]
        commands += [f"H{number(self.px(a))}V{number(self.py(b))}" for a, b in zip(x[1:], y[1:], strict=True)]
        self.add(f'<path class="{css}" d="{"".join(commands)}"/>')

    def step_band(self, x: Sequence[float], low: Sequence[float], high: Sequence[float], css: str) -> None:
        """Add the area between two step functions."""
        upper = [f"M{number(self.px(x[0]))} {number(self.py(high[0]))}"]
        upper += [f"H{number(self.px(a))}V{number(self.py(b))}" for a, b in zip(x[1:], high[1:], strict=True)]
        lower = [f"V{number(self.py(low[-1]))}"]
        lower += [f"H{number(self.px(x[i]))}V{number(self.py(low[i - 1]))}" for i in range(len(x) - 1, 0, -1)]
        self.add(f'<path class="{css}" d="{"".join(upper + lower)}Z"/>')

    def dot(self, x: float, y: float, css: str, radius: float = 3.5, tip: str = "") -> None:
        """Add a point; `tip` is shown when the pointer is over it."""
        title = f"<title>{escape(tip)}</title>" if tip else ""
        self.add(
            f'<circle class="{css}" cx="{number(self.px(x))}" cy="{number(self.py(y))}" r="{radius:g}">{title}</circle>'
        )

    def finish(self, title: str, description: str) -> str:
        """Return the complete figure with its title and text alternative."""
        return (
            f'<svg viewBox="0 0 {self.width:g} {number(self.height)}" role="img" class="plot" '
            f'style="min-width:{self.width * 0.8:g}px;max-width:{self.width * 1.25:g}px" '
            f'aria-label="{escape(f"{title}. {description}", quote=True)}">'
            f"<title>{escape(title)}</title><desc>{escape(description)}</desc>{''.join(self.parts)}</svg>"
        )
