"""`mpo-export to-gguf`: a file of integers as a GGUF file for llama.cpp, and what the rounding to its types costs."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mpo_exporter.convert.families import require_expressible
from mpo_exporter.convert.gguf_blocks import Integers, choose_type, packed
from mpo_exporter.convert.gguf_text import add_tokenizer
from mpo_formats import Architecture, ConfigError, Dense, LinearSpec, MpoFile, OutputError, Quantized, Rope
from mpo_formats.layout import PLANES
from mpo_formats.packing import implicit_zero, unpack
from mpo_runtime.layers.linear import float_tensor, load_linear
from mpo_runtime.loading import load_network, read_text_files
from mpo_runtime.measure import Comparison, compare
from mpo_runtime.rope import inverse_frequencies
from mpo_runtime.text.token_text import BUILT_IN_TEXT, read_tokens
from mpo_runtime.weights.gguf import Gguf, import_gguf, stored_name
from mpo_runtime.weights.gguf_config import REORDERED

# llama.cpp's name of each family's architecture.
NAMES = {"granite": "granite", "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
FLOATS = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


@dataclass(frozen=True, slots=True)
class GgufRequest:
    """What `to-gguf` writes, and how many tokens of the built-in text it measures on; 0 measures nothing."""

    file: Path
    out: Path
    measure_tokens: int = 2048
    force: bool = False

    def __post_init__(self) -> None:
        if self.measure_tokens < 0:
            raise ConfigError(f"--measure-tokens {self.measure_tokens}: expected 0 or more")


def write_gguf(request: GgufRequest) -> list[str]:
    """Writes the file; returns what there is to say about it, a sentence each.

    Raises:
        FormatError: for a damaged file.
        ConfigError: for an architecture, a layer or a tokenizer that llama.cpp cannot hold, named.
        OutputError: for an existing file, without `force`.
    """
    package = import_gguf(request.out)
    with MpoFile(request.file) as file:
        require_expressible(file.spec.architecture, file.name, "a GGUF file", NAMES, windows=False)
        require_settings(file)
        require_integers(file)
        if request.out.exists() and not request.force:
            raise OutputError(f"{request.out}: exists already; give another --out, or --force")
        file.verify()
        partial = request.out.with_name(f".{request.out.name[:64]}.{secrets.token_hex(4)}.partial")
        try:
            counts = write_tensors(package, file, partial)
            notes = [
                f"{count} matrices as {kind}, {'exactly' if exact else 'rounded'}"
                for (kind, exact), count in sorted(counts.items())
            ]
            if request.measure_tokens:
                notes.append(loss_text(file, measured(file, partial, request.measure_tokens)))
            partial.replace(request.out)
        finally:
            partial.unlink(missing_ok=True)
    return [*notes, f"wrote {request.out}, {request.out.stat().st_size:,} bytes"]


def require_settings(file: MpoFile) -> None:
    """Raises ConfigError for settings that llama.cpp does not read for an architecture."""
    architecture = file.spec.architecture
    kind, scaling = NAMES[architecture.model_type], architecture.rope.scaling
    if scaling == "yarn" or (scaling == "llama3" and kind not in REORDERED):
        raise ConfigError(
            f"{file.name}: RoPE scaling {scaling} cannot be written as a GGUF file of the architecture {kind} yet; use to-hf"
        )
    if kind == "qwen3" and architecture.attention_bias:
        raise ConfigError(f"{file.name}: attention_bias is True: a qwen3 in a GGUF file has none; use to-hf")


def require_integers(file: MpoFile) -> None:
    """Raises ConfigError for a layer with cores or several terms."""
    for linear in file.spec.linears:
        if len(linear.terms) > 1 or not isinstance(linear.terms[0], Dense | Quantized):
            raise ConfigError(
                f"{file.name}: {linear.name} has cores or several terms, which llama.cpp cannot hold; "
                "export with a plan of integers alone, such as --plan int4"
            )


def write_tensors(package: Any, file: MpoFile, path: Path) -> Counter[tuple[str, bool]]:
    """Writes metadata and tensors; returns how many matrices there are of each type, and whether these are exact."""
    architecture = file.spec.architecture
    writer = package.GGUFWriter(path, NAMES[architecture.model_type])
    counts: Counter[tuple[str, bool]] = Counter()
    try:
        add_architecture(writer, package, architecture, file.spec.provenance.source)
        add_tokenizer(writer, file, architecture)
        if architecture.rope.scaling == "llama3":
            divisors = rope_divisors(architecture)
            writer.add_tensor("rope_freqs.weight", divisors, raw_dtype=package.GGMLQuantizationType.F32)
        for linear in file.spec.linears:
            data, kind, exact = matrix(package, file, linear)
            counts[kind, exact] += 1
            known = package.GGMLQuantizationType[kind]
            writer.add_tensor(
                stored_name(f"{linear.name}.weight"), reordered(data, linear, architecture), raw_dtype=known
            )
            if linear.bias is not None:
                bias = float_tensor(file, f"{linear.name}.bias").numpy()
                writer.add_tensor(stored_name(f"{linear.name}.bias"), reordered(bias, linear, architecture))
        for vector in file.spec.vectors:
            name = f"{vector.name}.weight"
            writer.add_tensor(stored_name(name), float_tensor(file, name).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return counts


def add_architecture(writer: Any, package: Any, architecture: Architecture, name: str) -> None:
    """Adds the metadata of an architecture."""
    writer.add_name(name)
    writer.add_block_count(architecture.num_hidden_layers)
    writer.add_context_length(architecture.max_position_embeddings)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_feed_forward_length(architecture.intermediate_size)
    writer.add_head_count(architecture.num_attention_heads)
    writer.add_head_count_kv(architecture.num_key_value_heads)
    writer.add_layer_norm_rms_eps(architecture.rms_norm_eps)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_vocab_size(architecture.vocab_size)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(architecture.rope.theta)
    writer.add_quantization_version(package.GGML_QUANT_VERSION)
    if architecture.rope.scaling == "linear":
        writer.add_rope_scaling_type(package.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(architecture.rope.factor)
    if architecture.model_type == "granite":
        writer.add_attention_scale(architecture.attention_multiplier)
        writer.add_embedding_scale(architecture.embedding_multiplier)
        writer.add_residual_scale(architecture.residual_multiplier)
        writer.add_logit_scale(architecture.logits_scaling)


def rope_divisors(architecture: Architecture) -> NDArray[np.float32]:
    """What Llama 3.1's scaling divides each frequency [D/2] by."""
    rope, size = architecture.rope, architecture.head_dim
    plain = Rope(rope.theta, "default", 1.0, 0.0, 0.0, 0)
    found: NDArray[np.float32] = inverse_frequencies(plain, size) / inverse_frequencies(rope, size)
    return found


