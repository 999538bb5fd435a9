"""The shape search: limits hold, scores are the dropped shares, and the result is never worse than whitened SVD."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit import search, whitened
from mpo_exporter.fit.search import Limits, bond_multiply_adds, dropped_share, score_shapes
from mpo_exporter.fit.shapes import low_rank_shape
from mpo_formats import Mpo, PlanError
from mpo_formats.architecture import full_rank
from mpo_runtime.layers.contraction import sweep_cost
from tests.exporter.fit_cases import Dims, Matrix, case, true_error


def kronecker(rows: int, columns: int) -> tuple[Matrix, Matrix]:
    """A sum of two Kronecker products, which no low-rank shape reproduces, and a moment that is a product."""
    source = np.random.default_rng(0)
    pairs = [(source.standard_normal((4, 4)), source.standard_normal((rows // 4, columns // 4))) for _ in range(2)]
    moment = np.kron(case(4, 4)[1], case(4, columns // 4)[1])
    return sum(np.kron(*pair) for pair in pairs), moment


@settings(max_examples=10)
@given(seed=st.integers(0, 20), share=st.sampled_from([0.3, 0.5, 0.7]))
def test_never_worse_than_whitened_svd(seed: int, share: float) -> None:
    matrix, moment = case(12, 16, seed)
    limit = int(share * matrix.size)
    found = search.search(matrix, Moment(moment), Limits(limit), keep=1)
    plain = whitened.fit(matrix, Moment(moment), *low_rank_shape(12, 16), limit // 28)
    assert found.error <= plain.error
    assert found.error == pytest.approx(true_error(matrix, found, moment), rel=1e-6, abs=1e-7)
    assert sum(core.size for core in found.cores) <= limit


def test_the_shape_in_which_the_matrix_was_made_is_found() -> None:
    matrix, moment = kronecker(16, 24)
    found = search.search(matrix, Moment(moment), Limits(2 * (16 + 24)))
    assert [core.shape[1:3] for core in found.cores] == [(4, 4), (4, 6)]
    assert found.error < 1e-6 * true_error(matrix, tuple(np.zeros_like(core) for core in found.cores), moment)


def test_all_shapes_are_scored_by_what_they_drop() -> None:
    matrix, moment = kronecker(16, 24)
    limits = Limits(160)
    scored = score_shapes(matrix, moment, limits)
    shapes = {(shape.out_dims, shape.in_dims) for shape in scored}
    assert len(shapes) == len(scored)
    for out in (1, 2, 4, 8, 16):
        for inner in (1, 2, 3, 4, 6, 8, 12, 24):
            dims = (out, 16 // out), (inner, 24 // inner)
            wanted = min(160 // (out * inner + 384 // (out * inner)), full_rank(*dims)[0])
            if (out, inner) == (1, 24):
                assert dims not in shapes  # (16, 1) x (1, 24) again
            else:
                assert (dims in shapes) == (wanted > 0)
    assert [shape.dropped for shape in scored] == sorted(shape.dropped for shape in scored)
    for shape in scored:
        # the moment is a product of 4 and 6, so that the score of these shapes is exact
        if shape.in_dims in ((4, 6), (1, 24)):
            error = whitened.fit(matrix, Moment(moment), shape.out_dims, shape.in_dims, shape.chi).error
            whole = np.trace(matrix @ moment @ matrix.T)
            assert shape.dropped == pytest.approx(error**2 / whole, rel=1e-6, abs=1e-9)


@given(out=st.tuples(*[st.integers(1, 6)] * 2), inner=st.tuples(*[st.integers(1, 6)] * 2), chi=st.integers(1, 4))
def test_multiply_adds_are_those_of_the_runtime(out: Dims, inner: Dims, chi: int) -> None:
    chi = min(chi, *full_rank(out, inner))
    term = Mpo(out, inner, (chi,), "f16", 0)
    wanted = min(sweep_cost(term, 1, reverse) for reverse in (False, True))
    assert chi * bond_multiply_adds(out, inner) == wanted


def test_limits_hold() -> None:
    matrix, moment = case(12, 16)
    for shape in score_shapes(matrix, moment, Limits(96, multiply_adds=150)):
        cost = shape.chi * bond_multiply_adds(shape.out_dims, shape.in_dims)
        assert cost <= 150
    limits = Limits(96, seconds=0.25, latency=lambda out, inner, chi: 0.1 * chi)
    assert {shape.chi for shape in score_shapes(matrix, moment, limits)} == {1, 2}
    never = Limits(96, seconds=0.25, latency=lambda *_: math.inf)
    with pytest.raises(PlanError, match="no factor shape of a 12 x 16 matrix"):
        search.search(matrix, Moment(moment), never)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parameters": 0}, "at least 1 parameter"),
        ({"parameters": 5, "multiply_adds": 0}, "at least 1 parameter"),
        ({"parameters": 5, "seconds": 1.0}, "go together"),
        ({"parameters": 5, "latency": lambda *_: 1.0}, "go together"),
    ],
)
def test_limits_that_cannot_be(options, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Limits(**options)


def test_scores_of_large_matrices_come_from_a_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    source = np.random.default_rng(0)
    matrix = source.standard_normal((80, 100)) @ np.diag(0.9 ** np.arange(100)) @ source.standard_normal((100, 100))
    for part in (matrix, matrix.T):
        exact = dropped_share(part, 10)
        values = np.square(np.linalg.svd(part, compute_uv=False))
        assert exact == pytest.approx(values[10:].sum() / values.sum())
        with monkeypatch.context() as patch:
            patch.setattr(search, "EXACT_SIZE", 1)
            assert dropped_share(part, 10) == pytest.approx(exact, rel=0.1)
    assert dropped_share(matrix, 80) == 0
