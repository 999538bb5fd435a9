"""Second moments of the input of every linear layer, block by block.

A model's residual stream lies on disk, one state for each window and upstream; a block is run on it batch by batch with
the same model code that generates text, and only that block's matrices are in memory. The dense upstream is the model as
it came; the compressed one is what the layers before, already compressed, make of the same text.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.spill import mapped_file
from mpo_exporter.calibrate.upstream import Upstream
from mpo_formats import ConfigError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.layers.linear import widen
from mpo_runtime.weights.protocol import Weights

Matrix = NDArray[np.float64]
Single = NDArray[np.float32]
# Layers whose output is added to the residual stream.
TO_STREAM = ("self_attn.o_proj", "mlp.down_proj")
# Rows of a product computed at a time: the single-precision part then takes little memory beside the sums.
PANEL = 1024
# name, the matrix [O, I], its input's moment → the compressed matrix [O, I]
Build = Callable[[str, Matrix, "Moment"], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Moment:
    """Second moments of one input: E[x̂ x̂ᵀ] [I, I] and, where x̂ is not the dense input x, E[x x̂ᵀ] [I, I].

    `drift` is E[(h − ĥ) x̂ᵀ] / m [O, I], for a layer whose output is added to the residual stream ĥ, m times: what an output
    would have to make up for so that the stream becomes the dense model's h again.
    """

    second: Matrix
    cross: Single | None
    tokens: int
    drift: Single | None = None


class Sums:
    """Running sums of x x̂ᵀ over tokens: products of a batch in single precision, their sum in double."""

    def __init__(self) -> None:
        self.total: Matrix | None = None
        self.tokens = 0

    def add(self, left: Tensor, right: Tensor | None = None) -> None:
        """Adds Σ_t left_t right_tᵀ of inputs [..., I]; without `right` it is left's own, of which one half is computed."""
        left = left.detach().reshape(-1, left.shape[-1])
        right_ = left if right is None else right.detach().reshape(-1, right.shape[-1])
        size = left.shape[1]
        if self.total is None:
            self.total = np.zeros((size, right_.shape[1]))
        for start in range(0, size, PANEL):
            first = start if right is None else 0
            rows = slice(start, start + PANEL)
            self.total[rows, first:] += (left[:, rows].T @ right_[:, first:]).cpu().numpy()
        self.tokens += left.shape[0]

    def mean(self, symmetric: bool) -> Matrix:
        """The sums over tokens divided by their number; the lower half is filled in where only the upper was summed."""
        if self.total is None:
            raise ConfigError("calibration: no tokens were seen; give a longer text with --calib")
        total, self.total = self.total, None
        total /= self.tokens
        if symmetric:
            for start in range(0, total.shape[0], PANEL):
                rows = slice(start, start + PANEL)
                total[start + PANEL :, rows] = total[rows, start + PANEL :].T
                # The diagonal panel was computed whole; rounding may have left its halves different.
                total[rows, rows] = (total[rows, rows] + total[rows, rows].T) / 2
        return total


class Calibration:
    """Walks a dense model over windows of token ids [N, W], its residual stream spilled to disk.

    In `compress` both upstreams go through a block input by input, each linear once: the last input is kept in a file.

    Memory: the matrices of one block in float32, the moments asked for, and a batch of activations. Compressed matrices of
    the block stay in mapped files. benchmarks/memory.py measures it for the geometry of 8 billion parameters.

    Args:
        source: the dense model.
        folder: where states are spilled, N · W · E · 4 bytes for each upstream, in `compress` the inputs of a block's last
            two groups of layers beside them; what is written there is removed.
        batch: windows run at a time.

    Raises:
        ConfigError: for windows that are not [N, W] or are empty.
    """

    def __init__(self, source: Weights, windows: NDArray[np.int64], folder: Path, *, batch: int = 8) -> None:
        if windows.ndim != 2 or not windows.size or batch < 1:
            raise ConfigError(
                f"calibration: expected windows [N, W] in batches of at least 1, found an array of shape "
                f"{list(windows.shape)} in batches of {batch}"
            )
        self.source = source
        self.architecture = source.spec.architecture
        self.windows = windows
        self.folder = folder
        self.batch = batch

    def dense(self) -> Iterator[tuple[tuple[str, ...], Moment]]:
        """Yields the names of the linears that share an input and its moment on the dense upstream, in model order.

        The last is the head, named as the embedding where the two are tied.

        Raises:
            ConfigError: naming the layer whose input is not finite.
            OutputError: when the disk is too small for what is spilled.
        """
        with self._work() as work:
            dense = self._upstream(work / "dense")
            dense.embed()
            for block in range(self.architecture.num_hidden_layers):
                sums = measure_block(dense, block)
                for names in list(sums):
                    yield names, moment_of(names, sums.pop(names), None)
            yield self._head(), self._head_moment(dense, None)

    def compress(self, build: Build, *, embedding: NDArray[np.float32] | None = None) -> None:
        """Walks the model while it is being compressed: each layer's moment is that of what its input has become.

        For every group of linears with one input, in model order, the moment on the compressed upstream is measured and
        `build` is called for each of them; the walk goes on with the matrices that it returns. The head comes last (named
        as the embedding where the two are tied).

        Args:
            build: (name, matrix [O, I], moment) → compressed matrix [O, I].
            embedding: the compressed table [V, E] that tokens are looked up in; None means the dense one.

        Raises:
            ConfigError: naming the layer whose input is not finite, or for a compressed matrix of another shape.
            OutputError: when the disk is too small for what is spilled.
        """
        with self._work() as work:
            dense, ours = self._upstream(work / "dense"), self._upstream(work / "compressed")
            dense.embed()
            table = ours.ops.linears[EMBEDDING]
            if embedding is not None:
                ours.ops.replace(EMBEDDING, torch.from_numpy(np.ascontiguousarray(embedding, np.float32)))
            ours.embed()
            ours.ops.linears[EMBEDDING] = table
            for block in range(self.architecture.num_hidden_layers):
                self._compress_block(dense, ours, block, build, work)
            moment = self._head_moment(ours, dense)
            for name in self._head():
                build(name, dense_matrix(self.source, name), moment)

    def _compress_block(self, dense: Upstream, ours: Upstream, block: int, build: Build, work: Path) -> None:
        originals = dict(ours.ops.linears)
        mapped = []
        before: tuple[str, ...] = ()
        for names in input_groups(dense, block):
            moment = moment_of(names, *measure_input(dense, ours, block, before))
            for name in names:
                built = build(name, dense_matrix(self.source, name), moment)
                spec = originals[name].spec
                if built.shape != (spec.out_features, spec.in_features):
                    raise ConfigError(
                        f"{name}: expected a compressed matrix of {spec.out_features} x "
                        f"{spec.in_features}, found {list(built.shape)}"
                    )
                mapped.append(work / f"{name}.matrix")
                ours.ops.replace(name, spill(mapped[-1], built))
            del moment  # before the next one takes its memory
            before = names
        for upstream in (dense, ours):
            with upstream.ops.holding(block, before):
                for rows in upstream.batches:
                    upstream.step(rows, block, before)
            for name in list(upstream.inputs):
                upstream.forget(name)
        ours.ops.linears.update(originals)
        for file in mapped:
            file.unlink()

    @contextmanager
    def _work(self) -> Iterator[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="calibration-", dir=self.folder) as work:
            yield Path(work)

    def _upstream(self, file: Path) -> Upstream:
        return Upstream(self.source, self.windows, file, self.batch)

    def _head(self) -> tuple[str, ...]:
        return (EMBEDDING if self.architecture.tie_word_embeddings else HEAD,)

    def _head_moment(self, upstream: Upstream, dense: Upstream | None) -> Moment:
        second, cross = Sums(), None if dense is None else Sums()
        for rows in upstream.batches:
            x = upstream.normed(rows)
            second.add(x)
            if cross is not None and dense is not None:
                cross.add(dense.normed(rows), x)
        return moment_of(self._head(), second, cross)


