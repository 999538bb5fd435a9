"""Transforms of a layer's input: their definition, and models that use them in any mixture of layers and blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_exporter.export import ExportTask, export
from mpo_exporter.plan.options import Options
from mpo_exporter.source import open_source
from mpo_formats import Dense, MpoFile, Quantized, Term, Transform, reference
from mpo_formats.packing import block_transform, hadamard_transform
from mpo_formats.spec import HADAMARDS
from mpo_runtime.backends.native import NativeOps
from mpo_runtime.backends.reference import ReferenceOps
from mpo_runtime.layers import linear
from mpo_runtime.models.registry import decoder_for
from tests.families import FAMILIES, LLAMA_LIKE, family_config, write_family
from tests.formats.tiny import arrays, model
from tests.helpers import forward, granite_config, network, some_ids, write_folder
from tests.runtime.native_cases import Held, needs_native
from tests.transform_cases import turned

LLAMA = LLAMA_LIKE | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def by_definition(block: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """The matrix of SPEC.md, entry by entry."""
    signs = [[(-1) ** (row & column).bit_count() for column in range(block)] for row in range(block)]
    return np.array(signs) / np.sqrt(block)


@pytest.mark.parametrize("block", HADAMARDS[1:])
def test_the_transform_is_the_one_of_the_specification_and_its_own_inverse(block: int) -> None:
    rows = np.random.default_rng(block).standard_normal((3, 5, 2 * block))
    expected = (rows.reshape(3, 5, 2, block) @ by_definition(block)).reshape(rows.shape)
    found = hadamard_transform(rows, block)
    np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_allclose(hadamard_transform(found, block), rows, atol=1e-12)
    matrix = linear.hadamard_matrix(block, torch.float64, torch.device("cpu"))[None]
    np.testing.assert_allclose(linear.block_transform(torch.from_numpy(rows), matrix), expected, atol=1e-12)
    assert hadamard_transform(rows, 0) is rows


@pytest.mark.parametrize("count", [1, 3])
def test_a_stored_transform_multiplies_every_block_with_its_matrix(count: int) -> None:
    source = np.random.default_rng(count)
    matrices, rows = source.standard_normal((count, 16, 16)), source.standard_normal((5, 48))
    whole = np.zeros((48, 48))
    for block in range(3):
        inside = slice(16 * block, 16 * (block + 1))
        whole[inside, inside] = matrices[block % count]
    np.testing.assert_allclose(block_transform(rows, matrices), rows @ whole.T, atol=1e-12)
    turned = torch.from_numpy(matrices)
    np.testing.assert_allclose(linear.block_transform(torch.from_numpy(rows), turned), rows @ whole.T, atol=1e-12)
    np.testing.assert_allclose(linear.back_transform(torch.from_numpy(rows), turned), rows @ whole, atol=1e-12)


@needs_native
@given(
    blocks=st.lists(st.sampled_from([0, 0, 16, 32, -16, -32]), min_size=8, max_size=8),
    own=st.booleans(),
    terms=st.sampled_from([(Quantized(4, 16, False),), (Dense("f32"),), (Quantized(2, 16, True), Dense("bf16"))]),
    seed=st.integers(0, 100),
)
@settings(max_examples=30)
def test_layers_with_one_input_may_transform_it_differently(
    blocks: list[int], own: bool, terms: tuple[Term, ...], seed: int
) -> None:
    plain, linears = model({}), []
    stored: dict[tuple[int, int], Transform] = {}
    for one, sign in zip(plain.linears, blocks, strict=True):  # negative: a stored transform, shared where it can be
        block = min(abs(sign), one.in_features) if one.in_features % 32 == 0 else min(abs(sign), 16)
        transform = None
        if sign < 0:
            count = one.in_features // block if own else 1
            transform = stored.setdefault((block, count), Transform(one.name, block, count, Quantized(5, 16, True)))
        linears.append(replace(one, terms=terms, hadamard=block if sign > 0 else 0, transform=transform))
    spec = replace(plain, linears=tuple(linears))
    held = Held(spec, arrays(spec, seed))
    ids = [[1, 5, 2, 7, 3, 3, 0, 6]]
    expected = forward(decoder_for(plain.architecture, ReferenceOps(held)), ids)
    decoder = decoder_for(plain.architecture, NativeOps(held, activations="float"))
    size = float(np.abs(expected).max())
    np.testing.assert_allclose(forward(decoder, ids), expected, atol=1e-4 * size)
    cache, steps = decoder.ops.new_cache(plain.architecture, 1, 8), []
    for token in ids[0]:
        hidden = decoder.hidden(decoder.ops.ids([[token]]), cache, [1])
        steps.append(decoder.ops.to_numpy(decoder.logits(hidden))[0, 0])
    np.testing.assert_allclose(np.array(steps), expected[0], atol=1e-4 * size)


@needs_native
@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("kind", ["granite", "llama", *FAMILIES])
def test_in_full_precision_every_architecture_gives_the_logits_that_it_has_without(
    kind: str, version: str, tmp_path: Path
) -> None:
    folder, target = tmp_path / "model", tmp_path / "model.mpo"
    if kind in FAMILIES:
        write_family(folder, family_config(kind))
    else:
        write_folder(folder, granite_config(**LLAMA if kind == "llama" else {}))
    with open_source(folder) as source:
        linears, surveyed = tuple(replace(one, terms=(Dense("f32"),)) for one in source.weights.spec.linears), None
        if version == "0.4":
            linears = tuple(replace(one, hadamard=16) for one in linears)
        else:
            linears, surveyed = turned(linears, 16)
        export(source, ExportTask(target, Options("dense"), layers=linears, surveyed=surveyed))
    with MpoFile(target, verify=True) as file, open_source(folder) as source:
        assert file.spec.version == version
        for one in file.spec.linears:
            dense = source.weights.array(f"{one.name}.0.weight").astype(np.float64)
            np.testing.assert_allclose(reference.matrix(file, one), dense, atol=1e-6 * np.abs(dense).max())
    ids = [some_ids(20)]
    expected = forward(network(folder), ids)
    for options in ({}, {"backend": "native"}):
        found = forward(network(target, **options), ids)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
