"""Error-compensated rounding: against brute force, round-to-nearest, and the error that it claims to lower."""

from __future__ import annotations

import itertools
import logging

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_exporter.basis import PLAIN, Basis
from mpo_exporter.calibrate import hessian, moments
from mpo_exporter.calibrate.hessian import processing_order
from mpo_exporter.calibrate.moments import Moment
from mpo_exporter.fit.common import activation_error
from mpo_exporter.quantize import native
from mpo_exporter.quantize.descent import Problem, State, descend, errors, gradient_of
from mpo_exporter.quantize.gptq import compensated, expected_residuals, sweep, target
from mpo_exporter.quantize.grid import Grid, Levels, encode, half, inverse, search
from mpo_exporter.quantize.rounding import round_to_nearest
from mpo_formats import ConfigError
from mpo_formats.packing import dequantize
from mpo_formats.spec import BITS, GROUPS

Matrix = NDArray[np.float64]


def moment_of(size: int, seed: int, tokens: int = 0) -> Matrix:
    """The second moment of correlated inputs whose scales differ by a few orders, as a model's do."""
    source = np.random.default_rng(seed)
    mix = source.standard_normal((size, size)) / np.sqrt(size) + np.eye(size)
    inputs = source.standard_normal((tokens or 4 * size, size)) @ mix * np.exp(source.standard_normal(size))
    result: Matrix = inputs.T @ inputs / len(inputs)
    return result


def weights(rows: int, columns: int, seed: int) -> Matrix:
    return np.random.default_rng(seed).standard_normal((rows, columns))


@settings(max_examples=25)
@given(bits=st.sampled_from(BITS), group=st.sampled_from(GROUPS[:3]), zeros=st.booleans(), seed=st.integers(0, 99))
def test_compensation_beats_rounding_to_nearest_in_the_activation_norm(
    bits: int, group: int, zeros: bool, seed: int
) -> None:
    matrix, moment = weights(24, 2 * group, seed), moment_of(2 * group, seed)
    ours = compensated(matrix, Moment(moment), bits, group, zeros=zeros)
    nearest = round_to_nearest(matrix, bits, group, zeros=zeros)
    assert activation_error(matrix - ours.matrix(), moment) < activation_error(matrix - nearest.matrix(), moment)
    assert (ours.zero is not None) == zeros
    np.testing.assert_array_equal(dequantize(ours.planes(), bits, ours.scale, ours.zero), ours.matrix())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_descent_improves_on_plain_gptq(bits: int) -> None:
    matrix, moment = weights(32, 128, bits), moment_of(128, bits)
    found = [
        activation_error(matrix - compensated(matrix, Moment(moment), bits, 32, turns=turns).matrix(), moment)
        for turns in (0, 1, 4)
    ]
    assert found[0] > found[1] > found[2]


