"""Qwen 3: a Llama that norms each head's query and key before it rotates them."""

from __future__ import annotations

from mpo_runtime.backends.ops import Array
from mpo_runtime.models.decoder import Decoder


class Qwen3(Decoder):
    """All heads of a block share the weight of the queries' norm, and that of the keys'."""

    def project(self, h: Array, name: str) -> tuple[Array, Array, Array]:
        """Normed queries [B, S, H·D] and keys, and values [B, S, K·D] of h [B, S, E], in the block `name`."""
        q, k, v = super().project(h, name)
        return self.norm(q, f"{name}.self_attn.q_norm"), self.norm(k, f"{name}.self_attn.k_norm"), v