def matrix(package: Any, file: MpoFile, linear: LinearSpec) -> tuple[NDArray[Any], str, bool]:
    """A layer's matrix as the bytes or numbers of a type of llama.cpp, the type's name, and whether it holds it exactly."""
    term = linear.terms[0]
    if linear.transformed:  # the values are no integers any more once the transform is undone
        values = load_linear(file, linear, chi=None, held=False, device=torch.device("cpu")).weight().numpy()
        kind = "F32"
        if isinstance(term, Quantized) and linear.in_features % 32 == 0:
            kind = "Q5_1" if term.bits <= 4 else "Q8_0"
        return package.quantize(values, package.GGMLQuantizationType[kind]), kind, kind == "F32"
    if isinstance(term, Dense):
        raw = file.array(f"{linear.name}.0.weight")
        return (np.ascontiguousarray(raw).view(np.uint8) if term.dtype == "bf16" else raw), FLOATS[term.dtype], True
    integers = read_integers(file, linear)
    kind, exact = choose_type(integers)
    if kind == "F16" or integers.group % 32 or (integers.zeros and integers.bits > 5):
        return package.quantize(integers.values(), package.GGMLQuantizationType[kind]), kind, exact
    return packed(integers, kind), kind, exact


def read_integers(file: MpoFile, linear: LinearSpec) -> Integers:
    """The integers of a layer with one Quantized term."""
    term = linear.terms[0]
    if not isinstance(term, Quantized):
        raise TypeError(f"{linear.name}: expected integers")
    prefix = f"{linear.name}.0"
    scale = file.array(f"{prefix}.scale").astype(np.float32)
    zero = (
        file.array(f"{prefix}.zero").astype(np.float32) if term.zeros else np.full_like(scale, implicit_zero(term.bits))
    )
    codes = unpack([file.array(f"{prefix}.q{plane}") for plane in PLANES[term.bits]], term.bits)
    return Integers(codes.astype(np.int16), scale, zero, term.zeros, term.bits)


def reordered(array: NDArray[Any], linear: LinearSpec, architecture: Architecture) -> NDArray[Any]:
    """Rows in llama.cpp's order: in queries and keys of some architectures, row j of a head beside row j + D/2."""
    heads = {"q_proj": architecture.num_attention_heads, "k_proj": architecture.num_key_value_heads}
    count = heads.get(linear.name.rpartition(".")[2])
    if count is None or NAMES[architecture.model_type] not in REORDERED:
        return np.ascontiguousarray(array)
    halves = array.reshape(count, 2, -1, *array.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)


def measured(file: MpoFile, path: Path, tokens: int) -> Comparison | None:
    """The written file beside the `.mpo` file on the built-in text; None without a tokenizer."""
    tokenizer, template = read_text_files(file)
    if tokenizer is None:
        return None
    text = read_tokens(BUILT_IN_TEXT, tokenizer, template).first(tokens)
    written = Gguf(path, kept=1 << 30)
    try:
        theirs = load_network(written, backend="reference")
        return compare(theirs, load_network(file, backend="reference"), text.ids)
    finally:
        written.close()


def loss_text(file: MpoFile, found: Comparison | None) -> str:
    """What the rounding costs, in words."""
    if found is None:
        return f"the loss of rounding was not measured: {file.name} has no tokenizer.json"
    return (
        f"loss of rounding: KL {found.kl_mean:.3g} nats per token beside {file.name}, same most likely token "
        f"{100 * found.same_top1:.2f} %, perplexity {found.reference.perplexity:.4g} -> {found.model.perplexity:.4g} "
        f"({found.model.tokens:,} tokens)"
    )
