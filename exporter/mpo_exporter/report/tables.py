"""The tables of the page: quality, heat maps of the layers, their summary, and every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mpo_exporter.report.facts import Accuracy, Layer, Measured, Report, Texts, WithoutCores
from mpo_exporter.report.markup import (
    Child,
    Markup,
    change,
    compact,
    element,
    percent,
    place,
    short,
    terms,
    transform,
)
from mpo_runtime.cli.console import size_text

# How an error's norm is written in the table of layers.
NORMS = {"activations": "activations", "fit": "as fitted", "weights": "weights"}


def grid(heads: Sequence[str], rows: Sequence[Sequence[Child]], numbers: int = 1, marked: int = -1) -> Markup:
    """A table.

    Args:
        numbers: the index of the first column that holds numbers, which are aligned to the right.
        marked: the index of a row that is highlighted.
    """

    def cell(name: str, column: int, content: Child) -> Markup:
        return element(name, content, class_="n" if column >= numbers else None)

    head = element(
        "tr",
        [
            element("th", title, scope="col", class_="n" if column >= numbers else None)
            for column, title in enumerate(heads)
        ],
    )
    body = [
        element(
            "tr",
            [cell("td" if column else "th", column, content) for column, content in enumerate(row)],
            class_="this" if index == marked else None,
        )
        for index, row in enumerate(rows)
    ]
    return element("div", element("table", element("thead", head), element("tbody", body)), class_="scroll")


def quality_table(quality: Measured, accuracy: Sequence[Accuracy] = ()) -> Markup:
    """The quality of both models on the held-out text, and their accuracy on questions."""
    rows = [
        (
            "Perplexity ± standard error",
            f"{quality.dense_perplexity:.2f} ± {quality.dense_error:.2f}",
            f"{quality.perplexity:.2f} ± {quality.error:.2f}",
        ),
        ("Change of perplexity", "", change(quality.perplexity, quality.dense_perplexity)),
        ("KL to dense, mean (nats per token)", "0", compact(quality.kl_mean, 4)),
        ("KL to dense, 99.9 % (nats)", "0", compact(quality.kl_999, 4)),
        ("Same most likely token", "100 %", percent(quality.same_top1)),
        ("Logits, mean cosine", "1", f"{quality.cosine:.5f}"),
        ("Logits, mean squared error", "0", compact(quality.mse, 4)),
        *(
            (
                f"Accuracy, {one.task} ({one.questions} questions) ± standard error",
                percent(one.dense),
                f"{percent(one.compressed)} ± {percent(one.error)}",
            )
            for one in accuracy
        ),
    ]
    return grid(("", "dense", "this file"), rows)


def text_table(texts: Texts) -> Markup:
    """Counts of two common faults of generated text, for both models."""
    count = len(texts.prompts)
    rows = (
        (
            "Sequences of 4 tokens that repeat an earlier one",
            "" if texts.dense_repeated is None else percent(texts.dense_repeated),
            percent(texts.repeated),
        ),
        (
            f"Texts that end before {texts.early_tokens} tokens",
            "" if texts.dense_early is None else f"{texts.dense_early} of {count}",
            f"{texts.early} of {count}",
        ),
    )
    return grid(("", "dense", "this file"), rows)


def plain_table(quality: Measured, plain: WithoutCores, file_bytes: int) -> Markup:
    """The file beside one of the same size without cores."""
    rows = (
        ("Bytes", f"{file_bytes:,}", f"{plain.file_bytes:,}"),
        (
            "Perplexity",
            f"{quality.perplexity:.2f} ± {quality.error:.2f}",
            f"{plain.perplexity:.2f} ± {plain.error:.2f}",
        ),
        ("KL to dense, mean", compact(quality.kl_mean, 4), compact(plain.kl_mean, 4)),
        ("KL to dense, 99.9 %", compact(quality.kl_999, 4), compact(plain.kl_999, 4)),
        ("Same most likely token", percent(quality.same_top1), percent(plain.same_top1)),
    )
    return grid(("", "with cores", "without"), rows)


@dataclass(frozen=True, slots=True)
class Figure:
    """A figure of layers that a heat map shows.

    Args:
        title: of the map.
        hue: the CSS class of its colours.
        value: the figure of a layer, None where it has none.
        write: the figure as text.
        log: the colour follows the logarithm of the figure.
    """

    title: str
    hue: str
    value: Callable[[Layer], float | None]
    write: Callable[[float], str]
    log: bool = False

    def of(self, layer: Layer | None) -> float | None:
        """The figure of a layer, None where there is nothing to show."""
        found = None if layer is None else self.value(layer)
        return None if found is not None and self.log and found <= 0 else found

    def share(self, found: float, low: float, high: float) -> float:
        """Where a value lies between the smallest and the largest, 0 to 1."""
        if high <= low:
            return 0.4
        return math.log(found / low) / math.log(high / low) if self.log else (found - low) / (high - low)


def heat_map(figure: Figure, layers: Sequence[Layer]) -> Markup:
    """A table with a row for each block and a column for each matrix; the colour of a cell shows its figure."""
    known = [found for layer in layers if (found := figure.of(layer)) is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    columns = list(dict.fromkeys(layer.matrix for layer in layers if layer.block is not None))
    cells: dict[tuple[int, str], Layer] = {
        (layer.block, layer.matrix): layer for layer in layers if layer.block is not None
    }
    head = element(
        "tr", element("th", "block", scope="col"), [element("th", short(name), scope="col") for name in columns]
    )
    body = [
        element(
            "tr",
            element("th", str(block), scope="row"),
            [heat_cell(cells.get((block, name)), figure, low, high) for name in columns],
        )
        for block in sorted({block for block, _ in cells})
    ]
    other = [layer for layer in layers if layer.block is None]
    write = figure.write
    below = "; ".join(
        f"{short(layer.matrix)} {write(found)}" for layer in other if (found := figure.value(layer)) is not None
    )
    ramp = element("p", write(low), element("i"), write(high), element("span", below) if below else None, class_="ramp")
    return element(
        "div",
        element("h3", figure.title),
        element("table", element("thead", head), element("tbody", body)),
        ramp,
        class_=f"heat {figure.hue}",
    )


def heat_cell(layer: Layer | None, figure: Figure, low: float, high: float) -> Markup:
    """A layer's cell of a heat map whose figures lie between `low` and `high`."""
    found = figure.of(layer)
    if layer is None or found is None:
        return element("td", "–", class_="none")
    share = figure.share(found, low, high)
    return element(
        "td",
        figure.write(found),
        style=f"--v:{8 + 84 * share:.0f}%",
        class_="deep" if share > 0.62 else None,
        title=f"{layer.name}: {terms(layer)}",
    )


