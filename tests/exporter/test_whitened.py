"""Whitened SVD: the optimum of low rank, its error, singular moments, what is refused; and the order of bonds."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from mpo_exporter.calibrate import moments
from mpo_exporter.calibrate.hessian import cholesky_root
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit import als, common, svd, sweep, whitened
from mpo_exporter.fit.bonds import order_bonds
from mpo_exporter.fit.common import activation_error, check_fit, contract, factor_moments
from mpo_formats import ConfigError
from tests.exporter.fit_cases import SHAPES, Dims, Matrix, case, prefix, true_error

LOW = ((12, 1), (1, 16))


def symmetric_root(moment: Matrix) -> Matrix:
    values, vectors = np.linalg.eigh(moment)
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


@pytest.mark.parametrize("dims", [LOW, ((1, 12), (16, 1)), ((3, 4), (1, 16)), ((3, 4), (16, 1))])
@pytest.mark.parametrize("chi", [1, 3])
def test_its_error_is_that_of_the_dropped_singular_values(dims: tuple[Dims, Dims], chi: int) -> None:
    """E² = Σ of the squares of the dropped singular values of the whitened matrix, rearranged to the shape."""
    matrix, moment = case(12, 16)
    (o1, o2), (i1, i2) = dims
    weighed = (matrix @ symmetric_root(moment)).reshape(o1, o2, i1, i2).transpose(0, 2, 1, 3)
    dropped = np.linalg.svd(weighed.reshape(o1 * i1, o2 * i2), compute_uv=False)[chi:]
    fit = whitened.fit(matrix, Moment(moment), *dims, chi)
    assert fit.error == pytest.approx(np.linalg.norm(dropped), rel=1e-9)
    assert fit.error == pytest.approx(true_error(matrix, fit, moment), rel=1e-6)
    assert fit.bonds == (chi,)


@pytest.mark.parametrize("dims", SHAPES)
def test_the_error_told_is_the_true_one_in_any_shape(dims: tuple[Dims, Dims]) -> None:
    matrix, moment = case(12, 16)
    for chi in (1, 2, 5):
        for method in (svd.fit, whitened.fit):
            fit = method(matrix, Moment(moment), *dims, chi)
            assert fit.error == pytest.approx(true_error(matrix, fit, moment), rel=1e-6)


def test_it_beats_the_plain_decomposition_and_equals_it_without_a_moment() -> None:
    matrix, moment = case(12, 16)
    for dims in SHAPES:
        assert whitened.fit(matrix, None, *dims, 3).error == pytest.approx(svd.fit(matrix, None, *dims, 3).error)
    assert whitened.fit(matrix, Moment(moment), *LOW, 3).error < 0.9 * svd.fit(matrix, Moment(moment), *LOW, 3).error


def test_prefixes_are_the_fits_of_a_smaller_chi() -> None:
    matrix, moment = case(12, 16)
    whole = whitened.fit(matrix, Moment(moment), *LOW, 8)
    for chi in (1, 4, 7):
        assert true_error(matrix, prefix(whole.cores, chi), moment) == pytest.approx(
            whitened.fit(matrix, Moment(moment), *LOW, chi).error, rel=1e-9
        )


def test_a_singular_moment_is_loaded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    matrix, _ = case(12, 16)
    few = np.random.default_rng(1).standard_normal((5, 16))
    moment = few.T @ few / 5
    with caplog.at_level(logging.WARNING):
        fit = whitened.fit(matrix, Moment(moment), *LOW, 5)
    assert "moment of size 16 is singular" in caplog.text
    assert fit.error < 1e-4 * activation_error(matrix, moment)  # five bonds reproduce the outputs on five inputs
    assert np.isfinite(contract(fit.cores)).all()
    np.testing.assert_allclose(few @ contract(fit.cores).T, few @ matrix.T, atol=1e-3)


def test_a_moment_of_zero_still_fits(caplog: pytest.LogCaptureFixture) -> None:
    matrix, _ = case(12, 16)
    fit = whitened.fit(matrix, Moment(np.zeros((16, 16))), *LOW, 3)
    assert fit.error == 0
    assert np.linalg.norm(matrix - contract(fit.cores)) == pytest.approx(svd.fit(matrix, None, *LOW, 3).error)


def test_no_load_where_none_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    _, moment = case(12, 16)
    np.testing.assert_allclose((root := cholesky_root(moment)) @ root.T, moment, atol=1e-12)
    assert caplog.text == ""


@pytest.mark.parametrize("method", [svd.fit, whitened.fit])
def test_a_chi_above_the_full_rank_is_cut_and_that_is_said(method, caplog: pytest.LogCaptureFixture) -> None:
    matrix, moment = case(12, 16)
    fit = method(matrix, Moment(moment), *LOW, 99)
    assert fit.bonds == (12,)
    assert fit.error < 1e-6 * activation_error(matrix, moment)
    assert "chi 99 is above the full rank" in caplog.text
    assert "cut to 12" in caplog.text


def test_what_cannot_be_fitted() -> None:
    matrix, moment = case(12, 16)
    broken = matrix.copy()
    broken[3, 7] = np.nan
    with pytest.raises(ConfigError, match="matrix: row 3, column 7 is nan"):
        whitened.fit(broken, Moment(moment), *LOW, 2)
    broken = moment.copy()
    broken[15, 0] = np.inf
    with pytest.raises(ConfigError, match="moment: row 15, column 0 is inf"):
        whitened.fit(matrix, Moment(broken), *LOW, 2)
    with pytest.raises(ConfigError, match=r"moment: expected 16 x 16, found \[4, 4\]"):
        whitened.fit(matrix, Moment(np.eye(4)), *LOW, 2)
    with pytest.raises(ConfigError, match="whitened SVD takes 2 cores"):
        whitened.fit(matrix, Moment(moment), (3, 2, 2), (4, 2, 2), 2)
    with pytest.raises(ConfigError, match="does not multiply to a matrix"):
        check_fit(matrix, None, (12, 1), (16,), 2)


def test_large_matrices_take_the_gram_matrix_or_a_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branches for large matrices give the same subspace, and the sketch one that is nearly as good."""
    rng = np.random.default_rng(0)
    for shape in ((40, 60), (60, 40)):
        matrix = rng.standard_normal(shape) @ np.diag(0.8 ** np.arange(shape[1]))
        exact = whitened.dominant_subspace(matrix, 10)
        with monkeypatch.context() as patch:
            patch.setattr(whitened, "SKETCH_SIZE", 8)
            gram = whitened.dominant_subspace(matrix, 10)
        np.testing.assert_allclose(gram @ gram.T, exact @ exact.T, atol=1e-6)


