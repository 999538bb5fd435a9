"""Rounding to integers: never worse than the plain rule, and stored so that the format's reference reads the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_exporter.quantize import rounding
from mpo_exporter.quantize.rounding import round_to_nearest
from mpo_exporter.terms import fitting_group
from mpo_formats import ConfigError
from mpo_formats.packing import dequantize
from mpo_formats.spec import BITS, GROUPS

Matrix = NDArray[np.float64]


def random_matrix(rows: int, columns: int, seed: int, spread: float = 1.0) -> Matrix:
    """Normal values with a few large ones, as weights have them."""
    source = np.random.default_rng(seed)
    values = source.standard_normal((rows, columns)) * spread
    return np.where(source.random(values.shape) < 0.02, 8 * values, values)


def plain(matrix: Matrix, bits: int, group: int) -> Matrix:
    """The plain rule: the value of largest magnitude lies on the lowest code; a scale in half precision, no search."""
    half = 1.5 if bits == 2 else 1 << (bits - 1)
    grouped = matrix.reshape(matrix.shape[0], -1, group)
    extreme = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)
    scale = (-extreme / half).astype(np.float16).astype(np.float64)
    codes = np.divide(grouped, scale, out=np.zeros_like(grouped), where=scale != 0)
    return (scale * (np.clip(np.rint(codes + half), 0, (1 << bits) - 1) - half)).reshape(matrix.shape)


@given(
    bits=st.sampled_from(BITS),
    group=st.sampled_from(GROUPS),
    groups=st.integers(1, 3),
    seed=st.integers(0, 99),
    spread=st.sampled_from([1e-3, 1.0, 50.0]),
)
def test_every_group_is_at_least_as_close_as_by_the_plain_rule(
    bits: int, group: int, groups: int, seed: int, spread: float
) -> None:
    matrix = random_matrix(3, group * groups, seed, spread)
    searched, simple = (
        np.square(matrix - result).reshape(-1, group).sum(-1)
        for result in (round_to_nearest(matrix, bits, group).matrix(), plain(matrix, bits, group))
    )
    assert (searched <= simple * (1 + 1e-12)).all()


@given(bits=st.sampled_from(BITS), group=st.sampled_from(GROUPS), seed=st.integers(0, 99))
def test_stored_planes_read_back_as_the_same_matrix(bits: int, group: int, seed: int) -> None:
    integers = round_to_nearest(random_matrix(4, 2 * group, seed), bits, group)
    np.testing.assert_array_equal(dequantize(integers.planes(), bits, integers.scale, None), integers.matrix())
    assert integers.codes.max() < 1 << bits
    assert integers.zero is None


@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_bounded_by_the_step(bits: int) -> None:
    """Half a step, or up to what clipping and the missing positive end of the range leave: the search may choose both."""
    matrix = np.random.default_rng(bits).uniform(-1, 1, (8, 64))
    integers = round_to_nearest(matrix, bits, 32)
    step = np.abs(integers.scale.astype(np.float64)).repeat(32, 1)
    largest = np.abs(matrix).reshape(8, 2, 32).max(-1).repeat(32, 1)
    inside = np.abs(matrix) <= step * ((1 << (bits - 1)) - 1)
    assert (np.abs(matrix - integers.matrix())[inside] <= step[inside] * 0.5 + 1e-12).all()
    assert (np.abs(matrix - integers.matrix()) <= 0.3 * largest + step).all()


def test_rows_are_rounded_independently_of_the_block_they_fall_into(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = random_matrix(7, 64, 0)
    whole = round_to_nearest(matrix, 4, 32)
    monkeypatch.setattr(rounding, "BLOCK", 128)
    parts = round_to_nearest(matrix, 4, 32)
    np.testing.assert_array_equal(whole.codes, parts.codes)
    np.testing.assert_array_equal(whole.scale, parts.scale)


@pytest.mark.parametrize("value", [0.0, 1e-9, -3.0])
def test_constant_groups(value: float) -> None:
    """Zeros stay zeros; a value below half precision's range becomes zero; a constant is kept to half precision."""
    found = round_to_nearest(np.full((2, 32), value), 4, 32).matrix()
    np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-8)


def test_the_edge_of_half_precision() -> None:
    """65,504 · 8 is the largest value that 4 bits hold; the search must not step over it."""
    edge = np.full((1, 32), 65504.0 * 8)
    edge[0, 1:] = 1.0
    np.testing.assert_allclose(round_to_nearest(edge, 4, 32).matrix()[0, 0], 65504.0 * 8, rtol=1e-3)
    with pytest.raises(ConfigError, match="exceed the range of half-precision scales; store this layer dense"):
        round_to_nearest(edge * 1.01, 4, 32)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    matrix = np.ones((2, 32))
    matrix[1, 5] = value
    with pytest.raises(ConfigError, match="not finite"):
        round_to_nearest(matrix, 4, 32)


@given(columns=st.integers(1, 5000), wanted=st.sampled_from(GROUPS))
def test_the_group_is_the_largest_that_divides_the_row(columns: int, wanted: int) -> None:
    group = fitting_group(columns, wanted)
    fitting = [size for size in (16, 32, 64, 128, 256) if size <= wanted and columns % size == 0]
    assert group == (fitting[-1] if fitting else None)


def test_a_row_of_172_has_no_group() -> None:
    assert fitting_group(172, 32) is None
    assert fitting_group(176, 32) == 16
    assert fitting_group(4096, 32) == 32
