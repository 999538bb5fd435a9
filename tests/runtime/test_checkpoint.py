"""Hugging Face folders: one or many shards in any float type, and every kind of damage as one line with its remedy."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpo_formats import CheckpointError, Dense
from mpo_runtime.layers.linear import float_tensor
from mpo_runtime.loading import open_weights
from mpo_runtime.weights.checkpoint import Checkpoint
from tests.helpers import granite_config, random_tensors, tensor_shapes, write_folder, write_weights

CONFIG = granite_config(num_hidden_layers=1, attention_bias=True, tie_word_embeddings=False)
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", CONFIG)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "f32"), (torch.float16, "f16"), (torch.bfloat16, "bf16")])
def test_every_tensor_is_read_as_it_is_stored(tmp_path: Path, shards: int, dtype: torch.dtype, name: str) -> None:
    folder = write_folder(tmp_path / "model", CONFIG, dtype=dtype, shards=shards)
    checkpoint = Checkpoint(folder)
    expected = random_tensors(CONFIG, 0, dtype)
    for tensor in expected:
        ours = tensor.replace("proj.weight", "proj.0.weight")
        assert checkpoint.dtype(ours) == name
        np.testing.assert_array_equal(float_tensor(checkpoint, ours).numpy(), expected[tensor].float().numpy())
    assert {linear.terms for linear in checkpoint.spec.linears} == {(Dense(name),)}
    assert [linear.name for linear in checkpoint.spec.linears if linear.bias] == [
        f"model.layers.0.self_attn.{part}_proj" for part in "qkvo"
    ]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors"))))
    assert checkpoint.sha256() == digest.hexdigest()


def test_arrays_are_views_of_the_mapped_file(folder: Path) -> None:
    array = Checkpoint(folder).array("lm_head.0.weight")
    assert not array.flags.owndata and not array.flags.writeable


def test_files_that_go_into_an_export(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [5]}')
    settings = {"chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = Checkpoint(folder)
    names = [file.name for file in checkpoint.spec.files]
    assert names == ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
    assert checkpoint.file("chat_template.jinja") == b"{{ messages }}"
    assert checkpoint.file("tokenizer.model") is None
    assert 5 in checkpoint.architecture.eos_token_ids
    (folder / "chat_template.jinja").write_text("the file wins")
    assert Checkpoint(folder).file("chat_template.jinja") == b"the file wins"


def test_a_copy_of_the_embedding_as_head_of_a_tied_model(tmp_path: Path) -> None:
    config = granite_config(num_hidden_layers=1)
    folder = write_folder(tmp_path / "model", config)
    tensors = load_file(folder / SHARD)
    write_weights(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert [linear.name for linear in Checkpoint(folder).spec.linears][-1] == "model.layers.0.mlp.down_proj"
    write_weights(folder, {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding .* set it to false"):
        Checkpoint(folder)


HEAD_NAME, TABLE_NAME = "lm_head.weight", "model.embed_tokens.weight"


def test_one_table_saved_under_the_other_name(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", granite_config(num_hidden_layers=1))
    tensors = load_file(folder / SHARD)
    table = tensors.pop(TABLE_NAME)
    write_weights(folder, {**tensors, HEAD_NAME: table})
    checkpoint = Checkpoint(folder)
    np.testing.assert_array_equal(checkpoint.array("model.embed_tokens.0.weight"), table.numpy())
    assert checkpoint.spec.linears[0].name == "model.embed_tokens"


@pytest.mark.parametrize("other", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_table_under_two_names_in_two_types(tmp_path: Path, dtype: torch.dtype, other: torch.dtype) -> None:
    """What transformers reads: the embedding; the copy only has to be the same once one is rounded to the other's type."""
    folder = write_folder(tmp_path / "model", granite_config(num_hidden_layers=1))
    tensors = load_file(folder / SHARD)
    table = tensors[TABLE_NAME] if torch.float32 in (dtype, other) else tensors[TABLE_NAME].bfloat16().float()
    write_weights(folder, {**tensors, TABLE_NAME: table.to(dtype), HEAD_NAME: table.to(other).clone()})
    found = float_tensor(Checkpoint(folder), "model.embed_tokens.0.weight")
    np.testing.assert_array_equal(found.numpy(), table.to(dtype).float().numpy())
    write_weights(folder, {**tensors, TABLE_NAME: table.to(dtype), HEAD_NAME: (table * 1.5).to(other)})
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from the embedding"):
        Checkpoint(folder)


def shards_of(folder: Path, count: int) -> dict[str, torch.Tensor]:
    """Rewrites the model in shards with an index, and returns its tensors."""
    tensors = load_file(folder / SHARD)
    (folder / SHARD).unlink()
    write_weights(folder, tensors, count)
    return tensors


