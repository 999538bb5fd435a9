"""What is written is what is read, by this reader and by stock safetensors."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from mpo_formats import Certificates, Dense, Mpo, MpoFile, Quantized, Rope, Term, reference
from mpo_formats.layout import CHECKSUMS, content_tensors, file_tensors, linear_bytes, linear_tensors
from mpo_formats.spec import BITS, CoreType, FloatType
from tests.formats import tiny

FEATURES: dict[str, Term] = {
    **{f"dense-{dtype}": Dense(dtype) for dtype in get_args(FloatType)},
    **{
        f"int{bits}-{'zeros' if zeros else 'plain'}": Quantized(bits, 16, zeros)
        for bits in BITS
        for zeros in (False, True)
    },
    **{
        f"mpo{len(bonds) + 1}-{dtype}": Mpo(outs, ins, bonds, dtype, 16 if dtype.startswith("int") else 0)
        for outs, ins, bonds in (((16, 8), (4, 8), (7,)), ((8, 4, 4), (2, 4, 4), (7, 5)))
        for dtype in get_args(CoreType)
    },
}


@pytest.mark.parametrize("term", FEATURES.values(), ids=FEATURES)
def test_a_file_gives_back_its_spec_and_its_bytes(tmp_path: Path, term: Term) -> None:
    spec = tiny.model({tiny.GATE: (term,)})
    path = tmp_path / "a.mpo"
    written = tiny.write(path, spec, measure=lambda _: tiny.certificates(3))
    with MpoFile(path, verify=True) as file:
        assert file.spec == spec
        assert file.certificates() == tiny.certificates(3)
        assert file.file("tokenizer.json") == tiny.TOKENIZER
        assert file.file("chat_template.jinja") is None
        for tensor in content_tensors(spec):
            found = file.array(tensor.name)
            assert file.dtype(tensor.name) == tensor.dtype
            assert found.dtype == written[tensor.name].dtype
            assert not found.flags.writeable
            assert np.array_equal(found, written[tensor.name])


def test_stock_safetensors_reads_the_same_tensors(tmp_path: Path) -> None:
    path = tmp_path / "a.mpo"
    written = tiny.write(path, tiny.model(), measure=lambda _: tiny.certificates())
    with safetensors.safe_open(path, "numpy") as stock, MpoFile(path) as ours:
        names = [tensor.name for tensor in file_tensors(tiny.model())]
        assert set(stock.keys()) == set(names)
        assert stock.metadata()["format"] == "mpo"
        for name in names:
            if ours.dtype(name) != "bf16":
                assert np.array_equal(stock.get_tensor(name), ours.array(name))
    raw = path.read_bytes()
    shown = {name: (row["dtype"], row["shape"], row["data"]) for name, row in safetensors.deserialize(raw)}
    assert shown["model.norm.weight"] == ("BF16", [32], written["model.norm.weight"].tobytes())
    assert all(bytes(shown[name][2]) == written[name].tobytes() for name in written)


def test_tensors_are_aligned_in_the_order_of_the_layer_table_and_padding_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "a.mpo"
    tiny.write(path, tiny.model())
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    del header["__metadata__"]
    assert (8 + length) % 64 == 0
    place = 0
    for index, (name, row) in enumerate(header.items()):
        begin, end = row["data_offsets"]
        assert begin == place
        place = end
        if name.startswith("mpo.padding."):
            assert name == f"mpo.padding.{index}"
            assert not any(raw[8 + length + begin : 8 + length + end])
            assert 1 <= end - begin <= 63
        else:
            assert begin % 64 == 0
    assert place == len(raw) - 8 - length
    content = [name for name in header if not name.startswith("mpo.padding.")]
    assert content == [*(t.name for t in content_tensors(tiny.model())), "mpo.certificate", "mpo.checksums"]


def test_checksums_cover_the_header_and_every_tensor_before_them(tmp_path: Path) -> None:
    path = tmp_path / "a.mpo"
    tiny.write(path, tiny.model(), measure=lambda _: tiny.certificates())
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    rows = [header[name]["data_offsets"] for name in header if name not in ("__metadata__", CHECKSUMS)]
    digests = [hashlib.sha256(raw[:start]).digest()]
    digests += [hashlib.sha256(raw[start + begin : start + end]).digest() for begin, end in rows]
    begin, end = header[CHECKSUMS]["data_offsets"]
    assert header[CHECKSUMS]["shape"] == [len(rows) + 1, 32]
    assert raw[start + begin : start + end] == b"".join(digests)


def test_bias_untied_head_rope_and_empty_certificate(tmp_path: Path) -> None:
    rope = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 32)
    spec = tiny.model(attention_bias=True, mlp_bias=True, tie_word_embeddings=False, model_type="llama", rope=rope)
    written = tiny.write(tmp_path / "a.mpo", spec)
    with MpoFile(tmp_path / "a.mpo", verify=True) as file:
        assert file.spec == spec
        assert file.certificates() == Certificates(())
        for name in (f"{tiny.QUERY}.bias", "model.layers.0.mlp.down_proj.bias", "lm_head.0.weight"):
            assert np.array_equal(file.array(name), written[name])
    assert f"{tiny.QUERY}.bias" not in [tensor.name for tensor in content_tensors(tiny.model())]


def test_a_layer_with_several_terms_is_their_sum(tmp_path: Path) -> None:
    path = tmp_path / "a.mpo"
    tiny.write(path, tiny.model())
    with MpoFile(path) as both:
        query = both.spec.linear(tiny.QUERY)
        parts = []
        for index, term in enumerate(query.terms):
            # The same tensors in a file of their own, whose layer has that term alone.
            spec = tiny.model({tiny.QUERY: (term,)})
            content = tiny.arrays(spec)
            for tensor in content_tensors(spec):
                if tensor.name.startswith(f"{tiny.QUERY}.0."):
                    content[tensor.name] = both.array(tensor.name.replace(f"{tiny.QUERY}.0.", f"{tiny.QUERY}.{index}."))
            alone = tmp_path / f"{index}.mpo"
            tiny.write(alone, spec, content)
            with MpoFile(alone) as single:
                parts.append(reference.matrix(single, single.spec.linear(tiny.QUERY)))
        total = reference.matrix(both, query)
        assert total.shape == (16, 32)
        assert np.allclose(total, parts[0] + parts[1], rtol=1e-14, atol=0)


def test_sizes_and_bonds_of_a_spec() -> None:
    spec = tiny.model()
    query = spec.linear(tiny.QUERY)
    # 16 rows of 32 columns: 4-bit plane 256, 1-bit plane 64, scales and zeros 16 · 2 · 2 each; cores 6·4·8 + 6·4·4 f16.
    assert [tensor.size for tensor in linear_tensors(query)] == [256, 64, 64, 64, 384, 192]
    assert linear_bytes(query) == 1024
    assert spec.largest_bond() == 7
    assert tiny.model({}).largest_bond() == 0
    with pytest.raises(KeyError):
        spec.linear("lm_head")
