"""The survey of a model without calibration text: layers are judged by their weights, on some of their rows."""

from __future__ import annotations

import numpy as np
import torch

from mpo_exporter.basis import PLAIN
from mpo_exporter.calibrate.lanes import in_lanes
from mpo_exporter.calibrate.moments import dense_matrix, require_finite
from mpo_exporter.effort import USUAL
from mpo_exporter.fit.layer import widen
from mpo_exporter.measure.candidates import Matrix, Sensitivity, candidates
from mpo_exporter.measure.survey import Survey
from mpo_exporter.measure.tried import transform_gain
from mpo_exporter.progress import Progress, silent
from mpo_exporter.quantize.grid import LARGEST
from mpo_formats import ConfigError
from mpo_formats.packing import largest_magnitude
from mpo_runtime.weights.protocol import Weights


def blind_survey(source: Weights, *, hadamard: bool = True, progress: Progress = silent) -> Survey:
    """Candidates judged by their weights alone: the loss is the squared error relative to the matrix's own squares.

    Such losses order plans of one size. They are no nats, and the survey has no moment for the embedding's rows.

    Raises:
        ConfigError: naming the layer whose values are not finite.
    """
    found, gains = {}, {}
    for done, linear in enumerate(source.spec.linears, 1):
        try:
            matrix = sampled_matrix(source, linear.name)
            energy = max(float(np.vdot(matrix, matrix)), 1e-300)
            sensitivity = Sensitivity(None, np.full(len(matrix), 2 / energy))
            basis, gains[linear.name] = transform_gain(linear, matrix, sensitivity) if hadamard else (PLAIN, 1.0)
            found[linear.name] = candidates(linear, matrix, sensitivity, chis=(), basis=basis)
        except ConfigError as error:
            raise ConfigError(f"{linear.name}: {error}") from None
        progress("surveying", done, len(source.spec.linears))
    return Survey(found, None, {}, False, gains)


def sampled_matrix(source: Weights, name: str, count: int = USUAL.rows) -> Matrix:
    """`count` rows at equal distances of a dense matrix [O, I], all of which are looked at for values that are not finite.

    A matrix of at most twice as many rows comes whole, and so does one with values that integers may be unable to store.

    Raises:
        ConfigError: when a value is not finite.
    """
    tensor = f"{name}.0.weight"
    raw, dtype = source.array(tensor), source.dtype(tensor)
    step = -(-len(raw) // (4 * torch.get_num_threads()))
    pieces = [raw[start : start + step] for start in range(0, len(raw), step)]
    peak = float(np.max(in_lanes(lambda _, piece: largest_magnitude(piece, dtype), pieces), initial=0.0))
    # A transform of 256 inputs makes a value at most 16 times as large. What is not finite is not below anything.
    if len(raw) <= 2 * count or not 16 * peak < LARGEST:
        matrix = dense_matrix(source, name)
        require_finite(matrix, "matrix")
        return matrix
    picks = ((np.arange(count) + 0.5) * len(raw) / count).astype(np.int64)
    return widen(raw[picks], dtype)
