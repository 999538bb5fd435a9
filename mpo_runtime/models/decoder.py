"""The decoder: pre-norm blocks of grouped-query attention with RoPE and of a gated MLP. This is Llama; others differ in parts.

It is written once, against the op set (backends/ops.py). Each model_type has a file beside this one that says what differs,
and models/registry.py names them all.
"""

from __future__ import annotations

from mpo_formats import Architecture
from mpo_formats.architecture import EMBEDDING, FINAL_NORM, HEAD
from mpo_runtime.backends.ops import Array, Cache, Ops


class Decoder:
    """The forward pass over any backend.

    An architecture that differs overrides the part that differs: `embed`, `norm`, `project`, `attend`, `feed_forward`,
    `add`, `logits`, or `block`, which puts them together. Biases and windows need no override: a layer adds its own bias,
    attention heeds the block's window. Multipliers are numbers of the Architecture; in a Llama they are 1, and 1/√D for
    attention.
    """

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

        A backend may record the ops of one call and run them again for other ids, so no branch here may depend on the ids.
        """
        x = self.embed(ids, cache)
        for block in range(self.architecture.num_hidden_layers):
            x = self.block(x, cache, block)
        return self.normed(x)

    def embed(self, ids: Array, cache: Cache | None = None) -> Array:
        """Token ids [B, S] to the input of the first block [B, S, E].

        The tokens follow those in the cache; without one they begin at position 0.
        """
        return self.ops.embed(self.ops.weights(EMBEDDING), ids, self.architecture.embedding_multiplier)

    def block(self, x: Array, cache: Cache, block: int) -> Array:
        """One block on the residual stream x [B, S, E]; appends to the cache without advancing it."""
        name = f"model.layers.{block}"
        q, k, v = self.project(self.norm(x, f"{name}.input_layernorm"), name)
        mixed = self.attend(q, k, v, cache, block)
        x = self.add(x, self.ops.linear(self.ops.weights(f"{name}.self_attn.o_proj"), mixed))
        return self.add(x, self.feed_forward(self.norm(x, f"{name}.post_attention_layernorm"), name))

    def norm(self, x: Array, name: str) -> Array:
        """RMSNorm of x [..., E] with the weight of that name."""
        return self.ops.rms_norm(x, self.ops.weights(name), self.architecture.rms_norm_eps)

    def project(self, h: Array, name: str) -> tuple[Array, Array, Array]:
        """Queries [B, S, H·D], keys and values [B, S, K·D] of h [B, S, E], in the block `name`."""
        q, k, v = self.ops.linears([self.ops.weights(f"{name}.self_attn.{part}_proj") for part in "qkv"], h)
        return q, k, v

    def attend(self, q: Array, k: Array, v: Array, cache: Cache, block: int) -> Array:
        """Rotates q and k by position, appends k and v to the cache, and attends to all of it: [B, S, H·D]."""
        q = self.ops.rope_and_append(q, k, v, cache, block)
        return self.ops.attention(q, cache, block, self.architecture.attention_scale, self.architecture.window(block))

    def feed_forward(self, h: Array, name: str) -> Array:
        """The gated MLP on h [B, S, E], in the block `name`."""
        gate, up = self.ops.linears([self.ops.weights(f"{name}.mlp.{part}_proj") for part in ("gate", "up")], h)
        return self.ops.linear(self.ops.weights(f"{name}.mlp.down_proj"), self.ops.swiglu(gate, up))

    def add(self, x: Array, y: Array) -> Array:
        """The residual stream x [B, S, E] with the output y of a part added."""
        return self.ops.add_scaled(x, y, self.architecture.residual_multiplier)

    def normed(self, x: Array) -> Array:
        """The residual stream after the last block [B, S, E], normed for the head."""
        return self.norm(x, FINAL_NORM)

    def logits(self, hidden: Array) -> Array:
        """Maps normed hidden states [..., E] to logits [..., vocabulary]."""
        head = EMBEDDING if self.architecture.tie_word_embeddings else HEAD
        return self.ops.logits(self.ops.weights(head), hidden, self.architecture.logits_scaling)
