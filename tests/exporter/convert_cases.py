"""`.mpo` files of any terms with values of a trained model's size, for the tests of the converters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpo_formats import Quantized, Term
from mpo_formats.layout import TensorSpec, content_tensors
from tests.formats import tiny


def value(tensor: TensorSpec, seed: int, terms: Mapping[str, tuple[Term, ...]]) -> np.ndarray[Any, Any]:
    """Random values: matrices keep the size of what they multiply, zeros are whole numbers in the range of the codes."""
    random = np.random.default_rng([seed, len(tensor.name), sum(tensor.name.encode())])
    plain = tiny.values(tensor, seed)
    layer, _, part = tensor.name.rpartition(".")
    name = layer.rpartition(".")[0]
    if part == "zero":
        term = terms[name][0]
        assert isinstance(term, Quantized)
        return random.integers(0, 1 << term.bits, tensor.shape).astype(np.float16)
    if part == "scale":
        bits = max((term.bits for term in terms.get(name, ()) if isinstance(term, Quantized)), default=8)
        return (plain * (0.5 / (1 << bits) / math.sqrt(tensor.shape[0]))).astype(np.float16)
    if part == "weight" and len(tensor.shape) == 1:
        ones = (1 + 0.2 * random.standard_normal(tensor.shape)).astype(np.float32)
        return (ones.view(np.uint32) >> 16).astype(np.uint16)
    return plain


def write(path: Path, terms: Mapping[str, tuple[Term, ...]], seed: int = 0, **changes: Any) -> Path:
    """Writes a tiny model with these terms; layers that are not named are dense. Returns the path.

    changes: of the architecture; files=() leaves the tokenizer out.
    """
    files = changes.pop("files", None)
    spec = tiny.model(terms, **changes)
    spec = spec if files is None else dataclasses.replace(spec, files=files)
    tiny.write(path, spec, {tensor.name: value(tensor, seed, terms) for tensor in content_tensors(spec)})
    return path


def llama(**changes: Any) -> dict[str, Any]:
    """Changes that make the tiny architecture a llama."""
    multipliers = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
    return {"model_type": "llama", "attention_multiplier": 8**-0.5, **multipliers, **changes}
