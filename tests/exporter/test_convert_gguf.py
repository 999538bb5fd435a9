"""`mpo-export to-gguf`: the package gguf, the oracle, reads the weights back; what is rounded is measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from mpo_exporter.convert.gguf import GgufRequest, read_integers, write_gguf
from mpo_exporter.convert.gguf_blocks import choose_type, packed
from mpo_exporter.convert.gguf_text import add_tokenizer
from mpo_exporter.plan.options import Options
from mpo_exporter.source import embedded_model
from mpo_formats import ConfigError, Dense, Mpo, MpoFile, OutputError, Quantized, Rope, Term
from mpo_formats.layout import content_tensors
from mpo_formats.reference import integer_tensor, matrix
from mpo_runtime.layers.linear import widen
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.gguf import Gguf
from tests.exporter.convert_cases import llama, write
from tests.formats import tiny
from tests.formats.tiny import DOWN, GATE, KEY, QUERY, UP, VALUE
from tests.helpers import export_folder, forward, network

# The type of 256 columns in groups of 32, and whether it is exact, by bits and stored zeros.
TYPES = {
    (2, False): ("Q4_0", True),
    (3, False): ("Q4_0", True),
    (4, False): ("Q4_0", True),
    (5, False): ("Q5_0", True),
    (6, False): ("Q6_K", False),
    (8, False): ("Q8_0", True),
    (2, True): ("Q4_1", False),
    (3, True): ("Q4_1", False),
    (4, True): ("Q4_1", False),
    (5, True): ("Q5_1", False),
    (8, True): ("Q8_0", False),
}
IDS = [1, 3, 2, 7, 0, 5, 6, 4, 4, 1]


def small(path: Path, terms: dict[str, tuple[Term, ...]], **changes: Any) -> Path:
    """A file that the package can write: it has no tokenizer."""
    return write(path, terms, intermediate_size=256, files=(), **changes)


@pytest.mark.parametrize(("bits", "zeros"), TYPES)
def test_blocks_are_what_the_package_reads(tmp_path: Path, bits: int, zeros: bool) -> None:
    file = small(tmp_path / "a.mpo", {DOWN: (Quantized(bits, 32, zeros),)})
    with MpoFile(file) as opened:
        integers = read_integers(opened, opened.spec.linear(DOWN))
        kind, exact = choose_type(integers)
        assert (kind, exact) == TYPES[bits, zeros]
        known = gguf.GGMLQuantizationType[kind]
        whole = zeros and bits > 5
        data = gguf.quantize(integers.values(), known) if whole else packed(integers, kind)
        found, expected = gguf.dequantize(data, known), integer_tensor(opened, f"{DOWN}.0", bits, zeros)
    np.testing.assert_allclose(integers.values(), expected, rtol=1e-6)
    if exact and bits > 2:
        np.testing.assert_array_equal(found, expected.astype(np.float32))
    else:
        # Q6_K: codes of step d·s with s within half of 1/127 of the largest scale; zeros: m rounded to half precision
        coarse = np.abs(integers.scale).max(-1).repeat(256).reshape(expected.shape)
        assert np.all(np.abs(found - expected) <= coarse * (0.65 if kind == "Q6_K" else 0.02 if kind != "Q8_0" else 2))


def test_columns_and_groups_without_a_type_are_rounded(tmp_path: Path) -> None:
    file = small(tmp_path / "a.mpo", {DOWN: (Quantized(4, 16, False),), QUERY: (Quantized(4, 16, False),)})
    said = write_gguf(GgufRequest(file, tmp_path / "a.gguf"))
    assert "2 matrices as Q8_0, rounded" in said and any("not measured" in line for line in said)
    theirs = Gguf(tmp_path / "a.gguf")
    with MpoFile(file) as opened:
        expected = integer_tensor(opened, f"{QUERY}.0", 4, False)
    assert np.abs(theirs.array(f"{QUERY}.0.weight") - expected).max() < np.abs(expected).max() / 200


@pytest.mark.parametrize(
    ("terms", "changes"),
    [
        ({name: (Quantized(4, 32, False),) for name in (QUERY, KEY, VALUE, GATE, UP, DOWN)}, {}),
        ({QUERY: (Quantized(5, 32, False),), KEY: (Quantized(8, 32, False),), UP: (Dense("f16"),)}, llama()),
        (
            {KEY: (Quantized(3, 32, False),)},
            llama(
                head_dim=64,
                attention_multiplier=0.125,
                attention_bias=True,
                mlp_bias=True,
                rope=Rope(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
            ),
        ),
        ({}, llama(rope=Rope(10000.0, "linear", 4.0, 0.0, 0.0, 0), tie_word_embeddings=False)),
    ],
)
def test_a_written_file_gives_the_same_logits(
    tmp_path: Path, terms: dict[str, tuple[Term, ...]], changes: dict[str, Any]
) -> None:
    file = small(tmp_path / "a.mpo", terms, max_position_embeddings=16384, **changes)
    write_gguf(GgufRequest(file, tmp_path / "a.gguf"))
    ours, theirs = (forward(network(path), [IDS])[0] for path in (file, tmp_path / "a.gguf"))
    np.testing.assert_allclose(theirs, ours, atol=1e-4 * np.abs(ours).max())


def test_transforms_are_undone_and_their_integers_rounded(tmp_path: Path) -> None:
    plain = small(tmp_path / "a.mpo", {DOWN: (Quantized(4, 32, False),), QUERY: (Quantized(8, 32, False),)})
    with MpoFile(plain) as opened:
        linears = tuple(
            dataclasses.replace(one, hadamard=min(32, one.in_features) * (one.name != VALUE))
            for one in opened.spec.linears
        )
        spec = dataclasses.replace(opened.spec, linears=linears)
        arrays = {tensor.name: opened.array(tensor.name) for tensor in content_tensors(spec)}
        tiny.write(tmp_path / "b.mpo", spec, arrays)
    said = write_gguf(GgufRequest(tmp_path / "b.mpo", tmp_path / "b.gguf", measure_tokens=0))
    assert {"1 matrices as Q5_1, rounded", "1 matrices as Q8_0, rounded"} <= set(said)
    theirs = Gguf(tmp_path / "b.gguf")
    with MpoFile(tmp_path / "b.mpo") as opened:
        for name, share in ((DOWN, 0.05), (QUERY, 0.01), (UP, 1e-6), (VALUE, 0.0)):
            expected = matrix(opened, opened.spec.linear(name))
            found = np.float64(widen(theirs.array(f"{name}.0.weight"), theirs.dtype(f"{name}.0.weight")).numpy())
            assert np.linalg.norm(found - expected) <= share * np.linalg.norm(expected), name


def test_cores_are_refused_and_files_are_kept(tmp_path: Path) -> None:
    file = small(tmp_path / "a.mpo", {UP: (Mpo((256, 1), (1, 32), (4,), "f16", 0),)})
    with pytest.raises(ConfigError, match=f"{UP} has cores or several terms, which llama.cpp cannot hold"):
        write_gguf(GgufRequest(file, tmp_path / "a.gguf"))
    plain = small(tmp_path / "b.mpo", {})
    (tmp_path / "b.gguf").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_gguf(GgufRequest(plain, tmp_path / "b.gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mpo", "b.gguf", "b.mpo"]
    with pytest.raises(ConfigError, match="--measure-tokens -1: expected 0 or more"):
        GgufRequest(plain, tmp_path / "b.gguf", -1)


def test_an_unknown_way_to_cut_text_is_refused(tmp_path: Path) -> None:
    class File:
        name = "a.mpo"

        def file(self, name: str) -> bytes | None:
            rules = '"pre_tokenizer": {"type": "Whitespace"}'
            model = '"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}'
            return f"{{{rules}, {model}}}".encode() if name == "tokenizer.json" else None

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    with MpoFile(small(tmp_path / "a.mpo", {})) as file, pytest.raises(ConfigError, match="no name of llama.cpp for"):
        add_tokenizer(writer, File(), file.spec.architecture)  # type: ignore[arg-type]


def test_granite_nano_with_its_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "nano.mpo"
    export_folder(embedded_model(), file, Options("int4"))
    said = write_gguf(GgufRequest(file, tmp_path / "nano.gguf", measure_tokens=100))
    assert "43 matrices as Q4_0, exactly" in said
    assert any(line.startswith("loss of rounding: KL 0 nats per token beside nano.mpo") for line in said), said
    with MpoFile(file) as opened:
        ours, theirs = Tokenizer.from_files(opened.file), Tokenizer.from_files(Gguf(tmp_path / "nano.gguf").file)
        template = opened.file("chat_template.jinja")
        end = opened.spec.architecture.eos_token_ids
    assert ours and theirs
    for text in ("I'd like 2 tables, please.\n\n  Grüße — 日本語 🎉", "<|start_of_role|>user"):
        assert theirs.encode(text, add_special_tokens=True) == ours.encode(text, add_special_tokens=True)
        assert theirs.encode(text, parse_special=True) == ours.encode(text, parse_special=True)
    reader = gguf.GGUFReader(tmp_path / "nano.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["tokenizer.chat_template"] == (template or b"").decode()
    assert fields["tokenizer.ggml.pre"] == "qwen2" and fields["tokenizer.ggml.eos_token_id"] == end[0]
    assert fields["general.architecture"] == "granite" and len(reader.tensors) == 43 + 13


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope": Rope(10000.0, "yarn", 4.0, 1.0, 8.0, 16)},
            "RoPE scaling yarn cannot be written .* the architecture granite",
        ),
        (
            llama(model_type="qwen3", rope=Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 32)),
            "RoPE scaling llama3 cannot be written as a GGUF file of the architecture qwen3 yet; use to-hf",
        ),
        (llama(model_type="qwen3", attention_bias=True), "attention_bias is True: a qwen3 in a GGUF file has none"),
        (llama(model_type="mistral", windows=(5,)), "its blocks attend to windows of positions"),
    ],
    ids=str,
)
def test_what_llama_cpp_does_not_read_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    file = small(tmp_path / "a.mpo", {}, **changes)
    with pytest.raises(ConfigError, match=message):
        write_gguf(GgufRequest(file, tmp_path / "a.gguf"))
    assert not (tmp_path / "a.gguf").exists()
