"""Trains granite-nano on the corpus; the schedule, the seed, the data order and every hyper-parameter are here.

    python benchmarks/nano/tokens.py --corpus ../shared/corpus --out work/nano
    python benchmarks/nano/train.py --data work/nano

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

import numpy as np
import torch
from corpus import DOMAINS
from network import Nano, NanoConfig
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters: AdamW, warm-up, constant, then linear decay to zero."""

    steps: int = 2600
    decay_steps: int = 900
    warmup_steps: int = 100
    batch: int = 10
    window: int = 1024
    learning_rate: float = 3e-3
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
    # Ships until granite-nano is trained on a machine with bf16 units: a quarter of the size, trainable on any CPU.
    "stand-in": (
        NanoConfig(
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=512,
        ),
        Recipe(steps=1500, decay_steps=500, warmup_steps=60, batch=8, window=512, learning_rate=4e-3),
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


def optimizer_for(model: Nano, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.betas, fused=True)


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


def train(folder: Path, config: NanoConfig, recipe: Recipe, device: str, compile_model: bool) -> None:
    torch.manual_seed(recipe.seed)
    model = Nano(config).to(device)
    bf16 = has_bf16_units(device)
    optimizer = optimizer_for(model, recipe)
    windows, start, elapsed = Windows(folder, recipe), 0, 0.0
    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, elapsed = saved["step"], saved["seconds"]
        for step in range(start):
            windows.batch(step)
    loss_of = torch.compile(model.loss) if compile_model else model.loss
    log = (folder / "train.jsonl").open("a", encoding="utf-8")
    clock, running = time.monotonic() - elapsed, []
    for step in range(start, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = recipe.rate(step)
        ids = windows.batch(step).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = loss_of(ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        running.append(loss.detach())
        if (step + 1) % 20 == 0:
            row = {
                "step": step + 1,
                "tokens": (step + 1) * recipe.batch * recipe.window,
                "loss": round(float(torch.stack(running).mean()), 4),
                "rate": round(recipe.rate(step), 6),
                "seconds": round(time.monotonic() - clock, 1),
            }
            running = []
            if (step + 1) % 200 == 0 or step + 1 == recipe.steps:
                row["valid_bits_per_token"] = bits_per_token(model, folder, "valid", 24, recipe.window)
                content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
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
    config, recipe = PRESETS[arguments.preset]
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    train(arguments.data, config, recipe, arguments.device, not arguments.no_compile)


if __name__ == "__main__":
    main()
