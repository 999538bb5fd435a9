"""What one healing is asked to do: how to train (Settings), and which file into which (HealJob)."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from mpo_formats import ConfigError
from mpo_runtime.text.token_text import TokenText

# Tokens to train on where neither tokens, epochs nor minutes are given.
DEFAULT_TOKENS = 1_000_000
# The most weights of a model whose integers are trained where `train_codes` is None.
CODES_UP_TO = 500_000_000
# The largest weight of the block-matching loss where `match_weight` is None.
MOST_MATCHING = 20.0
# The share of the tokens that single blocks get where `block_share` is None. Trainings of fewer steps than FEWEST_STEPS have
# neither this nor, where `match_weight` is None, matched blocks.
BLOCK_SHARE = 0.05
# With fewer steps than these, too little of the noise averages out.
FEWEST_STEPS = 100
POWERS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}


def parse_tokens(text: str) -> int:
    """A number of tokens, written 2M, 1.5M, 500k or 1000000.

    Raises:
        ConfigError: for anything else, and for less than one token.
    """
    found = re.fullmatch(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)\s*([kmb]?)", text.strip(), re.IGNORECASE)
    tokens = 0 if found is None else round(float(re.sub("[_,]", "", found[1])) * POWERS[found[2].lower()])
    if tokens < 1:
        raise ConfigError(f"--heal-tokens {text}: expected a number of tokens such as 500k, 2M, 1.5M or 1000000")
    return tokens


@dataclass(frozen=True, slots=True)
class Settings:
    """How long to train, on what, and how fast. An invalid combination raises ConfigError when it is built.

    At most one of `tokens`, `epochs` and `minutes` limits the training. Where none is given, it is 1 M tokens.

    Args:
        window: tokens in a window; None: 256, or the model's context if that is shorter.
        batch: windows in an optimizer step, over all devices together.
        micro_batch: windows that a device runs at once; gradients of the rest of its share are accumulated.
        block_share: share of the tokens spent on training single blocks, before the whole model is trained; None: BLOCK_SHARE,
            or nothing in short trainings. What it gives is kept only if it lowers the KL.
        core_rate: learning rate of cores, relative to each core's root mean square; lowered where a first step at this
            rate would raise the loss (Trainer.tame).
        code_rate: learning rate of integers, in units of their grid's step; halved for each bit above 4.
        scale_rate: relative learning rate of scales (of zeros: in grid steps); halved for each bit above 4, except for
            the scales of integer cores. Below 100 and above 1,000 steps, `code_rate` and `scale_rate` are lowered.
        norm_rate: relative learning rate of norms and biases.
        train_codes: train the integers of quantised matrices too, through their rounding (straight-through); None: only
            in models of at most CODES_UP_TO weights, because this takes 16 bytes for each weight.
        top_k: number of teacher logits kept for each token; the remaining probability is treated as one class.
        match_blocks: number of blocks, evenly spread, whose outputs are matched to the teacher's.
        match_weight: weight of the block-matching loss relative to the KL; None: the model's weights divided by the
            text's tokens, at most MOST_MATCHING, if a trial with it ends at a lower KL than one without; 0 in short
            trainings. The more text there is, the less the matching adds to the logits.
        cross_entropy: λ, the weight of the text's cross entropy relative to the KL.
        assistant_only: only the tokens of the assistant's messages count in the loss.
        chi_dropout: probability that a step uses only a random prefix of the bonds.
        cores_first: share of each training, of single blocks and of the whole model, in which integers and scales stay as
            they are, so that the cores correct them first. It was no better than training everything at once (docs/log.md).
        checkpoint_steps: optimizer steps between two checkpoints.
        recompute: gradient checkpointing: run each block again in the backward pass instead of keeping its
            intermediate results, with the same outcome; None: only where keeping them would take too much memory.
        seed: of the order of the windows and of χ-dropout.
    """

    tokens: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    window: int | None = None
    batch: int = 4
    micro_batch: int = 4
    block_share: float | None = None
    core_rate: float = 2e-2
    code_rate: float = 1e-2
    scale_rate: float = 3e-3
    norm_rate: float = 1e-3
    train_codes: bool | None = None
    top_k: int = 256
    match_blocks: int = 4
    match_weight: float | None = None
    cross_entropy: float = 0.0
    assistant_only: bool = False
    chi_dropout: float = 0.0
    cores_first: float = 0.0
    checkpoint_steps: int = 100
    recompute: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = [name for name in ("tokens", "epochs", "minutes") if getattr(self, name) is not None]
        if len(bounds) > 1:
            raise ConfigError(f"healing: {' and '.join(bounds)} were both given; give one of them")
        for name in (*bounds, "batch", "micro_batch", "top_k", "checkpoint_steps"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ConfigError(f"healing: {name}: expected more than 0, found {value}")
        for name in ("core_rate", "code_rate", "scale_rate", "norm_rate", "cross_entropy", "match_weight"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ConfigError(f"healing: {name}: expected at least 0, found {value}")
        for name in ("seed", "match_blocks"):
            if getattr(self, name) < 0:
                raise ConfigError(f"healing: {name}: expected at least 0, found {getattr(self, name)}")
        for name in ("block_share", "chi_dropout", "cores_first"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"healing: {name}: expected 0 to 1, found {value}")

    def check_processes(self, count: int) -> None:
        """Raises ConfigError where a batch cannot be divided among `count` processes."""
        if self.batch % count:
            raise ConfigError(f"--batch {self.batch}: does not divide among {count} processes")

    def moves_codes(self, parameters: int) -> bool:
        """Whether the integers of a model of `parameters` weights are trained."""
        return parameters <= CODES_UP_TO if self.train_codes is None else self.train_codes

    def matching(self, parameters: int, tokens: int) -> float:
        """The weight of the block-matching loss for a model of `parameters` weights and a text of `tokens` tokens."""
        return min(parameters / tokens, MOST_MATCHING) if self.match_weight is None else self.match_weight

    def faster(self, factor: float) -> Settings:
        """The same settings with all learning rates multiplied by `factor`."""
        names = ("core_rate", "code_rate", "scale_rate", "norm_rate")
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    def digest(self, *inputs: str) -> str:
        """A digest of these settings and of the digests of what they are applied to; a checkpoint must have the same."""
        return hashlib.sha256(json.dumps([asdict(self), *inputs], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class HealJob:
    """One healing: the file to heal, the file to write, and how.

    Args:
        file: a `.mpo` file.
        target: the file to write; may be `file` itself.
        text: the text to train on, or its path; None: the embedded healing text.
        held_out: tokens to measure the result on; None: nothing is measured.
        work: folder for checkpoints and the teacher's outputs, which are kept; None: one beside the target, removed at
            the end.
        force: overwrite an existing target.
        discard_other: ignore a checkpoint of a different healing in the work folder; without this it is an error.
        most_kl: the largest KL on `held_out` with which the healed file is written; None: it is always written.
    """

    file: Path
    target: Path
    settings: Settings = field(default_factory=Settings)
    text: Path | TokenText | None = None
    held_out: TokenText | None = None
    work: Path | None = None
    force: bool = False
    discard_other: bool = False
    most_kl: float | None = None

    @property
    def folder(self) -> Path:
        """The folder for checkpoints and the teacher's outputs."""
        return self.work or self.target.with_name(f".{self.target.name}.healing")
