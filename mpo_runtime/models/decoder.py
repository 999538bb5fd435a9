"""Granite: a Llama with four multipliers (on embeddings, residual branches, attention scores and logits).

Written once, against the op set; Llama itself is the case in which three multipliers are 1 and attention's is 1/√D.
"""

from __future__ import annotations

from mpo_formats import Architecture
from mpo_formats.architecture import EMBEDDING, FINAL_NORM, HEAD
from mpo_runtime.backends.ops import Array, Cache, Ops


class GraniteModel:
    """The forward pass over any backend."""

    def __init__(self, architecture: Architecture, ops: Ops) -> None:
        self.architecture = architecture
        self.ops = ops

    def hidden(self, ids: Array, cache: Cache, counts: list[int]) -> Array:
        """Runs the blocks over new tokens and advances the cache.

        Args:
            ids: [B, S] token ids; a row with fewer than S new tokens is padded at its end with any id.
            counts: the number of new tokens of each row.

        Returns:
            The normed hidden states [B, S, E]; those of padding mean nothing.
        """
        x = self.ops.run(self.forward, ids, cache)
        cache.advance(counts)
        return x

    def forward(self, ids: Array, cache: Cache) -> Array:
        """Token ids [B, S] through all blocks; appends to the cache without advancing it.

        A backend may record the ops of one call and run them again for other ids: nothing here may depend on their values.
        """
        x = self.embed(ids)
        for block in range(self.architecture.num_hidden_layers):
            x = self.block(x, cache, block)
        return self.normed(x)

    def embed(self, ids: Array) -> Array:
        """Token ids [B, S] to what the first block takes [B, S, E]."""
        return self.ops.embed(self.ops.weights(EMBEDDING), ids, self.architecture.embedding_multiplier)

    def normed(self, x: Array) -> Array:
        """What the last block gives [B, S, E], normed for the head."""
        return self.ops.rms_norm(x, self.ops.weights(FINAL_NORM), self.architecture.rms_norm_eps)

    def block(self, x: Array, cache: Cache, block: int) -> Array:
        """One decoder block on x [B, S, E]; appends to the cache without advancing it."""
        model, ops, name = self.architecture, self.ops, f"model.layers.{block}"
        h = ops.rms_norm(x, ops.weights(f"{name}.input_layernorm"), model.rms_norm_eps)
        q, k, v = (ops.linear(ops.weights(f"{name}.self_attn.{part}_proj"), h) for part in "qkv")
        q = ops.rope_and_append(q, k, v, cache, block)
        h = ops.attention(q, cache, block, model.attention_multiplier)
        h = ops.linear(ops.weights(f"{name}.self_attn.o_proj"), h)
        x = ops.add_scaled(x, h, model.residual_multiplier)
        h = ops.rms_norm(x, ops.weights(f"{name}.post_attention_layernorm"), model.rms_norm_eps)
        gate, up = (ops.linear(ops.weights(f"{name}.mlp.{part}_proj"), h) for part in ("gate", "up"))
        h = ops.linear(ops.weights(f"{name}.mlp.down_proj"), ops.swiglu(gate, up))
        return ops.add_scaled(x, h, model.residual_multiplier)

    def logits(self, hidden: Array) -> Array:
        """Maps normed hidden states [..., E] to logits [..., vocabulary]."""
        head = EMBEDDING if self.architecture.tie_word_embeddings else HEAD
        return self.ops.logits(self.ops.weights(head), hidden, self.architecture.logits_scaling)
