"""The survey of a model: the candidates of every layer on a calibration text, measured once and cached.

A plan chooses from a survey, for any budget. `Survey.loss` also estimates terms that lie between the candidates.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.basis import Basis
from mpo_exporter.calibrate.fisher import LOOKUP, Backwards, Inputs
from mpo_exporter.calibrate.lanes import in_lanes
from mpo_exporter.calibrate.moments import Calibration
from mpo_exporter.calibrate.store import Memory, PartMissing, Store, array_json
from mpo_exporter.effort import USUAL, Care
from mpo_exporter.fit.shapes import low_rank_shape
from mpo_exporter.measure.cache import Cached, CacheFile
from mpo_exporter.measure.candidates import (
    CORED,
    GRIDS,
    LADDER,
    TURNED_GRIDS,
    Alone,
    Curve,
    Matrix,
    Sensitivity,
    table_sensitivity,
)
from mpo_exporter.measure.rows import alone_of, row_data, row_of
from mpo_exporter.measure.tried import Tried
from mpo_exporter.progress import Log, Progress, no_log, silent
from mpo_exporter.quantize.grid import Grid
from mpo_exporter.terms import Candidate, Transforms
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, Quantized
from mpo_formats.architecture import EMBEDDING, full_rank
from mpo_formats.codec import to_json
from mpo_formats.layout import transform_tensors
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import DenseWeights, Weights

# To be raised whenever a survey of the same model and text would come out differently.
VERSION = 13
# The KL that exports measured over what second-order losses of single layers add up to: 1.2 to 1.6 on granite-nano, 2.0 to 2.5 on
# SmolLM2 with another text than it was calibrated on.
OBSERVED = 1.5


@dataclass(frozen=True, slots=True)
class Survey:
    """The candidates of every layer of a model, in the order of the file.

    Args:
        table: the second moment [E, E] that the embedding's rows are rounded with; None of a survey without text.
        alone: the losses of cores that replace a matrix, for the attention and MLP matrices.
        complete: whether the losses of cores were measured for all layers; else only where cores may pay, and none alone.
        gains: of the layers whose integers take a transform of their input: the expected loss of integers that do not, over
            that of integers that do.
        bases: the stored transforms of the candidates, by their names.
    """

    candidates: dict[str, list[Candidate]]
    table: Matrix | None
    alone: dict[str, Alone] = field(default_factory=dict)
    complete: bool = True
    gains: dict[str, float] = field(default_factory=dict)
    bases: dict[str, Basis] = field(default_factory=dict)

    def loss(self, linear: LinearSpec) -> float | None:
        """The expected loss of a layer's terms in nats per token; None for sums of terms that cannot be estimated.

        Terms that are no candidate take the loss of their neighbours: bonds by interpolation in log χ, groups that of the
        nearest group of the same bits. Floats cost nothing.
        """
        row = self.candidates[linear.name]
        for one in row:
            if one.describes(linear):
                return one.loss
        factor = 1.0 if linear.transformed else self.gains.get(linear.name, 1.0)
        match linear.terms:
            case (Dense(),):
                return 0.0
            case (Quantized() as base,):
                found = nearest_integers(row, base)
            case (Mpo() as cores,):
                return self._alone_loss(linear, cores)
            case (Quantized() as base, Mpo() as cores):
                found = corrected_loss(row, linear, base, cores)
            case _:
                return None
        return None if found is None else factor * found

    def total_loss(self, linears: Sequence[LinearSpec]) -> float | None:
        """The summed loss of layers in nats per token, None if one of them cannot be estimated."""
        losses = [self.loss(linear) for linear in linears]
        known = [loss for loss in losses if loss is not None]
        return sum(known) if len(known) == len(losses) else None

    def _alone_loss(self, linear: LinearSpec, term: Mpo) -> float | None:
        """The loss of cores that replace a matrix; more than two cores count as two of the same χ."""
        measured = self.alone.get(linear.name)
        if measured is None:
            return None
        low_rank = (term.out_dims, term.in_dims) == low_rank_shape(linear.out_features, linear.in_features)
        most = max(full_rank(term.out_dims, term.in_dims))
        return interpolated((*(measured.low_rank if low_rank else measured.balanced), (most, 0.0)), max(term.bonds))


def nearest_integers(row: Sequence[Candidate], term: Quantized) -> float | None:
    """The loss of integers, that of the same bits with the nearest group.

    A difference in stored zeros counts like half a doubling of the group.
    """

    def distance(other: Quantized) -> float:
        return abs(math.log2(other.group / term.group)) + (other.zeros != term.zeros) / 2

    found = [
        (distance(one.terms[0]), one.loss)
        for one in row
        if len(one.terms) == 1 and isinstance(one.terms[0], Quantized) and one.terms[0].bits == term.bits
    ]
    return min(found)[1] if found else None


def corrected_loss(row: Sequence[Candidate], linear: LinearSpec, base: Quantized, cores: Mpo) -> float | None:
    """The loss of integers with cores beside them: the integers' own, times the share that cores leave of the nearest base."""
    alone = nearest_integers(row, base)
    bases = [one.terms[0] for one in row if len(one.terms) == 2 and isinstance(one.terms[0], Quantized)]
    if alone is None or not bases:
        return alone
    nearest = min(bases, key=lambda one: (abs(one.bits - base.bits), abs(one.group - base.group)))
    if (cores.out_dims, cores.in_dims) != low_rank_shape(linear.out_features, linear.in_features):
        return alone
    plain = nearest_integers(row, nearest)
    curve = [
        (max(one.terms[1].bonds), one.loss)
        for one in row
        if len(one.terms) == 2 and one.terms[0] == nearest and isinstance(one.terms[1], Mpo)
    ]
    most = min(linear.out_features, linear.in_features)
    left = interpolated((*curve, (most, 0.0)), max(cores.bonds))
    return alone if not plain else alone * min(left / plain, 1.0)


