"""Whole exports: what is stored is what was planned, and the runtime computes what the float64 reference reads."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mpo_exporter import certify as certify_module
from mpo_exporter import export as export_module
from mpo_exporter.export import Listener, Result
from mpo_exporter.fit.layer import Built, Tensors, build_linear, narrow, widen
from mpo_exporter.plan.options import Options
from mpo_formats import ConfigError, Dense, LinearSpec, Mpo, MpoFile, MpoWriter, OutputError, Quantized, Term
from mpo_formats.layout import linear_tensors
from mpo_formats.reference import matrix
from mpo_runtime.layers.linear import load_linear
from mpo_runtime.measure import compare
from mpo_runtime.text.token_text import TokenText
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import Config, export_folder, forward, granite_config, network, some_ids, write_folder, write_weights

# The second MLP size has no group; biases and an untied head are carried along.
CONFIG: Config = granite_config(
    hidden_size=32, intermediate_size=84, num_hidden_layers=3, attention_bias=True, tie_word_embeddings=False
)
PLANS = {
    "dense": Options("dense"),
    "int4": Options("int4"),
    "paper": Options("paper", chi=6),
    "paper of 3 cores": Options("paper", chi=9, cores=3),
    "auto": Options("auto", chi=4),
    "auto of 3 cores": Options("auto", chi=8, cores=3),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("source") / "model", CONFIG, dtype=torch.bfloat16, shards=2)


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("exported")
    return {
        name: export_folder(source, folder / f"{index}.mpo", options)
        for index, (name, options) in enumerate(PLANS.items())
    }


def dense_matrix(source: Checkpoint, name: str) -> NDArray[np.float64]:
    return widen(source.array(f"{name}.0.weight"), source.dtype(f"{name}.0.weight"))


@pytest.mark.parametrize("plan", PLANS)
def test_the_runtime_reads_what_the_reference_reads(exported: dict[str, Result], source: Path, plan: str) -> None:
    """Every layer's matrix, and the logits of the model with exactly these matrices, dense."""
    path = exported[plan].path
    folder = path.parent / f"{path.stem} rebuilt"
    tensors = {}
    original = Checkpoint(source)
    with MpoFile(path) as file:
        file.verify()
        assert file.spec == exported[plan].spec
        for linear in file.spec.linears:
            expected = matrix(file, linear)
            loaded = load_linear(file, linear, chi=None, held=True, device=torch.device("cpu"))
            np.testing.assert_allclose(loaded.weight().numpy(), expected, atol=2e-6)
            dense = dense_matrix(original, linear.name)
            relative = np.linalg.norm(expected - dense) / np.linalg.norm(dense)
            assert relative < (1e-9 if plan == "dense" else 0.1 if linear.terms[0].kind != "mpo" else 1)
            tensors[f"{linear.name}.weight"] = torch.from_numpy(expected.astype(np.float32))
            if linear.bias:
                tensors[f"{linear.name}.bias"] = loaded.bias
        for vector in file.spec.vectors:
            raw = widen(file.array(f"{vector.name}.weight"), vector.dtype).astype(np.float32)
            tensors[f"{vector.name}.weight"] = torch.from_numpy(raw)
    folder.mkdir()
    (folder / "config.json").write_text((source / "config.json").read_text())
    write_weights(folder, tensors)
    rows = [some_ids(12, 1), some_ids(12, 2)]
    np.testing.assert_allclose(forward(network(path), rows), forward(network(folder), rows), atol=1e-4)


def test_dense_is_the_source_bit_for_bit(exported: dict[str, Result], source: Path) -> None:
    original = Checkpoint(source)
    with MpoFile(exported["dense"].path) as file:
        assert file.spec.linears == original.spec.linears
        for linear in file.spec.linears:
            for tensor in linear_tensors(linear):
                np.testing.assert_array_equal(file.array(tensor.name), original.array(tensor.name))
                assert file.dtype(tensor.name) == original.dtype(tensor.name) == "bf16"
        for vector in file.spec.vectors:
            name = f"{vector.name}.weight"
            np.testing.assert_array_equal(file.array(name), original.array(name))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert file.file(name) == (source / name).read_bytes()
    rows = [some_ids(12)]
    np.testing.assert_array_equal(forward(network(exported["dense"].path), rows), forward(network(source), rows))


