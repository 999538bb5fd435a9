"""Second moments of the input of every linear layer, measured block by block.

The residual stream of a model is kept on disk, one state for each token of the calibration text. Blocks are run on it batch
by batch, with the same model code that generates text, and only one block's matrices are in memory at a time. There are two
such upstreams: the dense one is the original model; in the compressed one the layers so far are already compressed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.basis import PLAIN, Basis
from mpo_exporter.calibrate.hessian import (
    DAMPING,
    WIDE,
    Hessian,
    cholesky_root,
    decompose,
    parts_of,
    pivots,
    ridge,
    transform_in_place,
)
from mpo_exporter.calibrate.lanes import in_lanes, lane_count
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.calibrate.seen import Seen, nothing_seen
from mpo_exporter.calibrate.shortfall import Shortfall, is_wide, measure_block, measure_input
from mpo_exporter.calibrate.spill import spill
from mpo_exporter.calibrate.store import Store
from mpo_exporter.calibrate.sums import Sums, joined
from mpo_exporter.calibrate.upstream import Upstream
from mpo_formats import ConfigError
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.layers.linear import widen
from mpo_runtime.weights.protocol import Weights

Matrix = NDArray[np.float64]
Single = NDArray[np.float32]
# The name in a store of both upstreams' states, and the seconds between two times that they are kept.
UPSTREAMS, BETWEEN = "fit-upstreams", 3.0
# The largest input of which more than one root is kept.
KEPT = 4096
# From a layer's name, its matrix [O, I] and its input's moment to the compressed matrix [O, I].
Build = Callable[[str, Matrix, "Moment"], NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Parts:
    """How layers of wide inputs are compressed, some columns at a time.

    Args:
        takes: whether the layer of that name may be compressed so.
        build: from a layer's name, some of its columns, their matrix [O, w] and their inputs' moment to the compressed matrix
            [O, w]; called for all parts of a layer in order.
    """

    takes: Callable[[str], bool]
    build: Callable[[str, slice, Matrix, Moment], NDArray[np.float32]]


@dataclass(eq=False)
class Moment:
    """Second moments of one input x̂ over `tokens` tokens: `second` is C = E[x̂ x̂ᵀ] [I, I].

    The arrays must not be changed but by `turn`, which exchanges x̂ and x for what they are in another `basis`.

    `cross` is E[x x̂ᵀ] [I, I] where x̂ differs from the input x of the dense model, else None. `drift` is
    E[(h − ĥ) x̂ᵀ] / m [O, I] for a layer whose output is added, m times, to the residual stream ĥ: it says how the output
    would have to change so that the stream becomes the dense model's h again. Of a part of wide inputs `cross` is None and
    `drift` is E[r x̂ᵀ], with r all that the output falls short by (`Shortfall`).

    `device` is where the Hessian is, and with it the rounding of the layers' integers; the arrays here are on the CPU.

    Layers with one input share one object, so that the root and the Hessian are computed once for all of them. Only the last
    Hessian is kept, because each takes as much memory as C.
    """

    second: Matrix
    cross: Single | None = None
    tokens: int = 0
    drift: Single | None = None
    basis: Basis = PLAIN
    device: str = "cpu"
    _hessians: dict[tuple[int, float], Hessian] = field(default_factory=dict, init=False, repr=False)
    _ridge: tuple[float, tuple[Tensor, float]] | None = field(default=None, init=False, repr=False)
    _pivots: dict[tuple[int, Basis], Single] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def root(self) -> Matrix:
        """The lower triangular L with L Lᵀ = C, as `cholesky_root` gives it."""
        return cholesky_root(self.second)

    def turn(self, basis: Basis) -> None:
        """Makes these the moments of the inputs in another basis.

        It is done in place: a second C would be the largest array of an export.
        """
        if basis == self.basis:
            return
        for matrices in (self.basis.inverses, basis.matrices):
            if matrices is None:
                continue
            for array in (self.second, self.cross):
                if array is not None:
                    transform_in_place(array, matrices)
                    transform_in_place(array.T, matrices)
            if self.drift is not None:
                transform_in_place(self.drift, matrices)
        self.basis = basis
        self._hessians.clear()
        self._ridge = None
        self.__dict__.pop("root", None)

    def pivots(self, group: int, basis: Basis) -> Single:
        """The weights R_jj² [I] of `hessian`, of the inputs in a basis, in the order of these.

        All that were asked for are kept, so that layers with one input turn it no more often than one of them.
        """
        key = (group, basis)
        if key not in self._pivots:
            if len(self.second) <= WIDE:
                self.turn(basis)
            turns = (self.basis.inverses, basis.matrices) if basis != self.basis else ()
            found = [matrices for matrices in turns if matrices is not None]
            self._pivots[key] = pivots(self.second, group, DAMPING, self.device, found)
        return self._pivots[key]

    def ridge(self, damping: float) -> tuple[Tensor, float]:
        """The root of C with a load on its diagonal, and the unit that it is in: see `hessian.ridge`; the last one is kept."""
        if self._ridge is None or self._ridge[0] != damping:
            self._ridge = damping, ridge(self.second, damping, self.device)
        return self._ridge[1]

    def hessian(self, group: int, damping: float = DAMPING) -> Hessian:
        """The damped Hessian, its columns in the processing order for groups of that size.

        Raises:
            ConfigError: when C has values that are not finite.
        """
        key = (group, damping)
        if key not in self._hessians:
            self._hessians.clear()  # before the new one takes its memory
            self._ridge = self._ridge if len(self.second) <= KEPT else None
            self._hessians[key] = decompose(self.second, group, damping, self.device)
        return self._hessians[key]


def require_finite(matrix: Matrix, name: str) -> None:
    """Raises ConfigError with the place of the first value that is not finite."""
    finite = np.isfinite(matrix)
    if not finite.all():
        row, column = (int(place) for place in np.unravel_index(int(finite.argmin()), matrix.shape))
        raise ConfigError(
            f"{name}: row {row}, column {column} is {matrix[row, column]}, not finite; check the source model"
        )


class Calibration:
    """Runs a dense model block by block over windows of token ids [N, W], with its residual stream in a file.

    `compress` takes both upstreams through a block from one layer input to the next, so that each layer runs once; the input
    that was reached is kept in a file. What a survey before it saw of the dense model, which is in `seen`, is not run again.

    Memory: the matrices of one block in float32, the moments that the caller keeps, and a batch of activations. Compressed
    matrices of the block are in mapped files. benchmarks/memory.py measures it for a model of 8 billion parameters.

    Args:
        source: the dense model.
        folder: for the temporary files: N · W · E · 4 bytes for each upstream, and in `compress` the inputs of the last two
            groups of layers of a block. They are removed at the end.
        batch: windows that are run at once.
        device: that they are run on, and integers are rounded on; cores are fitted on the CPU.

    Raises:
        ConfigError: for windows that are not [N, W] or are empty.
    """

    def __init__(
        self, source: Weights, windows: NDArray[np.int64], folder: Path, *, batch: int = 8, device: str = "cpu"
    ) -> None:
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
        self.device = device
        self.seen = nothing_seen() if torch.device(device).type == "cpu" else None

    def dense(self) -> Iterator[tuple[tuple[str, ...], Moment]]:
        """Yields the names of the layers that share an input, and the input's moment on the dense upstream, in model order.

        The last is the head, under the embedding's name where the two are tied.

        Raises:
            ConfigError: naming the layer whose input is not finite.
            OutputError: when the disk has no room for the temporary files.
        """
        with self._work() as work:
            dense = self._upstream(work / "dense")
            dense.embed()
            for block in range(self.architecture.num_hidden_layers):
                sums = measure_block(dense, block)
                for names in list(sums):
                    yield names, moment_of(names, sums.pop(names), None, device=self.device)
            yield self._head(), self._head_moment(dense, None)

    def compress(
        self,
        build: Build,
        *,
        embedding: NDArray[np.float32] | None = None,
        store: Store | None = None,
        parts: Parts | None = None,
    ) -> None:
        """Runs the model while it is being compressed: each layer's moment is that of its input after the compressed layers.

        For every group of layers with one input, in model order, the moment on the compressed upstream is measured and
        `build` is called for each layer; the run continues with the matrices that it returns. The head comes last, under the
        embedding's name where the two are tied.

        Args:
            build: makes the compressed matrix of a layer.
            embedding: the compressed table [V, E] that tokens are looked up in; None for the dense one.
            store: keeps both upstreams between blocks, every three seconds or later; a run that finds them there begins at the
                block after these (`compressed_blocks`), and `build` is not called for the layers before.
            parts: for layers with inputs wider than `hessian.WIDE` whose output is added to the residual stream: their columns
                are compressed in parts, and each part makes up for the errors of those before it, as layers do.

        Raises:
            ConfigError: naming the layer whose input is not finite, or for a compressed matrix of another shape.
            OutputError: when the disk has no room for the temporary files.
        """
        with self._work() as work:
            dense, ours = self._upstream(work / "dense", self.seen), self._upstream(work / "compressed")
            first, kept = compressed_blocks(store), None if store is None else store.read(UPSTREAMS)
            if kept is not None:
                dense.states[:], ours.states[:] = kept["dense"], kept["ours"]
                del kept
            else:
                dense.embed()
                table = None if embedding is None else torch.from_numpy(np.ascontiguousarray(embedding, np.float32))
                with nullcontext() if table is None else ours.ops.replaced(EMBEDDING, table):
                    ours.embed()
            last = time.monotonic()
            for block in range(first, self.architecture.num_hidden_layers):
                self._compress_block(dense, ours, block, build, parts, work)
                if store is not None and time.monotonic() - last > BETWEEN:
                    done = {"block": np.array([block + 1]), "dense": dense.states, "ours": ours.states}
                    store.write(UPSTREAMS, done)
                    last = time.monotonic()
            moment = self._head_moment(ours, dense)
            for name in self._head():
                build(name, dense_matrix(self.source, name), moment)

    def _compress_block(
        self, dense: Upstream, ours: Upstream, block: int, build: Build, parts: Parts | None, work: Path
    ) -> None:
        mapped = []
        before: tuple[str, ...] = ()
        with ExitStack() as compressed:
            for names in input_groups(dense, block):
                for name, built in self._compressed(dense, ours, block, before, names, build, parts):
                    spec = self.source.spec.linear(name)
                    if built.shape != (spec.out_features, spec.in_features):
                        raise ConfigError(
                            f"{name}: expected a compressed matrix of {spec.out_features} x "
                            f"{spec.in_features}, found {list(built.shape)}"
                        )
                    mapped.append(work / f"{name}.matrix")
                    compressed.enter_context(ours.ops.replaced(name, spill(mapped[-1], built)))
                before = names
            for upstream in (dense, ours):
                upstream.leave(block, before)
                for name in list(upstream.inputs):
                    upstream.forget(name)
        for file in mapped:
            file.unlink()

    def _compressed(
        self,
        dense: Upstream,
        ours: Upstream,
        block: int,
        before: tuple[str, ...],
        names: tuple[str, ...],
        build: Build,
        parts: Parts | None,
    ) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Names and compressed matrices of the layers with the next input after the layers `before`."""
        name = names[0]
        if parts is None or not (is_wide(self.source.spec, names) and parts.takes(name)):
            moment = moment_of(names, *measure_input(dense, ours, block, before), device=self.device)
            for name in names:
                yield name, build(name, dense_matrix(self.source, name), moment)
            return
        matrix = dense_matrix(self.source, name)
        columns = parts_of(matrix.shape[1])
        short = Shortfall(dense, ours, block, before, name, matrix, columns)
        whole = np.empty(matrix.shape, np.float32)
        for part, second in zip(columns, short.seconds, strict=True):
            moment = moment_of(names, second, None, short.drift(part), device=self.device)
            whole[:, part] = parts.build(name, part, matrix[:, part], moment)
            if part != columns[-1]:
                short.subtract(part, whole[:, part] - matrix[:, part])
        yield name, whole

    @contextmanager
    def _work(self) -> Iterator[Path]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="calibration-", dir=self.folder) as work:
            yield Path(work)

    def _upstream(self, file: Path, seen: Seen | None = None) -> Upstream:
        return Upstream(self.source, self.windows, file, self.batch, self.device, seen)

    def _head(self) -> tuple[str, ...]:
        return (EMBEDDING if self.architecture.tie_word_embeddings else HEAD,)

    def _head_moment(self, upstream: Upstream, dense: Upstream | None) -> Moment:
        lanes = [(Sums(), Sums()) for _ in range(lane_count(self.device))]

        def add(lane: int, rows: slice) -> None:
            x = upstream.normed(rows)
            second, change = lanes[lane]
            second.add(x)
            if dense is not None:
                change.add(dense.normed(rows) - x, x)

        with fast_products():
            in_lanes(add, upstream.batches, self.device)
        second, change = (joined(kind) for kind in zip(*lanes, strict=True))
        return moment_of(self._head(), second, None if dense is None else change, device=self.device)


