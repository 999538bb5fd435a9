"""The architecture configuration of a `.mpo` file and the layers that it demands (SPEC.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from mpo_formats.codec import describe
from mpo_formats.errors import FormatError
from mpo_formats.spec import FileSpec, LinearSpec, Provenance, VectorSpec, require, require_sizes

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base theta, and the frequency scaling of Llama 3.1 or a linear one."""

    theta: float
    scaling: Literal["default", "linear", "llama3"]
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require(self.theta > 0, f"rope.theta: expected more than 0, found {self.theta}")
        require(self.factor >= 1, f"rope.factor: expected at least 1, found {self.factor}")
        if self.scaling == "llama3":
            ordered = 0 < self.low_freq_factor < self.high_freq_factor
            require(ordered, "rope: expected 0 < low_freq_factor < high_freq_factor")
            require_sizes("rope.original_max_position_embeddings", (self.original_max_position_embeddings,))


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of the Granite family; a Llama is one whose multipliers are 1 and whose attention is 1/√head_dim."""

    model_type: Literal["granite"]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    embedding_multiplier: float
    residual_multiplier: float
    attention_multiplier: float
    logits_scaling: float
    attention_bias: bool
    mlp_bias: bool
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    def __post_init__(self) -> None:
        widths = (self.vocab_size, self.hidden_size, self.intermediate_size, self.max_position_embeddings)
        require_sizes("model", widths)
        require_sizes("model.num_hidden_layers", (self.num_hidden_layers,), most=4096)
        heads = (self.num_attention_heads, self.num_key_value_heads, self.head_dim)
        require_sizes("model.num_attention_heads, num_key_value_heads, head_dim", heads, most=65536)
        divides = self.num_attention_heads % self.num_key_value_heads == 0
        require(divides, "model.num_key_value_heads: does not divide num_attention_heads")
        require(self.head_dim % 2 == 0, f"model.head_dim: expected an even size for RoPE, found {self.head_dim}")
        require(0 < self.rms_norm_eps < 1, f"model.rms_norm_eps: expected 0 to 1, found {self.rms_norm_eps}")
        require(self.logits_scaling != 0, "model.logits_scaling: must not be 0")
        tokens = (self.bos_token_id, self.pad_token_id, *self.eos_token_ids)
        for token in tokens:
            known = token is None or 0 <= token < self.vocab_size
            require(known, f"model: token id {describe(token)} lies outside the vocabulary of {self.vocab_size}")

    def linear_sizes(self) -> Iterator[tuple[str, int, int, bool]]:
        """Yields (name, out, in, has bias) of every linear in file order; the embedding is the first of them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield EMBEDDING, self.vocab_size, hidden, False
        sizes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
        for block in range(self.num_hidden_layers):
            for part, (rows, columns) in zip(ATTENTION, sizes, strict=True):
                yield f"model.layers.{block}.{part}", rows, columns, self.attention_bias
            for part, (rows, columns) in zip(MLP, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True):
                yield f"model.layers.{block}.{part}", rows, columns, self.mlp_bias
        if not self.tie_word_embeddings:
            yield HEAD, self.vocab_size, hidden, False

    def vector_sizes(self) -> Iterator[tuple[str, int]]:
        """Yields (name, size) of every norm in file order."""
        for block in range(self.num_hidden_layers):
            for part in BLOCK_NORMS:
                yield f"model.layers.{block}.{part}", self.hidden_size
        yield FINAL_NORM, self.hidden_size

    def parameters(self) -> int:
        """The number of weights of the dense model, embeddings counted once when tied."""
        linears = sum(rows * columns + (rows if bias else 0) for _, rows, columns, bias in self.linear_sizes())
        return linears + sum(size for _, size in self.vector_sizes())


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything the header says: architecture, layer table, vectors, embedded files, provenance."""

    architecture: Architecture
    linears: tuple[LinearSpec, ...]
    vectors: tuple[VectorSpec, ...]
    files: tuple[FileSpec, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        expected = list(self.architecture.linear_sizes())
        if len(self.linears) != len(expected):
            raise FormatError(f"layers: expected {len(expected)} for this architecture, found {len(self.linears)}")
        for linear, (name, rows, columns, bias) in zip(self.linears, expected, strict=True):
            found = (linear.name, linear.out_features, linear.in_features, linear.bias is not None)
            same = found == (name, rows, columns, bias)
            require(
                same,
                f"layers: expected {name} [{rows}, {columns}] bias {bias}, found {describe(list(found))} {linear.name}",
            )
        sizes = list(self.architecture.vector_sizes())
        require(len(self.vectors) == len(sizes), f"vectors: expected {len(sizes)}, found {len(self.vectors)}")
        for vector, (name, size) in zip(self.vectors, sizes, strict=True):
            same = (vector.name, vector.size) == (name, size)
            require(same, f"vectors: expected {name} [{size}], found {vector.name} [{vector.size}]")
        names = [file.name for file in self.files]
        require(len(set(names)) == len(names), "files: the same file is listed twice")

    def linear(self, name: str) -> LinearSpec:
        """The layer of that name; raises KeyError when there is none."""
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise KeyError(name)

    def largest_bond(self) -> int:
        """The largest χ in the file, 0 where no layer has cores."""
        terms = (term for linear in self.linears for term in linear.terms)
        return max((max(term.bonds) for term in terms if term.kind == "mpo"), default=0)


def full_rank(out_dims: tuple[int, ...], in_dims: tuple[int, ...]) -> tuple[int, ...]:
    """The largest useful bond at each cut of an MPO: the smaller side of the matrix unfolded there."""
    sizes = [o * i for o, i in zip(out_dims, in_dims, strict=True)]
    return tuple(min(math.prod(sizes[:cut]), math.prod(sizes[cut:])) for cut in range(1, len(sizes)))
