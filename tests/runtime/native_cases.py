"""Random layers and models for the tests of the native backend: any terms, held in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import strategies as st

from mpo_formats import Dense, ModelSpec, Mpo, Quantized, Term, Transform
from mpo_formats.layout import content_tensors
from mpo_formats.spec import BITS, BLOCKS, GROUPS, HADAMARDS, full_rank
from mpo_runtime import native
from tests.formats.tiny import GATE, Arrays, arrays, model

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")
if native.available():
    import mpo_runtime._native as _native

    LEVELS = _native.supported_isas()
else:
    LEVELS = []

# [out, in] of the layer under test: odd ones, and ones that are no multiple of any vector's length.
SIZES = [(128, 32), (48, 64), (172, 64), (64, 172), (33, 16), (96, 160), (256, 256), (320, 96)]


class Held:
    """Weights in memory, named as in a file."""

    def __init__(self, spec: ModelSpec, values: Arrays) -> None:
        self.spec = spec
        self.values = values
        self.types = {tensor.name: tensor.dtype for tensor in content_tensors(spec)}

    def array(self, name: str) -> Any:
        return self.values[name]

    def dtype(self, name: str) -> str:
        return self.types[name]

    def file(self, name: str) -> bytes | None:
        return None

    def close(self) -> None:
        return


@contextmanager
def level(name: str) -> Iterator[None]:
    """Runs with one instruction set, and with the best one again afterwards."""
    assert _native.set_isa(name)
    try:
        yield
    finally:
        _native.set_isa("auto")


def layer(
    terms: tuple[Term, ...],
    out: int,
    inner: int,
    bias: bool,
    seed: int,
    hadamard: int = 0,
    transform: Transform | None = None,
) -> Held:
    """A model whose GATE is the layer [out, inner]."""
    plain = model({GATE: terms}, hidden_size=inner, intermediate_size=out, mlp_bias=bias)
    kinds = {"hadamard": hadamard, "transform": transform}
    linears = (replace(one, **kinds) if one.name == GATE else one for one in plain.linears)
    spec = replace(plain, linears=tuple(linears))
    return Held(spec, arrays(spec, seed))


@st.composite
def factors(draw: st.DrawFn, number: int, count: int) -> tuple[int, ...]:
    """`count` factors of a number, in any order, ones included."""
    found = [1] * count
    while number > 1:
        prime = next(p for p in range(2, number + 1) if number % p == 0)
        found[draw(st.integers(0, count - 1))] *= prime
        number //= prime
    return tuple(found)


@st.composite
def operators(draw: st.DrawFn, out: int, inner: int) -> Mpo:
    """Any Mpo term of a layer; often the low-rank shape."""
    count = draw(st.sampled_from([2, 2, 3, 4]))
    if count == 2 and draw(st.booleans()):
        out_dims, in_dims = (out, 1), (1, inner)
    else:
        out_dims, in_dims = draw(factors(out, count)), draw(factors(inner, count))
    bonds = tuple(draw(st.integers(1, min(most, 19))) for most in full_rank(out_dims, in_dims))
    group = math.gcd(*(o * i for o, i in zip(out_dims, in_dims, strict=True)))
    groups = [size for size in GROUPS if group % size == 0]
    dtype = draw(st.sampled_from(["f32", "f16", "bf16", *(["int8", "int4"] if groups else [])]))
    return Mpo(out_dims, in_dims, bonds, dtype, draw(st.sampled_from(groups)) if dtype.startswith("i") else 0)


@st.composite
def layers(draw: st.DrawFn) -> Held:
    """A layer of one to three terms, of its inputs, of their Hadamard transform or of a stored one."""
    out, inner = draw(st.sampled_from(SIZES))
    groups = [size for size in GROUPS if inner % size == 0]
    kinds: list[st.SearchStrategy[Term]] = [
        st.builds(Dense, st.sampled_from(["f32", "f16", "bf16"])),
        operators(out, inner),
    ]
    if groups:
        kinds.append(st.builds(Quantized, st.sampled_from(BITS), st.sampled_from(groups), st.booleans()))
    terms = draw(st.lists(st.one_of(*kinds), min_size=1, max_size=3))
    hadamard = draw(st.sampled_from([size for size in HADAMARDS if not size or inner % size == 0]))
    blocks = [] if hadamard else [size for size in BLOCKS if inner % size == 0]
    transforms = st.builds(stored, st.just(inner), st.sampled_from(blocks or [16]), st.booleans(), st.booleans())
    transform = draw(st.none() | transforms) if blocks else None
    return layer(tuple(terms), out, inner, draw(st.booleans()), draw(st.integers(0, 1000)), hadamard, transform)


def stored(inner: int, block: int, own: bool, floats: bool) -> Transform:
    """A stored transform of GATE, with its own matrix for every block or with one for all."""
    term = Dense("f16") if floats else Quantized(4, 16, True)
    return Transform(GATE, block, inner // block if own else 1, term)
