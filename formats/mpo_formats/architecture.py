"""The architecture configuration of a `.mpo` file and the layers that it requires (SPEC.md, section 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

from mpo_formats.codec import VERSIONS, describe
from mpo_formats.errors import FormatError
from mpo_formats.provenance import Provenance
from mpo_formats.spec import FileSpec, LinearSpec, Transform, VectorSpec, require, require_choice, require_sizes
from mpo_formats.spec import full_rank as full_rank

EMBEDDING = "model.embed_tokens"
HEAD = "lm_head"
FINAL_NORM = "model.norm"
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
POSITIONS = "model.embed_positions"
MOST_BLOCKS = 4096
MOST_HEADS = 65536
MOST_END_TOKENS = 256

Scaling = Literal["default", "linear", "llama3", "yarn"]
ModelType = Literal["granite", "llama", "mistral", "qwen2", "qwen3", "granitemoehybrid", "gpt_neo"]
# What version 0.2 of the format can say.
OLD_SCALINGS = ("default", "linear", "llama3")
OLD_MODEL_TYPES = ("granite", "llama")
# The attention matrices that attention_bias is about, where that is not all of them.
BIASED = {"qwen2": ATTENTION[:3], "gpt_neo": ATTENTION[3:]}


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding: base `theta`, and linear frequency scaling, that of Llama 3.1, YaRN, or none.

    For YaRN `low_freq_factor` and `high_freq_factor` are what its paper calls β: frequencies that turn more often than `high`
    in the original context stay, those that turn less often than `low` are divided by `factor`.
    """

    theta: float
    scaling: Scaling = field(metadata={"choices": {"0.2": OLD_SCALINGS}})
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    attention_factor: float = field(default=1.0, metadata={"since": "0.3"})

    def __post_init__(self) -> None:
        require_choice("scaling", self.scaling, get_args(Scaling))
        require(0 < self.theta < math.inf, f"theta: expected more than 0, found {describe(self.theta)}")
        require(1 <= self.factor < math.inf, f"factor: expected at least 1, found {describe(self.factor)}")
        low, high, length = self.low_freq_factor, self.high_freq_factor, self.original_max_position_embeddings
        scale = self.attention_factor
        require(0 < scale < math.inf, f"attention_factor: expected more than 0, found {describe(scale)}")
        yarn = self.scaling == "yarn"
        require(yarn or scale == 1, f"attention_factor: expected 1 for {self.scaling} scaling")
        if yarn or self.scaling == "llama3":
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
    """A decoder of the Granite family. A Llama is one with all multipliers 1, and attention_multiplier 1/√head_dim.

    `windows` are the numbers of positions, its own included, that a token attends to in block 0, 1, …, repeated to the last
    block; 0 stands for all before it, and so does an empty `windows`.
    """

    model_type: ModelType = field(metadata={"choices": {"0.2": OLD_MODEL_TYPES}})
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
    windows: tuple[int, ...] = field(default=(), metadata={"since": "0.3"})

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
        require_sizes("windows", self.windows, least=0)
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

    @property
    def version(self) -> str:
        """The oldest version of the format that can say this."""
        old = self.model_type in OLD_MODEL_TYPES and self.rope.scaling in OLD_SCALINGS and not self.windows
        return VERSIONS[0] if old else VERSIONS[1]

    @property
    def head_norms(self) -> bool:
        """Whether each head's query and key are normed before they are rotated, with a weight that all heads share."""
        return self.model_type == "qwen3"

    @property
    def layer_norms(self) -> bool:
        """Whether norms subtract the mean and add a bias."""
        return self.model_type == "gpt_neo"

    @property
    def learned_positions(self) -> bool:
        """Whether positions are vectors that are added to the embedding; queries and keys are not rotated then."""
        return self.model_type == "gpt_neo"

    @property
    def gated(self) -> bool:
        """Whether the MLP is gated; else it is one matrix, GELU in its approximation by tanh, and another matrix."""
        return self.model_type != "gpt_neo"

    @property
    def attention_scale(self) -> float:
        """What the products of queries and keys are multiplied with; YaRN multiplies both by its attention factor."""
        return self.attention_multiplier * self.rope.attention_factor**2

    def window(self, block: int) -> int:
        """How many positions, its own included, a token of the block attends to; 0 for all before it."""
        return self.windows[block % len(self.windows)] if self.windows else 0

    def linear_sizes(self) -> Iterator[tuple[str, int, int, bool]]:
        """Yields (name, out, in, has bias) of every linear in file order; the embedding is the first of them."""
        hidden, inner = self.hidden_size, self.intermediate_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        yield EMBEDDING, self.vocab_size, hidden, False
        sizes = ((queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries))
        biased = BIASED.get(self.model_type, ATTENTION) if self.attention_bias else ()
        mlp = tuple(zip(MLP, ((inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
        for block in range(self.num_hidden_layers):
            for part, (rows, columns) in zip(ATTENTION, sizes, strict=True):
                yield f"model.layers.{block}.{part}", rows, columns, part in biased
            for part, (rows, columns) in mlp if self.gated else mlp[1:]:
                yield f"model.layers.{block}.{part}", rows, columns, self.mlp_bias
        if not self.tie_word_embeddings:
            yield HEAD, self.vocab_size, hidden, False

    def vector_sizes(self) -> Iterator[tuple[str, int]]:
        """Yields (name, size) of every vector in file order: norms, their biases, and the positions, row after row."""
        hidden, parts = self.hidden_size, ("", "_bias") if self.layer_norms else ("",)
        if self.learned_positions:
            yield POSITIONS, self.max_position_embeddings * hidden
        for block in range(self.num_hidden_layers):
            name = f"model.layers.{block}"
            yield from ((f"{name}.input_layernorm{part}", hidden) for part in parts)
            if self.head_norms:
                yield from ((f"{name}.self_attn.{part}_norm", self.head_dim) for part in "qk")
            yield from ((f"{name}.post_attention_layernorm{part}", hidden) for part in parts)
        yield from ((f"{FINAL_NORM}{part}", hidden) for part in parts)

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
        known, taken = {linear.name for linear in self.linears}, dict[str, Transform]()
        for linear in self.linears:
            if (one := linear.transform) is None:
                continue
            if one.name not in known:
                raise FormatError(
                    f"layers: {linear.name}: transform: expected the name of a layer, found {describe(one.name)}"
                )
            if taken.setdefault(one.name, one) != one:
                raise FormatError(f"layers: {linear.name}: transform: {one.name} has another form in a layer before")

    @property
    def version(self) -> str:
        """The oldest version of the format that can say this."""
        if any(linear.transform is not None for linear in self.linears):
            return VERSIONS[3]
        return VERSIONS[2] if any(linear.hadamard for linear in self.linears) else self.architecture.version

    def transforms(self) -> tuple[Transform, ...]:
        """The stored transforms of the layers' inputs, each once, in the order of their first use."""
        return tuple(dict.fromkeys(linear.transform for linear in self.linears if linear.transform is not None))

    def linear(self, name: str) -> LinearSpec:
        """The layer of that name; raises KeyError when there is none."""
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise KeyError(name)

    def stored_parameters(self) -> int:
        """Numbers that the file stores: entries of matrices, cores and transforms, biases and norms."""
        total = sum(vector.size for vector in self.vectors)
        total += sum(one.count * one.block**2 for one in self.transforms())
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
