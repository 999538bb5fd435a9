"""Turns a Hugging Face config.json into an Architecture; settings that the forward pass lacks are refused by name."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, get_args

from mpo_formats import Architecture, CheckpointError, FormatError, Rope
from mpo_formats.architecture import ModelType

log = logging.getLogger(__name__)
SUPPORTED: tuple[ModelType, ...] = get_args(ModelType)
MULTIPLIED = ("granite", "granitemoehybrid")
# Families that are close to one that runs, and what they have beside it.
CLOSE = {
    "mixtral": "is a Mistral with experts",
    "ministral": "is a Mistral with windows in some of its blocks",
    "mistral3": "is a Mistral with images",
    "mistral4": "is a Mistral with experts and compressed keys and values",
    "qwen": "multiplies its MLP and packs its projections otherwise than Qwen 2",
    "qwen2_moe": "is a Qwen 2 with experts",
    "qwen2_vl": "is a Qwen 2 with images",
    "qwen2_5_vl": "is a Qwen 2 with images",
    "qwen3_moe": "is a Qwen 3 with experts",
    "qwen3_next": "has linear attention and experts beside Qwen 3's blocks",
    "qwen3_vl": "is a Qwen 3 with images",
    "llama4": "has experts, and blocks without rotary positions",
    "mllama": "is a Llama with images",
    "granitemoe": "is a Granite with experts",
    "granitemoeshared": "is a Granite with experts",
    "granite_speech": "is a Granite with speech",
    "gpt_neox": "runs attention and MLP side by side and rotates a part of each head, unlike GPT-Neo",
    "gptj": "runs attention and MLP side by side and rotates a part of each head, unlike GPT-Neo",
    "gpt2": "packs its projections and scales its scores, unlike GPT-Neo",
    "phi3": "packs its projections as one matrix, unlike Llama",
    "smollm3": "is a Llama whose fourth blocks have no rotary positions",
    "gemma": "is a Llama with GELU and norms that add 1 to their weights",
    "gemma2": "has norms after each part and limited logits",
    "gemma3": "has norms after each part and two rotary bases",
    "gemma3_text": "has norms after each part and two rotary bases",
    "olmo": "is a Llama whose norms have no weights",
    "olmo2": "is a Llama with norms after each part instead of before it",
    "olmo3": "is a Llama with norms after each part instead of before it",
    "exaone4": "is a Llama with norms after each part instead of before it",
    "glm4": "has norms before and after each part and rotates a part of each head",
    "arcee": "is a Llama whose MLP has no gate and squares its ReLU",
    "nemotron": "has an MLP without a gate that squares its ReLU, and norms that add 1 to their weights",
    "apertus": "has an MLP without a gate, and an activation of its own",
    "helium": "is a Llama that rotates neighbouring numbers of a head",
    "seed_oss": "is a Llama with biases of q, k and v alone",
    "hunyuan_v1_dense": "norms queries and keys after rotating them, unlike Qwen 3",
    "internlm2": "is a Llama that packs its queries, keys and values as one matrix",
    "starcoder2": "has LayerNorm, and an MLP without a gate",
    "stablelm": "has LayerNorm, and rotates a part of each head",
    "cohere": "runs attention and MLP side by side",
    "cohere2": "runs attention and MLP side by side",
    "phi": "runs attention and MLP side by side and rotates a part of each head",
    "deepseek_v2": "has experts and compressed keys and values",
    "deepseek_v3": "has experts and compressed keys and values",
    "gpt_oss": "has experts, and attention that may attend to nothing",
}
# Settings by which a model of a known family differs.
REFUSED = {
    "quantization_config": "is quantised already; give the unquantised model",
    "num_local_experts": "has experts, which are not supported yet",
    "num_experts": "has experts, which are not supported yet",
    "attn_logit_softcapping": "limits its attention scores, which is not supported",
    "final_logit_softcapping": "limits its logits, which is not supported",
    "clip_qkv": "clips queries, keys and values, which is not supported",
    "use_qk_norm": "norms queries and keys, which this family does not",
    "no_rope_layers": "has blocks without rotary positions, which are not supported",
}
# The names of GPT-Neo's settings, by ours.
NEO = {
    "num_attention_heads": "num_heads",
    "num_hidden_layers": "num_layers",
    "rms_norm_eps": "layer_norm_epsilon",
    "hidden_act": "activation_function",
}
ROPE_SCALINGS = ("default", "linear", "llama3", "yarn", "dynamic")
# Families whose attention has biases, or none, whatever config.json says.
BIASES = {"mistral": False, "qwen2": True, "gpt_neo": True}
# The context that transformers takes where config.json names none, if not 2,048.
CONTEXTS = {"mistral": 131072, "qwen2": 32768, "qwen3": 32768}
# GELU in its approximation by tanh.
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def architecture_from_config(config: Mapping[str, Any], generation: Mapping[str, Any], where: str) -> Architecture:
    """Reads sizes, multipliers, RoPE settings and special tokens.

    Args:
        config: the content of config.json, with either spelling of the RoPE settings.
        generation: the content of generation_config.json; its end-of-text ids are added to those of the config.
            Special tokens with an id that the vocabulary does not have are ignored with a note.
        where: the folder, for messages.

    Raises:
        CheckpointError: naming the key that is missing, unknown or unsupported.
    """
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        why = f", which {CLOSE[kind]}," if kind in CLOSE else ""
        raise CheckpointError(
            f"{where}: model_type {kind!r}{why} is not supported; expected one of {', '.join(SUPPORTED)}"
        )
    if kind == "gpt_neo":
        config = neo_config(config)
    elif kind == "granitemoehybrid":
        config = dense_granite_config(config, where)
    for key, reason in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{where}: config.json has {key}: the model {reason}")
    expected = TANH_GELU if kind == "gpt_neo" else ("silu", "swish")
    activation = config.get("hidden_act", expected[0])
    if activation not in expected:
        raise CheckpointError(f"{where}: hidden_act {activation!r} is not supported; expected {expected[0]!r}")
    try:
        return read_settings(kind, config, generation, where)
    except (FormatError, TypeError, ValueError) as error:  # the last two: text or null where a number belongs
        raise CheckpointError(f"{where}: config.json: {error}") from None


def read_settings(
    kind: ModelType, config: Mapping[str, Any], generation: Mapping[str, Any], where: str
) -> Architecture:
    """The architecture of a supported family from its settings under Llama's names."""
    heads = integer(config, "num_attention_heads", where)
    hidden = integer(config, "hidden_size", where)
    vocabulary = integer(config, "vocab_size", where)
    ends = {"config.json": config.get("eos_token_id"), "generation_config.json": generation.get("eos_token_id")}
    # transformers' default, for configs that leave it out
    default = 128 if kind == "qwen3" else hidden // max(heads, 1)
    head_dim = int(config.get("head_dim") or default)
    multiplied = kind in MULTIPLIED
    scale = 1.0 if kind == "gpt_neo" else head_dim**-0.5
    return Architecture(
        model_type=kind,
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=integer(config, "intermediate_size", where),
        num_hidden_layers=integer(config, "num_hidden_layers", where),
        num_attention_heads=heads,
        num_key_value_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=head_dim,
        max_position_embeddings=int(number(config, "max_position_embeddings", CONTEXTS.get(kind, 2048), where)),
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6, where),
        rope=rope_from_config(config, where),
        embedding_multiplier=number(config, "embedding_multiplier", 1.0, where) if multiplied else 1.0,
        residual_multiplier=number(config, "residual_multiplier", 1.0, where) if multiplied else 1.0,
        attention_multiplier=number(config, "attention_multiplier", 1.0, where) if multiplied else scale,
        logits_scaling=number(config, "logits_scaling", 1.0, where) if multiplied else 1.0,
        attention_bias=bool(BIASES.get(kind, config.get("attention_bias", False))),
        mlp_bias=kind == "gpt_neo" or (kind in ("granite", "llama") and bool(config.get("mlp_bias", False))),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", kind == "gpt_neo")),
        bos_token_id=special_token(config.get("bos_token_id"), vocabulary, f"{where}/config.json: bos_token_id"),
        eos_token_ids=end_tokens(ends, vocabulary, where),
        pad_token_id=special_token(config.get("pad_token_id"), vocabulary, f"{where}/config.json: pad_token_id"),
        windows=read_windows(kind, config, where),
    )


