"""Trains granite-nano on the corpus; the schedule, the seed, the data order and every hyper-parameter are here.

    python benchmarks/nano/tokens.py --corpus ../shared/corpus --out work/nano
    python benchmarks/nano/train.py --data work/nano

Resumes from the last checkpoint in the folder. A window's place in the order depends on the seed and the step alone, so
a run that was stopped ends where an uninterrupted run ends.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import DOMAINS
from muon import Muon
from network import Nano, NanoConfig
from torch import Tensor


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of the learning rate: warm-up, constant, then linear decay to zero over the last `decay` of it.

    Windows are short first, when a step is cheap and there is little to gain from far back: `windows` gives
    (share of the steps, tokens of a window). `shares` of the domains (stories, web, chat) hold before the decay begins,
    `decay_shares` after.
    """

    steps: int
    learning_rate: float
    decay: float
    windows: tuple[tuple[float, int], ...]
    shares: tuple[float, ...]
    decay_shares: tuple[float, ...]
    warmup_steps: int = 40

    @property
    def decay_start(self) -> int:
        return round(self.steps * (1 - self.decay))

    def rate(self, step: int) -> float:
        left = (self.steps - step) / (self.steps - self.decay_start)
        return self.learning_rate * min(1.0, left, (step + 1) / self.warmup_steps)

    def window(self, step: int) -> int:
        return next(length for share, length in self.windows if step < share * self.steps)

    def mixture(self, step: int) -> tuple[float, ...]:
        return self.decay_shares if step >= self.decay_start else self.shares


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters. Muon trains the matrices of the blocks, AdamW the rest; a step has `tokens` tokens in all.

    Two cycles, because the first (one session of the machine) ended before the corpus did: the second goes on from it
    with text that the first had not seen, at a lower rate.
    """

    cycles: tuple[Cycle, ...] = (
        Cycle(1050, 4e-3, 0.6, ((0.60, 256), (0.94, 512), (1.0, 1024)), (0.40, 0.38, 0.22), (0.36, 0.34, 0.30)),
        Cycle(1400, 2.8e-3, 1.0, ((0.80, 512), (1.0, 1024)), (0.40, 0.37, 0.23), (0.40, 0.37, 0.23)),
    )
    tokens: int = 8192
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 20261125

    @property
    def steps(self) -> int:
        return sum(cycle.steps for cycle in self.cycles)

    @property
    def longest_window(self) -> int:
        return max(length for cycle in self.cycles for _, length in cycle.windows)

    def place(self, step: int) -> tuple[Cycle, int]:
        """The cycle that `step` falls into, and its number within it."""
        for cycle in self.cycles:
            if step < cycle.steps:
                return cycle, step
            step -= cycle.steps
        raise ValueError("a step after the last cycle")

    def rate(self, step: int) -> float:
        cycle, step = self.place(step)
        return cycle.rate(step)


class Windows:
    """Draws training windows: each domain's tokens in a seeded order of pieces every epoch, domains mixed by share.

    A piece is as long as the longest window; the windows of a step are cut from pieces one after another.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokens = [np.fromfile(folder / f"{domain}.train.u16", dtype=np.uint16) for domain in DOMAINS]
        self.used = [0] * len(DOMAINS)  # tokens drawn so far
        self.random = np.random.default_rng(recipe.seed)

    def batch(self, step: int) -> Tensor:
        """The ids [batch, window + 1] of one step; must be called for every step in order."""
        recipe = self.recipe
        cycle, place = recipe.place(step)
        length = cycle.window(place)
        domains = self.random.choice(len(DOMAINS), recipe.tokens // length, p=cycle.mixture(place))
        return torch.from_numpy(np.stack([self.draw(int(domain), length) for domain in domains]).astype(np.int64))

    def draw(self, domain: int, length: int) -> np.ndarray:
        tokens, piece = self.tokens[domain], self.recipe.longest_window
        used = -(-self.used[domain] // length) * length  # windows of every length lie within one piece
        self.used[domain] = used + length
        count = (tokens.size - 1) // piece - 1  # one less: every epoch starts at another offset
        epoch, place = divmod(used, count * piece)
        order = np.random.default_rng((self.recipe.seed, domain, epoch))
        offset = int(order.integers(piece))
        start = offset + int(order.permutation(count)[place // piece]) * piece + place % piece
        return tokens[start : start + length + 1]


def optimizers_for(model: Nano, recipe: Recipe, kind: torch.dtype) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    plain = [
        {"params": vectors, "weight_decay": 0.0},
        {"params": [model.embed_tokens.weight], "weight_decay": recipe.weight_decay},
    ]
    return [
        torch.optim.AdamW(plain, lr=recipe.rate(0), betas=recipe.betas, fused=True),
        Muon(matrices, recipe.rate(0), recipe.momentum, recipe.weight_decay, kind),
    ]


@torch.no_grad()
def bits_per_token(model: Nano, folder: Path, split: str, windows: int, window: int) -> dict[str, float]:
    """A quick look during training: mean bits per token over the first windows of each domain's split."""
    result = {}
    device = model.embed_tokens.weight.device
    for domain in DOMAINS:
        tokens = np.fromfile(folder / f"{domain}.{split}.u16", dtype=np.uint16)[: windows * window + 1]
        total = 0.0
        for start in range(0, tokens.size - window, window):
            ids = torch.from_numpy(tokens[start : start + window + 1].astype(np.int64))[None].to(device)
            total += float(model.loss(ids, "sum"))
        result[domain] = round(total / math.log(2) / (windows * window), 4)
    return result


def save(path: Path, content: object) -> None:
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def has_bf16_units(device: str) -> bool:
    """Whether bf16 products are faster than fp32 ones; emulated bf16 is up to a hundred times slower on a CPU."""
    return device == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def train(folder: Path, recipe: Recipe, last: int, device: str, compile_model: bool) -> None:
    checkpoint = folder / "nano.pt"
    saved = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint.exists() else None
    torch.manual_seed(recipe.seed)
    model = Nano(NanoConfig()).to(device)
    bf16 = has_bf16_units(device)
    optimizers = optimizers_for(model, recipe, torch.bfloat16 if bf16 else torch.float32)
    windows, first, elapsed = Windows(folder, recipe), 0, 0.0
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, elapsed = saved["step"], saved["seconds"]
        for step in range(first):
            windows.batch(step)
    loss_of = torch.compile(model.loss, dynamic=False) if compile_model else model.loss
    log = (folder / "nano.jsonl").open("a", encoding="utf-8")
    clock, running = time.monotonic() - elapsed, []
    for step in range(first, last):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = recipe.rate(step)
        ids = windows.batch(step).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        running.append(loss.detach())
        done = step + 1
        if done % 20 == 0 or done == last:
            row: dict[str, Any] = {
                "step": done,
                "tokens": done * recipe.tokens,
                "loss": round(float(torch.stack(running).mean()), 4),
                "rate": round(recipe.rate(step), 6),
                "seconds": round(time.monotonic() - clock, 1),
            }
            running = []
            if done % 250 == 0 or done == last:
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    row["valid_bits_per_token"] = bits_per_token(model, folder, "valid", 24, 512)
            if done % 100 == 0 or done == last:
                content = {"model": model.state_dict(), "optimizers": [part.state_dict() for part in optimizers]}
                save(checkpoint, {**content, "step": done, "seconds": time.monotonic() - clock})
            print(json.dumps(row), file=log, flush=True)
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that tokens.py wrote")
    parser.add_argument("--steps", type=int, help="stop after so many, the schedule unchanged")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads, if not all")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = Recipe()
    last = min(arguments.steps or recipe.steps, recipe.steps)
    train(arguments.data, recipe, last, arguments.device, not arguments.no_compile)


if __name__ == "__main__":
    main()
