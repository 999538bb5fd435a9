"""The plots of the page, as SVG: quality against bytes, spectra, and the fits of an export; and the axes they are drawn on.

Coordinates are in units of the view box, about a pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mpo_exporter.report.facts import Compression, Layer, Point, Report, Spectrum
from mpo_exporter.report.markup import (
    Child,
    Markup,
    byte_unit,
    compact,
    element,
    join,
    percent,
    seconds,
    short,
    tick,
)

WIDTH, HEIGHT = 400.0, 286.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 388.0, 34.0, 244.0
# The height of a strip at the bottom of the logarithmic axis, for a KL of zero.
LANE = 22.0
MARKS = {"dense": "square", "this file": "main", "prefix": "diamond", "without cores": "plain", "earlier": "faint"}
NAMES = {
    "dense": "dense model",
    "this file": "this file",
    "prefix": "its prefixes (--chi)",
    "without cores": "same bytes, no cores",
    "earlier": "earlier reports",
}
# Singular values below this share of the largest are not drawn.
SPECTRUM_FLOOR = 1e-3
KINDS = (("self_attn.", "attention"), ("mlp.", "mlp"), ("", "other"))
KIND_NAMES = {"attention": "attention", "mlp": "MLP", "other": "embedding and head"}
# The width of a character of a label; labels of an axis that would touch the one before are left out.
CHARACTER = 6.2


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps values `low` … `high` to positions `start` … `end`, logarithmically where `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; values outside the range are moved to its nearest end."""
        low, high, at = (
            (math.log(self.low), math.log(self.high), math.log(max(value, self.low)))
            if self.log
            else (self.low, self.high, value)
        )
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values within the range, about `most` of them at most."""
        return log_ticks(self.low, self.high, most) if self.log else linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, between two values."""
    span = high - low
    if span <= 0:
        return [low]
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10, 20) if span / (factor * step) <= most)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float, most: int) -> list[float]:
    """Powers of ten between two values, and 2, 3, 5 … times them where there is room for more."""
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
    """The range of values, widened by `share` at both ends."""
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** share, 1.12)
        return low / factor, high * factor
    room = max((high - low) * share, 1e-9)
    return low - room, high + room


def text(x: float, y: float, words: str, class_: str = "label", anchor: str = "middle") -> Markup:
    """A text at a position."""
    return element("text", words, x=x, y=y, class_=class_, text_anchor=anchor)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def path(points: list[tuple[float, float]], class_: str) -> Markup:
    """A line through points (x, y)."""
    drawn = "".join(f"{'L' if index else 'M'}{x:.1f} {y:.1f}" for index, (x, y) in enumerate(points))
    return element("path", d=drawn, class_=class_)


def marker(x: float, y: float, kind: str, words: str) -> Markup:
    """A point's mark; `kind` is its shape, and the page shows `words` when a pointer is over it."""
    title = element("title", words)
    name = f"mark {kind}"
    if kind == "square":
        return element("rect", title, x=x - 4, y=y - 4, width=8.0, height=8.0, class_=name)
    if kind == "diamond":
        return element("path", title, d=f"M{x:.1f} {y - 5.5:.1f}l5 5.5l-5 5.5l-5 -5.5z", class_=name)
    return element("circle", title, cx=x, cy=y, r=6.0 if kind == "main" else 4.0, class_=name)


def figure(width: float, height: float, label: str, *children: Child) -> Markup:
    """An SVG that scales with the page; `label` describes it to screen readers."""
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


def legend(entries: Sequence[tuple[Markup, str]]) -> Markup:
    """A list of marks and their names."""
    items = [
        element("li", element("svg", mark, viewBox="0 0 20 14", aria_hidden="true"), name) for mark, name in entries
    ]
    return element("ul", items, class_="legend")


