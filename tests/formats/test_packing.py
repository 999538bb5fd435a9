"""Integer layouts against the formula of SPEC.md, section 5, evaluated one element at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpo_formats.packing import (
    bf16_to_f32,
    dequantize,
    f32_to_bf16,
    first_not_finite,
    largest_magnitude,
    pack,
    unpack,
)
from mpo_formats.spec import BITS, GROUPS

SPEC = Path(__file__).resolve().parents[2] / "formats" / "SPEC.md"
# Written out here, so that a wrong table in the package is noticed.
PLANES = {8: [8], 6: [4, 2], 5: [4, 1], 4: [4], 3: [2, 1], 2: [2]}


def element(planes: list[Any], bits: int, group: int, row: int, column: int) -> int:
    """The code at [row, column], read bit by bit as section 5 says."""
    code, shift = 0, 0
    for packed, width in zip(planes, PLANES[bits], strict=True):
        bit = column % group * width
        byte = int(packed[row, column // group, bit // 8])
        code |= (byte >> (bit % 8) & (1 << width) - 1) << shift
        shift += width
    return code


@st.composite
def matrices(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], int, int]:
    bits, group = draw(st.sampled_from(BITS)), draw(st.sampled_from(GROUPS))
    rows, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seed = draw(st.integers(0, 2**32 - 1))
    return np.random.default_rng(seed).integers(0, 1 << bits, (rows, groups * group), np.uint8), bits, group


@given(matrices())
def test_packed_codes_lie_where_the_formula_says(case: tuple[np.ndarray[Any, Any], int, int]) -> None:
    codes, bits, group = case
    planes = pack(codes, bits, group)
    rows, columns = codes.shape
    assert [plane.shape for plane in planes] == [(rows, columns // group, group * p // 8) for p in PLANES[bits]]
    for row in range(rows):
        for column in range(columns):
            assert element(planes, bits, group, row, column) == codes[row, column]
    assert np.array_equal(unpack(planes, bits), codes)


@given(matrices(), st.booleans(), st.integers(0, 2**32 - 1))
def test_values_equal_scale_times_code_minus_zero(
    case: tuple[np.ndarray[Any, Any], int, int], zeros: bool, seed: int
) -> None:
    codes, bits, group = case
    random = np.random.default_rng(seed)
    shape = (codes.shape[0], codes.shape[1] // group)
    scale = random.standard_normal(shape).astype(np.float16)
    zero = random.uniform(0, 1 << bits, shape).astype(np.float16) if zeros else None
    found = dequantize(pack(codes, bits, group), bits, scale, zero)
    assert found.dtype == np.float64
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            offset = (1.5 if bits == 2 else 2.0 ** (bits - 1)) if zero is None else float(zero[row, column // group])
            expected = float(scale[row, column // group]) * (float(codes[row, column]) - offset)
            assert found[row, column] == expected


@pytest.mark.parametrize("bits", BITS)
def test_every_byte_pattern_survives_unpack_and_pack(bits: int) -> None:
    random = np.random.default_rng(bits)
    planes = [random.integers(0, 256, (3, 2, 64 * p // 8), np.uint8) for p in PLANES[bits]]
    packed = pack(unpack(planes, bits), bits, 64)
    assert all(np.array_equal(a, b) for a, b in zip(packed, planes, strict=True))


def test_pack_refuses_codes_that_do_not_fit_and_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="code 8 does not fit into 3 bits"):
        pack(np.full((1, 16), 8, np.uint8), 3, 16)
    with pytest.raises(ValueError, match="group 16 does not divide 24 columns"):
        pack(np.zeros((1, 24), np.uint8), 4, 16)


def example_rows() -> list[tuple[int, list[int], dict[str, bytes], list[float]]]:
    """The worked example of SPEC.md, section 5: bits, codes, bytes per plane, values."""
    section = SPEC.read_text(encoding="utf-8").split("\n## 5 ")[1].split("\n## 6 ")[0]
    rows = []
    for bits, codes, planes, numbers in re.findall(r"^\| (\d) \| ([\d ]+) \| (q.*?) \| (.*) \|$", section, re.M):
        parts = {name: bytes.fromhex(text) for name, text in re.findall(r"(q\d): ([0-9a-f ]+)", planes)}
        rows.append(
            (int(bits), [*map(int, codes.split())], parts, [float(n.replace("−", "-")) for n in numbers.split()])
        )
    return rows


def test_the_worked_example_has_a_row_for_every_width() -> None:
    assert tuple(row[0] for row in example_rows()) == BITS


@pytest.mark.parametrize(("bits", "codes", "planes", "expected"), example_rows())
def test_worked_example_of_the_specification(
    bits: int, codes: list[int], planes: dict[str, bytes], expected: list[float]
) -> None:
    assert list(planes) == [f"q{p}" for p in PLANES[bits]]
    stored = [np.frombuffer(part, np.uint8).reshape(1, 1, -1) for part in planes.values()]
    assert [element(stored, bits, 16, 0, column) for column in range(16)] == codes
    assert [packed.tobytes() for packed in pack(np.array([codes], np.uint8), bits, 16)] == list(planes.values())
    assert dequantize(stored, bits, np.full((1, 1), 0.5, np.float16), None).tolist() == [expected]


def test_bf16_keeps_every_pattern_and_rounds_to_nearest_even() -> None:
    patterns = np.arange(1 << 16, dtype=np.uint16)
    wide = bf16_to_f32(patterns)
    number = ~np.isnan(wide)
    assert np.array_equal(f32_to_bf16(wide)[number], patterns[number])
    assert np.isnan(bf16_to_f32(f32_to_bf16(wide[~number]))).all()
    # 1 + 2^-8 lies half-way between 1 and 1 + 2^-7: the even one is 1; a little more goes up.
    halves = np.array([1 + 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-7 + 2**-8, -1 - 2**-8], np.float32)
    assert bf16_to_f32(f32_to_bf16(halves)).tolist() == [1, 1 + 2**-7, 1 + 2**-6, -1]


@pytest.mark.parametrize(("dtype", "bad"), [("f32", np.nan), ("f16", np.inf), ("bf16", 0x7F80), ("bf16", 0xFFC1)])
def test_the_first_value_that_is_not_finite_is_found(dtype: str, bad: float) -> None:
    kind = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}[dtype]
    array = np.ones((3, 5), kind)
    assert first_not_finite(array, dtype) is None
    array[1, 2] = bad
    array[2, 2] = bad
    assert first_not_finite(array, dtype) == 7
    large = np.ones((1 << 20) + 9, kind)
    large[-2] = bad
    assert first_not_finite(large, dtype) == large.size - 2
    assert first_not_finite(np.full(4, 255, np.uint8), "u8") is None


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_the_largest_magnitude_is_that_of_all_values(dtype: str) -> None:
    values = np.random.default_rng(0).standard_normal(((1 << 20) + 9, 1)).astype(np.float32)
    values[-3] = -7.5
    raw = f32_to_bf16(values) if dtype == "bf16" else values.astype({"f32": np.float32, "f16": np.float16}[dtype])
    assert largest_magnitude(raw, dtype) == 7.5
    assert largest_magnitude(raw[:0], dtype) == 0
    for bad, found in ((-np.inf, np.isinf), (np.nan, np.isnan)):
        raw[5] = f32_to_bf16(np.full(1, bad, np.float32)) if dtype == "bf16" else bad
        assert found(largest_magnitude(raw, dtype))
        assert not largest_magnitude(raw, dtype) < 1e30
