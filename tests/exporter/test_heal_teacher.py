"""The teacher: what it keeps of its logits and blocks, what errors of blocks cost, and the loss that is made of both.

The oracle is transformers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_exporter.heal.ops import HealingOps, WindowOps, run_block
from mpo_exporter.heal.settings import HealJob, Settings
from mpo_exporter.heal.student import Batch, Student
from mpo_exporter.heal.teacher import TeacherFiles, matched_blocks, output_fisher, taught
from mpo_exporter.heal.trainable import Trainables
from mpo_exporter.plan.options import Options
from mpo_formats import MpoFile
from mpo_formats.packing import bf16_to_f32
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import BOS, VOCABULARY, export_folder, granite_config, heal_folder, some_ids, write_folder

BLOCKS = 4
IDS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 13))
TOP_K = 5
# For output_fisher: token ids, and the standard deviation of the errors.
FISHER_IDS = np.random.default_rng(0).integers(0, VOCABULARY, (3, 12))
ERROR_SIZE = 1e-2


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = granite_config(num_hidden_layers=BLOCKS)
    return write_folder(tmp_path_factory.mktemp("teacher") / "model", config, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def rough(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("file") / "rough.mpo"
    export_folder(teacher, path, Options("int4"))
    return path


def outputs(folder: Path, ids: np.ndarray) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Of transformers in float64: the output of every block [B, S, E], the log-probabilities [B, S, V]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().double()
    found: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _, __, y: found.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)).logits
    return found, logits.log_softmax(-1)


@pytest.mark.parametrize(
    ("blocks", "count", "expected"),
    [(6, 4, [0, 2, 3, 5]), (6, 3, [1, 3, 5]), (40, 4, [9, 19, 29, 39]), (2, 4, [0, 1]), (5, 1, [4]), (5, 0, [])],
)
def test_blocks_are_spread_evenly(blocks: int, count: int, expected: list[int]) -> None:
    assert matched_blocks(blocks, count) == expected


def test_what_the_teacher_says(teacher: Path) -> None:
    source = Checkpoint(teacher)
    model = decoder_for(source.spec.architecture, WindowOps(source))
    scores, chosen, states = taught(model, IDS, TOP_K, [1, 3])
    theirs, log_p = outputs(teacher, IDS)
    best = log_p.topk(TOP_K, -1)
    np.testing.assert_allclose(scores, best.values, rtol=2**-11, atol=1e-4)  # float16, as it is stored
    np.testing.assert_array_equal(chosen, best.indices)
    np.testing.assert_allclose(bf16_to_f32(states), torch.stack([theirs[1], theirs[3]], 2), rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("block", [0, 1])
def test_an_error_costs_what_is_expected(tmp_path: Path, block: int) -> None:
    """½ Σ F e² of random relative errors at a block's output, against the divergence that they cause."""
    folder = write_folder(tmp_path, granite_config())
    source = Checkpoint(folder)
    dense = decoder_for(source.spec.architecture, WindowOps(source))
    fisher = output_fisher(dense, np.tile(FISHER_IDS, (40, 1)), 6, "cpu")
    assert fisher.shape == (source.spec.architecture.num_hidden_layers, source.spec.architecture.hidden_size)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().double()
    ids, costs = torch.from_numpy(FISHER_IDS), []
    generator = torch.Generator().manual_seed(0)

    def disturbed(_: torch.nn.Module, __: object, y: torch.Tensor) -> torch.Tensor:
        size = y.square().mean(-1, keepdim=True).sqrt()
        return y + ERROR_SIZE * size * torch.randn(y.shape, generator=generator, dtype=y.dtype)

    with torch.no_grad():
        clean = model(ids).logits.log_softmax(-1)
        model.model.layers[block].register_forward_hook(disturbed)
        for _ in range(40):
            costs.append((clean.exp() * (clean - model(ids).logits.log_softmax(-1))).sum(-1).mean().item())
    assert np.mean(costs) == pytest.approx(0.5 * float(fisher[block].sum()) * ERROR_SIZE**2, rel=0.2)


