"""Listens to an export: when its stages ran, and what each layer's fit took and left."""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.export import Fitted
from mpo_exporter.fit.common import activation_error
from mpo_exporter.progress import Progress, silent
from mpo_exporter.report.facts import Compression, Stage, Step

Matrix = NDArray[np.float64]


class Recorder:
    """Its `progress` and `fitted` go into an export's Listener; `compression` is what they recorded. Progress is passed on."""

    def __init__(self, update: Progress = silent) -> None:
        self.update = update
        self.start = self.last = time.perf_counter()
        self.stages: dict[str, tuple[float, float, int]] = {}
        self.steps: list[Step] = []

    def progress(self, stage: str, done: int, total: int) -> None:
        """Notes a step of a stage, which began when the step before it ended, of whatever stage that was."""
        now = time.perf_counter()
        begun = self.stages[stage][0] if stage in self.stages else self.last - self.start
        self.stages[stage] = (begun, now - self.start, done)
        self.last = now
        self.update(stage, done, total)

    def fitted(self, fit: Fitted) -> None:
        """Notes one layer's fit."""
        end = time.perf_counter() - self.start
        second = None if fit.moment is None else fit.moment.second
        self.steps.append(Step(fit.layer, end, fit.seconds, relative_error(fit.dense, fit.stored, second)))

    def compression(self) -> Compression:
        """What was heard so far."""
        stages = tuple(Stage(name, *times) for name, times in self.stages.items())
        return Compression(self.last - self.start, stages, tuple(self.steps))


def relative_error(matrix: Matrix, fitted: Matrix, second: Matrix | None) -> float:
    """‖W − Ŵ‖ / ‖W‖ in the norm of a moment, the Frobenius norm without one; 0 of a matrix that is zero there."""
    whole = activation_error(matrix, second)
    return activation_error(matrix - fitted, second) / whole if whole else 0.0
