"""What a survey tries of every layer: the bases of its input, and in the best one the candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from mpo_exporter.basis import PLAIN, Basis
from mpo_exporter.calibrate.moments import dense_matrix, require_finite
from mpo_exporter.calibrate.store import Arrays, json_array
from mpo_exporter.effort import USUAL
from mpo_exporter.fit.rotation import price, rotated, rotation_block, row_step
from mpo_exporter.measure.candidates import (
    GRIDS,
    TURNED_GRIDS,
    Alone,
    Matrix,
    Sensitivity,
    alone,
    candidates,
    fitted,
)
from mpo_exporter.measure.rows import row_data
from mpo_exporter.quantize.gptq import expected_errors
from mpo_exporter.quantize.grid import LARGEST, Grid
from mpo_exporter.terms import Candidate, Transforms, hadamard_block
from mpo_formats import ConfigError, LinearSpec
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.weights.protocol import Weights

# What the bases are compared on.
PROBE = Grid(3, 64)


def transform_gain(
    linear: LinearSpec, matrix: Matrix, sensitivity: Sensitivity, sampled: int = USUAL.rows
) -> tuple[Basis, float]:
    """The basis in which a layer's integers are expected to lose less, that of its inputs or of their Hadamard transform.

    Beside it, the factor by which the loss is lower than in the basis of the inputs.
    """
    bases = PLAIN, Basis(hadamard_block(linear.in_features))
    return best_basis(bases, basis_losses(linear, matrix, sensitivity, bases, sampled))


def best_basis(bases: Sequence[Basis], losses: Sequence[float]) -> tuple[Basis, float]:
    """The basis of least loss, and the loss in the first one over it."""
    best = min(range(len(losses)), key=lambda place: losses[place], default=0)
    return (bases[best], losses[0] / losses[best]) if best else (bases[0], 1.0)


def basis_losses(
    linear: LinearSpec, matrix: Matrix, sensitivity: Sensitivity, bases: Sequence[Basis], sampled: int = USUAL.rows
) -> list[float]:
    """What a layer's integers are expected to lose on one grid in several bases; nothing where no integers can store it."""
    grids = fitted([PROBE], linear.in_features)
    require_finite(matrix, "matrix")
    if not grids or np.abs(matrix).max(initial=0.0) > LARGEST:
        return []
    rows, counted = sensitivity.sample(matrix, sampled)
    losses = []
    for basis in bases:
        tried = GRIDS if basis == PLAIN else TURNED_GRIDS
        group = max(grid.group for grid in fitted(tried, linear.in_features))  # as for the candidates
        errors = expected_errors(basis.turned(rows), sensitivity.moment, grids, group, basis)
        losses.append(float((errors @ counted.rows)[0]))
    return losses if all(loss > 0 for loss in losses) else []


@dataclass(frozen=True, slots=True)
class Tried:
    """What a survey tries of every layer; the fields are its arguments, and `rows` of its `care`."""

    grids: tuple[Grid, ...] | None
    chis: tuple[int, ...]
    transforms: Transforms
    complete: bool
    rows: int

    def rows_of(self, source: Weights, layers: Mapping[str, Sensitivity]) -> list[tuple[str, Arrays]]:
        """What a survey keeps of layers with one input, by their names: candidates, losses of cores, and bases.

        Raises:
            ConfigError: naming the layer whose values are not finite.
        """
        found = []
        bases = self.bases(source, layers)
        for name, sensitivity in layers.items():
            basis, gain = bases[name]
            row, cores = self.layer(source.spec.linear(name), dense_matrix(source, name), sensitivity, basis)
            data = [row_data(row), None if cores is None else asdict(cores), gain]
            found.append((name, {"row": json_array(data), **basis.tensors}))
        return found

    def layer(
        self, linear: LinearSpec, matrix: Matrix, sensitivity: Sensitivity, basis: Basis
    ) -> tuple[list[Candidate], Alone | None]:
        """The candidates of a layer in a basis of its inputs, and the losses of cores alone if asked for.

        Raises:
            ConfigError: naming the layer, when its values are not finite.
        """
        try:
            found = candidates(
                linear,
                matrix,
                sensitivity,
                self.grids,
                self.chis,
                basis=basis,
                every=self.complete,
                sampled=self.rows,
            )
            with_alone = self.complete and linear.name not in (EMBEDDING, HEAD)
            if sensitivity.moment is not None and (with_alone or linear.name == EMBEDDING):
                sensitivity.moment.turn(PLAIN)
            cores = alone(matrix, sensitivity, self.chis) if with_alone else None
        except ConfigError as error:
            raise ConfigError(f"{linear.name}: {error}") from None
        return found, cores

    def bases(self, source: Weights, layers: Mapping[str, Sensitivity]) -> dict[str, tuple[Basis, float]]:
        """For layers with one input the basis that each takes it in, and by what factor that lowers its loss.

        Raises:
            ConfigError: naming the layer whose values are not finite.
        """
        if self.transforms == "none":
            return dict.fromkeys(layers, (PLAIN, 1.0))
        linears = [source.spec.linear(name) for name in layers]
        columns = linears[0].in_features
        tried = [PLAIN, Basis(hadamard_block(columns))]
        rotation = None
        if self.transforms == "fitted" and (block := rotation_block(linears)):
            matrices = ((dense_matrix(source, name), one.rows) for name, one in layers.items())
            rotation = rotated(linears, matrices, next(iter(layers.values())).known, block)
            tried.append(rotation)
        losses: dict[str, list[float]] = {}
        for linear, (name, sensitivity) in zip(linears, layers.items(), strict=True):
            matrix, step = dense_matrix(source, name), row_step(linears) if rotation else 1
            if step > 1:  # on rows that the rotation was not fitted to
                held = slice(step // 2, None, step)
                matrix, sensitivity = matrix[held], Sensitivity(sensitivity.moment, sensitivity.rows[held])
            try:
                losses[name] = basis_losses(linear, matrix, sensitivity, tried, self.rows)
            except ConfigError as error:
                raise ConfigError(f"{name}: {error}") from None
        if rotation is not None:
            known = [one for one in losses.values() if one]
            before, after = sum(min(one[:2]) for one in known), sum(one[2] for one in known)
            if not known or after * price(rotation, linears) >= before:
                return {name: best_basis(tried[:2], one[:2]) for name, one in losses.items()}
            return {name: (rotation, one[0] / one[2]) if one else (PLAIN, 1.0) for name, one in losses.items()}
        return {name: best_basis(tried, one) for name, one in losses.items()}
