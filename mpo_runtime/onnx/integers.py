"""Integer terms in the containers that ONNX Runtime multiplies with: 2, 4 and 8 bits. Values are exact in all of them.

The CPU kernels decide which container is used (measured on onnxruntime 1.32, a 2,048 × 2,048 matrix, one token, 2 cores): with
activations rounded to int8 (accuracy level 4) 8, 4 and 2 bits take 0.05 to 0.17 ms, 2 bits in groups of 32 to 128 only. With
float activations (level 0) only 4 bits have a kernel (0.2 to 0.35 ms); 2 and 8 bits are turned into floats at every call, which
takes 4 to 15 ms. Zeros that are no whole numbers are turned into floats in the same way, at both levels. So

- 3 bits are stored in 4, 5 and 6 in 8, 2 bits where they have no kernel in 4;
- at level 0, 5 to 8 bits are two matrices of 4: the high and the low half of each code;
- a zero that is no whole number is not given to the product: its share is scale · zero · (sum of the group's inputs), one small
  matrix product more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats.packing import implicit_zero, pack

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]
# Groups for which there is a 2-bit kernel.
TWO_BIT_GROUPS = (32, 64, 128)
LEVELS = (0, 4)


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix w = scale · (code − zero) as MatMulNBits and GatherBlockQuantized take it.

    codes [N, G, group·bits/8] packed low bits first, scale [N, G], zeros [N, ⌈G·bits/8⌉] packed in the same way, or None for
    2^(bits − 1) in every group.
    """

    bits: int
    group: int
    codes: Codes
    scale: Floats
    zeros: Codes | None

    @property
    def nbytes(self) -> int:
        """Bytes of the codes and zeros; scales are stored in the graph's type."""
        return self.codes.nbytes + (0 if self.zeros is None else self.zeros.nbytes)


@dataclass(frozen=True, slots=True)
class Integers:
    """A matrix as a sum of blocks, and of an offset [N, G] that all elements of a group have in common, or None."""

    blocks: tuple[Blocks, ...]
    offset: Floats | None

    def matrix(self) -> NDArray[np.float64]:
        """The matrix [N, K] in float64, for tests."""
        total = sum(dequantised(block) for block in self.blocks)
        if self.offset is not None:
            total = total + np.repeat(self.offset.astype(np.float64), self.blocks[0].group, axis=1)
        return np.asarray(total)


def joined(parts: Sequence[Integers]) -> Integers | None:
    """Matrices of one width below each other as one; None where they are stored in different forms."""
    forms = {tuple((one.bits, one.group, one.zeros is None) for one in part.blocks) for part in parts}
    offsets = [part.offset for part in parts if part.offset is not None]
    if len(forms) != 1 or len(offsets) not in (0, len(parts)):
        return None
    stacked = []
    for same in zip(*(part.blocks for part in parts), strict=True):
        zeros = [one.zeros for one in same if one.zeros is not None]
        codes, scale = (np.concatenate([getattr(one, name) for one in same]) for name in ("codes", "scale"))
        stacked.append(Blocks(same[0].bits, same[0].group, codes, scale, np.concatenate(zeros) if zeros else None))
    return Integers(tuple(stacked), np.concatenate(offsets) if offsets else None)


def lay_out(
    codes: Codes,
    bits: int,
    group: int,
    scale: NDArray[Any],
    zero: NDArray[Any] | None,
    *,
    level: int,
    whole: bool = True,
) -> Integers:
    """Chooses the containers of a matrix and fills them.

    Args:
        codes: [N, K], as `packing.unpack` gives them.
        scale, zero: [N, G]; zero None for `packing.implicit_zero`.
        level: accuracy level 0 or 4.
        whole: stores zeros that are whole numbers with the codes; otherwise blocks have no zeros, all are in the offset.
    """
    scale = np.asarray(scale, np.float32)
    middle, width = implicit_zero(bits), container(bits, group, level)
    if zero is None and bits == 2 and width == 4:
        # s · (q − 1.5) = s/2 · ((2q + 5) − 8)
        return Integers((blocks(codes * np.uint8(2) + np.uint8(5), 4, group, np.float32(0.5) * scale, None),), None)
    given = np.full_like(scale, middle) if zero is None else zero.astype(np.float32)
    if zero is not None and whole and bool(np.all((given == np.rint(given)) & (given >= 0) & (given < 1 << bits))):
        return Integers(split(codes, bits, width, group, scale, given.astype(np.uint8)), None)
    # With the shift of `split` the container's own zero, 2^(c − 1), stands for the middle of the codes.
    offset = scale * (np.float32(np.ceil(middle)) - given)
    parts = split(codes, bits, width, group, scale, None)
    if len(parts) > 1 and not whole:
        parts = parts[0], replace(parts[1], zeros=None)
        offset += np.float32(8) * scale
    return Integers(parts, offset if offset.any() else None)


def container(bits: int, group: int, level: int) -> int:
    """The bits in which codes of `bits` bits are stored for an accuracy level; 4 for more than 4 bits means two blocks."""
    if level == 4 and bits > 4:
        return 8
    return 2 if level == 4 and bits == 2 and group in TWO_BIT_GROUPS else 4


def split(codes: Codes, bits: int, width: int, group: int, scale: Floats, zero: Codes | None) -> tuple[Blocks, ...]:
    """The blocks of `width` bits of a matrix w = scale · (code − zero), zero None for 2^(bits − 1)."""
    half = 1 << (bits - 1)
    if bits <= width:
        if zero is None:
            codes = codes + np.uint8((1 << (width - 1)) - half)
        return (blocks(codes, width, group, scale, zero),)
    high, low = codes >> np.uint8(4), codes & np.uint8(15)
    if zero is None:
        above = blocks(high + np.uint8(8 - half // 16), 4, group, scale * np.float32(16), None)
        return above, blocks(low, 4, group, scale, np.zeros(scale.shape, np.uint8))
    return (
        blocks(high, 4, group, scale * np.float32(16), zero >> np.uint8(4)),
        blocks(low, 4, group, scale, zero & np.uint8(15)),
    )


def blocks(codes: Codes, bits: int, group: int, scale: Floats, zero: Codes | None) -> Blocks:
    """Packs codes [N, K] and whole zeros [N, G]."""
    [packed] = pack(codes, bits, group)
    return Blocks(bits, group, packed, scale, None if zero is None else pack_zeros(zero, bits))


def pack_zeros(zero: Codes, bits: int) -> Codes:
    """Packs zeros [N, G] to [N, ⌈G·bits/8⌉], low bits first; what is left of the last byte is 0."""
    lanes = 8 // bits
    padded = np.pad(zero, ((0, 0), (0, -zero.shape[1] % lanes)))
    [packed] = pack(padded, bits, padded.shape[1])
    return packed.reshape(zero.shape[0], -1)


def dequantised(block: Blocks) -> NDArray[np.float64]:
    """The matrix [N, K] of one block in float64."""
    lanes = np.arange(0, 8, block.bits, dtype=np.uint8)
    mask = np.uint8((1 << block.bits) - 1)
    rows, groups = block.scale.shape
    codes = ((block.codes[..., None] >> lanes) & mask).reshape(rows, groups, block.group).astype(np.float64)
    if block.zeros is None:
        zero = np.full((rows, groups), float(1 << (block.bits - 1)))
    else:
        zero = ((block.zeros[..., None] >> lanes) & mask).reshape(rows, -1)[:, :groups].astype(np.float64)
    matrix: NDArray[np.float64] = block.scale.astype(np.float64)[..., None] * (codes - zero[..., None])
    return matrix.reshape(rows, -1)
