"""Every layer: what it is stored as, its error, and the spectrum of its dense matrix; and a recorder of how it was fitted."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Calibration, dense_matrix
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.export import Fitted
from mpo_exporter.fit.common import activation_error
from mpo_exporter.progress import Progress, silent
from mpo_exporter.report.facts import Calibrated, Compression, Layer, Norm, Spectrum, Stage, Step, Term
from mpo_exporter.report.job import Job
from mpo_exporter.terms import stored_bytes
from mpo_formats import Dense, LinearSpec, MpoFile, Quantized
from mpo_formats import Term as StoredTerm
from mpo_formats.layout import ELEMENTS, term_tensors
from mpo_formats.reference import matrix as stored_matrix
from mpo_runtime.cli.inspect import term_text
from mpo_runtime.weights.protocol import Weights

Matrix = NDArray[np.float64]
# Multiply-adds that moments and spectra of the layers may take by default: half a minute on a slow core.
WALK_BUDGET = 4e11
SPECTRA_BUDGET = 2e11
# Windows of calibration text that layers are measured on by default. Fewer than the least give a poor moment.
MOST_WINDOWS = 32
LEAST_WINDOWS = 8
# The most ranks at which a spectrum is kept.
SPECTRUM_POINTS = 48
# In larger models even the errors of the weights alone are not measured.
MOST_WEIGHTS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """A layer's relative error in a norm, and its spectrum if the budget allowed it."""

    error: float
    norm: Norm
    spectrum: Spectrum | None


def decision(linear: LinearSpec) -> Layer:
    """What one layer is stored as, without the measured figures."""
    parts = linear.name.split(".")
    block = int(parts[2]) if len(parts) > 3 and parts[2].isdigit() else None
    size = stored_bytes(linear)
    return Layer(
        name=linear.name,
        block=block,
        matrix=linear.name if block is None else ".".join(parts[3:]),
        rows=linear.out_features,
        columns=linear.in_features,
        terms=tuple(term_facts(linear, index, term) for index, term in enumerate(linear.terms)),
        bytes=size,
        bits_per_weight=8 * size / (linear.out_features * linear.in_features),
        error=None,
        norm=None,
        spectrum=None,
        hadamard=linear.hadamard,
        transform=0 if linear.transform is None else linear.transform.block,
    )


def term_facts(linear: LinearSpec, index: int, term: StoredTerm) -> Term:
    """One term of a layer."""
    tensors = term_tensors(f"{linear.name}.{index}", term, linear.out_features, linear.in_features)
    size = sum(tensor.size for tensor in tensors)
    if isinstance(term, Dense):
        return Term(term.kind, term_text(term), 8 * ELEMENTS[term.dtype][1], 0, 0, (), (), size)
    if isinstance(term, Quantized):
        words = term_text(term) + (" with zeros" if term.zeros else "")
        return Term(term.kind, words, term.bits, term.group, 0, (), (), size)
    bits = term.core_bits or 8 * ELEMENTS[term.dtype][1]
    return Term(term.kind, term_text(term), bits, term.group, max(term.bonds), term.out_dims, term.in_dims, size)


def affordable_windows(source: Weights, window: int, asked: int | None) -> int:
    """The number of windows to measure layers on: `asked`, or what the budget allows, 0 if that is too little."""
    if asked is not None:
        return asked
    left = WALK_BUDGET - sum(linear.out_features * linear.in_features**2 for linear in source.spec.linears)
    count = int(left / (source.spec.architecture.parameters() * window))
    return 0 if count < LEAST_WINDOWS else min(count, MOST_WINDOWS)


