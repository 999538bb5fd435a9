"""Allocation: one candidate for each layer, with the least summed loss within a number of bytes.

The loss of a candidate is ½ Σ_o F_o (w − ŵ)_o C (w − ŵ)_oᵀ (docs/method.md, Allocation) in nats per token, so losses of layers
add up. The choice is Lagrangian (Shoham & Gersho 1988): every layer descends its convex hull of (bytes, loss), always by the
steepest step of all layers, until no step fits. Bytes that are left over go to the single change, or the exchange between
two layers, that lowers the loss most. The largest layer, usually the embedding, is also tried with each of its candidates
set beforehand.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.terms import Candidate
from mpo_formats import PlanError

Indices = NDArray[np.int64]
Losses = NDArray[np.float64]
# How many of the choices with the largest layer set beforehand are improved to the end.
TRIED = 2


def choose(candidates: Mapping[str, Sequence[Candidate]], budget_bytes: int) -> dict[str, Candidate]:
    """Picks a candidate for every layer, together at most `budget_bytes`, with a summed loss as low as can be found.

    If the budget is a sum on the convex hull the choice is optimal; otherwise it is off by less than the loss of one step.

    Raises:
        PlanError: when a layer has no candidate, or the smallest ones exceed the budget.
    """
    empty = [name for name, row in candidates.items() if not row]
    if empty:
        raise PlanError(f"{empty[0]}: no candidate to choose from")
    fronts = {name: front(row) for name, row in candidates.items()}
    least = sum(row[0].bytes for row in fronts.values())
    if least > budget_bytes:
        raise PlanError(
            f"target: {budget_bytes:,} bytes for the layers are too few, the smallest plan takes {least:,}; "
            "give a larger target"
        )
    return min((improved(fronts, start, budget_bytes) for start in starts(fronts, budget_bytes)), key=total_loss)


def starts(fronts: Mapping[str, Sequence[Candidate]], budget: int) -> list[dict[str, Candidate]]:
    """Choices to improve: the descent of all hulls, and the best descents with the largest layer set beforehand.

    A step of the largest layer may need more bytes than small layers leave, and no exchange of two makes room for it then.
    """
    largest = max(fronts, key=lambda name: fronts[name][-1].bytes - fronts[name][0].bytes)
    rest = sum(row[0].bytes for name, row in fronts.items() if name != largest)
    fitting = [one for one in fronts[largest] if rest + one.bytes <= budget]
    hulls = {name: hull(row) for name, row in fronts.items()}
    set_beforehand = (descend({**hulls, largest: [one]}, budget) for one in fitting)
    return [descend(hulls, budget), *sorted(set_beforehand, key=total_loss)[:TRIED]]


def improved(
    fronts: Mapping[str, Sequence[Candidate]], chosen: dict[str, Candidate], budget: int
) -> dict[str, Candidate]:
    """The choice with its leftover bytes spent."""
    use_leftover(fronts, chosen, budget)
    return chosen


def total_loss(chosen: Mapping[str, Candidate]) -> float:
    """The summed loss of a choice."""
    return sum(one.loss for one in chosen.values())


def front(row: Sequence[Candidate]) -> list[Candidate]:
    """The candidates that no other one beats in both bytes and loss, by rising bytes and falling loss."""
    kept: list[Candidate] = []
    for candidate in sorted(row, key=lambda one: (one.bytes, one.loss)):
        if not kept or candidate.loss < kept[-1].loss:
            kept.append(candidate)
    return kept


def slope(start: Candidate, end: Candidate) -> float:
    """Loss saved per byte by going from one candidate to a larger one."""
    return (start.loss - end.loss) / (end.bytes - start.bytes)


def hull(row: Sequence[Candidate]) -> list[Candidate]:
    """The lower convex hull of a front: every step saves less loss per byte than the one before."""
    kept: list[Candidate] = []
    for candidate in row:
        while len(kept) > 1 and slope(kept[-2], kept[-1]) <= slope(kept[-1], candidate):
            kept.pop()
        kept.append(candidate)
    return kept


def descend_hulls(fronts: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Candidate]:
    """`descend` on the hulls of these fronts."""
    return descend({name: hull(row) for name, row in fronts.items()}, budget)


def descend(hulls: Mapping[str, Sequence[Candidate]], budget: int) -> dict[str, Candidate]:
    """Takes the steepest steps of all layers' hulls as long as they fit; a layer whose next step does not fit stops."""
    chosen = {name: row[0] for name, row in hulls.items()}
    left = budget - sum(candidate.bytes for candidate in chosen.values())
    steps = [(-slope(row[0], row[1]), name, 1) for name, row in hulls.items() if len(row) > 1]
    heapq.heapify(steps)
    while steps:
        _, name, index = heapq.heappop(steps)
        row = hulls[name]
        cost = row[index].bytes - row[index - 1].bytes
        if cost > left:
            continue
        left -= cost
        chosen[name] = row[index]
        if index + 1 < len(row):
            heapq.heappush(steps, (-slope(row[index], row[index + 1]), name, index + 1))
    return chosen


