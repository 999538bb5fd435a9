"""What the converters write for each `model_type`: config.json as transformers reads it, and what a family cannot say."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from mpo_formats import Architecture, ConfigError, Rope
from mpo_formats.architecture import ModelType

CLASSES: dict[ModelType, str] = {
    "granite": "GraniteForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "granitemoehybrid": "GraniteMoeHybridForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM",
}
MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
MULTIPLIED = ("granite", "granitemoehybrid")
# Families whose attention has biases, or none, whatever config.json says; those not named have a setting.
BIASES = {"mistral": False, "qwen2": True, "gpt_neo": True}
# Families whose MLP may have biases.
MLP_BIASES = ("granite", "llama")
# Families in which a block may attend to a window; in those of EACH_BLOCK it is a matter of the block.
EACH_BLOCK = ("qwen2", "qwen3", "gpt_neo")
# Settings that Llama and the families like it have in common; their names in config.json are ours.
SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "pad_token_id",
)


def require_expressible(
    architecture: Architecture, name: str, target: str, kinds: Collection[str] = tuple(CLASSES), *, windows: bool = True
) -> None:
    """Raises ConfigError for an architecture that a converter does not write, or that its family cannot say.

    Args:
        name, target: the file and the format, for messages.
        kinds: the families that the converter writes.
        windows: whether the format holds windows of attention.
    """
    kind = architecture.model_type
    if kind not in kinds:
        raise ConfigError(
            f"{name}: model_type {kind} cannot be written as {target} yet; expected one of {', '.join(kinds)}"
        )
    for key, expected in fixed_settings(architecture).items():
        found = getattr(architecture, key)
        if abs(found - expected) > 1e-6 * abs(expected):
            shown = [str(value) if isinstance(value, bool) else f"{value:g}" for value in (found, expected)]
            raise ConfigError(f"{name}: {key} is {shown[0]}: a {kind} in {target} has {shown[1]}")
    sizes = set(block_windows(architecture))
    if sizes != {0} and not windows:
        raise ConfigError(
            f"{name}: its blocks attend to windows of positions, which {target} cannot hold yet; use to-hf"
        )
    if kind not in EACH_BLOCK and sizes != {0} and (kind != "mistral" or len(sizes) > 1):
        raise ConfigError(
            f"{name}: windows are {list(architecture.windows)}: a {kind} in {target} has "
            f"{'one window for all blocks' if kind == 'mistral' else 'none'}"
        )
    if len(sizes - {0}) > 1:
        raise ConfigError(
            f"{name}: windows are {list(architecture.windows)}: a {kind} in {target} has one size of them"
        )


def fixed_settings(architecture: Architecture) -> dict[str, float]:
    """The settings that every model of the family has, with what they are."""
    kind, heads = architecture.model_type, architecture.num_attention_heads
    fixed: dict[str, float] = {}
    if kind not in MULTIPLIED:
        scale = 1.0 if kind == "gpt_neo" else architecture.head_dim**-0.5
        fixed = dict(zip(MULTIPLIERS, (1.0, 1.0, scale, 1.0), strict=True))
    if kind in BIASES:
        fixed["attention_bias"] = BIASES[kind]
    if kind not in MLP_BIASES:
        fixed["mlp_bias"] = kind == "gpt_neo"
    if kind == "gpt_neo":
        fixed |= {"num_key_value_heads": heads, "head_dim": architecture.hidden_size / heads}
    return fixed


def block_windows(architecture: Architecture) -> list[int]:
    """The window of each block, 0 for none."""
    return [architecture.window(block) for block in range(architecture.num_hidden_layers)]


def model_config(architecture: Architecture, dtype: str) -> dict[str, Any]:
    """The content of config.json.

    Args:
        dtype: torch's name of the type of what is stored as floats, such as `bfloat16`.
    """
    kind, ends = architecture.model_type, list(architecture.eos_token_ids)
    config: dict[str, Any] = {
        "architectures": [CLASSES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "torch_dtype": dtype,  # the name before transformers 5
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
    }
    if kind == "gpt_neo":
        return config | neo_settings(architecture)
    config |= {
        "hidden_act": "silu",
        "rope_theta": architecture.rope.theta,
        "rope_scaling": rope_scaling(architecture.rope),
    }
    own = [
        *(MULTIPLIERS if kind in MULTIPLIED else ()),
        *(() if kind in BIASES else ("attention_bias",)),
        *(("mlp_bias",) if kind in MLP_BIASES else ()),
    ]
    config |= {key: getattr(architecture, key) for key in (*SHARED, *own)}
    windows = block_windows(architecture)
    if kind == "mistral":
        config["sliding_window"] = windows[0] or None
    elif kind in EACH_BLOCK:
        config |= {
            "use_sliding_window": any(windows),
            "sliding_window": max(windows) or None,
            "max_window_layers": next((block for block, window in enumerate(windows) if window), len(windows)),
            "layer_types": ["sliding_attention" if window else "full_attention" for window in windows],
        }
    elif kind == "granitemoehybrid":
        config |= dense_settings(architecture)
    return config


def neo_settings(architecture: Architecture) -> dict[str, Any]:
    """The settings of a GPT-Neo, under its own names."""
    windows = block_windows(architecture)
    plain = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "tie_word_embeddings")
    return {
        **{key: getattr(architecture, key) for key in (*plain, "bos_token_id", "pad_token_id")},
        "num_layers": architecture.num_hidden_layers,
        "num_heads": architecture.num_attention_heads,
        "layer_norm_epsilon": architecture.rms_norm_eps,
        "activation_function": "gelu_new",
        "attention_types": [[["local" if window else "global" for window in windows], 1]],
        "window_size": max(windows) or 256,
    }


def dense_settings(architecture: Architecture) -> dict[str, Any]:
    """What a dense Granite 4 has beside Granite 3: no experts, and state space blocks of a valid size that no block uses."""
    return {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": architecture.intermediate_size,
        "layer_types": ["attention"] * architecture.num_hidden_layers,
        "position_embedding_type": "rope",
        "mamba_expand": 2,
        "mamba_n_heads": 1,
        "mamba_d_head": 2 * architecture.hidden_size,
    }


def rope_scaling(rope: Rope) -> dict[str, Any] | None:
    """The entry `rope_scaling` of config.json."""
    if rope.scaling == "default":
        return None
    settings: dict[str, Any] = {"rope_type": rope.scaling, "factor": rope.factor}
    if rope.scaling == "llama3":
        settings |= {
            key: getattr(rope, key)
            for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        }
    elif rope.scaling == "yarn":
        settings |= {
            "beta_slow": rope.low_freq_factor,
            "beta_fast": rope.high_freq_factor,
            "original_max_position_embeddings": rope.original_max_position_embeddings,
            "attention_factor": rope.attention_factor,
        }
    return settings
