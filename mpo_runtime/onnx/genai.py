"""The files beside a graph with which onnxruntime-genai loads the folder: genai_config.json and the tokenizer's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpo_formats import Architecture, CheckpointError
from mpo_runtime.model import end_ids
from mpo_runtime.onnx.manifest import MODEL
from mpo_runtime.text.decode import decode_json
from mpo_runtime.text.files import REMEDY
from mpo_runtime.text.tokenizer import Tokenizer
from mpo_runtime.weights.protocol import Weights

CONFIG, GENERATION = "genai_config.json", "generation_config.json"
# What a model may bring besides its tensors; all of them are copied.
TEXT_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja", GENERATION)
# What generation_config.json may say about drawing tokens, and what holds where it does not.
DRAWING: dict[str, Any] = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}


def text_files(weights: Weights) -> dict[str, bytes]:
    """The tokenizer, its configuration and the chat template of a model, as far as it has them."""
    found = {name: weights.file(name) for name in TEXT_FILES}
    return {name: content for name, content in found.items() if content is not None}


def genai_config(architecture: Architecture, files: Mapping[str, bytes]) -> dict[str, Any]:
    """genai_config.json for a graph of this architecture, with the fields that onnxruntime-genai's own builder writes.

    Args:
        files: the model's files about text, by name.

    Raises:
        CheckpointError: where one of the files is damaged.
    """
    ends = end_ids(architecture.eos_token_ids, architecture.vocab_size, Tokenizer.from_files(files.get))
    content = files.get(GENERATION)
    drawing = decode_json(content, GENERATION, REMEDY, CheckpointError) if content else {}
    model = {
        "type": architecture.model_type,
        "bos_token_id": 1 if architecture.bos_token_id is None else architecture.bos_token_id,
        "eos_token_id": list(ends),
        "pad_token_id": architecture.pad_token_id if architecture.pad_token_id is not None else (*ends, 0)[0],
        "context_length": architecture.max_position_embeddings,
        "vocab_size": architecture.vocab_size,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            "filename": MODEL,
            "head_size": architecture.head_dim,
            "hidden_size": architecture.hidden_size,
            "num_attention_heads": architecture.num_attention_heads,
            "num_hidden_layers": architecture.num_hidden_layers,
            "num_key_value_heads": architecture.num_key_value_heads,
            "inputs": {
                "input_ids": "input_ids",
                "attention_mask": "attention_mask",
                "past_key_names": "past_key_values.%d.key",
                "past_value_names": "past_key_values.%d.value",
            },
            "outputs": {
                "logits": "logits",
                "present_key_names": "present.%d.key",
                "present_value_names": "present.%d.value",
            },
        },
    }
    search = {
        **{name: drawing.get(name, default) for name, default in DRAWING.items()},
        "diversity_penalty": 0.0,
        "early_stopping": True,
        "length_penalty": 1.0,
        "max_length": architecture.max_position_embeddings,
        "min_length": 0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": False,
    }
    return {"model": model, "search": search}
