"""Many rows of x through panels of every instruction set: layers of every kind of term against float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_formats.packing import bf16_to_f32, dequantize, f32_to_bf16, pack
from mpo_formats.spec import GROUPS

native: Any = pytest.importorskip("mpo_runtime._native", reason="the native kernels were not built")

LEVELS = [name for name in native.supported_isas() if name != "generic"]
ROUNDED = {"amx": 4e-3}  # codes times scales, and x, to bf16: 2 · 2⁻⁹ at most, half of that on average
CODES = 1e-2  # x to int8 with a scale for 32 columns
EXACT = 1e-5

pytestmark = pytest.mark.skipif(not LEVELS, reason="this CPU has generic kernels only")


@pytest.fixture(autouse=True, params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Use it, and leave the level in use as it was."""
    before = native.active_isa()
    native.set_isa(request.param)
    yield request.param
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


def float_matrix(kind: str, rows: int, columns: int, generator: np.random.Generator) -> tuple[Any, NDArray[np.float64]]:
    """A random matrix of floats of a type, and its weights."""
    weights = generator.normal(size=(rows, columns)).astype(np.float16 if kind == "f16" else np.float32)
    stored = f32_to_bf16(weights) if kind == "bf16" else weights
    matrix = native.Matrix.dense("m", kind, rows, columns, stored.reshape(-1).view(np.uint8))
    return matrix, (bf16_to_f32(stored) if kind == "bf16" else weights).astype(np.float64)


def applied(layer: Any, x: NDArray[np.float32], exact: bool = False) -> NDArray[np.float32]:
    """The layer's result for one sequence x [tokens, columns], which is a prompt from 32 tokens on."""
    program = native.Program(exact)
    program.finish(program.linear(program.input(layer.columns), layer))
    out = np.empty((1, x.shape[0], layer.rows), np.float32)
    program.run(None, [x[None]], None, out)
    return out[0]


