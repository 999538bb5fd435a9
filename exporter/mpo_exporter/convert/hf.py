"""`mpo-export to-hf`: a Hugging Face folder, with the integers as compressed-tensors keep them, or with dense matrices."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_exporter.convert.families import model_config, require_expressible
from mpo_exporter.convert.folder import FolderWriter
from mpo_formats import ConfigError, Dense, LinearSpec, MpoFile, Quantized
from mpo_formats.architecture import EMBEDDING, HEAD, POSITIONS
from mpo_formats.layout import PLANES
from mpo_formats.packing import unpack
from mpo_runtime.layers.linear import float_tensor, load_linear
from mpo_runtime.weights.names import checkpoint_name

FORMATS = ("compressed-tensors", "dense")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Servers such as vLLM run these as one matrix, which takes one width and one group for all.
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)


@dataclass(frozen=True, slots=True)
class HfRequest:
    """What `to-hf` writes.

    Args:
        form: `compressed-tensors` or `dense`.
        dtype: the type of everything that is not stored as integers: bf16, f16 or f32.
        least_bits: integers of fewer bits are stored in so many, exactly: some programs take 4 only.

    Raises:
        ConfigError: for another form, type or width.
    """

    file: Path
    out: Path
    form: str = "compressed-tensors"
    dtype: str = "bf16"
    least_bits: int = 2
    force: bool = False

    def __post_init__(self) -> None:
        for option, value, choices in (("--as", self.form, FORMATS), ("--dtype", self.dtype, tuple(DTYPES))):
            if value not in choices:
                raise ConfigError(f"{option} {value}: expected one of {', '.join(choices)}")
        if not 2 <= self.least_bits <= 8:
            raise ConfigError(f"--least-bits {self.least_bits}: expected 2 to 8")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a layer's integers are stored: signed codes of `bits` bits, a scale and perhaps a whole zero for each group."""

    bits: int
    group: int
    zeros: bool

    def joined(self, other: Scheme) -> Scheme:
        """The narrowest scheme that holds both exactly: more bits, smaller groups, zeros where either has them."""
        return Scheme(max(self.bits, other.bits), min(self.group, other.group), self.zeros or other.zeros)


def write_hf(request: HfRequest) -> list[str]:
    """Writes the folder; returns what there is to say about it, a sentence each.

    Raises:
        FormatError: for a damaged file.
        ConfigError: for what the format cannot hold, named.
    """
    with MpoFile(request.file) as file:
        architecture = file.spec.architecture
        require_expressible(architecture, file.name, "a Hugging Face folder")
        writer = FolderWriter(request.out, force=request.force)
        file.verify()
        config = model_config(architecture, str(DTYPES[request.dtype]).removeprefix("torch."))
        modules, schemes = stored_modules(file), {}
        notes = []
        if request.form == "compressed-tensors":
            own = {linear.name: scheme for linear in file.spec.linears if (scheme := own_scheme(file, linear))}
            require_integers(file, own)
            wanted = fused_schemes(own, request.least_bits)
            schemes = {
                name: wanted[parts[0].name]
                for name, parts in modules.items()
                if all(part.name in wanted for part in parts)
            }
            config["quantization_config"] = quantization_config(schemes, modules)
            notes = packing_notes(file, own, wanted)
        with writer:
            for name, parts in modules.items():
                write_module(writer, file, name, parts, schemes.get(name), request.dtype)
            for vector in file.spec.vectors:
                name = checkpoint_name(architecture.model_type, f"{vector.name}.weight")
                values = converted(float_tensor(file, f"{vector.name}.weight"), name, request.dtype)
                writer.tensor(name, values.view(-1, architecture.hidden_size) if vector.name == POSITIONS else values)
            writer.text_files(file, config)
    return [*notes, f"wrote {request.out}, {writer.total:,} bytes of tensors"]


def stored_modules(file: MpoFile) -> dict[str, list[LinearSpec]]:
    """The modules of the folder with a matrix, by name and in order, and the layers whose rows each holds one after another."""
    modules: dict[str, list[LinearSpec]] = {}
    for linear in file.spec.linears:
        name = checkpoint_name(file.spec.architecture.model_type, f"{linear.name}.weight").removesuffix(".weight")
        modules.setdefault(name, []).append(linear)
    return modules


