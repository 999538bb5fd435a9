"""Healing from end to end: a file and its teacher in, a file of the same layers with healed values out."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpo_exporter.certify import Certifier
from mpo_exporter.heal.checkpoint import NAME
from mpo_exporter.heal.grid import Arrays
from mpo_exporter.heal.session import Session
from mpo_exporter.heal.settings import HealJob
from mpo_exporter.heal.trainable import Trainables
from mpo_exporter.heal.workers import Progress, Workers, silent
from mpo_exporter.request import check_file
from mpo_exporter.source import Source, require_finite_weights
from mpo_formats import Certificates, ConfigError, ModelSpec, MpoFile, MpoWriter, OutputError
from mpo_formats.layout import TRANSFORM
from mpo_formats.provenance import MOST_OPTIONS
from mpo_runtime.measure import Comparison


@dataclass(frozen=True, slots=True)
class Healed:
    """The outcome of a healing.

    Args:
        path: the target.
        tokens, minutes: spent on the training.
        block_curves, curve: the loss of every step, for each block and for the whole model.
        comparison: the healed model against the teacher on held-out text, where that was measured.
        written: False where its KL was above the job's `most_kl`, so that nothing was written.
    """

    path: Path
    tokens: int
    minutes: float
    block_curves: list[list[float]]
    curve: list[float]
    comparison: Comparison | None
    written: bool = True


class Worse(Exception):
    """The healed model's KL, in `comparison`, is above the largest allowed one."""

    def __init__(self, comparison: Comparison) -> None:
        super().__init__(f"healing raised the KL to {comparison.kl_mean:.4g}")
        self.comparison = comparison


def heal(source: Source, job: HealJob, workers: Workers | None = None, progress: Progress = silent) -> Healed:
    """Retrains a file against its teacher and writes the result.

    An interrupted healing continues from its last checkpoint when it is called again with the same arguments.

    Args:
        source: the dense model that the file was made from, the teacher.
        workers: the processes that share the work; each of them must call this with the same job.

    Raises:
        FormatError: for a damaged file.
        CheckpointError: for a teacher of another architecture or vocabulary, or with weights that are not finite.
        ConfigError: for a text that is too short, settings that cannot be used here, a loss that is not finite, or too
            little memory.
        OutputError: when the target exists and `force` is not given, or cannot be written.
    """
    workers = workers or Workers()
    check_file(job.target, "--out", force=job.force)
    job.settings.check_processes(workers.count)
    with MpoFile(job.file) as file:
        file.verify()  # otherwise damaged bytes would come out in a file whose checksums are right
        require_finite_weights(source.weights, f"teacher {source.folder.name}")
        session = Session(job, file, source, workers, progress)
        make_folder(job.folder)
        with saying_what_to_lower(session):
            trainables = session.run()
            session.place = "writing the file"
            comparison, written = None, True
            if workers.first:
                try:
                    comparison = write_healed(session, trainables)
                except Worse as worse:
                    comparison, written = worse.comparison, False
            workers.wait()
    if workers.first:
        clean(job)
    record = session.record
    minutes = record.seconds / 60
    return Healed(job.target, record.tokens, minutes, record.block_curves, record.curve, comparison, written)


def write_healed(session: Session, trainables: Trainables) -> Comparison | None:
    """Writes the healed file and measures it against the teacher on the held-out text, if there is one.

    The prefixes named in the certificate of the original file are measured again too.

    Raises:
        Worse: when its KL is above the job's `most_kl`; nothing is written then.
        OutputError: when the target exists and `force` is not given, or cannot be written.
    """
    job, file = session.job, session.file
    text, found = job.held_out, list[Comparison]()

    def measure(path: Path) -> Certificates:
        if text is None:
            return Certificates(())
        certifier = Certifier(session.source.weights, text, device=session.workers.device)
        entries = []
        prefixes = sorted({entry.chi for entry in file.certificates().entries if entry.chi is not None}, reverse=True)
        for chi in (None, *prefixes):
            found.append(certifier.compare(path, chi))
            if job.most_kl is not None and found[0].kl_mean > job.most_kl:
                raise Worse(found[0])
            entries.append(certifier.certificate(chi, found[-1]))
        return Certificates(tuple(entries))

    built: Arrays = {}
    layers = dict(trainables.layers)
    vectors = {f"{name}.weight": vector for name, vector in trainables.vectors.items()}
    transforms: Arrays = {}
    for transform in trainables.transforms.values():
        transforms.update(transform.arrays())
    with MpoWriter(job.target, healed_spec(file.spec, session.facts()), force=job.force) as writer:
        for tensor in writer.pending():
            name = tensor.name
            if name in vectors:
                writer.write(name, vectors[name].arrays()[name])
            elif name in transforms:
                writer.write(name, transforms[name])
            elif name.startswith("file.") or f".{TRANSFORM}." in name:
                writer.write(name, file.array(name))
            else:
                if name not in built:
                    layer = next(layer for layer in layers if name.startswith(f"{layer}."))
                    built = layers.pop(layer).arrays()
                writer.write(name, built[name])
        writer.commit(measure)
    return found[0] if found else None


def healed_spec(spec: ModelSpec, facts: dict[str, str]) -> ModelSpec:
    """The spec with `facts` added to the export's options; the facts of an earlier healing are replaced."""
    options = {**spec.provenance.options, **facts}
    if len(options) > MOST_OPTIONS:
        options = facts
    return replace(spec, provenance=replace(spec.provenance, options=options))


def clean(job: HealJob) -> None:
    """Removes the work folder; of one that the user named, only the checkpoint."""
    if job.work is None:
        shutil.rmtree(job.folder)
    else:
        (job.folder / NAME).unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes the work folder; raises OutputError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made ({error.strerror}); give another folder with --work") from None


@contextmanager
def saying_what_to_lower(session: Session) -> Iterator[None]:
    """Turns running out of memory into a ConfigError that says where that happened and which options to lower."""
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
    """Whether an error says that the memory of a device or of this machine is exhausted."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)