def problem_of(group: int, columns: int, levels: Levels, seed: int) -> tuple[Problem, torch.Tensor, State]:
    """A problem and a start that is far from its best."""
    source = torch.Generator().manual_seed(seed)
    rows = 6
    hessian = Moment(moment_of(columns, seed)).hessian(group).matrix
    wanted = torch.randn((columns, rows), generator=source)
    scale = half(torch.rand((columns // group, rows), generator=source) + 0.3)
    zero = half(torch.full_like(scale, levels.middle - 0.25 * levels.zeros))
    spread = (part.repeat_interleave(group, 0) for part in (inverse(scale), zero))
    return Problem(hessian, group, levels), wanted, State(encode(wanted, *spread, levels), scale, zero)


@settings(max_examples=25)
@given(bits=st.sampled_from((2, 3, 4)), zeros=st.booleans(), seed=st.integers(0, 99))
def test_no_step_of_the_descent_raises_any_rows_error(bits: int, zeros: bool, seed: int) -> None:
    problem, wanted, state = problem_of(16, 96, Levels(bits, zeros), seed)
    now = errors(problem, wanted, state)
    gradient = gradient_of(problem, wanted, state)
    for _ in range(4):
        state = descend(problem, state, gradient)
        then = errors(problem, wanted, state)
        assert (then <= now * (1 + 1e-4)).all()
        now = then


@pytest.mark.parametrize("group", [16, 32, 64, 256])
def test_the_gradient_stays_that_of_the_state(group: int) -> None:
    """Over several blocks and with groups smaller and larger than what is updated at once."""
    problem, wanted, state = problem_of(group, 512, Levels(3, True), group)
    gradient = gradient_of(problem, wanted, state)
    for _ in range(2):
        state = descend(problem, state, gradient)
    torch.testing.assert_close(gradient, gradient_of(problem, wanted, state), rtol=1e-3, atol=1e-4)


def test_descent_ends_where_no_single_code_can_be_bettered() -> None:
    problem, wanted, state = problem_of(16, 32, Levels(2, False), 3)
    gradient = gradient_of(problem, wanted, state)
    for _ in range(50):
        state = descend(problem, state, gradient)
    least = errors(problem, wanted, state)
    for column in range(32):
        for code in range(4):
            codes = state.codes.clone()
            codes[column] = code
            assert (errors(problem, wanted, State(codes, state.scale, state.zero)) >= least * (1 - 1e-5)).all()


@pytest.mark.parametrize("seed", range(4))
def test_close_to_the_best_of_all_codes_on_a_tiny_row(seed: int) -> None:
    """All 4^8 codes of a row, with the scales that were found: brute force may do a little better, never much."""
    moment = np.kron(np.eye(2), moment_of(8, seed))  # two independent halves; the second one's codes stay as found
    matrix = np.concatenate([weights(1, 8, seed), np.zeros((1, 8))], 1)
    ours = compensated(matrix, Moment(moment), 2, 16, turns=8)
    codes = np.array(list(itertools.product(range(4), repeat=8)), np.float64)
    scale = float(ours.scale[0, 0])
    rest = np.broadcast_to(ours.matrix()[:, 8:], (len(codes), 8))
    candidates = np.concatenate([scale * (codes - 1.5), rest], 1)
    residual = matrix - candidates
    best = np.sqrt(np.einsum("ki,ij,kj->k", residual, moment, residual).min())
    found = activation_error(matrix - ours.matrix(), moment)
    assert best * (1 - 1e-9) <= found <= 1.35 * best


@pytest.mark.parametrize("zeros", [False, True])
def test_a_group_that_rests_has_the_scale_of_least_squares(zeros: bool) -> None:
    """Once nothing changes any more, scale (and zero) solve the normal equations of their group, written out in double."""
    problem, wanted, state = problem_of(16, 48, Levels(4, zeros), 1)
    gradient = gradient_of(problem, wanted, state)
    for _ in range(30):
        state = descend(problem, state, gradient)
    hessian = problem.hessian.double()
    fitted = state.matrix(16).double()
    for row in range(wanted.shape[1]):
        for group in range(3):
            inside = slice(16 * group, 16 * group + 16)
            rest = (wanted[:, row].double() - fitted[:, row]) @ hessian[:, inside]
            rest += fitted[inside, row] @ hessian[inside, inside]
            basis = state.codes[inside, row, None].double()
            basis = torch.cat([basis, torch.ones_like(basis)], 1) if zeros else basis - 8
            own = hessian[inside, inside]
            best = basis @ torch.linalg.solve(basis.T @ own @ basis, basis.T @ rest)
            least, found = (float(part @ own @ part - 2 * part @ rest) for part in (best, fitted[inside, row]))
            assert found - least <= 1e-3 * float(fitted[inside, row] @ own @ fitted[inside, row])


def test_the_sweep_is_that_of_gptq() -> None:
    """Against the paper's own update of the remaining columns by the root of the inverse Hessian, in double precision."""
    moment, matrix = moment_of(64, 5), weights(7, 64, 5)
    hessian = Moment(moment).hessian(16)
    levels = Levels(3, False)
    wanted = torch.from_numpy(matrix).float()[:, hessian.order].T.contiguous()
    state = sweep(Problem(hessian.matrix, 16, levels), hessian, wanted)
    root = torch.linalg.cholesky(torch.linalg.inv(hessian.matrix.double()), upper=True)
    rest = wanted.double()
    for column in range(64):
        at = column // 16
        code = encode(rest[column].float(), inverse(state.scale[at]), state.zero[at], levels)
        assert (code == state.codes[column]).all()
        lost = (rest[column] - state.scale[at] * (code - state.zero[at])) / root[column, column]
        rest[column + 1 :] -= root[column, column + 1 :, None] * lost


def test_a_moment_computes_its_root_and_its_hessian_once() -> None:
    moment = Moment(moment_of(32, 0))
    first = moment.hessian(16)
    assert moment.hessian(16) is first
    assert moment.hessian(16, damping=0.5) is not first
    again = moment.hessian(16)
    assert again is not first  # only the last one is kept
    torch.testing.assert_close(again.matrix, first.matrix, rtol=0, atol=0)
    assert moment.root is moment.root
    np.testing.assert_allclose(moment.root @ moment.root.T, moment.second, atol=1e-10)


@settings(max_examples=20)
@given(bits=st.sampled_from((2, 3, 4)), zeros=st.booleans(), seed=st.integers(0, 99))
def test_the_search_of_a_grid_beats_a_fine_sweep_or_comes_close(bits: int, zeros: bool, seed: int) -> None:
    values = torch.randn((32, 3), generator=torch.Generator().manual_seed(seed))
    weight = torch.rand(32, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    levels = Levels(bits, zeros)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
        return weight @ (values - scale * (encode(values, inverse(scale), zero, levels) - zero)).square()

    found = error(*search(values, weight, levels))
    extreme = torch.where(values.amax(0) > -values.amin(0), -values.amax(0), -values.amin(0))
    for shrink in torch.linspace(0.4, 1.05, 14):
        plain = half(extreme * shrink / levels.middle)
        if not zeros:
            assert (found <= error(plain, torch.full_like(plain, levels.middle)) * (1 + 1e-5)).all()
    span = (values.amax(0) - values.amin(0)) / levels.top
    if zeros:
        assert (found <= error(half(span), half(-values.amin(0) / span)) * (1 + 1e-2)).all()


@given(groups=st.integers(1, 6), group=st.sampled_from(GROUPS), seed=st.integers(0, 99))
def test_the_processing_order_keeps_groups_whole(groups: int, group: int, seed: int) -> None:
    diagonal = torch.rand(groups * group, generator=torch.Generator().manual_seed(seed))
    order = processing_order(diagonal, group)
    assert sorted(order.tolist()) == list(range(groups * group))
    for start in range(0, groups * group, group):
        inside = order[start : start + group]
        assert len(set((inside // group).tolist())) == 1
        assert (diagonal[inside].diff() <= 0).all()


def test_a_changed_upstream_is_made_up_for() -> None:
    """With x̂ a linear map of x, the target undoes the map; with a drift it makes up for that too."""
    source = np.random.default_rng(0)
    x, drift = source.standard_normal((4000, 16)), source.standard_normal((8, 16))
    turn = np.eye(16) + 0.1 * source.standard_normal((16, 16))
    seen = x @ turn.T
    second, cross = seen.T @ seen / 4000, x.T @ seen / 4000
    matrix = weights(8, 16, 1)
    plain = target(matrix, Moment(second, cross), damping=0)
    np.testing.assert_allclose(plain @ turn, matrix, atol=1e-5)
    wanted = target(matrix, Moment(second, cross, drift=drift @ second), damping=0)
    np.testing.assert_allclose(wanted - plain, drift, atol=1e-5)
    assert target(matrix, Moment(second)) is matrix


@pytest.mark.parametrize("damping", [0.05, 0.5])
def test_the_change_of_a_target_is_a_ridge_regression(damping: float) -> None:
    source = np.random.default_rng(1)
    matrix, second = weights(24, 64, 2), moment_of(64, 1)
    cross, drift = second + source.standard_normal((64, 64)), source.standard_normal((24, 64))
    sides = matrix @ (cross - second) + drift
    wanted = matrix + sides @ np.linalg.inv(second + damping * np.trace(second) / 64 * np.eye(64))
    moment = Moment(second, cross, drift=drift)
    for _ in range(2):  # with the root computed, and with the one that was kept
        np.testing.assert_allclose(target(matrix, moment, damping), wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("rows", [24, 96])
def test_the_target_of_a_large_matrix_in_bf16(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """Products with factors of 8 bits, with the inverse where there are many rows: the change is right to two percent."""
    source = np.random.default_rng(1)
    matrix, second = weights(rows, 1024, 2), moment_of(1024, 1)
    cross = second + 0.1 * source.standard_normal((1024, 1024))
    drift = source.standard_normal((rows, 1024))
    exact = target(matrix, Moment(second, cross, drift=drift))
    monkeypatch.setattr(native, "FAST_COLUMNS", 1024)
    found = target(matrix, Moment(second, cross, drift=drift))
    assert np.linalg.norm(found - exact) < 0.02 * np.linalg.norm(exact - matrix)


def test_pivots_of_wide_inputs_are_those_of_their_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    second = moment_of(128, 3)
    apart = second.copy()
    apart[:64, 64:] = apart[64:, :64] = 0
    whole = Moment(apart)
    wanted = {basis: whole.pivots(16, basis) for basis in (PLAIN, Basis(32))}
    for module, names in ((hessian, ("WIDE", "PART", "UNIT")), (moments, ("WIDE",))):
        for name in names:
            monkeypatch.setattr(module, name, 64)
    parted = Moment(second.copy())
    for basis in (PLAIN, Basis(32), PLAIN):
        np.testing.assert_allclose(parted.pivots(16, basis), wanted[basis], rtol=2e-3)
    np.testing.assert_array_equal(parted.second, second)


@pytest.mark.parametrize("group", [16, 64])
def test_pivots_of_both_bases_are_those_of_the_hessians(group: int) -> None:
    second = moment_of(128, 3)
    known, moment = {}, Moment(second.copy())
    for basis in (PLAIN, Basis(32)):
        moment.turn(basis)
        hessian = moment.hessian(group)
        known[basis] = np.empty(128, np.float32)
        known[basis][hessian.order.numpy()] = hessian.weight.numpy()
    fresh = Moment(second.copy())
    for basis in (PLAIN, Basis(32), PLAIN, Basis(32)):
        np.testing.assert_allclose(fresh.pivots(group, basis), known[basis], rtol=2e-3)
    assert np.array_equal(fresh.pivots(group, PLAIN), fresh.pivots(group, PLAIN))
    empty = Moment(np.zeros((128, 128)))
    np.testing.assert_allclose(empty.pivots(group, PLAIN), empty.hessian(group).weight.numpy(), rtol=1e-6)


def test_the_expected_error_is_near_the_real_one() -> None:
    matrix, moment = weights(64, 128, 0), moment_of(128, 0)
    grids = [Grid(bits, 32) for bits in (2, 3, 4)]
    residuals, weight = expected_residuals(matrix, Moment(moment), grids)
    for grid, residual in zip(grids, residuals, strict=True):
        real = activation_error(matrix - compensated(matrix, Moment(moment), grid.bits, 32, turns=0).matrix(), moment)
        assert 0.8 < real / np.sqrt((np.square(residual) @ weight).sum()) < 1.25


def test_a_singular_moment_is_loaded_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    moment = -1e-3 * np.eye(32)
    moment[0, 0] = 40.0  # rounding may leave such a thing of too few tokens, only less
    with caplog.at_level(logging.WARNING):
        found = compensated(weights(4, 32, 0), Moment(moment), 4, 32, damping=1e-5)
    assert "second moment of 32 inputs is singular" in caplog.text
    assert np.isfinite(found.matrix()).all()
    with caplog.at_level(logging.WARNING):
        assert np.isfinite(compensated(weights(4, 32, 0), Moment(np.zeros((32, 32))), 4, 32).matrix()).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"matrix": np.full((4, 32), np.nan)}, "matrix: row 0, column 0 is nan, not finite"),
        ({"moment": Moment(np.full((32, 32), np.inf))}, "second moment: has values that are not finite"),
        ({"moment": Moment(np.eye(16))}, "do not fit together"),
        ({"group": 64}, "do not fit together"),
        ({"matrix": np.full((4, 32), 1e9)}, "exceed the range of half-precision scales"),
    ],
)
def test_what_cannot_be_rounded(change: dict[str, object], words: str) -> None:
    arguments = {"matrix": np.ones((4, 32)), "moment": Moment(np.eye(32)), "bits": 4, "group": 32, **change}
    with pytest.raises(ConfigError, match=words):
        compensated(**arguments)


def test_the_same_input_gives_the_same_codes() -> None:
    matrix, moment = weights(16, 64, 0), moment_of(64, 0)
    first, second = (compensated(matrix, Moment(moment), 3, 32, zeros=True) for _ in range(2))
    np.testing.assert_array_equal(first.codes, second.codes)
    np.testing.assert_array_equal(first.scale, second.scale)
