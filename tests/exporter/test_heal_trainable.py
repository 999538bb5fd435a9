"""What healing trains computes what the runtime reads, gives back the file's bytes, and has the right gradients."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_exporter.heal.bonds import sort_bonds
from mpo_exporter.heal.grid import CELL, Grid
from mpo_exporter.heal.ops import HealingOps, WindowCache, WindowOps, autocast, multiplies_bf16
from mpo_exporter.heal.rounding import cells, dequantize, rounded
from mpo_exporter.heal.student import head_loss
from mpo_exporter.heal.trainable import Trainables
from mpo_formats import MpoFile
from mpo_formats.layout import TRANSFORM, content_tensors
from mpo_formats.reference import matrix
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from tests.helpers import forward, some_ids

GOLDEN = sorted((Path(__file__).resolve().parent.parent / "golden").glob("*.mpo"))


def everything(file: MpoFile, *, moving: bool) -> Trainables:
    names = [linear.name for linear in file.spec.linears] + [vector.name for vector in file.spec.vectors]
    return Trainables(file, names, moving=moving)


def student(file: MpoFile, trainables: Trainables, chi: int | None = None) -> Decoder:
    ops = HealingOps(file)
    ops.trainables, ops.chi = trainables, chi
    return decoder_for(file.spec.architecture, ops)


@pytest.mark.parametrize("moving", [False, True])
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_untrained_is_the_file_bit_for_bit(path: Path, moving: bool) -> None:
    """For every kind of term: the logits, also of a prefix, and the bytes that would be written."""
    with MpoFile(path) as file:
        trainables = everything(file, moving=moving)
        rows = [some_ids(6, 1, file.spec.architecture.vocab_size), some_ids(6, 2, file.spec.architecture.vocab_size)]
        for chi in (None, 2):
            with torch.no_grad():
                found = forward(student(file, trainables, chi), rows)
            np.testing.assert_allclose(
                found, forward(decoder_for(file.spec.architecture, ReferenceOps(file, chi=chi)), rows), atol=1e-5
            )
        arrays = {}
        for part in (*trainables.layers.values(), *trainables.vectors.values(), *trainables.transforms.values()):
            arrays |= part.arrays()
        for tensor in content_tensors(file.spec):
            kept = tensor.name.startswith("file.") or f".{TRANSFORM}." in tensor.name
            if not kept or tensor.name in arrays:
                np.testing.assert_array_equal(arrays[tensor.name], file.array(tensor.name))
                assert arrays[tensor.name].dtype == file.array(tensor.name).dtype


def test_a_stored_transform_is_trained_once_for_all_layers_that_share_it() -> None:
    """After a change of it, two layers are what the file that would be written says; and it takes part in the loss."""
    with MpoFile(GOLDEN[0].with_name("transform.mpo")) as file:
        assert not everything(file, moving=False).transforms
        trainables = everything(file, moving=True)
        (name,) = trainables.transforms  # the embedding's is of floats, which stay
        sharing = [one for one in file.spec.linears if one.transform is not None and one.transform.name == name]
        assert len(sharing) == 2
        model = student(file, trainables)
        ids = [some_ids(6, 1, file.spec.architecture.vocab_size)]
        cache, x = WindowCache(), model.embed(model.ops.ids(ids))
        model.block(x, cache, 0).square().sum().backward()
        moved = list(trainables.transforms[name].learning())
        assert {kind for kind, _, _ in moved} == {"scale", "code"}
        assert all(parameter.grad is not None and bool(parameter.grad.any()) for _, parameter, _ in moved)
        before = [matrix(file, linear) for linear in sharing]
        with torch.no_grad():
            for _, parameter, _ in moved:
                parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
        for linear, old in zip(sharing, before, strict=True):
            layer = trainables.layers[linear.name]
            expected = matrix(_Arrays(file, layer.arrays() | trainables.transforms[name].arrays()), linear)
            np.testing.assert_allclose(layer.linear(None).weight().detach().numpy(), expected, atol=1e-5, rtol=1e-5)
            assert np.abs(expected - old).max() > 1e-3


@pytest.mark.parametrize("name", ["int3", "int8", "sum", "mpo-int4", "mpo-3-cores", "bias-untied", "dense-bf16"])
def test_what_is_evaluated_is_what_is_saved(name: str) -> None:
    """After a change of every parameter: the matrices in training equal those of the arrays that would be written."""
    with MpoFile(GOLDEN[0].with_name(f"{name}.mpo")) as file:
        trainables = everything(file, moving=True)
        source = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for kind, parameter, unit in trainables.learning():
                step = {"scale": 0.3, "core": 0.3 * unit, "norm": 0.3 * unit, "code": 1.0}[kind]
                parameter += step * torch.randn(parameter.shape, generator=source)
        for linear in file.spec.linears:
            layer = trainables.layers[linear.name]
            arrays = layer.arrays()
            expected = matrix(_Arrays(file, arrays), linear)
            np.testing.assert_allclose(layer.linear(None).weight().detach().numpy(), expected, atol=1e-5, rtol=1e-5)
            if linear.terms[0].kind != "dense":
                assert np.abs(expected - matrix(file, linear)).max() > 1e-3


@pytest.mark.parametrize(("name", "unit"), [("int2", 1), ("int3", 1), ("int4", 1), ("int8", 1 / 16)])
def test_wide_integers_learn_slower_with_each_bit(name: str, unit: float) -> None:
    with MpoFile(GOLDEN[0].with_name(f"{name}.mpo")) as file:
        layer = everything(file, moving=True).layers[file.spec.linears[1].name]
    found = {(kind, rate) for kind, _, rate in layer.learning()}
    assert found == {("scale", unit), ("code", unit)}


class _Arrays(MpoFile):
    """A file some of whose tensors are others."""

    def __init__(self, file: MpoFile, arrays: dict[str, np.ndarray]) -> None:
        self._file, self._arrays = file, arrays

    def array(self, name: str) -> np.ndarray:
        return self._arrays[name]

    def dtype(self, name: str) -> str:
        return self._file.dtype(name)


def test_gradients_of_frozen_codes_are_those_of_the_formula() -> None:
    source = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (3, 32), generator=source, dtype=torch.uint8)
    scale = torch.randn(3, 2, generator=source, dtype=torch.float64, requires_grad=True)
    zero = (4 + torch.randn(3, 2, generator=source, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, z: dequantize(codes, s, z), (scale, zero))


def test_rounding_passes_gradients_but_not_past_the_ends_of_the_codes() -> None:
    latent = torch.tensor([[-0.6, -0.4, 1.2, 3.4, 3.6]], requires_grad=True)
    codes = cells(latent, torch.ones(1, 1), torch.zeros(1, 1), 3)
    assert codes.tolist() == [[0, 0, 1, 3, 3]]
    codes.sum().backward()
    assert latent.grad is not None and latent.grad.tolist() == [[0, 1, 1, 1, 0]]
    values = torch.tensor([1.0 + 2**-12, 1e6], requires_grad=True)
    seen = rounded(values, "f16")
    assert seen.tolist() == [1.0, 65504.0]
    seen.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [1, 1]


def test_moving_codes_have_the_gradients_of_frozen_ones() -> None:
    """Of scales and zeros; and a latent number's is what its group's scale makes of the matrix's."""
    source = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (3, 32), generator=source, dtype=torch.uint8)
    latent = (codes + 0.4 * torch.rand(3, 32, generator=source)).requires_grad_()
    weight = torch.randn(3, 32, generator=source)
    parts = [
        [torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)).requires_grad_() for seed in (1, 2)]
        for _ in range(2)
    ]
    moving, frozen = cells(latent, *parts[0], 7), dequantize(codes, *parts[1])
    torch.testing.assert_close(moving, frozen)
    (moving * weight).sum().backward()
    (frozen * weight).sum().backward()
    for ours, theirs in zip(*parts, strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    expected = (weight.view(3, 2, 16) * parts[0][0].detach()[..., None]).view(3, 32)
    torch.testing.assert_close(latent.grad, expected)


@pytest.mark.parametrize("name", ["int2", "int5", "sum"])
def test_codes_that_were_told_the_dense_matrix_are_still_the_file_s(name: str) -> None:
    """But they lean to where the matrix is: a step of at most a hundredth of a code flips those that were almost others."""
    with MpoFile(GOLDEN[0].with_name(f"{name}.mpo")) as file:
        trainables = everything(file, moving=True)
        source = torch.Generator().manual_seed(0)
        for linear in file.spec.linears:
            layer = trainables.layers[linear.name]
            before = layer.linear(None).weight().detach()
            layer.aim(before + before.abs().mean() * torch.randn(before.shape, generator=source))
            assert torch.equal(layer.linear(None).weight().detach(), before)
            for term in layer.terms:
                if isinstance(term, Grid):
                    assert term.latent is not None
                    off = (term.latent - term.latent.round()).detach().abs()
                    assert 0.2 < float(off.max()) <= CELL + 1e-5 and float((off == 0).float().mean()) < 0.5


@pytest.mark.parametrize("kept", [5, 40])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_the_loss_is_that_of_the_buckets_and_its_gradient_is_the_formula_s(kept: int, share: float) -> None:
    generator = np.random.default_rng(0)
    teacher, ours = generator.normal(size=(2, 7, 40)) * 2
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, ours))
    order = np.argsort(-p, -1)[:, :kept]
    expected = []
    for row in range(7):
        inside = [(p[row, k], q[row, k]) for k in order[row]]
        rest = (1 - sum(a for a, _ in inside), 1 - sum(b for _, b in inside))
        pairs = inside if kept == 40 else [*inside, rest]
        expected.append(sum(a * np.log(a / b) for a, b in pairs))
    labels, weight = torch.from_numpy(generator.integers(0, 40, 7)), torch.from_numpy(generator.random(7))
    scores = torch.from_numpy(np.log(np.take_along_axis(p, order, -1)))
    chosen = torch.from_numpy(order)
    logits = torch.from_numpy(ours).requires_grad_()
    total, alone = head_loss(logits, labels, weight, scores, chosen, share)
    nll = -np.log(q[np.arange(7), labels.numpy()])
    assert float(alone) == pytest.approx(float(np.array(expected) @ weight.numpy()), rel=1e-6)
    assert float(total.detach()) == pytest.approx(float((np.array(expected) + share * nll) @ weight.numpy()), rel=1e-6)
    full = (p * np.log(p / q)).sum(-1)
    assert (np.array(expected) <= full + 1e-12).all()
    assert torch.autograd.gradcheck(lambda x: head_loss(x, labels, weight, scores, chosen, share)[0], (logits,))


