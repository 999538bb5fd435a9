"""Healing from end to end: a file and its teacher in, a file of the same layers out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from mpo_exporter.export import require_folder
from mpo_exporter.heal.checkpoint import NAME
from mpo_exporter.heal.distributed import Workers
from mpo_exporter.heal.progress import Progress, silent
from mpo_exporter.heal.save import Output, Worse, write_healed
from mpo_exporter.heal.session import Session
from mpo_exporter.heal.settings import Settings
from mpo_exporter.heal.trainable import Trainables
from mpo_exporter.source import require_finite_weights
from mpo_formats import ConfigError, MpoFile, OutputError
from mpo_runtime.measure import Comparison
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Healed:
    """What a healing gave: losses of all steps, what was spent, and the file against the teacher on held-out text.

    `written` is False where that was worse than what was allowed.
    """

    path: Path
    tokens: int
    minutes: float
    block_curves: list[list[float]]
    curve: list[float]
    comparison: Comparison | None
    written: bool = True


def heal(
    path: Path,
    teacher: Path,
    target: Path,
    settings: Settings,
    *,
    text: Path | TokenText | None = None,
    held_out: TokenText | None = None,
    force: bool = False,
    work: Path | None = None,
    workers: Workers | None = None,
    progress: Progress = silent,
    others: bool = False,
    most_kl: float | None = None,
) -> Healed:
    """Retrains the file `path` against the dense model `teacher` and writes the result to `target`.

    What was interrupted goes on from its last checkpoint when it is called again with the same arguments.

    Args:
        teacher: the Hugging Face folder that the file was made from.
        text: what to train on; the embedded healing text where None.
        held_out: what to measure the result on; None measures nothing.
        work: a folder for checkpoints and the teacher's logits, kept; None: one beside the target, removed at the end.
        most_kl: the KL on held-out text above which nothing is written.
        others: begins anew where the folder holds a checkpoint of another healing, which is refused otherwise.
        workers: the processes that share the work; all of them must call this with the same arguments.

    Raises:
        FormatError: for a damaged file.
        CheckpointError: for a teacher of another architecture or vocabulary, or whose weights are not finite.
        ConfigError: for a text too short, settings that cannot be honoured, a loss that is not finite, or no memory.
        OutputError: when the target exists and `force` is not given, or the disk is full.
    """
    workers = workers or Workers()
    check_target(target, force)
    settings.check_processes(workers.count)
    folder = work or work_folder(target)
    file, source = MpoFile(path), Checkpoint(teacher)
    try:
        file.verify()  # training would turn damaged bytes into a file whose checksums are right
        require_finite_weights(source, f"teacher {teacher.name}")
        session = Session(file, source, settings, text, folder, workers, progress, others=others)
        make_folder(folder)
        with saying_what_to_lower(session):
            trainables = session.run()
            session.place = "the writing of the file"
            comparison, written = None, True
            if workers.first:
                out = Output(target, session.facts(), held_out, force, workers.device, most_kl)
                comparison, written = write_if_better(file, trainables, source, out)
            workers.wait()
    finally:
        source.close()
        file.close()
    if workers.first:
        clean(folder, kept=work is not None)
    record = session.record
    return Healed(target, record.tokens, record.seconds / 60, record.block_curves, record.curve, comparison, written)


def write_if_better(
    file: MpoFile, trainables: Trainables, teacher: Checkpoint, out: Output
) -> tuple[Comparison | None, bool]:
    """Writes the healed file; gives what was measured and whether the file was written."""
    try:
        return write_healed(file, trainables, teacher, out), True
    except Worse as worse:
        return worse.comparison, False


def clean(folder: Path, *, kept: bool) -> None:
    """Removes the work folder, or only the checkpoint from one that is kept."""
    if kept:
        (folder / NAME).unlink(missing_ok=True)
    else:
        shutil.rmtree(folder)


def check_target(target: Path, force: bool) -> None:
    """Raises OutputError for a target that exists and may not be overwritten, or whose folder is missing."""
    if target.is_dir() or (not force and os.path.lexists(target)):
        raise OutputError(f"{target}: exists already; give another name with --out or overwrite it with --force")
    require_folder(target)


def make_folder(folder: Path) -> None:
    """Makes the work folder; raises OutputError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); give another folder with --work") from None


def work_folder(target: Path) -> Path:
    """Where checkpoints of the healing that writes `target` lie if the user names no folder."""
    return target.with_name(f".{target.name}.healing")


@contextmanager
def saying_what_to_lower(session: Session) -> Iterator[None]:
    """Turns running out of memory into a ConfigError that says where, and what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise ConfigError(
            f"healing: out of memory at {session.place}; lower --micro-batch, --window or --top-k, or "
            "spread the work with torchrun"
        ) from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a device or in the allocator of the CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
