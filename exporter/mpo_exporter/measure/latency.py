"""The decoding time of a layer on this machine: the native kernels are timed once for each shape, and cached.

An entry is the time of one layer for one token. Copies of the layer are run in turn, as many as exceed the CPU's caches just
as the whole model would; the fastest of several passes counts, since other programs may use the machine. The rest of a
decoding step (norms, attention, KV cache) is timed on models of one and of three blocks of the same sizes. A table is valid
for one CPU, instruction set, number of threads and version.
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

from mpo_exporter.measure.cache import Cached, CacheFile
from mpo_exporter.progress import Log, Progress, no_log, silent
from mpo_exporter.terms import Candidate
from mpo_formats import Architecture, ConfigError, LinearSpec, ModelSpec, Provenance, Quantized, VectorSpec
from mpo_formats.codec import to_json
from mpo_formats.layout import TensorSpec, content_tensors, linear_bytes, linear_tensors
from mpo_runtime import native

# Bytes of all copies of a layer together: a model of this size or more is read from memory for every token.
WORKING_SET = 1 << 26
MOST_COPIES, PASSES = 256, 7
# Positions in the KV cache and tokens timed for the rest of a step.
CONTEXT, TOKENS = 64, 8
NOISE = 1 << 20


@dataclass(slots=True)
class Noise:
    """Weights of any spec to time kernels with: random codes, small scales and floats."""

    spec: ModelSpec
    tensors: dict[str, TensorSpec]
    codes: NDArray[np.uint8] = field(default_factory=lambda: np.random.default_rng(0).integers(0, 256, NOISE, np.uint8))

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name, in new memory at each call, as another layer would have."""
        tensor = self.tensors[name]
        if tensor.dtype == "u8":
            return np.resize(self.codes, tensor.shape)
        kind, value = {"f32": (np.float32, 1e-3), "f16": (np.float16, 1e-3), "bf16": (np.uint16, 0x3A80)}[tensor.dtype]
        return np.full(tensor.shape, value, kind)

    def dtype(self, name: str) -> str:
        """The tensor's element type."""
        return self.tensors[name].dtype

    def file(self, name: str) -> bytes | None:
        """None: no file is embedded."""
        return None

    def close(self) -> None:
        """Does nothing: no file is open."""


@dataclass(slots=True)
class Latency:
    """Seconds of layers for one token, by their sizes and terms, and of the rest of a step, by the model's sizes.

    `measured` counts the entries that are not cached yet.
    """

    spec: ModelSpec
    working_set: int
    seconds: dict[str, float]
    rests: dict[str, list[float]]
    progress: Progress = silent
    measured: int = 0

    def layer(self, linear: LinearSpec) -> float:
        """Seconds of a layer for one token, from the table or timed now."""
        key = signature(linear)
        if key not in self.seconds:
            self.seconds[key] = time_layer(linear, self.spec, self.working_set)
            self.measured += 1
        return self.seconds[key]

    def fill(self, linears: Iterable[LinearSpec]) -> None:
        """Times all layers that are not in the table."""
        missing = {signature(linear): linear for linear in linears if signature(linear) not in self.seconds}
        for number, linear in enumerate(missing.values(), 1):
            self.layer(linear)
            self.progress("timing kernels", number, len(missing))

    def token(self, spec: ModelSpec) -> float:
        """Seconds of one decoded token of a model: its matrix products and the rest of the step."""
        key = rest_key(spec.architecture)
        if key not in self.rests:
            self.rests[key] = time_rest(spec, self)
            self.measured += 1
        each, once = self.rests[key]
        return once + each * spec.architecture.num_hidden_layers + sum(self.layer(one) for one in multiplied(spec))


def multiplied(spec: ModelSpec) -> list[LinearSpec]:
    """The layers that multiply a token's state: all but an embedding that is not the head too."""
    return list(spec.linears if spec.architecture.tie_word_embeddings else spec.linears[1:])


def signature(linear: LinearSpec) -> str:
    """A layer's sizes and terms as a key."""
    return f"{linear.out_features}x{linear.in_features} {to_json([asdict(term) for term in linear.terms])}"


