"""Rotary position embedding (RoPE): the rotation frequency of each pair of a head's elements."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Architecture, Rope


def rotations(architecture: Architecture) -> NDArray[np.float32]:
    """The angles [D/2] of `inverse_frequencies`; 0 where positions are learned vectors and nothing is rotated."""
    if architecture.learned_positions:
        return np.zeros(architecture.head_dim // 2, np.float32)
    return inverse_frequencies(architecture.rope, architecture.head_dim)


def inverse_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """The angle in radians by which each pair turns from one position to the next, [D/2].

    θ^(−2j/D) for pair j (Su et al. 2021), scaled linearly, as in Llama 3.1 or by YaRN (Peng et al. 2023). In the last two,
    wavelengths below original_max_position_embeddings / high_freq_factor stay, those above original_max_position_embeddings /
    low_freq_factor are stretched by `factor`, and those between are interpolated: by the number of turns in Llama 3.1, by j
    in YaRN.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(rope.theta) ** -exponents
    if rope.scaling == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.scaling == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        frequencies = blended(frequencies, blend, rope.factor)
    elif rope.scaling == "yarn":
        begin = max(math.floor(yarn_pair(rope, rope.high_freq_factor, head_dim)), 0)
        end = min(math.ceil(yarn_pair(rope, rope.low_freq_factor, head_dim)), head_dim - 1)
        ramp = (np.arange(head_dim // 2, dtype=np.float32) - begin) / (end - begin or 0.001)
        frequencies = blended(frequencies, 1 - ramp.clip(0, 1), rope.factor)
    return frequencies.astype(np.float32)


def blended(frequencies: NDArray[Any], share: NDArray[Any], factor: float) -> NDArray[Any]:
    """Frequencies of which a share, cut to 0 … 1, stays as it is, and the rest is divided by `factor`."""
    share = share.clip(0, 1)
    return frequencies * (share + (1 - share) / factor)


def yarn_pair(rope: Rope, turns: float, head_dim: int) -> float:
    """Which pair, as a fraction, turns so many times in the original context."""
    wavelength = rope.original_max_position_embeddings / (turns * 2 * math.pi)
    return head_dim * math.log(wavelength) / (2 * math.log(rope.theta))
