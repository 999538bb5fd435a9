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

from mpo_exporter.terms import Candidate
from mpo_formats import PlanError

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
    set_beforehand = (descend_hulls({**fronts, largest: [one]}, budget) for one in fitting)
    return [descend_hulls(fronts, budget), *sorted(set_beforehand, key=total_loss)[:TRIED]]


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
    """Takes the steepest steps of all layers' hulls as long as they fit; a layer whose next step does not fit stops."""
    hulls = {name: hull(row) for name, row in fronts.items()}
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
    left = budget - sum(candidate.bytes for candidate in chosen.values())
    while True:
        best: tuple[float, tuple[tuple[str, Candidate], ...]] = (0.0, ())
        moves = [
            (name, new, new.bytes - chosen[name].bytes, chosen[name].loss - new.loss)
            for name, row in fronts.items()
            for new in row
            if new is not chosen[name]
        ]
        # For a move that does not fit: the other layers' moves that free bytes, the cheapest in loss first.
        gives = sorted((move for move in moves if move[2] < 0), key=lambda move: -move[3])
        for name, new, cost, gain in moves:
            if gain <= best[0]:
                continue
            if cost <= left:
                best = gain, ((name, new),)
                continue
            for giver, smaller, saved, lost in gives:
                if gain + lost <= best[0]:
                    break
                if giver != name and cost + saved <= left:
                    best = gain + lost, ((name, new), (giver, smaller))
                    break
        if not best[1]:
            return
        for name, new in best[1]:
            left -= new.bytes - chosen[name].bytes
            chosen[name] = new
