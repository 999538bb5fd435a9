"""Matrix-vector products of every width against the read bandwidth of the same moment.

    python benchmarks/kernels.py [--rows 4096 --columns 4096] [--threads 2] [--batch 1] [--out results.json]

Each kernel runs over distinct matrices of together half a gigabyte, so that weights come from memory and not from a
cache. Every round measures the plain read and then each kernel, so that a busy moment hits all of them; shares are medians
over rounds of kernel over read. Codes are random. Where torch is installed, its int4 kernel and a bf16 product take part.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from parts.machine import describe_machine, read_bandwidth

import mpo_runtime._native as native
from mpo_formats.layout import PLANES
from mpo_runtime import kernels

TOTAL_BYTES = 1 << 29
WIDTHS = (8, 6, 5, 4, 3, 2)


@dataclass
class Entrant:
    """One kernel over its matrices; `run` does one pass."""

    name: str
    bytes: int
    run: Callable[[], object]
    speeds: list[float] = field(default_factory=list)


def pool_bytes(size: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Random bytes."""
    return np.random.default_rng(0).integers(0, 256, size, np.uint8)


def program_over(layers: list[native.Linear], columns: int, exact: bool) -> native.Program:
    """One native program that applies every layer to the same input."""
    program = native.Program(exact)
    x = program.input(columns)
    result = 0
    for layer in layers:
        result = program.linear(x, layer)
    program.finish(result)
    return program


def integer_entrant(bits: int, group: int, arguments: argparse.Namespace, chi: int = 0) -> Entrant:
    """The integer kernel of one width, perhaps with int8 low-rank cores of bond χ beside it."""
    rows, columns = arguments.rows, arguments.columns
    sizes = [rows * columns * plane // 8 for plane in PLANES[bits]]
    scales = rows * columns // group * 2
    each = sum(sizes) + scales + chi * (rows + columns)
    count = max(2, TOTAL_BYTES // each)
    layers = []
    for index in range(count):
        planes = [pool_bytes(size) for size in sizes]
        scale = np.full(scales // 2, 1e-3, np.float16).view(np.uint8)
        matrix = native.Matrix.integer(f"layer {index}", bits, rows, columns, group, planes, scale, None)
        operators = [low_rank(rows, columns, chi)] if chi else []
        layers.append(native.Linear(f"layer {index}", rows, columns, [matrix], operators, None))
    name = f"{bits} bits, group {group}" + (f", χ={chi} int8 cores" if chi else "")
    exact = arguments.activations == "float"
    return Entrant(name, count * each, runner(program_over(layers, columns, exact), arguments))


def low_rank(rows: int, columns: int, chi: int) -> native.Operator:
    """int8 cores of the shape (O, 1) × (1, I)."""
    cores = []
    for left, right, out, inner in ((1, chi, rows, 1), (chi, 1, 1, columns)):
        size = out * inner
        scale = np.full(chi * size // 64, 1e-3, np.float16).view(np.uint8)
        matrix = native.Matrix.integer("core", 8, chi, size, 64, [pool_bytes(chi * size)], scale, None)
        cores.append(native.Core(matrix, left, right, out, inner, left))
    return native.Operator(cores, True, 1 << 30)


def dense_entrant(arguments: argparse.Namespace) -> Entrant:
    """The bf16 kernel of this runtime."""
    rows, columns = arguments.rows, arguments.columns
    each = rows * columns * 2
    count = max(2, TOTAL_BYTES // each)
    content = np.full(rows * columns, 0x3A80, np.uint16).view(np.uint8)
    layers = []
    for index in range(count):
        matrix = native.Matrix.dense(f"layer {index}", "bf16", rows, columns, content.copy())
        layers.append(native.Linear(f"layer {index}", rows, columns, [matrix], [], None))
    return Entrant("bf16", count * each, runner(program_over(layers, columns, False), arguments))


def runner(program: native.Program, arguments: argparse.Namespace) -> Callable[[], object]:
    """A call of the program on a fixed batch."""
    x = np.random.default_rng(1).standard_normal((1, arguments.batch, arguments.columns)).astype(np.float32)
    out = np.empty((1, arguments.batch, arguments.rows), np.float32)
    return lambda: program.run(None, [x], None, out)


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

    def int4() -> None:
        for weight, scale in copies:
            torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, 32, scale)

    yield Entrant("torch int4, group 32", len(copies) * each, int4)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures all rounds of all entrants."""
    kernels.set_threads(arguments.threads)
    entrants = [integer_entrant(bits, group, arguments) for bits in WIDTHS for group in arguments.groups]
    entrants += [integer_entrant(4, 32, arguments, chi=32), dense_entrant(arguments), *torch_entrants(arguments)]
    reads: list[float] = []
    for index in range(arguments.rounds + 1):
        read = read_bandwidth(arguments.threads)
        for entrant in entrants:
            start = time.perf_counter()
            entrant.run()
            speed = entrant.bytes / 1e9 / (time.perf_counter() - start)
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
    machine = asdict(describe_machine())
    read = statistics.median(reads)
    today = datetime.date.today().isoformat()
    active = kernels.active()
    return {"date": today, **shape, **settings, "machine": machine, "kernels": active, "read": read, "results": rows}


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
    for row in result["results"]:
        print(f"| {row['kernel']} | {row['gigabytes_per_second']:.1f} | {row['share_of_bandwidth']:.2f} |")
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
