"""The GPU backend: the op set with Triton kernels where they pay, and torch's for the rest.

Weights stay as the file stores them. Activations between ops are float32; products with integers run on the vector units for
one token and on the matrix units (bf16) for several, or in float32 with `exact`. The KV cache is one tensor of pages. Steps of
single tokens attend by pages with split sums (flash decoding, Dao 2023); prompts by torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mpo_formats import Architecture, Dense, LinearSpec, Mpo, Quantized
from mpo_formats.layout import PLANES
from mpo_runtime.backends import triton_kernels as kernels
from mpo_runtime.backends.ops import PAGE, Span
from mpo_runtime.backends.reference import ReferenceOps, TorchCache, TorchPages, TorchSpans
from mpo_runtime.layers.linear import Linear, MpoTerm, float_tensor, load_cores, widen
from mpo_runtime.weights.protocol import Weights

# Programs that should be under way at once, a few for each of a large GPU's processors.
PROGRAMS = 512
# Shares of the pages that attention sums apart.
ATTENTION_PARTS = 8


@dataclass(frozen=True, slots=True)
class Tile:
    """How `integer_product` cuts a product: rows, columns and tokens of a program, and shares of the columns."""

    rows: int
    columns: int
    tokens: int
    parts: int

    @classmethod
    def choose(cls, tokens: int, rows: int, columns: int, group: int) -> Tile:
        """Enough programs for the GPU: one token splits the columns, many tokens need no split."""
        wide = max(group, 256 if tokens == 1 else 64)
        high = 16 if tokens == 1 else 64
        block = 1 if tokens == 1 else 16 if tokens <= 16 else 32 if tokens <= 32 else 64
        programs = triton.cdiv(rows, high) * triton.cdiv(tokens, block)
        parts = min(max(PROGRAMS // programs, 1), triton.cdiv(columns, wide))
        return cls(high, wide, block, 1 << (parts.bit_length() - 1))


class IntegerTerm:
    """A Quantized term on the device: planes, scales and zeros as the file has them."""

    def __init__(self, weights: Weights, prefix: str, term: Quantized, device: torch.device, *, exact: bool) -> None:
        def put(name: str) -> Tensor:
            return torch.from_numpy(np.array(weights.array(f"{prefix}.{name}"))).to(device)

        bits = PLANES[term.bits]
        self.planes = [put(f"q{plane}") for plane in bits]
        self.low, self.high = bits[0], bits[1] if len(bits) > 1 else 0
        self.scale = put("scale")
        self.zero = put("zero") if term.zeros else None
        self.outputs, self.columns = self.scale.shape[0], self.scale.shape[1] * term.group
        self.group, self.exact = term.group, exact

    def arguments(self) -> tuple[Tensor, ...]:
        """Planes, scales and zeros as the kernels take them; what is absent is not read."""
        zero = self.scale if self.zero is None else self.zero
        return (self.planes[0], self.planes[-1], self.scale, zero)

    def constants(self) -> dict[str, Any]:
        """What the kernels are compiled for."""
        return {"LOW": self.low, "HIGH": self.high, "GROUP": self.group, "ZEROS": self.zero is not None}

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out]."""
        tokens, x = x.shape[0], x.contiguous()
        tile = Tile.choose(tokens, self.outputs, self.columns, self.group)
        y = x.new_empty((tile.parts, tokens, self.outputs), dtype=torch.float32)
        grid = (triton.cdiv(self.outputs, tile.rows), triton.cdiv(tokens, tile.tokens), tile.parts)
        kernels.integer_product[grid](
            x, *self.arguments(), y, tokens, self.outputs, self.columns, **self.constants(),
            ROWS=tile.rows, COLUMNS=tile.columns, TOKENS=tile.tokens, PARTS=tile.parts, EXACT=self.exact,
        )  # fmt: skip
        return y[0] if tile.parts == 1 else y.sum(0)

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T], as [T, in]."""
        columns = max(self.group, 256)
        y = torch.empty((ids.shape[0], self.columns), dtype=torch.float32, device=ids.device)
        grid = (ids.shape[0], triton.cdiv(self.columns, columns))
        kernels.integer_rows[grid](
            ids, *self.arguments(), y, self.outputs, self.columns, **self.constants(), COLUMNS=columns
        )
        return y

    def weight(self) -> Tensor:
        """The matrix [out, in]."""
        return self.rows(torch.arange(self.outputs, device=self.scale.device))


class DenseTerm:
    """A Dense term on the device, in the type in which it is multiplied."""

    def __init__(self, weight: Tensor) -> None:
        self.held = weight

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out]."""
        return F.linear(x.to(self.held.dtype), self.held).float()

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T], as [T, in]."""
        return F.embedding(ids, self.held).float()

    def weight(self) -> Tensor:
        """The matrix [out, in]."""
        return self.held.float()


class CoreTerm:
    """An Mpo term whose cores are multiplied in another type than float32."""

    def __init__(self, term: MpoTerm) -> None:
        self.term = term

    def apply(self, x: Tensor) -> Tensor:
        """Maps x [T, in] to [T, out]."""
        return self.term.apply(x.to(self.term.cores[0].dtype)).float()

    def rows(self, ids: Tensor) -> Tensor:
        """The rows `ids` [T], as [T, in]."""
        return self.term.rows(ids).float()

    def weight(self) -> Tensor:
        """The matrix [out, in]."""
        return self.term.weight().float()


class TritonPages(TorchPages):
    """Pages of the KV cache in one tensor [pages, blocks, 2, K, PAGE, D]."""

    def __init__(self, architecture: Architecture, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(architecture, device, dtype)
        self.store = torch.zeros((0, *self.shape), device=device, dtype=dtype)

    def grow(self, count: int) -> None:
        """Makes pages until there are `count`; the tensor grows by half at least, so that it is rarely copied."""
        if count <= len(self.held):
            return
        if count > self.store.shape[0]:
            larger = self.store.new_zeros((max(count, self.store.shape[0] * 3 // 2), *self.shape))
            larger[: len(self.held)] = self.store[: len(self.held)]
            self.store = larger
        self.held = list(self.store[:count])


class TritonSpans(TorchSpans):
    """The sequences of one step, and for the kernels each token's sequence, position and pages."""

    def __init__(self, pages: TritonPages, spans: Sequence[Span]) -> None:
        super().__init__(pages, spans)
        self.pages: TritonPages = pages
        self.single = all(span.few for span in spans)
        device, width = pages.device, max(len(span.pages) for span in spans)
        padded = [[*span.pages, *[0] * (width - len(span.pages))] for span in spans]
        self.table = torch.tensor(padded, dtype=torch.int32, device=device)
        numbers = [number for number, span in enumerate(spans) for _ in range(span.count)]
        self.sequence = torch.tensor(numbers, dtype=torch.int32, device=device)
        self.place = self.positions(0)[0].to(torch.int32)


