"""Writes llama.cpp's files of Granite 3.3's sizes with random weights, for benchmarks/decode.py and, with
--tokenizer, benchmarks/serving.py; needs the package gguf.

    python benchmarks/synthetic_gguf.py --size 2b --type Q4_K_M --quantize BUILD/bin/llama-quantize --out q4km.gguf

Which tensor gets which type is asked of llama-quantize itself, on a small model with as many blocks; then every tensor
is filled with random bytes in which only the block scales are set.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray
from synthetic import SIZES, granite

from mpo_formats import Architecture

# Byte offsets of the half-precision scales in a block of each type.
SCALES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}
SCALES |= {
    "IQ2_XXS": (0,),
    "IQ2_XS": (0,),
    "IQ2_S": (0,),
    "IQ3_XXS": (0,),
    "IQ3_S": (0,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
}
SMALL = (256, 512, 8, 2, 32)  # hidden, MLP, heads, key-value heads, head size


def shapes(model: Architecture) -> dict[str, tuple[int, ...]]:
    """llama.cpp's tensor names and their shapes [out, in]."""
    hidden, inner = model.hidden_size, model.intermediate_size
    queries, keys = model.num_attention_heads * model.head_dim, model.num_key_value_heads * model.head_dim
    result: dict[str, tuple[int, ...]] = {"token_embd.weight": (model.vocab_size, hidden)}
    for block in range(model.num_hidden_layers):
        result |= {
            f"blk.{block}.attn_norm.weight": (hidden,),
            f"blk.{block}.attn_q.weight": (queries, hidden),
            f"blk.{block}.attn_k.weight": (keys, hidden),
            f"blk.{block}.attn_v.weight": (keys, hidden),
            f"blk.{block}.attn_output.weight": (hidden, queries),
            f"blk.{block}.ffn_norm.weight": (hidden,),
            f"blk.{block}.ffn_gate.weight": (inner, hidden),
            f"blk.{block}.ffn_up.weight": (inner, hidden),
            f"blk.{block}.ffn_down.weight": (hidden, inner),
        }
    return result | {"output_norm.weight": (hidden,)}


def writer_for(path: Path, model: Architecture, tokenizer: Path | None = None) -> gguf.GGUFWriter:
    """A writer with the model's settings, and the vocabulary of another file or none."""
    writer = gguf.GGUFWriter(path, "granite")
    writer.add_context_length(4096)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_hidden_layers)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_attention_heads)
    writer.add_head_count_kv(model.num_key_value_heads)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope.theta)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_vocab_size(model.vocab_size)
    writer.add_embedding_scale(model.embedding_multiplier)
    writer.add_residual_scale(model.residual_multiplier)
    writer.add_attention_scale(model.attention_multiplier)
    writer.add_logit_scale(model.logits_scaling)
    if tokenizer is None:
        writer.add_tokenizer_model("none")
    else:
        copy_tokenizer(writer, tokenizer, model.vocab_size)
    return writer


def copy_tokenizer(writer: gguf.GGUFWriter, path: Path, vocabulary: int) -> None:
    """Takes over the tokenizer of another file; ids beyond its vocabulary get names that no text has."""
    for field in gguf.GGUFReader(path).fields.values():
        if not field.name.startswith("tokenizer."):
            continue
        value = field.contents()
        if isinstance(value, list) and field.name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            names = field.name.endswith("tokens")
            rest = range(len(value), vocabulary)
            value += [f"[unused{index}]" if names else gguf.TokenType.UNUSED.value for index in rest]
        kinds = [kind for kind in field.types if kind != gguf.GGUFValueType.ARRAY]
        writer.add_key_value(field.name, value, field.types[0], sub_type=kinds[-1] if isinstance(value, list) else None)


def finish(writer: gguf.GGUFWriter) -> None:
    """Writes what was added."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def small_copy(model: Architecture) -> Architecture:
    """As many blocks, far smaller."""
    hidden, inner, heads, keys, head = SMALL
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": 512, "head_dim": head}
    return replace(model, **sizes, num_attention_heads=heads, num_key_value_heads=keys)


def types_of(name: str, model: Architecture, quantize: Path) -> dict[str, gguf.GGMLQuantizationType]:
    """The type that llama-quantize gives each tensor in a file of type `name`."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        dense, packed, importance = (Path(folder) / part for part in ("dense.gguf", "packed.gguf", "importance.gguf"))
        writer, measured = writer_for(dense, model), gguf.GGUFWriter(importance, "imatrix")
        measured.add_type("imatrix")
        measured.add_array("imatrix.datasets", ["random"])
        measured.add_uint32("imatrix.chunk_count", 1)
        measured.add_uint32("imatrix.chunk_size", 512)
        for tensor, shape in shapes(model).items():
            values = random.standard_normal(shape).astype(np.float32)
            writer.add_tensor(tensor, values.astype(np.float16) if len(shape) == 2 else values)
            if len(shape) == 2:
                measured.add_tensor(f"{tensor}.in_sum2", np.ones((1, shape[1]), np.float32))
                measured.add_tensor(f"{tensor}.counts", np.ones((1, 1), np.float32))
        finish(writer)
        finish(measured)
        weighted = [] if name.endswith(("_0", "_1")) else ["--imatrix", str(importance)]
        subprocess.run([str(quantize), *weighted, str(dense), str(packed), name, "2"], check=True, capture_output=True)
        return {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(packed).tensors}


def random_blocks(
    shape: tuple[int, ...], kind: gguf.GGMLQuantizationType, random: np.random.Generator
) -> NDArray[np.uint8]:
    """Random bytes of a matrix in that type, with small block scales."""
    elements, size = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = shape
    pool = random.integers(0, 256, 1 << 22, np.uint8)
    blocks = np.resize(pool, rows * (columns // elements) * size).reshape(-1, size)
    scale = np.array([1e-3 * columns**-0.5], np.float16).view(np.uint8)
    for offset in SCALES[kind.name]:
        blocks[:, offset : offset + 2] = scale
    return blocks.reshape(rows, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="2b")
    parser.add_argument("--type", default="Q4_K_M")
    parser.add_argument("--quantize", type=Path, required=True, help="llama.cpp's llama-quantize")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="a GGUF file whose tokenizer is taken, as servers need one")
    arguments = parser.parse_args()
    model = granite(arguments.size)
    types = types_of(arguments.type, small_copy(model), arguments.quantize)
    random = np.random.default_rng(0)
    writer = writer_for(arguments.out, model, arguments.tokenizer)
    for tensor, shape in shapes(model).items():
        if len(shape) == 1:
            writer.add_tensor(tensor, np.ones(shape, np.float32))
            continue
        writer.add_tensor(tensor, random_blocks(shape, types[tensor], random), raw_dtype=types[tensor])
    finish(writer)
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e9:.3f} GB")


if __name__ == "__main__":
    main()
