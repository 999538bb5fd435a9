"""What the user may choose about healing; an invalid choice cannot be built."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace

from mpo_formats import ConfigError

# Tokens of training if the user names neither tokens, epochs nor minutes.
DEFAULT_TOKENS = 1_000_000
CODES_UP_TO = 500_000_000
MOST_MATCHING = 20.0
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
    """How long, on what, and how fast to train.

    At most one of `tokens`, `epochs` and `minutes` bounds the training; 1 M tokens where none does.

    Args:
        window: tokens of a window, None for 256 or the model's context if that is shorter.
        batch: windows of an optimizer step, over all devices.
        micro_batch: windows that a device runs at a time; the rest of its share is accumulated.
        block_share: share of the tokens that go to the reconstruction of single blocks.
        core_rate: learning rate relative to the root mean square of each core.
        code_rate: learning rate of integers, in steps of their grids; half of it for each bit above 4.
        scale_rate: relative learning rate of scales (and of zeros, in steps), falling likewise above 4 bits; of integer
            cores' scales at every width. Both are lower below 100 and above 1,000 steps.
        norm_rate: relative learning rate of norms and biases.
        train_codes: moves the integers of quantised matrices too, straight through their rounding; None: in models of at
            most CODES_UP_TO weights, since that takes 16 bytes a weight.
        top_k: logits of the teacher kept a token; the rest of its mass is one bucket.
        match_blocks: blocks, evenly spread, whose outputs are matched to the teacher's beside its logits.
        match_weight: what the divergence to expect of their errors counts beside the divergence itself; None: as many as
            there are weights for each token of the text, at most MOST_MATCHING: with much text the logits say enough.
        cross_entropy: λ, the weight of the cross entropy of the text beside the divergence from the teacher.
        assistant_only: only what the assistant says counts in the loss.
        chi_dropout: chance that a step runs on a random prefix of the bonds.
        checkpoint_steps: optimizer steps between checkpoints.
        recompute: gradient checkpointing: each block is run again in the backward pass instead of kept; None: where
            what would be kept takes too much of the memory that is free. The results are the same.
    """

    tokens: int | None = None
    epochs: float | None = None
    minutes: float | None = None
    window: int | None = None
    batch: int = 4
    micro_batch: int = 4
    block_share: float = 0.05
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
        for name in ("block_share", "chi_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"healing: {name}: expected 0 to 1, found {getattr(self, name)}")

    def check_processes(self, count: int) -> None:
        """Raises ConfigError where a batch cannot be shared among `count` processes."""
        if self.batch % count:
            raise ConfigError(f"--batch {self.batch}: does not divide among {count} processes")

    def moves_codes(self, parameters: int) -> bool:
        """Whether the integers of a model of so many weights are trained."""
        return parameters <= CODES_UP_TO if self.train_codes is None else self.train_codes

    def matching(self, parameters: int, tokens: int) -> float:
        """The weight of matched blocks in the healing of a model of so many weights on a text of so many tokens."""
        return min(parameters / tokens, MOST_MATCHING) if self.match_weight is None else self.match_weight

    def faster(self, factor: float) -> Settings:
        """The same settings with all learning rates times `factor`."""
        names = ("core_rate", "code_rate", "scale_rate", "norm_rate")
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    def digest(self, *inputs: str) -> str:
        """A digest of these settings and of what they are applied to, which a checkpoint must match."""
        return hashlib.sha256(json.dumps([asdict(self), *inputs], sort_keys=True).encode()).hexdigest()
