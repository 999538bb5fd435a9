"""Products, layers, norms and gates of the GPU backend against the reference, in Triton's interpreter.

On a GPU: TRITON_INTERPRET=0. Bounds stand in triton_cases.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'mpo-runtime[gpu]'")

from hypothesis import given, settings
from hypothesis import strategies as st

from mpo_formats import ConfigError, Dense, Mpo, Quantized, Term, Transform
from mpo_formats.layout import PLANES
from mpo_runtime.backends.triton import products, tiles
from mpo_runtime.backends.triton import terms as terms_module
from mpo_runtime.backends.triton.lazy import Parts, Residual, resolved
from mpo_runtime.backends.triton.terms import Group, main_term
from mpo_runtime.backends.triton.tiles import Tile, tiles_for, write_entry
from tests.formats.tiny import GATE, KEY, QUERY, VALUE, arrays, model
from tests.kernels.triton_cases import DEVICE, assert_near, both, normal, poisoned
from tests.runtime.native_cases import Held, layer, layers


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned():
        yield


@pytest.mark.parametrize("bits", sorted(PLANES))
@pytest.mark.parametrize(("group", "zeros"), [(16, False), (64, True)])
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_with_integers(bits: int, group: int, zeros: bool, tokens: int) -> None:
    weights = layer((Quantized(bits, group, zeros),), 20, 192, False, bits)
    x = normal(1, tokens, 192, seed=bits)
    for exact, tolerance in ((True, 1e-5), (False, 1e-5 if tokens == 1 else 2e-2)):
        ours, reference = both(weights, exact=exact)
        expected = reference.linear(reference.weights(GATE), x)
        assert_near(resolved(ours.linear(ours.weights(GATE), x.to(DEVICE))), expected, tolerance)


@pytest.mark.parametrize("bits", sorted(PLANES))
@pytest.mark.parametrize(("group", "zeros"), [(16, False), (256, True)])
def test_matrices_as_floats_for_long_prompts(
    bits: int, group: int, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terms_module, "LONG_PROMPT", 6)
    weights = layer((Quantized(bits, group, zeros),), 20, 768, True, bits)
    x = normal(2, 3, 768, seed=bits)
    for exact, tolerance in ((True, 1e-5), (False, 2e-2)):
        ours, reference = both(weights, exact=exact)
        expected = reference.linear(reference.weights(GATE), x)
        with mock.patch.object(products, "integer_products", None):
            assert_near(resolved(ours.linear(ours.weights(GATE), x.to(DEVICE))), expected, tolerance)
        assert_near(main_term(ours.weights(GATE)).weight(), reference.weights(GATE).terms[0].weight(), 1e-6)


def test_very_large_matrices_are_not_written_as_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terms_module, "LONG_PROMPT", 6)
    monkeypatch.setattr(terms_module, "LARGEST_MATRIX", 20 * 64 - 1)
    ours, reference = both(layer((Quantized(4, 16, False),), 20, 64, False, 1), exact=True)
    x = normal(1, 6, 64)
    with mock.patch.object(products, "integer_matrix", None):
        assert_near(
            resolved(ours.linear(ours.weights(GATE), x.to(DEVICE))), reference.linear(reference.weights(GATE), x), 1e-5
        )


@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_inputs_of_all_sizes(size: float) -> None:
    """Codes are multiplied as subnormal floats with raised inputs: neither may leave the range of float32."""
    ours, reference = both(layer((Quantized(8, 32, True),), 20, 64, False, 1))
    x = size * normal(1, 1, 64)
    expected = reference.linear(reference.weights(GATE), x)
    assert_near(resolved(ours.linear(ours.weights(GATE), x.to(DEVICE))), expected, 1e-5)


@pytest.mark.long
@pytest.mark.parametrize("tokens", [1, 16, 17, 40, 65, 130])
@pytest.mark.parametrize("group", [16, 128, 256])
def test_every_class_of_tokens(tokens: int, group: int) -> None:
    for bits in sorted(PLANES):
        weights = layer((Quantized(bits, group, bool(bits % 2)),), 70, 768, True, bits)
        x = normal(1, tokens, 768, seed=tokens)
        for exact, tolerance in ((True, 1e-5), (False, 2e-2)):
            ours, reference = both(weights, exact=exact)
            expected = reference.linear(reference.weights(GATE), x)
            assert_near(resolved(ours.linear(ours.weights(GATE), x.to(DEVICE))), expected, tolerance)


@given(weights=layers(), tokens=st.sampled_from([1, 2, 7]), chi=st.none() | st.integers(1, 6))
@settings(max_examples=10)
def test_layers_of_any_terms(weights: Held, tokens: int, chi: int | None) -> None:
    ours, reference = both(weights, chi=chi, exact=True)
    inner = weights.spec.linear(GATE).in_features
    x, ids = normal(1, tokens, inner, seed=tokens), torch.arange(tokens) * 3
    parts = [term.weight() for term in reference.weights(GATE).terms]
    # Terms may cancel, so errors are measured against what they add up.
    size = sum(float(part.norm()) for part in parts) * float(x.norm()) / inner**0.5
    expected = reference.linear(reference.weights(GATE), x)
    found = resolved(ours.linear(ours.weights(GATE), x.to(DEVICE))).cpu()
    assert float((found - expected).norm()) <= 1e-5 * size
    rows = reference.embed(reference.weights(GATE), ids, 2.0)
    largest = 2 * sum(float(part.abs().max()) for part in parts)
    assert float((ours.embed(ours.weights(GATE), ids.to(DEVICE), 2.0).cpu() - rows).abs().max()) <= 1e-5 * largest


INT4, LOW_RANK = Quantized(4, 32, False), Mpo((64, 1), (1, 64), (3,), "f16", 0)
MIXTURES: dict[str, tuple[tuple[Term, ...], ...]] = {
    "alike": ((INT4,), (INT4,), (INT4,)),
    "bits": ((INT4,), (Quantized(3, 16, True),), (Quantized(2, 64, False),)),
    "cores": ((INT4, LOW_RANK), (INT4,), (Quantized(8, 32, False), LOW_RANK)),
    "dense": ((Dense("bf16"),), (Dense("f32"),), (Dense("f16"),)),
}


# Taken by all three.
STORED = Transform(QUERY, 32, 2, Quantized(8, 32, False))


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("transform", [{}, {"hadamard": 32}, {"transform": STORED}])
def test_layers_with_one_input_in_one_launch(kind: str, tokens: int, transform: dict[str, Any]) -> None:
    names, terms = (QUERY, KEY, VALUE), dict(zip((QUERY, KEY, VALUE), MIXTURES[kind], strict=True))
    spec = model(
        terms, hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16, attention_bias=kind == "bits"
    )
    turned = (replace(one, **transform) if one.name in names else one for one in spec.linears)
    spec = replace(spec, linears=tuple(turned))
    ours, reference = both(Held(spec, arrays(spec, 3)), exact=True)
    x, chosen = normal(2, tokens, 64, seed=tokens), [ours.weights(name) for name in names]
    assert Group.fits(chosen)
    for _ in range(2):  # the second time from the group that the first one made
        found = ours.linears(chosen, x.to(DEVICE))
        for name, y in zip(names, found, strict=True):
            assert_near(resolved(y), reference.linear(reference.weights(name), x), 1e-5)
    if kind == "alike":
        first, *others = (y.y for y in found if isinstance(y, Parts))
        assert len(others) == 2 and all(other is first for other in others)
    for name in names:  # what stands below one another is still the same layer
        one = resolved(ours.linear(ours.weights(name), x.to(DEVICE)))
        assert_near(one, reference.linear(reference.weights(name), x), 1e-5)


def test_layers_that_do_not_go_together() -> None:
    spec = model({QUERY: (INT4,), KEY: (Dense("bf16"),)})
    ours, reference = both(Held(spec, arrays(spec, 3)), exact=True)
    x = normal(1, 2, 32)
    assert not Group.fits([ours.weights(QUERY), ours.weights(KEY)])
    found = ours.linears([ours.weights(QUERY), ours.weights(KEY)], x.to(DEVICE))
    for name, y in zip((QUERY, KEY), found, strict=True):
        assert_near(resolved(y), reference.linear(reference.weights(name), x), 1e-5)
    matrix = normal(16, 32, seed=9).to(DEVICE)
    with ours.replaced(QUERY, matrix):  # an exchanged layer is not taken from a group
        found = ours.linears([ours.weights(QUERY), ours.weights(KEY)], x.to(DEVICE))
        assert_near(resolved(found[0]), x @ matrix.cpu().T, 1e-5)


@pytest.mark.parametrize("shape", [(1, 1, 32), (2, 3, 96), (1, 5, 300)])
def test_norms_and_gates(shape: tuple[int, ...]) -> None:
    ours, reference = both(Held(spec := model(), arrays(spec, 1)))
    x, y, weight = normal(*shape, seed=1), normal(*shape, seed=2), normal(shape[-1], seed=3)
    found = ours.rms_norm(x.to(DEVICE), weight.to(DEVICE), 1e-5)
    assert_near(found, reference.rms_norm(x, weight, 1e-5), 1e-6)
    assert_near(ours.swiglu(x.to(DEVICE), y.to(DEVICE)), reference.swiglu(x, y), 1e-6)


@pytest.mark.parametrize("parts", [1, 4])
def test_sums_that_are_left_to_the_next_op(parts: int) -> None:
    ours, reference = both(Held(spec := model(), arrays(spec, 1)))
    split = normal(parts, 6, 80, seed=4)
    whole, x, weight = split.sum(0).view(2, 3, 80), normal(2, 3, 40, seed=5), normal(40, seed=6)
    left, right = (Parts(split.to(DEVICE), first, 40, torch.Size((2, 3))) for first in (0, 40))
    assert_near(left.sum(), whole[..., :40], 1e-6)
    assert_near(ours.swiglu(left, right), reference.swiglu(whole[..., :40], whole[..., 40:]), 1e-6)
    added = ours.add_scaled(x.to(DEVICE), right, 0.3)
    assert isinstance(added, Residual)
    expected = x + 0.3 * whole[..., 40:]
    assert_near(ours.rms_norm(added, weight.to(DEVICE), 1e-5), reference.rms_norm(expected, weight, 1e-5), 1e-6)
    assert_near(resolved(added), expected, 1e-6)
    assert_near(
        ours.rms_norm(added, weight[:20].to(DEVICE), 1e-5), reference.rms_norm(expected, weight[:20], 1e-5), 1e-6
    )
    assert_near(resolved(ours.add_scaled(x.to(DEVICE), right, 0.3)), expected, 1e-6)


def test_tables_of_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tiles_for("a card that nobody measured")
    one, many = shipped.choose(1, 4), shipped.choose(300, 4)
    assert one.tokens == 1 and many.tokens > 1
    assert one.parts(8, 1, 4096) > 1 and many.parts(1024, 300, 4096) == 1
    parts = one.parts(100, 1, 768)
    assert parts & (parts - 1) == 0 and parts <= 768 // one.columns
    # What the package ships for single cards was written by benchmarks/gpu.py --tune; none has run yet.
    assert json.loads(tiles.SHIPPED.read_text())["cards"] == {}

    path = tmp_path / "tiles.json"
    mine = replace(one, rows=32)
    write_entry(path, "card", 3, {"1": mine})
    monkeypatch.setenv("MPO_TILES", str(path))
    tiles_for.cache_clear()
    assert tiles_for("card").choose(1, 3) == mine and tiles_for("card").choose(1, 4) == one
    path.write_text('{"default": {}, "cards": {}}')
    tiles_for.cache_clear()
    with pytest.raises(ConfigError, match="expected the classes"):
        tiles_for("card")
    path.write_text("nothing")
    tiles_for.cache_clear()
    with pytest.raises(ConfigError, match="cannot be read"):
        tiles_for("card")
    monkeypatch.delenv("MPO_TILES")
    tiles_for.cache_clear()
    for wrong in ({"rows": 24}, {"columns": 16}, {"tokens": 8}, {"warps": 3}, {"stages": 0}):
        with pytest.raises(ConfigError, match="tiles"):
            replace(Tile(16, 64, 16, 512, 4, 3), **wrong)


@pytest.mark.long
def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """Down to machine code, for A100, H100 and H200, and consumer cards; nothing is run."""
    command = [sys.executable, "-m", "tests.kernels.compile_triton", "80", "89", "90"]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "launches compiled for 3 GPUs" in done.stdout
