"""Triton kernels that round columns one after another, for the torch code of gptq.py and descent.py on a GPU.

Each column depends on the one before it, which in torch is half a dozen small launches a column. Here a program takes some rows
of the matrix through all columns of a part, in one launch. Tensors are transposed, as there: [columns, rows].
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Rows of a program.
LANES = 32
ROUNDER = tl.constexpr(12582912.0)  # 1.5 · 2²³: adding it rounds to a whole number, ties to even


@triton.jit
def nearest(values, scale, zero, top):  # type: ignore[no-untyped-def]
    """The nearest codes 0 … top; those of a scale of 0 are the zero's."""
    inverse = tl.where(scale != 0, 1.0 / tl.where(scale != 0, scale, 1.0), 0.0)
    return tl.minimum(tl.maximum(values * inverse + zero, 0.0), top * 1.0) + ROUNDER - ROUNDER


@triton.jit
def recode_columns(  # type: ignore[no-untyped-def]
    near, codes, scale, zero, own, count, rows, near_width, codes_width, own_width, top,
    COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Sets each code to the best with all others fixed, and takes the change off the gradient `near` of the later ones."""
    lane, index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES), tl.arange(0, COLUMNS)
    inside = (index[:, None] < count) & (lane[None, :] < rows)
    pull = tl.load(near + index[:, None] * near_width + lane[None, :], mask=inside, other=0)
    held = tl.load(codes + index[:, None] * codes_width + lane[None, :], mask=inside, other=0)
    step = tl.load(scale + lane, mask=lane < rows, other=0)
    middle = tl.load(zero + lane, mask=lane < rows, other=0)
    for column in range(count):
        here = (index == column)[:, None]
        now = tl.sum(tl.where(here, held, 0.0), 0)
        wish = tl.sum(tl.where(here, pull, 0.0), 0) / tl.load(own + column * own_width + column) + step * (now - middle)
        best = nearest(wish, step, middle, top)
        felt = tl.load(own + column * own_width + index, mask=index < count, other=0)
        pull -= felt[:, None] * (step * (best - now))[None, :]
        held = tl.where(here, best[None, :], held)
    tl.store(near + index[:, None] * near_width + lane[None, :], pull, mask=inside)
    tl.store(codes + index[:, None] * codes_width + lane[None, :], held, mask=inside)


@triton.jit
def round_columns(  # type: ignore[no-untyped-def]
    rest, wanted, codes, errors, scale, zero, feedback, count, rows, width, feedback_width, feedback_step, top,
    COLUMNS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Rounds `rest` column by column, adding each one's error to the later ones as `feedback` says; `width` is of all rows."""
    lane, index = tl.program_id(0).to(tl.int64) * LANES + tl.arange(0, LANES), tl.arange(0, COLUMNS)
    inside = (index[:, None] < count) & (lane[None, :] < rows)
    place = index[:, None] * width + lane[None, :]
    values = tl.load(rest + place, mask=inside, other=0)
    goal = tl.load(wanted + place, mask=inside, other=0)
    step = tl.load(scale + lane, mask=lane < rows, other=0)
    middle = tl.load(zero + lane, mask=lane < rows, other=0)
    found, missed = tl.zeros_like(values), tl.zeros_like(values)
    for column in range(count):
        here = (index == column)[:, None]
        code = nearest(tl.sum(tl.where(here, values, 0.0), 0), step, middle, top)
        error = tl.sum(tl.where(here, goal, 0.0), 0) - step * (code - middle)
        later = (index > column) & (index < count)
        told = tl.load(feedback + column * feedback_width + index * feedback_step, mask=later, other=0)
        values += told[:, None] * error[None, :]
        found = tl.where(here, code[None, :], found)
        missed = tl.where(here, error[None, :], missed)
    tl.store(codes + place, found, mask=inside)
    tl.store(errors + place, missed, mask=inside)


def recode(near: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, own: Tensor, top: int) -> None:
    """What descent.py does to the codes [C, R] of a part of a group and to their gradient `near` [C, R], both in place.

    Args:
        scale, zero: of the group [R].
        own: the Hessian of these columns [C, C], symmetric.
    """
    count, rows = near.shape
    recode_columns[(triton.cdiv(rows, LANES),)](
        near, codes, scale, zero, own, count, rows, near.stride(0), codes.stride(0), own.stride(0), top,
        COLUMNS=triton.next_power_of_2(count), LANES=LANES, num_warps=1,
    )  # fmt: skip


def sweep(
    rest: Tensor, wanted: Tensor, codes: Tensor, errors: Tensor, scale: Tensor, zero: Tensor, feedback: Tensor, top: int
) -> None:
    """What gptq.py does with the columns [C, R] of a part of a group; codes and errors are written, `rest` is not.

    Args:
        rest, wanted: the values to round, with the errors of earlier columns made up for, and without; all four have rows alike.
        feedback: [C, C], of which what is above the diagonal is read.
    """
    count, rows = rest.shape
    round_columns[(triton.cdiv(rows, LANES),)](
        rest, wanted, codes, errors, scale, zero, feedback, count, rows, rest.stride(0), *feedback.stride(), top,
        COLUMNS=triton.next_power_of_2(count), LANES=LANES, num_warps=1,
    )  # fmt: skip
