"""Small shared builders: a random Granite or Llama folder written by hand, and a forward pass over it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.models.decoder import Decoder

if TYPE_CHECKING:
    from mpo_exporter.export import Listener, Result
    from mpo_exporter.heal.run import Healed
    from mpo_exporter.heal.settings import HealJob
    from mpo_exporter.plan.options import Options

# Matrices this small are multiplied faster by one thread, above all where others use the machine.
torch.set_num_threads(1)

BOS, EOS = 256, 257
VOCABULARY = 258
Config = dict[str, Any]


def granite_config(**changes: Any) -> Config:
    """The config.json of a tiny Granite; None removes a key."""
    config: Config = {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.25,
        "logits_scaling": 2.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    config |= changes
    return {key: value for key, value in config.items() if value is not None}


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that such a model has, as transformers names them."""
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    size = config.get("head_dim") or hidden // heads
    queries, keys = heads * size, config.get("num_key_value_heads", heads) * size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for block in range(config["num_hidden_layers"]):
        layer = f"model.layers.{block}"
        attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        mlp = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
        for group, parts in (("self_attn", attention), ("mlp", mlp)):
            for part, shape in parts.items():
                shapes[f"{layer}.{group}.{part}_proj.weight"] = shape
                if config.get("attention_bias" if group == "self_attn" else "mlp_bias"):
                    shapes[f"{layer}.{group}.{part}_proj.bias"] = shape[:1]
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    return shapes


def random_tensors(config: Mapping[str, Any], seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random weights of a size that keeps activations and logits around 1."""
    source = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = torch.randn(shape, generator=source)
        if name.endswith("norm.weight"):
            values = 1 + 0.2 * values
        elif len(shape) == 1:
            values = 0.2 * values
        elif "embed_tokens" in name or "lm_head" in name:
            values = 0.7 * values
        else:
            values = values / shape[1] ** 0.5
        tensors[name] = values.to(dtype)
    return tensors


def write_folder(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> Path:
    """Writes a random model as a Hugging Face folder with a byte-level tokenizer; returns the folder."""
    config = granite_config() if config is None else config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    write_weights(folder, random_tensors(config, seed, dtype), shards)
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    names = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def write_weights(folder: Path, tensors: Mapping[str, torch.Tensor], shards: int = 1) -> None:
    """Writes tensors into one safetensors file, or into several with an index, dealt in turn."""
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    names = [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]
    homes = {tensor: names[index % shards] for index, tensor in enumerate(tensors)}
    for name in names:
        save_file({tensor: tensors[tensor] for tensor in tensors if homes[tensor] == name}, folder / name)
    index = {"metadata": {"total_size": 0}, "weight_map": homes}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def byte_tokenizer() -> Tokenizer:
    """One token a byte, then <s> and </s>; <s> is put in front."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE({token: index for index, token in enumerate(alphabet)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(["<s>", "</s>"])
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return raw


def network(path: Path, **options: Any) -> Decoder:
    """The reference backend's model of a folder or file; whatever the backend, the KV cache is in float32."""
    return load_network(open_weights(path), **{"backend": "reference", "kv_type": "f32", **options})


def forward(model: Decoder, rows: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    """Logits [B, S, vocabulary] of rows of equal length, in one pass."""
    count = len(rows[0])
    cache = model.ops.new_cache(model.architecture, len(rows), count)
    hidden = model.hidden(model.ops.ids([list(row) for row in rows]), cache, [count] * len(rows))
    return model.ops.to_numpy(model.logits(hidden))


def some_ids(count: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[int]:
    """Random token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(0, vocabulary, count)]


def export_folder(
    folder: Path, target: Path, options: Options, *, listener: Listener | None = None, **task: Any
) -> Result:
    """Exports a Hugging Face folder; `task` are other fields of ExportTask."""
    from mpo_exporter.export import ExportTask, export
    from mpo_exporter.source import open_source

    with open_source(folder) as source:
        return export(source, ExportTask(target, options, **task), listener)


def heal_folder(teacher: Path, job: HealJob, **others: Any) -> Healed:
    """Heals a file against a Hugging Face folder; `others` are `workers` and `progress` of `heal`."""
    from mpo_exporter.heal.run import heal
    from mpo_exporter.source import open_source

    with open_source(teacher) as source:
        return heal(source, job, **others)
