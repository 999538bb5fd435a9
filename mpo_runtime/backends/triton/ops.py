"""The op set on a GPU, over Triton's kernels and torch.

Weights stay as the file stores them. Activations between ops are float32; products with integers run on the vector units for
one token and on the matrix units (bf16) for several, or in float32 with `exact`. The KV cache is one tensor of pages. Generated
tokens attend by pages with split sums (flash decoding, Dao 2023), parts of prompts through torch's fused attention. Steps of
generated text are recorded (step.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
import triton
from numpy.typing import NDArray
from torch import Tensor

from mpo_formats import Architecture, LinearSpec
from mpo_runtime.backends.ops import PAGE, Span
from mpo_runtime.backends.reference import KV_TYPES, ReferenceOps, TorchCache, TorchPages, TorchSpans
from mpo_runtime.backends.triton import attention as kernels
from mpo_runtime.backends.triton.cache import StepInputs, TritonPages, TritonSpans
from mpo_runtime.backends.triton.lazy import Lazy, Parts, Residual, resolved, rms_norm, swiglu
from mpo_runtime.backends.triton.products import BF16, EMULATED, EXACT
from mpo_runtime.backends.triton.step import Steps, recordable
from mpo_runtime.backends.triton.terms import Group, Settings, apply_layer, load_layer
from mpo_runtime.backends.triton.tiles import tiles_for
from mpo_runtime.layers.linear import Linear
from mpo_runtime.weights.protocol import Weights

# Positions that attention of single tokens reads at a time; fewer where keys and values of so many would not fit into the
# shared memory of every card (99 KiB).
STRETCH, STRETCH_BYTES = 64, 1 << 15
# Programs of that attention that should be under way, and the most shares of a text that it sums apart.
ATTENTION_PROGRAMS, MOST_PARTS = 512, 32


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class Int8Rows(TorchCache):
    """A cache of rows whose entries are rounded as int8 pages round them, and kept in float32: for measurements."""

    def append(self, block: int, k: Tensor, v: Tensor) -> None:
        """Writes keys and values [B, K, S, D] of the new tokens; does not advance."""
        super().append(block, rounded(k), rounded(v))


def rounded(x: Tensor) -> Tensor:
    """x with each vector along the last axis as int8 times max |x| / 127 stands for it."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.where(scale > 0, (x / scale).round() * scale, 0.0)


