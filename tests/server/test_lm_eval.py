"""lm-eval's client of completions against the server, where lm-eval is installed: its log-likelihoods are the model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_runtime import load
from tests.server.conftest import NANO, Server

pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]
ROWS = [
    {"query": "I want to book a", "choices": ["table", "restaurant at noon", "sea"], "gold": 0},
    {"query": "What time does the", "choices": ["train leave", "green"], "gold": 0},
    {"query": "The movie starts at", "choices": ["seven in the evening", "the cat"], "gold": 0},
]
TASK = """task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""


def test_log_likelihoods_of_choices(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm_eval = pytest.importorskip(
        "lm_eval", reason="pip install lm-eval[api]: its local-completions against the server"
    )
    pytest.importorskip("tenacity", reason="pip install lm-eval[api]")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    rows, task = tmp_path / "rows.jsonl", tmp_path / "choices.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task.write_text(TASK.format(path=rows))
    arguments = f"base_url={server.url}/v1/completions,model=nano,tokenizer={NANO},tokenizer_backend=huggingface"
    found: dict[str, Any] = lm_eval.simple_evaluate(
        model="local-completions",
        model_args=f"{arguments},num_concurrent=2,max_length=1024",
        tasks=[str(task)],
        bootstrap_iters=0,
        log_samples=True,
    )
    assert 0 <= found["results"]["choices"]["acc,none"] <= 1
    with load(NANO) as model:
        for sample in found["samples"]["choices"]:
            row = sample["doc"]
            for choice, told in zip(row["choices"], sample["filtered_resps"], strict=True):
                count = len(model.encode(row["query"]))
                expected = sum(model.score(f"{row['query']} {choice}").logprobs[count - 1 :])
                assert float(told[0]) == pytest.approx(expected, abs=1e-3)
