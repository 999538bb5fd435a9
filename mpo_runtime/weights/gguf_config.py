"""Reads a model's architecture from the metadata of a GGUF file; what the forward pass cannot honour is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Architecture, CheckpointError, FormatError, Rope
from mpo_formats.architecture import ModelType
from mpo_runtime.weights.config import special_token
from mpo_runtime.weights.gguf_header import Entry

ROPE_FACTORS = "rope_freqs.weight"
# The architectures by llama.cpp's name; a Mistral is a llama there.
SUPPORTED: dict[str, ModelType] = {name: name for name in ("granite", "llama", "qwen2", "qwen3")}
# Of these, those whose queries and keys llama.cpp rotates otherwise than Hugging Face, so that it reorders their rows.
REORDERED = ("granite", "llama")
# llama.cpp ends a generation at control tokens of these spellings, whatever the metadata name.
END_SPELLINGS = frozenset(
    [
        b"<|eot_id|>",
        b"<|im_end|>",
        b"<|end|>",
        b"<end_of_turn>",
        b"<|endoftext|>",
        b"<|eom_id|>",
        b"<EOT>",
        b"<|end_of_text|>",
    ]
)
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
CONTROL = 3  # the type of a control token


def refuse_other_kinds(metadata: Mapping[str, Any], path: Path) -> None:
    """Raises CheckpointError for a part of a split file and for what is no language model."""
    parts = metadata.get("split.count", 0)
    if (isinstance(parts, int) and parts > 1) or re.search(r"-\d{5}-of-(?!00001)\d{5}$", path.stem):
        raise CheckpointError(
            f"{path}: is one part of a model in several files; join them: llama-gguf-split --merge FIRST-PART WHOLE.gguf"
        )
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"{path}: holds a part of general.type {kind!r}, expected a model; give the model's own file"
        )


class Settings:
    """The metadata of one architecture, `llama.block_count` as `block_count`; messages name the full key."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str, path: Path) -> None:
        self.metadata, self.prefix, self.path = metadata, prefix, path

    def get(self, key: str) -> Any:
        """The value of that key, or None."""
        return self.metadata.get(f"{self.prefix}.{key}")

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error for a value that is missing or of the wrong kind."""
        return CheckpointError(
            f"{self.path}: {self.prefix}.{key}: expected {expected}, found {self.get(key)!r}; download the file again"
        )

    def integer(self, key: str, default: int | None = None) -> int:
        """An integer; given for each block, the one that all have.

        Raises:
            CheckpointError: where there is none and no default, or the blocks differ.
        """
        value = self.get(key)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if value is None and default is not None:
            return default
        if type(value) is not int:
            raise self.wrong(key, "an integer, the same for all blocks")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; the shortest decimal of a float32, so that 1e-5 does not become 9.999999747378752e-06.

        Raises:
            CheckpointError: where there is none and no default.
        """
        value = self.get(key)
        if value is None and default is not None:
            return default
        if type(value) not in (int, float):
            raise self.wrong(key, "a number")
        short = float(str(np.float32(value)))
        return short if np.float32(short) == np.float32(value) and abs(short - value) <= 1e-6 * abs(value) else value


