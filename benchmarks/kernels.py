"""Matrix-vector products of every width against the read bandwidth of the same moment.

    python benchmarks/kernels.py [--rows 4096 --columns 4096] [--threads 2] [--batch 1] [--out results.json]

Each kernel runs over distinct matrices of together half a gigabyte, so that weights come from memory and not from a
cache. Every round measures the plain read and then each kernel, so that a busy moment hits all of them; shares are medians
over rounds of kernel over read. Codes are random. Where torch is installed, its int4 kernel and a bf16 product take part.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from parts.results import write_results

from mpo_formats import Dense, LinearSpec, Mpo, Quantized, Term
from mpo_formats.layout import linear_bytes, linear_tensors
from mpo_runtime import native
from mpo_runtime.bench.meters import read_bandwidth
from mpo_runtime.layers.native import load_linear

TOTAL_BYTES = 1 << 29
WIDTHS = (8, 6, 5, 4, 3, 2)
NUMBERS = {"f16": (np.float16, 1e-3), "bf16": (np.uint16, 0x3A80)}


@dataclass
class Entrant:
    """One kernel over its matrices; `run` does one pass and returns its seconds."""

    name: str
    bytes: int
    run: Callable[[], float]
    speeds: list[float] = field(default_factory=list)


class RandomWeights:
    """The tensors of one layer, new memory at every call: random codes, constant scales and floats."""

    def __init__(self, linear: LinearSpec) -> None:
        self.tensors = {tensor.name: tensor for tensor in linear_tensors(linear)}

    def array(self, name: str) -> np.ndarray[Any, Any]:
        tensor = self.tensors[name]
        if tensor.dtype == "u8":
            return np.random.default_rng(0).integers(0, 256, tensor.shape, np.uint8)
        kind, value = NUMBERS[tensor.dtype]
        return np.full(tensor.shape, value, kind)

    def dtype(self, name: str) -> str:
        return self.tensors[name].dtype


def native_entrant(name: str, terms: tuple[Term, ...], arguments: argparse.Namespace) -> Entrant:
    """The native kernels of a layer's terms over as many copies of it as fill TOTAL_BYTES."""
    linear = LinearSpec("layer", arguments.rows, arguments.columns, None, terms)
    count = max(2, TOTAL_BYTES // linear_bytes(linear))
    layers = [load_linear(RandomWeights(linear), linear, chi=None) for _ in range(count)]
    run = native.timed_pass(layers, tokens=arguments.batch, exact=arguments.activations == "float")
    return Entrant(name, count * linear_bytes(linear), run)


def native_entrants(arguments: argparse.Namespace) -> Iterator[Entrant]:
    """Every width and group, 4 bits with int8 low-rank cores beside them, and bf16."""
    for bits in WIDTHS:
        for group in arguments.groups:
            yield native_entrant(f"{bits} bits, group {group}", (Quantized(bits, group, False),), arguments)
    cores = Mpo((arguments.rows, 1), (1, arguments.columns), (32,), "int8", 64)
    yield native_entrant("4 bits, group 32, χ=32 int8 cores", (Quantized(4, 32, False), cores), arguments)
    yield native_entrant("bf16", (Dense("bf16"),), arguments)


def torch_entrants(arguments: argparse.Namespace) -> Iterator[Entrant]:
    """torch's own int4 and bf16 products, where torch is there."""
    if importlib.util.find_spec("torch") is None:
        return
    import torch

    torch.set_num_threads(arguments.threads)
    rows, columns = arguments.rows, arguments.columns
    x = torch.randn(arguments.batch, columns).to(torch.bfloat16)
    each = rows * columns // 2 + rows * columns // 32 * 4
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.full((columns // 32, rows, 2), 1e-3, dtype=torch.bfloat16)
    copies = [(packed.clone(), scales.clone()) for _ in range(max(2, TOTAL_BYTES // each))]

    def int4() -> float:
        start = time.perf_counter()
        for weight, scale in copies:
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 32, scale)
        return time.perf_counter() - start

    yield Entrant("torch int4, group 32", len(copies) * each, int4)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All rounds of all entrants."""
    native.set_threads(arguments.threads)
    entrants = [*native_entrants(arguments), *torch_entrants(arguments)]
    reads: list[float] = []
    for index in range(arguments.rounds + 1):
        read = read_bandwidth(arguments.threads)
        for entrant in entrants:
            speed = entrant.bytes / 1e9 / entrant.run()
            if index:  # the first round warms up
                entrant.speeds.append(speed)
        if index:
            reads.append(read)
    rows = [
        {
            "kernel": entrant.name,
            "gigabytes_per_second": statistics.median(entrant.speeds),
            "share_of_bandwidth": statistics.median(
                speed / read for speed, read in zip(entrant.speeds, reads, strict=True)
            ),
        }
        for entrant in entrants
    ]
    shape = {"rows": arguments.rows, "columns": arguments.columns, "batch": arguments.batch}
    settings = {"threads": arguments.threads, "activations": arguments.activations, "rounds": arguments.rounds}
    read = statistics.median(reads)
    active = native.active()
    return {"matrix": shape, **settings, "kernels": active, "read": read, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--activations", choices=("int8", "float"), default="int8")
    parser.add_argument("--out", type=Path, help="JSON")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(f"reads at {result['read']:.1f} GB/s; kernels {result['kernels']}\n")
    print("| kernel | GB/s | of the read bandwidth |\n|---|---|---|")
    for row in result["rows"]:
        print(f"| {row['kernel']} | {row['gigabytes_per_second']:.1f} | {row['share_of_bandwidth']:.2f} |")
    write_results(arguments.out, **result)


if __name__ == "__main__":
    main()
