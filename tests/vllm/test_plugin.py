"""The plugin's layers in vLLM's own classes against the reference. `make test-vllm` runs these."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mpo_formats import ConfigError
from mpo_formats.architecture import EMBEDDING
from mpo_runtime.weights.vllm_folder import quantization_config
from mpo_vllm.split import Layer
from tests.vllm.cases import BLOCK, DOWN, ENVIRONMENT, GATE, KEY, QUERY, UP, VALUE, close, layers, load, reference

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs these tests in .venv-vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def plugin() -> Iterator[Any]:
    """The plugin's module, with vLLM's groups for one rank."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    os.environ |= ENVIRONMENT
    import mpo_vllm

    mpo_vllm.register()
    mpo_vllm.register()  # vLLM may call it again
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, "tcp://127.0.0.1:0", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
        yield importlib.import_module("mpo_vllm.plugin")
        cleanup_dist_env_and_memory()


@pytest.fixture(params=[False, True], ids=["as they are", "transformed"])
def own(request: pytest.FixtureRequest) -> dict[str, Layer]:
    """Layers of every kind of term."""
    return layers(transformed=request.param)


def test_a_fused_layer_has_a_container_for_each_matrix(plugin: Any, own: dict[str, Layer]) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    config = plugin.MpoConfig.from_config(quantization_config(one.spec for one in own.values()))
    layer = QKVParallelLinear(64, 16, 4, 2, bias=False, quant_config=config, prefix=f"{BLOCK}.self_attn.qkv_proj")
    names = [QUERY, KEY, VALUE]
    for shard, name in zip("qkv", names, strict=True):
        load(layer, own[name], shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 3, 64)
    y, _ = layer(x)
    close(y, x @ torch.cat([reference(own[name]) for name in names]).T)
    assert [name for name, _ in layer.named_parameters()] == []  # the packed tensors are held once
    shape = torch.ops.vllm.mpo_linear(x.to("meta"), 0, 128)
    assert shape.shape == (2, 3, 128) and shape.device.type == "meta"


def test_gate_and_up_are_told_by_numbers(plugin: Any, own: dict[str, Layer]) -> None:
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear

    config = plugin.MpoConfig.from_config(quantization_config(one.spec for one in own.values()))
    layer = MergedColumnParallelLinear(
        64, [96, 96], bias=False, quant_config=config, prefix=f"{BLOCK}.mlp.gate_up_proj"
    )
    for shard, name in enumerate((GATE, UP)):
        load(layer, own[name], shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 64)
    close(layer(x)[0], x @ torch.cat([reference(own[GATE]), reference(own[UP])]).T)


def test_rows_and_a_bias(plugin: Any, own: dict[str, Layer]) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    config = plugin.MpoConfig.from_config(quantization_config([own[DOWN].spec]))
    layer = RowParallelLinear(96, 64, bias=True, quant_config=config, prefix=DOWN)
    load(layer, own[DOWN])
    layer.bias.data.fill_(2.0)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 96)
    close(layer(x)[0], x @ reference(own[DOWN]).T + 2)


def test_an_embedding_and_the_head_tied_to_it(plugin: Any, own: dict[str, Layer]) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    config = plugin.MpoConfig.from_config(quantization_config([own[EMBEDDING].spec]))
    table = VocabParallelEmbedding(100, 64, quant_config=config)
    head = ParallelLMHead(100, 64, quant_config=config, prefix="lm_head").tie_weights(table)
    load(table, own[EMBEDDING])
    for layer in (table, head):
        layer.quant_method.process_weights_after_loading(layer)
    ids = torch.tensor([[3, 99], [0, 3]])
    close(table(ids), reference(own[EMBEDDING])[ids])
    x = torch.randn(2, 64)
    logits = head.quant_method.apply(head, x, None)
    close(logits[:, :100], x @ reference(own[EMBEDDING]).T)
    assert logits.shape == (2, 128) and not logits[:, 100:].any()  # vLLM pads vocabularies to 64


def test_what_is_missing_is_named(plugin: Any) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    config = plugin.MpoConfig.from_config(quantization_config([layers()[DOWN].spec]))
    with pytest.raises(ConfigError, match=f"{BLOCK}.mlp.other: the folder's config.json has no such layer"):
        RowParallelLinear(96, 64, bias=False, quant_config=config, prefix=f"{BLOCK}.mlp.other")
    layer = RowParallelLinear(96, 64, bias=False, quant_config=config, prefix=DOWN)
    with pytest.raises(ConfigError, match=r"down_proj\.0\.q4: missing from the folder"):
        layer.quant_method.process_weights_after_loading(layer)
