"""Products in bf16 against torch's of rounded factors."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from mpo_exporter.calibrate import precision
from mpo_exporter.calibrate.precision import fast_products, has_kernel, has_units
from mpo_exporter.calibrate.sums import Sums
from mpo_runtime import native

needs_kernel = pytest.mark.skipif(
    not (native.available() and has_units() and has_kernel()), reason="this CPU has no products of bf16 in its vectors"
)


@needs_kernel
@pytest.mark.parametrize(("rows", "columns", "tokens"), [(1, 1, 1), (17, 50, 33), (200, 97, 513), (48, 1600, 1030)])
@pytest.mark.parametrize("turned", [False, True])
def test_the_kernel_multiplies_rounded_factors(rows: int, columns: int, tokens: int, turned: bool) -> None:
    import mpo_runtime._native as kernels

    source = torch.Generator().manual_seed(rows)
    left, right = (torch.randn(size, tokens, generator=source) for size in (rows, columns))
    wanted = left.bfloat16().double() @ right.bfloat16().double().T
    out = torch.full((rows, columns), 3.0)
    for add in (False, True):
        factors = [(one.T if turned else one).contiguous().numpy() for one in (left, right)]
        kernels.bf16_product(factors[0], turned, factors[1], turned, out.numpy(), add)
        torch.testing.assert_close(out.double(), (1 + add) * wanted, rtol=1e-5, atol=1e-5 * tokens**0.5)


@pytest.mark.parametrize("small", [True, False])
def test_sums_in_bf16(small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:  # as for matrices that are too large for sums in single precision beside those in double
        monkeypatch.setattr("mpo_exporter.calibrate.sums.MOST_PART", 0)
        monkeypatch.setattr("mpo_exporter.calibrate.sums.PANEL", 200)
    source = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 300, 500, generator=source) for _ in range(2))
    for right in (None, y):
        sums = Sums()
        with fast_products():
            for index in range(5):
                sums.add(x[index], None if right is None else right[index])
        mean = sums.mean(symmetric=right is None)
        wanted = torch.einsum("bti,btj->ij", x.double(), (x if right is None else right).double()) / 1500
        assert np.abs(mean - wanted.numpy()).max() < 0.004
        assert right is not None or np.array_equal(mean, mean.T)


def test_a_layer_has_the_gradient_of_its_input() -> None:
    source = torch.Generator().manual_seed(0)
    x, weight, pull = (torch.randn(*shape, generator=source) for shape in ((2, 70, 96), (200, 96), (2, 70, 200)))
    found: list[Any] = []
    for context in (fast_products(), nullcontext()):
        with context:
            given = x.clone().requires_grad_()
            y = torch.nn.functional.linear(given, weight)
            found.append((y.detach(), *torch.autograd.grad(y, [given], pull)))
    for fast, exact in zip(*found, strict=True):
        assert float((fast - exact).norm()) < 0.01 * float(exact.norm())
        assert has_units() or torch.equal(fast, exact)


@needs_kernel
def test_a_lower_instruction_set_has_no_kernel() -> None:
    import mpo_runtime._native as kernels

    before = kernels.active_isa()
    try:
        kernels.set_isa("avx2")
        assert not precision.has_kernel()
        with pytest.raises(ValueError, match="no products of bf16"):
            kernels.bf16_product(*[np.ones((2, 2), np.float32), False] * 2, np.ones((2, 2), np.float32))
    finally:
        kernels.set_isa(before)
