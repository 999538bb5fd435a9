"""GPT-Neo: learned positions, LayerNorms, an MLP without a gate, and windows in every other block."""

from __future__ import annotations

from mpo_formats.architecture import POSITIONS
from mpo_runtime.backends.ops import Array, Cache
from mpo_runtime.models.decoder import Decoder


class GptNeo(Decoder):
    """Attention scores are not scaled, and rotations are by angles of 0, which leave queries and keys as they are."""

    def embed(self, ids: Array, cache: Cache | None = None) -> Array:
        """Token ids [B, S] to the input of the first block [B, S, E]: the token's vector and its position's."""
        return self.ops.add_positions(super().embed(ids, cache), self.ops.weights(POSITIONS), cache)

    def norm(self, x: Array, name: str) -> Array:
        """LayerNorm of x [..., E] with the weight of that name and its bias."""
        weight, bias = self.ops.weights(name), self.ops.weights(f"{name}_bias")
        return self.ops.layer_norm(x, weight, bias, self.architecture.rms_norm_eps)

    def feed_forward(self, h: Array, name: str) -> Array:
        """The MLP on h [B, S, E], in the block `name`."""
        inner = self.ops.gelu(self.ops.linear(self.ops.weights(f"{name}.mlp.up_proj"), h))
        return self.ops.linear(self.ops.weights(f"{name}.mlp.down_proj"), inner)