def relative(found: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    """The norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


SAME_LEVEL = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@SAME_LEVEL
@given(
    bits=st.sampled_from((8, 6, 5, 4, 3, 2)),
    group=st.sampled_from(GROUPS),
    groups=st.integers(1, 70),
    rows=st.integers(1, 300),
    tokens=st.sampled_from((32, 33, 47, 48, 100, 530)),
    zeros=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_integer_layers(
    level: str, bits: int, group: int, groups: int, rows: int, tokens: int, zeros: bool, seed: int
) -> None:
    """Widths, groups, zeros; chunks of 512 columns with rests; panels of 16 rows and of 16 tokens with rests; slabs."""
    generator = np.random.default_rng(seed)
    columns = min(group * groups, 1536 // group * group)
    matrix, weights = integer_matrix(bits, group, rows, columns, zeros, generator)
    layer = native.Linear("l", rows, columns, [matrix], [], None)
    x = generator.normal(size=(tokens, columns)).astype(np.float32)
    expected = x @ weights.T
    found = applied(layer, x)
    assert relative(found, expected) < ROUNDED.get(level, CODES)
    assert relative(applied(layer, x, exact=True), expected) < EXACT
    if level not in ROUNDED:  # x is rounded as for single tokens, so that only the order of sums differs
        single = np.concatenate([applied(layer, x[t : t + 1]) for t in range(4)])
        assert relative(found[:4], single.astype(np.float64)) < EXACT


@SAME_LEVEL
@given(
    kind=st.sampled_from(("bf16", "f16", "f32")),
    rows=st.integers(1, 200),
    columns=st.integers(1, 700),
    tokens=st.integers(32, 80),
    seed=st.integers(0, 2**32 - 1),
)
def test_float_layers_are_exact(kind: str, rows: int, columns: int, tokens: int, seed: int) -> None:
    """What is stored as floats loses nothing, with a bias too; any number of columns."""
    generator = np.random.default_rng(seed)
    matrix, weights = float_matrix(kind, rows, columns, generator)
    bias = generator.normal(size=rows).astype(np.float32)
    x = generator.normal(size=(tokens, columns)).astype(np.float32)
    found = applied(native.Linear("l", rows, columns, [matrix], [], bias), x)
    assert relative(found, x @ weights.T + bias) < EXACT


@pytest.mark.parametrize("integers", [True, False])
@pytest.mark.parametrize("chi", [5, 32, 70])
def test_low_rank_terms(level: str, chi: int, integers: bool) -> None:
    """Beside an integer base and alone: χ columns more of the same sums."""
    generator = np.random.default_rng([chi, integers])
    rows, columns, tokens = 192, 1088, 50
    cores = []
    for wide in (rows, columns):
        made = (
            integer_matrix(8, 64, chi, wide, False, generator)
            if integers
            else float_matrix("bf16", chi, wide, generator)
        )
        cores.append(made)
    (first, first_weights), (second, second_weights) = cores
    term = native.Operator(
        [native.Core(first, 1, chi, rows, 1, 1), native.Core(second, chi, 1, 1, columns, chi)], False
    )
    base, base_weights = integer_matrix(4, 32, rows, columns, False, generator)
    x = generator.normal(size=(tokens, columns)).astype(np.float32)
    product = first_weights.T @ second_weights
    alone = applied(native.Linear("l", rows, columns, [], [term], None), x)
    assert relative(alone, x @ product.T) < (ROUNDED.get(level, 2 * CODES) if integers else EXACT)
    both = applied(native.Linear("l", rows, columns, [base], [term], None), x)
    assert relative(both, x @ (product + base_weights).T) < ROUNDED.get(level, 2 * CODES)
    assert (
        relative(
            applied(native.Linear("l", rows, columns, [base], [term], None), x, exact=True),
            x @ (product + base_weights).T,
        )
        < EXACT
    )


def rows_alone(layer: Any, x: NDArray[np.float32], exact: bool) -> NDArray[np.bool_]:
    """Of each row of x, whether its result among the others is that of the row alone, in every bit."""
    program = native.Program(exact)
    program.finish(program.linear(program.input(layer.columns), layer))
    together, alone = np.empty((len(x), 1, layer.rows), np.float32), np.empty((1, 1, layer.rows), np.float32)
    program.run(None, [x[:, None]], None, together)
    equal = []
    for row, found in zip(x, together, strict=True):
        program.run(None, [row[None, None]], None, alone)
        equal.append(bool((found == alone[0]).all()))
    return np.array(equal)


@SAME_LEVEL
@given(
    kind=st.sampled_from(("integers", "floats", "low rank", "three cores")),
    bits=st.sampled_from((8, 6, 5, 4, 3, 2)),
    group=st.sampled_from(GROUPS),
    groups=st.integers(1, 70),
    tokens=st.sampled_from((2, 3, 4, 5, 7, 8, 17, 40)),
    zeros=st.booleans(),
    exact=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_a_step_are_those_of_a_single_run(
    kind: str, bits: int, group: int, groups: int, tokens: int, zeros: bool, exact: bool, seed: int
) -> None:
    """Every kind of term, by rows and groups that fit a kernel's steps and that do not."""
    generator = np.random.default_rng(seed)
    columns, rows = min(group * groups, 1536 // group * group), int(generator.integers(1, 4)) * 64
    matrices, operators = [], []
    if kind in ("integers", "low rank"):
        rows -= 0 if kind == "low rank" else int(generator.integers(0, 63))
        matrices.append(integer_matrix(bits, group, rows, columns, zeros, generator)[0])
    if kind == "floats":
        matrices.append(float_matrix(str(generator.choice(["bf16", "f16", "f32"])), rows, columns, generator)[0])
    if kind == "low rank":
        chi = int(generator.integers(1, 40))
        first = integer_matrix(8, 64, chi, rows, False, generator)[0]
        second = float_matrix("f16", chi, columns, generator)[0]
        cores = [native.Core(first, 1, chi, rows, 1, 1), native.Core(second, chi, 1, 1, columns, chi)]
        operators.append(native.Operator(cores, False))
    if kind == "three cores":
        chi, out, wide = 5, (rows // 16, 4, 4), (columns // 16, 4, 4)
        bonds = (1, chi, chi, 1)
        cores = []
        for k in range(3):
            left, right = bonds[k], bonds[k + 1]
            matrix = float_matrix("f32", left * right, out[k] * wide[k], generator)[0]
            cores.append(native.Core(matrix, left, right, out[k], wide[k], left))
        operators.append(native.Operator(cores, False))
    layer = native.Linear("l", rows, columns, matrices, operators, None)
    x = generator.normal(size=(tokens, columns)).astype(np.float32)
    assert rows_alone(layer, x, exact).all()
