"""vLLM's side of the plugin: the quantisation method `mpo`, its containers for weights, and the custom operations."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.parameter import BasevLLMParameter
from vllm.utils.torch_utils import direct_register_custom_op

from mpo_formats import ConfigError, LinearSpec
from mpo_formats.architecture import EMBEDDING, HEAD
from mpo_formats.layout import TensorSpec, term_tensors, transform_tensors
from mpo_runtime import native
from mpo_runtime.weights.vllm_folder import FUSED, METHOD, flat_name, plain_layers, read_layers
from mpo_vllm.products import Product, product
from mpo_vllm.split import Axis, Layer, share

# vLLM shows the messages of loggers below its own.
log = logging.getLogger("vllm.mpo")
TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "u8": torch.uint8}
# A module of vLLM, to which attributes are added.
LayerOfVllm = Any
SHARDS = {"q": 0, "k": 1, "v": 2}
# What the custom operations look up: a list of products for each layer, by a number that stays constant in compiled code.
PRODUCTS: dict[int, list[Product]] = {}
NUMBERS = iter(range(1 << 62))


class MpoConfig(QuantizationConfig):
    """What config.json says about the layers of a folder of `mpo-export to-vllm`."""

    def __init__(self, layers: dict[str, LinearSpec]) -> None:
        super().__init__()
        self.layers = layers
        self.plain = plain_layers(layers.values())
        self.packed_modules_mapping = {name: list(parts) for name, parts in FUSED.items()}

    def get_name(self) -> str:
        """The name of the method."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The types that vLLM may calculate in."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """The least compute capability of a GPU: that of vLLM itself."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file besides config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MpoConfig:
        """Reads the entry `quantization_config`; raises ConfigError for one that this version does not know."""
        return cls(read_layers(config))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method for a layer of vLLM, None for what holds no matrix."""
        if isinstance(layer, VocabParallelEmbedding):
            name = HEAD if isinstance(layer, ParallelLMHead) and HEAD in self.layers else EMBEDDING
            return UnquantizedEmbeddingMethod() if name in self.plain else MpoMethod([self.layers[name]])
        if not isinstance(layer, LinearBase):
            return None
        module, _, part = prefix.rpartition(".")
        names = [f"{module}.{other}" for other in self.packed_modules_mapping.get(part, [part])]
        missing = [name for name in names if name not in self.layers]
        if missing:
            raise ConfigError(f"{missing[0]}: the folder's config.json has no such layer; mpo-export to-vllm again")
        if all(name in self.plain for name in names):
            return UnquantizedLinearMethod()
        return MpoMethod([self.layers[name] for name in names])


class Container(BasevLLMParameter):
    """The place of one tensor, for each matrix of a fused layer apart: they differ in size and some do not have it."""

    def __new__(cls, dtype: torch.dtype) -> Container:
        """An empty parameter."""
        made: Container = super().__new__(cls, data=torch.empty(0, dtype=dtype))
        return made

    def __init__(self, dtype: torch.dtype) -> None:
        self.parts: dict[int, Tensor] = {}
        super().__init__(data=self.data, weight_loader=self.load)

    def load(self, _: nn.Parameter, loaded: Tensor, shard: str | int | None = None) -> None:
        """Keeps a tensor of the checkpoint; vLLM names the matrix in an argument or in an attribute of the tensor."""
        shard = getattr(loaded, "shard_id", None) if shard is None else shard
        number = 0 if shard is None else SHARDS[shard] if isinstance(shard, str) else shard
        self.parts[number] = loaded


