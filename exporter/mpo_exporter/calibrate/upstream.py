"""One upstream of the calibration: a model whose residual stream lies on disk and whose blocks are run one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.spill import mapped_file
from mpo_formats import Architecture
from mpo_runtime.backends.reference import ReferenceOps, TorchCache
from mpo_runtime.layers.linear import Linear, MatrixTerm
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights


class Enough(Exception):
    """Ends a run of a block whose remaining outputs nobody wants."""


@dataclass(slots=True)
class Input:
    """What linears with one input were given: names in the order of use, the input [B, S, I], the stream [B, S, E] then."""

    names: list[str]
    x: Tensor
    stream: Tensor | None = None


@dataclass(slots=True)
class Record:
    """The inputs of a run's linears; the run ends where the input of number `last` is seen."""

    last: int | None = None
    inputs: list[Input] = field(default_factory=list)
    stream: Tensor | None = None

    def see(self, name: str, x: Tensor) -> None:
        """Notes that the layer `name` takes the input x.

        Raises:
            Enough: when this is the last input that is wanted.
        """
        if not self.inputs or self.inputs[-1].x is not x:
            self.inputs.append(Input([], x, self.stream))
        self.inputs[-1].names.append(name)
        if self.last is not None and len(self.inputs) > self.last:
            raise Enough


@dataclass(slots=True)
class Resume:
    """Where a run begins: at the linears `names`, with their input x; until they are called no op does anything."""

    names: tuple[str, ...]
    x: Tensor
    reached: bool = False


class RecordingOps(ReferenceOps):
    """The reference ops, whose matrices stay in the mapped file, and that note what linears are given.

    With a `resume` the ops before its linears are passed over: they give back what they were given, which nobody uses but
    the residual stream.
    """

    def __init__(self, source: Weights) -> None:
        super().__init__(source, held=False)
        self.record: Record | None = None
        self.resume: Resume | None = None

    @property
    def passing(self) -> bool:
        """Whether the run has not yet come to where it begins."""
        return self.resume is not None and not self.resume.reached

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias, noted."""
        name = layer.spec.name
        if self.resume is not None and name in self.resume.names:
            self.resume.reached, x = True, self.resume.x
        if self.passing:
            return x
        if self.record is not None:
            self.record.see(name, x)
        return super().linear(layer, x)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight."""
        return x if self.passing else super().rms_norm(x, weight, eps)

    def rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache, block: int) -> Tensor:
        """Rotates q and k, appends k and v to the cache; returns q."""
        return q if self.passing else super().rope_and_append(q, k, v, cache, block)

    def attention(self, q: Tensor, cache: TorchCache, block: int, scale: float) -> Tensor:
        """Causal grouped-query attention of q over the cache."""
        return q if self.passing else super().attention(q, cache, block, scale)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up."""
        return gate if self.passing else super().swiglu(gate, up)

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """x + scale · y, the residual stream from now on."""
        if self.passing:
            return x
        stream = super().add_scaled(x, y, scale)
        if self.record is not None:
            self.record.stream = stream
        return stream

    def replace(self, name: str, weight: Tensor) -> None:
        """Puts the matrix [out, in] in the place of a layer's terms; its bias stays."""
        layer = self.linears[name]
        term = MatrixTerm(weight, lambda: weight, lambda ids: weight[ids])
        self.linears[name] = Linear(layer.spec, [term], layer.bias)

    @contextmanager
    def holding(self, block: int, only: tuple[str, ...] | None = None) -> Iterator[None]:
        """Keeps the matrices of a block in memory, in float32; of `only` these layers where they are given."""
        prefix = f"model.layers.{block}."
        layers = [
            layer for name, layer in self.linears.items() if (name.startswith(prefix) if only is None else name in only)
        ]
        terms = [term for layer in layers for term in layer.terms if isinstance(term, MatrixTerm) and term.held is None]
        for term in terms:
            term.held = term.rebuild()
        try:
            yield
        finally:
            for term in terms:
                term.held = None


