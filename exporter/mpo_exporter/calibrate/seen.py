"""What the survey's pass forward saw of the dense model: the fit needs the same again, and memory may have room for it.

Nothing depends on whether it had: a block that is run again gives the same (`shared`).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mpo_exporter.calibrate import precision
from mpo_formats import Architecture
from mpo_runtime.memory import available_memory

# The share of the free memory that it may take, and the bytes at most: more saves a few seconds of an export.
SHARE, MOST = 0.25, 1 << 30
# Layers whose output is added to the residual stream.
TO_STREAM = ("self_attn.o_proj", "mlp.down_proj")
# The layers whose inputs are kept, by the ends of their names; two groups take inputs as wide as the stream.
INPUTS = ("self_attn.q_proj", "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")


@dataclass(slots=True)
class Input:
    """One input x [B, S, I]: the names of the layers that take it in the order of use, and the residual stream at that time.

    Args:
        moved: whether the block has added to the stream before.
    """

    names: list[str]
    x: Tensor
    stream: Tensor | None = None
    moved: bool = True


def kept_type() -> torch.dtype:
    """What inputs are kept in: bf16 where products are computed in that anyway."""
    return torch.bfloat16 if precision.has_units() else torch.float32


def shared(x: Tensor) -> Tensor:
    """An input of layers of the dense model as fits take it, whether it was kept or is computed again."""
    return x.to(kept_type()).float()


class Block:
    """A block of the dense model on windows of token ids: the inputs of its layers, and its output, [N, W, …].

    Streams that the block has added to are kept only for layers that add to them.
    """

    def __init__(self, windows: int) -> None:
        self.windows = windows
        self.inputs: list[Input] = []
        self.output: Tensor | None = None
        self.batches: set[tuple[int, int]] = set()
        self.lock = threading.Lock()

    def keep(self, rows: slice, inputs: Sequence[Input], output: Tensor) -> None:
        """Keeps a batch of windows."""
        with self.lock:
            if self.output is None:
                self.output = self._room(output, torch.float32)
                self.inputs = [self._room_for(one) for one in inputs]
        self.output[rows] = output
        for kept, one in zip(self.inputs, inputs, strict=True):
            kept.x[rows] = one.x
            if kept.stream is not None and one.stream is not None:
                kept.stream[rows] = one.stream
        with self.lock:
            self.batches.add((rows.start, rows.stop))

    def _room_for(self, one: Input) -> Input:
        adds = one.moved and one.stream is not None and one.names[0].endswith(TO_STREAM)
        stream = self._room(one.stream, torch.float32) if adds and one.stream is not None else None
        return Input(one.names, self._room(one.x, kept_type()), stream, one.moved)

    def _room(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        # Large arrays of numpy take large pages, of which new ones cost less.
        raw = np.empty((self.windows, *x.shape[1:]), np.int16 if dtype == torch.bfloat16 else np.float32)
        return torch.from_numpy(raw).view(dtype)

    def input(self, rows: slice, before: Sequence[str]) -> Input:
        """The next input after the layers `before`."""
        names = [one.names for one in self.inputs]
        found = self.inputs[names.index(list(before)) + 1 if before else 0]
        stream = None if found.stream is None else found.stream[rows]
        return Input(found.names, found.x[rows].float(), stream, found.moved)


@dataclass(slots=True)
class Seen:
    """Blocks of the dense model on all windows of a text; the fit drops each that it is past.

    Args:
        room: bytes that may still be taken.
    """

    room: int
    blocks: dict[int, Block] = field(default_factory=dict)

    def open(self, block: int, architecture: Architecture, windows: int, tokens: int) -> Block | None:
        """Makes room for a block on so many windows, of so many tokens each; None where there is none."""
        size = windows * tokens * bytes_of(architecture, block)
        if size > self.room:
            return None
        self.room -= size
        self.blocks[block] = Block(windows)
        return self.blocks[block]

    def block(self, number: int, batches: Sequence[slice]) -> Block | None:
        """A block of which these batches were kept."""
        found = self.blocks.get(number)
        return found if found and all((rows.start, rows.stop) in found.batches for rows in batches) else None


def bytes_of(architecture: Architecture, block: int) -> int:
    """Bytes that one token of a block takes."""
    sizes = {name: columns for name, _, columns, _ in architecture.linear_sizes()}
    inputs = sum(sizes[f"model.layers.{block}.{name}"] for name in INPUTS)
    return inputs * kept_type().itemsize + 2 * 4 * architecture.hidden_size


def nothing_seen() -> Seen:
    """An empty one that may take a share of the free memory."""
    return Seen(min(int(SHARE * available_memory()), MOST))
