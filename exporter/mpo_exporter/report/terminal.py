"""The table that an export or a report prints in the terminal: sizes, quality, speed and memory, before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mpo_exporter.export import Result
from mpo_exporter.plan.named import K_PROJ
from mpo_exporter.report.facts import Accuracy, Measured, Memory, Report, Sizes, Speed, Texts, WithoutCores
from mpo_exporter.report.job import JSON, PAGE
from mpo_exporter.report.sizes import sizes_of
from mpo_runtime.cli.console import size_text
from mpo_runtime.measure import Comparison
from mpo_runtime.text.token_text import TokenText

# Columns of a file or a pipe that the table is printed to.
WIDTH = 120


@dataclass(frozen=True, slots=True)
class Rows:
    """What the table shows. Figures that are None have no row; the healed column is shown where `healed`."""

    sizes: Sizes
    quality: Measured | None
    core_layers: int
    layers: int
    speed: Speed | None = None
    memory: Memory | None = None
    texts: Texts | None = None
    plain: WithoutCores | None = None
    accuracy: Sequence[Accuracy] = ()
    healed: bool = False
    healed_quality: Measured | None = None
    logits: bool = False  # shows what the logits differ by, which is shown beside speed or texts in any case


@dataclass(frozen=True, slots=True)
class HealedStage:
    """What the healing stage of an export adds to its table: the quality it measured, and lines printed below."""

    comparison: Comparison | None
    notes: Sequence[str]


def print_report(
    result: Result,
    text: TokenText | None,
    reason: str,
    healed: HealedStage | None = None,
    plain: WithoutCores | None = None,
    accuracy: Sequence[Accuracy] = (),
) -> None:
    """Prints the sizes and the quality of an exported file, also after healing if it was healed.

    Args:
        text: what quality was measured on, None where it was not measured, for `reason`.
        plain: a file of the same size without cores, if one was made to compare with.
        accuracy: on questions, of the file that was written last.
    """
    quality = Measured.of(result.comparison, text) if result.comparison and text else None
    again = Measured.of(healed.comparison, text) if healed and healed.comparison and text else None
    rows = Rows(
        sizes_of(result.spec, result.source, result.file_bytes),
        quality,
        result.core_layers,
        len(result.spec.linears),
        plain=plain,
        accuracy=accuracy,
        healed=healed is not None,
        healed_quality=again,
        logits=result.spec.provenance.options.get("plan") == K_PROJ.name,
    )
    console = console_for_tables()
    console.print(table(rows))
    say(console, measured_on(quality, reason))
    if rows.logits:
        say(console, "memory and tokens/s, before and after: --report DIR")
    for note in healed.notes if healed else ():
        say(console, note)


def print_whole(report: Report, folder: Path) -> None:
    """Prints the figures of a report, what was not measured and why, and where the report is."""
    console = console_for_tables()
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
                report.accuracy,
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


def console_for_tables() -> Console:
    """The terminal; a file or a pipe is wide enough for whole rows, so that a program can find them."""
    console = Console()
    return console if console.is_terminal or console.width >= WIDTH else Console(width=WIDTH)


def say(console: Console, text: str) -> None:
    """Prints a line as it is; square brackets in names are not taken as markup."""
    console.print(Text(text), soft_wrap=True)


def measured_on(quality: Measured | None, reason: str) -> str:
    """What the quality was measured on, or why it was not measured."""
    if quality is None:
        return f"quality was not measured: {reason}"
    return (
        f"measured on the first {quality.tokens:,} tokens of {quality.text}, held-out text; "
        "nothing was trained or calibrated on it\n"
        "KL: the distance of the next-token probabilities from the dense model's, in nats per token"
    )


def table(rows: Rows) -> Table:
    """The table of sizes, quality and what else was measured."""
    result = Table("", "dense", "compressed", *["healed"] * rows.healed, "change")
    for column in result.columns[1:]:
        column.justify = "right"

    def add(name: str, dense: str, ours: str, change: str = "", healed: str | None = None) -> None:
        # Healing changes neither sizes nor layers; what it did not measure again is the same as before.
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
        quality_rows(add, rows.quality, rows.healed_quality, full=bool(rows.speed or rows.texts or rows.logits))
    for one in rows.accuracy:
        share = f"{100 * one.compressed:.1f} ± {100 * one.error:.1f} %"
        name, gain = f"accuracy, {one.task} ({one.questions} questions)", 100 * (one.compressed - one.dense)
        add(name, f"{100 * one.dense:.1f} %", "" if rows.healed else share, f"{gain:+.1f} points", healed=share)
    if rows.texts:
        texts = rows.texts
        share = "" if texts.dense_repeated is None else f"{100 * texts.dense_repeated:.1f} %"
        add("repeated 4-grams in its texts", share, f"{100 * texts.repeated:.1f} %")
        stops = "" if texts.dense_early is None else str(texts.dense_early)
        add("early stops", stops, f"{texts.early} of {len(texts.prompts)}")
    add("layers with cores", "0", f"{rows.core_layers} of {rows.layers}")
    if rows.plain:
        plain = f"KL {rows.plain.kl_mean:.4f}"
        add("the same bytes without cores", "", plain, size_text(rows.plain.file_bytes), healed="")
    return result


def quality_rows(add: Callable[..., None], before: Measured, healed: Measured | None, *, full: bool) -> None:
    """Adds the rows of quality; those of the logits only where `full`."""
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
    """The relative change as a percentage."""
    return f"{100 * (after / before - 1):+.1f} %"
