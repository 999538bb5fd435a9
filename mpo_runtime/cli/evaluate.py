"""eval: the questions of standard tasks, through lm-eval's evaluator."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpo_formats import ConfigError
from mpo_runtime.cli import console
from mpo_runtime.evaluation.harness import NAME, Evaluated, Progress, harness_class, require
from mpo_runtime.evaluation.tasks import read_tasks
from mpo_runtime.filesystem import replace_file

# lm-eval's description of the machine, a page of text with the paths of packages.
LEFT_OUT = ("pretty_env_info",)
BOOTSTRAPS = 1000


@dataclass(frozen=True, slots=True)
class EvalRequest:
    """What to ask, and where the answers go.

    limit: questions of each task; below 1 a share of them; None for all.
    chat: whether prompts go through the model's chat template.
    out, resume: files for the results, and for answers that are kept while they come.
    samples: puts every question and answer into the results.
    """

    tasks: str
    limit: float | None = None
    fewshot: int | None = None
    chat: bool = False
    system: str | None = None
    out: Path | None = None
    resume: Path | None = None
    samples: bool = False

    def __post_init__(self) -> None:
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit == int(self.limit))):
            raise ConfigError(f"--limit: expected a whole number, or a share between 0 and 1, found {self.limit:g}")
        if self.fewshot is not None and self.fewshot < 0:
            raise ConfigError(f"--num-fewshot: expected 0 or more, found {self.fewshot}")
        if self.system is not None and not self.chat:
            raise ConfigError("--system: is a message of the chat template; add --chat")
        if self.out is not None and not self.out.absolute().parent.is_dir():
            raise ConfigError(f"--out {self.out}: its folder does not exist")


def run_eval(file: Path, request: EvalRequest, options: Mapping[str, Any], as_json: bool) -> None:
    """Asks a model and prints the table of results, or all of it as JSON."""
    require("lm_eval")
    tasks = read_tasks(request.tasks)
    with console.progress("eval") as update:
        results = evaluate(file, tasks, request, options, update)
    text = results_text(results)
    if request.out is not None:
        replace_file(request.out, text.encode())
    if as_json:
        print(text)
        return
    print(require("lm_eval.utils").make_table(results).rstrip())
    if results.get("groups"):
        print(require("lm_eval.utils").make_table(results, "groups").rstrip())


def evaluate(
    file: Path,
    tasks: list[str | dict[str, Any]],
    request: EvalRequest,
    options: Mapping[str, Any],
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The results in lm-eval's form.

    Raises:
        ConfigError: for a task that lm-eval does not know, or a model without tokenizer or, with `chat`, without template.
    """
    if all(isinstance(task, dict) for task in tasks):  # local files; `datasets` would ask the hub about them
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # lm-eval would fork a process with the kernels' threads for one chunk of samples; the draws are the same without.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    evaluator, manager = require("lm_eval.evaluator"), require("lm_eval.tasks").TaskManager()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    unknown = [task for task in tasks if isinstance(task, str) and not known_task(manager, task)]
    if unknown:
        raise ConfigError(
            f"--tasks {', '.join(unknown)}: lm-eval has no such task; give the name of one, or a .jsonl or .yaml file"
        )
    evaluated = Evaluated(file, request.resume, options, progress)
    if request.chat and evaluated.model.template is None:
        raise ConfigError(f"{file}: has no chat template; leave out --chat")
    limit = request.limit if request.limit is None or request.limit < 1 else int(request.limit)
    with contextlib.closing(evaluated.model), contextlib.redirect_stdout(sys.stderr):
        results = evaluator.simple_evaluate(
            model=harness_class()(evaluated),
            tasks=tasks,
            num_fewshot=request.fewshot,
            limit=limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=request.samples,
            system_instruction=request.system,
            apply_chat_template=request.chat,
            task_manager=manager,
        )
    results["config"] |= {"model": NAME, "model_args": {"pretrained": Path(file).name, **options}}
    return {name: value for name, value in results.items() if name not in LEFT_OUT}


def known_task(manager: Any, task: str) -> bool:
    """Whether lm-eval has a task, group or tag of that name, or it is a YAML file."""
    return task.endswith((".yaml", ".yml")) or bool(manager.match_tasks([task]))


def results_text(results: Mapping[str, Any]) -> str:
    """The results as JSON, values that JSON lacks as lm-eval writes them."""
    return json.dumps(results, indent=2, default=require("lm_eval.utils").handle_non_serializable, ensure_ascii=False)