def interpolated(curve: Curve, chi: int) -> float:
    """The loss at χ on a curve of (χ, loss), linear in log χ."""
    points = sorted(dict(curve).items())
    return float(np.interp(math.log(chi), [math.log(at) for at, _ in points], [loss for _, loss in points]))


def survey(
    source: Weights,
    calibration: Calibration,
    *,
    grids: Sequence[Grid] | None = None,
    chis: Sequence[int] = LADDER,
    transforms: Transforms = "hadamard",
    care: Care = USUAL,
    complete: bool = True,
    store: Store | None = None,
    progress: Progress = silent,
) -> Survey:
    """Measures every layer's candidates on the dense upstream, one block at a time.

    A grid whose group does not divide a layer's rows is tried with the largest smaller group that does. Rows that no group
    divides stay in bf16, as do values that are too large for a scale in half precision.

    Args:
        grids: of integers; None for those that suit each layer.
        chis: bond dimensions of cores, beside the integers and alone.
        transforms: that layers may take of their input, where that lowers their loss.
        complete: measures cores everywhere; see `Survey`.
        store: keeps what was measured, so that a later run with it goes on where this one ended.

    Raises:
        ConfigError: naming the layer whose values are not finite.
    """
    kept: Store = Memory() if store is None else store
    names = [linear.name for linear in source.spec.linears]
    tried = Tried(None if grids is None else tuple(grids), tuple(chis), transforms, complete, care.rows)
    kept.scope("survey", digest_of([VERSION, asdict(care), asdict(tried)]))
    done = {name for name in names if kept.read(f"survey-layer-{name}")}

    def measure() -> None:
        for block in sensitivities(source, calibration, care.windows, progress, kept):
            # Layers with one input share its moment, which one lane may turn.
            for name, arrays in chain.from_iterable(
                in_lanes(lambda lane, layers: tried.rows_of(source, layers), block)
            ):
                if name == EMBEDDING:
                    # Single precision, as in the cache: an export with a cached survey gives the same bytes as one without.
                    kept.write("survey-table", {"table": block[0][name].hessian.astype(np.float32)})
                kept.write(f"survey-layer-{name}", arrays)
                done.add(name)
                progress("surveying", len(done), len(names))

    try:
        if len(done) < len(names) or kept.read("survey-table") is None:
            measure()
        if len(done) < len(names):
            raise PartMissing("survey: layers are missing that a run before has measured")
    except PartMissing:
        kept.scope("survey", "")
        done.clear()
        measure()
    return collected(kept, names, complete)


def collected(kept: Store, names: Sequence[str], complete: bool) -> Survey:
    """The survey of which every layer was measured.

    Raises:
        ConfigError: if the embedding was not.
    """
    table = kept.read("survey-table")
    if table is None:
        raise ConfigError("survey: the embedding was not measured")
    rows, alone_by_name, gains, tensors = {}, {}, {}, {}
    for name in names:
        found = dict(kept.read(f"survey-layer-{name}") or {})
        row, cores_data, gains[name] = array_json(found.pop("row"))
        rows[name] = row_of(row)
        tensors.update(found)
        if cores_data is not None:
            alone_by_name[name] = alone_of(cores_data)
    return Survey(rows, table["table"].astype(np.float64), alone_by_name, complete, gains, bases_of(rows, tensors))


def bases_of(rows: Mapping[str, Sequence[Candidate]], tensors: Mapping[str, NDArray[Any]]) -> dict[str, Basis]:
    """The stored transforms of candidates by their names, with their tensors."""
    found: dict[str, Basis] = {}
    for stored in (one.transform for row in rows.values() for one in row):
        if stored is not None and stored.name not in found:
            own = {tensor.name: tensors[tensor.name] for tensor in transform_tensors(stored)}
            found[stored.name] = Basis(transform=stored, tensors=own)
    return found


def digest_of(data: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16]


