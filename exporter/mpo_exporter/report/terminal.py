"""The table after an export: what went in, what came out, what it cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpo_exporter.report.facts import Measured, Memory, Report, Sizes, Speed, Texts, WithoutCores
from mpo_exporter.report.folder import JSON, PAGE
from mpo_runtime.cli.console import size_text


@dataclass(frozen=True, slots=True)
class Rows:
    """What the table shows; what was not measured has no row."""

    sizes: Sizes
    quality: Measured | None
    core_layers: int
    layers: int
    speed: Speed | None = None
    memory: Memory | None = None
    texts: Texts | None = None
    plain: WithoutCores | None = None


def print_whole(report: Report, folder: Path) -> None:
    """Prints what a report measured, what it says plainly, and where it lies."""
    console = Console()
    console.print(
        table(
            Rows(
                report.sizes, report.quality, report.core_layers, len(report.layers),
                report.speed, report.memory, report.texts, report.without_cores,
            )
        )
    )  # fmt: skip
    say(console, measured_on(report.quality, report.missing.get("quality", "")))
    if report.speed and report.speed.slower:
        say(console, f"This file decodes more slowly than the dense model on this machine: "
                     f"{report.speed.median:.1f} against {report.speed.dense_median:.1f} tokens/s")  # fmt: skip
    for part, reason in report.missing.items():
        if part not in ("quality", "compression", "without_cores") or (part == "without_cores" and report.core_layers):
            say(console, f"{part.replace('_', ' ')}: not measured, {reason}")
    seconds = sum(cost.seconds for cost in report.costs)
    parts = ", ".join(f"{cost.part} {cost.seconds:.1f}" for cost in report.costs)
    say(console, f"the report took {seconds:.1f} s ({parts})")
    say(console, f"wrote {folder / PAGE} and {JSON}")


def say(console: Console, text: str) -> None:
    """Prints a line as it is: names in it are no markup."""
    console.print(Text(text))


def measured_on(quality: Measured | None, reason: str) -> str:
    """What the quality was measured on, or why not."""
    if quality is None:
        return f"quality was not measured: {reason}"
    return (
        f"measured on the first {quality.tokens:,} tokens of {quality.text}, held-out text; "
        "nothing was trained or calibrated on it"
    )


def table(rows: Rows) -> Table:
    """The table of sizes, quality and what else was measured."""
    result = Table("", "dense", "compressed", "change")
    for column in result.columns[1:]:
        column.justify = "right"
    sizes = rows.sizes
    result.add_row(
        "parameters", f"{sizes.dense_parameters:,}", f"{sizes.parameters:,}",
        change(sizes.parameters, sizes.dense_parameters),
    )  # fmt: skip
    result.add_row(
        "file bytes", size_text(sizes.dense_bytes), size_text(sizes.file_bytes),
        change(sizes.file_bytes, sizes.dense_bytes),
    )  # fmt: skip
    before, after = sizes.dense_bits_per_weight, sizes.bits_per_weight
    result.add_row("bits per weight", f"{before:.2f}", f"{after:.2f}", change(after, before))
    if rows.memory:
        peak, dense = rows.memory.peak, rows.memory.dense_peak
        result.add_row("memory, peak of the process", size_text(dense), size_text(peak), change(peak, dense))
    if rows.speed:
        rate, dense_rate = rows.speed.median, rows.speed.dense_median
        result.add_row("decoding, tokens/s", f"{dense_rate:.1f}", f"{rate:.1f}", change(rate, dense_rate))
    if rows.quality:
        quality_rows(result, rows.quality, full=rows.speed is not None or rows.texts is not None)
    if rows.texts:
        texts = rows.texts
        before_share = "" if texts.dense_repeated is None else f"{100 * texts.dense_repeated:.1f} %"
        result.add_row("repeated 4-grams in its texts", before_share, f"{100 * texts.repeated:.1f} %", "")
        stops = "" if texts.dense_early is None else str(texts.dense_early)
        result.add_row("early stops", stops, f"{texts.early} of {len(texts.prompts)}", "")
    result.add_row("layers with cores", "0", f"{rows.core_layers} of {rows.layers}", "")
    if rows.plain:
        plain = rows.plain
        result.add_row("KL without cores, same bytes", "", f"{plain.kl_mean:.4f}", f"{size_text(plain.file_bytes)}")
    return result


def quality_rows(result: Table, quality: Measured, *, full: bool) -> None:
    """The rows of quality; logits only where the whole report is shown."""
    result.add_row(
        "perplexity",
        f"{quality.dense_perplexity:.2f} ± {quality.dense_error:.2f}",
        f"{quality.perplexity:.2f} ± {quality.error:.2f}",
        change(quality.perplexity, quality.dense_perplexity),
    )
    result.add_row("KL to dense, mean", "0", f"{quality.kl_mean:.4f}", "")
    result.add_row("KL to dense, 99.9 %", "0", f"{quality.kl_999:.4f}", "")
    result.add_row("same top token", "100 %", f"{100 * quality.same_top1:.1f} %", "")
    if full:
        result.add_row("logits, cosine", "1", f"{quality.cosine:.5f}", "")
        result.add_row("logits, mean squared error", "0", f"{quality.mse:.4f}", "")


def change(after: float, before: float) -> str:
    """The change in per cent."""
    return f"{100 * (after / before - 1):+.1f} %"
