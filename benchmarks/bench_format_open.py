"""Measures how long it takes, and how much memory, to open a `.mpo` file of the size of Granite 3.3 8B.

    python benchmarks/bench_format_open.py [--runs 20] [--out FILE]

The header is real, with a Quantized and an Mpo term in each of 281 layers; the tensors are a hole in a sparse file,
which opening never reads. Peak memory is Python's own (tracemalloc); growth of the process is its largest resident size
after the first opening less that before. Runs on Linux.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path

from parts.results import write_results

from mpo_formats import (
    Architecture,
    FileSpec,
    LinearSpec,
    ModelSpec,
    Mpo,
    MpoFile,
    Provenance,
    Quantized,
    Rope,
    VectorSpec,
)
from mpo_formats.container import write_header
from mpo_formats.layout import file_tensors
from mpo_formats.writer import spec_metadata

FACTORS = {1024: (32, 32), 4096: (64, 64), 12800: (128, 100), 49159: (49159, 1)}


def large_model() -> ModelSpec:
    """Granite 3.3 8B: every layer 4 bits with zeros and two int8 cores, the embedding truncated to 64 bonds."""
    architecture = Architecture(
        model_type="granite",
        vocab_size=49159,
        hidden_size=4096,
        intermediate_size=12800,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope=Rope(1e7, "default", 1.0, 0.0, 0.0, 0),
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=1 / 128,
        logits_scaling=16.0,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_ids=(0,),
        pad_token_id=0,
    )
    linears = tuple(
        LinearSpec(
            name,
            rows,
            columns,
            None,
            (
                Quantized(4, 64, True),
                Mpo(FACTORS[rows], FACTORS[columns], (64,), "int8", 64),
            ),
        )
        for name, rows, columns, _ in architecture.linear_sizes()
    )
    vectors = tuple(VectorSpec(name, size, "bf16") for name, size in architecture.vector_sizes())
    return ModelSpec(
        architecture,
        linears,
        vectors,
        (FileSpec("tokenizer.json", 2_100_000),),
        Provenance("granite-3.3-8b-instruct", None, "", "benchmarks/bench_format_open.py", {}, None),
    )


def write_sparse(path: Path, model: ModelSpec) -> tuple[int, int, int]:
    """Writes header and a hole for the tensors; returns the number of tensors, header bytes and file bytes."""
    tensors = file_tensors(model)
    header = write_header(spec_metadata(model), tensors)
    size = len(header) + sum(tensor.size for tensor in tensors)
    path.write_bytes(header)
    os.truncate(path, size)
    return len(tensors), len(header), size


def resident_kilobytes() -> int:
    """The largest resident size of this process so far (getrusage would include that of its parent)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0])


def measure(path: Path, runs: int) -> dict[str, float]:
    """Opens the file `runs` times; returns milliseconds and megabytes."""
    before = resident_kilobytes()
    MpoFile(path).close()
    growth = resident_kilobytes() - before
    wall, processor = [], []
    for _ in range(runs):
        start, start_processor = time.perf_counter(), time.process_time()
        with MpoFile(path):
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - start_processor)
    tracemalloc.start()
    with MpoFile(path):
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {
        "wall_ms_median": 1e3 * statistics.median(wall),
        "wall_ms_least": 1e3 * min(wall),
        "processor_ms_median": 1e3 * statistics.median(processor),
        "processor_ms_least": 1e3 * min(processor),
        "peak_mb": peak / 1e6,
        "process_growth_mb": growth * 1024 / 1e6,
    }


def main() -> None:
    """Prints one row per measured quantity, and writes them as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "large.mpo"
        tensors, header, size = write_sparse(path, large_model())
        result = {"tensors": tensors, "header_bytes": header, "file_bytes": size, **measure(path, options.runs)}
    for name, value in result.items():
        print(f"{name:22} {value:,.1f}" if isinstance(value, float) else f"{name:22} {value:,}")
    write_results(options.out, [result], load=os.getloadavg()[0])


if __name__ == "__main__":
    main()
