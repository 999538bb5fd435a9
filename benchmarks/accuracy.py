"""Accuracy on multiple-choice and last-word tasks, as lm-eval counts it, and perplexity on a text.

    python benchmarks/accuracy.py MODEL [MODEL ...] --tasks ../shared/text/tasks --limit 500 --out results.json
    python benchmarks/accuracy.py FOLDER --tasks ../shared/text/tasks --limit 200 --check-lm-eval

A MODEL is a `.mpo` file, a Hugging Face folder, a GGUF file or a name in the store. All run through the reference backend in
float32, so that only the weights differ. --tasks is a folder of JSONL files: rows of {query, choices, gold}, or of {context,
continuation} (the last word is to be predicted greedily). Of each task the first --limit rows are asked (all: 0). A choice's
score is the sum of the log-probabilities of its tokens; `acc` takes the best score, `acc_norm` the best score divided by the
choice's number of characters. What was asked is kept in --rows: a run that was stopped goes on when it is repeated.
--check-lm-eval asks the same questions through lm-eval's own model of a Hugging Face folder (`pip install lm-eval`) and ends
with status 1 where a figure differs by 0.001 or more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quality import Kept

from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.loading import open_weights, read_text_files
from mpo_runtime.measure import perplexity
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.text.tokenizer import Tokenizer

# How a row's query becomes a prompt, as lm-eval's tasks of these names have it; the choice follows after a blank.
PROMPTS = {
    "arc_easy": "{query}\nAnswer:",
    "arc_challenge": "{query}\nAnswer:",
    "piqa": "{query}\nAnswer:",
    "boolq": "{query}\nAnswer:",
    "copa": "{query}",
    "lambada_openai": "{context}",
}
# The figure by which a task is judged.
MAIN = {
    "arc_easy": "acc_norm",
    "arc_challenge": "acc_norm",
    "piqa": "acc_norm",
    "boolq": "acc",
    "copa": "acc",
    "lambada_openai": "acc",
}
BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what may follow it; `gold` is the index of the right choice, None where there is just one."""

    prompt: str
    choices: tuple[str, ...]
    gold: int | None


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probability of a continuation in nats, and whether greedy decoding gives it."""

    nats: float
    greedy: bool


def read_task(path: Path, limit: int) -> list[Question]:
    """The first `limit` questions of a task's file, all of them where it is 0."""
    name = path.stem
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
    rows = rows[: limit or None]
    return [question(name, row) for row in rows]


def question(name: str, row: dict[str, Any]) -> Question:
    """One row of a task as a question."""
    if "continuation" in row:
        return Question(PROMPTS[name].format(context=row["context"]), (f" {row['continuation']}",), None)
    prompt = PROMPTS[name].format(query=row["query"].rstrip())
    return Question(prompt, tuple(f" {choice}" for choice in row["choices"]), int(row["gold"]))


def split_tokens(tokenizer: Tokenizer, prompt: str, choice: str) -> tuple[list[int], list[int]]:
    """The token ids of a prompt and of what follows; blanks at the prompt's end belong to what follows, as in lm-eval."""
    blanks = len(prompt) - len(prompt.rstrip())
    if blanks:
        prompt, choice = prompt[:-blanks], prompt[-blanks:] + choice
    whole, start = tokenizer.encode(prompt + choice), tokenizer.encode(prompt)
    return whole[: len(start)], whole[len(start) :]


