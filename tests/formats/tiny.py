"""A tiny model that the tests of the format write: one block, any terms, random but repeatable values."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpo_formats import (
    Architecture,
    Certificate,
    Certificates,
    Dense,
    FileSpec,
    LinearSpec,
    ModelSpec,
    Mpo,
    MpoWriter,
    Provenance,
    Quality,
    Quantized,
    Rope,
    Term,
    VectorSpec,
)
from mpo_formats.layout import TensorSpec, content_tensors
from mpo_formats.reader import NUMPY

Arrays = dict[str, np.ndarray[Any, Any]]

TOKENIZER = b'{"model": "a tokenizer"}'
DIGEST = "0123456789abcdef" * 4
QUERY, KEY, VALUE = (f"model.layers.0.self_attn.{part}_proj" for part in "qkv")
GATE, UP, DOWN = (f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up", "down"))

ARCHITECTURE = Architecture(
    model_type="granite",
    vocab_size=8,
    hidden_size=32,
    intermediate_size=128,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope=Rope(10000.0, "default", 1.0, 0.0, 0.0, 0),
    embedding_multiplier=12.0,
    residual_multiplier=0.22,
    attention_multiplier=0.125,
    logits_scaling=4.0,
    attention_bias=False,
    mlp_bias=False,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(0, 1),
    pad_token_id=None,
)

# One file with every kind of term; the other layers are dense bf16. q is [16, 32], k and v [8, 32], gate [128, 32].
TERMS: dict[str, tuple[Term, ...]] = {
    QUERY: (Quantized(5, 16, True), Mpo((4, 4), (8, 4), (6,), "f16", 0)),
    KEY: (Quantized(4, 32, False), Mpo((2, 4, 1), (8, 4, 1), (5, 1), "f32", 0)),
    VALUE: (Dense("f32"),),
    GATE: (Mpo((8, 4, 4), (2, 4, 4), (7, 5), "int8", 16),),
    UP: (Quantized(2, 32, False),),
    DOWN: (Quantized(2, 32, False),),
}


def model(terms: Mapping[str, tuple[Term, ...]] | None = None, **changes: Any) -> ModelSpec:
    """A spec of the tiny architecture with these terms; `changes` go into the architecture."""
    architecture = dataclasses.replace(ARCHITECTURE, **changes)
    chosen = TERMS if terms is None else terms
    return ModelSpec(
        architecture,
        tuple(
            LinearSpec(name, rows, columns, "f32" if bias else None, chosen.get(name, (Dense("bf16"),)))
            for name, rows, columns, bias in architecture.linear_sizes()
        ),
        tuple(VectorSpec(name, size, "bf16") for name, size in architecture.vector_sizes()),
        (FileSpec("tokenizer.json", len(TOKENIZER)),),
        Provenance("tiny", "main", DIGEST, "tests", {"chi": "6"}, None),
    )


def certificates(chi: int | None = None) -> Certificates:
    """One measured certificate."""
    return Certificates((Certificate(chi, Quality("text", DIGEST, 100, 32, 12.5, 0.5, 12.0, 0.01, 0.5, 0.9)),))


def values(tensor: TensorSpec, seed: int = 0) -> np.ndarray[Any, Any]:
    """Random values of a tensor: finite floats around 1, any bytes, or the embedded file."""
    random = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
    if tensor.name == "file.tokenizer.json":
        return np.frombuffer(TOKENIZER, np.uint8)
    if tensor.dtype == "u8":
        return random.integers(0, 256, tensor.shape, np.uint8)
    floats = random.standard_normal(tensor.shape).astype(np.float32)
    if tensor.dtype == "bf16":
        return (floats.view(np.uint32) >> 16).astype(np.uint16)
    return floats.astype(NUMPY[tensor.dtype])


def arrays(spec: ModelSpec, seed: int = 0) -> Arrays:
    """Random values of every tensor of a model."""
    return {tensor.name: values(tensor, seed) for tensor in content_tensors(spec)}


def write(
    path: Path,
    spec: ModelSpec,
    content: Arrays | None = None,
    measure: Callable[[Path], Certificates] | None = None,
) -> Arrays:
    """Writes a model with these values, or random ones; returns the values."""
    given = arrays(spec) if content is None else content
    with MpoWriter(path, spec, force=True) as writer:
        for tensor in writer.pending():
            writer.write(tensor.name, given[tensor.name])
        writer.commit(measure)
    return given
