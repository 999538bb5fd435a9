"""What an export takes on this machine: seconds by stage, memory and disk, from sizes and a measurement of about a second.

The work of every stage is counted in multiply-adds and in weights times grids. What one of these takes is measured on small
pieces of the same kind and of the model's own widths.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from mpo_exporter.calibrate.hessian import WIDE, parts_of
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.calibrate.outputs import MOST
from mpo_exporter.calibrate.precision import fast_products
from mpo_exporter.calibrate.seen import TO_STREAM, bytes_of, nothing_seen
from mpo_exporter.calibrate.upstream import HELD_BYTES
from mpo_exporter.effort import Effort
from mpo_exporter.measure.candidates import BOUNDED, CORED, GRIDS, fitted
from mpo_exporter.quantize.gptq import compensated, expected_errors
from mpo_exporter.quantize.rounding import round_to_nearest
from mpo_exporter.quantize.rows import MOST_ROWS, rows_at_once
from mpo_formats import Architecture
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_runtime.memory import peak_memory

# Sizes of the pieces that are measured, and seconds that each is repeated for.
TOKENS, WIDEST, ROWS, SECONDS = 1024, 2048, 256, 0.12
# What elementwise work and attention take beside the products of a block, as a share of exact products at the width `HALF`; it
# falls with the width, since products grow with its square.
BESIDE, HALF = 0.63, 576
# Roots and solutions of a moment, in products of its size; what is done with its entries beside that, in weights that are rounded
# to nearest.
ROOTS, PASSES = 2.5, 23
# Copies of a matrix between its types and bases, in weights that are rounded to nearest; the products of a target, in O I² each.
COPIES, SOLVED = 8, 1.5
# Without calibration text, in the same: a look at every value, and transforms, packing and checksums with the rounding.
LOOKED, BLIND = 0.3, 5
# The first layer of each input of a block.
FIRST = ("q_proj", "o_proj", "gate_proj", "down_proj")
# What measuring takes beside its products: attention without bf16, and the vocabulary's softmax twice.
MEASURED = 1.7
# Memory of the program itself, and of activations for each token and unit of width in a batch.
PROGRAM, LIVE = 550_000_000, 48


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of single steps.

    Args:
        product, exact: of a multiply-add in a calibration's product, and in an exact one.
        rounding: of a weight and column in error-compensated rounding.
        grid, nearest: of a weight on one grid of the survey, and of a weight rounded to nearest.
    """

    product: float
    exact: float
    rounding: float
    grid: float
    nearest: float


def measured_rates(architecture: Architecture, clock: Callable[[], float] = time.perf_counter) -> Rates:
    """The rates of this machine, measured now with the threads of this process.

    Args:
        clock: gives seconds; `time.process_time` predicts the time of the processor, where other programs keep it busy.
    """

    def seconds_of(work: Callable[[], object]) -> float:
        """The median of as many runs as fit into SECONDS, after one to warm up."""
        work()
        found = list[float]()
        end = clock() + SECONDS
        while not found or clock() < end:
            start = clock()
            work()
            found.append(clock() - start)
        return float(np.median(found))

    width, inner = (min(size, WIDEST) for size in (architecture.hidden_size, architecture.intermediate_size))
    source = torch.Generator().manual_seed(0)
    x, w = (torch.randn(rows, width, generator=source) for rows in (TOKENS, inner))
    count = TOKENS * width * inner
    with fast_products():
        product = seconds_of(lambda: torch.nn.functional.linear(x, w)) / count
    exact = seconds_of(lambda: torch.nn.functional.linear(x, w)) / count
    columns = width // 32 * 32 or width
    matrix = np.random.default_rng(0).standard_normal((ROWS, columns))
    moment = Moment(np.eye(columns) + np.outer(np.arange(columns), np.arange(columns)) / columns**2)
    grids = fitted(GRIDS, columns)
    if not grids:
        return Rates(product, exact, 0.0, 0.0, 0.0)
    group = grids[0].group
    moment.hessian(group)
    rounding = seconds_of(lambda: compensated(matrix, moment, 4, group)) / (matrix.size * columns)
    grid = seconds_of(lambda: expected_errors(matrix, None, grids)) / (matrix.size * len(grids))
    nearest = seconds_of(lambda: round_to_nearest(matrix, 4, group)) / matrix.size
    return Rates(product, exact, rounding, grid, nearest)


