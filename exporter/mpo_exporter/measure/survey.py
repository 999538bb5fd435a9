"""The survey of a model: the candidates of every layer on a calibration text, measured once and cached.

A plan chooses from a survey, for any budget. `Survey.loss` also estimates terms that lie between the candidates.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from mpo_exporter.calibrate.fisher import LOOKUP, output_fisher
from mpo_exporter.calibrate.moments import Calibration, dense_matrix
from mpo_exporter.fit.shapes import low_rank_shape
from mpo_exporter.measure.cache import Cached, CacheFile
from mpo_exporter.measure.candidates import (
    CORED,
    GRIDS,
    LADDER,
    Alone,
    Curve,
    Matrix,
    Sensitivity,
    alone,
    candidates,
    table_sensitivity,
)
from mpo_exporter.progress import Log, Progress, no_log, silent
from mpo_exporter.quantize.grid import Grid
from mpo_exporter.terms import Candidate
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, Quantized, Term
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank
from mpo_formats.codec import to_json
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import DenseWeights, Weights

# To be raised whenever a survey of the same model and text would come out differently.
VERSION = 6
# Windows whose gradients are taken: the Fisher information needs less text than the moments.
FISHER_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class Survey:
    """The candidates of every layer of a model, in the order of the file.

    Args:
        table: the second moment [E, E] that the embedding's rows are rounded with.
        alone: the losses of cores that replace a matrix, for the attention and MLP matrices.
        complete: whether the losses of cores were measured for all layers; else only where cores may pay, and none alone.
    """

    candidates: dict[str, list[Candidate]]
    table: Matrix
    alone: dict[str, Alone] = field(default_factory=dict)
    complete: bool = True

    def loss(self, linear: LinearSpec) -> float | None:
        """The expected loss of a layer's terms in nats per token; None for sums of terms that cannot be estimated.

        Terms that are no candidate take the loss of their neighbours: bonds by interpolation in log χ, groups that of the
        nearest group of the same bits. Floats cost nothing.
        """
        row = self.candidates[linear.name]
        for one in row:
            if one.terms == linear.terms:
                return one.loss
        match linear.terms:
            case (Dense(),):
                return 0.0
            case (Quantized() as base,):
                return nearest_integers(row, base)
            case (Mpo() as cores,):
                return self._alone_loss(linear, cores)
            case (Quantized() as base, Mpo() as cores):
                return corrected_loss(row, linear, base, cores)
        return None

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
    grids: Sequence[Grid] = GRIDS,
    chis: Sequence[int] = LADDER,
    fisher_windows: int = FISHER_WINDOWS,
    complete: bool = True,
    progress: Progress = silent,
) -> Survey:
    """Measures every layer's candidates on the dense upstream, one block at a time.

    A grid whose group does not divide a layer's rows is tried with the largest smaller group that does. Rows that no group
    divides stay in bf16, as do values that are too large for a scale in half precision.

    Args:
        chis: bond dimensions of cores, beside the integers and alone.
        complete: measures cores everywhere; see `Survey`.

    Raises:
        ConfigError: naming the layer whose values are not finite.
    """
    found: dict[str, list[Candidate]] = {}
    cores: dict[str, Alone] = {}
    table = None
    for name, sensitivity in sensitivities(source, calibration, fisher_windows, progress):
        matrix = dense_matrix(source, name)
        try:
            found[name] = candidates(source.spec.linear(name), matrix, sensitivity, grids, chis, every=complete)
            if complete and name not in (EMBEDDING, HEAD):
                cores[name] = alone(matrix, sensitivity, chis)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        if name == EMBEDDING:
            # Single precision, as in the cache: an export with a cached survey gives the same bytes as one without.
            table = sensitivity.hessian.astype(np.float32).astype(np.float64)
        progress("surveying", len(found), len(source.spec.linears))
    if table is None:
        raise ConfigError("survey: the embedding was not measured")
    names = [linear.name for linear in source.spec.linears]
    alone_by_name = {name: cores[name] for name in names if name in cores}
    return Survey({name: found[name] for name in names}, table, alone_by_name, complete)


def sensitivities(
    source: Weights, calibration: Calibration, fisher_windows: int = FISHER_WINDOWS, progress: Progress = silent
) -> Iterator[tuple[str, Sensitivity]]:
    """Yields every layer's name and sensitivity on the dense upstream, block by block, the head last."""
    windows = calibration.windows
    picks = np.linspace(0, len(windows) - 1, min(fisher_windows, len(windows))).round().astype(np.int64)
    fisher = output_fisher(source, windows[picks], progress=lambda done, total: progress("gradients", done, total))
    architecture = source.spec.architecture
    frequency = np.bincount(windows.reshape(-1), minlength=architecture.vocab_size) / windows.size
    if not architecture.tie_word_embeddings:
        yield EMBEDDING, table_sensitivity(frequency, fisher[LOOKUP])
    for names, moment in calibration.dense():
        for name in names:
            if name == EMBEDDING:
                yield name, table_sensitivity(frequency, fisher[LOOKUP], moment.second, fisher[name])
            else:
                yield name, Sensitivity(moment, fisher[name])


