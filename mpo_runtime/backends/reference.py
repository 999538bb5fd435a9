"""The reference backend: plain torch in float32, the numerical truth; differentiable, so healing uses it too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpo_formats import Architecture, ConfigError
from mpo_runtime.layers.linear import Linear, float_tensor, load_linear
from mpo_runtime.layers.rope import inverse_frequencies
from mpo_runtime.memory import available_memory
from mpo_runtime.weights.protocol import Weights

# Float matrices are held when they take at most this share of the memory that is free.
HELD_SHARE = 0.6
# Types that the KV cache may be stored in, by the names of --kv-type.
KV_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def free_memory(device: str) -> int:
    """Bytes that are free on a torch device; on a CPU, that this process may take."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else available_memory()


class TorchCache:
    """Keys and values [2, B, K, capacity, D] of each block, stored in `dtype`; apart, so that gradients flow through."""

    def __init__(
        self,
        architecture: Architecture,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        heads, size = architecture.num_key_value_heads, architecture.head_dim
        self.capacity = capacity
        self.lengths = [0] * rows
        shape = (2, rows, heads, capacity, size)
        self.device = device
        self.held = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(architecture.num_hidden_layers)]

    def positions(self, count: int) -> Tensor:
        """The positions [B, S] of `count` new tokens in each row."""
        starts = torch.tensor(self.lengths, device=self.device)
        return starts[:, None] + torch.arange(count, device=self.device)

    def advance(self, counts: list[int]) -> None:
        """Counts the new tokens of each row as held."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def rewind(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self.lengths = [min(length, held) for held in self.lengths]


class ReferenceOps:
    """The op set in plain torch.

    Args:
        weights: an open file or folder.
        chi: cuts every MPO bond to its first `chi` values.
        device: a torch device name.
        held: keeps all matrices in float32; None decides by the device's memory that is free, and rebuilds integer and bf16
            matrices at every use where it would not suffice.
        kv_type: what the KV cache is stored in: f32, f16 or bf16; attention computes in float32 in any case.

    Raises:
        ConfigError: for another `kv_type`.
    """

    name = "reference"

    def __init__(
        self,
        weights: Weights,
        *,
        chi: int | None = None,
        device: str = "cpu",
        held: bool | None = None,
        kv_type: str = "f32",
    ) -> None:
        if kv_type not in KV_TYPES:
            raise ConfigError(f"kv-type {kv_type}: expected one of {', '.join(KV_TYPES)}")
        self.kv_type = KV_TYPES[kv_type]
        spec = weights.spec
        self.device = torch.device(device)
        if held is None:
            held = spec.architecture.parameters() * 4 <= HELD_SHARE * free_memory(device)
        self.held = held
        self.linears: dict[str, Linear] = {
            linear.name: load_linear(weights, linear, chi=chi, held=held, device=self.device) for linear in spec.linears
        }
        self.vectors: dict[str, Tensor] = {
            vector.name: float_tensor(weights, f"{vector.name}.weight").to(self.device) for vector in spec.vectors
        }
        frequencies = inverse_frequencies(spec.architecture.rope, spec.architecture.head_dim)
        self.frequencies = torch.from_numpy(frequencies).to(self.device)

    def weights(self, layer: str) -> Linear | Tensor:
        """The loaded layer or vector of that name."""
        return self.linears[layer] if layer in self.linears else self.vectors[layer]

    def ids(self, rows: list[list[int]]) -> Tensor:
        """Token ids [B, S]."""
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def to_numpy(self, array: Tensor) -> NDArray[np.float32]:
        """A tensor as numpy float32."""
        return array.detach().float().cpu().numpy()

    def new_cache(self, architecture: Architecture, rows: int, capacity: int) -> TorchCache:
        """Allocates an empty KV cache."""
        if capacity > architecture.max_position_embeddings:
            limit = architecture.max_position_embeddings
            raise ConfigError(f"context of {capacity} tokens: the model was made for {limit}; lower --ctx-size")
        return TorchCache(architecture, rows, capacity, self.device, self.kv_type)

    def run(self, forward: Callable[[Tensor, Any], Tensor], ids: Tensor, cache: TorchCache) -> Tensor:
        """`forward(ids, cache)` itself: nothing is recorded, so that gradients flow and every op can be replaced."""
        return forward(ids, cache)

    def embed(self, table: Linear, ids: Tensor, multiplier: float) -> Tensor:
        """Token ids [B, S] to multiplier · rows [B, S, E]."""
        return table.rows(ids) * multiplier

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight (Zhang & Sennrich 2019)."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(x) + bias."""
        return layer.apply(x)

    def rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache, block: int) -> Tensor:
        """Rotates q [B, S, H·D] and k [B, S, K·D] by position, appends k and v to the cache; returns q [B, H, S, D]."""
        rows, count, _ = q.shape
        held = cache.held[block]
        _, _, heads, _, size = held.shape
        positions = cache.positions(count)
        angles = positions[:, None, :, None].float() * self.frequencies  # [B, 1, S, D/2]
        cosine, sine = angles.cos(), angles.sin()
        k = rotate(k.view(rows, count, heads, size).transpose(1, 2), cosine, sine)
        v = v.view(rows, count, heads, size).transpose(1, 2)
        for row, start in enumerate(cache.lengths):
            kept = min(count, cache.capacity - start)  # the padding of a short row may reach past the end
            held[0, row, :, start : start + kept] = k[row, :, :kept]
            held[1, row, :, start : start + kept] = v[row, :, :kept]
        return rotate(q.view(rows, count, -1, size).transpose(1, 2), cosine, sine)

    def attention(self, q: Tensor, cache: TorchCache, block: int, scale: float) -> Tensor:
        """Causal grouped-query attention of q [B, H, S, D] over the cache, as [B, S, H·D]."""
        rows, heads, count, size = q.shape
        end = min(max(cache.lengths) + count, cache.capacity)
        k, v = cache.held[block][:, :, :, :end].float()  # [B, K, end, D] each
        group = heads // k.shape[1]
        q = q.reshape(rows, k.shape[1], group, count, size)
        scores = torch.einsum("bkgsd,bktd->bkgst", q, k) * scale
        visible = torch.arange(end, device=q.device) <= cache.positions(count)[:, :, None]  # [B, S, end]
        scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
        mixed = torch.einsum("bkgst,bktd->bskgd", scores.softmax(-1), v)
        return mixed.reshape(rows, count, heads * size)

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up (Shazeer 2020)."""
        return F.silu(gate) * up

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """x + scale · y."""
        return x + scale * y

    def logits(self, head: Linear, x: Tensor, scaling: float) -> Tensor:
        """head(x) / scaling [..., vocabulary]."""
        return head.apply(x) / scaling


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates the halves of x [..., D] against each other by the angles [..., D/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