class TritonOps(ReferenceOps):
    """The op set on a GPU.

    Args:
        weights, chi, device: as for the reference.
        kv_type: f32, f16, bf16, or int8 with a scale for each position and head.
        exact: products in float32 instead of bf16 on the matrix units.

    Raises:
        ConfigError: for another `kv_type`.
    """

    name = "triton"
    prompt_tokens = 1024  # of which each reads all weights, as floats: terms.py
    kv_types: ClassVar = {**KV_TYPES, "int8": torch.int8}

    def __init__(
        self,
        weights: Weights,
        *,
        chi: int | None = None,
        device: str = "cuda",
        kv_type: str = "f16",
        exact: bool = False,
    ) -> None:
        self.exact, self.kv_name = exact, kv_type
        card = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
        self.settings = Settings(tiles_for(card), EXACT if exact else EMULATED if interpreted() else BF16)
        super().__init__(weights, chi=chi, device=device, held=False, kv_type=kv_type)
        self.groups: dict[tuple[str, ...], tuple[tuple[Linear, ...], Group | None]] = {}

    def load_layer(self, weights: Weights, spec: LinearSpec, chi: int | None) -> Linear:
        """A layer on the device."""
        return load_layer(weights, spec, chi, self.device, self.settings)

    def to_numpy(self, array: Tensor | Lazy) -> NDArray[np.float32]:
        """An array as numpy float32."""
        return super().to_numpy(resolved(array))

    def new_pages(self, architecture: Architecture) -> TritonPages:
        """An empty store of pages for the KV cache."""
        return TritonPages(architecture, self.device, self.kv_type)

    def new_cache(self, architecture: Architecture, rows: int, capacity: int) -> TorchCache:
        """Allocates an empty KV cache of rows, for measurements."""
        if self.kv_name != "int8":
            return super().new_cache(architecture, rows, capacity)
        return Int8Rows(architecture, rows, capacity, self.device)

    def spans(self, pages: TorchPages, spans: Sequence[Span]) -> TorchSpans:
        """The cache of a step over several sequences."""
        return TritonSpans(pages, spans) if isinstance(pages, TritonPages) else TorchSpans(pages, spans)

    def next_logits(
        self,
        forward: Callable[[Any, Any], Any],
        logits: Callable[[Any], Any],
        ids: Sequence[int],
        pages: Any,
        spans: Sequence[Span],
    ) -> NDArray[np.float32] | None:
        """The logits [texts, vocabulary] after one generated token of each text, by a recorded step; None for other steps."""
        if not recordable(ids, spans):
            return None
        if pages.steps is None:
            pages.steps = Steps(pages, self.vocabulary)
        steps: Steps = pages.steps
        return steps.run(forward, logits, ids, spans)

    def embed(self, table: Linear, ids: Tensor, multiplier: float) -> Tensor:
        """Token ids [B, S] to multiplier · rows [B, S, E]."""
        rows = table.rows(ids)
        return rows if multiplier == 1 else rows * multiplier

    def add_positions(self, x: Tensor, table: Tensor, cache: Any) -> Tensor:
        """x [B, S, E] with the rows of the table that belong to the positions of its tokens added."""
        return super().add_positions(resolved(x), table, cache)

    def rms_norm(self, x: Tensor | Lazy, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight, for each stretch of x that is as wide as the weight."""
        return x.normed(weight, eps) if isinstance(x, Residual) else rms_norm(resolved(x), weight, eps)

    def layer_norm(self, x: Tensor | Lazy, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x − mean x) / √(var x + eps) · weight + bias."""
        return super().layer_norm(resolved(x), weight, bias, eps)

    def gelu(self, x: Tensor | Lazy) -> Tensor:
        """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))."""
        return super().gelu(resolved(x))

    def swiglu(self, gate: Tensor | Parts, up: Tensor | Parts) -> Tensor:
        """silu(gate) · up."""
        return swiglu(gate, up)

    def add_scaled(self, x: Tensor | Lazy, y: Tensor | Lazy, scale: float) -> Any:
        """x + scale · y; where y is a product, the norm that follows adds it."""
        if isinstance(y, Parts):
            return Residual(resolved(x), y, scale)
        return torch.add(resolved(x), resolved(y), alpha=scale)

    def linear(self, layer: Linear, x: Tensor | Lazy) -> Any:
        """Σ_t term_t(H x) + bias."""
        return apply_layer(layer, resolved(x))

    def linears(self, layers: Sequence[Linear], x: Tensor | Lazy) -> Sequence[Tensor | Parts]:
        """Layers with the same input: their integers, or their dense matrices, in one launch."""
        key = tuple(layer.spec.name for layer in layers)
        present, group, x = *self.groups.get(key, ((), None)), resolved(x)
        if len(present) != len(layers) or any(one is not other for one, other in zip(present, layers, strict=True)):
            group = Group(layers) if Group.fits(layers) else None
            self.groups[key] = tuple(layers), group
        return [apply_layer(layer, x) for layer in layers] if group is None else group.apply(x)

    def logits(self, head: Linear, x: Tensor | Lazy, scaling: float) -> Tensor:
        """head(x) / scaling [..., vocabulary]."""
        y = resolved(self.linear(head, x))
        return y if scaling == 1 else y / scaling

    def rope_and_append(
        self, q: Tensor | Parts, k: Tensor | Parts, v: Tensor | Parts, cache: Any, block: int
    ) -> Tensor:
        """Rotates q and k by position, appends k and v to the cache; returns q [B, H, S, D]."""
        if not isinstance(cache, TritonSpans | StepInputs):
            return super().rope_and_append(resolved(q), resolved(k), resolved(v), cache, block)
        size = 2 * self.frequencies.shape[0]
        tokens, heads, kv_heads = q.shape[1], q.shape[2] // size, k.shape[2] // size
        part, parts = 0, 1
        if isinstance(q, Parts) and isinstance(k, Parts) and isinstance(v, Parts) and q.y is k.y is v.y:
            part, parts = q.part, q.count
            widths, starts = [q.width] * 3, [one.begin() for one in (q, k, v)]
        else:
            starts = [resolved(one).contiguous() for one in (q, k, v)]
            widths = [one.shape[-1] for one in starts]
        pages = cache.pages
        rotated = torch.empty((tokens, heads, size), dtype=torch.float32, device=pages.device)
        kernels.rotate_and_append[(tokens, heads + kv_heads)](
            *starts, rotated, *widths, part, pages.store, pages.scales, cache.table, cache.sequence, cache.place,
            self.frequencies, block, heads, kv_heads, pages.shape[0], cache.table.shape[1],
            SIZE=size, HALF=triton.next_power_of_2(size // 2), PAGE=PAGE, KV=self.kv_name, PARTS=parts,
        )  # fmt: skip
        return rotated[None].transpose(1, 2)

    def attention(self, q: Tensor, cache: Any, block: int, scale: float, window: int) -> Tensor:
        """Causal grouped-query attention of q [B, H, S, D] over the cache, as [B, S, H·D]."""
        if not isinstance(cache, TritonSpans | StepInputs):
            return super().attention(q, cache, block, scale, window)
        _, heads, tokens, size = q.shape
        flat = q[0].transpose(0, 1)  # [S, H, D]
        y = torch.empty((tokens, heads, size), dtype=torch.float32, device=flat.device)
        for first, end, span in cache.stretches():
            if span is None:
                self.attend_by_pages(flat, y, first, end, cache, block, scale, window)
            elif isinstance(cache, TritonSpans):
                y[first:end] = self.attend_prompt(q[:, :, first:end], cache, span, block, scale, window)
        return y.view(1, tokens, heads * size)

    def attend_by_pages(
        self, q: Tensor, y: Tensor, first: int, end: int, cache: Any, block: int, scale: float, window: int
    ) -> None:
        """Attention of the generated tokens [first, end) of q [S, H, D], into y."""
        _, heads, size = q.shape
        pages, count = cache.pages, end - first
        kv_heads = pages.shape[2]
        wanted = min(max(ATTENTION_PROGRAMS // (count * kv_heads), 1), MOST_PARTS)
        parts, width, group = 1 << (wanted.bit_length() - 1), triton.next_power_of_2(size), heads // kv_heads
        dot = self.attention_type()
        stretch = STRETCH if STRETCH * width * (2 if dot in (1, 2) else 4) <= STRETCH_BYTES else STRETCH // 2
        mixed = q.new_empty((count, heads, parts, size))
        highest, total = (q.new_empty((count, heads, parts)) for _ in range(2))
        kernels.attention_part[(count, kv_heads, parts)](
            q[first:end].contiguous(), pages.store, pages.scales, cache.table, cache.sequence[first:end],
            cache.place[first:end], mixed, highest, total, scale, window, block,
            heads, kv_heads, pages.shape[0], cache.table.shape[1],
            GROUP=group, QUERIES=max(triton.next_power_of_2(group), 16), SIZE=size, WIDTH=max(width, 16), PAGE=PAGE,
            STRETCH=stretch, PARTS=parts, INT8=pages.int8, DOT=dot,
        )  # fmt: skip
        kernels.attention_join[(count * heads,)](
            mixed, highest, total, y[first:end], SIZE=size, WIDTH=width, PARTS=parts
        )

    def attention_type(self) -> int:
        """In which type keys and values are multiplied, as a number of `operand`."""
        if self.exact or self.kv_name == "f32":
            return 0
        return 1 if self.kv_name != "bf16" else 3 if interpreted() else 2

    def attend_prompt(
        self, q: Tensor, cache: TritonSpans, number: int, block: int, scale: float, window: int
    ) -> Tensor:
        """Attention of a part of a prompt, q [1, H, S, D], as [S, H, D]."""
        span = cache.spans[number]
        end = span.start + span.count
        held = cache.pages.gathered(cache.table[number, : -(-end // PAGE)], block)[:, None, :, :end]
        dtype = torch.float32 if self.exact else torch.float16 if self.kv_name == "int8" else held.dtype
        mask = None
        if window or span.start:
            here = torch.arange(span.start, end, device=q.device)[:, None]
            there = torch.arange(end, device=q.device)
            mask = there <= here
            if window:
                mask &= there > here - window
        k, v = held.to(dtype)
        shared = q.shape[1] // k.shape[1]
        if (
            mask is not None and shared > 1
        ):  # with a mask torch's fused kernels take as many heads of keys as of queries
            k, v, shared = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1), 1
        mixed = F.scaled_dot_product_attention(
            q.to(dtype), k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=shared > 1
        )
        return mixed[0].transpose(0, 1).float()
