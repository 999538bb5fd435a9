"""Which class runs a model_type."""

from __future__ import annotations

from mpo_formats import Architecture
from mpo_formats.architecture import ModelType
from mpo_runtime.backends.ops import Ops
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.models.granite import Granite
from mpo_runtime.models.llama import Llama

MODELS: dict[ModelType, type[Decoder]] = {"granite": Granite, "llama": Llama}


def decoder_for(architecture: Architecture, ops: Ops) -> Decoder:
    """The forward pass of an architecture over a backend."""
    return MODELS[architecture.model_type](architecture, ops)
