"""Triton kernels of the GPU backend: products with packed integers, norms, rotation into the KV cache, decode attention.

Integers are read as the file stores them (formats/SPEC.md): a plane of p bits is row-major, low bits first. Every byte is read
once and spread over the lanes by interleaving. The kernels also run in Triton's interpreter on a CPU (TRITON_INTERPRET=1),
which is how the tests check them without a GPU.

Shapes: T tokens, R rows (outputs) and C columns (inputs) of a matrix, H query heads, K key-value heads, D head size.
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


@triton.jit
def plane_codes(plane, row, first, rows, columns, BITS: tl.constexpr, COUNT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The codes [R, COUNT] of a plane from column `first` on, 0 outside of the matrix."""
    byte = first * BITS // 8 + tl.arange(0, COUNT * BITS // 8)
    width = columns * BITS // 8
    inside = (row[:, None] < rows) & (byte[None, :] < width)
    packed = tl.load(plane + row[:, None].to(tl.int64) * width + byte[None, :], mask=inside, other=0).to(tl.int32)
    return spread(packed, BITS)


@triton.jit
def weights_of(  # type: ignore[no-untyped-def]
    low, high, scale, zero, row, first, rows, columns,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The weights scale · (q − zero) [R, COUNT] in float32 from column `first` on, 0 outside of the matrix."""
    codes = plane_codes(low, row, first, rows, columns, LOW, COUNT)
    if HIGH > 0:
        codes += plane_codes(high, row, first, rows, columns, HIGH, COUNT) << LOW
    group = first // GROUP + tl.arange(0, COUNT // GROUP)
    groups = columns // GROUP
    place = row[:, None].to(tl.int64) * groups + group[None, :]
    inside = (row[:, None] < rows) & (group[None, :] < groups)
    factor = tl.load(scale + place, mask=inside, other=0).to(tl.float32)
    if ZEROS:
        middle = tl.load(zero + place, mask=inside, other=0).to(tl.float32)
    else:
        middle = tl.zeros_like(factor) + (1.5 if LOW + HIGH == 2 else (1 << (LOW + HIGH - 1)))
    parts = tl.reshape(codes.to(tl.float32), (row.shape[0], COUNT // GROUP, GROUP))
    return tl.reshape((parts - middle[:, :, None]) * factor[:, :, None], (row.shape[0], COUNT))


@triton.jit
def integer_product(  # type: ignore[no-untyped-def]
    x, low, high, scale, zero, y, tokens, rows, columns,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TOKENS: tl.constexpr, PARTS: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """y [PARTS, T, R] = x [T, C] · weights [R, C]ᵀ; each part sums a share of the columns.

    TOKENS 1 multiplies on the vector units in float32; more on the matrix units in bf16, or in float32 where EXACT.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(2)
    chunks = tl.cdiv(tl.cdiv(columns, COLUMNS), PARTS)
    if TOKENS == 1:
        token = tl.program_id(1)
        one = tl.zeros((ROWS,), tl.float32)
        for step in range(chunks):
            first = (part * chunks + step) * COLUMNS
            column = first + tl.arange(0, COLUMNS)
            w = weights_of(
                low, high, scale, zero, row, first, rows, columns, LOW, HIGH, GROUP, ZEROS, COLUMNS
            )  # fmt: skip
            values = tl.load(x + token * columns + column, mask=column < columns, other=0).to(tl.float32)
            one += tl.sum(w * values[None, :], 1)
        tl.store(y + (part * tokens + token) * rows + row, one, mask=row < rows)
    else:
        token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
        several = tl.zeros((TOKENS, ROWS), tl.float32)
        for step in range(chunks):
            first = (part * chunks + step) * COLUMNS
            column = first + tl.arange(0, COLUMNS)
            w = weights_of(
                low, high, scale, zero, row, first, rows, columns, LOW, HIGH, GROUP, ZEROS, COLUMNS
            )  # fmt: skip
            inside = (token[:, None] < tokens) & (column[None, :] < columns)
            values = tl.load(x + token[:, None] * columns + column[None, :], mask=inside, other=0)
            if EXACT:
                several += tl.dot(values.to(tl.float32), tl.trans(w), input_precision="ieee")
            else:
                several += tl.dot(values.to(tl.bfloat16), tl.trans(w).to(tl.bfloat16))
        place = (part * tokens + token[:, None]) * rows + row[None, :]
        tl.store(y + place, several, mask=(token[:, None] < tokens) & (row[None, :] < rows))


@triton.jit
def integer_rows(  # type: ignore[no-untyped-def]
    ids, low, high, scale, zero, y, rows, columns,
    LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr, ZEROS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [T, C] = the rows `ids` [T] of the weights: the embedding of tokens."""
    token = tl.program_id(0)
    row = tl.load(ids + token + tl.zeros((1,), tl.int32)).to(tl.int32)
    first = tl.program_id(1) * COLUMNS
    column = first + tl.arange(0, COLUMNS)
    w = weights_of(low, high, scale, zero, row, first, rows, columns, LOW, HIGH, GROUP, ZEROS, COLUMNS)
    tl.store(y + token.to(tl.int64) * columns + column[None, :], w, mask=column[None, :] < columns)


@triton.jit
def rms_norm(x, weight, y, width, eps, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = x / √(mean x² + eps) · weight, one stretch of `width` elements a program."""
    place = tl.program_id(0).to(tl.int64) * width + tl.arange(0, WIDTH)
    inside = tl.arange(0, WIDTH) < width
    values = tl.load(x + place, mask=inside, other=0)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(y + place, values * scale * tl.load(weight + tl.arange(0, WIDTH), mask=inside, other=0), mask=inside)


@triton.jit
def swiglu(gate, up, y, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """y = silu(gate) · up."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    values = tl.load(gate + place, mask=inside, other=0)
    small = tl.exp(-tl.abs(values))  # never overflows
    silu = values * tl.where(values >= 0, 1.0, small) / (1 + small)
    tl.store(y + place, silu * tl.load(up + place, mask=inside, other=0), mask=inside)


@triton.jit
def rotate_and_append(  # type: ignore[no-untyped-def]
    q, k, v, q_out, cache, table, sequence, position, frequency, block,
    heads, kv_heads, blocks, table_width,
    SIZE: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Rotates q [T, H, D] into q_out, and k [T, K, D] into the cache beside v; a program for each token and head.

    The cache is [pages, blocks, 2, K, PAGE, D]; `table` [sequences, table_width] has the pages of each sequence.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    here = tl.load(position + token)
    lane = tl.arange(0, HALF)
    inside = lane < SIZE // 2
    angle = here.to(tl.float32) * tl.load(frequency + lane, mask=inside, other=0)
    cosine, sine = tl.cos(angle), tl.sin(angle)
    if head < heads:
        begin = (token.to(tl.int64) * heads + head) * SIZE
        a = tl.load(q + begin + lane, mask=inside, other=0)
        b = tl.load(q + begin + SIZE // 2 + lane, mask=inside, other=0)
        tl.store(q_out + begin + lane, a * cosine - b * sine, mask=inside)
        tl.store(q_out + begin + SIZE // 2 + lane, b * cosine + a * sine, mask=inside)
    else:
        row = head - heads
        page = tl.load(table + tl.load(sequence + token) * table_width + here // PAGE).to(tl.int64)
        target = cache + (((page * blocks + block) * 2 * kv_heads + row) * PAGE + here % PAGE) * SIZE
        begin = (token.to(tl.int64) * kv_heads + row) * SIZE
        a = tl.load(k + begin + lane, mask=inside, other=0)
        b = tl.load(k + begin + SIZE // 2 + lane, mask=inside, other=0)
        tl.store(target + lane, (a * cosine - b * sine).to(cache.dtype.element_ty), mask=inside)
        tl.store(target + SIZE // 2 + lane, (b * cosine + a * sine).to(cache.dtype.element_ty), mask=inside)
        target += kv_heads * PAGE * SIZE
        for half in tl.static_range(2):
            part = tl.load(v + begin + half * (SIZE // 2) + lane, mask=inside, other=0)
            tl.store(target + half * (SIZE // 2) + lane, part.to(cache.dtype.element_ty), mask=inside)


@triton.jit
def attention_part(  # type: ignore[no-untyped-def]
    q, cache, table, sequence, position, mixed, highest, total, scale, window, block,
    heads, kv_heads, blocks, table_width,
    GROUP: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Attention of one token and query head over a share of the pages: Σ exp(s − max) v, max and Σ exp(s − max).

    Written to mixed [T, H, PARTS, D], highest and total [T, H, PARTS] (flash decoding). A page is read by GROUP programs in a
    row, which share it through the second-level cache.
    """
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = tl.load(position + token)
    lane = tl.arange(0, WIDTH)
    inside = lane < SIZE
    query = tl.load(q + (token.to(tl.int64) * heads + head) * SIZE + lane, mask=inside, other=0) * scale
    pages = here // PAGE + 1
    share = tl.cdiv(pages, PARTS)
    best, sum_, acc = -float("inf"), 0.0, tl.zeros((WIDTH,), tl.float32)
    row = tl.load(sequence + token) * table_width
    for index in range(part * share, tl.minimum((part + 1) * share, pages)):
        page = tl.load(table + row + index).to(tl.int64)
        source = cache + ((page * blocks + block) * 2 * kv_heads + head // GROUP) * PAGE * SIZE
        slot = tl.arange(0, PAGE)
        place = slot[:, None] * SIZE + lane[None, :]
        at = index * PAGE + slot
        seen = at <= here
        if window > 0:
            seen = seen & (at > here - window)
        keys = tl.load(source + place, mask=inside[None, :] & seen[:, None], other=0).to(tl.float32)
        score = tl.where(seen, tl.sum(keys * query[None, :], 1), -float("inf"))
        new = tl.maximum(best, tl.max(score, 0))
        if new > -float("inf"):
            old = tl.exp(best - new)
            weight = tl.exp(score - new)
            values = tl.load(source + kv_heads * PAGE * SIZE + place, mask=inside[None, :] & seen[:, None], other=0).to(
                tl.float32
            )
            acc = acc * old + tl.sum(weight[:, None] * values, 0)
            sum_ = sum_ * old + tl.sum(weight, 0)
            best = new
    place = (token.to(tl.int64) * heads + head) * PARTS + part
    tl.store(mixed + place * SIZE + lane, acc, mask=inside)
    tl.store(highest + place, best)
    tl.store(total + place, sum_)


@triton.jit
def attention_join(mixed, highest, total, y, SIZE: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """y [T, H, D] from the parts of `attention_part`; a program for each token and head."""
    place = tl.program_id(0).to(tl.int64)
    part, lane = tl.arange(0, PARTS), tl.arange(0, WIDTH)
    inside = lane < SIZE
    best = tl.load(highest + place * PARTS + part)
    weight = tl.exp(best - tl.max(best, 0))
    source = mixed + (place * PARTS + part[:, None]) * SIZE + lane[None, :]
    values = tl.load(source, mask=inside[None, :] & (part[:, None] < PARTS), other=0)
    sum_ = tl.sum(weight * tl.load(total + place * PARTS + part), 0)
    tl.store(y + place * SIZE + lane, tl.sum(weight[:, None] * values, 0) / sum_, mask=inside)
