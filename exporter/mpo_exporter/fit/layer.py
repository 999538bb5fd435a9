"""Fits the terms of one layer to its matrix and makes their tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.basis import Basis, basis_of
from mpo_exporter.calibrate.lanes import in_lanes
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit import als, sweep, whitened
from mpo_exporter.fit.common import Cores, activation_error, contract, second_of
from mpo_exporter.fit.svd import sequential_svd
from mpo_exporter.quantize.gptq import TURNS, compensated, target
from mpo_exporter.quantize.rounding import (
    MOST_LOST,
    Integers,
    LostInScales,
    lost_in_scales,
    require_scales,
    round_to_nearest,
)
from mpo_exporter.quantize.rows import compensated_rows
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, Quantized, Term
from mpo_formats.layout import PLANES
from mpo_formats.packing import bf16_to_f32, f32_to_bf16

Matrix = NDArray[np.float64]
Tensors = dict[str, NDArray[Any]]
# Terms of a sum are fitted in turns, this many times; the round with the least error is kept.
ROUNDS = 2
# A term that has to make up for less than this share of a matrix's squared values may be stored as roughly as it likes.
NEGLIGIBLE = 1e-6
# Values that are rounded at once where rows are.
AT_ONCE = 1 << 19


@dataclass(frozen=True, slots=True)
class Method:
    """How terms are fitted where the moment of the layer's input is known; without one, `nearest` and `svd` are used.

    `rounding`: `compensated` (GPTQ and descent) or `nearest`. `cores`: `weighted` (ALS or sweeps for the least activation
    error of their shape), `whitened` (whitened SVD only) or `svd` (on the weights alone, the published method). `norm`: cores
    that replace a matrix are scaled to its Frobenius norm.
    """

    rounding: Literal["compensated", "nearest"] = "compensated"
    cores: Literal["weighted", "whitened", "svd"] = "weighted"
    norm: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """A layer's tensors by name, and the matrix [O, I] that the stored tensors stand for, or one term of it."""

    tensors: Tensors
    matrix: Matrix


def widen(raw: NDArray[Any], dtype: str) -> Matrix:
    """A stored float tensor in float64."""
    return (bf16_to_f32(raw) if dtype == "bf16" else raw).astype(np.float64)


def narrow(values: Matrix, dtype: str) -> NDArray[Any]:
    """float64 values rounded to a stored float type; bf16 as bit patterns.

    Raises:
        ConfigError: when a value is outside the range of the type.
    """
    if dtype == "bf16":
        return f32_to_bf16(values.astype(np.float32))
    with np.errstate(over="ignore"):
        result = values.astype(np.float16 if dtype == "f16" else np.float32)
    if not np.isfinite(result).all():
        raise ConfigError(f"values exceed the range of {dtype}; store this layer in another type")
    return result


def build_linear(
    linear: LinearSpec,
    raw: NDArray[Any],
    dtype: str,
    moment: Moment | None = None,
    method: Method | None = None,
    outputs: NDArray[np.float32] | None = None,
    basis: Basis | None = None,
) -> Built:
    """Fits all terms of a layer to its stored matrix [out, in], in the norm of its input's moment where that is given.

    A layer of transformed inputs is fitted in their basis, in which the moment is left (`Moment.turn`).

    Args:
        outputs: the second moment G [out, out] of the loss's gradient by its outputs, which integers are then rounded for too.
        basis: that of its inputs, needed where they take a stored transform.

    Raises:
        ConfigError: naming the layer, when a value is not finite or outside the range of the stored type.
    """
    matrix = widen(raw, dtype)
    only = linear.terms[0]
    if isinstance(only, Dense) and only.dtype == dtype and len(linear.terms) == 1 and not linear.transformed:
        return Built({f"{linear.name}.0.weight": raw}, matrix)
    try:
        basis = basis_of(linear, {}) if basis is None else basis
        matrix = basis.turned(matrix)
        if moment is not None:
            moment.turn(basis)
            matrix = target(matrix, moment)
        built = _fit(linear, matrix, moment, method or Method(), outputs)
        return replace(built, matrix=basis.back(built.matrix))
    except ConfigError as error:
        raise ConfigError(f"{linear.name}: {error}") from None


