"""Brings the bonds of trained cores back into canonical order, so that every prefix stays a good smaller operator.

Float cores get the canonical form of the fits, weighted by the second moment of the healed model's activations. Integer
cores get it in the middle of the training, which makes up for rounding them anew, and are only sorted at its end.
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
from mpo_runtime.models.decoder import Decoder

Matrix = NDArray[np.float64]


def importance(cores: Sequence[Matrix]) -> list[NDArray[np.int64]]:
    """For each bond the order of its values by the product of their slices' norms in the two cores, largest first."""
    orders = []
    for left, right in pairwise(cores):
        size = np.sqrt(np.square(left).sum((0, 1, 2)) * np.square(right).sum((1, 2, 3)))
        orders.append(np.argsort(-size, kind="stable"))
    return orders


def set_canonical(term: Cores, moment: Matrix | None) -> None:
    """Replaces a term's cores by their canonical form, rounded to the term's type."""
    cores = [core.detach().double().cpu().numpy() for core in term.operator(None).cores]
    for part, core in zip(term.cores, order_bonds(cores, moment), strict=True):
        part.set_core(torch.from_numpy(np.ascontiguousarray(core)).float())


def set_sorted(term: Cores) -> None:
    """Sorts the values of a term's bonds by importance; every number stays what it is."""
    cores = [core.detach().double().cpu().numpy() for core in term.operator(None).cores]
    keep = [np.arange(1)]
    orders = [*keep, *importance(cores), *keep]
    for part, left, right in zip(term.cores, orders, orders[1:], strict=False):
        part.reorder(torch.from_numpy(left), torch.from_numpy(right))


@torch.no_grad()
def sort_bonds(
    model: Decoder, ops: HealingOps, trainables: Trainables, inputs: NDArray[np.int64], *, exact: bool
) -> None:
    """Brings all cores of a model into canonical order, weighted by their inputs over token ids [N, S].

    Args:
        exact: leaves the values of integer cores alone and only sorts them, since new grids would round them anew.
    """
    ops.trainables, ops.chi = trainables, None
    moments: dict[str, Tensor] = {}

    def see(name: str, x: Tensor) -> None:
        layer = trainables.layers.get(name)
        if layer is not None and any(isinstance(term, Cores) for term in layer.terms):
            flat = x.detach().flatten(0, -2).double()
            moments[name] = flat.T @ flat / flat.shape[0]

    def put(name: str) -> None:
        for term in trainables.layers[name].terms:
            if isinstance(term, Cores):
                if exact and isinstance(term.cores[0], IntegerCore):
                    set_sorted(term)
                else:
                    set_canonical(term, moments[name].cpu().numpy() if name in moments else None)

    x = model.embed(ops.ids(inputs.tolist()))
    for block in range(model.architecture.num_hidden_layers):
        ops.record = see
        try:
            x = run_block(model, x, block)
        finally:
            ops.record = None
        for name in list(moments):
            put(name)
        moments.clear()  # one block's moments in memory at a time
    for name in trainables.layers:
        if not name.startswith("model.layers."):
            put(name)
