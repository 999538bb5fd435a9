"""Rotations of a layer's inputs, fitted to the matrices that read them: T = R A with R orthogonal, the same for every block.

What compensated rounding is expected to lose of a row o of W T⁻¹ is F_o Σ_G r²_oG c_G: r the largest value of group G, on which
its scale depends, and c_G the sum over the group of what an error of a column costs once later columns have made up for it. In
the Hadamard basis all columns of a block cost alike and weights are spread like a normal distribution, so what is left is to
turn the blocks of all rows together such that their largest values get smaller. A makes the weights of a block as large in every
direction, which orthogonal R keeps; R starts at the Hadamard transform and moves by Cayley's parametrisation,
R = (1 + S)⁻¹ (1 − S) H with S = −Sᵀ, along the gradient. The largest value is softened to a power mean.

The costs are exact: the covariance of a block given the blocks that are rounded later does not depend on the basis that these
are in, and its Cholesky root gives the c_G of the block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpo_exporter.basis import PLAIN, Basis
from mpo_exporter.calibrate.hessian import DAMPING
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.quantize.rounding import round_to_nearest
from mpo_formats import LinearSpec, Quantized, Transform
from mpo_formats.layout import transform_tensors
from mpo_formats.packing import hadamard_signs

Matrix = NDArray[np.float64]
Vector = NDArray[np.float64]

# Steps of Adam (Kingma & Ba 2015), the rate of the first one, which falls to nearly zero like a cosine, and its decays.
STEPS, RATE, DECAYS = 50, 1.4e-2, (0.9, 0.99)
# Inputs that are rotated together, by the least number of weights for which so large a rotation pays for its bytes.
LEAST = {16: 1 << 12, 32: 1 << 15, 64: 1 << 17, 128: 3 << 18}
# How a rotation is stored.
BITS, GROUP = 4, 64
# Weights that a rotation is fitted to, at most; of more, rows are taken at equal distances.
MOST = 1 << 22
# Blocks of rows that are multiplied at once, so that they stay in a cache.
CHUNK = 2048
# A whitening A changes no direction by more than this factor beside another.
CONDITION = 8.0


def rotation_block(linears: Sequence[LinearSpec]) -> int:
    """How many inputs of some layers are rotated together; 0 where no rotation pays."""
    columns, weights = linears[0].in_features, weights_of(linears)
    return max((block for block, least in LEAST.items() if weights >= least and columns % block == 0), default=0)


def weights_of(linears: Sequence[LinearSpec]) -> int:
    """The number of weights of some layers."""
    return sum(linear.out_features * linear.in_features for linear in linears)


def row_step(linears: Sequence[LinearSpec]) -> int:
    """Of how many rows of some layers a rotation is fitted to one."""
    return math.ceil(weights_of(linears) / MOST)


def price(basis: Basis, linears: Sequence[LinearSpec]) -> float:
    """The factor by which the layers' loss would be lower if they had the bytes of the basis: a bit per weight quarters it."""
    size = 0 if basis.transform is None else sum(tensor.size for tensor in transform_tensors(basis.transform))
    return float(4.0 ** (8 * size / weights_of(linears)))


def rotated(
    linears: Sequence[LinearSpec], matrices: Iterable[tuple[Matrix, Vector]], moment: Moment, block: int
) -> Basis:
    """The basis of a rotation that is fitted to layers with one input and stored in 4 bits, under the first one's name.

    Args:
        matrices: of the layers [O, I], each with the Fisher information [O] of its outputs; one is in memory at a time.
        moment: of their input, which is turned back to the basis of the inputs.
        block: inputs that are rotated together.
    """
    step = row_step(linears)
    weights = [(matrix[::step] * np.sqrt(fisher[::step])[:, None]).astype(np.float32) for matrix, fisher in matrices]
    moment.turn(PLAIN)
    stored = Transform(linears[0].name, block, 1, Quantized(BITS, min(block, GROUP), False))
    integers = round_to_nearest(fit(weights, moment.second, block), BITS, min(block, GROUP))
    names = [tensor.name for tensor in transform_tensors(stored)]
    return Basis(transform=stored, tensors=dict(zip(names, (*integers.planes(), integers.scale), strict=True)))


