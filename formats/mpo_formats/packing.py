"""The layout of integers, in numpy: the reference that every kernel is tested against (SPEC.md, section 5).

A matrix [rows, columns] is cut into groups along its columns. Its codes q are unsigned integers of `bits` bits, stored
as one or two bit planes, low bits first: 8, 4 and 2 bits as they are, 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1. In a plane of
p bits, element j of a group lies in byte ⌊j·p/8⌋ from bit (j·p) mod 8 upwards.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats.layout import PLANES

Codes = NDArray[np.uint8]
# Values that are checked at once, so that checking a large tensor needs little memory.
FINITE_CHUNK = 1 << 20


def pack(codes: Codes, bits: int, group: int) -> list[Codes]:
    """Packs codes [rows, columns] into planes [rows, columns/group, group·p/8], low plane first.

    Raises:
        ValueError: when a code does not fit into `bits` bits or the group does not divide the columns.
    """
    rows, columns = codes.shape
    if columns % group:
        raise ValueError(f"group {group} does not divide {columns} columns")
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    planes, shift = [], 0
    for plane in PLANES[bits]:
        part = (codes >> shift) & np.uint8((1 << plane) - 1)
        shift += plane
        lanes = part.reshape(rows, columns // group, group * plane // 8, 8 // plane)
        packed = np.zeros(lanes.shape[:-1], np.uint8)
        for lane in range(8 // plane):
            packed |= lanes[..., lane] << np.uint8(lane * plane)
        planes.append(packed)
    return planes


def unpack(planes: list[Codes], bits: int) -> Codes:
    """Unpacks planes [rows, groups, bytes] into codes [rows, groups·group]; the inverse of `pack`."""
    codes: Codes | None = None
    shift = 0
    for plane, packed in zip(PLANES[bits], planes, strict=True):
        shifts = np.arange(0, 8, plane, dtype=np.uint8)
        lanes = (packed[..., None] >> shifts) & np.uint8((1 << plane) - 1)  # [rows, groups, bytes, 8/p]
        part = lanes.reshape(packed.shape[0], -1) << np.uint8(shift)
        codes = part if codes is None else codes | part
        shift += plane
    if codes is None:
        raise ValueError("no planes given")
    return codes


def implicit_zero(bits: int) -> float:
    """The zero of groups that store none: 2^(bits − 1), but 1.5 at 2 bits, which makes the four levels symmetric."""
    return 1.5 if bits == 2 else float(1 << (bits - 1))


def dequantize(
    planes: list[Codes], bits: int, scale: NDArray[np.float16], zero: NDArray[np.float16] | None
) -> NDArray[np.float64]:
    """The weights w = scale · (q − zero) [rows, columns] in float64; zero None stands for `implicit_zero`."""
    codes = unpack(planes, bits).astype(np.float64)
    rows, groups = scale.shape
    grouped = codes.reshape(rows, groups, -1)
    offset = implicit_zero(bits) if zero is None else zero.astype(np.float64)[..., None]
    return (scale.astype(np.float64)[..., None] * (grouped - offset)).reshape(rows, -1)


def bf16_to_f32(raw: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Widens bf16 bit patterns to float32, exactly."""
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Rounds float32 to bf16 bit patterns, to nearest even; NaN stays NaN."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def first_not_finite(values: NDArray[Any], dtype: str) -> int | None:
    """The flat index of the first NaN or infinity of a tensor of type `dtype`, None where all values are finite."""
    if dtype == "u8":
        return None
    flat = values.reshape(-1)
    for start in range(0, flat.size, FINITE_CHUNK):
        part = flat[start : start + FINITE_CHUNK]
        # A bf16 is not finite where all eight exponent bits are set.
        finite = (part & np.uint16(0x7F80)) != 0x7F80 if dtype == "bf16" else np.isfinite(part)
        if not finite.all():
            return start + int(np.argmin(finite))
    return None


def largest_magnitude(values: NDArray[Any], dtype: str) -> float:
    """The largest absolute value of a float tensor of type `dtype`, 0 if it is empty; infinity or NaN where one is not finite."""
    flat, largest = values.reshape(-1), 0.0
    for start in range(0, flat.size, FINITE_CHUNK):
        part = flat[start : start + FINITE_CHUNK]
        # The bit patterns of numbers without their sign are in the order of their size, infinity and NaN last.
        peak = bf16_to_f32((part & np.uint16(0x7FFF)).max()[None])[0] if dtype == "bf16" else np.abs(part).max()
        largest = float(np.maximum(largest, peak))  # keeps NaN
    return largest


def hadamard_signs(block: int) -> NDArray[np.float64]:
    """The matrix S [block, block] of ±1 with S[j, k] = (−1)^(number of bits that j and k have in common).

    `block` is a power of two. S / √block is the Hadamard transform H (in Sylvester's order): symmetric, its own inverse.
    """
    signs = np.ones((1, 1))
    while len(signs) < block:
        signs = np.block([[signs, signs], [signs, -signs]])
    return signs


def hadamard_transform(rows: NDArray[Any], block: int) -> NDArray[Any]:
    """The Hadamard transform of every block of `block` elements along the last axis of `rows` [..., n]; 0 changes nothing."""
    if not block:
        return rows
    blocks = rows.reshape(-1, block) @ hadamard_signs(block).astype(rows.dtype)
    blocks *= rows.dtype.type(block**-0.5)
    result: NDArray[Any] = blocks.reshape(rows.shape)
    return result


def block_transform(rows: NDArray[Any], matrices: NDArray[Any]) -> NDArray[Any]:
    """T x for every vector x along the last axis of `rows` [..., n], where T has the matrices [1 or n/b, b, b] on its diagonal.

    The single matrix, if it is one, is that of every block.
    """
    count, block, _ = matrices.shape
    turned = matrices.transpose(0, 2, 1).astype(rows.dtype)
    if count == 1:
        result: NDArray[Any] = (rows.reshape(-1, block) @ turned[0]).reshape(rows.shape)
        return result
    blocks = rows.reshape(-1, count, block).swapaxes(0, 1) @ turned  # [n/b, rows, b]
    result = np.ascontiguousarray(blocks.swapaxes(0, 1)).reshape(rows.shape)
    return result