def test_the_whole_file_comes_before_an_index(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """save_pretrained in shards and then whole leaves the index behind, with its shards or without them."""
    tensors = shards_of(folder, 3)
    changed = {**tensors, NORM: tensors[NORM] + 1}
    write_weights(folder, changed)
    for left in (folder.glob("model-*"), []):
        checkpoint = Checkpoint(folder)
        np.testing.assert_array_equal(checkpoint.array(NORM), changed[NORM].numpy())
        assert caplog.messages == [f"{folder / INDEX}: is stale and not used; model.safetensors is read"]
        caplog.clear()
        for shard in left:
            shard.unlink()


def test_an_index_of_other_shards_than_are_here(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tensors = shards_of(folder, 3)
    index = (folder / INDEX).read_text()
    for shard in folder.glob("model-*"):
        shard.unlink()
    write_weights(folder, tensors, 2)
    (folder / INDEX).write_text(index)
    np.testing.assert_array_equal(Checkpoint(folder).array(NORM), tensors[NORM].numpy())
    assert "is stale and not used; model-00001-of-00002.safetensors and model-00002-of-00002" in caplog.text
    (folder / INDEX).unlink()
    np.testing.assert_array_equal(Checkpoint(folder).array(NORM), tensors[NORM].numpy())
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: missing shard"):
        Checkpoint(folder)


def test_a_tensor_in_several_shards(folder: Path) -> None:
    tensors = shards_of(folder, 2)
    first, second = sorted(folder.glob("model-*"))
    index = json.loads((folder / INDEX).read_text())
    home = index["weight_map"][NORM]
    other = first if home == second.name else second
    save_file({**load_file(other), NORM: tensors[NORM] + 1}, other)
    np.testing.assert_array_equal(Checkpoint(folder).array(NORM), tensors[NORM].numpy())  # the index says which
    (folder / INDEX).unlink()
    with pytest.raises(
        CheckpointError, match=rf"tensor {NORM} is in .* and, with other values, in .*; remove the shard"
    ):
        Checkpoint(folder)
    save_file({**load_file(other), NORM: tensors[NORM].to(torch.float16)}, other)
    save_file({**load_file(folder / home), NORM: tensors[NORM].to(torch.float16).float()}, folder / home)
    assert Checkpoint(folder).dtype(NORM) == "f32"  # equal in two types: the wider one


def test_configuration_files_with_a_byte_order_mark(folder: Path) -> None:
    (folder / "generation_config.json").write_bytes(b'\xef\xbb\xbf{\r\n"eos_token_id": [5]\r\n}')
    content = (folder / "config.json").read_bytes()
    (folder / "config.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert 5 in Checkpoint(folder).architecture.eos_token_ids


def test_frequencies_that_older_exporters_wrote_are_left_out(folder: Path) -> None:
    tensors = load_file(folder / SHARD)
    write_weights(folder, {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4, dtype=torch.int64)})
    assert Checkpoint(folder).spec.linears


def cut(size: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(content[:size])

    return damage


def header(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Rewrites the shard's header."""

    def damage(folder: Path) -> None:
        content = (folder / SHARD).read_bytes()
        length = int.from_bytes(content[:8], "little")
        table = json.loads(content[8 : 8 + length])
        text = json.dumps(change(table) or table).encode()
        (folder / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        write_weights(folder, {name: tensor for name, tensor in tensors.items() if name not in names})

    return damage


def replaced(name: str, tensor: torch.Tensor) -> Callable[[Path], None]:
    return lambda folder: write_weights(folder, {**load_file(folder / SHARD), name: tensor})


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def alone(index: str) -> Callable[[Path], None]:
    """An index that has to name the shards, since there is no model.safetensors."""

    def damage(folder: Path) -> None:
        (folder / SHARD).rename(folder / "x.safetensors")
        (folder / INDEX).write_text(index)

    return damage


def renamed(old: str, new: str) -> Callable[[Path], Any]:
    """Gives a tensor of the folder another name."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / SHARD)
        tensors[new] = tensors.pop(old)
        save_file(tensors, folder / SHARD, {"format": "pt"})

    return change


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 1044992\n"
NORM = "model.norm.weight"
DAMAGED = "model.safetensors: truncated or damaged shard: "
CASES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config.json": (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json; copy it from the model's",
    ),
    "config is not JSON": (text("config.json", "{"), "config.json: cannot be read"),
    "config is a list": (text("config.json", "[]"), "config.json: expected a JSON object"),
    "generation_config is not JSON": (text("generation_config.json", "?"), "generation_config.json: cannot be read"),
    "no shard": (
        lambda folder: (folder / SHARD).unlink(),
        "model.safetensors: missing shard; only safetensors are read",
    ),
    "empty shard": (cut(0), DAMAGED + "header of 0 bytes in a file of 0; download it again"),
    "three bytes": (cut(3), DAMAGED),
    "cut in the header": (cut(100), DAMAGED + "header of "),
    "cut in the data": (cut(-4), f"{DAMAGED}{NORM} ends at byte "),
    "a pointer of git-lfs": (
        text(SHARD, POINTER),
        "model.safetensors: is a Git LFS pointer, not the file itself; install",
    ),
    "a pointer as config": (text("config.json", POINTER), "config.json: is a Git LFS pointer"),
    "a pointer as tokenizer": (
        lambda folder: (folder / "tokenizer.json").rename(folder / "x") and text("tokenizer.model", POINTER)(folder),
        "tokenizer.model: is a Git LFS pointer",
    ),
    "config in UTF-16": (
        lambda folder: (folder / "config.json").write_bytes(json.dumps(CONFIG).encode("utf-16")),
        "config.json: not UTF-8 at byte 0, it is UTF-16; convert it with: iconv",
    ),
    "config in Latin-1": (
        lambda folder: (folder / "config.json").write_bytes(b'{"author": "M\xfcller"}'),
        "config.json: not UTF-8 at byte 13 (0xFC); convert it with: iconv -f ISO-8859-1",
    ),
    "header is not JSON": (lambda folder: (folder / SHARD).write_bytes(b"\x04" + bytes(7) + b"{no}"), "is not JSON"),
    "header is a list": (header(lambda table: [1]), "is not a JSON object; download it again"),
    "a row is no object": (header(lambda table: table.update({NORM: 3})), f"does not say where {NORM} lies"),
    "a row lacks its shape": (
        header(lambda table: table[NORM].pop("shape") and None),
        f"does not say where {NORM} lies",
    ),
    "offsets of text": (header(lambda table: table[NORM].update(data_offsets=["a", "b"])), f"where {NORM} lies"),
    "one offset": (header(lambda table: table[NORM].update(data_offsets=[1])), f"where {NORM} lies"),
    "negative offsets": (header(lambda table: table[NORM].update(data_offsets=[-128, 0])), f"{DAMAGED}{NORM} has 128"),
    "reversed offsets": (header(lambda table: table[NORM].update(data_offsets=[128, 0])), f"{DAMAGED}{NORM} has -128"),
    "negative shape": (header(lambda table: table[NORM].update(shape=[-4, -8])), f"{NORM} has 128 bytes for shape [-4"),
    "too few bytes": (header(lambda table: table[NORM].update(shape=[64])), f"{NORM} has 128 bytes for shape [64]"),
    "missing tensor": (without(NORM), f"tensor {NORM} is missing; download the folder again"),
    "missing bias": (
        without("model.layers.0.self_attn.k_proj.bias"),
        "tensor model.layers.0.self_attn.k_proj.bias is ",
    ),
    "missing head": (
        without("lm_head.weight"),
        "tensor lm_head.weight is missing and config.json does not say tie_word_embeddings; set that to true if",
    ),
    "missing embedding": (
        without("model.embed_tokens.weight"),
        "tensor model.embed_tokens.weight is missing and config.json does not say tie_word_embeddings; set that to true if",
    ),
    "another shape": (replaced(NORM, torch.ones(31)), f"tensor {NORM} has shape [31], config.json demands [32]"),
    "another rank": (replaced(NORM, torch.ones(32, 1)), f"tensor {NORM} has shape [32, 1], config.json demands [32]"),
    "integers": (
        replaced(NORM, torch.ones(32, dtype=torch.int8)),
        f"{NORM} has type I8, expected one of F32, F16, BF16",
    ),
    "double precision": (
        replaced(NORM, torch.ones(32, dtype=torch.float64)),
        "has type F64, expected one of F32, F16, BF16; convert",
    ),
    "queries under another name": (
        renamed("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.query.weight"),
        "q_proj.weight is missing, while model.layers.0.self_attn has k_proj.bias, k_proj.weight, o_proj.bias, ",
    ),
    "unknown tensor": (
        replaced("model.layers.0.self_attn.q_norm.weight", torch.ones(8)),
        "tensor model.layers.0.self_attn.q_norm.weight has no place in this architecture",
    ),
    "index without a map": (alone("{}"), "index.json: no weight_map; download the folder again"),
    "index with a map of numbers": (alone('{"weight_map": {"a": 1}}'), "index.json: no weight_map"),
    "shard of the index missing": (alone('{"weight_map": {"a": "b.safetensors"}}'), "b.safetensors: missing shard"),
    "shard elsewhere": (alone('{"weight_map": {"a": "../model/x.safetensors"}}'), "missing shard"),
}


@pytest.mark.parametrize("case", CASES)
def test_damage_is_named_with_its_remedy(folder: Path, case: str) -> None:
    damage, words = CASES[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        Checkpoint(folder)
    assert str(error.value).startswith(str(folder)) and "\n" not in str(error.value)


@pytest.mark.parametrize("dropped", sorted(tensor_shapes(CONFIG)))
def test_any_missing_tensor_is_noticed(folder: Path, dropped: str) -> None:
    without(dropped)(folder)
    with pytest.raises(CheckpointError, match=f"tensor {re.escape(dropped)} is missing"):
        Checkpoint(folder)


def test_nothing_at_the_path(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"absent: no such file or folder.*; give a \.mpo file or a Hugging Face folder"
    ):
        open_weights(tmp_path / "absent")
