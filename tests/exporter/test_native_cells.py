"""The native kernels for integer matrices in training against rounding.py, with every instruction set of this CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpo_exporter.heal import native_cells as module
from mpo_exporter.heal.grid import fused_kernels
from mpo_exporter.heal.native_cells import native_cells
from mpo_exporter.heal.rounding import cells, dequantize
from mpo_runtime import native

if not native.available():
    pytest.skip("no native kernels were built", allow_module_level=True)

import mpo_runtime._native as kernels

SHAPES = [(2, 16, 48), (3, 32, 96), (4, 64, 64), (8, 256, 768)]


@pytest.fixture(params=kernels.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use while a test runs."""
    before = kernels.active_isa()
    kernels.set_isa(request.param)
    yield request.param
    kernels.set_isa(before)


def case(bits: int, group: int, columns: int, rows: int = 37) -> list[Tensor]:
    """Latent numbers, some outside of the range, far outside, and between two codes; scales, zeros, and a gradient."""
    source = torch.Generator().manual_seed(bits)
    top = (1 << bits) - 1
    latent = torch.randint(0, top + 1, (rows, columns), generator=source) + 0.4 * torch.randn(
        rows, columns, generator=source
    )
    latent[0, :6] = torch.tensor([-0.5, -0.6, top + 0.5, top + 0.4, 0.5, 1.5])
    latent[1, :2] = torch.tensor([-1e7, 1e7])
    scale = torch.randn(rows, columns // group, generator=source)
    zero = top / 2 + torch.randn(rows, columns // group, generator=source)
    return [latent, scale, zero, torch.randn(rows, columns, generator=source)]


def passes(function: Any, given: list[Tensor], top: int, dtype: torch.dtype) -> list[Tensor]:
    """The matrix and the gradients of what it is made of, computed in a type."""
    inputs = [tensor.clone().requires_grad_() for tensor in given[:3]]
    matrix = function(*inputs, top).to(dtype)
    matrix.backward(given[3].to(dtype))
    return [matrix.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "group", "columns"), SHAPES)
def test_matrices_and_gradients(
    isa: str, bits: int, group: int, columns: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, top = case(bits, group, columns), (1 << bits) - 1
    monkeypatch.setattr(module, "product_dtype", lambda device: dtype)
    found, expected = (passes(function, given, top, dtype) for function in (native_cells, cells))
    assert len(found) == 4
    for name, one, wanted in zip(("matrix", "latent"), found, expected, strict=False):
        assert one.dtype == wanted.dtype and torch.equal(one, wanted), name
    for one, wanted in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_what_is_not_a_number_stays_so(isa: str) -> None:
    latent, scale, zero, _ = case(4, 64, 64)
    latent[3, 5] = float("nan")
    matrix = native_cells(latent, scale, zero, 15)
    assert matrix[3, 5].isnan() and int(matrix.isnan().sum()) == 1


def test_frozen_codes_and_other_groups_take_the_operations_of_torch() -> None:
    latent, scale, zero, _ = case(4, 64, 64)
    codes = latent.round().clamp(0, 15).to(torch.uint8)
    torch.testing.assert_close(native_cells(codes, scale, zero, 15), dequantize(codes, scale, zero), rtol=0, atol=0)
    wide = torch.randn(3, 512)
    ends = torch.ones(3, 1), torch.zeros(3, 1)
    torch.testing.assert_close(native_cells(wide, *ends, 15), cells(wide, *ends, 15), rtol=0, atol=0)


def test_they_are_what_a_cpu_uses() -> None:
    assert fused_kernels("cpu") is native_cells


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"top": 256}, "highest code is 256"),
        ({"scale": np.ones((37, 3), np.float32)}, "3 groups do not divide rows of 64 columns"),
        ({"scale": np.ones((36, 1), np.float32)}, "scale has 36 entries, expected 37"),
        ({"out": np.ones((36, 64), np.float32)}, "out has 2304 entries, expected 2368"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(change: dict[str, Any], says: str) -> None:
    given = {
        "latent": np.ones((37, 64), np.float32),
        "scale": np.ones((37, 1), np.float32),
        "zero": np.ones((37, 1), np.float32),
        "top": 15,
        "out": np.ones((37, 64), np.float32),
    }
    with pytest.raises(ValueError, match=says):
        kernels.cells(**{**given, **change})
