"""The tensors that a ModelSpec requires: names, types, shapes and file order (SPEC.md, sections 2 and 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from mpo_formats.architecture import ModelSpec
from mpo_formats.spec import Dense, LinearSpec, Mpo, Quantized, Term, Transform

ALIGNMENT = 64
CHECKSUMS = "mpo.checksums"
CERTIFICATE = "mpo.certificate"
CERTIFICATE_SIZE = 16384
PADDING = "mpo.padding."
FILE = "file."
TRANSFORM = "transform"
DIGEST_SIZE = 32

# Element type of a tensor: our name -> (safetensors name, bytes).
ELEMENTS = {"f32": ("F32", 4), "f16": ("F16", 2), "bf16": ("BF16", 2), "u8": ("U8", 1)}
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the container: its name, element type (`f32`, `f16`, `bf16`, `u8`) and shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{ascii(self.name)[1:-1]} {self.dtype} {list(self.shape)}"

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * ELEMENTS[self.dtype][1]

    @property
    def padding(self) -> int:
        """The number of zero bytes that must follow so that the next tensor starts at a multiple of 64."""
        return -self.size % ALIGNMENT


def integer_tensors(prefix: str, rows: int, columns: int, bits: int, group: int, zeros: bool) -> Iterator[TensorSpec]:
    """Yields the planes (low bits first), scales and zeros of an integer matrix [rows, columns]."""
    groups = columns // group
    for plane in PLANES[bits]:
        yield TensorSpec(f"{prefix}.q{plane}", "u8", (rows, groups, group * plane // 8))
    yield TensorSpec(f"{prefix}.scale", "f16", (rows, groups))
    if zeros:
        yield TensorSpec(f"{prefix}.zero", "f16", (rows, groups))


def term_tensors(prefix: str, term: Term, rows: int, columns: int) -> Iterator[TensorSpec]:
    """Yields the tensors of one term of a layer [rows, columns]; `prefix` is `<layer>.<index of the term>`."""
    if isinstance(term, Dense):
        yield TensorSpec(f"{prefix}.weight", term.dtype, (rows, columns))
    elif isinstance(term, Quantized):
        yield from integer_tensors(prefix, rows, columns, term.bits, term.group, term.zeros)
    else:
        yield from core_tensors(prefix, term)


def core_tensors(prefix: str, term: Mpo) -> Iterator[TensorSpec]:
    """Yields the tensors of the cores: [χ_k, χ_{k−1}, o_k, i_k], or its integer form over rows χ_k·χ_{k−1}."""
    for index, shape in enumerate(term.core_shapes()):
        name = f"{prefix}.core{index}"
        if term.core_bits:
            rows, columns = shape[0] * shape[1], shape[2] * shape[3]
            yield from integer_tensors(name, rows, columns, term.core_bits, term.group, zeros=False)
        else:
            yield TensorSpec(name, term.dtype, shape)


def transform_tensors(transform: Transform) -> Iterator[TensorSpec]:
    """Yields the tensors of a stored transform: one term [count · block, block], its matrices one below the other."""
    rows = transform.count * transform.block
    yield from term_tensors(f"{transform.name}.{TRANSFORM}", transform.term, rows, transform.block)


def linear_tensors(linear: LinearSpec) -> Iterator[TensorSpec]:
    """Yields the tensors of a layer in file order: its terms, then its bias."""
    for index, term in enumerate(linear.terms):
        yield from term_tensors(f"{linear.name}.{index}", term, linear.out_features, linear.in_features)
    if linear.bias is not None:
        yield TensorSpec(f"{linear.name}.bias", linear.bias, (linear.out_features,))


def linear_bytes(linear: LinearSpec) -> int:
    """Bytes of a layer's tensors, without padding."""
    return sum(tensor.size for tensor in linear_tensors(linear))


def content_tensors(model: ModelSpec) -> Iterator[TensorSpec]:
    """Yields every tensor that carries content, in file order, without padding, certificate and checksums."""
    seen: set[str] = set()
    for linear in model.linears:
        if linear.transform is not None and linear.transform.name not in seen:
            seen.add(linear.transform.name)
            yield from transform_tensors(linear.transform)
        yield from linear_tensors(linear)
    for vector in model.vectors:
        yield TensorSpec(f"{vector.name}.weight", vector.dtype, (vector.size,))
    for file in model.files:
        yield TensorSpec(f"{FILE}{file.name}", "u8", (file.size,))


def file_tensors(model: ModelSpec) -> tuple[TensorSpec, ...]:
    """All tensors of the file in order: content, each followed by its padding, then certificate and checksums."""
    tensors: list[TensorSpec] = []
    for tensor in content_tensors(model):
        tensors.append(tensor)
        if padding := tensor.padding:
            tensors.append(TensorSpec(f"{PADDING}{len(tensors)}", "u8", (padding,)))
    tensors.append(TensorSpec(CERTIFICATE, "u8", (CERTIFICATE_SIZE,)))
    # One digest for the header and one for every tensor before this one.
    tensors.append(TensorSpec(CHECKSUMS, "u8", (len(tensors) + 1, DIGEST_SIZE)))
    return tuple(tensors)
