"""Triton kernels: products with packed integers, and rows of them.

Integers are read as the file stores them (formats/SPEC.md): a plane of p bits is row-major, low bits first. Every byte is read
once and spread over the lanes by interleaving. The kernels also run in Triton's interpreter on a CPU (TRITON_INTERPRET=1),
which is how the tests check them without a GPU.

Shapes: T tokens, R rows (outputs) and C columns (inputs) of a matrix. C is a constant of the compiled kernel, so that loads
are as wide as the alignment of rows allows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def spread(packed, BITS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Bytes [R, N] as codes [R, N · 8 / BITS] of BITS bits, in the order of the columns."""
    if BITS == 8:
        codes = packed
    elif BITS == 4:
        codes = tl.interleave(packed & 15, packed >> 4)
    elif BITS == 2:
        codes = tl.interleave(
            tl.interleave(packed & 3, (packed >> 4) & 3), tl.interleave((packed >> 2) & 3, packed >> 6)
        )
    else:
        even = tl.interleave(
            tl.interleave(packed & 1, (packed >> 4) & 1), tl.interleave((packed >> 2) & 1, (packed >> 6) & 1)
        )
        odd = tl.interleave(
            tl.interleave((packed >> 1) & 1, (packed >> 5) & 1), tl.interleave((packed >> 3) & 1, packed >> 7)
        )
        codes = tl.interleave(even, odd)
    return codes


# How several tokens are multiplied: on the matrix units in bf16; in float32; or rounded to bf16 and multiplied in float32, for
# the interpreter, which takes the bits of bf16 for integers in `tl.dot`.
BF16, EXACT, EMULATED = 0, 1, 2