# One thread of a CPU of 2022, to tell how far an export is; the proportions count, not the size.
NOMINAL = Rates(1.2e-11, 2.3e-11, 8.5e-11, 2e-9, 5e-9)


@dataclass(frozen=True, slots=True)
class Cost:
    """What an export takes.

    Args:
        stages: seconds by the names that progress is reported under.
        memory, disk: bytes at most; disk with the file itself.
    """

    stages: dict[str, float]
    memory: int
    disk: int

    @property
    def seconds(self) -> float:
        """Of all stages."""
        return sum(self.stages.values())


def export_cost(
    architecture: Architecture,
    rates: Rates,
    effort: Effort,
    *,
    windows: int,
    window: int,
    file_bytes: int,
    source_bytes: int,
    measured_tokens: int = 0,
    surveyed: bool = True,
) -> Cost:
    """The cost of an export.

    Args:
        windows: of calibration text, each of `window` tokens; 0 for none.
        file_bytes, source_bytes: of the file to write, and of the dense model.
        measured_tokens: that the file is measured on.
        surveyed: whether layers are measured for a plan; False where a plan needs none, or the survey is cached.
    """
    sizes = [(name, rows, columns) for name, rows, columns, _ in architecture.linear_sizes()]
    block = sum(rows * columns for name, rows, columns in sizes if name not in (EMBEDDING, HEAD))
    head = architecture.vocab_size * architecture.hidden_size
    tokens, sampled = windows * window, min(windows, effort.care.windows) * window
    beside = rates.exact * BESIDE * HALF / (HALF + architecture.hidden_size)
    forward = block * (rates.product + beside)  # of a token through all blocks
    # Layers with one input share a moment: q, k and v; gate and up. Wide ones have one for each part.
    inputs = [one for one in sizes if one[0].endswith(first_layers(sizes))]
    squares, cubes = (sum(width**power for *_, columns in inputs for width in widths(columns)) for power in (2, 3))
    wide = sum(columns**2 for *_, columns in inputs)
    judged = sum((rows if rows <= 2 * effort.care.rows else effort.care.rows) * columns for _, rows, columns in sizes)
    weights = sum(rows * columns for _, rows, columns in sizes)
    stages = {}
    if surveyed and windows:
        stages["gradients"] = tokens * forward
        backward = sampled * (rates.product * (2 * block + wide + 4 * head) + 3 * beside * block)
        sides = [sorted((min(rows, effort.care.rows), columns)) for _, rows, columns in sizes]
        values = sum(side**2 * (other + 3 * side) for side, other in sides if side <= BOUNDED)
        tried = rates.grid * judged * (len(GRIDS) + 2) + rates.exact * len(CORED) * values
        stages["surveying"] = backward + rates.exact * cubes + tried
    elif surveyed:
        stages["surveying"] = rates.grid * judged * 2 * len(GRIDS) + rates.nearest * LOOKED * weights
    whole = max(architecture.num_hidden_layers * tokens * bytes_of(architecture, 0), 1)
    kept = min(whole, nothing_seen().room) if surveyed and tokens else 0
    seen = kept / whole  # of the dense model's pass
    minded = min(windows, effort.outputs) * window
    if minded:
        stages["outputs"] = minded * (forward + rates.product * (2 * block + pairs_of(architecture) + 4 * head))
        stages["outputs"] += minded * 3 * beside * block
    if windows:
        moments = tokens * (squares + sum(across(*one) for one in inputs))
        fits = [(name, rows, rows * width**2) for name, rows, columns in sizes for width in widths(columns)]
        roots = rates.exact * ROOTS * cubes + rates.nearest * (PASSES * squares + COPIES * weights)
        products = rates.product * (moments + SOLVED * sum(size for _, _, size in fits))
        rounding = rates.rounding * sum(size * (slower(name, rows) if minded else 1) for name, rows, size in fits)
        stages["fitting"] = tokens * (2 - seen) * forward + products + roots + rounding
    else:
        stages["fitting"] = rates.nearest * BLIND * weights
    stages["measuring"] = rates.exact * 2 * measured_tokens * (block + head) * MEASURED
    return Cost(
        stages,
        memory_of(architecture, source_bytes, tokens, measured_tokens, kept),
        disk_of(architecture, file_bytes, tokens, sampled if surveyed else 0, minded),
    )


