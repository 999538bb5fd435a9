"""Qwen 2 and 2.5: a Llama whose query, key and value projections have biases."""

from __future__ import annotations

from mpo_runtime.models.decoder import Decoder


class Qwen2(Decoder):
    """The layers add their own biases, and the decoder heeds a window, so nothing is overridden."""