def compressed_blocks(store: Store | None) -> int:
    """How many blocks of `Calibration.compress` a store has behind it."""
    kept = None if store is None else store.read(UPSTREAMS)
    return 0 if kept is None else int(kept["block"][0])


def dense_matrix(source: Weights, name: str) -> Matrix:
    """The matrix [O, I] of a dense model's layer, in float64."""
    tensor = f"{name}.0.weight"
    return widen(source.array(tensor), source.dtype(tensor)).numpy().astype(np.float64)


def input_groups(upstream: Upstream, block: int) -> list[tuple[str, ...]]:
    """The names of a block's layers in the order of use, those with one input together; found by running one window."""
    inputs, _ = upstream.run(slice(0, 1), block)
    return [tuple(part.names) for part in inputs]


def moment_of(
    names: tuple[str, ...], second: Sums, change: Sums | None, drift: Sums | None = None, *, device: str = "cpu"
) -> Moment:
    """The moment from the sums of x̂ x̂ᵀ, (x − x̂) x̂ᵀ and the drift, for fits on a device.

    Raises:
        ConfigError: naming the first layer, when the input was not finite.
    """
    tokens = second.tokens
    # Only the difference of `cross` and C is used, so single precision is enough, and it takes half the memory.
    whole = second.mean(symmetric=True)
    across = None if change is None else (change.mean(symmetric=False) + whole).astype(np.float32)
    drifted = None if drift is None else drift.mean(symmetric=False).astype(np.float32)
    moment = Moment(whole, across, tokens, drifted, device=device)
    for part in (moment.second, moment.cross, moment.drift):
        if part is not None and not np.isfinite(part).all():
            raise ConfigError(f"{names[0]}: its input is not finite on the calibration text; check the source model")
    return moment
