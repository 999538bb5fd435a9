"""Elastic χ: reading the prefix of every core equals truncating full cores that were built independently."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_formats import Mpo, MpoFile, reference
from mpo_formats.packing import bf16_to_f32
from tests.formats import tiny

SHAPES = {
    2: ((16, 8), (4, 8), (11,)),
    3: ((8, 4, 4), (2, 4, 4), (9, 6)),
}


def stored_core(content: tiny.Arrays, name: str, term: Mpo, index: int) -> np.ndarray[Any, Any]:
    """The core [χ_k, χ_{k−1}, o, i] in float64, decoded element by element from the arrays that were written."""
    bonds = (1, *term.bonds, 1)
    shape = (bonds[index + 1], bonds[index], term.out_dims[index], term.in_dims[index])
    if term.dtype == "bf16":
        return bf16_to_f32(content[name]).astype(np.float64)
    if term.group == 0:
        return content[name].astype(np.float64)
    bits = 8 if term.dtype == "int8" else 4
    plane, scale = content[f"{name}.q{bits}"], content[f"{name}.scale"]
    core = np.zeros(shape)
    for right, left, out, column in np.ndindex(shape):
        row, place = right * shape[1] + left, out * shape[3] + column
        group, bit = place // term.group, place % term.group * bits
        code = int(plane[row, group, bit // 8]) >> bit % 8 & (1 << bits) - 1
        core[right, left, out, column] = float(scale[row, group]) * (code - 2 ** (bits - 1))
    return core


def truncated_matrix(cores: list[np.ndarray[Any, Any]], chi: int) -> np.ndarray[Any, Any]:
    """The sum over all bond values below χ of the product of the cores' slices: Kronecker products, one at a time."""
    total: Any = 0.0
    for values in itertools.product(*(range(min(chi, core.shape[0])) for core in cores[:-1])):
        ends = (0, *values, 0)
        part = np.ones((1, 1))
        for index, core in enumerate(cores):
            part = np.kron(part, core[ends[index + 1], ends[index]])
        total = total + part
    return np.asarray(total)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16", "int8", "int4"])
@pytest.mark.parametrize("count", [2, 3])
def test_a_prefix_of_the_cores_is_the_truncated_operator(tmp_path: Path, count: int, dtype: Any) -> None:
    outs, ins, bonds = SHAPES[count]
    term = Mpo(outs, ins, bonds, dtype, 16 if dtype.startswith("int") else 0)
    spec = tiny.model({tiny.GATE: (term,)})
    content = tiny.write(tmp_path / "a.mpo", spec)
    cores = [stored_core(content, f"{tiny.GATE}.0.core{index}", term, index) for index in range(count)]
    with MpoFile(tmp_path / "a.mpo") as file:
        gate = file.spec.linear(tiny.GATE)
        whole = reference.matrix(file, gate)
        for chi in (1, 2, 5, 6, 8, max(bonds), max(bonds) + 5):
            expected = truncated_matrix(cores, chi)
            found = reference.matrix(file, gate, chi=chi)
            assert found.shape == (128, 32)
            scale = np.abs(expected).max()
            assert np.abs(found - expected).max() <= 1e-13 * scale
            if chi < max(bonds):
                assert np.abs(found - whole).max() > 1e-3 * scale
            else:
                assert np.array_equal(found, whole)


def test_only_cores_are_cut(tmp_path: Path) -> None:
    content = tiny.write(tmp_path / "a.mpo", tiny.model())
    with MpoFile(tmp_path / "a.mpo") as file:
        query = file.spec.linear(tiny.QUERY)
        base, operator = query.terms
        cores = [stored_core(content, f"{tiny.QUERY}.1.core{index}", operator, index) for index in range(2)]
        expected = reference.integer_tensor(file, f"{tiny.QUERY}.0", base.bits, base.zeros) + truncated_matrix(cores, 2)
        assert np.allclose(reference.matrix(file, query, chi=2), expected, rtol=1e-12, atol=1e-12)
        assert query.truncated(2).terms == (base, operator.truncated(2))
        assert operator.truncated(2).core_shapes() == ((2, 1, 4, 8), (1, 2, 4, 4))


def test_what_a_prefix_needs_is_contiguous_at_both_ends_and_strided_between(tmp_path: Path) -> None:
    outs, ins, bonds = SHAPES[3]
    term = Mpo(outs, ins, bonds, "int8", 16)
    tiny.write(tmp_path / "a.mpo", tiny.model({tiny.GATE: (term,)}))
    with MpoFile(tmp_path / "a.mpo") as file:
        for index, (full, cut) in enumerate(zip(term.core_shapes(), term.truncated(4).core_shapes(), strict=True)):
            for kind in ("q8", "scale"):
                array = file.array(f"{tiny.GATE}.0.core{index}.{kind}")
                prefix = array.reshape(*full[:2], -1)[: cut[0], : cut[1]]
                assert prefix.base is not None  # a view: nothing was copied to cut it
                assert prefix.flags.c_contiguous == (index != 1)
                assert prefix[0].flags.c_contiguous
