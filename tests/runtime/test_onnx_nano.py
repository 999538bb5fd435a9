"""ONNX folders of granite-nano: parity with the reference over long texts, generation, and onnxruntime-genai as a witness."""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

from mpo_formats import ConfigError, MpoError
from mpo_runtime.engine import Request
from mpo_runtime.loading import load
from mpo_runtime.onnx import export as export_module
from mpo_runtime.onnx import running
from mpo_runtime.onnx.session import Session
from mpo_runtime.sampler import SamplingOptions
from tests.runtime.onnx_cases import KINDS, NANO, folder_of, make, reference

TEXT = NANO.parent / "evaluation.jsonl"
PROMPT = "I want to book a table at a restaurant."


class Files:
    """granite-nano with each kind of term, made when it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __getitem__(self, kind: str) -> Path:
        path = self.root / f"{kind}.mpo"
        return path if path.exists() else make(kind, path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("nano"))


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    """2,000 tokens of text in two windows."""
    with load(NANO, backend="reference") as model:
        rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
        ids = model.encode("\n\n".join(row["text"] for row in rows if "text" in row))
    assert len(ids) >= 2000
    return [ids[:1000], ids[1000:2000]]


@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_give_the_references_logits(
    kind: str, files: Files, windows: list[list[int]], tmp_path: Path
) -> None:
    session = Session(folder_of(files[kind], tmp_path / "out"), capacity=1024, threads=1)
    same = []
    for window in windows:
        session.rewind(0)
        found, expected = session.run_all(window), reference(files[kind], [window])[0]
        assert np.abs(found - expected).max() < 1e-3
        same.append(found.argmax(-1) == expected.argmax(-1))
    assert np.mean(same) >= 0.995


def test_a_prompt_of_4000_tokens(tmp_path: Path, windows: list[list[int]]) -> None:
    source = tmp_path / "long"
    shutil.copytree(NANO, source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8192}))
    ids = (windows[0] + windows[1]) * 2
    assert len(ids) == 4000
    session = Session(folder_of(source, tmp_path / "out"), capacity=4096, threads=1)
    with load(source, backend="reference", context=4096) as model:
        [step] = model.engine.generate(ids, SamplingOptions(), max_tokens=1)
        expected = step.logits
    assert np.abs(session.run(ids) - expected).max() < 1e-3


def test_tables_are_floats_where_the_runtime_cannot_look_up_integers(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "lookup_bits", frozenset)
    folder = folder_of(files["int3"], tmp_path / "out")
    session = Session(folder, capacity=64, threads=1)
    ids = list(range(40))
    assert np.abs(session.run_all(ids) - reference(files["int3"], [ids])[0]).max() < 1e-3
    import onnx

    kinds = {node.op_type for node in onnx.load(str(folder / "model.onnx"), load_external_data=False).graph.node}
    assert "GatherBlockQuantized" not in kinds and "Gather" in kinds


def test_growth_is_told(files: Files, tmp_path: Path) -> None:
    exported = export_module.export_onnx(export_module.OnnxRequest(files["int3"], tmp_path / "out"))
    [kind] = exported.kinds
    # 3 bits in 4, and a scale of 32 bits instead of 16 in each group of 64.
    assert (kind.name, kind.written * 26) == ("3 bits", kind.stored * 36)
    data = sum(kind.written for kind in exported.kinds)
    assert data <= exported.manifest.data_bytes < data * 1.2


def test_generated_text_is_the_references(files: Files, tmp_path: Path) -> None:
    folder = folder_of(files["int4"], tmp_path / "out")
    with load(files["int4"], backend="reference") as model, load(folder, engine="onnx", threads=1) as ours:
        assert ours.tokenizer is not None and ours.template is not None
        for prompt in (PROMPT, "Once upon a time"):
            wanted = [piece.token for piece in model.generate(prompt, temperature=0, max_tokens=60)]
            assert [piece.token for piece in ours.generate(prompt, temperature=0, max_tokens=60)] == wanted
        message = [{"role": "user", "content": PROMPT}]
        wanted = [piece.token for piece in model.chat(message, seed=3, max_tokens=40)]
        assert [piece.token for piece in ours.chat(message, seed=3, max_tokens=40)] == wanted
        drawn = "".join(piece.text for piece in ours.generate(PROMPT, max_tokens=20))
        assert isinstance(drawn, str)
        assert ours.score(PROMPT).logprobs == pytest.approx(model.score(PROMPT).logprobs, abs=1e-3)
        with pytest.raises(ConfigError, match="prompt_logprobs: not with ONNX Runtime"):
            ours.engine.submit(Request((1, 2), prompt_logprobs=True))


def test_texts_that_are_waited_for_come_one_after_the_other(files: Files, tmp_path: Path) -> None:
    folder = folder_of(files["int4"], tmp_path / "out")
    told: queue.SimpleQueue[int] = queue.SimpleQueue()
    with load(folder, threads=1) as model:
        asked = [tuple(model.encode(f"{PROMPT} {index}")) for index in range(4)]
        greedy = [Request(ids, SamplingOptions(temperature=0), 6, ()) for ids in asked]
        alone = [[step.token for step in model.engine.submit(request)] for request in greedy]
        texts = [
            model.engine.submit(request, notify=lambda index=index: told.put(index))
            for index, request in enumerate(greedy)
        ]
        texts[2].cancel()
        assert [[step.token for step in text] for text in texts] == [*alone[:2], [], alone[3]]
        count = told.qsize()
        assert [told.get() for _ in range(count)] == [0] * 6 + [1] * 6 + [3] * 6
        failing = Request(asked[0], logits_hook=lambda ids, logits: logits.fill(np.nan))
        with pytest.raises(MpoError, match="NaN"):
            next(model.engine.submit(failing, notify=lambda: None))
        unread = model.engine.submit(Request(asked[0], stop_ids=()), notify=lambda: None)
        [step] = model.engine.submit(Request(asked[1], max_tokens=1, stop_ids=()), notify=unread.cancel)
        assert step.finish == "length"
        assert model.engine.stats().waiting == 0
        open_text = model.engine.submit(Request(asked[0], stop_ids=()), notify=lambda: None)
    assert len(list(open_text)) < 1000
    with pytest.raises(ConfigError, match="closed"):
        model.engine.submit(greedy[0], notify=lambda: None)


def test_a_reader_who_is_too_slow_does_not_keep_the_others_waiting(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "READER_SECONDS", 0.2)
    with load(folder_of(files["int4"], tmp_path / "out"), threads=1) as model:
        ids = tuple(model.encode(PROMPT))
        slow = model.engine.submit(Request(ids, stop_ids=()), notify=lambda: None)
        [step] = model.engine.submit(Request(ids, max_tokens=1, stop_ids=()), notify=lambda: None)
        assert step.finish == "length"
        with pytest.raises(ConfigError, match="not read"):
            list(slow)


def test_a_prompt_that_goes_on_reuses_the_cache(files: Files, tmp_path: Path) -> None:
    folder = folder_of(files["int4"], tmp_path / "out")
    with load(folder, threads=1) as model:
        first = model.encode(PROMPT)
        pieces = list(model.generate(first, max_tokens=8, temperature=0.5))
        longer = [*first, *(piece.token for piece in pieces), *first]
        assert model.engine.reusable(longer) == len(first) + len(pieces) - 1  # the last token was not run
        assert model.engine.reusable(longer, repeatable=True) == 0
        again = [piece.token for piece in model.generate(longer, max_tokens=5, temperature=0)]
    with load(folder, threads=1) as model:
        assert [piece.token for piece in model.generate(longer, max_tokens=5, temperature=0)] == again


def test_options_without_a_meaning_are_refused(files: Files, tmp_path: Path) -> None:
    folder = folder_of(files["dense"], tmp_path / "out")
    for options, message in (
        ({"chi": 4}, "chi 4: has no meaning for ONNX Runtime"),
        ({"backend": "native"}, "backend native: has no meaning"),
        ({"context": 2000}, "context of 2000 tokens: the model was made for 1024"),
    ):
        with pytest.raises(ConfigError, match=message):
            load(folder, **options)
    with pytest.raises(ConfigError, match=r"make one: mpo-run export-onnx .*int4.mpo --out int4-onnx"):
        load(files["int4"], engine="onnx")
    with pytest.raises(ConfigError, match="engine tensorflow: expected one of auto, mpo, onnx"):
        load(folder, engine="tensorflow")


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from mpo_runtime.cli import main
sys.argv = ["mpo-run", *sys.argv[1:]]
main.main()
"""


