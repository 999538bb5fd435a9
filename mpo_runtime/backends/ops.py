"""The op set: what a model needs and a backend provides. A model is written once; a backend is a complete set of ops.

Models pass arrays from op to op without looking into them; they are torch tensors or numpy arrays, depending on the backend.
Shapes: B rows, S new tokens, H query heads, K key-value heads, D head size, E hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Architecture, ConfigError

Array = Any
# Positions of a page of the KV cache.
PAGE = 32
# What a backend multiplies integer weights with.
ACTIVATIONS = ("int8", "float")


def check_activations(activations: str) -> None:
    """Raises ConfigError for other activations than `int8` and `float`."""
    if activations not in ACTIVATIONS:
        raise ConfigError(f"activations {activations}: expected one of {', '.join(ACTIVATIONS)}")


class Cache(Protocol):
    """A preallocated KV cache of several rows, each with a length of its own."""

    @property
    def capacity(self) -> int:
        """Tokens that fit into a row."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens in each row."""
        ...

    def advance(self, counts: list[int]) -> None:
        """Adds the number of new tokens to the length of each row; appended padding beyond it will be overwritten."""
        ...

    def rewind(self, length: int) -> None:
        """Forgets all tokens from position `length` on, in every row."""
        ...


@dataclass(frozen=True, slots=True)
class Span:
    """The new tokens of one sequence in a step over several.

    Attributes:
        pages: the sequence's pages in order, enough for all its tokens.
        start: the position of the first new token; those before it are in the pages.
        count: new tokens.
        few: they are one token or some drafts of a text being generated; otherwise they are a part of a prompt. The
            bits of a token's result depend on its sequence and on this alone, where the backend is `row_exact`.
    """

    pages: Sequence[int]
    start: int
    count: int
    few: bool


class Pages(Protocol):
    """A store of pages of the KV cache, each for PAGE positions of one sequence; which are in use is the caller's affair."""

    @property
    def count(self) -> int:
        """Pages that exist."""
        ...

    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
        ...

    def grow(self, count: int) -> None:
        """Makes pages until there are `count`."""
        ...

    def copy(self, source: int, target: int) -> None:
        """Copies the content of a page to another one."""
        ...

    def read(self, page: int) -> bytes:
        """The content of a page."""
        ...

    def write(self, page: int, content: bytes) -> None:
        """Puts in a page what `read` of a store for the same model and type gave; raises ValueError for another size."""
        ...


class Ops(Protocol):
    """What a model runs on: a complete backend."""

    name: str

    @property
    def row_exact(self) -> bool:
        """Whether a token's result does not depend on what else is in the step, in any bit."""
        ...

    @property
    def prompt_tokens(self) -> int:
        """How many tokens of a prompt are best run at once."""
        ...

    def weights(self, layer: str) -> Array:
        """The loaded layer or vector of that name."""
        ...

    def ids(self, rows: list[list[int]]) -> Array:
        """Token ids [B, S] as the backend's integers."""
        ...

    def to_numpy(self, array: Array) -> NDArray[np.float32]:
        """A float array of the backend as numpy float32."""
        ...

    def new_cache(self, architecture: Architecture, rows: int, capacity: int) -> Cache:
        """Allocates an empty KV cache."""
        ...

    def new_pages(self, architecture: Architecture) -> Pages:
        """An empty store of pages for the KV cache."""
        ...

    def spans(self, pages: Any, spans: Sequence[Span]) -> Any:
        """What `run` takes as cache for a step over several sequences: ids [1, S] are the new tokens of all of them."""
        ...

    def run(self, forward: Callable[[Array, Any], Array], ids: Array, cache: Any) -> Array:
        """The result of `forward(ids, cache)`; a backend may record its ops in the first call and replay them later."""
        ...

    def next_logits(
        self,
        forward: Callable[[Array, Any], Array],
        logits: Callable[[Array], Array],
        ids: Sequence[int],
        pages: Any,
        spans: Sequence[Span],
    ) -> NDArray[np.float32] | None:
        """The logits [texts, vocabulary] after one generated token of each text, where the backend has a way of its own.

        Args:
            forward: ids [1, S] and cache to hidden states [1, S, E].
            logits: hidden states [..., E] to logits [..., vocabulary].
            ids, spans: the new tokens, and the texts that they belong to.

        Returns:
            None where it has none for such a step: then `run` and `logits` do it.
        """
        return None

    def embed(self, table: Array, ids: Array, multiplier: float) -> Array:
        """Token ids [B, S] to multiplier · rows [B, S, E]."""
        ...

    def add_positions(self, x: Array, table: Array, cache: Any) -> Array:
        """x [B, S, E] with the rows of a table, given as one vector, that belong to the positions of its tokens added.

        The tokens follow those in the cache; without one they begin at position 0.
        """
        ...

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """x / √(mean x² + eps) · weight (Zhang & Sennrich 2019), for each stretch of x that is as wide as the weight."""
        ...

    def layer_norm(self, x: Array, weight: Array, bias: Array, eps: float) -> Array:
        """(x − mean x) / √(var x + eps) · weight + bias (Ba et al. 2016)."""
        ...

    def linear(self, layer: Array, x: Array) -> Array:
        """Σ_t term_t(H x) + bias."""
        ...

    def linears(self, layers: Sequence[Array], x: Array) -> Sequence[Array]:
        """Several layers with the same input; a backend may compute them at once."""
        return [self.linear(layer, x) for layer in layers]

    def rope_and_append(self, q: Array, k: Array, v: Array, cache: Any, block: int) -> Array:
        """Rotates q [B, S, H·D] and k [B, S, K·D] by position, appends k and v to the cache.

        Returns q in the layout that `attention` of the same backend takes: [B, H, S, D] or as it came.
        """
        ...

    def attention(self, q: Array, cache: Any, block: int, scale: float, window: int) -> Array:
        """Causal grouped-query attention of q from `rope_and_append` over the cache, as [B, S, H·D].

        A token sees the `window` positions that end with its own; all where that is 0.
        """
        ...

    def gelu(self, x: Array) -> Array:
        """x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))) (Hendrycks & Gimpel 2016)."""
        ...

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) · up (Shazeer 2020)."""
        ...

    def add_scaled(self, x: Array, y: Array, scale: float) -> Array:
        """x + scale · y."""
        ...

    def logits(self, head: Array, x: Array, scaling: float) -> Array:
        """head(x) / scaling [..., vocabulary]."""
        ...


class EditableOps(Ops, Protocol):
    """A backend whose matrices can be exchanged, as calibration, measuring and healing do. The reference backend is one."""

    def replace(self, layer: str, weight: Array) -> None:
        """Puts the matrix [out, in] in the place of a layer's terms; its bias stays."""
        ...

    def replaced(self, layer: str, weight: Array) -> AbstractContextManager[None]:
        """A context in which the layer has that matrix in the place of its terms."""
        ...

    def holding(self, layers: Iterable[str]) -> AbstractContextManager[None]:
        """A context in which the matrices of these layers stay in memory instead of being rebuilt at every use."""
        ...

    def block_cache(self, architecture: Architecture, rows: int, count: int) -> Cache:
        """A KV cache for `count` tokens that all blocks share: for running one block after the other on a whole text."""
        ...
