"""config.json: what is read from it, and what is refused because the forward pass could not honour it."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from mpo_formats import CheckpointError, Rope
from mpo_runtime.weights.config import architecture_from_config
from tests.families import family_config
from tests.helpers import EOS, granite_config

PLAIN = Rope(10000.0, "default", 1.0, 0.0, 0.0, 0)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def read(generation: dict[str, Any] | None = None, **changes: Any) -> Any:
    return architecture_from_config(granite_config(**changes), generation or {}, "folder")


def test_a_granite_is_read_as_it_stands() -> None:
    found = read(attention_bias=True, mlp_bias=True, tie_word_embeddings=False, pad_token_id=3)
    assert (found.hidden_size, found.intermediate_size, found.num_hidden_layers) == (32, 48, 2)
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim) == (4, 2, 8)
    assert (found.embedding_multiplier, found.residual_multiplier) == (3.0, 0.5)
    assert (found.attention_multiplier, found.logits_scaling) == (0.25, 2.0)
    assert (found.attention_bias, found.mlp_bias, found.tie_word_embeddings, found.pad_token_id) == (
        True,
        True,
        False,
        3,
    )


def test_defaults_are_those_of_transformers() -> None:
    """What a config.json may leave out, because transformers leaves out what equals its default."""
    from transformers import GraniteConfig

    default = GraniteConfig()
    names = (
        "num_key_value_heads",
        "max_position_embeddings",
        "rms_norm_eps",
        "embedding_multiplier",
        "rope_theta",
        "residual_multiplier",
        "attention_multiplier",
        "logits_scaling",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
        "hidden_act",
    )
    found = read(**dict.fromkeys(names))
    for name in names:
        if hasattr(found, name) and name != "num_key_value_heads":
            assert getattr(found, name) == getattr(default, name), name
    assert found.num_key_value_heads == found.num_attention_heads
    assert found.rope == PLAIN


def test_a_llama_has_no_multipliers() -> None:
    found = read(model_type="llama", head_dim=16)
    assert (found.embedding_multiplier, found.residual_multiplier, found.logits_scaling) == (1, 1, 1)
    assert found.attention_multiplier == 0.25
    assert found.head_dim == 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, PLAIN),
        ({"rope_theta": 5}, Rope(5.0, "default", 1.0, 0.0, 0.0, 0)),
        ({"rope_theta": None}, PLAIN),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, Rope(10000.0, "linear", 2.0, 0.0, 0.0, 0)),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, Rope(10000.0, "linear", 2.0, 0.0, 0.0, 0)),
        ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, Rope(10000.0, "llama3", 8.0, 1.0, 4.0, 16)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, Rope(7.0, "default", 1.0, 0.0, 0.0, 0)),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, **LLAMA3}},
            Rope(7.0, "llama3", 8.0, 1.0, 4.0, 16),
        ),
    ],
)
def test_both_spellings_of_rope(changes: dict[str, Any], expected: Rope) -> None:
    assert read(**changes).rope == expected


def test_yarn_has_the_defaults_of_transformers() -> None:
    plain = {"type": "yarn", "factor": 4.0}
    assert read(rope_scaling=plain).rope == Rope(10000.0, "yarn", 4.0, 1.0, 32.0, 64, 0.1 * math.log(4.0) + 1)
    settings = {**plain, "attention_factor": 2.0, "beta_fast": 8, "beta_slow": 2, "original_max_position_embeddings": 7}
    assert read(rope_scaling=settings).rope == Rope(10000.0, "yarn", 4.0, 2.0, 8.0, 7, 2.0)


def test_dynamic_scaling_changes_nothing_within_the_context() -> None:
    """Beyond max_position_embeddings it would, but no context is longer."""
    assert read(rope_scaling={"type": "dynamic", "factor": 4.0}).rope == PLAIN


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "mistral"}, ()),  # 4,096 by default, longer than the context
        ({"model_type": "mistral", "max_position_embeddings": 8192}, (4096,)),
        ({"model_type": "mistral", "sliding_window": 5}, (5,)),
        ({"model_type": "mistral", "sliding_window": 64}, ()),
        ({"model_type": "qwen2", "sliding_window": 5}, ()),
        ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True}, ()),
        ({"model_type": "qwen2", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 1}, (0, 5)),
        ({"model_type": "qwen3", "sliding_window": 5, "use_sliding_window": True, "max_window_layers": 0}, (5,)),
        (
            {
                "model_type": "qwen3",
                "sliding_window": 5,
                "use_sliding_window": True,
                "num_hidden_layers": 4,
                "layer_types": ["sliding_attention", "full_attention"] * 2,
            },
            (5, 0),
        ),
    ],
    ids=str,
)
def test_windows_are_the_shortest_list_that_repeats(changes: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert read(**changes).windows == windows


def test_a_gpt_neo_is_read_under_its_own_names() -> None:
    found = architecture_from_config(family_config("gpt_neo"), {}, "folder")
    assert (found.num_hidden_layers, found.num_attention_heads, found.num_key_value_heads) == (2, 4, 4)
    assert (found.rms_norm_eps, found.attention_multiplier, found.tie_word_embeddings) == (1e-5, 1.0, True)
    assert (found.windows, found.attention_bias, found.mlp_bias, found.intermediate_size) == ((0, 6), True, True, 48)
    plain = architecture_from_config(family_config("gpt_neo", intermediate_size=None), {}, "folder")
    assert plain.intermediate_size == 4 * plain.hidden_size
    with pytest.raises(CheckpointError, match="hidden_act 'relu' is not supported; expected 'gelu_new'"):
        architecture_from_config(family_config("gpt_neo", activation_function="relu"), {}, "folder")
    with pytest.raises(CheckpointError, match="names the attention of 24 blocks, expected 2"):
        architecture_from_config(family_config("gpt_neo", attention_types=None), {}, "folder")


def test_end_tokens_of_both_files() -> None:
    assert read().eos_token_ids == (EOS,)
    assert read({"eos_token_id": [5, EOS]}).eos_token_ids == (EOS, 5)
    assert read({"eos_token_id": 5}, eos_token_id=[1, 2]).eos_token_ids == (1, 2, 5)
    assert read(eos_token_id=None).eos_token_ids == ()


@pytest.mark.parametrize(
    ("value", "found", "noted"),
    [
        (None, None, False),
        ("", None, False),
        (0, 0, False),
        (257, 257, False),
        (5.0, 5, False),
        (-1, None, True),
        (258, None, True),
        (2.5, None, True),
        ("5", None, True),
        (True, None, True),
        ({"id": 5}, None, True),
    ],
)
def test_special_tokens_that_cannot_occur_are_ignored_with_a_note(
    value: Any, found: int | None, noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"bos_token_id": value, "pad_token_id": value, "eos_token_id": [2, value]}
    config = {key: item for key, item in {**granite_config(), **changes}.items() if item is not None}
    architecture = architecture_from_config(config, {"eos_token_id": value}, "folder")
    assert (architecture.bos_token_id, architecture.pad_token_id) == (found, found)
    assert architecture.eos_token_ids == ((2,) if found is None else (2, found))
    notes = [record.getMessage() for record in caplog.records]
    places = ["config.json: bos_token_id", "config.json: pad_token_id", "config.json: eos_token_id"]
    expected = [f"folder/{place}: {value!r} is ignored" for place in (*places, "generation_config.json: eos_token_id")]
    assert sorted(note.partition(" is ignored")[0] + " is ignored" for note in notes) == (
        sorted(expected) if noted else []
    )
    assert all(note.endswith("the vocabulary has the ids 0 to 257") for note in notes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "bert"}, "model_type 'bert' is not supported; expected one of granite, llama, mistral, qwen2"),
        ({"model_type": "gpt_neox"}, "'gpt_neox', which runs attention and MLP side by side and rotates a part of"),
        ({"model_type": "mixtral"}, "model_type 'mixtral', which is a Mistral with experts, is not supported"),
        ({"model_type": "gemma3_text"}, "'gemma3_text', which has norms after each part and two rotary bases, is not"),
        ({"model_type": "olmo2"}, "'olmo2', which is a Llama with norms after each part instead of before it, is not"),
        ({"model_type": "arcee"}, "'arcee', which is a Llama whose MLP has no gate and squares its ReLU, is not"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "has quantization_config: the model is quantised already"),
        ({"num_local_experts": 8}, "has num_local_experts: the model has experts"),
        ({"sliding_window": 128}, "has sliding_window, which is not supported for a granite model"),
        ({"rope_scaling": {"type": "yarn"}}, "RoPE scaling 'yarn' lacks 'factor'; complete config.json"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}}, "'yarn' with truncate false is not"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "RoPE scaling 'longrope' is not supported; expected one of default, linear, llama3, yarn, dynamic",
        ),
        ({"final_logit_softcapping": 30.0}, "has final_logit_softcapping: the model limits its logits"),
        ({"clip_qkv": 8.0}, "has clip_qkv: the model clips queries, keys and values"),
        ({"model_type": "mistral", "hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; expected 'silu'"),
        ({"model_type": "mistral", "layer_types": ["full_attention", "sliding_attention"]}, "has layer_types of sev"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["full_attention"]}, "of 1 blocks, exp"),
        ({"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["x", "y"]}, "attention of type 'x'"),
        ({"model_type": "granitemoehybrid"}, "num_local_experts 8: Granite 4 with experts is not supported; give a"),
        (
            {"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["mamba", "attention"]},
            "has blocks of type mamba: hybrids are not supported; give a dense Granite 4, such as granite-4.0-micro",
        ),
        (
            {"model_type": "granitemoehybrid", "num_local_experts": 0, "layer_types": ["attention"] * 2},
            "position_embedding_type None is not supported; expected 'rope'",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "RoPE scaling 'llama3' lacks 'low_freq_factor'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "RoPE scaling 'linear' lacks 'factor'; complete config.json"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor: expected at least 1, found 0.5"),
        ({"rope_scaling": "linear"}, "rope_scaling: expected an object, found 'linear'"),
        ({"rope_theta": "many"}, "config.json: "),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1 is not supported"),
        ({"hidden_size": None}, "hidden_size: expected an integer, found None"),
        ({"vocab_size": "258"}, "vocab_size: expected an integer, found '258'"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3 does not divide the 4 attention heads"),
        ({"head_dim": 7}, "head_dim: expected an even size"),
        ({"head_dim": "eight"}, "config.json: "),
        ({"rms_norm_eps": "tiny"}, "rms_norm_eps: expected a number, found 'tiny'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: expected more than 0"),
        ({"logits_scaling": 0}, "logits_scaling: expected another number than 0"),
        ({"embedding_multiplier": [1]}, "embedding_multiplier: expected a number"),
        ({"attention_multiplier": float("nan")}, "attention_multiplier: expected a finite number"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(words)) as error:
        read(**changes)
    assert str(error.value).startswith("folder: ") and "\n" not in str(error.value)