def test_windows_run_as_the_reference_runs_them() -> None:
    """Without a cache and with attention as plain products: the same numbers, and nearly the same in bf16."""
    with MpoFile(GOLDEN[0].with_name("sum.mpo")) as file:
        rows = [some_ids(9, seed, file.spec.architecture.vocab_size) for seed in (1, 2)]
        expected = forward(decoder_for(file.spec.architecture, ReferenceOps(file)), rows)
        model = decoder_for(file.spec.architecture, WindowOps(file))
        for context, tolerance in ((nullcontext(), 1e-5), (torch.autocast("cpu", torch.bfloat16), 0.1)):
            with context, torch.no_grad():
                x = model.embed(model.ops.ids(rows))
                for block in range(file.spec.architecture.num_hidden_layers):
                    x = model.block(x, WindowCache(), block)
                found = model.logits(model.normed(x)).float()
            np.testing.assert_allclose(found, expected, atol=tolerance)


def test_bf16_is_used_only_where_it_is_fast() -> None:
    with autocast("cpu"):
        assert torch.is_autocast_enabled("cpu") == multiplies_bf16("cpu")
    assert not multiplies_bf16("meta")


@pytest.mark.parametrize("name", ["mpo-2-cores", "mpo-3-cores", "mpo-int8"])
def test_sorted_bonds_keep_the_matrix_and_make_good_prefixes(name: str) -> None:
    """Bonds turned by a random regular matrix come back: the whole matrix stays, its prefix errs less than before."""
    with MpoFile(GOLDEN[0].with_name(f"{name}.mpo")) as file:
        trainables = everything(file, moving=False)
        terms = [
            (layer, term) for layer in trainables.layers.values() for term in layer.terms if hasattr(term, "cores")
        ]
        source = torch.Generator().manual_seed(1)
        for _, term in terms:
            cores = [core.detach() for core in term.operator(None).cores]
            for k in range(len(cores) - 1):
                turn = torch.linalg.qr(torch.randn(cores[k].shape[3], cores[k].shape[3], generator=source))[0]
                cores[k], cores[k + 1] = cores[k] @ turn, torch.tensordot(turn.T, cores[k + 1], 1)
            for part, core in zip(term.cores, cores, strict=True):
                part.set_core(core)
        before = [(term.operator(None).weight().detach(), term.operator(1).weight().detach()) for _, term in terms]
        inputs = np.array([some_ids(24, 5, file.spec.architecture.vocab_size)])
        ops = HealingOps(file)
        sort_bonds(decoder_for(file.spec.architecture, ops), ops, trainables, inputs, exact=False)
        better = 0
        for (_, term), (whole, prefix) in zip(terms, before, strict=True):
            again = term.operator(None).weight().detach()
            tolerance = 0.05 if "int" in name else 5e-3  # cores are rounded to half precision or bf16
            assert (again - whole).norm() <= tolerance * whole.norm()
            now = (term.operator(1).weight().detach() - again).norm()
            better += bool(now < (prefix - whole).norm())
        assert better >= 0.8 * len(terms) > 0


