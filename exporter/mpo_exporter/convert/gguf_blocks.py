"""Integers of a `.mpo` file as blocks of llama.cpp's types: exactly where a type holds them, else rounded to the nearest.

A block of Q4_0, Q5_0 and Q8_0 is w = d · q with signed codes of 32 columns, one of Q4_1 and Q5_1 is w = d · q + m with
unsigned ones; d and m are half-precision numbers. A block of Q6_K has 256 columns, w = d · s · q, with a signed byte s for each
16 columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK, SUPER, SUB = 32, 256, 16
Bytes = NDArray[np.uint8]
# What is added to a signed code before it is packed.
MIDDLE = {"Q4_0": 8, "Q4_1": 0, "Q5_0": 16, "Q5_1": 0, "Q8_0": 0}


@dataclass(frozen=True, slots=True)
class Integers:
    """Codes [rows, columns], scales [rows, groups] and zeros [rows, groups]: w = scale · (code − zero)."""

    codes: NDArray[np.int16]
    scale: NDArray[np.float32]
    zero: NDArray[np.float32]
    zeros: bool
    bits: int

    @property
    def group(self) -> int:
        """Columns of a group."""
        return int(self.codes.shape[1] // self.scale.shape[1])

    def values(self) -> NDArray[np.float32]:
        """The weights."""
        rows, columns = self.codes.shape
        codes = self.codes.reshape(rows, -1, self.group).astype(np.float32)
        found: NDArray[np.float32] = (self.scale[..., None] * (codes - self.zero[..., None])).reshape(rows, columns)
        return found


def choose_type(integers: Integers) -> tuple[str, bool]:
    """The name of the type for these integers, and whether it holds them exactly; F16 where no block fits the columns."""
    columns = integers.codes.shape[1]
    if columns % BLOCK:
        return "F16", False
    if integers.group % BLOCK or (integers.zeros and integers.bits > 5):
        return "Q8_0", False
    if integers.zeros:  # exact but for the rounding of m = -scale · zero
        return ("Q4_1" if integers.bits <= 4 else "Q5_1"), False
    if integers.bits == 6 and columns % SUPER == 0:
        return "Q6_K", False
    exact = integers.bits > 2 or bool(np.all(integers.scale / 2 == halved(integers.scale)))
    return {8: "Q8_0", 6: "Q8_0", 5: "Q5_0"}.get(integers.bits, "Q4_0"), exact


def halved(scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half of the scales, rounded to half precision: the smallest ones lose a bit."""
    return (scale / 2).astype(np.float16).astype(np.float32)


def packed(integers: Integers, kind: str) -> Bytes:
    """The bytes [rows, bytes of a row] of a type that `choose_type` names with the scales of the file."""
    if kind == "Q6_K":
        return super_blocks(integers)
    repeats = integers.group // BLOCK
    scale = np.repeat(integers.scale, repeats, axis=1)  # [rows, blocks]
    codes, scale = signed_codes(integers, scale)
    parts: list[NDArray[Any]] = [halves(scale)]
    if integers.zeros:
        parts.append(halves(np.repeat(-integers.scale * integers.zero, repeats, axis=1)))
    blocks = (codes + MIDDLE[kind]).reshape(len(codes), -1, BLOCK)
    if kind == "Q8_0":
        parts.append(blocks.astype(np.int8).view(np.uint8))
    else:
        if kind in ("Q5_0", "Q5_1"):
            parts.append(np.packbits((blocks >> 4).astype(np.uint8), axis=-1, bitorder="little"))
        low = (blocks & 15).astype(np.uint8)
        parts.append(low[..., :16] | (low[..., 16:] << 4))
    return np.concatenate(parts, axis=-1).reshape(len(codes), -1)


def signed_codes(integers: Integers, scale: NDArray[np.float32]) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """The codes with 0 in their middle, and the scales; with stored zeros both as they are.

    The levels of 2 bits, -1.5, -0.5, 0.5 and 1.5 scales, are -3, -1, 1 and 3 of half the scale.
    """
    if integers.zeros:
        return integers.codes, scale
    if integers.bits == 2:
        return 2 * integers.codes - 3, scale * np.float32(0.5)
    return integers.codes - (1 << (integers.bits - 1)), scale


def halves(values: NDArray[Any]) -> Bytes:
    """Numbers [rows, blocks] as half-precision bytes [rows, blocks, 2]."""
    return values.astype(np.float16)[..., None].view(np.uint8)


def super_blocks(integers: Integers) -> Bytes:
    """Q6_K: the scales of a superblock as multiples of one number, and codes that are rounded again to these."""
    rows, columns = integers.codes.shape
    weights = integers.values().reshape(rows, -1, SUPER // SUB, SUB)
    scale = np.repeat(integers.scale, integers.group // SUB, axis=1).reshape(rows, -1, SUPER // SUB)
    largest = np.abs(scale).max(-1, keepdims=True)
    unit = (largest / 127).astype(np.float16)
    inverse = np.divide(1, unit.astype(np.float32), out=np.zeros_like(largest), where=unit != 0)
    bytes_ = np.clip(np.round(scale * inverse), -128, 127).astype(np.int8)
    step = unit.astype(np.float32) * bytes_
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step != 0)
    codes = np.clip(np.round(weights * inverse[..., None]), -32, 31).astype(np.int16) + 32
    codes = codes.reshape(rows, -1, 2, 4, 32)  # halves of 128 columns, each of 4 quarters of 32
    low, high = (codes & 15).astype(np.uint8), (codes >> 4).astype(np.uint8)
    lower = low[..., :2, :] | (low[..., 2:, :] << 4)  # [rows, blocks, 2, 2, 32]
    upper = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    blocks = columns // SUPER
    parts = [
        lower.reshape(rows, blocks, -1),
        upper.reshape(rows, blocks, -1),
        bytes_.reshape(rows, blocks, -1).view(np.uint8),
        unit.view(np.uint8).reshape(rows, blocks, 2),
    ]
    return np.concatenate(parts, axis=-1).reshape(rows, -1)
