"""What does not fit together is refused with a ValueError or TypeError before native code touches memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.runtime.native_cases import needs_native

with contextlib.suppress(ImportError):  # where it was not built every test here is skipped
    import mpo_runtime._native as native

pytestmark = needs_native


def raw(count: int) -> NDArray[np.uint8]:
    return np.zeros(count, np.uint8)


def dense(rows: int, columns: int) -> Any:
    return native.Matrix.dense("w", "f32", rows, columns, raw(4 * rows * columns))


def linear(rows: int, columns: int, bias: Any = None) -> Any:
    return native.Linear("layer", rows, columns, [dense(rows, columns)], [], bias)


def core(left: int, right: int, out: int, inner: int, stored_left: int | None = None, rows: int | None = None) -> Any:
    stored = left if stored_left is None else stored_left
    return native.Core(dense(rows or stored * right, out * inner), left, right, out, inner, stored)


LAYERS: dict[str, Callable[[], Any]] = {
    "the matrix has 15 bytes, expected 16": lambda: native.Matrix.dense("w", "f32", 2, 2, raw(15)),
    "expected f32, f16 or bf16": lambda: native.Matrix.dense("w", "f64", 2, 2, raw(32)),
    "too many rows": lambda: native.Matrix.dense("w", "f32", 2**32, 2**32, raw(0)),
    "many rows and columns": lambda: native.Matrix.integer("w", 8, 2**40, 2**30, 32, [raw(0)], raw(0), None),
    "at least one row": lambda: native.Matrix.dense("w", "f32", 0, 2, raw(0)),
    "bits is 7": lambda: native.Matrix.integer("w", 7, 2, 32, 32, [raw(64)], raw(4), None),
    "group is 24": lambda: native.Matrix.integer("w", 8, 2, 48, 24, [raw(96)], raw(8), None),
    "group 32 does not divide 48": lambda: native.Matrix.integer("w", 8, 2, 48, 32, [raw(96)], raw(4), None),
    "3 bits are 2": lambda: native.Matrix.integer("w", 3, 2, 32, 32, [raw(16)], raw(4), None),
    "plane 1 has 9 bytes, expected 8": lambda: native.Matrix.integer(
        "w", 3, 2, 32, 32, [raw(16), raw(9)], raw(4), None
    ),
    "scale has 5 bytes": lambda: native.Matrix.integer("w", 8, 2, 32, 32, [raw(64)], raw(5), None),
    "zero has 2 bytes": lambda: native.Matrix.integer("w", 8, 2, 32, 32, [raw(64)], raw(4), raw(2)),
    "has no terms": lambda: native.Linear("layer", 2, 2, [], [], None),
    "a matrix is not": lambda: native.Linear("layer", 2, 3, [dense(2, 2)], [], None),
    "the bias has 3 values": lambda: linear(2, 2, np.zeros(3, np.float32)),
    "at least 2 cores": lambda: native.Operator([core(1, 1, 2, 2)], False),
    "does not fit its neighbour": lambda: native.Operator([core(1, 3, 2, 2), core(2, 1, 2, 2)], False),
    "fit its neighbour or its matrix": lambda: native.Operator([core(1, 3, 2, 2, rows=2), core(3, 1, 2, 2)], False),
    "the last bond is 2": lambda: native.Operator([core(1, 3, 2, 2), core(3, 2, 2, 2)], False),
    "an operator is not": lambda: native.Linear(
        "l", 2, 2, [], [native.Operator([core(1, 1, 2, 2), core(1, 1, 2, 2)], False)], None
    ),
}


@pytest.mark.parametrize("message", LAYERS)
def test_layers(message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LAYERS[message]()


def test_operators_that_no_memory_holds() -> None:
    """Small cores, a large product: 24 factors of 8 would wrap around in 64 bits."""
    cores = [core(1, 1, 8, 1) for _ in range(24)]
    with pytest.raises(MemoryError):
        native.Operator(cores, False)
    with pytest.raises(ValueError, match="fit its neighbour or its matrix"):
        native.Operator([native.Core(dense(1, 8), 1, 1, 2**63 + 4, 2, 1), core(1, 1, 1, 1)], False)


def test_arrays_of_other_types_and_strides() -> None:
    for wrong in (np.zeros(16, np.float32), raw(32)[::2], np.zeros((4, 4), np.uint8), None):
        with pytest.raises(TypeError):
            native.Matrix.dense("w", "f32", 2, 2, wrong)


def program(**changes: Any) -> Any:
    """ids -> embedding of 8 -> q, k, v of heads of 4 -> attention."""
    made = native.Program(False)
    x = made.embed(linear(10, 8), 1.0)
    q, k, v = made.linear(x, linear(8, 8)), made.linear(x, linear(4, 8)), made.linear(x, linear(4, 8))
    q = made.rope_and_append(q, k, v, np.ones(2, np.float32), changes.get("block", 0))
    made.finish(made.attention(q, 4, 0, 1.0, 0))
    return made


def test_a_program_that_fits_runs() -> None:
    out = np.empty((2, 3, 8), np.float32)
    program().run(np.full((2, 3), 9), [], native.Cache(1, 2, 1, 5, 4, "f32"), out)
    np.testing.assert_array_equal(out, 0)


IDS = np.zeros((2, 3), np.int64)
CALLS: dict[str, tuple[Any, ...]] = {
    "expected token ids": (None, [], (1, 2, 1, 5, 4), (2, 3, 8)),
    "token id 10 lies outside the 10 rows": (IDS + 10, [], (1, 2, 1, 5, 4), (2, 3, 8)),
    "token id -1 lies": (IDS - 1, [], (1, 2, 1, 5, 4), (2, 3, 8)),
    "expected a cache": (IDS, [], None, (2, 3, 8)),
    "a cache of 3 rows for 2": (IDS, [], (1, 3, 1, 5, 4), (2, 3, 8)),
    "made for another model": (IDS, [], (1, 2, 1, 5, 6), (2, 3, 8)),
    "for another model": (IDS, [], (1, 2, 2, 5, 4), (2, 3, 8)),
    "ids and out differ": (IDS, [], (1, 2, 1, 5, 4), (2, 4, 8)),
    "out has the wrong width": (IDS, [], (1, 2, 1, 5, 4), (2, 3, 9)),
    "expected 0 inputs, found 1": (IDS, [np.zeros((2, 3, 8), np.float32)], (1, 2, 1, 5, 4), (2, 3, 8)),
    "at least one row and one token": (IDS[:0], [], (1, 2, 1, 5, 4), (0, 3, 8)),
}


@pytest.mark.parametrize("message", CALLS)
def test_calls(message: str) -> None:
    ids, inputs, cache, out = CALLS[message]
    with pytest.raises(ValueError, match=message):
        held = cache and native.Cache(*cache, "f32")
        program().run(ids, inputs, held, np.empty(out, np.float32))


def test_a_block_that_the_cache_lacks() -> None:
    with pytest.raises(ValueError, match="another model"):
        program(block=1).run(IDS, [], native.Cache(1, 2, 1, 5, 4, "f32"), np.empty((2, 3, 8), np.float32))


def test_recording() -> None:
    made = native.Program(True)
    x = made.input(8)
    wrong: list[Callable[[], Any]] = [
        lambda: made.rms_norm(x, np.ones(7, np.float32), 1e-5),
        lambda: made.rms_norm(5, np.ones(8, np.float32), 1e-5),
        lambda: made.linear(x, linear(2, 4)),
        lambda: made.swiglu(x, made.input(4)),
        lambda: made.add_scaled(x, 99, 1.0),
        lambda: made.rope_and_append(x, x, x, np.ones(3, np.float32), 0),
        lambda: made.rope_and_append(x, x, x, np.ones(0, np.float32), 0),
        lambda: made.attention(x, 3, 0, 1.0, 0),
        lambda: made.layer_norm(x, np.ones(8, np.float32), np.ones(4, np.float32), 1e-5),
        lambda: made.add_positions(x, np.ones(12, np.float32)),
        lambda: made.gelu(99),
        lambda: made.finish(x),
        lambda: made.input(0),
        lambda: made.run(None, [], None, np.empty((1, 1, 8), np.float32)),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="program:|takes"):
            call()
    with pytest.raises(TypeError):
        made.linear(x, None)


@pytest.mark.parametrize("sizes", [(0, 1, 1, 1, 1), (1, 1, 1, 0, 1), (1, 1, 1, 1, 0)])
def test_caches(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        native.Cache(*sizes, "f32")
    with pytest.raises(ValueError, match="expected a type"):
        native.Cache(1, 1, 1, 1, 1, "f64")
    with pytest.raises(MemoryError):
        native.Cache(1 << 20, 1 << 20, 1 << 20, 1 << 20, 1, "f32")
    cache = native.Cache(1, 2, 1, 4, 2, "int8")
    cache.advance([4, 1])
    for counts in ([1, 0], [0, 4], [0], [0, 2**62]):
        with pytest.raises(ValueError, match="cache:"):
            cache.advance(counts)
    cache.rewind(2)
    assert cache.lengths == [2, 1]
    assert cache.nbytes == 2 * 2 * 32 * (2 + 4)  # two pages of 32 positions


def test_threads() -> None:
    before = native.threads()
    for count in (0, -1, 1025):
        with pytest.raises(ValueError, match="threads: expected 1 to 1024"):
            native.set_threads(count)
    assert native.threads() == before
    assert native.default_threads() >= 1
