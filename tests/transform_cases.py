"""Stored transforms for tests: random rotations, rounded to integers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from mpo_exporter.basis import Basis
from mpo_exporter.measure.survey import Survey
from mpo_exporter.quantize.rounding import round_to_nearest
from mpo_formats import LinearSpec, Quantized, Transform
from mpo_formats.layout import transform_tensors


def random_basis(name: str, block: int, count: int = 1, bits: int = 8) -> Basis:
    """Random rotations of blocks, rounded to integers, so that they are rotations no more."""
    source = np.random.default_rng(block + count)
    matrices = [np.linalg.qr(source.standard_normal((block, block)))[0] for _ in range(count)]
    integers = round_to_nearest(np.concatenate(matrices), bits, min(block, 64))
    stored = Transform(name, block, count, Quantized(bits, min(block, 64), False))
    names = [tensor.name for tensor in transform_tensors(stored)]
    return Basis(transform=stored, tensors=dict(zip(names, (*integers.planes(), integers.scale), strict=True)))


def shared_bases(linears: Iterable[LinearSpec], block: int) -> dict[str, Basis]:
    """For every layer by its name a basis: layers with one input share theirs, and down projections have own matrices."""
    found = {}
    for linear in linears:
        owner = linear.name
        for part, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
            owner = owner.replace(part, first) if owner.replace(part, first) in found else owner
        count = linear.in_features // block if linear.name.endswith("down_proj") else 1
        found[linear.name] = found[owner] if owner in found else random_basis(linear.name, block, count)
    return found


def turned(linears: Iterable[LinearSpec], block: int) -> tuple[tuple[LinearSpec, ...], Survey]:
    """The layers, each with a stored transform of its input, and a survey that has their tensors."""
    linears = tuple(linears)
    bases = shared_bases(linears, block)
    found = tuple(replace(one, transform=bases[one.name].transform) for one in linears)
    stored = {one.transform.name: one for one in bases.values() if one.transform is not None}
    return found, Survey({}, None, bases=stored)
