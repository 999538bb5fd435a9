"""Time and memory of one healing step of compressed models beside a training step of the dense one, at the same batch.

    python benchmarks/healing.py --cost                              # of granite-nano, on the CPU
    python benchmarks/healing.py --cost --size 2b --device cuda      # of random weights, on a GPU

Each is measured in a process of its own; this file is that process's program. The peak is the memory of the whole process less
what it held before the model was built; on a GPU, the memory that torch allocated there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from parts.heal_rows import of_parameters, uniform
from parts.machine import device_name
from parts.results import write_results
from quality import Bench, Kept
from synthetic import SyntheticPlan, write_layers, write_synthetic
from torch import Tensor, nn

from mpo_exporter.export import ExportTask, export
from mpo_exporter.fit.layer import Method
from mpo_exporter.heal.ops import HealingOps
from mpo_exporter.heal.settings import Settings
from mpo_exporter.heal.student import Batch, Student
from mpo_exporter.heal.teacher import matched_blocks
from mpo_exporter.heal.train import STEPS_BEFORE_GRAPH, Trainer
from mpo_exporter.heal.trainable import Trainables, Vector
from mpo_exporter.heal.workers import Workers
from mpo_exporter.plan.options import Options
from mpo_exporter.source import find_source, open_source
from mpo_formats import LinearSpec
from mpo_runtime.layers.linear import Linear, MatrixTerm, float_tensor
from mpo_runtime.loading import open_weights
from mpo_runtime.memory import peak_memory
from mpo_runtime.models.registry import decoder_for
from mpo_runtime.weights.protocol import Weights

STEPS = 5


class DenseLayer(nn.Module):
    """A matrix in training, in float32."""

    def __init__(self, weights: Weights, name: str) -> None:
        super().__init__()
        self.spec = weights.spec.linear(name)
        self.values = nn.Parameter(float_tensor(weights, f"{name}.0.weight").clone())

    def linear(self, chi: int | None) -> Linear:
        """The layer with its present weights."""
        return Linear(self.spec, [MatrixTerm.of(self.values)], None)


class DenseTrainables(nn.Module):
    """Every weight of the dense model, with the interface of what healing trains."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        spec = weights.spec
        self.layers = {one.name: DenseLayer(weights, one.name) for one in spec.linears}
        self.vectors = {one.name: Vector(weights, f"{one.name}.weight", one.dtype) for one in spec.vectors}
        self.parts = nn.ModuleList([*self.layers.values(), *self.vectors.values()])

    def learning(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yields (kind, parameter, unit of its learning rate)."""
        for layer in self.layers.values():
            yield "core", layer.values, 1e-3
        for vector in self.vectors.values():
            yield from vector.learning()


def measure(
    weights: Weights, trainables: Any, batch: int, window: int, recompute: bool, device: str = "cpu"
) -> dict[str, float]:
    """Median seconds of a step, on the clock and on all processors (which other programs disturb less); numbers trained."""
    trainables.to(device)
    ops = HealingOps(weights, device)
    model = decoder_for(weights.spec.architecture, ops)
    settings, architecture = Settings(), weights.spec.architecture
    blocks = matched_blocks(architecture.num_hidden_layers, settings.match_blocks)
    matched = {block: torch.ones(architecture.hidden_size, device=device) for block in blocks}
    student = Student(model, ops, trainables, cross_entropy=0.0, recompute=recompute, matched=matched)
    trainer = Trainer(student, trainables, settings, Workers(device=device))
    source, vocabulary = torch.Generator().manual_seed(0), architecture.vocab_size
    ids = torch.randint(0, vocabulary, (batch, window), generator=source)
    chosen = torch.stack([torch.randperm(vocabulary, generator=source)[: settings.top_k] for _ in range(window - 1)])
    scores = (torch.randn(batch, window - 1, settings.top_k, generator=source).log_softmax(-1) - 0.2).float()
    weight = torch.full((batch, window - 1), 1 / (batch * (window - 1)))
    states = torch.randn(batch, window - 1, len(blocks), architecture.hidden_size, generator=source)
    tensors = (ids[:, :-1], ids[:, 1:], weight, scores, chosen.expand(batch, -1, -1).contiguous(), states)
    part = Batch(*(tensor.to(device) for tensor in tensors))
    seconds, busy = [], []
    first = STEPS_BEFORE_GRAPH + 1 if trainer.graphs else 1  # not measured
    for _ in range(first + STEPS):
        begin, worked = time.perf_counter(), time.process_time()
        trainer.step([part], 0.5, None, "a step")
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
        busy.append(time.process_time() - worked)
    count = sum(parameter.numel() for _, parameter, _ in trainables.learning())
    return {
        "seconds": statistics.median(seconds[first:]),
        "processor_seconds": statistics.median(busy[first:]),
        "trained": count,
    }


def child(asked: dict[str, Any]) -> dict[str, float]:
    """Measures one model in this process."""
    torch.set_num_threads(asked["threads"])
    held = peak_memory()
    sizes = asked["batch"], asked["window"], asked["recompute"], asked["device"]
    weights = open_weights(asked["file"])
    names = [one.name for one in (*weights.spec.linears, *weights.spec.vectors)]
    dense = DenseTrainables(weights) if asked["dense"] else None
    result = measure(weights, dense or Trainables(weights, names, moving=asked["codes"]), *sizes)
    on_gpu = asked["device"].startswith("cuda")
    return result | {"peak_bytes": float(torch.cuda.max_memory_allocated() if on_gpu else peak_memory() - held)}


def written(arguments: argparse.Namespace, source: Weights, layers: tuple[LinearSpec, ...], path: Path) -> None:
    """Writes a file of these layers: of the source, or of random weights where a size was asked for."""
    if arguments.size:
        write_layers(arguments.size, layers, path)
    else:
        with open_source(arguments.model) as dense:
            export(dense, ExportTask(path, Options("int4"), layers=layers, method=Method("nearest", "svd"), force=True))


def run(arguments: argparse.Namespace) -> None:
    """Prints the table, and writes it to the file of --out."""
    dense = find_source(arguments.model).folder
    if arguments.size:
        dense = arguments.rows.parent / f"cost-{arguments.size}-dense.mpo"
        write_synthetic(arguments.size, SyntheticPlan.parse("dense"), dense)
    source = open_weights(dense)
    # Speed and memory do not depend on how well a file is fitted: no calibration.
    bench = Bench(source, None, 0, None, Kept(arguments.rows))  # type: ignore[arg-type]
    integer = tuple(uniform(source.spec.linears, 3, 64))
    files: dict[str, tuple[Any, bool]] = {
        "3 bits, scales and norms": (integer, False),
        "3 bits, codes too": (integer, True),
        "fp16 cores (balanced), 30 % of the parameters": (of_parameters(0.3, balanced=True)(bench), False),
        "fp16 cores (O,1)×(1,I), 30 % of the parameters": (of_parameters(0.3, balanced=False)(bench), False),
    }
    asked = {
        "file": str(dense),
        "dense": True,
        "codes": False,
        "batch": 4,
        "window": 256,
        "recompute": False,
        "threads": arguments.threads or torch.get_num_threads(),
        "device": arguments.device,
    }
    rows = {"dense training": start(asked)}
    for number, (name, (layers, codes)) in enumerate(files.items()):
        path = arguments.rows.parent / f"cost-{number}.mpo"
        written(arguments, source, layers, path)
        rows[name] = start(asked | {"file": str(path), "dense": False, "codes": codes})
        path.unlink()
        print(markdown(rows).splitlines()[-1], flush=True)
    print(markdown(rows))
    if arguments.size:
        dense.unlink()
    named = [{"trained_part": name, **row} for name, row in rows.items()]
    write_results(arguments.out, named, device=device_name(arguments.device), asked=asked | {"file": dense.name})


def start(asked: dict[str, Any]) -> dict[str, float]:
    """Measures in a process of its own."""
    done = subprocess.run([sys.executable, __file__, json.dumps(asked)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def markdown(rows: dict[str, dict[str, float]]) -> str:
    """The rows as a Markdown table; ratios are to the first row."""
    lines = [
        "| | numbers trained | seconds a step | of dense | processor seconds | of dense | peak MB | of dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    dense = next(iter(rows.values()))
    for name, row in rows.items():
        lines.append(
            f"| {name} | {int(row['trained']):,} | {row['seconds']:.3f} | {row['seconds'] / dense['seconds']:.2f} | "
            f"{row['processor_seconds']:.3f} | {row['processor_seconds'] / dense['processor_seconds']:.2f} | "
            f"{row['peak_bytes'] / 1e6:.0f} | {row['peak_bytes'] / dense['peak_bytes']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    print(json.dumps(child(json.loads(sys.argv[1]))))
