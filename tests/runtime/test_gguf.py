"""GGUF files: every tensor, setting and logit against the Hugging Face folder they came from and against transformers' reading,
and every kind of damage as one line with its remedy."""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.utils import logging

import mpo_runtime
from mpo_formats import CheckpointError, Dense, MpoError
from mpo_runtime.loading import open_weights
from mpo_runtime.weights import gguf as reader
from mpo_runtime.weights.checkpoint import Checkpoint
from mpo_runtime.weights.gguf import Gguf
from tests.families import family_config, write_family
from tests.gguf_files import Tensors, byte_level, convert, write_gguf
from tests.helpers import Config, forward, granite_config, network, random_tensors, some_ids, write_folder

logging.set_verbosity_error()
logging.disable_progress_bar()

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
QUANTISED = (Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1)
# Where the half-precision scales of a block lie: types that the package dequantises but cannot quantise to.
SCALES_AT = {
    Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,),
    Kind.Q4_K: (0, 2),
    Kind.Q5_K: (0, 2),
    Kind.Q6_K: (208,),
    Kind.IQ4_NL: (0,),
    Kind.IQ4_XS: (0,),
    Kind.IQ3_XXS: (0,),
    Kind.IQ2_XS: (0,),
}


def llama_config(**changes: Any) -> Config:
    return granite_config(model_type="llama", **dict.fromkeys(MULTIPLIERS, None), **changes)


def arrays(config: Config, seed: int = 0) -> Tensors:
    return {name: tensor.numpy() for name, tensor in random_tensors(config, seed, torch.float32).items()}


def change_header(change: Callable[[gguf.GGUFWriter], Any], **config: Any) -> Callable[[Path], Path]:
    """Writes a small Llama whose metadata `change` adds to."""
    made = llama_config(num_hidden_layers=1, **config)
    return lambda path: write_gguf(path, made, arrays(made), change=change)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    config = llama_config(num_hidden_layers=1)
    return write_gguf(tmp_path / "small.gguf", config, arrays(config), tokenizer=letters())


def letters() -> Callable[[gguf.GGUFWriter], None]:
    """A byte-level vocabulary of 258 tokens, of which the last is special."""
    from tokenizers import pre_tokenizers

    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    return byte_level(tokens, [("h", "e")], "gpt-2", ["<|end|>"])


def same_weights(ours: Gguf, folder: Path) -> None:
    """Every setting and every tensor, bit for bit, is that of the folder."""
    expected = Checkpoint(folder)
    assert ours.architecture == expected.architecture
    assert ours.spec.linears == expected.spec.linears
    names = [f"{linear.name}.0.weight" for linear in expected.spec.linears]
    names += [f"{linear.name}.bias" for linear in expected.spec.linears if linear.bias]
    names += [f"{vector.name}.weight" for vector in expected.spec.vectors]
    for name in names:
        assert ours.dtype(name) == "f32"
        np.testing.assert_array_equal(ours.array(name), expected.array(name))


@pytest.mark.shared
@pytest.mark.parametrize("kind", ["llama", "granite"])
def test_the_shared_models(shared: Path, tmp_path: Path, kind: str) -> None:
    folder = shared / "models" / f"stories260K-{kind}"
    ours = Gguf(convert(folder, tmp_path / "model.gguf"))
    same_weights(ours, folder)
    content = ours.file("tokenizer.json")
    assert content is not None
    for document in (made := json.loads(content), own := json.loads((folder / "tokenizer.json").read_bytes())):
        del document["post_processor"]["pair"]  # for two texts, which no language model is given
    assert made == own
    assert [file.name for file in ours.spec.files] == ["tokenizer.json", "tokenizer_config.json"]


