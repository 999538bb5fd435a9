"""Trains granite-nano on the corpus; the schedule, the seed, the data order and every hyper-parameter are here.

    python benchmarks/nano/tokens.py --corpus ../shared/corpus --out work/nano
    python benchmarks/nano/train.py --data work/nano

The preset `nano` first trains the small model `seed` (a quarter of the size, four times the tokens in the same time),
grows it (growth.py) and goes on from there.

Resumes from the last checkpoint in the folder. A window's place in the order depends on the seed and the step alone, and
the learning rate is constant until the decay, so a run that was stopped, or whose --steps was raised before its
decay began, ends where an uninterrupted run ends.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import DOMAINS
from growth import grow
from muon import Muon
from network import Nano, NanoConfig
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters: warm-up, constant, then linear decay to zero.

    `muon` trains the matrices of the blocks by Muon, the rest by AdamW; without it AdamW trains everything.
    """

    steps: int = 1000
    decay_steps: int = 600
    warmup_steps: int = 20
    batch: int = 4
    window: int = 1024
    learning_rate: float = 1e-3
    muon: bool = True
    momentum: float = 0.95
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.1
    clip: float = 1.0
    seed: int = 20261122
    shares: tuple[float, ...] = (0.40, 0.38, 0.22)  # stories, web, chat
    decay_shares: tuple[float, ...] = (0.34, 0.32, 0.34)

    def rate(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        left = (self.steps - step) / self.decay_steps
        return self.learning_rate * min(1.0, left)


PRESETS = {
    "nano": (NanoConfig(), Recipe()),
    "seed": (
        NanoConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
            logits_scaling=4.0,
        ),
        Recipe(steps=1500, decay_steps=500, warmup_steps=60, batch=8, window=512, learning_rate=4e-3, muon=False),
    ),
}


class Windows:
    """Draws training windows: each domain's windows in a fresh seeded order every epoch, domains mixed by share."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        self.tokens = [np.fromfile(folder / f"{domain}.train.u16", dtype=np.uint16) for domain in DOMAINS]
        self.drawn = [0] * len(DOMAINS)
        self.random = np.random.default_rng(recipe.seed)

    def batch(self, step: int) -> Tensor:
        """The ids [batch, window + 1] of one step; must be called for every step in order."""
        recipe = self.recipe
        decaying = step >= recipe.steps - recipe.decay_steps
        rows = []
        for domain in self.random.choice(
            len(DOMAINS), recipe.batch, p=recipe.decay_shares if decaying else recipe.shares
        ):
            rows.append(self.window(int(domain)))
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def window(self, domain: int) -> np.ndarray:
        tokens, length = self.tokens[domain], self.recipe.window
        count = (tokens.size - 1) // length - 1  # one less: every epoch starts at another offset
        epoch, index = divmod(self.drawn[domain], count)
        self.drawn[domain] += 1
        order = np.random.default_rng((self.recipe.seed, domain, epoch))
        offset = int(order.integers(length))
        start = offset + int(order.permutation(count)[index]) * length
        return tokens[start : start + length + 1]


def optimizers_for(model: Nano, recipe: Recipe) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    table = model.embed_tokens.weight
    plain = [{"params": vectors, "weight_decay": 0.0}, {"params": [table], "weight_decay": recipe.weight_decay}]
    if not recipe.muon:
        plain.append({"params": matrices, "weight_decay": recipe.weight_decay})
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(plain, lr=recipe.learning_rate, betas=recipe.betas, fused=True)
    ]
    if recipe.muon:
        optimizers.append(Muon(matrices, recipe.learning_rate, recipe.momentum, recipe.weight_decay))
    return optimizers


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
        result[domain] = total / math.log(2) / (windows * window)
    return result


def save(path: Path, content: object) -> None:
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def has_bf16_units(device: str) -> bool:
    """Whether bf16 products are faster than fp32 ones; emulated bf16 is up to a hundred times slower on a CPU."""
    return device == "cuda" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def start(folder: Path, preset: str, device: str, compile_model: bool) -> Nano:
    """The model before its first step: random, or grown from the preset `seed`, which is trained first if need be."""
    config, recipe = PRESETS[preset]
    torch.manual_seed(recipe.seed)
    if preset == "seed":
        return Nano(config)
    small, small_recipe = PRESETS["seed"]
    saved = finished(folder / "seed.pt", small_recipe.steps)
    if saved is None:
        train(folder, "seed", small_recipe, device, compile_model)
        saved = torch.load(folder / "seed.pt", map_location="cpu", weights_only=True)
    return grow(saved["model"], small, config, recipe.seed)


def finished(path: Path, steps: int) -> dict[str, Any] | None:
    """A checkpoint that has all its steps."""
    saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None
    return saved if saved and saved["step"] == steps else None


def train(folder: Path, preset: str, recipe: Recipe, device: str, compile_model: bool) -> None:
    checkpoint = folder / f"{preset}.pt"
    saved = torch.load(checkpoint, map_location=device, weights_only=True) if checkpoint.exists() else None
    model = (Nano(PRESETS[preset][0]) if saved else start(folder, preset, device, compile_model)).to(device)
    bf16 = has_bf16_units(device)
    optimizers = optimizers_for(model, recipe)
    windows, first, elapsed = Windows(folder, recipe), 0, 0.0
    if saved:
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first, elapsed = saved["step"], saved["seconds"]
        for step in range(first):
            windows.batch(step)
    loss_of = torch.compile(model.loss, dynamic=False) if compile_model else model.loss
    log = (folder / f"{preset}.jsonl").open("a", encoding="utf-8")
    clock, running = time.monotonic() - elapsed, []
    for step in range(first, recipe.steps):
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
        if (step + 1) % 20 == 0 or step + 1 == recipe.steps:
            row: dict[str, Any] = {
                "step": step + 1,
                "tokens": (step + 1) * recipe.batch * recipe.window,
                "loss": round(float(torch.stack(running).mean()), 4),
                "rate": round(recipe.rate(step), 6),
                "seconds": round(time.monotonic() - clock, 1),
            }
            running = []
            if (step + 1) % 100 == 0 or step + 1 == recipe.steps:
                row["valid_bits_per_token"] = bits_per_token(model, folder, "valid", 24, recipe.window)
                content = {"model": model.state_dict(), "optimizers": [part.state_dict() for part in optimizers]}
                save(checkpoint, {**content, "step": step + 1, "seconds": time.monotonic() - clock})
            print(json.dumps(row), file=log, flush=True)
            print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder that tokens.py wrote")
    parser.add_argument("--preset", choices=PRESETS, default="nano")
    parser.add_argument("--steps", type=int, help="overrides the preset's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads, if not all")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    recipe = PRESETS[arguments.preset][1]
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    train(arguments.data, arguments.preset, recipe, arguments.device, not arguments.no_compile)


if __name__ == "__main__":
    main()
