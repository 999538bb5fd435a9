"""The commands and the Python of the documents, run as written: in a folder with small files under the names they use."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpo_exporter.source import data_folder
from tests.test_docs import commands_of

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
# Words that keep a command short; what a document says about quality and time is not tested here.
SHORT = {
    "mpo-export": ["--calib-windows", "4", "--measure-tokens", "512"],
    "mpo-export heal": ["--heal-tokens", "2k", "--measure-tokens", "512"],
    "mpo-export report": ["--calib-windows", "4", "--measure-tokens", "512"],
    "mpo-export to-hf": [],
    "mpo-export to-vllm": [],
    "mpo-export to-gguf": [],
    "mpo-run bench": ["-p", "16", "-n", "8", "-d", "0", "-r", "1"],
    "mpo-run eval": ["--limit", "2"],
}
# What is in no network here, or has a test of its own.
ELSEWHERE = re.compile(r"mpo-run (serve|pull (smollm2|owner|PATH)|rm x)|(chat|generate) granite")
NEEDS = {"onnx": "onnxruntime", "eval": "lm_eval", "to-hf": "compressed_tensors", "to-gguf": "gguf"}
PAGES = ("README.md", "docs/chat.md", "docs/measuring.md", "docs/onnx.md", "docs/report.md", "docs/serving.md")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder, with granite-nano in the store in the place of SmolLM2."""
    place = tmp_path_factory.mktemp("documents")
    work = place / "work"
    work.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPO_HOME", str(place / "home"))
        run(["mpo-run", "pull", str(data_folder() / "granite-nano"), "--name", "smollm2"], work)
        for name in ("demo", "smollm2", "model"):
            run(["mpo-export", "demo", "--plan", "int4", "--out", f"{name}.mpo"], work)
        (work / "prompts.jsonl").write_text('{"prompt": "Once"}\n', encoding="utf-8")
        rows = [json.dumps({"query": "One and one is", "choices": ["two", "ten"], "gold": 0})] * 2
        (work / "tasks").mkdir()
        for name in ("arc_easy", "copa"):
            (work / "tasks" / f"{name}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        yield work


def run(words: list[str], folder: Path) -> None:
    """Runs a command of the documents, a little shortened; stdin has one line."""
    program, *rest = words
    key = f"{program} {rest[0]}" if f"{program} {rest[0]}" in SHORT else program
    anew = ["--force"] if program == "mpo-export" or rest[0] in ("export-onnx", "pull") else []
    done = subprocess.run(
        [BIN / program, *rest, *SHORT.get(key, []), *anew],
        cwd=folder,
        input="Hello.\n",
        capture_output=True,
        encoding="utf-8",
        timeout=1800,
    )
    assert done.returncode == 0, f"{' '.join(words)}:\n{done.stdout[-1000:]}{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_document_run(page: str, folder: Path) -> None:
    ran = 0
    for words in commands_of(ROOT / page):
        line = " ".join(words)
        missing = [package for part, package in NEEDS.items() if part in line and not importlib.util.find_spec(package)]
        if ELSEWHERE.search(line) or missing:
            continue
        run(words, folder)
        ran += 1
    assert ran > 0


def test_the_python_of_the_readme_runs(folder: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^In Python:\n\n((?:    .*\n|\n)+)", text, re.MULTILINE)
    assert block is not None
    code = textwrap.dedent(block[1])
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, encoding="utf-8", timeout=600)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 10