def score_all(model: Decoder, pairs: Sequence[tuple[list[int], list[int]]], lead: list[int]) -> list[Score]:
    """The scores of (prompt, continuation) pairs of token ids; `lead` stands in front of every prompt."""
    longest = model.architecture.max_position_embeddings
    inputs = [tuple((lead + prompt + following)[-(longest + 1) :][:-1]) for prompt, following in pairs]
    by_input: dict[tuple[int, ...], list[int]] = {}
    for index, row in enumerate(inputs):
        by_input.setdefault(row, []).append(index)
    found: dict[int, Score] = {}
    for batch in batches(sorted(by_input, key=len)):
        for row, hidden in zip(batch, run(model, batch), strict=True):
            for index in by_input[row]:
                found[index] = score(model, hidden[: len(row)], pairs[index][1])
        print(f"\r{len(found)}/{len(pairs)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return [found[index] for index in range(len(pairs))]


def batches(rows: Sequence[tuple[int, ...]]) -> Iterator[list[tuple[int, ...]]]:
    """Rows in order of length, cut so that no batch holds more than BATCH_TOKENS with its padding."""
    batch: list[tuple[int, ...]] = []
    for row in rows:
        if batch and (len(batch) + 1) * len(row) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.inference_mode()
def run(model: Decoder, batch: Sequence[tuple[int, ...]]) -> torch.Tensor:
    """The hidden states [B, S, E] of rows that are padded at their ends."""
    length = max(map(len, batch))
    padded = [[*row, *[0] * (length - len(row))] for row in batch]
    cache = model.ops.new_cache(model.architecture, len(batch), length)
    return model.hidden(model.ops.ids(padded), cache, [len(row) for row in batch])


@torch.inference_mode()
def score(model: Decoder, hidden: torch.Tensor, following: list[int]) -> Score:
    """The score of the tokens that follow, from the hidden states [S, E] of all but the last of them."""
    scores = model.logits(hidden[-len(following) :]).log_softmax(-1)
    ids = torch.tensor(following)
    nats = float(scores.gather(-1, ids[:, None]).double().sum())
    return Score(nats, bool((scores.argmax(-1) == ids).all()))


def answers(questions: Sequence[Question], scores: Sequence[Score]) -> dict[str, Any]:
    """Accuracies with their standard errors, and each question's outcome under `right`."""
    taken = iter(scores)
    right: dict[str, list[bool]] = {"acc": []}
    nats = 0.0
    for asked in questions:
        row = [next(taken) for _ in asked.choices]
        if asked.gold is None:
            right["acc"].append(row[0].greedy)
            nats += row[0].nats
            continue
        plain = [one.nats for one in row]
        normed = [one.nats / (len(choice) - 1) for one, choice in zip(row, asked.choices, strict=True)]
        right["acc"].append(int(np.argmax(plain)) == asked.gold)
        right.setdefault("acc_norm", []).append(int(np.argmax(normed)) == asked.gold)
    result: dict[str, Any] = {"questions": len(questions)}
    for name, outcomes in right.items():
        mean = sum(outcomes) / len(outcomes)
        result[name] = mean
        result[f"{name}_stderr"] = math.sqrt(mean * (1 - mean) / max(len(outcomes) - 1, 1))
    if "acc_norm" not in right:
        result["perplexity"] = math.exp(-nats / len(questions))
    result["right"] = {name: "".join("01"[one] for one in outcomes) for name, outcomes in right.items()}
    return result


def measure(path: str, tasks: Sequence[Path], limit: int, text: Path | None, tokens: int) -> dict[str, Any]:
    """All figures of one model."""
    weights = open_weights(path)
    try:
        tokenizer, _ = read_text_files(weights)
        if tokenizer is None:
            raise SystemExit(f"{path}: has no tokenizer")
        model = decoder_for(weights.spec.architecture, ReferenceOps(weights, held=True))
        lead = tokenizer.encode("", add_special_tokens=True)[:1]
        result: dict[str, Any] = {"tasks": {}}
        for task in tasks:
            questions = read_task(task, limit)
            pairs = [split_tokens(tokenizer, asked.prompt, choice) for asked in questions for choice in asked.choices]
            print(f"{path}: {task.stem}", file=sys.stderr)
            result["tasks"][task.stem] = answers(questions, score_all(model, pairs, lead))
        result["mean"] = sum(row[MAIN[name]] for name, row in result["tasks"].items()) / max(len(result["tasks"]), 1)
        if text is not None:
            ids = np.array(tokenizer.encode(text.read_text(encoding="utf-8")), np.int64)[:tokens]
            found = perplexity(model, ids, min(512, model.architecture.max_position_embeddings))
            result["text"] = {
                "name": text.name,
                "tokens": found.tokens,
                "perplexity": found.perplexity,
                "error": found.error,
            }
        return result
    finally:
        weights.close()


def lm_eval_figures(folder: str, tasks: Sequence[Path], limit: int) -> dict[str, dict[str, float]]:
    """The same questions through lm-eval's model of a Hugging Face folder and its own evaluator, in float32."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=folder, dtype="float32", device="cpu", batch_size=8)
    configs = [lm_eval_task(path) for path in tasks]
    found = simple_evaluate(
        model=model, tasks=configs, limit=limit or None, task_manager=TaskManager(), bootstrap_iters=0
    )
    return {name: dict(row) for name, row in found["results"].items()}


def lm_eval_task(path: Path) -> dict[str, Any]:
    """A task of lm-eval over a local JSONL file."""
    common = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    if path.stem == "lambada_openai":
        return common | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": " {{continuation}}",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }
    return common | {
        "output_type": "multiple_choice",
        "doc_to_text": PROMPTS[path.stem].replace("{query}", "{{query.rstrip()}}"),
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }


def check(folder: str, tasks: Sequence[Path], limit: int, ours: dict[str, Any]) -> int:
    """Prints our figures beside lm-eval's; returns the number of figures that differ by 0.001 or more."""
    theirs, differ = lm_eval_figures(folder, tasks, limit), 0
    for name, row in ours["tasks"].items():
        for figure in ("acc", "acc_norm"):
            if figure in row:
                other = theirs[name][f"{figure},none"]
                same = abs(row[figure] - other) < 0.001
                differ += not same
                print(f"{name} {figure}: {row[figure]:.4f}, lm-eval {other:.4f}{'' if same else '  DIFFERS'}")
    return differ


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    names = list(next(iter(rows.values()))["tasks"])
    lines = ["| model | " + " | ".join(names) + " | mean | perplexity |", "|---|" + "---|" * (len(names) + 2)]
    for path, row in rows.items():
        cells = [f"{100 * row['tasks'][name][MAIN[name]]:.1f}" for name in names]
        text = f"{row['text']['perplexity']:.2f}" if "text" in row else ""
        lines.append(f"| {Path(path).name} | " + " | ".join(cells) + f" | {100 * row['mean']:.2f} | {text} |")
    return "\n".join(lines)


def content_digest(path: Path) -> str:
    """The SHA-256 of a model's file, or of the digests of a folder's weights."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*.safetensors")) if path.is_dir() else [path]:
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def key_of(path: str, arguments: argparse.Namespace) -> str:
    """What a kept row belongs to: the file's content, the tasks and the settings."""
    settings = [arguments.names, arguments.limit, str(arguments.text and arguments.text.name), arguments.text_tokens]
    return f"{content_digest(Path(path))} {json.dumps(settings)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--tasks", type=Path, required=True, help="folder of the tasks' JSONL files")
    parser.add_argument("--names", nargs="*", default=list(PROMPTS), help="of these tasks only")
    parser.add_argument("--limit", type=int, default=0, help="questions of each task; 0: all")
    parser.add_argument("--text", type=Path, help="a text to measure perplexity on")
    parser.add_argument("--text-tokens", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=Path, default=Path("build/accuracy-rows.json"), help="rows that are kept")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--check-lm-eval", action="store_true", help="compare the first MODEL, a folder, with lm-eval")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tasks = [arguments.tasks / f"{name}.jsonl" for name in arguments.names]
    if absent := [str(task) for task in tasks if not task.exists()]:
        raise SystemExit(f"{', '.join(absent)}: not there; give the folder of the tasks with --tasks")
    kept, rows = Kept(arguments.rows), {}
    for path in arguments.models:
        key = key_of(path, arguments)
        rows[path] = kept.rows.get(key) or kept.add(
            key, measure(path, tasks, arguments.limit, arguments.text, arguments.text_tokens)
        )
    print(table(rows))
    if arguments.out:
        command = f"python benchmarks/accuracy.py {' '.join(sys.argv[1:])}"
        content = {"command": command, "rows": [{"model": Path(path).name} | row for path, row in rows.items()]}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if arguments.check_lm_eval:
        sys.exit(1 if check(arguments.models[0], tasks, arguments.limit, rows[arguments.models[0]]) else 0)


if __name__ == "__main__":
    main()
