"""Sweeps: a core's optimum in the middle of a chain, descent, and agreement with ALS for two cores."""

from __future__ import annotations

import time

import numpy as np
import pytest

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit import als, svd, sweep
from mpo_exporter.fit.common import contract
from mpo_exporter.fit.site import make_target, site_at
from mpo_formats import ConfigError
from mpo_formats.architecture import full_rank
from tests.exporter.fit_cases import Dims, case, prefix, true_error

CHAINS: list[tuple[Dims, Dims]] = [((3, 2, 2), (2, 2, 4)), ((2, 2, 3), (4, 2, 2)), ((2, 1, 2, 3), (2, 2, 2, 2))]


@pytest.mark.parametrize("dims", CHAINS)
def test_a_site_is_the_map_from_its_core_to_the_operator(dims: tuple[Dims, Dims]) -> None:
    """`expand` is the contraction, `project` its adjoint."""
    matrix, moment = case(12, 16)
    cores = list(svd.sequential_svd(matrix, *dims, 3).cores)
    target = make_target(matrix, moment, dims[1])
    source = np.random.default_rng(0)
    for k in range(len(cores)):
        place = site_at(target, cores, k)
        core, other = source.standard_normal(cores[k].shape), source.standard_normal(matrix.shape)
        whole = contract([*cores[:k], core, *cores[k + 1 :]])
        np.testing.assert_allclose(place.expand(core), whole, atol=1e-10)
        assert np.vdot(place.project(other), core) == pytest.approx(np.vdot(other, whole))


@pytest.mark.parametrize("dims", CHAINS)
def test_a_core_is_the_optimum_among_the_others(dims: tuple[Dims, Dims]) -> None:
    matrix, moment = case(12, 16)
    cores = list(svd.sequential_svd(matrix, *dims, 3).cores)
    root = np.linalg.cholesky(moment)
    target = make_target(matrix, moment, dims[1])
    for k in range(len(cores)):
        units = np.eye(cores[k].size).reshape(-1, *cores[k].shape)
        design = np.stack([(contract([*cores[:k], unit, *cores[k + 1 :]]) @ root).ravel() for unit in units], 1)
        rest = np.linalg.lstsq(design, (matrix @ root).ravel(), rcond=None)[0]
        best = np.linalg.norm(design @ rest - (matrix @ root).ravel())
        _, square = site_at(target, cores, k).solve(cores[k], 300)
        assert square == pytest.approx(best**2, rel=1e-6)


@pytest.mark.parametrize("dims", CHAINS)
@pytest.mark.parametrize("weighed", [True, False])
def test_sweeps_descend_and_tell_the_true_error(dims: tuple[Dims, Dims], weighed: bool) -> None:
    matrix, moment = case(12, 16)
    norm = moment if weighed else np.eye(16)
    errors = []
    for sweeps in (0, 1, 2, 6):
        fit = sweep.fit(matrix, Moment(moment) if weighed else None, *dims, 3, sweeps=sweeps)
        assert fit.error == pytest.approx(true_error(matrix, fit, norm), rel=1e-6)
        assert fit.bonds == tuple(min(3, most) for most in full_rank(*dims))
        errors.append(fit.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(svd.fit(matrix, Moment(moment) if weighed else None, *dims, 3).error)
    assert errors[-1] < (0.9 if weighed else 1.0) * errors[0]


def test_two_cores_end_where_als_ends() -> None:
    matrix, moment = case(24, 36)
    dims = ((6, 4), (6, 6))
    swept = sweep.fit(matrix, Moment(moment), *dims, 5, sweeps=30)
    start = svd.fit(matrix, Moment(moment), *dims, 5)
    assert swept.error == pytest.approx(
        als.fit(matrix, Moment(moment), *dims, 5, sweeps=60, start=start).error, rel=0.05
    )


def test_full_rank_is_exact() -> None:
    matrix, moment = case(12, 16)
    fit = sweep.fit(matrix, Moment(moment), (3, 2, 2), (2, 2, 4), 99)
    np.testing.assert_allclose(contract(fit.cores), matrix, atol=1e-6)


def test_prefixes_of_a_chain_hold_what_matters() -> None:
    matrix, _ = case(24, 36)
    moment = np.kron(np.kron(case(4, 3)[1], case(4, 3, 1)[1]), case(4, 4)[1])  # which its partial traces tell in full
    fit = sweep.fit(matrix, Moment(moment), (4, 3, 2), (3, 3, 4), 8)
    errors = [true_error(matrix, prefix(fit.cores, chi), moment) for chi in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    first, middle, last = fit.cores
    reversed_bonds = first[..., ::-1], middle[::-1, ..., ::-1], last[::-1]
    for chi, error in ((4, errors[1]), (6, errors[2])):
        assert true_error(matrix, prefix(reversed_bonds, chi), moment) > 1.05 * error


def test_the_clock_ends_it_between_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, moment = case(12, 16)
    begun, calls, make = time.monotonic(), [], sweep.site_at
    monkeypatch.setattr(sweep, "site_at", lambda *given: calls.append(given[2]) or make(*given))
    monkeypatch.setattr(sweep.time, "monotonic", lambda: begun + 10 * len(calls))
    cores = sweep.fit(matrix, Moment(moment), *CHAINS[0], 3, seconds=35)
    assert calls == [0, 1, 2, 1]  # there, and half of the way back
    assert cores.error == pytest.approx(true_error(matrix, cores, moment), rel=1e-6)


def test_what_sweeps_refuse() -> None:
    _, moment = case(12, 16)
    with pytest.raises(ConfigError, match="not finite"):
        sweep.fit(np.full((12, 16), np.inf), Moment(moment), (3, 2, 2), (2, 2, 4), 2)
