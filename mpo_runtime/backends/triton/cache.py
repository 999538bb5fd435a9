"""The KV cache of the GPU backend: pages in one tensor, and what the kernels need to know of a step's tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_formats import Architecture
from mpo_runtime.backends.ops import PAGE, Span
from mpo_runtime.backends.reference import TorchPages, TorchSpans

# Tokens for which pages are made at first, unless the model's longest context is less: the default context.
FIRST_TOKENS = 4096
LINE = 64
# Where rows that stand for no text write: never one of a text's pages.
SCRATCH = 0


class TritonPages(TorchPages):
    """Pages of the KV cache in one tensor [pages, blocks, 2, K, PAGE, D], with scales [pages, blocks, 2, K, PAGE] for int8.

    Page p of a text is row p + 1; row 0 is scratch. Recorded steps hold the tensor, so it is made for a whole default context
    at once and grows by half at least; `generation` counts how often it was exchanged.
    """

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(architecture, device, dtype)
        self.int8 = dtype == torch.int8
        self.first = -(-min(architecture.max_position_embeddings, FIRST_TOKENS) // PAGE)
        self.generation = 0
        self.steps: Any = None  # recorded over this store (step.py)
        self.made = 0
        self.store = torch.zeros((1, *self.shape), device=device, dtype=dtype)
        self.scales = torch.zeros((1, *self.shape[:-1]) if self.int8 else (1,), device=device)

    @property
    def count(self) -> int:
        """Pages that exist."""
        return self.made

    @property
    def page_bytes(self) -> int:
        """Bytes of a page: codes up to a multiple of 64, then scales in float32."""
        codes = super().page_bytes
        return -(-codes // LINE) * LINE + codes // self.shape[-1] * 4 if self.int8 else codes

    def grow(self, count: int) -> None:
        """Makes pages until there are `count`; raises MemoryError where the device has no memory for them."""
        if count + 1 > self.store.shape[0]:
            room = max(count, self.first, self.made * 3 // 2) + 1
            try:
                store = self.store.new_zeros((room, *self.shape))
                scales = self.scales.new_zeros((room, *self.shape[:-1])) if self.int8 else self.scales
            except torch.OutOfMemoryError:
                raise MemoryError(
                    f"KV cache: the device has no memory for {room} pages of {self.page_bytes} bytes"
                ) from None
            store[: self.made + 1] = self.store[: self.made + 1]
            if self.int8:
                scales[: self.made + 1] = self.scales[: self.made + 1]
            self.store, self.scales = store, scales
            self.generation += 1
        self.made = max(self.made, count)

    def copy(self, source: int, target: int) -> None:
        """Copies the content of a page to another one."""
        self.store[target + 1].copy_(self.store[source + 1])
        if self.int8:
            self.scales[target + 1].copy_(self.scales[source + 1])

    def read(self, page: int) -> bytes:
        """The content of a page."""
        content = raw(self.store[page + 1])
        if self.int8:
            content += bytes(-len(content) % LINE) + raw(self.scales[page + 1])
        return content

    def write(self, page: int, content: bytes) -> None:
        """Puts in a page what `read` gave; raises ValueError for another size."""
        if len(content) != self.page_bytes:
            raise ValueError(f"cache: a page has {self.page_bytes} bytes, found {len(content)}")
        size = super().page_bytes
        self.store[page + 1].copy_(torch.frombuffer(bytearray(content[:size]), dtype=self.dtype).view(self.shape))
        if self.int8:
            begin = -(-size // LINE) * LINE
            self.scales[page + 1].copy_(
                torch.frombuffer(bytearray(content[begin:]), dtype=torch.float32).view(self.shape[:-1])
            )

    def gathered(self, rows: Tensor, block: int) -> Tensor:
        """Keys and values [2, K, positions, D] of a block, from the rows of the store in that order; int8 as float32."""
        held = self.store[rows, block].permute(1, 2, 0, 3, 4).flatten(2, 3)
        if self.int8:
            return held.float() * self.scales[rows, block].permute(1, 2, 0, 3).flatten(2, 3)[..., None]
        return held


def raw(tensor: Tensor) -> bytes:
    """The bytes of a tensor."""
    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()


class TritonSpans(TorchSpans):
    """The sequences of one step, and for the kernels each token's sequence, position and pages."""

    def __init__(self, pages: TritonPages, spans: Sequence[Span]) -> None:
        super().__init__(pages, spans)
        self.pages: TritonPages = pages
        width = max(len(span.pages) for span in spans)
        counts = [span.count for span in spans]
        table = np.full((len(spans), width), SCRATCH, np.int32)
        for row, span in zip(table, spans, strict=True):
            row[: len(span.pages)] = np.array(span.pages, np.int32) + 1
        places = np.concatenate([np.arange(span.start, span.start + span.count, dtype=np.int32) for span in spans])
        numbers = np.repeat(np.arange(len(spans), dtype=np.int32), counts)
        tokens = len(places)
        packed = torch.from_numpy(np.concatenate([numbers, places, table.reshape(-1)])).to(pages.device)  # one copy
        self.sequence, self.place = packed[:tokens], packed[tokens : 2 * tokens]
        self.table = packed[2 * tokens :].view(len(spans), width)

    def positions(self, count: int) -> Tensor:
        """The positions [1, S] of the new tokens."""
        return self.place[None].long()

    def stretches(self) -> Iterator[tuple[int, int, int | None]]:
        """Runs of tokens: the first, the one past the last, and the span of a part of a prompt; None for generated tokens."""
        first = begin = 0
        for index, span in enumerate(self.spans):
            end = first + span.count
            if not span.few:
                if begin < first:
                    yield begin, first, None
                yield first, end, index
                begin = end
            first = end
        if begin < first:
            yield begin, first, None


class StepInputs:
    """The inputs of a recorded step of `rows` texts, one token each, in tensors that stay where they are.

    Rows that stand for no text run token 0 at position 0 of the scratch page. It takes the place of TritonSpans: every number
    that changes from step to step is in `held`, which one copy fills.

    Args:
        width: pages that a text may have.
    """

    def __init__(self, pages: TritonPages, rows: int, width: int) -> None:
        self.pages, self.rows, self.width = pages, rows, width
        self.held = torch.zeros(rows * (2 + width), dtype=torch.int32, device=pages.device)
        self.host = torch.zeros_like(self.held, device="cpu", pin_memory=pages.device.type == "cuda")
        self.ids, self.place = self.held[:rows], self.held[rows : 2 * rows]
        self.table = self.held[2 * rows :].view(rows, width)
        self.sequence = torch.arange(rows, dtype=torch.int32, device=pages.device)

    def fill(self, ids: Sequence[int], spans: Sequence[Span]) -> None:
        """Puts in the next token of each text."""
        host = self.host.numpy()
        host[:] = SCRATCH
        count, table = len(ids), host[2 * self.rows :].reshape(self.rows, self.width)
        host[:count] = ids
        host[self.rows : self.rows + count] = [span.start for span in spans]
        for row, span in zip(table, spans, strict=False):
            used = span.start // PAGE + 1
            row[:used] = np.array(span.pages[:used], np.int32) + 1
        self.held.copy_(self.host, non_blocking=True)

    def positions(self, count: int) -> Tensor:
        """The positions [1, S] of the new tokens."""
        return self.place[None].long()

    def stretches(self) -> Iterator[tuple[int, int, int | None]]:
        """All tokens are generated ones."""
        yield 0, self.rows, None