def dense_matrix(source: Weights, name: str) -> Matrix:
    """The matrix [O, I] of a dense model's layer."""
    tensor = f"{name}.0.weight"
    return widen(source.array(tensor), source.dtype(tensor)).numpy().astype(np.float64)


def input_groups(upstream: Upstream, block: int) -> list[tuple[str, ...]]:
    """The names of a block's linears, those with one input together, in the order of use; found on one window."""
    inputs, _ = upstream.run(slice(0, 1), block)
    return [tuple(part.names) for part in inputs]


def measure_block(upstream: Upstream, block: int) -> dict[tuple[str, ...], Sums]:
    """Sums the moments of all inputs in a block and advances the residual stream past it, in one pass."""
    sums: dict[tuple[str, ...], Sums] = {}
    with upstream.ops.holding(block):
        for rows in upstream.batches:
            inputs, output = upstream.run(rows, block)
            for part in inputs:
                sums.setdefault(tuple(part.names), Sums()).add(part.x)
            upstream.write(rows, output)
    return sums


def measure_input(
    dense: Upstream, ours: Upstream, block: int, before: tuple[str, ...]
) -> tuple[Sums, Sums, Sums | None]:
    """Sums the moments of the input that follows the linears `before`, whose matrices are as they will stay.

    Gives those on the compressed upstream, across the two, and the drift.
    """
    second, cross, drift = Sums(), Sums(), Sums()
    scale = ours.model.architecture.residual_multiplier
    residual = False
    with dense.ops.holding(block, before), ours.ops.holding(block, before):
        for rows in ours.batches:
            theirs, mine = (upstream.step(rows, block, before) for upstream in (dense, ours))
            if theirs is None or mine is None:
                raise ConfigError(f"calibration: block {block} has no linears after {', '.join(before)}")
            second.add(mine.x)
            cross.add(theirs.x, mine.x)
            residual = mine.names[0].endswith(TO_STREAM)
            if residual and theirs.stream is not None and mine.stream is not None and scale:
                drift.add((theirs.stream - mine.stream) / scale, mine.x)
    return second, cross, drift if residual and scale else None


def moment_of(names: tuple[str, ...], second: Sums, cross: Sums | None, drift: Sums | None = None) -> Moment:
    """The moment that sums make.

    Raises:
        ConfigError: naming the first layer, when the input was not finite.
    """
    tokens = second.tokens
    # Only differences of these are used, and they are large: in single precision they take half the memory.
    across, drifted = (
        None if sums is None else sums.mean(symmetric=False).astype(np.float32) for sums in (cross, drift)
    )
    moment = Moment(second.mean(symmetric=True), across, tokens, drifted)
    for part in (moment.second, moment.cross, moment.drift):
        if part is not None and not np.isfinite(part).all():
            raise ConfigError(f"{names[0]}: its input is not finite on the calibration text; check the source model")
    return moment


def spill(file: Path, matrix: NDArray[np.float32]) -> Tensor:
    """Puts a matrix into a mapped file, so that it takes no memory that cannot be given back."""
    mapped = mapped_file(file, matrix.shape)
    mapped[:] = matrix
    return torch.from_numpy(mapped)
