"""Sequential SVD: exact at full rank, optimal for two cores, and an error that is the true one."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_exporter.fit import svd
from mpo_exporter.fit.svd import contract, sequential_svd, truncated_svd
from mpo_formats import ConfigError
from mpo_formats import reference as format_reference
from mpo_formats.architecture import full_rank

Matrix = NDArray[np.float64]
Dims = tuple[int, ...]


@st.composite
def shapes(draw: st.DrawFn, least: int = 2, most: int = 4) -> tuple[Dims, Dims]:
    """Output and input factors of any number of cores, primes and ones among them."""
    count = draw(st.integers(least, most))
    factors = st.lists(st.sampled_from([1, 2, 3, 5]), min_size=count, max_size=count)
    return tuple(draw(factors)), tuple(draw(factors))


def random_matrix(out_dims: Dims, in_dims: Dims, seed: int = 0) -> Matrix:
    return np.random.default_rng(seed).standard_normal((math.prod(out_dims), math.prod(in_dims)))


def rearranged(matrix: Matrix, out_dims: Dims, in_dims: Dims) -> Matrix:
    """The matrix of a two-core fit: rows (o_1, i_1), columns (o_2, i_2), entry by entry."""
    (o1, o2), (i1, i2) = out_dims, in_dims
    result = np.empty((o1 * i1, o2 * i2))
    for row in range(o1 * o2):
        for column in range(i1 * i2):
            place = (row // o2 * i1 + column // i2, row % o2 * i2 + column % i2)
            result[place] = matrix[row, column]
    return result


@given(shape=shapes())
def test_full_rank_reproduces_the_matrix(shape: tuple[Dims, Dims]) -> None:
    matrix = random_matrix(*shape)
    fit = sequential_svd(matrix, *shape, chi=10**6)
    assert all(bond <= most for bond, most in zip(fit.bonds, full_rank(*shape), strict=True))
    np.testing.assert_allclose(contract(fit.cores), matrix, atol=1e-10)
    np.testing.assert_allclose(format_reference.contract(list(fit.cores)), matrix, atol=1e-10)
    assert fit.error < 1e-6 * np.linalg.norm(matrix)  # the root of a difference of squares that are almost equal


@given(shape=shapes(2, 2), chi=st.integers(1, 6))
def test_two_cores_are_the_best_approximation(shape: tuple[Dims, Dims], chi: int) -> None:
    """The error is the norm of the dropped singular values (Eckart & Young)."""
    matrix = random_matrix(*shape, seed=chi)
    fit = sequential_svd(matrix, *shape, chi=chi)
    dropped = np.linalg.svd(rearranged(matrix, *shape), compute_uv=False)[chi:]
    assert np.linalg.norm(matrix - contract(fit.cores)) == pytest.approx(np.linalg.norm(dropped), abs=1e-10)
    assert fit.error == pytest.approx(np.linalg.norm(dropped), abs=1e-6)
    assert fit.bonds == (min(chi, *rearranged(matrix, *shape).shape),)


@given(shape=shapes(), chi=st.integers(1, 8))
def test_the_reported_error_is_the_actual_one(shape: tuple[Dims, Dims], chi: int) -> None:
    matrix = random_matrix(*shape, seed=chi)
    fit = sequential_svd(matrix, *shape, chi=chi)
    assert max(fit.bonds) <= chi
    assert fit.error == pytest.approx(np.linalg.norm(matrix - contract(fit.cores)), abs=1e-6)


def test_bonds_are_sorted_by_importance_so_that_a_prefix_is_the_fit_of_a_smaller_chi() -> None:
    out_dims, in_dims = (8, 1), (1, 12)
    matrix = random_matrix(out_dims, in_dims)
    whole = sequential_svd(matrix, out_dims, in_dims, chi=8)
    for chi in (1, 3, 8):
        prefix = [whole.cores[0][..., :chi], whole.cores[1][:chi]]
        fit = sequential_svd(matrix, out_dims, in_dims, chi=chi)
        np.testing.assert_allclose(contract(prefix), contract(fit.cores), atol=1e-10)


def test_neighbouring_cores_share_the_size_of_the_matrix() -> None:
    """A matrix of large values must not put them all into one core, whose type may be half precision."""
    matrix = 1e6 * random_matrix((4, 4), (4, 4))
    first, second = sequential_svd(matrix, (4, 4), (4, 4), chi=16).cores
    assert 0.1 < np.linalg.norm(first) / np.linalg.norm(second) < 10


@pytest.mark.parametrize("matrix", [np.zeros((4, 6)), np.outer(np.arange(4.0), np.ones(6))], ids=["zero", "rank one"])
def test_degenerate_matrices(matrix: Matrix) -> None:
    fit = sequential_svd(matrix, (2, 2), (2, 3), chi=3)
    assert all(np.isfinite(core).all() for core in fit.cores)
    np.testing.assert_allclose(contract(fit.cores), matrix, atol=1e-10)


def test_a_sketched_range_is_within_a_hundredth_of_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(0)
    left, right = (np.linalg.qr(source.standard_normal((130, 130)))[0] for _ in range(2))
    matrix = left * (1 / np.arange(1.0, 131)) @ right.T
    rank = 10
    exact = np.linalg.svd(matrix)[1]
    best = np.linalg.norm(exact[rank:])
    monkeypatch.setattr(svd, "SKETCH_SIZE", 100)
    monkeypatch.setattr(np.linalg, "svd", refuse_large(np.linalg.svd, rank + 16))
    u, s, vt = truncated_svd(matrix, rank)
    assert np.linalg.norm(matrix - u * s @ vt) <= 1.01 * best
    np.testing.assert_allclose(s, exact[:rank], rtol=0.01)
    again = truncated_svd(matrix, rank)
    np.testing.assert_array_equal(u, again[0])
    fit = sequential_svd(matrix, (130, 1), (1, 130), rank)
    assert best * 0.999 <= fit.error <= 1.01 * best
    assert fit.error == pytest.approx(np.linalg.norm(matrix - contract(fit.cores)), rel=1e-6)


@pytest.mark.parametrize("shape", [(90, 120), (120, 90)])
def test_a_large_share_of_a_large_spectrum_comes_from_the_gram_matrix(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    exact = np.linalg.svd(matrix, full_matrices=False)
    monkeypatch.setattr(svd, "SKETCH_SIZE", 50)
    monkeypatch.setattr(np.linalg, "svd", refuse_large(np.linalg.svd, 1))
    u, s, vt = truncated_svd(matrix, 40)
    np.testing.assert_allclose(s, exact[1][:40], rtol=1e-9)
    np.testing.assert_allclose(u * s @ vt, exact[0][:, :40] * exact[1][:40] @ exact[2][:40], atol=1e-9)
    np.testing.assert_allclose(vt @ vt.T, np.eye(40), atol=1e-9)


def refuse_large(function, limit):
    """numpy's SVD, for matrices with a side of at most `limit`: proof that the sketch was taken."""

    def small(matrix, **options):
        assert min(matrix.shape) <= limit
        return function(matrix, **options)

    return small


@pytest.mark.parametrize(
    ("matrix", "chi", "words"),
    [
        (np.ones((4, 6)), 0, "chi: expected at least 1, found 0"),
        (np.ones((4, 6)), -3, "chi: expected at least 1, found -3"),
        (np.ones((4, 5)), 2, "does not multiply to a matrix of"),
        (np.full((4, 6), np.nan), 2, "not finite"),
        (np.full((4, 6), np.inf), 2, "not finite"),
    ],
    ids=["zero", "negative", "shape", "nan", "infinite"],
)
def test_what_cannot_be_fitted(matrix: Matrix, chi: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        sequential_svd(matrix, (2, 2), (2, 3), chi)