def run_cli(*words: str) -> str:
    """The output of mpo-run in a process in which importing torch fails."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *words],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_commands_work_without_torch(files: Files, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    told = run_cli("export-onnx", str(files["int4"]), "--out", out)
    assert "4 bits: " in told and f"wrote {out}" in told
    assert run_cli("generate", out, "--engine", "onnx", "-p", "Once", "-n", "8", "--temperature", "0").startswith(
        "Once"
    )
    assert run_cli("chat", out, "--engine", "onnx", "-p", PROMPT, "-n", "8", "--temperature", "0").strip()


@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="the extra genai is not installed")
@pytest.mark.parametrize("kind", ["dense", "int4"])
def test_onnxruntime_genai_writes_the_same_text(kind: str, files: Files, tmp_path: Path) -> None:
    import onnxruntime_genai as genai

    folder = folder_of(files[kind], tmp_path / "out")
    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    # The dense model goes on for 100 tokens; int4, coarsely rounded, may end earlier.
    with load(files[kind], backend="reference") as ours:
        for prompt in ("The history of", "Dear customer, "):  # 100 tokens without an end
            ids = ours.encode(prompt)
            assert list(tokenizer.encode(prompt)) == ids
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=len(ids) + 100, do_sample=False)
            generator = genai.Generator(model, parameters)
            generator.append_tokens(ids)
            while not generator.is_done():
                generator.generate_next_token()
            wanted = [piece.token for piece in ours.generate(ids, temperature=0, max_tokens=100)]
            found = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
            if wanted[-1] in ours.end_ids:  # which genai leaves out
                wanted.pop()
            assert found == wanted