def rest_key(architecture: Architecture) -> str:
    """The sizes that the time of norms, attention and KV cache depends on, as a key."""
    parts = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size", "vocab_size")
    return " ".join(str(getattr(architecture, part)) for part in parts)


def machine_key() -> dict[str, Any]:
    """What a table is valid for: CPU, kernels, threads and version."""
    from mpo_runtime import __version__

    return {"version": __version__, "cpu": cpu_name(), **native.active()}


def cpu_name() -> str:
    """The CPU's name and the number of cores that this process may use."""
    table = Path("/proc/cpuinfo")
    rows = table.read_text(encoding="utf-8").splitlines() if table.exists() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith(("model name", "CPU part"))]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{names[0] if names else platform.processor() or platform.machine()}, {cores} cores"


def latency_file(working_set: int) -> CacheFile:
    """The cache file of this machine's table."""
    return CacheFile("latency", platform.machine() or "cpu", (f"{working_set:x}",), machine_key())


def working_set_of(spec: ModelSpec) -> int:
    """About the bytes read per decoded token of this model, rounded up to a power of two, at most 64 MiB."""
    size = sum(linear.out_features * linear.in_features for linear in spec.linears) // 2
    return min(1 << max(size, 1).bit_length(), WORKING_SET)


def open_table(spec: ModelSpec, *, progress: Progress = silent, log: Log = no_log) -> Latency:
    """The cached table of this machine for models of about this size; empty if nothing was measured yet.

    Raises:
        ConfigError: if no native kernels were built: there is nothing else worth timing.
    """
    if not native.available():
        raise ConfigError(
            f"latency: there are no native kernels to time here ({native.active()['native']}); plan without --for-speed"
        )
    working_set = working_set_of(spec)
    cached = latency_file(working_set).read(log)
    content = {"seconds": {}, "rests": {}} if cached is None else cached.content
    return Latency(spec, working_set, content["seconds"], content["rests"], progress)


def save_table(table: Latency, log: Log = no_log) -> None:
    """Caches a table if anything was added to it."""
    if table.measured:
        log(f"latency: timed {table.measured} shapes on this machine, cached for the next plan")
        latency_file(table.working_set).write(Cached({"seconds": table.seconds, "rests": table.rests}), log)
        table.measured = 0


def time_layer(linear: LinearSpec, spec: ModelSpec, working_set: int) -> float:
    """Seconds of a layer for one token: of the fastest of several passes over all its copies."""
    from mpo_runtime.layers.native import load_linear

    noise = Noise(spec, {tensor.name: tensor for tensor in linear_tensors(linear)})
    copies = min(max(1, -(-working_set // max(linear_bytes(linear), 1))), MOST_COPIES)
    run = native.timed_pass([load_linear(noise, linear, chi=None) for _ in range(copies)])
    times = [run() for _ in range(PASSES + 1)]
    return min(times[1:]) / copies  # the first pass warms up


def time_rest(spec: ModelSpec, table: Latency) -> list[float]:
    """Seconds of a decoding step besides its matrix products: for each block, and once per step."""
    short, long = (small_model(spec, blocks) for blocks in (1, 3))
    seconds = [time_step(model) - sum(table.layer(one) for one in multiplied(model)) for model in (short, long)]
    each = max((seconds[1] - seconds[0]) / 2, 0.0)
    return [each, max(seconds[0] - each, 0.0)]


def small_model(spec: ModelSpec, blocks: int) -> ModelSpec:
    """A model of the same sizes with few blocks, in 4-bit integers where a group divides the row."""
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
    """Seconds of one decoded token of a model of random weights: the fastest of several, after a short prompt."""
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
    """The candidates of a layer that take no longer on this machine than `plain`, the same layer in int4."""
    most = table.layer(plain)
    seconds = {one.terms: table.layer(one.stored(linear)) for one in candidates}
    kept = [one for one in candidates if seconds[one.terms] <= most]
    # Rows that no group divides have no integer candidate: take the fastest of the others.
    return kept or [min(candidates, key=lambda one: seconds[one.terms])]