def quality_plot(report: Report) -> Markup | None:
    """KL to the dense model over bytes: every measured size, and what the survey expects of integers alone."""
    points = [point for point in report.points if point.kind == "dense" or point.kl_mean > 0]
    lossy = [point for point in points if point.kind != "dense"]
    if not lossy:
        return None
    largest = max(point.bytes for point in points)
    smallest = min(point.bytes for point in points)
    least = min(point.kl_mean for point in lossy) / 100  # smaller losses would squeeze the measured points
    expected = [one for one in report.predicted if smallest * 0.8 <= one.bytes <= largest and one.loss >= least]
    unit, name = byte_unit(largest)
    x = Scale(
        *padded([*(point.bytes for point in points), *(one.bytes for one in expected)], log=True), LEFT, RIGHT, True
    )
    losses = [point.kl_mean for point in lossy] + [one.loss for one in expected]
    low, high = padded(losses, log=True)
    if high < 10 * low:  # one point, or a few that are close: a wider axis, so that small distances look small
        low, high = low / 4, high * 4
    y = Scale(low, high, BOTTOM - LANE, TOP, True)
    ticks = Scale(x.low / unit, x.high / unit, LEFT, RIGHT, log=True).ticks(7)
    drawn: list[Child] = [
        x_axis(
            x, BOTTOM, TOP, f"bytes of the file ({name}, logarithmic)", [(value * unit, tick(value)) for value in ticks]
        ),
        y_axis(
            y,
            LEFT,
            RIGHT,
            "KL to the dense model (nats per token, logarithmic)",
            [(one, tick(one)) for one in y.ticks(6)],
        ),
        line(LEFT, BOTTOM - LANE, RIGHT, BOTTOM - LANE, "break"),
        text(LEFT - 6, BOTTOM - LANE / 2 + 3.5, "0", anchor="end"),
    ]
    if expected:
        drawn.append(path([(x(one.bytes), y(one.loss)) for one in expected], "curve"))
    order = list(MARKS)
    for point in sorted(points, key=lambda one: -order.index(one.kind)):
        drawn.append(
            quality_mark(point, x(point.bytes), BOTTOM - LANE / 2 if point.kind == "dense" else y(point.kl_mean))
        )
    drawn.append(quality_labels(points, x, y))
    keys = [
        (marker(10, 7, MARKS[kind], NAMES[kind]), NAMES[kind]) for kind in order if any(p.kind == kind for p in points)
    ]
    if expected:
        keys.append((path([(1, 7), (19, 7)], "curve"), "expected by the survey, integers only"))
    return join(legend(keys), figure(WIDTH, HEIGHT, "KL to the dense model over bytes of the file", drawn))


def quality_mark(point: Point, x: float, y: float) -> Markup:
    """The mark of one measured size."""
    words = f"{point.label}: {point.bytes:,} bytes, KL {compact(point.kl_mean)}, perplexity {point.perplexity:.2f}"
    return marker(x, y, MARKS[point.kind], words)


def quality_labels(points: Sequence[Point], x: Scale, y: Scale) -> Iterator[Markup]:
    """Labels beside the points of the dense model and of this file; the legend names the others."""
    for point in points:
        at = x(point.bytes)
        anchor, step = ("end", -10.0) if at > (LEFT + RIGHT) / 2 else ("start", 10.0)
        if point.kind == "dense":
            yield text(at + step, BOTTOM - LANE / 2 + 3.5, "dense", "note", anchor)
        elif point.kind == "this file":
            yield text(at + step, y(point.kl_mean) - 6, "this file", "note strong", anchor)


def spectra(report: Report) -> list[Markup]:
    """A panel of singular values for each kind of matrix."""
    rows: dict[str, list[tuple[Layer, Spectrum]]] = {}
    for layer in report.layers:
        if layer.spectrum and any(layer.spectrum.values):
            rows.setdefault(layer.matrix, []).append((layer, layer.spectrum))
    return [spectrum_panel(matrix, found, report.subject.blocks) for matrix, found in rows.items()]


