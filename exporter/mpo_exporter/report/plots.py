"""The plots of the page, as SVG: quality against bytes, spectra, progress of the compression."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mpo_exporter.report.charts import Scale, figure, line, marker, padded, path, text, x_axis, y_axis
from mpo_exporter.report.facts import Compression, Layer, Point, Report, Spectrum
from mpo_exporter.report.markup import Child, Markup, element, join
from mpo_exporter.report.wording import byte_unit, compact, percent, seconds, short, tick

WIDTH, HEIGHT = 400.0, 286.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 388.0, 34.0, 244.0
# The lane at the bottom of a logarithmic axis in which a divergence of zero lies.
LANE = 22.0
MARKS = {"dense": "square", "this file": "main", "prefix": "diamond", "without cores": "plain", "earlier": "faint"}
NAMES = {
    "dense": "dense model",
    "this file": "this file",
    "prefix": "its prefixes (--chi)",
    "without cores": "same bytes, no cores",
    "earlier": "earlier reports",
}
SPECTRUM_FLOOR = 1e-3
KINDS = (("self_attn.", "attention"), ("mlp.", "mlp"), ("", "other"))
KIND_NAMES = {"attention": "attention", "mlp": "MLP", "other": "embedding and head"}


def legend(entries: Sequence[tuple[Markup, str]]) -> Markup:
    """Marks and what they mean."""
    items = [
        element("li", element("svg", mark, viewBox="0 0 20 14", aria_hidden="true"), name) for mark, name in entries
    ]
    return element("ul", items, class_="legend")


def quality_plot(report: Report) -> Markup | None:
    """KL divergence over bytes: every measured size, and what the survey expects of others."""
    points = [point for point in report.points if point.kind == "dense" or point.kl_mean > 0]
    lossy = [point for point in points if point.kind != "dense"]
    if not lossy:
        return None
    largest = max(point.bytes for point in points)
    smallest = min(point.bytes for point in points)
    least = min(point.kl_mean for point in lossy) / 100  # below, the curve would squeeze what was measured
    expected = [one for one in report.predicted if smallest * 0.8 <= one.bytes <= largest and one.loss >= least]
    unit, name = byte_unit(largest)
    x = Scale(
        *padded([*(point.bytes for point in points), *(one.bytes for one in expected)], log=True), LEFT, RIGHT, True
    )
    losses = [point.kl_mean for point in lossy] + [one.loss for one in expected]
    low, high = padded(losses, log=True)
    if (
        high < 10 * low
    ):  # one point or a few of a kind: room around them, so that the axis says how far they are from others
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
            "KL to the dense model (nats a token, logarithmic)",
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
    return join(legend(keys), figure(WIDTH, HEIGHT, "KL divergence over bytes of the file", drawn))


def quality_mark(point: Point, x: float, y: float) -> Markup:
    """The mark of one measured size."""
    words = f"{point.label}: {point.bytes:,} bytes, KL {compact(point.kl_mean)}, perplexity {point.perplexity:.2f}"
    return marker(x, y, MARKS[point.kind], words)


def quality_labels(points: Sequence[Point], x: Scale, y: Scale) -> Iterator[Markup]:
    """Words beside the dense model and this file; the legend names the rest."""
    for point in points:
        at = x(point.bytes)
        anchor, step = ("end", -10.0) if at > (LEFT + RIGHT) / 2 else ("start", 10.0)
        if point.kind == "dense":
            yield text(at + step, BOTTOM - LANE / 2 + 3.5, "dense", "note", anchor)
        elif point.kind == "this file":
            yield text(at + step, y(point.kl_mean) - 6, "this file", "note strong", anchor)


def spectra(report: Report) -> list[Markup]:
    """One panel for each kind of matrix, one line for each block."""
    rows: dict[str, list[tuple[Layer, Spectrum]]] = {}
    for layer in report.layers:
        if layer.spectrum and any(layer.spectrum.values):
            rows.setdefault(layer.matrix, []).append((layer, layer.spectrum))
    return [spectrum_panel(matrix, found, report.subject.blocks) for matrix, found in rows.items()]


def spectrum_panel(matrix: str, found: Sequence[tuple[Layer, Spectrum]], blocks: int) -> Markup:
    """The singular values of one kind of matrix."""
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
        words = f"{layer.name}: 90 % of the energy in {spectrum.rank_90} of {spectrum.rank} values"
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
    """The smallest and the largest of some numbers."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low}–{high}"


def kind_of(name: str) -> str:
    """Whether a layer is attention, MLP, or neither."""
    return next(kind for part, kind in KINDS if part in name)


def progress_plots(compression: Compression) -> tuple[Markup, Markup]:
    """The error and the time of each layer's fit, in the order of the work."""
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
        figure(WIDTH, HEIGHT, "Error of each layer's fit, in the order of the work", first),
        figure(WIDTH, HEIGHT, "Time of each layer's fit, in the order of the work", second),
    )


def kind_legend(compression: Compression) -> Markup:
    """The colours of the kinds of layers."""
    found = {kind_of(step.layer) for step in compression.steps}
    return legend(
        [
            (element("circle", cx=10.0, cy=7.0, r=4.0, class_=f"dot {kind}"), KIND_NAMES[kind])
            for _, kind in KINDS
            if kind in found
        ]
    )
