"""Steps of training: parameter groups, schedule, accumulation, clipping, and what stops it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from mpo_exporter.heal.distributed import Workers
from mpo_exporter.heal.graph import GraphedStep
from mpo_exporter.heal.ops import compute
from mpo_exporter.heal.settings import Settings
from mpo_exporter.heal.trainable import Trainables
from mpo_formats import ConfigError

BETAS = (0.9, 0.95)
# Gradients longer than this are cut; the share of the training over which the rates rise; what they end at.
LONGEST_GRADIENT = 1.0
WARM_UP = 0.03
LAST_RATE = 0.02
# Integers and their scales walk at random by the noise of gradients, as far as rate · √steps: longer trainings than this
# let them, and cool faster, with one more power of the schedule for each time that they are twice as long, up to the last.
SLOWLY_COOLED_STEPS = 250
FASTEST_COOLING = 3.0
# Fewer steps than these average too little of the noise away: the rates of both are their share of these then. More than
# these let them walk too far: the rates fall so that the sum of all steps' rates stays what it is here.
FEWEST_STEPS = 100
FULL_RATE_STEPS = 1000
WALKING = ("code", "scale")
# On a GPU steps are recorded as a graph after so many, which shorter trainings do not gain from.
STEPS_BEFORE_GRAPH = 20


class NotFinite(ConfigError):
    """The loss or a gradient is NaN or infinite."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a stage lasts: a number of steps, or seconds."""

    steps: int | None
    seconds: float | None = None

    def done(self, step: int, seconds: float) -> float:
        """The share of the stage that lies behind, given the steps and seconds behind."""
        if self.steps is not None:
            return step / self.steps if self.steps else 1.0
        return min(seconds / self.seconds, 1.0) if self.seconds else 1.0


def learning_rate(done: float, steps: float = SLOWLY_COOLED_STEPS) -> float:
    """The factor of all learning rates in a training of so many steps.

    It rises to 1, then falls along a half cosine (Loshchilov & Hutter 2017) or, in long trainings, a power of one: few
    steps must use all of their time to move integers, many have time for what moved by chance to settle.
    """
    if done < WARM_UP:
        return max(done / WARM_UP, 0.1)
    factor = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
    power = 1 + math.log2(max(steps / SLOWLY_COOLED_STEPS, 1.0))
    return float(factor ** min(power, FASTEST_COOLING))


def walking_rate(steps: float) -> float:
    """The factor of the rates of integers and scales in a training of so many steps."""
    steps = max(steps, 1.0)
    return min(steps / FEWEST_STEPS, 1.0, FULL_RATE_STEPS / steps)


def chosen_windows(count: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """The windows of a step: the text's windows in a random order, another one each time all were seen."""
    places = np.arange(step * batch, (step + 1) * batch)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in set((places // count).tolist())
    }
    return np.array([orders[place // count][place % count] for place in places.tolist()], np.int64)


def chosen_chi(settings: Settings, largest: int, step: int) -> int | None:
    """The χ of a step under χ-dropout: all bonds, or a random prefix of 1 … χ, small ones as often as large ones."""
    generator = np.random.default_rng((settings.seed, step, 1))
    if largest < 2 or generator.random() >= settings.chi_dropout:
        return None
    return max(1, round(math.exp(generator.uniform(0, math.log(largest)))))


class Trainer:
    """AdamW over a student's parameters, the student being a module (batch, χ) -> [loss, figure to show].

    Args:
        fixed: whether all steps are alike but for their batches' contents, so that a GPU may replay one.
    """

    def __init__(
        self, student: nn.Module, trainables: Trainables, settings: Settings, workers: Workers, *, fixed: bool = True
    ) -> None:
        self.settings, self.workers = settings, workers
        self.trainables = trainables
        self.module = workers.wrap(student)
        alike = fixed and settings.chi_dropout == 0 and settings.batch <= settings.micro_batch
        self.graphs = alike and workers.count == 1 and workers.device.startswith("cuda")
        self.graph: GraphedStep | None = None
        self.steps = 0
        self.restart()

    def restart(self) -> None:
        """Forgets the optimizer's state."""
        rates = {
            "core": self.settings.core_rate,
            "code": self.settings.code_rate,
            "scale": self.settings.scale_rate,
            "norm": self.settings.norm_rate,
        }
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for index, (kind, parameter, unit) in enumerate(self.trainables.learning()):
            # Integers and scales of one unit are one group, one kernel on a GPU; other units follow what is trained.
            key = (kind, unit) if kind in WALKING else (kind, float(index))
            rate = rates[kind] * unit
            groups.setdefault(key, {"params": [], "lr": rate, "rate": rate, "kind": kind})["params"].append(parameter)
        if not groups:
            raise ConfigError("healing: the file has nothing to train: no cores, integers or norms")
        self.optimizer = torch.optim.AdamW(list(groups.values()), betas=BETAS, weight_decay=0.0, fused=True)

    def rates(self) -> list[float]:
        """The learning rates of the groups before the schedule, which a checkpoint must put back."""
        return [float(group["rate"]) for group in self.optimizer.param_groups]

    def set_rates(self, rates: Sequence[float]) -> None:
        """Puts back what `rates` gave: units were taken from the parameters as they were at the start."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["rate"] = rate

    def step(
        self, parts: Sequence[Any], done: float, chi: int | None, where: str, steps: float = FEWEST_STEPS
    ) -> tuple[float, float]:
        """One optimizer step over the parts of this process's share of a batch; the loss and the figure to show.

        Args:
            done: the share of the training that lies behind.
            steps: how many steps it will have.

        Raises:
            NotFinite: naming `where`; the parameters are as before the step then.
        """
        figures = self._passes(parts, chi)
        loss, shown = self.workers.total(figures).tolist()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        length = float(nn.utils.clip_grad_norm_(parameters, LONGEST_GRADIENT))
        if not math.isfinite(loss) or not math.isfinite(length):
            self.optimizer.zero_grad()
            raise NotFinite(f"healing: the loss is not finite at {where}")
        factor, walking = learning_rate(done, steps), walking_rate(steps)
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor * (walking if group["kind"] in WALKING else 1.0)
        self.optimizer.step()
        if self.graph is None:
            self.optimizer.zero_grad()
        self.steps += 1
        return loss, shown

    def _passes(self, parts: Sequence[Any], chi: int | None) -> torch.Tensor:
        """Sets the gradients of a batch; returns the sums over its parts."""
        if self.graphs and self.steps >= STEPS_BEFORE_GRAPH:
            if self.graph is None:
                self.graph = GraphedStep(self.module, parts[0], self.workers.device)
            return self.graph(parts[0])
        figures = torch.zeros(2, device=self.workers.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.workers.quiet(self.module), compute(self.workers.device):
                found = self.module(part, chi)
            with nullcontext() if last else self.workers.quiet(self.module):
                (found[0] * self.workers.count).backward()  # DDP takes the mean over processes, the loss is a sum
            figures += found.detach()
        return figures


def share_of(rows: NDArray[np.int64], settings: Settings, workers: Workers) -> list[NDArray[np.int64]]:
    """This process's windows of a batch, in parts of the micro batch."""
    mine = rows[workers.rank :: workers.count]
    return [mine[start : start + settings.micro_batch] for start in range(0, len(mine), settings.micro_batch)]


class Clock:
    """Seconds spent, those before a restart included."""

    def __init__(self, before: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self.before, self.now = before, now
        self.start = now()

    def seconds(self) -> float:
        """So many in all."""
        return self.before + self.now() - self.start
