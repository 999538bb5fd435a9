"""Turns a Hugging Face config.json into an Architecture; settings that the forward pass lacks are refused by name."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mpo_formats import Architecture, CheckpointError, FormatError, Rope

log = logging.getLogger(__name__)
REFUSED = {
    "quantization_config": "is quantised already; give the unquantised model",
    "num_local_experts": "has experts, which are not supported yet",
    "sliding_window": "uses sliding-window attention, which is not supported yet",
}
SUPPORTED = ("granite", "llama")


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
        raise CheckpointError(f"{where}: model_type {kind!r} is not supported; expected one of {', '.join(SUPPORTED)}")
    for key, reason in REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"{where}: config.json has {key}: the model {reason}")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise CheckpointError(f"{where}: hidden_act {activation!r} is not supported; expected 'silu'")
    granite = kind == "granite"
    try:
        heads = integer(config, "num_attention_heads", where)
        hidden = integer(config, "hidden_size", where)
        vocabulary = integer(config, "vocab_size", where)
        ends = {"config.json": config.get("eos_token_id"), "generation_config.json": generation.get("eos_token_id")}
        head_dim = config.get("head_dim") or hidden // max(heads, 1)
        return Architecture(
            model_type=kind,
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=integer(config, "intermediate_size", where),
            num_hidden_layers=integer(config, "num_hidden_layers", where),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(head_dim),
            max_position_embeddings=int(number(config, "max_position_embeddings", 2048, where)),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6, where),
            rope=rope_from_config(config, where),
            embedding_multiplier=number(config, "embedding_multiplier", 1.0, where) if granite else 1.0,
            residual_multiplier=number(config, "residual_multiplier", 1.0, where) if granite else 1.0,
            attention_multiplier=number(config, "attention_multiplier", 1.0, where) if granite else head_dim**-0.5,
            logits_scaling=number(config, "logits_scaling", 1.0, where) if granite else 1.0,
            attention_bias=bool(config.get("attention_bias", False)),
            mlp_bias=bool(config.get("mlp_bias", False)),
            # transformers' defaults, for configs that leave it out
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=special_token(config.get("bos_token_id"), vocabulary, f"{where}/config.json: bos_token_id"),
            eos_token_ids=end_tokens(ends, vocabulary, where),
            pad_token_id=special_token(config.get("pad_token_id"), vocabulary, f"{where}/config.json: pad_token_id"),
        )
    except (FormatError, TypeError, ValueError) as error:  # the last two: text or null where a number belongs
        raise CheckpointError(f"{where}: config.json: {error}") from None


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

    Raises:
        CheckpointError: for a scaling that is not `default`, `linear` or `llama3`.
    """
    settings: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        given = config.get(key) or {}
        if not isinstance(given, Mapping):
            raise CheckpointError(f"{where}: config.json: {key}: expected an object, found {given!r}")
        settings.update(given)
    kind: Any = settings.get("rope_type") or settings.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"{where}: RoPE scaling {kind!r} is not supported; expected default, linear or llama3")
    for source in (settings, config):
        if source.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{where}: partial_rotary_factor other than 1 is not supported")
    theta = settings.get("rope_theta", config.get("rope_theta", 10000.0))
    try:
        return Rope(
            theta=float(theta),
            scaling=kind,
            factor=float(settings["factor"]) if kind != "default" else 1.0,
            low_freq_factor=float(settings["low_freq_factor"]) if kind == "llama3" else 0.0,
            high_freq_factor=float(settings["high_freq_factor"]) if kind == "llama3" else 0.0,
            original_max_position_embeddings=(
                int(settings["original_max_position_embeddings"]) if kind == "llama3" else 0
            ),
        )
    except KeyError as error:
        raise CheckpointError(f"{where}: RoPE scaling {kind!r} lacks {error}; complete config.json") from None
