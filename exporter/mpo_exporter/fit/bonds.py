"""The order of bonds: by importance, so that cutting each bond to its first χ' values gives a good smaller operator."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpo_exporter.fit.common import Matrix, factor_moments

# Singular values below this share of the largest are rounding noise of the Gram matrices' roots.
NOISE = 1e-12


def order_bonds(cores: Sequence[Matrix], second: Matrix | None) -> tuple[Matrix, ...]:
    """Changes the basis of every bond to the operator's singular vectors there, by descending singular values.

    The norm is that of the moment's partial traces, ⊗_k C_k, which is exact where one core takes the whole input or there
    is no moment. With Gram matrices Rᵀ R of the left and the right part at a bond, and the decomposition
    R_left R_rightᵀ = U S Vᵀ, the bond is changed by R_rightᵀ V S^(−1/2), whose inverse is S^(−1/2) Uᵀ R_left: the
    canonical form of Vidal 2003, with S shared between the neighbours. The product of the cores does not change.
    """
    weights = factor_moments(second, tuple(core.shape[2] for core in cores))
    left = left_grams(cores, weights)
    right = left_grams([core.transpose(3, 1, 2, 0) for core in reversed(cores)], weights[::-1])[::-1]
    turned = list(cores)
    for bond in range(len(cores) - 1):
        first, second = gram_root(left[bond + 1]), gram_root(right[bond + 1])
        u, s, vt = np.linalg.svd(first @ second.T)
        root = np.sqrt(np.maximum(s, NOISE * max(float(s[0]), 1e-30)))
        turned[bond] = turned[bond] @ (second.T @ (vt.T / root))
        turned[bond + 1] = np.tensordot((u / root).T @ first, turned[bond + 1], 1)
    return tuple(turned)


def left_grams(cores: Sequence[Matrix], weights: Sequence[Matrix]) -> list[Matrix]:
    """The Gram matrix [χ_k, χ_k] of the part left of each bond, inputs weighted by C_k, beginning with the outer bond's 1."""
    grams = [np.ones((1, 1))]
    for core, weight in zip(cores, weights, strict=True):
        weighed = np.tensordot(grams[-1], core, 1)  # [a, o, i, b]
        weighed = np.einsum("aoib,ij->aojb", weighed, weight, optimize=True)
        grams.append(np.tensordot(core, weighed, ((0, 1, 2), (0, 1, 2))))
    return grams


def gram_root(gram: Matrix) -> Matrix:
    """R with Rᵀ R = G, for a positive semidefinite G."""
    values, vectors = np.linalg.eigh((gram + gram.T) / 2)
    root: Matrix = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    return root
