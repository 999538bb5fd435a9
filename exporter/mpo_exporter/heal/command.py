"""What `mpo-export heal` and the healing stage of an export (`mpo-export --heal`) do, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_exporter.export import Result, measure_file
from mpo_exporter.heal.checkpoint import NAME
from mpo_exporter.heal.data import healing_data
from mpo_exporter.heal.run import Healed, heal
from mpo_exporter.heal.settings import HealRequest, Settings, parse_tokens
from mpo_exporter.heal.workers import Workers, joined, shown, silent
from mpo_exporter.source import find_source
from mpo_formats import ConfigError, MpoError
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.measure import Comparison
from mpo_runtime.model import check_device, read_text_files, set_threads
from mpo_runtime.models.decoder import GraniteModel
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class HealCommand:
    """The options of `mpo-export heal`, as they were given.

    `text` is trained on, `eval_text` and `measure_tokens` say what quality is measured on.
    """

    file: Path
    teacher: str
    settings: Settings
    out: Path | None = None
    force: bool = False
    text: Path | None = None
    work: Path | None = None
    eval_text: Path | None = None
    measure_tokens: int | None = None
    device: str = "cpu"
    threads: int | None = None


def run_heal(given: HealCommand) -> Healed:
    """Heals a file and prints its quality before and after.

    Raises:
        MpoError: as `heal` does, and for options out of range.
    """
    from mpo_exporter.cli.export import held_out_text

    check_device(given.device)
    if given.measure_tokens is not None and given.measure_tokens < 0:
        raise ConfigError(f"--measure-tokens {given.measure_tokens}: expected 0 or more")
    set_threads(given.threads)
    file = given.file
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a .mpo file that mpo-export wrote")
    source = find_source(given.teacher)
    held_out, reason = held_out_text(source.folder, given.eval_text, given.measure_tokens)
    request = HealRequest(
        file=file,
        teacher=source.folder,
        target=given.out or file.with_name(f"{file.stem}-healed.mpo"),
        settings=given.settings,
        text=given.text,
        held_out=held_out,
        work=given.work,
        force=given.force,
    )
    with joined(given.device) as workers:
        if workers.first:
            resumed = "; continuing from the last checkpoint" if (request.folder / NAME).exists() else ""
            print(f"healing {file} by {source.name} into {request.target}{resumed}", flush=True)
        with telling_of_checkpoints(request), shown("heal") if workers.first else nullcontext(silent) as update:
            result = heal(request, workers, update)
        if workers.first:
            print_healed(result, quality_before(request, workers.device), held_out, reason)
    return result


@contextmanager
def telling_of_checkpoints(request: HealRequest) -> Iterator[None]:
    """When the user stops a healing that has a checkpoint, says that the same command continues it."""
    try:
        yield
    except KeyboardInterrupt:
        if (request.folder / NAME).exists():
            print("stopped; the same command continues from the last checkpoint", file=sys.stderr, flush=True)
        raise


def quality_before(request: HealRequest, device: str) -> Comparison | None:
    """The unhealed file against its teacher on the held-out text, if there is one."""
    if request.held_out is None:
        return None
    source = Checkpoint(request.teacher)
    try:
        dense = GraniteModel(source.architecture, ReferenceOps(source, device=device))
        return measure_file(request.file, None, dense, request.held_out, device, lambda stage, done, total: None)
    finally:
        source.close()


def print_healed(result: Healed, before: Comparison | None, text: TokenText | None, reason: str) -> None:
    """Prints the quality before and after, and how long the training was.

    Args:
        text: what quality was measured on, None where it was not measured, for `reason`.
    """
    from mpo_exporter.report.next_step import wrote

    console = Console()
    if before and result.comparison and text:
        table = Table("", "dense", "before", "healed")
        for column in table.columns[1:]:
            column.justify = "right"
        after, dense = result.comparison, before.reference
        figures = (before.model, after.model)
        table.add_row(
            "perplexity",
            f"{dense.perplexity:.2f} ± {dense.error:.2f}",
            *(f"{item.perplexity:.2f} ± {item.error:.2f}" for item in figures),
        )
        table.add_row("KL to dense, mean", "0", f"{before.kl_mean:.4f}", f"{after.kl_mean:.4f}")
        table.add_row("KL to dense, 99.9 %", "0", f"{before.kl_999:.4f}", f"{after.kl_999:.4f}")
        table.add_row("same top token", "100 %", f"{100 * before.same_top1:.1f} %", f"{100 * after.same_top1:.1f} %")
        console.print(table)
        console.print(
            f"measured on the first {text.ids.size:,} tokens of {text.name}, held-out text; nothing was trained on it",
            highlight=False,
        )
        if after.kl_mean > before.kl_mean:
            console.print(
                "healing made this file worse: heal longer, or with lower rates (--rate 0.3)", highlight=False
            )
    else:
        console.print(f"quality was not measured: {reason}", highlight=False)
    console.print(f"trained on {result.tokens:,} tokens in {result.minutes:.1f} minutes", highlight=False)
    console.print(wrote(result.path), highlight=False, markup=False, soft_wrap=True)


def heal_settings(
    wanted: bool, tokens: str | None, epochs: float | None, minutes: float | None, text: Path | None = None
) -> Settings | None:
    """The settings of an export's healing stage, None where none was asked for.

    Args:
        wanted: whether `--heal` was given.
        tokens, epochs, minutes, text: the values of `--heal-tokens`, `--heal-epochs`, `--heal-minutes` and `--heal-text`,
            each of which implies `--heal`.

    Raises:
        ConfigError: for two limits at once, or one that cannot be read.
    """
    if not wanted and all(value is None for value in (tokens, epochs, minutes, text)):
        return None
    return Settings(tokens=None if tokens is None else parse_tokens(tokens), epochs=epochs, minutes=minutes)


def check_healing(folder: Path, settings: Settings, text: Path | None) -> dict[str, str]:
    """Reads the healing text before the export begins, so that a text that cannot be used is refused early.

    Returns:
        Placeholders of the largest size for what healing will add to the file's provenance, so that an export with a
        target in bytes leaves room for it.

    Raises:
        ConfigError: naming file and line of what cannot be read, or for a text that is too short.
    """
    source = Checkpoint(folder)
    readers = read_text_files(source)
    source.close()
    data = healing_data(text, readers, source.architecture, settings)
    digest, number = "0" * 64, "0" * 12
    return {
        "healed_tokens": number,
        "healed_minutes": number,
        "healed_teacher_sha256": digest,
        "healed_text": data.name,
        "healed_text_sha256": digest,
        "healed_codes": "trained",
    }


def heal_exported(exported: Result, request: HealRequest, device: str) -> Healed:
    """Heals a file that was just exported, in its place.

    The healed file is complete and measured before it replaces the exported one. The exported file remains if healing
    fails, and also if its KL was measured and healing raised it.

    Raises:
        MpoError: as `heal` does; the message adds that the file is the unhealed one.
    """
    most_kl = exported.comparison.kl_mean if exported.comparison else None
    request = replace(request, force=True, discard_other=True, most_kl=most_kl)
    try:
        with shown("heal") as update:
            return heal(request, Workers(device=device), update)
    except MpoError as error:
        raise type(error)(f"{error}; {exported.path} is the file before healing") from None


def healing_notes(healed: Healed) -> list[str]:
    """How long an exported file was healed, and whether the healed form was kept."""
    notes = [f"healed on {healed.tokens:,} tokens in {healed.minutes:.1f} minutes"]
    if not healed.written:
        notes.append("healing raised the KL: the file is the one before healing; heal longer (--heal-tokens)")
    return notes
