"""Every family through the programs: each plan, healing, report and chat. Random weights: mechanics, not quality."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_exporter.cli.main import main
from mpo_exporter.convert.gguf import GgufRequest, write_gguf
from mpo_exporter.convert.hf import DTYPES, HfRequest, write_hf
from mpo_exporter.convert.vllm import write_vllm
from mpo_exporter.plan.named import PLANS
from mpo_exporter.plan.options import Options
from mpo_formats import ConfigError, MpoFile
from mpo_formats.layout import content_tensors
from mpo_runtime.loading import load
from mpo_runtime.weights.config import architecture_from_config
from tests.families import EVERY, family_config, write_family
from tests.formats import tiny
from tests.helpers import BOS, export_folder, forward, network, some_ids
from tests.runtime.native_cases import needs_native

OPTIONS = {
    "auto": ["--target-bpw", "12"],
    "paper": ["--chi", "4"],
    "k-proj": ["--min-dim", "8", "--rank", "4"],
    "corrected": ["--chi", "4"],
}
WIDE = {"hidden_size": 64, "max_position_embeddings": 128}


@pytest.fixture(scope="module", params=EVERY)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("family") / str(request.param)
    write_family(place, family_config(request.param, **WIDE))
    return place


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "ids.npy"
    np.save(path, np.array(some_ids(930, 7, BOS)))
    return path


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["mpo-export", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code


@needs_native
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_gives_a_file_that_both_backends_run_alike(
    folder: Path,
    text: Path,
    plan: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "model.mpo"
    fixed = ["--calib", str(text), "--calib-windows", "2", "--eval-text", str(text), "--measure-tokens", "200"]
    run(monkeypatch, str(folder), "--plan", plan, "--out", str(target), *fixed, *OPTIONS.get(plan, []))
    assert ("logits, cosine" in (printed := capsys.readouterr().out)) == (plan == "k-proj"), printed
    rows = [some_ids(30)]
    expected, source = forward(network(target), rows), forward(network(folder), rows)
    found = forward(network(target, backend="native", activations="float"), rows)
    np.testing.assert_allclose(found, expected, atol=1e-3 * max(1, expected.std()))
    with MpoFile(target, verify=True) as file:
        kind = file.spec.architecture.model_type
        assert file.spec.architecture.version == ("0.2" if kind in ("granite", "llama") else "0.3")
        assert len(file.certificates().entries) == 1
    if plan == "dense":
        np.testing.assert_array_equal(expected, source)
    else:
        assert np.abs(expected - source).max() > 1e-4


@needs_native
def test_healing_report_and_chat(folder: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, page = tmp_path / "model.mpo", tmp_path / "page"
    fixed = ["--calib", str(text), "--calib-windows", "2", "--eval-text", str(text), "--measure-tokens", "200"]
    healed = ["--heal-tokens", "2k", "--heal-text", str(text), "--report", str(page)]
    run(monkeypatch, str(folder), "--plan", "corrected", "--chi", "2", "--out", str(target), *fixed, *healed)
    with MpoFile(target, verify=True) as file:
        assert int(file.spec.provenance.options["healed_tokens"]) > 1900
    assert json.loads((page / "report.json").read_text()) and (page / "report.html").stat().st_size > 10_000
    with load(target) as model:
        parts = list(model.chat([{"role": "user", "content": "hello"}], max_tokens=5, temperature=0.0))
        assert parts


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("plan", "form"), [("int4", "compressed-tensors"), ("int4", "dense"), ("corrected", "dense")])
def test_transformers_gives_our_logits_from_a_folder(folder: Path, tmp_path: Path, plan: str, form: str) -> None:
    file = tmp_path / "model.mpo"
    export_folder(folder, file, Options(plan, chi=4 if plan == "corrected" else None))
    ids = some_ids(40)
    ours = forward(network(file), [ids])[0]
    # Of bf16 transformers rounds activations, too: 1.1e-2 at most on these random models, 6e-3 on granite-nano.
    for dtype, bound in (("f32", 1e-6), ("bf16", 1.3e-2)):
        write_hf(HfRequest(file, tmp_path / dtype, form, dtype))
        model = AutoModelForCausalLM.from_pretrained(tmp_path / dtype, dtype=DTYPES[dtype])
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0].float().numpy()
        assert np.sqrt(np.square(found - ours).mean() / np.square(ours).mean()) < bound
    config = json.loads((tmp_path / "f32" / "config.json").read_text())
    config.pop("quantization_config", None)
    with MpoFile(file) as opened:
        assert architecture_from_config(config, {}, "config") == opened.spec.architecture


def test_llama_cpp_reads_the_families_that_it_has(folder: Path, tmp_path: Path) -> None:
    """Those without windows, by our own reader; the others are refused by name."""
    file, out, kind = tmp_path / "model.mpo", tmp_path / "model.gguf", folder.name
    export_folder(folder, file, Options("int4"))
    plain = tmp_path / "plain.mpo"
    with MpoFile(file) as opened:
        spec = replace(
            opened.spec,
            architecture=replace(opened.spec.architecture, windows=()),
            files=(),  # llama.cpp has no name for the tokenizer of these tests
        )
        names = [tensor.name for tensor in content_tensors(spec)]
        tiny.write(plain, spec, {name: opened.array(name).copy() for name in names})
    if kind in ("granitemoehybrid", "gpt_neo"):
        with pytest.raises(
            ConfigError, match=f"model_type {kind} cannot be written as a GGUF file yet; expected one of"
        ):
            write_gguf(GgufRequest(file, out))
        return
    if kind in ("mistral", "qwen2"):
        with pytest.raises(
            ConfigError, match="its blocks attend to windows of positions, which a GGUF file cannot hold"
        ):
            write_gguf(GgufRequest(file, out))
    write_gguf(GgufRequest(plain, out))
    rows = [some_ids(40)]
    expected = forward(network(plain), rows)
    # The 48 columns of `down` are no multiple of 32, so that it becomes F16.
    np.testing.assert_allclose(forward(network(out), rows), expected, atol=1e-3 * np.abs(expected).max())


def test_vllm_is_given_granite_and_llama(folder: Path, tmp_path: Path) -> None:
    file, out, kind = tmp_path / "model.mpo", tmp_path / "out", folder.name
    export_folder(folder, file, Options("int4"))
    if kind in ("granite", "llama"):
        assert any("wrote" in line for line in write_vllm(file, out, force=False))
        return
    file.write_bytes(file.read_bytes()[:-1] + b"x")  # refused before the checksums are read
    with pytest.raises(ConfigError, match=f"model_type {kind} cannot be written as a folder for vLLM yet"):
        write_vllm(file, out, force=False)
    assert not out.exists()
