"""What `mpo-export heal` and the healing stage of an export (`mpo-export --heal`) do, and what they print."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mpo_exporter.certify import Certifier
from mpo_exporter.export import Result
from mpo_exporter.heal.checkpoint import NAME
from mpo_exporter.heal.data import healing_data
from mpo_exporter.heal.run import Healed, heal
from mpo_exporter.heal.settings import HealJob, Settings, parse_tokens
from mpo_exporter.heal.workers import Workers, joined, shown
from mpo_exporter.request import HealingRequest, Machine, MeasureRequest
from mpo_exporter.source import Source, open_source
from mpo_exporter.texts import held_out_text
from mpo_formats import ConfigError, MpoError
from mpo_runtime.measure import Comparison
from mpo_runtime.text.token_text import TokenText


@dataclass(frozen=True, slots=True)
class HealCommand:
    """One healing, as `mpo-export heal FILE` asks for it.

    Args:
        file: a `.mpo` file.
        teacher: the dense model that it was made from, as `open_source` takes it.
        out: the file to write; None: FILE-healed.mpo beside the file.
        text: to train on; None: the embedded healing text.
        work: folder for checkpoints and the teacher's outputs, which is kept; None: one beside the output, not kept.
    """

    file: Path
    teacher: str
    settings: Settings = field(default_factory=Settings)
    out: Path | None = None
    force: bool = False
    text: Path | None = None
    work: Path | None = None
    measure: MeasureRequest = field(default_factory=MeasureRequest)
    machine: Machine = field(default_factory=Machine)


def run_heal(command: HealCommand) -> Healed | None:
    """Heals a file and prints its quality before and after; returns None in all processes but the first.

    Raises:
        MpoError: as `heal` does.
    """
    command.machine.prepare()
    file, measure = command.file, command.measure
    if not file.is_file():
        raise ConfigError(f"{file}: no such file; give a .mpo file that mpo-export wrote")
    with open_source(command.teacher) as source, joined(command.machine.device) as workers:
        held_out, reason = held_out_text(source, measure.text, measure.tokens)
        job = HealJob(
            file=file,
            target=command.out or file.with_name(f"{file.stem}-healed.mpo"),
            settings=command.settings,
            text=command.text,
            held_out=held_out,
            work=command.work,
            force=command.force,
        )
        if not workers.first:
            heal(source, job, workers)
            return None
        resumed = "; continuing from the last checkpoint" if (job.folder / NAME).exists() else ""
        print(f"healing {file} by {source.name} into {job.target}{resumed}", flush=True)
        with telling_of_checkpoints(job), shown("heal") as update:
            result = heal(source, job, workers, update)
        before = Certifier(source.weights, held_out, device=workers.device).compare(file) if held_out else None
    print_healed(result, before, held_out, reason)
    return result


@contextmanager
def telling_of_checkpoints(job: HealJob) -> Iterator[None]:
    """When the user stops a healing that has a checkpoint, says that the same command continues it."""
    try:
        yield
    except KeyboardInterrupt:
        if (job.folder / NAME).exists():
            print("stopped; the same command continues from the last checkpoint", file=sys.stderr, flush=True)
        raise


def print_healed(result: Healed, before: Comparison | None, text: TokenText | None, reason: str) -> None:
    """Prints the quality before and after, and how long the training was.

    Args:
        text: what quality was measured on, None where it was not measured, for `reason`.
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
            f"measured on the first {text.ids.size:,} tokens of {text.name}, held-out text; nothing was trained on it\n"
            "KL: the distance of the next-token probabilities from the dense model's, in nats per token",
            highlight=False,
        )
        if after.kl_mean > before.kl_mean:
            console.print(
                "healing made this file worse: heal longer, or with lower rates (--rate 0.3)", highlight=False
            )
    else:
        console.print(f"quality was not measured: {reason}", highlight=False)
    console.print(f"trained on {result.tokens:,} tokens in {result.minutes:.1f} minutes", highlight=False)


def heal_settings(request: HealingRequest) -> Settings:
    """The settings of an export's healing stage.

    Raises:
        ConfigError: for more than one of tokens, epochs and minutes, or one that cannot be read.
    """
    tokens = None if request.tokens is None else parse_tokens(request.tokens)
    return Settings(tokens=tokens, epochs=request.epochs, minutes=request.minutes)


def check_healing(source: Source, request: HealingRequest) -> dict[str, str]:
    """Checks settings and text of a healing stage before the export begins, so that they are refused early.

    Returns:
        Placeholders of the largest size for what healing will add to the file's provenance, so that an export with a
        target in bytes leaves room for it.

    Raises:
        ConfigError: as `heal_settings`; naming file and line of what cannot be read; for a text that is too short.
    """
    data = healing_data(request.text, source.text_files, source.architecture, heal_settings(request))
    digest, number = "0" * 64, "0" * 12
    return {
        "healed_tokens": number,
        "healed_minutes": number,
        "healed_teacher_sha256": digest,
        "healed_text": data.name,
        "healed_text_sha256": digest,
        "healed_codes": "trained",
    }


def heal_exported(
    source: Source, exported: Result, request: HealingRequest, held_out: TokenText | None, device: str
) -> Healed:
    """Heals a file that was just exported, in its place.

    The healed file is complete and measured before it replaces the exported one. The exported file remains if healing
    fails, and also if its KL was measured and healing raised it.

    Raises:
        MpoError: as `heal` does; the message adds that the file is the unhealed one.
    """
    job = HealJob(
        file=exported.path,
        target=exported.path,
        settings=heal_settings(request),
        text=request.text,
        held_out=held_out,
        force=True,
        discard_other=True,
        most_kl=exported.comparison.kl_mean if exported.comparison else None,
    )
    try:
        with shown("heal") as update:
            return heal(source, job, Workers(device=device), update)
    except MpoError as error:
        raise type(error)(f"{error}; {exported.path} is the file before healing") from None


def healing_notes(healed: Healed) -> list[str]:
    """How long an exported file was healed, and whether the healed file was kept."""
    notes = [f"healed on {healed.tokens:,} tokens in {healed.minutes:.1f} minutes"]
    if not healed.written:
        notes.append("healing raised the KL: the file is the one before healing; heal longer (--heal-tokens)")
    return notes
