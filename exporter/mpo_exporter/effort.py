"""How much care an export takes, by the values of `--effort`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mpo_formats import ConfigError


@dataclass(frozen=True, slots=True)
class Care:
    """How carefully layers are judged before a plan is made.

    Args:
        windows: of the calibration text that moments and Fisher information are taken on.
        rows: of a matrix that errors are estimated on, if it has more than twice as many.
    """

    windows: int = 32
    rows: int = 512


@dataclass(frozen=True, slots=True)
class Effort:
    """One value of `--effort`.

    Args:
        windows: of the calibration text, at most, that layers are fitted to; 0 uses none: layers are judged by the relative
            errors of their weights and rounded to nearest.
        care: for the survey of a model with calibration text.
        outputs: windows on which gradients by the layers' outputs are measured, for a rounding that minds them; 0: none.
        least: windows that layers are fitted to, and those of the care, in the largest models; see `suited`. None for as many
            as in small ones.
    """

    name: str
    windows: int
    care: Care
    outputs: int = 0
    least: tuple[int, int] | None = None

    def suited(self, weights: int) -> Effort:
        """The effort for a model of so many weights: fewer windows the more weights there are above FREE.

        Windows fall with the root of the weights, so that the time of an export grows with the root only, down to `least`.
        """
        if self.least is None or weights <= FREE:
            return self
        share = math.sqrt(FREE / weights)
        fitted, judged = (
            max(least, int(count * share) // BATCH * BATCH)
            for count, least in zip((self.windows, self.care.windows), self.least, strict=True)
        )
        return replace(self, windows=fitted, care=replace(self.care, windows=judged))


# Models of at most so many weights are given all windows; windows are run in batches of so many.
FREE, BATCH = 400_000_000, 8
USUAL = Care()
QUICK = Effort("quick", 0, USUAL)
NORMAL = Effort("normal", 80, USUAL, least=(32, 8))
BEST = Effort("best", 96, Care(96, 1024), outputs=96)
EFFORTS = {effort.name: effort for effort in (QUICK, NORMAL, BEST)}


def find_effort(name: str) -> Effort:
    """The effort of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in EFFORTS:
        raise ConfigError(f"--effort {name}: expected one of {', '.join(EFFORTS)}")
    return EFFORTS[name]
