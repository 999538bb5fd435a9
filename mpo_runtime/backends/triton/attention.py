"""Triton kernels: rotation of queries and keys with the KV cache's new entries, and attention of single tokens.

The cache is [pages, blocks, 2, K, PAGE, D]: keys and values in float32, f16, bf16, or int8 with a scale for each position in
[pages, blocks, 2, K, PAGE]. `table` [sequences, W] has the pages of each sequence, `sequence` [T] and `place` [T] the sequence
and the position of each token. All of them are read on the device, so that a recorded step serves any texts.

Shapes: T tokens, H query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from mpo_runtime.backends.triton.elementwise import load_sum

LARGEST_HALF = tl.constexpr(65504.0)
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds to a whole number, ties to even


@triton.jit
def store_entry(a, b, target, scales, lane, inside, SIZE: tl.constexpr, KV: tl.constexpr):  # type: ignore[no-untyped-def]
    """Writes the halves a and b of a key or value [D] as KV: `f32`, `f16`, `bf16`, or `int8` with its scale.

    As the native backend does: halves are clamped to the largest finite one; the scale is max |x| / 127, NaN where x is not
    finite, and 0 where x is tiny.
    """
    if KV == "int8":
        largest = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
        finite_a, finite_b = tl.abs(a) < float("inf"), tl.abs(b) < float("inf")  # false for NaN, too
        wrong = tl.sum(tl.where(finite_a & finite_b, 0, 1), 0) > 0
        some = (wrong == 0) & (largest > 1e-30)
        largest = tl.where(some, largest, 127.0)
        tl.store(scales, tl.where(wrong, float("nan"), tl.where(some, largest / 127.0, 0.0)))
        # Plain sums: adding ROUNDER rounds to whole numbers.
        a = tl.where(some & finite_a, a, 0.0) * (127.0 / largest) + ROUNDER - ROUNDER
        b = tl.where(some & finite_b, b, 0.0) * (127.0 / largest) + ROUNDER - ROUNDER
    elif KV == "f16":
        a = tl.minimum(tl.maximum(a, -LARGEST_HALF), LARGEST_HALF)
        b = tl.minimum(tl.maximum(b, -LARGEST_HALF), LARGEST_HALF)
    tl.store(target + lane, a.to(target.dtype.element_ty), mask=inside)
    tl.store(target + SIZE // 2 + lane, b.to(target.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_append(  # type: ignore[no-untyped-def]
    q, k, v, q_out, q_width, k_width, v_width, part, cache, scales, table, sequence, place, frequency, block,
    heads, kv_heads, blocks, table_width,
    SIZE: tl.constexpr, HALF: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Rotates q [T, H, D] into q_out, and k [T, K, D] into the cache beside v; a program for each token and head.

    Rows of q, k and v are `q_width`, `k_width` and `v_width` apart; each is the sum of PARTS that are `part` apart.
    """
    token, head = tl.program_id(0), tl.program_id(1)
    here = tl.load(place + token)
    lane = tl.arange(0, HALF)
    inside = lane < SIZE // 2
    angle = here.to(tl.float32) * tl.load(frequency + lane, mask=inside, other=0)
    cosine, sine = tl.cos(angle), tl.sin(angle)
    if head < heads:
        source = q + token.to(tl.int64) * q_width + head * SIZE
        a = load_sum(source + lane, inside, part, PARTS)
        b = load_sum(source + SIZE // 2 + lane, inside, part, PARTS)
        target = q_out + (token.to(tl.int64) * heads + head) * SIZE
        tl.store(target + lane, a * cosine - b * sine, mask=inside)
        tl.store(target + SIZE // 2 + lane, b * cosine + a * sine, mask=inside)
    else:
        row = head - heads
        page = tl.load(table + tl.load(sequence + token) * table_width + here // PAGE).to(tl.int64)
        entry = ((page * blocks + block) * 2 * kv_heads + row) * PAGE + here % PAGE
        source = k + token.to(tl.int64) * k_width + row * SIZE
        a = load_sum(source + lane, inside, part, PARTS)
        b = load_sum(source + SIZE // 2 + lane, inside, part, PARTS)
        store_entry(
            a * cosine - b * sine, b * cosine + a * sine, cache + entry * SIZE, scales + entry, lane, inside, SIZE, KV
        )  # fmt: skip
        entry += kv_heads * PAGE
        source = v + token.to(tl.int64) * v_width + row * SIZE
        a = load_sum(source + lane, inside, part, PARTS)
        b = load_sum(source + SIZE // 2 + lane, inside, part, PARTS)
        store_entry(a, b, cache + entry * SIZE, scales + entry, lane, inside, SIZE, KV)


@triton.jit
def operand(values, DOT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values as they are multiplied: in float32 (0), f16 (1), bf16 (2), or for the interpreter bf16 in float32 (3)."""
    if DOT == 1:
        values = values.to(tl.float16)
    elif DOT == 2:
        values = values.to(tl.bfloat16)
    elif DOT == 3:
        values = values.to(tl.float32).to(tl.bfloat16).to(tl.float32)
    else:
        values = values.to(tl.float32)
    return values


@triton.jit
def attention_part(  # type: ignore[no-untyped-def]
    q, cache, scales, table, sequence, place, mixed, highest, total, scale, window, block,
    heads, kv_heads, blocks, table_width,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr, PAGE: tl.constexpr,
    STRETCH: tl.constexpr, PARTS: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Attention of one token over a share of its positions, for the query heads of one key-value head.

    Writes Σ exp(s − max) v to mixed [T, H, PARTS, D], max and Σ exp(s − max) to highest and total [T, H, PARTS] (flash
    decoding, Dao 2023). The heads of a group are rows of one product, so keys and values are read once; STRETCH positions at
    a time. With INT8 the scales of keys are applied to the scores, and those of values to the probabilities.
    """
    token, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = tl.load(place + token)
    lane, query = tl.arange(0, WIDTH), tl.arange(0, QUERIES)
    inside, asked = lane < SIZE, query < GROUP
    rows = token.to(tl.int64) * heads + head * GROUP + query
    loaded = tl.load(q + rows[:, None] * SIZE + lane[None, :], mask=asked[:, None] & inside[None, :], other=0)
    queries = operand(loaded * scale, DOT)
    best = tl.full((QUERIES,), -float("inf"), tl.float32)
    sums = tl.zeros((QUERIES,), tl.float32)
    acc = tl.zeros((QUERIES, WIDTH), tl.float32)
    first = 0
    if window > 0:
        first = tl.maximum(here + 1 - window, 0) // STRETCH
    share = tl.cdiv(here // STRETCH + 1 - first, PARTS)
    pages = table + tl.load(sequence + token) * table_width
    for index in range(first + part * share, tl.minimum(first + (part + 1) * share, here // STRETCH + 1)):
        at = index * STRETCH + tl.arange(0, STRETCH)
        seen = at <= here
        if window > 0:
            seen = seen & (at > here - window)
        page = tl.load(pages + at // PAGE, mask=seen, other=0).to(tl.int64)
        entry = ((page * blocks + block) * 2 * kv_heads + head) * PAGE + at % PAGE
        both = inside[None, :] & seen[:, None]
        keys = tl.load(cache + entry[:, None] * SIZE + lane[None, :], mask=both, other=0)
        score = tl.dot(queries, tl.trans(operand(keys, DOT)), input_precision="ieee")  # [QUERIES, STRETCH]
        if INT8:
            score *= tl.load(scales + entry, mask=seen, other=0)[None, :]
        score = tl.where(seen[None, :], score, -float("inf"))
        new = tl.maximum(best, tl.max(score, 1))
        # A share that begins before the window has seen nothing yet: its sums are 0, and 0 · exp(0) stays 0.
        safe = tl.where(new > -float("inf"), new, 0.0)
        old = tl.exp(best - safe)
        weight = tl.exp(score - safe[:, None])
        sums = sums * old + tl.sum(weight, 1)
        entry += kv_heads * PAGE
        values = tl.load(cache + entry[:, None] * SIZE + lane[None, :], mask=both, other=0)
        if INT8:
            weight *= tl.load(scales + entry, mask=seen, other=0)[None, :]
        acc = acc * old[:, None] + tl.dot(operand(weight, DOT), operand(values, DOT), input_precision="ieee")
        best = new
    where = rows * PARTS + part
    tl.store(mixed + where[:, None] * SIZE + lane[None, :], acc, mask=asked[:, None] & inside[None, :])
    tl.store(highest + where, best, mask=asked)
    tl.store(total + where, sums, mask=asked)


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
    sums = tl.sum(weight * tl.load(total + place * PARTS + part), 0)
    tl.store(y + place * SIZE + lane, tl.sum(weight[:, None] * values, 0) / sums, mask=inside)