@triton.jit
def plane_codes(plane, row, first, rows, INPUTS: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes [R, COUNT] of a plane from column `first` on, 0 outside of the matrix."""
    byte = first * BITS // 8 + tl.arange(0, COUNT * BITS // 8)
    width: tl.constexpr = INPUTS * BITS // 8
    inside = row[:, None] < rows
    if INPUTS % COUNT != 0:
        inside = inside & (byte[None, :] < width)
    packed = tl.load(plane + row[:, None].to(tl.int64) * width + byte[None, :], mask=inside, other=0).to(tl.int32)
    return spread(packed, BITS)


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    low, high, scale, zero, row, first, rows,
    INPUTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The weights scale · (q − zero) [R, COUNT] in float32 from column `first` on, 0 outside of the matrix.

    COUNT is a multiple of GROUP, or divides it.
    """
    codes = plane_codes(low, row, first, rows, INPUTS, LOW, COUNT)
    if HIGH > 0:
        codes = codes | (plane_codes(high, row, first, rows, INPUTS, HIGH, COUNT) << LOW)
    groups: tl.constexpr = INPUTS // GROUP
    within: tl.constexpr = COUNT // GROUP if COUNT > GROUP else 1
    group = first // GROUP + tl.arange(0, within)
    place = row[:, None].to(tl.int64) * groups + group[None, :]
    inside = (row[:, None] < rows) & (group[None, :] < groups)
    factor = tl.load(scale + place, mask=inside, other=0).to(tl.float32)
    if ZEROS:
        middle = tl.load(zero + place, mask=inside, other=0).to(tl.float32)
    else:
        middle = tl.zeros_like(factor) + (1.5 if LOW + HIGH == 2 else (1 << (LOW + HIGH - 1)))
    parts = tl.reshape(codes.to(tl.float32), (row.shape[0], within, COUNT // within))
    return tl.reshape(parts * factor[:, :, None] - (middle * factor)[:, :, None], (row.shape[0], COUNT))


@triton.jit
def product_tile(  # type: ignore[no-untyped-def]
    x, y, tile, tokens, width, at, low, high, scale, zero, rows,
    INPUTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """One tile of y [PARTS, T, width], columns `at` and on, = x [T, C] · weights [R, C]ᵀ over a share of the columns."""
    row = tile * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    chunks: tl.constexpr = (((INPUTS + COLUMNS - 1) // COLUMNS) + PARTS - 1) // PARTS
    if TOKENS == 1:
        token = tl.program_id(1)
        sums = tl.zeros((ROWS, COLUMNS), tl.float32)
        for step in range(chunks):
            first = (part * chunks + step) * COLUMNS
            column = first + tl.arange(0, COLUMNS)
            w = weights_of(low, high, scale, zero, row, first, rows, INPUTS, LOW, HIGH, GROUP, ZEROS, COLUMNS)
            values = tl.load(x + token * INPUTS + column, mask=column < INPUTS, other=0).to(tl.float32)
            sums += w * values[None, :]
        tl.store(y + (part * tokens + token).to(tl.int64) * width + at + row, tl.sum(sums, 1), mask=row < rows)
    else:
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        several = tl.zeros((ROWS, TOKENS), tl.float32)
        for step in range(chunks):
            first = (part * chunks + step) * COLUMNS
            column = first + tl.arange(0, COLUMNS)
            w = weights_of(low, high, scale, zero, row, first, rows, INPUTS, LOW, HIGH, GROUP, ZEROS, COLUMNS)
            inside = (token[:, None] < tokens) & (column[None, :] < INPUTS)
            values = tl.load(x + token[:, None].to(tl.int64) * INPUTS + column[None, :], mask=inside, other=0)
            if MODE == 1:
                several += tl.dot(w, tl.trans(values.to(tl.float32)), input_precision="ieee")
            elif MODE == 2:
                rounded = values.to(tl.float32).to(tl.bfloat16).to(tl.float32)
                several += tl.dot(w.to(tl.bfloat16).to(tl.float32), tl.trans(rounded))
            else:
                several += tl.dot(w.to(tl.bfloat16), tl.trans(values.to(tl.bfloat16)))
        place = (part * tokens + token[None, :]).to(tl.int64) * width + at + row[:, None]
        tl.store(y + place, several, mask=(token[None, :] < tokens) & (row[:, None] < rows))


@triton.jit
def integer_products(  # type: ignore[no-untyped-def]
    x, y, tokens, width,
    low0, high0, scale0, zero0, rows0,
    low1, high1, scale1, zero1, rows1,
    low2, high2, scale2, zero2, rows2,
    INPUTS: tl.constexpr, MATRICES: tl.constexpr,
    LOW0: tl.constexpr, HIGH0: tl.constexpr, GROUP0: tl.constexpr, ZEROS0: tl.constexpr,
    LOW1: tl.constexpr, HIGH1: tl.constexpr, GROUP1: tl.constexpr, ZEROS1: tl.constexpr,
    LOW2: tl.constexpr, HIGH2: tl.constexpr, GROUP2: tl.constexpr, ZEROS2: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """y [PARTS, T, width] = x [T, C] times one, two or three matrices with the same input, stored in any way each.

    Their outputs stand side by side; each part sums a share of the columns. TOKENS 1 multiplies on the vector units in
    float32, more tokens on the matrix units.
    """
    tile = tl.program_id(0)
    begin1 = tl.cdiv(rows0, ROWS)
    if tile < begin1:
        product_tile(
            x, y, tile, tokens, width, 0, low0, high0, scale0, zero0, rows0,
            INPUTS, LOW0, HIGH0, GROUP0, ZEROS0, ROWS, COLUMNS, TOKENS, PARTS, MODE,
        )  # fmt: skip
    if MATRICES > 1:
        begin2 = begin1 + tl.cdiv(rows1, ROWS)
        if (tile >= begin1) & (tile < begin2):
            product_tile(
                x, y, tile - begin1, tokens, width, rows0, low1, high1, scale1, zero1, rows1,
                INPUTS, LOW1, HIGH1, GROUP1, ZEROS1, ROWS, COLUMNS, TOKENS, PARTS, MODE,
            )  # fmt: skip
        if MATRICES > 2:  # noqa: SIM102 - of a constant, so that the rest is not compiled
            if tile >= begin2:
                product_tile(
                    x, y, tile - begin2, tokens, width, rows0 + rows1, low2, high2, scale2, zero2, rows2,
                    INPUTS, LOW2, HIGH2, GROUP2, ZEROS2, ROWS, COLUMNS, TOKENS, PARTS, MODE,
                )  # fmt: skip


@triton.jit
def integer_rows(  # type: ignore[no-untyped-def]
    ids, low, high, scale, zero, y, rows,
    INPUTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [T, C] = the rows `ids` [T] of the weights: the embedding of tokens."""
    token = tl.program_id(0)
    row = tl.load(ids + token + tl.zeros((1,), tl.int32)).to(tl.int32)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    w = weights_of(low, high, scale, zero, row, first, rows, INPUTS, LOW, HIGH, GROUP, ZEROS, COLUMNS)
    tl.store(y + token.to(tl.int64) * INPUTS + column[None, :], w, mask=column[None, :] < INPUTS)
