"""The native backend: C++ kernels on numpy memory and on the mapped file, for any CPU; never imports torch.

A forward pass is a few hundred small operations. In a small model, calling each of them from Python would take most of the
time. So this backend runs the model's Python code (models/decoder.py) once with *symbols* in place of arrays: every op
records itself into a native program, and all later steps run that program in a single call without the GIL. The C++ code
knows ops and registers, but no architecture. An op that is given arrays instead of symbols records a program of that op
alone and runs it. There is only this one path, so a test of a single op tests the code that the model runs.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mpo_runtime._native as _native
from mpo_formats import Architecture, ConfigError
from mpo_runtime.backends.ops import Array, Ops, Span, check_activations
from mpo_runtime.layers.native import float_vector, load_linear
from mpo_runtime.residence import Choice, Residence
from mpo_runtime.rope import rotations
from mpo_runtime.weights.protocol import Weights

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]
KV_TYPES = ("f32", "f16", "bf16", "int8")
# Rows that are multiplied at once to see whether that changes one of them.
TRIED = (2, 5, 17)
MOST_TRIED = 48


@dataclass(frozen=True, slots=True)
class Symbol:
    """Stands for an array while a program is recorded: a register of the program, or None for the token ids."""

    program: _native.Program
    register: int | None


class NativeCache:
    """The KV cache of the native kernels."""

    def __init__(self, held: _native.Cache) -> None:
        self.held = held

    @property
    def capacity(self) -> int:
        """Tokens that fit into a row."""
        return self.held.capacity

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        return self.held.lengths

    @property
    def nbytes(self) -> int:
        """Reserved bytes; the system provides each page when it is first written."""
        return self.held.nbytes

    def advance(self, counts: list[int]) -> None:
        """Adds the number of new tokens to the length of each row; raises ValueError past the capacity."""
        self.held.advance(counts)

    def rewind(self, length: int) -> None:
        """Forgets all tokens from position `length` on."""
        self.held.rewind(length)


class NativeOps(Ops):
    """The op set in C++.

    Args:
        weights: an open file or folder; its tensors are read directly from the mapping.
        chi: cuts every MPO bond to its first `chi` values.
        kv_type: element type of the KV cache: f32, f16, bf16 or int8 (with a scale for each position and head).
        activations: what integer weights are multiplied with: `int8` rounds the input of a layer to 8 bits in blocks of
            32 (fast), `float` keeps it in float32. Attention of prompts multiplies in bf16 where activations are rounded, the
            KV cache is not f32 and the CPU has AVX-512 BF16; all else of attention is float32.

    Raises:
        ConfigError: for another `kv_type` or `activations`.
    """

    name = "native"

    def __init__(
        self,
        weights: Weights,
        *,
        chi: int | None = None,
        kv_type: str = "f32",
        activations: str = "int8",
    ) -> None:
        if kv_type not in KV_TYPES:
            raise ConfigError(f"kv-type {kv_type}: expected one of {', '.join(KV_TYPES)}")
        check_activations(activations)
        spec = weights.spec
        self.kv_type = kv_type
        self.exact = activations == "float"
        self._specs = spec.linears
        self.load = Choice("map", "as asked")
        self.residence: Residence | None = None  # moves the weights, see loading.py
        shared: dict[str, _native.Transform] = {}
        self._linears = {
            linear.name: load_linear(weights, linear, chi=chi, transforms=shared) for linear in spec.linears
        }
        self._vectors = {vector.name: float_vector(weights, f"{vector.name}.weight") for vector in spec.vectors}
        self.head_dim = spec.architecture.head_dim
        self.frequencies = rotations(spec.architecture)
        # Forward passes are weak keys: a strong one would keep the model alive, and the model keeps this op set alive.
        self.recorded: dict[Any, tuple[_native.Program, int]] = {}

    prompt_tokens = 256

    @cached_property
    def row_exact(self) -> bool:
        """Whether a token's result does not depend on the others in a step, in any bit.

        Kernels may add up in another order for one row than for many. So one layer of each kind in the model is tried: as
        generated tokens in several numbers, and as parts of prompts of two lengths. The rest of a step is exact by its design.
        """
        kinds = {(spec.terms, spec.out_features, spec.in_features): spec.name for spec in self._specs}
        return all(self._is_row_exact(self._linears[name]) for name in kinds.values())

    def _is_row_exact(self, layer: _native.Linear) -> bool:
        x = np.random.default_rng(0).standard_normal((MOST_TRIED, layer.columns)).astype(np.float32)
        single = [self.linear(layer, row[None, None])[0, 0] for row in x[: len(TRIED)]]
        for count in TRIED:
            found = self.linear(layer, x[:count, None])[:, 0]
            if any((found[row] != expected).any() for row, expected in enumerate(single[:count])):
                return False
        long, short = (self.linear(layer, x[None, :count])[0] for count in (MOST_TRIED, MOST_TRIED // 4))
        return bool((long[: len(short)] == short).all())

    def weights(self, layer: str) -> _native.Linear | Floats:
        """The layer or vector of that name."""
        return self._linears[layer] if layer in self._linears else self._vectors[layer]

    def ids(self, rows: list[list[int]]) -> Ids:
        """Token ids [B, S]."""
        return np.array(rows, np.int64)

    def to_numpy(self, array: Floats) -> Floats:
        """The array itself."""
        return array

    def new_cache(self, architecture: Architecture, rows: int, capacity: int) -> NativeCache:
        """Allocates an empty KV cache."""
        if capacity > architecture.max_position_embeddings:
            limit = architecture.max_position_embeddings
            raise ConfigError(f"context of {capacity} tokens: the model was made for {limit}; lower --ctx-size")
        blocks, heads = architecture.num_hidden_layers, architecture.num_key_value_heads
        return NativeCache(_native.Cache(blocks, rows, heads, capacity, architecture.head_dim, self.kv_type))

    def new_pages(self, architecture: Architecture) -> _native.Pages:
        """An empty store of pages for the KV cache."""
        blocks, heads = architecture.num_hidden_layers, architecture.num_key_value_heads
        return _native.Pages(blocks, heads, architecture.head_dim, self.kv_type)

    def spans(self, pages: _native.Pages, spans: Sequence[Span]) -> NativeCache:
        """The cache of a step over several sequences."""
        tables = [list(span.pages) for span in spans]
        starts, counts = [span.start for span in spans], [span.count for span in spans]
        return NativeCache(_native.Cache(pages, tables, starts, counts, [span.few for span in spans]))

    def run(self, forward: Callable[[Array, Any], Array], ids: Ids, cache: NativeCache) -> Floats:
        """The result of `forward(ids, cache)` [B, S, width], from the program that its first call recorded."""
        key = weakref.WeakMethod(forward) if hasattr(forward, "__self__") else forward
        if key not in self.recorded:
            program = _native.Program(self.exact)
            result = forward(Symbol(program, None), None)
            program.finish(result.register)
            self.recorded[key] = program, program.width(result.register)
        program, width = self.recorded[key]
        out = np.empty((*ids.shape, width), np.float32)
        program.run(ids, [], cache.held, out)
        return out

    def _apply(
        self,
        record: Callable[..., int],
        *arrays: Array,
        ids: Array | None = None,
        cache: NativeCache | None = None,
        key: Any = None,
    ) -> Any:
        """Records an op on symbols, or runs it on arrays [..., width] with one or two leading axes.

        Args:
            record: `record(program, *registers)` adds the op and returns the register of its result.
            key: under which the op's program is kept for the next call; two ops that record differently need two keys.
        """
        given = ids if ids is not None else arrays[0]
        if isinstance(given, Symbol):
            return Symbol(given.program, record(given.program, *(array.register for array in arrays)))
        if key in self.recorded:
            program, width = self.recorded[key]
        else:
            program = _native.Program(self.exact)
            result = record(program, *(program.input(array.shape[-1]) for array in arrays))
            program.finish(result)
            width = program.width(result)
            if key is not None:
                self.recorded[key] = program, width
        leading = given.shape if ids is not None else given.shape[:-1]
        batch = leading if len(leading) == 2 else (1, *leading)
        out = np.empty((*batch, width), np.float32)
        tokens = None if ids is None else np.ascontiguousarray(ids, np.int64).reshape(batch)
        inputs = [np.ascontiguousarray(array, np.float32).reshape(*batch, -1) for array in arrays]
        program.run(tokens, inputs, None if cache is None else cache.held, out)
        return out.reshape(*leading, -1)

    def embed(self, table: _native.Linear, ids: Array, multiplier: float) -> Array:
        """Token ids [B, S] to multiplier · rows [B, S, E]; raises ValueError for an id outside the table."""
        return self._apply(lambda program: program.embed(table, multiplier), ids=ids)

    def add_positions(self, x: Array, table: Floats, cache: Any) -> Array:
        """x [B, S, E] with the rows of the table that belong to the positions of its tokens added."""
        return self._apply(lambda program, x: program.add_positions(x, table), x, cache=cache)

    def rms_norm(self, x: Array, weight: Floats, eps: float) -> Array:
        """x / √(mean x² + eps) · weight (Zhang & Sennrich 2019), for each stretch of x that is as wide as the weight."""
        return self._apply(lambda program, x: program.rms_norm(x, weight, eps), x)

    def layer_norm(self, x: Array, weight: Floats, bias: Floats, eps: float) -> Array:
        """(x − mean x) / √(var x + eps) · weight + bias (Ba et al. 2016)."""
        return self._apply(lambda program, x: program.layer_norm(x, weight, bias, eps), x)

    def linear(self, layer: _native.Linear, x: Array) -> Array:
        """Σ_t term_t(T x) + bias."""
        return self._apply(lambda program, x: program.linear(x, layer), x)

    def rope_and_append(self, q: Array, k: Array, v: Array, cache: Any, block: int) -> Array:
        """Rotates q [B, S, H·D] and k [B, S, K·D] by position, appends k and v to the cache; returns q [B, S, H·D]."""

        def record(program: _native.Program, q: int, k: int, v: int) -> int:
            return program.rope_and_append(q, k, v, self.frequencies, block)

        return self._apply(record, q, k, v, cache=cache)

    def attention(self, q: Array, cache: Any, block: int, scale: float, window: int) -> Array:
        """Causal grouped-query attention of q [B, S, H·D] over the cache, as [B, S, H·D]."""

        def record(program: _native.Program, q: int) -> int:
            return program.attention(q, self.head_dim, block, scale, window)

        return self._apply(record, q, cache=cache)

    def gelu(self, x: Array) -> Array:
        """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Hendrycks & Gimpel 2016)."""
        return self._apply(lambda program, x: program.gelu(x), x)

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) · up (Shazeer 2020)."""
        return self._apply(lambda program, gate, up: program.swiglu(gate, up), gate, up)

    def add_scaled(self, x: Array, y: Array, scale: float) -> Array:
        """x + scale · y."""
        return self._apply(lambda program, x, y: program.add_scaled(x, y, scale), x, y)

    def logits(self, head: _native.Linear, x: Array, scaling: float) -> Array:
        """head(x) / scaling [..., vocabulary]."""

        def record(program: _native.Program, x: int) -> int:
            y = program.linear(x, head)
            return y if scaling == 1 else program.divide(y, scaling)

        return self._apply(record, x, key=(head.name, scaling))
