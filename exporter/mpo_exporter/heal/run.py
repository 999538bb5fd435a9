"""Healing from end to end: a file and its teacher in, a file of the same layers with healed values out."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mpo_exporter.export import measure_file, quality, require_folder
from mpo_exporter.heal.checkpoint import NAME
from mpo_exporter.heal.session import Session
from mpo_exporter.heal.settings import HealRequest
from mpo_exporter.heal.trainable import Arrays, Trainables
from mpo_exporter.heal.workers import Progress, Workers, silent
from mpo_exporter.source import require_finite_weights
from mpo_formats import Certificate, Certificates, ConfigError, ModelSpec, MpoFile, MpoWriter, OutputError
from mpo_formats.provenance import MOST_OPTIONS
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.measure import Comparison
from mpo_runtime.models.decoder import GraniteModel
from mpo_runtime.weights.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True)
class Healed:
    """The outcome of a healing.

    Args:
        path: the target.
        tokens, minutes: spent on the training.
        block_curves, curve: the loss of every step, for each block and for the whole model.
        comparison: the healed model against the teacher on held-out text, where that was measured.
        written: False where its KL was above the request's `most_kl`, so that nothing was written.
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


def heal(request: HealRequest, workers: Workers | None = None, progress: Progress = silent) -> Healed:
    """Retrains a file against its teacher and writes the result.

    An interrupted healing continues from its last checkpoint when it is called again with the same request.

    Args:
        workers: the processes that share the work; each of them must call this with the same request.

    Raises:
        FormatError: for a damaged file.
        CheckpointError: for a teacher of another architecture or vocabulary, or with weights that are not finite.
        ConfigError: for a text that is too short, settings that cannot be used here, a loss that is not finite, or too
            little memory.
        OutputError: when the target exists and `force` is not given, or cannot be written.
    """
    workers = workers or Workers()
    check_target(request.target, request.force)
    request.settings.check_processes(workers.count)
    file, source = MpoFile(request.file), Checkpoint(request.teacher)
    try:
        file.verify()  # otherwise damaged bytes would come out in a file whose checksums are right
        require_finite_weights(source, f"teacher {request.teacher.name}")
        session = Session(request, file, source, workers, progress)
        make_folder(request.folder)
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
    finally:
        source.close()
        file.close()
    if workers.first:
        clean(request)
    record = session.record
    minutes = record.seconds / 60
    return Healed(request.target, record.tokens, minutes, record.block_curves, record.curve, comparison, written)


def write_healed(session: Session, trainables: Trainables) -> Comparison | None:
    """Writes the healed file and measures it against the teacher on the held-out text, if there is one.

    The prefixes named in the certificate of the original file are measured again too.

    Raises:
        Worse: when its KL is above the request's `most_kl`; nothing is written then.
        OutputError: when the target exists and `force` is not given, or cannot be written.
    """
    request, file, device = session.request, session.file, session.workers.device
    text, found = request.held_out, list[Comparison]()

    def measure(path: Path) -> Certificates:
        if text is None:
            return Certificates(())
        dense = GraniteModel(session.source.spec.architecture, ReferenceOps(session.source, device=device))
        entries = []
        prefixes = sorted({entry.chi for entry in file.certificates().entries if entry.chi is not None}, reverse=True)
        for chi in (None, *prefixes):
            found.append(measure_file(path, chi, dense, text, device, lambda stage, done, total: None))
            if request.most_kl is not None and found[0].kl_mean > request.most_kl:
                raise Worse(found[0])
            entries.append(Certificate(chi, quality(found[-1], text)))
        return Certificates(tuple(entries))

    built: Arrays = {}
    layers = dict(trainables.layers)
    vectors = {f"{name}.weight": vector for name, vector in trainables.vectors.items()}
    with MpoWriter(request.target, healed_spec(file.spec, session.facts()), force=request.force) as writer:
        for tensor in writer.pending():
            name = tensor.name
            if name in vectors:
                writer.write(name, vectors[name].arrays()[name])
            elif name.startswith("file."):
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


def clean(request: HealRequest) -> None:
    """Removes the work folder; of one that the user named, only the checkpoint."""
    if request.work is None:
        shutil.rmtree(request.folder)
    else:
        (request.folder / NAME).unlink(missing_ok=True)


def check_target(target: Path, force: bool) -> None:
    """Raises OutputError for a target that exists and may not be overwritten, or whose folder is missing."""
    if target.is_dir() or (not force and os.path.lexists(target)):
        raise OutputError(f"{target}: exists already; give another name with --out or overwrite it with --force")
    require_folder(target)


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
