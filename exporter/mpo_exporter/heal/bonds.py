"""Puts the bonds of trained cores into canonical order again, so that every prefix of them is a good smaller operator.

Float cores are brought into the canonical form of the fits, weighted by the second moment of the healed model's activations.
Integer cores would be rounded anew by that: they are brought into canonical form only during the training, whose remaining
steps make up for the rounding. At its end their bonds are sorted, which changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.fit.bonds import order_bonds
from mpo_exporter.heal.ops import HealingOps, run_block
from mpo_exporter.heal.trainable import Cores, IntegerCore, Trainables
from mpo_runtime.layers.linear import block_transform
from mpo_runtime.models.decoder import Decoder

Matrix = NDArray[np.float64]


def importance(cores: Sequence[Matrix]) -> list[NDArray[np.int64]]:
    """For each bond the order of its values, the most important first.

    The importance of a value is the product of the Frobenius norms of its slices in the two cores that it joins.
    """
    orders = []
    for left, right in pairwise(cores):
        size = np.sqrt(np.square(left).sum((0, 1, 2)) * np.square(right).sum((1, 2, 3)))
        orders.append(np.argsort(-size, kind="stable"))
    return orders


def set_canonical(term: Cores, moment: Matrix | None) -> None:
    """Replaces a term's cores by their canonical form in the norm of `moment`, rounded to the term's type."""
    cores = [core.detach().double().cpu().numpy() for core in term.operator(None).cores]
    for part, core in zip(term.cores, order_bonds(cores, moment), strict=True):
        part.set_core(torch.from_numpy(np.ascontiguousarray(core)).float())


def set_sorted(term: Cores) -> None:
    """Sorts the values of a term's bonds by importance; the operator and every stored number stay the same."""
    cores = [core.detach().double().cpu().numpy() for core in term.operator(None).cores]
    keep = [np.arange(1)]
    orders = [*keep, *importance(cores), *keep]
    for part, left, right in zip(term.cores, orders, orders[1:], strict=False):
        part.reorder(torch.from_numpy(left), torch.from_numpy(right))


@torch.no_grad()
def sort_bonds(
    model: Decoder, ops: HealingOps, trainables: Trainables, inputs: NDArray[np.int64], *, exact: bool
) -> None:
    """Puts the bonds of all cores of a model into canonical order, weighted by the layers' inputs over ids [N, S].

    Args:
        exact: only sort the bonds of integer cores; their canonical form would need new grids and rounding.
    """
    ops.trainables, ops.chi = trainables, None
    moments: dict[str, Tensor] = {}

    def note(name: str, x: Tensor) -> None:
        layer = trainables.layers.get(name)
        if layer is not None and any(isinstance(term, Cores) for term in layer.terms):
            flat = block_transform(x.detach().flatten(0, -2).double(), layer.transform())
            moments[name] = flat.T @ flat / flat.shape[0]

    def put_in_order(name: str) -> None:
        for term in trainables.layers[name].terms:
            if isinstance(term, Cores):
                if exact and isinstance(term.cores[0], IntegerCore):
                    set_sorted(term)
                else:
                    set_canonical(term, moments[name].cpu().numpy() if name in moments else None)

    x = model.embed(ops.ids(inputs.tolist()))
    for block in range(model.architecture.num_hidden_layers):
        ops.record = note
        try:
            x = run_block(model, x, block)
        finally:
            ops.record = None
        for name in list(moments):
            put_in_order(name)
        moments.clear()  # so that the moments of only one block are in memory at a time
    for name in trainables.layers:
        if not name.startswith("model.layers."):
            put_in_order(name)
