"""The GPU's kernels for integer matrices in training against rounding.py, in Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'mpo-runtime[gpu]'")

from mpo_exporter.heal import fused, grid
from mpo_exporter.heal.grid import fused_kernels
from mpo_exporter.heal.ops import autocast, multiplies_bf16
from mpo_exporter.heal.rounding import cells, dequantize, product_dtype
from mpo_formats import MpoFile
from tests.exporter.test_heal_recorded import GOLDEN, batches, gradients, replayed, student_of
from tests.kernels import triton_cases
from tests.kernels.triton_cases import DEVICE, poisoned


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize(("bits", "group", "columns"), [(2, 16, 48), (3, 32, 96), (4, 64, 64), (8, 256, 768)])
def test_matrices_and_gradients(bits: int, group: int, columns: int, moving: bool) -> None:
    source = torch.Generator().manual_seed(bits)
    top, rows = (1 << bits) - 1, 37
    codes = torch.randint(0, top + 1, (rows, columns), generator=source)
    held = codes.to(torch.uint8)
    if moving:  # also outside of the range, far outside, and between two codes
        held = codes + 0.4 * torch.randn(rows, columns, generator=source)
        held[0, :6] = torch.tensor([-0.5, -0.6, top + 0.5, top + 0.4, 0.5, 1.5])
        held[1, :2] = torch.tensor([-1e7, 1e7])
    scale = torch.randn(rows, columns // group, generator=source)
    zero = top / 2 + torch.randn(rows, columns // group, generator=source)
    felt = torch.randn(rows, columns, generator=source)
    results = []
    for ours in (True, False):
        place = DEVICE if ours else "cpu"
        inputs = [
            tensor.to(place, copy=True).requires_grad_(tensor.is_floating_point()) for tensor in (held, scale, zero)
        ]
        with poisoned():
            theirs = cells if moving else lambda held, scale, zero, _: dequantize(held, scale, zero)
            matrix = (fused.fused_cells if ours else theirs)(*inputs, top)
            matrix.backward(felt.to(place))
        results.append([matrix.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)])
    assert len(results[0]) == len(results[1]) == (4 if moving else 3)
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_gpu_has_its_own_and_matrices_come_in_the_type_of_products() -> None:
    assert fused_kernels("cuda") is fused.fused_cells
    assert product_dtype(torch.device("cpu")) == torch.float32
    with autocast("cpu"):
        expected = torch.bfloat16 if multiplies_bf16("cpu") else torch.float32
        assert product_dtype(torch.device("cpu")) == expected


@pytest.mark.skipif(
    DEVICE != "cpu", reason="models are on the CPU here; on a GPU test_heal_cuda.py heals with the kernels"
)
@pytest.mark.parametrize("name", ["sum", "int3", "hadamard"])
def test_a_whole_step_and_its_replay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with MpoFile(Path(GOLDEN) / f"{name}.mpo") as file:
        first, second = batches(file, 2)
        module, trainables = student_of(file, recompute=False)
        expected = [gradients(module, trainables, batch) for batch in (first, second)]
        monkeypatch.setattr(grid, "fused_kernels", lambda device: fused.fused_cells)
        monkeypatch.setitem(triton_cases.KERNELS, fused, ("write_cells", "write_gradients"))
        figures, found = gradients(module, trainables, first)
        torch.testing.assert_close(figures, expected[0][0], rtol=1e-5, atol=1e-6)
        for one, wanted in zip(found, expected[0][1], strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-6)

        def change() -> None:
            for held, tensor in zip(first, second, strict=True):
                assert held is not None and tensor is not None
                held.copy_(tensor)

        recording = replayed(module, trainables, first, change)
        assert recording.launches
        for (_, parameter, _), wanted in zip(trainables.learning(), expected[1][1], strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)
