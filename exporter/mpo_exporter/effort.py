"""How much care an export takes, by the values of `--effort`."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_exporter.terms import Transforms
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
        transforms: that layers may take of their input, if the user does not say.
    """

    name: str
    windows: int
    care: Care
    outputs: int = 0
    transforms: Transforms = "hadamard"


USUAL = Care()
QUICK = Effort("quick", 0, USUAL)
NORMAL = Effort("normal", 80, USUAL)
BEST = Effort("best", 96, Care(96, 1024), outputs=96, transforms="fitted")
EFFORTS = {effort.name: effort for effort in (QUICK, NORMAL, BEST)}


def find_effort(name: str) -> Effort:
    """The effort of that name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in EFFORTS:
        raise ConfigError(f"--effort {name}: expected one of {', '.join(EFFORTS)}")
    return EFFORTS[name]
