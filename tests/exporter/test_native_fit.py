"""Rounding by the native kernels against the torch code, for every instruction set of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.calibrate.precision import are_fast, fast_products, has_kernel, has_units
from mpo_exporter.fit.common import activation_error
from mpo_exporter.measure.candidates import LADDER, Sensitivity, candidates, lower_hull, may_pay, tails
from mpo_exporter.quantize import native
from mpo_exporter.quantize.gptq import compensated, expected_errors, expected_residuals
from mpo_exporter.quantize.grid import Grid
from mpo_exporter.quantize.rounding import round_to_nearest
from mpo_exporter.terms import Candidate, operator, without_operators
from mpo_formats import Dense, LinearSpec
from mpo_formats.spec import BITS, GROUPS
from mpo_runtime import native as runtime

Matrix = NDArray[np.float64]
kernels: Any = pytest.importorskip("mpo_runtime._native", reason="the native kernels were not built")
# Those with rounding of their own.
LEVELS = [level for level in kernels.supported_isas() if level in ("avx512", "avx2", "neon", "generic")]


@pytest.fixture(autouse=True, params=LEVELS)
def instruction_set(request: pytest.FixtureRequest) -> Iterator[None]:
    before = kernels.active_isa()
    assert kernels.set_isa(request.param)
    yield
    kernels.set_isa(before)


def example(rows: int, columns: int, seed: int) -> tuple[Matrix, Matrix]:
    """A matrix with a few outliers, and the second moment of correlated inputs of unequal scales."""
    source = np.random.default_rng(seed)
    mix = source.standard_normal((columns, columns)) / np.sqrt(columns) + np.eye(columns)
    inputs = source.standard_normal((4 * columns, columns)) @ mix * np.exp(source.standard_normal(columns))
    matrix = source.standard_normal((rows, columns))
    matrix[source.integers(rows, size=5), source.integers(columns, size=5)] *= 20
    matrix[0] = 0
    return matrix, inputs.T @ inputs / len(inputs)


@settings(max_examples=8, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
    turns=st.integers(0, 5),
)
def test_compensated_rounding_equals_the_torch_code(bits: int, group: int, zeros: bool, seed: int, turns: int) -> None:
    """Nearly every code is the same; where a tie went another way, the error is the same to a thousandth."""
    matrix, moment = example(
        64, max(group, 96 // group * group) + group, seed
    )  # one block of rows, as the kernels take
    ours = compensated(matrix, Moment(moment), bits, group, zeros=zeros, turns=turns)
    with native.torch_alone():
        theirs = compensated(matrix, Moment(moment), bits, group, zeros=zeros, turns=turns)
    assert (ours.zero is None) == (theirs.zero is None)
    assert (ours.codes == theirs.codes).mean() > (0.99 if turns < 2 else 0.9)
    left = [activation_error(matrix - found.matrix(), moment) for found in (ours, theirs)]
    assert left[0] == pytest.approx(left[1], rel=2e-3)


@settings(max_examples=8, deadline=None)
@given(bits=st.sampled_from(BITS), group=st.sampled_from(GROUPS[:4]), zeros=st.booleans(), seed=st.integers(0, 99))
def test_rounding_to_nearest_equals_the_torch_code(bits: int, group: int, zeros: bool, seed: int) -> None:
    matrix, moment = example(70, 2 * group, seed)
    for weight in (None, moment.diagonal().copy()):
        ours = round_to_nearest(matrix, bits, group, zeros=zeros, weight=weight)
        with native.torch_alone():
            theirs = round_to_nearest(matrix, bits, group, zeros=zeros, weight=weight)
        assert (ours.codes == theirs.codes).mean() > 0.99
        scale = np.ones(len(moment)) if weight is None else weight
        left = [np.square(matrix - found.matrix()) @ scale for found in (ours, theirs)]
        np.testing.assert_allclose(left[0], left[1], rtol=1e-3, atol=1e-9)


def test_expected_errors_of_all_grids_equal_the_residuals() -> None:
    matrix, moment = example(130, 256, 3)
    grids = [Grid(bits, group, zeros) for bits in BITS for group in (32, 128) for zeros in (False, True)]
    ours = expected_errors(matrix, Moment(moment), grids)
    with native.torch_alone():
        theirs = expected_errors(matrix, Moment(moment), grids)
        residuals, _ = expected_residuals(matrix, Moment(moment), grids)
        expected = list(residuals)
    np.testing.assert_allclose(ours, theirs, rtol=2e-3, atol=1e-9)
    for one, other in zip(expected_residuals(matrix, Moment(moment), grids)[0], expected, strict=True):
        assert (np.abs(one - other) > 1e-5).mean() < 0.02  # ties of scales in a few groups


@pytest.mark.parametrize(("columns", "group", "zeros"), [(512, 64, False), (160, 32, True)])
def test_products_in_bf16_leave_about_the_same_error(
    monkeypatch: pytest.MonkeyPatch, columns: int, group: int, zeros: bool
) -> None:
    """Against the torch code, with an input direction that has nearly all of the energy."""
    if not kernels.has_bf16_products():
        pytest.skip("this CPU, or this instruction set, has no products of bf16")
    matrix, moment = example(200, columns, 5)
    moment += 20 * np.trace(moment) / columns * np.ones((columns, columns))
    with native.torch_alone():
        theirs = compensated(matrix, Moment(moment), 3, group, zeros=zeros, turns=native.FAST_PASSES)
    exact = compensated(matrix, Moment(moment), 3, group, zeros=zeros)
    monkeypatch.setattr(native, "FAST_COLUMNS", columns)
    ours = compensated(matrix, Moment(moment), 3, group, zeros=zeros)
    assert (ours.codes != exact.codes).any()
    errors = [activation_error(matrix - one.matrix(), moment) for one in (ours, theirs)]
    assert errors[0] < 1.02 * errors[1]
    plain = activation_error(matrix - round_to_nearest(matrix, 3, group, zeros=zeros).matrix(), moment)
    assert errors[0] < 0.5 * plain


def test_threads_do_not_change_a_byte() -> None:
    matrix, moment = example(300, 128, 4)
    found = []
    for threads in (1, 2, 5):
        runtime.set_threads(threads)
        found.append(compensated(matrix, Moment(moment), 3, 64, zeros=True))
    runtime.set_threads(kernels.default_threads())
    for other in found[1:]:
        for name in ("codes", "scale", "zero"):
            np.testing.assert_array_equal(getattr(found[0], name), getattr(other, name))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), hidden=st.sampled_from([0.0, 0.5, 4.0]), steepness=st.floats(0.5, 50))
def test_cores_that_pay_are_never_left_out(seed: int, hidden: float, steepness: float) -> None:
    """Against every singular value: where some χ lies below the line of the integers, `may_pay` says so."""
    source = np.random.default_rng(seed)
    strong = np.outer(source.standard_normal(48), source.standard_normal(64))
    residual = torch.from_numpy((source.standard_normal((48, 64)) + hidden * strong).astype(np.float32))
    curve = tails(residual, LADDER)
    total = float(residual.square().sum())
    sizes = [Candidate(1000 + 112 * chi, 0.0, (operator((48, 1), (1, 64), chi, "int8"),)) for chi, _ in curve]
    hull = [(1000, total), (1000 + int(112 * 48 / steepness), 0.1 * total), (20_000, 0.0)]
    pays = [loss < np.interp(one.bytes, *zip(*hull, strict=True)) for one, (_, loss) in zip(sizes, curve, strict=True)]
    if any(pays):
        assert may_pay(residual, 1.0, sizes, hull)


def test_cores_are_measured_only_where_they_may_pay() -> None:
    matrix = np.random.default_rng(5).standard_normal((160, 128))
    linear = LinearSpec("model.layers.0.mlp.up_proj", 160, 128, None, (Dense("f32"),))
    sensitivity = Sensitivity(Moment(np.eye(128)), np.ones(160))
    complete = candidates(linear, matrix, sensitivity)
    paying = candidates(linear, matrix, sensitivity, every=False)
    assert without_operators(paying) == without_operators(complete)
    assert len(paying) < len(complete) and lower_hull(paying) == lower_hull(complete)


def test_products_are_fast_only_inside_the_context() -> None:
    before = torch.get_float32_matmul_precision()
    with fast_products():
        assert are_fast() == has_units()
        assert torch.get_float32_matmul_precision() == ("medium" if has_units() and not has_kernel() else before)
    assert not are_fast()
    assert torch.get_float32_matmul_precision() == before
