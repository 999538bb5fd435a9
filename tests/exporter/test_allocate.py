"""Allocation: against trying everything on small cases, and never above the budget."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_exporter.plan.allocate import choose, front, hull, slope
from mpo_exporter.terms import Candidate
from mpo_formats import PlanError, Quantized

TERM = (Quantized(4, 32, False),)


def layers(seed: int, count: int, choices: int) -> dict[str, list[Candidate]]:
    """Random candidates whose loss mostly falls with their bytes."""
    source = np.random.default_rng(seed)
    result = {}
    for layer in range(count):
        sizes = source.integers(1, 100, choices)
        losses = source.exponential(1, choices) * 2.0 ** (-sizes / 20) * source.exponential(1)
        result[str(layer)] = [Candidate(int(size), float(loss), TERM) for size, loss in zip(sizes, losses, strict=True)]
    return result


def best(candidates: dict[str, list[Candidate]], budget: int) -> float:
    """The least loss of all combinations within the budget."""
    return min(
        (
            sum(one.loss for one in combination)
            for combination in itertools.product(*candidates.values())
            if sum(one.bytes for one in combination) <= budget
        ),
    )


@given(seed=st.integers(0, 999), count=st.integers(1, 4), choices=st.integers(1, 5), room=st.floats(0, 1))
def test_within_the_budget_and_near_the_best_of_all_combinations(
    seed: int, count: int, choices: int, room: float
) -> None:
    candidates = layers(seed, count, choices)
    least = sum(min(one.bytes for one in row) for row in candidates.values())
    most = sum(max(one.bytes for one in row) for row in candidates.values())
    budget = round(least + room * (most - least))
    chosen = choose(candidates, budget)
    assert sum(one.bytes for one in chosen.values()) <= budget
    assert all(chosen[name] in row for name, row in candidates.items())
    found, wanted = sum(one.loss for one in chosen.values()), best(candidates, budget)
    step = max(
        (
            first.loss - second.loss
            for row in candidates.values()
            for first, second in itertools.pairwise(hull(front(row)))
        ),
        default=0.0,
    )
    assert wanted - 1e-12 <= found <= wanted + step + 1e-12


@given(seed=st.integers(0, 999), steps=st.integers(0, 8))
def test_optimal_at_budgets_that_lie_on_the_hull(seed: int, steps: int) -> None:
    """After any number of the steepest steps the bytes used are a budget at which no other choice is better."""
    candidates = layers(seed, 3, 5)
    hulls = {name: hull(front(row)) for name, row in candidates.items()}
    order = sorted(
        (
            (slope(*pair), name, index + 1)
            for name, row in hulls.items()
            for index, pair in enumerate(itertools.pairwise(row))
        ),
        reverse=True,
    )
    place = dict.fromkeys(hulls, 0) | {name: index for _, name, index in order[:steps]}
    budget = sum(hulls[name][index].bytes for name, index in place.items())
    found = sum(one.loss for one in choose(candidates, budget).values())
    assert found == pytest.approx(best(candidates, budget), abs=1e-12)


def test_a_large_layer_gets_its_step_where_small_ones_would_have_eaten_the_room() -> None:
    """Twenty small steps are each a little steeper than the one of the table, which then no longer fits."""
    small = {f"{index}": [Candidate(10, 1.0, TERM), Candidate(15, 0.75, TERM)] for index in range(20)}
    table = [Candidate(100, 20.0, TERM), Candidate(200, 16.0, TERM)]
    candidates = {**small, "table": table}
    budget = 20 * 10 + 200
    chosen = choose({**candidates, "table": [Candidate(100, 20.0, TERM), Candidate(200, 10.0, TERM)]}, budget)
    assert chosen["table"].bytes == 200
    found = sum(one.loss for one in choose(candidates, budget).values())
    assert found == pytest.approx(min(20 * 1.0 + 16.0, 20 * 0.75 + 20.0))


def test_a_generous_budget_takes_the_least_loss_of_every_layer() -> None:
    candidates = layers(1, 5, 6)
    chosen = choose(candidates, 10**6)
    assert all(chosen[name].loss == min(one.loss for one in row) for name, row in candidates.items())


@given(seed=st.integers(0, 99))
def test_the_hull_is_convex_and_below_every_candidate(seed: int) -> None:
    row = layers(seed, 1, 8)["0"]
    kept = hull(front(row))
    slopes = [slope(*pair) for pair in itertools.pairwise(kept)]
    assert slopes == sorted(slopes, reverse=True)
    sizes, losses = [one.bytes for one in kept], [one.loss for one in kept]
    for one in row:
        assert one.loss >= np.interp(one.bytes, sizes, losses) - 1e-12


def test_budgets_that_cannot_be_met() -> None:
    candidates = {"layer": [Candidate(10, 1.0, TERM), Candidate(20, 0.5, TERM)]}
    with pytest.raises(PlanError, match="target: 9 bytes for the layers are too few, the smallest plan takes 10"):
        choose(candidates, 9)
    with pytest.raises(PlanError, match="other: no candidate"):
        choose({**candidates, "other": []}, 100)