def spectrum_panel(matrix: str, found: Sequence[tuple[Layer, Spectrum]], blocks: int) -> Markup:
    """The singular values of one kind of matrix, a line for each block."""
    left, right, top, bottom = 34.0, 192.0, 26.0, 122.0
    x = Scale(1, max(max(spectrum.rank for _, spectrum in found), 2), left, right, log=True)
    y = Scale(SPECTRUM_FLOOR, 1, bottom, top, log=True)
    drawn: list[Child] = [
        x_axis(
            x,
            bottom,
            top,
            "rank",
            [(value, f"{value:g}") for value in (1.0, 10.0, 100.0, 1000.0, 10000.0) if value <= x.high],
        ),
        y_axis(y, left, right, "", [(value, f"{value:g}") for value in (1.0, 0.1, 0.01, 0.001)]),
        element("text", short(matrix), x=left, y=16.0, class_="panel"),
        text(right, 16, f"90 % in {range_text([spectrum.rank_90 for _, spectrum in found])}", "label", "end"),
    ]
    for layer, spectrum in found:
        shown = [
            (x(rank), y(value))
            for rank, value in zip(spectrum.ranks, spectrum.values, strict=True)
            if value >= SPECTRUM_FLOOR
        ]
        depth = 1.0 if layer.block is None or blocks < 2 else layer.block / (blocks - 1)
        words = f"{layer.name}: {spectrum.rank_90} of {spectrum.rank} singular values hold 90 % of the energy"
        drawn.append(element("g", element("title", words), path(shown, "depth"), style=f"--v:{15 + 85 * depth:.0f}%"))
    largest = max(term.chi for layer, _ in found for term in layer.terms)
    if largest:
        at = x(largest)
        drawn += [
            line(at, top, at, bottom, "chi"),
            text(at - 3, bottom - 5, f"χ {largest}", "note", "end" if at > left + 40 else "start"),
        ]
    return figure(200, 158, f"Singular values of {short(matrix)}", drawn)


def range_text(values: Sequence[int]) -> str:
    """The smallest and the largest of some numbers, as text."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def kind_of(name: str) -> str:
    """`attention`, `mlp` or `other`: the kind of a layer of that name."""
    return next(kind for part, kind in KINDS if part in name)


def progress_plots(compression: Compression) -> tuple[Markup, Markup]:
    """Two plots: the error and the duration of each layer's fit, in the order in which layers were fitted."""
    steps = compression.steps
    x = Scale(0.5, len(steps) + 0.5, LEFT, RIGHT)
    places = [(value, f"{value:g}") for value in Scale(1, len(steps), LEFT, RIGHT).ticks(8) if value == int(value)]
    errors = [step.error for step in steps if step.error > 0]
    low, high = padded(errors, log=True) if errors else (0.01, 1.0)
    y = Scale(low, high, BOTTOM, TOP, log=True)
    name = "layers, in the order in which they were fitted"
    first: list[Child] = [
        x_axis(x, BOTTOM, TOP, name, places),
        y_axis(y, LEFT, RIGHT, "relative error of the fit (logarithmic)", [(one, tick(one)) for one in y.ticks(6)]),
    ]
    times = Scale(0, max(step.seconds for step in steps) * 1.08 or 1.0, BOTTOM, TOP)
    second: list[Child] = [
        x_axis(x, BOTTOM, TOP, name, places),
        y_axis(times, LEFT, RIGHT, "time of the fit (seconds)", [(one, tick(one)) for one in times.ticks(6)]),
    ]
    width = max((RIGHT - LEFT) / len(steps) - 1.5, 0.8)
    for number, step in enumerate(steps, 1):
        words = f"{number}. {step.layer}: error {percent(step.error, 2)}, {seconds(step.seconds)}"
        kind = kind_of(step.layer)
        title = element("title", words)
        first.append(element("circle", title, cx=x(number), cy=y(step.error), r=3.6, class_=f"dot {kind}"))
        at = times(step.seconds)
        second.append(
            element(
                "rect",
                title,
                x=x(number) - width / 2,
                y=at,
                width=width,
                height=max(BOTTOM - at, 0.5),
                class_=f"bar {kind}",
            )
        )
    return (
        figure(WIDTH, HEIGHT, "Error of each layer's fit, in the order of fitting", first),
        figure(WIDTH, HEIGHT, "Time of each layer's fit, in the order of fitting", second),
    )


def kind_legend(compression: Compression) -> Markup:
    """The legend of the colours of the kinds of layers."""
    found = {kind_of(step.layer) for step in compression.steps}
    return legend(
        [
            (element("circle", cx=10.0, cy=7.0, r=4.0, class_=f"dot {kind}"), KIND_NAMES[kind])
            for _, kind in KINDS
            if kind in found
        ]
    )
