"""The decision for every layer, what it cost there, and the spectrum of what was decided on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Calibration, dense_matrix
from mpo_exporter.calibrate.windows import cut_calibration
from mpo_exporter.progress import Progress
from mpo_exporter.report.facts import Calibrated, Layer, Norm, Spectrum, Step, Term
from mpo_exporter.report.record import relative_error
from mpo_exporter.terms import stored_bytes
from mpo_formats import Dense, LinearSpec, MpoFile, Quantized
from mpo_formats import Term as StoredTerm
from mpo_formats.layout import ELEMENTS, term_tensors
from mpo_formats.reference import matrix as stored_matrix
from mpo_runtime.cli.inspect import term_text
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.protocol import Weights

Matrix = NDArray[np.float64]
# Multiply-adds that measuring layers may take if the user says nothing: half a minute on a slow core.
WALK_BUDGET = 4e11
SPECTRA_BUDGET = 2e11
MOST_WINDOWS = 32
# Less text gives a moment that says little.
LEAST_WINDOWS = 8
SPECTRUM_POINTS = 48
# Files above this are not even rebuilt for the plain error of their weights.
MOST_WEIGHTS = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Measurement:
    """A layer's relative error in a norm, and its spectrum where that was within the budget."""

    error: float
    norm: Norm
    spectrum: Spectrum | None


def decisions(file: MpoFile) -> list[Layer]:
    """What every layer of a file is stored as, nothing measured yet."""
    return [decision(linear) for linear in file.spec.linears]


def decision(linear: LinearSpec) -> Layer:
    """What one layer is stored as."""
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
    """Windows of calibration text that the budget allows, 0 where it is too small; as many as were asked for."""
    if asked is not None:
        return asked
    left = WALK_BUDGET - sum(linear.out_features * linear.in_features**2 for linear in source.spec.linears)
    count = int(left / (source.spec.architecture.parameters() * window))
    return 0 if count < LEAST_WINDOWS else min(count, MOST_WINDOWS)


def with_spectra(source: Weights) -> set[str]:
    """The layers whose spectra the budget allows: the first, middle and last block come first."""
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
    """Singular values of W L, where C = L Lᵀ is the moment of the input, or of W alone without one."""
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
    """Measures layers on the dense upstream, block by block; of an untied embedding there is no activation to measure."""
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
    """Measures layers by their weights alone."""
    chosen = with_spectra(source)
    for done, name in enumerate(names, 1):
        matrix = dense_matrix(source, name)
        error = relative_error(matrix, stored_matrix(file, file.spec.linear(name)), None)
        yield name, Measurement(error, "weights", spectrum(matrix, None) if name in chosen else None)
        progress("weights", done, len(names))


def measured_layers(
    file: MpoFile,
    source: Weights,
    calibration: TokenText | None,
    asked: int | None,
    steps: Sequence[Step],
    folder: Path,
    progress: Progress,
) -> tuple[tuple[Layer, ...], Calibrated | None, str | None]:
    """Every layer's decision with the best figure of its error that there is, and why there is none where there is none.

    Args:
        calibration: text for the activation norm; without it errors are those of the fits, or of the weights.
        asked: windows of it; None for as many as the budget allows.
        steps: the fits that an export noted.
        folder: where activations are spilled for a while.
    """
    found: dict[str, Measurement] = {}
    calibrated, reason = None, None
    window = min(256, source.spec.architecture.max_position_embeddings)
    count = affordable_windows(source, window, asked)
    if calibration is None:
        reason = "no calibration text; give one with --calib"
    elif not count:
        reason = "the model is large for this machine; mpo-export report with --calib-windows measures it all the same"
    else:
        windows = cut_calibration(calibration, source.spec.architecture, count=count)
        found.update(calibrated_layers(file, source, windows, folder, progress))
        calibrated = Calibrated(calibration.name, calibration.sha256, int(windows.shape[0]), int(windows.size))
    for step in steps:
        found.setdefault(step.layer, Measurement(step.error, "fit", None))
    rest = [linear.name for linear in file.spec.linears if linear.name not in found]
    if source.spec.architecture.parameters() <= MOST_WEIGHTS:
        found.update(plain_layers(file, source, rest, progress))
    layers = [with_measurement(layer, found.get(layer.name)) for layer in decisions(file)]
    return tuple(layers), calibrated, reason


def with_measurement(layer: Layer, found: Measurement | None) -> Layer:
    """A decision with what was measured of it."""
    if found is None:
        return layer
    return replace(layer, error=found.error, norm=found.norm, spectrum=found.spectrum)
