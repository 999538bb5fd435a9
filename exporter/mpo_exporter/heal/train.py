"""Optimizer steps: schedule, parameter groups, accumulation and clipping of gradients, recorded steps on a GPU."""

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
from torch import Tensor, nn

from mpo_exporter.heal.ops import autocast
from mpo_exporter.heal.settings import FEWEST_STEPS, Settings
from mpo_exporter.heal.trainable import Trainables
from mpo_exporter.heal.workers import Workers
from mpo_formats import ConfigError

BETAS = (0.9, 0.95)
# Gradients with a larger norm than this are scaled down to it.
LARGEST_GRADIENT = 1.0
# The share of the training during which the rates rise, and the factor that they end at.
WARM_UP = 0.03
LAST_RATE = 0.02
# Gradient noise moves integers and their scales in a random walk, by about rate · √steps. Trainings longer than this have
# time to let that settle, so their rates fall faster: the schedule is raised to a power that grows by one each time the
# length doubles, up to the largest.
SLOWLY_COOLED_STEPS = 250
FASTEST_COOLING = 3.0
# The rates of integers and scales are lowered in proportion in trainings of fewer than FEWEST_STEPS steps. With more steps than
# these they would walk too far: the rates fall so that the sum of all steps' rates stays the same.
FULL_RATE_STEPS = 1000
# A step says less about each integer the more there are: with more than these, rates fall with the root of their number.
FULL_RATE_INTEGERS = 20_000_000
WALKING = ("code", "scale")
# What the rate of cores is multiplied by, tried in this order (see Trainer.tame).
CORE_FACTORS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
# Steps of a trial (see Trainer.trial).
TRIAL_STEPS = 8
# On a GPU, steps are recorded as a graph after this many; recording does not pay off in shorter trainings.
STEPS_BEFORE_GRAPH = 20
# Passes before the recording, on the recording's stream: libraries allocate their workspaces during the first ones.
REHEARSALS = 2


class NotFinite(ConfigError):
    """The loss or a gradient is NaN or infinite."""


@dataclass(frozen=True, slots=True)
class Extent:
    """How long a stage of the training lasts: a number of steps, or a number of seconds."""

    steps: int | None
    seconds: float | None = None

    def done(self, step: int, seconds: float) -> float:
        """The share of the stage (0 to 1) that is done after `step` steps and `seconds` seconds."""
        if self.steps is not None:
            return step / self.steps if self.steps else 1.0
        return min(seconds / self.seconds, 1.0) if self.seconds else 1.0


def learning_rate(done: float, steps: float = SLOWLY_COOLED_STEPS) -> float:
    """The factor of all learning rates, when the share `done` of a training of `steps` steps is done.

    It rises linearly to 1 and then falls along a half cosine (Loshchilov & Hutter 2017), in long trainings along a power
    of it. Short trainings need high rates for most of their time to move integers at all.
    """
    if done < WARM_UP:
        return max(done / WARM_UP, 0.1)
    factor = LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP))) / 2
    power = 1 + math.log2(max(steps / SLOWLY_COOLED_STEPS, 1.0))
    return float(factor ** min(power, FASTEST_COOLING))


def walking_rate(steps: float, integers: int = 0) -> float:
    """The factor by which the rates of integers and scales are lowered in a training of `steps` steps with so many integers."""
    steps = max(steps, 1.0)
    crowded = math.sqrt(FULL_RATE_INTEGERS / max(integers, 1))
    return min(steps / FEWEST_STEPS, 1.0, FULL_RATE_STEPS / steps, crowded)


