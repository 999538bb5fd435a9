"""One upstream of the calibration: a model whose residual stream is kept on disk and whose blocks are run one at a time."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.calibrate.lanes import in_lanes, lane_count
from mpo_exporter.calibrate.precision import fast_products, small_products
from mpo_exporter.calibrate.seen import Input, Seen, shared
from mpo_exporter.calibrate.spill import mapped_file
from mpo_formats import Architecture
from mpo_runtime.backends.reference import ReferenceOps, TorchCache, TorchSpans
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights

# A layer's input that takes at most so many bytes is kept in memory: a new file's pages cost more than their use.
HELD_BYTES = 1 << 28


class Enough(Exception):
    """Ends the run of a block early, when the last input that is needed was seen."""


@dataclass(slots=True)
class Record:
    """The inputs of the layers in a run of a block; the run ends when the input of index `last` is seen.

    Args:
        stream: the residual stream, at first the one before the block.
        moved: whether the block has added to it.
    """

    last: int | None = None
    inputs: list[Input] = field(default_factory=list)
    stream: Tensor | None = None
    moved: bool = False

    def see(self, name: str, x: Tensor) -> None:
        """Records that the layer `name` takes the input x.

        Raises:
            Enough: when this is the last input that is needed.
        """
        if not self.inputs or self.inputs[-1].x is not x:
            self.inputs.append(Input([], x, self.stream, self.moved))
        self.inputs[-1].names.append(name)
        if self.last is not None and len(self.inputs) > self.last:
            raise Enough


@dataclass(slots=True)
class Resume:
    """Where a run begins: at the layers `names`, with their input x; the ops before them do nothing."""

    names: tuple[str, ...]
    x: Tensor
    reached: bool = False


class WindowOps(ReferenceOps):
    """The reference ops, with attention over whole windows in one operation."""

    def attention(self, q: Tensor, cache: TorchCache | TorchSpans, block: int, scale: float, window: int) -> Tensor:
        """Causal grouped-query attention of q [B, H, S, D] over the cache, as [B, S, H·D]."""
        count = q.shape[2]
        if not isinstance(cache, TorchCache) or any(cache.lengths) or count != cache.capacity or 0 < window < count:
            return super().attention(q, cache, block, scale, window)
        keys, values = cache.held[block].float()
        with small_products():
            mixed = F.scaled_dot_product_attention(q, keys, values, is_causal=True, scale=scale, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(q.shape[0], count, -1)


class RecordingOps(WindowOps):
    """The reference ops that record the inputs of the layers; matrices are read from the mapped file at every use.

    With a `resume`, the ops before its layers are skipped: they return one of their inputs. Of these results only the
    residual stream is used, which passes through unchanged. Every thread has its own `record` and `resume`.
    """

    def __init__(self, source: Weights, device: str = "cpu") -> None:
        super().__init__(source, held=False, device=device)
        self.run_of = threading.local()

    @property
    def record(self) -> Record | None:
        """What this thread's run records."""
        return getattr(self.run_of, "record", None)

    @record.setter
    def record(self, record: Record | None) -> None:
        self.run_of.record = record

    @property
    def resume(self) -> Resume | None:
        """Where this thread's run begins."""
        return getattr(self.run_of, "resume", None)

    @resume.setter
    def resume(self, resume: Resume | None) -> None:
        self.run_of.resume = resume

    @property
    def skipping(self) -> bool:
        """Whether the run has not yet reached the layers where it begins."""
        return self.resume is not None and not self.resume.reached

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias; the input is recorded."""
        name = layer.spec.name
        if self.resume is not None and name in self.resume.names:
            self.resume.reached, x = True, self.resume.x
        if self.skipping:
            return x
        if self.record is not None:
            self.record.see(name, x)
        return super().linear(layer, x)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight."""
        return x if self.skipping else super().rms_norm(x, weight, eps)

    def rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache | TorchSpans, block: int) -> Tensor:
        """Rotates q and k, appends k and v to the cache; returns q."""
        return q if self.skipping else super().rope_and_append(q, k, v, cache, block)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x − mean x) / √(var x + eps) · weight + bias."""
        return x if self.skipping else super().layer_norm(x, weight, bias, eps)

    def attention(self, q: Tensor, cache: TorchCache | TorchSpans, block: int, scale: float, window: int) -> Tensor:
        """Causal grouped-query attention of q [B, H, S, D] over the cache, as [B, S, H·D]."""
        return q if self.skipping else super().attention(q, cache, block, scale, window)

    def gelu(self, x: Tensor) -> Tensor:
        """GELU."""
        return x if self.skipping else super().gelu(x)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up."""
        return gate if self.skipping else super().swiglu(gate, up)

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """x + scale · y, the residual stream from now on."""
        if self.skipping:
            return x
        stream = super().add_scaled(x, y, scale)
        if self.record is not None:
            self.record.stream, self.record.moved = stream, True
        return stream


def block_linears(architecture: Architecture, block: int) -> list[str]:
    """The names of a block's layers."""
    return [name for name, *_ in architecture.linear_sizes() if name.startswith(f"model.layers.{block}.")]


