"""Granite 4 in its dense form: the forward pass of Granite 3 under other names of tensors (weights/names.py)."""

from __future__ import annotations

from mpo_runtime.models.decoder import Decoder


class GraniteMoeHybrid(Decoder):
    """Attention in every block and one MLP, which checkpoints call the shared one; nothing is overridden."""
