"""mpo-run eval through lm-eval itself, beside lm-eval's own model of transformers on the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Run
from tests.helpers import granite_config, write_folder

pytest.importorskip("lm_eval", reason="lm-eval is not installed; install the eval extra")
pytestmark = [
    pytest.mark.timeout(900),
    # lm-eval's own libraries warn of their own affairs.
    pytest.mark.filterwarnings("ignore"),
]

QUESTIONS = [
    {
        "query": f"Question {number}: the colour of{' a big' * number} thing is",
        "choices": ["red", "blue or so", "x"],
        "gold": 1,
    }
    for number in range(6)
]
WORDS = [{"context": f"Once upon {'a ' * number}time, there was a", "continuation": "girl"} for number in range(4)]
SUMS = [{"question": "What is 1 + 1?", "answer": "It is\n#### 2"}]
ROLLING = """
task: rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
metadata: {{version: 1}}
"""


# Ends itself in the middle of the sixth answer that is kept.
KILLED = """
import os, signal
from mpo_runtime.cli.main import main
from mpo_runtime.evaluation.kept import Kept
add = Kept.add
def add_or_end(kept, key, entry):
    if len(kept.rows) == 5:
        with kept.path.open("a") as file:
            file.write('\\n{"key": "' + key[:9])
        os.kill(os.getpid(), signal.SIGKILL)
    return add(kept, key, entry)
Kept.add = add_or_end
main()
"""


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("eval") / "little", granite_config(max_position_embeddings=96))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Three local tasks and a YAML file, and a cache of `datasets` of their own."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    texts = jsonl(
        tmp_path / "texts.jsonl", [{"text": "A text that is longer than the context. " * 5}, {"text": "Short."}]
    )
    yaml = tmp_path / "rolling.yaml"
    yaml.write_text(ROLLING.format(path=texts))
    return [jsonl(tmp_path / "choices.jsonl", QUESTIONS), jsonl(tmp_path / "words.jsonl", WORDS), yaml]


def their_results(folder: Path, tasks: list[Any]) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)
    return dict(simple_evaluate(model=model, tasks=tasks, bootstrap_iters=0, log_samples=True))


def in_a_process(code: str, words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, "eval", *words],
        cwd=folder,
        env=os.environ | {"HF_DATASETS_OFFLINE": "1", "HF_HOME": str(folder / "home")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_figures_agree_with_lm_evals_model_of_transformers(
    run: Run, folder: Path, tasks: list[Path], tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="lm-eval's model of transformers needs accelerate")
    from mpo_runtime.evaluation.tasks import read_tasks

    listed = ",".join(map(str, tasks))
    found = run(
        "mpo-run", "eval", folder, "--tasks", listed, "--log-samples", "--out", "r.json", "--backend", "reference"
    )
    assert found.code == 0, found.err
    assert "|choices" in found.out and "|rolling" in found.out
    ours = json.loads((tmp_path / "r.json").read_text())
    theirs = their_results(folder, read_tasks(listed))
    assert set(ours) >= {"results", "configs", "versions", "n-shot", "samples", "config"}
    assert ours["config"]["model"] == "mpo"
    for task, row in theirs["results"].items():
        for figure, value in row.items():
            if isinstance(value, float) and "stderr" not in figure:
                assert ours["results"][task][figure] == pytest.approx(value, rel=1e-3), (task, figure)
    for task in ("choices", "words"):
        for one, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for mine, wanted in zip(one["filtered_resps"], other["filtered_resps"], strict=True):
                assert float(mine[0]) == pytest.approx(float(wanted[0]), abs=1e-3)


def test_generated_answers_and_resuming(run: Run, folder: Path, tmp_path: Path, tasks: list[Path]) -> None:
    sums = jsonl(tmp_path / "sums.jsonl", SUMS)
    yaml = tmp_path / "sums.yaml"
    yaml.write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {sums}}}}}\ntest_split: test\n"
        "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '2'\n"
        "generation_kwargs: {until: ['zz'], do_sample: false, max_gen_toks: 8}\n"
        "metric_list: [{metric: exact_match}]\nmetadata: {version: 1}\n"
    )
    listed = f"{yaml},{tasks[0]}"
    first = run("mpo-run", "eval", folder, "--tasks", listed, "--limit", "2", "--resume", "kept.jsonl", "--json")
    assert first.code == 0, first.err
    document = json.loads(first.out)
    assert document["results"]["sums"]["exact_match,none"] in (0.0, 1.0)
    assert document["n-samples"]["choices"]["effective"] == 2
    kept = (tmp_path / "kept.jsonl").read_text()
    assert len(kept.splitlines()) == 7
    words = [str(folder), "--tasks", listed, "--limit", "2", "--resume", "kept.jsonl", "--json"]
    second = in_a_process("from mpo_runtime.cli.main import main; main()", words, tmp_path)
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["results"] == document["results"]
    assert (tmp_path / "kept.jsonl").read_text() == kept


def test_a_killed_run_goes_on(run: Run, folder: Path, tmp_path: Path, tasks: list[Path]) -> None:
    words = [str(folder), "--tasks", str(tasks[0]), "--limit", "4", "--json", "--resume"]
    whole = run("mpo-run", "eval", *words, "whole.jsonl")
    assert whole.code == 0, whole.err
    assert in_a_process(KILLED, [*words, "kept.jsonl"], tmp_path).returncode == -signal.SIGKILL
    killed = (tmp_path / "kept.jsonl").read_text()
    assert len(killed.splitlines()) == 6 and killed.splitlines()[-1].startswith('{"key": "')
    again = run("mpo-run", "eval", *words, "kept.jsonl")
    assert again.code == 0, again.err
    assert json.loads(again.out)["results"] == json.loads(whole.out)["results"]
    resumed = (tmp_path / "kept.jsonl").read_text()
    assert resumed.startswith(killed)
    # What is asked anew shares the run of its prompt with others: the last bits may differ.
    rows = [json.loads(line) for line in resumed.splitlines() if line.endswith("}")]
    wanted = [json.loads(line) for line in (tmp_path / "whole.jsonl").read_text().splitlines()]
    assert len(rows) == len(wanted)
    nats = {row["key"]: row["nats"] for row in rows}
    assert nats == pytest.approx({row["key"]: row["nats"] for row in wanted}, abs=1e-4)


def test_bad_input_is_one_line(run: Run, folder: Path, tasks: list[Path], tmp_path: Path) -> None:
    def refused(*arguments: object, words: str) -> None:
        run("mpo-run", "eval", folder, *arguments).assert_error("mpo-run", words)

    refused("--tasks", "none.jsonl", words="none.jsonl: cannot be read")
    refused("--tasks", "no_such_task_at_all", words="lm-eval has no such task")
    refused("--tasks", tasks[0], "--limit", "1.5", words="--limit: expected a whole number")
    refused("--tasks", tasks[0], "--limit", "0", words="--limit")
    refused("--tasks", tasks[0], "--system", "Be kind.", words="add --chat")
    refused("--tasks", tasks[0], "--chat", words="has no chat template")
    refused("--tasks", tasks[0], "--out", "no/such/place.json", words="its folder does not exist")
    run("mpo-run", "eval", tmp_path / "none", "--tasks", tasks[0]).assert_error("mpo-run", "none")
