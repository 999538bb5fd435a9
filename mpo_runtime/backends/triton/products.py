"""Triton kernels: products with packed integers, rows of them, and whole matrices as floats.

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
def spread(  # type: ignore[no-untyped-def]
    packed, FIRST: tl.constexpr, STEP: tl.constexpr, COUNT: tl.constexpr, BITS: tl.constexpr, MOVED: tl.constexpr
):
    """The codes of BITS bits at the places FIRST, FIRST + STEP, … of integers [R, N], as [R, N · COUNT] in order.

    MOVED to bit 0, a shift and a mask for each; else left at their place in a half word of 16 bits, a mask for each.
    """
    if COUNT == 1:
        if MOVED:  # noqa: SIM108 - of constants, so that one of them is compiled
            codes = (packed >> FIRST) & ((1 << BITS) - 1)
        else:
            codes = (packed >> (FIRST // 16 * 16)) & (((1 << BITS) - 1) << (FIRST % 16))
    else:
        even = spread(packed, FIRST, 2 * STEP, COUNT // 2, BITS, MOVED)
        odd = spread(packed, FIRST + STEP, 2 * STEP, COUNT // 2, BITS, MOVED)
        codes = tl.interleave(even, odd)
    return codes


# How several tokens are multiplied: on the matrix units in bf16; in float32; or rounded to bf16 and multiplied in float32, for
# the interpreter, which takes the bits of bf16 for integers in `tl.dot`.
BF16, EXACT, EMULATED = 0, 1, 2
# Columns whose products are added up before they are scaled; every group is a multiple.
CHUNK = tl.constexpr(8)
# A code q at bit p, taken for a float, is q · 2^(p − 149). What it is multiplied with is raised by 2^(RAISED − p), so that
# products are LOWERED.
RAISED, LOWERED = tl.constexpr(100), tl.constexpr(2.0**-49)


@triton.jit
def plane_codes(  # type: ignore[no-untyped-def]
    plane, row, first, rows, INPUTS: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, MOVED: tl.constexpr
):
    """The codes [R, COUNT] of a plane from column `first` on, 0 outside of the matrix; where their bits are: `spread`.

    The plane is read as it is typed: in words of 32 bits where its rows are whole words, else in bytes.
    """
    word: tl.constexpr = 32 if plane.dtype.element_ty == tl.int32 else 8
    width: tl.constexpr = INPUTS * BITS // word
    place = first * BITS // word + tl.arange(0, COUNT * BITS // word)
    inside = row[:, None] < rows
    if INPUTS % COUNT != 0:
        inside = inside & (place[None, :] < width)
    packed = tl.load(plane + row[:, None].to(tl.int64) * width + place[None, :], mask=inside, other=0).to(tl.int32)
    return spread(packed, 0, BITS, word // BITS, BITS, MOVED)


@triton.jit
def plane_products(  # type: ignore[no-untyped-def]
    plane, values, row, first, rows,
    INPUTS: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr, WITHIN: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """LOWERED · 2^UP · Σ code · value of CHUNK columns each [R, WITHIN, …], of a plane's COUNT columns from `first` on.

    The bits of a code are taken for a float, a subnormal one: that needs neither shift nor conversion. Nothing may flush it to
    0: Triton compiles without such (tests/kernels/compile_triton.py).
    """
    word: tl.constexpr = 16 if plane.dtype.element_ty == tl.int32 else 8
    at = tl.arange(0, COUNT) * BITS % word  # where each code lies
    power = ((127 - at + RAISED + UP) << 23).to(tl.float32, bitcast=True)
    codes = plane_codes(plane, row, first, rows, INPUTS, BITS, COUNT, False)
    products = codes.to(tl.float32, bitcast=True) * (values * power)[None, :]
    return tl.sum(tl.reshape(products, (row.shape[0], WITHIN, COUNT // CHUNK // WITHIN, CHUNK)), 3)


@triton.jit
def grids_of(  # type: ignore[no-untyped-def]
    scale, zero, row, first, rows,
    INPUTS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Scales and zeros of the groups [R, G] from column `first` on; scales are 0 outside of the matrix."""
    groups: tl.constexpr = INPUTS // GROUP
    group = first // GROUP + tl.arange(0, COUNT // GROUP if COUNT > GROUP else 1)
    place = row[:, None].to(tl.int64) * groups + group[None, :]
    inside = (row[:, None] < rows) & (group[None, :] < groups)
    factor = tl.load(scale + place, mask=inside, other=0).to(tl.float32)
    if ZEROS:
        middle = tl.load(zero + place, mask=inside, other=0).to(tl.float32)
    else:
        middle = tl.zeros_like(factor) + (1.5 if BITS == 2 else (1 << (BITS - 1)))
    return factor, middle


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    low, high, scale, zero, row, first, rows,
    INPUTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """The weights scale · (q − zero) [R, COUNT] in float32 from column `first` on, 0 outside of the matrix.

    COUNT is a multiple of GROUP, or divides it.
    """
    codes = plane_codes(low, row, first, rows, INPUTS, LOW, COUNT, True)
    if HIGH > 0:
        codes = codes | (plane_codes(high, row, first, rows, INPUTS, HIGH, COUNT, True) << LOW)
    codes = codes.to(tl.float32)
    factor, middle = grids_of(scale, zero, row, first, rows, INPUTS, LOW + HIGH, GROUP, ZEROS, COUNT)
    within: tl.constexpr = COUNT // GROUP if COUNT > GROUP else 1
    parts = tl.reshape(codes, (row.shape[0], within, COUNT // within))
    return tl.reshape(parts * factor[:, :, None] - (middle * factor)[:, :, None], (row.shape[0], COUNT))


@triton.jit
def product_tile(  # type: ignore[no-untyped-def]
    x, y, tile, tokens, width, at, low, high, scale, zero, rows,
    INPUTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, MODE: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile of y [PARTS, T, width], columns `at` and on, = x [T, C] · weights [R, C]ᵀ over a share of the columns."""
    row = tile * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    chunks: tl.constexpr = (((INPUTS + COLUMNS - 1) // COLUMNS) + PARTS - 1) // PARTS
    if TOKENS == 1:
        # Σ (q − zero) x = Σ q x − zero Σ x: scales and zeros are applied to sums of CHUNK columns. Loads are STAGES steps ahead.
        token = tl.program_id(1)
        within: tl.constexpr = COLUMNS // GROUP if COLUMNS > GROUP else 1
        each: tl.constexpr = COLUMNS // CHUNK // within
        sums = tl.zeros((ROWS, within, each), tl.float32)
        for step in tl.range(0, chunks, num_stages=STAGES):
            first = (part * chunks + step) * COLUMNS
            column = first + tl.arange(0, COLUMNS)
            values = tl.load(x + token * INPUTS + column, mask=column < INPUTS, other=0).to(tl.float32)
            products = plane_products(low, values, row, first, rows, INPUTS, LOW, COLUMNS, within, 0)
            if HIGH > 0:
                products += plane_products(high, values, row, first, rows, INPUTS, HIGH, COLUMNS, within, LOW)
            plain = tl.sum(tl.reshape(values, (within, each, CHUNK)), 2)
            factor, middle = grids_of(scale, zero, row, first, rows, INPUTS, LOW + HIGH, GROUP, ZEROS, COLUMNS)
            sums += factor[:, :, None] * (products - (middle * LOWERED)[:, :, None] * plain[None, :, :])
        total = tl.sum(tl.sum(sums, 2), 1) * (1 / LOWERED)
        tl.store(y + (part * tokens + token).to(tl.int64) * width + at + row, total, mask=row < rows)
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
    STAGES: tl.constexpr,
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
            INPUTS, LOW0, HIGH0, GROUP0, ZEROS0, ROWS, COLUMNS, TOKENS, PARTS, MODE, STAGES,
        )  # fmt: skip
    if MATRICES > 1:
        begin2 = begin1 + tl.cdiv(rows1, ROWS)
        if (tile >= begin1) & (tile < begin2):
            product_tile(
                x, y, tile - begin1, tokens, width, rows0, low1, high1, scale1, zero1, rows1,
                INPUTS, LOW1, HIGH1, GROUP1, ZEROS1, ROWS, COLUMNS, TOKENS, PARTS, MODE, STAGES,
            )  # fmt: skip
        if MATRICES > 2:  # noqa: SIM102 - of a constant, so that the rest is not compiled
            if tile >= begin2:
                product_tile(
                    x, y, tile - begin2, tokens, width, rows0 + rows1, low2, high2, scale2, zero2, rows2,
                    INPUTS, LOW2, HIGH2, GROUP2, ZEROS2, ROWS, COLUMNS, TOKENS, PARTS, MODE, STAGES,
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


@triton.jit
def integer_matrix(  # type: ignore[no-untyped-def]
    low, high, scale, zero, y, rows,
    INPUTS: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [R, C] = the weights, rounded to y's type; a program for ROWS rows and COLUMNS columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    w = weights_of(low, high, scale, zero, row, first, rows, INPUTS, LOW, HIGH, GROUP, ZEROS, COLUMNS)
    place = row[:, None].to(tl.int64) * INPUTS + column[None, :]
    tl.store(y + place, w.to(y.dtype.element_ty), mask=(row[:, None] < rows) & (column[None, :] < INPUTS))