def write_module(
    writer: FolderWriter, file: MpoFile, name: str, parts: list[LinearSpec], scheme: Scheme | None, dtype: str
) -> None:
    """Writes a module: packed in its scheme, or as a matrix where it has none."""
    if scheme:
        for part, tensor in packed_tensors(file, parts, scheme).items():
            writer.tensor(f"{name}.{part}", tensor)
    else:
        device = torch.device("cpu")
        weight = torch.cat([load_linear(file, one, chi=None, held=False, device=device).weight() for one in parts])
        writer.tensor(f"{name}.weight", converted(weight, name, dtype))
    biases = [float_tensor(file, f"{one.name}.bias") for one in parts if one.bias is not None]
    if biases:
        writer.tensor(f"{name}.bias", converted(torch.cat(biases), name, dtype))


def converted(values: Tensor, name: str, dtype: str) -> Tensor:
    """The values in another type; raises ConfigError where one becomes infinite."""
    result = values.to(DTYPES[dtype])
    if not torch.isfinite(result).all():
        raise ConfigError(f"{name}: holds values that {dtype} cannot; give --dtype bf16 or f32")
    return result


def own_scheme(file: MpoFile, linear: LinearSpec) -> Scheme | None:
    """The scheme that holds a layer exactly; None for a dense one and for the tables, which are stored as floats.

    Two bits without stored zeros stand for -1.5, -0.5, 0.5 and 1.5 scales: -3, -1, 1 and 3 halves of it, which take 3 bits.

    Raises:
        ConfigError: for cores, several terms, transforms and fractional zeros, which compressed-tensors cannot hold.
    """
    if linear.name in (EMBEDDING, HEAD):
        return None
    term = linear.terms[0]
    if len(linear.terms) > 1 or not isinstance(term, Dense | Quantized):
        raise refused(file, linear, "has cores or several terms")
    if isinstance(term, Dense):
        return None
    if linear.transformed:
        kind = "Hadamard" if linear.hadamard else "stored"
        raise refused(file, linear, f"takes a {kind} transform of its input (export with --transforms none)")
    if not term.zeros:
        return Scheme(max(term.bits, 3), term.group, False)
    zero = file.array(f"{linear.name}.0.zero").astype(np.float32)
    if not np.array_equal(zero, np.round(zero)) or zero.min() < 0 or zero.max() >= 1 << term.bits:
        raise refused(file, linear, f"has zeros that are no whole numbers from 0 to {(1 << term.bits) - 1}")
    return Scheme(term.bits, term.group, True)


def refused(file: MpoFile, linear: LinearSpec, why: str) -> ConfigError:
    """The error for a layer that compressed-tensors cannot hold."""
    return ConfigError(
        f"{file.name}: {linear.name} {why}, which compressed-tensors cannot hold; "
        "give --as dense, or use mpo-export to-vllm"
    )


def require_integers(file: MpoFile, schemes: Mapping[str, Scheme]) -> None:
    """Raises ConfigError for a file in which no layer but the tables has integers."""
    if not schemes:
        raise ConfigError(f"{file.name}: no layer has integers; give --as dense")


def fused_schemes(schemes: Mapping[str, Scheme], least_bits: int = 2) -> dict[str, Scheme]:
    """The schemes, with one for all of q, k and v and one for gate and up of a block, where all of them have integers."""
    schemes = {name: replace(scheme, bits=max(scheme.bits, least_bits)) for name, scheme in schemes.items()}
    result = dict(schemes)
    for name in schemes:
        block, _, first = name.rpartition(".layers.")[2].partition(".")
        for parts in FUSED:
            names = [f"model.layers.{block}.{part}" for part in parts]
            if first == parts[0] and all(other in schemes for other in names):
                together = schemes[names[0]]
                for other in names[1:]:
                    together = together.joined(schemes[other])
                result |= dict.fromkeys(names, together)
    return result


def packing_notes(file: MpoFile, own: Mapping[str, Scheme], schemes: Mapping[str, Scheme]) -> list[str]:
    """What became larger than in the file, and why."""
    notes = []
    tables = [linear.name for linear in file.spec.linears if linear.name in (EMBEDDING, HEAD)]
    if any(not isinstance(file.spec.linear(name).terms[0], Dense) for name in tables):
        notes.append(f"{' and '.join(tables)} stored as floats: compressed-tensors are for linear layers")
    widened = [
        name
        for name, scheme in schemes.items()
        if scheme != own[name] or scheme.bits != getattr(file.spec.linear(name).terms[0], "bits", scheme.bits)
    ]
    if widened:
        notes.append(f"{len(widened)} layers take more bits or scales than in the file, exactly, such as {widened[0]}")
    zeros = [name for name, scheme in schemes.items() if scheme.zeros]
    if zeros:
        # compressed-tensors 0.20.1 makes parameters of another shape for packed zeros when transformers loads them.
        notes.append(
            f"{len(zeros)} layers have zeros: vLLM reads them, transformers 5.23 does not (use --as dense there)"
        )
    return notes


