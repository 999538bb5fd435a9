"""The native kernel, its numpy twin and a per-element float64 loop agree; inputs that do not fit are refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from mpo_formats.layout import PLANES
from mpo_formats.spec import GROUPS
from mpo_runtime import native

needs_native = pytest.mark.skipif(not native.available(), reason="the native kernels were not built")


@dataclass(frozen=True, slots=True)
class Case:
    """A quantised matrix and, packed independently of the code under test, its planes."""

    bits: int
    levels: NDArray[np.uint8]  # [rows, groups, group]
    planes: list[NDArray[np.uint8]]
    scale: NDArray[np.float16]
    zero: NDArray[np.float16] | None


def pack(levels: NDArray[np.uint8], widths: tuple[int, ...]) -> list[NDArray[np.uint8]]:
    """Pack levels [rows, groups, group] through numpy's bit arrays, a different way from the loops under test."""
    bits = np.unpackbits(levels[..., None], axis=-1, bitorder="little")  # [rows, groups, group, 8]
    planes, first = [], 0
    for width in widths:
        plane_bits = bits[..., first : first + width].reshape(*levels.shape[:2], levels.shape[2] * width)
        planes.append(np.packbits(plane_bits, axis=-1, bitorder="little"))
        first += width
    return planes


def make_case(
    bits: int, group: int = 32, rows: int = 3, groups: int = 2, with_zero: bool = True, seed: int = 0
) -> Case:
    """Draw a quantised matrix whose scales and zeros cover float16 from subnormals to its largest value."""
    generator = np.random.default_rng(seed)

    def halves() -> NDArray[np.float16]:
        drawn = generator.integers(0, 2**16, (rows, groups), dtype=np.uint16).view(np.float16)
        return np.where(np.isfinite(drawn), drawn, np.float16(0.1))

    levels = generator.integers(0, 2**bits, (rows, groups, group), dtype=np.uint8)
    return Case(bits, levels, pack(levels, PLANES[bits]), halves(), halves() if with_zero else None)


