"""The plugin in vLLM itself: its layers against the reference, and whole models against ours. `make test-vllm` runs these."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpo_exporter.convert.hf import HfRequest, write_hf
from mpo_exporter.convert.vllm import write_vllm
from mpo_exporter.plan.options import Options
from mpo_exporter.source import embedded_model
from mpo_formats import ConfigError, LinearSpec, Mpo, Quantized, Term
from mpo_formats.architecture import EMBEDDING
from mpo_formats.layout import linear_tensors
from mpo_runtime.engine import Scheduler
from mpo_runtime.layers.linear import load_linear
from mpo_runtime.loading import load_network, open_weights
from mpo_runtime.measure import log_softmax, window_logits
from mpo_runtime.models.decoder import Decoder
from mpo_runtime.sampler import SamplingOptions
from mpo_runtime.weights.vllm_folder import flat_name, quantization_config
from mpo_vllm.split import Layer
from tests.formats.tiny import values
from tests.helpers import export_folder

pytest.importorskip("vllm", reason="vLLM is not installed here; make test-vllm runs these tests in .venv-vllm")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(1800)]
# Runs on any machine: vLLM's processes keep off each other's cores, and nothing is compiled before the first token.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
}
PROMPTS = [[0, 50, 60, 100, 2000, 400, 300, 77], [5, 6, 7, 8, 9, 10]]
BLOCK = "model.layers.0"
QKV = {"q": 64, "k": 32, "v": 32}
TERMS: dict[str, tuple[Term, ...]] = {
    f"{BLOCK}.self_attn.q_proj": (Quantized(4, 32, False), Mpo((8, 8), (8, 8), (4,), "f16", 0)),
    f"{BLOCK}.self_attn.k_proj": (Quantized(3, 16, True),),
    f"{BLOCK}.self_attn.v_proj": (Mpo((32, 1), (1, 64), (6,), "bf16", 0),),
    f"{BLOCK}.mlp.down_proj": (Quantized(5, 32, False),),
    EMBEDDING: (Quantized(8, 32, False),),
}
SIZES = {
    f"{BLOCK}.self_attn.q_proj": (64, 64),
    f"{BLOCK}.self_attn.k_proj": (32, 64),
    f"{BLOCK}.self_attn.v_proj": (32, 64),
    f"{BLOCK}.mlp.down_proj": (64, 96),
    EMBEDDING: (100, 64),
}


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


def layers() -> dict[str, Layer]:
    """Random layers of TERMS."""
    found = {}
    for name, terms in TERMS.items():
        spec = LinearSpec(name, *SIZES[name], None, terms)
        found[name] = Layer(spec, {tensor.name: values(tensor, 5) for tensor in linear_tensors(spec)})
    return found


def load(layer: Any, one: Layer, shard: Any = None) -> None:
    """Gives the tensors of a layer to vLLM's layer as its loader does."""
    for name, array in one.arrays.items():
        plain = torch.from_numpy(array.view(np.int16) if array.dtype == np.uint16 else array)
        tensor = plain.view(torch.bfloat16) if array.dtype == np.uint16 else plain
        parameter = getattr(layer, flat_name(one.spec.name, name).rpartition(".")[2])
        arguments = () if shard is None else (shard,)
        parameter.weight_loader(parameter, tensor, *arguments)


def reference(one: Layer) -> Tensor:
    """The matrix of a layer."""
    return load_linear(one, one.spec, chi=None, held=False, device=torch.device("cpu")).weight()  # type: ignore[arg-type]


def close(found: Tensor, expected: Tensor) -> None:
    """Compares to a thousandth of the largest value."""
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_a_fused_layer_has_a_container_for_each_matrix(plugin: Any) -> None:
    from vllm.model_executor.layers.linear import QKVParallelLinear

    own = layers()
    config = plugin.MpoConfig.from_config(quantization_config(one.spec for one in own.values()))
    layer = QKVParallelLinear(64, 16, 4, 2, bias=False, quant_config=config, prefix=f"{BLOCK}.self_attn.qkv_proj")
    names = [f"{BLOCK}.self_attn.{part}_proj" for part in "qkv"]
    for shard, name in zip("qkv", names, strict=True):
        load(layer, own[name], shard)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 3, 64)
    y, _ = layer(x)
    close(y, x @ torch.cat([reference(own[name]) for name in names]).T)
    assert [name for name, _ in layer.named_parameters()] == []  # the packed tensors are held once
    shape = torch.ops.vllm.mpo_linear(x.to("meta"), 0, 128)
    assert shape.shape == (2, 3, 128) and shape.device.type == "meta"


def test_rows_and_a_bias(plugin: Any) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    own = layers()[f"{BLOCK}.mlp.down_proj"]
    config = plugin.MpoConfig.from_config(quantization_config([own.spec]))
    layer = RowParallelLinear(96, 64, bias=True, quant_config=config, prefix=own.spec.name)
    load(layer, own)
    layer.bias.data.fill_(2.0)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(5, 96)
    close(layer(x)[0], x @ reference(own).T + 2)


