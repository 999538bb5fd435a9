"""Which class runs a model_type."""

from __future__ import annotations

from mpo_formats import Architecture
from mpo_formats.architecture import ModelType
from mpo_runtime.backends.ops import Ops
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.gpt_neo import GptNeo
from mpo_runtime.models.granite import Granite
from mpo_runtime.models.granitemoehybrid import GraniteMoeHybrid
from mpo_runtime.models.llama import Llama
from mpo_runtime.models.mistral import Mistral
from mpo_runtime.models.qwen2 import Qwen2
from mpo_runtime.models.qwen3 import Qwen3

MODELS: dict[ModelType, type[Decoder]] = {
    "granite": Granite,
    "llama": Llama,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "granitemoehybrid": GraniteMoeHybrid,
    "gpt_neo": GptNeo,
}


def decoder_for(architecture: Architecture, ops: Ops) -> Decoder:
    """The forward pass of an architecture over a backend."""
    return MODELS[architecture.model_type](architecture, ops)
