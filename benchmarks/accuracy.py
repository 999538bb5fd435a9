"""Accuracy on multiple-choice and last-word tasks, as lm-eval counts it, and perplexity on a text.

    python benchmarks/accuracy.py MODEL [MODEL ...] --tasks ../shared/text/tasks --limit 500 --out results.json
    python benchmarks/accuracy.py MODEL --tasks ../shared/text/tasks --limit 40 --check-lm-eval

A MODEL is a `.mpo` file, a Hugging Face folder, a GGUF file or a name in the store. All run through the reference backend in
float32, so that only the weights differ. --tasks is a folder of JSONL files: rows of {query, choices, gold}, or of {context,
continuation} (the last word is to be predicted greedily). Of each task the first --limit rows are asked (all: 0). A choice's
score is the sum of the log-probabilities of its tokens; `acc` takes the best score, `acc_norm` the best score divided by the
choice's number of characters. What was asked is kept in --rows: a run that was stopped goes on when it is repeated. Questions
are scored by the code of `mpo-run eval` (mpo_runtime/evaluation) and counted here, without lm-eval.
--check-lm-eval asks the first MODEL the same through lm-eval twice: as `mpo-run eval` does, and through lm-eval's own model of
transformers, on a Hugging Face folder of the same weights in float32. It ends with status 1 where a figure differs by 0.001
or more, a perplexity by a thousandth of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from parts.hf_folder import write_hf_folder
from parts.results import write_results

from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.cli.evaluate import EvalRequest, evaluate
from mpo_runtime.evaluation.kept import Kept, weights_digest
from mpo_runtime.evaluation.questions import MAIN, ask, read_task
from mpo_runtime.evaluation.scoring import Scorer
from mpo_runtime.evaluation.tasks import PROMPTS, jsonl_task
from mpo_runtime.loading import open_weights, read_text_files
from mpo_runtime.measure import perplexity
from mpo_runtime.models.registry import decoder_for


def main_figure(task: str) -> str:
    """The figure by which a task is judged."""
    return MAIN.get(task, "acc")


def show(done: int, total: int) -> None:
    """Shows how many continuations are scored."""
    if done == total or done % 25 == 0:
        print(f"\r{done}/{total}", end="\n" if done == total else "", file=sys.stderr, flush=True)


def measure(path: str, tasks: Sequence[Path], limit: int, text: Path | None, tokens: int) -> dict[str, Any]:
    """All figures of one model."""
    weights = open_weights(path)
    try:
        tokenizer, _ = read_text_files(weights)
        if tokenizer is None:
            raise SystemExit(f"{path}: has no tokenizer")
        model = decoder_for(weights.spec.architecture, ReferenceOps(weights, held=True))
        scorer = Scorer(model)
        result: dict[str, Any] = {"tasks": {}}
        for task in tasks:
            print(f"{path}: {task.stem}", file=sys.stderr)
            with torch.inference_mode():
                result["tasks"][task.stem] = ask(scorer, tokenizer, read_task(task, limit), show)
        result["mean"] = sum(row[main_figure(name)] for name, row in result["tasks"].items()) / max(len(tasks), 1)
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


def lm_eval_figures(path: str, tasks: Sequence[Path], limit: int, folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The same questions through lm-eval: by our model, and by its own one of a Hugging Face folder, in float32."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    configs = [jsonl_task(task) for task in tasks]
    request = EvalRequest(",".join(map(str, tasks)), limit=limit or None)
    ours = evaluate(Path(path), list(configs), request, {"backend": "auto", "activations": "float"})
    weights = open_weights(path)
    try:
        write_hf_folder(weights, folder)
    finally:
        weights.close()
    model = HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=8)
    theirs = simple_evaluate(
        model=model, tasks=configs, limit=limit or None, task_manager=TaskManager(), bootstrap_iters=0
    )
    return {"mpo-run eval": ours["results"], "transformers": theirs["results"]}


def check(path: str, tasks: Sequence[Path], limit: int, ours: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Prints our figures beside lm-eval's; returns them, and the number that differ by 0.001 or more."""
    with tempfile.TemporaryDirectory() as folder:
        found = lm_eval_figures(path, tasks, limit, Path(folder) / "model")
    rows: list[dict[str, Any]] = []
    for name, row in ours["tasks"].items():
        for figure in ("acc", "acc_norm", "perplexity"):
            by = {who: results[name].get(f"{figure},none") for who, results in found.items()}
            if figure in row:  # lm-eval alone counts the perplexity of last words
                by = {"accuracy.py": row[figure], **by}
            if None in by.values():
                continue
            wanted = by["transformers"]
            same = all(abs(value - wanted) < 0.001 * max(1.0, wanted) for value in by.values())
            rows.append({"task": name, "figure": figure, **by, "agree": same})
            figures = ", ".join(f"{who} {value:.4f}" for who, value in by.items())
            print(f"{name} {figure}: {figures}{'' if same else '  DIFFERS'}")
    return rows, sum(not row["agree"] for row in rows)


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table."""
    names = list(next(iter(rows.values()))["tasks"])
    lines = ["| model | " + " | ".join(names) + " | mean | perplexity |", "|---|" + "---|" * (len(names) + 2)]
    for path, row in rows.items():
        cells = [f"{100 * row['tasks'][name][main_figure(name)]:.1f}" for name in names]
        text = f"{row['text']['perplexity']:.2f}" if "text" in row else ""
        lines.append(f"| {Path(path).name} | " + " | ".join(cells) + f" | {100 * row['mean']:.2f} | {text} |")
    return "\n".join(lines)


def key_of(path: str, arguments: argparse.Namespace) -> str:
    """What a kept row belongs to: the file's content, the tasks and the settings."""
    settings = [arguments.names, arguments.limit, str(arguments.text and arguments.text.name), arguments.text_tokens]
    return f"{weights_digest(Path(path))} {json.dumps(settings)}"


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
    parser.add_argument("--check-lm-eval", action="store_true", help="compare the first MODEL with lm-eval")
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
    compared, differing = (
        check(arguments.models[0], tasks, arguments.limit, rows[arguments.models[0]])
        if arguments.check_lm_eval
        else ([], 0)
    )
    models = [{"model": Path(path).name} | row for path, row in rows.items()]
    write_results(arguments.out, models, limit=arguments.limit, lm_eval=compared)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
