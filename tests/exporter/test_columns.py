"""The GPU's kernels that round columns one after another against torch's code, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'mpo-runtime[gpu]'")

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.quantize import columns, descent, gptq
from mpo_exporter.quantize.descent import State, column_kernels, descend, gradient_of
from mpo_exporter.quantize.grid import Levels
from tests.exporter.test_gptq import moment_of, problem_of
from tests.kernels.triton_cases import DEVICE, poisoned

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="the problems of these tests are on the CPU")


def same(found: State, expected: State) -> None:
    """Sums in another order move a code now and then by one; scales and zeros follow."""
    assert float((found.codes != expected.codes).float().mean()) < 0.01
    assert float((found.codes - expected.codes).abs().max()) <= 1
    for one, other in ((found.scale, expected.scale), (found.zero, expected.zero)):
        assert float((one - other).abs().mean()) < 1e-2 * float(other.abs().mean())


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Makes the kernels used when it is called upon."""
    assert column_kernels("cpu") is None and column_kernels("cuda") is columns
    return monkeypatch


def use(kernels: pytest.MonkeyPatch) -> None:
    for module in (descent, gptq):
        kernels.setattr(module, "column_kernels", lambda device: columns)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("group", "bits"), [(16, 4), (32, 3), (64, 2), (256, 8)])
def test_descent(kernels: pytest.MonkeyPatch, group: int, bits: int, zeros: bool) -> None:
    problem, wanted, state = problem_of(group, max(2 * group, 96), Levels(bits, zeros), group)
    gradients = [gradient_of(problem, wanted, state) for _ in range(2)]
    expected = descend(problem, state, gradients[0])
    use(kernels)
    found = descend(problem, state, gradients[1])
    same(found, expected)
    torch.testing.assert_close(gradients[1], gradient_of(problem, wanted, found), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("group", "bits"), [(16, 4), (32, 3), (64, 2), (256, 8)])
def test_rounding(kernels: pytest.MonkeyPatch, group: int, bits: int, zeros: bool) -> None:
    size = max(2 * group, 96)
    hessian = Moment(moment_of(size, bits)).hessian(group)
    problem = descent.Problem(hessian.matrix, group, Levels(bits, zeros))
    wanted = torch.randn((size, 33), generator=torch.Generator().manual_seed(bits))
    wanted[:group, 0] = 0  # groups whose scale is 0
    expected = gptq.sweep(problem, hessian, wanted)
    use(kernels)
    with poisoned():
        found = gptq.sweep(problem, hessian, wanted)
    same(found, expected)
    least, reached = (descent.errors(problem, wanted, one).sum() for one in (expected, found))
    assert float(reached) == pytest.approx(float(least), rel=0.02)
