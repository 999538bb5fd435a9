"""Errors of the fits at half the parameters, and what each fit takes per matrix size.

    python benchmarks/fits.py [MODEL] [--calib FILE] [--windows 96] [--share 0.5] [--out benchmarks/results/DATE-fits.json]
    python benchmarks/fits.py --sizes [--cap 60] [--budget 540] [--out ...]

The first fits every attention and MLP matrix of a model (`demo`, a folder or a hub id) by every method and prints the
medians of the errors √(tr[(W−Ŵ)C(W−Ŵ)ᵀ] / tr[W C Wᵀ]), C from the calibration text in the dense model. The second times
the fits on synthetic matrices, each in a process of its own, and gives its peak memory above the inputs'.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from parts.results import write_results

from mpo_exporter.calibrate.moments import Moment, dense_matrix
from mpo_exporter.calibrate.windows import COUNT
from mpo_exporter.fit import als, search, svd, sweep, whitened
from mpo_exporter.fit.common import Cores, activation_error
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape, parameters
from mpo_exporter.quantize.gptq import compensated
from mpo_exporter.quantize.rounding import round_to_nearest
from mpo_exporter.source import open_source
from mpo_exporter.texts import calibration_text, calibration_walk
from mpo_formats.architecture import EMBEDDING, HEAD, full_rank
from mpo_runtime.memory import peak_memory

Matrix = NDArray[np.float64]
Dims = tuple[int, ...]
Fit = Callable[[Matrix, Moment, Dims, Dims, int], Cores]
BALANCED = {"sequential SVD, balanced": svd.fit, "ALS, balanced": als.fit}
LOW_RANK = {"plain SVD": svd.fit, "whitened SVD": whitened.fit}
SIZES = ((1024, 1024), (4096, 1024), (4096, 4096), (12800, 4096), (4096, 12800))
# name: the fit, its number of cores, or None for (O, 1) × (1, I)
TIMED: dict[str, tuple[Fit, int | None]] = {
    "sequential SVD": (svd.fit, 2),
    "whitened SVD": (whitened.fit, None),
    "ALS": (als.fit, 2),
    "sweeps, 3 cores": (sweep.fit, 3),
}
# Integers: bits, group, whether error-compensated.
ROUNDED = {
    "nearest, 4 bits g32": (4, 32, False),
    "compensated, 4 bits g32": (4, 32, True),
    "compensated, 2 bits g64": (2, 64, True),
}


def shape_of(rows: int, columns: int, cores: int | None) -> tuple[Dims, Dims]:
    """The balanced shape of that many cores, or (O, 1) × (1, I)."""
    if cores is None:
        return low_rank_shape(rows, columns)
    out_dims, in_dims = balanced_shape(rows, columns, cores)[:2]
    return tuple(out_dims), tuple(in_dims)


def largest_chi(out_dims: Dims, in_dims: Dims, limit: int) -> int:
    """The largest χ whose cores have at most `limit` parameters."""
    most = full_rank(out_dims, in_dims)
    low, high = 1, max(most)
    while low < high:
        middle = (low + high + 1) // 2
        fits = parameters(out_dims, in_dims, tuple(min(middle, rank) for rank in most)) <= limit
        low, high = (middle, high) if fits else (low, middle - 1)
    return low


def fit_matrix(name: str, matrix: Matrix, moment: Moment, share: float) -> dict[str, object]:
    """Relative errors of all methods on one matrix at that share of its parameters."""
    rows, columns = matrix.shape
    limit = int(share * matrix.size)
    norm = activation_error(matrix, moment.second)
    errors = {}
    for methods, cores in ((BALANCED, 2), (LOW_RANK, None)):
        shape = shape_of(rows, columns, cores)
        chi = largest_chi(*shape, limit)
        for method, fit in methods.items():
            errors[method] = fit(matrix, moment, *shape, chi).error / norm
    found = search.search(matrix, moment, search.Limits(limit))
    errors["search"] = found.error / norm
    shape_found = [[core.shape[axis] for core in found.cores] for axis in (1, 2)]
    three = shape_of(rows, columns, 3)
    errors["sweeps, 3 cores"] = sweep.fit(matrix, moment, *three, largest_chi(*three, limit)).error / norm
    return {"name": name, "rows": rows, "columns": columns, "errors": errors, "search_shape": shape_found}


def measure_model(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fits all matrices of a model and prints the medians."""
    results = []
    with open_source(arguments.model) as source, tempfile.TemporaryDirectory() as folder:
        text = calibration_text(source, arguments.calib)
        walk = calibration_walk(source, text, Path(folder), arguments.windows)
        for names, moment in walk.dense():
            for name in names:
                if name not in (EMBEDDING, HEAD):
                    dense = dense_matrix(source.weights, name)
                    results.append(fit_matrix(name, dense, moment, arguments.share))
                    print(f"\r{len(results)} matrices", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    methods = list(results[0]["errors"])
    print(f"{len(results)} matrices, {arguments.share:.0%} of the parameters, relative error in the activation norm")
    print("\n| method | median | attention | MLP |\n|---|---|---|---|")
    for method in methods:
        parts = [[r["errors"][method] for r in results if part in r["name"]] for part in ("", "self_attn", "mlp")]
        print(f"| {method} | " + " | ".join(f"{statistics.median(part):.4f}" for part in parts) + " |")
    ratios = [r["errors"]["ALS, balanced"] / r["errors"]["sequential SVD, balanced"] for r in results]
    worse = [r["name"] for r in results if r["errors"]["search"] > r["errors"]["whitened SVD"] * (1 + 1e-9)]
    other = [r["name"] for r in results if 1 not in r["search_shape"][1]]
    print(
        f"\nALS over sequential SVD, balanced shapes: median of the ratios {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )
    print(
        f"search worse than whitened SVD: {len(worse)} of {len(results)}; another shape than (O,1)x(1,I) won: {len(other)}"
    )
    return {
        "model": arguments.model,
        "text_sha256": text.sha256,
        "windows": list(walk.windows.shape),
        "share": arguments.share,
        "median_ratio": statistics.median(ratios),
        "rows": results,
    }


def synthetic(rows: int, columns: int) -> tuple[Matrix, Moment]:
    """A random matrix and moment of the given size, with decaying spectra."""
    source = np.random.default_rng(0)
    decay = 1 / np.arange(1.0, 257)
    factor = source.standard_normal((columns, 256)) * np.sqrt(64 * decay)
    moment = factor @ factor.T / 64
    moment[np.diag_indices(columns)] += 0.1
    matrix = source.standard_normal((rows, columns))
    matrix += (source.standard_normal((rows, 256)) * 8 * decay) @ source.standard_normal((256, columns))
    return matrix / columns**0.5, Moment(moment)


def time_one(name: str, rows: int, columns: int, chi: int, cap: float) -> dict[str, object]:
    """Runs one fit in this process; returns seconds, peak bytes above the inputs, and whether the time limit ended it."""
    matrix, moment = synthetic(rows, columns)
    options = {"seconds": cap / 2} if name in ("ALS", "sweeps, 3 cores") else {}
    before, start, worked = peak_memory(), time.monotonic(), time.process_time()
    if name in ROUNDED:
        bits, group, whole = ROUNDED[name]
        (compensated(matrix, moment, bits, group) if whole else round_to_nearest(matrix, bits, group))
    else:
        fit, cores = TIMED[name]
        shape = shape_of(rows, columns, cores)
        fit(matrix, moment, *shape, chi or largest_chi(*shape, matrix.size // 2), **options)
    taken = time.monotonic() - start
    return {
        "seconds": taken,
        "cpu_seconds": time.process_time() - worked,
        "peak_bytes": max(0, peak_memory() - before),
        "clock": bool(options) and taken > cap / 2,
    }


def run_one(name: str, rows: int, columns: int, chi: int, cap: float) -> dict[str, object] | None:
    """`time_one` in a process of its own; None if it takes longer than 1.5 times the cap."""
    command = [sys.executable, __file__, "--one", name, str(rows), str(columns), str(chi), "--cap", str(cap)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=cap * 1.5 + 30)
    except subprocess.TimeoutExpired:
        return None
    found: dict[str, object] = json.loads(done.stdout)
    return found


def measure_sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """Times every fit and quantiser on every size; names those that are left out because of the cap or the budget."""
    results, until = [], time.monotonic() + arguments.budget
    given_up: set[tuple[str, int]] = set()
    print("| fit | matrix | χ | seconds | of all threads | peak MB beside the inputs |\n|---|---|---|---|---|---|")
    for chi in (32, 0):
        for rows, columns in SIZES:
            for name in [*(ROUNDED if chi else ()), *TIMED]:
                words = "" if name in ROUNDED else chi or "half"
                label = f"| {name} | {rows}×{columns} | {words} | "
                if (name, chi) in given_up or time.monotonic() > until:
                    why = "a smaller one passed the cap" if (name, chi) in given_up else "the budget is spent"
                    print(f"{label}left out: {why} | | |", flush=True)
                    continue
                row = run_one(name, rows, columns, chi, arguments.cap)
                if row is None:
                    given_up.add((name, chi))
                    print(f"{label}over {arguments.cap * 1.5:.0f} | | |", flush=True)
                    continue
                clock = " (ended by the clock)" if row["clock"] else ""
                print(
                    f"{label}{row['seconds']:.1f}{clock} | {row['cpu_seconds']:.1f} | {row['peak_bytes'] / 1e6:.0f} |",
                    flush=True,
                )
                results.append({"fit": name, "rows": rows, "columns": columns, "chi": words, **row})
    return {"cap": arguments.cap, "budget": arguments.budget, "rows": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calib", type=Path)
    parser.add_argument("--windows", type=int, default=COUNT)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--cap", type=float, default=60, help="seconds that one fit may take")
    parser.add_argument("--budget", type=float, default=540, help="seconds after which no fit is begun")
    parser.add_argument("--one", nargs=4, metavar=("FIT", "ROWS", "COLUMNS", "CHI"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.one:
        name, *numbers = arguments.one
        print(json.dumps(time_one(name, *(int(number) for number in numbers), arguments.cap)))
        return
    result = measure_sizes(arguments) if arguments.sizes else measure_model(arguments)
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "all")
    write_results(arguments.out, **result, numpy=np.__version__, threads=threads)


if __name__ == "__main__":
    main()
