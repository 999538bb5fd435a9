"""How an MPO is applied to activations: the order of contraction, chosen here by its cost for both backends.

A sweep contracts a batch of T rows x [T, i_1 … i_n] with one core after the other. From the left its state after core k is
[T, o_1 … o_k, χ_k, i_{k+1} … i_n]; from the right it is the mirror image. `densify` builds the matrix first, which is
cheaper for many rows.
"""

from __future__ import annotations

import functools
import math
from typing import Literal

from mpo_formats import Mpo

Order = Literal["left", "right", "densify"]


def sweep_cost(term: Mpo, rows: int, reverse: bool) -> int:
    """Multiply-adds of one sweep over `rows` rows, from the right where `reverse`."""
    out_dims, in_dims, bonds = term.out_dims, term.in_dims, (1, *term.bonds, 1)
    if reverse:
        out_dims, in_dims, bonds = out_dims[::-1], in_dims[::-1], bonds[::-1]
    total = 0
    for k in range(len(out_dims)):
        done, left = math.prod(out_dims[:k]), math.prod(in_dims[k + 1 :])
        total += rows * done * left * bonds[k] * in_dims[k] * out_dims[k] * bonds[k + 1]
    return total


def densify_cost(term: Mpo, rows: int) -> int:
    """Multiply-adds of building the matrix from left to right, and of multiplying `rows` rows with it."""
    bonds, total, size = (1, *term.bonds, 1), 0, 1
    for k, core in enumerate(term.core_sizes()):
        total += size * bonds[k] * core * bonds[k + 1]
        size *= core
    return total + rows * size


@functools.cache
def choose_order(term: Mpo, rows: int) -> Order:
    """The order with the fewest multiply-adds for `rows` rows; of equal ones the sweep from the left."""
    costs: dict[Order, int] = {
        "left": sweep_cost(term, rows, reverse=False),
        "right": sweep_cost(term, rows, reverse=True),
        "densify": densify_cost(term, rows),
    }
    return min(costs, key=lambda order: costs[order])


def densify_from(term: Mpo) -> int:
    """The smallest number of rows for which `choose_order` builds the matrix, 0 where it never does."""
    sweep = min(sweep_cost(term, 1, reverse=False), sweep_cost(term, 1, reverse=True))
    size = densify_cost(term, 1) - densify_cost(term, 0)
    return densify_cost(term, 0) // (sweep - size) + 1 if sweep > size else 0
