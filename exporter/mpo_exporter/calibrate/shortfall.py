"""Sums over the inputs of one group of layers on both upstreams, and what their outputs fall short by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate import hessian
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.calibrate.sums import Sums
from mpo_exporter.calibrate.upstream import Input, Upstream
from mpo_formats import ConfigError, ModelSpec

Matrix = NDArray[np.float64]
# Layers whose output is added to the residual stream.
TO_STREAM = ("self_attn.o_proj", "mlp.down_proj")


def is_wide(spec: ModelSpec, names: Sequence[str]) -> bool:
    """Whether these layers are one with wide inputs that adds to the residual stream, so that it may be compressed in parts."""
    wide = len(names) == 1 and names[0].endswith(TO_STREAM) and spec.linear(names[0]).in_features > hessian.WIDE
    return wide and spec.architecture.residual_multiplier != 0


def pairs(dense: Upstream, ours: Upstream, block: int, before: tuple[str, ...]) -> Iterator[tuple[Input, Input]]:
    """The next inputs after the layers `before` on both upstreams, batch by batch; the upstreams go on to there.

    Raises:
        ConfigError: where the block has no more layers.
    """
    with dense.ops.holding(before), ours.ops.holding(before), fast_products():
        for rows in ours.batches:
            theirs, mine = (upstream.step(rows, block, before) for upstream in (dense, ours))
            if theirs is None or mine is None:
                raise ConfigError(f"calibration: block {block} has no linears after {', '.join(before)}")
            yield theirs, mine


def stream_error(theirs: Input, mine: Input, scale: float) -> Tensor:
    """(h − ĥ) / m: by how much an output that is added m times to the stream would have to change."""
    if theirs.stream is None or mine.stream is None:
        raise ConfigError("calibration: a layer adds to a residual stream that was not recorded")
    return (theirs.stream - mine.stream) / scale


def measure_input(
    dense: Upstream, ours: Upstream, block: int, before: tuple[str, ...]
) -> tuple[Sums, Sums, Sums | None]:
    """Sums the moments of the first layer input after the layers `before`, which are already compressed.

    Returns:
        The sums of x̂ x̂ᵀ on the compressed upstream, of (x − x̂) x̂ᵀ across the two, and of the drift where the layers' output is
        added to the residual stream (see `Moment`).
    """
    second, change, drift = Sums(), Sums(), Sums()
    scale = ours.model.architecture.residual_multiplier
    residual = False
    for theirs, mine in pairs(dense, ours, block, before):
        second.add(mine.x)
        change.add(theirs.x - mine.x, mine.x)
        residual = mine.names[0].endswith(TO_STREAM) and scale != 0
        if residual:
            drift.add(stream_error(theirs, mine, scale), mine.x)
    return second, change, drift if residual else None


class Shortfall:
    """What the output of a layer W [O, I] falls short by: r = W (x − x̂) + (h − ĥ) / m for every token.

    The layer's matrix is to change by the Δ with the least E|r − Δ x̂|². Its columns are taken part by part: `subtract` takes off
    what a part makes up for, and puts on the errors of its rounding.

    Args:
        dense, ours, block, before: as `measure_input` takes them.
        name: of the layer.
        matrix: W.
        parts: the columns of every part; their sums of x̂ x̂ᵀ are `seconds`.
    """

    def __init__(
        self,
        dense: Upstream,
        ours: Upstream,
        block: int,
        before: tuple[str, ...],
        name: str,
        matrix: Matrix,
        parts: Sequence[slice],
    ) -> None:
        self.ours, self.name, self.parts = ours, name, tuple(parts)
        self.seconds = [Sums() for _ in self.parts]
        self.rests: list[Tensor] = []
        weight = torch.from_numpy(matrix.astype(np.float32)).to(ours.ops.device)
        scale = ours.model.architecture.residual_multiplier
        self.first = Sums()
        for theirs, mine in pairs(dense, ours, block, before):
            # The difference is multiplied and not its parts, so that products in bf16 lose nothing.
            rest = torch.nn.functional.linear(theirs.x - mine.x, weight).add_(stream_error(theirs, mine, scale))
            for part, second in zip(self.parts, self.seconds, strict=True):
                second.add(mine.x[..., part])
            self.first.add(rest, mine.x[..., self.parts[0]])
            self.rests.append(rest)

    def drift(self, part: slice) -> Sums:
        """The sums of r x̂ᵀ for the columns of one part."""
        if part == self.parts[0]:
            return self.first
        sums = Sums()
        with fast_products():
            for rest, x in self._batches(part):
                sums.add(rest, x)
        return sums

    def subtract(self, part: slice, change: Matrix) -> None:
        """Takes what a change [O, w] of the columns of a part adds to the output off r."""
        taken = torch.from_numpy(change.astype(np.float32)).to(self.ours.ops.device)
        with fast_products():
            for rest, x in self._batches(part):
                rest -= torch.nn.functional.linear(x, taken)

    def _batches(self, part: slice) -> Iterator[tuple[Tensor, Tensor]]:
        """r and x̂ in the columns of a part, batch by batch."""
        kept = self.ours.kept(self.name)
        for rows, rest in zip(self.ours.batches, self.rests, strict=True):
            yield rest, torch.from_numpy(np.ascontiguousarray(kept[rows][..., part])).to(self.ours.ops.device)