def neo_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """GPT-Neo's settings under Llama's names."""
    named = {ours: config[theirs] for ours, theirs in NEO.items() if theirs in config}
    inner = config.get("intermediate_size")
    if inner is None and isinstance(config.get("hidden_size"), int):
        inner = 4 * config["hidden_size"]
    return {"rms_norm_eps": 1e-5, **config, **named, "intermediate_size": inner}


def dense_granite_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The settings of a dense Granite 4 under Granite's names.

    Raises:
        CheckpointError: for one with experts or state space blocks, or without rotary positions.
    """
    experts = config.get("num_local_experts", 8)
    if experts:
        raise CheckpointError(
            f"{where}: config.json has num_local_experts {experts}: Granite 4 with experts is not supported; "
            "give a dense one, such as granite-4.0-micro"
        )
    blocks = config.get("layer_types") or config.get("layers_block_type") or ["mamba"]
    others = sorted({str(block) for block in blocks} - {"attention", "full_attention"})
    if others:
        raise CheckpointError(
            f"{where}: config.json has blocks of type {others[0]}: hybrids are not supported; "
            "give a dense Granite 4, such as granite-4.0-micro"
        )
    positions = config.get("position_embedding_type")
    if positions != "rope":
        raise CheckpointError(
            f"{where}: position_embedding_type {positions!r} is not supported; expected 'rope'; give another model"
        )
    return {**config, "intermediate_size": config.get("shared_intermediate_size", 1024)}


def read_windows(kind: ModelType, config: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The windows of the blocks, 0 for none, as the shortest list that repeats; empty where none is shorter than the context.

    Raises:
        CheckpointError: for blocks of an unknown kind, or a window in a family that has none.
    """
    blocks, context = integer(config, "num_hidden_layers", where), config.get("max_position_embeddings", math.inf)
    if kind == "gpt_neo":
        types = config.get("attention_types") or [[["global", "local"], 12]]
        kinds = [str(name) for names, count in types for _ in range(count) for name in names]
        window = int(config.get("window_size", 256))
    elif kind in ("qwen2", "qwen3"):
        window = int(config.get("sliding_window", 4096) or 0) if config.get("use_sliding_window") else 0
        full = int(config.get("max_window_layers", 28))
        default = ["full_attention" if block < full else "sliding_attention" for block in range(blocks)]
        kinds = [str(name) for name in config.get("layer_types") or default] if window else ["global"] * blocks
    else:
        window = int(config.get("sliding_window", 4096 if kind == "mistral" else 0) or 0)
        kinds = ["local"] * blocks
        if window and (kind != "mistral" or len(set(config.get("layer_types") or ())) > 1):
            found = "sliding_window" if kind != "mistral" else "layer_types of several kinds"
            raise CheckpointError(f"{where}: config.json has {found}, which is not supported for a {kind} model")
    if len(kinds) != blocks:
        raise CheckpointError(f"{where}: config.json names the attention of {len(kinds)} blocks, expected {blocks}")
    unknown = sorted(set(kinds) - {"global", "full_attention", "local", "sliding_attention"})
    if unknown:
        raise CheckpointError(f"{where}: config.json has attention of type {unknown[0]!r}, which is not supported")
    windows = [window if name in ("local", "sliding_attention") and window < context else 0 for name in kinds]
    if not any(windows):
        return ()
    length = next(n for n in range(1, blocks + 1) if windows == [windows[b % n] for b in range(blocks)])
    return tuple(windows[:length])


