"""The architecture configuration of a `.mpo` file and the layers that it requires (SPEC.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from mpo_formats.codec import describe
from mpo_formats.errors import FormatError
from mpo_formats.provenance import Provenance
from mpo_formats.spec import FileSpec, LinearSpec, VectorSpec, require, require_choice, require_sizes
from mpo_formats.spec import full_rank as full_rank

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
MOST_BLOCKS = 4096
MOST_HEADS = 65536
MOST_END_TOKENS = 256
BLOCK_NORMS = ("input_layernorm", "post_attention_layernorm")


Scaling = Literal["default", "linear", "llama3"]
ModelType = Literal["granite", "llama"]


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base `theta`, and linear frequency scaling, that of Llama 3.1, or none."""

    theta: float
    scaling: Scaling
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        require_choice("scaling", self.scaling, get_args(Scaling))
        require(0 < self.theta < math.inf, f"theta: expected more than 0, found {describe(self.theta)}")
        require(1 <= self.factor < math.inf, f"factor: expected at least 1, found {describe(self.factor)}")
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        if self.scaling == "llama3":
            require(0 < low < high < math.inf, "low_freq_factor: expected 0 < low_freq_factor < high_freq_factor")
            require_sizes("original_max_position_embeddings", (length,))
        else:
            unused = (low, high, length) == (0, 0, 0)
            require(
                unused,
                f"low_freq_factor, high_freq_factor, original_max_position_embeddings: "
                f"expected 0 for {self.scaling} scaling",
            )
            require(self.scaling == "linear" or self.factor == 1, "factor: expected 1 for default scaling")


@dataclass(frozen=True, slots=True)
class Architecture:
    """A decoder of the Granite family. A Llama is one with all multipliers 1, and attention_multiplier 1/√head_dim."""

    model_type: ModelType
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
        require_choice("model_type", self.model_type, get_args(ModelType))
        for name in ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings"):
            require_sizes(name, (getattr(self, name),))
        require_sizes("num_hidden_layers", (self.num_hidden_layers,), most=MOST_BLOCKS)
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            require_sizes(name, (getattr(self, name),), most=MOST_HEADS)
        heads, keys = self.num_attention_heads, self.num_key_value_heads
        require(heads % keys == 0, f"num_key_value_heads: {keys} does not divide the {heads} attention heads")
        require(self.head_dim % 2 == 0, f"head_dim: expected an even size for RoPE, found {self.head_dim}")
        epsilon = self.rms_norm_eps
        require(0 < epsilon < 1, f"rms_norm_eps: expected more than 0 and less than 1, found {describe(epsilon)}")
        for name in ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"):
            value = getattr(self, name)
            require(math.isfinite(value), f"{name}: expected a finite number, found {describe(value)}")
        # The runtime divides in single precision, where smaller numbers are 0.
        require(abs(self.logits_scaling) > 2.0**-150, "logits_scaling: expected another number than 0")
        self._check_tokens()

    def _check_tokens(self) -> None:
        count = len(self.eos_token_ids)
        require(count <= MOST_END_TOKENS, f"eos_token_ids: expected at most {MOST_END_TOKENS}, found {count}")
        for name, token in (
            ("bos_token_id", self.bos_token_id),
            ("pad_token_id", self.pad_token_id),
            *(("eos_token_ids", token) for token in self.eos_token_ids),
        ):
            if token is not None:
                require_sizes(name, (token,), least=0, most=self.vocab_size - 1)

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
    """The contents of the header: architecture, layer table, vectors, embedded files, provenance."""

    architecture: Architecture
    linears: tuple[LinearSpec, ...]
    vectors: tuple[VectorSpec, ...]
    files: tuple[FileSpec, ...]
    provenance: Provenance

    def __post_init__(self) -> None:
        linears, vectors = list(self.architecture.linear_sizes()), list(self.architecture.vector_sizes())
        if len(self.linears) != len(linears):
            raise FormatError(f"layers: this architecture has {len(linears)}, found {len(self.linears)}")
        for linear, wanted in zip(self.linears, linears, strict=True):
            found = (linear.name, linear.out_features, linear.in_features, linear.bias is not None)
            if found != wanted:
                raise FormatError(f"layers: expected {_layer_text(*wanted)}, found {_layer_text(*found)}")
        if len(self.vectors) != len(vectors):
            raise FormatError(f"vectors: this architecture has {len(vectors)}, found {len(self.vectors)}")
        for vector, (name, size) in zip(self.vectors, vectors, strict=True):
            if (vector.name, vector.size) != (name, size):
                raise FormatError(f"vectors: expected {name} [{size}], found {vector.name} [{vector.size}]")
        names = [file.name for file in self.files]
        repeated = sorted({name for name in names if names.count(name) > 1})
        require(not repeated, f"files: {', '.join(repeated)} listed twice")

    def linear(self, name: str) -> LinearSpec:
        """The layer of that name; raises KeyError when there is none."""
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise KeyError(name)

    def stored_parameters(self) -> int:
        """Numbers that the file stores: matrix entries, core entries, biases and norms."""
        total = sum(vector.size for vector in self.vectors)
        for linear in self.linears:
            total += linear.out_features if linear.bias else 0
            for term in linear.terms:
                if term.kind == "mpo":
                    total += sum(a * b * c * d for a, b, c, d in term.core_shapes())
                else:
                    total += linear.out_features * linear.in_features
        return total

    def largest_bond(self) -> int:
        """The largest χ in the file, 0 where no layer has cores."""
        terms = (term for linear in self.linears for term in linear.terms)
        return max((max(term.bonds) for term in terms if term.kind == "mpo"), default=0)


def _layer_text(name: str, rows: int, columns: int, bias: bool) -> str:
    return f"{name} [{rows}, {columns}] {'with' if bias else 'without'} bias"