def heat_maps(report: Report) -> Markup:
    """Heat maps of the bits per weight, of χ if there are cores, and of the errors if they were measured."""

    def chi(layer: Layer) -> float | None:
        return max((term.chi for term in layer.terms), default=0) or None

    figures = [Figure("Bits per weight", "bits", lambda layer: layer.bits_per_weight, "{:.2f}".format)]
    if report.core_layers:
        figures.append(Figure("Bond dimension χ of the cores", "chi", chi, "{:.0f}".format))
    if any(layer.error is not None for layer in report.layers):
        figures.append(
            Figure(
                "Relative error (%)",
                "error",
                lambda layer: layer.error,
                lambda share: f"{100 * share:.{2 if share < 0.01 else 1}f}",
                log=True,
            )
        )
    return element("div", [heat_map(figure, report.layers) for figure in figures], class_="heats")


def decision_table(report: Report) -> Markup:
    """How many layers are stored in which way; the way that takes the most bytes comes first."""
    rows: dict[str, list[Layer]] = {}
    for layer in report.layers:
        kinds = " + ".join(term.text if not term.chi else f"cores in {term.bits} bits" for term in layer.terms)
        rows.setdefault(kinds + transform(layer), []).append(layer)
    weights = sum(layer.rows * layer.columns for layer in report.layers)
    whole = sum(layer.bytes for layer in report.layers)
    written = []
    for name, found in sorted(rows.items(), key=lambda row: -sum(layer.bytes for layer in row[1])):
        held = sum(layer.rows * layer.columns for layer in found)
        size = sum(layer.bytes for layer in found)
        chis = sorted({term.chi for layer in found for term in layer.terms if term.chi})
        span = "" if not chis else str(chis[0]) if len(chis) == 1 else f"{chis[0]}–{chis[-1]}"
        row = [
            name,
            str(len(found)),
            percent(held / weights),
            size_text(size),
            percent(size / whole),
            f"{8 * size / held:.2f}",
        ]
        written.append([*row[:2], span, *row[2:]] if report.core_layers else row)
    heads = ["stored as", "layers", "of the weights", "bytes", "of the bytes", "bits per weight"]
    return grid([*heads[:2], "χ", *heads[2:]] if report.core_layers else heads, written)


def layer_table(report: Report) -> Markup:
    """What every layer is stored as, its size and its error."""
    rows = [
        (
            place(layer),
            f"{layer.rows} × {layer.columns}",
            terms(layer),
            f"{layer.bytes:,}",
            f"{layer.bits_per_weight:.2f}",
            "" if layer.error is None else percent(layer.error, 2),
            "" if layer.norm is None else NORMS[layer.norm],
        )
        for layer in report.layers
    ]
    return grid(("layer", "shape", "terms", "bytes", "bits per weight", "error", "in the norm of"), rows, numbers=3)
