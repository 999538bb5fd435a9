"""ALS: the optimum for a fixed partner against dense least squares, descent, and its error."""

from __future__ import annotations

import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit import als, common, site, svd, whitened
from mpo_exporter.fit.common import Cores, activation_error, contract
from mpo_exporter.fit.site import make_target, site_at
from mpo_formats import ConfigError
from tests.exporter.fit_cases import SHAPES, Dims, Matrix, case, prefix, true_error

BALANCED = ((4, 3), (4, 4))


def best_core(matrix: Matrix, moment: Matrix, cores: tuple[Matrix, ...], k: int) -> tuple[Matrix, float]:
    """The least-squares solution for core k and its error, from the dense design matrix: column by column, one unit core."""
    root = np.linalg.cholesky(moment)
    columns = []
    for index in range(cores[k].size):
        unit = np.zeros(cores[k].size)
        unit[index] = 1
        parts = [core if j != k else unit.reshape(core.shape) for j, core in enumerate(cores)]
        whole = np.einsum("aoib,bpjc->opij", *parts).reshape(matrix.shape)
        columns.append((whole @ root).ravel())
    design = np.stack(columns, 1)
    solution, *_ = np.linalg.lstsq(design, (matrix @ root).ravel(), rcond=None)
    return solution.reshape(cores[k].shape), float(np.linalg.norm(design @ solution - (matrix @ root).ravel()))


@pytest.mark.parametrize("dims", SHAPES)
@pytest.mark.parametrize("k", [0, 1])
def test_a_core_is_the_optimum_for_its_partner(dims: tuple[Dims, Dims], k: int) -> None:
    """By the normal equations, and by conjugate gradients that are given time."""
    matrix, moment = case(12, 16)
    cores = svd.sequential_svd(matrix, *dims, 3).cores
    wanted, error = best_core(matrix, moment, cores, k)
    target = make_target(matrix, moment, dims[1])
    direct, square = als.solve_directly(target, cores, k)
    np.testing.assert_allclose(direct, wanted, atol=1e-6 * np.abs(wanted).max())
    assert square == pytest.approx(error**2, rel=1e-8)
    steps, square = site_at(target, cores, k).solve(cores[k], 300)
    np.testing.assert_allclose(steps, wanted, atol=1e-4 * np.abs(wanted).max())
    assert square == pytest.approx(error**2, rel=1e-8)


def test_every_step_of_the_gradients_descends() -> None:
    matrix, moment = case(12, 16)
    cores = svd.sequential_svd(matrix, *BALANCED, 3).cores
    place = site_at(make_target(matrix, moment, BALANCED[1]), cores, 0)
    errors = []
    for steps in range(8):
        core, square = place.solve(cores[0], steps)
        assert square == pytest.approx(true_error(matrix, (core, cores[1]), moment) ** 2, rel=1e-9)
        errors.append(square)
    assert errors[0] == pytest.approx(svd.fit(matrix, Moment(moment), *BALANCED, 3).error ** 2)
    assert all(later < earlier for earlier, later in pairwise(errors))


@pytest.mark.parametrize("formed", [True, False])
def test_sweeps_descend(monkeypatch: pytest.MonkeyPatch, formed: bool) -> None:
    monkeypatch.setattr(als, "pays_to_form", lambda *_: formed)
    matrix, moment = case(24, 36)
    dims = ((6, 4), (6, 6))
    errors = [als.fit(matrix, Moment(moment), *dims, 5, sweeps=sweeps).error for sweeps in (0, 1, 2, 4, 8, 16)]
    assert errors[0] == pytest.approx(whitened.fit(matrix, Moment(moment), *dims, 5).error)
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.9 * errors[0]
    assert errors[-1] < 0.75 * svd.fit(matrix, Moment(moment), *dims, 5).error


@settings(max_examples=15)
@given(dims=st.sampled_from(SHAPES), chi=st.integers(1, 8), seed=st.integers(0, 5))
def test_never_worse_than_its_start_and_the_error_is_the_true_one(dims: tuple[Dims, Dims], chi: int, seed: int) -> None:
    matrix, moment = case(12, 16, seed)
    plain = svd.fit(matrix, Moment(moment), *dims, chi)
    for start, begun in ((None, whitened.fit(matrix, Moment(moment), *dims, chi)), (plain, plain)):
        fit = als.fit(matrix, Moment(moment), *dims, chi, start=start, sweeps=5)
        assert fit.error <= begun.error * (1 + 1e-9) + 1e-9
        assert fit.error == pytest.approx(true_error(matrix, fit, moment), rel=1e-6, abs=1e-7)
        assert fit.bonds == begun.bonds


def test_the_closed_form_is_returned_where_there_is_one() -> None:
    matrix, moment = case(12, 16)
    for dims in (SHAPES[0], ((3, 4), (1, 16))):
        assert als.fit(matrix, Moment(moment), *dims, 3).error == whitened.fit(matrix, Moment(moment), *dims, 3).error
    assert als.fit(matrix, None, *BALANCED, 3).error == pytest.approx(svd.fit(matrix, None, *BALANCED, 3).error)


def test_no_start_is_better_than_the_closed_form() -> None:
    matrix, moment = case(12, 16)
    fit = als.fit(matrix, Moment(moment), *SHAPES[0], 3, start=svd.fit(matrix, Moment(moment), *SHAPES[0], 3))
    assert fit.error == whitened.fit(matrix, Moment(moment), *SHAPES[0], 3).error