def test_an_embedding_and_the_head_tied_to_it(plugin: Any) -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

    own = layers()[EMBEDDING]
    config = plugin.MpoConfig.from_config(quantization_config([own.spec]))
    table = VocabParallelEmbedding(100, 64, quant_config=config)
    head = ParallelLMHead(100, 64, quant_config=config, prefix="lm_head").tie_weights(table)
    load(table, own)
    for layer in (table, head):
        layer.quant_method.process_weights_after_loading(layer)
    ids = torch.tensor([[3, 99], [0, 3]])
    close(table(ids), reference(own)[ids])
    x = torch.randn(2, 64)
    logits = head.quant_method.apply(head, x, None)
    close(logits[:, :100], x @ reference(own).T)
    assert logits.shape == (2, 128) and not logits[:, 100:].any()  # vLLM pads vocabularies to 64


def test_what_is_missing_is_named(plugin: Any) -> None:
    from vllm.model_executor.layers.linear import RowParallelLinear

    own = layers()[f"{BLOCK}.mlp.down_proj"]
    config = plugin.MpoConfig.from_config(quantization_config([own.spec]))
    with pytest.raises(ConfigError, match=f"{BLOCK}.mlp.other: the folder's config.json has no such layer"):
        RowParallelLinear(96, 64, bias=False, quant_config=config, prefix=f"{BLOCK}.mlp.other")
    layer = RowParallelLinear(96, 64, bias=False, quant_config=config, prefix=own.spec.name)
    with pytest.raises(ConfigError, match=r"down_proj\.0\.q4: missing from the folder"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """granite-nano as integers, and with cores beside them; MPO_VLLM_FILE adds another model's file."""
    folder = tmp_path_factory.mktemp("files")
    found = {"integers": folder / "integers.mpo", "cores": folder / "cores.mpo"}
    export_folder(embedded_model(), found["integers"], Options("int4"))
    export_folder(embedded_model(), found["cores"], Options("corrected", chi=8))
    if other := os.environ.get("MPO_VLLM_FILE"):
        found["other"] = Path(other)
    for name, file in list(found.items()):
        write_vllm(file, folder / name, force=False)
        found[f"{name} folder"] = folder / name
    return found


def vllm(tmp_path: Path, folder: Path, prompts: list[list[int]], tokens: int, **options: Any) -> list[dict[str, Any]]:
    """What vLLM makes of a folder, in a process of its own."""
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps({"folder": str(folder), "prompts": prompts, "tokens": tokens, **options}))
    script = Path(__file__).with_name("generate.py")
    done = subprocess.run(
        [sys.executable, script, request, result],
        env=os.environ | ENVIRONMENT | {"MPO_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(result.read_text())
    return found


def ours(file: Path) -> Decoder:
    """Our model of a file, in float32."""
    return load_network(open_weights(file), kv_type="f32", activations="float")


def greedy(model: Decoder, prompt: list[int], count: int) -> list[int]:
    """Our tokens after a prompt."""
    steps = Scheduler(model).generate(prompt, SamplingOptions(temperature=0), max_tokens=count, stop_ids=())
    return [step.token for step in steps]


@pytest.mark.parametrize("name", ["integers", "cores", "other"])
def test_the_text_is_ours(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    if name not in files:
        pytest.skip("set MPO_VLLM_FILE to a .mpo file of another model")
    model = ours(files[name])
    found = vllm(tmp_path, files[f"{name} folder"], PROMPTS, 64)
    assert [one["tokens"] for one in found] == [greedy(model, prompt, 64) for prompt in PROMPTS]
    for one, prompt in zip(found, PROMPTS, strict=True):
        scores = log_softmax(window_logits(model, np.array(prompt)))
        expected = [scores[index, token] for index, token in enumerate(prompt[1:])]
        np.testing.assert_allclose(one["prompt_logprobs"], expected, atol=1e-3)


@pytest.mark.parametrize("name", ["integers", "cores"])
def test_two_ranks_write_what_one_writes(files: dict[str, Path], tmp_path: Path, name: str) -> None:
    found = vllm(tmp_path, files[f"{name} folder"], PROMPTS, 32, ranks=2)
    model = ours(files[name])
    assert [one["tokens"] for one in found] == [greedy(model, prompt, 32) for prompt in PROMPTS]


def test_sixteen_requests_at_once(files: dict[str, Path], tmp_path: Path) -> None:
    prompts = [[index + 5, 50 + index, 100, 2000 - index] for index in range(16)]
    found = vllm(tmp_path, files["integers folder"], prompts, 16)
    model = ours(files["integers"])
    assert [one["tokens"] for one in found] == [greedy(model, prompt, 16) for prompt in prompts]


def test_stock_vllm_loads_compressed_tensors(files: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    write_hf(HfRequest(files["integers"], tmp_path / "hf"))
    found = vllm(tmp_path, tmp_path / "hf", PROMPTS, 8, dtype="bfloat16")  # its kernel for CPUs runs bf16 only
    model = ours(files["integers"])
    assert [one["tokens"][:2] for one in found] == [greedy(model, prompt, 2) for prompt in PROMPTS]
