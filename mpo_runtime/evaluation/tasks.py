"""The tasks of `--tasks`: names that lm-eval knows, its YAML files, and local JSONL files, which need no network.

Rows of a JSONL file are {query, choices, gold} (the best answer is asked for), {context, choices, gold} (the best end of a
text), {context, continuation} (the last word is to be predicted greedily) or {question, answer} (an answer is generated; the
last number of both is compared).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpo_formats import ConfigError

# How the query of a known task becomes a prompt, as lm-eval's task of that name has it; the choice follows after a blank.
PROMPTS = {
    "arc_easy": "{query}\nAnswer:",
    "arc_challenge": "{query}\nAnswer:",
    "piqa": "{query}\nAnswer:",
    "boolq": "{query}\nAnswer:",
    "copa": "{query}",
    "lambada_openai": "{context}",
}
OTHER_PROMPT = "{query}\nAnswer:"
KINDS = ("choices", "continuation", "answer")


def read_tasks(text: str) -> list[str | dict[str, Any]]:
    """The tasks of a list separated by commas, in the form that lm-eval takes.

    Raises:
        ConfigError: for a file that is not there or has rows of another form.
    """
    found: list[str | dict[str, Any]] = []
    for part in text.split(","):
        name, path = part.strip(), Path(part.strip())
        if not name:
            raise ConfigError(f"--tasks {text}: expected names or files separated by commas")
        if path.suffix == ".jsonl":
            found.append(jsonl_task(path))
        elif path.suffix in (".yaml", ".yml"):
            if not path.exists():
                raise ConfigError(f"--tasks {path}: there is no such file")
            found.append(str(path))
        else:
            found.append(name)
    return found


def first_row(path: Path) -> Mapping[str, Any]:
    """The first row of a JSONL file; raises ConfigError where there is none."""
    try:
        with path.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
    except OSError as error:
        raise ConfigError(f"--tasks {path}: cannot be read ({error.strerror}); give a JSONL file") from None
    except ValueError:
        raise ConfigError(f"--tasks {path}: line 1 is not JSON; expected one object a line") from None
    if not isinstance(row, dict) or not any(kind in row for kind in KINDS):
        raise ConfigError(
            f"--tasks {path}: expected rows of query, choices, gold, or context, continuation, or question, answer; "
            f"found {', '.join(row) if isinstance(row, dict) else type(row).__name__}"
        )
    return row


def jsonl_task(path: Path) -> dict[str, Any]:
    """A task of lm-eval over a local JSONL file."""
    row = first_row(path)
    common = {
        "task": path.stem,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}},
        "test_split": "test",
        "num_fewshot": 0,
        "metadata": {"version": 1},
    }
    if "choices" in row:
        prompt = "{context}" if "query" not in row else PROMPTS.get(path.stem, OTHER_PROMPT)
        asked = prompt.replace("{query}", "{{query.rstrip()}}").replace("{context}", "{{context.rstrip()}}")
        return common | {
            "output_type": "multiple_choice",
            "doc_to_text": asked,
            "doc_to_choice": "choices",
            "doc_to_target": "gold",
            "metric_list": [metric("acc"), metric("acc_norm")],
        }
    if "continuation" in row:
        return common | {
            "output_type": "loglikelihood",
            "doc_to_text": "{{context}}",
            "doc_to_target": " {{continuation}}",
            "metric_list": [
                metric("acc"),
                {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            ],
        }
    return common | {
        "output_type": "generate_until",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{answer.split('####')[-1].strip() | replace(',', '')}}",
        "generation_kwargs": {"until": ["Question:"], "do_sample": False, "max_gen_toks": 256},
        "filter_list": [
            {
                "name": "last-number",
                "filter": [
                    {"function": "regex", "regex_pattern": r"(-?[0-9][0-9,]*(?:\.[0-9]+)?)", "group_select": -1},
                    {"function": "take_first"},
                ],
            }
        ],
        "metric_list": [metric("exact_match") | {"regexes_to_ignore": [",", r"\$"]}],
    }


def metric(name: str) -> dict[str, Any]:
    """A metric that is the mean over the questions."""
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}