def chosen_windows(count: int, batch: int, step: int, seed: int) -> NDArray[np.int64]:
    """The indices of a step's windows: each epoch visits all `count` windows once, in a random order of its own."""
    places = np.arange(step * batch, (step + 1) * batch)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(count) for epoch in set((places // count).tolist())
    }
    return np.array([orders[place // count][place % count] for place in places.tolist()], np.int64)


def chosen_chi(settings: Settings, largest: int, step: int) -> int | None:
    """The χ of a step under χ-dropout: None for all bonds, or a random prefix of 1 … `largest`, log-uniform."""
    generator = np.random.default_rng((settings.seed, step, 1))
    if largest < 2 or generator.random() >= settings.chi_dropout:
        return None
    return max(1, round(math.exp(generator.uniform(0, math.log(largest)))))


class GraphedStep:
    """A forward and backward pass recorded as a CUDA graph and replayed.

    A small model's step is thousands of small kernels, which take longer to launch one by one than to run. Each replay
    writes the gradients into the same tensors, so these must never be set to None.

    Args:
        module: (batch, None) -> [loss, figure to show]; its gradients are set to None here, before the recording.
        batch: a tuple of tensors; all later batches must have the same shapes and types.
    """

    def __init__(self, module: nn.Module, batch: Any, device: str) -> None:
        held = [None if tensor is None else tensor.clone() for tensor in batch]
        self.batch = batch._make(held) if hasattr(batch, "_make") else tuple(held)
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        outer = torch.cuda.current_stream(device)
        stream.wait_stream(outer)
        with torch.cuda.stream(stream):
            for _ in range(REHEARSALS):
                self._pass(module, device)
        outer.wait_stream(stream)
        module.zero_grad(set_to_none=True)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.figures = self._pass(module, device)

    def _pass(self, module: nn.Module, device: str) -> Tensor:
        with autocast(device):
            found = module(self.batch, None)
        found[0].backward()
        figures: Tensor = found.detach()
        return figures

    def __call__(self, batch: Any) -> Tensor:
        """Computes the gradients for a batch; returns its figures, in a tensor that the next call overwrites."""
        for held, tensor in zip(self.batch, batch, strict=True):
            if held is not None:
                held.copy_(tensor)
        self.graph.replay()
        return self.figures


class Trainer:
    """AdamW over a student's parameters; the student is a module (batch, χ) -> [loss, figure to show].

    Args:
        fixed: all steps run the same operations, so that on a GPU one recorded step can be replayed for all.
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
        self.core_factor, self.walking_factor = 1.0, 1.0
        self.integers = sum(parameter.numel() for kind, parameter, _ in trainables.learning() if kind == "code")
        self.restart()

    def restart(self) -> None:
        """Starts with a new optimizer, without the state of the old one."""
        rates = {
            "core": self.settings.core_rate * self.core_factor,
            "code": self.settings.code_rate,
            "scale": self.settings.scale_rate,
            "norm": self.settings.norm_rate,
        }
        groups: dict[tuple[str, float], dict[str, Any]] = {}
        for index, (kind, parameter, unit) in enumerate(self.trainables.learning()):
            # Integers and scales with the same unit form one group, which is one kernel on a GPU. The units of cores and
            # norms depend on the parameter, so each has a group of its own.
            key = (kind, unit) if kind in WALKING else (kind, float(index))
            rate = rates[kind] * unit
            groups.setdefault(key, {"params": [], "lr": rate, "rate": rate, "kind": kind})["params"].append(parameter)
        if not groups:
            raise ConfigError("healing: the file has nothing to train: no cores, integers or norms")
        self.optimizer = torch.optim.AdamW(list(groups.values()), betas=BETAS, weight_decay=0.0, fused=True)

    def tame(self, parts: Sequence[Any]) -> float:
        """Lowers the rate of cores until a first step at that rate does not raise the loss; returns the factor.

        The first step of Adam moves every number by its rate, against the sign of its gradient. In models with massive
        activations (arXiv 2402.17762) such a step changes the products with them far more than all others, and a rate that
        is right elsewhere ruins the model in one step.

        Args:
            parts: this process's share of a batch, in micro-batches.
        """
        groups = [group for group in self.optimizer.param_groups if group["kind"] == "core"]
        if not groups:
            return 1.0
        before = float(self.workers.total(self._passes(parts, None))[0])
        steps = [
            (parameter, parameter.detach().clone(), group["rate"] * parameter.grad.sign())
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        self.optimizer.zero_grad()
        for factor in CORE_FACTORS:
            if float(self.workers.total(self._moved(steps, factor, parts))[0]) <= before:
                break
        self.set_core_factor(factor)
        return factor

    def trial(self, batches: Sequence[Sequence[Any]], unseen: Sequence[Sequence[Any]], steps: float) -> float:
        """The KL on unseen batches after a step for each of `batches`; the steps are taken back.

        Args:
            steps: the number of steps that the training will have.
        """
        held = [
            (parameter, parameter.detach().clone())
            for group in self.optimizer.param_groups
            for parameter in group["params"]
        ]
        for number, parts in enumerate(batches):
            self.step(parts, WARM_UP, None, f"step {number + 1} of a trial", steps)
        found = self.kl(unseen)
        with torch.no_grad():
            for parameter, value in held:
                parameter.copy_(value)
        self.restart()
        self.steps -= len(batches)
        return found

    def kl(self, batches: Sequence[Sequence[Any]]) -> float:
        """The mean KL of batches."""
        return sum(float(self.workers.total(self._figures(parts))[1]) for parts in batches) / len(batches)

    @torch.no_grad()
    def _figures(self, parts: Sequence[Any]) -> Tensor:
        """The figures of a batch, without gradients."""
        with autocast(self.workers.device):
            return torch.stack([self.module(part, None) for part in parts]).sum(0)

    @torch.no_grad()
    def _moved(self, steps: Sequence[tuple[Tensor, Tensor, Tensor]], factor: float, parts: Sequence[Any]) -> Tensor:
        """The figures of a batch after steps (parameter, its value, its change) times `factor`, which are taken back."""
        for parameter, value, change in steps:
            parameter.copy_(value - factor * change)
        figures = self._figures(parts)
        for parameter, value, _ in steps:
            parameter.copy_(value)
        return figures

    def set_core_factor(self, factor: float) -> None:
        """Multiplies the rate of cores, from now on and after every restart."""
        for group in self.optimizer.param_groups:
            if group["kind"] == "core":
                group["rate"] *= factor / self.core_factor
        self.core_factor = factor

    def rates(self) -> list[float]:
        """The learning rates of the groups before the schedule; a checkpoint has to keep them."""
        return [float(group["rate"]) for group in self.optimizer.param_groups]

    def set_rates(self, rates: Sequence[float]) -> None:
        """Restores what `rates` returned: the units depend on the parameters' values at the start of the training."""
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["rate"] = rate

    def step(
        self, parts: Sequence[Any], done: float, chi: int | None, where: str, steps: float = FEWEST_STEPS
    ) -> tuple[float, float]:
        """One optimizer step; returns the loss and the figure to show.

        Args:
            parts: this process's share of the batch, in micro-batches.
            done: the share of the training that is done (0 to 1).
            chi: cuts all bonds to their first `chi` values; None: not.
            where: names the step in messages.
            steps: the number of steps that the training will have.

        Raises:
            NotFinite: naming `where`; the parameters are then as they were before the step.
        """
        figures = self._passes(parts, chi)
        loss, shown = self.workers.total(figures).tolist()
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        length = float(nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT))
        if not math.isfinite(loss) or not math.isfinite(length):
            self.optimizer.zero_grad()
            raise NotFinite(f"healing: the loss is not finite at {where}")
        factor = learning_rate(done, steps)
        walking = self.walking_factor * walking_rate(steps, self.integers) if done >= self.settings.cores_first else 0.0
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * factor * (walking if group["kind"] in WALKING else 1.0)
        self.optimizer.step()
        if self.graph is None:
            self.optimizer.zero_grad()
        self.steps += 1
        return loss, shown

    def _passes(self, parts: Sequence[Any], chi: int | None) -> Tensor:
        """Computes the gradients of a batch; returns the figures summed over its parts."""
        if self.graphs and self.steps >= STEPS_BEFORE_GRAPH:
            if self.graph is None:
                self.graph = GraphedStep(self.module, parts[0], self.workers.device)
            return self.graph(parts[0])
        figures = torch.zeros(2, device=self.workers.device)
        for index, part in enumerate(parts):
            last = index == len(parts) - 1
            with nullcontext() if last else self.workers.unsynchronised(self.module), autocast(self.workers.device):
                found = self.module(part, chi)
            with nullcontext() if last else self.workers.unsynchronised(self.module):
                (found[0] * self.workers.count).backward()  # DDP averages over processes, but the loss is a sum
            figures += found.detach()
        return figures


def share_of(rows: NDArray[np.int64], settings: Settings, workers: Workers) -> list[NDArray[np.int64]]:
    """This process's windows of a batch, in parts of at most `micro_batch` windows."""
    mine = rows[workers.rank :: workers.count]
    return [mine[start : start + settings.micro_batch] for start in range(0, len(mine), settings.micro_batch)]


class Clock:
    """Counts the seconds of a healing, including those before it was interrupted."""

    def __init__(self, before: float = 0.0, now: Callable[[], float] = time.monotonic) -> None:
        self.before, self.now = before, now
        self.start = now()

    def seconds(self) -> float:
        """The seconds so far."""
        return self.before + self.now() - self.start
