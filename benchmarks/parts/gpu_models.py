"""Models of random weights on a GPU, without files: what benchmarks/gpu.py times and compares."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from batch import prompts
from numpy.typing import NDArray
from synthetic import Noise, SyntheticPlan, granite

from mpo_formats import Architecture, ModelSpec, Provenance, VectorSpec
from mpo_formats.layout import content_tensors
from mpo_runtime.backends.ops import PAGE
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.backends.triton import TritonOps
from mpo_runtime.engine.pages import PagePool
from mpo_runtime.engine.sequence import Part, Sequence, run_step
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.registry import decoder_for

# Larger than the second-level cache of any card.
FLUSHED = 512 << 20


def architecture_of(size: str) -> Architecture:
    """Granite's architecture at `8b` or `2b`, `small` to compare with the reference, or `dry` for the interpreter."""
    if size in ("8b", "2b"):
        return granite(size)
    plain = {"max_position_embeddings": 4096, "num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 64}
    if size == "small":
        plain |= {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    else:
        plain |= {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4}
        plain |= {"num_hidden_layers": 1, "max_position_embeddings": 128, "head_dim": 16}
    return replace(granite("tiny"), **plain)


class RandomWeights:
    """Random tensors of a plan, as a file has them; all blocks have the same, so that gigabytes take no time.

    Args:
        plan: as SyntheticPlan reads it.
    """

    def __init__(self, architecture: Architecture, plan: str) -> None:
        self.plan, layers = plan, SyntheticPlan.parse(plan)
        linears = tuple(layers.layer(name, rows, columns) for name, rows, columns, _ in architecture.linear_sizes())
        vectors = tuple(VectorSpec(name, size, "bf16") for name, size in architecture.vector_sizes())
        provenance = Provenance("random", None, "0" * 64, "benchmarks/gpu.py", {}, None)
        self.spec = ModelSpec(architecture, linears, vectors, (), provenance)
        self.tensors = {tensor.name: tensor for tensor in content_tensors(self.spec)}
        self.columns = {linear.name: linear.in_features for linear in linears}
        self.noise, self.made = Noise(0), dict[str, NDArray[Any]]()

    def array(self, name: str) -> NDArray[Any]:
        """The tensor of that name."""
        tensor, layer = self.tensors[name], re.sub(r"\.(\d+|transform)\.(weight|q\d|scale|core\d.*)$", "", name)
        key = re.sub(r"layers\.\d+\.", "", name) + str((tensor.shape, tensor.dtype))
        if key not in self.made:
            self.made[key] = self.noise.tensor(tensor, self.columns.get(layer, 1))
        return self.made[key]

    def dtype(self, name: str) -> str:
        """The tensor's element type."""
        return self.tensors[name].dtype

    def file(self, name: str) -> bytes | None:
        """No file is embedded."""
        return None

    def close(self) -> None:
        """Nothing is open."""

    def bytes_read(self) -> int:
        """Bytes of all tensors, which a step of one token reads: the embedding is the head, too."""
        return sum(tensor.size for tensor in self.tensors.values())


def triton_network(weights: Any, device: str, **options: Any) -> Decoder:
    """The model on the backend for GPUs."""
    return decoder_for(weights.spec.architecture, TritonOps(weights, device=device, **options))


def reference_network(weights: Any, device: str) -> Decoder:
    """The model on the reference, on the same device."""
    return decoder_for(weights.spec.architecture, ReferenceOps(weights, device=device, held=True))


def seconds_of(action: Callable[[], object], device: str) -> float:
    """Seconds of an action: of the device's work by its own events, on a CPU by the clock."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        action()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    action()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end)) / 1e3


class Cold:
    """Times actions on cold caches: a buffer larger than them is written before each."""

    def __init__(self, device: str, rounds: int) -> None:
        self.device, self.rounds = device, rounds
        self.buffer = torch.empty(FLUSHED if device.startswith("cuda") else 1, dtype=torch.uint8, device=device)

    def seconds(self, action: Callable[[], object]) -> float:
        """The median over the rounds; the first call, which compiles, does not count."""
        action()
        found = []
        for _ in range(self.rounds):
            self.buffer.zero_()
            found.append(seconds_of(action, self.device))
        return statistics.median(found)


class Contestant:
    """A model with texts whose KV cache holds the context that steps are timed at."""

    def __init__(self, plan: str, size: str, device: str, context: int, batches: tuple[int, ...]) -> None:
        self.plan, self.device = plan, device
        weights = RandomWeights(architecture_of(size), plan)
        self.bytes, self.spec = weights.bytes_read(), weights.spec
        self.network = triton_network(weights, device)
        self.pool = PagePool(self.network.ops.new_pages(self.network.architecture))
        self.texts = {count: self.at_context(count, context) for count in batches}
        self.times: dict[str, list[float]] = {}

    def at_context(self, count: int, length: int) -> list[Sequence]:
        """Texts that hold `length` tokens."""
        texts = [Sequence(self.pool) for _ in range(count)]
        for text, ids in zip(texts, prompts(count, length, self.network.architecture.vocab_size), strict=True):
            run_step(self.network, [Part(text, ids, few=False)], together=True)
        return texts

    def step(self, count: int) -> None:
        """Times a step of so many texts: from the host with its logits, and the recorded launches alone."""
        texts = self.texts[count]
        for text in texts:
            text.reserve(1)
        length = len(texts[0].held)
        parts = [Part(text, [1], few=True) for text in texts]
        self.add(f"step {count}", lambda: run_step(self.network, parts, together=True))
        store: Any = self.pool.store
        recorded = store.steps.find(count, length // PAGE + 1)
        self.add(f"replay {count}", lambda: recorded.launch(self.network.forward, self.network.logits))
        for text in texts:
            text.truncate(length)

    def prompt(self, length: int) -> None:
        """Times a prompt that is run at once."""
        ids, text = prompts(1, length, self.network.architecture.vocab_size)[0], Sequence(self.pool)
        self.add("prompt", lambda: run_step(self.network, [Part(text, ids, few=False)], together=True))
        text.release()

    def add(self, what: str, action: Callable[[], object]) -> None:
        """Times an action."""
        self.times.setdefault(what, []).append(seconds_of(action, self.device))

    def median(self, what: str) -> float:
        """The median of the rounds but the first, which compiles and records."""
        found = self.times[what]
        return statistics.median(found[1:] or found)