def with_spectra(source: Weights) -> set[str]:
    """The layers whose spectra the budget allows; those of the first, middle and last block are preferred."""
    blocks = source.spec.architecture.num_hidden_layers
    favourites = {0, blocks // 2, blocks - 1}

    def rank(linear: LinearSpec) -> int:
        block = decision(linear).block
        return 2 if block is None else 0 if block in favourites else 1

    chosen, left = set(), SPECTRA_BUDGET
    for linear in sorted(source.spec.linears, key=rank):
        small, large = sorted((linear.out_features, linear.in_features))
        cost = 2 * small * small * large + 4 * small**3 + (4 * large**3 if large == linear.in_features else 0)
        if cost > left:
            break
        left -= cost
        chosen.add(linear.name)
    return chosen


def spectrum(matrix: Matrix, second: Matrix | None) -> Spectrum:
    """Singular values of W L, where `second` = L Lᵀ is the input's second moment, or of W alone without one."""
    weighted = matrix if second is None else matrix @ second
    rows, columns = matrix.shape
    if rows <= columns:
        squares = np.linalg.eigvalsh(weighted @ matrix.T)
    elif second is None:
        squares = np.linalg.eigvalsh(matrix.T @ matrix)
    else:
        values, vectors = np.linalg.eigh(second)
        root = matrix @ (vectors * np.sqrt(np.maximum(values, 0)))
        squares = np.linalg.eigvalsh(root.T @ root)
    squares = np.maximum(squares[::-1], 0)
    total = float(squares.sum())
    kept = np.cumsum(squares) / total if total else np.ones_like(squares)
    places = np.unique(np.geomspace(1, squares.size, SPECTRUM_POINTS).round().astype(np.int64))
    relative = np.sqrt(squares / squares[0]) if squares[0] else squares
    return Spectrum(
        whitened=second is not None,
        ranks=tuple(int(place) for place in places),
        values=tuple(float(relative[place - 1]) for place in places),
        rank=int(squares.size),
        rank_90=int(np.searchsorted(kept, 0.9 - 1e-12)) + 1,
    )


def calibrated_layers(
    file: MpoFile, source: Weights, windows: NDArray[np.int64], folder: Path, progress: Progress
) -> Iterator[tuple[str, Measurement]]:
    """Measures layers for the inputs that they have in the dense model, block by block.

    An untied embedding has no such input and is left out.
    """
    chosen = with_spectra(source)
    done = 0
    for names, moment in Calibration(source, windows, folder).dense():
        for name in names:
            matrix = dense_matrix(source, name)
            error = relative_error(matrix, stored_matrix(file, file.spec.linear(name)), moment.second)
            found = spectrum(matrix, moment.second) if name in chosen else None
            yield name, Measurement(error, "activations", found)
            done += 1
            progress("layers", done, len(file.spec.linears))


def plain_layers(
    file: MpoFile, source: Weights, names: Sequence[str], progress: Progress
) -> Iterator[tuple[str, Measurement]]:
    """Measures layers without calibration text: the errors of their weights."""
    chosen = with_spectra(source)
    for done, name in enumerate(names, 1):
        matrix = dense_matrix(source, name)
        error = relative_error(matrix, stored_matrix(file, file.spec.linear(name)), None)
        yield name, Measurement(error, "weights", spectrum(matrix, None) if name in chosen else None)
        progress("weights", done, len(names))


def measured_layers(
    job: Job, file: MpoFile, source: Weights, progress: Progress
) -> tuple[tuple[Layer, ...], Calibrated | None, str | None]:
    """Every layer, with the most telling error that can be had of it.

    Errors are those for the inputs in the dense model where the job has calibration text and the budget allows it, then
    those that the export recorded, then those of the weights.

    Returns:
        The layers; the calibration text they were measured on; the reason if there is none.
    """
    found: dict[str, Measurement] = {}
    calibrated, reason = None, None
    window = min(256, source.spec.architecture.max_position_embeddings)
    count = affordable_windows(source, window, job.calib_windows)
    text = job.calibration
    if text is None:
        reason = "no calibration text; give one with --calib"
    elif not count:
        reason = "the model is large for this machine; mpo-export report with --calib-windows measures it all the same"
    else:
        windows = cut_calibration(text, source.spec.architecture, count=count)
        found.update(calibrated_layers(file, source, windows, job.folder, progress))
        calibrated = Calibrated(text.name, text.sha256, int(windows.shape[0]), int(windows.size))
    for step in job.compression.steps if job.compression else ():
        found.setdefault(step.layer, Measurement(step.error, "fit", None))
    rest = [linear.name for linear in file.spec.linears if linear.name not in found]
    if source.spec.architecture.parameters() <= MOST_WEIGHTS:
        found.update(plain_layers(file, source, rest, progress))
    layers = [with_measurement(decision(linear), found.get(linear.name)) for linear in file.spec.linears]
    return tuple(layers), calibrated, reason


def with_measurement(layer: Layer, found: Measurement | None) -> Layer:
    """A layer with what was measured of it, if anything."""
    if found is None:
        return layer
    return replace(layer, error=found.error, norm=found.norm, spectrum=found.spectrum)


class Recorder:
    """Records an export: its methods `progress` and `fitted` go into the export's Listener.

    Args:
        update: is called with all progress too.
    """

    def __init__(self, update: Progress = silent) -> None:
        self.update = update
        self.start = self.last = time.perf_counter()
        self.stages: dict[str, tuple[float, float, int]] = {}
        self.steps: list[Step] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        """Records a step of a stage. A stage begins when the last step of any stage before it ended."""
        now = time.perf_counter()
        begun = self.stages[stage][0] if stage in self.stages else self.last - self.start
        self.stages[stage] = (begun, now - self.start, done)
        self.last = now
        self.update(stage, done, total)

    def fitted(self, fit: Fitted) -> None:
        """Records one layer's fit."""
        end = time.perf_counter() - self.start
        second = None if fit.moment is None else fit.moment.second
        self.steps.append(Step(fit.layer, end, fit.seconds, relative_error(fit.dense, fit.stored, second)))

    def compression(self) -> Compression:
        """What was recorded so far."""
        stages = tuple(Stage(name, *times) for name, times in self.stages.items())
        return Compression(self.last - self.start, stages, tuple(self.steps))


def relative_error(matrix: Matrix, fitted: Matrix, second: Matrix | None) -> float:
    """‖W − Ŵ‖ / ‖W‖ in the norm of a second moment, or the Frobenius norm without one; 0 where ‖W‖ is 0."""
    whole = activation_error(matrix, second)
    return activation_error(matrix - fitted, second) / whole if whole else 0.0