def sensitivities(
    source: Weights,
    calibration: Calibration,
    count: int = USUAL.windows,
    progress: Progress = silent,
    store: Store | None = None,
) -> Iterator[list[dict[str, Sensitivity]]]:
    """Yields the sensitivities on the dense upstream block by block: those of layers with one input together, by their names.

    The last block comes first, and the embedding last.

    Args:
        count: windows that they are measured on, spread over those of the calibration.
        store: as `Backwards` takes it; layers of blocks that it is past are not yielded again.
    """
    windows = calibration.windows
    picks = np.linspace(0, len(windows) - 1, min(count, len(windows))).round().astype(np.int64)
    walk = Backwards(
        source,
        windows,
        picks=picks,
        batch=calibration.batch,
        seen=calibration.seen,
        store=store,
        device=calibration.device,
        progress=lambda done, total: progress("gradients", done, total),
    )
    architecture = source.spec.architecture
    frequency = np.bincount(windows.reshape(-1), minlength=architecture.vocab_size) / windows.size
    head: Inputs | None = None
    for block in walk.inputs():
        match block:
            case [Inputs((name,)) as one] if name == EMBEDDING:
                head = one
            case [Inputs((name,)) as one] if name == LOOKUP:
                used = (None, None) if head is None else (head.moment.second, head.fisher[EMBEDDING])
                yield [{EMBEDDING: table_sensitivity(frequency, one.fisher[LOOKUP], *used).scaled(OBSERVED)}]
            case _:
                yield [
                    {name: Sensitivity(one.moment, one.fisher[name]).scaled(OBSERVED) for name in one.names}
                    for one in block
                ]


def survey_file(
    source: DenseWeights, walk: Calibration, text: TokenText, care: Care, transforms: Transforms = "hadamard"
) -> CacheFile:
    """The cache file of a survey, named by the digests of the model and of the calibration text, and the basis."""
    key = {
        "version": VERSION,
        "architecture": hashlib.sha256(to_json(source.architecture).encode()).hexdigest(),
        "windows": list(walk.windows.shape),
        "tokens": hashlib.sha256(walk.windows.tobytes()).hexdigest(),
        "surveyed": care.windows,
        "rows": care.rows,
        "grids": [[grid.bits, grid.group, grid.zeros] for grid in (*GRIDS, *TURNED_GRIDS)],
        "transforms": transforms,
        "cores": [[grid.bits, grid.group, grid.zeros] for grid in CORED],
        "bonds": list(LADDER),
    }
    parts = (source.sha256(), text.sha256, *(() if transforms == "hadamard" else (f"transforms-{transforms}",)))
    return CacheFile("survey", source.folder.resolve().name, parts, key)


def cached_survey(
    source: DenseWeights,
    walk: Calibration,
    text: TokenText,
    *,
    transforms: Transforms = "hadamard",
    care: Care = USUAL,
    complete: bool = True,
    store: Store | None = None,
    progress: Progress = silent,
    log: Log = no_log,
) -> Survey:
    """The survey of a model on a calibration text: from the cache, or measured now and cached.

    Args:
        transforms, store: as `survey` takes them.
        complete: measures cores everywhere, which takes longer; a complete survey in the cache is always good enough.

    Raises:
        ConfigError: as `survey` does.
    """
    file = survey_file(source, walk, text, care, transforms)
    cached = file.read(log)
    if cached is not None and (cached.content["complete"] or not complete):
        log(f"survey: measured before, read from {file.path.name}")
        return unpacked(cached)
    if cached is not None:
        log("survey: measured before, but cores only where they pay; measuring them everywhere")
    started = time.perf_counter()
    found = survey(source, walk, transforms=transforms, care=care, complete=complete, store=store, progress=progress)
    seconds = time.perf_counter() - started
    log(f"survey: every layer measured in {seconds:.0f} s, cached for other budgets")
    file.write(packed(found, seconds), log)
    return found


def packed(found: Survey, seconds: float) -> Cached:
    """A survey as plain data and one array."""
    rows = {name: row_data(row) for name, row in found.candidates.items()}
    alone = {name: asdict(one) for name, one in found.alone.items()}
    content = {
        "candidates": rows,
        "alone": alone,
        "gains": found.gains,
        "complete": found.complete,
        "seconds": seconds,
    }
    arrays = {} if found.table is None else {"table": found.table.astype("float32")}
    for basis in found.bases.values():
        arrays.update(basis.tensors)
    return Cached(content, arrays)


def unpacked(cached: Cached) -> Survey:
    """The survey that `packed` was given."""
    rows = {name: row_of(row) for name, row in cached.content["candidates"].items()}
    alone = {name: alone_of(one) for name, one in cached.content["alone"].items()}
    table, content = cached.arrays["table"].astype("float64"), cached.content
    return Survey(rows, table, alone, content["complete"], content["gains"], bases_of(rows, cached.arrays))
