"""The loss that a survey expects of any layer, also of terms between those that it measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from mpo_exporter.fit.shapes import low_rank_shape
from mpo_exporter.measure.survey import Survey
from mpo_exporter.terms import Candidate
from mpo_formats import LinearSpec, Mpo, Quantized
from mpo_formats.architecture import full_rank

Curve = Sequence[tuple[int, float]]


def layer_loss(surveyed: Survey, linear: LinearSpec) -> float | None:
    """Nats a token that a layer's terms are expected to cost; None for sums of terms that no survey knows.

    Terms that were not measured themselves take the loss of their neighbours: bonds between those of the ladder by
    interpolation in log χ, groups the nearest of the same bits. Floats cost nothing.
    """
    row = surveyed.candidates[linear.name]
    for one in row:
        if one.terms == linear.terms:
            return one.loss
    kinds = [term.kind for term in linear.terms]
    if kinds == ["dense"]:
        return 0.0
    first = linear.terms[0]
    if kinds == ["quantized"] and isinstance(first, Quantized):
        return nearest_integers(row, first)
    last = linear.terms[-1]
    if kinds == ["mpo"] and isinstance(last, Mpo):
        return alone_loss(surveyed, linear, last)
    if kinds == ["quantized", "mpo"] and isinstance(first, Quantized) and isinstance(last, Mpo):
        return corrected_loss(row, linear, first, last)
    return None


def total_loss(surveyed: Survey, linears: Sequence[LinearSpec]) -> float | None:
    """The summed loss of all layers, None where one of them is unknown."""
    losses = [layer_loss(surveyed, linear) for linear in linears]
    known = [loss for loss in losses if loss is not None]
    return sum(known) if len(known) == len(losses) else None


def nearest_integers(row: Sequence[Candidate], term: Quantized) -> float | None:
    """The loss of integers alone: those of the same bits whose group is nearest, stored zeros counting as half a group."""

    def distance(other: Quantized) -> float:
        return abs(math.log2(other.group / term.group)) + (other.zeros != term.zeros) / 2

    found = [
        (distance(one.terms[0]), one.loss)
        for one in row
        if len(one.terms) == 1 and isinstance(one.terms[0], Quantized) and one.terms[0].bits == term.bits
    ]
    return min(found)[1] if found else None


def alone_loss(surveyed: Survey, linear: LinearSpec, term: Mpo) -> float | None:
    """The loss of cores in the place of a matrix; more than two cores are taken for two of the same χ."""
    measured = surveyed.alone.get(linear.name)
    if measured is None:
        return None
    low_rank = (term.out_dims, term.in_dims) == low_rank_shape(linear.out_features, linear.in_features)
    most = max(full_rank(term.out_dims, term.in_dims))
    return interpolated([*(measured.low_rank if low_rank else measured.balanced), (most, 0.0)], max(term.bonds))


def corrected_loss(row: Sequence[Candidate], linear: LinearSpec, base: Quantized, cores: Mpo) -> float | None:
    """The loss of integers and cores beside them: that of the integers, times what cores leave of it in the nearest base."""
    alone = nearest_integers(row, base)
    bases = [one.terms[0] for one in row if len(one.terms) == 2 and isinstance(one.terms[0], Quantized)]
    if alone is None or not bases:
        return alone
    nearest = min(bases, key=lambda one: (abs(one.bits - base.bits), abs(one.group - base.group)))
    if (cores.out_dims, cores.in_dims) != low_rank_shape(linear.out_features, linear.in_features):
        return alone
    plain = nearest_integers(row, nearest)
    curve = [
        (max(one.terms[1].bonds), one.loss)
        for one in row
        if len(one.terms) == 2 and one.terms[0] == nearest and isinstance(one.terms[1], Mpo)
    ]
    most = min(linear.out_features, linear.in_features)
    left = interpolated([*curve, (most, 0.0)], max(cores.bonds))
    return alone if not plain else alone * min(left / plain, 1.0)


def interpolated(curve: Curve, chi: int) -> float:
    """A loss between those of a curve of (χ, loss), linear in log χ."""
    points = sorted(dict(curve).items())
    return float(np.interp(math.log(chi), [math.log(at) for at, _ in points], [loss for _, loss in points]))