VOCABULARY = 40


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """A Llama or Granite of any shape, with any scaling of RoPE that llama.cpp can store."""
    granite = draw(st.booleans())
    keys, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size, theta = draw(st.sampled_from([4, 8, 16])), draw(st.sampled_from([100.0, 10000.0, 500000.0]))
    own_size = not granite and draw(st.booleans())
    scale = st.floats(0.0625, 20, width=32)
    scaling: Config = {"rope_type": draw(st.sampled_from(["default", "linear", "llama3"]))}
    if scaling["rope_type"] != "default":
        scaling["factor"] = draw(st.sampled_from([2.0, 8.0, 32.0]))
    if scaling["rope_type"] == "llama3":
        # With another theta no frequency of a small head is slow enough to tell the factor.
        size, theta = draw(st.sampled_from([8, 16])), 500000.0
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return granite_config(
        model_type="granite" if granite else "llama",
        vocab_size=VOCABULARY,
        hidden_size=draw(st.sampled_from([32, 64])) if own_size else keys * group * size,
        head_dim=size if own_size else None,
        intermediate_size=draw(st.sampled_from([16, 48])),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=keys * group,
        num_key_value_heads=keys,
        rope_theta=theta,
        rope_scaling=None if scaling["rope_type"] == "default" else scaling,
        rms_norm_eps=draw(st.sampled_from([1e-5, 1e-6])),
        attention_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        tie_word_embeddings=draw(st.booleans()),
        bos_token_id=None,
        eos_token_id=None,
        **{key: float(str(np.float32(draw(scale)))) if granite else None for key in MULTIPLIERS},
    )


@given(configs())
def test_random_models_come_back_bit_for_bit(config: Config) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name) / "model", config)
        path = write_gguf(Path(name) / "model.gguf", config, arrays(config))
        same_weights(Gguf(path), folder)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_qwen(tmp_path: Path, kind: str, tied: bool) -> None:
    """As the folder in every bit, and in logits as transformers: rows are not reordered, biases and norms of heads are read."""
    config = family_config(kind, use_sliding_window=False, tie_word_embeddings=tied, bos_token_id=None)
    model = write_family(tmp_path / "folder", config)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    if tied:
        del tensors["lm_head.weight"]
    path = write_gguf(tmp_path / "model.gguf", config, tensors, tokenizer=letters())
    same_weights(Gguf(path), tmp_path / "folder")
    rows = [some_ids(20)]
    with torch.inference_mode():
        expected = model(torch.tensor(rows)).logits.numpy()
    np.testing.assert_allclose(forward(network(path), rows), expected, atol=1e-4)


def test_a_mistral_is_a_llama_in_gguf(tmp_path: Path) -> None:
    """llama.cpp gives both one name; logits are those of transformers' Mistral."""
    config = family_config("mistral", sliding_window=None, bos_token_id=None)
    model = write_family(tmp_path / "folder", config)
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    path = write_gguf(tmp_path / "model.gguf", config | {"model_type": "llama"}, tensors, tokenizer=letters())
    assert Gguf(path).architecture.model_type == "llama"
    rows = [some_ids(20)]
    with torch.inference_mode():
        expected = model(torch.tensor(rows)).logits.numpy()
    np.testing.assert_allclose(forward(network(path), rows), expected, atol=1e-4)


def theirs(path: Path, rows: list[list[int]]) -> NDArray[np.float32]:
    """Logits [B, S, vocabulary] as transformers computes them in float32 from its own reading of the file."""
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    model = LlamaForCausalLM(config).float().eval()
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    missing = model.load_state_dict(tensors, strict=False).missing_keys
    assert missing in ([], ["lm_head.weight"])
    model.tie_weights()
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor(rows)).logits
    return logits.numpy()


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, *QUANTISED], ids=lambda kind: kind.name)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tmp_path: Path, kind: Kind, tied: bool) -> None:
    config = llama_config(hidden_size=64, intermediate_size=96, tie_word_embeddings=tied)
    path = write_gguf(tmp_path / "model.gguf", config, arrays(config), kinds=kind, tokenizer=letters())
    rows = [some_ids(12, seed) for seed in range(2)]
    for backend in ("reference", "native"):
        ours = forward(network(path, backend=backend), rows)
        # With matrix units for bf16, native multiplies bf16 weights with activations as sums of two bf16 numbers.
        assert np.abs(ours - theirs(path, rows)).max() < (1e-4 if backend == "reference" else 5e-4)


