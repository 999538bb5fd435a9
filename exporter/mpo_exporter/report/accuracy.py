"""The accuracy of a file and of its dense model on questions."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch

from mpo_exporter.progress import Progress, silent
from mpo_exporter.report.facts import Accuracy
from mpo_exporter.source import Source
from mpo_formats import ConfigError, MpoFile
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.evaluation.questions import Task, ask
from mpo_runtime.evaluation.scoring import Scorer
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights


def measured_accuracy(
    source: Source, path: Path, tasks: Sequence[Task], device: str = "cpu", progress: Progress = silent
) -> tuple[Accuracy, ...]:
    """Asks both models all questions, in float32 by the reference backend, so that only the weights differ.

    Args:
        source: the dense model.
        path: the `.mpo` file.
        progress: is given the continuations scored, one stage for each model and task.

    Raises:
        ConfigError: for a model without tokenizer.
        FormatError: for a damaged file.
    """
    tokenizer = source.tokenizer
    if tokenizer is None:
        raise ConfigError(f"{source.folder.name}: has no tokenizer.json to read questions with")

    def figures(weights: Weights, name: str) -> list[tuple[float, float]]:
        scorer = Scorer(decoder_for(weights.spec.architecture, ReferenceOps(weights, device=device)))
        result = []
        for task in tasks:
            with torch.inference_mode():
                found = ask(scorer, tokenizer, task, partial(progress, f"{task.name}, {name}"))
            result.append((found[task.figure], found[f"{task.figure}_stderr"]))
        return result

    dense = figures(source.weights, "dense")
    with closing(MpoFile(path)) as file:
        ours = figures(file, "compressed")
    return tuple(
        Accuracy(task.name, len(task.questions), before, after, error)
        for task, (before, _), (after, error) in zip(tasks, dense, ours, strict=True)
    )
