"""A healing step recorded as a CUDA graph records it, emulated: replayed for another batch it gives that batch's gradients."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", reason="Triton is not installed: pip install 'mpo-runtime[gpu]'")

from mpo_exporter.heal import grid
from mpo_exporter.heal.ops import HealingOps, unseen_mask
from mpo_exporter.heal.student import Batch, BlockStudent, Student
from mpo_exporter.heal.trainable import Trainables
from mpo_formats import MpoFile
from mpo_runtime.layers.linear import hadamard_matrix
from mpo_runtime.models.registry import decoder_for
from tests.kernels.triton_cases import Recording

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
LENGTH, KEPT = 7, 4


@pytest.fixture(autouse=True)
def operations_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded here are torch's operations, not the kernels that a CPU has."""
    monkeypatch.setattr(grid, "fused_kernels", lambda device: None)


def batches(file: MpoFile, count: int) -> list[Batch]:
    """Random batches of two windows, with the outputs of block 0."""
    architecture = file.spec.architecture
    found = []
    for seed in range(count):
        source = torch.Generator().manual_seed(seed)
        ids = torch.randint(0, architecture.vocab_size, (2, LENGTH + 1), generator=source)
        scores, chosen = torch.randn(2, LENGTH, architecture.vocab_size, generator=source).log_softmax(-1).topk(KEPT)
        states = torch.randn(2, LENGTH, 1, architecture.hidden_size, generator=source)
        weight = torch.rand(2, LENGTH, generator=source)
        found.append(Batch(ids[:, :-1], ids[:, 1:], weight / weight.sum(), scores, chosen, states))
    return found


def student_of(file: MpoFile, recompute: bool) -> tuple[nn.Module, Trainables]:
    names = [linear.name for linear in file.spec.linears] + [vector.name for vector in file.spec.vectors]
    trainables, ops = Trainables(file, names, moving=True), HealingOps(file)
    matched = {0: torch.ones(file.spec.architecture.hidden_size)}
    model = decoder_for(file.spec.architecture, ops)
    return Student(model, ops, trainables, cross_entropy=0.1, recompute=recompute, matched=matched), trainables


def gradients(module: nn.Module, trainables: Trainables, batch: Any) -> tuple[Tensor, list[Tensor]]:
    """The figures of a step and the gradients of all parameters."""
    module.zero_grad(set_to_none=True)
    figures = module(batch, None)
    figures[0].backward()
    return figures.detach().clone(), [parameter.grad.clone() for _, parameter, _ in trainables.learning()]


def replayed(module: nn.Module, trainables: Trainables, first: Any, change: Callable[[], None]) -> Recording:
    """Records a step on `first`, changes what it reads, and does it again."""
    module.zero_grad(set_to_none=True)
    recording = Recording()
    with recording.recorded():
        figures = module(first, None)
        figures[0].backward()
    assert not recording.read  # no value goes to the host or comes from it
    change()
    for _, parameter, _ in trainables.learning():
        assert parameter.grad is not None
        parameter.grad.fill_(float("nan"))
    recording.replay()
    return recording


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["sum", "int3", "mpo-int4", "hadamard", "gpt-neo", "qwen3"])
def test_a_recorded_step_serves_other_batches(name: str, recompute: bool) -> None:
    with MpoFile(GOLDEN / f"{name}.mpo") as file:
        first, second = batches(file, 2)
        module, trainables = student_of(file, recompute)
        gradients(module, trainables, first)  # as rehearsals do, so that what is made once is there
        _, expected = gradients(module, trainables, second)

        def change() -> None:
            for held, tensor in zip(first, second, strict=True):
                assert held is not None and tensor is not None
                held.copy_(tensor)

        replayed(module, trainables, first, change)
        for (_, parameter, _), wanted in zip(trainables.learning(), expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-7)


def test_a_recorded_step_follows_its_parameters() -> None:
    """The optimizer changes parameters in place: the next replay is of the changed model, also of a single block."""
    with MpoFile(GOLDEN / "sum.mpo") as file:
        names = [linear.name for linear in file.spec.linears if ".layers.0." in linear.name]
        names += [vector.name for vector in file.spec.vectors if ".layers.0." in vector.name]
        trainables, ops = Trainables(file, names, moving=True), HealingOps(file)
        module = BlockStudent(decoder_for(file.spec.architecture, ops), ops, trainables, 0)
        size, source = file.spec.architecture.hidden_size, torch.Generator().manual_seed(1)
        batch = (*(torch.randn(2, LENGTH, size, generator=source) for _ in range(2)), torch.ones(size))
        gradients(module, trainables, batch)

        def change() -> None:
            with torch.no_grad():
                for _, parameter, unit in trainables.learning():
                    parameter.add_(0.1 * unit * torch.randn(parameter.shape, generator=source))

        replayed(module, trainables, batch, change)
        found = [parameter.grad.clone() for _, parameter, _ in trainables.learning() if parameter.grad is not None]
        _, expected = gradients(module, trainables, batch)
        for one, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-7)


def test_what_is_made_once_may_be_kept_for_a_backward_pass() -> None:
    with torch.inference_mode():
        made = hadamard_matrix(16, torch.float64, torch.device("cpu")), unseen_mask(5, 3, torch.device("cpu"))
    assert not any(tensor.is_inference() for tensor in made)
