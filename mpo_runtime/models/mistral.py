"""Mistral: a Llama whose tokens may see only a window of the last positions."""

from __future__ import annotations

from mpo_runtime.models.decoder import Decoder


class Mistral(Decoder):
    """The window is a number of the Architecture; the decoder heeds it, so nothing is overridden."""