def batches(windows: int, size: int, device: str) -> list[slice]:
    """Batches of windows, for lanes that together run `size` windows at once."""
    step = max(1, size // lane_count(device))
    return [slice(start, start + step) for start in range(0, windows, step)]


class Upstream:
    """A model, and its residual stream [N, W, E] over windows of token ids [N, W] in a file.

    Args:
        seen: blocks that need not be run again; what they gave is used, and inputs are rounded as if all had been kept there.

    Raises:
        OutputError: when the disk has no room for the file.
    """

    def __init__(
        self,
        source: Weights,
        windows: NDArray[np.int64],
        file: Path,
        batch: int,
        device: str = "cpu",
        seen: Seen | None = None,
    ) -> None:
        self.ops = RecordingOps(source, device)
        self.model = decoder_for(source.spec.architecture, self.ops)
        self.windows, self.file, self.seen = windows, file, seen
        shape = (*windows.shape, self.model.architecture.hidden_size)
        self.states = mapped_file(file, shape)
        self.inputs: dict[str, NDArray[np.float32]] = {}
        self.spare: list[NDArray[np.float32]] = []
        self.lock = threading.Lock()
        self.batches = batches(windows.shape[0], batch, device)

    @torch.no_grad()
    def embed(self) -> None:
        """Sets the residual stream to the embedded tokens."""

        def embed(lane: int, rows: slice) -> None:
            self.write(rows, self.model.embed(self.ops.ids(self.windows[rows].tolist())))

        in_lanes(embed, self.batches, self.ops.device)

    def read(self, rows: slice) -> Tensor:
        """The residual stream [B, W, E] of a batch."""
        return torch.from_numpy(self.states[rows]).to(self.ops.device)

    def write(self, rows: slice, x: Tensor | None) -> None:
        """Sets the residual stream of a batch; None leaves it."""
        if x is not None:
            self.states[rows] = x.cpu().numpy()

    @torch.no_grad()
    def run(
        self, rows: slice, block: int, last: int | None = None, resume: Resume | None = None
    ) -> tuple[list[Input], Tensor | None]:
        """Runs a block on a batch; returns the inputs of its layers and its output [B, W, E].

        Args:
            last: ends the run at the input of that index; the output is then None.
            resume: begins the run there and not at the block's first op; the first input is then the one of `resume`.
        """
        x = self.read(rows)
        cache = self.ops.block_cache(self.model.architecture, x.shape[0], x.shape[1])
        self.ops.record, self.ops.resume = Record(last, stream=x), resume
        record = self.ops.record
        try:
            return record.inputs, self.model.block(x, cache, block)
        except Enough:
            return record.inputs, None
        finally:
            self.ops.record = self.ops.resume = None

    def step(self, rows: slice, block: int, before: tuple[str, ...]) -> Input | None:
        """Continues through a block to the next input of a layer and returns it, or to the block's end and returns None.

        The residual stream in the file is updated to that place, and the input is kept in a file for the next step.

        Args:
            before: the layers of the step before, whose input was kept; none at the beginning of the block.
        """
        if kept_block := self.seen and self.seen.block(block, self.batches):
            known = kept_block.input(rows, before)
            return known if known.moved else replace(known, stream=self.read(rows))
        if before:
            kept = torch.from_numpy(self.kept(before[0])[rows])
            resume = Resume(before, kept.to(self.ops.device))
            inputs, output = self.run(rows, block, 1, resume)
            found = inputs[1] if output is None else None
        else:
            [found], output = self.run(rows, block, 0)
        if found is None:
            self.write(rows, output)
            return None
        if found.moved:
            self.write(rows, found.stream)
        self.kept(found.names[0])[rows] = found.x.cpu().numpy()
        return found if self.seen is None else replace(found, x=shared(found.x))

    def leave(self, block: int, before: tuple[str, ...]) -> None:
        """Takes the residual stream to the end of a block, behind the layers `before`."""
        if self.seen and (kept := self.seen.block(block, self.batches)):
            self.write(slice(None), kept.output)
            del self.seen.blocks[block]
            return
        with self.ops.holding(before), fast_products():
            in_lanes(lambda lane, rows: self.step(rows, block, before), self.batches, self.ops.device)

    def kept(self, name: str) -> NDArray[np.float32]:
        """The input [N, W, I] of the layer `name`, in a mapped file if it is large; a new one removes all but the newest."""
        with self.lock:
            return self._kept(name)

    def _kept(self, name: str) -> NDArray[np.float32]:
        if name not in self.inputs:
            for other in list(self.inputs)[:-1]:
                self.forget(other)
            sizes = {layer: columns for layer, _, columns, _ in self.model.architecture.linear_sizes()}
            shape = (*self.windows.shape, sizes[name])
            spare = [array for array in self.spare if array.shape == shape]
            if spare:
                self.spare = [array for array in self.spare if array is not spare[0]]
            small = 4 * math.prod(shape) <= HELD_BYTES
            self.inputs[name] = (
                spare[0]
                if spare
                else np.empty(shape, np.float32)
                if small
                else mapped_file(self.input_file(name), shape)
            )
        return self.inputs[name]

    def input_file(self, name: str) -> Path:
        """The file of a layer's input."""
        return self.file.with_name(f"{self.file.name}.{name}")

    def forget(self, name: str) -> None:
        """Removes the file of a layer's input; its memory is kept for the next one, if it was in memory."""
        array = self.inputs.pop(name)
        if isinstance(array, np.memmap):
            self.input_file(name).unlink()
        else:
            self.spare.append(array)

    @torch.no_grad()
    def normed(self, rows: slice) -> Tensor:
        """The normed residual stream of a batch: the input of the head."""
        x: Tensor = self.model.normed(self.read(rows))
        return x