def test_integer_cores_are_sorted_without_a_changed_number() -> None:
    with MpoFile(GOLDEN[0].with_name("mpo-int8.mpo")) as file:
        trainables = everything(file, moving=False)
        terms = [term for layer in trainables.layers.values() for term in layer.terms if hasattr(term, "cores")]
        for term in terms:  # the reverse of a sorted order
            chi = term.term.bonds[0]
            order = torch.arange(chi - 1, -1, -1)
            term.cores[0].reorder(torch.zeros(1, dtype=torch.int64), order)
            term.cores[1].reorder(order, torch.zeros(1, dtype=torch.int64))
        whole = [term.operator(None).weight().detach() for term in terms]
        numbers = [torch.sort(term.cores[0].core().detach().flatten()).values for term in terms]
        ops = HealingOps(file)
        inputs = np.array([some_ids(8, 5, file.spec.architecture.vocab_size)])
        sort_bonds(decoder_for(file.spec.architecture, ops), ops, trainables, inputs, exact=True)
        for term, matrix_before, values in zip(terms, whole, numbers, strict=True):
            cores = [core.detach() for core in term.operator(None).cores]
            torch.testing.assert_close(term.operator(None).weight().detach(), matrix_before, atol=1e-5, rtol=1e-5)
            assert torch.equal(torch.sort(cores[0].flatten()).values, values)
            size = cores[0].square().sum((0, 1, 2)) * cores[1].square().sum((1, 2, 3))
            assert (size[:-1] >= size[1:] * (1 - 1e-6)).all()
