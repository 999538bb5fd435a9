"""Writes the golden files: one small `.mpo` per feature, and the matrices that they must give.

    python -m tests.golden.generate [FOLDER]

Neither packing.py nor reference.py is used: integers are packed one bit at a time as SPEC.md, section 5, says, and the
expected matrices are sums over the elements that went in. All values are short binary fractions, so that float64 holds
every sum exactly and the comparison needs no tolerance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np

from mpo_formats import (
    Certificate,
    Certificates,
    Dense,
    FileSpec,
    LinearSpec,
    ModelSpec,
    Mpo,
    MpoWriter,
    Provenance,
    Quantized,
    Rope,
    Term,
    Transform,
)
from mpo_formats.layout import content_tensors, linear_tensors
from tests.formats import tiny

Matrix = np.ndarray[Any, np.dtype[np.float64]]
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1), 2: (2,)}
QUERY, OUT, GATE, HEAD = tiny.QUERY, "model.layers.0.self_attn.o_proj", tiny.GATE, "lm_head"
EMBEDDING = "model.embed_tokens"
FILES = {
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer.model": bytes(range(256)),
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": "{{ messages }} é 模型".encode(),
    "generation_config.json": b'{"eos_token_id": [0, 1]}',
}
# What the layers hold whose matrices are not among the expected ones.
PLAIN: tuple[tuple[Term, ...], ...] = ((Dense("bf16"),), (Quantized(2, 32, False),))
LLAMA3 = Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 32)
YARN = Rope(500000.0, "yarn", 4.0, 1.0, 32.0, 32, 1.125)


def feature(terms: dict[str, tuple[Term, ...]], files: tuple[str, ...] = (), **changes: Any) -> ModelSpec:
    """A tiny model with these terms; the layers that are not named are dense bf16."""
    spec = tiny.model(terms, **{"intermediate_size": 32, **changes})
    embedded = tuple(FileSpec(name, len(FILES[name])) for name in files)
    provenance = Provenance("golden", None, hashlib.sha256(b"golden").hexdigest(), "tests.golden", {}, None)
    return dataclasses.replace(spec, files=embedded, provenance=provenance)


def features() -> dict[str, ModelSpec]:
    """The golden files by name."""
    result = {
        # q_proj with stored zeros in groups of 32, o_proj without zeros in groups of 16
        f"int{bits}": feature({QUERY: (Quantized(bits, 32, True),), OUT: (Quantized(bits, 16, False),)})
        for bits in PLANES
    }
    for dtype in ("f32", "f16", "bf16"):
        result[f"dense-{dtype}"] = feature({QUERY: (Dense(dtype),)})
    result["mpo-2-cores"] = feature({QUERY: (Mpo((16, 1), (1, 32), (5,), "bf16", 0),)})
    result["mpo-3-cores"] = feature({QUERY: (Mpo((2, 4, 2), (4, 4, 2), (5, 3), "f16", 0),)})
    result["mpo-int8"] = feature({QUERY: (Mpo((4, 4), (8, 4), (6,), "int8", 16),)})
    int4 = Mpo((8, 4, 4), (2, 4, 4), (4, 3), "int4", 16)
    small = {tiny.UP: PLAIN[1], tiny.DOWN: PLAIN[1]}
    result["mpo-int4"] = feature({GATE: (int4,), **small}, intermediate_size=128)
    result["sum"] = feature(
        {
            QUERY: (
                Quantized(3, 16, True),
                Mpo((4, 4), (8, 4), (4,), "f32", 0),
                Dense("f16"),
            )
        }
    )
    result["bias-untied"] = feature(
        {HEAD: (Dense("f32"),)}, attention_bias=True, mlp_bias=True, tie_word_embeddings=False
    )
    result["rope-llama3"] = feature({}, model_type="llama", rope=LLAMA3)
    # version 0.3
    result["rope-yarn"] = feature({}, model_type="mistral", rope=YARN, windows=(16,))
    result["qwen2"] = feature({}, model_type="qwen2", attention_bias=True)
    result["qwen3"] = feature({}, model_type="qwen3", windows=(0, 16))
    result["granitemoehybrid"] = feature({}, model_type="granitemoehybrid")
    neo = {"attention_bias": True, "mlp_bias": True, "max_position_embeddings": 16, "attention_multiplier": 1.0}
    result["gpt-neo"] = feature({}, model_type="gpt_neo", windows=(0, 8), **neo)
    # version 0.4: blocks of 16, so that 1/√16 is a binary fraction
    both = (Quantized(3, 16, False), Mpo((4, 4), (8, 4), (4,), "f16", 0))
    plain = feature({EMBEDDING: (Quantized(4, 32, False),), QUERY: both})
    turned = (dataclasses.replace(one, hadamard=16 * (one.name in (EMBEDDING, QUERY))) for one in plain.linears)
    result["hadamard"] = dataclasses.replace(plain, linears=tuple(turned))
    # version 0.5: q and k share one matrix of integers, the embedding has a matrix for each block, in floats
    shared = Transform(QUERY, 16, 1, Quantized(4, 16, False))
    own = Transform(EMBEDDING, 16, 2, Dense("f16"))
    stored = {EMBEDDING: own, QUERY: shared, tiny.KEY: shared}
    plain = feature({EMBEDDING: (Quantized(4, 32, False),), QUERY: both, tiny.KEY: (Dense("f32"),)})
    turned = (dataclasses.replace(one, transform=stored.get(one.name)) for one in plain.linears)
    result["transform"] = dataclasses.replace(plain, linears=tuple(turned))
    result["files-certificate"] = feature({}, tuple(FILES))
    return result


def integers(label: str, count: int, low: int, high: int) -> list[int]:
    """Numbers from low to high that depend on the label alone, on every machine and version."""
    raw = hashlib.shake_128(label.encode()).digest(2 * count)
    return [low + int.from_bytes(raw[2 * i : 2 * i + 2], "little") % (high - low + 1) for i in range(count)]


def float_tensor(label: str, shape: tuple[int, ...], dtype: str) -> tuple[np.ndarray[Any, Any], Matrix]:
    """Multiples of 1/16 as a stored tensor, and as float64."""
    exact = np.array(integers(label, int(np.prod(shape)), -32, 32), np.float64).reshape(shape) / 16
    if dtype == "bf16":
        halves = [struct.unpack("<HH", struct.pack("<f", value))[1] for value in exact.reshape(-1)]
        return np.array(halves, np.uint16).reshape(shape), exact
    return exact.astype({"f32": np.float32, "f16": np.float16}[dtype]), exact


def integer_tensors(
    prefix: str, rows: int, columns: int, bits: int, group: int, zeros: bool
) -> tuple[dict[str, np.ndarray[Any, Any]], Matrix]:
    """Planes, scales and zeros of random codes, and the matrix scale · (code − zero), element by element."""
    shape = (rows, columns // group)
    codes = integers(f"{prefix} codes", rows * columns, 0, (1 << bits) - 1)
    scale = np.array(integers(f"{prefix} scale", shape[0] * shape[1], -31, 31), np.float64).reshape(shape) / 64
    zero = np.full(shape, 1.5 if bits == 2 else float(1 << (bits - 1)))
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    for number, plane in enumerate(PLANES[bits]):
        packed = np.zeros((rows, columns // group, group * plane // 8), np.uint8)
        shift = sum(PLANES[bits][:number])
        for index, code in enumerate(codes):
            row, column = divmod(index, columns)
            for bit in range(plane):
                place = column % group * plane + bit
                packed[row, column // group, place // 8] |= (code >> (shift + bit) & 1) << place % 8
        tensors[f"{prefix}.q{plane}"] = packed
    tensors[f"{prefix}.scale"] = scale.astype(np.float16)
    if zeros:
        quarters = integers(f"{prefix} zero", shape[0] * shape[1], 0, (4 << bits) - 4)
        zero = np.array(quarters, np.float64).reshape(shape) / 4
        tensors[f"{prefix}.zero"] = zero.astype(np.float16)
    matrix = np.zeros((rows, columns))
    for index, code in enumerate(codes):
        row, column = divmod(index, columns)
        matrix[row, column] = scale[row, column // group] * (code - zero[row, column // group])
    return tensors, matrix


def operator_tensors(prefix: str, term: Mpo) -> tuple[dict[str, np.ndarray[Any, Any]], Matrix]:
    """The cores of an operator, and the sum over all bond values of the products of their elements."""
    tensors, cores = {}, []
    bonds = (1, *term.bonds, 1)
    for index, (out, column) in enumerate(zip(term.out_dims, term.in_dims, strict=True)):
        name, shape = f"{prefix}.core{index}", (bonds[index + 1], bonds[index], out, column)
        if term.group:
            bits = {"int8": 8, "int4": 4}[term.dtype]
            parts, core = integer_tensors(name, shape[0] * shape[1], out * column, bits, term.group, False)
            tensors.update(parts)
        else:
            tensors[name], core = float_tensor(name, shape, term.dtype)
        cores.append(core.reshape(shape))
    total: Any = 0.0
    for values in itertools.product(*(range(bond) for bond in term.bonds)):
        ends = (0, *values, 0)
        part = np.ones((1, 1))
        for index, core in enumerate(cores):
            part = np.kron(part, core[ends[index + 1], ends[index]])
        total = total + part
    return tensors, np.asarray(total)


def linear_content(linear: LinearSpec) -> tuple[dict[str, np.ndarray[Any, Any]], Matrix]:
    """All tensors of a layer, and its matrix."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    total = np.zeros((linear.out_features, linear.in_features))
    for index, term in enumerate(linear.terms):
        prefix = f"{linear.name}.{index}"
        if isinstance(term, Dense):
            tensors[f"{prefix}.weight"], matrix = float_tensor(f"{prefix}.weight", total.shape, term.dtype)
        elif isinstance(term, Quantized):
            parts, matrix = integer_tensors(prefix, *total.shape, term.bits, term.group, term.zeros)
            tensors.update(parts)
        else:
            parts, matrix = operator_tensors(prefix, term)
            tensors.update(parts)
        total += matrix
    if linear.bias:
        tensors[f"{linear.name}.bias"], _ = float_tensor(f"{linear.name}.bias", (linear.out_features,), linear.bias)
    assert list(tensors) == [tensor.name for tensor in linear_tensors(linear)]
    if linear.transform is not None:
        parts, total = stored_transform(linear.transform, total)
        return parts | tensors, total
    return tensors, transformed(total, linear.hadamard) if linear.hadamard else total


