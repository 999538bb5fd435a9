"""Sums over the inputs of one group of layers on both upstreams, and what their outputs fall short by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate import hessian
from mpo_exporter.calibrate.lanes import in_lanes, lane_count
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.calibrate.seen import TO_STREAM, Input
from mpo_exporter.calibrate.sums import Sums, joined
from mpo_exporter.calibrate.upstream import Upstream, block_linears
from mpo_formats import ConfigError, ModelSpec

Matrix = NDArray[np.float64]
Found = TypeVar("Found")


def is_wide(spec: ModelSpec, names: Sequence[str]) -> bool:
    """Whether these layers are one with wide inputs that adds to the residual stream, so that it may be compressed in parts."""
    wide = len(names) == 1 and names[0].endswith(TO_STREAM) and spec.linear(names[0]).in_features > hessian.WIDE
    return wide and spec.architecture.residual_multiplier != 0


def over_pairs(
    dense: Upstream,
    ours: Upstream,
    block: int,
    before: tuple[str, ...],
    use: Callable[[int, Input, Input], Found],
) -> list[Found]:
    """Takes both upstreams to the next inputs after the layers `before`, and calls `use(lane, theirs, mine)` for each batch.

    Raises:
        ConfigError: where the block has no more layers.
    """

    def step(lane: int, rows: slice) -> Found:
        theirs, mine = (upstream.step(rows, block, before) for upstream in (dense, ours))
        if theirs is None or mine is None:
            raise ConfigError(f"calibration: block {block} has no linears after {', '.join(before)}")
        return use(lane, theirs, mine)

    with dense.ops.holding(before), ours.ops.holding(before), fast_products():
        return in_lanes(step, ours.batches, ours.ops.device)


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
    lanes = [(Sums(), Sums(), Sums()) for _ in range(lane_count(ours.ops.device))]
    scale = ours.model.architecture.residual_multiplier

    def add(lane: int, theirs: Input, mine: Input) -> None:
        second, change, drift = lanes[lane]
        second.add(mine.x)
        change.add(theirs.x - mine.x, mine.x)
        if mine.names[0].endswith(TO_STREAM) and scale != 0:
            drift.add(stream_error(theirs, mine, scale), mine.x)

    over_pairs(dense, ours, block, before, add)
    second, change, drift = (joined(kind) for kind in zip(*lanes, strict=True))
    return second, change, drift if drift.tokens else None


def measure_block(upstream: Upstream, block: int) -> dict[tuple[str, ...], Sums]:
    """Sums the moments of all layer inputs of a block, and replaces the residual stream by the block's output."""
    lanes: list[dict[tuple[str, ...], Sums]] = [{} for _ in range(lane_count(upstream.ops.device))]

    def add(lane: int, rows: slice) -> None:
        inputs, output = upstream.run(rows, block)
        for part in inputs:
            lanes[lane].setdefault(tuple(part.names), Sums()).add(part.x)
        upstream.write(rows, output)

    with upstream.ops.holding(block_linears(upstream.model.architecture, block)), fast_products():
        in_lanes(add, upstream.batches, upstream.ops.device)
    return {names: joined([lane[names] for lane in lanes if names in lane]) for names in lanes[0]}


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
        self.lanes = lane_count(ours.ops.device)
        weight = torch.from_numpy(matrix.astype(np.float32)).to(ours.ops.device)
        scale = ours.model.architecture.residual_multiplier
        seconds = [[Sums() for _ in range(self.lanes)] for _ in self.parts]
        first = [Sums() for _ in range(self.lanes)]

        def add(lane: int, theirs: Input, mine: Input) -> Tensor:
            # The difference is multiplied and not its parts, so that products in bf16 lose nothing.
            rest = torch.nn.functional.linear(theirs.x - mine.x, weight).add_(stream_error(theirs, mine, scale))
            for part, second in zip(self.parts, seconds, strict=True):
                second[lane].add(mine.x[..., part])
            first[lane].add(rest, mine.x[..., self.parts[0]])
            return rest

        self.rests = over_pairs(dense, ours, block, before, add)
        self.seconds, self.first = [joined(lanes) for lanes in seconds], joined(first)

    def drift(self, part: slice) -> Sums:
        """The sums of r x̂ᵀ for the columns of one part."""
        if part == self.parts[0]:
            return self.first
        sums = [Sums() for _ in range(self.lanes)]
        with fast_products():
            self._over(part, lambda lane, rest, x: sums[lane].add(rest, x))
        return joined(sums)

    def subtract(self, part: slice, change: Matrix) -> None:
        """Takes what a change [O, w] of the columns of a part adds to the output off r."""
        taken = torch.from_numpy(change.astype(np.float32)).to(self.ours.ops.device)
        with fast_products():
            self._over(part, lambda lane, rest, x: rest.sub_(torch.nn.functional.linear(x, taken)))

    def _over(self, part: slice, use: Callable[[int, Tensor, Tensor], object]) -> None:
        """Calls `use(lane, r, x̂)` for every batch, x̂ in the columns of a part."""
        kept, device = self.ours.kept(self.name), self.ours.ops.device

        def batch(lane: int, given: tuple[slice, Tensor]) -> None:
            rows, rest = given
            use(lane, rest, torch.from_numpy(np.ascontiguousarray(kept[rows][..., part])).to(device))

        in_lanes(batch, list(zip(self.ours.batches, self.rests, strict=True)), device)
