"""The decoder as a graph: token ids and a KV cache in, logits and the longer cache out."""

from __future__ import annotations

from dataclasses import dataclass

from onnx import TensorProto

from mpo_formats import Architecture, ConfigError, ModelSpec
from mpo_formats.architecture import EMBEDDING, FINAL_NORM, HEAD, POSITIONS
from mpo_runtime.onnx.attention import FusedAttention, PlainAttention, attention, new_positions
from mpo_runtime.onnx.graph import Graph
from mpo_runtime.onnx.layers import Layers, widened
from mpo_runtime.weights.protocol import Weights

# The architectures that `write_decoder` writes.
WRITTEN = ("gpt_neo", "granite", "granitemoehybrid", "llama", "mistral", "qwen2", "qwen3")


def check_architecture(architecture: Architecture) -> None:
    """Raises ConfigError for an architecture that cannot be written."""
    if architecture.model_type not in WRITTEN:
        raise ConfigError(
            f"export-onnx: has no graph for the architecture {architecture.model_type}, only for {', '.join(WRITTEN)}; "
            "run this model with mpo-run"
        )


@dataclass(frozen=True, slots=True)
class Written:
    """What a graph turned out to be: whether past and present may be one buffer."""

    shares_buffer: bool


def write_decoder(
    graph: Graph,
    weights: Weights,
    *,
    level: int = 0,
    chi: int | None = None,
    plain: bool = False,
    lookup_bits: frozenset[int] = frozenset((2, 4, 8)),
) -> Written:
    """Writes all nodes and tensors of a decoder: pre-norm blocks as in mpo_runtime/models/decoder.py.

    Inputs: input_ids [B, S], attention_mask [B, total] and past_key_values.%d.key/value [B, K, past, D]; outputs: logits
    [B, S, vocabulary] and present.%d.key/value. A row's mask is 1 for its tokens, those in the cache and the new ones.

    Args:
        level: accuracy level of the integer products, 0 or 4.
        chi: cuts every bond to its first `chi` values.
        plain: attention in plain ONNX also where there is a fused operator.
        lookup_bits: bit widths in which the runtime looks up rows of integer matrices.
    """
    architecture = weights.spec.architecture
    check_architecture(architecture)
    ids = graph.input("input_ids", TensorProto.INT64, ["batch_size", "sequence_length"])
    mask = graph.input("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"])
    layers = Layers(graph, weights, level, chi, frozenset([EMBEDDING]), lookup_bits)
    mixer = attention(graph, architecture, mask, plain=plain)
    parts = Parts(weights.spec, graph, layers, mixer)
    # The first norm has no branch to add: half of the embedding is added to the other half, which is exact.
    half = parts.scaled(layers.rows(weights.spec.linear(EMBEDDING), ids), architecture.embedding_multiplier / 2)
    x = branch = half
    if architecture.learned_positions:
        size = (architecture.max_position_embeddings, architecture.hidden_size)
        table = graph.floats(POSITIONS, widened(weights, f"{POSITIONS}.weight").reshape(size))
        x, branch = graph.add("Add", half, half), graph.add("Gather", table, new_positions(graph, mask))
    for block in range(architecture.num_hidden_layers):
        x, branch = parts.block(block, x, branch)
    hidden, _ = parts.norm(FINAL_NORM, x, branch)
    logits = parts.linear(EMBEDDING if architecture.tie_word_embeddings else HEAD, hidden)
    graph.add("Div", logits, graph.scalar(architecture.logits_scaling), outputs=["logits"])
    graph.output("logits", graph.element, ["batch_size", "sequence_length", architecture.vocab_size])
    graph.outputs.insert(0, graph.outputs.pop())  # the first output, as readers of such folders expect
    return Written(mixer.shares_buffer)


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a block as nodes."""

    spec: ModelSpec
    graph: Graph
    layers: Layers
    mixer: FusedAttention | PlainAttention

    def block(self, index: int, x: str, branch: str) -> tuple[str, str]:
        """One block on the residual stream x and the branch that is not yet added to it; returns both after the block."""
        name, factor = f"model.layers.{index}", self.spec.architecture.residual_multiplier
        h, x = self.norm(f"{name}.input_layernorm", x, branch)
        projections = [self.spec.linear(f"{name}.self_attn.{part}_proj") for part in "qkv"]
        by_head = self.spec.architecture.head_norms
        packed = self.layers.together(projections, h) if self.mixer.takes_packed and not by_head else ""
        q, k, v = (packed, "", "") if packed else (self.layers.apply(layer, h) for layer in projections)
        if by_head:
            q, k = (self.head_norm(f"{name}.self_attn.{part}_norm", x) for part, x in (("q", q), ("k", k)))
        mixed = self.linear(f"{name}.self_attn.o_proj", self.mixer.apply(index, q, k, v))
        h, x = self.norm(f"{name}.post_attention_layernorm", x, self.scaled(mixed, factor))
        return x, self.scaled(self.linear(f"{name}.mlp.down_proj", self.inner(name, h)), factor)

    def inner(self, name: str, h: str) -> str:
        """What the last matrix of a block's MLP is given."""
        if not self.spec.architecture.gated:
            return self.graph.add("Gelu", self.linear(f"{name}.mlp.up_proj", h), approximate="tanh")
        gate, up = (self.linear(f"{name}.mlp.{part}_proj", h) for part in ("gate", "up"))
        return self.graph.add("Mul", self.graph.add("Mul", gate, self.graph.add("Sigmoid", gate)), up)

    def norm(self, name: str, x: str, branch: str) -> tuple[str, str]:
        """x + branch, normed with the weight of that name, and as it is."""
        total = f"{name}.sum"
        by_mean = self.spec.architecture.layer_norms
        normed = self.graph.microsoft(
            "SkipLayerNormalization" if by_mean else "SkipSimplifiedLayerNormalization",
            x,
            branch,
            self.layers.floats(f"{name}.weight"),
            *([self.layers.floats(f"{name}_bias.weight")] if by_mean else []),
            outputs=[f"{name}.normed", *(["", "", total] if name != FINAL_NORM else [])],
            epsilon=self.spec.architecture.rms_norm_eps,
        )
        return normed, total

    def head_norm(self, name: str, x: str) -> str:
        """x [B, S, heads·D] with each head normed."""
        size, heads = self.spec.architecture.head_dim, self.spec.linear(name.replace("_norm", "_proj")).out_features
        half = self.scaled(self.graph.add("Reshape", x, self.graph.constant([0, -1, size])), 0.5)
        weight = self.layers.floats(f"{name}.weight")
        normed = self.graph.microsoft(
            "SkipSimplifiedLayerNormalization", half, half, weight, epsilon=self.spec.architecture.rms_norm_eps
        )
        return self.graph.add("Reshape", normed, self.graph.constant([0, -1, heads]))

    def linear(self, name: str, x: str) -> str:
        """The layer of that name on x."""
        return self.layers.apply(self.spec.linear(name), x)

    def scaled(self, x: str, factor: float) -> str:
        """factor · x."""
        return x if factor == 1 else self.graph.add("Mul", x, self.graph.scalar(factor))
