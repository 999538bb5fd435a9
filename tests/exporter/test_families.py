"""Every family through the programs: each plan, healing, report and chat. Random weights: mechanics, not quality."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mpo_exporter.cli.main import main
from mpo_exporter.convert.gguf import GgufRequest, write_gguf
from mpo_exporter.convert.hf import HfRequest, write_hf
from mpo_exporter.convert.vllm import write_vllm
from mpo_exporter.plan.named import PLANS
from mpo_exporter.plan.options import Options
from mpo_formats import ConfigError, MpoFile
from mpo_runtime.loading import load
from tests.families import EVERY, family_config, write_family
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


def test_converters_write_granite_and_llama_and_refuse_the_others_by_name(folder: Path, tmp_path: Path) -> None:
    file, out, kind = tmp_path / "model.mpo", tmp_path / "out", folder.name
    export_folder(folder, file, Options("int4"))
    converters = {
        "a Hugging Face folder": lambda: write_hf(HfRequest(file, out / "hf", "dense")),
        "a folder for vLLM": lambda: write_vllm(file, out / "vllm", force=False),
        "a GGUF file": lambda: write_gguf(GgufRequest(file, out / "model.gguf", measure_tokens=0)),
    }
    out.mkdir()
    for target, write in converters.items():
        if kind not in ("granite", "llama"):
            with pytest.raises(ConfigError, match=f"model_type {kind} cannot be written as {target} yet"):
                write()
        elif target != "a GGUF file":  # llama.cpp has no name for the tokenizer of these tests
            assert any("wrote" in line for line in write())
    assert len(list(out.iterdir())) == (2 if kind in ("granite", "llama") else 0)