@pytest.mark.parametrize("kind", SCALES_AT, ids=lambda kind: kind.name)
def test_types_that_only_llama_cpp_quantises_to(tmp_path: Path, kind: Kind) -> None:
    config = llama_config(hidden_size=256, intermediate_size=256, num_hidden_layers=1, vocab_size=258)
    tensors = arrays(config)
    stored = {}
    for number, part in enumerate(("attn_q", "attn_k", "ffn_down")):
        rows = 128 if part == "attn_k" else 256
        stored[f"blk.0.{part}.weight"] = (random_blocks(kind, rows, 256, number), kind)
    path = write_gguf(tmp_path / "model.gguf", config, tensors, stored=stored, tokenizer=letters())
    rows_of_ids = [some_ids(12)]
    assert np.abs(forward(network(path), rows_of_ids) - theirs(path, rows_of_ids)).max() < 1e-3
    matrix = Gguf(path).array("model.layers.0.mlp.down_proj.0.weight")
    np.testing.assert_array_equal(matrix, gguf.dequantize(*stored["blk.0.ffn_down.weight"]))
    assert matrix.dtype == np.float32 and not matrix.flags.writeable and matrix.std() > 1e-3


def random_blocks(kind: Kind, rows: int, columns: int, seed: int) -> NDArray[np.uint8]:
    """Random bytes as blocks of a type, with scales that keep the values small."""
    block, length = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // block, length), np.uint8)
    for place in SCALES_AT[kind]:
        raw[..., place : place + 2] = np.frombuffer(np.float16(3e-4).tobytes(), np.uint8)
    return raw.reshape(rows, -1)


