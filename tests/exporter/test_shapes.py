"""The rule for factor shapes: every size splits exactly into any number of factors, as evenly as its primes allow."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_exporter.fit.shapes import balanced_dims, balanced_shape, divisors, low_rank_shape, parameters
from mpo_formats import Mpo, PlanError

COUNTS = st.integers(2, 8)


@given(size=st.integers(1, 200_000), count=COUNTS)
def test_every_size_splits_exactly(size: int, count: int) -> None:
    dims = balanced_dims(size, count)
    assert len(dims) == count
    assert math.prod(dims) == size
    assert min(dims) >= 1
    assert list(dims) == sorted(dims, reverse=True)


@given(size=st.integers(1, 3000), count=st.integers(2, 4))
def test_no_split_has_a_smaller_sum(size: int, count: int) -> None:
    def sums(rest: int, left: int) -> set[int]:
        if left == 1:
            return {rest}
        return {d + s for d in range(1, rest + 1) if rest % d == 0 for s in sums(rest // d, left - 1)}

    assert sum(balanced_dims(size, count)) == min(sums(size, count))


@given(size=st.integers(1, 5000))
def test_all_divisors_in_order(size: int) -> None:
    assert divisors(size) == [divisor for divisor in range(1, size + 1) if size % divisor == 0]


@pytest.mark.parametrize(
    ("size", "count", "dims"),
    [
        (4096, 2, (64, 64)),
        (4096, 3, (16, 16, 16)),
        (12800, 2, (128, 100)),
        (172, 2, (43, 4)),
        (127, 2, (127, 1)),
        (127, 3, (127, 1, 1)),
        (1, 2, (1, 1)),
        (6, 4, (3, 2, 1, 1)),
    ],
)
def test_known_splits(size: int, count: int, dims: tuple[int, ...]) -> None:
    """Square where the size is one, unequal where its primes are, (p, 1, …) for a prime."""
    assert balanced_dims(size, count) == dims


@given(rows=st.integers(1, 5000), columns=st.integers(1, 5000), count=st.integers(2, 5))
def test_input_factors_are_ordered_for_equal_cores(rows: int, columns: int, count: int) -> None:
    out_dims, in_dims = balanced_shape(rows, columns, count)
    assert (math.prod(out_dims), math.prod(in_dims)) == (rows, columns)
    cost = sum(o * i for o, i in zip(out_dims, in_dims, strict=True))
    for order in itertools.permutations(in_dims):
        assert cost <= sum(o * i for o, i in zip(out_dims, order, strict=True))


def test_low_rank_is_a_member_of_the_family() -> None:
    assert low_rank_shape(7, 5) == ((7, 1), (1, 5))
    assert parameters((7, 1), (1, 5), (3,)) == 7 * 3 + 3 * 5


@given(rows=st.integers(1, 300), columns=st.integers(1, 300), count=st.integers(2, 4))
def test_parameters_are_those_of_the_stored_cores(rows: int, columns: int, count: int) -> None:
    out_dims, in_dims = balanced_shape(rows, columns, count)
    bonds = (1,) * (count - 1)
    term = Mpo(out_dims, in_dims, bonds, "f16", 0)
    assert parameters(out_dims, in_dims, bonds) == sum(math.prod(shape) for shape in term.core_shapes())


@pytest.mark.parametrize(("size", "count"), [(0, 2), (-4, 2), (8, 1), (8, 0)])
def test_what_has_no_split(size: int, count: int) -> None:
    with pytest.raises(PlanError, match="cores: expected"):
        balanced_dims(size, count)