@pytest.mark.parametrize("dims", [((60, 1), (1, 80)), ((20, 3), (1, 80)), ((1, 60), (80, 1))])
def test_a_sketch_of_a_large_matrix_is_nearly_as_good(dims: tuple[Dims, Dims], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the root of the moment nor the whitened matrix is formed; the error told is the true one."""
    matrix, moment = case(60, 80)
    best = whitened.fit(matrix, Moment(moment), *dims, 2)
    monkeypatch.setattr(whitened, "SKETCH_SIZE", 8)
    for module in (whitened, moments):
        monkeypatch.setattr(module, "cholesky_root", None)
    fit = whitened.fit(matrix, Moment(moment), *dims, 2)
    assert best.error * (1 - 1e-9) <= fit.error <= 1.001 * best.error
    assert fit.error == pytest.approx(true_error(matrix, fit, moment), rel=1e-6)


def test_the_error_of_large_matrices_is_told_to_six_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single precision is enough, also where what is left avoids the strongest directions of the input."""
    for method in (whitened.fit, als.fit):
        matrix, moment = case(60, 80)
        exact = method(matrix, Moment(moment), (6, 10), (8, 10), 5)
        with monkeypatch.context() as patch:
            patch.setattr(common, "DOUBLE_WORK", 1 << 10)
            patch.setattr(common, "PANEL", 16)
            told = activation_error(matrix - contract(exact.cores), moment)
        assert told == pytest.approx(true_error(matrix, exact, moment), rel=1e-6)


def test_partial_traces_multiply_to_a_moment_that_is_a_product() -> None:
    first, second, third = (case(4, size)[1] for size in (2, 3, 4))
    moment = np.kron(np.kron(first, second), third)
    parts = factor_moments(moment, (2, 3, 4))
    np.testing.assert_allclose(np.kron(np.kron(*parts[:2]), parts[2]) * np.trace(moment) / 24, moment, atol=1e-10)
    assert [np.trace(part) for part in parts] == pytest.approx([2, 3, 4])


@pytest.mark.parametrize("dims", [((4, 3), (4, 4)), ((3, 2, 2), (2, 2, 4)), ((2, 2, 3, 1), (2, 2, 2, 2))])
def test_bonds_are_turned_to_singular_vectors_without_a_change(dims: tuple[Dims, Dims]) -> None:
    """Left and right parts of every bond become orthogonal, their squares equal and descending; the product stays."""
    matrix, _ = case(12, 16)
    cores = svd.sequential_svd(matrix, *dims, 6).cores
    source = np.random.default_rng(0)
    mixed = list(cores)
    for k in range(len(cores) - 1):  # any gauge
        turn = source.standard_normal((cores[k].shape[3],) * 2)
        mixed[k], mixed[k + 1] = mixed[k] @ turn, np.tensordot(np.linalg.inv(turn), mixed[k + 1], 1)
    ordered = order_bonds(mixed, None)
    np.testing.assert_allclose(contract(ordered), contract(cores), atol=1e-8)
    for k in range(1, len(cores)):
        left = sweep_left(ordered[:k])
        right = sweep_left([core.transpose(3, 1, 2, 0) for core in reversed(ordered[k:])])
        np.testing.assert_allclose(left.T @ left, right.T @ right, atol=1e-6)
        squares = np.diag(left.T @ left)
        np.testing.assert_allclose(left.T @ left, np.diag(squares), atol=1e-6)
        assert (np.diff(squares) <= 1e-9).all()


def sweep_left(cores) -> Matrix:
    state = np.ones((1, 1))
    for core in cores:
        state = np.einsum("pa,aoib->poib", state, core).reshape(-1, core.shape[3])
    return state


def test_sweep_is_blind_to_the_gauge_that_it_shifts() -> None:
    matrix, _ = case(12, 16)
    cores = list(svd.sequential_svd(matrix, (3, 2, 2), (2, 2, 4), 4).cores)
    whole = contract(cores)
    sweep.shift_right(cores, 0)
    sweep.shift_left(cores, 2)
    np.testing.assert_allclose(contract(cores), whole, atol=1e-10)
    first = cores[0].reshape(-1, cores[0].shape[3])
    np.testing.assert_allclose(first.T @ first, np.eye(first.shape[1]), atol=1e-10)
