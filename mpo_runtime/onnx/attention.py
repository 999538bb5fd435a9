"""Attention as nodes: GroupQueryAttention with the rotation inside, or plain ONNX for heads that it does not take."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from mpo_formats import Architecture
from mpo_runtime.onnx.graph import Graph
from mpo_runtime.rope import inverse_frequencies

# GroupQueryAttention rotates heads of a multiple of 16 elements (onnxruntime 1.32 on a CPU).
FUSED_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Rotation:
    """The tables of RoPE, cosines and sines [positions, D/2], as float32 angles give them."""

    cosine: str
    sine: str

    @classmethod
    def store(cls, graph: Graph, architecture: Architecture) -> Rotation:
        """Stores the tables for all positions of the architecture; they leave all as it is where positions are learned."""
        frequencies = inverse_frequencies(architecture.rope, architecture.head_dim)
        positions = np.arange(architecture.max_position_embeddings, dtype=np.float32)
        angles = positions[:, None] * (0 * frequencies if architecture.learned_positions else frequencies)
        return cls(graph.floats("cosine", np.cos(angles)), graph.floats("sine", np.sin(angles)))


def past_and_present(graph: Graph, architecture: Architecture, block: int) -> tuple[list[str], list[str]]:
    """Declares the KV cache of a block: names of the past and of the present keys and values [B, K, length, D]."""
    heads, size = architecture.num_key_value_heads, architecture.head_dim
    pasts, presents = [], []
    for part in ("key", "value"):
        past: list[int | str] = ["batch_size", heads, "past_sequence_length", size]
        present: list[int | str] = ["batch_size", heads, "total_sequence_length", size]
        pasts.append(graph.input(f"past_key_values.{block}.{part}", graph.element, past))
        presents.append(f"present.{block}.{part}")
        graph.output(presents[-1], graph.element, present)
    return pasts, presents


def places(graph: Graph, mask: str) -> tuple[str, str]:
    """How many columns of the attention mask [B, total] are the cache's, and how many there are, as [1]."""
    count = graph.add("Gather", graph.add("Shape", "input_ids"), graph.constant([1]))
    total = graph.add("Gather", graph.add("Shape", mask), graph.constant([1]))
    return graph.add("Sub", total, count), total


def new_positions(graph: Graph, mask: str) -> str:
    """The positions [B, S] of the new tokens: the number of tokens before each of them in its row."""
    past, total = places(graph, mask)
    one = graph.constant([1])
    positions = graph.add("Sub", graph.add("CumSum", mask, graph.constant(1)), one)
    return graph.add("Max", graph.add("Slice", positions, past, total, one), graph.constant([0]))


@dataclass(frozen=True, slots=True)
class FusedAttention:
    """GroupQueryAttention: one node a block, whose cache may be one buffer for past and present."""

    graph: Graph
    architecture: Architecture
    rotation: Rotation
    lengths: str  # of each row, its new tokens included, less one; int32 [B]
    total: str  # of the longest row; int32 scalar

    shares_buffer = True
    takes_packed = True

    @classmethod
    def prepare(cls, graph: Graph, architecture: Architecture, mask: str) -> FusedAttention:
        """What all blocks have in common, from the attention mask [B, total]."""
        one = graph.constant([1])
        counts = graph.add("Sub", graph.add("ReduceSum", mask, one, keepdims=0), one)
        total = graph.add("Gather", graph.add("Shape", mask), graph.constant(1))
        lengths, longest = (graph.add("Cast", value, to=TensorProto.INT32) for value in (counts, total))
        return cls(graph, architecture, Rotation.store(graph, architecture), lengths, longest)

    def apply(self, block: int, q: str, k: str, v: str) -> str:
        """The mixed values [B, S, H·D] of queries [B, S, H·D], keys and values [B, S, K·D].

        With empty names for k and v, q is all three one after another.
        """
        pasts, presents = past_and_present(self.graph, self.architecture, block)
        mixed = f"mixed_{block}"
        inputs = (q, k, v, *pasts, self.lengths, self.total, self.rotation.cosine, self.rotation.sine)
        return self.graph.microsoft(
            "GroupQueryAttention",
            *inputs,
            outputs=[mixed, *presents],
            num_heads=self.architecture.num_attention_heads,
            kv_num_heads=self.architecture.num_key_value_heads,
            scale=self.architecture.attention_scale,
            do_rotary=1,
            local_window_size=self.architecture.window(block) or -1,
        )


