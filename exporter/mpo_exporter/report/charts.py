"""Scales, ticks and axes: what all plots draw on. Coordinates are in units of the view box, about a pixel each."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpo_exporter.report.markup import Child, Markup, element

# A gap between labels below which one would touch the other.
CHARACTER = 6.2


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values from `low` … `high` to places from `start` … `end`, by their logarithm where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; values beyond an end are put there."""
        low, high, at = (
            (math.log(self.low), math.log(self.high), math.log(max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the scale, at most about `most`."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two values."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (factor * step) <= most)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten between two values, with 2 and 5 times them, or all nine, where there is room for more."""
    choices = ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0))
    found: list[float] = []
    for digits in choices:
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
        row = [digit * 10.0**power for power in powers for digit in digits]
        row = [value for value in row if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if found and len(row) > most:
            break
        found = row
    step = math.ceil(len(found) / most) if found else 1
    return found[::step]


def padded(values: list[float], *, log: bool, share: float = 0.08) -> tuple[float, float]:
    """The range of values with some room around them."""
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** share, 1.12)
        return low / factor, high * factor
    room = max((high - low) * share, 1e-9)
    return low - room, high + room


def text(x: float, y: float, words: str, class_: str = "label", anchor: str = "middle") -> Markup:
    """A text at a place."""
    return element("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: list[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    drawn = "".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(points))
    return element("path", d=drawn, class_=class_)


def marker(x: float, y: float, kind: str, words: str) -> Markup:
    """The mark of a point of some kind, with words that a pointer shows."""
    title = element("title", words)
    name = f"mark {kind}"
    if kind == "square":
        return element("rect", title, x=x - 4, y=y - 4, width=8.0, height=8.0, class_=name)
    if kind == "diamond":
        return element("path", title, d=f"M{x:.1f} {y - 5.5:.1f}l5 5.5l-5 5.5l-5 -5.5z", class_=name)
    return element("circle", title, cx=x, cy=y, r=6.0 if kind == "main" else 4.0, class_=name)


def figure(width: float, height: float, label: str, *children: Child) -> Markup:
    """An SVG that scales with the page; `label` is read aloud in its place."""
    return element("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label)


def x_axis(scale: Scale, y: float, top: float, name: str, labels: list[tuple[float, str]]) -> list[Markup]:
    """A horizontal axis at `y` with grid lines up to `top`; labels that would touch the one before are left out."""
    drawn = [line(scale.start, y, scale.end, y, "axis")]
    last = -math.inf
    for value, words in labels:
        x = scale(value)
        drawn.append(line(x, y, x, top, "grid"))
        if x - len(words) * CHARACTER / 2 > last:
            drawn.append(text(x, y + 14, words))
            last = x + len(words) * CHARACTER / 2 + 4
    drawn.append(text((scale.start + scale.end) / 2, y + 30, name, "title"))
    return drawn


def y_axis(scale: Scale, x: float, right: float, name: str, labels: list[tuple[float, str]]) -> list[Markup]:
    """A vertical axis at `x` with grid lines to `right`, its name above it."""
    drawn = []
    for value, words in labels:
        y = scale(value)
        drawn += [line(x, y, right, y, "grid"), text(x - 6, y + 3.5, words, anchor="end")]
    drawn.append(text(x, scale.end - 12, name, "title", "start"))
    return drawn
