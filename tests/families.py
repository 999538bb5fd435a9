"""Small random models of every family, as transformers writes them: the oracle, and folders for tests of everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from tests.helpers import BOS, EOS, VOCABULARY, Config, byte_tokenizer, granite_config

logging.set_verbosity_error()
logging.disable_progress_bar()

LLAMA_LIKE = dict.fromkeys(
    ("embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling", "mlp_bias")
)
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
NEO: Config = {
    "model_type": "gpt_neo",
    "architectures": ["GPTNeoForCausalLM"],
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "attention_types": [[["global", "local"], 1]],
    "window_size": 6,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
# What the config.json of each family has beside the settings of a Llama.
OWN: dict[str, Config] = {
    "granite": {},
    "llama": {},
    "mistral": {"sliding_window": 6, "attention_bias": None},
    "qwen2": {"attention_bias": None, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    "qwen3": {"head_dim": 16, "use_sliding_window": False},
    "granitemoehybrid": {
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "layer_types": ["attention"] * 2,
        "position_embedding_type": "rope",
        "shared_intermediate_size": 48,
        "intermediate_size": 7,
        "mamba_n_heads": 8,
        "mlp_bias": None,
    },
}
EVERY = (*OWN, "gpt_neo")
# Those that have no tests of their own in test_decoder.py.
FAMILIES = EVERY[2:]


def family_config(kind: str, **changes: Any) -> Config:
    """The config.json of a tiny model of a family; None removes a key."""
    if kind == "gpt_neo":
        config = NEO | changes
        return {key: value for key, value in config.items() if value is not None}
    plain = {} if kind.startswith("granite") else LLAMA_LIKE
    changes = {"model_type": kind, "architectures": None, **plain, **OWN[kind], **changes}
    config = granite_config(**changes)
    return config | {key: None for key in ("sliding_window",) if key in changes and changes[key] is None}


def oracle_model(folder: Path, config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """The model of transformers with such a config.json, with random weights that keep activations around 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder), dtype=torch.float32, attn_implementation="eager"
    )
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=source)
            if parameter.ndim == 1:
                values = 0.2 * values + (1 if name.endswith("weight") else 0)
            elif any(part in name for part in ("embed_tokens", "lm_head", "wte")):
                values = 0.7 * values
            elif "wpe" not in name:
                values = values / parameter.shape[1] ** 0.5
            parameter.copy_(values)
    return model.eval()


def write_family(folder: Path, config: Mapping[str, Any], seed: int = 0) -> PreTrainedModel:
    """Writes such a model as a folder, with config.json as it is given and a byte-level tokenizer; returns the oracle."""
    model = oracle_model(folder, config, seed)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items() if name not in tied}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True, "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return model
