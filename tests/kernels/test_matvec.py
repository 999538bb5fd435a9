"""Every product of the native kernels, at each level this CPU runs, against float64 on the unpacked weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_formats.packing import bf16_to_f32, dequantize, f32_to_bf16, pack
from mpo_formats.spec import GROUPS

native: Any = pytest.importorskip("mpo_runtime._native", reason="the native kernels were not built")

WIDTHS = (8, 6, 5, 4, 3, 2)
LEVELS = native.supported_isas()


@pytest.fixture(autouse=True)
def restored_level() -> Iterator[None]:
    """Leave the level in use as it was."""
    before = native.active_isa()
    yield
    native.set_isa(before)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantised matrix for the kernels and its weights [rows, columns] in float64."""

    handle: Any
    weights: NDArray[np.float64]


def placed(array: NDArray[Any], shift: int) -> NDArray[np.uint8]:
    """Return the bytes of an array, `shift` bytes past an aligned address and ending with their buffer."""
    raw = np.ascontiguousarray(array).view(np.uint8).reshape(-1)
    buffer = np.empty(raw.size + shift, np.uint8)
    buffer[shift:] = raw
    return buffer[shift:]


def random_matrix(
    bits: int, group: int, rows: int, columns: int, zeros: bool, generator: np.random.Generator, shift: int = 0
) -> Matrix:
    """Draw codes, scales of both signs and zeros, and hand them to the kernels from misaligned addresses."""
    codes = generator.integers(0, 2**bits, (rows, columns), dtype=np.uint8)
    groups = (rows, columns // group)
    scale = generator.normal(size=groups).astype(np.float16)
    zero = generator.uniform(0, 2**bits - 1, groups).astype(np.float16) if zeros else None
    planes = pack(codes, bits, group)
    handle = native.quantized_matrix(
        bits,
        rows,
        columns,
        group,
        placed(planes[0], shift),
        placed(planes[1], shift) if len(planes) > 1 else None,
        placed(scale, shift),
        None if zero is None else placed(zero, shift),
    )
    return Matrix(handle, dequantize(planes, bits, scale, zero))


def relative(found: NDArray[np.float32], expected: NDArray[np.float64]) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def rounded(x: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return x [batch, columns] as the kernels' int8 activations have it: blocks of 32 with scale max|x| / 127."""
    batch, columns = x.shape
    blocks = np.pad(x, ((0, 0), (0, -columns % 32))).reshape(batch, -1, 32)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    inverse = np.divide(np.float32(127), largest, out=np.zeros_like(largest), where=largest > 0)
    codes = np.rint(blocks * inverse).astype(np.float64)
    scales = (largest / np.float32(127)).astype(np.float64)
    return (codes * scales).reshape(batch, -1)[:, :columns]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_products_of_quantised_weights(bits: int, group: int, zeros: bool, level: str) -> None:
    """Widths, groups and zeros; one row of x, a tile of four, and both with rest; whole chunks of 256 and a tail."""
    assert native.set_isa(level)
    generator = np.random.default_rng([bits, group, zeros])
    for batch, columns in ((1, 512), (7, 256 + group), (17, group)):
        matrix = random_matrix(bits, group, 5, columns, zeros, generator, shift=1)
        x = generator.normal(size=(batch, columns)).astype(np.float32)
        y = np.zeros((batch, 5), np.float32)
        native.multiply(matrix.handle, native.quantize_activations(x), y, 0, 5)
        # The kernel rounds the activations, and does everything after that to float32's precision.
        assert relative(y, rounded(x) @ matrix.weights.T) < 1e-5
        native.multiply_exact(matrix.handle, x, y, 0, 5)
        assert relative(y, x @ matrix.weights.T) < 1e-5
        s = generator.normal(size=(batch, 5)).astype(np.float32)
        sums = np.ones((batch, columns), np.float32)
        native.add_transposed(matrix.handle, s, sums, 0, columns)
        assert relative(sums, 1 + s @ matrix.weights) < 1e-5


@pytest.mark.parametrize("level", [level for level in LEVELS if level not in ("avx2", "neon")])
@pytest.mark.parametrize("bits", WIDTHS)
def test_a_row_does_not_depend_on_the_rows_beside_it(bits: int, level: str) -> None:
    """Each row of a batch is what it is alone, bit for bit: groups, zeros, rests of two chunks, batches up to 40."""
    assert native.set_isa(level)
    generator = np.random.default_rng(bits)
    for group in GROUPS:
        for zeros, batch, columns in ((False, 7, 1024), (True, 3, 512 + group), (False, 40, 3 * group)):
            matrix = random_matrix(bits, group, 11, columns, zeros, generator)
            x = generator.normal(size=(batch, columns)).astype(np.float32)
            together, alone = np.zeros((batch, 11), np.float32), np.zeros((batch, 11), np.float32)
            native.multiply(matrix.handle, native.quantize_activations(x), together, 0, 11)
            for row in range(batch):
                codes = native.quantize_activations(x[row : row + 1])
                native.multiply(matrix.handle, codes, alone[row : row + 1], 0, 11)
            np.testing.assert_array_equal(together, alone)


@given(
    bits=st.sampled_from(WIDTHS),
    group=st.sampled_from(GROUPS),
    groups=st.integers(1, 9),
    rows=st.integers(1, 37),
    batch=st.integers(1, 20),
    zeros=st.booleans(),
    shift=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_random_shapes_and_ranges(
    bits: int, group: int, groups: int, rows: int, batch: int, zeros: bool, shift: int, seed: int, data: st.DataObject
) -> None:
    """A range of rows or columns is written, accumulated or not, and nothing beside it."""
    generator = np.random.default_rng(seed)
    columns = group * groups
    matrix = random_matrix(bits, group, rows, columns, zeros, generator, shift)
    x = generator.normal(size=(batch, columns)).astype(np.float32)
    s = generator.normal(size=(batch, rows)).astype(np.float32)
    begin = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(begin + 1, rows))
    first = data.draw(st.integers(0, groups - 1))
    last = data.draw(st.integers(first + 1, groups))
    accumulate = data.draw(st.booleans())
    for level in LEVELS:
        assert native.set_isa(level)
        start = generator.normal(size=(batch, rows)).astype(np.float32)
        part = slice(begin, end)
        for exact, inputs in ((False, rounded(x)), (True, x.astype(np.float64))):
            y = start.copy()
            if exact:
                native.multiply_exact(matrix.handle, x, y, begin, end, accumulate)
            else:
                native.multiply(matrix.handle, native.quantize_activations(x), y, begin, end, accumulate)
            expected = inputs @ matrix.weights.T
            tolerance = 1e-5 * np.linalg.norm(expected) + 1e-6
            np.testing.assert_allclose(y[:, part], (expected + accumulate * start)[:, part], rtol=0, atol=tolerance)
            y[:, part] = start[:, part]
            np.testing.assert_array_equal(y, start)
        sums = np.zeros((batch, columns), np.float32)
        native.add_transposed(matrix.handle, s, sums, first * group, last * group)
        expected = s @ matrix.weights
        inside = slice(first * group, last * group)
        tolerance = 1e-5 * np.linalg.norm(expected) + 1e-6
        np.testing.assert_allclose(sums[:, inside], expected[:, inside], rtol=0, atol=tolerance)
        sums[:, inside] = 0
        assert not sums.any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_int8_activations_cost_less_than_one_percent(bits: int, level: str) -> None:
    """On Gaussian weights and activations of a real size."""
    assert native.set_isa(level)
    generator = np.random.default_rng(bits)
    matrix = random_matrix(bits, 32, 64, 2048, False, generator)
    x = generator.normal(size=(4, 2048)).astype(np.float32)
    y = np.empty((4, 64), np.float32)
    native.multiply(matrix.handle, native.quantize_activations(x), y, 0, 64)
    assert relative(y, x @ matrix.weights.T) < 0.01


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_extreme_codes_do_not_overflow(bits: int, level: str) -> None:
    """All codes at either end times activations at either end: exact, since every sum is a small integer."""
    assert native.set_isa(level)
    columns = 320
    for code in (0, 2**bits - 1):
        codes = np.full((3, columns), code, np.uint8)
        planes = pack(codes, bits, 32)
        scale = np.ones((3, columns // 32), np.float16)
        handle = native.quantized_matrix(
            bits,
            3,
            columns,
            32,
            placed(planes[0], 0),
            placed(planes[1], 0) if len(planes) > 1 else None,
            placed(scale, 0),
            None,
        )
        for value in (127.0, -127.0):
            x = np.full((5, columns), value, np.float32)
            y = np.empty((5, 3), np.float32)
            native.multiply(handle, native.quantize_activations(x), y, 0, 3)
            np.testing.assert_array_equal(y, value * columns * (code - (1.5 if bits == 2 else 2 ** (bits - 1))))


@pytest.mark.parametrize("level", LEVELS)
def test_zero_and_tiny_activations(level: str) -> None:
    """A block of zeros, or of values whose inverse overflows, gives zeros and no NaN."""
    assert native.set_isa(level)
    matrix = random_matrix(4, 32, 4, 96, True, np.random.default_rng(0))
    x = np.zeros((1, 96), np.float32)
    x[0, 32:64] = 1e-42
    y = np.full((1, 4), 5, np.float32)
    native.multiply(matrix.handle, native.quantize_activations(x), y, 0, 4)
    np.testing.assert_array_equal(y, 0)


@pytest.mark.parametrize("level", LEVELS)
@given(
    kind=st.sampled_from(["f32", "f16", "bf16"]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    batch=st.integers(1, 9),
    shift=st.integers(0, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_float_weights(level: str, kind: str, rows: int, columns: int, batch: int, shift: int, seed: int) -> None:
    """Any number of columns, any address."""
    assert native.set_isa(level)
    generator = np.random.default_rng(seed)
    values = generator.normal(size=(rows, columns)).astype(np.float32)
    stored: NDArray[Any] = values
    if kind == "f16":
        stored = values.astype(np.float16)
        values = stored.astype(np.float32)
    elif kind == "bf16":
        stored = f32_to_bf16(values)
        values = bf16_to_f32(stored)
    handle = native.dense_matrix(kind, rows, columns, placed(stored, shift))
    weights = values.astype(np.float64)
    x = generator.normal(size=(batch, columns)).astype(np.float32)
    y = np.ones((batch, rows), np.float32)
    native.multiply_dense(handle, x, y, 0, rows, True)
    expected = 1 + x @ weights.T
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.linalg.norm(expected) + 1e-6)
    s = generator.normal(size=(batch, rows)).astype(np.float32)
    sums = np.ones((batch, columns), np.float32)
    native.add_transposed_dense(handle, s, sums, 0, columns)
    expected = 1 + s @ weights
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-5 * np.linalg.norm(expected) + 1e-6)


def test_sizes_that_do_not_fit_are_refused() -> None:
    """Before any memory is touched."""
    matrix = random_matrix(4, 32, 4, 64, False, np.random.default_rng(0))
    x, y = np.zeros((1, 64), np.float32), np.zeros((1, 4), np.float32)
    prepared = native.quantize_activations(x)
    with pytest.raises(ValueError, match="expected a range inside 4, found 5"):
        native.multiply(matrix.handle, prepared, y, 0, 5)
    with pytest.raises(ValueError, match="expected activations of 64 columns, found 96"):
        native.multiply(matrix.handle, native.quantize_activations(np.zeros((1, 96), np.float32)), y, 0, 4)
    with pytest.raises(ValueError, match="expected columns to be a multiple of 16, found 17"):
        native.quantize_activations(np.zeros((1, 17), np.float32))
    with pytest.raises(ValueError, match="bits is 7, expected 8, 6, 5, 4, 3 or 2"):
        native.quantized_matrix(7, 4, 64, 32, placed(y, 0), None, placed(y, 0), None)
    with pytest.raises(ValueError, match="group is 8, expected 16, 32, 64, 128 or 256"):
        small = native.quantized_matrix(4, 4, 64, 8, placed(np.zeros(128, np.uint8), 0), None, placed(x, 0)[:64], None)
        native.multiply_exact(small, x, y, 0, 4)
    with pytest.raises(ValueError, match="expected begin to be a multiple of the group, found 16"):
        native.add_transposed(matrix.handle, y, np.zeros((1, 64), np.float32), 16, 64)