def test_a_correction_lowers_the_error_of_rounding_alone(exported: dict[str, Result], source: Path) -> None:
    original = Checkpoint(source)
    with MpoFile(exported["int4"].path) as plain, MpoFile(exported["auto"].path) as corrected:
        pairs = [
            pair for pair in zip(plain.spec.linears, corrected.spec.linears, strict=True) if len(pair[1].terms) == 2
        ]
        assert len(pairs) == exported["auto"].core_layers > 0
        for rounded, both in pairs:
            dense = dense_matrix(original, both.name)
            errors = [
                np.linalg.norm(matrix(file, linear) - dense) for file, linear in ((plain, rounded), (corrected, both))
            ]
            assert errors[1] < errors[0]


def test_sizes_and_provenance(exported: dict[str, Result], source: Path) -> None:
    original = Checkpoint(source)
    for name, result in exported.items():
        assert result.file_bytes == result.path.stat().st_size
        assert result.bits_per_weight == result.file_bytes * 8 / original.architecture.parameters()
        origin = result.spec.provenance
        options = PLANS[name]
        assert (origin.source, origin.source_sha256) == ("model", original.sha256())
        expected = {"plan": options.plan, "chi": str(options.largest_chi), "cores": str(options.cores)}
        expected["effort"] = "normal"
        if options.plan == "auto":  # with χ given, every matrix carries cores
            expected["cored"] = "every matrix"
        assert origin.options == expected
        assert result.comparison is None
    assert exported["int4"].file_bytes < exported["auto"].file_bytes < exported["dense"].file_bytes


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("plan", ["dense", "auto"])
def test_other_storage_types(tmp_path: Path, dtype: torch.dtype, plan: str) -> None:
    folder = write_folder(tmp_path / "model", dtype=dtype)
    result = export_folder(folder, tmp_path / "out.mpo", Options(plan, chi=4))
    rows = [some_ids(12)]
    difference = np.abs(forward(network(result.path), rows) - forward(network(folder), rows)).max()
    assert difference == 0 if plan == "dense" else 0 < difference < 2


def test_the_same_export_gives_the_same_bytes(exported: dict[str, Result], source: Path, tmp_path: Path) -> None:
    again = export_folder(source, tmp_path / "again.mpo", PLANS["auto"]).path
    assert again.read_bytes() == exported["auto"].path.read_bytes()


def test_the_certificate_is_what_compare_measures(source: Path, tmp_path: Path) -> None:
    ids = np.array(some_ids(100), np.int64)
    text = TokenText("ids", ids, 0, "0" * 64)
    stages: list[tuple[str, int, int]] = []
    result = export_folder(
        source, tmp_path / "out.mpo", PLANS["auto"], text=text, listener=Listener(lambda *step: stages.append(step))
    )
    with MpoFile(result.path, verify=True) as file:
        (entry,) = file.certificates().entries
    measured = result.comparison
    assert measured is not None and entry.chi is None
    # Attention of whole windows is one operation in an export, and sums in another order.
    known = compare(network(result.path), network(source), ids)
    for name in ("kl_mean", "kl_999", "cosine", "mse", "same_top1"):
        assert getattr(measured, name) == pytest.approx(getattr(known, name), rel=1e-4)
    for ours, theirs in ((measured.model, known.model), (measured.reference, known.reference)):
        assert (ours.tokens, ours.windows, ours.window) == (theirs.tokens, theirs.windows, theirs.window)
        assert (ours.perplexity, ours.error) == pytest.approx((theirs.perplexity, theirs.error), rel=1e-4)
    quality = entry.quality
    assert (quality.text, quality.text_sha256, quality.window) == ("ids", "0" * 64, measured.model.window)
    assert (quality.perplexity, quality.perplexity_error) == (measured.model.perplexity, measured.model.error)
    assert (quality.dense_perplexity, quality.kl_mean) == (measured.reference.perplexity, measured.kl_mean)
    assert (quality.kl_999, quality.same_top1) == (measured.kl_999, measured.same_top1)
    layers = len(result.spec.linears)
    assert [step for step in stages if step[0] == "fitting"] == [("fitting", n + 1, layers) for n in range(layers)]
    assert stages[-1] == ("measuring", measured.model.windows, measured.model.windows)


