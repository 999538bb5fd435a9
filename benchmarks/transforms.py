"""What transforms of a layer's input do to the error of its integers, on some matrices of a model.

    python benchmarks/transforms.py MODEL --calib TEXT --out benchmarks/results/DATE-transforms.json

For matrices of a few blocks, and a sample of the embedding's rows: error-compensated integers in groups of 64, as they are
and after a Hadamard transform of blocks of 16 to 512 inputs, with and without random signs, after a random rotation of all
inputs, and after fitted rotations of blocks of 64, one for all blocks or one for each. The error is that of the outputs in the
norm of the input's second moment, relative to no transform. The spread is the arithmetic over the geometric mean of what a
rounding error of each column costs once later columns have made up for it: 1 is the least that any rotation can reach.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from parts.results import write_results

from mpo_exporter.calibrate.moments import Moment, dense_matrix
from mpo_exporter.fit.common import activation_error
from mpo_exporter.quantize.gptq import compensated
from mpo_exporter.source import find_source, open_source
from mpo_exporter.texts import calibration_text, calibration_walk
from mpo_formats.architecture import EMBEDDING
from mpo_formats.packing import hadamard_signs

Matrix = NDArray[np.float64]
GROUP, BITS = 64, (2, 3, 4)
BLOCKS = (16, 32, 64, 128, 256, 512)
# Rows of a matrix that are rounded, at most; steps of fitting, and the power of the mean that stands for a group's largest value.
ROWS, STEPS, POWER = 512, 100, 8.0


def blocked(columns: int, block: int, signs: Matrix | None = None) -> Matrix:
    """The Hadamard transform of every block, of inputs that were multiplied by signs."""
    found = np.kron(np.eye(columns // block), hadamard_signs(block) / math.sqrt(block))
    return found if signs is None else found * signs


def fitted(matrix: Matrix, second: Matrix, *, shared: bool) -> Matrix:
    """Rotations of every block of 64 inputs, `shared` by all or each its own, that lower what integers are expected to lose.

    They start at the Hadamard transform and move by Cayley's parametrisation. The loss is the sum over groups and rows of the
    squared range of a group, as a power mean, times the costs of its columns' errors.
    """
    columns, block = len(second), GROUP
    count = columns // block
    weights, moment = torch.from_numpy(matrix), torch.from_numpy(second / np.trace(second) * columns)
    moment = moment + 0.01 * torch.eye(columns)
    start = torch.from_numpy(blocked(block, block)).expand(count, block, block)
    skew = torch.zeros(1 if shared else count, block, block, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([skew], lr=2e-3)

    def rotation() -> torch.Tensor:
        turn, one = skew - skew.mT, torch.eye(block, dtype=torch.float64)
        return torch.linalg.solve(one + turn, one - turn) @ start

    for _ in range(STEPS):
        turned = rotation()
        rows = torch.einsum("rgi,gji->rgj", weights.view(-1, count, block), turned)
        inner = torch.einsum("gab,gbhc->gahc", turned, moment.view(count, block, count, block))
        whole = torch.einsum("gahc,hdc->gahd", inner, turned).reshape(columns, columns)
        root = torch.linalg.cholesky(whole.flip(0, 1))
        costs = root.diagonal().flip(0).square().view(count, block).sum(1)
        ranges = rows.abs().pow(POWER).mean(2).pow(2 / POWER)
        loss = torch.log((ranges.sum(0) * costs).sum())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return np.asarray(torch.block_diag(*rotation().detach()).numpy())


def rotations(matrix: Matrix, second: Matrix, *, fit: bool) -> Iterator[tuple[str, Matrix]]:
    """The rotations to compare, by name."""
    columns, random = len(second), np.random.default_rng(0)
    signs = random.choice((-1.0, 1.0), columns)
    yield "none", np.eye(columns)
    for block in BLOCKS:
        if columns % block == 0:
            yield f"blocks of {block}", blocked(columns, block)
    yield f"blocks of {GROUP}, random signs", blocked(columns, GROUP, signs)
    yield "random rotation of all inputs", np.linalg.qr(random.standard_normal((columns, columns)))[0]
    if fit:
        yield f"fitted, one for all blocks of {GROUP}", fitted(matrix, second, shared=True)
        yield f"fitted, one for each block of {GROUP}", fitted(matrix, second, shared=False)


def spread(second: Matrix) -> float:
    """The arithmetic over the geometric mean of the costs of the columns' errors."""
    costs = Moment(second).hessian(GROUP).weight.double().numpy()
    return float(costs.mean() / np.exp(np.log(costs).mean()))


def measure(name: str, matrix: Matrix, second: Matrix, *, fit: bool) -> Iterator[dict[str, Any]]:
    """A row for each rotation of one layer's input."""
    errors: dict[int, float] = {}
    for transform, rotation in rotations(matrix, second, fit=fit):
        turned, moment = matrix @ rotation.T, rotation @ second @ rotation.T
        row: dict[str, Any] = {"layer": name, "transform": transform, "spread": spread(moment)}
        for bits in BITS:
            integers = compensated(turned, Moment(moment.copy()), bits, GROUP, zeros=False)
            error = activation_error(turned - integers.matrix(), moment)
            row[f"error_{bits}"] = error / errors.setdefault(bits, error)
        yield row


def mean_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The geometric means over layers for each transform, with the number of layers."""
    found = []
    for transform in dict.fromkeys(row["transform"] for row in rows):
        own = [row for row in rows if row["transform"] == transform]
        keys = ("spread", *(f"error_{bits}" for bits in BITS))
        means = {key: float(np.exp(np.mean([math.log(row[key]) for row in own]))) for key in keys}
        found.append({"transform": transform, "layers": len(own), **means})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="as mpo-export takes it")
    parser.add_argument("--calib", type=Path, help="calibration text; the embedded one where not given")
    parser.add_argument("--windows", type=int, default=32, help="of 256 tokens of it")
    parser.add_argument("--blocks", type=int, nargs="*", help="of the model; three spread over it where not given")
    parser.add_argument(
        "--fit", nargs="*", default=["q_proj", "down_proj"], help="layers whose rotations are fitted too"
    )
    parser.add_argument("--out", type=Path, help="the JSON to write")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    with open_source(find_source(arguments.model).folder) as source, tempfile.TemporaryDirectory() as folder:
        last = source.architecture.num_hidden_layers - 1
        chosen = arguments.blocks or [0, last // 2, last]
        text = calibration_text(source, arguments.calib)
        for names, moment in calibration_walk(source, text, Path(folder), arguments.windows).dense():
            for name in names:
                if name != EMBEDDING and (name.count(".") < 2 or int(name.split(".")[2]) not in chosen):
                    continue
                start = time.monotonic()
                matrix = dense_matrix(source.weights, name)
                matrix = matrix[:: max(1, len(matrix) // ROWS)][:ROWS]
                rows += measure(name, matrix, moment.second, fit=name.endswith(tuple(arguments.fit)))
                print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    means = mean_rows(rows)
    print("| transform | layers | spread | " + " | ".join(f"{bits} bits" for bits in BITS) + " |")
    print("|---|---|---|---|---|---|")
    for row in means:
        cells = " | ".join(f"{row[f'error_{bits}']:.3f}" for bits in BITS)
        print(f"| {row['transform']} | {row['layers']} | {row['spread']:.3f} | {cells} |")
    write_results(arguments.out, means, model=arguments.model, group=GROUP, matrices=rows)


if __name__ == "__main__":
    main()