def block_cache(architecture: Architecture, rows: int, count: int, device: torch.device) -> TorchCache:
    """A KV cache for one block at a time: all blocks share one block's memory."""
    cache = TorchCache(architecture, 0, 0, device)
    shape = (2, rows, architecture.num_key_value_heads, count, architecture.head_dim)
    cache.held = [torch.zeros(shape, device=device)] * architecture.num_hidden_layers
    cache.lengths, cache.capacity = [0] * rows, count
    return cache


class Upstream:
    """A model and the residual stream [N, W, E] of windows of token ids [N, W], kept in a file.

    Raises:
        OutputError: when the file would not fit on its disk.
    """

    def __init__(self, source: Weights, windows: NDArray[np.int64], file: Path, batch: int) -> None:
        self.ops = RecordingOps(source)
        self.model = decoder_for(source.spec.architecture, self.ops)
        self.windows, self.file = windows, file
        shape = (*windows.shape, self.model.architecture.hidden_size)
        self.states = mapped_file(file, shape)
        self.inputs: dict[str, NDArray[np.float32]] = {}
        self.batches = [slice(start, start + batch) for start in range(0, windows.shape[0], batch)]

    @torch.no_grad()
    def embed(self) -> None:
        """Sets the residual stream to the embedded tokens."""
        for rows in self.batches:
            self.write(rows, self.model.embed(self.ops.ids(self.windows[rows].tolist())))

    def read(self, rows: slice) -> Tensor:
        """The residual stream [B, W, E] of a batch."""
        return torch.from_numpy(np.array(self.states[rows]))

    def write(self, rows: slice, x: Tensor | None) -> None:
        """Sets the residual stream of a batch; None leaves it."""
        if x is not None:
            self.states[rows] = x.numpy()

    @torch.no_grad()
    def run(
        self, rows: slice, block: int, last: int | None = None, resume: Resume | None = None
    ) -> tuple[list[Input], Tensor | None]:
        """Runs a block on a batch; gives its linears' inputs and its output [B, W, E].

        Args:
            last: ends the run at the block's input of that number; there is no output then.
            resume: begins there, not at the block's first op; its input is then the first one.
        """
        x = self.read(rows)
        cache = block_cache(self.model.architecture, x.shape[0], x.shape[1], x.device)
        self.ops.record, self.ops.resume = Record(last, stream=x), resume
        record = self.ops.record
        try:
            return record.inputs, self.model.block(x, cache, block)
        except Enough:
            return record.inputs, None
        finally:
            self.ops.record = self.ops.resume = None

    def step(self, rows: slice, block: int, before: tuple[str, ...]) -> Input | None:
        """Goes on through a block to the next input that linears are given, or to its end: gives that input, or None.

        The residual stream in the file is brought up to there, and the input is kept for the next step.

        Args:
            before: the linears of the step before, whose input was kept; none at the block's begin.
        """
        if before:
            resume = Resume(before, torch.from_numpy(np.array(self.kept(before[0])[rows])))
            inputs, output = self.run(rows, block, 1, resume)
            found = inputs[1] if output is None else None
        else:
            [found], output = self.run(rows, block, 0)
        self.write(rows, output if found is None else found.stream)
        if found is not None:
            self.kept(found.names[0])[rows] = found.x.numpy()
        return found

    def kept(self, name: str) -> NDArray[np.float32]:
        """The input [N, W, I] of the layer `name`, in a file; of two others the older one is removed."""
        if name not in self.inputs:
            for other in list(self.inputs)[:-1]:
                self.forget(other)
            shape = (*self.windows.shape, self.ops.linears[name].spec.in_features)
            self.inputs[name] = mapped_file(self.input_file(name), shape)
        return self.inputs[name]

    def input_file(self, name: str) -> Path:
        """Where a layer's input is kept."""
        return self.file.with_name(f"{self.file.name}.{name}")

    def forget(self, name: str) -> None:
        """Removes the file of a layer's input."""
        del self.inputs[name]
        self.input_file(name).unlink()

    @torch.no_grad()
    def normed(self, rows: slice) -> Tensor:
        """The normed residual stream of a batch: what the head is given."""
        x: Tensor = self.model.normed(self.read(rows))
        return x