@pytest.mark.parametrize("recompute", [False, True])
def test_the_loss_counts_errors_of_blocks(teacher: Path, rough: Path, recompute: bool) -> None:
    """Σ weight · (KL + Σ G e²) of a file that is 4 bits of its teacher, e relative errors, both run by transformers."""
    theirs, log_p = outputs(teacher, IDS[:, :-1])
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(IDS[:, 1:].shape, generator=generator)
    matched = {block: torch.rand(32, generator=generator) for block in (1, 3)}
    with MpoFile(rough) as file:
        names = [one.name for one in (*file.spec.linears, *file.spec.vectors)]
        ops, parts = HealingOps(file), Trainables(file, names, moving=True)
        model = decoder_for(file.spec.architecture, ops)
        student = Student(model, ops, parts, cross_entropy=0.0, recompute=recompute, matched=matched)
        ids = torch.from_numpy(IDS)
        chosen = torch.arange(VOCABULARY).expand(*weight.shape, -1)
        states = torch.stack([theirs[1], theirs[3]], 2).float()
        found = student(Batch(ids[:, :-1], ids[:, 1:], weight, log_p.float(), chosen, states))
        found[0].backward()
        loss, kl = found.tolist()
        assert all(parameter.grad is not None for _, parameter, _ in parts.learning())
        ops.trainables = None
        with torch.no_grad():
            x, ours = model.embed(ids[:, :-1]), list[torch.Tensor]()
            for block in range(BLOCKS):
                x = run_block(model, x, block)
                ours.append(x.double())
            log_q = model.logits(model.normed(x)).double().log_softmax(-1)
    expected_kl = float((weight * (log_p.exp() * (log_p - log_q)).sum(-1)).sum())
    errors = sum(
        (ours[block] - theirs[block]).square() / theirs[block].square().mean(-1, keepdim=True) @ scale.double()
        for block, scale in matched.items()
    )
    assert kl == pytest.approx(expected_kl, rel=1e-4)
    assert loss == pytest.approx(expected_kl + float((weight * errors).sum()), rel=1e-4)


def test_a_healing_matches_block_by_block(teacher: Path, rough: Path, tmp_path: Path) -> None:
    """The file of the dense model itself has nothing to learn; in 4 bits the errors count beside the divergence."""
    text, dense = tmp_path / "ids.npy", tmp_path / "dense.mpo"
    np.save(text, np.array(some_ids(930, 7, BOS)))
    export_folder(teacher, dense, Options("dense"))
    losses = {}
    for name, file, weight in (("dense", dense, 50.0), ("matched", rough, 50.0), ("logits alone", rough, 0.0)):
        settings = Settings(tokens=500, window=32, match_blocks=2, match_weight=weight, block_share=0)
        job = HealJob(file, tmp_path / f"{name}-healed.mpo", settings, text=text)
        losses[name] = heal_folder(teacher, job).curve[0]
    assert losses["matched"] > 5 * losses["logits alone"] > 0
    assert losses["dense"] < 0.01 * losses["matched"]


@pytest.mark.parametrize("kept", [[], [1, 3]])
def test_the_teacher_weighs_all_blocks_and_keeps_the_asked(teacher: Path, tmp_path: Path, kept: list[int]) -> None:
    """Files of more windows serve fewer; those whose Fisher information is gone are written anew."""
    source, silent = Checkpoint(teacher), lambda *_: None
    of, shape = source.spec.architecture, (*IDS[:, :-1].shape, TOP_K)
    files = TeacherFiles(tmp_path, "key", shape, of, kept)
    assert files.complete() == 0
    assert files.write(source, IDS, IDS, batch=2, device="cpu", progress=silent) == len(IDS) == files.complete()
    lesson = files.open()
    assert lesson.scores.shape == shape and lesson.states.shape == (
        *shape[:2],
        len(kept),
        of.hidden_size if kept else 0,
    )
    model = decoder_for(of, WindowOps(source))
    torch.testing.assert_close(lesson.fisher, output_fisher(model, IDS[:, :-1], 2, "cpu"))
    assert lesson.fisher.shape == (BLOCKS, of.hidden_size) and bool((lesson.fisher > 0).all())
    assert files.write(source, IDS[:2], IDS, batch=2, device="cpu", progress=silent) == 2
    next(tmp_path.glob("*fisher*")).unlink()
    assert files.complete() == 0


def test_without_weight_nothing_of_blocks_is_kept(teacher: Path, rough: Path, tmp_path: Path) -> None:
    text, sizes = tmp_path / "ids.npy", {}
    np.save(text, np.array(some_ids(930, 7, BOS)))
    for weight in (0.0, 1.0):
        work = tmp_path / str(weight)
        settings = Settings(tokens=500, window=32, match_weight=weight, block_share=0)
        with pytest.raises(ZeroDivisionError):
            job = HealJob(rough, tmp_path / "healed.mpo", settings, text=text, work=work)
            heal_folder(teacher, job, progress=stopping)
        sizes[weight] = sorted(path.name.split("-")[-1] for path in work.glob("teacher-*"))
    assert sizes[0.0] == ["done.npy", "fisher.npy", "scores.npy", "tokens.npy"]
    assert sizes[1.0] == ["done.npy", "fisher.npy", "scores.npy", "states.npy", "tokens.npy"]


def stopping(stage: str, done: float, note: str) -> None:
    """Progress that ends a healing once the teacher is through."""
    if stage == "healing":
        raise ZeroDivisionError