def stored_transform(transform: Transform, matrix: Matrix) -> tuple[dict[str, np.ndarray[Any, Any]], Matrix]:
    """The tensors of a stored transform, and a matrix times it, element by element."""
    prefix, block = f"{transform.name}.transform", transform.block
    rows = transform.count * block
    if isinstance(transform.term, Dense):
        values, factors = float_tensor(f"{prefix}.weight", (rows, block), transform.term.dtype)
        tensors = {f"{prefix}.weight": values}
    else:
        term = transform.term
        tensors, factors = integer_tensors(prefix, rows, block, term.bits, term.group, term.zeros)
    result = np.zeros_like(matrix)
    for column in range(matrix.shape[1]):
        start, place = column - column % block, column % block
        first = start if transform.count > 1 else 0
        for other in range(block):
            result[:, column] += matrix[:, start + other] * factors[first + other, place]
    return tensors, result


def transformed(matrix: Matrix, block: int) -> Matrix:
    """A matrix times the Hadamard transform of every block of columns, element by element."""
    result = np.zeros_like(matrix)
    for column in range(matrix.shape[1]):
        start, place = column - column % block, column % block
        for other in range(block):
            sign = -1 if (place & other).bit_count() % 2 else 1
            result[:, column] += sign * matrix[:, start + other] / math.sqrt(block)
    return result


