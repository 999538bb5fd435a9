"""The dataclasses cannot be built invalid, and SPEC.md lists exactly their fields."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpo_formats
from mpo_formats import (
    Architecture,
    Certificate,
    Certificates,
    Dense,
    FileSpec,
    FormatError,
    Layouts,
    LinearSpec,
    Mpo,
    Provenance,
    Quality,
    Quantized,
    Rope,
    Transform,
    VectorSpec,
)
from mpo_formats.codec import NEWEST, describe, from_json, parse_json, records_from_json, shorten, to_json
from mpo_formats.container import HEADER_LIMIT
from mpo_formats.layout import CERTIFICATE_SIZE
from mpo_formats.reader import METADATA_KEYS
from mpo_formats.spec import full_rank
from tests.formats import tiny

SPEC = (Path(__file__).resolve().parents[2] / "formats" / "SPEC.md").read_text(encoding="utf-8")
MPO = Mpo((4, 4), (8, 4), (6,), "int8", 16)
QUALITY = tiny.certificates().entries[0].quality
PROVENANCE = tiny.model().provenance


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        (Dense("f32"), {"dtype": "u8"}, "dtype: expected one of f32, f16, bf16, found 'u8'"),
        (Dense("f32"), {"kind": "mpo"}, "kind: expected one of dense, found 'mpo'"),
        (Quantized(4, 32, True), {"bits": 7}, "bits: expected one of 8, 6, 5, 4, 3, 2, found 7"),
        (Quantized(4, 32, True), {"bits": 4.0}, "found 4.0"),
        (Quantized(4, 32, True), {"group": 24}, "group: expected one of 16, 32, 64, 128, 256, found 24"),
        (Quantized(4, 32, True), {"zeros": 1}, "zeros: expected one of False, True, found 1"),
        (MPO, {"bonds": (0,)}, "bonds: expected an integer from 1 to 2147483647, found 0"),
        (MPO, {"bonds": (17,)}, r"bonds\[0\]: expected at most the full rank 16, found 17"),
        (MPO, {"bonds": (6, 6)}, "bonds: expected 1 for 2 cores, found 2"),
        (MPO, {"out_dims": (16,)}, "out_dims: expected 2 to 16 cores, found 1"),
        (MPO, {"in_dims": (8, 2, 2)}, "in_dims: expected 2 factors as in out_dims, found 3"),
        (MPO, {"out_dims": (True, 16)}, "out_dims: expected an integer from 1 to 2147483647, found true"),
        (MPO, {"dtype": "int5"}, "dtype: expected one of f32, f16, bf16, int8, int4, found 'int5'"),
        (MPO, {"group": 32}, "group: 32 does not divide core 1's o·i = 16"),
        (MPO, {"dtype": "f16"}, "group: expected 0 for f16 cores, found 16"),
        (VectorSpec("n", 4, "f32"), {"size": -1}, "n: expected an integer from 1 to 2147483647, found -1"),
        (VectorSpec("n", 4, "f32"), {"name": "a\nb"}, "vector name: expected 1 to 200 printable ASCII"),
        (FileSpec("tokenizer.json", 3), {"name": "../../etc/passwd"}, "file name: expected one of tokenizer.json"),
        (FileSpec("tokenizer.json", 3), {"size": 2**31}, "found 2147483648"),
        (Layouts(), {"bond_order": "none"}, "bond_order: expected one of descending-importance, found 'none'"),
        (PROVENANCE, {"source": "a\x1b[31m"}, r"source: expected at most 4096 .*found 'a\\x1b\[31m'"),
        (PROVENANCE, {"revision": "\ud800"}, "revision: expected at most 4096"),
        (PROVENANCE, {"source_sha256": "ABC"}, "source_sha256: expected 64 lower-case hexadecimal digits, found 'ABC'"),
        (PROVENANCE, {"calibration_sha256": ""}, "calibration_sha256: expected 64"),
        (PROVENANCE, {"options": {"a": "x" * 5000}}, "options.a: expected at most 4096"),
        (PROVENANCE, {"options": {str(n): "" for n in range(257)}}, "options: expected at most 256, found 257"),
        (QUALITY, {"perplexity": 0.0}, "perplexity: expected more than 0, found 0.0"),
        (QUALITY, {"dense_perplexity": float("inf")}, "dense_perplexity: expected more than 0, found inf"),
        (QUALITY, {"perplexity_error": -1.0}, "perplexity_error: expected at least 0, found -1.0"),
        (QUALITY, {"kl_mean": float("nan")}, "kl_mean: expected at least 0, found nan"),
        (QUALITY, {"same_top1": 1.1}, "same_top1: expected 0 to 1, found 1.1"),
        (QUALITY, {"tokens": 0}, "tokens: expected an integer from 1 to 9007199254740992, found 0"),
        (Certificate(None, QUALITY), {"chi": 0}, "chi: expected an integer from 1"),
        (tiny.certificates(), {"entries": tiny.certificates().entries * 2}, "the same chi and text are listed twice"),
        (tiny.ARCHITECTURE, {"num_hidden_layers": 4097}, "num_hidden_layers: expected an integer from 1 to 4096"),
        (tiny.ARCHITECTURE, {"num_key_value_heads": 3}, "3 does not divide the 2 attention heads"),
        (tiny.ARCHITECTURE, {"head_dim": 7}, "head_dim: expected an even size for RoPE, found 7"),
        (
            tiny.ARCHITECTURE,
            {"model_type": "gpt"},
            "model_type: expected one of granite, llama, .*, gpt_neo, found 'gpt'",
        ),
        (tiny.ARCHITECTURE, {"logits_scaling": 0.0}, "logits_scaling: expected another number than 0"),
        (tiny.ARCHITECTURE, {"residual_multiplier": float("nan")}, "residual_multiplier: expected a finite number"),
        (tiny.ARCHITECTURE, {"rms_norm_eps": 1.0}, "rms_norm_eps: expected more than 0 and less than 1, found 1.0"),
        (tiny.ARCHITECTURE, {"eos_token_ids": (8,)}, "eos_token_ids: expected an integer from 0 to 7, found 8"),
        (tiny.ARCHITECTURE, {"bos_token_id": -1}, "bos_token_id: expected an integer from 0 to 7, found -1"),
        (tiny.ARCHITECTURE, {"eos_token_ids": (0,) * 257}, "eos_token_ids: expected at most 256, found 257"),
        (tiny.ARCHITECTURE.rope, {"theta": 0.0}, "theta: expected more than 0, found 0.0"),
        (tiny.ARCHITECTURE.rope, {"factor": 2.0}, "factor: expected 1 for default scaling"),
        (tiny.ARCHITECTURE.rope, {"scaling": "linear", "factor": 0.5}, "factor: expected at least 1, found 0.5"),
        (tiny.ARCHITECTURE.rope, {"high_freq_factor": 1.0}, "expected 0 for default scaling"),
        (tiny.ARCHITECTURE.rope, {"scaling": "llama3"}, "expected 0 < low_freq_factor < high_freq_factor"),
        (tiny.ARCHITECTURE.rope, {"scaling": "yarn"}, "expected 0 < low_freq_factor < high_freq_factor"),
        (tiny.ARCHITECTURE.rope, {"scaling": "longrope"}, "expected one of default, linear, llama3, yarn, found 'long"),
        (tiny.ARCHITECTURE.rope, {"attention_factor": 1.5}, "attention_factor: expected 1 for default scaling"),
        (tiny.ARCHITECTURE.rope, {"attention_factor": 0.0}, "attention_factor: expected more than 0, found 0.0"),
        (tiny.ARCHITECTURE, {"windows": (4, -1)}, "windows: expected an integer from 0 to 2147483647, found -1"),
    ],
)
def test_an_invalid_record_cannot_be_built(record: Any, changes: dict[str, Any], message: str) -> None:
    assert dataclasses.replace(record) == record
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(record, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terms": ()}, "n: expected 1 to 8 terms, found 0"),
        ({"terms": (Dense("f32"),) * 9}, "n: expected 1 to 8 terms, found 9"),
        ({"bias": "int8"}, "n: bias: expected one of f32, f16, bf16, None, found 'int8'"),
        ({"terms": (Quantized(4, 64, False),)}, "n: group 64 does not divide the 32 inputs"),
        ({"out_features": 20}, r"n: out_dims \[4, 4\] multiply to 16, expected 20"),
        ({"in_features": 33}, r"n: in_dims \[8, 4\] multiply to 32, expected 33"),
        ({"name": ""}, "layer name: expected 1 to 200 printable ASCII characters, found ''"),
    ],
)
def test_a_layer_fits_its_terms(changes: dict[str, Any], message: str) -> None:
    layer = LinearSpec("n", 16, 32, None, (MPO,))
    with pytest.raises(FormatError, match=message):
        dataclasses.replace(layer, **changes)


def test_a_model_has_exactly_the_layers_of_its_architecture() -> None:
    spec = tiny.model()
    first, second, *rest = spec.linears
    for changes, message in (
        ({"linears": spec.linears[:-1]}, "layers: this architecture has 8, found 7"),
        (
            {"linears": (second, first, *rest)},
            r"layers: expected model.embed_tokens \[8, 32\] without bias",
        ),
        ({"linears": (first, dataclasses.replace(second, bias="f32"), *rest)}, r"\[16, 32\] with bias"),
        ({"vectors": spec.vectors[1:]}, "vectors: this architecture has 3, found 2"),
        ({"vectors": spec.vectors[::-1]}, r"vectors: expected model.layers.0.input_layernorm \[32\], found model.norm"),
        ({"files": spec.files * 2}, "files: tokenizer.json listed twice"),
    ):
        with pytest.raises(FormatError, match=message):
            dataclasses.replace(spec, **changes)


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=4),
    st.integers(1, 40),
    st.integers(1, 40),
)
def test_shapes_and_prefixes_of_an_operator(factors: list[tuple[int, int]], bond: int, chi: int) -> None:
    outs, ins = zip(*factors, strict=True)
    most = full_rank(outs, ins)
    term = Mpo(outs, ins, tuple(min(bond, rank) for rank in most), "f32", 0)
    cut = term.truncated(chi)
    assert cut.bonds == tuple(min(value, chi) for value in term.bonds)
    shapes = cut.core_shapes()
    assert shapes[0][1] == shapes[-1][0] == 1
    for k in range(len(factors) - 1):
        assert shapes[k][0] == shapes[k + 1][1] == cut.bonds[k]
    assert [shape[2:] for shape in shapes] == factors
    with pytest.raises(FormatError, match="full rank"):
        dataclasses.replace(term, bonds=(most[0] + 1, *term.bonds[1:]))


def test_full_rank_is_that_of_the_smaller_side() -> None:
    assert full_rank((16, 8), (4, 8)) == (64,)
    assert full_rank((2, 3, 5), (7, 1, 4)) == (14, 20)
    assert full_rank((49159, 1), (1, 4096)) == (4096,)


def test_json_of_a_model_comes_back_equal() -> None:
    spec = tiny.model(attention_bias=True, tie_word_embeddings=False)
    for record in (spec.architecture, spec.provenance, spec.linears[1], tiny.certificates(5), Layouts()):
        text = to_json(record)
        assert from_json(type(record), text, "x") == record
        assert text.isascii()
        assert ": " not in text
    rows = to_json([dataclasses.asdict(linear) for linear in spec.linears])
    assert records_from_json(LinearSpec, rows, "x") == spec.linears


def test_numbers_are_not_converted_silently() -> None:
    text = to_json(tiny.ARCHITECTURE.rope)
    assert from_json(Rope, text.replace("10000.0", "10000"), "x") == tiny.ARCHITECTURE.rope
    for old, new, found in (
        ('"theta":10000.0', '"theta":true', r"x.theta: expected a finite number, found true"),
        ('"theta":10000.0', '"theta":1e999', r"x.theta: expected a finite number, found inf"),
        ('"theta":10000.0', f'"theta":{2**53}', r"x.theta: expected a finite number, found 9007199254740992"),
        ('embeddings":0', 'embeddings":0.0', r"x.original_max_position_embeddings: expected an integer, found 0.0"),
        ('embeddings":0', 'embeddings":false', r"expected an integer, found false"),
        ('embeddings":0', f'embeddings":{10**30}', r"expected 0 for default scaling"),
    ):
        assert old in text
        with pytest.raises(FormatError, match=found):
            from_json(Rope, text.replace(old, new), "x")


@pytest.mark.parametrize("depth", [8, 9, 100_000])
def test_nesting_is_bounded_before_the_parser_runs(depth: int) -> None:
    text = "[" * depth + "]" * depth
    if depth <= 8:
        assert parse_json(text, "x") == [[[[[[[[]]]]]]]]
    else:
        with pytest.raises(FormatError, match="x: brackets do not match or nest deeper than 8"):
            parse_json(text, "x")


def test_brackets_inside_strings_are_text() -> None:
    value = {'a\\"[[[[[[[[[[[[[[[': "]}]}\\", "b": ["{" * 1000]}
    assert parse_json(to_json(value), "x") == value
    # An unterminated string full of escapes must not take quadratic time.
    with pytest.raises(FormatError, match="not valid JSON"):
        parse_json('"' + '\\"' * 1_000_000, "x")


def test_descriptions_are_safe_and_short() -> None:
    assert describe("a\x1b\n\u202e") == r"'a\x1b\n\u202e'"
    assert describe([1, "b", None, True]) == "[1, 'b', null, true]"
    assert describe([[1]]) == "a list of 1"
    assert describe({"a": 1}) == "an object of 1"
    assert describe(-(10**40)) == "an integer beyond 64 bits"
    assert len(shorten("é" * 1000)) <= 80
    assert shorten("x" * 78) == "'" + "x" * 78 + "'"


def fields_of(heading: str) -> list[str]:
    """The field names in the first table of SPEC.md after `heading`."""
    table = SPEC.split(heading, 1)[1].split("|---|---|\n", 1)[1].split("\n\n", 1)[0]
    return [name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])]


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("**Layouts**", Layouts),
        ("**Architecture**", Architecture),
        ("**Rope**", Rope),
        ("**LinearSpec**", LinearSpec),
        ("**Transform**", Transform),
        ("**Dense**", Dense),
        ("**Quantized**", Quantized),
        ("**Mpo**", Mpo),
        ("**VectorSpec**", VectorSpec),
        ("**FileSpec**", FileSpec),
        ("**Provenance**", Provenance),
        ("record **Certificates**", Certificate),
        ("**Quality**", Quality),
    ],
)
def test_the_specification_lists_every_field(heading: str, kind: Any) -> None:
    assert sorted(fields_of(heading)) == sorted(field.name for field in dataclasses.fields(kind))


def test_the_specification_names_the_limits_and_keys_of_the_code() -> None:
    assert f"# The `.mpo` format, version {NEWEST}\n" in SPEC
    assert fields_of("`__metadata__` has exactly these keys") == list(METADATA_KEYS)
    assert f"| N | {HEADER_LIMIT:,} (4 MiB) |" in SPEC
    assert f"filled with spaces to {CERTIFICATE_SIZE:,} bytes" in SPEC
    for value in dataclasses.asdict(Layouts()).values():
        assert f"| `{value}` |" in SPEC
    assert [field.name for field in dataclasses.fields(Certificates)] == ["entries"]
    assert all(hasattr(mpo_formats, name) for name in mpo_formats.__all__)
