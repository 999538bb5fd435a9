"""Llama and models of its form: the decoder as it stands."""

from __future__ import annotations

from mpo_runtime.models.decoder import Decoder


class Llama(Decoder):
    """All multipliers are 1; attention scores are multiplied by 1/√D."""
