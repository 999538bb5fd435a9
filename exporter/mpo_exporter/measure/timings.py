"""The time of fitting cores on this machine, estimated: small pieces of the same work are timed once, and cached."""

from __future__ import annotations

import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit.layer import Method, build_linear
from mpo_exporter.fit.shapes import balanced_shape, low_rank_shape
from mpo_exporter.measure.cache import Cached, CacheFile
from mpo_exporter.measure.latency import machine_key
from mpo_exporter.progress import Log, no_log
from mpo_exporter.terms import operator
from mpo_formats import LinearSpec, ModelSpec, Mpo, Quantized, Term

# The largest matrix that a fit is timed on. The time grows with the weights, and a little more with the columns.
MOST_ROWS, MOST_COLUMNS = 256, 1024


@dataclass(slots=True)
class Rates:
    """Seconds by what was timed; `measured` counts the entries that are not cached yet."""

    seconds: dict[str, float]
    measured: int = 0

    def of(self, key: str, measure: Callable[[], float]) -> float:
        """The figure under a key, measured now if it is missing."""
        if key not in self.seconds:
            self.seconds[key] = measure()
            self.measured += 1
        return self.seconds[key]


def open_rates(log: Log = no_log) -> Rates:
    """The cached rates of this machine."""
    cached = rates_file().read(log)
    return Rates({} if cached is None else cached.content)


def save_rates(rates: Rates, log: Log = no_log) -> None:
    """Caches the rates if any is new."""
    if rates.measured:
        rates_file().write(Cached(rates.seconds), log)
        rates.measured = 0


def rates_file() -> CacheFile:
    """The cache file of the rates, valid for this machine and number of torch's threads."""
    key = machine_key() | {"torch": torch.__version__, "torch threads": torch.get_num_threads()}
    return CacheFile("rates", platform.machine() or "cpu", (), key)


def fit_seconds(spec: ModelSpec, calibrated: bool, rates: Rates) -> float:
    """Seconds to fit the layers of a planned model that have cores."""
    total = 0.0
    for linear in spec.linears:
        kinds = "+".join(shape_kind(term) for term in linear.terms)
        if "mpo" not in kinds:
            continue
        rows, columns = min(linear.out_features, MOST_ROWS), min(linear.in_features, MOST_COLUMNS)
        key = f"fit {kinds} {'calibrated' if calibrated else 'blind'} {rows}x{columns}"
        seconds = rates.of(key, timed_fit(linear, rows, columns, calibrated))
        total += seconds / (rows * columns) * linear.out_features * linear.in_features
    return total


def shape_kind(term: Term) -> str:
    """The kind of a term as far as the time of its fit depends on it: integers, or cores by number, shape and χ."""
    if isinstance(term, Mpo):
        return f"mpo{len(term.out_dims)}{'' if min(term.in_dims) == 1 else ' balanced'} χ{max(term.bonds)}"
    return term.kind


def timed_fit(linear: LinearSpec, rows: int, columns: int, calibrated: bool) -> Callable[[], float]:
    """A function that times the fit of a layer's terms to a random matrix of a size."""

    def measure() -> float:
        terms = tuple(fitted_to(term, rows, columns) for term in linear.terms)
        source = np.random.default_rng(0)
        matrix = source.standard_normal((rows, columns)).astype(np.float32)
        inputs = source.standard_normal((2 * columns, columns))
        moment = Moment(inputs.T @ inputs / len(inputs), None, len(inputs)) if calibrated else None
        start = time.perf_counter()
        build_linear(LinearSpec("timed", rows, columns, None, terms), matrix, "f32", moment, Method())
        return time.perf_counter() - start

    return measure


def fitted_to(term: Term, rows: int, columns: int) -> Term:
    """The same kind of term for a matrix of another size."""
    if isinstance(term, Mpo):
        low_rank = min(term.in_dims) == 1
        shape = low_rank_shape(rows, columns) if low_rank else balanced_shape(rows, columns, len(term.out_dims))
        return operator(*shape, max(term.bonds), term.dtype)
    if isinstance(term, Quantized) and columns % term.group:
        return replace(term, group=16)
    return term


def base_memory(rates: Rates) -> int:
    """Bytes of memory of a process that has loaded the runtime but no model; 0 if the system does not tell."""

    def measure() -> float:
        # Not getrusage: its peak of a child process starts at its parent's.
        code = (
            "import mpo_runtime.backends.native, mpo_runtime.model, mpo_runtime.engine, mpo_runtime.text.tokenizer\n"
            "rows = [row.split() for row in open('/proc/self/status')]\n"
            "print([int(row[1]) for row in rows if row[0] == 'VmHWM:'][0] * 1024)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        return float(done.stdout) if done.returncode == 0 else 0.0

    return int(rates.of("base memory", measure))