def rounded_rows(linear: LinearSpec, raw: NDArray[Any], dtype: str, basis: Basis) -> Tensors:
    """The tensors of a layer of integers alone as `build_linear` makes them without a moment, some rows at a time.

    Rows are rounded by themselves, and some of them stay in a cache where a large matrix is bound by the memory.

    Raises:
        ConfigError: as `build_linear` does.
    """
    [term] = linear.terms
    if not isinstance(term, Quantized):
        raise ConfigError(f"{linear.name}: expected integers to round row by row, found {term.kind}")
    bits, group = term.bits, term.group

    def rounded(lane: int, part: NDArray[Any]) -> tuple[Integers, LostInScales]:
        rows = basis.turned(widen(part, dtype))
        return round_to_nearest(rows, bits, group, zeros=term.zeros), lost_in_scales(rows, bits, group)

    step = max(1, AT_ONCE // linear.in_features)
    try:
        found = in_lanes(rounded, [raw[start : start + step] for start in range(0, len(raw), step)])
        sum((lost for _, lost in found[1:]), found[0][1]).require()
    except ConfigError as error:
        raise ConfigError(f"{linear.name}: {error}") from None
    parts = [integers for integers, _ in found]
    zeros = [part.zero for part in parts if part.zero is not None]
    whole = Integers(
        np.concatenate([part.codes for part in parts]),
        np.concatenate([part.scale for part in parts]),
        np.concatenate(zeros) if zeros else None,
        bits,
        group,
    )
    return dict(integer_tensors(f"{linear.name}.0", whole))


def require_precision(term: Term, matrix: Matrix, built: Built, cores: Cores | None) -> None:
    """Raises ConfigError where half precision, in which a term or its scales are stored, cannot hold values so small.

    Args:
        matrix: what the term stands for.
        built: the term as it is stored.
        cores: its cores as they were fitted, of an operator.
    """
    if isinstance(term, Quantized):
        require_scales(matrix, term.bits, term.group)
    elif isinstance(term, Dense):
        pairs = [(matrix, built.matrix)] if term.dtype == "f16" else []
        require_half(pairs)
    elif cores is not None:
        ordered = [core.transpose(3, 0, 1, 2) for core in cores.cores]
        if term.core_bits:
            for core in ordered:
                require_scales(core.reshape(core.shape[0] * core.shape[1], -1), term.core_bits, term.group)
        elif term.dtype == "f16":
            stored = [built.tensors[name].astype(np.float64) for name in sorted(built.tensors)]
            require_half(list(zip(ordered, stored, strict=True)))


def require_half(pairs: Sequence[tuple[Matrix, Matrix]]) -> None:
    """Raises ConfigError for values, given with what half precision makes of them, that lose too much."""
    for values, stored in pairs:
        if float(np.square(values - stored).sum()) > MOST_LOST * float(np.square(values).sum()):
            largest = np.abs(values).max()
            raise ConfigError(
                f"values of at most {largest:.2g} are below the range of f16; store this layer in bf16 or f32"
            )


def _fit(
    linear: LinearSpec, matrix: Matrix, moment: Moment | None, method: Method, outputs: NDArray[np.float32] | None
) -> Built:
    best: tuple[float, list[Built]] | None = None
    fitted = [Built({}, np.zeros_like(matrix)) for _ in linear.terms]
    rounds = ROUNDS if len(linear.terms) > 1 else 1
    energy = float(np.square(matrix).sum())
    alone = len(linear.terms) == 1
    for number in range(rounds):
        for index, term in enumerate(linear.terms):
            others = (part.matrix for other, part in enumerate(fitted) if other != index)
            rest = matrix if alone else matrix - sum(others)
            prefix = f"{linear.name}.{index}"
            cores = None
            if isinstance(term, Dense):
                stored = narrow(rest, term.dtype)
                fitted[index] = Built({f"{prefix}.weight": stored}, widen(stored, term.dtype))
            elif isinstance(term, Quantized):
                turns = TURNS if number + 1 == rounds else 1
                integers = quantize(rest, term, moment, method, turns, outputs)
                fitted[index] = Built(dict(integer_tensors(prefix, integers)), integers.matrix())
            else:
                cores = fit_cores(rest, term, moment, method)
                if method.norm and len(linear.terms) == 1:
                    cores = with_norm(cores, rest)
                fitted[index] = store_cores(prefix, term, cores)
            if float(np.square(rest).sum()) > NEGLIGIBLE * energy:
                require_precision(term, rest, fitted[index], cores)
        if alone:
            return fitted[0]
        error = activation_error(matrix - sum(part.matrix for part in fitted), second_of(moment))
        if best is None or error < best[0]:
            best = error, list(fitted)
    parts = best[1] if best else fitted
    tensors = {name: array for part in parts for name, array in part.tensors.items()}
    return Built(tensors, sum((part.matrix for part in parts), np.zeros_like(matrix)))


def quantize(
    matrix: Matrix,
    term: Quantized,
    moment: Moment | None,
    method: Method,
    turns: int = TURNS,
    outputs: NDArray[np.float32] | None = None,
) -> Integers:
    """Rounds a matrix to the term's integers, with compensated rounding where a moment is given and the method says so.

    Args:
        outputs: G [O, O] as `build_linear` takes it; None rounds the rows without regard for each other.
    """
    if moment is None or method.rounding == "nearest":
        return round_to_nearest(matrix, term.bits, term.group, zeros=term.zeros)
    if outputs is not None:
        whole = outputs.astype(np.float64)
        return compensated_rows(matrix, moment, whole, term.bits, term.group, zeros=term.zeros, turns=turns)
    return compensated(matrix, moment, term.bits, term.group, zeros=term.zeros, turns=turns)


def in_integers(linear: LinearSpec, method: Method) -> bool:
    """Whether a layer is fitted as integers alone, with compensated rounding, its inputs not in a stored transform."""
    return (
        linear.transform is None
        and [term.kind for term in linear.terms] == ["quantized"]
        and method.rounding == "compensated"
    )


def quantized_part(linear: LinearSpec, matrix: Matrix, moment: Moment) -> tuple[Integers, Matrix]:
    """Fits some columns [O, w] of a layer of integers alone, with the moment of their inputs; what is stored and stands for them.

    Raises:
        ConfigError: as `build_linear` does.
    """
    [term] = linear.terms
    if not isinstance(term, Quantized):
        raise ConfigError(f"{linear.name}: expected integers to fit in parts, found {term.kind}")
    try:
        basis = Basis(linear.hadamard)
        moment.turn(basis)
        wanted = target(basis.turned(matrix), moment)
        integers = compensated(wanted, moment, term.bits, term.group, zeros=term.zeros)
        require_scales(wanted, term.bits, term.group)
    except ConfigError as error:
        raise ConfigError(f"{linear.name}: {error}") from None
    return integers, basis.back(integers.matrix())


def joined_parts(linear: LinearSpec, parts: Sequence[Integers]) -> Built:
    """The layer of which all columns were fitted by `quantized_part`, in order."""
    first = parts[0]
    zeros = [part.zero for part in parts if part.zero is not None]
    whole = Integers(
        np.hstack([part.codes for part in parts]),
        np.hstack([part.scale for part in parts]),
        np.hstack(zeros) if zeros else None,
        first.bits,
        first.group,
    )
    return Built(dict(integer_tensors(f"{linear.name}.0", whole)), Basis(linear.hadamard).back(whole.matrix()))


def fit_cores(matrix: Matrix, term: Mpo, moment: Moment | None, method: Method) -> Cores:
    """Fits an operator of the term's shape; where its bonds differ, all are fitted as the largest and then cut."""
    cores = fit_bond(matrix, term, moment, method)
    if tuple(core.shape[3] for core in cores.cores[:-1]) == term.bonds:
        return cores
    bonds = (1, *term.bonds, 1)
    cut = tuple(core[: bonds[k], :, :, : bonds[k + 1]] for k, core in enumerate(cores.cores))
    return Cores(cut, activation_error(matrix - contract(cut), second_of(moment)))


def fit_bond(matrix: Matrix, term: Mpo, moment: Moment | None, method: Method) -> Cores:
    """Fits an operator of the term's shape, every bond as large as the term's largest."""
    out_dims, in_dims, chi = term.out_dims, term.in_dims, max(term.bonds)
    if moment is None or method.cores == "svd":
        return sequential_svd(matrix, out_dims, in_dims, chi)
    if len(out_dims) > 2:
        return sweep.fit(matrix, moment, out_dims, in_dims, chi)
    if method.cores == "whitened":
        return whitened.fit(matrix, moment, out_dims, in_dims, chi)
    return als.fit(matrix, moment, out_dims, in_dims, chi)


def with_norm(cores: Cores, matrix: Matrix) -> Cores:
    """Cores scaled so that the operator has the Frobenius norm of the matrix; truncation has reduced it."""
    found = float(np.linalg.norm(contract(cores.cores)))
    if not found:
        return cores
    first, *rest = cores.cores
    return replace(cores, cores=(first * (float(np.linalg.norm(matrix)) / found), *rest))


def integer_tensors(prefix: str, integers: Integers) -> Iterator[tuple[str, NDArray[Any]]]:
    """The tensors of an integer matrix under their names."""
    for plane, array in zip(PLANES[integers.bits], integers.planes(), strict=True):
        yield f"{prefix}.q{plane}", array
    yield f"{prefix}.scale", integers.scale
    if integers.zero is not None:
        yield f"{prefix}.zero", integers.zero


def store_cores(prefix: str, term: Mpo, fit: Cores) -> Built:
    """Stores cores [χ_{k−1}, o, i, χ_k] as [χ_k, χ_{k−1}, o, i] in the term's type."""
    tensors: Tensors = {}
    kept = []
    for index, (core, shape) in enumerate(zip(fit.cores, term.core_shapes(), strict=True)):
        name = f"{prefix}.core{index}"
        ordered = np.ascontiguousarray(core.transpose(3, 0, 1, 2))
        if term.core_bits:
            integers = round_to_nearest(ordered.reshape(shape[0] * shape[1], -1), term.core_bits, term.group)
            tensors.update(integer_tensors(name, integers))
            rounded = integers.matrix().reshape(shape)
        else:
            tensors[name] = narrow(ordered, term.dtype)
            rounded = widen(tensors[name], term.dtype)
        kept.append(rounded.transpose(1, 2, 3, 0))
    return Built(tensors, contract(kept))
