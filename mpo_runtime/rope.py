"""Rotary position embedding (RoPE): the rotation frequency of each pair of a head's elements."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from mpo_formats import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> NDArray[np.float32]:
    """The angle in radians by which each pair turns from one position to the next, [D/2].

    θ^(−2j/D) for pair j (Su et al. 2021), scaled linearly or as in Llama 3.1: wavelengths below
    original_max_position_embeddings / high_freq_factor stay, those above original_max_position_embeddings / low_freq_factor
    are stretched by `factor`, those between are interpolated.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(rope.theta) ** -exponents
    if rope.scaling == "linear":
        frequencies = frequencies / np.float32(rope.factor)
    elif rope.scaling == "llama3":
        turns = rope.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = blend.clip(0, 1)
        frequencies = frequencies * (blend + (1 - blend) / rope.factor)
    return frequencies.astype(np.float32)
