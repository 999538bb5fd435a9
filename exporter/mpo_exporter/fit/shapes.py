"""How a matrix [O, I] is reshaped for n cores: O = o_1 ⋯ o_n and I = i_1 ⋯ i_n."""

from __future__ import annotations

import functools
import itertools
import math

from mpo_formats import PlanError


@functools.cache
def balanced_dims(size: int, count: int) -> tuple[int, ...]:
    """Splits `size` into `count` factors whose product it is and that are as equal as its divisors allow.

    This is the split with the smallest sum: 12800 becomes (128, 100). Every size has a split: a prime p becomes (p, 1, …).
    Factors are in descending order.

    Raises:
        PlanError: for fewer than two factors or a size below one.
    """
    if count < 2 or size < 1:
        raise PlanError(f"cores: expected a size of at least 1 and at least 2 cores, found {size} and {count}")
    splits = (
        (divisor, *((size // divisor,) if count == 2 else balanced_dims(size // divisor, count - 1)))
        for divisor in divisors(size)
    )
    return tuple(sorted(min(splits, key=sum), reverse=True))


def divisors(size: int) -> list[int]:
    """All divisors of `size` in ascending order."""
    small = [divisor for divisor in range(1, math.isqrt(size) + 1) if size % divisor == 0]
    return small + [size // divisor for divisor in reversed(small) if divisor * divisor != size]


def balanced_shape(rows: int, columns: int, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Balanced out_dims and in_dims whose core sizes o_k · i_k are as equal as possible.

    Of all orders of the input factors this is the one with the smallest Σ o_k · i_k, which for two cores is the number of
    parameters per value of the bond.
    """
    out_dims, in_dims = balanced_dims(rows, count), balanced_dims(columns, count)
    best = min(
        itertools.permutations(in_dims) if count <= 6 else [in_dims[::-1]],
        key=lambda dims: sum(o * i for o, i in zip(out_dims, dims, strict=True)),
    )
    return out_dims, tuple(best)


def low_rank_shape(rows: int, columns: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The shape (O, 1) × (1, I): truncated SVD as a member of the MPO family."""
    return (rows, 1), (1, columns)


def parameters(out_dims: tuple[int, ...], in_dims: tuple[int, ...], bonds: tuple[int, ...]) -> int:
    """The number of weights in the cores."""
    ends = (1, *bonds, 1)
    sizes = zip(ends, out_dims, in_dims, ends[1:], strict=False)
    return sum(math.prod(core) for core in sizes)
