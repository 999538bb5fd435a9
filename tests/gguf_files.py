"""Writes GGUF files for tests as llama.cpp's converter does, from a Hugging Face folder or from parts of one."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import load_file

Tensors = dict[str, NDArray[Any]]
Change = Callable[[gguf.GGUFWriter], None]
SCALES = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
}
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
}


def stored_name(name: str) -> str:
    """llama.cpp's name of a tensor of transformers."""
    for ours, theirs in (
        ("model.embed_tokens.", "token_embd."),
        ("lm_head.", "output."),
        ("model.norm.", "output_norm."),
    ):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    _, _, block, *inner, part = name.split(".")
    return f"blk.{block}.{NAMES['.'.join(inner)]}.{part}"


def permuted(array: NDArray[Any], heads: int) -> NDArray[Any]:
    """Rows in llama.cpp's order, one head and one row at a time: row 2j of a head is its row j, row 2j + 1 its row j + D/2."""
    size = len(array) // heads
    order = []
    for head in range(heads):
        for row in range(size):
            order.append(head * size + row // 2 + (row % 2) * (size // 2))
    return array[order]


def as_stored(name: str, array: NDArray[Any], config: Mapping[str, Any]) -> NDArray[Any]:
    """A tensor with its rows in llama.cpp's order."""
    heads = config["num_attention_heads"]
    if config["model_type"].startswith("qwen"):
        return array
    if ".q_proj." in name:
        return permuted(array, heads)
    return permuted(array, config.get("num_key_value_heads") or heads) if ".k_proj." in name else array


def rope_divisors(config: Mapping[str, Any], size: int) -> NDArray[np.float32] | None:
    """The divisors of rope_freqs.weight, frequency by frequency, as the converter computes them for Llama 3.1's scaling."""
    scaling = rope_settings(config)
    if scaling.get("rope_type") != "llama3":
        return None
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    length = scaling["original_max_position_embeddings"]
    found = []
    for pair in range(size // 2):
        wavelength = 2 * math.pi * scaling["rope_theta"] ** (2 * pair / size)
        if wavelength < length / high:
            found.append(1.0)
        elif wavelength > length / low:
            found.append(factor)
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The RoPE settings of a config.json in either spelling."""
    settings = {"rope_theta": config.get("rope_theta", 10000.0)}
    for key in ("rope_scaling", "rope_parameters"):
        settings |= config.get(key) or {}
    return settings


def write_gguf(
    path: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    *,
    kinds: Mapping[str, Kind] | Kind = Kind.F32,
    tokenizer: Change | None = None,
    change: Change | None = None,
    stored: Mapping[str, tuple[NDArray[Any], Kind]] | None = None,
) -> Path:
    """Writes a model; `kinds` is the type of all matrices or of each by name, where the package can quantise to it.

    stored: tensors by llama.cpp's names that replace or join those of `tensors`; change: adds metadata at the end.
    """
    writer = gguf.GGUFWriter(path, config["model_type"])
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    size = config.get("head_dim") or hidden // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(size)
        writer.add_value_length(size)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(size)
    rope = rope_settings(config)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type", rope.get("type")) == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    for ours, theirs in SCALES.items():
        if config["model_type"] == "granite":
            getattr(writer, f"add_{theirs}")(config.get(ours, 1.0))
    if tokenizer:
        tokenizer(writer)
    if change:
        change(writer)
    own = dict(stored or {})
    divisors = rope_divisors(config, size)
    if divisors is not None:
        own.setdefault("rope_freqs.weight", (divisors, Kind.F32))
    for name, array in tensors.items():
        plain = array.ndim == 1
        kind = Kind.F32 if plain else kinds if isinstance(kinds, Kind) else kinds.get(name, Kind.F32)
        own.setdefault(stored_name(name), (gguf.quantize(as_stored(name, array, config), kind), kind))
    for name, (array, kind) in own.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(
    folder: Path, path: Path, kinds: Mapping[str, Kind] | Kind = Kind.F32, change: Change | None = None
) -> Path:
    """Converts a Hugging Face folder whose tokenizer is a SentencePiece BPE, such as the shared stories260K."""
    config = json.loads((folder / "config.json").read_text())
    tensors = dict(load_file(folder / "model.safetensors"))
    document = json.loads((folder / "tokenizer.json").read_text())
    return write_gguf(path, config, tensors, kinds=kinds, tokenizer=sentencepiece(document), change=change)


def sentencepiece(document: Mapping[str, Any]) -> Change:
    """Metadata of a SentencePiece BPE from its tokenizer.json: a token's score is the rank of its first merge."""
    vocabulary, model = document["model"]["vocab"], document["model"]
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token["content"] for token in document["added_tokens"]}
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        ranks.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), rank)
    types, scores = [], []
    for token in tokens:
        byte = token.startswith("<0x") and len(token) == 6
        types.append(2 if token == model["unk_token"] else 3 if token in special else 6 if byte else 1)
        scores.append(-float(ranks[token]) if token in ranks else -1e6)

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        for name, token in (("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>")):
            getattr(writer, f"add_{name}_token_id")(vocabulary[token])

    return add


def byte_level(
    tokens: Sequence[str],
    merges: Sequence[tuple[str, str]],
    pre: str,
    control: Sequence[str] = (),
    own: Sequence[str] = (),
) -> Change:
    """Metadata of a byte-level BPE; `control` tokens and the user's `own` come after the others."""

    def add(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list([*tokens, *control, *own])
        writer.add_token_types([1] * len(tokens) + [3] * len(control) + [4] * len(own))
        writer.add_token_merges([" ".join(merge) for merge in merges])

    return add