def content(spec: ModelSpec) -> tuple[dict[str, np.ndarray[Any, Any]], dict[str, Matrix]]:
    """All tensors of a golden file, and the matrices of the layers that have a feature, biases and the final norm."""
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    expected: dict[str, Matrix] = {}
    for linear in spec.linears:
        parts, matrix = linear_content(linear)
        tensors.update(parts)
        if linear.name == QUERY or linear.terms not in PLAIN:
            expected[linear.name] = matrix
        if linear.bias:
            expected[f"{linear.name}.bias"] = parts[f"{linear.name}.bias"].astype(np.float64)
    for vector in spec.vectors:
        name = f"{vector.name}.weight"
        tensors[name], expected[name] = float_tensor(name, (vector.size,), vector.dtype)
    for file in spec.files:
        tensors[f"file.{file.name}"] = np.frombuffer(FILES[file.name], np.uint8)
    return tensors, expected


def certificates(name: str) -> Certificates:
    """Two certificates, of the whole file and of a prefix, in the file that is about them."""
    if name != "files-certificate":
        return Certificates(())
    whole = tiny.certificates().entries[0]
    return Certificates((whole, Certificate(2, dataclasses.replace(whole.quality, perplexity=13.25, kl_mean=0.125))))


def main(folder: Path) -> None:
    """Writes every golden file and expected.npz."""
    everything: dict[str, Matrix] = {}
    for name, spec in features().items():
        tensors, expected = content(spec)
        with MpoWriter(folder / f"{name}.mpo", spec, force=True) as writer:
            for tensor in writer.pending():
                writer.write(tensor.name, tensors[tensor.name])
            writer.commit(lambda _, name=name: certificates(name))
        assert set(tensors) == {tensor.name for tensor in content_tensors(spec)}
        everything.update({f"{name}/{key}": value for key, value in expected.items()})
    np.savez(folder / "expected.npz", **everything)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
