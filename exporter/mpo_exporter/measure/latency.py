"""What a layer costs in time on this machine: the native kernels are timed once for each shape and kept.

Every entry is one layer applied to one token, copies of it in turns until they exceed the caches as the whole model would;
the fastest of some passes, as others may use the machine. What a token takes besides its layers (norms, attention, the
cache) is timed on models of one and of three blocks of the same sizes. A table belongs to one CPU, level of kernels, number
of threads and version.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpo_exporter.measure.cache import Kept, Shelf, Tell, untold
from mpo_exporter.progress import Progress, silent
from mpo_exporter.terms import Candidate
from mpo_formats import Architecture, ConfigError, LinearSpec, ModelSpec, Provenance, Quantized, VectorSpec
from mpo_formats.codec import to_json
from mpo_formats.layout import TensorSpec, content_tensors, linear_bytes, linear_tensors
from mpo_runtime import native

# Bytes that copies of a layer take together: a model of this size or more is read from memory at every token.
WORKING_SET = 1 << 26
MOST_COPIES, PASSES = 256, 7
# Positions in the cache and tokens timed for what a step takes besides its layers.
CONTEXT, TOKENS = 64, 8
NOISE = 1 << 20


@dataclass(slots=True)
class Noise:
    """Weights of any spec, with values that no kernel chokes on: codes at random, scales and floats small."""

    spec: ModelSpec
    tensors: dict[str, TensorSpec]
    codes: NDArray[np.uint8] = field(default_factory=lambda: np.random.default_rng(0).integers(0, 256, NOISE, np.uint8))

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name; each call gives other memory, as another layer would have."""
        tensor = self.tensors[name]
        if tensor.dtype == "u8":
            return np.resize(self.codes, tensor.shape)
        kind, value = {"f32": (np.float32, 1e-3), "f16": (np.float16, 1e-3), "bf16": (np.uint16, 0x3A80)}[tensor.dtype]
        return np.full(tensor.shape, value, kind)

    def dtype(self, name: str) -> str:
        """Its element type."""
        return self.tensors[name].dtype

    def file(self, name: str) -> bytes | None:
        """No file is embedded."""
        return None

    def close(self) -> None:
        """Nothing to give back."""


@dataclass(slots=True)
class Latency:
    """Seconds of a layer for one token, by its sizes and terms, and of a step's rest, by the model's sizes."""

    spec: ModelSpec
    working_set: int
    seconds: dict[str, float]
    rests: dict[str, list[float]]
    progress: Progress = silent
    measured: int = 0

    def layer(self, linear: LinearSpec) -> float:
        """Seconds of one token, from the table or timed now."""
        key = signature(linear)
        if key not in self.seconds:
            self.seconds[key] = time_layer(linear, self.spec, self.working_set)
            self.measured += 1
        return self.seconds[key]

    def fill(self, linears: Iterable[LinearSpec]) -> None:
        """Times all layers that the table does not have."""
        missing = {signature(linear): linear for linear in linears if signature(linear) not in self.seconds}
        for number, linear in enumerate(missing.values(), 1):
            self.layer(linear)
            self.progress("timing kernels", number, len(missing))

    def token(self, spec: ModelSpec) -> float:
        """Seconds of one decoded token of a model: its layers, without the lookup of the embedding, and the rest."""
        key = rest_key(spec.architecture)
        if key not in self.rests:
            self.rests[key] = time_rest(spec, self)
            self.measured += 1
        each, once = self.rests[key]
        return once + each * spec.architecture.num_hidden_layers + sum(self.layer(one) for one in multiplied(spec))


def multiplied(spec: ModelSpec) -> list[LinearSpec]:
    """The layers that a token is multiplied with: all but an embedding that is only looked up."""
    return list(spec.linears if spec.architecture.tie_word_embeddings else spec.linears[1:])


def signature(linear: LinearSpec) -> str:
    """A layer's sizes and terms as a key."""
    return f"{linear.out_features}x{linear.in_features} {to_json([asdict(term) for term in linear.terms])}"


def rest_key(architecture: Architecture) -> str:
    """What the time of norms, attention and cache depends on."""
    parts = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
    return " ".join(str(getattr(architecture, part)) for part in parts)


def machine_key() -> dict[str, Any]:
    """What a table belongs to: CPU, kernels, threads and version."""
    from mpo_runtime import __version__

    return {"version": __version__, "cpu": cpu_name(), **native.active()}


def cpu_name() -> str:
    """The CPU as the system names it, with the number of its cores that this process may use."""
    table = Path("/proc/cpuinfo")
    rows = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith(("model name", "CPU part"))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def latency_shelf(working_set: int) -> Shelf:
    """Where the table of this machine is kept."""
    return Shelf("latency", platform.machine() or "cpu", (f"{working_set:x}",), machine_key())