def test_stored_floats_are_views_and_others_are_dequantised_to_what_is_asked_for(tmp_path: Path) -> None:
    config = llama_config(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    kinds = {"model.embed_tokens.weight": Kind.BF16, "model.layers.0.mlp.up_proj.weight": Kind.Q8_0}
    path = write_gguf(tmp_path / "model.gguf", config, arrays(config), kinds=kinds)
    exact, half = Gguf(path), Gguf(path, dequantised="f16")
    for ours in (exact, half):
        table = ours.array("model.embed_tokens.0.weight")
        assert not table.flags.owndata and not table.flags.writeable
        assert ours.dtype("model.embed_tokens.0.weight") == "bf16" and table.dtype == np.uint16
        assert ours.spec.linear("model.layers.0.mlp.down_proj").terms == (Dense("f32"),)
    name = "model.layers.0.mlp.up_proj"
    assert exact.spec.linear(name).terms == (Dense("f32"),) and half.spec.linear(name).terms == (Dense("f16"),)
    narrow = half.array(f"{name}.0.weight")
    assert narrow.dtype == np.float16
    np.testing.assert_array_equal(narrow, exact.array(f"{name}.0.weight").astype(np.float16))


def test_large_models_are_dequantised_to_two_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = llama_config(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    path = write_gguf(tmp_path / "model.gguf", config, arrays(config), kinds=Kind.Q4_0)
    parameters = Gguf(path).architecture.parameters()
    monkeypatch.setattr(reader, "MOST_EXACT", parameters)
    name = "model.embed_tokens.0.weight"
    exact = Gguf(path)
    assert exact.dtype(name) == "f32" and exact.array(name).dtype == np.float32
    monkeypatch.setattr(reader, "MOST_EXACT", parameters - 1)
    monkeypatch.setattr(reader, "AT_ONCE", 1000)  # in parts of a few rows
    half = Gguf(path)
    assert half.dtype(name) == "f16"
    assert Gguf(path, dequantised="f16").array(name).shape == exact.array(name).shape and not caplog.messages
    for _ in range(2):
        np.testing.assert_array_equal(half.array(name), exact.array(name).astype(np.float16))
    assert caplog.messages == [
        f"{path}: is dequantised whenever it is opened, which takes minutes; export it once: mpo-export"
    ]


def test_the_latest_tensors_are_kept_where_there_is_room(tmp_path: Path) -> None:
    config = llama_config(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    path = write_gguf(tmp_path / "model.gguf", config, arrays(config), kinds=Kind.Q4_0)
    up, gate, down = (f"model.layers.0.mlp.{part}_proj.0.weight" for part in ("up", "gate", "down"))
    size = 96 * 64 * 4
    ours = Gguf(path, kept=2 * size)
    first, second = ours.array(up), ours.array(gate)
    assert ours.array(up) is first  # now the latest
    ours.array(down)
    assert ours.array(up) is first and ours.array(gate) is not second
    for room in (0, size - 1):
        ours = Gguf(path, kept=room)
        assert ours.array(up) is not ours.array(up)


def test_values_that_two_bytes_cannot_hold_are_refused(tmp_path: Path) -> None:
    config = llama_config(hidden_size=64, intermediate_size=96, num_hidden_layers=1)
    tensors = arrays(config)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = 1e6
    path = write_gguf(tmp_path / "model.gguf", config, tensors, kinds=Kind.Q8_0)
    name = "model.layers.0.mlp.up_proj.0.weight"
    assert Gguf(path).array(name)[3, 5] == pytest.approx(1e6, rel=1e-3)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight holds values that f16 cannot"):
        Gguf(path, dequantised="f16").array(name)


def test_a_file_generates_and_is_told_by_its_first_bytes(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "no-suffix"
    other.write_bytes(file.read_bytes())
    texts = []
    for path in (file, other):
        with mpo_runtime.load(path) as model:
            texts.append("".join(piece.text for piece in model.generate("he", max_tokens=5, temperature=0)))
    assert texts[0] == texts[1] and texts[0]
    weights = open_weights(file)
    assert isinstance(weights, Gguf) and weights.folder == file
    assert weights.sha256() == hashlib.sha256(file.read_bytes()).hexdigest()
    assert weights.spec.provenance.source == "small.gguf"
    weights.close()


def test_end_tokens_come_from_every_key_and_from_well_known_spellings(tmp_path: Path) -> None:
    def ids(**named: int) -> tuple[int, ...]:
        def change(writer: gguf.GGUFWriter) -> None:
            letters()(writer)
            for key, token in named.items():
                getattr(writer, f"add_{key}_token_id")(token)

        return Gguf(change_header(change)(tmp_path / "model.gguf")).architecture.eos_token_ids

    assert ids() == (257,)  # <|end|>
    assert ids(eos=3) == (3, 257)
    assert ids(eos=257, eot=5, eom=6) == (257, 5, 6)
    assert ids(eos=100_000, eot=5) == (5, 257)  # an id that cannot occur


def test_special_ids_that_cannot_occur_are_ignored(tmp_path: Path) -> None:
    path = change_header(lambda writer: (writer.add_bos_token_id(999), writer.add_pad_token_id(1)))(tmp_path / "a.gguf")
    architecture = Gguf(path).architecture
    assert architecture.bos_token_id is None and architecture.pad_token_id == 1


@pytest.mark.parametrize(("low", "high", "length"), [(1.0, 4.0, 8192), (2.0, 32.0, 4096), (0.5, 3.0, 1000)])
def test_llama3_settings_follow_from_the_divisors(tmp_path: Path, low: float, high: float, length: int) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }
    config = llama_config(
        num_attention_heads=1, num_key_value_heads=1, head_dim=64, rope_theta=5e5, rope_scaling=scaling
    )
    plain = Gguf(write_gguf(tmp_path / "a.gguf", config, arrays(config))).architecture.rope
    # Only the ratios count: twice the length with twice the factors is the same.
    assert plain.scaling == "llama3" and plain.factor == 8
    assert plain.low_freq_factor / plain.original_max_position_embeddings == pytest.approx(low / length, rel=1e-3)
    assert plain.high_freq_factor / plain.original_max_position_embeddings == pytest.approx(high / length, rel=1e-3)
    path = write_gguf(
        tmp_path / "b.gguf", config, arrays(config), change=lambda writer: writer.add_rope_scaling_orig_ctx_len(length)
    )
    rope = Gguf(path).architecture.rope
    assert rope.original_max_position_embeddings == length
    assert rope.low_freq_factor == pytest.approx(low, rel=1e-3)
    assert rope.high_freq_factor == pytest.approx(high, rel=1e-3)


def test_a_linear_factor_of_rope_in_both_spellings(tmp_path: Path) -> None:
    old = change_header(lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0))(tmp_path / "old.gguf")
    new = change_header(lambda writer: writer.add_rope_scaling_factor(4.0))(tmp_path / "new.gguf")
    off = change_header(
        lambda writer: (
            writer.add_rope_scaling_factor(4.0),
            writer.add_rope_scaling_type(gguf.RopeScalingType.NONE),
        )
    )(tmp_path / "off.gguf")
    assert [Gguf(path).architecture.rope.factor for path in (old, new, off)] == [4, 4, 1]


def test_random_divisors_are_refused(tmp_path: Path) -> None:
    divisors = np.array([1, 3, 2, 8], np.float32)
    config = llama_config(num_hidden_layers=1)
    stored = {"rope_freqs.weight": (divisors, Kind.F32)}
    path = write_gguf(tmp_path / "model.gguf", config, arrays(config), stored=stored)
    with pytest.raises(
        CheckpointError, match=r"model\.gguf: RoPE: rope_freqs\.weight holds divisors that no Llama 3\.1"
    ):
        Gguf(path)


HEADERS: dict[str, tuple[Callable[[gguf.GGUFWriter], Any], str]] = {
    "experts": (lambda w: w.add_expert_count(8), "has experts, which are not supported yet"),
    "window": (lambda w: w.add_sliding_window(16), "uses sliding-window attention"),
    "yarn": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "RoPE scaling 'yarn' is not supported"),
    "partial": (lambda w: w.add_key_length(16), r"llama\.rope\.dimension_count: expected 16"),
    "values": (lambda w: w.add_value_length(16), r"llama\.attention\.value_length: expected 8"),
    "split": (
        lambda w: w.add_uint16("split.count", 3),
        "one part of a model in several files; join them: llama-gguf-split",
    ),
    "adapter": (lambda w: w.add_type("adapter"), "general.type 'adapter', expected a model"),
    "tokenizer": (
        lambda w: w.add_tokenizer_model("rwkv"),
        "tokenizer.ggml.model 'rwkv' is not supported; expected gpt2 or",
    ),
    "pre": (
        lambda w: byte_level(["a", "b", "ab"], [("a", "b")], "tekken")(w),
        r"tokenizer\.ggml\.pre 'tekken' is not supported; expected one of llama-bpe.* give the model's Hugging Face folder",
    ),
    "old": (
        lambda w: (w.add_tokenizer_model("gpt2"), w.add_token_list(["a"]), w.add_token_merges(["a b"])),
        r"tokenizer\.ggml\.pre is missing, as in files made before May 2024; expected one of",
    ),
    "merges": (
        lambda w: byte_level(["a", "b"], [("a", "b")], "gpt-2")(w),
        r"tokenizer\.ggml\.merges: expected pairs of tokens that make a token, found 'a b'",
    ),
    "twice": (
        lambda w: byte_level(["a", "a"], [("a", "b")], "gpt-2")(w),
        r"tokens: expected every token once, found 'a' twice",
    ),
    "many": (
        lambda w: byte_level([str(i) for i in range(400)], [], "gpt-2")(w),
        "expected 1 to 258 tokens, .* found 400",
    ),
    "scores": (
        lambda w: (w.add_tokenizer_model("llama"), w.add_token_list(["a"])),
        r"scores: expected an array, found None",
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_what_cannot_be_honoured_is_named_in_one_line(tmp_path: Path, name: str) -> None:
    change, message = HEADERS[name]
    path = change_header(change)(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match=rf"model\.gguf: .*{message}") as caught:
        Gguf(path)
    assert "\n" not in str(caught.value)


def test_a_granite_without_rotary_embedding_is_refused(tmp_path: Path) -> None:
    config = granite_config(num_hidden_layers=1)
    path = write_gguf(
        tmp_path / "model.gguf", config, arrays(config), change=lambda writer: writer.add_rope_scaling_finetuned(False)
    )
    with pytest.raises(CheckpointError, match="uses no rotary position embedding"):
        Gguf(path)


@pytest.mark.parametrize("kind", ["gemma2", "granitehybrid", "gpt_neo", "gptneox"])
def test_other_architectures_are_named(tmp_path: Path, kind: str) -> None:
    """Among them llama.cpp's name for Granite 4, and a name that it has not for GPT-Neo."""
    config = llama_config(num_hidden_layers=1) | {"model_type": kind}
    path = write_gguf(tmp_path / "model.gguf", config, arrays(config))
    with pytest.raises(
        CheckpointError, match=rf"the architecture '{kind}' is not supported; expected one of granite, llama"
    ):
        Gguf(path)


def test_tensors_too_many_too_few_or_of_another_shape(tmp_path: Path) -> None:
    config = llama_config(num_hidden_layers=1)
    zeros = np.zeros((32, 32), np.float32)
    path = tmp_path / "model.gguf"
    write_gguf(path, config, arrays(config), stored={"blk.0.attn_qkv.weight": (zeros, Kind.F32)})
    with pytest.raises(CheckpointError, match=r"tensor blk\.0\.attn_qkv\.weight has no place in a llama model"):
        Gguf(path)
    write_gguf(path, config, arrays(config), stored={"blk.0.attn_k.weight": (zeros, Kind.F32)})
    with pytest.raises(CheckpointError, match=r"attn_k\.weight has shape \[32, 32\], the metadata demand \[16, 32\]"):
        Gguf(path)
    tensors = arrays(config)
    del tensors["model.norm.weight"]
    write_gguf(path, config, tensors)
    with pytest.raises(CheckpointError, match=r"tensor output_norm\.weight is missing; the file is incomplete"):
        Gguf(path)


def test_types_that_the_package_does_not_dequantise(tmp_path: Path) -> None:
    config = llama_config(num_hidden_layers=1)
    path = tmp_path / "model.gguf"
    write_gguf(path, config, arrays(config), stored={"blk.0.ffn_up.weight": (np.zeros((48, 32), np.int8), Kind.I8)})
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight has the type I8, which .* does not dequantise"):
        Gguf(path)
    data = bytearray(path.read_bytes())
    at = data.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 2 * 8
    data[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"has the tensor type 99, which the installed package gguf does not know"
    ):
        Gguf(path)


@pytest.mark.parametrize(
    ("begin", "message"),
    [
        (b"", r"cannot be read \(it is empty\); download it again"),
        (b"<htm", r"is not a GGUF file, it begins with b'<htm'; download it again"),
        (b"GGUF", "it ends at byte 4; download it again"),
        (b"GGUF\1\0\0\0", "has GGUF version 1, expected 2 or 3; get a newer file, or convert the model again"),
        (b"GGUF\0\0\0\3", "is big-endian, which is not supported"),
        (b"GGUF\3\0\0\0" + bytes(4), "its header goes on to byte 16, the file ends at 12"),
    ],
)
def test_other_files_and_versions(tmp_path: Path, begin: bytes, message: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(begin)
    with pytest.raises(CheckpointError, match=message):
        open_weights(path)


def test_version_2_is_read(file: Path) -> None:
    data = file.read_bytes()
    file.write_bytes(data[:4] + (2).to_bytes(4, "little") + data[8:])
    assert Gguf(file).architecture.num_hidden_layers == 1


def test_part_of_a_split_file_by_its_name(file: Path) -> None:
    part = file.rename(file.with_name("model-00002-of-00003.gguf"))
    with pytest.raises(CheckpointError, match="one part of a model in several files"):
        Gguf(part)
    assert Gguf(part.rename(file.with_name("model-00001-of-00001.gguf"))).spec.linears


def test_a_truncated_file_says_so_wherever_it_ends(file: Path) -> None:
    data = file.read_bytes()
    for end in (20, 100, 1000, 5000, len(data) // 2, len(data) - 33):
        file.write_bytes(data[:end])
        with pytest.raises(CheckpointError, match=r"truncated or damaged GGUF file: .*; download it again"):
            Gguf(file)


@settings(max_examples=150)
@given(st.data())
def test_damaged_bytes_never_raise_anything_else(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        config = llama_config(num_hidden_layers=1, vocab_size=258)
        path = write_gguf(Path(name) / "model.gguf", config, arrays(config), tokenizer=letters())
        raw = bytearray(path.read_bytes())
        header = raw.index(b"output_norm.weight") + 100
        for _ in range(data.draw(st.integers(1, 4))):
            at = data.draw(st.integers(4, header))
            raw[at] = data.draw(st.integers(0, 255))
        path.write_bytes(raw)
        try:
            opened = Gguf(path)
        except MpoError as error:
            assert "\n" not in str(error)
            return
        assert math.prod(opened.array("model.embed_tokens.0.weight").shape) > 0


def test_without_the_package_the_message_says_what_to_install(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointError, match=re.escape("need the package gguf: pip install 'mpo-runtime[gguf]'")):
        open_weights(file)
