"""Questions of local JSONL files, and the accuracy of a model on them: the best of several choices, or a last word."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpo_formats import ConfigError
from mpo_runtime.evaluation.scoring import Pair, Score, Scorer
from mpo_runtime.evaluation.tasks import OTHER_PROMPT, PROMPTS
from mpo_runtime.text.tokenizer import Tokenizer

# The figure by which a known task is judged, as is usual for it; `acc` for others.
MAIN = {"arc_easy": "acc_norm", "arc_challenge": "acc_norm", "piqa": "acc_norm"}


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and what may follow it; `gold` is the index of the right choice, None where there is just one."""

    prompt: str
    choices: tuple[str, ...]
    gold: int | None


@dataclass(frozen=True, slots=True)
class Task:
    """A task's name, which is its file's without `.jsonl`, and its questions."""

    name: str
    questions: tuple[Question, ...]

    @property
    def figure(self) -> str:
        """The figure by which the task is judged: `acc` or `acc_norm`."""
        return MAIN.get(self.name, "acc")


def read_task(path: Path, limit: int = 0) -> Task:
    """The first `limit` questions of a file, all of them where it is 0.

    Raises:
        ConfigError: naming the file and the line, for a file that cannot be read or a row of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give a JSONL file of questions") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text; give a JSONL file of questions") from None
    questions: list[Question] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and (not limit or len(questions) < limit):
            try:
                questions.append(question(path.stem, json.loads(line)))
            except (KeyError, TypeError, ValueError, AttributeError):
                raise ConfigError(
                    f"{path}: line {number}: expected query (or context), choices and gold, the number of the right "
                    f"choice from 0; or context and continuation; found {line[:80]}"
                ) from None
    if not questions:
        raise ConfigError(f"{path}: has no questions; give a JSONL file with one question a line")
    return Task(path.stem, tuple(questions))


def question(task: str, row: Mapping[str, Any]) -> Question:
    """One row of a task as a question; raises KeyError, TypeError or ValueError for a row of another form."""
    if "continuation" in row:
        prompt = PROMPTS.get(task, "{context}").replace("{context}", row["context"])
        return Question(prompt, (f" {row['continuation']}",), None)
    if "query" in row:
        prompt = PROMPTS.get(task, OTHER_PROMPT).replace("{query}", row["query"].rstrip())
    else:
        prompt = row["context"].rstrip()
    choices, gold = row["choices"], row["gold"]
    if not isinstance(choices, list) or not all(isinstance(one, str) and one for one in choices):
        raise TypeError
    if not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise ValueError
    return Question(prompt, tuple(f" {choice}" for choice in choices), gold)


def split_tokens(tokenizer: Tokenizer, prompt: str, choice: str) -> Pair:
    """The token ids of a prompt and of what follows; blanks at the prompt's end belong to what follows, as in lm-eval."""
    blanks = len(prompt) - len(prompt.rstrip())
    if blanks:
        prompt, choice = prompt[:-blanks], prompt[-blanks:] + choice
    whole, start = tokenizer.encode(prompt + choice), tokenizer.encode(prompt)
    return whole[: len(start)], whole[len(start) :]


def ask(
    scorer: Scorer, tokenizer: Tokenizer, task: Task, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """A model's figures on a task (`answers`); a text begins with the begin-of-text token where the tokenizer adds one.

    Args:
        progress: is given the number of continuations scored, and their total.
    """
    lead = tokenizer.encode("", add_special_tokens=True)[:1]
    pairs = [split_tokens(tokenizer, asked.prompt, choice) for asked in task.questions for choice in asked.choices]
    found: dict[int, Score] = {}
    for index, score in scorer.scores([(lead + prompt, following) for prompt, following in pairs]):
        found[index] = score
        progress(len(found), len(pairs))
    return answers(task.questions, [found[index] for index in range(len(pairs))])


def answers(questions: Sequence[Question], scores: Sequence[Score]) -> dict[str, Any]:
    """Accuracies with their standard errors, and each question's outcome under `right`.

    A choice's score is the sum of the log-probabilities of its tokens; `acc` takes the best score, `acc_norm` the best score
    divided by the choice's number of characters. A last word is right when greedy decoding gives it.
    """
    taken = iter(scores)
    right: dict[str, list[bool]] = {"acc": []}
    nats, words = 0.0, 0
    for asked in questions:
        row = [next(taken) for _ in asked.choices]
        if asked.gold is None:
            right["acc"].append(row[0].greedy)
            nats, words = nats + row[0].nats, words + 1
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
    if words:
        result["perplexity"] = math.exp(min(-nats / words, 700.0))
    result["right"] = {name: "".join("01"[one] for one in outcomes) for name, outcomes in right.items()}
    return result
