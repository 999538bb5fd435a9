"""Integers in the containers of ONNX Runtime: every width, level and kind of zero keeps its values exactly."""

from __future__ import annotations

import numpy as np
import pytest

from mpo_formats.packing import dequantize, pack
from mpo_formats.spec import BITS, GROUPS
from mpo_runtime.onnx.integers import LEVELS, TWO_BIT_GROUPS, container, joined, lay_out, pack_zeros

ROWS, GROUPED = 5, 3


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("zeros", ["none", "whole", "fractions", "outside"])
@pytest.mark.parametrize("whole", [True, False])
def test_values_stay_exact(bits: int, group: int, level: int, zeros: str, whole: bool) -> None:
    random = np.random.default_rng(bits * group + level)
    codes = random.integers(0, 1 << bits, (ROWS, GROUPED * group)).astype(np.uint8)
    codes[0, :2] = 0, (1 << bits) - 1
    # Few digits, so that float32 holds every product and sum of the offset.
    scale = (random.integers(-63, 64, (ROWS, GROUPED)) / 64).astype(np.float16)
    zero = {
        "none": None,
        "whole": random.integers(0, 1 << bits, scale.shape).astype(np.float16),
        "fractions": (random.integers(0, 8 << bits, scale.shape) / 8).astype(np.float16),
        "outside": np.full(scale.shape, (1 << bits) + 3, np.float16),
    }[zeros]
    laid = lay_out(codes, bits, group, scale, zero, level=level, whole=whole)
    expected = dequantize(pack(codes, bits, group), bits, scale, zero)
    np.testing.assert_array_equal(laid.matrix(), expected)
    assert {block.bits for block in laid.blocks} == {container(bits, group, level)}
    if not whole:
        assert all(block.zeros is None for block in laid.blocks)
    if zeros == "whole" and whole:
        assert laid.offset is None and all(block.zeros is not None for block in laid.blocks)
    if zeros == "none" and bits > 2 and whole:
        assert laid.offset is None, "the zero that no group stores costs nothing"


def test_containers() -> None:
    assert [container(bits, 64, 4) for bits in (2, 3, 4, 5, 6, 8)] == [2, 4, 4, 8, 8, 8]
    assert [container(bits, 64, 0) for bits in (2, 3, 4, 5, 6, 8)] == [4] * 6
    assert [group for group in GROUPS if container(2, group, 4) == 2] == list(TWO_BIT_GROUPS)


def test_zeros_are_packed_low_bits_first() -> None:
    assert pack_zeros(np.array([[1, 2, 3]], np.uint8), 4).tolist() == [[0x21, 0x03]]
    assert pack_zeros(np.array([[1, 2, 3]], np.uint8), 2).tolist() == [[0b111001]]
    assert pack_zeros(np.array([[1, 200]], np.uint8), 8).tolist() == [[1, 200]]


def test_matrices_of_one_form_are_joined() -> None:
    random = np.random.default_rng(0)
    codes = random.integers(0, 16, (ROWS, 64)).astype(np.uint8)
    scale = (random.integers(1, 64, (ROWS, 2)) / 64).astype(np.float16)
    whole = random.integers(0, 16, scale.shape).astype(np.float16)
    plain, zeros, fractions = (
        lay_out(codes, 4, 32, scale, zero, level=4) for zero in (None, whole, whole + np.float16(0.5))
    )
    eight = lay_out(codes, 8, 32, scale, None, level=4)
    for part in (plain, zeros, fractions):
        both = joined([part, part])
        assert both is not None
        np.testing.assert_array_equal(both.matrix(), np.concatenate([part.matrix()] * 2))
    assert joined([plain, zeros]) is None and joined([plain, fractions]) is None and joined([plain, eight]) is None
