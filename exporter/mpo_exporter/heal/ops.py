"""Forward passes over whole windows: differentiable, without a KV cache, in bf16 where the device multiplies it fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from mpo_exporter.heal.trainable import Trainables
from mpo_runtime.backends.reference import ReferenceOps, rotate
from mpo_runtime.layers.linear import Linear
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.weights.protocol import Weights

# The most logits that are in memory at a time, and those that a CPU works on at a time so that its caches hold them.
HEAD_LOGITS, CACHED_LOGITS = 1 << 26, 1 << 19


def multiplies_bf16(device: str) -> bool:
    """Whether a device has hardware for bf16 products; emulated ones are slower than float32."""
    if device.startswith("cuda"):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def autocast(device: str) -> AbstractContextManager[Any]:
    """While this is open, matrix products use bf16 on a device with hardware for it; elsewhere they stay float32."""
    return torch.autocast(device.split(":")[0], torch.bfloat16) if multiplies_bf16(device) else nullcontext()


def head_tokens(vocabulary: int) -> int:
    """The number of tokens whose logits may be in memory at a time."""
    return max(HEAD_LOGITS // vocabulary, 1)


def in_cache(logits: Tensor) -> Iterator[slice]:
    """The parts of logits [T, V] to work on one after the other: on a CPU a few tokens, elsewhere all of them."""
    count = logits.shape[0]
    size = max(CACHED_LOGITS // logits.shape[-1], 1) if logits.device.type == "cpu" else count
    for start in range(0, count, max(size, 1)):
        yield slice(start, start + size)


class WindowCache:
    """The keys and values [B, K, S, D] of the block that is being run: all that attention over a whole window needs."""

    k: Tensor
    v: Tensor


@lru_cache(maxsize=32)
def unseen_mask(length: int, window: int, device: torch.device) -> Tensor:
    """The mask [S, S] of what causal attention must not see: later positions, and those before the window, if not 0."""
    with torch.inference_mode(False):  # it may be kept for a backward pass, whoever asks for it first
        mask = torch.ones(length, length, dtype=torch.bool, device=device)
        return mask.triu(1) | mask.tril(-window) if window else mask.triu(1)


class WindowOps(ReferenceOps):
    """The reference ops for windows that begin at position 0.

    Attention is two plain batched products in which the heads of a group are rows of one matrix. In training on a CPU this
    is several times as fast as torch's fused attention or an einsum over groups.
    """

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight, cast once to the type in which the following products are computed."""
        return self._cast(super().rms_norm(x, weight, eps))

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x − mean x) / √(var x + eps) · weight + bias, cast likewise."""
        return self._cast(super().layer_norm(x, weight, bias, eps))

    def _cast(self, y: Tensor) -> Tensor:
        kind = self.device.type
        return y.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else y

    def rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, cache: Any, block: int) -> Tensor:
        """Rotates q [B, S, H·D] and k [B, S, K·D] by position, stores k and v in `cache`, returns q [B, H, S, D]."""
        rows, count, _ = q.shape
        size = 2 * self.frequencies.shape[0]
        angles = torch.arange(count, device=q.device)[:, None].float() * self.frequencies  # [S, D/2]
        cosine, sine = angles.cos(), angles.sin()
        cache.k = rotate(k.view(rows, count, -1, size).transpose(1, 2), cosine, sine).to(k.dtype)
        cache.v = v.view(rows, count, -1, size).transpose(1, 2)
        return rotate(q.view(rows, count, -1, size).transpose(1, 2), cosine, sine)

    def attention(self, q: Tensor, cache: Any, block: int, scale: float, window: int) -> Tensor:
        """Causal grouped-query attention of q [B, H, S, D] over its window, as [B, S, H·D]."""
        rows, heads, count, size = q.shape
        groups = cache.k.shape[1]
        q = (q * scale).to(cache.v.dtype).reshape(rows * groups, -1, size)  # [B·K, H/K·S, D]
        scores = torch.bmm(q, cache.k.reshape(rows * groups, count, size).transpose(1, 2))
        scores = scores.view(rows * groups, -1, count, count)
        scores = scores.masked_fill(unseen_mask(count, window, q.device), float("-inf"))
        weights = scores.softmax(-1, dtype=torch.float32).to(cache.v.dtype).view(rows * groups, -1, count)
        mixed = torch.bmm(weights, cache.v.reshape(rows * groups, count, size))
        return mixed.view(rows, heads, count, size).transpose(1, 2).reshape(rows, count, heads * size)


class HealingOps(WindowOps):
    """The window ops of a model in training: layers and vectors in `trainables` are used instead of the stored ones.

    `chi` cuts the bonds of the layers in training. `record`, where it is set, is called with each layer's name and input
    [..., I].
    """

    def __init__(self, weights: Weights, device: str = "cpu") -> None:
        super().__init__(weights, held=False, device=device)
        self.trainables: Trainables | None = None
        self.chi: int | None = None
        self.record: Callable[[str, Tensor], None] | None = None

    def weights(self, layer: str) -> Linear | Tensor:
        """The layer or vector of that name, with its present parameters if it is in training."""
        if self.trainables is not None:
            if layer in self.trainables.layers:
                return self.trainables.layers[layer].linear(self.chi)
            if layer in self.trainables.vectors:
                return self.trainables.vectors[layer].value()
        return super().weights(layer)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias; `record` is called first."""
        if self.record is not None:
            self.record(layer.spec.name, x)
        return super().linear(layer, x)


def run_block(model: Decoder, x: Tensor, block: int) -> Tensor:
    """Runs one block of a model over WindowOps on x [B, S, E], positions 0 … S − 1."""
    cache: Any = WindowCache()
    y: Tensor = model.block(x, cache, block)
    return y
