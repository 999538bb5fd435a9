"""Whether a model fits into the memory that it will run in, before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mpo_formats import Dense, ModelSpec, Mpo
from mpo_formats.layout import content_tensors, term_tensors
from mpo_runtime.memory import require_memory
from mpo_runtime.weights.protocol import Weights

BYTES = {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}
# Tokens of a prompt that are run at once on a GPU, and texts in a step: what activations are counted for; and the largest
# matrix that is written as floats for a prompt (backends/triton).
TOKENS, TEXTS, LARGEST_MATRIX = 1024, 16, 1 << 28


def require_room(weights: Weights, name: str, context: int, options: Mapping[str, Any]) -> None:
    """Refuses a model whose weights and KV cache of one text are more than the memory that is available.

    With `load` map the weights do not count: the system reads them from the file as they are needed, however slowly.

    Args:
        options: device, load, kv_type (not `auto`), activations and chi as for `load`.

    Raises:
        ConfigError: where they do not fit.
    """
    spec = weights.spec
    cache = cache_bytes(spec, context, options["kv_type"])
    remedy = (
        "close other programs, or take a smaller --ctx-size, --kv-type int8, or a file with fewer bits (--target-size)"
    )
    if options["device"] == "cpu":
        mapped = options["load"] == "map"
        size = 0 if mapped else sum(tensor.size for tensor in content_tensors(spec))
        remedy += "" if mapped else "; --load map reads the weights from the disk, slowly"
        require_memory(name, size, cache, remedy)
        return
    from mpo_runtime.backends.reference import free_memory

    remedy = f"end other programs on {options['device']}, or take a smaller --ctx-size, --kv-type int8, a file with fewer bits, "
    remedy += "or --device cpu; several GPUs are used through vLLM (docs/serving.md)"
    exact, chi = options["activations"] == "float", options["chi"]
    size = device_bytes(spec, exact=exact, chi=chi) + working_bytes(spec)
    require_memory(name, size, cache, remedy, free_memory(options["device"]))


def cache_bytes(spec: ModelSpec, context: int, kv_type: str) -> int:
    """Bytes of the KV cache of one text; int8 has a scale of 4 bytes for each position and head."""
    architecture = spec.architecture
    rows = 2 * architecture.num_hidden_layers * architecture.num_key_value_heads * context
    return rows * (BYTES.get(kv_type, 4) * architecture.head_dim + (4 if kv_type == "int8" else 0))


def device_bytes(spec: ModelSpec, *, exact: bool, chi: int | None) -> int:
    """Bytes of the weights on a GPU: integers as they are stored, matrices and cores as bf16 (float32 where exact)."""
    width, total = 4 if exact else 2, 0
    for linear in spec.linears:
        for index, term in enumerate(linear.terms):
            if isinstance(term, Dense):
                total += linear.out_features * linear.in_features * width
            elif isinstance(term, Mpo):
                kept = term if chi is None else term.truncated(chi)
                total += sum(math.prod(shape) for shape in kept.core_shapes()) * width
            else:
                total += sum(
                    tensor.size
                    for tensor in term_tensors(f"{linear.name}.{index}", term, linear.out_features, linear.in_features)
                )
        total += 4 * linear.out_features if linear.bias else 0
        # Each layer has its stored transform in float32; layers share the matrices of Hadamard transforms.
        total += 4 * linear.transform.count * linear.transform.block**2 if linear.transform else 0
    total += sum(4 * block**2 for block in {linear.hadamard for linear in spec.linears})
    return total + sum(4 * vector.size for vector in spec.vectors)


def working_bytes(spec: ModelSpec) -> int:
    """About what a step takes besides: activations of a part of a prompt and logits of a batch in float32, and a matrix."""
    architecture = spec.architecture
    activations = TOKENS * 4 * (10 * architecture.hidden_size + 6 * architecture.intermediate_size)
    matrix = 4 * min(max(rows * columns for _, rows, columns, _ in architecture.linear_sizes()), LARGEST_MATRIX)
    return activations + 3 * TEXTS * 4 * architecture.vocab_size + matrix