class MpoMethod(LinearMethodBase):
    """Creates, loads and applies the terms of a layer, or of the layers that vLLM runs as one."""

    def __init__(self, specs: list[LinearSpec]) -> None:
        self.specs = specs

    def create_weights(
        self,
        layer: LayerOfVllm,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Registers a container for each tensor name, and what cuts each matrix for this rank."""
        layer.mpo_shares = [
            matrix_share(layer, index, spec, input_size_per_partition, output_partition_sizes[index])
            for index, spec in enumerate(self.specs)
        ]
        layer.mpo_outputs = sum(output_partition_sizes)
        layer.mpo_number = next(NUMBERS)
        layer.register_buffer("mpo_like", torch.empty(0, dtype=params_dtype), persistent=False)
        types = {name: tensor.dtype for spec in self.specs for name, tensor in parameter_tensors(spec).items()}
        for name, dtype in types.items():
            layer.register_parameter(name, Container(TYPES[dtype]))

    def process_weights_after_loading(self, layer: LayerOfVllm) -> None:
        """Cuts what was loaded for this rank, and makes it ready to be used."""
        if not hasattr(layer, "mpo_shares"):  # a head tied to the embedding, or processed before
            return
        device = layer.mpo_like.device
        exact = chosen_activations(layer.mpo_like.dtype) == "float"
        products = []
        for index, (spec, (axis, start, stop)) in enumerate(zip(self.specs, layer.mpo_shares, strict=True)):
            arrays = {}
            for parameter, tensor in parameter_tensors(spec).items():
                arrays[tensor.name] = as_array(getattr(layer, parameter).parts.get(index), tensor)
            if stop > start:
                products.append(product(share(Layer(spec, arrays), axis, start, stop), device, exact=exact))
        drop_containers(layer)
        PRODUCTS[layer.mpo_number] = products
        weakref.finalize(layer, PRODUCTS.pop, layer.mpo_number, None)
        del layer.mpo_shares

    def apply(self, layer: LayerOfVllm, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Maps x [..., in] to [..., out] of this rank."""
        owner = getattr(layer, "mpo_tied", (layer,))[0]
        y: Tensor = torch.ops.vllm.mpo_linear(x, owner.mpo_number, owner.mpo_outputs)
        return y if bias is None else y + bias

    def embedding(self, layer: LayerOfVllm, ids: Tensor) -> Tensor:
        """The rows of token ids."""
        found: Tensor = torch.ops.vllm.mpo_embedding(ids, layer.mpo_like, layer.mpo_number, self.specs[0].in_features)
        return found

    def tie_weights(self, layer: LayerOfVllm, embed_tokens: LayerOfVllm) -> LayerOfVllm:
        """Makes the head use the table of the embedding."""
        drop_containers(layer)
        del layer.mpo_shares
        layer.mpo_tied = (embed_tokens,)  # in a tuple, so that it is no module of the head
        return layer


def parameter_tensors(spec: LinearSpec) -> dict[str, TensorSpec]:
    """The tensors of a layer's terms and stored transform by the names of their parameters in vLLM's layer."""
    found = [] if spec.transform is None else list(transform_tensors(spec.transform))
    for index, term in enumerate(spec.terms):
        found += term_tensors(f"{spec.name}.{index}", term, spec.out_features, spec.in_features)
    return {flat_name(spec.name, tensor.name).rpartition(".")[2]: tensor for tensor in found}


def as_array(loaded: Tensor | None, tensor: TensorSpec) -> NDArray[Any]:
    """A loaded tensor in numpy; bf16 as uint16. Raises ConfigError for one that is missing or of another type or shape."""
    if loaded is None:
        raise ConfigError(f"{tensor.name}: missing from the folder; mpo-export to-vllm again")
    if loaded.dtype != TYPES[tensor.dtype] or tuple(loaded.shape) != tensor.shape:
        found = f"{loaded.dtype} {list(loaded.shape)}"
        raise ConfigError(f"{tensor.name}: expected {tensor}, found {found}; mpo-export to-vllm again")
    plain = loaded.detach().cpu()
    array: NDArray[Any] = plain.view(torch.uint16).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()
    return array


def matrix_share(layer: LayerOfVllm, index: int, spec: LinearSpec, inputs: int, outputs: int) -> tuple[Axis, int, int]:
    """Which rows or columns of a matrix this rank holds.

    Args:
        index: of the matrix in a fused layer; inputs, outputs: sizes of the rank's part, a vocabulary's with padding.
    """
    if isinstance(layer, VocabParallelEmbedding):
        vocabulary = layer.shard_indices
        return "rows", vocabulary.org_vocab_start_index, vocabulary.org_vocab_end_index
    rank = layer.tp_rank
    if inputs != spec.in_features:
        return "columns", rank * inputs, (rank + 1) * inputs
    if index and hasattr(layer, "num_kv_head_replicas"):  # keys and values of fewer heads than ranks are repeated
        rank //= layer.num_kv_head_replicas
    start = 0 if outputs == spec.out_features else rank * outputs
    return "rows", start, start + outputs


def drop_containers(layer: LayerOfVllm) -> None:
    """Takes the containers, and the tensors that they keep, off a layer."""
    for name in [name for name, parameter in layer.named_parameters(recurse=False) if isinstance(parameter, Container)]:
        delattr(layer, name)


def chosen_activations(dtype: torch.dtype) -> str:
    """What integers are multiplied with on a CPU: MPO_ACTIVATIONS, else float in float32 and int8 in half precision."""
    chosen = os.environ.get("MPO_ACTIVATIONS") or ("float" if dtype == torch.float32 else "int8")
    if chosen not in ("float", "int8"):
        raise ConfigError(f"MPO_ACTIVATIONS {chosen}: expected float or int8")
    return chosen


def mpo_linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """The custom operation of a layer: x [..., in] to [..., outputs], padding at the end 0."""
    flat = x.reshape(-1, x.shape[-1])
    parts = [one.apply(flat) for one in PRODUCTS[number]]
    padding = outputs - sum(part.shape[1] for part in parts)
    if padding:
        parts.append(flat.new_zeros(flat.shape[0], padding))
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return y.reshape(*x.shape[:-1], outputs)


def mpo_linear_shape(x: Tensor, number: int, outputs: int) -> Tensor:
    """What `mpo_linear` returns, in shape and type."""
    return x.new_empty(*x.shape[:-1], outputs)


def mpo_embedding(ids: Tensor, like: Tensor, number: int, width: int) -> Tensor:
    """The custom operation of an embedding: ids [...] to rows [..., width] of the type of `like`."""
    products = PRODUCTS[number]
    if not products:
        return like.new_zeros(*ids.shape, width)
    return products[0].rows(ids.reshape(-1), like.dtype).reshape(*ids.shape, width)


def mpo_embedding_shape(ids: Tensor, like: Tensor, number: int, width: int) -> Tensor:
    """What `mpo_embedding` returns, in shape and type."""
    return like.new_empty(*ids.shape, width)


def register_method() -> None:
    """Registers the operations and the method, once in a process."""
    operations: list[tuple[str, Callable[..., Tensor], Callable[..., Tensor]]] = [
        ("mpo_linear", mpo_linear, mpo_linear_shape),
        ("mpo_embedding", mpo_embedding, mpo_embedding_shape),
    ]
    for name, run, shape in operations:
        if not hasattr(torch.ops.vllm, name):
            direct_register_custom_op(name, run, fake_impl=shape)
    register_quantization_config(METHOD)(MpoConfig)
    how = "native kernels on a CPU" if native.available() else "torch on a CPU"
    log.info("mpo: integers and cores run on %s; on a GPU integers are dequantised at every use", how)
