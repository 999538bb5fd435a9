"""The reference backend: plain torch in float32. Every other backend is tested against it.

It is differentiable and its matrices can be exchanged, so calibration, measuring and healing run on it too.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mpo_formats import Architecture, ConfigError, LinearSpec
from mpo_runtime.backends.ops import PAGE, EditableOps, Span
from mpo_runtime.layers.linear import Linear, MatrixTerm, float_tensor, load_linear
from mpo_runtime.memory import available_memory
from mpo_runtime.rope import rotations
from mpo_runtime.weights.protocol import Weights

# All matrices are kept in memory as float32 where they take at most this share of the free memory.
HELD_SHARE = 0.6
# Element types of the KV cache, by the values of --kv-type.
KV_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def free_memory(device: str) -> int:
    """Free memory of a torch device in bytes; for the CPU, what this process can still allocate."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else available_memory()


class TorchCache:
    """Keys and values [2, B, K, capacity, D], a tensor for each block so that gradients can flow through the cache.

    Args:
        shared: all blocks use one tensor, for running one block after the other on a whole text.
    """

    def __init__(
        self,
        architecture: Architecture,
        rows: int,
        capacity: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        shared: bool = False,
    ) -> None:
        heads, size = architecture.num_key_value_heads, architecture.head_dim
        self.capacity = capacity
        self.lengths = [0] * rows
        shape = (2, rows, heads, capacity, size)
        self.device = device
        blocks = architecture.num_hidden_layers
        tensors = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(1 if shared else blocks)]
        self.held = tensors * blocks if shared else tensors

    def positions(self, count: int) -> Tensor:
        """The positions [B, S] of `count` new tokens in each row."""
        starts = torch.tensor(self.lengths, device=self.device)
        return starts[:, None] + torch.arange(count, device=self.device)

    def append(self, block: int, k: Tensor, v: Tensor) -> None:
        """Writes keys and values [B, K, S, D] of the new tokens; does not advance."""
        for row, start in enumerate(self.lengths):
            kept = min(k.shape[2], self.capacity - start)  # the padding of a short row may exceed the capacity
            for index, new in enumerate((k, v)):
                self.held[block][index, row, :, start : start + kept] = new[row, :, :kept]

    def advance(self, counts: list[int]) -> None:
        """Adds the number of new tokens to the length of each row."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def rewind(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self.lengths = [min(length, held) for held in self.lengths]


class TorchPages:
    """Pages [blocks, 2, K, PAGE, D] of the KV cache, a tensor each."""

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        heads, size = architecture.num_key_value_heads, architecture.head_dim
        self.shape = (architecture.num_hidden_layers, 2, heads, PAGE, size)
        self.device, self.dtype = device, dtype
        self.held: list[Tensor] = []

    @property
    def count(self) -> int:
        """Pages that exist."""
        return len(self.held)

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        return math.prod(self.shape) * self.dtype.itemsize

    def grow(self, count: int) -> None:
        """Makes pages until there are `count`."""
        while len(self.held) < count:
            self.held.append(torch.zeros(self.shape, device=self.device, dtype=self.dtype))

    def copy(self, source: int, target: int) -> None:
        """Copies the content of a page to another one."""
        self.held[target].copy_(self.held[source])

    def read(self, page: int) -> bytes:
        """The content of a page."""
        return self.held[page].cpu().contiguous().view(torch.uint8).numpy().tobytes()

    def write(self, page: int, content: bytes) -> None:
        """Puts in a page what `read` gave; raises ValueError for another size."""
        if len(content) != self.page_bytes:
            raise ValueError(f"cache: a page has {self.page_bytes} bytes, found {len(content)}")
        self.held[page].copy_(torch.frombuffer(bytearray(content), dtype=self.dtype).view(self.shape))


class TorchSpans:
    """The sequences of one step as the cache of its tokens [1, S]."""

    def __init__(self, pages: TorchPages, spans: Sequence[Span]) -> None:
        self.pages, self.spans = pages, spans

    def positions(self, count: int) -> Tensor:
        """The positions [1, S] of the new tokens."""
        parts = [torch.arange(span.start, span.start + span.count) for span in self.spans]
        return torch.cat(parts).to(self.pages.device)[None]

    def append(self, block: int, k: Tensor, v: Tensor) -> None:
        """Writes keys and values [1, K, S, D] of the new tokens to their pages."""
        token, both = 0, torch.stack((k[0], v[0]))
        for span in self.spans:
            position, end = span.start, span.start + span.count
            while position < end:
                index, first = divmod(position, PAGE)
                count = min(PAGE - first, end - position)
                page = self.pages.held[span.pages[index]]
                page[block, :, :, first : first + count] = both[:, :, token : token + count]
                token, position = token + count, position + count

    def rows(self, block: int) -> Iterator[tuple[int, int, Tensor]]:
        """For each sequence its first token, its new tokens, and its keys and values [2, 1, K, end, D]."""
        first = 0
        for span in self.spans:
            end = span.start + span.count
            used = [self.pages.held[page][block] for page in span.pages[: -(-end // PAGE)]]
            yield first, span.count, torch.cat(used, dim=2)[:, None, :, :end]
            first += span.count


class ReferenceOps(EditableOps):
    """The op set in plain torch.

    Args:
        weights: an open file or folder.
        chi: cuts every MPO bond to its first `chi` values.
        device: a torch device name.
        held: keeps all matrices in memory as float32; False rebuilds them from the file at every use. None keeps them where
            the device has enough free memory.
        kv_type: element type of the KV cache: f32, f16 or bf16; attention is computed in float32 in any case.

    Raises:
        ConfigError: for another `kv_type`.
    """

    name = "reference"
    row_exact = False
    prompt_tokens = 256
    kv_types: ClassVar[dict[str, torch.dtype]] = KV_TYPES

    def __init__(
        self,
        weights: Weights,
        *,
        chi: int | None = None,
        device: str = "cpu",
        held: bool | None = None,
        kv_type: str = "f32",
    ) -> None:
        if kv_type not in self.kv_types:
            raise ConfigError(f"kv-type {kv_type}: expected one of {', '.join(self.kv_types)} with backend {self.name}")
        self.kv_type = self.kv_types[kv_type]
        spec = weights.spec
        self.device = torch.device(device)
        if held is None:
            held = spec.architecture.parameters() * 4 <= HELD_SHARE * free_memory(device)
        self.held = held
        self.vocabulary = spec.architecture.vocab_size
        self._linears: dict[str, Linear] = {
            linear.name: self.load_layer(weights, linear, chi) for linear in spec.linears
        }
        self._vectors: dict[str, Tensor] = {
            vector.name: float_tensor(weights, f"{vector.name}.weight").to(self.device) for vector in spec.vectors
        }
        self.frequencies = torch.from_numpy(rotations(spec.architecture)).to(self.device)

    def load_layer(self, weights: Weights, spec: LinearSpec, chi: int | None) -> Linear:
        """A layer, loaded for this backend."""
        return load_linear(weights, spec, chi=chi, held=self.held, device=self.device)

    def weights(self, layer: str) -> Linear | Tensor:
        """The loaded layer or vector of that name."""
        return self._linears[layer] if layer in self._linears else self._vectors[layer]

    def replace(self, layer: str, weight: Tensor) -> None:
        """Puts the matrix [out, in] in the place of a layer's terms; its bias stays."""
        present = self._linears[layer]
        spec = dataclasses.replace(present.spec, hadamard=0, transform=None)
        self._linears[layer] = Linear(spec, [MatrixTerm.of(weight.to(self.device))], present.bias)

    @contextmanager
    def replaced(self, layer: str, weight: Tensor) -> Iterator[None]:
        """A context in which the layer has that matrix [out, in] in the place of its terms."""
        original = self._linears[layer]
        self.replace(layer, weight)
        try:
            yield
        finally:
            self._linears[layer] = original

    @contextmanager
    def holding(self, layers: Iterable[str]) -> Iterator[None]:
        """A context in which the matrices of these layers stay in memory as float32."""
        terms = [term for name in layers for term in self._linears[name].terms if isinstance(term, MatrixTerm)]
        rebuilt = [term for term in terms if term.held is None]
        for term in rebuilt:
            term.held = term.rebuild()
        try:
            yield
        finally:
            for term in rebuilt:
                term.held = None

    def ids(self, rows: list[list[int]]) -> Tensor:
        """Token ids [B, S]."""
        return torch.tensor(rows, dtype=torch.int64, device=self.device)

    def to_numpy(self, array: Tensor) -> NDArray[np.float32]:
        """A tensor as numpy float32."""
        return array.detach().float().cpu().numpy()

    def new_pages(self, architecture: Architecture) -> TorchPages:
        """An empty store of pages for the KV cache."""
        return TorchPages(architecture, self.device, self.kv_type)

    def spans(self, pages: TorchPages, spans: Sequence[Span]) -> TorchSpans:
        """The cache of a step over several sequences."""
        return TorchSpans(pages, spans)

    def new_cache(self, architecture: Architecture, rows: int, capacity: int) -> TorchCache:
        """Allocates an empty KV cache."""
        if capacity > architecture.max_position_embeddings:
            limit = architecture.max_position_embeddings
            raise ConfigError(f"context of {capacity} tokens: the model was made for {limit}; lower --ctx-size")
        return TorchCache(architecture, rows, capacity, self.device, self.kv_type)

    def block_cache(self, architecture: Architecture, rows: int, count: int) -> TorchCache:
        """A float32 KV cache for `count` tokens that all blocks share: for running one block after the other."""
        return TorchCache(architecture, rows, count, self.device, shared=True)

    def run(self, forward: Callable[[Tensor, Any], Tensor], ids: Tensor, cache: Any) -> Tensor:
        """`forward(ids, cache)`: nothing is recorded, so that gradients flow and a subclass can override every op."""
        return forward(ids, cache)

    def embed(self, table: Linear, ids: Tensor, multiplier: float) -> Tensor:
        """Token ids [B, S] to multiplier · rows [B, S, E]."""
        return table.rows(ids) * multiplier

    def add_positions(self, x: Tensor, table: Tensor, cache: TorchCache | TorchSpans | None) -> Tensor:
        """x [B, S, E] with the rows of the table that belong to the positions of its tokens added."""
        count, rows = x.shape[1], table.view(-1, x.shape[2])
        if cache is None:
            return x + rows[:count]
        return (
            x + rows[cache.positions(count).clamp(max=len(rows) - 1)]
        )  # padding of a short row may reach past the end

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight (Zhang & Sennrich 2019), for each stretch of x that is as wide as the weight."""
        parts = x.reshape(*x.shape[:-1], -1, weight.shape[0])
        return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps) * weight).flatten(-2)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        """(x − mean x) / √(var x + eps) · weight + bias (Ba et al. 2016)."""
        return F.layer_norm(x, weight.shape, weight, bias, eps)

    def linear(self, layer: Linear, x: Tensor) -> Tensor:
        """Σ_t term_t(H x) + bias."""
        return layer.apply(x)

    def rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache | TorchSpans, block: int) -> Tensor:
        """Rotates q [B, S, H·D] and k [B, S, K·D] by position, appends k and v to the cache; returns q [B, H, S, D]."""
        rows, count, _ = q.shape
        size = 2 * self.frequencies.shape[0]
        angles = cache.positions(count)[:, None, :, None].float() * self.frequencies  # [B, 1, S, D/2]
        cosine, sine = angles.cos(), angles.sin()
        k = rotate(k.view(rows, count, -1, size).transpose(1, 2), cosine, sine)
        cache.append(block, k, v.view(rows, count, -1, size).transpose(1, 2))
        return rotate(q.view(rows, count, -1, size).transpose(1, 2), cosine, sine)

    def attention(self, q: Tensor, cache: TorchCache | TorchSpans, block: int, scale: float, window: int) -> Tensor:
        """Causal grouped-query attention of q [B, H, S, D] over the cache, as [B, S, H·D]."""
        positions = cache.positions(q.shape[2])
        if isinstance(cache, TorchCache):
            end = min(max(cache.lengths) + q.shape[2], cache.capacity)
            return attend(q, cache.held[block][:, :, :, :end], positions, scale, window)
        parts = [
            attend(q[:, :, first : first + count], held, positions[:, first : first + count], scale, window)
            for first, count, held in cache.rows(block)
        ]
        return torch.cat(parts, dim=1)

    def gelu(self, x: Tensor) -> Tensor:
        """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Hendrycks & Gimpel 2016)."""
        return F.gelu(x, approximate="tanh")

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up (Shazeer 2020)."""
        return F.silu(gate) * up

    def add_scaled(self, x: Tensor, y: Tensor, scale: float) -> Tensor:
        """x + scale · y."""
        return x + scale * y

    def logits(self, head: Linear, x: Tensor, scaling: float) -> Tensor:
        """head(x) / scaling [..., vocabulary]."""
        found = head.apply(x)
        return found if scaling == 1 else found / scaling


def attend(q: Tensor, held: Tensor, positions: Tensor, scale: float, window: int) -> Tensor:
    """Causal grouped-query attention of q [B, H, S, D] at positions [B, S] over keys and values [2, B, K, end, D]."""
    rows, heads, count, size = q.shape
    k, v = held.float()
    end, group = k.shape[2], heads // k.shape[1]
    q = q.reshape(rows, k.shape[1], group, count, size)
    scores = torch.einsum("bkgsd,bktd->bkgst", q, k) * scale
    present, positions = torch.arange(end, device=q.device), positions[:, :, None]
    visible = present <= positions  # [B, S, end]
    if window:
        visible &= present > positions.clamp(max=end - 1) - window  # padding past the end sees something, too
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    mixed = torch.einsum("bkgst,bktd->bskgd", scores.softmax(-1), v)
    return mixed.reshape(rows, count, heads * size)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotates each pair of elements (j, j + D/2) of x [..., D] by its angle [..., D/2], given as cosine and sine."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)