def test_a_text_of_a_single_window_has_a_certificate_too(source: Path, tmp_path: Path) -> None:
    text = TokenText("ids", np.array(some_ids(9), np.int64), 0, "0" * 64)
    result = export_folder(source, tmp_path / "out.mpo", PLANS["int4"], text=text)
    assert result.comparison is not None and result.comparison.model.windows == 1
    with MpoFile(result.path) as file:
        assert file.certificates().entries[0].quality.perplexity_error == result.comparison.model.error > 0


def left_behind(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupted_export_leaves_nothing_and_the_old_file_untouched(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    target = tmp_path / "out.mpo"
    if force:
        target.write_bytes(b"old")
    calls: list[str] = []

    def interrupted(linear: LinearSpec, *rest: Any) -> Built:
        calls.append(linear.name)
        if len(calls) == 5:
            assert any(name.endswith(".partial") for name in left_behind(tmp_path))
            raise KeyboardInterrupt
        return build_linear(linear, *rest)

    monkeypatch.setattr(export_module, "build_linear", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_folder(source, target, PLANS["auto"], force=force)
    assert left_behind(tmp_path) == (["out.mpo"] if force else [])
    assert not force or target.read_bytes() == b"old"


def test_an_interrupted_measurement_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(certify_module, "compare", interrupted)
    text = TokenText("ids", np.array(some_ids(20), np.int64), 0, "0" * 64)
    with pytest.raises(KeyboardInterrupt):
        export_folder(source, tmp_path / "out.mpo", PLANS["dense"], text=text)
    assert left_behind(tmp_path) == []


def full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("place", ["reserving", "writing", "syncing"])
def test_a_full_disk_is_named_and_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    target = tmp_path / "out.mpo"
    target.write_bytes(b"old")
    if place == "reserving":
        monkeypatch.setattr(os, "posix_fallocate", full)
    elif place == "syncing":
        monkeypatch.setattr(os, "fsync", full)
    else:
        append, calls = MpoWriter._append, []

        def fails_later(writer: MpoWriter, content: bytes) -> None:
            calls.append(len(content))
            if len(calls) == 9:
                full()
            append(writer, content)

        monkeypatch.setattr(MpoWriter, "_append", fails_later)
    with pytest.raises(OutputError, match=r"out\.mpo: cannot write .* MB \(No space left on device\); free some space"):
        export_folder(source, target, PLANS["int4"], force=True)
    assert left_behind(tmp_path) == ["out.mpo"]
    assert target.read_bytes() == b"old"


def test_a_target_is_overwritten_only_when_forced(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.mpo"
    target.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already; give another name with --out or overwrite it with --force"):
        export_folder(source, target, PLANS["dense"])
    assert target.read_bytes() == b"old"
    export_folder(source, target, PLANS["dense"], force=True)
    with MpoFile(target) as file:
        assert file.verify() > 0
    assert left_behind(tmp_path) == ["out.mpo"]


def test_values_that_do_not_fit_name_their_layer(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model")
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj"
    tensors[f"{name}.weight"][3, 4] = torch.inf
    write_weights(folder, tensors)
    with pytest.raises(ConfigError, match=f"{name}: matrix: has values that are not finite; check the source model"):
        export_folder(folder, tmp_path / "out.mpo", PLANS["int4"])
    assert left_behind(tmp_path) == ["model"]


@pytest.mark.parametrize(
    "terms",
    [
        (Quantized(3, 16, False),),
        (Dense("f16"), Mpo((16, 1), (1, 32), (2,), "f32", 0)),
        (Quantized(2, 32, False), Mpo((4, 4), (4, 8), (5,), "bf16", 0)),
        (Mpo((4, 4), (8, 4), (12,), "int4", 16), Mpo((16, 1), (1, 32), (3,), "f16", 0)),
    ],
    ids=["int3", "f16 + f32 cores", "int2 + bf16 cores", "int4 cores + f16 cores"],
)
def test_any_sum_of_terms_can_be_fitted(terms: tuple[Term, ...]) -> None:
    """And further terms do not make the fit worse than the first one alone."""
    linear = LinearSpec("layer", 16, 32, None, terms)
    values = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    tensors = build_linear(linear, values, "f32").tensors
    wanted = {tensor.name: tensor.shape for tensor in linear_tensors(linear)}
    assert {name: array.shape for name, array in tensors.items()} == wanted
    alone = build_linear(LinearSpec("layer", 16, 32, None, terms[:1]), values, "f32").tensors
    whole, first = (
        np.linalg.norm(matrix(Arrays(arrays), spec) - values)
        for arrays, spec in ((tensors, linear), (alone, LinearSpec("layer", 16, 32, None, terms[:1])))
    )
    assert whole < first if len(terms) > 1 else whole < 0.2 * np.linalg.norm(values)


class Arrays:
    """Tensors in memory, as the format's reference reads them from a file."""

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def array(self, name: str) -> NDArray[Any]:
        return self.tensors[name]

    def dtype(self, name: str) -> str:
        return {"float16": "f16", "float32": "f32", "uint16": "bf16"}[self.tensors[name].dtype.name]


TINY = {
    "int4": (Quantized(4, 32, False),),
    "int8": (Quantized(8, 32, False),),
    "int4 with zeros": (Quantized(4, 32, True),),
    "cores in f16": (Mpo((16, 1), (1, 32), (4,), "f16", 0),),
    "cores in int8": (Mpo((16, 1), (1, 32), (16,), "int8", 16),),
    "a sum": (Quantized(4, 32, False), Mpo((16, 1), (1, 32), (4,), "f16", 0)),
    "f16": (Dense("f16"),),
}


@pytest.mark.parametrize("name", TINY)
def test_values_below_the_range_of_half_precision_name_their_layer(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((16, 32)).astype(np.float32)
    linear = LinearSpec("model.layer", 16, 32, None, TINY[name])
    build_linear(linear, values * 1e-3, "f32")
    build_linear(linear, values * 0, "f32")
    with pytest.raises(ConfigError, match=r"^model\.layer: .*values of at most .* are below the range of"):
        build_linear(linear, values * np.float32(1e-20), "f32")
    lost = values * np.float32(1e-3)
    lost[3] *= np.float32(1e-20)  # a row that was never trained does no harm
    assert np.abs(build_linear(linear, lost, "f32").matrix).max() > 0


def test_what_small_scales_cost_is_bounded() -> None:
    """Whatever is accepted is as close as at an ordinary scale; what is refused is not."""
    values = np.random.default_rng(1).standard_normal((16, 64)).astype(np.float32)
    linear = LinearSpec("layer", 16, 64, None, (Quantized(4, 32, False),))
    usual = np.square(build_linear(linear, values, "f32").matrix - values).sum()
    refused = 0
    for exponent in range(30):
        factor = np.float32(2.0**-exponent)
        try:
            error = np.square(build_linear(linear, values * factor, "f32").matrix / float(factor) - values).sum()
        except ConfigError:
            refused += 1
            continue
        assert error < 1.3 * usual and refused == 0
    assert 5 < refused < 15


def test_a_correction_that_has_next_to_nothing_to_do_may_be_rough() -> None:
    values = np.random.default_rng(2).standard_normal((16, 32)).astype(np.float32)
    terms = (Mpo((16, 1), (1, 32), (16,), "f32", 0), Quantized(4, 32, False))
    matrix = build_linear(LinearSpec("layer", 16, 32, None, terms), values, "f32").matrix
    np.testing.assert_allclose(matrix, values, atol=1e-5)


def test_narrowing_refuses_what_half_precision_cannot_hold() -> None:
    with pytest.raises(ConfigError, match="exceed the range of f16; store this layer in another type"):
        narrow(np.array([70000.0]), "f16")
    np.testing.assert_array_equal(widen(narrow(np.array([1.5, -2.0]), "bf16"), "bf16"), [1.5, -2.0])


def test_options_are_recorded_as_json_text(exported: dict[str, Result]) -> None:
    """The header is plain JSON in a safetensors file: any tool can read it."""
    raw = exported["auto"].path.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert json.loads(header["__metadata__"]["provenance"])["options"]["plan"] == "auto"
