"""Prompts through the matrix units for bf16, where this CPU has them: layers of every kind of term against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_formats.packing import bf16_to_f32, dequantize, f32_to_bf16, pack
from mpo_formats.spec import GROUPS

native: Any = pytest.importorskip("mpo_runtime._native", reason="the native kernels were not built")

pytestmark = pytest.mark.skipif(
    "amx" not in native.supported_isas(), reason="this CPU has no AMX; tests/kernels/test_emulated.py emulates it"
)

ROUNDED = 4e-3  # codes times scales, and x, are rounded to bf16: 2 · 2⁻⁹ at most, half of that on average
EXACT = 1e-5


@pytest.fixture(autouse=True)
def matrix_units() -> Iterator[None]:
    """Use them, and leave the level in use as it was."""
    before = native.active_isa()
    native.set_isa("amx")
    yield
    native.set_isa(before)


def integer_matrix(
    bits: int, group: int, rows: int, columns: int, zeros: bool, generator: np.random.Generator
) -> tuple[Any, NDArray[np.float64]]:
    """A random matrix for layers, and its weights."""
    codes = generator.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    shape = (rows, columns // group)
    scale = generator.normal(size=shape).astype(np.float16)
    zero = generator.uniform(0, 2**bits - 1, shape).astype(np.float16) if zeros else None
    planes = pack(codes, bits, group)
    flat = [plane.reshape(-1) for plane in planes]
    raw_zero = None if zero is None else zero.reshape(-1).view(np.uint8)
    matrix = native.Matrix.integer("m", bits, rows, columns, group, flat, scale.reshape(-1).view(np.uint8), raw_zero)
    return matrix, dequantize(planes, bits, scale, zero).astype(np.float64)


def bf16_matrix(rows: int, columns: int, generator: np.random.Generator) -> tuple[Any, NDArray[np.float64]]:
    """A random matrix of bf16 numbers, and its weights."""
    stored = f32_to_bf16(generator.normal(size=(rows, columns)).astype(np.float32))
    matrix = native.Matrix.dense("m", "bf16", rows, columns, stored.reshape(-1).view(np.uint8))
    return matrix, bf16_to_f32(stored).astype(np.float64)


def applied(layer: Any, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The layer's result for one sequence x [tokens, columns] with int8 activations, which prompts do not use."""
    program = native.Program(False)
    program.finish(program.linear(program.input(layer.columns), layer))
    out = np.empty((1, x.shape[0], layer.rows), np.float32)
    program.run(None, [x[None]], None, out)
    return out[0]


def relative(found: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@given(
    bits=st.sampled_from((8, 6, 5, 4, 3, 2)),
    group=st.sampled_from(GROUPS),
    groups=st.integers(1, 70),
    rows=st.integers(1, 300),
    tokens=st.sampled_from((32, 33, 47, 48, 100, 530)),
    zeros=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_integer_layers(bits: int, group: int, groups: int, rows: int, tokens: int, zeros: bool, seed: int) -> None:
    """Widths, groups, zeros; chunks of 512 columns with rests; panels of 16 rows and of 16 tokens with rests; slabs."""
    generator = np.random.default_rng(seed)
    columns = min(group * groups, 1536 // group * group)
    matrix, weights = integer_matrix(bits, group, rows, columns, zeros, generator)
    x = generator.normal(size=(tokens, columns)).astype(np.float32)
    found = applied(native.Linear("l", rows, columns, [matrix], [], None), x)
    assert relative(found, x @ weights.T) < ROUNDED


@given(
    rows=st.integers(1, 200), columns=st.integers(1, 700), tokens=st.integers(32, 80), seed=st.integers(0, 2**32 - 1)
)
def test_bf16_layers_are_exact(rows: int, columns: int, tokens: int, seed: int) -> None:
    """What is stored as bf16 loses nothing, with a bias too; any number of columns."""
    generator = np.random.default_rng(seed)
    matrix, weights = bf16_matrix(rows, columns, generator)
    bias = generator.normal(size=rows).astype(np.float32)
    x = generator.normal(size=(tokens, columns)).astype(np.float32)
    found = applied(native.Linear("l", rows, columns, [matrix], [], bias), x)
    assert relative(found, x @ weights.T + bias) < EXACT


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("chi", [5, 32, 70])
def test_low_rank_terms(chi: int, integers: bool) -> None:
    """Beside an integer base and alone: χ columns more of the same sums."""
    generator = np.random.default_rng([chi, integers])
    rows, columns, tokens = 192, 1088, 50
    cores = []
    for wide in (rows, columns):
        made = integer_matrix(8, 64, chi, wide, False, generator) if integers else bf16_matrix(chi, wide, generator)
        cores.append(made)
    (first, first_weights), (second, second_weights) = cores
    term = native.Operator(
        [native.Core(first, 1, chi, rows, 1, 1), native.Core(second, chi, 1, 1, columns, chi)], False
    )
    base, base_weights = integer_matrix(4, 32, rows, columns, False, generator)
    x = generator.normal(size=(tokens, columns)).astype(np.float32)
    product = first_weights.T @ second_weights
    alone = applied(native.Linear("l", rows, columns, [], [term], None), x)
    assert relative(alone, x @ product.T) < (ROUNDED if integers else EXACT)
    both = applied(native.Linear("l", rows, columns, [base], [term], None), x)
    assert relative(both, x @ (product + base_weights).T) < ROUNDED


def test_tokens_of_a_short_step_are_computed_as_always() -> None:
    """Below 32 tokens of a sequence, however many sequences there are, rows are those of a single run, bit for bit."""
    generator = np.random.default_rng(5)
    matrix, _ = integer_matrix(3, 64, 70, 832, True, generator)
    layer = native.Linear("l", 70, 832, [matrix], [], None)
    x = generator.normal(size=(40, 832)).astype(np.float32)
    program = native.Program(False)
    program.finish(program.linear(program.input(832), layer))
    out = np.empty((40, 1, 70), np.float32)
    program.run(None, [x[:, None]], None, out)
    for row in range(40):
        np.testing.assert_array_equal(applied(layer, x[row : row + 1])[0], out[row, 0])