def packed_tensors(file: MpoFile, parts: list[LinearSpec], scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of a module in the form `pack-quantized`: weight_packed, weight_scale, weight_shape, weight_zero_point.

    Args:
        parts: the layers whose rows stand one after another, all in the same scheme.
    """
    pack_to_int32 = import_compressed_tensors("compressors.pack_quantized").pack_to_int32
    columns = parts[0].in_features
    found = [signed_integers(file, linear) for linear in parts]
    spread = [columns // scheme.group // scale.shape[1] for _, scale, _ in found]
    codes = np.concatenate([codes for codes, _, _ in found])
    scales = np.concatenate([np.repeat(one[1], finer, axis=1) for one, finer in zip(found, spread, strict=True)])
    tensors = {
        "weight_packed": pack_to_int32(torch.from_numpy(codes), scheme.bits),
        "weight_scale": torch.from_numpy(scales),
        "weight_shape": torch.tensor([codes.shape[0], columns]),
    }
    if scheme.zeros:
        zeros = [np.zeros_like(scale, np.int8) if zero is None else zero for _, scale, zero in found]
        wide = np.concatenate([np.repeat(zero, finer, axis=1) for zero, finer in zip(zeros, spread, strict=True)])
        tensors["weight_zero_point"] = pack_to_int32(torch.from_numpy(wide), scheme.bits, packed_dim=0)
    return tensors


def signed_integers(
    file: MpoFile, linear: LinearSpec
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any] | None]:
    """The codes [out, in], scales [out, groups] and zeros [out, groups], shifted so that 0 stands in the middle.

    Scales come as f16, but as f32 where they are halved, which f16 may not hold.
    """
    term = linear.terms[0]
    if not isinstance(term, Quantized):
        raise TypeError(f"{linear.name}: expected integers")
    prefix = f"{linear.name}.0"
    codes = unpack([file.array(f"{prefix}.q{plane}") for plane in PLANES[term.bits]], term.bits).astype(np.int16)
    scale = file.array(f"{prefix}.scale")
    middle = 1 << (term.bits - 1)
    if term.zeros:
        zero = file.array(f"{prefix}.zero").astype(np.int16) - middle
        return (codes - middle).astype(np.int8), scale, zero.astype(np.int8)
    if term.bits == 2:
        return (2 * codes - 3).astype(np.int8), scale.astype(np.float32) / 2, None
    return (codes - middle).astype(np.int8), scale, None


def quantization_config(schemes: Mapping[str, Scheme], modules: Mapping[str, list[LinearSpec]]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json, as the package compressed-tensors writes it."""
    quantization = import_compressed_tensors("quantization")
    groups = {}
    for index, scheme in enumerate(sorted(set(schemes.values()), key=str)):
        names = [name for name, other in schemes.items() if other == scheme]
        weights = quantization.QuantizationArgs(
            num_bits=scheme.bits,
            type="int",
            symmetric=not scheme.zeros,
            strategy="group",
            group_size=scheme.group,
        )
        # A name for each layer where there are several schemes; vLLM finds the parts of its fused layers by these.
        targets = ["Linear"] if len(set(schemes.values())) == 1 else names
        groups[f"group_{index}"] = quantization.QuantizationScheme(
            targets=targets, weights=weights, format="pack-quantized"
        )
    dense = [name for name, parts in modules.items() if name not in schemes and parts[0].name != EMBEDDING]
    config = quantization.QuantizationConfig(
        config_groups=groups,
        format="pack-quantized",
        quantization_status="compressed",
        ignore=[*dense, *([] if HEAD in dense else [HEAD])],
    )
    found: dict[str, Any] = config.model_dump(mode="json", exclude_none=True)
    return found


def import_compressed_tensors(part: str) -> Any:
    """A part of the package compressed-tensors; raises ConfigError where the package is missing."""
    try:
        return importlib.import_module(f"compressed_tensors.{part}")
    except ImportError:
        raise ConfigError(
            "--as compressed-tensors needs the package compressed-tensors: pip install 'mpo-runtime[hf]'"
        ) from None