def use_leftover(fronts: Mapping[str, Sequence[Candidate]], chosen: dict[str, Candidate], budget: int) -> None:
    """Changes one layer, or exchanges bytes between two, as long as that lowers the loss within the budget; edits `chosen`."""
    names, options = list(fronts), [candidate for row in fronts.values() for candidate in row]
    layer = np.repeat(np.arange(len(names)), [len(row) for row in fronts.values()])
    sizes = np.array([one.bytes for one in options], np.int64)
    losses = np.array([one.loss for one in options])
    left = budget - sum(candidate.bytes for candidate in chosen.values())
    while True:
        now = [chosen[name] for name in names]
        costs = sizes - np.array([one.bytes for one in now], np.int64)[layer]
        gains = np.array([one.loss for one in now])[layer] - losses
        change = best_change(layer, costs, gains, left)
        if not change:
            return
        for move in change:
            left -= int(costs[move])
            chosen[names[layer[move]]] = options[move]


def best_change(layer: Indices, costs: Indices, gains: Losses, left: int) -> tuple[int, ...]:
    """The move, or the move and the one that frees bytes for it, that together gain most; empty where none gains.

    Args:
        layer: of every move; costs: in bytes, negative where it frees some; gains: in loss. One entry for each move.
        left: bytes that may be spent.
    """
    best = 0.0
    found: tuple[int, ...] = ()
    alone = np.flatnonzero((costs <= left) & (gains > 0))
    if alone.size:
        found = (int(alone[gains[alone].argmax()]),)
        best = float(gains[found[0]])
    gives = np.flatnonzero(costs < 0)
    takes = np.flatnonzero((costs > left) & (gains > best))
    if not gives.size or not takes.size:
        return found
    # Those that free most first. After each, the cheapest so far, and the cheapest of any other layer.
    gives = gives[np.argsort(costs[gives], kind="stable")]
    first, second = np.empty_like(gives), np.full_like(gives, -1)
    one, other = int(gives[0]), -1
    for place, give in enumerate(gives.tolist()):
        if gains[give] > gains[one]:
            one, other = give, one if layer[one] != layer[give] else other
        elif layer[give] != layer[one] and (other < 0 or gains[give] > gains[other]):
            other = give
        first[place], second[place] = one, other
    enough = np.searchsorted(costs[gives], left - costs[takes], side="right") - 1
    takes, enough = takes[enough >= 0], enough[enough >= 0]
    partner = np.where(layer[first[enough]] != layer[takes], first[enough], second[enough])
    takes, partner = takes[partner >= 0], partner[partner >= 0]
    together = gains[takes] + gains[partner]
    if together.size and together.max() > best:
        pick = int(together.argmax())
        return int(takes[pick]), int(partner[pick])
    return found