def first_layers(sizes: list[tuple[str, int, int]]) -> tuple[str, ...]:
    """The ends of the names of the first layer of each input of a block."""
    return FIRST if any(name.endswith("gate_proj") for name, *_ in sizes) else ("up_proj", *FIRST)


def widths(columns: int) -> list[int]:
    """The columns that are fitted together: all, or those of each part."""
    return [part.stop - part.start for part in parts_of(columns)] if columns > WIDE else [columns]


def across(name: str, rows: int, columns: int) -> int:
    """Multiply-adds of a token for what a layer makes up for: see calibrate/shortfall.py."""
    if not name.endswith(TO_STREAM):
        return columns**2
    return 3 * rows * columns if columns > WIDE else columns**2 + rows * columns


def memory_of(architecture: Architecture, source_bytes: int, tokens: int, measured_tokens: int, kept: int = 0) -> int:
    """Bytes of memory at most: one block, its moments, a batch of activations; or both models while they are compared.

    Args:
        kept: what is kept of the dense model's pass for the fit.
    """
    hidden, inner = architecture.hidden_size, architecture.intermediate_size
    widest = max(hidden, inner)
    matrices = 8 * (4 * hidden * hidden + 3 * hidden * inner)
    held = sum(min(4 * tokens * size, HELD_BYTES) for size in (hidden, hidden, inner, inner))
    fitting = matrices + 5 * 8 * widest**2 + held + LIVE * min(tokens, 2048) * widest if tokens else 24 * hidden * inner
    measuring = 8 * architecture.parameters() if measured_tokens else 0
    return max(PROGRAM + source_bytes + max(fitting + kept, measuring), peak_memory())


def slower(name: str, rows: int) -> float:
    """How many times as long the rounding of a layer takes that minds its outputs: few rows at once take as long as many."""
    return 1.0 if name in (EMBEDDING, HEAD) or rows > MOST else MOST_ROWS / rows_at_once(rows)


def pairs_of(architecture: Architecture) -> int:
    """Entries of the second moments of gradients by the outputs of the blocks' layers."""
    sizes = architecture.linear_sizes()
    return sum(rows**2 for name, rows, _, _ in sizes if name not in (EMBEDDING, HEAD) and rows <= MOST)


def disk_of(architecture: Architecture, file_bytes: int, tokens: int, sampled: int, minded: int = 0) -> int:
    """Bytes of disk at most: the file twice, and the states of the survey or those of both upstreams.

    Args:
        sampled, minded: tokens that gradients are taken on in the survey, and for a rounding that minds outputs.
    """
    state = 4 * architecture.hidden_size
    survey = state * (sampled * (architecture.num_hidden_layers + 1) + tokens) if sampled else 0
    spilled = sum(4 * tokens * size for size in (architecture.intermediate_size,) if 4 * tokens * size > HELD_BYTES)
    fits = 6 * state * tokens + 4 * spilled
    kept = 4 * pairs_of(architecture) if minded else 0
    return 2 * file_bytes + kept + max(survey, fits, state * minded * architecture.num_hidden_layers)
