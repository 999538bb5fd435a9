"""Granite 3: a Llama with multipliers on embeddings, residual branches, attention scores and logits."""

from __future__ import annotations

from mpo_runtime.models.decoder import Decoder


class Granite(Decoder):
    """The four multipliers come from config.json; the decoder applies them, so nothing is overridden."""
