"""Products in bf16 where the CPU has units for them: calibration text is run several times faster.

Sums stay in float32, and so do results. Rounding an input to bf16 changes it by at most 0.4 %, at random, which moves the
diagonal of a second moment by a millionth; the fits' own products are not touched. Matrix units (AMX) are left to torch. For
vectors with dot products of bf16 (AVX-512 BF16) there is a kernel, `mpo_runtime/csrc/fit/product.cpp`, which is nearly twice
as fast as torch's products of float32 by these vectors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from mpo_runtime import native

PROCESSORS = Path("/proc/cpuinfo")
# Flags of CPUs that multiply bf16: matrix units, and vectors with dot products.
TILES = "amx_bf16"
UNITS = frozenset({TILES, "avx512_bf16"})
# What torch calls products of float32 in bf16.
FAST = "medium"
# Products of fewer multiply-adds than this are left to torch.
LEAST = 1 << 20
# Whether the calling thread is in `fast_products`.
_now = threading.local()


@cache
def flags(processors: Path = PROCESSORS) -> frozenset[str]:
    """Those of UNITS that this CPU has, as far as the system tells."""
    try:
        rows = processors.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset[str]().union(*(UNITS & set(row.split()) for row in rows if row.startswith("flags")))


def has_units(processors: Path = PROCESSORS) -> bool:
    """Whether this CPU multiplies bf16."""
    return bool(flags(processors))


def uses_tiles() -> bool:
    """Whether products of bf16 are torch's, by matrix units."""
    return TILES in flags()


def has_kernel() -> bool:
    """Whether products of bf16 are those of the native kernel and not torch's."""
    if uses_tiles() or not native.available():
        return False
    import mpo_runtime._native as module

    return module.has_bf16_products()


def kernel_takes(*factors: Tensor) -> bool:
    """Whether the native kernel multiplies these now: in `fast_products`, on the CPU and in float32."""
    suited = all(one.device.type == "cpu" and one.dtype == torch.float32 for one in factors)
    return suited and are_fast() and has_units() and has_kernel()


def are_fast() -> bool:
    """Whether the calling thread is in `fast_products`."""
    return getattr(_now, "fast", False)


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """A context in which float32 products of torch have that precision, by the names of torch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def fast_products() -> Iterator[None]:
    """A context in which float32 products of this thread may be computed in bf16, if the CPU has units for that."""
    if not has_units():
        yield
        return
    before, _now.fast = are_fast(), True
    try:
        # Torch's own precision is one for all threads, so it is left alone where the kernel takes its place.
        with Redirected() if has_kernel() else products_in(FAST):
            yield
    finally:
        _now.fast = before


def small_products() -> AbstractContextManager[None]:
    """A context for many small products, such as attention's: converting their factors to bf16 would cost more than it gives."""
    return nullcontext() if has_kernel() else products_in("highest")


class Redirected(TorchFunctionMode):
    """A context in which linear layers without a bias, on the CPU and in float32, are multiplied by the native kernel."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch in the place of each of its functions."""
        if func is torch.nn.functional.linear and not kwargs and len(args) == 2:
            x, weight = args
            if kernel_takes(x, weight) and x.numel() * weight.shape[0] >= LEAST:
                return LinearProduct.apply(x, weight)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class LinearProduct(torch.autograd.Function):
    """x wᵀ by the kernel, with the gradient of x; that of the weight is not computed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x [..., I] by the matrix [O, I]: [..., O]."""
        ctx.save_for_backward(weight)
        rows = x.detach().reshape(-1, x.shape[-1])
        return multiplied(rows, weight.detach()).reshape(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """The gradient [..., I] for that of the result [..., O]."""
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        rows = gradient.reshape(-1, gradient.shape[-1])
        return multiplied(rows, weight, turned=True).reshape(*gradient.shape[:-1], weight.shape[1]), None


def multiplied(rows: Tensor, weight: Tensor, *, turned: bool = False) -> Tensor:
    """rows [T, I] by the transpose of a matrix [O, I], or by a matrix [I, O] that is `turned`: [T, O]."""
    import mpo_runtime._native as module

    out = torch.empty(len(rows), weight.shape[1 if turned else 0])
    module.bf16_product(rows.contiguous().numpy(), False, weight.contiguous().numpy(), turned, out.numpy())
    return out


def add_outer(left: Tensor, right: Tensor, out: Tensor, *, upper: bool) -> None:
    """Adds Σ_t left_t right_tᵀ of tensors [T, I] and [T, J] to `out` [I, J] by the kernel; see `kernel_takes`.

    Args:
        upper: entries below the diagonal may be left out.
    """
    import mpo_runtime._native as module

    factors = (left.contiguous().numpy(), True, right.contiguous().numpy(), True)
    module.bf16_product(*factors, out.numpy(), True, upper)
