"""The table after an export: what went in, what came out, what it cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpo_exporter.export import Result
from mpo_exporter.heal.run import Healed
from mpo_exporter.report.facts import Measured, Memory, Report, Sizes, Speed, Texts, WithoutCores
from mpo_exporter.report.folder import JSON, PAGE
from mpo_exporter.report.next_step import wrote
from mpo_exporter.report.subject import measured, sizes_of
from mpo_runtime.cli.console import size_text
from mpo_runtime.text.token_text import TokenText


@dataclass(frozen=True, slots=True)
class Rows:
    """What the table shows; what was not measured has no row, what was not healed no column."""

    sizes: Sizes
    quality: Measured | None
    core_layers: int
    layers: int
    speed: Speed | None = None
    memory: Memory | None = None
    texts: Texts | None = None
    plain: WithoutCores | None = None
    healed: bool = False
    healed_quality: Measured | None = None


def print_report(result: Result, text: TokenText | None, reason: str, healed: Healed | None = None) -> None:
    """Prints sizes and quality before and after, and after healing where there was one.

    Args:
        text: what was measured on, None where nothing was.
        reason: why nothing was measured.
    """
    quality = measured(result.comparison, text) if result.comparison and text else None
    again = measured(healed.comparison, text) if healed and healed.comparison and text else None
    rows = Rows(
        sizes_of(result.spec, result.source, result.file_bytes),
        quality,
        result.core_layers,
        len(result.spec.linears),
        healed=healed is not None,
        healed_quality=again,
    )
    console = Console()
    console.print(table(rows))
    say(console, measured_on(quality, reason))
    print_healing(healed)
    say(console, wrote(result.path))


def print_healing(healed: Healed | None) -> None:
    """Prints how long was healed where it was, and that the file is not the healed one where it is not."""
    if healed is None:
        return
    console = Console()
    say(console, f"healed on {healed.tokens:,} tokens in {healed.minutes:.1f} minutes")
    if not healed.written:
        say(console, "healing raised the KL: the file is the one before healing; heal longer (--heal-tokens)")


def print_whole(report: Report, folder: Path) -> None:
    """Prints what a report measured, what it says plainly, and where it lies."""
    console = Console()
    console.print(
        table(
            Rows(
                report.sizes,
                report.quality,
                report.core_layers,
                len(report.layers),
                report.speed,
                report.memory,
                report.texts,
                report.without_cores,
            )
        )
    )
    say(console, measured_on(report.quality, report.missing.get("quality", "")))
    if report.speed and report.speed.slower:
        say(
            console,
            f"This file decodes more slowly than the dense model on this machine: "
            f"{report.speed.median:.1f} against {report.speed.dense_median:.1f} tokens/s",
        )
    for part, reason in report.missing.items():
        if part not in ("quality", "compression", "without_cores") or (part == "without_cores" and report.core_layers):
            say(console, f"{part.replace('_', ' ')}: not measured, {reason}")
    seconds = sum(cost.seconds for cost in report.costs)
    parts = ", ".join(f"{cost.part} {cost.seconds:.1f}" for cost in report.costs)
    say(console, f"the report took {seconds:.1f} s ({parts})")
    say(console, f"wrote {folder / PAGE} and {JSON}")


def say(console: Console, text: str) -> None:
    """Prints a line as it is: names in it are no markup."""
    console.print(Text(text), soft_wrap=True)


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
    result = Table("", "dense", "compressed", *["healed"] * rows.healed, "change")
    for column in result.columns[1:]:
        column.justify = "right"

    def add(name: str, dense: str, ours: str, change: str = "", healed: str | None = None) -> None:
        # Healing changes neither sizes nor layers: what it did not measure anew stands as it was.
        result.add_row(name, dense, ours, *[ours if healed is None else healed] * rows.healed, change)

    sizes = rows.sizes
    add(
        "parameters",
        f"{sizes.dense_parameters:,}",
        f"{sizes.parameters:,}",
        change(sizes.parameters, sizes.dense_parameters),
    )
    add(
        "file bytes",
        size_text(sizes.dense_bytes),
        size_text(sizes.file_bytes),
        change(sizes.file_bytes, sizes.dense_bytes),
    )
    before, after = sizes.dense_bits_per_weight, sizes.bits_per_weight
    add("bits per weight", f"{before:.2f}", f"{after:.2f}", change(after, before))
    if rows.memory:
        peak, dense = rows.memory.peak, rows.memory.dense_peak
        add("memory, peak of the process", size_text(dense), size_text(peak), change(peak, dense))
    if rows.speed:
        rate, dense_rate = rows.speed.median, rows.speed.dense_median
        add("decoding, tokens/s", f"{dense_rate:.1f}", f"{rate:.1f}", change(rate, dense_rate))
    if rows.quality:
        quality_rows(add, rows.quality, rows.healed_quality, full=rows.speed is not None or rows.texts is not None)
    if rows.texts:
        texts = rows.texts
        share = "" if texts.dense_repeated is None else f"{100 * texts.dense_repeated:.1f} %"
        add("repeated 4-grams in its texts", share, f"{100 * texts.repeated:.1f} %")
        stops = "" if texts.dense_early is None else str(texts.dense_early)
        add("early stops", stops, f"{texts.early} of {len(texts.prompts)}")
    add("layers with cores", "0", f"{rows.core_layers} of {rows.layers}")
    if rows.plain:
        add("KL without cores, same bytes", "", f"{rows.plain.kl_mean:.4f}", size_text(rows.plain.file_bytes))
    return result


def quality_rows(add: Callable[..., None], before: Measured, healed: Measured | None, *, full: bool) -> None:
    """The rows of quality; logits only where the whole report is shown."""
    last = healed or before

    def each(name: str, dense: str, form: Callable[[Measured], str], change: str = "") -> None:
        add(name, dense, form(before), change, form(last))

    each(
        "perplexity",
        f"{before.dense_perplexity:.2f} ± {before.dense_error:.2f}",
        lambda one: f"{one.perplexity:.2f} ± {one.error:.2f}",
        change(last.perplexity, before.dense_perplexity),
    )
    each("KL to dense, mean", "0", lambda one: f"{one.kl_mean:.4f}")
    each("KL to dense, 99.9 %", "0", lambda one: f"{one.kl_999:.4f}")
    each("same top token", "100 %", lambda one: f"{100 * one.same_top1:.1f} %")
    if full:
        each("logits, cosine", "1", lambda one: f"{one.cosine:.5f}")
        each("logits, mean squared error", "0", lambda one: f"{one.mse:.4f}")


def change(after: float, before: float) -> str:
    """The change in per cent."""
    return f"{100 * (after / before - 1):+.1f} %"