def integer(config: Mapping[str, Any], key: str, where: str) -> int:
    """A required integer of the config; raises CheckpointError naming the key."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(f"{where}: config.json: {key}: expected an integer, found {value!r}")
    return value


def number(config: Mapping[str, Any], key: str, default: float, where: str) -> float:
    """A number of the config, or its default; raises CheckpointError naming the key."""
    value = config.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"{where}: config.json: {key}: expected a number, found {value!r}")
    return float(value)


def special_token(value: Any, vocabulary: int, where: str) -> int | None:
    """The id of a special token, None where the value is none; one that the model cannot meet is ignored with a note.

    Files say that there is no such token by null, by an empty text, or by -1 (Meta's Llama).
    """
    if value is None or value == "":
        return None
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    if isinstance(whole, int) and not isinstance(whole, bool) and 0 <= whole < vocabulary:
        return whole
    log.warning("%s: %r is ignored: the vocabulary has the ids 0 to %d", where, value, vocabulary - 1)
    return None


def end_tokens(values: Mapping[str, Any], vocabulary: int, where: str) -> tuple[int, ...]:
    """All end-of-text ids that the files give, as an id, a list of ids or nothing; each once, in order."""
    found = [
        special_token(token, vocabulary, f"{where}/{file}: eos_token_id")
        for file, value in values.items()
        for token in (value if isinstance(value, list) else [value])
    ]
    return tuple(dict.fromkeys(token for token in found if token is not None))


def rope_from_config(config: Mapping[str, Any], where: str) -> Rope:
    """Reads RoPE settings: rope_theta beside rope_scaling, or rope_parameters as transformers 5 writes them.

    `dynamic` changes nothing up to max_position_embeddings, where contexts end here, so it is read as none.

    Raises:
        CheckpointError: for a scaling that is not `default`, `linear`, `llama3`, `yarn` or `dynamic`.
    """
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{where}: config.json: {key}: expected an object, found {given!r}")
        settings.update(given)
    kind: Any = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ROPE_SCALINGS:
        raise CheckpointError(
            f"{where}: RoPE scaling {kind!r} is not supported; expected one of {', '.join(ROPE_SCALINGS)}"
        )
    for source in (settings, config):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{where}: partial_rotary_factor other than 1 is not supported")
    theta = float(settings.get("rope_theta", config.get("rope_theta", 10000.0)))
    try:
        if kind == "linear":
            return Rope(theta, "linear", float(settings["factor"]), 0.0, 0.0, 0)
        if kind == "llama3":
            low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
            length = int(settings["original_max_position_embeddings"])
            return Rope(theta, "llama3", float(settings["factor"]), low, high, length)
        if kind == "yarn":
            return yarn_from_config(theta, settings, config, where)
    except KeyError as error:
        raise CheckpointError(f"{where}: RoPE scaling {kind!r} lacks {error}; complete config.json") from None
    return Rope(theta, "default", 1.0, 0.0, 0.0, 0)


def yarn_from_config(theta: float, settings: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Rope:
    """The settings of YaRN, with transformers' defaults for those that are left out.

    Raises:
        CheckpointError: for a ramp whose ends are not whole numbers.
        KeyError: where the factor is missing.
    """
    if not settings.get("truncate", True):
        raise CheckpointError(f"{where}: RoPE scaling 'yarn' with truncate false is not supported")
    factor = float(settings["factor"])
    length = settings.get("original_max_position_embeddings") or config.get("max_position_embeddings", 2048)
    scale = settings.get("attention_factor")
    if scale is None:
        whole, part = settings.get("mscale"), settings.get("mscale_all_dim")
        scale = yarn_scale(factor, whole) / yarn_scale(factor, part) if whole and part else yarn_scale(factor, 1.0)
    slow, fast = settings.get("beta_slow") or 1.0, settings.get("beta_fast") or 32.0
    return Rope(theta, "yarn", factor, float(slow), float(fast), int(length), float(scale))


def yarn_scale(factor: float, share: float) -> float:
    """What YaRN multiplies queries and keys with for contexts that are `factor` times as long."""
    return 0.1 * share * math.log(factor) + 1.0 if factor > 1 else 1.0