def test_a_prefix_is_sensible() -> None:
    """Cut prefixes get better with χ, and are at least as good as the plain decomposition of that size."""
    matrix, moment = case(24, 36)
    dims = ((6, 4), (6, 6))
    fit = als.fit(matrix, Moment(moment), *dims, 12)
    errors = [true_error(matrix, prefix(fit.cores, chi), moment) for chi in range(1, 13)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == pytest.approx(fit.error)
    for chi in (4, 8):
        assert errors[chi - 1] < svd.fit(matrix, Moment(moment), *dims, chi).error
    shuffled = fit.cores[0][..., ::-1], fit.cores[1][::-1]
    assert true_error(matrix, prefix(shuffled, 4), moment) > 1.1 * errors[3]


@pytest.mark.parametrize("formed", [True, False])
def test_a_singular_moment(monkeypatch: pytest.MonkeyPatch, formed: bool) -> None:
    monkeypatch.setattr(als, "pays_to_form", lambda *_: formed)
    matrix, _ = case(12, 16)
    few = np.random.default_rng(1).standard_normal((6, 16))
    moment = few.T @ few / 6
    fit = als.fit(matrix, Moment(moment), *BALANCED, 3)
    assert fit.error <= whitened.fit(matrix, Moment(moment), *BALANCED, 3).error
    assert all(np.isfinite(core).all() for core in fit.cores)


def test_large_products_in_single_precision_find_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, moment = case(24, 36)
    dims = ((6, 4), (6, 6))
    wide = als.fit(matrix, Moment(moment), *dims, 5)
    monkeypatch.setattr(site, "DOUBLE_WORK", 0)
    assert make_target(matrix, moment, dims[1]).product.dtype == np.float32
    for formed in (True, False):
        monkeypatch.setattr(als, "pays_to_form", lambda *_, formed=formed: formed)
        narrow = als.fit(matrix, Moment(moment), *dims, 5)
        assert narrow.error == pytest.approx(wide.error, rel=0.02)
        assert narrow.error == pytest.approx(true_error(matrix, narrow, moment), rel=1e-6)


def test_the_normal_equations_are_formed_where_they_are_cheap() -> None:
    square = (64, 64), (64, 64)
    assert als.pays_to_form(*square, 32, 0)
    assert not als.pays_to_form(*square, 256, 0)
    assert not als.pays_to_form((4096, 1), (2, 2048), 32, 0)  # the partner's Gram matrix would not fit


def test_the_clock_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, moment = case(12, 16)
    begun = time.monotonic()
    calls = []
    solve = als.solve_directly
    monkeypatch.setattr(als, "pays_to_form", lambda *_: True)
    monkeypatch.setattr(als, "solve_directly", lambda *given: calls.append(1) or solve(*given))
    monkeypatch.setattr(als.time, "monotonic", lambda: begun + 10 * len(calls))
    als.fit(matrix, Moment(moment), *BALANCED, 3, sweeps=50, seconds=25)
    assert len(calls) == 3  # a sweep of two cores and a half


def test_what_als_refuses() -> None:
    matrix, moment = case(12, 16)
    with pytest.raises(ConfigError, match="ALS takes 2 cores; fit 3 by sweeps"):
        als.fit(matrix, Moment(moment), (3, 2, 2), (4, 2, 2), 2)
    with pytest.raises(ConfigError, match="start: expected cores of shape"):
        als.fit(matrix, Moment(moment), *BALANCED, 2, start=svd.fit(matrix, Moment(moment), *SHAPES[2], 2))
    with pytest.raises(ConfigError, match="start: expected cores of shape"):
        als.fit(matrix, Moment(moment), *BALANCED, 2, start=svd.fit(matrix, Moment(moment), *BALANCED, 3))
    with pytest.raises(ConfigError, match="chi: expected at least 1"):
        als.fit(matrix, Moment(moment), *BALANCED, 0)


def test_a_matrix_of_zeros() -> None:
    _, moment = case(12, 16)
    fit = als.fit(np.zeros((12, 16)), Moment(moment), *BALANCED, 2)
    assert fit.error == 0
    assert isinstance(fit, Cores)
    assert activation_error(np.zeros((12, 16)), moment) == 0


def test_a_partner_of_zeros_gives_zeros() -> None:
    matrix, moment = case(12, 16)
    start = Cores((np.ones((1, 4, 4, 2)), np.zeros((2, 3, 4, 1))), 0.0)
    fit = als.fit(matrix, Moment(moment), *BALANCED, 2, start=start, sweeps=20)
    assert fit.error <= activation_error(matrix, moment) * (1 + 1e-9)
    assert all(np.isfinite(core).all() for core in fit.cores)


@pytest.mark.parametrize("share", [0.5, 0.99, 0.9999])
def test_errors_of_large_matrices_are_exact_where_one_direction_holds_nearly_all(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the mean of massive activations does."""
    source = np.random.default_rng(0)
    matrix, inputs = source.standard_normal((60, 96)), source.standard_normal((400, 96))
    moment, lead = inputs.T @ inputs / 400, source.standard_normal(96)
    moment = (1 - share) * moment / np.trace(moment) + share * np.outer(lead, lead) / (lead @ lead)
    fitted = whitened.fit(matrix, Moment(moment), (60, 1), (1, 96), 12)
    residual = matrix - contract(fitted.cores)
    monkeypatch.setattr(common, "DOUBLE_WORK", 0)
    assert common.activation_error(residual, moment) == pytest.approx(fitted.error, rel=1e-6)