def read_architecture(
    metadata: Mapping[str, Any], tensors: Mapping[str, Entry], read: Callable[[str], NDArray[Any]], path: Path
) -> Architecture:
    """Reads sizes, multipliers, RoPE settings and special tokens; what the forward pass cannot honour is refused by name.

    Raises:
        CheckpointError: naming the key that is missing or unsupported.
    """
    kind = metadata.get("general.architecture")
    if kind not in SUPPORTED:
        raise CheckpointError(
            f"{path}: the architecture {kind!r} is not supported; expected one of {', '.join(SUPPORTED)}; "
            "give another model"
        )
    settings = Settings(metadata, kind, path)
    model_type = SUPPORTED[kind]
    granite = model_type == "granite"
    refuse_unsupported(settings, granite)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{path}: tensor token_embd.weight is missing; the file is incomplete, download it again")
    heads, hidden = settings.integer("attention.head_count"), settings.integer("embedding_length")
    head_dim = settings.integer("attention.key_length", hidden // max(heads, 1))
    if settings.integer("attention.value_length", head_dim) != head_dim:
        raise settings.wrong("attention.value_length", f"{head_dim}, as attention.key_length")
    vocabulary = embedding.shape[0]
    bos, pad = (special_id(metadata, f"{name}_token_id", vocabulary, str(path)) for name in ("bos", "padding"))
    try:
        return Architecture(
            model_type=model_type,
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=settings.integer("feed_forward_length"),
            num_hidden_layers=settings.integer("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=settings.integer("attention.head_count_kv", heads),
            head_dim=head_dim,
            max_position_embeddings=settings.integer("context_length", 2048),
            rms_norm_eps=settings.number("attention.layer_norm_rms_epsilon"),
            rope=read_rope(settings, head_dim, read(ROPE_FACTORS) if ROPE_FACTORS in tensors else None),
            embedding_multiplier=settings.number("embedding_scale", 1.0) if granite else 1.0,
            residual_multiplier=settings.number("residual_scale", 1.0) if granite else 1.0,
            attention_multiplier=settings.number("attention.scale", head_dim**-0.5) if granite else head_dim**-0.5,
            logits_scaling=settings.number("logit_scale", 1.0) if granite else 1.0,
            attention_bias="blk.0.attn_q.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
            tie_word_embeddings="output.weight" not in tensors,
            bos_token_id=bos,
            eos_token_ids=end_of_text_ids(metadata, vocabulary, str(path)),
            pad_token_id=pad,
        )
    except FormatError as error:
        raise CheckpointError(f"{path}: {error}") from None


def special_id(metadata: Mapping[str, Any], key: str, vocabulary: int, where: str) -> int | None:
    """The id of a special token; None where the file names none, or with a note one that the vocabulary does not have."""
    return special_token(metadata.get(f"tokenizer.ggml.{key}"), vocabulary, f"{where}: tokenizer.ggml.{key}")


def end_of_text_ids(metadata: Mapping[str, Any], vocabulary: int, where: str) -> tuple[int, ...]:
    """The ids at which a generation ends: eos, eot and eom of the metadata, then control tokens known by their spelling."""
    named = [special_id(metadata, key, vocabulary, where) for key in END_KEYS]
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    spelled: list[int] = []
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = zip(tokens[:vocabulary], types, strict=False)
        spelled = [index for index, (token, kind) in enumerate(pairs) if kind == CONTROL and token in END_SPELLINGS]
    return tuple(dict.fromkeys([*(token for token in named if token is not None), *spelled]))


def refuse_unsupported(settings: Settings, granite: bool) -> None:
    """Raises CheckpointError for experts, sliding windows, and a Granite without rotary embeddings."""
    if settings.get("expert_count"):
        raise CheckpointError(f"{settings.path}: has experts, which are not supported yet; give another model")
    window = settings.get("attention.sliding_window")
    if window and window < settings.integer("context_length", 0):
        raise CheckpointError(f"{settings.path}: uses sliding-window attention, which is not supported yet")
    if granite and settings.get("rope.scaling.finetuned") is False:
        raise CheckpointError(f"{settings.path}: uses no rotary position embedding, which is not supported yet")


def read_rope(settings: Settings, head_dim: int, factors: NDArray[Any] | None) -> Rope:
    """Reads the RoPE base, and the scaling as llama.cpp stores it: a linear factor, or one divisor for each frequency.

    Raises:
        CheckpointError: for another scaling, or a rotation of a part of each head.
    """
    if settings.integer("rope.dimension_count", head_dim) != head_dim:
        raise settings.wrong(
            "rope.dimension_count", f"{head_dim}, the size of a head: partial rotation is not supported"
        )
    theta = settings.number("rope.freq_base", 10000.0)
    kind = settings.get("rope.scaling.type") or "linear"  # as llama.cpp takes it, with a factor of 1
    if kind not in ("none", "linear"):
        raise CheckpointError(
            f"{settings.path}: RoPE scaling {kind!r} is not supported; expected none, linear or Llama 3.1's"
        )
    # llama.cpp reads a factor of 0 as 1; rope.scale_linear is the older name.
    factor = settings.number("rope.scaling.factor", settings.number("rope.scale_linear", 1.0)) or 1.0
    try:
        scaled = linear_rope(theta, 1.0 if kind == "none" else factor)
        if factors is None or np.all(factors == 1):
            return scaled
        if scaled.scaling != "default":
            raise CheckpointError(
                f"{settings.path}: has a linear RoPE factor beside {ROPE_FACTORS}; give another model"
            )
        original = settings.get("rope.scaling.original_context_length")
        return llama3_rope(theta, head_dim, factors.astype(np.float64), original)
    except (FormatError, ValueError) as error:
        raise CheckpointError(f"{settings.path}: RoPE: {error}") from None


def linear_rope(theta: float, factor: float) -> Rope:
    """The scaling that divides all frequencies by one factor."""
    if factor == 1:
        return Rope(theta, "default", 1.0, 0.0, 0.0, 0)
    return Rope(theta, "linear", factor, 0.0, 0.0, 0)


def llama3_rope(theta: float, head_dim: int, divisors: NDArray[np.float64], original: Any) -> Rope:
    """The settings of Llama 3.1's scaling from the divisor of each frequency [D/2] that they make.

    A divisor is 1 / (s + (1 − s) / factor) with s = (t − low) / (high − low) cut to 0 … 1, and t the turns that a frequency
    makes in the original context. `factor` is the divisor of the slowest; the rest follows from the divisors between. They
    depend on original/(high − low) and low/(high − low) alone, so the original context is taken as the file says, or 8,192
    as all published models have it.

    Raises:
        ValueError: where no settings give these divisors.
    """
    refused = f"{ROPE_FACTORS} holds divisors that no Llama 3.1 scaling gives; give the Hugging Face folder"
    if divisors.shape != (head_dim // 2,) or not np.isfinite(divisors).all() or divisors.min() <= 0:
        raise ValueError(refused)
    factor = float(divisors[-1])
    if np.all(divisors == factor):
        return linear_rope(theta, factor)
    length = original if isinstance(original, int) and original > 0 else 8192
    turns = length / (2 * math.pi) * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    bounds = [(1.0, 4.0)]
    between = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if between.sum() > 1:
        share = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)  # s, linear in the turns
        slope, offset = (float(value) for value in np.polyfit(turns[between], share, 1))
        if slope > 0:
            bounds.append((round(-offset / slope, 4), round((1 - offset) / slope, 4)))
    for low, high in bounds:
        if not 0 < low < high:
            continue
        share = ((turns - low) / (high - low)).clip(0, 1)
        if np.allclose(1 / (share + (1 - share) / factor), divisors, rtol=1e-4, atol=0):
            return Rope(theta, "llama3", factor, low, high, length)
    raise ValueError(refused)