def fit(rows: Sequence[NDArray[np.float32]], second: Matrix, block: int, steps: int = STEPS) -> Matrix:
    """The matrix T [block, block] for every block of the inputs of some layers.

    Args:
        rows: of the layers' matrices [O, I], each times the root of the Fisher information of its output.
        second: the second moment [I, I] of their input.
        block: a power of two that divides I.
    """
    weights = torch.cat([torch.from_numpy(part.reshape(-1, block)) for part in rows])
    places = torch.cat([torch.arange(len(second) // block).repeat(len(part)) for part in rows])
    weights /= weights.square().mean().sqrt().clamp(min=1e-30)
    whitening, inverse = balance(weights)
    weights = weights @ inverse
    costs = whitening @ torch.from_numpy(conditional(second, block)).float() @ whitening.T
    return (rotate(weights, places, costs, steps) @ whitening).double().numpy()


def balance(weights: Tensor) -> tuple[Tensor, Tensor]:
    """A [b, b] and A⁻¹ such that the rows of weights A⁻¹ [N, b] are spread alike in every direction; its determinant is 1."""
    values, vectors = torch.linalg.eigh((weights.T @ weights).double())
    roots = values.clamp(min=max(float(values[-1]) / CONDITION**2, 1e-30)).sqrt()
    roots /= roots.log().mean().exp()
    return ((vectors * roots) @ vectors.T).float(), ((vectors / roots) @ vectors.T).float()


def conditional(second: Matrix, block: int) -> Matrix:
    """The covariance [I/b, b, b] of every block of inputs given the blocks of less energy, which are rounded later."""
    columns = len(second)
    count, mean = columns // block, max(float(np.trace(second)) / columns, 1e-300)
    energies = np.diag(second).reshape(count, block).sum(1)
    last_first = np.argsort(energies, kind="stable")
    places = (last_first[:, None] * block + np.arange(block)).reshape(-1)
    root = torch.linalg.cholesky(torch.from_numpy(second[np.ix_(places, places)] / mean + DAMPING * np.eye(columns)))
    found = np.empty((count, block, block))
    for at, place in enumerate(last_first):
        inside = slice(at * block, (at + 1) * block)
        corner = root[inside, inside].numpy()
        found[place] = corner @ corner.T
    return found


def rotate(weights: Tensor, places: Tensor, costs: Tensor, steps: int) -> Tensor:
    """The orthogonal R [b, b] that makes the groups' largest values small.

    Args:
        weights: the blocks of all rows [N, b], and places [N], which block of the inputs each belongs to.
        costs: the conditional covariances [I/b, b, b].
    """
    block = weights.shape[1]
    start, one = torch.from_numpy(hadamard_signs(block) * block**-0.5).float(), torch.eye(block)
    skew = torch.zeros(block, block, requires_grad=True)
    optimizer = torch.optim.Adam([skew], lr=RATE, betas=DECAYS)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, RATE / 100)

    def rotation() -> Tensor:
        turn = skew - skew.mT
        found: Tensor = torch.linalg.solve(one + turn, (one - turn) @ start)
        return found

    for _ in range(steps):
        turned = rotation()
        root = torch.linalg.cholesky((turned @ costs @ turned.mT).flip(1, 2))
        cost = root.diagonal(dim1=1, dim2=2).square().sum(1)
        with torch.no_grad():
            ranges, gradient = squared_ranges(weights, turned.mT.contiguous(), places, cost)
            total = torch.dot(ranges, cost)
        # The gradient through the weights was summed by hand; that through the costs is left to torch.
        loss = (cost @ ranges + (turned * gradient.mT).sum()) / total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return rotation().detach()


def squared_ranges(weights: Tensor, turned: Tensor, places: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    """Σ r² over the rows of every block of inputs [I/b], with r = (mean_j y_j⁸)^(1/8) of y = w Rᵀ, and its gradient.

    Args:
        turned: Rᵀ [b, b]; the gradient is that of Σ_k cost_k Σ r² with respect to it.
    """
    ranges, gradient = torch.zeros_like(cost), torch.zeros_like(turned)
    for start in range(0, len(weights), CHUNK):
        rows, place = weights[start : start + CHUNK], places[start : start + CHUNK]
        y = rows @ turned
        squares = y * y
        fourth = squares * squares
        mean = (fourth * fourth).mean(1).clamp(min=1e-30)
        root = mean.sqrt()
        ranges.index_add_(0, place, root.sqrt())
        factor = cost[place] * (2 / weights.shape[1]) / (root * root.sqrt())
        gradient.addmm_(rows.T, fourth.mul_(squares).mul_(y).mul_(factor[:, None]))
    return ranges, gradient