def survey_file(source: DenseWeights, walk: Calibration, text: TokenText) -> CacheFile:
    """The cache file of a survey, named by the digests of the model and of the calibration text."""
    key = {
        "version": VERSION,
        "architecture": hashlib.sha256(to_json(source.architecture).encode()).hexdigest(),
        "windows": list(walk.windows.shape),
        "tokens": hashlib.sha256(walk.windows.tobytes()).hexdigest(),
        "gradients": FISHER_WINDOWS,
        "grids": [[grid.bits, grid.group, grid.zeros] for grid in GRIDS],
        "cores": [[grid.bits, grid.group, grid.zeros] for grid in CORED],
        "bonds": list(LADDER),
    }
    return CacheFile("survey", source.folder.resolve().name, (source.sha256(), text.sha256), key)


def cached_survey(
    source: DenseWeights,
    walk: Calibration,
    text: TokenText,
    *,
    complete: bool = True,
    progress: Progress = silent,
    log: Log = no_log,
) -> Survey:
    """The survey of a model on a calibration text: from the cache, or measured now and cached.

    Args:
        complete: measures cores everywhere, which takes longer; a complete survey in the cache is always good enough.

    Raises:
        ConfigError: as `survey` does.
    """
    file = survey_file(source, walk, text)
    cached = file.read(log)
    if cached is not None and (cached.content["complete"] or not complete):
        log(f"survey: measured before, read from {file.path.name}")
        return unpacked(cached)
    if cached is not None:
        log("survey: measured before, but cores only where they pay; measuring them everywhere")
    started = time.perf_counter()
    found = survey(source, walk, complete=complete, progress=progress)
    seconds = time.perf_counter() - started
    log(f"survey: every layer measured in {seconds:.0f} s, cached for other budgets")
    file.write(packed(found, seconds), log)
    return found


def packed(found: Survey, seconds: float) -> Cached:
    """A survey as plain data and one array."""
    rows = {
        name: [[one.bytes, one.loss, [asdict(term) for term in one.terms]] for one in row]
        for name, row in found.candidates.items()
    }
    alone = {name: asdict(one) for name, one in found.alone.items()}
    content = {"candidates": rows, "alone": alone, "complete": found.complete, "seconds": seconds}
    return Cached(content, {"table": found.table.astype("float32")})


def unpacked(cached: Cached) -> Survey:
    """The survey that `packed` was given."""
    rows = {
        name: [Candidate(size, loss, tuple(map(term_of, terms))) for size, loss, terms in row]
        for name, row in cached.content["candidates"].items()
    }
    alone = {
        name: Alone(*(tuple((chi, loss) for chi, loss in one[kind]) for kind in ("low_rank", "balanced")))
        for name, one in cached.content["alone"].items()
    }
    return Survey(rows, cached.arrays["table"].astype("float64"), alone, cached.content["complete"])


def term_of(data: dict[str, Any]) -> Term:
    """A term from its fields as JSON has them; raises FormatError for values that no term can have."""
    kind = {"dense": Dense, "quantized": Quantized, "mpo": Mpo}[data["kind"]]
    built: Term = kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})
    return built