def working_set_of(spec: ModelSpec) -> int:
    """The bytes that a decoded token of about this model touches, as a power of two, at most 64 MiB."""
    size = sum(linear.out_features * linear.in_features for linear in spec.linears) // 2
    return min(1 << max(size, 1).bit_length(), WORKING_SET)


def open_table(spec: ModelSpec, *, progress: Progress = silent, tell: Tell = untold) -> Latency:
    """The table of this machine for models of about this size, as far as it was measured.

    Raises:
        ConfigError: where no native kernels were built: numpy's speed says nothing about them.
    """
    if not native.available():
        raise ConfigError(
            f"latency: there are no native kernels to time here ({native.active()['native']}); plan without --for-speed"
        )
    working_set = working_set_of(spec)
    kept = latency_shelf(working_set).read(tell)
    content = {"seconds": {}, "rests": {}} if kept is None else kept.content
    return Latency(spec, working_set, content["seconds"], content["rests"], progress)


def keep_table(table: Latency, tell: Tell = untold) -> None:
    """Keeps a table where anything was added to it."""
    if table.measured:
        tell(f"latency: timed {table.measured} shapes on this machine, kept for the next plan")
        latency_shelf(table.working_set).write(Kept({"seconds": table.seconds, "rests": table.rests}), tell)
        table.measured = 0


def time_layer(linear: LinearSpec, spec: ModelSpec, working_set: int) -> float:
    """Seconds of one token in one of several copies of a layer: the fastest of some passes over all copies."""
    from mpo_runtime.layers.native import load_linear

    noise = Noise(spec, {tensor.name: tensor for tensor in linear_tensors(linear)})
    copies = min(max(1, -(-working_set // max(linear_bytes(linear), 1))), MOST_COPIES)
    run = native.timed_pass([load_linear(noise, linear, chi=None) for _ in range(copies)])
    times = [run() for _ in range(PASSES + 1)]
    return min(times[1:]) / copies  # the first pass warms up


def time_rest(spec: ModelSpec, table: Latency) -> list[float]:
    """Seconds that a decoding step takes besides its layers: for each block, and once."""
    short, long = (small_model(spec, blocks) for blocks in (1, 3))
    seconds = [time_step(model) - sum(table.layer(one) for one in multiplied(model)) for model in (short, long)]
    each = max((seconds[1] - seconds[0]) / 2, 0.0)
    return [each, max(seconds[0] - each, 0.0)]


def small_model(spec: ModelSpec, blocks: int) -> ModelSpec:
    """A model of the same sizes with few blocks, in integers of 4 bits where a group divides the row."""
    architecture = replace(spec.architecture, num_hidden_layers=blocks)
    term = Quantized(4, 16, False)
    dense = spec.linears[0].terms
    linears = tuple(
        LinearSpec(name, rows, columns, "f32" if bias else None, dense if columns % 16 else (term,))
        for name, rows, columns, bias in architecture.linear_sizes()
    )
    vectors = tuple(VectorSpec(name, size, "f32") for name, size in architecture.vector_sizes())
    return ModelSpec(architecture, linears, vectors, (), Provenance("noise", None, "0" * 64, "latency", {}, None))


def time_step(spec: ModelSpec) -> float:
    """Seconds of one decoded token of a model of noise: the fastest of some, after a short prompt."""
    from mpo_runtime.loading import load_network

    network = load_network(Noise(spec, {tensor.name: tensor for tensor in content_tensors(spec)}), backend="native")
    context = min(CONTEXT, spec.architecture.max_position_embeddings)
    cache = network.ops.new_cache(network.architecture, 1, context)
    network.hidden(network.ops.ids([[0] * (context - TOKENS)]), cache, [context - TOKENS])
    times = []
    for _ in range(TOKENS):
        start = time.perf_counter()
        network.logits(network.hidden(network.ops.ids([[0]]), cache, [1])[:, -1:])
        times.append(time.perf_counter() - start)
    return min(times[1:])


def no_slower_than(
    table: Latency, linear: LinearSpec, candidates: Sequence[Candidate], plain: LinearSpec
) -> list[Candidate]:
    """The candidates of a layer that take no longer on this machine than the same layer in plain int4."""
    most = table.layer(plain)
    seconds = {one.terms: table.layer(replace(linear, terms=one.terms)) for one in candidates}
    kept = [one for one in candidates if seconds[one.terms] <= most]
    # Rows that no group divides have no integers at all: then the fastest of what there is.
    return kept or [min(candidates, key=lambda one: seconds[one.terms])]
