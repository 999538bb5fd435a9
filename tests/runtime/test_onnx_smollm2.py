"""An ONNX folder of SmolLM2, a model that others trained, against the reference: long prompts, 2,000 tokens, batches.

Needs the model in the store: mpo-run pull smollm2.
"""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("gguf", reason="the extra gguf is not installed")

from mpo_exporter.export import ExportTask, export
from mpo_exporter.fit.layer import Method
from mpo_exporter.source import open_source
from mpo_formats import CheckpointError, Quantized
from mpo_runtime import load
from mpo_runtime.onnx.session import Session
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.weights import store
from tests.runtime.onnx_cases import NANO, Plain, folder_of, reference

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
TEXT = NANO.parent / "evaluation.jsonl"
PROMPT = "The sea is"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2 with all matrices rounded to 4 bits."""
    try:
        path = store.resolve(Path("smollm2"))
    except CheckpointError:
        pytest.skip("SmolLM2 is not in the store: mpo-run pull smollm2")
    target = tmp_path_factory.mktemp("smollm2") / "int4.mpo"
    with open_source(path) as source:
        linears = source.weights.spec.linears
        layers = tuple(dataclasses.replace(layer, terms=(Quantized(4, 32, False),)) for layer in linears)
        export(source, ExportTask(target, layers=layers, method=Method("nearest", "svd")))
    return target


@pytest.fixture(scope="module")
def folder(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folder_of(file, tmp_path_factory.mktemp("folder") / "out")


@pytest.fixture(scope="module")
def ids(file: Path) -> list[int]:
    with load(file) as model:
        rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
        return model.encode("\n\n".join(row["text"] for row in rows if "text" in row))


def test_two_thousand_tokens_and_a_batch(file: Path, folder: Path, ids: list[int]) -> None:
    windows = [ids[start : start + 500] for start in range(0, 2000, 500)]
    expected = reference(file, windows)
    session = Session(folder, capacity=512)
    single = []
    for window, wanted in zip(windows, expected, strict=True):
        session.rewind(0)
        found = session.run_all(window)
        assert np.abs(found - wanted).max() < 1e-3
        single.append(found.argmax(-1) == wanted.argmax(-1))
    assert np.mean(single) >= 0.995
    together = Plain(folder).run(np.array(windows), np.ones((len(windows), 500), np.int64))
    assert np.abs(together - expected).max() < 1e-3


def test_a_prompt_of_4000_tokens(file: Path, folder: Path, ids: list[int]) -> None:
    prompt = ids[:4000]
    assert len(prompt) == 4000
    with load(file, backend="reference", context=4096) as model:
        [step] = model.engine.generate(prompt, SamplingOptions(), max_tokens=1)
    found = Session(folder, capacity=4096).run(prompt)
    assert np.abs(found - step.logits).max() < 1e-3


@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="the extra genai is not installed")
def test_onnxruntime_genai_gives_our_text(file: Path, folder: Path) -> None:
    import onnxruntime_genai as genai

    with load(file, backend="reference") as model:
        prompt = model.encode(PROMPT)
        wanted = [piece.token for piece in model.generate(prompt, temperature=0, max_tokens=100)]
    loaded = genai.Model(str(folder))
    parameters = genai.GeneratorParams(loaded)
    parameters.set_search_options(max_length=len(prompt) + 100, do_sample=False)
    generator = genai.Generator(loaded, parameters)
    generator.append_tokens(prompt)
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)[len(prompt) :]]
    if wanted[-1] in model.end_ids:  # which genai leaves out
        wanted.pop()
    assert found == wanted
