"""Products in bf16 where the CPU has units for them: calibration text is run several times faster.

Sums stay in float32. Rounding an input to bf16 changes it by at most 0.4 %, at random, which moves the diagonal of a second
moment by a millionth; the fits' own products are not touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path

import torch

PROCESSORS = Path("/proc/cpuinfo")
# Flags of CPUs that multiply bf16: matrix units, and vectors with dot products.
UNITS = {"amx_bf16", "avx512_bf16"}


@cache
def has_units(processors: Path = PROCESSORS) -> bool:
    """Whether this CPU multiplies bf16, as far as the system tells."""
    try:
        rows = processors.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        return False
    return any(UNITS & set(row.split()) for row in rows if row.startswith("flags"))


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """A context in which float32 products of torch have that precision, by the names of torch."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def fast_products() -> AbstractContextManager[None]:
    """A context in which float32 products may be computed in bf16, if the CPU has units for that."""
    return products_in("medium") if has_units() else nullcontext()


def small_products() -> AbstractContextManager[None]:
    """A context for many small products, such as attention's: converting their factors to bf16 would cost more than it gives."""
    return products_in("highest")