def by_hand(case: Case) -> NDArray[np.float64]:
    """Read every element where the layout says it is, and compute it in float64, one at a time."""
    rows, groups, group = case.levels.shape
    out = np.empty((rows, groups, group))
    for row, block, j in np.ndindex(rows, groups, group):
        level, shift = 0, 0
        for plane, width in zip(case.planes, PLANES[case.bits], strict=True):
            byte = int(plane[row, block, j * width // 8])
            level |= (byte >> (j * width % 8) & (2**width - 1)) << shift
            shift += width
        zero = (
            (1.5 if case.bits == 2 else 2.0 ** (case.bits - 1)) if case.zero is None else float(case.zero[row, block])
        )
        out[row, block, j] = float(case.scale[row, block]) * (level - zero)
    return out.reshape(rows, groups * group)


cases = st.builds(
    make_case,
    bits=st.sampled_from(sorted(PLANES)),
    group=st.sampled_from(GROUPS),
    rows=st.integers(1, 4),
    groups=st.integers(1, 3),
    with_zero=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)


def native_all(case: Case) -> dict[str, NDArray[np.float32]]:
    """Run the native kernel once for every instruction set that this CPU has."""
    from mpo_runtime import _native

    rows, groups, group = case.levels.shape
    results = {}
    for isa in _native.supported_isas():
        results[isa] = np.full((rows, groups * group), np.nan, dtype=np.float32)
        zero = None if case.zero is None else case.zero.view(np.uint16)
        _native.dequantize(case.planes, case.bits, case.scale.view(np.uint16), zero, results[isa], isa)
    return results


@given(case=cases)
def test_numpy_equals_the_float64_loop(case: Case) -> None:
    expected = by_hand(case)
    # Two float32 roundings: half a unit of the last place each.
    np.testing.assert_allclose(
        native.dequantize_numpy(case.planes, case.bits, case.scale, case.zero), expected, rtol=2.0**-23, atol=0
    )


@needs_native
@given(case=cases)
def test_native_equals_numpy_bit_for_bit_on_every_instruction_set(case: Case) -> None:
    expected = native.dequantize_numpy(case.planes, case.bits, case.scale, case.zero).view(np.uint32)
    for isa, result in native_all(case).items():
        np.testing.assert_array_equal(result.view(np.uint32), expected, err_msg=isa)
    chosen = native.dequantize(case.planes, case.bits, case.scale, case.zero)
    np.testing.assert_array_equal(chosen.view(np.uint32), expected)


@needs_native
def test_native_converts_every_finite_half() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    scale = halves[np.isfinite(halves)].reshape(-1, 8)
    ones = np.full((*scale.shape, 16), 129, dtype=np.uint8)  # 129 - 128 = 1: the result is the scale itself
    result = native.dequantize([ones], 8, scale).reshape(*scale.shape, 16)
    np.testing.assert_array_equal(result, np.repeat(scale[..., None].astype(np.float32), 16, axis=-1))


def test_more_rows_than_one_chunk_of_the_numpy_path() -> None:
    case = make_case(4, group=128, rows=150, groups=20, with_zero=False)
    result = native.dequantize_numpy(case.planes, 4, case.scale)
    expected = case.scale[..., None].astype(np.float32) * (case.levels - np.float32(8))
    np.testing.assert_array_equal(result, expected.reshape(150, -1))


@pytest.mark.parametrize("function", [native.dequantize, native.dequantize_numpy])
def test_empty_read_only_and_strided_inputs(function: Callable[..., NDArray[np.float32]]) -> None:
    for rows, groups in ((0, 2), (2, 0), (0, 0)):
        empty = make_case(6, rows=rows, groups=groups)
        assert function(empty.planes, 6, empty.scale, empty.zero).shape == (rows, 32 * groups)

    case = make_case(5, rows=6, with_zero=False)
    for array in (*case.planes, case.scale):
        array.flags.writeable = False  # as a memory-mapped file gives it
    every_second = function([plane[::2] for plane in case.planes], 5, case.scale[::2])
    np.testing.assert_array_equal(every_second, function(case.planes, 5, case.scale)[::2])


def changed(**changes: Any) -> dict[str, Any]:
    """Return valid arguments of a 6-bit matrix, with some of them replaced."""
    case = make_case(6)
    return {"planes": case.planes, "bits": 6, "scale": case.scale, "zero": case.zero} | changes


ERRORS = {
    "bits is 7": {"bits": 7},
    "4 bits are 1 plane": {"bits": 4},
    "6 bits are 2 plane": {"planes": make_case(6).planes[:1]},
    "got 0": {"planes": []},
    "expected \\[rows, groups, bytes\\]": {"planes": [np.zeros((3, 32), np.uint8)] * 2},
    "groups of 48 elements": {"planes": [np.zeros((3, 2, 24), np.uint8), np.zeros((3, 2, 12), np.uint8)]},
    "groups of 0 elements": {"planes": [np.zeros((3, 2, 0), np.uint8)] * 2},
    "plane 1 is uint8 \\[3, 2, 16\\]": {"planes": [np.zeros((3, 2, 16), np.uint8)] * 2},
    "plane 0 is int8": {"planes": [np.zeros((3, 2, 16), np.int8), np.zeros((3, 2, 8), np.uint8)]},
    "scale is float32": {"scale": np.ones((3, 2), np.float32)},
    "scale is float16 \\[2, 3\\]": {"scale": np.ones((2, 3), np.float16)},
    "zero is float16 \\[3\\]": {"zero": np.ones(3, np.float16)},
}


@pytest.mark.parametrize("function", [native.dequantize, native.dequantize_numpy])
@pytest.mark.parametrize("message", ERRORS)
def test_what_does_not_fit_is_refused(function: Callable[..., NDArray[np.float32]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(**changed(**ERRORS[message]))


NATIVE_ERRORS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "bits is 1,": (ValueError, {"bits": 1}),
    "1 plane": (ValueError, {"bits": 8}),
    "groups of 24 elements": (ValueError, {"planes": [np.zeros((3, 2, 12), np.uint8)] * 2}),
    "plane 1 has shape \\[3, 2, 16\\]": (ValueError, {"planes": [np.zeros((3, 2, 16), np.uint8)] * 2}),
    "scale has shape \\[2, 3\\]": (ValueError, {"scale": np.zeros((2, 3), np.uint16)}),
    "zero has shape \\[2, 3\\]": (ValueError, {"zero": np.zeros((2, 3), np.uint16)}),
    "out has shape \\[3, 63\\]": (ValueError, {"out": np.zeros((3, 63), np.float32)}),
    "no instruction set 'z80'": (ValueError, {"isa": "z80"}),
    # Wrong dtypes and strided memory are never converted silently: a converted `out` would lose the result.
    "float64": (TypeError, {"out": np.zeros((3, 64), np.float64)}),
    "float32": (TypeError, {"out": np.zeros((3, 128), np.float32)[:, ::2]}),
    "float16": (TypeError, {"scale": np.zeros((3, 2), np.float16)}),
    "int8": (TypeError, {"planes": [np.zeros((3, 2, 16), np.int8), np.zeros((3, 2, 8), np.int8)]}),
}


@needs_native
@pytest.mark.parametrize("message", NATIVE_ERRORS)
def test_the_native_function_guards_itself(message: str) -> None:
    from mpo_runtime import _native

    kind, change = NATIVE_ERRORS[message]
    arguments = changed(out=np.zeros((3, 64), np.float32))
    arguments["scale"] = arguments["scale"].view(np.uint16)
    arguments["zero"] = arguments["zero"].view(np.uint16)
    with pytest.raises(kind, match=message if kind is ValueError else None):
        _native.dequantize(**(arguments | change))


def test_active_names_what_runs() -> None:
    names = native.active()
    if native.available():
        from mpo_runtime import _native

        assert names["native"] == _native.active_isa()
        assert names["threads"] == str(_native.threads())
        assert _native.supported_isas()[-1] == "generic"
        assert names["dequantize"] == f"native ({_native.active_isa()})"
    else:
        assert names["native"].startswith("absent: ")
        assert names["dequantize"] == "numpy"


@needs_native
def test_a_timed_pass_runs_every_layer() -> None:
    from mpo_runtime import _native

    def layer(rows: int, columns: int) -> Any:
        matrix = _native.Matrix.dense("w", "f32", rows, columns, np.zeros(4 * rows * columns, np.uint8))
        return _native.Linear("layer", rows, columns, [matrix], [], None)

    run = native.timed_pass([layer(3, 5), layer(3, 5)], tokens=2)
    assert run() > 0 and run() > 0
    with pytest.raises(ValueError):
        native.timed_pass([layer(3, 5), layer(3, 4)])


def test_without_kernels_there_is_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_HAS_NATIVE", False)
    with pytest.raises(RuntimeError, match="timed_pass: needs the native kernels"):
        native.timed_pass([])
    with pytest.raises(RuntimeError, match="read_bandwidth: needs the native kernels"):
        native.read_bandwidth(np.ones(8, np.uint64), 1)


def test_native_kernels_are_there_where_they_must_be() -> None:
    if os.environ.get("MPO_REQUIRE_NATIVE") != "1":
        pytest.skip("MPO_REQUIRE_NATIVE=1 makes this a requirement; .ci/run sets it where a C++ compiler is there")
    assert native.available(), native.active()["native"]