@dataclass(frozen=True, slots=True)
class PlainAttention:
    """The same in plain ONNX; every call makes a new cache that is longer by its tokens."""

    graph: Graph
    architecture: Architecture
    cosine: str  # of the new tokens, [B, 1, S, D/2]
    sine: str
    given: str  # [B, 1, 1, total]: whether a column of the cache holds a token
    behind: str  # [S, total]: how many positions a key is behind a query

    shares_buffer = False
    takes_packed = False

    @classmethod
    def prepare(cls, graph: Graph, architecture: Architecture, mask: str) -> PlainAttention:
        """What all blocks have in common, from the attention mask [B, total]: angles of the new tokens, who sees whom."""
        rotation = Rotation.store(graph, architecture)
        one = graph.constant([1])
        past, total = places(graph, mask)
        new = new_positions(graph, mask)
        cosine, sine = (
            graph.add("Unsqueeze", graph.add("Gather", table, new), one) for table in (rotation.cosine, rotation.sine)
        )
        columns = graph.add("Range", graph.constant(0), graph.add("Squeeze", total), graph.constant(1))
        last = graph.add("Unsqueeze", graph.add("Slice", columns, past, total), one)  # [S, 1]
        given = graph.add("Unsqueeze", graph.add("Greater", mask, graph.constant(0)), graph.constant([1, 2]))
        return cls(graph, architecture, cosine, sine, given, graph.add("Sub", last, columns))

    def apply(self, block: int, q: str, k: str, v: str) -> str:
        """The mixed values [B, S, H·D] of queries [B, S, H·D], keys and values [B, S, K·D]."""
        graph, size = self.graph, self.architecture.head_dim
        heads, keys = self.architecture.num_attention_heads, self.architecture.num_key_value_heads
        pasts, presents = past_and_present(graph, self.architecture, block)
        q = self._rotated(self._split(q, heads))
        k = graph.add("Concat", pasts[0], self._rotated(self._split(k, keys)), outputs=[presents[0]], axis=2)
        v = graph.add("Concat", pasts[1], self._split(v, keys), outputs=[presents[1]], axis=2)
        grouped = graph.constant([0, keys, heads // keys, -1, size])
        q = graph.add("Reshape", q, grouped)  # [B, K, H/K, S, D]
        k, v = (graph.add("Unsqueeze", value, graph.constant([2])) for value in (k, v))
        scores = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 2, 4, 3]))
        scores = graph.add("Mul", scores, graph.scalar(self.architecture.attention_scale))
        scores = graph.add("Add", scores, self._hidden(self.architecture.window(block)))
        mixed = graph.add("MatMul", graph.add("Softmax", scores, axis=-1), v)
        mixed = graph.add("Reshape", mixed, graph.constant([0, heads, -1, size]))
        mixed = graph.add("Transpose", mixed, perm=[0, 2, 1, 3])
        return graph.add("Reshape", mixed, graph.constant([0, 0, heads * size]))

    def _hidden(self, window: int) -> str:
        """[B, 1, 1, S, total]: 0 where a query sees a key, else the lowest number; of all before it for a window of 0."""
        graph, key = self.graph, ("hidden", window)
        if key not in graph.shared:
            seen = graph.add("GreaterOrEqual", self.behind, graph.constant(0))
            if window:
                seen = graph.add("And", seen, graph.add("Less", self.behind, graph.constant(window)))
            seen = graph.add("And", self.given, seen)
            lowest = graph.scalar(float(np.finfo(graph.dtype).min))
            hidden = graph.add("Where", seen, graph.scalar(0), lowest)
            graph.shared[key] = graph.add("Unsqueeze", hidden, graph.constant([1]))
        return graph.shared[key]

    def _split(self, x: str, heads: int) -> str:
        """[B, S, heads·D] to [B, heads, S, D]."""
        shape = self.graph.constant([0, 0, heads, self.architecture.head_dim])
        return self.graph.add("Transpose", self.graph.add("Reshape", x, shape), perm=[0, 2, 1, 3])

    def _rotated(self, x: str) -> str:
        """Rotates each pair of elements (j, j + D/2) of x [B, heads, S, D]."""
        graph, last = self.graph, self.graph.constant([-1])
        half, end = graph.constant([self.architecture.head_dim // 2]), graph.constant([self.architecture.head_dim])
        first = graph.add("Slice", x, graph.constant([0]), half, last)
        second = graph.add("Slice", x, half, end, last)
        left = graph.add("Sub", graph.add("Mul", first, self.cosine), graph.add("Mul", second, self.sine))
        right = graph.add("Add", graph.add("Mul", second, self.cosine), graph.add("Mul", first, self.sine))
        return graph.add("Concat", left, right, axis=-1)


def attention(graph: Graph, architecture: Architecture, mask: str, *, plain: bool) -> FusedAttention | PlainAttention:
    """The attention of an architecture; plain where it is asked for or the fused one does not take the heads."""
    if plain or architecture.head_dim % FUSED_MULTIPLE:
        return PlainAttention.prepare(graph, architecture, mask)
    return FusedAttention.prepare(graph, architecture, mask)