class TritonOps(ReferenceOps):
    """The op set on a GPU.

    Args:
        weights, chi, device, kv_type: as for the reference.
        exact: products in float32 instead of bf16 on the matrix units.
    """

    name = "triton"

    def __init__(
        self,
        weights: Weights,
        *,
        chi: int | None = None,
        device: str = "cuda",
        kv_type: str = "f16",
        exact: bool = False,
    ) -> None:
        self.exact = exact
        super().__init__(weights, chi=chi, device=device, held=False, kv_type=kv_type)
        dtype = torch.float32 if exact else torch.bfloat16
        self._linears = {one.name: self.load(weights, one, chi, dtype) for one in weights.spec.linears}

    def load(self, weights: Weights, spec: LinearSpec, chi: int | None, dtype: torch.dtype) -> Linear:
        """A layer on the device: integers as they are stored, dense matrices and cores in `dtype`."""
        terms: list[Any] = []
        for index, term in enumerate(spec.terms):
            prefix = f"{spec.name}.{index}"
            if isinstance(term, Quantized):
                terms.append(IntegerTerm(weights, prefix, term, self.device, exact=self.exact))
            elif isinstance(term, Dense):
                matrix = widen(weights.array(f"{prefix}.weight"), weights.dtype(f"{prefix}.weight"))
                terms.append(DenseTerm(matrix.to(self.device, dtype)))
            elif isinstance(term, Mpo):
                kept = term if chi is None else term.truncated(chi)
                cores = load_cores(weights, prefix, term, kept, self.device)
                terms.append(CoreTerm(MpoTerm(kept, [core.to(dtype) for core in cores])))
        bias = None if spec.bias is None else float_tensor(weights, f"{spec.name}.bias").to(self.device)
        return Linear(spec, terms, bias)

    def new_pages(self, architecture: Architecture) -> TritonPages:
        """An empty store of pages for the KV cache."""
        return TritonPages(architecture, self.device, self.kv_type)

    def spans(self, pages: TorchPages, spans: Sequence[Span]) -> TorchSpans:
        """The cache of a step over several sequences."""
        return TritonSpans(pages, spans) if isinstance(pages, TritonPages) else TorchSpans(pages, spans)

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x / √(mean x² + eps) · weight, for each stretch of x that is as wide as the weight."""
        x, width = x.contiguous(), weight.shape[0]
        y = torch.empty_like(x)
        kernels.rms_norm[(x.numel() // width,)](x, weight, y, width, eps, WIDTH=triton.next_power_of_2(width))
        return y

    def swiglu(self, gate: Tensor, up: Tensor) -> Tensor:
        """silu(gate) · up."""
        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        kernels.swiglu[(triton.cdiv(gate.numel(), 1024),)](gate, up, y, gate.numel(), BLOCK=1024)
        return y

    def rope_and_append(self, q: Tensor, k: Tensor, v: Tensor, cache: TorchCache | TorchSpans, block: int) -> Tensor:
        """Rotates q and k by position, appends k and v to the cache; returns q [B, H, S, D]."""
        if not isinstance(cache, TritonSpans):
            return super().rope_and_append(q, k, v, cache, block)
        size = 2 * self.frequencies.shape[0]
        tokens, heads, kv_heads = q.shape[1], q.shape[2] // size, k.shape[2] // size
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        rotated = torch.empty_like(q)
        pages = cache.pages
        kernels.rotate_and_append[(tokens, heads + kv_heads)](
            q, k, v, rotated, pages.store, cache.table, cache.sequence, cache.place, self.frequencies, block,
            heads, kv_heads, pages.shape[0], cache.table.shape[1],
            SIZE=size, HALF=triton.next_power_of_2(size // 2), PAGE=PAGE,
        )  # fmt: skip
        return rotated.view(1, tokens, heads, size).transpose(1, 2)

    def attention(self, q: Tensor, cache: TorchCache | TorchSpans, block: int, scale: float, window: int) -> Tensor:
        """Causal grouped-query attention of q [B, H, S, D] over the cache, as [B, S, H·D]."""
        if not (isinstance(cache, TritonSpans) and cache.single):
            return super().attention(q, cache, block, scale, window)
        _, heads, tokens, size = q.shape
        blocks, _, kv_heads, _, _ = cache.pages.shape
        flat = q.transpose(1, 2).reshape(tokens, heads, size).contiguous()
        parts, width = ATTENTION_PARTS, triton.next_power_of_2(size)
        mixed = flat.new_empty((tokens, heads, parts, size))
        highest, total = (flat.new_empty((tokens, heads, parts)) for _ in range(2))
        kernels.attention_part[(tokens, heads, parts)](
            flat, cache.pages.store, cache.table, cache.sequence, cache.place, mixed, highest, total, scale, window, block,
            heads, kv_heads, blocks, cache.table.shape[1],
            GROUP=heads // kv_heads, SIZE=size, WIDTH=width, PAGE=PAGE, PARTS=parts,
        )  # fmt: skip
        y = torch.empty_like(flat)
        kernels.attention_join[(tokens * heads,)](mixed, highest, total, y, SIZE=size, WIDTH=width, PARTS=parts)
        return y.view(1, tokens, heads * size)
