"""What `mpo-export heal` does: find the models, heal, report."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_exporter.cli.export import held_out_text
from mpo_exporter.export import measure_file
from mpo_exporter.heal.checkpoint import NAME
from mpo_exporter.heal.distributed import joined
from mpo_exporter.heal.progress import shown, silent
from mpo_exporter.heal.run import Healed, heal, work_folder
from mpo_exporter.heal.settings import Settings
from mpo_exporter.report.next_step import wrote
from mpo_exporter.source import find_source
from mpo_formats import ConfigError
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.loading import check_device, set_threads
from mpo_runtime.measure import Comparison
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint


def run_heal(
    file: Path,
    teacher: str,
    settings: Settings,
    out: Path | None,
    force: bool,
    text: Path | None,
    work: Path | None,
    eval_text: Path | None,
    measure_tokens: int | None,
    device: str,
    threads: int | None,
) -> Healed:
    """Heals a file and prints quality before and after."""
    check_device(device)
    if measure_tokens is not None and measure_tokens < 0:
        raise ConfigError(f"--measure-tokens {measure_tokens}: expected 0 or more")
    set_threads(threads)
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a .mpo file that mpo-export wrote")
    target = out or file.with_name(f"{file.stem}-healed.mpo")
    source = find_source(teacher)
    held_out, reason = held_out_text(source.folder, eval_text, measure_tokens)
    with joined(device) as workers:
        if workers.first:
            begun = ((work or work_folder(target)) / NAME).exists()
            going_on = "; going on from the last checkpoint" if begun else ""
            print(f"healing {file} by {source.name} into {target}{going_on}", flush=True)
        showing = shown("heal") if workers.first else nullcontext(silent)
        with telling_of_checkpoints(work or work_folder(target)), showing as update:
            result = heal(
                file,
                source.folder,
                target,
                settings,
                text=text,
                held_out=held_out,
                force=force,
                work=work,
                workers=workers,
                progress=update,
            )
        if workers.first:
            before = measured_before(file, source.folder, held_out, workers.device)
            print_healed(result, before, held_out, reason)
    return result


@contextmanager
def telling_of_checkpoints(folder: Path) -> Iterator[None]:
    """Says, where the user stops a healing, that it can go on."""
    try:
        yield
    except KeyboardInterrupt:
        if (folder / NAME).exists():
            print("stopped; the same command goes on from the last checkpoint", file=sys.stderr, flush=True)
        raise


def measured_before(file: Path, teacher: Path, text: TokenText | None, device: str) -> Comparison | None:
    """The unhealed file against its teacher on held-out text."""
    if text is None:
        return None
    source = Checkpoint(teacher)
    try:
        dense = decoder_for(source.architecture, ReferenceOps(source, device=device))
        return measure_file(file, None, dense, text, device, lambda stage, done, total: None)
    finally:
        source.close()


def print_healed(result: Healed, before: Comparison | None, text: TokenText | None, reason: str) -> None:
    """Prints quality before and after, and what the healing took.

    Args:
        reason: why nothing was measured.
    """
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
